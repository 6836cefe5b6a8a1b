//! Boot files of an image: kernel, initrd and parameters, looked for in /boot and beside the kernel modules, and never
//! outside the image.

use std::cmp::Ordering;
use std::fmt::Write;
use std::fs::File;

use rustix::fs::{Dir, FileType, Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::error::{Attempt, Error, Result};
use crate::printable::listed;
use crate::sys::tree::Tree;

/// Names of files in /boot. `auto` chooses one.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Names {
    /// The kernel.
    pub(crate) kernel: String,
    /// The initrd; `none` for no initrd.
    pub(crate) initrd: String,
    /// The kernel parameters, which an image may lack.
    pub(crate) parameters: String,
}

/// An open file to be published.
#[derive(Debug)]
pub(crate) struct BootFile {
    /// Path in the image.
    pub(crate) path: String,
    /// Content.
    pub(crate) content: File,
}

/// Files that are published beside the packed image.
#[derive(Debug)]
pub(crate) struct BootFiles {
    /// The kernel.
    pub(crate) kernel: BootFile,
    /// The initrd; `None` if [`NONE`] was given or, in a run on one machine, if the image has none.
    pub(crate) initrd: Option<BootFile>,
    /// The kernel parameters, if the image has them.
    pub(crate) parameters: Option<BootFile>,
}

/// Name that asks for an automatic choice of the file.
pub const AUTO: &str = "auto";

/// Name that asks for no initrd: the node boots without one, or with one from elsewhere, as with Warewulf.
const NONE: &str = "none";

/// Names of kernels, alone or followed by `-` and a version or flavour (`vmlinuz-lts`), in order of preference. Any
/// firmware boots a kernel of the first name.
const KERNELS: [&str; 5] = ["vmlinuz", "Image", "zImage", "bzImage", "vmlinux"];

/// Suffixes of files that lie beside a kernel and must not be taken for a kernel to boot: its checksum, the previous
/// kernel, its signature, and compressed copies.
const BESIDE_KERNELS: [&str; 5] = [".hmac", ".old", ".sig", ".gz", ".xz"];

/// Prefix and suffix of an initrd's name around its kernel's version or flavour.
const INITRDS: [(&str, &str); 5] =
    [("initrd-", ""), ("initrd.img-", ""), ("initramfs-", ".img"), ("initramfs-", ""), ("initrd-", ".img")];

/// Names of an initrd without a version: in a directory of modules (ostree, MicroOS), or beside a kernel without a
/// version.
const BARE_INITRDS: [&str; 4] = ["initrd", "initrd.img", "initramfs.img", "initramfs"];

/// Directories of modules, with one subdirectory for each kernel version. In most images the first is a link to the
/// second.
const MODULES: [&str; 2] = ["lib/modules", "usr/lib/modules"];

/// Maximum number of names read from a directory. No real image has more; one that was built to waste time may have.
const MOST_ENTRIES: usize = 1000;

/// Maximum number of names in a directory that a message lists.
const MOST_NAMES: usize = 20;

/// The modules of one kernel.
#[derive(Debug)]
struct Modules {
    version: String,
    directory: String,
    /// Path of the kernel, if its package installs it beside the modules, from where kernel-install copies it (EL 9 and
    /// later, Fedora, Arch).
    kernel: Option<String>,
    /// Suffix of this kernel's name in /boot, which Arch's mkinitcpio records in `pkgbase`.
    flavour: Option<String>,
}

/// A kernel of the image.
#[derive(Debug)]
struct Kernel {
    path: String,
    /// Version of the kernel's modules, if known.
    version: Option<String>,
    /// Suffix after `vmlinuz-` in the kernel's name; for a kernel beside its modules, the suffix of its copy in /boot.
    flavour: Option<String>,
    /// Decides between two kernels of one version: the one with the higher value is chosen.
    preference: usize,
}

