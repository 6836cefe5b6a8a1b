//! A session's environment variables, as a table: what is kept of the ones sshd gives, and what the image's root gets.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use crate::session::account::Account;

/// Names that belong to the client and to the job, in every environment; `*` and `?` as in sshd's patterns.
const KEPT: &[&str] = &["TERM", "COLORTERM", "LANG", "LANGUAGE", "LC_*", "SSH_*", "IMS_*"];

/// Names that belong to the container although they look like the client's: they point to files outside the jail.
const DROPPED: &[&str] = &["SSH_AUTH_SOCK", "SSH_USER_AUTH", "SSH_ORIGINAL_COMMAND", "SSH_ASKPASS"];

/// What a login on the booted image would find before its profile is read.
pub const LOGIN_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A session's variables: those of `given` that match [`KEPT`] or `keep` (names that the server's configuration gives), then those of
/// the account. What belongs to the container (its PATH, HOME, `LD_*`, `BASH_ENV` and all the rest) does not come in.
pub fn session_environment(
    given: impl IntoIterator<Item = (OsString, OsString)>,
    account: &Account,
    keep: &[String],
) -> Vec<(OsString, OsString)> {
    let own: [(&str, &OsStr); 6] = [
        ("USER", account.name.as_ref()),
        ("LOGNAME", account.name.as_ref()),
        ("HOME", account.home.as_ref()),
        ("SHELL", account.shell.as_ref()),
        ("PATH", LOGIN_PATH.as_ref()),
        ("MAIL", "/var/mail/root".as_ref()),
    ];
    let is_kept = |name: &OsStr| {
        let matches = |pattern: &str| matches(pattern.as_bytes(), name.as_bytes());
        let wanted = KEPT.iter().copied().any(matches) || keep.iter().map(String::as_str).any(matches);
        let ours = own.iter().any(|(o, _)| name == *o) || DROPPED.iter().any(|d| name == *d);
        wanted && !ours
    };
    let mut environment: Vec<_> = given.into_iter().filter(|(name, _)| is_kept(name)).collect();
    environment.extend(own.map(|(name, value)| (name.into(), value.to_owned())));
    environment
}

/// Whether `name` matches sshd's `pattern`: `*` any number of bytes, `?` one.
pub fn matches(pattern: &[u8], name: &[u8]) -> bool {
    // The classic two-finger walk: on a mismatch go back to the last star and let it take one byte more.
    let (mut p, mut n) = (0, 0);
    let mut star = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(&b) if b == b'?' || b == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((at, taken)) => {
                    p = at + 1;
                    n = taken + 1;
                    star = Some((at, n));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&b| b == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(given: &[(&str, &str)], keep: &[&str]) -> Vec<(String, String)> {
        let account = Account::parse(b"root:x:0:0::/home/r:/bin/zsh\n", b"");
        let given = given.iter().map(|(n, v)| ((*n).into(), (*v).into()));
        let keep: Vec<_> = keep.iter().map(|k| (*k).to_owned()).collect();
        let text = |s: OsString| s.into_string().unwrap();
        session_environment(given, &account, &keep).into_iter().map(|(n, v)| (text(n), text(v))).collect()
    }

    #[test]
    fn what_is_the_containers_stays_there_and_what_is_the_jobs_comes_in() {
        let given = [
            ("TERM", "xterm"),
            ("LC_TIME", "C"),
            ("SSH_CONNECTION", "a 1 b 2"),
            ("IMS_JOB_ID", "7"),
            ("SITE_PROXY", "p"),
            ("PATH", "/evil"),
            ("HOME", "/container"),
            ("LD_PRELOAD", "x"),
            ("BASH_ENV", "x"),
            ("KUBECONFIG", "x"),
            ("SSH_AUTH_SOCK", "/tmp/agent"),
            ("SSH_ORIGINAL_COMMAND", "id"),
        ];
        let mut got = environment(&given, &["SITE_*", "HOME"]);
        got.sort();
        let mut wanted: Vec<(String, String)> = [
            ("TERM", "xterm"),
            ("LC_TIME", "C"),
            ("SSH_CONNECTION", "a 1 b 2"),
            ("IMS_JOB_ID", "7"),
            ("SITE_PROXY", "p"),
            ("USER", "root"),
            ("LOGNAME", "root"),
            ("HOME", "/home/r"),
            ("SHELL", "/bin/zsh"),
            ("PATH", LOGIN_PATH),
            ("MAIL", "/var/mail/root"),
        ]
        .map(|(n, v)| (n.to_owned(), v.to_owned()))
        .into();
        wanted.sort();
        assert_eq!(got, wanted);
    }

    #[test]
    fn patterns_match_as_sshd_matches_them() {
        for (pattern, name, wanted) in [
            ("LC_*", "LC_ALL", true),
            ("LC_*", "LC_", true),
            ("LC_*", "LANG", false),
            ("*", "", true),
            ("?", "", false),
            ("A?C", "ABC", true),
            ("*_X", "A_X_X", true),
            ("A", "AB", false),
            ("A**", "A", true),
            ("", "", true),
        ] {
            assert_eq!(matches(pattern.as_bytes(), name.as_bytes()), wanted, "{pattern} {name}");
        }
    }
}
