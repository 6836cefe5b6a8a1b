//! The process outside the jail that represents a session: starts the inner stage in the jail, forwards signals, lends
//! the terminal, relays the client's agent, and ends as the session does.

use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};

use caps::Capability;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpgrp, getpid, getsid, setpgid, tcgetpgrp};
use rustix::event::{PollFd, PollFlags};

use crate::error::{Attempt, Result};
use crate::jail::enter::Joined;
use crate::jail::record::Record;
use crate::jail::streams::{ENDING, Streams};
use crate::jail::tier::Tier;
use crate::jail::{capabilities, refused_calls};
use crate::session::agent::Agent;
use crate::session::typed::Typed;
use crate::sys::process::{Exec, close_on_exec_from, end_like, exit_now, spawn};
use crate::sys::seccomp::{self, Instruction};
use crate::sys::signals::{Signals, stop_own_group};
use crate::sys::terminal::set_foreground;
use crate::sys::tree::Tree;
use crate::sys::umask;

/// Signals that this process forwards to the session's program.
const PASSED_ON: [Signal; 8] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGTSTP,
];

/// Streams that this process serves while the session's program runs.
pub(crate) struct Beside {
    /// The client's agent.
    pub(crate) agent: Option<Agent>,
    /// The listener for typed signals.
    pub(crate) typed: Option<Typed>,
}

/// Starts the `inner` stage in the jail that was [`join`](crate::jail::enter::join)ed, with these `streams`, in
/// `directory` or else in the current directory, which is in the jail. Serves `beside` until the inner stage ends. When
/// the inner stage has ended, calls `ended`, and then ends in the same way, with its exit code or by the same signal.
pub(crate) fn run(
    record: &Record,
    joined: &Joined,
    inner: &Exec,
    mut streams: Streams,
    directory: Option<&Tree>,
    beside: Beside,
    ended: impl FnOnce(&WaitStatus),
) -> Result<Infallible> {
    let mut blocked = PASSED_ON.to_vec();
    blocked.extend([Signal::SIGCHLD, Signal::SIGCONT]);
    let signals = Signals::block(&blocked).attempt(|| "block signals")?;
    let mut terminal = Terminal::of_this_process();
    // The chroot tier lacks CAP_SYS_ADMIN, which the filter needs, and confines nobody anyway.
    let refused = (record.tier != Tier::Chroot).then(refused_calls::program);
    let child = spawn(|| {
        let prepared = prepare(record.dkms, refused, &signals, &terminal, directory)
            .and_then(|()| streams.take().attempt(|| "install the session's streams"));
        let become_inner =
            || inner.replace_this_process_by(&joined.helper).attempt(|| "start the jail's ims-jail-shell");
        let Err(error) = prepared.and_then(|()| become_inner());
        eprintln!("ims-jail-shell: {error}");
        1
    });
    let child = child.attempt(|| "start a process in the jail")?;
    streams.close();
    beside.typed.iter().for_each(|typed| typed.join(child));
    // Exit without cleanup: the client waits for this process to end.
    exit_now(attend(child, &signals, &mut terminal, streams, beside, ended))
}

/// Prepares the child for the inner stage. Resolves no path of the image.
fn prepare(
    dkms: bool,
    refused: Option<&[Instruction]>,
    signals: &Signals,
    terminal: &Terminal,
    directory: Option<&Tree>,
) -> Result<()> {
    // Move the child into a process group of its own, so that `kill 0` inside does not reach this process; with this
    // process's group the child would see its group as 0, which fish and some other shells cannot handle. The session
    // stays the same, so that sshd's hang-up reaches the child.
    setpgid(Pid::from_raw(0), Pid::from_raw(0)).attempt(|| "make a process group in the jail")?;
    terminal.show_in_front(getpid());
    if !dkms {
        // The filter comes first, because it needs CAP_SYS_ADMIN.
        if let Some(refused) = refused {
            seccomp::filter(refused).attempt(|| "install the seccomp filter")?;
        }
        capabilities::keep_jail_set().attempt(|| "drop capabilities")?;
    }
    signals.restore_for_exec().attempt(|| "restore signals")?;
    umask::restore_callers();
    if let Some(directory) = directory {
        rustix::process::fchdir(directory).attempt(|| "change to the directory of sftp-server")?;
    }
    close_on_exec_from(3).attempt(|| "mark descriptors close-on-exec")
}

