//! Finds the files of an image root that provably equal those in the squashfs from which the image root was made. The
//! packer copies their compressed blocks from that squashfs. If there is any doubt about a file, it is compressed
//! again.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{FileType, Stat};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{Attempt, Result};
use crate::image::unpack::{INDEX_OF_LINKS, LOWER, Overlay, UPPER};
use crate::image::upper_layer::{self, Directories, directories};
use crate::sys::loops;
use crate::sys::tree::{Tree, inode_and_birth};

/// An image root's source, with the evidence by which unchanged files are recognized.
#[derive(Debug)]
pub(crate) struct Source {
    /// The squashfs.
    pub(crate) squashfs: File,
    /// Recognizes the entries that are unchanged.
    pub(crate) basis: Basis,
    /// Directory and name of the squashfs, if nobody needs it once the image is packed.
    pub(crate) is_dropped: Option<(Tree, &'static str)>,
}

impl Source {
    /// Removes the squashfs, if nobody needs it any more.
    pub(crate) fn drop_squashfs(&self) -> io::Result<()> {
        self.is_dropped.as_ref().map_or(Ok(()), |(directory, name)| directory.remove(name).map(drop))
    }
}

/// Evidence by which an entry of an image root is recognized as unchanged since the source. The packer passes the
/// status that it packs, so that the image root is walked only once.
#[derive(Debug)]
pub(crate) enum Basis {
    /// The image root is an overlay above the mounted source.
    Overlay(Overlaid),
    /// The image root was unpacked from the source.
    Unpacked(Unpacked),
}

/// Time of change (ctime) of a file, in seconds and nanoseconds.
fn changed(found: &Stat) -> (i64, u64) {
    (found.st_ctime, found.st_ctime_nsec)
}

/// An entry of a source, as its squashfs describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Before {
    /// Inode number.
    pub(crate) number: u32,
    /// Type and permissions, as in `st_mode`.
    pub(crate) mode: u32,
    /// Length of a regular file.
    pub(crate) size: u64,
    /// Time of modification in seconds since 1970. A mounted squashfs reports it as the time of change (ctime) too.
    pub(crate) modified: u32,
    /// Number of names.
    pub(crate) links: u32,
    /// True if the entry has extended attributes.
    pub(crate) has_attributes: bool,
}

/// Entries of a source by path; `None` for a path that occurs twice, since either entry could be meant.
pub(crate) type Entries = HashMap<OsString, Option<Before>>;

/// An entry that is unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Unchanged {
    /// Inode number in the source.
    pub(crate) number: u32,
    /// True if the entry has no extended attributes.
    pub(crate) is_bare: bool,
}

/// Source of the overlay of `directory`, which is mounted at `image_root`. `squashfs` is the file from which the
/// overlay was made; the outer error says why that could not be confirmed.
pub(crate) fn of_overlay(
    directory: &Path,
    image_root: &Tree,
    squashfs: File,
) -> std::result::Result<Result<Source>, &'static str> {
    if !Overlay::is_mounted(directory, &image_root.shown()) {
        return Err("no overlay of ours is mounted there");
    }
    let lower = squashfs.metadata().ok().and_then(|_| std::fs::symlink_metadata(directory.join(LOWER)).ok());
    // Compare with the mounted file itself: another file may have taken its name.
    if !lower.is_some_and(|lower| loops::shows(lower.dev(), &squashfs)) {
        return Err("the squashfs is not the one that is mounted");
    }
    let basis = Overlaid::of(directory, image_root).map(Basis::Overlay);
    Ok(basis.map(|basis| Source { squashfs, basis, is_dropped: None }))
}

/// Entries of the upper layer of an overlay.
#[derive(Debug, Default)]
pub(crate) struct Overlaid {
    /// Paths of all entries of the upper layer, copied up or new.
    pub(crate) in_upper: HashSet<OsString>,
    /// Directories of the upper layer.
    pub(crate) directories: Directories,
    /// True if no file with several hard links was changed.
    pub(crate) has_whole_links: bool,
    /// Cache of the last query: its directory, and the directory of the source from which the entries there come.
    last: RefCell<Option<(PathBuf, Option<PathBuf>)>>,
}

