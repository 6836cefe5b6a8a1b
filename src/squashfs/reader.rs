//! Reads an image that may be damaged or malicious.
//!
//! Nothing is trusted: each position is checked against its table, and each block against its size. Time and memory are
//! limited whatever the image states: at most 1 GiB of metadata in total, 16 million entries, and 65,536 levels of
//! directories. A directory that is its own parent or has two parents is an error.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::squashfs::compression::{Compression, Decompressor, Method, content_length};
use crate::squashfs::error::Fault;
use crate::squashfs::format::{
    Extent, Fields, Fragment, METADATA_BLOCK, NO_TABLE, Place, STORED_BLOCK, STORED_METADATA, SUPERBLOCK_LENGTH,
    Superblock, XATTR_ELSEWHERE, XATTR_PREFIXES, XATTR_SET_LENGTH, flag,
};
use crate::squashfs::metadata::MetadataReader;
use crate::squashfs::options::Fragments;
use crate::squashfs::options::Options;
use crate::squashfs::plan::XattrSet;

/// Maximum length in bytes of an extended attribute's value that is read: the kernel's limit (xattr(7)).
const LONGEST_VALUE: usize = 64 << 10;
/// Maximum length in bytes of a table of fragments, IDs or sets of extended attributes: enough for 4,000,000 fragments.
const LONGEST_TABLE: usize = 64 << 20;
/// Maximum number of extended attributes of one object.
const MOST_XATTRS: u32 = 1 << 12;

/// An open image.
pub struct Reader {
    file: File,
    superblock: Superblock,
    method: Method,
    fragments: Vec<Fragment>,
    ids: Vec<u32>,
    xattrs: Option<XattrTables>,
}

/// Positions of the extended attributes.
struct XattrTables {
    values: Range<u64>,
    sets: Vec<XattrPlace>,
}

#[derive(Clone, Copy)]
struct XattrPlace {
    place: Place,
    count: u32,
}

impl Reader {
    /// Opens an image, and checks its superblock and the tables of fragments, ids and extended attributes.
    pub fn open(file: File) -> Result<Self, Fault> {
        let length = file.metadata()?.len();
        let mut first = [0; SUPERBLOCK_LENGTH];
        if length < SUPERBLOCK_LENGTH as u64 {
            return Err(Fault::NoSquashfs);
        }
        file.read_exact_at(&mut first, 0)?;
        let superblock = Superblock::decode(&first, length)?;
        let mut method = Method::decode(superblock.compression, None, superblock.block_size)?;
        if superblock.has(flag::OPTIONS) {
            let options = compressor_options(&file, Method::options_length(method.algorithm()))?;
            method = Method::decode(superblock.compression, Some(&options), superblock.block_size)?;
        }
        let mut reader = Self { file, superblock, method, fragments: Vec::new(), ids: Vec::new(), xattrs: None };
        reader.fragments = reader.read_fragments()?;
        reader.ids = reader.read_ids()?;
        reader.xattrs = reader.read_xattr_tables()?;
        Ok(reader)
    }

    /// Options with which a new image becomes like this one: compression, block size, fragments and export table.
    pub fn options(&self) -> Options {
        let stored = flag::STORED_DATA | flag::STORED_FRAGMENTS;
        let is_stored = self.superblock.flags & stored == stored;
        let none = Compression::None;
        let block_size = self.superblock.block_size;
        Options {
            method: if is_stored { Method::new(none, block_size) } else { self.method },
            block_size,
            is_exportable: self.superblock.export_table != NO_TABLE,
            fragments: match () {
                () if self.superblock.has(flag::NO_FRAGMENTS) => Fragments::Never,
                () if self.superblock.has(flag::ALWAYS_FRAGMENTS) => Fragments::Tails,
                () => Fragments::Small,
            },
            ..Options::new(none)
        }
    }

    pub(crate) fn into_file(self) -> File {
        self.file
    }

    pub(crate) fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    pub(crate) fn method(&self) -> &Method {
        &self.method
    }

    pub(crate) fn fragments(&self) -> &[Fragment] {
        &self.fragments
    }

    /// Returns the owner or group at this index of the table of ids.
    pub(crate) fn id(&self, index: u16) -> Result<u32, Fault> {
        self.ids.get(usize::from(index)).copied().ok_or_else(|| Fault::damaged("an owner is not in the table of ids"))
    }

