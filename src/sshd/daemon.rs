//! sshd's process: started as it is told, found again after it went into the background, waited for until it listens.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid};

use crate::error::{Attempt, Error, Result};
use crate::sshd;
use crate::sshd::audit;
use crate::sshd::effective::Effective;
use crate::sshd::login_shell::LoginShell;
use crate::sshd::options::Options;
use crate::sys::process::{Entry, Identity, children, output_within, reap};

/// The listening sshd. Its connections and sessions go on when it ends.
#[derive(Debug)]
pub struct Daemon {
    /// Its number.
    pub pid: Pid,
    /// When it started, as [`Entry::start`].
    start: u64,
}

/// sshd listens some milliseconds after it was started, or never.
const TIME_TO_LISTEN: Duration = Duration::from_secs(10);

impl Daemon {
    /// Starts `sshd $SSHD_OPTIONS`, which finds `shell` for root, and waits until it listens on all addresses of its configuration that
    /// this machine has. This process has to be a subreaper (or PID 1), whose child the daemon becomes.
    pub fn start(options: &Options, effective: &Effective, shell: Option<&LoginShell>) -> Result<Self> {
        let line = format!("sshd {}", shell_words::join(&options.words));
        let attempted = || format!("start {line}");
        let log_start = options.log.as_deref().and_then(|log| std::fs::metadata(log).ok()).map_or(0, |m| m.len());
        let complaint = |said: String| {
            let log = options.log.as_deref().map(|log| last_lines(log, log_start)).filter(|t| !t.is_empty());
            let said =
                [Some(said).filter(|s| !s.is_empty()), log].into_iter().flatten().collect::<Vec<_>>().join(" | ");
            let error = Error::new(attempted());
            if said.is_empty() {
                error.because("it ended without a word").advise("give it -E FILE in SSHD_OPTIONS to see why")
            } else {
                error.because(said)
            }
        };
        // What is there before is not the listener: connections outlive theirs, and are then children of this process too.
        let before = Self::children();
        let mut command = Command::new(sshd::program()?);
        command.args(&options.words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // By a thread of its own, whose mounts and system calls are others' where sshd's have to be.
        let started = std::thread::scope(|scope| {
            let start = || {
                shell.map_or(Ok(()), LoginShell::put_in_place)?;
                audit::hide_from_sshd()?;
                let sshd = command.spawn().attempt(attempted)?;
                output_within(sshd, sshd::TIME_LIMIT).attempt(attempted)?.ok_or_else(|| sshd::late(attempted()))
            };
            scope.spawn(start).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        if !started.status.success() {
            return Err(complaint(one_line(&String::from_utf8_lossy(&started.stderr))));
        }
        let began = Instant::now();
        let mut first_seen = None;
        loop {
            let daemon =
                Self::children().into_iter().filter(|e| !before.iter().any(|b| b.pid == e.pid)).max_by_key(|e| e.start);
            let Some(daemon) = daemon else {
                reap();
                return Err(complaint(String::new()));
            };
            match listening_sockets(daemon.pid) {
                0 => {}
                sockets => {
                    // An address that the machine does not have is never bound; the others are within a moment of each other.
                    let since = *first_seen.get_or_insert_with(Instant::now);
                    if sockets >= effective.listen_addresses() || since.elapsed() > Duration::from_millis(200) {
                        return Ok(Self { pid: daemon.pid, start: daemon.start });
                    }
                }
            }
            if began.elapsed() > TIME_TO_LISTEN {
                let _ = kill(daemon.pid, Signal::SIGKILL);
                return Err(complaint(format!("it does not listen after {} s", TIME_TO_LISTEN.as_secs())));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// sshds in the background: each leads a session of its own and is this process's child.
    fn children() -> Vec<Entry> {
        let mut own: Vec<_> = children(getpid()).into_iter().filter_map(Entry::read).collect();
        own.retain(|e| e.session == e.pid && e.name.starts_with("sshd") && !e.has_ended());
        own
    }

    /// Writes down which process it is, for an environment that has to go on after this one was killed.
    pub fn note(&self, path: &Path) -> Result<()> {
        let identity = Identity { pid: self.pid.as_raw(), start: self.start };
        std::fs::write(path, identity.to_string()).attempt(|| format!("write {}", path.display()))
    }

    /// The listener that was noted at `path`, if it is still there.
    pub fn noted(path: &Path) -> Option<Entry> {
        let noted = Identity::parse(&std::fs::read_to_string(path).ok()?)?;
        Entry::read(Pid::from_raw(noted.pid)).filter(|e| e.identity() == noted)
    }

    /// Every sshd that has this log open, listener or connection: those of an earlier environment as long as this one has started none.
    pub fn with_log(log: &Path) -> Vec<Entry> {
        // A log that was removed since is still theirs.
        let removed = PathBuf::from(format!("{} (deleted)", log.display()));
        let is_open = |entry: &Entry| {
            std::fs::read_dir(format!("/proc/{}/fd", entry.pid)).is_ok_and(|mut descriptors| {
                descriptors.any(|fd| {
                    fd.and_then(|fd| std::fs::read_link(fd.path())).is_ok_and(|file| file == log || file == removed)
                })
            })
        };
        Entry::all().into_iter().filter(|e| e.name.starts_with("sshd") && is_open(e)).collect()
    }

    /// What sshd logged last, as one line; empty if it logs to no file.
    pub fn last_words(options: &Options) -> String {
        let log = options.log.as_deref();
        log.map_or(String::new(), |log| {
            let length = std::fs::metadata(log).map_or(0, |m| m.len());
            last_lines(log, length.saturating_sub(2048))
        })
    }

    /// Ends the listener, so that nobody new gets in. Connections stay.
    pub fn stop_listening(&self) {
        let _ = kill(self.pid, Signal::SIGTERM);
    }
}

/// How many sockets the process listens on.
fn listening_sockets(pid: Pid) -> usize {
    let Ok(descriptors) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return 0 };
    let inodes: Vec<String> = descriptors
        .filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok())
        .filter_map(|target| Some(target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    ["tcp", "tcp6"]
        .into_iter()
        .filter_map(|table| std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).ok())
        .map(|table| listening_inodes(&table).filter(|inode| inodes.iter().any(|own| own == inode)).count())
        .sum()
}

/// Inodes of the sockets in /proc/net/tcp (proc(5)) that are in state LISTEN, 0A.
fn listening_inodes(table: &str) -> impl Iterator<Item = &str> {
    table.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        (fields.nth(3)? == "0A").then(|| fields.nth(5))?
    })
}

/// The last lines that were added to `log` after its first `start` bytes, as one line.
fn last_lines(log: &Path, start: u64) -> String {
    let mut text = Vec::new();
    let _ = std::fs::File::open(log).and_then(|mut f| {
        f.seek(SeekFrom::Start(start))?;
        f.take(64 << 10).read_to_end(&mut text)
    });
    let text = String::from_utf8_lossy(&text).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    one_line(&lines[lines.len().saturating_sub(5)..].join("\n"))
}

fn one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join(", ")
}

/// Processes that sshd runs for clients at one moment.
#[derive(Debug, Default)]
pub struct Running {
    /// One process a connection (two for some), whether or not a session is open on it.
    pub connections: Vec<Entry>,
    /// The first process of each session: the login shell, command, `ims-jail-shell` or internal sftp server.
    pub sessions: Vec<Entry>,
    /// Sessions of whose end sshd has taken no note yet, and so neither have their clients.
    pub unheard: usize,
    /// When a session has ended last whose connection stands, as far as the looks tell.
    pub last_end: Option<Instant>,
}

/// The clients of an sshd, as they are seen from one look to the next.
#[derive(Debug, Default)]
pub struct Clients {
    /// Connections: what they had waited for at the last look, and when that was more than at the look before.
    connections: HashMap<Identity, (u64, Option<Instant>)>,
    /// Children of this process that are no sshd, such as what sessions have left behind: there can be thousands of them.
    strangers: HashSet<Pid>,
}

impl Clients {
    /// Processes below this one that serve clients. Sessions are children of connections; those of a listener that has
    /// ended count too.
    pub fn look(&mut self, listener: Option<Pid>) -> Running {
        let mut running = Running::default();
        let mut before = std::mem::take(&mut self.connections);
        for entry in self.sshds_with_children().into_iter().filter(|e| Some(e.pid) != listener) {
            let within_sshd = entry.parent != getpid();
            let is_sshd = entry.name.starts_with("sshd");
            if entry.has_ended() {
                running.unheard += usize::from(within_sshd && Some(entry.parent) != listener);
            } else if within_sshd && (!is_sshd || entry.command_line().ends_with("@internal-sftp")) {
                running.sessions.push(entry);
            } else if is_sshd {
                // However short a session was: sshd has waited for its process.
                let (faults, last_end) = before.remove(&entry.identity()).unwrap_or((0, None));
                let last_end = if entry.faults_of_children > faults { Some(Instant::now()) } else { last_end };
                running.last_end = running.last_end.max(last_end);
                self.connections.insert(entry.identity(), (entry.faults_of_children, last_end));
                running.connections.push(entry);
            }
        }
        running
    }

    /// Every sshd below this process and the children of each. What sessions have started is not walked: it can be any number of
    /// processes.
    fn sshds_with_children(&mut self) -> Vec<Entry> {
        let mut found = Vec::new();
        let mut seen = HashSet::new();
        // A connection whose listener ends during a walk may be missed, in a list that was read before and in one that is gone: it is a
        // child of this process then, and found by the next walk.
        for _ in 0..10 {
            let mut parents = vec![getpid()];
            let before = seen.len();
            while let Some(parent) = parents.pop() {
                let own = parent == getpid();
                let mut listed = children(parent);
                if own {
                    let all: HashSet<_> = listed.iter().copied().collect();
                    self.strangers.retain(|pid| all.contains(pid));
                    listed.retain(|pid| !self.strangers.contains(pid));
                }
                for pid in listed {
                    let Some(entry) = Entry::read(pid) else { continue };
                    let is_sshd = entry.name.starts_with("sshd");
                    if is_sshd {
                        parents.push(pid);
                    } else if own {
                        self.strangers.insert(pid);
                        continue;
                    }
                    if seen.insert(pid) {
                        found.push(entry);
                    }
                }
            }
            if seen.len() == before {
                break;
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_sockets_are_told_from_others() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
                     0: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 x\n   \
                     1: 0100007F:0016 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 x\n";
        assert_eq!(listening_inodes(table).collect::<Vec<_>>(), ["4711"]);
    }

    #[test]
    fn only_what_was_added_to_a_log_is_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        std::fs::write(&log, "old\nnew one\n\nnew two\n").unwrap();
        assert_eq!(last_lines(&log, 4), "new one, new two");
    }
}
