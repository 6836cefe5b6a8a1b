//! Reads the files that are to be compressed: their blocks, holes and tails. Finds files with equal content.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use ring::digest::{Context, SHA256};

use crate::squashfs::blocks::{FileBlocks, Halt, Queue, Stopped};
use crate::squashfs::error::Failure;
use crate::squashfs::format::{Extent, STORED_BLOCK};
use crate::squashfs::inventory::SourceFile;
use crate::squashfs::options::{Fragments, Options};
use crate::squashfs::plan::{NodeId, Plan};

/// Opens a regular file of the tree, given its path below the root.
pub type Open<'a> = &'a mut dyn FnMut(&Path) -> io::Result<File>;

/// Position of each file's content in the image.
#[derive(Debug)]
pub(crate) struct Located {
    /// Positions, indexed by node.
    places: Vec<At>,
    duplicates: u64,
}

#[derive(Debug, Default, Clone)]
enum At {
    /// The file is empty, or the position of its content is not known yet.
    #[default]
    Nowhere,
    /// The content is that of another file.
    SameAs(NodeId),
    /// All content is in a fragment block: index of the block, and offset in it.
    Fragment(u32, u32),
    /// Blocks, and the place of the tail if it is in a fragment block.
    Blocks(Box<FileBlocks>, Option<(u32, u32)>),
}

impl Located {
    /// Creates a list for `nodes` nodes, none of which has a position yet.
    pub(crate) fn new(nodes: usize) -> Self {
        Self { places: vec![At::Nowhere; nodes], duplicates: 0 }
    }

    fn set_same(&mut self, node: NodeId, other: NodeId) {
        self.places[node.index()] = At::SameAs(other);
        self.duplicates += 1;
    }

    fn set_fragment(&mut self, node: NodeId, fragment: (u32, u32)) {
        self.places[node.index()] = At::Fragment(fragment.0, fragment.1);
    }

    /// Sets the position of a file's blocks and tail.
    pub(crate) fn set(&mut self, node: NodeId, (blocks, fragment): (FileBlocks, Option<(u32, u32)>)) {
        self.places[node.index()] = match fragment {
            Some((index, offset)) if blocks.sizes.is_empty() => At::Fragment(index, offset),
            _ => At::Blocks(Box::new(blocks), fragment),
        };
    }

    /// Sets the blocks of files after they were written; the tail that was set earlier is kept.
    pub(crate) fn add_blocks(&mut self, files: HashMap<u32, FileBlocks>) {
        for (node, blocks) in files {
            let place = &mut self.places[node as usize];
            let tail = if let At::Fragment(index, offset) = place { Some((*index, *offset)) } else { None };
            *place = At::Blocks(Box::new(blocks), tail);
        }
    }

    /// Number of files whose content is that of another file.
    pub(crate) fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// Returns the position of the content of the file `node`, which has `size` bytes.
    pub(crate) fn content(&self, node: NodeId, size: u64, block_size: u32) -> Extent {
        match &self.places[node.index()] {
            At::Nowhere => Extent { size, ..Extent::default() },
            // This recurses only once: `other` is the first of the equal files, and never refers to another file
            // itself.
            At::SameAs(other) => self.content(*other, size, block_size),
            At::Fragment(index, offset) => Extent { size, fragment: Some((*index, *offset)), ..Extent::default() },
            At::Blocks(blocks, fragment) => {
                let holes = blocks.sizes.iter().enumerate().filter(|(_, size)| **size & !STORED_BLOCK == 0);
                let start = |block: usize| (block as u64).saturating_mul(block_size.into()).min(size);
                let sparse: u64 = holes.map(|(block, _)| start(block + 1) - start(block)).sum();
                Extent {
                    size,
                    start: blocks.start,
                    // The kernel derives st_blocks from this number. As with mksquashfs, a file that has nothing but
                    // holes counts as one block.
                    sparse: sparse.min(size.saturating_sub(1)),
                    blocks: blocks.sizes.clone(),
                    fragment: *fragment,
                }
            }
        }
    }
}

/// Collects tails of files in fragment blocks.
pub(crate) struct Packer {
    block_size: usize,
    /// Index of the fragment block that is being filled.
    index: u32,
    pending: Vec<u8>,
}

