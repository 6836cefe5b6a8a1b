//! The files that a node boots from: found in the image's /boot and beside its modules, and nowhere but in the image.

use std::cmp::Ordering;
use std::fmt::Write;
use std::fs::File;

use rustix::fs::{Dir, FileType, Mode, OFlags};

use crate::error::{Attempt, Error, Result};
use crate::printable::listed;
use crate::sys::tree::Tree;

/// Names in /boot; `auto` chooses.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    /// The kernel.
    pub(crate) kernel: String,
    /// What it begins with.
    pub(crate) initrd: String,
    /// The kernel's parameters, which an image need not have.
    pub(crate) parameters: String,
}

/// A file to be published, open.
#[derive(Debug)]
pub(crate) struct BootFile {
    /// Its path in the image.
    pub(crate) path: String,
    /// Its content.
    pub(crate) content: File,
}

/// What is published beside the packed image.
#[derive(Debug)]
pub(crate) struct BootFiles {
    /// The kernel.
    pub(crate) kernel: BootFile,
    /// The initrd; `None` where [`NONE`] is named, or where none is found on one machine.
    pub(crate) initrd: Option<BootFile>,
    /// The kernel's parameters, where the image has them.
    pub(crate) parameters: Option<BootFile>,
}

/// Chooses by itself.
pub const AUTO: &str = "auto";

/// Names no initrd: the image is booted by one that others bring, as Warewulf does, or by none.
const NONE: &str = "none";

/// How kernels are called, alone or before `-` and their version or flavour (`vmlinuz-lts`); the one that boots everywhere first.
const KERNELS: [&str; 5] = ["vmlinuz", "Image", "zImage", "bzImage", "vmlinux"];

/// Endings of what lies beside a kernel: its checksum, its signature, what it was before an upgrade, the same with its symbols.
const BESIDE_KERNELS: [&str; 5] = [".hmac", ".old", ".sig", ".gz", ".xz"];

/// How the initrd of a kernel is called: before and after its version or flavour.
const INITRDS: [(&str, &str); 5] =
    [("initrd-", ""), ("initrd.img-", ""), ("initramfs-", ".img"), ("initramfs-", ""), ("initrd-", ".img")];

/// How it is called where it is the only one: in a directory of modules (ostree, MicroOS), or beside a kernel without a version.
const BARE_INITRDS: [&str; 4] = ["initrd", "initrd.img", "initramfs.img", "initramfs"];

/// Directories of modules, each kernel's in a subdirectory named after its version. In most images the first is a link
/// to the second.
const MODULES: [&str; 2] = ["lib/modules", "usr/lib/modules"];

/// No image has more kernels, and one that is made to keep us busy does not.
const MOST_ENTRIES: usize = 1000;

/// No message needs more names of a directory.
const MOST_NAMES: usize = 20;

/// The modules of one kernel.
#[derive(Debug)]
struct Modules {
    version: String,
    directory: String,
    /// The kernel itself, where the package keeps it (EL 9 and later, Fedora, Arch), and kernel-install would copy it from.
    kernel: Option<String>,
    /// Name of this kernel in /boot, as Arch's mkinitcpio has it.
    flavour: Option<String>,
}

/// A kernel that the image has.
#[derive(Debug)]
struct Kernel {
    path: String,
    /// Version of its modules, if known.
    version: Option<String>,
    /// Suffix after `vmlinuz-` in its name, or the one it would have.
    flavour: Option<String>,
    /// Tie-breaker: the higher of two kernels with one version is taken.
    preference: usize,
}

/// Largest boot files, in bytes, holes included: a node's firmware reads each whole into memory, and each is uploaded as it is. A kernel
/// with its symbols has some 500 MiB, and the kernel takes 4 KiB of parameters at the most.
const LARGEST_KERNEL: u64 = 1 << 30;
const LARGEST_INITRD: u64 = 4 << 30;
const LARGEST_PARAMETERS: u64 = 1 << 20;

impl BootFiles {
    fn refuse_too_large(self) -> Result<Self> {
        let files = [
            (Some(&self.kernel), LARGEST_KERNEL),
            (self.initrd.as_ref(), LARGEST_INITRD),
            (self.parameters.as_ref(), LARGEST_PARAMETERS),
        ];
        for (file, most) in files {
            let Some(BootFile { path, content }) = file else { continue };
            let size = content.metadata().attempt(|| format!("read the size of {path}"))?.len();
            if size > most {
                return Err(Error::new(format!("publish {path} of the image"))
                    .because(format!("it has {size} bytes, expected {most} at the most"))
                    .advise("see what wrote it: a file of holes is as large as it says"));
            }
        }
        Ok(self)
    }
}

