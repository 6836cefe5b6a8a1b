//! Keeps the positions of the content of all files of a source image in memory.

use std::collections::HashMap;
use std::fs::File;
use std::panic::resume_unwind;
use std::thread;

use crate::squashfs::compression::Method;
use crate::squashfs::error::Fault;
use crate::squashfs::format::Fragment;
use crate::squashfs::options::Options;
use crate::squashfs::reader::{BlockReader, Reader};
use crate::squashfs::walk::Entry;

/// The checked content of a source image. It takes about 60 bytes for each file and 4 for each block.
#[derive(Debug)]
pub struct Inventory {
    file: File,
    pub(crate) block_size: u32,
    pub(crate) method: Method,
    pub(crate) fragments: Vec<Fragment>,
    files: HashMap<u32, SourceFile>,
    blocks: Vec<u32>,
    /// Content length of each fragment block; empty until [`Inventory::set_lengths`] is called.
    lengths: Vec<u64>,
}

/// A regular file of a source image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SourceFile {
    pub(crate) size: u64,
    /// Start of the file's first block in the image.
    pub(crate) start: u64,
    /// Index of the file's first block in [`Inventory::blocks`].
    first: u32,
    /// Number of the file's blocks.
    count: u32,
    /// Index of the fragment block that contains the file's tail, and the tail's offset in it.
    pub(crate) fragment: Option<(u32, u32)>,
}

impl Inventory {
    /// Reads the positions of all content of the image that `reader` has opened.
    pub fn new(reader: Reader) -> Result<Self, Fault> {
        Self::with(reader, &mut |_| {})
    }

    /// Like [`Inventory::new`], but also calls `visit` with each entry, which saves a second walk through the image.
    pub fn with(reader: Reader, visit: &mut dyn FnMut(&Entry)) -> Result<Self, Fault> {
        let (mut files, mut blocks) = (HashMap::new(), Vec::new());
        reader.walk(false, &mut |entry| {
            visit(entry);
            let Some(extent) = entry.extent() else { return Ok(()) };
            if files.contains_key(&entry.number()) {
                return Ok(());
            }
            let too_many = |_| Fault::TooLarge("more blocks than are read from a source".into());
            let first = u32::try_from(blocks.len()).map_err(too_many)?;
            let count = u32::try_from(extent.blocks.len()).map_err(too_many)?;
            blocks.extend_from_slice(&extent.blocks);
            let (size, start) = (extent.size, extent.start);
            // Some writers name a fragment block for a file that has no tail.
            let fragment = extent.fragment.filter(|_| size % u64::from(reader.superblock().block_size) > 0);
            files.insert(entry.number(), SourceFile { size, start, first, count, fragment });
            Ok(())
        })?;
        Ok(Self {
            block_size: reader.superblock().block_size,
            method: *reader.method(),
            fragments: reader.fragments().to_vec(),
            file: reader.into_file(),
            files,
            blocks,
            lengths: Vec::new(),
        })
    }

    /// Returns the content length of each fragment block, for [`Inventory::set_lengths`], using so many `processors`.
    /// gzip blocks do not state their length and must be decompressed, so this can run while a tree is being collected.
    pub fn measure(&self, processors: usize) -> Result<Vec<u64>, Fault> {
        let most = self.block_size as usize;
        in_parts(&self.fragments, processors, |part| {
            let mut blocks = BlockReader::new(&self.file, &self.method);
            part.iter().map(|fragment| blocks.length(fragment.start, fragment.size, most)).collect()
        })
    }

    /// Stores the result of [`Inventory::measure`].
    pub fn set_lengths(&mut self, lengths: Vec<u64>) {
        self.lengths = lengths;
    }

    /// Returns the content length of a fragment block if it was measured.
    pub(crate) fn length(&self, fragment: u32) -> Option<u64> {
        self.lengths.get(fragment as usize).copied()
    }

    /// Returns whether an image with these options can hold the blocks of this source unchanged.
    pub fn fits(&self, options: &Options) -> bool {
        self.block_size == options.block_size && self.method.number() == options.method.number()
    }

    pub(crate) fn source(&self) -> &File {
        &self.file
    }

    /// Returns the regular file with this inode number.
    pub(crate) fn file(&self, number: u32) -> Option<SourceFile> {
        self.files.get(&number).copied()
    }

    /// Returns all regular files, in arbitrary order.
    pub(crate) fn files(&self) -> impl Iterator<Item = &SourceFile> {
        self.files.values()
    }

    /// Returns the part of a fragment block that contains a file's tail: index of the block, start and end of the tail
    /// in it.
    pub(crate) fn tail(&self, file: &SourceFile) -> Option<(u32, u32, u32)> {
        let (index, offset) = file.fragment?;
        let length = u32::try_from(file.size % u64::from(self.block_size)).unwrap_or(0);
        // Reading the inventory has checked that the tail ends within a block.
        Some((index, offset, offset.saturating_add(length)))
    }

    /// Returns the sizes of a file's blocks.
    pub(crate) fn blocks(&self, file: &SourceFile) -> &[u32] {
        let (first, count) = (file.first as usize, file.count as usize);
        self.blocks.get(first..first + count).unwrap_or(&[])
    }
}

/// Divides `all` among so many `processors`, each of which evaluates its part. Returns the results in order.
pub(crate) fn in_parts<T: Sync, R: Send>(
    all: &[T],
    processors: usize,
    evaluate: impl Fn(&[T]) -> Result<Vec<R>, Fault> + Sync,
) -> Result<Vec<R>, Fault> {
    let parts = all.chunks(all.len().div_ceil(processors.max(1)).max(1));
    let results: Result<Vec<_>, _> = thread::scope(|scope| {
        let running: Vec<_> = parts.map(|part| scope.spawn(|| evaluate(part))).collect();
        running.into_iter().map(|one| one.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    Ok(results?.into_iter().flatten().collect())
}