impl Packer {
    /// Adds a tail. If the current fragment block has no room for it, queues that block first. Returns the tail's
    /// position.
    pub(crate) fn add(&mut self, tail: &[u8], queue: &Queue) -> Result<(u32, u32), Stopped> {
        if self.pending.len() + tail.len() > self.block_size {
            self.flush(queue)?;
        }
        let offset = u32::try_from(self.pending.len()).unwrap_or(0);
        self.pending.extend_from_slice(tail);
        Ok((self.index, offset))
    }

    fn flush(&mut self, queue: &Queue) -> Result<(), Stopped> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let mut block = queue.buffer();
        block.extend_from_slice(&self.pending);
        self.pending.clear();
        self.index += 1;
        queue.fragment(block)
    }
}

/// Hash of a file's content. Two files with the same size and SHA-256 are treated as equal.
type Hash = [u8; 32];

/// Finds files with equal content. Only files that share their size with another file are hashed.
struct Duplicates {
    /// Number of files of each size.
    sizes: HashMap<u64, u32>,
    /// Files whose content is taken over from the source and that have not been hashed yet, by size.
    taken: HashMap<u64, Vec<NodeId>>,
    known: HashMap<(u64, Hash), NodeId>,
}

/// Reads files and queues their blocks.
pub(crate) struct Reading<'a, 'o> {
    plan: &'a Plan,
    options: &'a Options,
    open: Open<'o>,
    duplicates: Option<Duplicates>,
    /// Collects the tails in fragment blocks.
    pub(crate) packer: Packer,
}

impl<'a, 'o> Reading<'a, 'o> {
    /// `taken` lists the files whose content is taken over from the source; `fragments` is the number of fragment
    /// blocks that are copied from there.
    pub(crate) fn new(
        plan: &'a Plan,
        options: &'a Options,
        taken: &[(NodeId, SourceFile)],
        open: Open<'o>,
        fragments: u32,
    ) -> Self {
        let packer = Packer { block_size: options.block_size as usize, index: fragments, pending: Vec::new() };
        let duplicates = options.without_duplicates.then(|| {
            let mut by_size: HashMap<u64, Vec<NodeId>> = HashMap::new();
            for (node, file) in taken {
                by_size.entry(file.size).or_default().push(*node);
            }
            Duplicates { sizes: HashMap::new(), taken: by_size, known: HashMap::new() }
        });
        Self { plan, options, open, duplicates, packer }
    }

    /// Reads `files`, each with its size, and queues their blocks, including the last fragment block.
    pub(crate) fn read_all(
        &mut self,
        files: &[(NodeId, u64)],
        queue: &Queue,
        located: &mut Located,
    ) -> Result<(), Halt<Failure>> {
        if let Some(duplicates) = &mut self.duplicates {
            for (_, size) in files {
                *duplicates.sizes.entry(*size).or_default() += 1;
            }
        }
        for (node, size) in files {
            self.read(*node, *size, queue, located)?;
        }
        Ok(self.packer.flush(queue)?)
    }

    fn read(&mut self, node: NodeId, size: u64, queue: &Queue, located: &mut Located) -> Result<(), Halt<Failure>> {
        let file = self.opened(node, size)?;
        let fail = |error| Halt::Failed(Failure::Tree(self.plan.path(node), error));
        let block_size = u64::from(self.options.block_size);
        let is_small = size < block_size;
        let mut content = queue.buffer();
        if is_small {
            fill(&file, 0, size, &mut content).map_err(fail)?;
        }
        if self.has_peers(size) {
            let hash = if is_small { hash(&content) } else { hash_file(&file, size).map_err(fail)? };
            if let Some(other) = self.equal(node, size, hash)? {
                located.set_same(node, other);
                queue.give_back(content);
                return Ok(queue.skipped(size)?);
            }
        }
        let tail = match self.options.fragments {
            Fragments::Never => 0,
            Fragments::Small if !is_small => 0,
            Fragments::Small | Fragments::Tails => size % block_size,
        };
        if is_small && tail == 0 {
            return Ok(queue.block(node, content)?);
        }
        if !is_small {
            self.read_blocks((node, &file), size - tail, queue)?;
            fill(&file, size - tail, tail, &mut content).map_err(fail)?;
        }
        if tail > 0 {
            located.set_fragment(node, self.packer.add(&content, queue)?);
        }
        queue.give_back(content);
        Ok(())
    }