impl Overlaid {
    fn of(directory: &Path, image_root: &Tree) -> Result<Self> {
        let attempted = || format!("compare {} with its source", image_root.shown().display());
        let upper = Tree::open(&directory.join(UPPER)).attempt(attempted)?;
        let mut in_upper = HashSet::new();
        let seen = upper.walk(|path, _, _, _| {
            in_upper.insert(path.as_os_str().to_owned());
            Ok(())
        });
        seen.attempt(attempted)?;
        let directories = directories(&upper).attempt(attempted)?;
        // After a change under one of a file's names, its other names still lead to the source's file; the overlay's
        // index lists such files.
        let names = std::fs::read_dir(directory.join(INDEX_OF_LINKS)).map(|mut names| names.next().is_none());
        let has_whole_links = names.unwrap_or_else(|e| e.kind() == io::ErrorKind::NotFound);
        Ok(Self::new(in_upper, directories, has_whole_links))
    }

    pub(crate) fn new(in_upper: HashSet<OsString>, directories: Directories, has_whole_links: bool) -> Self {
        Self { in_upper, directories, has_whole_links, last: RefCell::new(None) }
    }

    /// Path in the source of an entry that is not in the upper layer.
    fn source_of(&self, path: &Path) -> Option<PathBuf> {
        let (above, name) = (path.parent()?, path.file_name()?);
        let mut last = self.last.borrow_mut();
        // All entries of a directory that are not in the upper layer have their sources in one directory.
        if last.as_ref().is_none_or(|(known, _)| known.as_os_str() != above.as_os_str()) {
            let source = upper_layer::source_of(&self.directories, path);
            *last = Some((above.to_owned(), source.and_then(|source| source.parent().map(Path::to_owned))));
        }
        Some(last.as_ref()?.1.as_ref()?.join(name))
    }

    /// Returns the source's entry that the overlay shows at `path`, if nothing in the upper layer touches it.
    fn find(&self, path: &Path, found: &Stat, source: &Entries) -> Option<Unchanged> {
        if self.in_upper.contains(path.as_os_str()) {
            return None;
        }
        let before = (*source.get(self.source_of(path)?.as_os_str())?)?;
        // Use the link count in the source: all names but one may have been removed after the file was changed.
        let is_whole =
            before.links == 1 || self.has_whole_links || FileType::from_raw_mode(before.mode) == FileType::Directory;
        let Before { number, has_attributes, .. } = before;
        (is_whole && before.is_still(found)).then_some(Unchanged { number, is_bare: !has_attributes })
    }
}

impl Before {
    /// Compares the entry with `found`, the status of an entry of an overlay. A file that was copied up has another
    /// time of change.
    fn is_still(&self, found: &Stat) -> bool {
        let then = i64::from(self.modified);
        let is_file = FileType::from_raw_mode(self.mode) == FileType::RegularFile;
        let has_size = !is_file || u64::try_from(found.st_size) == Ok(self.size);
        let times = (found.st_mtime, found.st_mtime_nsec, changed(found));
        has_size && self.mode == found.st_mode && times == (then, 0, (then, 0))
    }
}

impl Basis {
    /// Returns the entry `path` of the image root if it is as in the source. `found` is the status of the entry,
    /// `source` the entries of the source, and `device` the device number of the image root.
    pub(crate) fn find(&self, path: &Path, found: &Stat, device: u64, source: &Entries) -> Option<Unchanged> {
        match self {
            Self::Overlay(overlaid) => overlaid.find(path, found, source),
            Self::Unpacked(unpacked) => unpacked.find(found, device, source),
        }
    }
}

/// File systems that record every change of content in the time of change (ctime), even one through a memory mapping,
/// and in fractions of a second. On tmpfs, for example, a write through a mapping that was read before leaves the ctime
/// as it is.
const PRECISE: [(u64, &str); 3] = [(0xef53, "ext4"), (0x5846_5342, "xfs"), (0x9123_683e, "btrfs")];

/// Resolution of times of change, with a margin: the kernel takes them from its last clock tick.
const CLOCK_TICK: Duration = Duration::from_millis(50);

/// Decrease of `Clock::offset`, in nanoseconds, that does not count as setting the clock back, since the clock is
/// adjusted all the time.
const ADJUSTED: i64 = 1_000_000_000;

