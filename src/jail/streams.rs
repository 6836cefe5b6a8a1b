//! Standard input, output and error of a session in the jail, none of which is a file of the container.
//!
//! A process that has a file open can reopen it for writing (/proc/self/fd/0) and change its mode, owner and
//! attributes, whatever the open mode: the file could become a setuid program outside. sshd gives sessions sockets and
//! terminals, but the caller of `ims-sshd enter` may give anything. So a file or device is replaced by a pipe, and a
//! process outside copies between the two.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{FileType, Mode, OFlags, SeekFrom, Stat, makedev};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with};

use crate::error::{Attempt, Error, Result};
use crate::sys::file_kind::FileKind;
use crate::sys::poll;
use crate::sys::process::{Fork, exit_now, fork};
use crate::sys::signals::Signals;
use crate::sys::tree::Tree;

/// Names of the streams, by descriptor.
const NAMES: [&str; 3] = ["input", "output", "error"];

/// Bytes per read: the default capacity of a pipe.
const CHUNK: usize = 64 << 10;

/// Magic number of pipes, `PIPEFS_MAGIC` of linux/magic.h.
const PIPES: u64 = 0x5049_5045;

/// A device node: path below the root, major and minor number.
type Node = (&'static str, u32, u32);

/// Nodes that the jail has itself, mounted read-only, so that nobody inside can change the mode of the machine's node.
const OWN_NODES: [Node; 2] = [("dev/null", 1, 3), ("dev/tty", 5, 0)];

/// Shared nodes for which isatty(3) is true: /dev/console and /dev/ptmx. An open master of a pty has the number of
/// /dev/ptmx.
const SHARED_TERMINALS: [(u32, u32); 2] = [(5, 1), (5, 2)];

/// Form in which a stream enters the jail.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// Unchanged: a socket or a terminal; an anonymous pipe is reopened.
    Itself,
    /// Replaced by the jail's own node of the same device, opened with this access mode.
    Own(Node, OFlags),
    /// Replaced by a pipe and a copier.
    Copied,
}

/// Streams of a session, until it ends.
pub(crate) struct Streams {
    ways: [Way; 3],
    /// Replacement of each stream that does not enter unchanged.
    replaced: [Option<OwnedFd>; 3],
    copiers: Vec<Pid>,
    /// The copiers end when this is closed, which also happens when this process ends.
    stop: Option<OwnedFd>,
}

/// A pipe in place of a stream.
struct Relay {
    number: usize,
    from: OwnedFd,
    to: OwnedFd,
}

impl Streams {
    /// Examines this process's streams and starts the copiers they need. Must be called before the jail is joined, so
    /// that the copiers stay outside. Fails for a directory, which would lead out of the jail, and for a descriptor
    /// that only names a file (`O_PATH`).
    pub(crate) fn of_this_process() -> Result<Self> {
        let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
        let streams = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
        let mut found = Vec::with_capacity(streams.len());
        for (stream, name) in streams.into_iter().zip(NAMES) {
            found.push(look(stream, name)?);
        }
        let ways = [found[0].0, found[1].0, found[2].0];
        let replaced = [0, 1, 2].map(|number| reopened(streams[number], &found[number]));
        let mut this = Self { ways, replaced, copiers: Vec::new(), stop: None };
        if ways.contains(&Way::Copied) {
            // If two streams go to the same file, only a single pipe keeps their output in order.
            let file = |number: usize| (found[number].1.st_dev, found[number].1.st_ino);
            let is_shared = ways[1] == Way::Copied && ways[2] == Way::Copied && file(1) == file(2);
            this.start(streams, is_shared).attempt(|| "start copying a stream that is a file")?;
        }
        Ok(this)
    }

