//! The structures of SquashFS 4.0 as values: constants, and functions that encode and decode each. No I/O.
//!
//! All numbers are little-endian. docs/ARCHITECTURE.md, "The squashfs format as it is used here", shows the order of
//! the parts of an image and the pointers between them.

use crate::squashfs::error::Fault;

/// `hsqs`, the first four bytes of an image.
pub(crate) const MAGIC: u32 = 0x7371_7368;
/// Length of the superblock in bytes.
pub(crate) const SUPERBLOCK_LENGTH: usize = 96;
/// Length of an uncompressed metadata block, except the last one of a table.
pub(crate) const METADATA_BLOCK: usize = 8192;
/// Smallest block size that the kernel mounts.
pub(crate) const SMALLEST_BLOCK: u32 = 4096;
/// Largest block size that the kernel mounts.
pub(crate) const LARGEST_BLOCK: u32 = 1 << 20;
/// Flag in the size of a data or fragment block, set if the block is stored uncompressed.
pub(crate) const STORED_BLOCK: u32 = 1 << 24;
/// Flag in a metadata block's header, set if the block is stored uncompressed.
pub(crate) const STORED_METADATA: u16 = 1 << 15;
/// Index that means "none", for fragments and sets of extended attributes.
pub(crate) const NONE: u32 = u32::MAX;
/// Position of a table that does not exist.
pub(crate) const NO_TABLE: u64 = u64::MAX;
/// Maximum number of entries below one header of a directory listing.
pub(crate) const ENTRIES_PER_HEADER: usize = 256;
/// Maximum length of a directory entry's name, in bytes.
pub(crate) const LONGEST_NAME: usize = 255;
/// Maximum length of a symbolic link's target, in bytes; the kernel follows no longer one.
pub(crate) const LONGEST_TARGET: usize = 4095;
/// Number added to the length of a listing in the directory's inode: the format counts `.` and `..` as 3 bytes.
pub(crate) const DOT_ENTRIES: u32 = 3;
/// An image is padded to a multiple of this number of bytes, so that it can be attached to a loop device.
pub(crate) const PADDING: u64 = 4096;

/// Bits of the superblock's flags.
pub(crate) mod flag {
    /// The inode table is stored uncompressed.
    pub(crate) const STORED_INODES: u16 = 1;
    /// Data blocks are stored uncompressed.
    pub(crate) const STORED_DATA: u16 = 1 << 1;
    /// Fragment blocks are stored uncompressed.
    pub(crate) const STORED_FRAGMENTS: u16 = 1 << 3;
    /// No file has a fragment.
    pub(crate) const NO_FRAGMENTS: u16 = 1 << 4;
    /// Files larger than a block have their tails in fragments too.
    pub(crate) const ALWAYS_FRAGMENTS: u16 = 1 << 5;
    /// Equal files are stored once.
    pub(crate) const DUPLICATES: u16 = 1 << 6;
    /// The image has an export table.
    pub(crate) const EXPORTABLE: u16 = 1 << 7;
    /// Extended attributes are stored uncompressed.
    pub(crate) const STORED_XATTRS: u16 = 1 << 8;
    /// The image has no extended attributes.
    pub(crate) const NO_XATTRS: u16 = 1 << 9;
    /// Options of the compressor follow the superblock.
    pub(crate) const OPTIONS: u16 = 1 << 10;
    /// The table of ids is stored uncompressed.
    pub(crate) const STORED_IDS: u16 = 1 << 11;
}

/// Reads numbers one after another from a slice; returns `None` once the slice is too short.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn bytes(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn i16(&mut self) -> Option<i16> {
        self.array().map(i16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}

/// Appends numbers to a vector.
pub(crate) trait Append {
    fn u16(&mut self, value: u16);
    fn i16(&mut self, value: i16);
    fn u32(&mut self, value: u32);
    fn u64(&mut self, value: u64);
}

impl Append for Vec<u8> {
    fn u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn i16(&mut self, value: i16) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }
}

/// Position in a table of metadata blocks: a block, and an offset in its uncompressed content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, PartialOrd, Ord, Hash)]
pub(crate) struct Place {
    /// Start of the block, in bytes from the table's start in the image.
    pub(crate) block: u32,
    /// Offset in the uncompressed block.
    pub(crate) offset: u16,
}

impl Place {
    /// Decodes an inode reference.
    pub(crate) fn decode(reference: u64) -> Option<Self> {
        let offset = u16::try_from(reference & 0xffff).ok()?;
        Some(Self { block: u32::try_from(reference >> 16).ok()?, offset })
    }

    /// Encodes the position as an inode reference.
    pub(crate) fn encode(self) -> u64 {
        u64::from(self.block) << 16 | u64::from(self.offset)
    }
}

