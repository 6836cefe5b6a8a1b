//! Compresses data and fragment blocks on all processors, and writes them in the order in which they were queued.
//!
//! The caller's thread reads, a pool of workers compresses, and one thread writes. A queue has a *ticket* for each
//! block, in the order of the image. The writing thread takes the first ticket and waits until that ticket's block is
//! compressed. The bytes of the image therefore do not depend on the speed or the number of the workers.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::squashfs::compression::{Compressor, Method};
use crate::squashfs::error::Failure;
use crate::squashfs::format::{Fragment, STORED_BLOCK};
use crate::squashfs::plan::NodeId;
use crate::squashfs::progress::Meter;

/// The blocks of one file, in order.
#[derive(Debug, Default, Clone)]
pub(crate) struct FileBlocks {
    /// Start of the file's first block in the image; 0 if all blocks are holes.
    pub(crate) start: u64,
    /// Sizes of the file's blocks, as in [`Extent::blocks`](crate::squashfs::format::Extent::blocks).
    pub(crate) sizes: Vec<u32>,
}

/// Positions of all blocks that were written.
#[derive(Debug, Default)]
pub(crate) struct Written {
    pub(crate) files: HashMap<u32, FileBlocks>,
    /// Fragment blocks, in the order of their indices.
    pub(crate) fragments: Vec<Fragment>,
    /// End of the last block in the image.
    pub(crate) end: u64,
}

/// The output file, the position of the first block in it, and the method of compression.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) output: &'a File,
    /// Position of the first block in the image.
    pub(crate) start: u64,
    pub(crate) method: &'a Method,
    pub(crate) workers: usize,
    pub(crate) meter: &'a Meter<'a>,
    /// Set by other code once the image cannot be finished; the queue then accepts no more blocks.
    pub(crate) is_stopped: &'a AtomicBool,
}

/// Reason to stop queuing blocks.
#[derive(Debug)]
pub(crate) enum Halt<E> {
    /// The writing thread has stopped; if it failed, its error is the one to report.
    Stopped,
    /// The caller has failed.
    Failed(E),
}

/// The writing thread has stopped, or was asked to.
#[derive(Debug)]
pub(crate) struct Stopped;

impl From<Failure> for Halt<Failure> {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl<E> From<Stopped> for Halt<E> {
    fn from(Stopped: Stopped) -> Self {
        Self::Stopped
    }
}

struct Job {
    content: Vec<u8>,
    reply: SyncSender<Compressed>,
}

struct Compressed {
    /// Length of the content before compression, in bytes.
    length: usize,
    bytes: Vec<u8>,
    is_stored: bool,
}

enum Ticket {
    Block(NodeId, Receiver<Compressed>),
    /// Number of blocks that are holes, and number of the file's bytes in these holes.
    Holes(NodeId, usize, u64),
    Fragment(Receiver<Compressed>),
    /// Number of a file's bytes that need no block.
    Skipped(u64),
}

/// Buffers for reuse. Without this pool the allocator would return each buffer to the system, and the kernel would have
/// to zero its memory again.
#[derive(Default)]
struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    fn take(&self) -> Vec<u8> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    fn give_back(&self, buffer: Vec<u8>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }
}

/// Accepts blocks in the order of the image, for compression and writing.
pub(crate) struct Queue<'a> {
    jobs: SyncSender<Job>,
    tickets: SyncSender<Ticket>,
    buffers: &'a Buffers,
    is_stopped: &'a AtomicBool,
}

