//! Which files of an image root are provably as they are in the squashfs that it was made from. The packer takes their
//! compressed blocks over. A file is compressed again whenever there is a doubt.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, FileType, Stat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{Attempt, Result};
use crate::image::unpack::{INDEX_OF_LINKS, LOWER, Overlay, UPPER};
use crate::image::upper_layer::{self, directories};
use crate::sys::loops;
use crate::sys::tree::{Tree, inode_and_birth};
use crate::sys::walk::Descent;

/// An image root's source, and the files that are still as they are there.
#[derive(Debug)]
pub(crate) struct Source {
    /// The squashfs.
    pub(crate) squashfs: File,
    /// The files.
    pub(crate) files: Vec<Unchanged>,
    /// Directory and name of a squashfs that nobody needs once the image is packed.
    pub(crate) is_dropped: Option<(Tree, &'static str)>,
}

impl Source {
    /// Removes the squashfs, if nobody needs it any more.
    pub(crate) fn drop_squashfs(&self) -> io::Result<()> {
        self.is_dropped.as_ref().map_or(Ok(()), |(directory, name)| directory.remove(name).map(drop))
    }
}

/// A regular file that is unchanged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unchanged {
    /// Path below the image root.
    pub(crate) path: PathBuf,
    /// Path in the source, if that is another one: a directory was renamed.
    pub(crate) source: Option<PathBuf>,
    /// Time of change (ctime) when this was decided, in seconds and nanoseconds. The packer compares it.
    pub(crate) changed: (i64, u64),
}

/// Time of change of a file.
pub(crate) fn changed(found: &Stat) -> (i64, u64) {
    (found.st_ctime, found.st_ctime_nsec)
}

/// Files of the overlay of `directory`, mounted at `image_root`, that nothing in the upper layer touches. `squashfs` is
/// what the overlay was made from; the error says why it is not known to be.
pub(crate) fn of_overlay(
    directory: &Path,
    image_root: &Tree,
    squashfs: File,
) -> std::result::Result<Result<Source>, &'static str> {
    if !Overlay::is_mounted(directory, &image_root.shown()) {
        return Err("no overlay of ours is mounted there");
    }
    let lower = squashfs.metadata().ok().and_then(|_| std::fs::symlink_metadata(directory.join(LOWER)).ok());
    // The mounted file itself: another one may have its name by now.
    if !lower.is_some_and(|lower| loops::shows(lower.dev(), &squashfs)) {
        return Err("the squashfs is not the one that is mounted");
    }
    let files = untouched(directory, image_root);
    Ok(files.map(|files| Source { squashfs, files, is_dropped: None }))
}

/// Regular files of an overlay that are not in its upper layer in any form: copied up, or put in place of another.
fn untouched(directory: &Path, image_root: &Tree) -> Result<Vec<Unchanged>> {
    let attempted = || format!("compare {} with its source", image_root.shown().display());
    let upper = Tree::open(&directory.join(UPPER)).attempt(attempted)?;
    let mut in_upper = HashSet::new();
    let seen = upper.walk(|path, _, _, _| {
        in_upper.insert(path.to_owned());
        Ok(())
    });
    seen.attempt(attempted)?;
    let directories = directories(&upper).attempt(attempted)?;
    // A file that was changed under one of its names has the others still in the source; the index knows such files.
    let names = std::fs::read_dir(directory.join(INDEX_OF_LINKS)).map(|mut names| names.next().is_none());
    let has_whole_links = names.unwrap_or_else(|e| e.kind() == std::io::ErrorKind::NotFound);
    let lower = Tree::open(&directory.join(LOWER)).attempt(attempted)?;
    let mut lowers = Descent::of(&lower);
    let mut files = Vec::new();
    let looked = image_root.walk(|path, _, _, found| {
        if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile || in_upper.contains(path) {
            return Ok(());
        }
        let Some(source) = upper_layer::source_of(&directories, path) else { return Ok(()) };
        let (Some(above), Some(name)) = (source.parent(), source.file_name()) else { return Ok(()) };
        let before = match rustix::fs::statat(lowers.directory_without_links(above)?, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(()),
            before => before?,
        };
        // The count of the source decides: all names but one may have been removed after a change.
        if is_same(&before, found) && (before.st_nlink == 1 || has_whole_links) {
            let source = (source != path).then_some(source);
            files.push(Unchanged { path: path.to_owned(), source, changed: changed(found) });
        }
        Ok(())
    });
    looked.attempt(attempted)?;
    Ok(files)
}

/// Compares the status of a file of the overlay with the source's. A file that was copied up has another time of
/// change.
fn is_same(before: &Stat, now: &Stat) -> bool {
    let status = |found: &Stat| (found.st_mode, found.st_size, found.st_mtime, found.st_mtime_nsec, changed(found));
    status(before) == status(now)
}

