//! Tables of metadata blocks. Each block has up to 8 KiB of content, and a two-byte header with its size in the image.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use crate::squashfs::compression::{Compression, Compressor, Decompressor, Method};
use crate::squashfs::error::Fault;
use crate::squashfs::format::{METADATA_BLOCK, Place, STORED_METADATA};

/// Writes a table into memory.
pub(crate) struct MetadataWriter {
    compressor: Compressor,
    /// Content that does not fill a whole block yet.
    pending: Vec<u8>,
    /// Complete blocks.
    table: Vec<u8>,
    compressed: Vec<u8>,
}

impl MetadataWriter {
    pub(crate) fn new(method: &Method) -> Self {
        Self {
            compressor: Compressor::for_metadata(method),
            pending: Vec::new(),
            table: Vec::new(),
            compressed: Vec::new(),
        }
    }

    /// Returns the position of the next byte. Returns `None` once the table exceeds 4 GiB, since references cannot
    /// point beyond.
    pub(crate) fn place(&self) -> Option<Place> {
        let offset = u16::try_from(self.pending.len()).ok()?;
        Some(Place { block: u32::try_from(self.table.len()).ok()?, offset })
    }

    pub(crate) fn write(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(METADATA_BLOCK - self.pending.len()));
            self.pending.extend_from_slice(now);
            bytes = later;
            if self.pending.len() == METADATA_BLOCK {
                self.end_block();
            }
        }
    }

    fn end_block(&mut self) {
        let is_smaller = self.compressor.compress(&self.pending, &mut self.compressed);
        let (content, mark) = if is_smaller { (&self.compressed, 0) } else { (&self.pending, STORED_METADATA) };
        // A block has at most 8192 bytes, so its length always fits.
        let header = u16::try_from(content.len()).unwrap_or(0) | mark;
        self.table.extend_from_slice(&header.to_le_bytes());
        self.table.extend_from_slice(content);
        self.pending.clear();
    }

    /// Returns the complete table.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        if !self.pending.is_empty() {
            self.end_block();
        }
        self.table
    }
}

/// Builds a table with an index of its blocks, as for IDs, fragments and exports: the blocks, which begin at `start` in
/// the image, then the index. Returns the table, and the position of the index in the image.
pub(crate) fn indexed_table(content: &[u8], start: u64, method: &Method) -> (Vec<u8>, u64) {
    let mut writer = MetadataWriter::new(method);
    let mut index = Vec::new();
    for block in content.chunks(METADATA_BLOCK) {
        index.extend_from_slice(&(start + writer.table.len() as u64).to_le_bytes());
        writer.write(block);
    }
    let mut table = writer.finish();
    let at = start + table.len() as u64;
    table.extend_from_slice(&index);
    (table, at)
}

/// Maximum number of metadata bytes that are read from one image, counted again if they are read again. An image of
/// 5,000,000 files stays below this limit.
const MOST_READ: u64 = 1 << 30;
/// Maximum number of metadata blocks that are decompressed for one image: this takes some seconds with gzip.
const MOST_BLOCKS: u64 = 1 << 17;
/// Maximum number of decompressed blocks in the cache, which takes up to 16 MiB.
const KEPT_BLOCKS: usize = 2048;

/// Reads metadata tables of an image, within limits of time and memory.
pub(crate) struct MetadataReader<'a> {
    file: &'a File,
    decompressor: RefCell<Decompressor>,
    kept: RefCell<HashMap<u64, Block>>,
    bytes: Cell<u64>,
    blocks: Cell<u64>,
}

#[derive(Clone)]
struct Block {
    content: Rc<Vec<u8>>,
    /// Position of the next block in the image.
    next: u64,
}

impl<'a> MetadataReader<'a> {
    pub(crate) fn new(file: &'a File, algorithm: Compression) -> Self {
        Self {
            file,
            decompressor: RefCell::new(Decompressor::new(algorithm)),
            kept: RefCell::default(),
            bytes: Cell::new(0),
            blocks: Cell::new(0),
        }
    }

    fn block(&self, at: u64, end: u64) -> Result<Block, Fault> {
        if let Some(known) = self.kept.borrow().get(&at).filter(|known| known.next <= end) {
            return Ok(known.clone());
        }
        count(&self.blocks, 1, MOST_BLOCKS)?;
        let beyond = || Fault::damaged("a metadata block lies outside of its table");
        let start = at.checked_add(2).filter(|start| *start <= end).ok_or_else(beyond)?;
        let mut header = [0; 2];
        self.file.read_exact_at(&mut header, at)?;
        let header = u16::from_le_bytes(header);
        let (length, is_stored) = (usize::from(header & !STORED_METADATA), header & STORED_METADATA != 0);
        let next = start + length as u64;
        if next > end || length > METADATA_BLOCK || length == 0 {
            return Err(beyond());
        }
        let mut raw = vec![0; length];
        self.file.read_exact_at(&mut raw, start)?;
        let content = if is_stored {
            raw
        } else {
            let mut content = Vec::new();
            self.decompressor.borrow_mut().decompress(&raw, METADATA_BLOCK, &mut content)?;
            content
        };
        let block = Block { content: Rc::new(content), next };
        let mut kept = self.kept.borrow_mut();
        if kept.len() >= KEPT_BLOCKS {
            kept.clear();
        }
        kept.insert(at, block.clone());
        Ok(block)
    }

    /// Returns a cursor at `place` in the table that occupies the range `table` of the image.
    pub(crate) fn at(&self, table: &Range<u64>, place: Place) -> Result<Cursor<'_, 'a>, Fault> {
        let at = table.start.saturating_add(place.block.into());
        let block = self.block(at, table.end)?;
        let offset = usize::from(place.offset);
        if offset > block.content.len() {
            return Err(Fault::damaged("a reference points beyond its metadata block"));
        }
        Ok(Cursor { reader: self, end: table.end, block, offset })
    }
}

/// Adds `by` to a counter, and fails if the counter then exceeds its limit `most`.
fn count(counter: &Cell<u64>, by: u64, most: u64) -> Result<(), Fault> {
    counter.set(counter.get().saturating_add(by));
    if counter.get() > most {
        return Err(Fault::TooLarge("more metadata than is read from a source".into()));
    }
    Ok(())
}

/// Position in a table, for reading bytes across the borders of its metadata blocks.
pub(crate) struct Cursor<'r, 'a> {
    reader: &'r MetadataReader<'a>,
    /// End of the table, as a position in the image.
    end: u64,
    block: Block,
    offset: usize,
}

impl Cursor<'_, '_> {
    /// Reads exactly `out.len()` bytes.
    pub(crate) fn read(&mut self, mut out: &mut [u8]) -> Result<(), Fault> {
        count(&self.reader.bytes, out.len() as u64, MOST_READ)?;
        while !out.is_empty() {
            let available = self.block.content.get(self.offset..).unwrap_or(&[]);
            if available.is_empty() {
                self.block = self.reader.block(self.block.next, self.end)?;
                self.offset = 0;
                continue;
            }
            let now = available.len().min(out.len());
            let (filled, rest) = out.split_at_mut(now);
            filled.copy_from_slice(&available[..now]);
            self.offset += now;
            out = rest;
        }
        Ok(())
    }

    /// Reads `N` bytes.
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let mut out = [0; N];
        self.read(&mut out)?;
        Ok(out)
    }

    /// Reads `length` bytes; the caller has checked `length` against a limit.
    pub(crate) fn vector(&mut self, length: usize) -> Result<Vec<u8>, Fault> {
        let mut out = vec![0; length];
        self.read(&mut out)?;
        Ok(out)
    }
}
