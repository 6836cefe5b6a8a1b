//! Messages of `ims-jail-shell` to the supervisor about its session: client, request, and how it ended. The session
//! waits for no answer, and continues if nobody listens.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::wait::WaitStatus;
use rustix::event::{PollFd, PollFlags};

use crate::session::request::Request;
use crate::sys::poll;
use crate::sys::seqpacket::Packets;

/// The beginning of a session.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Beginning {
    /// Address and port of the client, as sshd saw them, separated by a blank.
    pub client: String,
    /// Authentication method and key, a line of `ExposeAuthInfo`: `publickey ssh-ed25519 AAAA…`.
    pub(crate) credential: String,
    /// True if the session has a terminal.
    pub(crate) terminal: bool,
    /// True for a shell at a terminal, without a command.
    pub(crate) interactive: bool,
    /// `shell`, `sftp`, or the command line.
    pub(crate) request: String,
}

/// Maximum number of bytes of a command that are logged.
const LONGEST_REQUEST: usize = 1000;

impl Beginning {
    /// Describes this process's session from the variables that sshd set.
    pub(crate) fn of_this_session(request: &Request, terminal: bool) -> Self {
        let interactive = terminal && *request == Request::Shell;
        let variable = |name| std::env::var_os(name).unwrap_or_default();
        let connection = variable("SSH_CONNECTION");
        let end = connection.as_bytes().iter().enumerate().filter(|(_, b)| **b == b' ').nth(1);
        let client = &connection.as_bytes()[..end.map_or(connection.len(), |(at, _)| at)];
        let credential =
            std::env::var_os("SSH_USER_AUTH").and_then(|file| std::fs::read(file).ok()).unwrap_or_default();
        let credential = credential.split(|&b| b == b'\n').next().unwrap_or_default();
        let words = |words: &[std::ffi::OsString]| words.join(OsStr::new(" "));
        let request = match request {
            Request::Shell => "shell".into(),
            Request::Sftp(_) => "sftp".into(),
            Request::Command(line) => line.clone(),
            Request::Program(program) => words(program),
        };
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace('\0', " ");
        Self {
            client: text(client),
            credential: text(credential),
            terminal,
            interactive,
            request: text(&request.as_bytes()[..request.len().min(LONGEST_REQUEST)]),
        }
    }
}

/// A packet to the supervisor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    /// A session begins. It ends with [`Packet::End`] on the same connection, or when the connection closes.
    Begin(Beginning),
    /// The session ended: an exit code or the name of a signal.
    End(String),
    /// A request for the environment's status.
    Status,
}

impl Packet {
    /// The packet's bytes: fields separated by NUL bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Self::Begin(Beginning { client, credential, terminal, interactive, request }) => {
                let kind = match (interactive, terminal) {
                    (true, _) => "interactive",
                    (false, true) => "terminal",
                    (false, false) => "",
                };
                ["begin", client, credential, kind, request].join("\0").into_bytes()
            }
            Self::End(how) => format!("end\0{how}").into_bytes(),
            Self::Status => b"status".into(),
        }
    }

    /// Parses a packet; `None` if it is invalid.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(bytes);
        let fields: Vec<&str> = text.split('\0').collect();
        Some(match fields.as_slice() {
            ["begin", client, credential, kind, request] => Self::Begin(Beginning {
                client: (*client).to_owned(),
                credential: (*credential).to_owned(),
                terminal: !kind.is_empty(),
                interactive: *kind == "interactive",
                request: (*request).to_owned(),
            }),
            ["end", how] => Self::End((*how).to_owned()),
            ["status"] => Self::Status,
            _ => return None,
        })
    }
}

/// Connection to the supervisor, open as long as the session lasts.
pub(crate) struct Report(Option<Packets>);

impl Report {
    /// Reports the beginning to the supervisor's socket, which is next to the record `jail`.
    pub(crate) fn begin(jail: &Path, beginning: Beginning) -> Self {
        let packets = Packets::connect(&jail.with_file_name(SOCKET)).ok();
        Self(packets.filter(|p| p.send(&Packet::Begin(beginning).to_bytes()).is_ok()))
    }

    /// Reports the end, with the reason where sshd does not show it to the client.
    pub(crate) fn end(&self, status: &WaitStatus, reason: Option<&str>) {
        let how = match status {
            WaitStatus::Exited(_, code) => code.to_string(),
            WaitStatus::Signaled(_, signal, _) => signal.to_string(),
            other => format!("{other:?}"),
        };
        let how = reason.map_or(how.clone(), |reason| format!("{how}: {reason}"));
        if let Some(packets) = &self.0 {
            let _ = packets.send(&Packet::End(how).to_bytes());
        }
    }
}

/// Asks the supervisor with the state directory `state` for its report, which is JSON; `None` if no supervisor answers
/// within `limit`.
pub(crate) fn ask(state: &Path, limit: Duration) -> Option<Vec<u8>> {
    let packets = Packets::connect(&state.join(SOCKET)).ok()?;
    packets.send(&Packet::Status.to_bytes()).ok()?;
    poll::wait(&mut [PollFd::new(&packets, PollFlags::IN)], limit).ok().filter(|ready| *ready > 0)?;
    packets.receive().ok()?
}

/// Name of the supervisor's socket in its state directory.
pub(crate) const SOCKET: &str = "control";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_round_trip_through_their_bytes() {
        let beginning = Beginning {
            client: "192.0.2.1 40000".into(),
            credential: "publickey ssh-ed25519 AAAA".into(),
            terminal: true,
            interactive: false,
            request: "echo a\nb".into(),
        };
        for packet in [Packet::Begin(beginning), Packet::End("SIGTERM".into()), Packet::Status] {
            assert_eq!(Packet::parse(&packet.to_bytes()), Some(packet));
        }
        assert_eq!(Packet::parse(b"begin\0x"), None);
    }
}
