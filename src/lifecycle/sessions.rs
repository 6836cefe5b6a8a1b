//! Sessions at the close: who is told and hung up, and who may finish.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags};

use crate::lifecycle::secrets::without_secrets;
use crate::sshd::daemon::{Running, running};
use crate::sys::process::{Entry, Handle};
use crate::verdict::Verdict;

/// A shell that was hung up writes its history and goes; one that does not go by then is not waited for.
const HANG_UP_TIME: Duration = Duration::from_secs(2);

/// A client whose connection stands may be between two commands of one task, as Ansible is without pipelining; and sshd has an exit code to
/// send.
const QUIET_TIME: Duration = Duration::from_millis(250);

/// How often one looks whether sshd has noticed that a session has ended: of that no event tells.
const NOTICE_TIME: Duration = Duration::from_millis(10);

/// The wait for sessions to end.
pub struct Farewell {
    began: Instant,
    deadline: Instant,
    /// Leaders of sessions at a terminal, which were hung up.
    hung_up: Vec<Pid>,
    /// Since when no session is running, and each client could hear how its own has ended; nothing as long as that is not so.
    quiet_since: Option<Instant>,
    /// Their ends wake the event loop.
    watched: Vec<Handle>,
}

/// What the wait has come to.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// No session is running.
    Idle,
    /// Some are; look again at this moment at the latest.
    Until(Instant),
    /// Some are, and their time is up.
    Over,
}

/// Writes one line to every terminal at which there is a session. Returns the sessions' first processes.
pub fn tell_terminals(what: &str) -> Vec<Entry> {
    let mut sessions = running(None).sessions;
    sessions.retain(|e| e.terminal != 0);
    for path in sessions.iter().filter_map(Entry::terminal_path) {
        // Somebody may have stopped the terminal's output: not a reason to wait.
        let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
        let terminal = std::fs::OpenOptions::new().write(true).custom_flags(flags).open(path);
        let _ = terminal.and_then(|mut t| t.write_all(format!("\r\nims-sshd: {what}\r\n").as_bytes()));
    }
    sessions
}

/// Tells people at a terminal what comes, and hangs up as a lost line would. Returns whom.
pub fn hang_up(verdict: Verdict, grace: Duration) -> Vec<Pid> {
    let word = match verdict {
        Verdict::Complete => "marked complete and will be packed",
        Verdict::Failed => "marked failed and will not be packed",
    };
    let told = tell_terminals(&format!(
        "the image was {word}; this session ends now, commands without a terminal have {} s",
        grace.as_secs()
    ));
    for session in &told {
        session.signal(Signal::SIGHUP);
        session.signal(Signal::SIGCONT);
    }
    told.iter().map(|e| e.pid).collect()
}

impl Farewell {
    /// Waits for `grace` at the most. `hung_up` are those that [`hang_up`] told.
    pub fn start(grace: Duration, hung_up: Vec<Pid>) -> Self {
        let began = Instant::now();
        Self { began, deadline: began + grace, hung_up, quiet_since: None, watched: Vec::new() }
    }

    /// Looks at what is running. `script` says whether the customization script is.
    pub fn look(&mut self, listener: Option<Pid>, script: bool) -> Progress {
        let now = Instant::now();
        let Running { connections, mut sessions, unheard } = running(listener);
        if now >= self.began + HANG_UP_TIME {
            sessions.retain(|e| !self.hung_up.contains(&e.pid));
        }
        self.watched = sessions.iter().chain(&connections).filter_map(|e| Handle::open(e.identity()).ok()).collect();
        let next = if !sessions.is_empty() || script {
            self.quiet_since = None;
            (self.began + HANG_UP_TIME).max(now + Duration::from_millis(100))
        } else if unheard > 0 {
            self.quiet_since = None;
            now + NOTICE_TIME
        } else {
            let enough = *self.quiet_since.get_or_insert(now) + QUIET_TIME;
            // No connection, no next command.
            if connections.is_empty() || now >= enough {
                return Progress::Idle;
            }
            enough
        };
        if now >= self.deadline {
            for session in &sessions {
                tracing::warn!(
                    pid = session.pid.as_raw(),
                    command = without_secrets(&session.command_line()),
                    "its time is up"
                );
            }
            return Progress::Over;
        }
        Progress::Until(next.min(self.deadline))
    }

    /// Readable when one of the sessions or connections has ended.
    pub fn ends(&self) -> impl Iterator<Item = PollFd<'_>> {
        self.watched.iter().map(|h| PollFd::from_borrowed_fd(h.fd.as_fd(), PollFlags::IN))
    }
}
