//! The image's /etc/resolv.conf: it holds the container's text while the jail is open, and its own before and after.
//!
//! It is no mount, so that it can be renamed, removed and replaced as on a node. A link into /run is left as it is, and leads to a file in
//! the jail's own /run. Anything else is moved aside, by rename, and a file of ours takes its place; at the end, or after a crash, it is
//! moved back if nobody has touched that file.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{FileType, FlockOperation, Mode, Stat};
use rustix::io::Errno;
use sha2::Digest;

use crate::error::{Advise, Attempt, Error, Result};
use crate::jail::resolv_conf::{LIMIT, link_into_run};
use crate::sys::file_kind::FileKind;
use crate::sys::tree::Tree;
use crate::volume::layout;

/// True if a program finds `text` only once a file of ours replaces the image's. `own_run`: /run is the jail's own and not the image's.
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

/// Someone who lends the image a text, by the name of the directory that holds what belongs to it. The names differ because a sidecar's text
/// stands there while environments come and go, and clean up after an earlier one.
pub(crate) struct Replacer(&'static str);

/// A build environment.
pub(crate) const ENVIRONMENT: Replacer = Replacer(layout::RESOLV_CONF);

/// A sidecar, for sessions of any kind.
pub(crate) const SIDECAR: Replacer = Replacer(layout::SIDECAR_RESOLV_CONF);

/// Directories of the image that can hold a lender's, the best first. A jail covers the first ones with its own mounts, so that no session
/// sees what was moved aside. An image without them has no packages that could mind.
fn places(image_root: &Tree) -> impl Iterator<Item = Tree> {
    let covered = ["proc", "sys"].into_iter().filter_map(|name| image_root.directory_of_same_mount(name).ok());
    covered.chain(image_root.directory("etc"))
}

/// In a lender's directory: what stood at /etc/resolv.conf; the file that is to stand there, until it does; and which one that is, its
/// inode's number and its text's SHA-256. All of it lies in the image root, so it is the image's word: it decides on nothing but this file.
const ORIGINAL: &str = "original";
const NEW: &str = "new";
const NOTE: &str = "note";

/// All of that; and under which names the latter two are written, which a kill leaves behind.
const OURS: [&str; 5] = [ORIGINAL, NEW, NOTE, ".new.ims-sshd", ".note.ims-sshd"];

fn is_folder(tree: &Tree, name: &str) -> bool {
    matches!(tree.look(name), Ok(Some(found)) if FileType::from_raw_mode(found.st_mode) == FileType::Directory)
}

/// A text that stands in the image, by descriptors: whoever renames directories meanwhile changes nothing about what is put back.
#[derive(Debug)]
pub(crate) struct Replaced {
    etc: Tree,
    place: Tree,
    name: &'static str,
    /// Locked as long as this value lives (flock(2)): another program that enters the same image root takes nothing back.
    _lock: OwnedFd,
}

impl Replacer {
    /// Puts `text` in the place of the image's own. [`io::ErrorKind::ResourceBusy`] where a lender of this name has done so and lives.
    pub(crate) fn replace(&self, image_root: &Tree, text: &[u8]) -> io::Result<Replaced> {
        let etc = image_root.directory("etc")?;
        let place = self.make_directory(image_root)?;
        let lock = lock(&place.directory_without_links(self.0)?)?;
        let replaced = Replaced { etc, place, name: self.0, _lock: lock };
        replaced.put(text).inspect_err(|_| drop(replaced.restore()))?;
        Ok(replaced)
    }

    /// Returns the directory in which the lender's was made.
    fn make_directory(&self, image_root: &Tree) -> io::Result<Tree> {
        let mut last = io::ErrorKind::NotFound.into();
        for place in places(image_root) {
            let made = place
                .keeping_times(|| rustix::fs::mkdirat(&place, self.0, Mode::from_raw_mode(0o700)).map_err(Into::into));
            match made {
                Ok(()) => return Ok(place),
                // The one of a lender that was killed has been taken back before.
                Err(_) if place.directory_without_links(self.0).is_ok() => {
                    return Err(io::ErrorKind::ResourceBusy.into());
                }
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    /// Puts the image's own back where an earlier lender of this name was killed. Returns nothing if there was none, or if it lives, else
    /// whether what was replaced has been changed.
    pub(crate) fn restore(&self, image_root: &Tree) -> Result<Option<bool>> {
        for place in places(image_root) {
            let Ok(aside) = place.directory_without_links(self.0) else { continue };
            let lock = match lock(&aside) {
                Err(e) if e.kind() == io::ErrorKind::ResourceBusy => return Ok(None),
                other => other.attempt(|| "lock what was put aside of the image's /etc/resolv.conf")?,
            };
            let etc = match image_root.directory("etc") {
                Ok(etc) => etc,
                // A session has removed it, with all that it held.
                Err(_) => place.directory(self.0).attempt(|| "open what was put aside")?,
            };
            return Replaced { etc, place, name: self.0, _lock: lock }.restore().map(Some);
        }
        Ok(None)
    }
}

/// Locks a lender's directory. [`io::ErrorKind::ResourceBusy`] if another process has. Where the file system has no locks (NFS), nobody has.
fn lock(aside: &Tree) -> io::Result<OwnedFd> {
    let directory = aside.reopen()?;
    match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Err(io::ErrorKind::ResourceBusy.into()),
        _ => Ok(directory),
    }
}

impl Replaced {
    fn directory(&self) -> io::Result<Tree> {
        self.place.directory_without_links(self.name)
    }

    fn put(&self, text: &[u8]) -> io::Result<()> {
        let aside = self.directory()?;
        aside.replace(NEW, text)?;
        let inode = aside.look(NEW)?.map_or(0, |found| found.st_ino);
        aside.replace(NOTE, format!("{inode} {}", digest(text)).as_bytes())?;
        self.etc.keeping_times(|| {
            if self.etc.look("resolv.conf")?.is_some() {
                self.etc.rename_to("resolv.conf", &aside, ORIGINAL)?;
            }
            aside.rename_to(NEW, &self.etc, "resolv.conf")
        })
    }

    /// Puts the image's own back, unless somebody has changed what was replaced: then that stays. Returns whether it was changed.
    pub(crate) fn restore(&self) -> Result<bool> {
        let put_back = || -> io::Result<bool> {
            let aside = match self.directory() {
                // Somebody has removed it.
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
                directory => directory?,
            };
            let changed = self.settle(&aside)?;
            for name in OURS.into_iter().filter(|name| !is_folder(&aside, name)) {
                aside.remove(name)?;
            }
            if !aside.names()?.is_empty() {
                return Ok(changed);
            }
            self.place.keeping_times(|| self.place.remove_directory(self.name))?;
            Ok(changed)
        };
        let attempted = || "put the image's own /etc/resolv.conf back";
        let changed = put_back().attempt(attempted).advise("the image root has to be writable")?;
        let Ok(left) = self.directory() else { return Ok(changed) };
        let names = left.names().attempt(attempted)?;
        let name = names.first().map(|name| name.display().to_string()).unwrap_or_default();
        Err(Error::new(attempted())
            .because(format!("{} holds '{name}', which is not ours", left.shown().display()))
            .advise("remove that directory from the image"))
    }

    /// Returns whether what was replaced has been changed.
    fn settle(&self, aside: &Tree) -> io::Result<bool> {
        let has_original = aside.look(ORIGINAL)?.is_some();
        let note = aside.read(NOTE, LIMIT).unwrap_or_default();
        if note.is_empty() || aside.look(NEW)?.is_some() {
            // Killed before it was replaced.
            if has_original && self.etc.look("resolv.conf")?.is_none() {
                self.etc.keeping_times(|| aside.rename_to(ORIGINAL, &self.etc, "resolv.conf"))?;
            }
            return Ok(false);
        }
        self.etc.keeping_times(|| self.settle_replaced(aside, &note, has_original))
    }

    fn settle_replaced(&self, aside: &Tree, note: &[u8], has_original: bool) -> io::Result<bool> {
        if self.is_ours("resolv.conf", note) {
            self.give_back("resolv.conf", aside, has_original)?;
            return Ok(false);
        }
        // A session has moved it, to put another one there: it has moved the image's own.
        for name in self.etc.names()? {
            if let Some(name) = name.to_str().filter(|name| self.is_ours(name, note)) {
                self.give_back(name, aside, has_original)?;
                break;
            }
        }
        Ok(true)
    }

    /// In one step where there is an original, so that a crash leaves one of the two.
    fn give_back(&self, name: &str, aside: &Tree, has_original: bool) -> io::Result<()> {
        if has_original { aside.rename_over(ORIGINAL, &self.etc, name) } else { self.etc.remove(name).map(|_| ()) }
    }

    /// True if the file of this name in /etc is the replaced one, unchanged.
    fn is_ours(&self, name: &str, note: &[u8]) -> bool {
        let as_made = |found: &Stat| {
            FileType::from_raw_mode(found.st_mode) == FileType::RegularFile
                && (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (0o644, 0, 0)
        };
        let Ok(Some(found)) = self.etc.look(name) else { return false };
        let inode = format!("{} ", found.st_ino);
        as_made(&found)
            && note
                .strip_prefix(inode.as_bytes())
                .is_some_and(|noted| self.etc.read(name, LIMIT).is_ok_and(|text| digest(&text).as_bytes() == noted))
    }
}

fn digest(text: &[u8]) -> String {
    format!("{:x}", sha2::Sha256::digest(text))
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
            for folder in ["etc", "proc"] {
                std::fs::create_dir(dir.path().join(folder)).unwrap();
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

        /// State of every file: names, inodes and times.
        fn state(&self) -> Vec<(PathBuf, u64, i64, i64)> {
            let mut found = Vec::new();
            for folder in ["etc", "proc"] {
                let entries = std::fs::read_dir(self.path(folder)).unwrap().map(|entry| entry.unwrap().path());
                found.extend(entries.chain([self.path(folder)]).map(|path| {
                    let m = std::fs::symlink_metadata(&path).unwrap();
                    (path, m.ino(), m.mtime(), m.mtime_nsec())
                }));
            }
            found.sort();
            found
        }
    }

    #[test]
    fn a_text_is_lent_where_the_image_does_not_lead_to_it_already() {
        let image = Image::new();
        std::fs::create_dir(image.path("run")).unwrap();
        symlink("/run", image.path("var-run")).unwrap();
        let replaced = |own_run| needs_replacing(&image.tree, b"a", own_run).unwrap();
        assert!(replaced(true), "nothing stands there");
        image.write("a");
        assert!(!replaced(true), "the same text");
        image.write("b");
        assert!(replaced(true));
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
            assert_eq!((replaced(true), replaced(false)), (below.is_none(), true), "{target}");
        }
        std::fs::remove_file(image.path(RESOLV_CONF)).unwrap();
        std::fs::create_dir(image.path(RESOLV_CONF)).unwrap();
        assert!(!replaced(true), "a directory");
        std::fs::remove_dir_all(image.path("etc")).unwrap();
        assert!(!replaced(true), "no /etc");
    }

    #[test]
    fn an_untouched_image_gets_its_own_back_inode_and_times_alike() {
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
            // Killed: found by its name.
            image.replace("container's");
            assert_eq!(ENVIRONMENT.restore(&image.tree).unwrap(), Some(false));
            assert_eq!(state(), before, "{number}");
            if number == 3 {
                assert_eq!(std::fs::read_dir(image.path("etc")).unwrap().count(), 0);
            }
        }
    }

    #[test]
    fn a_lender_that_was_killed_at_any_step_has_lost_nothing() {
        for step in 0..5 {
            let image = Image::new();
            image.write("image's");
            let before = image.state();
            drop(image.replace("container's"));
            let aside = image.path("proc").join(ENVIRONMENT.0);
            let (file, original) = (image.path(RESOLV_CONF), aside.join(ORIGINAL));
            // Undone from the last step on.
            if step > 0 {
                std::fs::rename(&file, aside.join(NEW)).unwrap();
            }
            if step > 1 {
                std::fs::rename(&original, &file).unwrap();
            }
            if step > 2 {
                std::fs::remove_file(aside.join(NOTE)).unwrap();
            }
            if step > 3 {
                std::fs::remove_file(aside.join(NEW)).unwrap();
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
    fn what_a_session_has_done_to_the_file_is_the_images() {
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
                // The moved file was the image's.
                let moved = std::fs::read_to_string(image.path("etc/moved")).ok();
                assert_eq!(moved.as_deref(), own.filter(|_| number > 2), "{number}");
                assert_eq!(std::fs::read_dir(image.path("proc")).unwrap().count(), 0);
            }
        }
        let image = Image::new();
        image.write("image's");
        let replaced = image.replace("container's");
        overwrite(&image, "container's");
        assert!(replaced.restore().unwrap(), "another file of the same text");
        assert_eq!(image.text(), "container's");
        let replaced = image.replace("again");
        std::fs::remove_dir_all(image.path("etc")).unwrap();
        assert!(replaced.restore().unwrap(), "with all of /etc");
        std::fs::create_dir(image.path("etc")).unwrap();
        image.replace("again");
        std::fs::remove_dir_all(image.path("etc")).unwrap();
        assert_eq!(ENVIRONMENT.restore(&image.tree).unwrap(), Some(true));
        assert_eq!(std::fs::read_dir(image.path("proc")).unwrap().count(), 0);
    }

    #[test]
    fn what_a_sidecar_lent_stays_while_environments_come_and_go() {
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
    fn what_a_lender_that_lives_has_lent_stays() {
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
    fn a_directory_that_an_image_brings_is_refused_by_name_or_removed_if_it_is_a_leftover() {
        for (name, content) in [("resolv.conf", "x"), ("note", "odd"), ("note/x", ""), (".new.ims-sshd/x", "")] {
            let image = Image::new();
            image.write("image's");
            let aside = image.path("proc").join(ENVIRONMENT.0);
            let file = aside.join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, content).unwrap();
            let result = ENVIRONMENT.restore(&image.tree);
            assert_eq!(image.text(), "image's");
            if name == "note" {
                result.unwrap();
                assert!(!aside.exists(), "{name}");
                continue;
            }
            let error = result.unwrap_err().to_string();
            for words in ["/proc/.ims-sshd.resolv.conf", name.split('/').next().unwrap(), "remove that directory"] {
                assert!(error.contains(words), "{words}: {error}");
            }
        }
        // Killed as it wrote a file there.
        let image = Image::new();
        let aside = image.path("proc").join(ENVIRONMENT.0);
        std::fs::create_dir(&aside).unwrap();
        std::fs::write(aside.join(".note.ims-sshd"), "1").unwrap();
        ENVIRONMENT.restore(&image.tree).unwrap();
        assert!(!aside.exists());
    }

    #[test]
    fn an_etc_that_cannot_be_changed_is_refused_and_nothing_is_left_in_the_image() {
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
    fn a_directory_that_an_image_brings_leads_nothing_out_of_it() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join(ORIGINAL), "outside").unwrap();
        let image = Image::new();
        symlink(outside.path(), image.path("proc").join(ENVIRONMENT.0)).unwrap();
        assert_eq!(ENVIRONMENT.restore(&image.tree).unwrap(), None);
        image.replace("container's").restore().unwrap();
        assert_eq!(std::fs::read_to_string(outside.path().join(ORIGINAL)).unwrap(), "outside");
    }
}
