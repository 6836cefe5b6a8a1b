//! Large holes in the files of an image.

use std::collections::HashSet;
use std::path::Path;

use rustix::fs::{FileType, Stat};

use crate::printable::listed;
use crate::sys::tree::Tree;

/// Logs indexed by user ID: as large as the highest ID requires, and nearly empty. mksquashfs reads holes as data,
/// which takes minutes for content that no image needs.
const SPARSE_LOGS: [&str; 3] = ["lastlog", "faillog", "tallylog"];
/// Directory of the sparse logs.
const LOGS: &str = "var/log";
/// Minimum size of a large hole, in bytes.
const LARGE_HOLE: i64 = 1 << 30;

/// Maximum total of all large holes in bytes. mksquashfs reads some TiB of holes in an hour.
const MOST_HOLES: i64 = 64 << 30;

/// Advice for an image whose large holes exceed [`MOST_HOLES`].
pub(crate) const ADVICE: &str = "remove them, or exclude them (--exclude): each byte is packed as a zero";

/// The sparse logs of the image, with their paths.
pub(crate) fn sparse_logs(image_root: &Tree) -> Vec<(String, Stat)> {
    let Ok(logs) = image_root.directory_without_links(Path::new(LOGS)) else { return Vec::new() };
    let found = SPARSE_LOGS.into_iter().filter_map(|name| Some((name, logs.look(name).ok()??)));
    let sparse = found.filter(|(_, found)| large_hole(found).is_some());
    sparse.map(|(name, found)| (format!("{LOGS}/{name}"), found)).collect()
}

/// Bytes of a file that are holes; `None` unless they exceed [`LARGE_HOLE`].
fn large_hole(found: &Stat) -> Option<i64> {
    let is_file = FileType::from_raw_mode(found.st_mode) == FileType::RegularFile;
    let hole = found.st_size.saturating_sub(found.st_blocks.saturating_mul(512));
    (is_file && hole > LARGE_HOLE).then_some(hole)
}

/// Adds up the large holes of a tree's files, except its sparse logs.
pub(crate) struct Holes {
    names: Vec<String>,
    bytes: i64,
    seen: HashSet<(u64, u64)>,
}

impl Holes {
    /// Starts the sum for a tree. Its sparse logs, which are `logs`, do not count.
    pub(crate) fn new(logs: &[(String, Stat)]) -> Self {
        let seen = logs.iter().map(|(_, log)| (log.st_dev, log.st_ino)).collect();
        Self { names: Vec::new(), bytes: 0, seen }
    }

    /// Adds a file of the tree. A file with several hard links counts once.
    pub(crate) fn add(&mut self, path: &Path, found: &Stat) {
        if let Some(hole) = large_hole(found)
            && self.seen.insert((found.st_dev, found.st_ino))
        {
            self.names.push(format!("/{}", path.display()));
            self.bytes = self.bytes.saturating_add(hole);
        }
    }

    /// GiB of holes, and the files that have them; `None` if there are none.
    pub(crate) fn found(&self) -> Option<(i64, String)> {
        (!self.names.is_empty()).then(|| (self.bytes >> 30, listed(&self.names)))
    }

    /// Reason to refuse the image, if it has more holes than can be packed.
    pub(crate) fn refusal(&self) -> Option<String> {
        let (held, names) = self.found().filter(|_| self.bytes > MOST_HOLES)?;
        Some(format!("its files have {held} GiB of holes, expected at most {}: {names}", MOST_HOLES >> 30))
    }
}