/// The first 96 bytes of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) inodes: u32,
    /// Time of creation, in seconds since 1970.
    pub(crate) created: u32,
    pub(crate) block_size: u32,
    pub(crate) fragments: u32,
    /// Number of the compression algorithm, see [`crate::squashfs::compression`].
    pub(crate) compression: u16,
    /// Bits of [`flag`].
    pub(crate) flags: u16,
    pub(crate) ids: u16,
    /// Reference of the root directory's inode.
    pub(crate) root: u64,
    /// Length of the image without padding.
    pub(crate) length: u64,
    pub(crate) id_table: u64,
    pub(crate) xattr_table: u64,
    pub(crate) inode_table: u64,
    pub(crate) directory_table: u64,
    pub(crate) fragment_table: u64,
    pub(crate) export_table: u64,
}

impl Superblock {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(SUPERBLOCK_LENGTH);
        out.u32(MAGIC);
        out.u32(self.inodes);
        out.u32(self.created);
        out.u32(self.block_size);
        out.u32(self.fragments);
        out.u16(self.compression);
        out.u16(u16::try_from(self.block_size.trailing_zeros()).unwrap_or(0));
        out.u16(self.flags);
        out.u16(self.ids);
        out.u16(4);
        out.u16(0);
        for number in [
            self.root,
            self.length,
            self.id_table,
            self.xattr_table,
            self.inode_table,
            self.directory_table,
            self.fragment_table,
            self.export_table,
        ] {
            out.u64(number);
        }
        out
    }

    /// Decodes a superblock and checks that its fields are consistent. `available` is the length of the image file in
    /// bytes.
    pub(crate) fn decode(bytes: &[u8], available: u64) -> Result<Self, Fault> {
        let (decoded, log, version) = Self::fields(Fields(bytes)).ok_or(Fault::NoSquashfs)?;
        if version != (4, 0) {
            return Err(Fault::Unsupported(format!("version {}.{}, expected 4.0", version.0, version.1)));
        }
        let size = decoded.block_size;
        if !size.is_power_of_two() || u32::from(log) != size.trailing_zeros() {
            return Err(Fault::damaged("its block size is no power of two"));
        }
        if !(SMALLEST_BLOCK..=LARGEST_BLOCK).contains(&size) {
            return Err(Fault::damaged(format!("its block size is {size}")));
        }
        if decoded.length > available {
            let missing = format!("it has {available} bytes of {}", decoded.length);
            return Err(Fault::damaged(missing));
        }
        decoded.check_order()?;
        Ok(decoded)
    }

    fn fields(mut from: Fields) -> Option<(Self, u16, (u16, u16))> {
        if from.u32()? != MAGIC {
            return None;
        }
        let (inodes, created, block_size, fragments) = (from.u32()?, from.u32()?, from.u32()?, from.u32()?);
        let (compression, log, flags, ids) = (from.u16()?, from.u16()?, from.u16()?, from.u16()?);
        let version = (from.u16()?, from.u16()?);
        let decoded = Self {
            inodes,
            created,
            block_size,
            fragments,
            compression,
            flags,
            ids,
            root: from.u64()?,
            length: from.u64()?,
            id_table: from.u64()?,
            xattr_table: from.u64()?,
            inode_table: from.u64()?,
            directory_table: from.u64()?,
            fragment_table: from.u64()?,
            export_table: from.u64()?,
        };
        Some((decoded, log, version))
    }

    /// Checks the order of the tables: the kernel refuses any other order.
    fn check_order(&self) -> Result<(), Fault> {
        let optional = |table: u64, before: u64| if table == NO_TABLE { before } else { table };
        let fragments = optional(self.fragment_table, self.directory_table);
        let exports = optional(self.export_table, fragments);
        let xattrs = optional(self.xattr_table, self.id_table);
        let order = [
            SUPERBLOCK_LENGTH as u64,
            self.inode_table,
            self.directory_table,
            fragments,
            exports,
            self.id_table,
            xattrs,
            self.length,
        ];
        // The directory table may be empty, since an image of empty directories has no listings. Optional tables may be
        // absent.
        let in_order = order.is_sorted() && self.inode_table < self.directory_table && xattrs < self.length;
        if in_order && self.inodes > 0 && self.ids > 0 {
            return Ok(());
        }
        Err(Fault::damaged("its tables overlap or lie outside of it"))
    }

    /// Returns whether a bit of [`flag`] is set.
    pub(crate) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Type of an inode. The numbers are those in directory entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory = 1,
    File = 2,
    Symlink = 3,
    Block = 4,
    Character = 5,
    Fifo = 6,
    Socket = 7,
}

impl Kind {
    const ALL: [Self; 7] =
        [Self::Directory, Self::File, Self::Symlink, Self::Block, Self::Character, Self::Fifo, Self::Socket];