/// Finds and opens them. `arch` as in `BUILD_ARCH`: on aarch64 the kernel that is called `vmlinuz` is `Image`.
pub(crate) fn find(image_root: &Tree, names: &Names, arch: &str) -> Result<BootFiles> {
    Search::of(image_root, names, arch)?.open(Err)
}

/// The same of an image that need not be one that is booted, or not by an initrd of its own: nothing where `auto` finds no kernel at all.
pub(crate) fn find_if_any(image_root: &Tree, names: &Names, arch: &str) -> Result<Option<BootFiles>> {
    if names.kernel == AUTO && has_none(image_root) {
        tracing::warn!("the image has no kernel: it is one for a container or a chroot, without boot files");
        return Ok(None);
    }
    let search = Search::of(image_root, names, arch)?;
    let kernel = search.kernel.path.clone();
    search
        .open(|_| {
            tracing::warn!(
                "the image has no initrd of /{kernel}: it is published without one; --initrd names one, or none"
            );
            Ok(())
        })
        .map(Some)
}

/// Warns of an initrd that [`find_if_any`] would not find now.
pub(crate) fn warn_of_missing_initrd(image_root: &Tree, names: &Names, arch: &str) {
    let Ok(search) = Search::of(image_root, names, arch) else { return };
    if names.initrd == AUTO && search.initrd().is_none() {
        let kernel = search.kernel.path;
        tracing::warn!(
            "no initrd of /{kernel} is in the image yet: unless one is made, it is published without; --initrd names one, or none"
        );
    }
}

/// A search for the boot files of an image.
struct Search<'a> {
    image_root: &'a Tree,
    names: &'a Names,
    boot: Vec<String>,
    modules: Vec<Modules>,
    kernel: Kernel,
}

impl<'a> Search<'a> {
    /// Chooses the kernel.
    fn of(image_root: &'a Tree, names: &'a Names, arch: &str) -> Result<Self> {
        let (boot, modules) = (entries(image_root, "boot"), modules(image_root));
        let kernel = match names.kernel.as_str() {
            AUTO => best(kernels(image_root, &boot, &modules), &modules)
                .ok_or_else(|| missing("a kernel", None, &boot, &modules))?,
            "vmlinuz" if arch == "aarch64" => in_boot(image_root, "Image", &modules),
            name => in_boot(image_root, name, &modules),
        };
        Ok(Self { image_root, names, boot, modules, kernel })
    }

    fn missing(&self, what: &str, path: Option<&str>) -> Error {
        missing(what, path, &self.boot, &self.modules)
    }

    /// Path of the initrd that belongs to the kernel.
    fn initrd(&self) -> Option<String> {
        let all = kernels(self.image_root, &self.boot, &self.modules);
        let is_only = all.iter().all(|other| other.version == self.kernel.version);
        let mut paths = initrds(&self.kernel, is_only, &self.modules).into_iter();
        paths.find(|path| is_file(self.image_root, path))
    }

    /// Opens all; `without` decides what becomes of an image in which none belongs to the kernel.
    fn open(&self, without: impl Fn(Error) -> Result<()>) -> Result<BootFiles> {
        let path = &self.kernel.path;
        let needed = |what: &str, path: &str| {
            open(self.image_root, path)?.ok_or_else(|| self.missing(&format!("the {what} /{path}"), Some(path)))
        };
        let kernel = needed("kernel", path)?;
        let initrd = match self.names.initrd.as_str() {
            NONE => None,
            AUTO => match self.initrd() {
                Some(initrd) => Some(needed("initrd", &initrd)?),
                None => {
                    without(self.missing(&format!("the initrd of /{path}"), None))?;
                    None
                }
            },
            name => Some(needed("initrd", &format!("boot/{name}"))?),
        };
        let parameters = open(self.image_root, &format!("boot/{}", self.names.parameters))?;
        BootFiles { kernel, initrd, parameters }.refuse_too_large()
    }
}

/// Refuses a name that the image has no file of, before any work is done. What `auto` finds may only be there at the end.
pub(crate) fn check_named(image_root: &Tree, names: &Names, arch: &str) -> Result<()> {
    let (boot, modules) = (entries(image_root, "boot"), modules(image_root));
    let kernel = if names.kernel == "vmlinuz" && arch == "aarch64" { "Image" } else { &names.kernel };
    let kernel = (kernel != AUTO).then(|| ("kernel", in_boot(image_root, kernel, &modules).path));
    let initrd = (![AUTO, NONE].contains(&&*names.initrd)).then(|| ("initrd", format!("boot/{}", names.initrd)));
    for (what, path) in kernel.into_iter().chain(initrd) {
        if !is_file(image_root, &path) {
            return Err(missing(&format!("the {what} /{path}"), Some(&path), &boot, &modules));
        }
    }
    Ok(())
}

