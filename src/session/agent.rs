//! The client's ssh-agent in the jail: a socket below the jail's /run, and what is said there is said to the one that sshd has made in
//! the container.
//!
//! Handed on and not mounted: in the user tier nobody may copy a mount of the container's, and nobody who has given up his capabilities
//! could take it down again.

use std::ffi::OsString;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::unistd::{Pid, getpid, getppid};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::Mode;

use crate::sys::tree::Tree;

/// The socket that sshd has made in the container for this process's session.
pub(crate) struct Outside {
    folder: Tree,
    name: OsString,
    sshd: Pid,
}

impl Outside {
    /// To be called before the jail is entered. `None` if the client does not bring its agent, or may not.
    pub(crate) fn of_this_session() -> Option<Self> {
        let path = PathBuf::from(std::env::var_os("SSH_AUTH_SOCK")?);
        let folder = Tree::open(path.parent()?).ok()?;
        Some(Self { folder, name: path.file_name()?.to_owned(), sshd: getppid() })
    }

    /// Listens below /run of the jail, which has been entered and has `image_root` as its root. Changes the working folder.
    pub(crate) fn show(self, image_root: &Tree) -> io::Result<Agent> {
        let run = image_root.directory(RUN)?;
        // One of a process that was killed may lie there.
        let name = format!("ssh-agent.{}", getpid());
        run.remove(&name)?;
        // A name without a slash: whatever somebody puts there meanwhile, the kernel makes a socket in this folder or none.
        rustix::process::fchdir(&run)?;
        // For root alone, as sshd's own.
        let umask = rustix::process::umask(Mode::from_raw_mode(0o177));
        let listener = UnixListener::bind(&name);
        rustix::process::umask(umask);
        let listener = listener?;
        listener.set_nonblocking(true)?;
        Ok(Agent { outside: self, run, name, listener, connections: Vec::new() })
    }
}

/// Relative to the image root; a tmpfs of the jail's own, so that no socket comes into the image.
const RUN: &str = "run";

/// So many programs can talk to the agent at once; others wait.
const MOST_CONNECTIONS: usize = 16;

/// What is read at once.
const CHUNK: usize = 16 << 10;

/// An agent that is there in the jail.
pub(crate) struct Agent {
    outside: Outside,
    run: Tree,
    name: String,
    listener: UnixListener,
    connections: Vec<Connection>,
}

impl Agent {
    /// The socket's path in the jail.
    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/").join(RUN).join(&self.name)
    }

    /// Makes sshd's folder this process's working folder, where no path of the jail leads, and names have to be without one.
    pub(crate) fn go_outside(&self) -> io::Result<()> {
        rustix::process::fchdir(&self.outside.folder).map_err(Into::into)
    }

    /// What it waits for.
    pub(crate) fn interests(&self) -> impl Iterator<Item = PollFd<'_>> {
        let listener = self.has_room().then(|| PollFd::new(&self.listener, PollFlags::IN));
        listener.into_iter().chain(self.connections.iter().flat_map(Connection::interests))
    }

    /// Goes on where it can: `ready` says of each of its interests whether that has come.
    pub(crate) fn go_on(&mut self, mut ready: impl Iterator<Item = bool>) {
        let somebody_comes = self.has_room() && ready.next() == Some(true);
        self.connections.retain_mut(|connection| connection.go_on(&mut ready));
        // Who cannot be connected sees the connection end, as when the client is gone.
        if somebody_comes && let Ok(connection) = self.connect() {
            self.connections.push(connection);
        }
    }

    fn has_room(&self) -> bool {
        self.connections.len() < MOST_CONNECTIONS
    }

    fn connect(&self) -> io::Result<Connection> {
        let (inside, _) = self.listener.accept()?;
        let outside = UnixStream::connect(&self.outside.name)?;
        // Where AcceptEnv lets it, a client may have named another socket of the container.
        let listener = rustix::net::sockopt::socket_peercred(&outside)?.pid;
        if listener.as_raw_nonzero().get() != self.outside.sshd.as_raw() {
            return Err(ErrorKind::PermissionDenied.into());
        }
        for end in [&inside, &outside] {
            end.set_nonblocking(true)?;
        }
        Ok(Connection { ends: [inside, outside], flows: Default::default() })
    }

    /// Takes the socket away. Another one of that name is in the jail's memory only, too.
    pub(crate) fn remove(&self) {
        let _ = self.run.remove(&self.name);
    }
}

/// A program in the jail and sshd.
struct Connection {
    ends: [UnixStream; 2],
    /// The first from the first end to the second, the second back.
    flows: [Flow; 2],
}

/// What one end says to the other.
#[derive(Default)]
struct Flow {
    /// Read, and not yet written. Nothing more is read before it is.
    pending: Vec<u8>,
    ended: bool,
}

impl Connection {
    /// One of each flow that has not ended.
    fn interests(&self) -> impl Iterator<Item = PollFd<'_>> {
        self.flows.iter().enumerate().filter(|(_, flow)| !flow.ended).map(|(from, flow)| {
            let (end, what) = if flow.pending.is_empty() { (from, PollFlags::IN) } else { (1 - from, PollFlags::OUT) };
            PollFd::from_borrowed_fd(self.ends[end].as_fd(), what)
        })
    }

    /// Returns whether anything is still to come.
    fn go_on(&mut self, ready: &mut impl Iterator<Item = bool>) -> bool {
        let mut whole = true;
        for from in 0..2 {
            if !self.flows[from].ended && ready.next() == Some(true) {
                whole &= self.pass_on(from).is_ok();
            }
        }
        whole && self.flows.iter().any(|flow| !flow.ended)
    }

    fn pass_on(&mut self, from: usize) -> io::Result<()> {
        let (mut source, mut sink, flow) = (&self.ends[from], &self.ends[1 - from], &mut self.flows[from]);
        if flow.pending.is_empty() {
            let mut chunk = [0; CHUNK];
            let Some(length) = unless_early(source.read(&mut chunk))? else { return Ok(()) };
            if length == 0 {
                flow.ended = true;
                return sink.shutdown(Shutdown::Write);
            }
            flow.pending.extend_from_slice(&chunk[..length]);
        }
        let written = unless_early(sink.write(&flow.pending))?.unwrap_or(0);
        flow.pending.drain(..written);
        Ok(())
    }
}

/// `None` where one has to wait.
fn unless_early(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        other => other.map(Some),
    }
}