    fn start(&mut self, streams: [BorrowedFd<'_>; 3], is_shared: bool) -> io::Result<()> {
        let (stopped, stop) = pipe_with(PipeFlags::CLOEXEC)?;
        let mut relays = Vec::new();
        for number in (0..3).filter(|&number| self.ways[number] == Way::Copied && !(is_shared && number == 2)) {
            let (from, to) = pipe_with(PipeFlags::CLOEXEC)?;
            self.replaced[number] = Some(if number == 0 { &from } else { &to }.try_clone()?);
            // Only the copier's end is non-blocking, because it also waits for the session's end; the programs of the
            // session share the other end's mode.
            rustix::fs::fcntl_setfl(if number == 0 { &to } else { &from }, OFlags::NONBLOCK)?;
            relays.push(Relay { number, from, to });
        }
        if is_shared {
            self.replaced[2] = self.replaced[1].as_ref().map(OwnedFd::try_clone).transpose()?;
        }
        for at in 0..relays.len() {
            match fork()? {
                Fork::Parent(copier) => self.copiers.push(copier),
                Fork::Child => {
                    drop(stop);
                    self.replaced = [None, None, None];
                    let relay = relays.swap_remove(at);
                    drop(relays);
                    exit_now(copier(relay, streams, &stopped));
                }
            }
        }
        self.stop = Some(stop);
        Ok(())
    }

    /// Opens the jail's own nodes, below `image_root` as seen in the jail, in place of the container's.
    pub(crate) fn open_own_nodes(&mut self, image_root: &Tree) -> Result<()> {
        for (way, replaced) in self.ways.iter().zip(&mut self.replaced) {
            if let Way::Own(node, access) = *way {
                let attempted = || format!("open /{} of the jail", node.0);
                let flags = access | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NOCTTY;
                let opened = image_root.open_at(node.0, flags, Mode::empty()).attempt(attempted)?;
                let found = rustix::fs::fstat(&opened).attempt(attempted)?;
                if own_node(&found) != Some(node) {
                    return Err(Error::new(attempted()).because(format!("it is {}", FileKind::of(&found))));
                }
                *replaced = Some(opened);
            }
        }
        Ok(())
    }

    /// Installs the streams in this process, a child that is about to exec.
    pub(crate) fn take(&self) -> io::Result<()> {
        let [stdin, stdout, stderr] = &self.replaced;
        stdin.as_ref().map_or(Ok(()), rustix::stdio::dup2_stdin)?;
        stdout.as_ref().map_or(Ok(()), rustix::stdio::dup2_stdout)?;
        Ok(stderr.as_ref().map_or(Ok(()), rustix::stdio::dup2_stderr)?)
    }

    /// Closes this process's ends of the pipes, so that the child's ends alone decide when a pipe ends.
    pub(crate) fn close(&mut self) {
        self.replaced = [None, None, None];
    }

    /// Waits until the copiers have written the session's remaining output, and returns whether they could. Perhaps
    /// nobody will ever read that output: if this program `is_to_end`, the copiers have one second, and another
    /// terminating signal kills them at once.
    pub(crate) fn finish(&mut self, signals: &Signals, is_to_end: bool) -> bool {
        self.stop = None;
        let mut is_whole = true;
        let limit = if is_to_end { TIME_TO_FINISH } else { Duration::MAX };
        for copier in self.copiers.drain(..) {
            let ended = loop {
                match waitpid(copier, Some(WaitPidFlag::WNOHANG)) {
                    Ok(WaitStatus::StillAlive) => {}
                    Err(nix::errno::Errno::EINTR) => continue,
                    ended => break ended,
                }
                // The end of a copier ends this wait, since SIGCHLD is among the signals.
                let is_late = matches!(poll::wait(&mut [PollFd::new(signals, PollFlags::IN)], limit), Ok(0));
                let told = std::iter::from_fn(|| signals.next().ok().flatten());
                if told.filter(|signal| ENDING.contains(signal)).count() > 0 || is_late {
                    let _ = kill(copier, Signal::SIGKILL);
                }
            };
            is_whole &= matches!(ended, Ok(WaitStatus::Exited(_, 0)));
        }
        is_whole
    }
}

/// Time for the copiers to finish when this program is to end.
const TIME_TO_FINISH: Duration = Duration::from_secs(1);

/// Signals with which a user or a supervisor ends this program.
pub(crate) const ENDING: [Signal; 4] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM];

