//! Who is in the environment: sessions as their helpers tell of them, and as they are found where no helper is (plain mode).

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use base64::Engine;
use serde_json::{Value, json};
use sha2::Digest;

use crate::error::{Attempt, Result};
use crate::log::redaction::without_secrets;
use crate::session::report::{Packet, SOCKET};
use crate::sys::poll::Sources;
use crate::sys::process::Entry;
use crate::sys::seqpacket::{Listener, Packets};
use crate::sys::tree::Tree;

/// So many descriptors this process keeps for everything else: without one it could neither look for a mark nor end a process.
const RESERVED: u64 = 48;

/// A session that is running.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    /// Its first process: the helper, or in plain mode the shell or command.
    pub(crate) pid: i32,
    /// The client's address.
    pub(crate) client: String,
    /// The fingerprint of its key, as sshd logs it; empty where it is not known.
    pub(crate) key: String,
    /// Whether there is a terminal.
    pub(crate) terminal: bool,
    /// Whether it is a shell at a terminal, without a command of the client's.
    pub(crate) interactive: bool,
    /// `shell`, `sftp`, or the command line, without what looks like a secret.
    pub(crate) request: String,
    /// When it began.
    pub(crate) since: SystemTime,
}

impl Session {
    fn to_json(&self) -> Value {
        json!({
            "pid": self.pid,
            "client": self.client,
            "key": self.key,
            "terminal": self.terminal,
            "request": self.request,
            "since": humantime::format_rfc3339_seconds(self.since).to_string(),
        })
    }

    fn log_beginning(&self) {
        tracing::info!(
            pid = self.pid,
            client = self.client,
            key = self.key,
            terminal = self.terminal,
            request = self.request,
            "session begins"
        );
    }

    /// Logs its end: an exit code, the name of a signal, each perhaps with a reason, or nothing where that is not known.
    fn log_end(&self, how: Option<&str>) {
        let seconds = self.since.elapsed().unwrap_or_default().as_secs_f64();
        let (how, reason) =
            how.map(|how| how.split_once(": ").map_or((how, None), |(how, why)| (how, Some(why)))).unzip();
        let exit: Option<i32> = how.and_then(|how| how.parse().ok());
        let signal = how.filter(|how| exit.is_none() && !how.is_empty());
        let reason = reason.flatten();
        tracing::info!(pid = self.pid, client = self.client, exit, signal, reason, seconds, "session ended");
    }
}

/// One line to a helper, or to somebody who asks for the status.
struct Line {
    packets: Packets,
    session: Option<Session>,
    /// How the session ended, once that was told.
    ended: Option<String>,
}

/// All who are there.
pub(crate) struct Presence {
    listener: Listener,
    /// By their descriptors.
    lines: BTreeMap<RawFd, Line>,
    /// The lines, and the listener as `None`.
    sources: Sources<Option<RawFd>>,
    /// Maximum number of lines held at once; sessions beyond it are not noticed.
    most_lines: usize,
    /// True once lines were refused and the log has said so.
    was_full: bool,
    /// Sessions without a helper, by number and start of their first process.
    found: Vec<(Session, u64)>,
    /// When a session was last heard to end, however short it was.
    last_heard: Option<Instant>,
}

impl Presence {
    /// Listens in the environment's state folder.
    pub(crate) fn listen(state: &Path) -> Result<Self> {
        let path = state.join(SOCKET);
        let attempted = || format!("listen at {}", path.display());
        let listener = Listener::bind(&path).attempt(attempted)?;
        let mut sources = Sources::new().attempt(attempted)?;
        sources.add(&listener, None).attempt(attempted)?;
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
        let most_lines = usize::try_from(limit.saturating_sub(RESERVED)).unwrap_or(usize::MAX).max(1);
        let (lines, found) = (BTreeMap::new(), Vec::new());
        Ok(Self { listener, lines, sources, most_lines, was_full: false, found, last_heard: None })
    }

    /// Sessions that are running now.
    pub(crate) fn sessions(&self) -> impl Iterator<Item = &Session> {
        self.lines.values().filter_map(|l| l.session.as_ref()).chain(self.found.iter().map(|(s, _)| s))
    }

    /// Whether the session whose first process is `leader` is an interactive shell.
    pub(crate) fn is_interactive(&self, leader: &Entry) -> bool {
        self.sessions().any(|session| session.interactive && session.pid == leader.pid.as_raw())
    }

    /// Sessions that are running now, for the status.
    pub(crate) fn to_json(&self) -> Value {
        self.sessions().map(Session::to_json).collect()
    }

    /// When a session was last heard to end.
    pub(crate) fn last_heard(&self) -> Option<Instant> {
        self.last_heard
    }

    /// Hears what helpers tell, and returns whether somebody asked for the status.
    pub(crate) fn look(&mut self) -> Vec<Packets> {
        let mut asking = Vec::new();
        loop {
            let ready = self.sources.wait(Duration::ZERO);
            if ready.is_empty() {
                return asking;
            }
            for number in ready {
                match number.and_then(|number| self.lines.get_mut(&number)).map(Line::hear) {
                    None => self.accept(),
                    Some(Heard::News) => {}
                    Some(Heard::Question) => asking.extend(self.forget(number)),
                    Some(Heard::End) => {
                        self.forget(number);
                        self.last_heard = Some(Instant::now());
                    }
                }
            }
        }
    }

