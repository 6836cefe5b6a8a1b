//! Blocking signals and reading them from a descriptor.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags};

use crate::sys::poll;

/// Signals blocked in this process and read from a signalfd.
pub(crate) struct Signals {
    fd: SignalFd,
    /// The previous mask, restored in a child.
    before: SigSet,
}

impl Signals {
    /// Blocks `signals` in this thread and in all threads that it starts later, and opens the signalfd.
    pub(crate) fn block(signals: &[Signal]) -> nix::Result<Self> {
        let set: SigSet = signals.iter().copied().collect();
        let mut before = SigSet::empty();
        nix::sys::signal::sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), Some(&mut before))?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self { fd, before })
    }

    /// The next pending signal, if any.
    pub(crate) fn next(&self) -> nix::Result<Option<Signal>> {
        self.next_with_sender().map(|next| next.map(|(signal, _)| signal))
    }

    /// The next pending signal, and the process that sent it: `None` for the kernel, as for a signal typed at a
    /// terminal, which goes to the terminal's whole foreground group.
    pub(crate) fn next_with_sender(&self) -> nix::Result<Option<(Signal, Option<Pid>)>> {
        match self.fd.read_signal() {
            // SI_USER and the other codes for a sending process are not positive (sigaction(2)).
            Ok(Some(info)) => Signal::try_from(info.ssi_signo.cast_signed()).map(|signal| {
                let sender = (info.ssi_code <= 0).then_some(Pid::from_raw(info.ssi_pid.cast_signed()));
                Some((signal, sender))
            }),
            Ok(None) | Err(Errno::EINTR) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Restores, in a child before exec, the signal state that sshd gives its programs: the previous mask, and the
    /// default action of SIGPIPE. This program ignores SIGPIPE, and an ignored signal survives exec: `yes | head` would
    /// not end.
    pub(crate) fn restore_for_exec(&self) -> nix::Result<()> {
        default_disposition(Signal::SIGPIPE)?;
        self.before.thread_set_mask()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Signals that end the program.
const ENDING: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];

/// Lets long file system work check whether a signal that ends the program is pending. The check leaves the signal for
/// the code that blocked it to read. A signal that is not blocked ends the program by itself and is never pending.
pub(crate) struct Pending {
    /// `None` if no descriptor was free; then pending signals do not interrupt the work.
    fd: Option<SignalFd>,
    from: Instant,
    checks: Cell<usize>,
}

impl Pending {
    /// Only the first of every this many checks asks the kernel.
    const EACH: usize = 256;

    /// Reports pending signals from now on.
    pub(crate) fn new() -> Self {
        Self::after(Duration::ZERO)
    }

    /// Reports pending signals only once `time` has passed.
    pub(crate) fn after(time: Duration) -> Self {
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let fd = SignalFd::with_flags(&ENDING.into_iter().collect(), flags).ok();
        Self { fd, from: Instant::now() + time, checks: Cell::new(0) }
    }

    /// Fails with [`io::ErrorKind::Interrupted`] if a signal is pending. Cheap: most calls do not ask the kernel.
    pub(crate) fn check(&self) -> io::Result<()> {
        let checks = self.checks.replace(self.checks.get() + 1);
        let Some(fd) = self.fd.as_ref().filter(|_| checks.is_multiple_of(Self::EACH)) else { return Ok(()) };
        let mut sources = [PollFd::new(fd, PollFlags::IN)];
        if Instant::now() >= self.from && matches!(poll::wait(&mut sources, Duration::ZERO), Ok(1)) {
            return Err(io::Error::new(io::ErrorKind::Interrupted, "interrupted by a signal"));
        }
        Ok(())
    }
}

/// Has `command` start with no signal blocked. It would otherwise inherit this process's mask (`Command` does not reset
/// it), and a shell could not be interrupted, nor a script terminated.
pub(crate) fn unblock_signals(command: &mut Command) -> &mut Command {
    // SAFETY: between fork and exec only sigprocmask runs, which is async-signal-safe, on a set on the stack.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(|| SigSet::empty().thread_set_mask().map_err(Into::into))
    }
}

/// Stops this process group as Ctrl-Z does, and returns after SIGCONT. Returns at once if the group is orphaned: the
/// kernel does not stop a group that no shell could continue.
pub(crate) fn stop_own_group() -> nix::Result<()> {
    default_disposition(Signal::SIGTSTP)?;
    let stop: SigSet = [Signal::SIGTSTP].into_iter().collect();
    let mut before = SigSet::empty();
    nix::sys::signal::sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&stop), Some(&mut before))?;
    let result = nix::sys::signal::kill(Pid::from_raw(0), Signal::SIGTSTP);
    before.thread_set_mask()?;
    result
}

/// Restores the default action of `signal`.
pub(crate) fn default_disposition(signal: Signal) -> nix::Result<()> {
    // SAFETY: SIG_DFL is not a function, so no code of this program can run as a handler.
    #[allow(unsafe_code)]
    unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) }.map(|_| ())
}

/// Ignores `signal`.
pub(crate) fn ignore(signal: Signal) -> nix::Result<()> {
    // SAFETY: SIG_IGN is not a function, so no code of this program can run as a handler.
    #[allow(unsafe_code)]
    unsafe { nix::sys::signal::signal(signal, SigHandler::SigIgn) }.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_blocked_here_are_not_blocked_in_started_programs() {
        let signals = Signals::block(&[Signal::SIGTERM, Signal::SIGTSTP]).unwrap();
        let blocked = |command: &mut Command| {
            let output = command.args(["SigBlk", "/proc/self/status"]).output().unwrap();
            String::from_utf8(output.stdout).unwrap().split_whitespace().nth(1).unwrap().to_owned()
        };
        assert_eq!(blocked(unblock_signals(&mut Command::new("grep"))), "0000000000000000");
        // Without `unblock_signals`, the mask is inherited.
        assert_ne!(blocked(&mut Command::new("grep")), "0000000000000000");
        signals.before.thread_set_mask().unwrap();
    }
}