/// Maximum size of a kernel in bytes, holes included; one with symbols has about 500 MiB. Boot files have limits
/// because the firmware reads each file whole into memory, and because the holes of a file are uploaded as zeros.
const LARGEST_KERNEL: u64 = 1 << 30;
/// Maximum size of an initrd in bytes, holes included.
const LARGEST_INITRD: u64 = 4 << 30;
/// Maximum size of the parameters in bytes, holes included; the kernel accepts at most 4 KiB.
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
                    .because(format!("it has {size} bytes, expected at most {most}"))
                    .advise("see what wrote it: a sparse file counts with its full size"));
            }
        }
        Ok(self)
    }
}

/// Finds and opens the boot files. `arch` is a value of `BUILD_ARCH`; on aarch64 the kernel named `vmlinuz` is `Image`.
/// Returns `None` if `auto` finds no kernel, and no initrd if `auto` finds none: an image may have none of its own. A
/// named file has to exist.
pub(crate) fn find_if_any(image_root: &Tree, names: &Names, arch: &str) -> Result<Option<BootFiles>> {
    if names.kernel == AUTO && has_none(image_root) {
        tracing::warn!("the image has no kernel, and so no boot files: it serves as a container or a chroot");
        return Ok(None);
    }
    Search::of(image_root, names, arch)?.open().map(Some)
}

/// Warns if [`find_if_any`] would not find an initrd at this point.
pub(crate) fn warn_of_missing_initrd(image_root: &Tree, names: &Names, arch: &str) {
    let Ok(search) = Search::of(image_root, names, arch) else { return };
    if names.initrd == AUTO && search.initrd().is_none() {
        let kernel = search.kernel.path;
        tracing::warn!(
            "the image has no initrd for /{kernel} yet: unless one is made, it is published without one; name one with --initrd, or none"
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
    /// Starts a search by choosing the kernel.
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

    /// Opens the files.
    fn open(&self) -> Result<BootFiles> {
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
                    tracing::warn!(
                        "the image has no initrd for /{path}: it is published without one; name one with --initrd, or \
                         none"
                    );
                    None
                }
            },
            name => Some(needed("initrd", &format!("boot/{name}"))?),
        };
        let parameters = open(self.image_root, &format!("boot/{}", self.names.parameters))?;
        BootFiles { kernel, initrd, parameters }.refuse_too_large()
    }
}

/// Checks early that the image has the boot files that `names` names. A file that `auto` is to find may still be
/// created in the session.
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

/// Names of the boot files that a remote job leaves beside its packed image. The name `auto` becomes the usual name.
pub(crate) fn left_names(names: &Names, arch: &str) -> Names {
    let or = |name: &str, usual: &str| if name == AUTO { usual.to_owned() } else { name.to_owned() };
    let kernel = or(&names.kernel, "vmlinuz");
    Names {
        kernel: if kernel == "vmlinuz" && arch == "aarch64" { "Image".into() } else { kernel },
        initrd: or(&names.initrd, "initrd"),
        parameters: names.parameters.clone(),
    }
}

/// Opens the boot files that a remote job left in `directory`, beside its packed image. Refuses links. Like
/// [`find_if_any`], returns `None` if `auto` has found no kernel.
pub(crate) fn left_in(directory: &Tree, names: &Names, arch: &str) -> Result<Option<BootFiles>> {
    let left = left_names(names, arch);
    let open = |name: &str| match directory.open_regular(name, OFlags::RDONLY | OFlags::NOFOLLOW) {
        Ok(content) => Ok(Some(BootFile { path: name.to_owned(), content })),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).attempt(|| format!("open {name}, which the remote job left")),
    };
    let needed = |name: &str| {
        open(name)?.ok_or_else(|| {
            Error::new(format!("find {name} in {}", directory.shown().display()))
                .because("the remote job has not left this file beside its packed image")
                .advise("name the files that it left in KERNEL_FILENAME and INITRD_FILENAME")
        })
    };
    let kernel = match names.kernel.as_str() {
        AUTO => match open(&left.kernel)? {
            Some(kernel) => kernel,
            None => return Ok(None),
        },
        _ => needed(&left.kernel)?,
    };
    let initrd = match names.initrd.as_str() {
        NONE => None,
        AUTO => open(&left.initrd)?,
        _ => Some(needed(&left.initrd)?),
    };
    BootFiles { kernel, initrd, parameters: open(&left.parameters)? }.refuse_too_large().map(Some)
}

