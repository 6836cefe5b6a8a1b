//! Progress of writing an image.

use std::sync::{Mutex, PoisonError};

/// Progress of writing an image. Bytes that are taken over from the source are counted separately, since copying them
/// takes little time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Bytes of the image that were taken over from the source.
    pub taken: u64,
    /// Bytes of new blocks in the image, counted after compression.
    pub compressed: u64,
    /// Bytes of files that were read.
    pub read: u64,
    /// Total number of bytes that will be taken over.
    pub to_take: u64,
    /// Total number of bytes of files that will be read. Files that turn out to equal others are skipped.
    pub to_read: u64,
}

impl Progress {
    /// Number of bytes of the image that have been written.
    pub fn image(&self) -> u64 {
        self.taken + self.compressed
    }
}

/// Called after each change, from several threads but never concurrently. It should return quickly.
pub type Report<'a> = &'a (dyn Fn(&Progress) + Sync);

/// Adds up the progress of all threads.
pub(crate) struct Meter<'a> {
    report: Report<'a>,
    so_far: Mutex<Progress>,
}

impl<'a> Meter<'a> {
    pub(crate) fn new(report: Report<'a>, to_take: u64, to_read: u64) -> Self {
        Self { report, so_far: Mutex::new(Progress { to_take, to_read, ..Progress::default() }) }
    }

    fn change(&self, change: impl FnOnce(&mut Progress)) {
        let mut so_far = self.so_far.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut so_far);
        (self.report)(&so_far);
    }

    pub(crate) fn taken(&self, bytes: u64) {
        self.change(|so_far| so_far.taken += bytes);
    }

    /// Counts bytes of a file that need no compression: holes, and content that the image already contains.
    pub(crate) fn read(&self, bytes: u64) {
        self.change(|so_far| so_far.read += bytes);
    }

    pub(crate) fn compressed(&self, content: u64, block: u64) {
        self.change(|so_far| {
            so_far.read += content;
            so_far.compressed += block;
        });
    }

    pub(crate) fn so_far(&self) -> Progress {
        *self.so_far.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
