//! Walks through all entries of an image, directory by directory.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::squashfs::error::Fault;
use crate::squashfs::format::{
    Body, DOT_ENTRIES, Directory, Extent, Fields, Header, Inode, Kind, LONGEST_NAME, LONGEST_TARGET, ListingEntry,
    NONE, Place, RunHeader, STORED_BLOCK,
};
use crate::squashfs::metadata::{Cursor, MetadataReader};
use crate::squashfs::plan::XattrSet;
use crate::squashfs::reader::Reader;

/// Maximum number of entries that are read from one image.
const MOST_ENTRIES: u64 = 16 << 20;
/// Maximum nesting depth of directories that is read.
const DEEPEST: usize = 1 << 16;
/// Maximum number of whole blocks of one file: enough for 4 TiB in blocks of 4 KiB.
const MOST_BLOCKS: u64 = 1 << 30;

/// An entry of an image.
#[derive(Debug)]
pub struct Entry<'a> {
    /// Path below the root; empty for the root itself.
    pub path: &'a Path,
    /// Owner.
    pub user: u32,
    /// Group.
    pub group: u32,
    /// Extended attributes, sorted by name.
    pub xattrs: XattrSet,
    pub(crate) inode: &'a Inode,
}

impl Entry<'_> {
    /// Inode number, the same as `st_ino` if the kernel mounts the image.
    pub fn number(&self) -> u32 {
        self.inode.header.number
    }

    /// Permission bits, without the type.
    pub fn mode(&self) -> u32 {
        self.inode.header.mode.into()
    }

    /// Time of the last modification, in seconds.
    pub fn modified(&self) -> u32 {
        self.inode.header.modified
    }

    /// Returns whether the entry has extended attributes.
    pub fn has_xattrs(&self) -> bool {
        self.inode.xattrs != NONE
    }

    /// Number of the object's names (hard links).
    pub fn links(&self) -> u32 {
        self.inode.links
    }

    /// Type of the object, as the type bits of `st_mode`.
    pub fn kind(&self) -> u32 {
        match &self.inode.body {
            Body::Directory(_) => 0o040_000,
            Body::File(_) => 0o100_000,
            Body::Symlink(_) => 0o120_000,
            Body::Device { is_block: true, .. } => 0o060_000,
            Body::Device { is_block: false, .. } => 0o020_000,
            Body::Special(Kind::Socket) => 0o140_000,
            Body::Special(_) => 0o010_000,
        }
    }

    /// Length of a regular file in bytes; 0 for other types.
    pub fn size(&self) -> u64 {
        if let Body::File(extent) = &self.inode.body { extent.size } else { 0 }
    }

    /// Target of a symbolic link; empty for other types.
    pub fn target(&self) -> &[u8] {
        if let Body::Symlink(target) = &self.inode.body { target } else { &[] }
    }

    /// Major and minor number of a device; `None` for other types.
    pub fn device(&self) -> Option<(u32, u32)> {
        let Body::Device { number, .. } = &self.inode.body else { return None };
        Some((number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xf_ff00))
    }

    /// Returns the position of a regular file's content; `None` for other types.
    pub(crate) fn extent(&self) -> Option<&Extent> {
        if let Body::File(extent) = &self.inode.body { Some(extent) } else { None }
    }
}

/// An entry of a listing: its name, and the position, number and type of its inode.
struct Found {
    name: Vec<u8>,
    place: Place,
    number: u32,
    kind: Kind,
}

/// A directory that is being listed.
struct Open<'r, 'a> {
    /// `None` if the directory has no entries.
    listing: Option<Cursor<'r, 'a>>,
    /// Number of bytes of the listing that have not been read yet.
    left: u32,
    run: RunHeader,
    /// Number of entries of the current run that have not been read yet.
    left_in_run: u32,
    /// Length of the path without the name of the current entry.
    path: usize,
}

impl Reader {
    /// Calls `visit` with each entry: the root first, and each directory before its entries. Visits an object with
    /// several hard links once for each. With `with_xattrs`, also reads extended attributes.
    pub fn walk(&self, with_xattrs: bool, visit: &mut dyn FnMut(&Entry) -> Result<(), Fault>) -> Result<(), Fault> {
        let (metadata, xattr_metadata) = (self.metadata(), self.metadata());
        let root = Place::decode(self.superblock().root).ok_or_else(|| Fault::damaged("it has no root"))?;
        let mut walk = Walk { reader: self, metadata: &metadata, known: HashMap::new(), directories: HashSet::new() };
        let mut show = |path: &Path, inode: &Inode| {
            let (user, group) = (self.id(inode.header.user)?, self.id(inode.header.group)?);
            let xattrs = if with_xattrs && inode.xattrs != NONE {
                self.xattrs(inode.xattrs, &xattr_metadata)?
            } else {
                XattrSet::new()
            };
            visit(&Entry { path, user, group, xattrs, inode })
        };
        let inode = walk.inode(root, None)?;
        show(Path::new(""), &inode)?;
        let Body::Directory(directory) = &inode.body else {
            return Err(Fault::damaged("its root is no directory"));
        };
        let mut path = Vec::new();
        let mut open = vec![walk.enter(&inode, directory, 0)?];
        let mut entries = 0_u64;
        while let Some(last) = open.last_mut() {
            let at = last.path;
            path.truncate(at);
            let Some(Found { name, place, number, kind }) = last.next()? else {
                open.pop();
                continue;
            };
            entries += 1;
            if entries > MOST_ENTRIES || open.len() > DEEPEST {
                return Err(Fault::TooLarge("more entries than are read from a source".into()));
            }
            if at > 0 {
                path.push(b'/');
            }
            path.extend_from_slice(&name);
            let inode = walk.inode(place, Some((number, kind)))?;
            show(&PathBuf::from(OsStr::from_bytes(&path)), &inode)?;
            if let Body::Directory(directory) = &inode.body {
                open.push(walk.enter(&inode, directory, path.len())?);
            }
        }
        Ok(())
    }
}

