//! Signals typed at the terminal of a command of `enter`. The kernel sends them to the command's process group alone,
//! so a process of ours, the listener, is in that group.
//!
//! The listener is started before the jail is entered, so that it is not in the jail's PID namespace, and only signals
//! to the whole group reach it from inside.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid, setpgid};
use rustix::event::{PollFd, PollFlags};

use crate::error::{Attempt, Result};
use crate::jail::capabilities;
use crate::sys::process::{Fork, exit_now, fork};
use crate::sys::signals::Signals;

/// Signals of Ctrl-C and Ctrl-\.
const TYPED: [Signal; 2] = [Signal::SIGINT, Signal::SIGQUIT];

/// Time for the listener to report the signals that it has received.
const TIME_TO_REPORT: Duration = Duration::from_secs(1);

/// The listener, and this process's parent, to which typed signals are passed on.
pub(crate) struct Typed {
    socket: UnixStream,
    listener: Pid,
    parent: Pid,
}

impl Typed {
    /// Starts the listener, which gets no signals before [`Typed::join`].
    pub(crate) fn start() -> Result<Self> {
        let attempted = || "start a process that listens for Ctrl-C";
        let (socket, other) = UnixStream::pair().attempt(attempted)?;
        socket.set_nonblocking(true).attempt(attempted)?;
        let parent = getppid();
        match fork().attempt(attempted)? {
            Fork::Child => {
                drop(socket);
                exit_now(u8::from(listen(&other).is_err()))
            }
            Fork::Parent(listener) => Ok(Self { socket, listener, parent }),
        }
    }

    /// Moves the listener into the process group of a command.
    pub(crate) fn join(&self, group: Pid) {
        // Ignore an error: the command may have ended.
        let _ = setpgid(self.listener, group);
    }

    /// Sends typed signals to the parent, which distinguishes them from other signals by their sender. Returns false if
    /// the listener has ended.
    pub(crate) fn pass_on(&mut self) -> bool {
        let mut heard = [0; 16];
        match self.socket.read(&mut heard) {
            Ok(0) => false,
            Ok(length) => {
                for &number in &heard[..length] {
                    self.tell(number);
                }
                true
            }
            Err(e) => matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        }
    }

    /// Ends the listener once the command has ended. All signals typed before the command's end have reached the
    /// listener: the kernel sends a signal to a whole group before a process of the group can end (`tasklist_lock`).
    pub(crate) fn end(mut self) {
        let _ = kill(self.listener, Signal::SIGCONT);
        let _ = self.socket.shutdown(Shutdown::Write);
        let _ = self.socket.set_nonblocking(false).and_then(|()| self.socket.set_read_timeout(Some(TIME_TO_REPORT)));
        let mut heard = Vec::new();
        let _ = self.socket.read_to_end(&mut heard);
        for number in heard {
            self.tell(number);
        }
    }

    fn tell(&self, number: u8) {
        // If the parent was killed, another process is the parent now, and must not get the signal.
        if let Ok(signal) = Signal::try_from(i32::from(number))
            && getppid() == self.parent
        {
            let _ = kill(self.parent, signal);
        }
    }
}

impl AsFd for Typed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Reports typed signals until the other end of `socket` closes. Only SIGKILL ends the listener earlier.
fn listen(socket: &UnixStream) -> Result<()> {
    let attempted = || "listen for Ctrl-C";
    let all: Vec<_> = Signal::iterator().collect();
    let signals = Signals::block(&all).attempt(attempted)?;
    capabilities::keep_only(&[]).attempt(attempted)?;
    loop {
        let mut sources = [PollFd::new(&signals, PollFlags::IN), PollFd::new(socket, PollFlags::IN)];
        let _ = rustix::event::poll(&mut sources, None);
        let is_over = !sources[1].revents().is_empty();
        while let Ok(Some((signal, sender))) = signals.next_with_sender() {
            if sender.is_none() && TYPED.contains(&signal) {
                let mut socket = socket;
                socket.write_all(&[u8::try_from(signal as i32).attempt(attempted)?]).attempt(attempted)?;
            }
        }
        if is_over {
            return Ok(());
        }
    }
}