/// The times of the machine, in nanoseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Clock {
    /// ID of the machine's current boot.
    boot: String,
    /// Time since 1970.
    now: i64,
    /// Time since 1970 minus the time since the boot: it changes when the clock is set.
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
    /// could get its previous time of change again.
    fn was_set_back(&self, later: &Self) -> bool {
        if self.boot == later.boot { later.offset.saturating_add(ADJUSTED) < self.offset } else { later.now < self.now }
    }
}

/// Fields that distinguish one state of a squashfs from another.
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

/// Inventory of an image root that has just been unpacked, and that nobody else has reached yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Inventory {
    head: Head,
    files: Unpacked,
}

/// Regular files of an image root as they were unpacked, by inode number.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Unpacked(HashMap<u64, Then>);

/// A regular file as it was unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Then {
    size: i64,
    modified: (i64, u64),
    changed: (i64, u64),
    /// True if the file has no extended attributes.
    is_bare: bool,
    path: PathBuf,
}

impl Inventory {
    /// Takes the inventory of `root`, which was unpacked from `squashfs`. `source` is the path of `squashfs`, or `None`
    /// if that is kept beside the image root. The error says why unchanged files could not be recognized later.
    pub(crate) fn of(root: &Tree, squashfs: &File, source: Option<PathBuf>) -> std::result::Result<Self, String> {
        is_precise(root)?;
        let mut files = HashMap::new();
        let mut newest = (0, 0);
        // llistxattr fails if the list of names is longer than this buffer; such a file does not count as bare.
        let mut names = [0; 1024];
        let walked = root.walk(|path, directory, name, found| {
            if FileType::from_raw_mode(found.st_mode) == FileType::RegularFile {
                newest = newest.max(changed(found));
                let is_bare = matches!(rustix::fs::llistxattr(directory.path().join(name), &mut names[..]), Ok(0));
                files.insert(found.st_ino, Then::of(path, found, is_bare));
            }
            Ok(())
        });
        let fail = |error: io::Error| error.to_string();
        walked.map_err(fail)?;
        // Whole seconds everywhere mean inodes that have no space for fractions of a second.
        if files.len() > 1 && files.values().all(|then| then.changed.1 == 0) {
            return Err("its file system tells times in whole seconds".into());
        }
        // A later change within the same tick would leave no trace, so wait until the tick is over.
        std::thread::sleep(CLOCK_TICK);
        let clock = Clock::read().map_err(fail)?;
        if clock.now <= newest.0.saturating_mul(1_000_000_000).saturating_add_unsigned(newest.1) {
            return Err("it has files with a time of change in the future".into());
        }
        let head = Head {
            source,
            squashfs: Mark::of(squashfs).map_err(fail)?,
            root: inode_and_birth(root).map_err(fail)?,
            clock,
        };
        Ok(Self { head, files: Unpacked(files) })
    }

    /// Path of the squashfs; `None` if it is kept beside the image root.
    pub(crate) fn source(&self) -> Option<&Path> {
        self.head.source.as_deref()
    }

    /// Records that `squashfs`, which is kept beside the image root, was moved together with the image root.
    pub(crate) fn moved(&mut self, squashfs: &File) -> io::Result<()> {
        self.head.squashfs = Mark::of(squashfs)?;
        Ok(())
    }

    /// Encodes the inventory: the head as JSON, then a record for each file; a zero byte ends each of them.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = json!(self.head).to_string().into_bytes();
        bytes.push(0);
        self.files.encode(&mut |record| {
            bytes.extend_from_slice(record);
            bytes.push(0);
        });
        bytes
    }

    /// Decodes the bytes of [`Inventory::encode`], which somebody else may have written; `None` if they are malformed.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut records = bytes.strip_suffix(&[0])?.split(|byte| *byte == 0);
        let head = serde_json::from_slice(records.next()?).ok()?;
        let mut files = Unpacked::default();
        records.try_for_each(|record| files.add(record))?;
        Some(Self { head, files })
    }

    /// The source of `root`, if `root` still is the image root that was unpacked from `squashfs`. The error says why
    /// this could not be confirmed.
    pub(crate) fn source_of(self, root: &Tree, squashfs: File) -> std::result::Result<Source, String> {
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
        Ok(Source { squashfs, basis: Basis::Unpacked(self.files), is_dropped: None })
    }
}

