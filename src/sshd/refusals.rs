//! Refused logins, copied from sshd's log into ours: people read the pod's log, while sshd's is a file in the
//! container.
//!
//! sshd writes several lines for a connection, the last one when the connection ends. That last line is logged, with
//! the reason from an earlier line. Connections without a login attempt (probes, port scanners) are not logged. sshd
//! may also end an accepted login before its session begins; the client does not see that reason either. Such a login
//! is recognized as follows: no session is reported for it, and either its connection is gone without a line that names
//! the client, or sshd has logged a reason before that line.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use crate::sys::tree::Tree;

/// Maximum number of bytes of sshd's log in one read.
const LONGEST_READ: usize = 64 << 10;

/// Maximum number of refusals logged per [`PERIOD`]. The rest are only counted, so that password guessing does not fill
/// the node's disk.
const MOST_LINES: u64 = 10;
const PERIOD: Duration = Duration::from_mins(1);

/// sshd's message when a client has exceeded `MaxAuthTries`.
const TOO_MANY: &str = "Too many authentication failures";

/// Reason for a login that sshd refuses because the account is locked; no key helps.
const LOCKED: &str = "the account is locked ('!' in /etc/shadow where sshd runs); there, 'usermod -p \"*\" USER' lets \
    keys in without a password";

/// Prefixes of the lines with which a child of sshd ends a session that has not begun (OpenSSH's session.c, uidswap.c,
/// auth-pam.c, audit-linux.c). If short sessions are not reported, only these lines distinguish such an end from the
/// end of a short session.
const ENDS_SESSION: [&str; 10] = [
    "linux_audit_write_entry failed",
    "PAM: pam_setcred(): ",
    "PAM: pam_open_session(): ",
    "safely_chroot: ",
    "bad ownership or modes for chroot directory",
    "chroot(",
    "setgid",
    "initgroups: ",
    "permanently_set_uid: ",
    "unable to set user context",
];

/// Prefixes of lines that are no reason for the end of a login: debugging, records of logins that cannot be written,
/// configuration that a connection reads again, scanners of ports, sessions at LogLevel VERBOSE, and the end of sshd
/// and of idle connections when the environment closes.
const NO_REASON: [&str; 11] = [
    "debug",
    "kex_",
    "syslogin_perform_logout",
    "lastlog_",
    "rexec line ",
    "subsystem request for ",
    "User child is on pid ",
    "Starting session: ",
    "Close session: ",
    "Received signal ",
    "Exiting on signal ",
];

/// Maximum number of accepted logins that are followed at the same time.
const MOST_ACCEPTED: usize = 256;

