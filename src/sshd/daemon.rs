//! The sshd process: starting it, finding it after it has gone into the background, waiting until it listens.

use std::collections::{HashMap, HashSet};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid};
use rustix::net::sockopt::socket_acceptconn;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::error::{Attempt, Error, Result};
use crate::sshd;
use crate::sshd::audit;
use crate::sshd::effective::Effective;
use crate::sshd::login_shell::LoginShell;
use crate::sshd::options::Options;
use crate::sys::process::{Entry, Identity, children, output_within, reap};
use crate::sys::umask;

/// The listening sshd. Connections and sessions survive its end.
#[derive(Debug)]
pub struct Daemon {
    /// PID of the listener.
    pub(crate) pid: Pid,
    /// Start time of the listener, as in [`Entry::start`].
    start: u64,
}

/// Timeout for listening; it normally takes milliseconds.
const TIME_TO_LISTEN: Duration = Duration::from_secs(10);

impl Daemon {
    /// Starts `sshd $SSHD_OPTIONS` with `shell` as root's login shell, and waits until it listens on all configured
    /// addresses that this machine has. This process must be PID 1 or a subreaper, so that the daemon becomes its
    /// child.
    pub(crate) fn start(options: &Options, effective: &Effective, shell: Option<&LoginShell>) -> Result<Self> {
        let line = format!("sshd {}", shell_words::join(&options.words));
        let attempted = || format!("start {line}");
        let log_start = options.log.as_deref().and_then(|log| std::fs::metadata(log).ok()).map_or(0, |m| m.len());
        let complaint = |said: String| {
            let log = options.log.as_deref().map(|log| last_lines(log, log_start)).filter(|t| !t.is_empty());
            let said =
                [Some(said).filter(|s| !s.is_empty()), log].into_iter().flatten().collect::<Vec<_>>().join(" | ");
            let error = Error::new(attempted());
            if said.is_empty() {
                error.because("it ended without a message").advise("add -E FILE to SSHD_OPTIONS to see why")
            } else {
                error.because(said)
            }
        };
        // Remember the sshd children that exist before the start, which are not the new listener: connections of an
        // earlier listener outlive it, and this process adopts them.
        let before = Self::children();
        let mut command = Command::new(sshd::program()?);
        // Sessions get this umask from sshd, which adds 022.
        umask::with_callers(&mut command);
        command.args(&options.words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // Start sshd from a thread of its own: the mount namespace and seccomp filter are for sshd only.
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
                    // sshd never binds an address that the machine lacks; it binds the others within moments.
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

    /// sshd processes in the background: session leaders that are children of this process.
    fn children() -> Vec<Entry> {
        let mut own: Vec<_> = children(getpid()).into_iter().filter_map(Entry::read).collect();
        own.retain(|e| e.session == e.pid && e.name.starts_with("sshd") && !e.has_ended());
        own
    }

    /// Records PID and start time in the file `path`, for an environment started after this one was killed.
    pub(crate) fn record(&self, path: &Path) -> Result<()> {
        let identity = Identity { pid: self.pid.as_raw(), start: self.start };
        std::fs::write(path, identity.to_string()).attempt(|| format!("write {}", path.display()))
    }

    /// The listener recorded in the file `path`, if it is still running. A zombie, which its parent does not reap,
    /// counts as ended.
    pub fn recorded(path: &Path) -> Option<Entry> {
        let recorded = Identity::parse(&std::fs::read_to_string(path).ok()?)?;
        Entry::read(Pid::from_raw(recorded.pid)).filter(|e| e.identity() == recorded && !e.has_ended())
    }

    /// Every sshd process that has this log open, listener or connection. Before this environment starts sshd, such
    /// processes belong to an earlier environment.
    pub(crate) fn with_log(log: &Path) -> Vec<Entry> {
        // The log may have been removed while the processes keep it open.
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

    /// The last lines of sshd's log, joined into one; empty if sshd does not log to a file.
    pub(crate) fn last_words(options: &Options) -> String {
        let log = options.log.as_deref();
        log.map_or(String::new(), |log| {
            let length = std::fs::metadata(log).map_or(0, |m| m.len());
            last_lines(log, length.saturating_sub(2048))
        })
    }

    /// Ends the listener, so that no new connection is accepted. Existing connections stay.
    pub(crate) fn stop_listening(&self) {
        let _ = kill(self.pid, Signal::SIGTERM);
    }
}

/// Number of sockets the process listens on. Reading the tables in /proc/PID/net takes the kernel milliseconds.
fn listening_sockets(pid: Pid) -> usize {
    let Ok(descriptors) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return 0 };
    let sockets: Vec<(RawFd, String)> = descriptors
        .filter_map(|fd| {
            let fd = fd.ok()?;
            let target = std::fs::read_link(fd.path()).ok()?;
            let inode = target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
            Some((fd.file_name().to_str()?.parse().ok()?, inode.to_owned()))
        })
        .collect();
    let copies = copies_of(pid, sockets.iter().map(|(descriptor, _)| *descriptor));
    if let Ok(copies) = copies {
        return copies.iter().filter(|copy| socket_acceptconn(copy).is_ok_and(|listens| listens)).count();
    }
    ["tcp", "tcp6"]
        .into_iter()
        .filter_map(|table| std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).ok())
        .map(|table| listening_inodes(&table).filter(|inode| sockets.iter().any(|(_, own)| own == inode)).count())
        .sum()
}

/// Copies of descriptors of a process (pidfd_getfd(2)). Many containers do not allow that.
fn copies_of(pid: Pid, descriptors: impl Iterator<Item = RawFd>) -> io::Result<Vec<OwnedFd>> {
    let raw = rustix::process::Pid::from_raw(pid.as_raw()).ok_or(io::ErrorKind::NotFound)?;
    let process = pidfd_open(raw, PidfdFlags::empty())?;
    descriptors.map(|number| Ok(pidfd_getfd(&process, number, PidfdGetfdFlags::empty())?)).collect()
}

/// Inodes of sockets in state LISTEN (0A) in /proc/net/tcp (proc(5)).
fn listening_inodes(table: &str) -> impl Iterator<Item = &str> {
    table.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        (fields.nth(3)? == "0A").then(|| fields.nth(5))?
    })
}