/// Opens those that a remote job has left in `folder` itself, beside its packed image. Links are none of what it has left.
pub(crate) fn left_in(folder: &Tree, names: &Names, arch: &str) -> Result<BootFiles> {
    let kernel = if names.kernel == "vmlinuz" && arch == "aarch64" { "Image" } else { &names.kernel };
    let open = |name: &str| match folder.open_regular(name, OFlags::RDONLY | OFlags::NOFOLLOW) {
        Ok(content) => Ok(Some(BootFile { path: name.to_owned(), content })),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).attempt(|| format!("open {name}, which the remote job left")),
    };
    let needed = |name: &str| {
        open(name)?.ok_or_else(|| {
            Error::new(format!("find {name} in {}", folder.shown().display()))
                .because("the remote job has left none beside its packed image")
                .advise("name one by KERNEL_FILENAME and INITRD_FILENAME; 'auto' cannot be had of a remote job")
        })
    };
    let initrd = (names.initrd != NONE).then(|| needed(&names.initrd)).transpose()?;
    BootFiles { kernel: needed(kernel)?, initrd, parameters: open(&names.parameters)? }.refuse_too_large()
}

/// Whether the image is one that nobody boots: it has no kernel, neither in /boot nor beside modules.
fn has_none(image_root: &Tree) -> bool {
    kernels(image_root, &entries(image_root, "boot"), &modules(image_root)).is_empty()
}

/// `path` is that of a file that was looked for by its name.
fn missing(what: &str, path: Option<&str>, boot: &[String], modules: &[Modules]) -> Error {
    let mut holds = match boot {
        [] => "nothing".to_owned(),
        names => listed(names),
    };
    for kernel in modules.iter().filter_map(|m| m.kernel.as_ref()).take(MOST_NAMES) {
        let _ = write!(holds, ", and there is /{kernel}");
    }
    let is_there = |name: &String| path.and_then(|path| path.strip_prefix("boot/")) == Some(name);
    let odd = if boot.iter().any(is_there) { "it is no regular file; " } else { "" };
    Error::new(format!("find {what} in the image")).because(format!("{odd}/boot holds {holds}")).advise(
        "name files of /boot by --kernel and --initrd (in a pod KERNEL_FILENAME and INITRD_FILENAME); auto also looks in /lib/modules, \
         when all work is done",
    )
}

/// Opens the file `path`, every link on the way resolved inside the image. What is no regular file is not there: a fifo would hang, and a
/// device would not end.
fn open(image_root: &Tree, path: &str) -> Result<Option<BootFile>> {
    if !is_file(image_root, path) {
        return Ok(None);
    }
    let content = image_root.open_regular(path, OFlags::RDONLY).attempt(|| format!("open /{path} of the image"))?;
    Ok(Some(BootFile { path: path.to_owned(), content }))
}

/// Whether `path` leads to a regular file. Without opening it for reading: to open a device can do something.
fn is_file(image_root: &Tree, path: &str) -> bool {
    let found = image_root.open_at(path, OFlags::PATH, Mode::empty()).and_then(|fd| Ok(rustix::fs::fstat(fd)?));
    found.is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::RegularFile)
}

/// Names in a directory of the image, in order, as many as any image has; none where there is no such directory.
fn entries(image_root: &Tree, path: &str) -> Vec<String> {
    let folder = image_root.directory(path).and_then(|f| f.reopen());
    let Some(folder) = folder.ok().and_then(|fd| Dir::new(fd).ok()) else { return Vec::new() };
    let mut names: Vec<_> = folder
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|n| n != "." && n != "..")
        .collect();
    names.sort();
    names.truncate(MOST_ENTRIES);
    names
}

fn modules(image_root: &Tree) -> Vec<Modules> {
    let mut found: Vec<Modules> = Vec::new();
    for above in MODULES {
        for version in entries(image_root, above) {
            let directory = format!("{above}/{version}");
            if image_root.directory(&directory).is_err() || found.iter().any(|m| m.version == version) {
                continue;
            }
            let kernel =
                KERNELS.iter().map(|name| format!("{directory}/{name}")).find(|path| is_file(image_root, path));
            let flavour = image_root.read(format!("{directory}/pkgbase"), 4096).ok();
            let flavour = flavour.map(|text| String::from_utf8_lossy(&text).trim().to_owned());
            found.push(Modules { version, directory, kernel, flavour });
        }
    }
    found
}