/// Decides in which form a stream enters the jail.
fn look(stream: BorrowedFd<'_>, name: &str) -> Result<(Way, Stat)> {
    let attempted = || format!("examine standard {name}");
    let refuse = |what: &str| {
        let because = format!("standard {name} is {what}, which would lead out of the jail");
        Err(Error::new("enter the jail").because(because).advise("redirect it from or to a file"))
    };
    let flags = rustix::fs::fcntl_getfl(stream).attempt(attempted)?;
    if flags.contains(OFlags::PATH) {
        return refuse("a descriptor that only names a file (O_PATH)");
    }
    let found = rustix::fs::fstat(stream).attempt(attempted)?;
    let way = match FileType::from_raw_mode(found.st_mode) {
        FileType::Directory => return refuse("a directory"),
        FileType::Socket => Way::Itself,
        // A named fifo's owner and mode could be changed; those of an anonymous pipe do not matter.
        FileType::Fifo if is_anonymous(stream).attempt(attempted)? => Way::Itself,
        _ => match own_node(&found) {
            Some(node) => Way::Own(node, flags & OFlags::RWMODE),
            None if stream.is_terminal() && !is_shared_terminal(&found) => Way::Itself,
            None => Way::Copied,
        },
    };
    Ok((way, found))
}

/// The jail's node of the same device.
fn own_node(found: &Stat) -> Option<Node> {
    let is_device = FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice;
    OWN_NODES.into_iter().find(|(_, major, minor)| is_device && found.st_rdev == makedev(*major, *minor))
}

fn is_shared_terminal(found: &Stat) -> bool {
    SHARED_TERMINALS.into_iter().any(|(major, minor)| found.st_rdev == makedev(major, minor))
}

/// Reopens an anonymous pipe, so that its flags are separate: a session that sets O_NONBLOCK affects neither the caller
/// nor the messages of this program and ims-sshd.
fn reopened(stream: BorrowedFd<'_>, (way, found): &(Way, Stat)) -> Option<OwnedFd> {
    if *way != Way::Itself || FileType::from_raw_mode(found.st_mode) != FileType::Fifo {
        return None;
    }
    let flags = rustix::fs::fcntl_getfl(stream).ok()?;
    let access = (flags & OFlags::RWMODE) | OFlags::NONBLOCK | OFlags::CLOEXEC;
    // Opening fails if nobody reads the pipe any more; then no output can be lost.
    let new = rustix::fs::open(format!("/proc/self/fd/{}", stream.as_raw_fd()), access, Mode::empty()).ok()?;
    rustix::fs::fcntl_setfl(&new, flags).ok()?;
    Some(new)
}

fn is_anonymous(pipe: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(u64::try_from(rustix::fs::fstatfs(pipe)?.f_type).is_ok_and(|kind| kind == PIPES))
}

/// Body of a copier. Returns the exit code.
fn copier(relay: Relay, streams: [BorrowedFd<'_>; 3], stopped: &OwnedFd) -> u8 {
    // Block all signals: a signal that ends the session must not kill the copier, which ends after the session or when
    // its parent dies.
    let _ = SigSet::all().thread_block();
    let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
    let Relay { number, from, to } = relay;
    let stream = streams[number];
    let (copied, verb) = if number == 0 {
        let is_fifo =
            rustix::fs::fstat(stream).is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::Fifo);
        let copy = if is_fifo { pass_in } else { copy_in };
        (copy(stream, &from, to, stopped), "read")
    } else {
        drop(to);
        (copy_out(&from, stream, stopped), "write")
    };
    match copied {
        // The reader is gone, and the session's program gets EPIPE too.
        Ok(()) | Err(Errno::PIPE) => 0,
        Err(error) => {
            let error = io::Error::from(error);
            eprintln!("ims-jail-shell: cannot {verb} standard {}: {error}", NAMES[number]);
            1
        }
    }
}

/// Copies the caller's `stream` into the pipe. At the end of the session, seeks back over input that the session has
/// not read, so that the next reader of the stream gets it: bytes that are not yet written to the pipe, and bytes that
/// are still in it. `read` is the pipe's other end.
fn copy_in(stream: BorrowedFd<'_>, read: &OwnedFd, write: OwnedFd, stopped: &OwnedFd) -> rustix::io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    let mut left = 0;
    'session: while wait(stopped, stream, PollFlags::IN)? {
        let length = match rustix::io::read(stream, &mut chunk) {
            Ok(0) => break,
            Err(Errno::AGAIN | Errno::INTR) => continue,
            other => other?,
        };
        left = length;
        while left > 0 {
            if !wait(stopped, write.as_fd(), PollFlags::OUT)? {
                break 'session;
            }
            match rustix::io::write(&write, &chunk[length - left..length]) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                written => left -= written?,
            }
        }
    }
    // Signals the end of input.
    drop(write);
    while wait_for(stopped, None)? {}
    let unread = u64::try_from(left).unwrap_or(0) + rustix::io::ioctl_fionread(read)?;
    if let (1.., Ok(unread)) = (unread, i64::try_from(unread)) {
        // Ignore an error: a device cannot seek.
        let _ = rustix::fs::seek(stream, SeekFrom::Current(-unread));
    }
    Ok(())
}

