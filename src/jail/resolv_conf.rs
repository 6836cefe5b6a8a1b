//! The image's /etc/resolv.conf, which is to hold the container's text while the jail is open, and its own before and after.

use std::io;
use std::path::Path;

use sha2::Digest;

use crate::error::{Advise, Attempt, Result};
use crate::sys::tree::{Tree, kind_of};

/// The container's file, and the image's.
pub const RESOLV_CONF: &str = "etc/resolv.conf";

/// No resolv.conf is larger; what is, is not one.
const LIMIT: u64 = 1 << 20;

/// How the image's file comes to hold the container's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ResolvConf {
    /// By itself: the texts are the same, or one of the two has no place.
    AsItIs,
    /// A copy of the container's text takes the place of the file or link that stands there.
    Covered,
    /// The same, and nothing stands there.
    Made,
}

/// Decides on /etc/resolv.conf. `text` is the container's; `None` where it has none.
pub fn decide(image_root: &Tree, text: Option<&[u8]>) -> Result<ResolvConf> {
    let Some(text) = text else { return Ok(ResolvConf::AsItIs) };
    let attempted = || "look at /etc/resolv.conf of the image";
    let etc = match image_root.folder("etc") {
        Ok(etc) => etc,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(ResolvConf::AsItIs);
        }
        Err(e) => return Err(e).attempt(attempted),
    };
    Ok(match etc.look("resolv.conf").attempt(attempted)?.as_ref().map(kind_of) {
        None => ResolvConf::Made,
        Some("a regular file") => {
            let same = image_root.read(RESOLV_CONF, LIMIT).is_ok_and(|own| own == text);
            if same { ResolvConf::AsItIs } else { ResolvConf::Covered }
        }
        Some("a symbolic link") => ResolvConf::Covered,
        Some(_) => ResolvConf::AsItIs,
    })
}

/// After a jail in which a copy was mounted: if that no longer holds the container's text, it becomes the image's own. Returns whether
/// it did.
pub fn keep_edited(image_root: &Tree, copy: &Path, container_text: &[u8]) -> Result<bool> {
    let edited = std::fs::read(copy).attempt(|| format!("read {}", copy.display()))?;
    if edited == container_text {
        return Ok(false);
    }
    image_root.replace(RESOLV_CONF, &edited).attempt(|| "keep the edited /etc/resolv.conf in the image")?;
    Ok(true)
}

/// Who puts a text into the image in the place of its own. The names are theirs alone: a sidecar's text stands there while environments
/// come and go, and put right what an earlier one has left.
pub struct Lender {
    /// Where the image's own waits meanwhile. In its own folder, so that moving it there and back keeps it as it is, inode and all.
    aside: &'static str,
    /// The note that a text was lent, in the image root's parent: its SHA-256 in hexadecimal digits.
    note: &'static str,
}

/// A build environment, where nothing can be mounted.
pub const ENVIRONMENT: Lender = Lender { aside: ".ims-sshd.resolv.conf", note: ".ims-sshd.resolv-conf" };

/// A sidecar, for sessions of any kind.
pub const SIDECAR: Lender = Lender { aside: ".ims-sshd.sidecar.resolv.conf", note: ".ims-sshd.sidecar.resolv-conf" };

impl Lender {
    /// Puts `text` in the place of the image's own, and the image's own aside. Noted before it is done.
    pub fn lend(&self, image_root: &Tree, note_folder: &Tree, text: &[u8]) -> Result<()> {
        let attempted = || "put the container's /etc/resolv.conf into the image";
        let advice = "the image root has to be writable and to have space";
        note_folder.replace(self.note, digest(text).as_bytes()).attempt(attempted).advise(advice)?;
        let put = || -> io::Result<()> {
            let etc = image_root.folder("etc")?;
            etc.keeping_times(|| {
                if etc.look("resolv.conf")?.is_some() {
                    etc.rename_to("resolv.conf", &etc, self.aside)?;
                }
                etc.replace("resolv.conf", text)
            })
        };
        put().attempt(attempted).advise(advice)
    }

    /// Puts the image's own back, unless somebody has changed what was lent: then that stays. Returns nothing if nothing was lent, else
    /// whether it was changed.
    pub fn take_back(&self, image_root: &Tree, note_folder: &Tree) -> Result<Option<bool>> {
        let Ok(lent) = note_folder.read(self.note, LIMIT) else { return Ok(None) };
        let put_back = || -> io::Result<bool> {
            let etc = image_root.folder("etc")?;
            let now = etc.look("resolv.conf")?;
            let ours = now.as_ref().map(kind_of) == Some("a regular file")
                && etc.read("resolv.conf", LIMIT).is_ok_and(|text| digest(&text).as_bytes() == lent);
            let changed = now.is_some() && !ours;
            etc.keeping_times(|| {
                if changed {
                    etc.remove(self.aside)?;
                } else {
                    etc.remove("resolv.conf")?;
                    if etc.look(self.aside)?.is_some() {
                        etc.rename_to(self.aside, &etc, "resolv.conf")?;
                    }
                }
                Ok(changed)
            })
        };
        let changed = match put_back() {
            // A session has removed /etc altogether.
            Err(e) if e.kind() == io::ErrorKind::NotFound => true,
            other => other.attempt(|| "put the image's own /etc/resolv.conf back")?,
        };
        note_folder.remove(self.note).attempt(|| format!("remove {} beside the image root", self.note))?;
        Ok(Some(changed))
    }
}