    pub(crate) fn number(self) -> u16 {
        self as u16
    }

    pub(crate) fn of_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.number() == number)
    }
}

/// The fields with which all inodes begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// Permission bits, without the type.
    pub(crate) mode: u16,
    /// Index of the owner in the table of ids.
    pub(crate) user: u16,
    pub(crate) group: u16,
    pub(crate) modified: u32,
    pub(crate) number: u32,
}

/// An inode. Its values determine whether it is encoded in the basic or the extended form of its type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Inode {
    pub(crate) header: Header,
    pub(crate) links: u32,
    /// Index of the inode's set of extended attributes, or [`NONE`].
    pub(crate) xattrs: u32,
    pub(crate) body: Body,
}

/// The part of an inode that depends on its type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Body {
    /// A directory.
    Directory(Directory),
    /// A regular file.
    File(Extent),
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// A device, with its numbers in the kernel's encoding.
    Device { is_block: bool, number: u32 },
    /// A FIFO or a socket.
    Special(Kind),
}

/// Position and length of a directory's listing, and its index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Directory {
    pub(crate) listing: Place,
    /// Length of the listing in bytes, plus [`DOT_ENTRIES`].
    pub(crate) size: u32,
    pub(crate) parent: u32,
    pub(crate) index: Vec<IndexEntry>,
}

/// Entry of the index of a long listing. A lookup starts at the last indexed header whose first name is not greater
/// than the name that it looks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IndexEntry {
    /// Offset of a header in the listing.
    pub(crate) offset: u32,
    /// Start of the metadata block that holds the header.
    pub(crate) block: u32,
    /// Name of the first entry below that header.
    pub(crate) name: Vec<u8>,
}

/// Position and size of a regular file's content.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Extent {
    pub(crate) size: u64,
    /// Start of the first block in the image; the other blocks follow without gaps.
    pub(crate) start: u64,
    /// Number of the file's bytes that lie in holes.
    pub(crate) sparse: u64,
    /// Size of each block in the image. A size of 0 means a hole, and [`STORED_BLOCK`] marks an uncompressed block.
    pub(crate) blocks: Vec<u32>,
    /// Index of the fragment block that contains the tail, and the tail's offset in it.
    pub(crate) fragment: Option<(u32, u32)>,
}

impl Extent {
    /// Number of blocks of a file of `size` bytes. If the rest is in a fragment, only whole blocks count.
    pub(crate) fn block_count(size: u64, block_size: u32, has_fragment: bool) -> u64 {
        if has_fragment { size / u64::from(block_size) } else { size.div_ceil(u64::from(block_size)) }
    }
}

impl Inode {
    /// Type of the inode.
    pub(crate) fn kind(&self) -> Kind {
        match &self.body {
            Body::Directory(_) => Kind::Directory,
            Body::File(_) => Kind::File,
            Body::Symlink(_) => Kind::Symlink,
            Body::Device { is_block: true, .. } => Kind::Block,
            Body::Device { is_block: false, .. } => Kind::Character,
            Body::Special(kind) => *kind,
        }
    }

    fn is_extended(&self) -> bool {
        self.xattrs != NONE
            || match &self.body {
                Body::Directory(directory) => u16::try_from(directory.size).is_err() || !directory.index.is_empty(),
                Body::File(extent) => {
                    self.links > 1
                        || extent.sparse > 0
                        || u32::try_from(extent.start).is_err()
                        || u32::try_from(extent.size).is_err()
                }
                _ => false,
            }
    }

