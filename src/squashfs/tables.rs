//! The tables that follow the data of an image: inodes, directories, fragments, exports, IDs and extended attributes.

use std::collections::HashMap;

use crate::squashfs::compression::Method;
use crate::squashfs::error::Limit;
use crate::squashfs::format::{
    Append, Body, DOT_ENTRIES, Directory, ENTRIES_PER_HEADER, Extent, Fragment, Header, IndexEntry, Inode, Kind,
    ListingEntry, METADATA_BLOCK, NO_TABLE, NONE, Place, RunHeader, XATTR_ELSEWHERE, split_xattr,
};
use crate::squashfs::metadata::{MetadataWriter, indexed_table};
use crate::squashfs::plan::{Node, NodeBody, NodeId, Plan, XattrSet};

/// Length in bytes from which a listing gets an index. A shorter listing lies in at most two metadata blocks.
const INDEXED_LISTING: usize = METADATA_BLOCK;
/// Maximum number of entries in a directory's index.
const MOST_INDEX_ENTRIES: usize = u16::MAX as usize;

/// All tables, and their positions in the image.
#[derive(Debug, Default)]
pub(crate) struct Tables {
    pub(crate) bytes: Vec<u8>,
    pub(crate) inodes: u32,
    pub(crate) ids: u16,
    pub(crate) root: u64,
    pub(crate) inode_table: u64,
    pub(crate) directory_table: u64,
    pub(crate) fragment_table: u64,
    pub(crate) export_table: u64,
    pub(crate) id_table: u64,
    pub(crate) xattr_table: u64,
}

/// Everything from which the tables are built.
pub(crate) struct Parts<'a> {
    pub(crate) plan: &'a Plan,
    /// Result of [`Plan::in_order`].
    pub(crate) order: &'a [NodeId],
    /// Returns the position of the content of a regular file, given its node and size.
    pub(crate) content: &'a dyn Fn(NodeId, u64) -> Extent,
    pub(crate) fragments: &'a [Fragment],
    /// Time that all objects get; `None` if each keeps its own time.
    pub(crate) time: Option<u32>,
    pub(crate) is_exportable: bool,
    pub(crate) method: &'a Method,
}

/// Builds all tables of an image; the first table begins at `start`.
pub(crate) fn make(parts: &Parts, start: u64) -> Result<Tables, Limit> {
    let mut ids = Ids::default();
    let mut xattrs = Xattrs::new(parts.method);
    let Written { inodes, listings, places } = inodes_and_directories(parts, &mut ids, &mut xattrs)?;
    let mut made = Tables {
        inodes: u32::try_from(parts.order.len()).map_err(|_| Limit::Number)?,
        ids: u16::try_from(ids.list.len()).unwrap_or(0),
        root: places.last().copied().unwrap_or_default().encode(),
        inode_table: start,
        directory_table: start + inodes.len() as u64,
        bytes: inodes,
        fragment_table: NO_TABLE,
        export_table: NO_TABLE,
        ..Tables::default()
    };
    made.bytes.extend_from_slice(&listings);
    let mut add = |content: &[u8]| {
        let (table, at) = indexed_table(content, start + made.bytes.len() as u64, parts.method);
        made.bytes.extend_from_slice(&table);
        at
    };
    if !parts.fragments.is_empty() {
        let mut content = Vec::with_capacity(parts.fragments.len() * Fragment::LENGTH);
        parts.fragments.iter().for_each(|fragment| fragment.encode(&mut content));
        made.fragment_table = add(&content);
    }
    if parts.is_exportable {
        let content: Vec<u8> = places.iter().flat_map(|place| place.encode().to_le_bytes()).collect();
        made.export_table = add(&content);
    }
    let content: Vec<u8> = ids.list.iter().flat_map(|id| id.to_le_bytes()).collect();
    made.id_table = add(&content);
    made.xattr_table = xattrs.finish(start, &mut made.bytes, parts.method);
    Ok(made)
}

/// Owners and groups, in the order of their first use.
#[derive(Default)]
struct Ids {
    list: Vec<u32>,
    known: HashMap<u32, u16>,
}

impl Ids {
    fn index(&mut self, id: u32) -> Result<u16, Limit> {
        if let Some(known) = self.known.get(&id) {
            return Ok(*known);
        }
        // The superblock has 16 bits for the number of IDs, so at most 65,535 are possible.
        let next = u16::try_from(self.list.len()).ok().filter(|next| *next < u16::MAX).ok_or(Limit::Ids)?;
        self.list.push(id);
        self.known.insert(id, next);
        Ok(next)
    }
}

/// The inode table, the directory table, and the position of each inode, in the order of the inodes.
struct Written {
    inodes: Vec<u8>,
    listings: Vec<u8>,
    places: Vec<Place>,
}