/// True if the image has no kernel, neither in /boot nor beside modules, so nobody boots it.
fn has_none(image_root: &Tree) -> bool {
    kernels(image_root, &entries(image_root, "boot"), &modules(image_root)).is_empty()
}

/// Error for a boot file that was not found. `path` is given if the file was looked for by name.
fn missing(what: &str, path: Option<&str>, boot: &[String], modules: &[Modules]) -> Error {
    let mut holds = match boot {
        [] => "nothing".to_owned(),
        names => listed(names),
    };
    for kernel in modules.iter().filter_map(|m| m.kernel.as_ref()).take(MOST_NAMES) {
        let _ = write!(holds, ", and there is /{kernel}");
    }
    let is_there = |name: &String| path.and_then(|path| path.strip_prefix("boot/")) == Some(name);
    let odd = if boot.iter().any(is_there) { "it is not a regular file; " } else { "" };
    Error::new(format!("find {what} in the image")).because(format!("{odd}/boot holds {holds}")).advise(
        "install it in the image, or name files of /boot with --kernel and --initrd (in a pod KERNEL_FILENAME and \
         INITRD_FILENAME, of 'ims jobs create' --kernel-file-name and --initrd-file-name); 'auto' chooses when the \
         image is complete, in /lib/modules too",
    )
}

/// Opens the file `path`, with every link resolved inside the image. Ignores anything but a regular file: a fifo would
/// block, and a device would never end.
fn open(image_root: &Tree, path: &str) -> Result<Option<BootFile>> {
    if !is_file(image_root, path) {
        return Ok(None);
    }
    let content = image_root.open_regular(path, OFlags::RDONLY).attempt(|| format!("open /{path} of the image"))?;
    Ok(Some(BootFile { path: path.to_owned(), content }))
}

/// True if `path` leads to a regular file. Does not open the file for reading, since that can have side effects on a
/// device.
fn is_file(image_root: &Tree, path: &str) -> bool {
    let found = image_root.open_at(path, OFlags::PATH, Mode::empty()).and_then(|fd| Ok(rustix::fs::fstat(fd)?));
    found.is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::RegularFile)
}

/// Sorted names in a directory of the image, up to a limit; empty if there is no such directory.
fn entries(image_root: &Tree, path: &str) -> Vec<String> {
    let directory = image_root.directory(path).and_then(|f| f.reopen());
    let Some(directory) = directory.ok().and_then(|fd| Dir::new(fd).ok()) else { return Vec::new() };
    let mut names: Vec<_> = directory
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

/// Describes the kernel /boot/`name`, which need not exist.
fn in_boot(image_root: &Tree, name: &str, modules: &[Modules]) -> Kernel {
    let path = format!("boot/{name}");
    let target = image_root.handle(&path).ok().and_then(|link| rustix::fs::readlinkat(link, "", Vec::new()).ok());
    let target = target.map(|target| target.to_string_lossy().into_owned()).unwrap_or_default();
    let (above, last) = target.rsplit_once('/').unwrap_or(("", &target));
    let above = above.rsplit('/').next().unwrap_or_default();
    // `vmlinuz` is usually a link to a kernel whose name has a version, or to the kernel in a directory of modules.
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

/// Suffix after the `-` in a kernel's name, or an empty string; `None` if `name` is not the name of a kernel.
fn flavour_of(name: &str) -> Option<&str> {
    if BESIDE_KERNELS.iter().any(|ending| name.ends_with(ending)) {
        return None;
    }
    KERNELS.iter().find_map(|kernel| {
        let rest = name.strip_prefix(kernel)?;
        if rest.is_empty() { Some(rest) } else { rest.strip_prefix('-') }
    })
}

/// Version of the modules that belong to a kernel whose name has no version: the newest version of `flavour` or,
/// without a flavour, the only version in the image.
fn version_of<'a>(flavour: Option<&str>, modules: &'a [Modules]) -> Option<&'a str> {
    let Some(flavour) = flavour else {
        return if let [only] = modules { Some(&only.version) } else { None };
    };
    let ending = format!("-{flavour}");
    let of_flavour = |m: &&Modules| m.flavour.as_deref() == Some(flavour) || m.version.ends_with(&ending);
    modules.iter().filter(of_flavour).map(|m| m.version.as_str()).max_by(|a, b| compare_versions(a, b))
}

