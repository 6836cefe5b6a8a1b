//! Mount points and device nodes that the jail needs and the image lacks: recorded, then created, and removed after the
//! jail's end.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::error::{Advise, Attempt, Error, Result};
use crate::jail::mount_table::{Missing, Mount};
use crate::sys::file_kind::FileKind;
use crate::sys::tree::Tree;
use crate::volume::layout::MOUNT_POINTS;

/// A mount point that the image lacks or, where nothing can be mounted, a device node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPoint {
    /// Path relative to the image root.
    pub path: PathBuf,
    /// Kind of file to create.
    pub(crate) kind: Kind,
}

/// Kind of a mount point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// An empty directory.
    Directory,
    /// An empty file.
    File,
    /// A character device, by major and minor number.
    Device(u32, u32),
}

/// Line of the record: `folder PATH` (a directory), `file PATH` or `device MAJOR:MINOR PATH`.
impl fmt::Display for MountPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match self.kind {
            Kind::Directory => write!(f, "folder {path}"),
            Kind::File => write!(f, "file {path}"),
            Kind::Device(major, minor) => write!(f, "device {major}:{minor} {path}"),
        }
    }
}

impl MountPoint {
    fn parse(line: &str) -> Option<Self> {
        let (word, rest) = line.split_once(' ')?;
        let (kind, path) = match word {
            "folder" => (Kind::Directory, rest),
            "file" => (Kind::File, rest),
            "device" => {
                let (numbers, path) = rest.split_once(' ')?;
                let (major, minor) = numbers.split_once(':')?;
                (Kind::Device(major.parse().ok()?, minor.parse().ok()?), path)
            }
            _ => return None,
        };
        Some(Self { path: path.into(), kind })
    }
}

/// Returns the targets of `table` that the image lacks. A target that exists has to be a directory: a link would move
/// the mount elsewhere.
pub fn mount_points(image_root: &Tree, table: impl Iterator<Item = Mount>) -> Result<Vec<MountPoint>> {
    let mut missing = Vec::new();
    for mount in table.filter(|m| m.missing == Missing::MountPoint) {
        let found = image_root.look(mount.target).attempt(|| format!("look at /{} of the image", mount.target))?;
        match found.as_ref().map(FileKind::of) {
            None => missing.push(MountPoint { path: mount.target.into(), kind: Kind::Directory }),
            Some(FileKind::Directory) => {}
            Some(other) => {
                return Err(Error::new(format!("mount on /{} of the image", mount.target))
                    .because(format!("it is {other}"))
                    .advise("it has to be a directory, or not to exist"));
            }
        }
    }
    Ok(missing)
}

/// Device nodes that a shell needs where nothing can be mounted. Without them `>/dev/null` would create a file, which
/// would be packed.
const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// Returns the device nodes of a jail without mounts, if the image's /dev is empty or missing. A /dev with content is
/// left as it is.
pub(crate) fn devices(image_root: &Tree) -> Result<Vec<MountPoint>> {
    let attempted = || "look at /dev of the image";
    let directory = match image_root.look("dev").attempt(attempted)?.as_ref().map(FileKind::of) {
        None => Some(MountPoint { path: "dev".into(), kind: Kind::Directory }),
        Some(FileKind::Directory)
            if image_root.directory("dev").and_then(|dev| dev.names()).attempt(attempted)?.is_empty() =>
        {
            None
        }
        Some(_) => return Ok(Vec::new()),
    };
    let node =
        |(name, major, minor)| MountPoint { path: Path::new("dev").join(name), kind: Kind::Device(major, minor) };
    Ok(directory.into_iter().chain(DEVICES.map(node)).collect())
}

/// Mount points that were created in an image root. They are recorded in its parent before they are created.
pub(crate) struct Made<'a> {
    image_root: &'a Tree,
    record_directory: &'a Tree,
    mount_points: Vec<MountPoint>,
    /// True if the kernel refused to create device nodes.
    pub(crate) without_devices: bool,
}

impl<'a> Made<'a> {
    /// Records `wanted` in `record_directory` and creates them, device nodes only if this container may.
    pub(crate) fn make(image_root: &'a Tree, record_directory: &'a Tree, wanted: Vec<MountPoint>) -> Result<Self> {
        if !wanted.is_empty() {
            let text = wanted.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
            record_directory
                .replace(MOUNT_POINTS, text.as_bytes())
                .attempt(|| format!("record the jail's mount points in {MOUNT_POINTS} beside the image root"))?;
        }
        let mut made = Self { image_root, record_directory, mount_points: wanted, without_devices: false };
        for mount_point in &made.mount_points {
            let result = match mount_point.kind {
                Kind::Directory => image_root.make_mount_point(&mount_point.path, true),
                Kind::File => image_root.make_mount_point(&mount_point.path, false),
                Kind::Device(major, minor) => image_root.make_device(&mount_point.path, major, minor),
            };
            match result {
                Err(e)
                    if matches!(mount_point.kind, Kind::Device(..)) && e.kind() == io::ErrorKind::PermissionDenied =>
                {
                    made.without_devices = true;
                    // Create /dev/null as a file: a program that discards its output would create it anyway, and a
                    // program that only opens /dev/null, such as sftp-server, would not start without it.
                    if mount_point.path == Path::new("dev/null") {
                        image_root
                            .make_mount_point(&mount_point.path, false)
                            .attempt(|| "make the file /dev/null in the image")?;
                    }
                }
                other => other
                    .attempt(|| format!("make /{} in the image", mount_point.path.display()))
                    .advise("the image root has to be writable and to have space")?,
            }
        }
        Ok(made)
    }

