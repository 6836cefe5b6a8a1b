//! Sessions of the environment, as their helpers report them. In plain mode there is no helper, and sessions are found
//! among the processes below sshd.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use base64::Engine;
use ring::digest::{SHA256, digest};
use serde::{Serialize, Serializer};

use crate::error::{Attempt, Result};
use crate::log::redaction::without_secrets;
use crate::session::report::{Packet, SOCKET};
use crate::sys::poll::Sources;
use crate::sys::process::Entry;
use crate::sys::seqpacket::{Listener, Packets};
use crate::sys::tree::Tree;

/// Number of descriptors that connections of sessions must leave free: about 34 are open for the environment itself, and
/// 16 during the grace period. Without a free one, the supervisor could neither read a mark nor end a process, and would
/// see no session in /proc.
const RESERVED: u64 = 64;

/// How long a connection without a session is remembered. `ControlPersist` keeps Ansible's connections open for a
/// minute.
const REMEMBERED: Duration = Duration::from_mins(10);

/// A session that is running. Its JSON is part of the status.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Session {
    /// PID of the session's first process: the helper, or in plain mode the shell or command.
    pub(crate) pid: i32,
    /// Address of the client.
    pub(crate) client: String,
    /// Port of the client; `None` if it is unknown.
    #[serde(skip)]
    pub(crate) port: Option<u16>,
    /// Fingerprint of the client's key, as sshd logs it; empty if it is unknown.
    pub(crate) key: String,
    /// True if the session has a terminal.
    pub(crate) terminal: bool,
    /// True for a shell on a terminal, started without a command.
    #[serde(skip)]
    pub(crate) interactive: bool,
    /// `shell`, `sftp`, or the command line with secrets masked.
    pub(crate) request: String,
    /// When the session began; in JSON as RFC 3339, in seconds.
    #[serde(serialize_with = "rfc3339")]
    pub(crate) since: SystemTime,
}

impl Session {
    /// Logs the beginning of the session. Only the first session of a connection is logged at a level that is shown by
    /// default: Ansible runs several sessions for each task.
    fn log_beginning(&self, is_first: bool) {
        let Self { pid, client, port, key, terminal, request, .. } = self;
        if is_first {
            tracing::info!(pid, client, port, key, terminal, request, "session begins");
        } else {
            tracing::debug!(pid, client, port, key, terminal, request, "session begins");
        }
    }

    /// Logs the end of the session. `how` is an exit code or the name of a signal, optionally with `: REASON`; `None`
    /// if that is unknown.
    fn log_end(&self, how: Option<&str>) {
        let seconds = self.since.elapsed().unwrap_or_default().as_secs_f64();
        let (how, reason) =
            how.map(|how| how.split_once(": ").map_or((how, None), |(how, why)| (how, Some(why)))).unzip();
        let exit: Option<i32> = how.and_then(|how| how.parse().ok());
        let signal = how.filter(|how| exit.is_none() && !how.is_empty());
        let Self { pid, client, port, .. } = self;
        let reason = reason.flatten();
        // Log a death by signal at the default level: the OOM killer may have sent the signal.
        if reason.is_some() || signal.is_some() {
            tracing::info!(pid, client, port, exit, signal, reason, seconds, "session ended");
        } else {
            tracing::debug!(pid, client, port, exit, seconds, "session ended");
        }
    }
}

fn rfc3339<S: Serializer>(time: &SystemTime, to: S) -> std::result::Result<S::Ok, S::Error> {
    to.collect_str(&humantime::format_rfc3339_seconds(*time))
}

/// Connection of a helper, or of a client that asks for the status.
struct Connection {
    packets: Packets,
    session: Option<Session>,
    /// How the session ended, once the helper has reported it.
    ended: Option<String>,
}