/// The kernel that `auto` chooses: one with modules, not a debug kernel, of the highest version. Kernels for crash
/// dumps and rescue come last.
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

/// Possible paths of the initrd of `kernel`, best first. An initrd whose name has no version belongs to a kernel whose
/// name has none, or to the only kernel.
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

/// A part of a version, ordered so that `6.9~rc1` and `6.9-rc1` come before `6.9`, `6.9` before `6.9-a`, and that
/// before `6.9.1`.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Piece<'a> {
    Before(&'a str),
    End,
    Word(&'a str),
    /// Length and digits of a number without leading zeros. Comparing the length first orders numbers of any size.
    Number(usize, &'a str),
}

/// Compares versions as package managers do, with two exceptions: `-rc1` comes before the release, as in the kernel's
/// own version, and a variant (`.aarch64+64k`) before its base kernel.
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

/// Splits off the variant of Red Hat's kernels, which follows the architecture.
fn without_variant(version: &str) -> (&str, Option<&str>) {
    match version.rsplit_once('+') {
        Some((version, variant)) if [".x86_64", ".aarch64"].iter().any(|arch| version.ends_with(arch)) => {
            (version, Some(variant))
        }
        _ => (version, None),
    }
}

/// Splits a version into runs of digits and runs of letters.
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

    /// Finds the boot files of an image that has a kernel.
    fn find(image_root: &Tree, names: &Names, arch: &str) -> Result<BootFiles> {
        find_if_any(image_root, names, arch).map(|found| found.expect("a kernel"))
    }

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
    fn boot_files_of_a_remote_job_have_names_of_their_own_each() {
        let names = |kernel: &str, initrd: &str| Names {
            kernel: kernel.into(),
            initrd: initrd.into(),
            parameters: "kernel-parameters".into(),
        };
        for (given, arch, left) in [
            (("auto", "auto"), "x86_64", ("vmlinuz", "initrd")),
            (("auto", "auto"), "aarch64", ("Image", "initrd")),
            (("vmlinuz", "initrd"), "aarch64", ("Image", "initrd")),
            (("linux", "initrd.img"), "x86_64", ("linux", "initrd.img")),
        ] {
            let found = left_names(&names(given.0, given.1), arch);
            assert_eq!((found.kernel.as_str(), found.initrd.as_str()), left, "{given:?}");
        }
    }

    #[test]
    fn sparse_boot_files_that_are_too_large_are_refused() {
        for (name, size) in [("vmlinuz", 2_u64 << 30), ("initrd", (4 << 30) + 1), ("kernel-parameters", 2 << 20)] {
            let (dir, tree) = image(&["boot/vmlinuz", "boot/initrd", "boot/kernel-parameters"]);
            assert!(find(&tree, &names("vmlinuz", "initrd"), "x86_64").is_ok());
            let file = File::options().write(true).open(dir.path().join("boot").join(name)).unwrap();
            file.set_len(size).unwrap();
            let refused = find(&tree, &names("vmlinuz", "initrd"), "x86_64").unwrap_err().to_string();
            assert!(refused.contains(&format!("publish boot/{name}")) && refused.contains("at most"), "{refused}");
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
    fn links_out_of_the_image_do_not_publish_their_targets() {
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
    fn boot_files_that_are_not_regular_files_are_ignored() {
        let (dir, tree) = image(&["boot/initrd"]);
        rustix::fs::mknodat(tree.directory("boot").unwrap(), "vmlinuz", FileType::Fifo, Mode::from_raw_mode(0o600), 0)
            .unwrap();
        assert!(find(&tree, &names("vmlinuz", "initrd"), "x86_64").is_err());
        std::fs::remove_file(dir.path().join("boot/vmlinuz")).unwrap();
        std::fs::create_dir(dir.path().join("boot/vmlinuz")).unwrap();
        assert!(find(&tree, &names("vmlinuz", "initrd"), "x86_64").is_err());
    }

    #[test]
    fn vmlinuz_means_image_on_aarch64() {
        let (_dir, tree) = image(&["boot/Image", "boot/initrd"]);
        assert_eq!(text(find(&tree, &names("vmlinuz", "initrd"), "aarch64").unwrap().kernel), "boot/Image");
    }

    #[test]
    fn auto_chooses_the_newest_kernel_with_modules_and_its_initrd() {
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

    /// Files of an image and the paths that `auto` chooses. `V` stands for a version of EL 9; directories end with `/`.
    const LAYOUTS: [(&str, &str); 14] = [
        // EL 9 and later in a container, where kernel-install made no copy and dracut was run by hand.
        ("lib/modules/V/vmlinuz boot/initramfs-V.img", "lib/modules/V/vmlinuz boot/initramfs-V.img"),
        // The same image with /lib not being a link.
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
        // Arch, first after the run of the hook that copies the kernel, then before it.
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
        // The only kernel's initrd, whatever its name.
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
    fn auto_prefers_other_kernels_to_debug_kdump_and_rescue_kernels() {
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
        // With two kernels, an initrd without a version belongs to neither.
        let (_dir, tree) = image(&["boot/vmlinuz-6.9.1", "boot/vmlinuz-6.9.0", "boot/initrd"]);
        assert!(find(&tree, &names("auto", "auto"), "x86_64").unwrap().initrd.is_none());
        // A debug kernel is chosen if it is the only one.
        assert_eq!(chosen(&["boot/vmlinuz-6.9.1-debug", "boot/initrd-6.9.1-debug"]).0, "boot/vmlinuz-6.9.1-debug");
    }

    #[test]
    fn kernel_linked_from_boot_to_lib_modules_gets_the_initrd_of_its_version() {
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
    fn image_with_a_kernel_in_boot_or_lib_modules_is_bootable() {
        for file in [
            "boot/vmlinuz-lts",
            "boot/Image",
            "boot/vmlinux-6.1",
            "lib/modules/6.1/vmlinuz",
            "usr/lib/modules/6.1/vmlinuz",
        ] {
            assert!(!has_none(&image(&[file]).1), "{file}");
        }
        // A container image may have headers and modules, but no kernel.
        assert!(has_none(&image(&["lib/modules/6.1/modules.dep", "boot/config-6.1", "boot/initrd-6.1"]).1));
    }

    #[test]
    fn missing_boot_file_is_reported_with_the_names_in_boot() {
        let (_dir, tree) = image(&["boot/config-6.1", "lib/modules/6.1/vmlinuz"]);
        let error = find(&tree, &names("nonesuch", "auto"), "x86_64").unwrap_err().to_string();
        assert!(error.contains("/boot holds config-6.1") && error.contains("/lib/modules/6.1/vmlinuz"), "{error}");
        let many: Vec<_> = (0..1000).map(|n| format!("boot/file{n}")).collect();
        let (_dir, tree) = image(&many.iter().map(String::as_str).collect::<Vec<_>>());
        let error = find(&tree, &names("nonesuch", "auto"), "x86_64").unwrap_err().to_string();
        assert!(error.len() < 1000 && error.contains("and 980 more"), "{error}");
    }

    #[test]
    fn kernel_versions_are_ordered_as_distributions_order_them() {
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