    /// Returns a new reader of metadata; its limits count from zero.
    pub(crate) fn metadata(&self) -> MetadataReader<'_> {
        MetadataReader::new(&self.file, self.method.algorithm())
    }

    /// Returns the range of the table that begins at `start`: it ends where the next table begins.
    pub(crate) fn table(&self, start: u64) -> Range<u64> {
        let all = &self.superblock;
        let starts =
            [all.inode_table, all.directory_table, all.fragment_table, all.export_table, all.id_table, all.xattr_table];
        let next = starts.into_iter().filter(|next| *next > start && *next != NO_TABLE).min();
        start..next.unwrap_or(all.length).min(all.length)
    }

    /// Reads a table of `count` entries of `entry` bytes each, whose index is at `at`.
    fn indexed(&self, at: u64, count: u64, entry: usize) -> Result<Vec<u8>, Fault> {
        let outside = || Fault::damaged("an index lies outside of the image");
        let length = usize::try_from(count).ok().and_then(|count| count.checked_mul(entry)).ok_or_else(outside)?;
        if length > LONGEST_TABLE {
            return Err(Fault::TooLarge("a table of more than 64 MiB".into()));
        }
        let blocks = length.div_ceil(METADATA_BLOCK);
        let end = at.checked_add(8 * blocks as u64).filter(|end| *end <= self.superblock.length).ok_or_else(outside)?;
        let mut index = vec![0; usize::try_from(end - at).map_err(|_| outside())?];
        self.file.read_exact_at(&mut index, at)?;
        let metadata = self.metadata();
        let mut table = Vec::new();
        for place in index.chunks_exact(8) {
            let place = Fields(place).u64().ok_or_else(outside)?;
            if place < SUPERBLOCK_LENGTH as u64 {
                return Err(outside());
            }
            let now = (length - table.len()).min(METADATA_BLOCK);
            let mut cursor = metadata.at(&(place..at), Place::default())?;
            table.extend_from_slice(&cursor.vector(now)?);
        }
        Ok(table)
    }

    fn read_fragments(&self) -> Result<Vec<Fragment>, Fault> {
        if self.superblock.fragments == 0 {
            return Ok(Vec::new());
        }
        if self.superblock.fragment_table == NO_TABLE {
            return Err(Fault::damaged("it has no table of fragments"));
        }
        let (at, count) = (self.superblock.fragment_table, self.superblock.fragments.into());
        let table = self.indexed(at, count, Fragment::LENGTH)?;
        let fragments = table.chunks_exact(Fragment::LENGTH).map(|bytes| {
            let fragment =
                Fragment::decode(&mut Fields(bytes)).ok_or_else(|| Fault::damaged("a fragment is cut off"))?;
            self.check_data(fragment.start, &[fragment.size])?;
            Ok(fragment)
        });
        fragments.collect()
    }

    fn read_ids(&self) -> Result<Vec<u32>, Fault> {
        let table = self.indexed(self.superblock.id_table, self.superblock.ids.into(), 4)?;
        Ok(table.chunks_exact(4).filter_map(|bytes| Fields(bytes).u32()).collect())
    }

    fn read_xattr_tables(&self) -> Result<Option<XattrTables>, Fault> {
        let at = self.superblock.xattr_table;
        if at == NO_TABLE {
            return Ok(None);
        }
        let outside = || Fault::damaged("its extended attributes lie outside of it");
        let mut header = [0; 16];
        at.checked_add(16).filter(|end| *end <= self.superblock.length).ok_or_else(outside)?;
        self.file.read_exact_at(&mut header, at)?;
        let mut fields = Fields(&header);
        let (values, count) = (fields.u64().ok_or_else(outside)?, fields.u32().ok_or_else(outside)?);
        // Some versions of mksquashfs write a header with zero sets and an invalid start of the values.
        if count == 0 {
            return Ok(None);
        }
        if values < self.superblock.id_table || values > at {
            return Err(outside());
        }
        let table = self.indexed(at + 16, count.into(), XATTR_SET_LENGTH)?;
        let sets = table.chunks_exact(XATTR_SET_LENGTH).map(|bytes| {
            let mut fields = Fields(bytes);
            let place = fields.u64().and_then(Place::decode).ok_or_else(outside)?;
            let count = fields.u32().filter(|count| *count <= MOST_XATTRS).ok_or_else(outside)?;
            Ok::<_, Fault>(XattrPlace { place, count })
        });
        Ok(Some(XattrTables { values: values..at, sets: sets.collect::<Result<_, _>>()? }))
    }

    /// Returns the set of extended attributes with the number `index`, sorted by name.
    pub(crate) fn xattrs(&self, index: u32, metadata: &MetadataReader) -> Result<XattrSet, Fault> {
        let unknown = || Fault::damaged("a set of extended attributes is not in its table");
        let tables = self.xattrs.as_ref().ok_or_else(unknown)?;
        let set = *tables.sets.get(index as usize).ok_or_else(unknown)?;
        let mut cursor = metadata.at(&tables.values, set.place)?;
        let mut found = XattrSet::new();
        for _ in 0..set.count {
            let kind = u16::from_le_bytes(cursor.array()?);
            let length = usize::from(u16::from_le_bytes(cursor.array()?));
            let prefix = XATTR_PREFIXES.get(usize::from(kind & 0xff)).ok_or_else(unknown)?;
            let name = [prefix, cursor.vector(length)?.as_slice()].concat();
            let length = u32::from_le_bytes(cursor.array()?);
            let value = if kind & XATTR_ELSEWHERE == 0 {
                cursor.vector(value_length(length)?)?
            } else {
                let place = Place::decode(u64::from_le_bytes(cursor.array()?)).ok_or_else(unknown)?;
                let mut elsewhere = metadata.at(&tables.values, place)?;
                let length = u32::from_le_bytes(elsewhere.array()?);
                elsewhere.vector(value_length(length)?)?
            };
            found.push((name, value));
        }
        found.sort_unstable();
        Ok(found)
    }

    /// Checks that blocks of these sizes, which follow each other from `start`, lie between the superblock and the
    /// inodes. Returns the total length of the blocks in the image.
    pub(crate) fn check_data(&self, start: u64, sizes: &[u32]) -> Result<u64, Fault> {
        let mut length = 0;
        for size in sizes {
            let size = size & !STORED_BLOCK;
            if size > self.superblock.block_size {
                return Err(Fault::damaged("a block is larger than the block size"));
            }
            length += u64::from(size);
        }
        let end = start.checked_add(length);
        let is_inside = start >= SUPERBLOCK_LENGTH as u64 && end.is_some_and(|end| end <= self.superblock.inode_table);
        if length > 0 && !is_inside { Err(Fault::damaged("a block lies outside of the data")) } else { Ok(length) }
    }

    /// Reads the content of a file block by block, and calls `take` with the content of each block.
    pub(crate) fn extent_content(
        &self,
        extent: &Extent,
        take: &mut dyn FnMut(&[u8]) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let block_size = u64::from(self.superblock.block_size);
        let mut blocks = BlockReader::new(&self.file, &self.method);
        let (mut at, mut left) = (extent.start, extent.size);
        let short = || Fault::damaged("a block is shorter than it should be");
        for size in &extent.blocks {
            let expected = usize::try_from(left.min(block_size)).map_err(|_| short())?;
            let content = blocks.read(at, *size, expected)?;
            if content.len() != expected {
                return Err(short());
            }
            take(content)?;
            at += u64::from(size & !STORED_BLOCK);
            left -= expected as u64;
        }
        let Some((index, offset)) = extent.fragment else { return Ok(()) };
        let fragment = self.fragments.get(index as usize).ok_or_else(short)?;
        let most = self.superblock.block_size as usize;
        let content = blocks.read(fragment.start, fragment.size, most)?;
        let tail = offset as usize..(offset as usize).saturating_add(usize::try_from(left).map_err(|_| short())?);
        take(content.get(tail).ok_or_else(short)?)
    }
}