    fn accept(&mut self) {
        while let Some(packets) = self.listener.accept() {
            let number = packets.as_fd().as_raw_fd();
            if self.lines.len() < self.most_lines && self.sources.add(&packets, Some(number)).is_ok() {
                self.lines.insert(number, Line { packets, session: None, ended: None });
            } else if !std::mem::replace(&mut self.was_full, true) {
                let most = self.most_lines;
                tracing::warn!(
                    "{most} sessions are open: further ones are not logged, for lack of descriptors (ulimit -n)"
                );
            }
        }
    }

    /// Removes a line, which is no source any more even while its descriptor is open.
    fn forget(&mut self, number: Option<RawFd>) -> Option<Packets> {
        let line = self.lines.remove(&number?)?;
        self.sources.remove(&line.packets);
        Some(line.packets)
    }

    /// Logs the end of those that the close has ended.
    pub(crate) fn close(mut self) {
        self.look();
        self.compare(&[]);
    }

    /// Compares with the first processes of all sessions, as they are found in plain mode: logs who has come and gone.
    pub(crate) fn compare(&mut self, leaders: &[Entry]) {
        let gone = |(session, start): &(Session, u64)| {
            !leaders.iter().any(|e| e.pid.as_raw() == session.pid && e.start == *start)
        };
        for (session, _) in self.found.extract_if(.., |found| gone(found)) {
            session.log_end(None);
        }
        for leader in leaders {
            let pid = leader.pid.as_raw();
            if self.found.iter().any(|(s, start)| s.pid == pid && *start == leader.start) {
                continue;
            }
            let session = Session {
                pid,
                client: variable_of(leader, "SSH_CONNECTION").map_or("unknown".into(), |c| first_word(&c)),
                key: key_of(leader).unwrap_or_default(),
                terminal: leader.terminal != 0,
                interactive: leader.terminal != 0 && leader.is_login_shell(),
                request: without_secrets(&leader.command_line()),
                since: SystemTime::now(),
            };
            session.log_beginning();
            self.found.push((session, leader.start));
        }
    }
}

impl AsFd for Presence {
    /// Readable when there is something to [`Presence::look`] at.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.sources.as_fd()
    }
}

enum Heard {
    News,
    Question,
    End,
}

impl Line {
    /// Takes one packet, which has come.
    fn hear(&mut self) -> Heard {
        match self.packets.receive().ok().flatten().as_deref().map(Packet::parse) {
            Some(Some(Packet::Begin(beginning))) => {
                let session = Session {
                    pid: self.packets.peer().map_or(0, nix::unistd::Pid::as_raw),
                    client: beginning.client,
                    key: fingerprint(&beginning.credential).unwrap_or_default(),
                    terminal: beginning.terminal,
                    interactive: beginning.interactive,
                    request: without_secrets(&beginning.request),
                    since: SystemTime::now(),
                };
                session.log_beginning();
                self.session = Some(session);
            }
            Some(Some(Packet::End(how))) => self.ended = Some(how),
            Some(Some(Packet::Status)) => return Heard::Question,
            Some(None) => {}
            None => {
                if let Some(session) = &self.session {
                    session.log_end(Some(self.ended.as_deref().unwrap_or(": its helper died")));
                }
                return Heard::End;
            }
        }
        Heard::News
    }
}

/// What sshd gave a session as `name`.
fn variable_of(leader: &Entry, name: &str) -> Option<String> {
    let variables = std::fs::read(format!("/proc/{}/environ", leader.pid)).ok()?;
    let variables = String::from_utf8_lossy(&variables);
    variables.split('\0').find_map(|v| v.strip_prefix(name)?.strip_prefix('=')).map(str::to_owned)
}

fn first_word(text: &str) -> String {
    text.split(' ').next().unwrap_or_default().to_owned()
}

/// By the file in which sshd tells a session what it authenticated with.
fn key_of(leader: &Entry) -> Option<String> {
    // As a tree: the session may have put something there that one would wait for.
    let told = Tree::open(Path::new("/")).ok()?.read(variable_of(leader, "SSH_USER_AUTH")?, 64 << 10).ok()?;
    fingerprint(String::from_utf8_lossy(&told).lines().next()?)
}

/// The fingerprint of a key in a line of `ExposeAuthInfo`, as sshd and `ssh-keygen -l` print it.
fn fingerprint(credential: &str) -> Option<String> {
    let key = credential.split_ascii_whitespace().nth(2)?;
    let raw = base64::engine::general_purpose::STANDARD.decode(key).ok()?;
    let digest = sha2::Sha256::digest(raw);
    Some(format!("SHA256:{}", base64::engine::general_purpose::STANDARD_NO_PAD.encode(digest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_the_one_that_ssh_keygen_prints() {
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key");
        let keygen = |arguments: &[&str]| {
            let output = std::process::Command::new("ssh-keygen").args(arguments).arg(&key).output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        keygen(&["-q", "-t", "ed25519", "-N", "", "-f"]);
        let public = std::fs::read_to_string(key.with_extension("pub")).unwrap();
        let printed = keygen(&["-l", "-f"]);
        let ours = fingerprint(&format!("publickey {public}")).unwrap();
        assert!(printed.contains(&ours), "{printed} {ours}");
        assert_eq!(fingerprint("password"), None);
    }
}
