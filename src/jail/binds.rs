//! Bind mounts: directories and files of the container that a job wants to see in the jail, as `SOURCE[:TARGET[:ro]]`.
//! A colon in a path is written `\:`; a backslash before a colon or another backslash is written `\\`.
//!
//! The source comes from the administrator and is trusted; the target is in the image and is not.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Component, Path, PathBuf};

use rustix::mount::MountAttrFlags;

use crate::error::{Attempt, Error, Result};
use crate::sys::file_kind::FileKind;
use crate::sys::mounts::Detached;
use crate::sys::named;
use crate::sys::tree::Tree;

/// One bind mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// Source: a path of the container, with links resolved.
    pub(crate) source: PathBuf,
    /// Target, relative to the image root.
    pub(crate) target: PathBuf,
    /// Read-only, including everything mounted below it.
    pub(crate) read_only: bool,
}

/// Paths that the jail itself mounts or puts into the image.
const TAKEN_TARGETS: [&str; 5] = ["proc", "sys", "dev", "run", "etc/resolv.conf"];

/// Paths of the container that the jail hides or restricts, so a bind mount must not expose them. /run/ims-sshd holds
/// the private host keys of open environments.
const HIDDEN_SOURCES: [&str; 4] = ["/proc", "/sys", "/dev", "/run/ims-sshd"];

impl Bind {
    /// Parses `SOURCE[:TARGET[:ro]]`, with `\:` for a colon and `\\` for a backslash, and checks the source. The error
    /// begins with SOURCE or TARGET.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        let words = words(text);
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        let (source, target, read_only) = match words[..] {
            [source] => (source, None, false),
            [source, target] => (source, Some(target), false),
            [source, target, "ro"] => (source, Some(target), true),
            _ => return Err("expected SOURCE[:TARGET[:ro]], with '\\:' for a colon in a path".into()),
        };
        let named = std::path::absolute(source).map_err(|e| format!("SOURCE is '{source}': {e}"))?;
        let refuse = |why: &str| Err(format!("SOURCE is '{}': {why}", named.display()));
        let real = match named::resolve(&named) {
            Ok(real) => real,
            Err(e) => return refuse(&e.to_string()),
        };
        match std::fs::symlink_metadata(&real) {
            Ok(found) if found.is_dir() || found.is_file() => {}
            Ok(_) => return refuse("expected a directory or a regular file"),
            Err(e) => return refuse(&e.to_string()),
        }
        if let Some(hidden) = HIDDEN_SOURCES.iter().find(|hidden| overlap(&real, Path::new(hidden))) {
            return refuse(&format!("it overlaps {hidden}, which sessions must not reach"));
        }
        let target = target.map_or(named.clone(), PathBuf::from);
        let refuse = |why: &str| Err(format!("TARGET is '{}': {why}", target.display()));
        if !target.is_absolute() || target.components().any(|c| c == Component::ParentDir) {
            return refuse("expected an absolute path in the image without '..'");
        }
        let relative: PathBuf = target.components().filter(|c| matches!(c, Component::Normal(_))).collect();
        if let Some(why) = taken(&relative) {
            return refuse(&why);
        }
        Ok(Self { source: real, target: relative, read_only })
    }

    /// Copies the mount of the source with everything mounted below it: a mount below it may cover something on
    /// purpose.
    pub(crate) fn copy(&self) -> Result<Detached> {
        let mut attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
        attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, self.read_only);
        let copy =
            named::open_without_links(&self.source).and_then(|source| Detached::copy_of_fd(source, true, attributes));
        copy.map_err(|e| self.refuse(format!("the source: {e}")))
    }

    /// Attaches the copy to the target.
    pub(crate) fn attach(&self, copy: Detached, root: &Tree) -> Result<()> {
        let target = root.handle(&self.target).map_err(|e| self.refuse(format!("the target: {e}")))?;
        // move_mount(2) fails with EINVAL if a directory is attached to a file or the reverse, so name the types in the
        // error. `place` has checked both types, but either file may have been replaced since.
        let kind =
            |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).map(|found| FileKind::of(&found)).attempt(|| self.attempted());
        let (source_is, target_is) = (kind(copy.as_fd())?, kind(target.as_fd())?);
        if source_is != target_is {
            let why = format!("the source is now {source_is} and the target {target_is}: one of them was replaced");
            return Err(self.refuse(why).advise("try again while nothing changes either of them"));
        }
        copy.attach(target).attempt(|| self.attempted()).map(drop)
    }

    pub(crate) fn refuse(&self, why: String) -> Error {
        Error::new(self.attempted()).because(why)
    }

    pub(crate) fn attempted(&self) -> String {
        format!("bind {} to /{} of the image", self.source.display(), self.target.display())
    }
}

/// Splits at colons, and removes the backslash that protects a colon or another backslash. Other backslashes stay.
fn words(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(character) = rest.next() {
        let character = match character {
            ':' => {
                words.push(String::new());
                continue;
            }
            '\\' => rest.next_if(|next| [':', '\\'].contains(next)).unwrap_or(character),
            other => other,
        };
        if let Some(word) = words.last_mut() {
            word.push(character);
        }
    }
    words
}

/// True if the paths are equal or one contains the other.
pub(crate) fn overlap(a: &Path, b: &Path) -> bool {
    a.starts_with(b) || b.starts_with(a)
}

