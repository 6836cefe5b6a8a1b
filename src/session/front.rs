//! The process in front of a session, outside the jail: starts the inner stage in the jail, passes signals in, lends the terminal, serves
//! the client's agent, and ends as the session does.

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
use crate::sys::process::{Exec, close_on_exec_from, end_like, exit_now, spawn};
use crate::sys::seccomp::{self, Instruction};
use crate::sys::signals::{Signals, stop_own_group};
use crate::sys::terminal::set_foreground;
use crate::sys::tree::Tree;

/// Signals that somebody may send to the process in front and that are meant for the one inside.
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

/// Starts the `inner` stage in the jail that was [`join`]ed, with these `streams`, in the working directory `directory` if one is given, else
/// in this process's, which lies inside. This process ends as that does, with its exit code or dying of the same signal, after `ended` has
/// been told how. Until then it serves the client's `agent`.
pub(crate) fn run(
    record: &Record,
    joined: &Joined,
    inner: &Exec,
    mut streams: Streams,
    directory: Option<&Tree>,
    agent: Option<Agent>,
    ended: impl FnOnce(&WaitStatus),
) -> Result<Infallible> {
    let mut held = PASSED_ON.to_vec();
    held.extend([Signal::SIGCHLD, Signal::SIGCONT]);
    let signals = Signals::block(&held).attempt(|| "block signals")?;
    let mut terminal = Terminal::of_this_process();
    // Not in the chroot tier, which lacks CAP_SYS_ADMIN for it and holds nobody anyway.
    let refused = (record.tier != Tier::Chroot).then(refused_calls::program);
    let child = spawn(|| {
        let prepared = prepare(record.dkms, refused, &signals, &terminal, directory)
            .and_then(|()| streams.take().attempt(|| "take the session's streams"));
        let become_inner =
            || inner.replace_this_process_by(&joined.helper).attempt(|| "start the jail's ims-jail-shell");
        let Err(error) = prepared.and_then(|()| become_inner());
        eprintln!("ims-jail-shell: {error}");
        1
    });
    let child = child.attempt(|| "start a process in the jail")?;
    streams.are_taken();
    // At once: the client waits for this end.
    exit_now(attend(child, &signals, &mut terminal, streams, agent, ended))
}

/// Makes the child ready to become the inner stage. It looks up no name here.
fn prepare(
    dkms: bool,
    refused: Option<&[Instruction]>,
    signals: &Signals,
    terminal: &Terminal,
    directory: Option<&Tree>,
) -> Result<()> {
    // Its own process group: `kill 0` inside reaches what is inside and not the process in front, whose group, seen from
    // here, would be 0, which fish and others do not cope with. Not its own session: sshd's hang-up would miss it.
    setpgid(Pid::from_raw(0), Pid::from_raw(0)).attempt(|| "make a process group in the jail")?;
    terminal.show_in_front(getpid());
    if !dkms {
        // First, since it takes CAP_SYS_ADMIN.
        if let Some(refused) = refused {
            seccomp::filter(refused).attempt(|| "give up system calls")?;
        }
        capabilities::keep_jail_set().attempt(|| "give up capabilities")?;
    }
    signals.restore_for_exec().attempt(|| "restore signals")?;
    if let Some(directory) = directory {
        rustix::process::fchdir(directory).attempt(|| "change to the directory of sftp-server")?;
    }
    close_on_exec_from(3).attempt(|| "mark descriptors close-on-exec")
}

/// The process in front: passes signals in, the agent's words in and out, and the end out.
fn attend(
    child: Pid,
    signals: &Signals,
    terminal: &mut Terminal,
    mut streams: Streams,
    agent: Option<Agent>,
    ended: impl FnOnce(&WaitStatus),
) -> u8 {
    let _ = capabilities::hold_only(&[(Capability::CAP_KILL, "the child may have become another user")]);
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
                    terminal.take_back();
                    return end_like(end);
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(_) => return 1,
            }
        }
        let mut sources = vec![PollFd::new(signals, PollFlags::IN)];
        sources.extend(agent.iter().flat_map(Agent::interests));
        let _ = rustix::event::poll(&mut sources, None);
        let ready: Vec<_> = sources[1..].iter().map(|source| !source.revents().is_empty()).collect();
        if let Some(agent) = &mut agent {
            agent.go_on(ready.into_iter());
        }
        while let Ok(Some(signal)) = signals.next() {
            match signal {
                Signal::SIGCHLD => {}
                // A shell outside has continued this job, in front or not.
                Signal::SIGCONT => terminal.go_on(child),
                passed_on => {
                    is_to_end |= ENDING.contains(&passed_on);
                    let _ = kill(child, passed_on);
                }
            }
        }
    }
}

/// The controlling terminal, which is lent to the jail while this process is in its foreground.
struct Terminal {
    /// None if there is none.
    fd: Option<OwnedFd>,
    /// Whether this process leads its session, as one that sshd started does. There is then no shell outside to go back to.
    leader: bool,
    /// Whether the jail has it.
    lent: bool,
}

impl Terminal {
    fn of_this_process() -> Self {
        let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
        let mut streams = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()].into_iter();
        // Only of the controlling terminal does the kernel tell the foreground group.
        let terminal = streams.find(|stream| tcgetpgrp(stream).is_ok());
        let fd = terminal.and_then(|terminal| terminal.try_clone_to_owned().ok());
        let mut this = Self { fd, leader: getsid(None) == Ok(getpid()), lent: false };
        this.lent = this.is_ours();
        this
    }

    /// Whether this process is in the foreground.
    fn is_ours(&self) -> bool {
        self.fd.as_ref().is_some_and(|fd| tcgetpgrp(fd) == Ok(getpgrp()))
    }

    /// Puts `group` in the foreground, if the terminal is lent.
    fn show_in_front(&self, group: Pid) {
        if let (true, Some(fd)) = (self.lent, &self.fd) {
            let _ = set_foreground(fd, group);
        }
    }

    /// Only for the sake of a shell outside, and only what the jail has: in the background the terminal is that shell's. A session
    /// leader leaves it as it is: the kernel then sends the hang-up of its end to what still runs in the foreground inside, as after a
    /// plain login.
    fn take_back(&mut self) {
        if !self.leader {
            self.show_in_front(getpgrp());
            self.lent = false;
        }
    }

    /// The child was stopped.
    fn stopped(&mut self, child: Pid, signal: Signal) {
        if self.leader {
            // Nobody could ever continue it. After a plain login its group would be orphaned, and these signals without effect; the
            // same comes out here.
            if matches!(signal, Signal::SIGTSTP | Signal::SIGTTIN | Signal::SIGTTOU) {
                self.show_in_front(child);
                let _ = killpg(child, Signal::SIGCONT);
            }
        } else if self.is_ours() && matches!(signal, Signal::SIGTTIN | Signal::SIGTTOU) {
            // A shell outside has put a running job in front, of which it tells nobody.
            self.go_on(child);
        } else {
            // Somebody pressed Ctrl-Z. The shell outside has to see its job stopped: this process and the one that started it.
            self.take_back();
            let _ = stop_own_group();
            self.go_on(child);
        }
    }

    /// The shell outside has continued this process, and in front if it gave it the terminal.
    fn go_on(&mut self, child: Pid) {
        if !self.leader {
            self.lent |= self.is_ours();
            self.show_in_front(child);
        }
        let _ = killpg(child, Signal::SIGCONT);
    }
}
