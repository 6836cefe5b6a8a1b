//! Replaces the image's /etc/resolv.conf with the container's text while the jail is open, and restores it afterwards.
//!
//! The container's text comes as a file, not as a mount, so that programs can rename, remove and replace it as on a
//! node. A link into /run is left as it is, and leads to a file in the jail's own /run. Anything else at
//! /etc/resolv.conf is renamed into a directory of ours, and a new file takes its name. When the environment closes, or
//! after a crash, the image's own file is renamed back unless somebody has touched the new one.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, FlockOperation, Mode, Stat};
use rustix::io::Errno;

use crate::error::{Advise, Attempt, Error, Result};
use crate::jail::resolv_conf::{LIMIT, link_into_run, of_container};
use crate::sys::file_kind::FileKind;
use crate::sys::tree::Tree;
use crate::transfer::checksum::sha256_of;
use crate::volume::layout;

/// Returns whether programs in the jail read `text` only if the image's file is replaced. `own_run` is true if the jail
/// has a /run of its own.
pub(crate) fn needs_replacing(image_root: &Tree, text: &[u8], own_run: bool) -> Result<bool> {
    let attempted = || "look at /etc/resolv.conf of the image";
    let etc = match image_root.directory("etc") {
        Ok(etc) => etc,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(false),
        Err(e) => return Err(e).attempt(attempted),
    };
    Ok(match etc.look("resolv.conf").attempt(attempted)?.as_ref().map(FileKind::of) {
        None => true,
        Some(FileKind::Regular) => !etc.read("resolv.conf", LIMIT).is_ok_and(|own| own == text),
        Some(FileKind::SymbolicLink) => !(own_run && link_into_run(image_root).is_some()),
        Some(_) => false,
    })
}

/// Puts the pod's (or the node's) resolv.conf into the image, for plain sessions and for programs that run while no
/// jail is open. [`SIDECAR`] restores the image's own file later.
pub(crate) fn lend(image_root: &Tree) -> Result<()> {
    // An earlier run may have been killed before it restored the file.
    SIDECAR.restore(image_root)?;
    match of_container() {
        // Decide as for plain mode, in which /run is the image's own.
        Some(text) if needs_replacing(image_root, &text, false)? => {
            let replaced = SIDECAR.replace(image_root, &text);
            replaced.attempt(|| "put the pod's /etc/resolv.conf into the image").map(|_| ())
        }
        _ => Ok(()),
    }
}

