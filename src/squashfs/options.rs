//! Options for writing an image.

use std::thread;

use crate::squashfs::compression::{Compression, Method};

/// Content that goes into fragment blocks, which hold several files each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fragments {
    /// No content.
    Never,
    /// The content of files smaller than a block.
    Small,
    /// The content of files smaller than a block, and the tails of larger files.
    Tails,
}

/// Block size of a new image in bytes; mksquashfs has the same default.
pub const DEFAULT_BLOCK_SIZE: u32 = 128 << 10;

/// Options for writing an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Compression and its options.
    pub method: Method,
    /// Block size in bytes: a power of two from 4 KiB to 1 MiB.
    pub block_size: u32,
    /// `SOURCE_DATE_EPOCH`: the time of all objects and of the image, in seconds. Without it, objects keep their times,
    /// and the image gets the latest of these.
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

/// Default for [`Options::memory`]; with a plan of 200,000 files, the process stays below 256 MiB.
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

    /// Number of threads that compress, as far as the memory allows.
    pub(crate) fn workers(&self) -> usize {
        // Two blocks for each worker wait, each with its content and its result.
        let each = self.method.memory(self.block_size) + 5 * u64::from(self.block_size);
        let affordable = usize::try_from(self.memory / each).unwrap_or(usize::MAX);
        self.processors.min(affordable).max(1)
    }
}