fn kernels(image_root: &Tree, boot: &[String], modules: &[Modules]) -> Vec<Kernel> {
    let in_boot = boot.iter().filter(|name| flavour_of(name).is_some()).map(|name| in_boot(image_root, name, modules));
    let mut found: Vec<_> = in_boot.filter(|kernel| is_file(image_root, &kernel.path)).collect();
    found.extend(modules.iter().filter_map(|modules| {
        let path = modules.kernel.clone()?;
        Some(Kernel { path, version: Some(modules.version.clone()), flavour: modules.flavour.clone(), preference: 0 })
    }));
    found
}

/// The kernel /boot/`name`, whether it is there or not.
fn in_boot(image_root: &Tree, name: &str, modules: &[Modules]) -> Kernel {
    let path = format!("boot/{name}");
    let target = image_root.handle(&path).ok().and_then(|link| rustix::fs::readlinkat(link, "", Vec::new()).ok());
    let target = target.map(|target| target.to_string_lossy().into_owned()).unwrap_or_default();
    let (above, last) = target.rsplit_once('/').unwrap_or(("", &target));
    let above = above.rsplit('/').next().unwrap_or_default();
    // `vmlinuz` is mostly a link to the kernel with its version, in /boot or in the directory of its modules.
    let own = flavour_of(name).filter(|flavour| !flavour.is_empty());
    let flavour = own.or_else(|| flavour_of(last).filter(|flavour| !flavour.is_empty()));
    let version = flavour
        .filter(|flavour| flavour.starts_with(|c: char| c.is_ascii_digit()))
        .or_else(|| modules.iter().map(|m| m.version.as_str()).find(|version| *version == above))
        .or_else(|| version_of(flavour, modules));
    let position = KERNELS.iter().position(|kernel| name.starts_with(kernel)).unwrap_or(KERNELS.len());
    Kernel {
        path,
        version: version.map(str::to_owned),
        flavour: flavour.map(str::to_owned),
        preference: if own.is_some() { 2 * KERNELS.len() } else { KERNELS.len() } - position,
    }
}

/// Suffix after the `-` in a kernel's name, or nothing; `None` if this is no kernel's name.
fn flavour_of(name: &str) -> Option<&str> {
    if BESIDE_KERNELS.iter().any(|ending| name.ends_with(ending)) {
        return None;
    }
    KERNELS.iter().find_map(|kernel| {
        let rest = name.strip_prefix(kernel)?;
        if rest.is_empty() { Some(rest) } else { rest.strip_prefix('-') }
    })
}

/// The version of a kernel whose name has none: the newest of its flavour, or the only one.
fn version_of<'a>(flavour: Option<&str>, modules: &'a [Modules]) -> Option<&'a str> {
    let Some(flavour) = flavour else {
        return if let [only] = modules { Some(&only.version) } else { None };
    };
    let ending = format!("-{flavour}");
    let of_flavour = |m: &&Modules| m.flavour.as_deref() == Some(flavour) || m.version.ends_with(&ending);
    modules.iter().filter(of_flavour).map(|m| m.version.as_str()).max_by(|a, b| compare_versions(a, b))
}

/// The kernel to boot by default: one that has modules, no debug kernel, the highest version; and only where there is no other one that
/// is there for crashes and repairs.
fn best(kernels: Vec<Kernel>, modules: &[Modules]) -> Option<Kernel> {
    let is_called = |kernel: &Kernel, words: &[&str]| {
        let name = [kernel.version.as_deref(), kernel.flavour.as_deref()].into_iter().flatten();
        name.into_iter().any(|name| words.iter().any(|word| name.contains(word)))
    };
    let rank = |kernel: &Kernel| {
        let has_modules = modules.iter().any(|m| Some(&m.version) == kernel.version.as_ref());
        (!is_called(kernel, &["rescue", "kdump"]), has_modules, !is_called(kernel, &["debug"]))
    };
    let version = |kernel: &Kernel| kernel.version.clone().unwrap_or_default();
    kernels.into_iter().max_by(|a, b| {
        let by_version = || compare_versions(&version(a), &version(b));
        rank(a).cmp(&rank(b)).then_with(by_version).then_with(|| a.preference.cmp(&b.preference))
    })
}