/// File systems whose time of change (ctime) tells every change of content, also one through a mapping of memory, in
/// parts of a second. tmpfs, for one, does not tell a change through a mapping that was read before.
const PRECISE: [(u64, &str); 3] = [(0xef53, "ext4"), (0x5846_5342, "xfs"), (0x9123_683e, "btrfs")];

/// Resolution of times of change: they are taken from the kernel's last clock tick.
const CLOCK_TICK: Duration = Duration::from_millis(50);

/// Difference between two readings of the clock by which it was not set back: it is adjusted all the time.
const ADJUSTED: i64 = 1_000_000_000;

/// The times of the machine, in nanoseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Clock {
    /// Which start of the machine.
    boot: String,
    /// Time since 1970.
    now: i64,
    /// Time since 1970 without the time since the start: it changes when the clock is set.
    offset: i64,
}

impl Clock {
    fn read() -> io::Result<Self> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(io::Error::other)?;
        let uptime = std::fs::read_to_string("/proc/uptime")?;
        let uptime = uptime.split(' ').next().and_then(|seconds| seconds.parse().ok());
        let uptime = Duration::try_from_secs_f64(uptime.unwrap_or(-1.0)).map_err(io::Error::other)?;
        let nanoseconds = |time: Duration| i64::try_from(time.as_nanos()).map_err(io::Error::other);
        let (now, uptime) = (nanoseconds(now)?, nanoseconds(uptime)?);
        Ok(Self { boot, now, offset: now - uptime })
    }

    /// Returns whether the clock was set back between `self` and a later reading: a file that is changed afterwards
    /// could get the time of change that it had.
    fn was_set_back(&self, later: &Self) -> bool {
        if self.boot == later.boot { later.offset.saturating_add(ADJUSTED) < self.offset } else { later.now < self.now }
    }
}

/// Fields that tell one state of a squashfs from another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Mark {
    fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        Ok(Self {
            inode: found.ino(),
            size: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }
}

/// Head of the inventory of an unpacked image root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    /// Path of the squashfs; `None` if it is kept beside the image root.
    source: Option<PathBuf>,
    squashfs: Mark,
    /// Inode number and birth of the image root.
    root: (u64, (i64, u32)),
    clock: Clock,
}

/// Inventory of an image root that was just unpacked, and nobody else has reached yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unpacked {
    head: Head,
    files: HashMap<u64, Then>,
}

/// A regular file as it was unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Then {
    size: i64,
    modified: (i64, u64),
    changed: (i64, u64),
    path: PathBuf,
}

impl Unpacked {
    /// Takes the inventory of `root`, which was unpacked from `squashfs`. `source` is the path of that, unless it is
    /// kept beside the image root. The error says why files could not be told to be unchanged.
    pub(crate) fn of(root: &Tree, squashfs: &File, source: Option<PathBuf>) -> std::result::Result<Self, String> {
        is_precise(root)?;
        let mut files = HashMap::new();
        let mut newest = (0, 0);
        let walked = root.walk(|path, _, _, found| {
            if FileType::from_raw_mode(found.st_mode) == FileType::RegularFile {
                newest = newest.max(changed(found));
                files.insert(found.st_ino, Then::of(path, found));
            }
            Ok(())
        });
        let fail = |error: io::Error| error.to_string();
        walked.map_err(fail)?;
        // An inode without space for parts of a second.
        if files.len() > 1 && files.values().all(|then| then.changed.1 == 0) {
            return Err("its file system tells times in whole seconds".into());
        }
        // A change within the same tick would not be seen.
        std::thread::sleep(CLOCK_TICK);
        let clock = Clock::read().map_err(fail)?;
        if clock.now <= newest.0.saturating_mul(1_000_000_000).saturating_add_unsigned(newest.1) {
            return Err("files of it have a time of change in the future".into());
        }
        let head = Head {
            source,
            squashfs: Mark::of(squashfs).map_err(fail)?,
            root: inode_and_birth(root).map_err(fail)?,
            clock,
        };
        Ok(Self { head, files })
    }

    /// Path of the squashfs; `None` if it is kept beside the image root.
    pub(crate) fn source(&self) -> Option<&Path> {
        self.head.source.as_deref()
    }

    /// Notes that `squashfs`, which is kept beside the image root, was moved with it.
    pub(crate) fn moved(&mut self, squashfs: &File) -> io::Result<()> {
        self.head.squashfs = Mark::of(squashfs)?;
        Ok(())
    }

