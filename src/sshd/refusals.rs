//! Refused logins, copied from sshd's log into ours: people read the pod's log, while sshd's is a file in the
//! container.
//!
//! sshd writes several lines for a connection; the last one ends it. That one is logged, with the reason given before.
//! Connections without a login attempt (probes, port scanners) are not logged. sshd may also end an accepted login
//! before its session begins; the client does not see that reason either.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use crate::sys::tree::Tree;

/// Most bytes of sshd's log read at once.
const LONGEST_READ: usize = 64 << 10;

/// Lines logged per [`PERIOD`]; the rest are only counted, so that password guessing does not fill the node's disk.
const MOST_LINES: u64 = 10;
const PERIOD: Duration = Duration::from_mins(1);

/// sshd's message when a client has exceeded `MaxAuthTries`.
const TOO_MANY: &str = "Too many authentication failures";

/// Prefixes of the lines with which sshd ends an accepted login or its session (OpenSSH's session.c, uidswap.c,
/// auth-pam.c, audit-linux.c).
const ENDS_ACCEPTED: [&str; 10] = [
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

/// A line of sshd's log that concerns logins.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    /// Why a login is about to be refused, with its user if the line names one.
    Reason(Option<&'a str>, String),
    /// A connection ended before a login was accepted.
    Refused(Refusal<'a>),
    /// A login was accepted, with user and client.
    Accepted(&'a str, (&'a str, u16)),
    /// The reason why an accepted login ended.
    Ended(&'a str),
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
    let line = line.trim_end();
    let line = line.strip_suffix(" [preauth]").unwrap_or(line);
    let reason = |user, text: &str| Some(Line::Reason(user, text.to_owned()));
    let refused = |user, client, reason| Some(Line::Refused(Refusal { user, client, reason }));
    if let Some(who) = line.strip_prefix("Accepted ").and_then(|rest| rest.split_once(" for ")) {
        let (user, client) = address(who.1.split_once(" ssh2").map_or(who.1, |(who, _)| who))?;
        return Some(Line::Accepted(user.strip_suffix(" from").unwrap_or(user), client));
    }
    if ENDS_ACCEPTED.iter().any(|begin| line.starts_with(begin)) {
        return Some(Line::Ended(line));
    }
    if let Some(why) = line.strip_prefix("Authentication refused: ") {
        return reason(None, why);
    }
    if line.starts_with("ROOT LOGIN REFUSED FROM ") {
        return reason(Some("root"), "PermitRootLogin does not allow it");
    }
    if let Some((who, why)) = line.strip_prefix("User ").and_then(|rest| rest.rsplit_once(" not allowed because ")) {
        return reason(Some(who.rsplit_once(" from ")?.0), why);
    }
    // Logged at LogLevel VERBOSE; for passwords, at every level.
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
    let rest = begin.iter().find_map(|begin| line.strip_prefix(begin))?;
    let (is_known, rest) = match rest.strip_prefix("authenticating user ") {
        Some(rest) => (true, rest),
        None => (false, rest.strip_prefix("invalid user ")?),
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

/// Splits off the address at the end, as in `root 192.0.2.1 port 40000`.
fn address(text: &str) -> Option<(&str, (&str, u16))> {
    let (before, port) = text.rsplit_once(" port ")?;
    let (user, client) = before.rsplit_once(' ').unwrap_or(("", before));
    Some((user, (client, port.parse().ok()?)))
}

/// Follows sshd's log.
#[derive(Debug)]
pub(crate) struct Refusals {
    log: PathBuf,
    /// Offset in bytes up to which the log has been read.
    position: u64,
    /// User and reason of a refusal whose connection has not ended yet.
    reason: Option<(Option<String>, String)>,
    /// User and client of the login accepted last.
    accepted: Option<(String, (String, u16))>,
    period: Instant,
    /// Refusals in the current period.
    count: u64,
}

impl Refusals {
    /// Follows `log` from its current end.
    pub(crate) fn new(log: &Path) -> Self {
        let position = std::fs::metadata(log).map_or(0, |log| log.len());
        Self { log: log.to_owned(), position, reason: None, accepted: None, period: Instant::now(), count: 0 }
    }

    /// Logs new refusals. To be called about once a second.
    pub(crate) fn look(&mut self) {
        self.read();
        if self.period.elapsed() >= PERIOD {
            self.end_period();
        }
    }

    /// Logs the remaining refusals.
    pub(crate) fn close(mut self) {
        self.read();
        self.end_period();
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
                self.accepted = Some((user.to_owned(), (client.to_owned(), port)));
            }
            Some(Line::Ended(reason)) => {
                self.count += 1;
                if self.count > MOST_LINES {
                    return;
                }
                let (user, client) = self.accepted.take().unzip();
                let (client, port) = client.unzip();
                tracing::warn!(client, port, user, reason, "sshd accepted a login that ended before its session began");
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

#[cfg(test)]
mod tests {
    use super::*;

    fn refused<'a>(user: &'a str, port: u16, reason: Option<&'a str>) -> Line<'a> {
        Line::Refused(Refusal { user: Some(user), client: Some(("192.0.2.1", port)), reason })
    }

    #[test]
    fn refused_logins_are_recognized_by_their_last_line() {
        let unknown = Some("there is no such user");
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
            ("Connection closed by 192.0.2.1 port 7 [preauth]", None),
            ("kex_exchange_identification: Connection closed by remote host", None),
            ("banner exchange: Connection from 192.0.2.1 port 7: invalid format", None),
            ("Invalid user x from 192.0.2.1 port 7", None),
            (
                "Accepted publickey for root from 192.0.2.1 port 7 ssh2: ED25519 SHA256:x",
                Some(Line::Accepted("root", ("192.0.2.1", 7))),
            ),
            (
                "linux_audit_write_entry failed: Operation not permitted",
                Some(Line::Ended("linux_audit_write_entry failed: Operation not permitted")),
            ),
            ("syslogin_perform_logout: logout() returned an error", None),
            ("Disconnected from user root 192.0.2.1 port 7", None),
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
        let mut log = Refusals::new(&file);
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