/// Possible paths of the initrd of `kernel`, best first. One without a version belongs to a kernel without one, or to the only kernel.
fn initrds(kernel: &Kernel, is_only: bool, modules: &[Modules]) -> Vec<String> {
    let own = modules.iter().find(|m| Some(&m.version) == kernel.version.as_ref());
    let of_modules = own.and_then(|m| m.flavour.as_deref());
    let names = [kernel.version.as_deref(), kernel.flavour.as_deref(), of_modules].into_iter().flatten();
    let mut found: Vec<_> =
        names.flat_map(|name| INITRDS.map(|(before, after)| format!("boot/{before}{name}{after}"))).collect();
    let is_bare = is_only || KERNELS.iter().any(|name| kernel.path == format!("boot/{name}"));
    for directory in own.map(|m| m.directory.as_str()).into_iter().chain(is_bare.then_some("boot")) {
        found.extend(BARE_INITRDS.map(|name| format!("{directory}/{name}")));
    }
    found
}

/// A piece of a version, in the order in which pieces count: `6.9~rc1` and `6.9-rc1` come before `6.9`, that before `6.9-a`, and that
/// before `6.9.1`.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Piece<'a> {
    Before(&'a str),
    End,
    Word(&'a str),
    /// Without leading zeros, by length first: of any size.
    Number(usize, &'a str),
}

/// Versions as package managers order them, but that `-rc1` comes before the release, as in what the kernel calls itself, and a variant
/// (`.aarch64+64k`) before the kernel that it is one of.
fn compare_versions(a: &str, b: &str) -> Ordering {
    let ((a, variant_of_a), (b, variant_of_b)) = (without_variant(a), without_variant(b));
    let (mut pieces_of_a, mut pieces_of_b) = (pieces(a), pieces(b));
    loop {
        let (x, y) = (pieces_of_a.next().unwrap_or(Piece::End), pieces_of_b.next().unwrap_or(Piece::End));
        match x.cmp(&y) {
            Ordering::Equal if x == Piece::End => break,
            Ordering::Equal => {}
            order => return order,
        }
    }
    variant_of_a.is_none().cmp(&variant_of_b.is_none()).then_with(|| variant_of_a.cmp(&variant_of_b))
}

/// Red Hat's kernels have their variant after the architecture.
fn without_variant(version: &str) -> (&str, Option<&str>) {
    match version.rsplit_once('+') {
        Some((version, variant)) if [".x86_64", ".aarch64"].iter().any(|arch| version.ends_with(arch)) => {
            (version, Some(variant))
        }
        _ => (version, None),
    }
}

/// The runs of digits and of letters.
fn pieces(version: &str) -> impl Iterator<Item = Piece<'_>> {
    let mut rest = version;
    std::iter::from_fn(move || {
        rest = rest.trim_start_matches(|c: char| !c.is_ascii_alphanumeric() && c != '~');
        let first = rest.bytes().next()?;
        let same = |b: u8| b.is_ascii_alphanumeric() && b.is_ascii_digit() == first.is_ascii_digit();
        let length = if first == b'~' { 1 } else { rest.bytes().position(|b| !same(b)).unwrap_or(rest.len()) };
        let (run, after) = rest.split_at(length);
        rest = after;
        Some(if first.is_ascii_digit() {
            let number = run.trim_start_matches('0');
            Piece::Number(number.len(), number)
        } else if ["~", "rc", "pre", "alpha", "beta"].contains(&run) {
            Piece::Before(run)
        } else {
            Piece::Word(run)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::symlink;

    fn image(files: &[&str]) -> (tempfile::TempDir, Tree) {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            if file.ends_with('/') {
                std::fs::create_dir_all(path).unwrap();
            } else if let Some((name, content)) = file.split_once('=') {
                std::fs::write(dir.path().join(name), content).unwrap();
            } else {
                std::fs::write(path, file).unwrap();
            }
        }
        let tree = Tree::open(dir.path()).unwrap();
        (dir, tree)
    }

    fn names(kernel: &str, initrd: &str) -> Names {
        Names { kernel: kernel.into(), initrd: initrd.into(), parameters: "kernel-parameters".into() }
    }

    fn text(mut file: BootFile) -> String {
        let mut text = String::new();
        file.content.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn files_of_holes_are_not_booted_from() {
        for (name, size) in [("vmlinuz", 2_u64 << 30), ("initrd", (4 << 30) + 1), ("kernel-parameters", 2 << 20)] {
            let (dir, tree) = image(&["boot/vmlinuz", "boot/initrd", "boot/kernel-parameters"]);
            assert!(find(&tree, &names("vmlinuz", "initrd"), "x86_64").is_ok());
            let file = File::options().write(true).open(dir.path().join("boot").join(name)).unwrap();
            file.set_len(size).unwrap();
            let refused = find(&tree, &names("vmlinuz", "initrd"), "x86_64").unwrap_err().to_string();
            assert!(refused.contains(&format!("publish boot/{name}")) && refused.contains("at the most"), "{refused}");
        }
    }

    #[test]
    fn links_are_resolved_inside_the_image() {
        let (dir, tree) = image(&["boot/vmlinuz-6.1", "boot/initrd-6.1", "etc/passwd"]);
        symlink("/boot/vmlinuz-6.1", dir.path().join("boot/vmlinuz")).unwrap();
        symlink("initrd-6.1", dir.path().join("boot/initrd")).unwrap();
        let found = find(&tree, &names("vmlinuz", "initrd"), "x86_64").unwrap();
        assert_eq!(
            (text(found.kernel), text(found.initrd.unwrap())),
            ("boot/vmlinuz-6.1".into(), "boot/initrd-6.1".into())
        );
        assert!(found.parameters.is_none());
    }

    #[test]
    fn a_link_out_of_the_image_publishes_nothing_of_what_is_there() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("client-secret"), "secret").unwrap();
        let (dir, tree) = image(&["boot/initrd", "boot/other"]);
        for target in
            [outside.path().join("client-secret"), "../../../../etc/hostname".into(), "/proc/self/environ".into()]
        {
            let link = dir.path().join("boot/vmlinuz");
            let _ = std::fs::remove_file(&link);
            symlink(target, &link).unwrap();
            let error = find(&tree, &names("vmlinuz", "initrd"), "x86_64").unwrap_err().to_string();
            assert!(error.contains("/boot holds initrd, other, vmlinuz"), "{error}");
        }
    }

    #[test]
    fn what_is_no_regular_file_is_not_there() {
        let (dir, tree) = image(&["boot/initrd"]);
        rustix::fs::mknodat(tree.directory("boot").unwrap(), "vmlinuz", FileType::Fifo, Mode::from_raw_mode(0o600), 0)
            .unwrap();
        assert!(find(&tree, &names("vmlinuz", "initrd"), "x86_64").is_err());
        std::fs::remove_file(dir.path().join("boot/vmlinuz")).unwrap();
        std::fs::create_dir(dir.path().join("boot/vmlinuz")).unwrap();
        assert!(find(&tree, &names("vmlinuz", "initrd"), "x86_64").is_err());
    }

    #[test]
    fn vmlinuz_of_aarch64_is_image() {
        let (_dir, tree) = image(&["boot/Image", "boot/initrd"]);
        assert_eq!(text(find(&tree, &names("vmlinuz", "initrd"), "aarch64").unwrap().kernel), "boot/Image");
    }

    #[test]
    fn auto_takes_the_newest_kernel_with_modules_and_the_initrd_that_belongs_to_it() {
        let (dir, tree) = image(&[
            "boot/vmlinuz-5.14.21-150500.55.9-default",
            "boot/vmlinuz-5.14.21-150500.55.10-default",
            "boot/vmlinuz-6.4.0-rescue",
            "boot/.vmlinuz-6.4.0.hmac",
            "boot/initrd-5.14.21-150500.55.9-default",
            "boot/initrd-5.14.21-150500.55.10-default",
            "lib/modules/5.14.21-150500.55.9-default/",
            "lib/modules/5.14.21-150500.55.10-default/",
        ]);
        let found = find(&tree, &names("auto", "auto"), "x86_64").unwrap();
        assert_eq!(found.kernel.path, "boot/vmlinuz-5.14.21-150500.55.10-default");
        assert_eq!(found.initrd.unwrap().path, "boot/initrd-5.14.21-150500.55.10-default");
        symlink("vmlinuz-5.14.21-150500.55.9-default", dir.path().join("boot/vmlinuz")).unwrap();
        let found = find(&tree, &names("vmlinuz", "auto"), "x86_64").unwrap();
        assert_eq!(found.initrd.unwrap().path, "boot/initrd-5.14.21-150500.55.9-default");
    }

    /// Paths that `auto` chooses.
    fn chosen(files: &[&str]) -> (String, String) {
        let (_dir, tree) = image(files);
        let found = find(&tree, &names("auto", "auto"), "x86_64").unwrap();
        (found.kernel.path, found.initrd.unwrap().path)
    }

    /// Files of an image, and which are chosen; `V` is a version of EL 9, and directories end with `/`.
    const LAYOUTS: [(&str, &str); 14] = [
        // EL 9 and later in a container, without kernel-install's copy; dracut was run by hand.
        ("lib/modules/V/vmlinuz boot/initramfs-V.img", "lib/modules/V/vmlinuz boot/initramfs-V.img"),
        // The same where /lib is no link.
        ("usr/lib/modules/V/vmlinuz boot/initramfs-V.img", "usr/lib/modules/V/vmlinuz boot/initramfs-V.img"),
        // ostree and bootc, openSUSE MicroOS.
        ("lib/modules/V/vmlinuz lib/modules/V/initramfs.img", "lib/modules/V/vmlinuz lib/modules/V/initramfs.img"),
        ("lib/modules/V/vmlinuz lib/modules/V/initrd", "lib/modules/V/vmlinuz lib/modules/V/initrd"),
        // EL 9 installed by Anaconda.
        (
            "lib/modules/V/vmlinuz boot/vmlinuz-V boot/initramfs-V.img boot/initramfs-Vkdump.img \
             boot/vmlinuz-0-rescue-0123 boot/initramfs-0-rescue-0123.img",
            "boot/vmlinuz-V boot/initramfs-V.img",
        ),
        // Alpine, with one kernel and with two.
        ("lib/modules/6.6.31-0-lts/ boot/vmlinuz-lts boot/initramfs-lts", "boot/vmlinuz-lts boot/initramfs-lts"),
        (
            "lib/modules/6.6.31-0-lts/ boot/vmlinuz-lts boot/initramfs-lts \
             lib/modules/6.6.40-0-virt/ boot/vmlinuz-virt boot/initramfs-virt",
            "boot/vmlinuz-virt boot/initramfs-virt",
        ),
        // Arch, and its image before the hook that copies the kernel has run.
        (
            "usr/lib/modules/6.9.1-arch1-1/vmlinuz usr/lib/modules/6.9.1-arch1-1/pkgbase=linux boot/vmlinuz-linux \
             boot/initramfs-linux.img boot/initramfs-linux-fallback.img usr/lib/modules/6.6.31-1-lts/pkgbase=linux-lts \
             boot/vmlinuz-linux-lts boot/initramfs-linux-lts.img",
            "boot/vmlinuz-linux boot/initramfs-linux.img",
        ),
        (
            "lib/modules/6.9.1-arch1-1/vmlinuz lib/modules/6.9.1-arch1-1/pkgbase=linux boot/initramfs-linux.img",
            "lib/modules/6.9.1-arch1-1/vmlinuz boot/initramfs-linux.img",
        ),
        // Kernels without a version.
        ("lib/modules/6.9.1/ boot/Image boot/initrd.img", "boot/Image boot/initrd.img"),
        ("boot/zImage boot/initramfs.img", "boot/zImage boot/initramfs.img"),
        ("lib/modules/6.9.1/ boot/vmlinuz boot/initrd.img-6.9.1", "boot/vmlinuz boot/initrd.img-6.9.1"),
        ("boot/Image-6.9.1 boot/initrd-6.9.1", "boot/Image-6.9.1 boot/initrd-6.9.1"),
        // The only kernel's, whatever it is called.
        ("boot/vmlinuz-V boot/initrd lib/modules/V/", "boot/vmlinuz-V boot/initrd"),
    ];

    #[test]
    fn auto_finds_the_kernel_and_its_initrd_where_each_distribution_puts_them() {
        for layout in LAYOUTS {
            let [files, wanted] = [layout.0, layout.1].map(|names| names.replace('V', "5.14.0-503.el9.x86_64"));
            let (kernel, initrd) = chosen(&files.split_whitespace().collect::<Vec<_>>());
            assert_eq!(format!("{kernel} {initrd}"), wanted, "{files}");
        }
    }

    #[test]
    fn auto_takes_no_debug_kdump_or_rescue_kernel_before_another() {
        for (worse, better) in [
            ("6.9.0", "6.9.1"),
            ("6.9.0-rc1", "6.9.0"),
            ("6.9~rc1-amd64", "6.9-amd64"),
            ("6.12.0-55.el10.x86_64+debug", "6.12.0-55.el10.x86_64"),
            ("6.12.0-56.el10.x86_64+debug", "6.12.0-55.el10.x86_64"),
            ("6.9.1-debug", "6.9.0-default"),
            ("6.9.1-kdump", "6.9.0-default"),
            ("0-rescue-a1b2", "4.18.0-80.el8.x86_64"),
            ("9.9.9-rescue", "6.9.1-debug"),
        ] {
            let files = [worse, better]
                .map(|v| [format!("boot/vmlinuz-{v}"), format!("boot/initrd-{v}"), format!("lib/modules/{v}/")]);
            for files in [files.concat(), files.iter().rev().flatten().cloned().collect()] {
                let files: Vec<_> = files.iter().map(String::as_str).collect();
                assert_eq!(chosen(&files).0, format!("boot/vmlinuz-{better}"));
            }
        }
        // One of two kernels has no initrd.
        let (_dir, tree) = image(&["boot/vmlinuz-6.9.1", "boot/vmlinuz-6.9.0", "boot/initrd"]);
        assert!(find(&tree, &names("auto", "auto"), "x86_64").is_err());
        // A debug kernel is taken if there is no other.
        assert_eq!(chosen(&["boot/vmlinuz-6.9.1-debug", "boot/initrd-6.9.1-debug"]).0, "boot/vmlinuz-6.9.1-debug");
    }

    #[test]
    fn a_kernel_of_lib_modules_that_boot_links_to_has_the_initrd_of_its_version() {
        let (dir, tree) =
            image(&["usr/lib/modules/6.9.1-1-default/vmlinuz", "boot/initrd-6.9.1-1-default", "boot/initrd-6.9.0"]);
        symlink("../usr/lib/modules/6.9.1-1-default/vmlinuz", dir.path().join("boot/vmlinuz")).unwrap();
        for kernel in ["vmlinuz", "auto"] {
            let found = find(&tree, &names(kernel, "auto"), "x86_64").unwrap();
            assert_eq!(found.initrd.unwrap().path, "boot/initrd-6.9.1-1-default");
            assert_eq!(text(found.kernel), "usr/lib/modules/6.9.1-1-default/vmlinuz");
        }
    }

    #[test]
    fn an_image_with_a_kernel_anywhere_is_one_that_is_booted() {
        for file in [
            "boot/vmlinuz-lts",
            "boot/Image",
            "boot/vmlinux-6.1",
            "lib/modules/6.1/vmlinuz",
            "usr/lib/modules/6.1/vmlinuz",
        ] {
            assert!(!has_none(&image(&[file]).1), "{file}");
        }
        // Headers, and modules alone, of a container.
        assert!(has_none(&image(&["lib/modules/6.1/modules.dep", "boot/config-6.1", "boot/initrd-6.1"]).1));
    }

    #[test]
    fn a_name_that_the_image_does_not_have_is_told_with_those_that_it_has() {
        let (_dir, tree) = image(&["boot/config-6.1", "lib/modules/6.1/vmlinuz"]);
        let error = find(&tree, &names("nonesuch", "auto"), "x86_64").unwrap_err().to_string();
        assert!(error.contains("/boot holds config-6.1") && error.contains("/lib/modules/6.1/vmlinuz"), "{error}");
        let many: Vec<_> = (0..1000).map(|n| format!("boot/file{n}")).collect();
        let (_dir, tree) = image(&many.iter().map(String::as_str).collect::<Vec<_>>());
        let error = find(&tree, &names("nonesuch", "auto"), "x86_64").unwrap_err().to_string();
        assert!(error.len() < 1000 && error.contains("and 980 more"), "{error}");
    }

    #[test]
    fn versions_are_ordered_as_distributions_do() {
        for (older, newer) in [
            ("6.1.9", "6.1.10"),
            ("6.1.0-rc1", "6.1.0-1"),
            ("5.14", "6"),
            ("6.1", "6.1.1"),
            ("6.1-a", "6.1-b"),
            ("6.9.0-rc1", "6.9.0"),
            ("6.9.0-rc1", "6.9.0-rc2"),
            ("6.9.0-rc9", "6.9.0-rc10"),
            ("6.9~rc1", "6.9"),
            ("6.9~rc1", "6.9-amd64"),
            ("6.9.0-0.rc1.20240325.15.fc41.x86_64", "6.9.0-64.fc41.x86_64"),
            ("6.9.0-060900rc1-generic", "6.9.0-060900-generic"),
            ("6.8.12", "6.9.0-rc1"),
            ("6.9.0-64.fc41.x86_64", "6.9.1-1.fc41.x86_64"),
            ("5.14.21-150500.55.9-default", "5.14.21-150500.55.10-default"),
            ("6.1.0-9-amd64", "6.1.0-10-amd64"),
            ("5.14.0-503.el9.aarch64+64k", "5.14.0-503.el9.aarch64"),
            ("5.14.0-503.el9.aarch64", "5.14.0-504.el9.aarch64+64k"),
            ("6.1.0-99999999999999999999998", "6.1.0-99999999999999999999999"),
        ] {
            assert_eq!(compare_versions(older, newer), Ordering::Less, "{older} {newer}");
            assert_eq!(compare_versions(newer, older), Ordering::Greater, "{older} {newer}");
        }
        assert_eq!(compare_versions("6.1", "6.1"), Ordering::Equal);
    }
}