/// Writes inodes and listings in one pass. A directory's inode points to its listing, and the listing points to the
/// inodes of its entries, so each directory is written after all its entries.
fn inodes_and_directories(parts: &Parts, ids: &mut Ids, xattrs: &mut Xattrs) -> Result<Written, Limit> {
    let plan = parts.plan;
    let mut numbers = vec![0; plan.len()];
    for (number, node) in (1..).zip(parts.order) {
        numbers[node.index()] = number;
    }
    let (mut inodes, mut listings) = (MetadataWriter::new(parts.method), MetadataWriter::new(parts.method));
    let mut places = Vec::with_capacity(parts.order.len());
    let mut encoded = Vec::new();
    for id in parts.order {
        let node = plan.node(*id);
        let number = numbers[id.index()];
        let body = match node.body {
            NodeBody::Directory(_) => {
                let entries = listed(plan, *id, &numbers, &places)?;
                let (listing, size, index) = write_listing(&entries, &mut listings)?;
                // The root has no parent: as mksquashfs does, give it the first unused inode number.
                let parent = if *id == NodeId::ROOT { number + 1 } else { numbers[plan.parent(*id).index()] };
                Body::Directory(Directory { listing, size, parent, index })
            }
            NodeBody::File { size, .. } => Body::File((parts.content)(*id, size)),
            NodeBody::Symlink(start, length) => Body::Symlink(plan.target((start, length)).to_vec()),
            NodeBody::Device { is_block, number } => Body::Device { is_block, number },
            NodeBody::Special(kind) => Body::Special(kind),
        };
        let header = Header {
            mode: node.mode,
            user: ids.index(node.user)?,
            group: ids.index(node.group)?,
            modified: parts.time.unwrap_or(node.modified),
            number,
        };
        let set = plan.xattrs_of(node.xattrs);
        let set = set.map_or(Ok(NONE), |set| xattrs.index(node.xattrs, set))?;
        places.push(inodes.place().ok_or(Limit::Table)?);
        encoded.clear();
        Inode { header, links: node.links, xattrs: set, body }.encode(&mut encoded);
        inodes.write(&encoded);
    }
    Ok(Written { inodes: inodes.finish(), listings: listings.finish(), places })
}

/// An entry that is going to be listed.
struct Listed<'a> {
    name: &'a [u8],
    kind: Kind,
    number: u32,
    place: Place,
}

fn listed<'a>(plan: &'a Plan, directory: NodeId, numbers: &[u32], places: &[Place]) -> Result<Vec<Listed<'a>>, Limit> {
    let entries = plan.entries(directory)?.into_iter().map(|entry| {
        let node = plan.node_of(entry);
        let number = numbers[node.index()];
        // All entries of a directory are written before the directory, so their positions are known.
        let place = places.get(number.wrapping_sub(1) as usize).copied().ok_or(Limit::Parent)?;
        Ok(Listed { name: plan.name(entry), kind: kind(plan.node(node)), number, place })
    });
    entries.collect()
}

fn kind(node: &Node) -> Kind {
    match node.body {
        NodeBody::Directory(_) => Kind::Directory,
        NodeBody::File { .. } => Kind::File,
        NodeBody::Symlink(..) => Kind::Symlink,
        NodeBody::Device { is_block: true, .. } => Kind::Block,
        NodeBody::Device { is_block: false, .. } => Kind::Character,
        NodeBody::Special(kind) => kind,
    }
}

/// Writes a directory's listing. Returns the listing's position, its length including the dot entries, and its index.
fn write_listing(entries: &[Listed], table: &mut MetadataWriter) -> Result<(Place, u32, Vec<IndexEntry>), Limit> {
    let start = table.place().ok_or(Limit::Table)?;
    let length: usize = entries.iter().map(|entry| ListingEntry::LENGTH + entry.name.len()).sum();
    let is_indexed = length >= INDEXED_LISTING;
    let (mut index, mut offset, mut encoded) = (Vec::new(), 0_usize, Vec::new());
    let mut indexed_block = start.block;
    let mut rest = entries;
    while let Some(first) = rest.first() {
        let place = table.place().ok_or(Limit::Table)?;
        if is_indexed && place.block != indexed_block && index.len() < MOST_INDEX_ENTRIES {
            indexed_block = place.block;
            let at = u32::try_from(offset).map_err(|_| Limit::Listing)?;
            index.push(IndexEntry { offset: at, block: place.block, name: first.name.to_owned() });
        }
        let count = run_length(rest, usize::from(place.offset), is_indexed);
        let (run, later) = rest.split_at(count);
        encoded.clear();
        let count = u32::try_from(count).unwrap_or(0);
        RunHeader { count, block: first.place.block, number: first.number }.encode(&mut encoded);
        for entry in run {
            // `run_length` limits the difference to 16 bits.
            let difference = i64::from(entry.number) - i64::from(first.number);
            let difference = i16::try_from(difference).unwrap_or(0);
            let Listed { name, kind, place, .. } = *entry;
            ListingEntry { offset: place.offset, difference, kind, name }.encode(&mut encoded);
        }
        table.write(&encoded);
        offset += encoded.len();
        rest = later;
    }
    // Use position 0 for an empty listing. Nothing reads it, but at the end of the table its real position might be in
    // no block.
    let start = if entries.is_empty() { Place::default() } else { start };
    let size = u32::try_from(offset).ok().and_then(|size| size.checked_add(DOT_ENTRIES)).ok_or(Limit::Listing)?;
    Ok((start, size, index))
}