impl Reader {
    /// Reads the content of a regular file, and calls `take` with each part of it, which is at most one block.
    pub fn content(&self, entry: &Entry, take: &mut dyn FnMut(&[u8]) -> Result<(), Fault>) -> Result<(), Fault> {
        entry.extent().map_or(Ok(()), |extent| self.extent_content(extent, take))
    }
}

impl Open<'_, '_> {
    /// Reads the next entry; returns `None` at the end of the listing.
    fn next(&mut self) -> Result<Option<Found>, Fault> {
        let cut = || Fault::damaged("a directory's listing is cut off");
        let Some(listing) = &mut self.listing else { return Ok(None) };
        if self.left == 0 && self.left_in_run == 0 {
            return Ok(None);
        }
        let mut spend = |length: usize| {
            self.left = u32::try_from(length).ok().and_then(|length| self.left.checked_sub(length)).ok_or_else(cut)?;
            Ok::<_, Fault>(())
        };
        if self.left_in_run == 0 {
            spend(RunHeader::LENGTH)?;
            let header = listing.array::<{ RunHeader::LENGTH }>()?;
            self.run = RunHeader::decode(&mut Fields(&header)).ok_or_else(cut)?;
            self.left_in_run = self.run.count;
        }
        self.left_in_run -= 1;
        let fixed = listing.array::<{ ListingEntry::LENGTH }>()?;
        let length = Fields(&fixed[6..]).u16().map_or(usize::MAX, usize::from).saturating_add(1);
        if length > LONGEST_NAME {
            return Err(Fault::damaged("a name is longer than 255 bytes"));
        }
        spend(ListingEntry::LENGTH + length)?;
        let name = listing.vector(length)?;
        let whole = [&fixed[..], &name].concat();
        let entry = ListingEntry::decode(&mut Fields(&whole)).ok_or_else(cut)?;
        if matches!(entry.name, b"." | b"..") || entry.name.iter().any(|byte| matches!(byte, b'/' | 0)) {
            return Err(Fault::damaged("a directory has an entry that is no name"));
        }
        let number = self.run.number.wrapping_add_signed(entry.difference.into());
        let place = Place { block: self.run.block, offset: entry.offset };
        let kind = entry.kind;
        Ok(Some(Found { name, place, number, kind }))
    }
}

struct Walk<'r, 'a> {
    reader: &'r Reader,
    metadata: &'r MetadataReader<'a>,
    /// Position of each inode that was read, by the inode's number.
    known: HashMap<u32, Place>,
    /// Inode numbers of the directories whose listing has begun.
    directories: HashSet<u32>,
}

impl<'r, 'a> Walk<'r, 'a> {
    /// Begins the listing of a directory.
    fn enter(&mut self, inode: &Inode, directory: &Directory, path: usize) -> Result<Open<'r, 'a>, Fault> {
        if !self.directories.insert(inode.header.number) {
            return Err(Fault::damaged("a directory is in two directories, or in itself"));
        }
        let left = directory.size.saturating_sub(DOT_ENTRIES);
        let table = self.reader.table(self.reader.superblock().directory_table);
        let listing = if left == 0 { None } else { Some(self.metadata.at(&table, directory.listing)?) };
        let run = RunHeader { count: 0, block: 0, number: 0 };
        Ok(Open { listing, left, run, left_in_run: 0, path })
    }

    /// Reads the inode at `place`. `expected` are the number and type that the directory entry states.
    fn inode(&mut self, place: Place, expected: Option<(u32, Kind)>) -> Result<Inode, Fault> {
        let table = self.reader.table(self.reader.superblock().inode_table);
        let mut cursor = self.metadata.at(&table, place)?;
        let inode = decode(&mut cursor, self.reader)?;
        let number = inode.header.number;
        if expected.is_some_and(|expected| expected != (number, inode.kind())) {
            return Err(Fault::damaged("a directory entry names another inode than it points to"));
        }
        if *self.known.entry(number).or_insert(place) != place {
            return Err(Fault::damaged("two inodes have the same number"));
        }
        if self.known.len() as u64 > u64::from(self.reader.superblock().inodes) {
            return Err(Fault::damaged("it has more inodes than its superblock states"));
        }
        Ok(inode)
    }
}

