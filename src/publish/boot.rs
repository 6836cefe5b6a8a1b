//! The files that a node boots from: found in the image's /boot, and nowhere but in the image.

use std::cmp::Ordering;
use std::fs::File;
use std::path::Path;

use rustix::fs::{Dir, FileType, Mode, OFlags};

use crate::error::{Attempt, Error, Result};
use crate::sys::tree::Tree;

/// Names in /boot; `auto` chooses.
#[derive(Debug, Clone)]
pub struct Names {
    /// The kernel.
    pub kernel: String,
    /// What it begins with.
    pub initrd: String,
    /// The kernel's parameters, which an image need not have.
    pub parameters: String,
}

/// A file to be published, open.
#[derive(Debug)]
pub struct BootFile {
    /// Its path in the image.
    pub path: String,
    /// Its content.
    pub content: File,
}

/// What is published beside the packed image.
#[derive(Debug)]
pub struct BootFiles {
    /// The kernel.
    pub kernel: BootFile,
    /// What it begins with.
    pub initrd: BootFile,
    /// The kernel's parameters, where the image has them.
    pub parameters: Option<BootFile>,
}

/// Chooses by itself.
const AUTO: &str = "auto";

/// How kernels are named, before their version.
const KERNELS: [&str; 4] = ["vmlinuz-", "Image-", "vmlinux-", "zImage-"];

/// How their initrd is named: (before, after the version).
const INITRDS: [(&str, &str); 5] =
    [("initrd-", ""), ("initrd.img-", ""), ("initramfs-", ".img"), ("initramfs-", ""), ("initrd-", ".img")];

/// Finds and opens them. `arch` as in `BUILD_ARCH`: on aarch64 the kernel that is called `vmlinuz` is `Image`.
pub fn find(image_root: &Tree, names: &Names, arch: &str) -> Result<BootFiles> {
    let boot = entries(image_root, "boot");
    let modules = entries(image_root, "lib/modules");
    let kernel = match names.kernel.as_str() {
        AUTO => newest_kernel(&boot, &modules).ok_or_else(|| missing("a kernel", &boot))?,
        "vmlinuz" if arch == "aarch64" => "Image",
        name => name,
    };
    let initrd = match names.initrd.as_str() {
        AUTO => {
            let real = real_name(image_root, kernel);
            let version = version_of(&real).or_else(|| version_of(kernel));
            let found = version.and_then(|version| initrd_of(version, &boot));
            found.ok_or_else(|| missing(&format!("the initrd of {kernel}"), &boot))?
        }
        name => name,
    };
    Ok(BootFiles {
        kernel: open(image_root, kernel)?.ok_or_else(|| missing(&format!("the kernel /boot/{kernel}"), &boot))?,
        initrd: open(image_root, initrd)?.ok_or_else(|| missing(&format!("the initrd /boot/{initrd}"), &boot))?,
        parameters: open(image_root, &names.parameters)?,
    })
}

/// Whether the image is one that nobody boots: nothing in /boot is called like a kernel.
pub fn has_none(image_root: &Tree) -> bool {
    let is_kernel =
        |name: &String| ["vmlinu", "Image", "zImage", "bzImage"].iter().any(|begin| name.starts_with(begin));
    !entries(image_root, "boot").iter().any(is_kernel)
}

fn missing(what: &str, boot: &[String]) -> Error {
    let holds = if boot.is_empty() { "nothing".to_owned() } else { boot.join(", ") };
    Error::new(format!("find {what} in the image"))
        .because(format!("no regular file of the image; /boot holds {holds}"))
        .advise("name one of them by KERNEL_FILENAME and INITRD_FILENAME, or 'auto'")
}

/// Opens /boot/`name`, every link on the way resolved inside the image. What is no regular file is not there: a fifo would hang, and a
/// device would not end.
fn open(image_root: &Tree, name: &str) -> Result<Option<BootFile>> {
    let path = format!("boot/{name}");
    let attempted = || format!("open /{path} of the image");
    // Looked at before it is opened for reading: to open a device can do something.
    let Ok(handle) = image_root.open_at(&path, OFlags::PATH, Mode::empty()) else { return Ok(None) };
    let found = rustix::fs::fstat(&handle).attempt(attempted)?;
    if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
        return Ok(None);
    }
    let content = image_root.open_regular(&path, OFlags::RDONLY).attempt(attempted)?;
    Ok(Some(BootFile { path, content }))
}

/// The last name of what /boot/`name` leads to, if that is a link to one.
fn real_name(image_root: &Tree, name: &str) -> String {
    let handle = image_root.handle(Path::new("boot").join(name));
    let target = handle.ok().and_then(|link| rustix::fs::readlinkat(link, "", Vec::new()).ok());
    let target = target.map(|t| t.to_string_lossy().into_owned()).unwrap_or_default();
    target.rsplit('/').next().filter(|last| !last.is_empty()).unwrap_or(name).to_owned()
}