    /// Its bytes: a head, and a record of each file that ends with a zero byte.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = json!(self.head).to_string().into_bytes();
        bytes.push(0);
        let mut files: Vec<_> = self.files.iter().collect();
        files.sort_unstable_by_key(|(inode, _)| **inode);
        for (inode, Then { size, modified, changed, path }) in files {
            let (modified, changed) =
                (format!("{} {}", modified.0, modified.1), format!("{} {}", changed.0, changed.1));
            bytes.extend_from_slice(format!("{inode} {size} {modified} {changed} ").as_bytes());
            bytes.extend_from_slice(path.as_os_str().as_bytes());
            bytes.push(0);
        }
        bytes
    }

    /// Reads [`Unpacked::encode`]. Somebody else may have written it.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut records = bytes.strip_suffix(&[0])?.split(|byte| *byte == 0);
        let head = serde_json::from_slice(records.next()?).ok()?;
        let files = records.map(|record| {
            let mut fields = record.splitn(7, |byte| *byte == b' ');
            let mut number = || std::str::from_utf8(fields.next()?).ok();
            let (inode, size) = (number()?.parse().ok()?, number()?.parse().ok()?);
            let modified = (number()?.parse().ok()?, number()?.parse().ok()?);
            let changed = (number()?.parse().ok()?, number()?.parse().ok()?);
            let path = PathBuf::from(OsString::from_vec(fields.next()?.to_vec()));
            Some((inode, Then { size, modified, changed, path }))
        });
        Some(Self { head, files: files.collect::<Option<_>>()? })
    }

    /// Files of `root` that are as they were unpacked. The error says why that cannot be told.
    pub(crate) fn unchanged(&self, root: &Tree, squashfs: File) -> std::result::Result<Source, String> {
        let fail = |error: io::Error| error.to_string();
        is_precise(root)?;
        if inode_and_birth(root).map_err(fail)? != self.head.root {
            return Err("its inventory is that of another image root".into());
        }
        if Mark::of(&squashfs).map_err(fail)? != self.head.squashfs {
            return Err("the squashfs was changed since the image root was unpacked".into());
        }
        if self.head.clock.was_set_back(&Clock::read().map_err(fail)?) {
            return Err("the clock was set back since the image root was unpacked".into());
        }
        let device = rustix::fs::fstat(root).map_err(|e| e.to_string())?.st_dev;
        let mut files = Vec::new();
        let walked = root.walk(|path, _, _, found| {
            let is_file = FileType::from_raw_mode(found.st_mode) == FileType::RegularFile && found.st_dev == device;
            if let Some(then) = self.files.get(&found.st_ino).filter(|_| is_file)
                && then.is_still(found)
            {
                let source = (then.path != path).then(|| then.path.clone());
                files.push(Unchanged { path: path.to_owned(), source, changed: changed(found) });
            }
            Ok(())
        });
        walked.map_err(fail)?;
        Ok(Source { squashfs, files, is_dropped: None })
    }
}

impl Then {
    fn of(path: &Path, found: &Stat) -> Self {
        let modified = (found.st_mtime, found.st_mtime_nsec);
        Self { size: found.st_size, modified, changed: changed(found), path: path.to_owned() }
    }

    fn is_still(&self, found: &Stat) -> bool {
        let modified = (found.st_mtime, found.st_mtime_nsec);
        (self.size, self.modified, self.changed) == (found.st_size, modified, changed(found))
    }
}

fn is_precise(root: &Tree) -> std::result::Result<(), String> {
    let found = rustix::fs::fstatfs(root).map_err(|e| e.to_string())?;
    if PRECISE.iter().any(|(kind, _)| u64::try_from(found.f_type) == Ok(*kind)) {
        return Ok(());
    }
    let known: Vec<_> = PRECISE.iter().map(|(_, name)| *name).collect();
    Err(format!("times of change are relied on only on {}", known.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_that_was_set_back_is_noticed_and_one_that_is_adjusted_is_not() {
        let clock = |boot: &str, now, offset| Clock { boot: boot.into(), now, offset };
        let (second, then) = (1_000_000_000, clock("a", 100, 5_000_000_000));
        assert!(!then.was_set_back(&clock("a", 50 * second, 5 * second - second / 2)));
        assert!(!then.was_set_back(&clock("a", 50 * second, 90 * second)), "set forward");
        assert!(then.was_set_back(&clock("a", 50 * second, 3 * second)));
        assert!(!then.was_set_back(&clock("b", 101, 0)) && then.was_set_back(&clock("b", 99, 0)), "another start");
    }

    #[test]
    fn inventory_is_read_as_it_was_written_and_damage_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("a b")).unwrap();
        for name in ["a b/1 2", "x\ny", "z"] {
            std::fs::write(root.join(name), name).unwrap();
        }
        let (tree, file) = (Tree::open(&root).unwrap(), File::open(root.join("z")).unwrap());
        let Ok(unpacked) = Unpacked::of(&tree, &file, Some("/some where".into())) else {
            assert!(is_precise(&tree).is_err());
            return;
        };
        let bytes = unpacked.encode();
        assert_eq!(Unpacked::decode(&bytes).as_ref(), Some(&unpacked));
        assert_eq!(unpacked.unchanged(&tree, file).unwrap().files.len(), 3);
        for cut in [1, 5, 30, bytes.len()] {
            let cut = Unpacked::decode(&bytes[..bytes.len() - cut]);
            assert!(cut.is_none(), "{cut:?}");
        }
    }
}
