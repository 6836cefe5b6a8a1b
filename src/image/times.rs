//! Times of files that a squashfs cannot hold: it has unsigned seconds since 1970, of 32 bits.

use std::path::Path;

use rustix::fs::Stat;
use serde::{Deserialize, Serialize};

use crate::printable::Printable;

/// Files with times that a squashfs cannot hold: the first one, and their number.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct OutOfRange {
    first: String,
    count: u64,
}

impl OutOfRange {
    /// Counts the entry `path` if a squashfs cannot hold its time of modification.
    pub(crate) fn add(&mut self, path: &Path, found: &Stat) {
        if u32::try_from(found.st_mtime).is_ok() {
            return;
        }
        if self.count == 0 {
            self.first = format!("/{}", path.display());
        }
        self.count += 1;
    }

    /// Warns about these files; `instead` says which time they get.
    pub(crate) fn tell(&self, instead: &str) {
        if self.count > 0 {
            let Self { first, count } = self;
            let range = "a squashfs holds times from 1970 to February 2106";
            tracing::warn!("packed {count} files with {instead}, first {}: {range}", Printable(first));
        }
    }
}