/// A line of sshd's log that concerns logins.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    /// Why a login is about to be refused, with its user if the line names one.
    Reason(Option<&'a str>, String),
    /// A connection ended before a login was accepted.
    Refused(Refusal<'a>),
    /// A login was accepted, with user and client.
    Accepted(&'a str, (&'a str, u16)),
    /// The connection of this client has ended.
    Disconnected((&'a str, u16)),
    /// Any other line, which may be the reason why an accepted login ended.
    Other(&'a str),
}

#[derive(Debug, PartialEq, Eq)]
struct Refusal<'a> {
    user: Option<&'a str>,
    client: Option<(&'a str, u16)>,
    reason: Option<&'a str>,
}

/// Parses a line. A user name comes from the client and may imitate the rest of a line, so addresses are searched from
/// the end.
fn parse(line: &str) -> Option<Line<'_>> {
    let whole = line.trim_end();
    let line = whole.strip_suffix(" [preauth]").unwrap_or(whole);
    let reason = |user, text: &str| Some(Line::Reason(user, text.to_owned()));
    let refused = |user, client, reason| Some(Line::Refused(Refusal { user, client, reason }));
    if let Some(who) = line.strip_prefix("Accepted ").and_then(|rest| rest.split_once(" for ")) {
        let (user, client) = address(who.1.split_once(" ssh2").map_or(who.1, |(who, _)| who))?;
        return Some(Line::Accepted(user.strip_suffix(" from").unwrap_or(user), client));
    }
    if let Some(why) = line.strip_prefix("Authentication refused: ") {
        return reason(None, why);
    }
    if line.starts_with("ROOT LOGIN REFUSED FROM ") {
        return reason(Some("root"), "PermitRootLogin does not allow it");
    }
    if let Some((who, why)) = line.strip_prefix("User ").and_then(|rest| rest.rsplit_once(" not allowed because ")) {
        // sshd names the client for some of the reasons only.
        let user = who.rsplit_once(" from ").map_or(who, |(user, _)| user);
        return reason(Some(user), if why == "account is locked" { LOCKED } else { why });
    }
    // sshd logs this line at LogLevel VERBOSE; for passwords, at every level.
    if let Some((method, who)) = line.strip_prefix("Failed ").and_then(|rest| rest.split_once(" for ")) {
        let (who, key) = who.rsplit_once(" ssh2: ").unwrap_or((who, ""));
        let user = who.rsplit_once(" from ")?.0;
        let user = user.strip_prefix("invalid user ").unwrap_or(user);
        return reason(Some(user), format!("{method} {key} is not accepted").replace("  ", " ").as_str());
    }
    if let Some(rest) = line.strip_prefix("Unable to negotiate with ") {
        let (client, why) = rest.split_once(": ")?;
        return refused(None, Some(address(client)?.1), Some(why));
    }
    if line.starts_with("drop connection ") {
        return refused(None, None, Some(line));
    }
    let begin = ["Connection closed by ", "Connection reset by ", "Disconnected from ", "Disconnecting "];
    let rest = begin.iter().find_map(|begin| line.strip_prefix(begin)).unwrap_or_default();
    let (is_known, rest) = match (rest.strip_prefix("authenticating user "), rest.strip_prefix("invalid user ")) {
        (Some(rest), _) => (true, rest),
        (None, Some(rest)) => (false, rest),
        (None, None) => return of_accepted(whole),
    };
    let (who, why) = match rest.strip_suffix(TOO_MANY).and_then(|who| who.strip_suffix(": ")) {
        Some(who) => (who, Some(TOO_MANY)),
        None => (rest, (!is_known).then_some("there is no such user")),
    };
    match address(who) {
        Some((user, client)) => refused(Some(user), Some(client), why),
        None => refused(None, None, Some(line)),
    }
}

/// Parses a line that is not about authentication: the end of a connection, or perhaps the reason why an accepted login
/// ended.
fn of_accepted(line: &str) -> Option<Line<'_>> {
    if NO_REASON.iter().any(|begin| line.starts_with(begin)) {
        return None;
    }
    if let Some((before, after)) = line.rsplit_once(" port ") {
        let end = after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len());
        let client = before.rsplit(' ').next().unwrap_or_default();
        return Some(Line::Disconnected((client, after[..end].parse().ok()?)));
    }
    (!line.is_empty() && !line.ends_with(" [preauth]")).then_some(Line::Other(line))
}

/// Splits off the address at the end, as in `root 192.0.2.1 port 40000`.
fn address(text: &str) -> Option<(&str, (&str, u16))> {
    let (before, port) = text.rsplit_once(" port ")?;
    let (user, client) = before.rsplit_once(' ').unwrap_or(("", before));
    Some((user, (client, port.parse().ok()?)))
}

/// A login that sshd accepted, and whose session has not begun.
#[derive(Debug)]
struct Login {
    user: String,
    client: String,
    port: u16,
    /// The last line that may be the reason why the login ended.
    last: Option<String>,
    /// True if sshd has logged the end of the login's connection.
    is_disconnected: bool,
    /// True if the login's connection was gone already before the log was last read.
    is_gone: bool,
}

/// Follows sshd's log.
#[derive(Debug)]
pub(crate) struct Refusals {
    log: PathBuf,
    /// Offset in bytes up to which the log has been read.
    position: u64,
    /// User and reason of a refusal whose connection has not ended yet.
    reason: Option<(Option<String>, String)>,
    accepted: Vec<Login>,
    /// True if every session is reported, however short.
    knows_sessions: bool,
    period: Instant,
    /// Refusals in the current period.
    count: u64,
}

impl Refusals {
    /// Follows `log` from its current end. `knows_sessions` says that every session is reported, however short.
    pub(crate) fn new(log: &Path, knows_sessions: bool) -> Self {
        let position = std::fs::metadata(log).map_or(0, |log| log.len());
        let (period, accepted) = (Instant::now(), Vec::new());
        Self { log: log.to_owned(), position, reason: None, accepted, knows_sessions, period, count: 0 }
    }

    /// Logs new refusals. `has_begun` says whether a client, by address and port, had a session. Must be called about
    /// once a second.
    pub(crate) fn look(&mut self, has_begun: impl Fn(&str, u16) -> bool) {
        self.read();
        self.accepted.retain(|login| !has_begun(&login.client, login.port));
        self.tell_ended();
        if self.period.elapsed() >= PERIOD {
            self.end_period();
        }
    }

