//! What the client asked sshd for.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A session's request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// No command: a login shell.
    Shell,
    /// A command line for the shell.
    Command(OsString),
    /// The file transfer server, with the options its configuration gives it. Modern scp comes here too.
    Sftp(Vec<OsString>),
    /// A program with its arguments, from `ims-sshd enter`: no shell in between.
    Program(Vec<OsString>),
}

impl Request {
    /// Reads `SSH_ORIGINAL_COMMAND`, which sshd leaves unset for a shell.
    ///
    /// For the sftp subsystem it holds the server's command from sshd_config: literally `internal-sftp` with its options, or the
    /// path of the container's sftp-server. A person who types one of these as a command means the same.
    pub fn from_original_command(command: Option<&OsStr>) -> Self {
        let Some(command) = command else { return Self::Shell };
        match command.to_str().and_then(sftp_options) {
            Some(options) => Self::Sftp(options),
            None => Self::Command(command.to_owned()),
        }
    }
}

fn sftp_options(command: &str) -> Option<Vec<OsString>> {
    // Anything that a shell would do more with than split it is a command.
    let plain = |b: u8| b.is_ascii_alphanumeric() || b" _-./,=:+".contains(&b);
    if !command.bytes().all(plain) {
        return None;
    }
    let mut words = command.split_ascii_whitespace();
    let server = Path::new(words.next()?);
    let known = server == Path::new("internal-sftp")
        || (server.is_absolute() && server.file_name() == Some(OsStr::from_bytes(b"sftp-server")));
    known.then(|| words.map(OsString::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_apart() {
        let sftp = |options: &[&str]| Request::Sftp(options.iter().map(OsString::from).collect());
        let command = |text: &str| Request::Command(text.into());
        for (original, meant) in [
            ("internal-sftp", sftp(&[])),
            ("internal-sftp -l INFO -u 0022", sftp(&["-l", "INFO", "-u", "0022"])),
            ("/usr/lib/openssh/sftp-server", sftp(&[])),
            ("/usr/lib/ssh/sftp-server -R", sftp(&["-R"])),
            ("internal-sftp; id", command("internal-sftp; id")),
            ("internal-sftp $(id)", command("internal-sftp $(id)")),
            ("internal-sftpd", command("internal-sftpd")),
            ("sftp-server", command("sftp-server")),
            ("scp -t /tmp", command("scp -t /tmp")),
            ("", command("")),
        ] {
            assert_eq!(Request::from_original_command(Some(OsStr::new(original))), meant, "{original}");
        }
        assert_eq!(Request::from_original_command(None), Request::Shell);
    }

    #[test]
    fn a_command_is_kept_byte_for_byte() {
        let raw = OsStr::from_bytes(b"echo \xff\xfe");
        assert_eq!(Request::from_original_command(Some(raw)), Request::Command(raw.to_owned()));
    }
}