fn digest(text: &[u8]) -> String {
    format!("{:x}", sha2::Sha256::digest(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    #[test]
    fn resolv_conf_is_covered_made_or_left() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::open(dir.path()).unwrap();
        let decide = |text: Option<&[u8]>| decide(&tree, text).unwrap();
        assert_eq!(decide(Some(b"a")), ResolvConf::AsItIs, "no /etc");
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        let file = dir.path().join(RESOLV_CONF);
        assert_eq!(decide(Some(b"a")), ResolvConf::Made);
        assert_eq!(decide(None), ResolvConf::AsItIs, "the container has none");
        std::fs::write(&file, "a").unwrap();
        assert_eq!(decide(Some(b"a")), ResolvConf::AsItIs, "same text");
        assert_eq!(decide(Some(b"b")), ResolvConf::Covered);
        std::fs::remove_file(&file).unwrap();
        symlink("/run/nowhere", &file).unwrap();
        assert_eq!(decide(Some(b"b")), ResolvConf::Covered);
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        assert_eq!(decide(Some(b"b")), ResolvConf::AsItIs, "a folder cannot be covered by a file");
    }

    #[test]
    fn what_was_lent_is_taken_back_unless_somebody_changed_it() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::open(dir.path()).unwrap();
        let etc = dir.path().join("etc");
        let file = etc.join("resolv.conf");
        std::fs::create_dir(&etc).unwrap();
        assert_eq!(ENVIRONMENT.take_back(&tree, &tree).unwrap(), None, "nothing was lent");

        symlink("/run/netconfig/resolv.conf", &file).unwrap();
        let state =
            |path: &Path| std::fs::symlink_metadata(path).map(|m| (m.ino(), m.mtime(), m.mtime_nsec())).unwrap();
        let before = (state(&etc), state(&file));
        ENVIRONMENT.lend(&tree, &tree, b"container's").unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"container's");
        assert_eq!(ENVIRONMENT.take_back(&tree, &tree).unwrap(), Some(false));
        assert_eq!((state(&etc), state(&file)), before);

        ENVIRONMENT.lend(&tree, &tree, b"container's").unwrap();
        std::fs::write(&file, "edited").unwrap();
        assert_eq!(ENVIRONMENT.take_back(&tree, &tree).unwrap(), Some(true));
        assert_eq!(std::fs::read(&file).unwrap(), b"edited");
        assert_eq!(std::fs::read_dir(&etc).unwrap().count(), 1, "nothing of ours stays beside it");

        // Killed between the two steps.
        ENVIRONMENT.lend(&tree, &tree, b"container's").unwrap();
        std::fs::remove_file(&file).unwrap();
        assert_eq!(ENVIRONMENT.take_back(&tree, &tree).unwrap(), Some(false));
        assert_eq!(std::fs::read(&file).unwrap(), b"edited");

        std::fs::remove_file(&file).unwrap();
        ENVIRONMENT.lend(&tree, &tree, b"container's").unwrap();
        assert_eq!(ENVIRONMENT.take_back(&tree, &tree).unwrap(), Some(false));
        assert!(!file.exists(), "there was none");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "the note is gone");
    }

    #[test]
    fn what_a_sidecar_lent_stays_while_environments_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::open(dir.path()).unwrap();
        let etc = dir.path().join("etc");
        let file = etc.join("resolv.conf");
        std::fs::create_dir(&etc).unwrap();
        std::fs::write(&file, "image's").unwrap();
        SIDECAR.lend(&tree, &tree, b"pod's").unwrap();
        assert_eq!(ENVIRONMENT.take_back(&tree, &tree).unwrap(), None, "an environment that begins");
        ENVIRONMENT.lend(&tree, &tree, b"container's").unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"container's");
        assert_eq!(ENVIRONMENT.take_back(&tree, &tree).unwrap(), Some(false));
        assert_eq!(std::fs::read(&file).unwrap(), b"pod's");
        assert_eq!(SIDECAR.take_back(&tree, &tree).unwrap(), Some(false));
        assert_eq!(std::fs::read(&file).unwrap(), b"image's");
        assert_eq!((std::fs::read_dir(&etc).unwrap().count(), std::fs::read_dir(dir.path()).unwrap().count()), (1, 1));
    }
}
