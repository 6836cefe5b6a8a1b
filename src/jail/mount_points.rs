//! Folders that the image lacks and the jail needs: made before it, noted before that, removed after it.

use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Advise, Attempt, Error, Result};
use crate::jail::mount_table::{Missing, Mount};
use crate::sys::tree::{Tree, kind_of};

/// The container's file, and the image's.
pub const RESOLV_CONF: &str = "etc/resolv.conf";

/// No resolv.conf is larger; what is, is not one.
const RESOLV_CONF_LIMIT: u64 = 1 << 20;

/// A name below the image root that is to be mounted on and does not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPoint {
    /// Relative to the image root.
    pub path: PathBuf,
    /// A folder, or a file.
    pub folder: bool,
}

/// Which of the table's targets the image lacks. Refuses an image in which something else than a folder stands in a target's
/// place: a link there would move the mount elsewhere.
pub fn missing(image_root: &Tree, table: &[Mount]) -> Result<Vec<MountPoint>> {
    let mut missing = Vec::new();
    for mount in table.iter().filter(|m| m.missing == Missing::MountPoint) {
        let found = image_root.look(mount.target).attempt(|| format!("look at /{} of the image", mount.target))?;
        match found.as_ref().map(kind_of) {
            None => missing.push(MountPoint { path: mount.target.into(), folder: true }),
            Some("a folder") => {}
            Some(other) => {
                return Err(Error::new(format!("mount on /{} of the image", mount.target))
                    .because(format!("it is {other}"))
                    .advise("it has to be a folder, or not to exist"));
            }
        }
    }
    Ok(missing)
}

/// How the image's /etc/resolv.conf comes to hold the container's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ResolvConf {
    /// Nothing is mounted: the texts are the same, or one of the two has no place.
    AsItIs,
    /// A copy of the container's text is mounted on the file or link that stands there.
    Covered,
    /// The same, and the file has to be made first.
    Made,
}

/// Decides on /etc/resolv.conf. `text` is the container's; `None` where it has none.
pub fn resolv_conf(image_root: &Tree, text: Option<&[u8]>) -> Result<ResolvConf> {
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
            let same = image_root.read(RESOLV_CONF, RESOLV_CONF_LIMIT).is_ok_and(|own| own == text);
            if same { ResolvConf::AsItIs } else { ResolvConf::Covered }
        }
        Some("a symbolic link") => ResolvConf::Covered,
        Some(_) => ResolvConf::AsItIs,
    })
}

/// The note of what was made, in the image root's parent: it outlives a container that is restarted.
const NOTE: &str = ".ims-sshd.mount-points";

/// Mount points that were made in an image root. They are noted in its parent before they are made.
pub struct Made<'a> {
    image_root: &'a Tree,
    note_folder: &'a Tree,
    points: Vec<MountPoint>,
}

impl<'a> Made<'a> {
    /// Notes `wanted` in `note_folder` and makes them.
    pub fn make(image_root: &'a Tree, note_folder: &'a Tree, wanted: Vec<MountPoint>) -> Result<Self> {
        if !wanted.is_empty() {
            let mut text = String::new();
            for point in &wanted {
                let kind = if point.folder { "folder" } else { "file" };
                let _ = writeln!(text, "{kind} {}", point.path.display());
            }
            note_folder
                .replace(NOTE, text.as_bytes())
                .attempt(|| format!("note the mount points to be made in {NOTE} beside the image root"))?;
        }
        let made = Self { image_root, note_folder, points: wanted };
        for point in &made.points {
            image_root
                .make_mount_point(&point.path, point.folder)
                .attempt(|| format!("make the mount point /{} in the image", point.path.display()))
                .advise("the image root has to be writable and to have space")?;
        }
        Ok(made)
    }

    /// What an earlier environment on the same parent made and, killed, did not remove.
    pub fn left_over(image_root: &'a Tree, note_folder: &'a Tree) -> Option<Self> {
        let note = note_folder.read(NOTE, 1 << 16).ok()?;
        let points = String::from_utf8_lossy(&note)
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(kind, path)| MountPoint { path: path.into(), folder: kind == "folder" })
            .collect();
        Some(Self { image_root, note_folder, points })
    }

    /// Removes them, and the note. Returns what could not be removed because somebody put something there.
    pub fn remove(self) -> Result<Vec<PathBuf>> {
        let mut kept = Vec::new();
        for point in &self.points {
            let gone = self
                .image_root
                .remove_mount_point(&point.path)
                .attempt(|| format!("remove the mount point /{} from the image", point.path.display()))?;
            if !gone {
                kept.push(point.path.clone());
            }
        }
        self.note_folder.remove(NOTE).attempt(|| format!("remove {NOTE} beside the image root"))?;
        Ok(kept)
    }
}

/// Keeps what was edited: if the mounted copy of resolv.conf no longer holds the container's text, it becomes the image's own.
/// Returns whether it was.
pub fn keep_edited_resolv_conf(image_root: &Tree, copy: &Path, container_text: &[u8]) -> Result<bool> {
    let edited = std::fs::read(copy).attempt(|| format!("read {}", copy.display()))?;
    if edited == container_text {
        return Ok(false);
    }
    image_root.replace(RESOLV_CONF, &edited).attempt(|| "keep the edited /etc/resolv.conf in the image")?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jail::mount_table::JAILED;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_link_in_the_place_of_a_mount_point_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::open(dir.path()).unwrap();
        symlink("/tmp", dir.path().join("dev")).unwrap();
        let message = missing(&tree, JAILED).unwrap_err().to_string();
        assert!(message.contains("/dev") && message.contains("a symbolic link"), "{message}");
    }

    #[test]
    fn mount_points_of_a_killed_environment_are_found_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("image-root")).unwrap();
        let parent = Tree::open(dir.path()).unwrap();
        let root = parent.folder("image-root").unwrap();
        let wanted = missing(&root, JAILED).unwrap();
        assert_eq!(wanted.len(), 4);
        Made::make(&root, &parent, wanted).unwrap();
        std::fs::write(dir.path().join("image-root/run/kept"), "").unwrap();
        let kept = Made::left_over(&root, &parent).unwrap().remove().unwrap();
        assert_eq!(kept, [Path::new("run")]);
        assert!(!dir.path().join("image-root/proc").exists());
        assert!(Made::left_over(&root, &parent).is_none());
    }

    #[test]
    fn resolv_conf_is_covered_made_or_left() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::open(dir.path()).unwrap();
        let decide = |text: Option<&[u8]>| resolv_conf(&tree, text).unwrap();
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
}