    /// Appends the inode to `out`.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let is_extended = self.is_extended();
        let kind = self.kind().number();
        out.u16(if is_extended { kind + 7 } else { kind });
        out.u16(self.header.mode);
        out.u16(self.header.user);
        out.u16(self.header.group);
        out.u32(self.header.modified);
        out.u32(self.header.number);
        match &self.body {
            Body::Directory(directory) => self.encode_directory(directory, is_extended, out),
            Body::File(extent) => self.encode_file(extent, is_extended, out),
            Body::Symlink(target) => {
                out.u32(self.links);
                out.u32(u32::try_from(target.len()).unwrap_or(u32::MAX));
                out.extend_from_slice(target);
            }
            Body::Device { number, .. } => {
                out.u32(self.links);
                out.u32(*number);
            }
            Body::Special(_) => out.u32(self.links),
        }
        if is_extended && !matches!(self.body, Body::Directory(_) | Body::File(_)) {
            out.u32(self.xattrs);
        }
    }

    fn encode_directory(&self, directory: &Directory, is_extended: bool, out: &mut Vec<u8>) {
        let Directory { listing, size, parent, index } = directory;
        if is_extended {
            out.u32(self.links);
            out.u32(*size);
            out.u32(listing.block);
            out.u32(*parent);
            out.u16(u16::try_from(index.len()).unwrap_or(u16::MAX));
            out.u16(listing.offset);
            out.u32(self.xattrs);
            for entry in index {
                out.u32(entry.offset);
                out.u32(entry.block);
                out.u32(u32::try_from(entry.name.len().saturating_sub(1)).unwrap_or(0));
                out.extend_from_slice(&entry.name);
            }
        } else {
            out.u32(listing.block);
            out.u32(self.links);
            out.u16(u16::try_from(*size).unwrap_or(u16::MAX));
            out.u16(listing.offset);
            out.u32(*parent);
        }
    }

    fn encode_file(&self, extent: &Extent, is_extended: bool, out: &mut Vec<u8>) {
        let (fragment, offset) = extent.fragment.unwrap_or((NONE, 0));
        if is_extended {
            out.u64(extent.start);
            out.u64(extent.size);
            out.u64(extent.sparse);
            out.u32(self.links);
            out.u32(fragment);
            out.u32(offset);
            out.u32(self.xattrs);
        } else {
            out.u32(u32::try_from(extent.start).unwrap_or(u32::MAX));
            out.u32(fragment);
            out.u32(offset);
            out.u32(u32::try_from(extent.size).unwrap_or(u32::MAX));
        }
        for size in &extent.blocks {
            out.u32(*size);
        }
    }
}

/// Header of a run of directory entries whose inodes are in the same metadata block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RunHeader {
    /// Number of entries that follow the header.
    pub(crate) count: u32,
    /// Start of the metadata block that contains the inodes of these entries.
    pub(crate) block: u32,
    /// Base of the entries' inode numbers, which are stored as differences from it.
    pub(crate) number: u32,
}

impl RunHeader {
    /// Length of a header in a listing, in bytes.
    pub(crate) const LENGTH: usize = 12;

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.u32(self.count.saturating_sub(1));
        out.u32(self.block);
        out.u32(self.number);
    }

    pub(crate) fn decode(from: &mut Fields) -> Option<Self> {
        let count = from.u32()?.checked_add(1).filter(|count| *count as usize <= ENTRIES_PER_HEADER)?;
        Some(Self { count, block: from.u32()?, number: from.u32()? })
    }
}

/// One entry of a directory's listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ListingEntry<'a> {
    /// Offset of the inode in its metadata block.
    pub(crate) offset: u16,
    /// Inode number of the entry, minus the number in the run's header.
    pub(crate) difference: i16,
    pub(crate) kind: Kind,
    pub(crate) name: &'a [u8],
}

impl<'a> ListingEntry<'a> {
    /// Length of an entry without its name, in bytes.
    pub(crate) const LENGTH: usize = 8;

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.u16(self.offset);
        out.i16(self.difference);
        out.u16(self.kind.number());
        out.u16(u16::try_from(self.name.len().saturating_sub(1)).unwrap_or(0));
        out.extend_from_slice(self.name);
    }

    pub(crate) fn decode(from: &mut Fields<'a>) -> Option<Self> {
        let (offset, difference, kind) = (from.u16()?, from.i16()?, Kind::of_number(from.u16()?)?);
        let name = usize::from(from.u16()?).checked_add(1).filter(|length| *length <= LONGEST_NAME + 1)?;
        Some(Self { offset, difference, kind, name: from.bytes(name)? })
    }
}

/// A fragment block, which contains tails of several files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fragment {
    pub(crate) start: u64,
    /// Size in the image, encoded like [`Extent::blocks`].
    pub(crate) size: u32,
}

impl Fragment {
    /// Length of an entry in the fragment table, in bytes.
    pub(crate) const LENGTH: usize = 16;

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.u64(self.start);
        out.u32(self.size);
        out.u32(0);
    }

    pub(crate) fn decode(from: &mut Fields) -> Option<Self> {
        let decoded = Self { start: from.u64()?, size: from.u32()? };
        from.u32()?;
        Some(decoded)
    }
}

/// Prefixes of the names of extended attributes, by number. A squashfs cannot hold attributes with other prefixes.
pub(crate) const XATTR_PREFIXES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
/// Flag in the type of an extended attribute, set if the value is stored elsewhere and the attribute refers to it.
pub(crate) const XATTR_ELSEWHERE: u16 = 1 << 8;
/// Length in bytes of an entry in the table of sets of extended attributes.
pub(crate) const XATTR_SET_LENGTH: usize = 16;

/// Splits `name` into the number of its prefix and the rest; `None` if a squashfs cannot hold the attribute.
pub(crate) fn split_xattr(name: &[u8]) -> Option<(u16, &[u8])> {
    (0..).zip(XATTR_PREFIXES).find_map(|(number, prefix)| Some((number, name.strip_prefix(prefix)?)))
}
