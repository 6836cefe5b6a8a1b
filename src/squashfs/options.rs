//! How an image is written.

use std::thread;

use crate::squashfs::compression::{Compression, Method};

/// Content that goes into fragment blocks, which hold several files each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fragments {
    /// Nothing.
    Never,
    /// Files smaller than a block.
    Small,
    /// These, and the tails of larger files.
    Tails,
}

/// Block size of a new image in bytes; mksquashfs's.
pub const DEFAULT_BLOCK_SIZE: u32 = 128 << 10;

/// How an image is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Compression and its options.
    pub method: Method,
    /// A power of two from 4 KiB to 1 MiB.
    pub block_size: u32,
    /// `SOURCE_DATE_EPOCH`: the time of all objects and of the image, in seconds. Without it, objects keep theirs, and
    /// the image gets the latest of them.
    pub epoch: Option<u32>,
    /// True if the image has an export table, which NFS needs.
    pub is_exportable: bool,
    /// True if equal files are stored once.
    pub without_duplicates: bool,
    /// Content that goes into fragment blocks.
    pub fragments: Fragments,
    /// Number of processors to use.
    pub processors: usize,
    /// Memory in bytes for blocks that are being compressed. It limits the number of processors.
    pub memory: u64,
}

/// Memory that leaves room for a plan of 200,000 files below 256 MiB.
const MEMORY: u64 = 96 << 20;

impl Options {
    /// mksquashfs's defaults, with all processors.
    pub fn new(compression: Compression) -> Self {
        Self {
            method: Method::new(compression, DEFAULT_BLOCK_SIZE),
            block_size: DEFAULT_BLOCK_SIZE,
            epoch: None,
            is_exportable: true,
            without_duplicates: true,
            fragments: Fragments::Small,
            processors: thread::available_parallelism().map_or(1, usize::from),
            memory: MEMORY,
        }
    }

    /// Number of threads that compress, within the memory.
    pub(crate) fn workers(&self) -> usize {
        // Two blocks a worker wait, and each has its content and its result.
        let each = self.method.memory(self.block_size) + 5 * u64::from(self.block_size);
        let affordable = usize::try_from(self.memory / each).unwrap_or(usize::MAX);
        self.processors.min(affordable).max(1)
    }
}