impl Unpacked {
    /// Calls `write` with a record for each file. A record contains no zero byte.
    pub(crate) fn encode(&self, write: &mut dyn FnMut(&[u8])) {
        let mut files: Vec<_> = self.0.iter().collect();
        files.sort_unstable_by_key(|(inode, _)| **inode);
        for (inode, Then { size, modified, changed, is_bare, path }) in files {
            let ((seconds, parts), (changed, its_parts)) = (modified, changed);
            let kind = if *is_bare { BARE } else { ATTRIBUTED };
            let fields = format!("{inode} {size} {seconds} {parts} {changed} {its_parts} {kind} ");
            write(&[fields.as_bytes(), path.as_os_str().as_bytes()].concat());
        }
    }

    /// Adds the file that a record describes; `None` if the record is malformed.
    pub(crate) fn add(&mut self, record: &[u8]) -> Option<()> {
        let mut fields = record.splitn(8, |byte| *byte == b' ');
        let mut number = || std::str::from_utf8(fields.next()?).ok();
        let (inode, size) = (number()?.parse().ok()?, number()?.parse().ok()?);
        let modified = (number()?.parse().ok()?, number()?.parse().ok()?);
        let changed = (number()?.parse().ok()?, number()?.parse().ok()?);
        let kind = number()?;
        let is_bare = [ATTRIBUTED, BARE].into_iter().position(|known| known == kind)? == 1;
        let path = PathBuf::from(OsString::from_vec(fields.next()?.to_vec()));
        self.0.insert(inode, Then { size, modified, changed, is_bare, path });
        Some(())
    }

    fn find(&self, found: &Stat, device: u64, source: &Entries) -> Option<Unchanged> {
        let is_file = FileType::from_raw_mode(found.st_mode) == FileType::RegularFile && found.st_dev == device;
        let then = self.0.get(&found.st_ino).filter(|then| is_file && then.is_still(found))?;
        let before = (*source.get(then.path.as_os_str())?)?;
        let is_file = FileType::from_raw_mode(before.mode) == FileType::RegularFile;
        is_file.then_some(Unchanged { number: before.number, is_bare: then.is_bare })
    }
}

/// Field of a record for a file without extended attributes.
const BARE: &str = "-";
/// Field of a record for a file with extended attributes.
const ATTRIBUTED: &str = "a";

impl Then {
    fn of(path: &Path, found: &Stat, is_bare: bool) -> Self {
        let modified = (found.st_mtime, found.st_mtime_nsec);
        Self { size: found.st_size, modified, changed: changed(found), is_bare, path: path.to_owned() }
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
    Err(format!("the packer relies on times of change only on {}", known.join(", ")))
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
        let Ok(unpacked) = Inventory::of(&tree, &file, Some("/some where".into())) else {
            assert!(is_precise(&tree).is_err());
            return;
        };
        let bytes = unpacked.encode();
        assert_eq!(Inventory::decode(&bytes).as_ref(), Some(&unpacked));
        let mut source = Entries::new();
        for (number, name) in (7..).zip(["a b/1 2", "x\ny", "z"]) {
            let (mode, has_attributes) = (0o100_644, true);
            let before = Before { number, mode, size: 1, modified: 0, links: 1, has_attributes };
            source.insert(name.into(), Some(before));
        }
        let basis = unpacked.source_of(&tree, file).unwrap().basis;
        let mut found = Vec::new();
        let device = rustix::fs::fstat(&tree).unwrap().st_dev;
        let looked = tree.walk(|path, _, _, status| {
            found.extend(basis.find(path, status, device, &source));
            assert_eq!(basis.find(path, status, device + 1, &source), None);
            let mut changed = *status;
            changed.st_ctime_nsec = 1;
            assert_eq!(basis.find(path, &changed, device, &source), None);
            Ok(())
        });
        looked.unwrap();
        let mut numbers: Vec<_> = found.iter().map(|unchanged| (unchanged.number, unchanged.is_bare)).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, [(7, true), (8, true), (9, true)]);
        for cut in [1, 5, 30, bytes.len()] {
            let cut = Inventory::decode(&bytes[..bytes.len() - cut]);
            assert!(cut.is_none(), "{cut:?}");
        }
    }
}