/// Names in a folder of the image, in order; none where there is no such folder.
fn entries(image_root: &Tree, path: &str) -> Vec<String> {
    let folder = image_root.folder(path).and_then(|f| f.reopen());
    let Some(folder) = folder.ok().and_then(|fd| Dir::new(fd).ok()) else { return Vec::new() };
    let mut names: Vec<_> = folder
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|n| n != "." && n != "..")
        .collect();
    names.sort();
    names
}

/// The kernel of the highest version; one whose modules are there comes before one whose are not.
fn newest_kernel<'a>(boot: &'a [String], modules: &[String]) -> Option<&'a str> {
    let kernels = boot.iter().filter_map(|name| Some((name.as_str(), version_of(name)?)));
    let newest = kernels.max_by(|(_, a), (_, b)| {
        let has_modules = |version: &str| modules.iter().any(|m| m == version);
        has_modules(a).cmp(&has_modules(b)).then_with(|| compare_versions(a, b))
    });
    newest.map(|(name, _)| name)
}

fn version_of(kernel: &str) -> Option<&str> {
    let version = KERNELS.iter().find_map(|prefix| kernel.strip_prefix(prefix))?;
    // Beside a kernel lie its checksum and what it was before an upgrade.
    let beside = [".hmac", ".old", ".sig", ".gz.hmac"].iter().any(|suffix| version.ends_with(suffix));
    (!beside && version.starts_with(|c: char| c.is_ascii_digit())).then_some(version)
}

fn initrd_of<'a>(version: &str, boot: &'a [String]) -> Option<&'a str> {
    let wanted = INITRDS.iter().map(|(before, after)| format!("{before}{version}{after}"));
    wanted.filter_map(|name| boot.iter().find(|n| **n == name)).map(String::as_str).next()
}

/// Versions as package managers order them: numbers by value, the rest as text.
fn compare_versions(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (parts(a), parts(b));
    loop {
        let order = match (a.next(), b.next()) {
            (None, None) => return Ordering::Equal,
            (x, y) => match (x.map(number), y.map(number)) {
                (Some(Some(x)), Some(Some(y))) => x.cmp(&y),
                // 6.1-rc1 comes before 6.1.1: a word comes before a number.
                (Some(None), Some(Some(_))) => Ordering::Less,
                (Some(Some(_)), Some(None)) => Ordering::Greater,
                _ => x.cmp(&y),
            },
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

/// The runs of digits and of letters.
fn parts(version: &str) -> impl Iterator<Item = &str> {
    let mut rest = version;
    std::iter::from_fn(move || {
        rest = rest.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
        let digits = rest.bytes().next()?.is_ascii_digit();
        let same = |b: u8| b.is_ascii_alphanumeric() && b.is_ascii_digit() == digits;
        let (run, after) = rest.split_at(rest.bytes().position(|b| !same(b)).unwrap_or(rest.len()));
        rest = after;
        Some(run)
    })
}

fn number(part: &str) -> Option<u64> {
    part.parse().ok()
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
    fn links_are_resolved_inside_the_image() {
        let (dir, tree) = image(&["boot/vmlinuz-6.1", "boot/initrd-6.1", "etc/passwd"]);
        symlink("/boot/vmlinuz-6.1", dir.path().join("boot/vmlinuz")).unwrap();
        symlink("initrd-6.1", dir.path().join("boot/initrd")).unwrap();
        let found = find(&tree, &names("vmlinuz", "initrd"), "x86_64").unwrap();
        assert_eq!((text(found.kernel), text(found.initrd)), ("boot/vmlinuz-6.1".into(), "boot/initrd-6.1".into()));
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
        rustix::fs::mknodat(tree.folder("boot").unwrap(), "vmlinuz", FileType::Fifo, Mode::from_raw_mode(0o600), 0)
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
        assert_eq!(found.initrd.path, "boot/initrd-5.14.21-150500.55.10-default");
        symlink("vmlinuz-5.14.21-150500.55.9-default", dir.path().join("boot/vmlinuz")).unwrap();
        let found = find(&tree, &names("vmlinuz", "auto"), "x86_64").unwrap();
        assert_eq!(found.initrd.path, "boot/initrd-5.14.21-150500.55.9-default");
    }

    #[test]
    fn versions_are_ordered_as_package_managers_do() {
        for (older, newer) in
            [("6.1.9", "6.1.10"), ("6.1.0-rc1", "6.1.0-1"), ("5.14", "6"), ("6.1", "6.1.1"), ("6.1-a", "6.1-b")]
        {
            assert_eq!(compare_versions(older, newer), Ordering::Less, "{older} {newer}");
            assert_eq!(compare_versions(newer, older), Ordering::Greater, "{older} {newer}");
        }
        assert_eq!(compare_versions("6.1", "6.1"), Ordering::Equal);
    }
}