    /// Descriptors of the mount points, each with the path at which it was created.
    pub(crate) fn mount_points(&self) -> Vec<(PathBuf, OwnedFd)> {
        let made =
            self.mount_points.iter().filter(|mount_point| matches!(mount_point.kind, Kind::Directory | Kind::File));
        made.filter_map(|mount_point| Some((mount_point.path.clone(), self.image_root.handle(&mount_point.path).ok()?)))
            .collect()
    }

    /// Mount points that an earlier environment on the same parent recorded and did not remove, because it was killed.
    pub(crate) fn left_over(image_root: &'a Tree, record_directory: &'a Tree) -> Option<Self> {
        let record = record_directory.read(MOUNT_POINTS, 1 << 16).ok()?;
        let mount_points = String::from_utf8_lossy(&record).lines().filter_map(MountPoint::parse).collect();
        Some(Self { image_root, record_directory, mount_points, without_devices: false })
    }

    /// Removes the mount points and their record. Returns those that stay because a session put something into them.
    pub(crate) fn remove(self) -> Result<Vec<PathBuf>> {
        let mut kept = Vec::new();
        // Remove a directory after what was created in it.
        for mount_point in self.mount_points.iter().rev() {
            let gone = match mount_point.kind {
                Kind::Directory | Kind::File => self.image_root.remove_mount_point(&mount_point.path),
                Kind::Device(major, minor) => self.image_root.remove_device(&mount_point.path, major, minor),
            };
            let gone = gone.attempt(|| format!("remove /{} from the image", mount_point.path.display()))?;
            if !gone {
                kept.push(mount_point.path.clone());
            }
        }
        self.record_directory
            .remove(MOUNT_POINTS)
            .attempt(|| format!("remove {MOUNT_POINTS} beside the image root"))?;
        Ok(kept)
    }
}

/// Removes those of [`Made::mount_points`] that a session has moved, for example by renaming a directory above them. No
/// process that could move them again may be left. Returns those that stay because a session put something into them.
pub(crate) fn remove_moved(image_root: &Tree, made: &[(PathBuf, OwnedFd)]) -> Result<Vec<PathBuf>> {
    let mut kept = Vec::new();
    for (path, handle) in made.iter().rev() {
        let Ok(now) = image_root.path_of(handle) else { continue };
        let attempted = || format!("remove /{}, which was /{}, from the image", now.display(), path.display());
        let identity = |found: rustix::fs::Stat| (found.st_dev, found.st_ino);
        let found = image_root.look(&now).attempt(attempted)?.map(identity);
        let is_moved = now != *path && found == Some(identity(rustix::fs::fstat(handle).attempt(attempted)?));
        if is_moved && !image_root.remove_mount_point(&now).attempt(attempted)? {
            kept.push(now);
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jail::mount_table::{Proc, mount_table};
    use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

    fn table() -> impl Iterator<Item = Mount> {
        mount_table(false, Proc::New)
    }

    #[test]
    fn link_at_a_mount_point_of_the_image_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::open(dir.path()).unwrap();
        symlink("/tmp", dir.path().join("dev")).unwrap();
        let message = mount_points(&tree, table()).unwrap_err().to_string();
        assert!(message.contains("/dev") && message.contains("a symbolic link"), "{message}");
    }

    #[test]
    fn mount_points_of_a_killed_environment_are_found_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("image-root")).unwrap();
        let parent = Tree::open(dir.path()).unwrap();
        let root = parent.directory("image-root").unwrap();
        let wanted = mount_points(&root, table()).unwrap();
        assert_eq!(wanted.len(), 4);
        Made::make(&root, &parent, wanted).unwrap();
        std::fs::write(dir.path().join("image-root/run/kept"), "").unwrap();
        let kept = Made::left_over(&root, &parent).unwrap().remove().unwrap();
        assert_eq!(kept, [Path::new("run")]);
        assert!(!dir.path().join("image-root/proc").exists());
        assert!(Made::left_over(&root, &parent).is_none());
    }

    #[test]
    fn device_nodes_are_created_only_in_an_empty_dev_and_removed_with_files_that_replaced_them() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::open(dir.path()).unwrap();
        let dev = dir.path().join("dev");
        assert_eq!(devices(&tree).unwrap().len(), DEVICES.len() + 1, "without /dev, it is created too");
        std::fs::create_dir(&dev).unwrap();
        let before = std::fs::metadata(&dev).unwrap();
        let made = Made::make(&tree, &tree, devices(&tree).unwrap()).unwrap();
        assert!(!made.without_devices);
        let null = std::fs::metadata(dev.join("null")).unwrap();
        assert!(null.file_type().is_char_device() && null.permissions().mode() & 0o777 == 0o666);
        std::fs::remove_file(dev.join("null")).unwrap();
        std::fs::write(dev.join("null"), "output that was to vanish").unwrap();
        std::fs::remove_file(dev.join("tty")).unwrap();
        symlink("elsewhere", dev.join("tty")).unwrap();
        assert!(devices(&tree).unwrap().is_empty(), "/dev has content");
        let kept = Made::left_over(&tree, &tree).unwrap().remove().unwrap();
        assert_eq!(kept, [Path::new("dev/tty")], "a link was put there on purpose");
        std::fs::remove_file(dev.join("tty")).unwrap();
        assert!(std::fs::read_dir(&dev).unwrap().next().is_none());
        assert_eq!(std::fs::metadata(&dev).unwrap().ino(), before.ino());
    }
}
