//! Signals as values: what is blocked, what has arrived.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;

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
        self.next_with_sender().map(|next| next.map(|(signal, _)| signal))
    }

    /// The next signal, and whether a process has sent it: a terminal's comes from the kernel, and to all of its foreground.
    pub fn next_with_sender(&self) -> nix::Result<Option<(Signal, bool)>> {
        match self.fd.read_signal() {
            // SI_USER and its like are not positive (sigaction(2)).
            Ok(Some(info)) => {
                Signal::try_from(info.ssi_signo.cast_signed()).map(|signal| Some((signal, info.ssi_code <= 0)))
            }
            Ok(None) | Err(Errno::EINTR) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Gives a child that is about to exec the dispositions a program expects from sshd: the old mask, and SIGPIPE deadly, which is ignored
    /// here and would be in `yes | head` too.
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

/// Starts `command` with no signal held back. A mask outlives exec and `Command` hands ours on: without this a shell could not be
/// interrupted, nor a script terminated.
pub fn hold_none(command: &mut Command) -> &mut Command {
    // SAFETY: all that runs between fork and exec is one sigprocmask, which is async-signal-safe, on a set made on the stack.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(|| SigSet::empty().thread_set_mask().map_err(Into::into))
    }
}

/// Stops this process's group as Ctrl-Z would, and returns once it was continued. Returns at once if the group is orphaned: the kernel
/// stops none so that nobody could continue.
pub fn stop_own_group() -> nix::Result<()> {
    default_disposition(Signal::SIGTSTP)?;
    let stop: SigSet = [Signal::SIGTSTP].into_iter().collect();
    let mut before = SigSet::empty();
    nix::sys::signal::sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&stop), Some(&mut before))?;
    let result = nix::sys::signal::kill(Pid::from_raw(0), Signal::SIGTSTP);
    before.thread_set_mask()?;
    result
}

/// Lets `signal` do to this process what it does by default.
pub fn default_disposition(signal: Signal) -> nix::Result<()> {
    // SAFETY: SIG_DFL is no function of ours, so nothing of this program can run inside a handler.
    #[allow(unsafe_code)]
    unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) }.map(|_| ())
}

/// Lets `signal` do nothing to this process.
pub fn ignore(signal: Signal) -> nix::Result<()> {
    // SAFETY: SIG_IGN is no function of ours, so nothing of this program can run inside a handler.
    #[allow(unsafe_code)]
    unsafe { nix::sys::signal::signal(signal, SigHandler::SigIgn) }.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_here_is_not_held_by_what_is_started() {
        let signals = Signals::hold(&[Signal::SIGTERM, Signal::SIGTSTP]).unwrap();
        let blocked = |command: &mut Command| {
            let output = command.args(["SigBlk", "/proc/self/status"]).output().unwrap();
            String::from_utf8(output.stdout).unwrap().split_whitespace().nth(1).unwrap().to_owned()
        };
        assert_eq!(blocked(hold_none(&mut Command::new("grep"))), "0000000000000000");
        // Why it is needed: a mask is inherited.
        assert_ne!(blocked(&mut Command::new("grep")), "0000000000000000");
        signals.before.thread_set_mask().unwrap();
    }
}