/// The last lines appended to `log` after offset `start`, joined into one.
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

/// Processes that currently serve clients.
#[derive(Debug, Default)]
pub(crate) struct Running {
    /// One process per connection (two for some), with or without an open session.
    pub(crate) connections: Vec<Entry>,
    /// The first process of each session: the login shell, command, `ims-jail-shell` or internal sftp server.
    pub(crate) sessions: Vec<Entry>,
    /// Ended sessions that sshd has not reaped yet, so that their clients do not know of the end yet.
    pub(crate) unreaped: usize,
    /// Last end of a session whose connection still exists, as precisely as polling shows.
    pub(crate) last_end: Option<Instant>,
}

/// The clients of an sshd, tracked from one poll to the next.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    /// For each connection: its children's page faults at the last poll, and when they last increased.
    connections: HashMap<Identity, (u64, Option<Instant>)>,
    /// Children of this process that are not sshd, such as daemons left behind by sessions; there may be thousands.
    strangers: HashSet<Pid>,
}

impl Clients {
    /// Processes below this one that serve clients. Sessions are children of connections; connections of a listener
    /// that has ended count too.
    pub(crate) fn look(&mut self, listener: Option<Pid>) -> Running {
        let mut running = Running::default();
        let mut before = std::mem::take(&mut self.connections);
        for entry in self.sshds_with_children().into_iter().filter(|e| Some(e.pid) != listener) {
            let within_sshd = entry.parent != getpid();
            let is_sshd = entry.name.starts_with("sshd");
            if entry.has_ended() {
                running.unreaped += usize::from(within_sshd && Some(entry.parent) != listener);
            } else if within_sshd && (!is_sshd || entry.command_line().ends_with("@internal-sftp")) {
                running.sessions.push(entry);
            } else if is_sshd {
                // More page faults of children show that sshd has reaped a session since the last poll, even a very
                // short one.
                let (faults, last_end) = before.remove(&entry.identity()).unwrap_or((0, None));
                let last_end = if entry.faults_of_children > faults { Some(Instant::now()) } else { last_end };
                running.last_end = running.last_end.max(last_end);
                self.connections.insert(entry.identity(), (entry.faults_of_children, last_end));
                running.connections.push(entry);
            }
        }
        running
    }

    /// Every sshd below this process, and its children. Descendants of sessions are skipped: there may be any number.
    fn sshds_with_children(&mut self) -> Vec<Entry> {
        let mut found = Vec::new();
        let mut seen = HashSet::new();
        // A walk may miss a connection whose listener ends during the walk. This process has then adopted the
        // connection, and the next walk finds it.
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
    fn only_sockets_in_state_listen_count() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
                     0: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 x\n   \
                     1: 0100007F:0016 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 x\n";
        assert_eq!(listening_inodes(table).collect::<Vec<_>>(), ["4711"]);
    }

    #[test]
    fn recorded_listener_that_nobody_reaps_does_not_run() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed());
        let dir = tempfile::tempdir().unwrap();
        let record = dir.path().join("sshd");
        let daemon = Daemon { pid, start: Entry::read(pid).unwrap().start };
        daemon.record(&record).unwrap();
        assert_eq!(Daemon::recorded(&record).unwrap().pid, pid);
        drop(child.stdin.take());
        nix::sys::wait::waitid(
            nix::sys::wait::Id::Pid(pid),
            nix::sys::wait::WaitPidFlag::WEXITED | nix::sys::wait::WaitPidFlag::WNOWAIT,
        )
        .unwrap();
        assert!(Daemon::recorded(&record).is_none());
        child.wait().unwrap();
    }

    #[test]
    fn only_lines_added_to_a_log_are_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        std::fs::write(&log, "old\nnew one\n\nnew two\n").unwrap();
        assert_eq!(last_lines(&log, 4), "new one, new two");
    }
}