impl Queue<'_> {
    /// An empty buffer for a block.
    pub(crate) fn buffer(&self) -> Vec<u8> {
        let mut buffer = self.buffers.take();
        buffer.clear();
        buffer
    }

    /// Queues the next block of the file `node`. The blocks of a file must be queued without other blocks between them.
    pub(crate) fn block(&self, node: NodeId, content: Vec<u8>) -> Result<(), Stopped> {
        // A fast test for a block of zeros: the first byte is 0, and each byte equals the previous one.
        if content.first() == Some(&0) && content[1..] == content[..content.len() - 1] {
            let length = content.len() as u64;
            self.buffers.give_back(content);
            return self.holes(node, 1, length);
        }
        let (reply, result) = sync_channel(1);
        self.wait_for(Ticket::Block(node, result))?;
        self.jobs.send(Job { content, reply }).map_err(|_| Stopped)
    }

    /// Records that the next `count` blocks of the file `node`, which contain `bytes` bytes of it, are holes.
    pub(crate) fn holes(&self, node: NodeId, count: usize, bytes: u64) -> Result<(), Stopped> {
        self.wait_for(Ticket::Holes(node, count, bytes))
    }

    /// Counts `bytes` bytes of a file that need no block, since the image already contains them.
    pub(crate) fn skipped(&self, bytes: u64) -> Result<(), Stopped> {
        self.wait_for(Ticket::Skipped(bytes))
    }

    fn wait_for(&self, ticket: Ticket) -> Result<(), Stopped> {
        if self.is_stopped.load(Ordering::Relaxed) {
            return Err(Stopped);
        }
        self.tickets.send(ticket).map_err(|_| Stopped)
    }

    /// Returns a buffer to the pool that was not queued.
    pub(crate) fn give_back(&self, buffer: Vec<u8>) {
        self.buffers.give_back(buffer);
    }

    /// Queues the next fragment block.
    pub(crate) fn fragment(&self, content: Vec<u8>) -> Result<(), Stopped> {
        let (reply, result) = sync_channel(1);
        self.wait_for(Ticket::Fragment(result))?;
        self.jobs.send(Job { content, reply }).map_err(|_| Stopped)
    }
}

/// Calls `feed`, which queues blocks, and compresses and writes the blocks at the same time. `E` is the type of
/// `feed`'s error.
pub(crate) fn compress<E: From<io::Error>>(
    target: Target,
    feed: impl FnOnce(&Queue) -> Result<(), Halt<E>>,
) -> Result<Written, E> {
    let buffers = Buffers::default();
    thread::scope(|scope| {
        // Each ticket holds two buffers at most. Two tickets for each worker keep the workers busy while the first
        // block is being written.
        let ahead = 2 * target.workers + 2;
        let (jobs, queued) = sync_channel::<Job>(ahead);
        let (tickets, in_order) = sync_channel::<Ticket>(ahead);
        let queued = Mutex::new(queued);
        let (queued, buffers) = (&queued, &buffers);
        thread::scope(|workers| {
            for _ in 0..target.workers.max(1) {
                workers.spawn(|| work(target.method, queued, buffers));
            }
            let writing = scope.spawn(move || write_in_order(&target, &in_order, buffers));
            let queue = Queue { jobs, tickets, buffers, is_stopped: target.is_stopped };
            let handed_in = feed(&queue);
            drop(queue);
            let written = writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            match (handed_in, written) {
                (Err(Halt::Failed(error)), _) => Err(error),
                (_, Err(error)) => Err(error.into()),
                (Ok(()) | Err(Halt::Stopped), Ok(written)) => Ok(written),
            }
        })
    })
}

fn work(method: &Method, queued: &Mutex<Receiver<Job>>, buffers: &Buffers) {
    let mut compressor = Compressor::new(method);
    loop {
        // Wait while holding the lock: the other workers could only wait for the same queue.
        let next = queued.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { content, reply }) = next else { return };
        let mut bytes = buffers.take();
        let length = content.len();
        let result = if compressor.compress(&content, &mut bytes) {
            buffers.give_back(content);
            Compressed { length, bytes, is_stored: false }
        } else {
            buffers.give_back(bytes);
            Compressed { length, bytes: content, is_stored: true }
        };
        // The writing thread may have failed, so that nothing receives the result.
        let _ = reply.send(result);
    }
}

