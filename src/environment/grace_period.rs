//! The grace period while the environment closes: commands may finish, and a connected client may open its next
//! session.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use crate::log::redaction::without_secrets;
use crate::sshd::daemon::Running;
use crate::sys::process::{Entry, Handle, children};

/// Time for a shell that was hung up to write its history and exit; afterwards the environment closes without waiting
/// for the shell.
const HANG_UP_TIME: Duration = Duration::from_secs(2);

/// How long the closing environment waits for a client's next session after a session has ended. Ansible removes its
/// temporary directory in a session of its own, and a distant control node with 500 hosts may take seconds to open it.
const NEXT_SESSION_TIME: Duration = Duration::from_secs(5);

/// Maximum number of sessions and connections watched for their end, each by a descriptor. The end of any others is
/// found by polling.
const WATCHED: usize = 16;

/// Maximum number of sessions that the log names if they are still running when the grace period ends.
const NAMED: usize = 20;

/// Interval at which to check whether sshd has reaped an ended session; the kernel raises no event for that.
const NOTICE_TIME: Duration = Duration::from_millis(10);

/// The wait for sessions to end while the environment closes.
pub(crate) struct GracePeriod {
    began: Instant,
    deadline: Instant,
    /// Time of the next poll.
    pub(crate) next_look: Instant,
    /// Interactive shells that were hung up.
    hung_up: Vec<Pid>,
    /// Sessions and connections whose end wakes the event loop.
    watched: Vec<Handle>,
}

/// State of the wait for sessions to end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// No session is running.
    Idle,
    /// A session is running; poll again at [`GracePeriod::next_look`].
    Running,
    /// A session is running, and the grace period has ended.
    Over,
}

/// The program that a session runs. In a jail, the session's process is always `ims-jail-shell`, which would say
/// nothing to a reader of the log; the program is its child.
fn program_of(session: &Entry) -> Entry {
    const HELPER: &str = "ims-jail-shell";
    let children = || children(session.pid).into_iter().filter_map(Entry::read);
    let inside = if session.name == HELPER { children().find(|child| child.name != HELPER) } else { None };
    inside.unwrap_or_else(|| session.clone())
}

impl GracePeriod {
    /// Starts a wait of at most `grace`. `hung_up` are the shells that [`hang_up`](super::hang_up::hang_up) returned.
    pub(crate) fn start(grace: Duration, hung_up: Vec<Pid>) -> Self {
        let began = Instant::now();
        Self { began, deadline: began + grace, next_look: began, hung_up, watched: Vec::new() }
    }

    /// Decides whether the closing environment has to wait for `running`. `script` is true if the customization script
    /// is running.
    pub(crate) fn look(&mut self, running: Running, script: bool) -> Progress {
        let now = Instant::now();
        let Running { connections, mut sessions, unreaped, last_end } = running;
        if now >= self.began + HANG_UP_TIME {
            sessions.retain(|e| !self.hung_up.contains(&e.pid));
        }
        let watched = sessions.iter().chain(&connections).take(WATCHED);
        self.watched = watched.filter_map(|e| Handle::open(e.identity()).ok()).collect();
        let next = if !sessions.is_empty() || script {
            (self.began + HANG_UP_TIME).max(now + Duration::from_millis(100))
        } else if unreaped > 0 {
            now + NOTICE_TIME
        } else {
            // Wait for a client's next session only if a session has ended recently: a client may keep a connection
            // open for long without starting another session (ControlPersist).
            match last_end.map(|end| end + NEXT_SESSION_TIME) {
                Some(moment) if now < moment => moment,
                _ => return Progress::Idle,
            }
        };
        if now >= self.deadline {
            for session in sessions.iter().take(NAMED) {
                tracing::warn!(
                    pid = session.pid.as_raw(),
                    command = without_secrets(&program_of(session).command_line()),
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

    /// Descriptors that become readable when a watched session or connection ends.
    pub(crate) fn ends(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.watched.iter().map(|handle| handle.fd.as_fd())
    }
}