    /// Logs the remaining refusals.
    pub(crate) fn close(mut self, has_begun: impl Fn(&str, u16) -> bool) {
        for _ in 0..2 {
            self.look(&has_begun);
        }
        self.end_period();
    }

    /// Logs accepted logins that have ended. A login whose connection has disappeared is logged only at the next call:
    /// if sshd logs a reason, that line has been read by then.
    fn tell_ended(&mut self) {
        let ended: Vec<_> = self.accepted.extract_if(.., |login| login.is_disconnected || login.is_gone).collect();
        if self.accepted.iter().any(|login| login.last.is_some()) {
            let connected = connected();
            for login in self.accepted.iter_mut().filter(|login| login.last.is_some()) {
                let client = login.client.parse().map(|address: IpAddr| (address, login.port));
                login.is_gone = !client.is_ok_and(|client| connected.contains(&client));
            }
        }
        for Login { user, client, port, last, is_gone, .. } in ended {
            let Some(reason) = last else { continue };
            let is_known = ENDS_SESSION.iter().any(|begin| reason.starts_with(begin));
            if !is_gone && !is_known && !self.knows_sessions {
                continue;
            }
            self.count += 1;
            if self.count <= MOST_LINES {
                tracing::warn!(client, port, user, reason, "sshd accepted a login that ended before its session began");
            }
        }
    }

    fn read(&mut self) {
        let text = self.added().unwrap_or_default();
        for line in text.lines() {
            self.handle(line);
        }
    }

