//! Options for writing an image.

use std::thread;

use crate::squashfs::compression::{Compression, Method};

/// Selects the content that goes into fragment blocks. A fragment block contains content of several files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fragments {
    /// No content.
    Never,
    /// The content of files smaller than a block.
    Small,
    /// The content of files smaller than a block, and the tails of larger files.
    Tails,
}

/// Default block size of a new image in bytes, the same as mksquashfs's.
pub const DEFAULT_BLOCK_SIZE: u32 = 128 << 10;

/// Options for writing an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Compression and its options.
    pub method: Method,
    /// Block size in bytes: a power of two from 4 KiB to 1 MiB.
    pub block_size: u32,
    /// `SOURCE_DATE_EPOCH`: the time of all objects and of the image, in seconds. If `None`, objects keep their times,
    /// and the image gets the latest of them.
    pub epoch: Option<u32>,
    /// True if the image gets an export table, which NFS needs.
    pub is_exportable: bool,
    /// True if equal files are stored only once.
    pub without_duplicates: bool,
    /// The content that goes into fragment blocks.
    pub fragments: Fragments,
    /// Maximum number of processors to use.
    pub processors: usize,
    /// Memory in bytes for blocks that are being compressed. It also limits the number of threads that compress.
    pub memory: u64,
}

/// Default for [`Options::memory`]; with a plan of 200,000 files, the process stays below 256 MiB.
const MEMORY: u64 = 96 << 20;

impl Options {
    /// mksquashfs's default options, with all processors.
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

    /// Number of threads that compress, limited by the memory.
    pub(crate) fn workers(&self) -> usize {
        // For each worker, two blocks wait in the queue, each with its content and its result.
        let each = self.method.memory(self.block_size) + 5 * u64::from(self.block_size);
        let affordable = usize::try_from(self.memory / each).unwrap_or(usize::MAX);
        self.processors.min(affordable).max(1)
    }
}