/// All sessions of the environment.
pub(crate) struct SessionList {
    listener: Listener,
    /// Connections by their descriptors.
    connections: BTreeMap<RawFd, Connection>,
    /// Sources that wake [`SessionList::receive`]: the connections by descriptor, and the listener as `None`.
    sources: Sources<Option<RawFd>>,
    /// Maximum number of connections; sessions beyond it are not logged.
    most_connections: usize,
    /// True once a connection has been refused: only the first refusal is logged.
    was_full: bool,
    /// Sessions without a helper, each with the start time of its first process.
    found: Vec<(Session, u64)>,
    /// Connections of clients, by address and port, each with the time of its last new session.
    clients: BTreeMap<(String, u16), Instant>,
    /// When a helper last reported the end of a session, however short.
    last_heard: Option<Instant>,
}

impl SessionList {
    /// Listens in the environment's state directory.
    pub(crate) fn listen(state: &Path) -> Result<Self> {
        let path = state.join(SOCKET);
        let attempted = || format!("listen at {}", path.display());
        let listener = Listener::bind(&path).attempt(attempted)?;
        let mut sources = Sources::new().attempt(attempted)?;
        sources.add(&listener, None).attempt(attempted)?;
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
        let most_connections = usize::try_from(limit.saturating_sub(RESERVED)).unwrap_or(usize::MAX).max(1);
        Ok(Self {
            listener,
            connections: BTreeMap::new(),
            sources,
            most_connections,
            was_full: false,
            found: Vec::new(),
            clients: BTreeMap::new(),
            last_heard: None,
        })
    }

    /// Sessions that are running now.
    pub(crate) fn sessions(&self) -> impl Iterator<Item = &Session> {
        self.connections.values().filter_map(|l| l.session.as_ref()).chain(self.found.iter().map(|(s, _)| s))
    }

    /// Returns whether the session whose first process is `leader` is an interactive shell.
    pub(crate) fn is_interactive(&self, leader: &Entry) -> bool {
        self.sessions().any(|session| session.interactive && session.pid == leader.pid.as_raw())
    }

    /// Returns whether a session of this client's connection has begun.
    pub(crate) fn has_begun(&self, client: &str, port: u16) -> bool {
        self.clients.contains_key(&(client.to_owned(), port))
            || self.sessions().any(|session| session.port == Some(port) && session.client == client)
    }

    /// When a helper last reported the end of a session.
    pub(crate) fn last_heard(&self) -> Option<Instant> {
        self.last_heard
    }

    /// Receives the reports of helpers. Returns the connections of clients that ask for the status.
    pub(crate) fn receive(&mut self) -> Vec<Packets> {
        let mut clients = Vec::new();
        loop {
            let ready = self.sources.wait(Duration::ZERO);
            if ready.is_empty() {
                return clients;
            }
            for number in ready {
                match number.and_then(|number| self.connections.get_mut(&number)).map(Connection::receive) {
                    None => self.accept(),
                    Some(Received::Beginning(session)) => {
                        session.log_beginning(self.is_first(&session));
                        let connection = number.and_then(|number| self.connections.get_mut(&number));
                        if let Some(connection) = connection {
                            connection.session = Some(session);
                        }
                    }
                    Some(Received::Report) => {}
                    Some(Received::StatusRequest) => clients.extend(self.remove(number)),
                    Some(Received::End) => {
                        self.remove(number);
                        self.last_heard = Some(Instant::now());
                    }
                }
            }
        }
    }

    /// Records the connection of a new session. Returns whether the session is the connection's first one, as far as is
    /// known.
    fn is_first(&mut self, session: &Session) -> bool {
        let Some(port) = session.port else { return true };
        let client = (session.client.clone(), port);
        let is_running = self.sessions().any(|other| other.port == session.port && other.client == session.client);
        self.clients.retain(|_, last| last.elapsed() < REMEMBERED);
        self.clients.insert(client, Instant::now()).is_none() && !is_running
    }

    fn accept(&mut self) {
        while let Some(packets) = self.listener.accept() {
            let number = packets.as_fd().as_raw_fd();
            if self.connections.len() < self.most_connections && self.sources.add(&packets, Some(number)).is_ok() {
                self.connections.insert(number, Connection { packets, session: None, ended: None });
            } else if !std::mem::replace(&mut self.was_full, true) {
                let most = self.most_connections;
                tracing::warn!(
                    "{most} sessions are open, as many as descriptors allow (ulimit -n): further ones are not logged"
                );
            }
        }
    }