    /// Whole lines appended since the last read. Skips a log that is not a regular file (/dev/stderr) or that is our
    /// own: those lines are in our log already.
    fn added(&mut self) -> std::io::Result<String> {
        let log = Tree::open(Path::new("/"))?.open_regular(&self.log, OFlags::RDONLY)?;
        let found = log.metadata()?;
        let own = rustix::fs::fstat(rustix::stdio::stderr())?;
        if (found.dev(), found.ino()) == (own.st_dev, own.st_ino) {
            return Ok(String::new());
        }
        if found.len() < self.position {
            self.position = 0;
        }
        let mut text = vec![0; LONGEST_READ];
        let length = log.read_at(&mut text, self.position)?;
        text.truncate(length);
        match text.iter().rposition(|&byte| byte == b'\n') {
            Some(end) => text.truncate(end + 1),
            None if length < LONGEST_READ => text.clear(),
            None => {}
        }
        self.position += text.len() as u64;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    fn handle(&mut self, line: &str) {
        match parse(line) {
            None => {}
            Some(Line::Reason(user, reason)) => self.reason = Some((user.map(str::to_owned), reason)),
            Some(Line::Accepted(user, (client, port))) => {
                if self.accepted.len() == MOST_ACCEPTED {
                    self.accepted.remove(0);
                }
                let (user, client) = (user.to_owned(), client.to_owned());
                self.accepted.push(Login { user, client, port, last: None, is_disconnected: false, is_gone: false });
            }
            Some(Line::Disconnected((client, port))) => {
                let is_its = |login: &&mut Login| (login.client.as_str(), login.port) == (client, port);
                self.accepted.iter_mut().filter(is_its).for_each(|login| login.is_disconnected = true);
            }
            // The line does not say to which connection it belongs, so it may concern each of these logins.
            Some(Line::Other(line)) => {
                let may_end = self.accepted.iter_mut().filter(|login| !login.is_disconnected);
                may_end.for_each(|login| login.last = Some(line.to_owned()));
            }
            Some(Line::Refused(refusal)) => {
                self.count += 1;
                let is_its = |(user, _): &mut (Option<String>, _)| user.is_none() || user.as_deref() == refusal.user;
                let before = self.reason.take_if(is_its).map(|(_, reason)| reason);
                if self.count > MOST_LINES {
                    return;
                }
                let reason = before.as_deref().or(refusal.reason).unwrap_or("no key that the client has is authorized");
                let (client, port) = refusal.client.unzip();
                tracing::warn!(client, port, user = refusal.user, reason, "refused a login");
            }
        }
    }

    fn end_period(&mut self) {
        let further = self.count.saturating_sub(MOST_LINES);
        if further > 0 {
            let seconds = self.period.elapsed().as_secs();
            tracing::warn!(count = further, seconds, "refused further logins");
        }
        (self.count, self.period) = (0, Instant::now());
    }
}

/// Clients, by address and port, of this machine's connections that a process has open (proc_pid_net(5)).
fn connected() -> HashSet<(IpAddr, u16)> {
    let tables = ["tcp", "tcp6"].map(|table| std::fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default());
    tables.iter().flat_map(|table| table.lines().filter_map(client_of)).collect()
}

/// The remote address and port of an entry; `None` for a connection that no process has open any more.
fn client_of(entry: &str) -> Option<(IpAddr, u16)> {
    let mut fields = entry.split_ascii_whitespace();
    let (remote, inode) = (fields.nth(2)?, fields.nth(6)?);
    let (address, port) = remote.split_once(':').filter(|_| inode != "0")?;
    // The kernel prints words of the address in its own byte order.
    let words = (0..address.len()).step_by(8).map(|at| u32::from_str_radix(address.get(at..at + 8)?, 16).ok());
    let bytes: Vec<u8> = words.collect::<Option<Vec<_>>>()?.into_iter().flat_map(u32::to_ne_bytes).collect();
    let address = match *bytes {
        [a, b, c, d] => Ipv4Addr::new(a, b, c, d).into(),
        _ => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical(),
    };
    Some((address, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused<'a>(user: &'a str, port: u16, reason: Option<&'a str>) -> Line<'a> {
        Line::Refused(Refusal { user: Some(user), client: Some(("192.0.2.1", port)), reason })
    }

    #[test]
    fn refused_logins_are_recognized_by_their_last_line() {
        let (unknown, of) = (Some("there is no such user"), || Some(Line::Disconnected(("192.0.2.1", 7))));
        for (line, means) in [
            (
                "Connection closed by authenticating user root 192.0.2.1 port 7 [preauth]\r",
                Some(refused("root", 7, None)),
            ),
            ("Connection reset by authenticating user root 192.0.2.1 port 7 [preauth]", Some(refused("root", 7, None))),
            ("Disconnected from authenticating user root 192.0.2.1 port 7 [preauth]", Some(refused("root", 7, None))),
            (
                "Connection closed by invalid user nobody 192.0.2.1 port 7 [preauth]",
                Some(refused("nobody", 7, unknown)),
            ),
            (
                "Disconnecting authenticating user root 192.0.2.1 port 7: Too many authentication failures [preauth]",
                Some(refused("root", 7, Some("Too many authentication failures"))),
            ),
            // A user name that imitates an address does not hide the real one.
            (
                "Connection closed by invalid user x 198.51.100.9 port 1 192.0.2.1 port 7 [preauth]",
                Some(refused("x 198.51.100.9 port 1", 7, unknown)),
            ),
            // Probes, scanners, and ends of accepted logins.
            ("Connection closed by 192.0.2.1 port 7 [preauth]", of()),
            ("kex_exchange_identification: Connection closed by remote host", None),
            ("Connection closed by 192.0.2.1 port 7", of()),
            ("Received disconnect from 192.0.2.1 port 7:11: disconnected by user", of()),
            ("banner exchange: Connection from 192.0.2.1 port 7: invalid format", of()),
            ("Invalid user x from 192.0.2.1 port 7", of()),
            (
                "Accepted publickey for root from 192.0.2.1 port 7 ssh2: ED25519 SHA256:x",
                Some(Line::Accepted("root", ("192.0.2.1", 7))),
            ),
            (
                "linux_audit_write_entry failed: Operation not permitted",
                Some(Line::Other("linux_audit_write_entry failed: Operation not permitted")),
            ),
            ("syslogin_perform_logout: logout() returned an error", None),
            ("Disconnected from user root 192.0.2.1 port 7", of()),
            ("debug1: server_init_dispatch", None),
            ("", None),
        ] {
            assert_eq!(parse(line), means, "{line}");
        }
        let Some(Line::Refused(refusal)) = parse(
            "Unable to negotiate with 192.0.2.1 port 7: no matching host key type found. Their offer: x [preauth]",
        ) else {
            panic!("not a refusal");
        };
        assert_eq!(refusal.client, Some(("192.0.2.1", 7)));
        assert_eq!(refusal.reason, Some("no matching host key type found. Their offer: x"));
    }

    #[test]
    fn connections_that_a_process_has_open_are_read_from_the_kernels_tables() {
        let v4 = "   1: 0100007F:0016 {}:C350 01 00000000:00000000 00:00000000 00000000     0        0 {}  1 x";
        let entry = |remote: &str, inode: &str| v4.replacen("{}", remote, 1).replacen("{}", inode, 1);
        let local = Some((IpAddr::from([127, 0, 0, 1]), 50000));
        assert_eq!(client_of(&entry("0100007F", "4711")), local);
        assert_eq!(client_of(&entry("0000000000000000FFFF00000100007F", "4711")), local);
        assert_eq!(client_of(&entry("0100007F", "0")), None);
        assert_eq!(client_of("  sl  local_address rem_address   st tx_queue rx_queue"), None);
    }

    #[test]
    fn login_that_sshd_ends_is_told_from_one_that_its_client_ends() {
        for (reason, disconnected, knows_sessions, told) in [
            (Some("chown(/dev/pts/0, 0, 5) failed: Operation not permitted"), false, false, true),
            (Some("linux_audit_write_entry failed: Operation not permitted"), true, false, true),
            (Some("something else"), true, true, true),
            // A connection without a session, such as ssh's ControlPersist keeps, when the environment closes.
            (Some("Exiting on signal 15"), true, true, false),
            (Some("Received signal 15; terminating."), true, true, false),
            // The login may have had a short session.
            (Some("something else"), true, false, false),
            (None, true, true, false),
            (None, false, true, false),
        ] {
            let mut log = Refusals::new(Path::new("/nonexistent"), knows_sessions);
            for port in [7, 8] {
                log.handle(&format!("Accepted publickey for root from 192.0.2.1 port {port} ssh2: ED25519 SHA256:x"));
            }
            if let Some(line) = reason {
                log.handle(line);
            }
            if disconnected {
                log.handle("Disconnected from user root 192.0.2.1 port 7");
            }
            for _ in 0..2 {
                log.look(|_, port| port == 8);
            }
            assert_eq!(log.count, u64::from(told), "{reason:?} {disconnected} {knows_sessions}");
            assert_eq!(log.accepted.len(), usize::from(reason.is_none() && !disconnected), "{reason:?}");
        }
    }

    #[test]
    fn refusal_reasons_are_extracted_from_sshds_log() {
        let reason = |user: Option<&'static str>, why: &str| Some(Line::Reason(user, why.to_owned()));
        for (line, means) in [
            (
                "Authentication refused: bad ownership or modes for file /k",
                reason(None, "bad ownership or modes for file /k"),
            ),
            (
                "User nobody from 192.0.2.1 not allowed because listed in DenyUsers",
                reason(Some("nobody"), "listed in DenyUsers"),
            ),
            ("User root not allowed because account is locked", reason(Some("root"), LOCKED)),
            (
                "User root not allowed because shell /bin/x does not exist",
                reason(Some("root"), "shell /bin/x does not exist"),
            ),
            ("ROOT LOGIN REFUSED FROM 192.0.2.1 port 7", reason(Some("root"), "PermitRootLogin does not allow it")),
            (
                "Failed publickey for invalid user a b from 192.0.2.1 port 7 ssh2: ED25519 SHA256:x",
                reason(Some("a b"), "publickey ED25519 SHA256:x is not accepted"),
            ),
            ("Failed password for root from 192.0.2.1 port 7 ssh2", reason(Some("root"), "password is not accepted")),
        ] {
            assert_eq!(parse(line), means, "{line}");
        }
    }

    #[test]
    fn log_is_read_once_in_whole_lines_without_blocking() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("log");
        std::fs::write(&file, "before\n").unwrap();
        let append = |text: &str| {
            use std::io::Write;
            std::fs::File::options().append(true).open(&file).unwrap().write_all(text.as_bytes()).unwrap();
        };
        let mut log = Refusals::new(&file, true);
        append("one\ntw");
        assert_eq!(log.added().unwrap(), "one\n");
        append("o\n");
        assert_eq!(log.added().unwrap(), "two\n");
        assert_eq!(log.added().unwrap(), "");
        // Truncated, as by logrotate's copytruncate.
        std::fs::write(&file, "new\n").unwrap();
        assert_eq!(log.added().unwrap(), "new\n");
        append(&"x".repeat(2 * LONGEST_READ));
        append("\nlast\n");
        let read: String = (0..4).map(|_| log.added().unwrap()).collect();
        assert!(read.ends_with("\nlast\n"), "a line without an end blocks nothing");
        std::fs::remove_file(&file).unwrap();
        nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(log.added().is_err());
    }
}