/// Someone who temporarily replaces the image's resolv.conf, identified by the name of the directory of the saved file.
/// A sidecar's name differs from an environment's, so the sidecar's resolv.conf stays while environments open, close,
/// and clean up after killed environments.
pub(crate) struct Replacer(&'static str);

/// A build environment.
pub(crate) const ENVIRONMENT: Replacer = Replacer(layout::RESOLV_CONF);

/// A sidecar, for sessions of any kind.
pub(crate) const SIDECAR: Replacer = Replacer(layout::SIDECAR_RESOLV_CONF);

/// Directories of the image that can contain a replacer's directory, best first. A jail covers /proc and /sys with its
/// own mounts, so that no session sees the saved file there. An image without /proc and /sys has no packages that would
/// notice the saved file in /etc.
fn locations(image_root: &Tree) -> impl Iterator<Item = Tree> {
    let covered = ["proc", "sys"].into_iter().filter_map(|name| image_root.directory_of_same_mount(name).ok());
    covered.chain(image_root.directory("etc"))
}

// Names of the files in a replacer's directory. A session can change these files, because they are in the image root.
// So they must not decide about anything but resolv.conf.
/// The image's own resolv.conf.
const ORIGINAL: &str = "original";
/// The new file, until it is renamed to /etc.
const NEW: &str = "new";
/// The record: the inode number of the new file, and the SHA-256 of its text.
const RECORD: &str = "note";

/// Names of all files in a replacer's directory, including the temporary names of the new file and the record.
const OURS: [&str; 5] = [ORIGINAL, NEW, RECORD, ".new.ims-sshd", ".note.ims-sshd"];

fn is_directory(tree: &Tree, name: &str) -> bool {
    matches!(tree.look(name), Ok(Some(found)) if FileType::from_raw_mode(found.st_mode) == FileType::Directory)
}

/// A replaced resolv.conf. Its directories are open, so that a session that renames them does not change what is
/// restored.
#[derive(Debug)]
pub(crate) struct Replaced {
    etc: Tree,
    location: Tree,
    name: &'static str,
    /// Lock (flock(2)) that keeps another program that enters the same image root from restoring the file.
    _lock: OwnedFd,
}

impl Replacer {
    /// Replaces the image's own file with `text`. Fails with [`io::ErrorKind::ResourceBusy`] if a live replacer of this
    /// name has done so.
    pub(crate) fn replace(&self, image_root: &Tree, text: &[u8]) -> io::Result<Replaced> {
        let etc = image_root.directory("etc")?;
        let location = self.make_directory(image_root)?;
        let lock = lock(&location.directory_without_links(self.0)?)?;
        let replaced = Replaced { etc, location, name: self.0, _lock: lock };
        replaced.put(text).inspect_err(|_| drop(replaced.restore()))?;
        Ok(replaced)
    }

    /// Creates the replacer's directory. Returns the directory that contains it.
    fn make_directory(&self, image_root: &Tree) -> io::Result<Tree> {
        let mut last = io::ErrorKind::NotFound.into();
        for location in locations(image_root) {
            let mode = Mode::from_raw_mode(0o700);
            match location.keeping_times(|| rustix::fs::mkdirat(&location, self.0, mode).map_err(Into::into)) {
                Ok(()) => return Ok(location),
                // The directory exists, so a replacer of this name is alive: a killed replacer's directory was removed
                // at the start.
                Err(_) if location.directory_without_links(self.0).is_ok() => {
                    return Err(io::ErrorKind::ResourceBusy.into());
                }
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    /// Restores the image's own file after a replacer of this name was killed. Returns `None` if no replacer was killed
    /// or one is alive, otherwise whether the new file was changed.
    pub(crate) fn restore(&self, image_root: &Tree) -> Result<Option<bool>> {
        for location in locations(image_root) {
            let Ok(saved) = location.directory_without_links(self.0) else { continue };
            let lock = match lock(&saved) {
                Err(e) if e.kind() == io::ErrorKind::ResourceBusy => return Ok(None),
                other => other.attempt(|| "lock the saved /etc/resolv.conf of the image")?,
            };
            let etc = match image_root.directory("etc") {
                Ok(etc) => etc,
                // If a session has removed /etc, the saved directory stands in for /etc, so that the cleanup is the
                // same.
                Err(_) => location.directory(self.0).attempt(|| "open the directory of the saved /etc/resolv.conf")?,
            };
            return Replaced { etc, location, name: self.0, _lock: lock }.restore().map(Some);
        }
        Ok(None)
    }
}

/// Locks a replacer's directory. Fails with [`io::ErrorKind::ResourceBusy`] if another process has locked it, which
/// cannot be seen on a file system without locks (NFS).
fn lock(saved: &Tree) -> io::Result<OwnedFd> {
    let directory = saved.reopen()?;
    match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Err(io::ErrorKind::ResourceBusy.into()),
        _ => Ok(directory),
    }
}

impl Replaced {
    fn directory(&self) -> io::Result<Tree> {
        self.location.directory_without_links(self.name)
    }

    fn put(&self, text: &[u8]) -> io::Result<()> {
        let saved = self.directory()?;
        saved.replace(NEW, text)?;
        let inode = saved.look(NEW)?.map_or(0, |found| found.st_ino);
        saved.replace(RECORD, format!("{inode} {}", sha256_of(text)).as_bytes())?;
        self.etc.keeping_times(|| {
            if self.etc.look("resolv.conf")?.is_some() {
                self.etc.rename_to("resolv.conf", &saved, ORIGINAL)?;
            }
            saved.rename_to(NEW, &self.etc, "resolv.conf")
        })
    }

    /// Restores the image's own file unless somebody has changed the new file, which then stays. Returns whether the
    /// new file was changed.
    pub(crate) fn restore(&self) -> Result<bool> {
        let restore = || -> io::Result<bool> {
            let saved = match self.directory() {
                // If a session has removed the directory, nothing is left to restore.
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
                directory => directory?,
            };
            let changed = self.restore_from(&saved)?;
            for name in OURS.into_iter().filter(|name| !is_directory(&saved, name)) {
                saved.remove(name)?;
            }
            if !saved.names()?.is_empty() {
                return Ok(changed);
            }
            self.location.keeping_times(|| self.location.remove_directory(self.name))?;
            Ok(changed)
        };
        let attempted = || "restore the image's own /etc/resolv.conf";
        let changed = restore().attempt(attempted).advise("the image root has to be writable")?;
        let Ok(left) = self.directory() else { return Ok(changed) };
        let names = left.names().attempt(attempted)?;
        let name = names.first().map(|name| name.display().to_string()).unwrap_or_default();
        Err(Error::new(attempted())
            .because(format!("{} contains '{name}', which ims-sshd did not create", left.shown().display()))
            .advise("remove that directory from the image"))
    }

    /// Renames the saved file back unless the new file was changed. Returns whether the new file was changed.
    fn restore_from(&self, saved: &Tree) -> io::Result<bool> {
        let has_original = saved.look(ORIGINAL)?.is_some();
        let record = saved.read(RECORD, LIMIT).unwrap_or_default();
        if record.is_empty() || saved.look(NEW)?.is_some() {
            // The replacer was killed before the new file was in /etc.
            if has_original && self.etc.look("resolv.conf")?.is_none() {
                self.etc.keeping_times(|| saved.rename_to(ORIGINAL, &self.etc, "resolv.conf"))?;
            }
            return Ok(false);
        }
        self.etc.keeping_times(|| self.find_and_restore(saved, &record, has_original))
    }

    fn find_and_restore(&self, saved: &Tree, record: &[u8], has_original: bool) -> io::Result<bool> {
        if self.is_ours("resolv.conf", record) {
            self.restore_as("resolv.conf", saved, has_original)?;
            return Ok(false);
        }
        // A session may have renamed the file, for example to keep it as a backup. The image's own file then gets that
        // name.
        for name in self.etc.names()? {
            if let Some(name) = name.to_str().filter(|name| self.is_ours(name, record)) {
                self.restore_as(name, saved, has_original)?;
                break;
            }
        }
        Ok(true)
    }

    /// Replaces the new file with the image's own by one rename, so that a crash leaves one of the two. Without an
    /// original, removes the new file.
    fn restore_as(&self, name: &str, saved: &Tree, has_original: bool) -> io::Result<()> {
        if has_original { saved.rename_over(ORIGINAL, &self.etc, name) } else { self.etc.remove(name).map(|_| ()) }
    }

    /// Returns whether the file of this name in /etc is the new one, unchanged.
    fn is_ours(&self, name: &str, record: &[u8]) -> bool {
        let as_made = |found: &Stat| {
            FileType::from_raw_mode(found.st_mode) == FileType::RegularFile
                && (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (0o644, 0, 0)
        };
        let Ok(Some(found)) = self.etc.look(name) else { return false };
        let inode = format!("{} ", found.st_ino);
        as_made(&found)
            && record
                .strip_prefix(inode.as_bytes())
                .is_some_and(|sum| self.etc.read(name, LIMIT).is_ok_and(|text| sha256_of(&text).as_bytes() == sum))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jail::resolv_conf::RESOLV_CONF;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::path::PathBuf;

    struct Image {
        dir: tempfile::TempDir,
        tree: Tree,
    }

    impl Image {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            for name in ["etc", "proc"] {
                std::fs::create_dir(dir.path().join(name)).unwrap();
            }
            let tree = Tree::open(dir.path()).unwrap();
            Self { dir, tree }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn text(&self) -> String {
            std::fs::read_to_string(self.path(RESOLV_CONF)).unwrap()
        }

        fn write(&self, text: &str) {
            std::fs::write(self.path(RESOLV_CONF), text).unwrap();
        }

        fn replace(&self, text: &str) -> Replaced {
            ENVIRONMENT.replace(&self.tree, text.as_bytes()).unwrap()
        }

        /// Name, inode and mtime of every file.
        fn state(&self) -> Vec<(PathBuf, u64, i64, i64)> {
            let mut found = Vec::new();
            for name in ["etc", "proc"] {
                let entries = std::fs::read_dir(self.path(name)).unwrap().map(|entry| entry.unwrap().path());
                found.extend(entries.chain([self.path(name)]).map(|path| {
                    let m = std::fs::symlink_metadata(&path).unwrap();
                    (path, m.ino(), m.mtime(), m.mtime_nsec())
                }));
            }
            found.sort();
            found
        }
    }

    #[test]
    fn resolv_conf_is_replaced_unless_the_image_already_leads_to_the_same_text() {
        let image = Image::new();
        std::fs::create_dir(image.path("run")).unwrap();
        symlink("/run", image.path("var-run")).unwrap();
        let needed = |own_run| needs_replacing(&image.tree, b"a", own_run).unwrap();
        assert!(needed(true), "there is no file");
        image.write("a");
        assert!(!needed(true), "the same text");
        image.write("b");
        assert!(needed(true));
        for (target, below) in [
            ("/run/netconfig/resolv.conf", Some("netconfig/resolv.conf")),
            ("../run/a/b", Some("a/b")),
            ("../var-run/x/../c", Some("c")),
            ("/etc/other", None),
            ("/nowhere/resolv.conf", None),
            ("resolv.conf", None),
            ("/run", None),
        ] {
            std::fs::remove_file(image.path(RESOLV_CONF)).unwrap();
            symlink(target, image.path(RESOLV_CONF)).unwrap();
            assert_eq!(link_into_run(&image.tree), below.map(PathBuf::from), "{target}");
            assert_eq!((needed(true), needed(false)), (below.is_none(), true), "{target}");
        }
        std::fs::remove_file(image.path(RESOLV_CONF)).unwrap();
        std::fs::create_dir(image.path(RESOLV_CONF)).unwrap();
        assert!(!needed(true), "a directory");
        std::fs::remove_dir_all(image.path("etc")).unwrap();
        assert!(!needed(true), "no /etc");
    }

    #[test]
    fn untouched_resolv_conf_is_restored_with_its_inode_and_times() {
        let shapes: [fn(&Image); 4] = [
            |_| {},
            |image| image.write("image's"),
            |image| symlink("/run/netconfig/resolv.conf", image.path(RESOLV_CONF)).unwrap(),
            |image| std::fs::remove_dir(image.path("proc")).unwrap(),
        ];
        for (number, shape) in shapes.iter().enumerate() {
            let image = Image::new();
            shape(&image);
            let state = || if number == 3 { Vec::new() } else { image.state() };
            let before = state();
            let replaced = image.replace("container's");
            assert_eq!(image.text(), "container's");
            assert_eq!(std::fs::metadata(image.path(RESOLV_CONF)).unwrap().mode() & 0o777, 0o644);
            assert!(!replaced.restore().unwrap());
            assert_eq!(state(), before, "{number}");
            assert_eq!(ENVIRONMENT.restore(&image.tree).unwrap(), None, "nothing is replaced");
            // Stand in for a killed replacer, which is found by its name.
            image.replace("container's");
            assert_eq!(ENVIRONMENT.restore(&image.tree).unwrap(), Some(false));
            assert_eq!(state(), before, "{number}");
            if number == 3 {
                assert_eq!(std::fs::read_dir(image.path("etc")).unwrap().count(), 0);
            }
        }
    }

    #[test]
    fn replacer_killed_at_any_step_loses_nothing() {
        for step in 0..5 {
            let image = Image::new();
            image.write("image's");
            let before = image.state();
            drop(image.replace("container's"));
            let saved = image.path("proc").join(ENVIRONMENT.0);
            let (file, original) = (image.path(RESOLV_CONF), saved.join(ORIGINAL));
            // Undo the steps, the last one first.
            if step > 0 {
                std::fs::rename(&file, saved.join(NEW)).unwrap();
            }
            if step > 1 {
                std::fs::rename(&original, &file).unwrap();
            }
            if step > 2 {
                std::fs::remove_file(saved.join(RECORD)).unwrap();
            }
            if step > 3 {
                std::fs::remove_file(saved.join(NEW)).unwrap();
            }
            assert_eq!(ENVIRONMENT.restore(&image.tree).unwrap(), Some(false), "{step}");
            assert_eq!(image.text(), "image's");
            let times =
                |state: &[(PathBuf, u64, i64, i64)]| state.iter().map(|s| (s.0.clone(), s.1)).collect::<Vec<_>>();
            assert_eq!(times(&image.state()), times(&before), "{step}");
        }
    }

    type Action = (fn(&Image), Option<&'static str>);

    #[test]
    fn changes_of_a_session_to_resolv_conf_stay_in_the_image() {
        let overwrite = |image: &Image, text: &str| {
            std::fs::write(image.path("etc/new"), text).unwrap();
            std::fs::rename(image.path("etc/new"), image.path(RESOLV_CONF)).unwrap();
        };
        let actions: [Action; 5] = [
            (|image| image.write("edited"), Some("edited")),
            (|image| std::fs::remove_file(image.path(RESOLV_CONF)).unwrap(), None),
            (
                |image| std::fs::set_permissions(image.path(RESOLV_CONF), PermissionsExt::from_mode(0o600)).unwrap(),
                Some("container's"),
            ),
            (|image| std::fs::rename(image.path(RESOLV_CONF), image.path("etc/moved")).unwrap(), None),
            (
                |image| {
                    std::fs::rename(image.path(RESOLV_CONF), image.path("etc/moved")).unwrap();
                    image.write("new");
                },
                Some("new"),
            ),
        ];
        for (number, (act, wanted)) in actions.iter().enumerate() {
            for own in [Some("image's"), None] {
                let image = Image::new();
                if let Some(own) = own {
                    image.write(own);
                }
                let replaced = image.replace("container's");
                act(&image);
                assert!(replaced.restore().unwrap(), "{number}");
                assert_eq!(std::fs::read_to_string(image.path(RESOLV_CONF)).ok().as_deref(), *wanted, "{number}");
                // The file that the session moved away becomes the image's own.
                let moved = std::fs::read_to_string(image.path("etc/moved")).ok();
                assert_eq!(moved.as_deref(), own.filter(|_| number > 2), "{number}");
                assert_eq!(std::fs::read_dir(image.path("proc")).unwrap().count(), 0);
            }
        }
        let image = Image::new();
        image.write("image's");
        let replaced = image.replace("container's");
        overwrite(&image, "container's");
        assert!(replaced.restore().unwrap(), "another file with the same text");
        assert_eq!(image.text(), "container's");
        let replaced = image.replace("again");
        std::fs::remove_dir_all(image.path("etc")).unwrap();
        assert!(replaced.restore().unwrap(), "all of /etc is gone");
        std::fs::create_dir(image.path("etc")).unwrap();
        image.replace("again");
        std::fs::remove_dir_all(image.path("etc")).unwrap();
        assert_eq!(ENVIRONMENT.restore(&image.tree).unwrap(), Some(true));
        assert_eq!(std::fs::read_dir(image.path("proc")).unwrap().count(), 0);
    }

    #[test]
    fn resolv_conf_of_a_sidecar_stays_while_environments_come_and_go() {
        let image = Image::new();
        image.write("image's");
        let before = image.state();
        SIDECAR.replace(&image.tree, b"pod's").unwrap();
        assert_eq!(ENVIRONMENT.restore(&image.tree).unwrap(), None, "an environment that begins");
        image.replace("container's");
        assert_eq!(image.text(), "container's");
        assert_eq!(ENVIRONMENT.restore(&image.tree).unwrap(), Some(false));
        assert_eq!(image.text(), "pod's");
        assert_eq!(SIDECAR.restore(&image.tree).unwrap(), Some(false));
        assert_eq!(image.state(), before);
    }

    #[test]
    fn resolv_conf_of_a_live_replacer_stays() {
        let image = Image::new();
        image.write("image's");
        let replaced = image.replace("container's");
        assert_eq!(ENVIRONMENT.restore(&image.tree).unwrap(), None);
        assert_eq!(ENVIRONMENT.replace(&image.tree, b"other").unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        assert_eq!(image.text(), "container's");
        assert!(!replaced.restore().unwrap());
        assert_eq!(image.text(), "image's");
    }

    #[test]
    fn foreign_directory_of_the_replacers_name_is_refused_and_a_leftover_is_removed() {
        for (name, content) in [("resolv.conf", "x"), ("note", "odd"), ("note/x", ""), (".new.ims-sshd/x", "")] {
            let image = Image::new();
            image.write("image's");
            let saved = image.path("proc").join(ENVIRONMENT.0);
            let file = saved.join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, content).unwrap();
            let result = ENVIRONMENT.restore(&image.tree);
            assert_eq!(image.text(), "image's");
            if name == "note" {
                result.unwrap();
                assert!(!saved.exists(), "{name}");
                continue;
            }
            let error = result.unwrap_err().to_string();
            for words in ["/proc/.ims-sshd.resolv.conf", name.split('/').next().unwrap(), "remove that directory"] {
                assert!(error.contains(words), "{words}: {error}");
            }
        }
        // Stand in for a replacer that was killed while it wrote a file there.
        let image = Image::new();
        let saved = image.path("proc").join(ENVIRONMENT.0);
        std::fs::create_dir(&saved).unwrap();
        std::fs::write(saved.join(".note.ims-sshd"), "1").unwrap();
        ENVIRONMENT.restore(&image.tree).unwrap();
        assert!(!saved.exists());
    }

    #[test]
    fn immutable_etc_is_refused_and_nothing_is_left_in_the_image() {
        let image = Image::new();
        image.write("image's");
        let chattr = |flag: &str| {
            assert!(std::process::Command::new("chattr").arg(flag).arg(image.path("etc")).status().unwrap().success());
        };
        chattr("+i");
        let replaced = ENVIRONMENT.replace(&image.tree, b"container's");
        chattr("-i");
        assert_eq!(replaced.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(std::fs::read_dir(image.path("proc")).unwrap().count(), 0);
        assert_eq!(image.text(), "image's");
    }

    #[test]
    fn link_of_the_replacers_name_in_the_image_is_not_followed() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join(ORIGINAL), "outside").unwrap();
        let image = Image::new();
        symlink(outside.path(), image.path("proc").join(ENVIRONMENT.0)).unwrap();
        assert_eq!(ENVIRONMENT.restore(&image.tree).unwrap(), None);
        image.replace("container's").restore().unwrap();
        assert_eq!(std::fs::read_to_string(outside.path().join(ORIGINAL)).unwrap(), "outside");
    }
}
