//! The client's ssh-agent in the jail: a socket below the jail's /run, whose connections are relayed to the socket that
//! sshd created in the container.
//!
//! sshd's socket is relayed and not mounted: in the user tier no mount of the container can be copied, and a process
//! without capabilities could not unmount it again.

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

/// Socket of the agent that sshd created in the container for this session.
pub(crate) struct Outside {
    directory: Tree,
    name: OsString,
    sshd: Pid,
}

impl Outside {
    /// Must be called before the jail is entered. `None` if the client does not forward its agent.
    pub(crate) fn of_this_session() -> Option<Self> {
        let path = PathBuf::from(std::env::var_os("SSH_AUTH_SOCK")?);
        let directory = Tree::open(path.parent()?).ok()?;
        Some(Self { directory, name: path.file_name()?.to_owned(), sshd: getppid() })
    }

    /// Creates the socket below /run of the jail, which this process has entered and whose root is `image_root`.
    /// Changes the working directory.
    pub(crate) fn show(self, image_root: &Tree) -> io::Result<Agent> {
        let run = image_root.directory(RUN)?;
        // A killed process with the same ID may have left its socket behind.
        let name = format!("ssh-agent.{}", getpid());
        run.remove(&name)?;
        // Bind to a name without a slash: whatever a session puts in /run, the kernel creates the socket in this
        // directory or not at all.
        rustix::process::fchdir(&run)?;
        // Give access to root only, as for sshd's own socket.
        let umask = rustix::process::umask(Mode::from_raw_mode(0o177));
        let listener = UnixListener::bind(&name);
        rustix::process::umask(umask);
        let listener = listener?;
        listener.set_nonblocking(true)?;
        Ok(Agent { outside: self, run, name, listener, connections: Vec::new() })
    }
}

/// Directory of the sockets, relative to the image root: the jail's own tmpfs, so that no socket gets into the image.
const RUN: &str = "run";

/// Maximum number of simultaneous connections; further ones wait.
const MOST_CONNECTIONS: usize = 16;

/// Bytes per read.
const CHUNK: usize = 16 << 10;

/// The agent's socket in the jail.
pub(crate) struct Agent {
    outside: Outside,
    run: Tree,
    name: String,
    listener: UnixListener,
    connections: Vec<Connection>,
}

impl Agent {
    /// Path of the socket in the jail.
    pub(crate) fn path(&self) -> PathBuf {
        Path::new("/").join(RUN).join(&self.name)
    }

    /// Changes to the directory of sshd's socket, which no path of the jail leads to; the socket is then reached by its
    /// name alone.
    pub(crate) fn go_outside(&self) -> io::Result<()> {
        rustix::process::fchdir(&self.outside.directory).map_err(Into::into)
    }

    /// Descriptors to poll.
    pub(crate) fn interests(&self) -> impl Iterator<Item = PollFd<'_>> {
        let listener = self.has_room().then(|| PollFd::new(&self.listener, PollFlags::IN));
        listener.into_iter().chain(self.connections.iter().flat_map(Connection::interests))
    }

    /// Makes progress where it can. `ready` says for each of [`Self::interests`] whether its event has occurred.
    pub(crate) fn go_on(&mut self, mut ready: impl Iterator<Item = bool>) {
        let is_connecting = self.has_room() && ready.next() == Some(true);
        self.connections.retain_mut(|connection| connection.go_on(&mut ready));
        // If the connection to the agent fails, the program sees its own connection close, as when the client is gone.
        if is_connecting && let Ok(connection) = self.connect() {
            self.connections.push(connection);
        }
    }

    fn has_room(&self) -> bool {
        self.connections.len() < MOST_CONNECTIONS
    }

    fn connect(&self) -> io::Result<Connection> {
        let (inside, _) = self.listener.accept()?;
        let outside = UnixStream::connect(&self.outside.name)?;
        // If AcceptEnv allows SSH_AUTH_SOCK, a client may have named another socket of the container.
        let listener = rustix::net::sockopt::socket_peercred(&outside)?.pid;
        if listener.as_raw_nonzero().get() != self.outside.sshd.as_raw() {
            return Err(ErrorKind::PermissionDenied.into());
        }
        for end in [&inside, &outside] {
            end.set_nonblocking(true)?;
        }
        Ok(Connection { ends: [inside, outside], flows: Default::default() })
    }

    /// Removes the socket, or a file that a session has put in its place; either is in the jail's tmpfs.
    pub(crate) fn remove(&self) {
        let _ = self.run.remove(&self.name);
    }
}

/// A connection between a program in the jail and sshd.
struct Connection {
    ends: [UnixStream; 2],
    /// Data from the first end to the second, and back.
    flows: [Flow; 2],
}

/// Data in one direction.
#[derive(Default)]
struct Flow {
    /// Bytes read and not yet written. Nothing more is read until they are written.
    pending: Vec<u8>,
    ended: bool,
}

impl Connection {
    /// One interest for each flow that has not ended.
    fn interests(&self) -> impl Iterator<Item = PollFd<'_>> {
        self.flows.iter().enumerate().filter(|(_, flow)| !flow.ended).map(|(from, flow)| {
            let (end, what) = if flow.pending.is_empty() { (from, PollFlags::IN) } else { (1 - from, PollFlags::OUT) };
            PollFd::from_borrowed_fd(self.ends[end].as_fd(), what)
        })
    }

    /// Returns whether more data may come.
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
            let Some(length) = unless_not_ready(source.read(&mut chunk))? else { return Ok(()) };
            if length == 0 {
                flow.ended = true;
                return sink.shutdown(Shutdown::Write);
            }
            flow.pending.extend_from_slice(&chunk[..length]);
        }
        let written = unless_not_ready(sink.write(&flow.pending))?.unwrap_or(0);
        flow.pending.drain(..written);
        Ok(())
    }
}

/// Turns an error into `None` if the call would have blocked or was interrupted.
fn unless_not_ready(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        other => other.map(Some),
    }
}