/// Forwards signals and agent data until the child ends, and returns this process's exit code.
fn attend(
    child: Pid,
    signals: &Signals,
    terminal: &mut Terminal,
    mut streams: Streams,
    Beside { agent, mut typed }: Beside,
    ended: impl FnOnce(&WaitStatus),
) -> u8 {
    let _ = capabilities::keep_only(&[(Capability::CAP_KILL, "the child may have changed its user")]);
    let mut agent = agent.filter(|agent| agent.go_outside().is_ok());
    let mut is_to_end = false;
    loop {
        loop {
            match waitpid(child, Some(WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED)) {
                Ok(WaitStatus::StillAlive) => break,
                Ok(WaitStatus::Stopped(_, signal)) => terminal.stopped(child, signal),
                Ok(mut end) => {
                    if !streams.finish(signals, is_to_end) && end == WaitStatus::Exited(child, 0) {
                        end = WaitStatus::Exited(child, 1);
                    }
                    ended(&end);
                    agent.iter().for_each(Agent::remove);
                    typed.into_iter().for_each(Typed::end);
                    terminal.take_back();
                    return end_like(end);
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(_) => return 1,
            }
        }
        let mut sources = vec![PollFd::new(signals, PollFlags::IN)];
        sources.extend(agent.iter().flat_map(Agent::interests));
        let of_agent = 1..sources.len();
        sources.extend(typed.iter().map(|typed| PollFd::new(typed, PollFlags::IN)));
        let _ = rustix::event::poll(&mut sources, None);
        let ready: Vec<_> = sources[of_agent].iter().map(|source| !source.revents().is_empty()).collect();
        // Read typed signals in every round: their socket does not block.
        if typed.as_mut().is_some_and(|typed| !typed.pass_on()) {
            typed = None;
        }
        if let Some(agent) = &mut agent {
            agent.go_on(ready.into_iter());
        }
        while let Ok(Some(signal)) = signals.next() {
            match signal {
                Signal::SIGCHLD => {}
                // A shell outside continued this job, in the foreground or not.
                Signal::SIGCONT => terminal.go_on(child),
                passed_on => {
                    is_to_end |= ENDING.contains(&passed_on);
                    let _ = kill(child, passed_on);
                }
            }
        }
    }
}

/// The controlling terminal, lent to the jail while this process is in the foreground.
struct Terminal {
    /// `None` without a controlling terminal.
    fd: Option<OwnedFd>,
    /// True if this process leads its session, as one started by sshd does: then no shell outside waits for the
    /// terminal.
    leader: bool,
    /// True while the jail has the terminal.
    lent: bool,
}

impl Terminal {
    fn of_this_process() -> Self {
        let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
        let mut streams = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()].into_iter();
        // tcgetpgrp(3) succeeds for the controlling terminal only.
        let terminal = streams.find(|stream| tcgetpgrp(stream).is_ok());
        let fd = terminal.and_then(|terminal| terminal.try_clone_to_owned().ok());
        let mut this = Self { fd, leader: getsid(None) == Ok(getpid()), lent: false };
        this.lent = this.is_ours();
        this
    }

    /// True if this process is in the foreground.
    fn is_ours(&self) -> bool {
        self.fd.as_ref().is_some_and(|fd| tcgetpgrp(fd) == Ok(getpgrp()))
    }

    /// Puts `group` in the foreground, if the terminal is lent.
    fn show_in_front(&self, group: Pid) {
        if let (true, Some(fd)) = (self.lent, &self.fd) {
            let _ = set_foreground(fd, group);
        }
    }

    /// Takes the terminal back for the shell outside, unless that shell has it already because this process is in the
    /// background. A session leader does not take it back: when it ends, the kernel hangs up the jail's foreground
    /// group, as after a plain login.
    fn take_back(&mut self) {
        if !self.leader {
            self.show_in_front(getpgrp());
            self.lent = false;
        }
    }

    /// Handles a child that was stopped.
    fn stopped(&mut self, child: Pid, signal: Signal) {
        if self.leader {
            // Nobody could continue the child. After a plain login, its process group would be orphaned and these
            // signals would have no effect; continuing the child at once has the same result.
            if matches!(signal, Signal::SIGTSTP | Signal::SIGTTIN | Signal::SIGTTOU) {
                self.show_in_front(child);
                let _ = killpg(child, Signal::SIGCONT);
            }
        } else if self.is_ours() && matches!(signal, Signal::SIGTTIN | Signal::SIGTTOU) {
            // A shell outside put this running job in the foreground; no event has reported that.
            self.go_on(child);
        } else {
            // Somebody pressed Ctrl-Z. The shell outside must see its whole job stop: this process and its parent.
            self.take_back();
            let _ = stop_own_group();
            self.go_on(child);
        }
    }

    /// The shell outside continued this process, in the foreground if the shell also gave it the terminal.
    fn go_on(&mut self, child: Pid) {
        if !self.leader {
            self.lent |= self.is_ours();
            self.show_in_front(child);
        }
        let _ = killpg(child, Signal::SIGCONT);
    }
}
