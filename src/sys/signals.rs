//! Signals as values: what is blocked, what has arrived.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Signals that are held back from this process's handlers and read from a descriptor instead.
pub struct Signals {
    fd: SignalFd,
    /// The mask from before, which a child gets back.
    before: SigSet,
}

impl Signals {
    /// Blocks `signals` in this thread (and in all it starts later) and opens the descriptor they are read from.
    pub fn hold(signals: &[Signal]) -> nix::Result<Self> {
        let set: SigSet = signals.iter().copied().collect();
        let mut before = SigSet::empty();
        nix::sys::signal::sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), Some(&mut before))?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self { fd, before })
    }

    /// The next signal that has arrived, if any.
    pub fn next(&self) -> nix::Result<Option<Signal>> {
        match self.fd.read_signal() {
            Ok(Some(info)) => Signal::try_from(info.ssi_signo.cast_signed()).map(Some),
            Ok(None) | Err(Errno::EINTR) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Gives a child that is about to exec the dispositions a program expects from sshd: the old mask, and SIGPIPE deadly (Rust's
    /// runtime ignores it, which `yes | head` would inherit).
    pub fn restore_for_exec(&self) -> nix::Result<()> {
        default_disposition(Signal::SIGPIPE)?;
        self.before.thread_set_mask()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Lets `signal` do to this process what it does by default.
pub fn default_disposition(signal: Signal) -> nix::Result<()> {
    // SAFETY: SIG_DFL is no function of ours, so nothing of this program can run inside a handler.
    #[allow(unsafe_code)]
    unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) }.map(|_| ())
}