/// Reads and decompresses data blocks.
pub(crate) struct BlockReader<'a> {
    file: &'a File,
    algorithm: Compression,
    decompressor: Decompressor,
    raw: Vec<u8>,
    content: Vec<u8>,
}

impl<'a> BlockReader<'a> {
    pub(crate) fn new(file: &'a File, method: &Method) -> Self {
        let algorithm = method.algorithm();
        Self { file, algorithm, decompressor: Decompressor::new(algorithm), raw: Vec::new(), content: Vec::new() }
    }

    /// Returns the length of a block's content. Decompresses the block only if the block does not state the length.
    pub(crate) fn length(&mut self, at: u64, size: u32, most: usize) -> Result<u64, Fault> {
        let length = size & !STORED_BLOCK;
        if size & STORED_BLOCK == 0 && length > 0 {
            self.raw.resize(length as usize, 0);
            self.file.read_exact_at(&mut self.raw, at)?;
            if let Some(says) = content_length(self.algorithm, &self.raw) {
                return Ok(says);
            }
        }
        Ok(self.read(at, size, most)?.len() as u64)
    }

    /// Returns the content, at most `most` bytes, of the block at `at`, for which an inode or fragment states `size`.
    /// The content of a hole is `most` zeros.
    pub(crate) fn read(&mut self, at: u64, size: u32, most: usize) -> Result<&[u8], Fault> {
        let length = size & !STORED_BLOCK;
        if length == 0 {
            self.content.clear();
            self.content.resize(most, 0);
            return Ok(&self.content);
        }
        self.raw.resize(length as usize, 0);
        self.file.read_exact_at(&mut self.raw, at)?;
        if size & STORED_BLOCK != 0 {
            return Ok(self.raw.get(..most).unwrap_or(&self.raw));
        }
        self.decompressor.decompress(&self.raw, most, &mut self.content)?;
        Ok(&self.content)
    }
}

fn value_length(length: u32) -> Result<usize, Fault> {
    let length = usize::try_from(length).ok().filter(|length| *length <= LONGEST_VALUE);
    length.ok_or_else(|| Fault::damaged("an extended attribute is longer than 64 KiB"))
}

/// Reads the options of the compressor from the uncompressed metadata block that follows the superblock.
fn compressor_options(file: &File, length: usize) -> Result<Vec<u8>, Fault> {
    let mut header = [0; 2];
    file.read_exact_at(&mut header, SUPERBLOCK_LENGTH as u64)?;
    if u16::from_le_bytes(header) != u16::try_from(length).unwrap_or(0) | STORED_METADATA {
        return Err(Fault::damaged("the compressor's options have an unexpected length"));
    }
    let mut options = vec![0; length];
    file.read_exact_at(&mut options, SUPERBLOCK_LENGTH as u64 + 2)?;
    Ok(options)
}