/// Returns the number of entries that fit below one header. Their inodes must lie in the same metadata block, and their
/// numbers must be close to the first one's. In a long listing, at most one entry of a run may extend beyond the
/// metadata block in which the header begins, so that each block can have an index entry.
fn run_length(entries: &[Listed], offset: usize, is_indexed: bool) -> usize {
    let Some(first) = entries.first() else { return 0 };
    let mut end = offset + RunHeader::LENGTH;
    let fits = |entry: &&Listed| {
        let is_near = i16::try_from(i64::from(entry.number) - i64::from(first.number)).is_ok();
        let begins_beyond = is_indexed && end >= METADATA_BLOCK;
        end += ListingEntry::LENGTH + entry.name.len();
        entry.place.block == first.place.block && is_near && !begins_beyond
    };
    entries.iter().take(ENTRIES_PER_HEADER).take_while(fits).count().max(1)
}

/// Sets of extended attributes. Equal sets and equal long values are stored only once.
struct Xattrs {
    values: MetadataWriter,
    /// For each set: its position, number of attributes, and length.
    sets: Vec<u8>,
    known_sets: HashMap<u32, u32>,
    known_values: HashMap<Vec<u8>, Place>,
}

impl Xattrs {
    /// Maximum length of a value that is always stored directly, since a reference would take as many bytes.
    const SHORT: usize = 8;

    fn new(method: &Method) -> Self {
        let (known_sets, known_values) = (HashMap::new(), HashMap::new());
        Self { values: MetadataWriter::new(method), sets: Vec::new(), known_sets, known_values }
    }

    fn index(&mut self, planned: u32, set: &XattrSet) -> Result<u32, Limit> {
        if let Some(known) = self.known_sets.get(&planned) {
            return Ok(*known);
        }
        let next = u32::try_from(self.known_sets.len()).map_err(|_| Limit::Number)?;
        let start = self.values.place().ok_or(Limit::Table)?;
        let mut length = 0_usize;
        for (name, value) in set {
            length += self.write(name, value)?;
        }
        self.sets.u64(start.encode());
        self.sets.u32(u32::try_from(set.len()).map_err(|_| Limit::Number)?);
        self.sets.u32(u32::try_from(length).map_err(|_| Limit::Number)?);
        self.known_sets.insert(planned, next);
        Ok(next)
    }

    /// Writes an attribute. Returns the length of its name, with a NUL as listxattr(2) counts it, plus the length of
    /// its value.
    fn write(&mut self, name: &[u8], value: &[u8]) -> Result<usize, Limit> {
        let (prefix, rest) = split_xattr(name).ok_or_else(|| Limit::Xattr(name.to_owned()))?;
        let known = if value.len() > Self::SHORT { self.known_values.get(value).copied() } else { None };
        let mut entry = Vec::new();
        entry.u16(if known.is_some() { prefix | XATTR_ELSEWHERE } else { prefix });
        entry.u16(u16::try_from(rest.len()).map_err(|_| Limit::Xattr(name.to_owned()))?);
        entry.extend_from_slice(rest);
        self.values.write(&entry);
        let mut encoded = Vec::new();
        match known {
            Some(place) => {
                encoded.u32(8);
                encoded.u64(place.encode());
            }
            None => {
                if value.len() > Self::SHORT {
                    self.known_values.insert(value.to_owned(), self.values.place().ok_or(Limit::Table)?);
                }
                encoded.u32(u32::try_from(value.len()).map_err(|_| Limit::Xattr(name.to_owned()))?);
                encoded.extend_from_slice(value);
            }
        }
        self.values.write(&encoded);
        Ok(name.len() + 1 + value.len())
    }

    /// Appends the values and the sets to `image`, whose first byte is at `start`. Returns the position of the header
    /// of the sets.
    fn finish(self, start: u64, image: &mut Vec<u8>, method: &Method) -> u64 {
        if self.known_sets.is_empty() {
            return NO_TABLE;
        }
        let values = start + image.len() as u64;
        image.extend_from_slice(&self.values.finish());
        let (mut sets, at) = indexed_table(&self.sets, start + image.len() as u64, method);
        let index = sets.split_off(usize::try_from(at - start).unwrap_or(0) - image.len());
        image.extend_from_slice(&sets);
        image.u64(values);
        image.u32(u32::try_from(self.known_sets.len()).unwrap_or(0));
        image.u32(0);
        image.extend_from_slice(&index);
        at
    }
}
