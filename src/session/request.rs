//! The client's request, as sshd passes it on.

use std::ffi::{OsStr, OsString};

/// A session's request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// No command: a login shell.
    Shell,
    /// A command line for the shell.
    Command(OsString),
    /// The file transfer server, with the options from sshd's configuration. Modern scp uses it too.
    Sftp(Vec<OsString>),
    /// A program with its arguments, without a shell, from `ims-sshd enter`.
    Program(Vec<OsString>),
}

impl Request {
    /// Parses `SSH_ORIGINAL_COMMAND`, which sshd leaves unset for a shell.
    ///
    /// For the sftp subsystem, the variable has the server's command from sshd_config: literally `internal-sftp` with
    /// its options, or the path of the container's sftp-server. A person who types such a command gets the same.
    pub fn from_original_command(command: Option<&OsStr>) -> Self {
        let Some(command) = command else { return Self::Shell };
        match command.to_str().and_then(sftp_options) {
            Some(options) => Self::Sftp(options),
            None => Self::Command(command.to_owned()),
        }
    }
}

fn sftp_options(command: &str) -> Option<Vec<OsString>> {
    // A line with other characters is a command: a shell would do more with it than split it. sftp-server itself
    // expands `%u`.
    let plain = |b: u8| b.is_ascii_alphanumeric() || b" _-./,=:+%".contains(&b);
    if !command.bytes().all(plain) {
        return None;
    }
    let mut words = command.split_ascii_whitespace();
    let server = words.next()?;
    // Compare as text: `Path` ignores a trailing `/` or `/.`, but a path that ends so names no program.
    let known = server == "internal-sftp" || server.starts_with('/') && server.ends_with("/sftp-server");
    known.then(|| words.map(OsString::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn original_command_is_parsed_into_a_request() {
        let sftp = |options: &[&str]| Request::Sftp(options.iter().map(OsString::from).collect());
        let command = |text: &str| Request::Command(text.into());
        for (original, meant) in [
            ("internal-sftp", sftp(&[])),
            ("internal-sftp -l INFO -u 0022", sftp(&["-l", "INFO", "-u", "0022"])),
            ("/usr/lib/openssh/sftp-server", sftp(&[])),
            ("/usr/lib/ssh/sftp-server -R", sftp(&["-R"])),
            ("internal-sftp; id", command("internal-sftp; id")),
            ("internal-sftp $(id)", command("internal-sftp $(id)")),
            ("internal-sftp -d /srv/%u", sftp(&["-d", "/srv/%u"])),
            ("internal-sftpd", command("internal-sftpd")),
            ("internal-sftp/", command("internal-sftp/")),
            ("/usr/lib/ssh/sftp-server/.", command("/usr/lib/ssh/sftp-server/.")),
            ("sftp-server", command("sftp-server")),
            ("scp -t /tmp", command("scp -t /tmp")),
            ("", command("")),
        ] {
            assert_eq!(Request::from_original_command(Some(OsStr::new(original))), meant, "{original}");
        }
        assert_eq!(Request::from_original_command(None), Request::Shell);
    }

    /// Names of the server in configurations, near misses, options, and characters that are special to a shell.
    fn piece() -> impl Strategy<Value = String> {
        prop_oneof![
            "internal-sftp|/usr/lib(exec|64)?/(openssh/|ssh/)?sftp-server",
            "internal-sftp(d|/|/\\.|,)|/?sftp-server(/|/\\.|\\.old)?|[A-Z]=b|scp|Internal-sftp",
            "-[a-zA-Z]|[a-z0-9/=,.:+_%-]{0,8}",
            "[;&|$`'\"\\\\(){}<>*?~#!\\[\\]^\t\n]",
            "\\PC",
        ]
    }

    proptest! {
        #[test]
        fn sftp_needs_a_line_without_shell_syntax_and_other_lines_stay_unchanged(
            server in "(internal-sftp|/lib/sftp-server)? {0,2}",
            pieces in vec((piece(), " {0,2}"), 0..6),
        ) {
            let line = server + &pieces.into_iter().map(|(piece, space)| piece + &space).collect::<String>();
            match Request::from_original_command(Some(OsStr::new(&line))) {
                Request::Sftp(options) => {
                    let mut words = shell_words::split(&line).unwrap();
                    let server = words.remove(0);
                    prop_assert!(server == "internal-sftp" || server.starts_with('/') && server.ends_with("/sftp-server"));
                    prop_assert_eq!(options, words.into_iter().map(OsString::from).collect::<Vec<_>>());
                    prop_assert!(!line.contains(|c| "|&;<>()$`\\\"'*?[#~!{}^\t\n".contains(c)), "a shell would do more");
                }
                Request::Command(command) => prop_assert_eq!(command, OsString::from(line)),
                other => prop_assert!(false, "{other:?}"),
            }
        }

        #[test]
        fn every_sftp_subsystem_of_a_configuration_is_recognized(
            server in "internal-sftp|(/[a-z0-9_.+-]{1,8}){0,3}/sftp-server",
            options in vec("-[a-zA-Z]|[a-zA-Z0-9/=,.:+_%-]{1,8}", 0..5),
        ) {
            let line = [vec![server], options.clone()].concat().join(" ");
            let meant = Request::Sftp(options.into_iter().map(OsString::from).collect());
            prop_assert_eq!(Request::from_original_command(Some(OsStr::new(&line))), meant);
        }

        #[test]
        fn command_is_passed_on_byte_for_byte(raw in vec(any::<u8>(), 0..40), at in any::<prop::sample::Index>()) {
            let mut raw = raw;
            raw.insert(at.index(raw.len() + 1), 0xff);
            let raw = OsStr::from_bytes(&raw);
            prop_assert_eq!(Request::from_original_command(Some(raw)), Request::Command(raw.to_owned()));
        }
    }
}
