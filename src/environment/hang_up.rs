//! Sessions at the close: who is told and hung up, and who may finish.

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::log::redaction::without_secrets;
use crate::sshd::daemon::Running;
use crate::sys::process::{Entry, Handle, children};
use crate::verdict::Verdict;

/// A shell that was hung up writes its history and goes; one that does not go by then is not waited for.
const HANG_UP_TIME: Duration = Duration::from_secs(2);

/// How long a client may take from one session to the next: Ansible removes its temporary directory in a session of its own, and the
/// machine that it runs on may have 500 of them to serve, far away.
const NEXT_SESSION_TIME: Duration = Duration::from_secs(5);

/// Number of sessions and connections watched for their end, each by a descriptor; the next look finds the end of the
/// others.
const WATCHED: usize = 16;

/// So many sessions are named that are still running when the grace is over.
const NAMED: usize = 20;

/// Poll interval for sshd reaping an ended session; the kernel raises no event for it.
const NOTICE_TIME: Duration = Duration::from_millis(10);

/// The wait for sessions to end.
pub(crate) struct GracePeriod {
    began: Instant,
    deadline: Instant,
    /// When to look again at the latest.
    pub(crate) next_look: Instant,
    /// Interactive shells, which were hung up.
    hung_up: Vec<Pid>,
    /// Their ends wake the event loop.
    watched: Vec<Handle>,
}

/// What the wait has come to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// No session is running.
    Idle,
    /// Some are; look again at [`GracePeriod::next_look`].
    Running,
    /// Some are, and their time is up.
    Over,
}

/// Writes one line to the terminal of each of `shells`. Never to that of a command, whose output a program may read.
pub(crate) fn tell_terminals(shells: &[Entry], what: &str) {
    for path in shells.iter().filter_map(Entry::terminal_path) {
        // Somebody may have stopped the terminal's output: not a reason to wait.
        let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
        let terminal = std::fs::OpenOptions::new().write(true).custom_flags(flags).open(path);
        let _ = terminal.and_then(|mut t| t.write_all(format!("\r\nims-sshd: {what}\r\n").as_bytes()));
    }
}

/// Tells people at interactive shells what comes, and hangs up as a lost line would. Returns whom.
pub(crate) fn hang_up(shells: &[Entry], verdict: Verdict, grace: Duration) -> Vec<Pid> {
    let word = match verdict {
        Verdict::Complete => "marked complete and will be packed",
        Verdict::Failed => "marked failed and will not be packed",
    };
    let grace = grace.as_secs();
    tell_terminals(shells, &format!("the image was {word}; this session ends now, running commands have {grace} s"));
    for shell in shells {
        shell.signal(Signal::SIGHUP);
        shell.signal(Signal::SIGCONT);
    }
    shells.iter().map(|e| e.pid).collect()
}

/// The program that a session runs: in a jail it is the child of the process in front, which people do not know.
fn carried_out(session: &Entry) -> Entry {
    const IN_FRONT: &str = "ims-jail-shell";
    let children = || children(session.pid).into_iter().filter_map(Entry::read);
    let inside = if session.name == IN_FRONT { children().find(|child| child.name != IN_FRONT) } else { None };
    inside.unwrap_or_else(|| session.clone())
}

impl GracePeriod {
    /// Waits for `grace` at the most. `hung_up` are those that [`hang_up`] told.
    pub(crate) fn start(grace: Duration, hung_up: Vec<Pid>) -> Self {
        let began = Instant::now();
        Self { began, deadline: began + grace, next_look: began, hung_up, watched: Vec::new() }
    }

    /// Judges what is running. `script` says whether the customization script is.
    pub(crate) fn look(&mut self, running: Running, script: bool) -> Progress {
        let now = Instant::now();
        let Running { connections, mut sessions, unheard, last_end } = running;
        if now >= self.began + HANG_UP_TIME {
            sessions.retain(|e| !self.hung_up.contains(&e.pid));
        }
        let watched = sessions.iter().chain(&connections).take(WATCHED);
        self.watched = watched.filter_map(|e| Handle::open(e.identity()).ok()).collect();
        let next = if !sessions.is_empty() || script {
            (self.began + HANG_UP_TIME).max(now + Duration::from_millis(100))
        } else if unheard > 0 {
            now + NOTICE_TIME
        } else {
            // Without a connection there is no next session; and a connection that has long been idle is one that its client keeps for
            // later.
            match last_end.map(|end| end + NEXT_SESSION_TIME) {
                Some(moment) if now < moment => moment,
                _ => return Progress::Idle,
            }
        };
        if now >= self.deadline {
            for session in sessions.iter().take(NAMED) {
                tracing::warn!(
                    pid = session.pid.as_raw(),
                    command = without_secrets(&carried_out(session).command_line()),
                    "still running when the grace period ended; ending it"
                );
            }
            if sessions.len() > NAMED {
                tracing::warn!("{} more sessions were still running", sessions.len() - NAMED);
            }
            return Progress::Over;
        }
        self.next_look = next.min(self.deadline);
        Progress::Running
    }

    /// Readable when one of the sessions or connections has ended.
    pub(crate) fn ends(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.watched.iter().map(|handle| handle.fd.as_fd())
    }
}