/// Decodes the inode at the cursor, and checks its fields against the image.
fn decode(from: &mut Cursor, reader: &Reader) -> Result<Inode, Fault> {
    let unknown = || Fault::damaged("an inode is of an unknown type");
    let fixed = from.array::<16>()?;
    let mut fields = Fields(&fixed);
    let mut short = || fields.u16().ok_or_else(unknown);
    let (number, mode, user, group) = (short()?, short()?, short()?, short()?);
    let header = Header {
        mode: mode & 0o7777,
        user,
        group,
        modified: fields.u32().ok_or_else(unknown)?,
        number: fields.u32().ok_or_else(unknown)?,
    };
    let is_extended = number > 7;
    let kind = Kind::of_number(if is_extended { number - 7 } else { number }).ok_or_else(unknown)?;
    let mut inode = Inode { header, links: 1, xattrs: NONE, body: Body::Special(kind) };
    match kind {
        Kind::Directory => decode_directory(from, is_extended, &mut inode)?,
        Kind::File => decode_file(from, is_extended, &mut inode, reader)?,
        Kind::Symlink => {
            inode.links = word(from)?;
            let length = usize::try_from(word(from)?).ok().filter(|length| (1..=LONGEST_TARGET).contains(length));
            let length = length.ok_or_else(|| Fault::damaged("a symbolic link's target is empty or too long"))?;
            inode.body = Body::Symlink(from.vector(length)?);
        }
        Kind::Block | Kind::Character => {
            inode.links = word(from)?;
            inode.body = Body::Device { is_block: kind == Kind::Block, number: word(from)? };
        }
        Kind::Fifo | Kind::Socket => inode.links = word(from)?,
    }
    if is_extended && !matches!(kind, Kind::Directory | Kind::File) {
        inode.xattrs = word(from)?;
    }
    Ok(inode)
}

fn word(from: &mut Cursor) -> Result<u32, Fault> {
    from.array().map(u32::from_le_bytes)
}

fn decode_directory(from: &mut Cursor, is_extended: bool, inode: &mut Inode) -> Result<(), Fault> {
    let half = |from: &mut Cursor| from.array().map(u16::from_le_bytes);
    let (block, size, offset, parent);
    if is_extended {
        inode.links = word(from)?;
        (size, block, parent) = (word(from)?, word(from)?, word(from)?);
        // Skip the number of index entries. The index follows the inode, and only makes lookups faster.
        half(from)?;
        offset = half(from)?;
        inode.xattrs = word(from)?;
    } else {
        block = word(from)?;
        inode.links = word(from)?;
        size = half(from)?.into();
        offset = half(from)?;
        parent = word(from)?;
    }
    inode.body = Body::Directory(Directory { listing: Place { block, offset }, size, parent, index: Vec::new() });
    Ok(())
}

fn decode_file(from: &mut Cursor, is_extended: bool, inode: &mut Inode, reader: &Reader) -> Result<(), Fault> {
    let long = |from: &mut Cursor| from.array().map(u64::from_le_bytes);
    let (start, size, index, offset);
    let mut sparse = 0;
    if is_extended {
        (start, size, sparse) = (long(from)?, long(from)?, long(from)?);
        inode.links = word(from)?;
        (index, offset) = (word(from)?, word(from)?);
        inode.xattrs = word(from)?;
    } else {
        (start, index, offset) = (word(from)?.into(), word(from)?, word(from)?);
        size = word(from)?.into();
    }
    let block_size = reader.superblock().block_size;
    let fragment = (index != NONE).then_some((index, offset));
    let count = Extent::block_count(size, block_size, fragment.is_some());
    if count > MOST_BLOCKS {
        return Err(Fault::TooLarge(format!("a file of {size} bytes")));
    }
    // Grow the vector block by block, so that a false count in the image takes no memory.
    let mut blocks = Vec::new();
    for _ in 0..count {
        blocks.push(word(from)?);
    }
    if blocks.iter().any(|size| size & !(STORED_BLOCK | (STORED_BLOCK - 1)) != 0) {
        return Err(Fault::damaged("a block has an impossible size"));
    }
    reader.check_data(start, &blocks)?;
    if fragment.is_some() {
        let tail = u32::try_from(size % u64::from(block_size)).unwrap_or(0);
        let is_inside = offset.checked_add(tail).is_some_and(|end| end <= block_size);
        if !is_inside || index as usize >= reader.fragments().len() {
            return Err(Fault::damaged("a file's tail lies outside of its fragment"));
        }
    }
    inode.body = Body::File(Extent { size, start, sparse, blocks, fragment });
    Ok(())
}