fn write_in_order(target: &Target, tickets: &Receiver<Ticket>, buffers: &Buffers) -> io::Result<Written> {
    let mut written = Written { end: target.start, ..Written::default() };
    // The result is missing only if a worker panicked; that panic is raised again when the worker is joined.
    let died = |_| io::Error::other("a thread that compresses has ended");
    for ticket in tickets {
        match ticket {
            Ticket::Holes(node, count, bytes) => {
                let sizes = &mut written.files.entry(node.0).or_default().sizes;
                sizes.resize(sizes.len() + count, 0);
                target.meter.read(bytes);
            }
            Ticket::Skipped(bytes) => target.meter.read(bytes),
            Ticket::Block(node, result) => {
                let compressed = result.recv().map_err(died)?;
                let (start, size) = append(target, &mut written.end, compressed, buffers)?;
                let file = written.files.entry(node.0).or_default();
                if file.start == 0 {
                    file.start = start;
                }
                file.sizes.push(size);
            }
            Ticket::Fragment(result) => {
                let compressed = result.recv().map_err(died)?;
                let (start, size) = append(target, &mut written.end, compressed, buffers)?;
                written.fragments.push(Fragment { start, size });
            }
        }
    }
    Ok(written)
}

/// Writes a block at `end`. Returns the block's position, and its size as inodes encode it.
fn append(target: &Target, end: &mut u64, block: Compressed, buffers: &Buffers) -> io::Result<(u64, u32)> {
    let start = *end;
    target.output.write_all_at(&block.bytes, start)?;
    *end += block.bytes.len() as u64;
    target.meter.compressed(block.length as u64, block.bytes.len() as u64);
    // A block has at most 1 MiB, so its length always fits.
    let length = u32::try_from(block.bytes.len()).unwrap_or(0);
    buffers.give_back(block.bytes);
    Ok((start, if block.is_stored { length | STORED_BLOCK } else { length }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::squashfs::compression::Compression;

    fn content(number: usize) -> Vec<u8> {
        (0..4096).map(|at| u8::try_from((at * number + at / 7) % 251).unwrap()).collect()
    }

    fn image(workers: usize) -> (Written, Vec<u8>) {
        let file = tempfile::tempfile().unwrap();
        let method = Method::new(Compression::Zstd, 4096);
        let (meter, is_stopped) = (Meter::new(&|_| {}, 0, 0), AtomicBool::new(false));
        let target =
            Target { output: &file, start: 10, method: &method, workers, meter: &meter, is_stopped: &is_stopped };
        let written = compress::<io::Error>(target, |queue| {
            for number in 0..40 {
                queue.block(NodeId(number / 10), content(number as usize))?;
                if number % 7 == 6 {
                    queue.fragment(content(100 + number as usize))?;
                }
            }
            queue.holes(NodeId(9), 3, 3 * 4096)?;
            queue.block(NodeId(9), vec![0; 4096])?;
            Ok(())
        });
        let written = written.unwrap();
        let mut bytes = vec![0; usize::try_from(written.end).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        (written, bytes)
    }

    #[test]
    fn blocks_lie_in_the_order_of_the_queue_whatever_the_number_of_workers() {
        let (one, bytes) = image(1);
        assert_eq!((one.files[&0].start, one.files[&0].sizes.len(), one.fragments.len()), (10, 10, 5));
        assert_eq!((one.files[&9].start, one.files[&9].sizes.as_slice()), (0, &[0; 4][..]));
        for workers in [2, 7] {
            assert!(image(workers).1 == bytes, "{workers} workers");
        }
    }

    #[test]
    fn a_full_disk_ends_reading() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let method = Method::new(Compression::None, 4096);
        let (meter, is_stopped) = (Meter::new(&|_| {}, 0, 0), AtomicBool::new(false));
        let target =
            Target { output: &full, start: 0, method: &method, workers: 2, meter: &meter, is_stopped: &is_stopped };
        let mut handed_in = 0;
        let result = compress::<io::Error>(target, |queue| {
            loop {
                queue.block(NodeId(1), content(3))?;
                handed_in += 1;
            }
        });
        assert_eq!(result.unwrap_err().raw_os_error(), Some(rustix::io::Errno::NOSPC.raw_os_error()));
        assert!(handed_in < 20, "{handed_in}");
    }
}