    fn opened(&mut self, node: NodeId, size: u64) -> Result<File, Failure> {
        let path = self.plan.path(node);
        let opened = (self.open)(&path).and_then(|file| {
            let found = file.metadata()?.len();
            if found == size { Ok(file) } else { Err(changed()) }
        });
        opened.map_err(|error| Failure::Tree(path, error))
    }

    /// Queues the first `length` bytes of a file, block by block. Holes are not read.
    fn read_blocks(&self, (node, file): (NodeId, &File), length: u64, queue: &Queue) -> Result<(), Halt<Failure>> {
        let fail = |error| Halt::Failed(Failure::Tree(self.plan.path(node), error));
        let block_size = u64::from(self.options.block_size);
        let found = file.metadata().map_err(fail)?;
        let has_holes = found.blocks().saturating_mul(512) < found.len();
        let mut at = 0;
        while at < length {
            if has_holes {
                let data = next_data(file, at).map_err(fail)?.min(length);
                // Skip only those blocks that lie completely in the hole, and all of them if the hole reaches to the
                // end.
                let end = if data == length { data } else { data - data % block_size };
                if end > at {
                    let count = usize::try_from((end - at).div_ceil(block_size)).unwrap_or(usize::MAX);
                    queue.holes(node, count, end - at)?;
                    at = end;
                    continue;
                }
            }
            let mut block = queue.buffer();
            fill(file, at, block_size.min(length - at), &mut block).map_err(fail)?;
            at += block.len() as u64;
            queue.block(node, block)?;
        }
        Ok(())
    }

    /// Returns whether any other file has this size.
    fn has_peers(&self, size: u64) -> bool {
        let has = |duplicates: &Duplicates| {
            duplicates.taken.contains_key(&size) || duplicates.sizes.get(&size).is_some_and(|count| *count > 1)
        };
        self.duplicates.as_ref().is_some_and(has)
    }

    /// Returns an earlier file with the same content. If there is none, remembers this file for later calls.
    fn equal(&mut self, node: NodeId, size: u64, hash: Hash) -> Result<Option<NodeId>, Failure> {
        let taken = self.duplicates.as_mut().and_then(|duplicates| duplicates.taken.get_mut(&size));
        // Empty the list but leave its key: by the key, `has_peers` sees that files of this size are taken over.
        for taken in taken.map(std::mem::take).unwrap_or_default() {
            let file = self.opened(taken, size)?;
            let hash = hash_file(&file, size).map_err(|error| Failure::Tree(self.plan.path(taken), error))?;
            if let Some(duplicates) = &mut self.duplicates {
                duplicates.known.entry((size, hash)).or_insert(taken);
            }
        }
        let Some(duplicates) = &mut self.duplicates else { return Ok(None) };
        let first = *duplicates.known.entry((size, hash)).or_insert(node);
        Ok((first != node).then_some(first))
    }
}

fn changed() -> io::Error {
    io::Error::other("it has changed meanwhile")
}

/// Reads `length` bytes of `file` from offset `at`, replacing the content of `buffer`.
fn fill(file: &File, at: u64, length: u64, buffer: &mut Vec<u8>) -> io::Result<()> {
    buffer.resize(usize::try_from(length).map_err(io::Error::other)?, 0);
    file.read_exact_at(buffer, at).map_err(|e| if e.kind() == io::ErrorKind::UnexpectedEof { changed() } else { e })
}

/// Returns the offset of the first data at or after `at`; `u64::MAX` if only a hole follows.
fn next_data(file: &File, at: u64) -> io::Result<u64> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
        Err(rustix::io::Errno::NXIO) => Ok(u64::MAX),
        // The file system does not report holes, so everything counts as data.
        Err(rustix::io::Errno::INVAL) => Ok(at),
        other => Ok(other?),
    }
}

fn hash(content: &[u8]) -> Hash {
    let mut digest = Context::new(&SHA256);
    digest.update(content);
    finish(digest)
}

fn finish(digest: Context) -> Hash {
    let mut hash = [0; 32];
    hash.copy_from_slice(digest.finish().as_ref());
    hash
}

fn hash_file(file: &File, size: u64) -> io::Result<Hash> {
    let (mut digest, mut buffer, mut at) = (Context::new(&SHA256), Vec::new(), 0);
    while at < size {
        fill(file, at, (size - at).min(1 << 18), &mut buffer)?;
        digest.update(&buffer);
        at += buffer.len() as u64;
    }
    Ok(finish(digest))
}