/// Reason why nothing can be bound at `target`, relative to the image root.
pub(crate) fn taken(target: &Path) -> Option<String> {
    if target.as_os_str().is_empty() {
        return Some("that is the image root itself".into());
    }
    // The record of created mount points has one path on each line, which a newline in a path would break.
    if target.as_os_str().as_encoded_bytes().iter().any(u8::is_ascii_control) {
        return Some("expected a path without control characters".into());
    }
    // A target above one of these paths is allowed: a bind mount may cover all of /etc, including resolv.conf.
    let taken = TAKEN_TARGETS.iter().find(|taken| target.starts_with(taken));
    taken.map(|taken| format!("/{taken} is the jail's own"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn backslash_protects_a_colon_of_a_path() {
        for (text, wanted) in [
            (r"/a\:b", &["/a:b"][..]),
            (r"/a\:b:/c\:d:ro", &["/a:b", "/c:d", "ro"]),
            (r"/a\\:/b", &[r"/a\", "/b"]),
            (r"/a\b\", &[r"/a\b\"]),
            ("", &[""]),
            (":", &["", ""]),
        ] {
            assert_eq!(words(text), wanted, "{text}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap().join("a:b");
        std::fs::create_dir(&path).unwrap();
        let text = path.to_str().unwrap().replace(':', r"\:");
        let bind = Bind::parse(&format!(r"{text}:/opt/c\:d:ro")).unwrap();
        assert_eq!(bind, Bind { source: path.clone(), target: "opt/c:d".into(), read_only: true });
        assert_eq!(Bind::parse(&text).unwrap().target, path.strip_prefix("/").unwrap());
        let refused = Bind::parse(path.to_str().unwrap()).unwrap_err();
        assert!(refused.contains("No such file"), "{refused}");
    }

    #[test]
    fn bind_is_parsed_as_source_target_and_ro() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        let shown = path.display();
        let bind = |target: &str, read_only| Bind { source: path.clone(), target: target.into(), read_only };
        assert_eq!(Bind::parse(&format!("{shown}:/opt//./repo/")).unwrap(), bind("opt/repo", false));
        assert_eq!(Bind::parse(&format!("{shown}:/opt:ro")).unwrap(), bind("opt", true));
        let same = path.strip_prefix("/").unwrap().to_str().unwrap();
        assert_eq!(Bind::parse(&shown.to_string()).unwrap(), bind(same, false));
        assert_eq!(Bind::parse(".:/opt").unwrap().source, std::env::current_dir().unwrap());
        std::os::unix::net::UnixListener::bind(path.join("socket")).unwrap();
        for (wrong, why) in [
            (format!("{shown}:/opt:rw"), "expected SOURCE[:TARGET[:ro]]"),
            (format!("{shown}:/opt:ro:ro"), "expected SOURCE[:TARGET[:ro]]"),
            (String::new(), "SOURCE is ''"),
            (format!("{shown}/missing:/opt"), "No such file"),
            (format!("{shown}/socket:/opt"), "expected a directory or a regular file"),
            ("/:/opt".into(), "it overlaps /proc"),
            ("/proc/sys:/opt".into(), "it overlaps /proc"),
            ("/dev/shm:/opt".into(), "it overlaps /dev"),
            (format!("{shown}:"), "expected an absolute path"),
            (format!("{shown}:opt"), "expected an absolute path"),
            (format!("{shown}:/opt/../etc"), "without '..'"),
            (format!("{shown}:/opt\nfile /etc/passwd"), "control characters"),
            (format!("{shown}:/"), "the image root itself"),
            (format!("{shown}:/proc"), "/proc is the jail's own"),
            (format!("{shown}://run/x"), "/run is the jail's own"),
            (format!("{shown}:/etc/resolv.conf"), "the jail's own"),
        ] {
            let refused = Bind::parse(&wrong).unwrap_err();
            assert!(refused.contains(why), "{wrong}: {refused}");
        }
    }

    #[test]
    fn source_or_target_replaced_before_the_mount_is_named_in_the_error() {
        let exchange = || {
            let dir = tempfile::tempdir().unwrap();
            let (root, source) = (dir.path().join("root"), dir.path().join("source"));
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("this test needs root");
            crate::sys::mounts::make_all_private().unwrap();
            std::fs::create_dir_all(root.join("target")).unwrap();
            std::fs::create_dir(&source).unwrap();
            let tree = Tree::open(&root).unwrap();
            let bind = Bind { source: source.clone(), target: "target".into(), read_only: false };
            let attach = || bind.copy().and_then(|copy| bind.attach(copy, &tree)).map_err(|e| e.to_string());
            let refused = |why: &str| {
                let error = attach().unwrap_err();
                assert!(error.contains(why), "{error}");
            };
            std::fs::remove_dir(&source).unwrap();
            refused("the source: No such file or directory");
            symlink("/etc", &source).unwrap();
            refused("the source is now a symbolic link and the target a directory");
            std::fs::remove_file(&source).unwrap();
            symlink("/", dir.path().join("way")).unwrap();
            let way = Bind { source: dir.path().join("way/etc"), ..bind.clone() };
            assert!(way.copy().unwrap_err().to_string().contains("the source: Too many levels"));
            std::fs::create_dir(&source).unwrap();
            std::fs::remove_dir(root.join("target")).unwrap();
            refused("the target: No such file or directory");
            std::fs::write(root.join("target"), "").unwrap();
            refused("the source is now a directory and the target a regular file");
        };
        // A thread of its own, since it gets a mount namespace of its own.
        std::thread::spawn(exchange).join().unwrap();
    }
}