/// Like [`copy_in`], for a fifo, which cannot seek: shows a page at a time to the session (tee(2)), and consumes the
/// page from the fifo once the session has read it.
fn pass_in(fifo: BorrowedFd<'_>, read: &OwnedFd, write: OwnedFd, stopped: &OwnedFd) -> rustix::io::Result<()> {
    /// Size of the pipe: with room for only one page, it stays full until that page has been read completely.
    const PAGE: usize = 4096;
    rustix::pipe::fcntl_setpipe_size(&write, PAGE)?;
    let mut shown = 0;
    while wait(stopped, fifo, PollFlags::IN)? {
        shown = match rustix::pipe::tee(fifo, &write, PAGE, SpliceFlags::NONBLOCK) {
            Ok(0) => break,
            Err(Errno::AGAIN | Errno::INTR) => continue,
            other => other?,
        };
        if !wait(stopped, write.as_fd(), PollFlags::OUT)? {
            break;
        }
        take(fifo, shown)?;
        shown = 0;
    }
    // Signals the end of input.
    drop(write);
    while wait_for(stopped, None)? {}
    let unread = usize::try_from(rustix::io::ioctl_fionread(read)?).unwrap_or(0);
    take(fifo, shown.saturating_sub(unread))
}

/// Consumes `length` bytes of the fifo, unless another process has consumed them.
fn take(fifo: BorrowedFd<'_>, mut length: usize) -> rustix::io::Result<()> {
    let mut bytes = [0; 4096];
    while length > 0 && poll::wait(&mut [PollFd::from_borrowed_fd(fifo, PollFlags::IN)], Duration::ZERO)? > 0 {
        let most = length.min(bytes.len());
        match rustix::io::read(fifo, &mut bytes[..most]) {
            Ok(0) => break,
            Err(Errno::AGAIN | Errno::INTR) => {}
            taken => length -= taken?,
        }
    }
    Ok(())
}

/// Copies the pipe to the caller's `stream` until all writers have closed it or the session has ended, since a process
/// left in the jail may keep it open.
fn copy_out(pipe: &OwnedFd, stream: BorrowedFd<'_>, stopped: &OwnedFd) -> rustix::io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    while wait(stopped, pipe.as_fd(), PollFlags::IN)? {
        match rustix::io::read(pipe, &mut chunk) {
            Ok(0) => return Ok(()),
            Err(Errno::AGAIN | Errno::INTR) => {}
            length => write_all(stream, &chunk[..length?])?,
        }
    }
    let mut left = usize::try_from(rustix::io::ioctl_fionread(pipe)?).unwrap_or(0);
    while left > 0 {
        let most = left.min(CHUNK);
        match rustix::io::read(pipe, &mut chunk[..most]) {
            Ok(0) | Err(Errno::AGAIN) => break,
            Err(Errno::INTR) => {}
            length => {
                let length = length?;
                write_all(stream, &chunk[..length])?;
                left -= length;
            }
        }
    }
    Ok(())
}

fn write_all(stream: BorrowedFd<'_>, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(stream, bytes) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                rustix::event::poll(&mut [PollFd::from_borrowed_fd(stream, PollFlags::OUT)], None)?;
            }
            written => bytes = &bytes[written?..],
        }
    }
    Ok(())
}

/// Waits until `fd` is ready. Returns false once the session has ended.
fn wait(stopped: &OwnedFd, fd: BorrowedFd<'_>, ready: PollFlags) -> rustix::io::Result<bool> {
    wait_for(stopped, Some(PollFd::from_borrowed_fd(fd, ready)))
}

fn wait_for(stopped: &OwnedFd, further: Option<PollFd<'_>>) -> rustix::io::Result<bool> {
    let mut sources = vec![PollFd::new(stopped, PollFlags::IN)];
    sources.extend(further);
    match rustix::event::poll(&mut sources, None) {
        Ok(_) | Err(Errno::INTR) => Ok(sources[0].revents().is_empty()),
        Err(e) => Err(e),
    }
}