    /// Removes a connection. The caller may keep the connection's descriptor open, so it is removed from the sources
    /// too.
    fn remove(&mut self, number: Option<RawFd>) -> Option<Packets> {
        let connection = self.connections.remove(&number?)?;
        self.sources.remove(&connection.packets);
        Some(connection.packets)
    }

    /// Logs the end of sessions that ended while the environment closed.
    pub(crate) fn close(mut self) {
        self.receive();
        self.compare(&[]);
    }

    /// Compares the known sessions with `leaders`, the first processes of the sessions found in plain mode, and logs
    /// which sessions began and ended.
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
            let (client, port) = client(&variable_of(leader, "SSH_CONNECTION").unwrap_or("unknown".into()));
            let session = Session {
                pid,
                client,
                port,
                key: key_of(leader).unwrap_or_default(),
                terminal: leader.terminal != 0,
                interactive: leader.terminal != 0 && leader.is_login_shell(),
                request: without_secrets(&leader.command_line()),
                since: SystemTime::now(),
            };
            session.log_beginning(self.is_first(&session));
            self.found.push((session, leader.start));
        }
    }
}

impl AsFd for SessionList {
    /// Readable when [`SessionList::receive`] has something to receive.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.sources.as_fd()
    }
}

/// Kind of a received packet.
enum Received {
    Beginning(Session),
    Report,
    StatusRequest,
    End,
}

impl Connection {
    /// Receives one packet, once the connection is readable.
    fn receive(&mut self) -> Received {
        match self.packets.receive().ok().flatten().as_deref().map(Packet::parse) {
            Some(Some(Packet::Begin(beginning))) => {
                let (client, port) = client(&beginning.client);
                return Received::Beginning(Session {
                    pid: self.packets.peer().map_or(0, nix::unistd::Pid::as_raw),
                    client,
                    port,
                    key: fingerprint(&beginning.credential).unwrap_or_default(),
                    terminal: beginning.terminal,
                    interactive: beginning.interactive,
                    request: without_secrets(&beginning.request),
                    since: SystemTime::now(),
                });
            }
            Some(Some(Packet::End(how))) => self.ended = Some(how),
            Some(Some(Packet::Status)) => return Received::StatusRequest,
            Some(None) => {}
            None => {
                if let Some(session) = &self.session {
                    session.log_end(Some(self.ended.as_deref().unwrap_or(": its helper died")));
                }
                return Received::End;
            }
        }
        Received::Report
    }
}

/// Value of the variable `name` that sshd gave a session.
fn variable_of(leader: &Entry, name: &str) -> Option<String> {
    let variables = std::fs::read(format!("/proc/{}/environ", leader.pid)).ok()?;
    let variables = String::from_utf8_lossy(&variables);
    variables.split('\0').find_map(|v| v.strip_prefix(name)?.strip_prefix('=')).map(str::to_owned)
}

/// Address and port of the client at the beginning of `SSH_CONNECTION`.
fn client(connection: &str) -> (String, Option<u16>) {
    let mut words = connection.split(' ');
    (words.next().unwrap_or_default().to_owned(), words.next().and_then(|port| port.parse().ok()))
}

/// Fingerprint of a session's key, from the file that sshd writes for the session (`ExposeAuthInfo`).
fn key_of(leader: &Entry) -> Option<String> {
    // Read through a Tree, which refuses anything but a regular file: the session may have put a fifo there.
    let text = Tree::open(Path::new("/")).ok()?.read(variable_of(leader, "SSH_USER_AUTH")?, 64 << 10).ok()?;
    fingerprint(String::from_utf8_lossy(&text).lines().next()?)
}

/// Fingerprint of the key in a line of `ExposeAuthInfo`, as sshd and `ssh-keygen -l` print it.
fn fingerprint(credential: &str) -> Option<String> {
    let key = credential.split_ascii_whitespace().nth(2)?;
    let raw = base64::engine::general_purpose::STANDARD.decode(key).ok()?;
    Some(format!("SHA256:{}", base64::engine::general_purpose::STANDARD_NO_PAD.encode(digest(&SHA256, &raw))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprint_is_that_of_ssh_keygen() {
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
