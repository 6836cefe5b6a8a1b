//! Writes an image: data, then tables, then the superblock, so that an interrupted write leaves no valid squashfs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::squashfs::blocks::{self, Target, Written};
use crate::squashfs::compression::Compression;
use crate::squashfs::content::{Located, Open, Reading};
use crate::squashfs::error::{Failure, Limit};
use crate::squashfs::format::{Fragment, NO_TABLE, PADDING, STORED_METADATA, SUPERBLOCK_LENGTH, Superblock, flag};
use crate::squashfs::inventory::{Inventory, SourceFile};
use crate::squashfs::options::{Fragments, Options};
use crate::squashfs::plan::{Content, NodeBody, NodeId, Plan};
use crate::squashfs::progress::{Meter, Progress, Report};
use crate::squashfs::tables::{self, Parts};
use crate::squashfs::takeover::{Moved, Takeover};

/// Numbers about an image that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    /// Length of the image in bytes, including padding.
    pub length: u64,
    /// Number of objects.
    pub objects: u32,
    /// Number of files whose compressed content was copied from the source image, at least in part.
    pub files_taken: u64,
    /// Number of files that were read and compressed, or found to be equal to others.
    pub files_read: u64,
    /// Number of files whose content equals that of another file, which was read or copied from the source image.
    pub duplicates: u64,
    /// Numbers of bytes that were copied from the source image, compressed and read.
    pub progress: Progress,
}

/// Writes the image that `plan` describes into `output`, replacing its old content. `source` has the content that the
/// plan takes over. If there is no source, or if it does not fit `options`, all files are read. The image is not synced
/// to disk.
pub fn write(
    plan: &Plan,
    source: Option<&Inventory>,
    options: &Options,
    open: Open,
    output: &File,
    report: Report,
) -> Result<Summary, Failure> {
    output.set_len(0)?;
    let order = plan.in_order()?;
    let source = source.filter(|source| source.fits(options));
    let (taken, read) = divided(plan, &order, source);
    let compressor_options = options.method.encode_options(options.block_size);
    let start = SUPERBLOCK_LENGTH as u64 + compressor_options.as_ref().map_or(0, |bytes| 2 + bytes.len() as u64);
    let takeover = match source {
        Some(source) => Takeover::new(source, &taken, start, options, !read.is_empty())?,
        None => Takeover::default(),
    };
    let to_read = read.iter().map(|(_, size)| size).sum::<u64>() + takeover.to_read();
    let meter = Meter::new(report, takeover.to_take(), to_read);
    let is_stopped = AtomicBool::new(false);
    let target = Target {
        output,
        start: start + takeover.to_take(),
        method: &options.method,
        workers: options.workers(),
        meter: &meter,
        is_stopped: &is_stopped,
    };
    let mut located = Located::new(plan.len());
    let mut reading = Reading::new(plan, options, &taken, open, takeover.fragments());
    let mut moved = Moved::new();
    // Compress new blocks and build the tables while the old blocks are being copied.
    let (copied, made) = thread::scope(|scope| {
        let copying = scope.spawn(|| {
            let copied = takeover.copy(output, &meter);
            is_stopped.store(copied.is_err(), Ordering::Relaxed);
            copied
        });
        let written = blocks::compress::<Failure>(target, |queue| {
            moved = takeover.move_tails(queue, &mut reading)?;
            reading.read_all(&read, queue, &mut located)
        });
        let made = written.and_then(|Written { files, fragments: compressed, end }| {
            located.add_blocks(files);
            for (node, file) in &taken {
                located.set(*node, takeover.located(file, &moved)?);
            }
            let fragments: Vec<Fragment> = takeover.kept_fragments().chain(compressed).collect();
            let content = |node, size| located.content(node, size, options.block_size);
            let parts = Parts {
                plan,
                order: &order,
                content: &content,
                fragments: &fragments,
                time: options.epoch,
                is_exportable: options.is_exportable,
                method: &options.method,
            };
            Ok((tables::make(&parts, end)?, fragments.len(), end))
        });
        (copying.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), made)
    });
    let (tables, fragments, end) = match (copied, made) {
        // Prefer the error of the copying thread: it makes the other threads stop with a less specific error.
        (Err(failure), _) | (Ok(()), Err(failure)) => return Err(failure),
        (Ok(()), Ok(made)) => made,
    };
    output.write_all_at(&tables.bytes, end)?;
    let length = end + tables.bytes.len() as u64;
    let padded = length.next_multiple_of(PADDING);
    output.set_len(padded)?;
    if let Some(bytes) = &compressor_options {
        let header = u16::try_from(bytes.len()).unwrap_or(0) | STORED_METADATA;
        output.write_all_at(&[&header.to_le_bytes()[..], bytes].concat(), SUPERBLOCK_LENGTH as u64)?;
    }
    let superblock = Superblock {
        inodes: tables.inodes,
        created: options.epoch.unwrap_or_else(|| latest(plan, &order)),
        block_size: options.block_size,
        fragments: u32::try_from(fragments).map_err(|_| Limit::Table)?,
        compression: options.method.number(),
        flags: flags(options, compressor_options.is_some(), tables.xattr_table != NO_TABLE),
        ids: tables.ids,
        root: tables.root,
        length,
        id_table: tables.id_table,
        xattr_table: tables.xattr_table,
        inode_table: tables.inode_table,
        directory_table: tables.directory_table,
        fragment_table: tables.fragment_table,
        export_table: tables.export_table,
    };
    output.write_all_at(&superblock.encode(), 0)?;
    Ok(Summary {
        length: padded,
        objects: tables.inodes,
        files_taken: taken.len() as u64,
        files_read: read.len() as u64,
        duplicates: located.duplicates(),
        progress: meter.so_far(),
    })
}

/// Files whose content is taken over from the source, and files that are read, each with its size.
type Divided = (Vec<(NodeId, SourceFile)>, Vec<(NodeId, u64)>);

fn divided(plan: &Plan, order: &[NodeId], source: Option<&Inventory>) -> Divided {
    let (mut taken, mut read) = (Vec::new(), Vec::new());
    for node in order {
        let NodeBody::File { size, content } = plan.node(*node).body else { continue };
        let known = match content {
            Content::Taken(number) => source.and_then(|source| source.file(number)).filter(|file| file.size == size),
            Content::Read => None,
        };
        match known {
            _ if size == 0 => {}
            Some(file) => taken.push((*node, file)),
            None => read.push((*node, size)),
        }
    }
    (taken, read)
}

/// Returns the latest modification time of all objects.
fn latest(plan: &Plan, order: &[NodeId]) -> u32 {
    order.iter().map(|node| plan.node(*node).modified).max().unwrap_or(0)
}

fn flags(options: &Options, has_compressor_options: bool, has_xattrs: bool) -> u16 {
    let stored =
        flag::STORED_INODES | flag::STORED_DATA | flag::STORED_FRAGMENTS | flag::STORED_XATTRS | flag::STORED_IDS;
    let set = [
        (stored, options.method.algorithm() == Compression::None),
        (flag::NO_FRAGMENTS, options.fragments == Fragments::Never),
        (flag::ALWAYS_FRAGMENTS, options.fragments == Fragments::Tails),
        (flag::DUPLICATES, options.without_duplicates),
        (flag::EXPORTABLE, options.is_exportable),
        (flag::NO_XATTRS, !has_xattrs),
        (flag::OPTIONS, has_compressor_options),
    ];
    set.into_iter().filter(|(_, is_set)| *is_set).fold(0, |flags, (flag, _)| flags | flag)
}
