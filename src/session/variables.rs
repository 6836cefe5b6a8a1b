//! Environment variables of a session as tables: those kept from sshd, and those set for the image's root.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use crate::session::account::Account;

/// Names of variables that every environment passes on from sshd to the session, with `*` and `?` as in patterns of
/// sshd_config(5). They come from the client and the job.
const KEPT: &[&str] = &["TERM", "COLORTERM", "LANG", "LANGUAGE", "LC_*", "SSH_*", "IMS_*"];

/// Names that are dropped although they match [`KEPT`]: their values are meant for processes outside the jail.
const DROPPED: &[&str] = &["SSH_AUTH_SOCK", "SSH_USER_AUTH", "SSH_ORIGINAL_COMMAND", "SSH_ASKPASS"];

/// Names that describe the client or the job, which no file of the image may set.
const RESERVED: &[&str] = &["SSH_*", "IMS_*"];

/// Names that /etc/environment of the image overrides, as on the booted image, where the locale in that file also takes
/// precedence over the client's.
const CHANGED: &[&str] = &["PATH", "MAIL", "LANG", "LANGUAGE", "LC_*", "SYSTEMD_OFFLINE"];

/// Login PATH before any profile is read.
pub(crate) const LOGIN_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Variables set for the image's root; the client cannot override them.
const OWN: [&str; 6] = ["USER", "LOGNAME", "HOME", "SHELL", "PATH", "MAIL"];

/// Variables that enter the jail: those of `given` that match [`KEPT`] or `keep` (names from the server's
/// configuration). The container's own variables (PATH, HOME, `LD_*`, `BASH_ENV` and all others) do not enter.
pub(crate) fn client_environment(
    given: impl IntoIterator<Item = (OsString, OsString)>,
    keep: &[String],
) -> Vec<(OsString, OsString)> {
    let is_kept = |name: &OsStr| {
        let matches = |pattern: &str| matches(pattern.as_bytes(), name.as_bytes());
        let wanted = KEPT.iter().copied().any(matches) || keep.iter().map(String::as_str).any(matches);
        wanted && !OWN.iter().chain(DROPPED).any(|other| name == *other)
    };
    let mut environment: Vec<(OsString, OsString)> = Vec::new();
    for (name, value) in given {
        // With duplicate names getenv(3) returns the first and bash the last; two programs could see different values.
        if is_kept(&name) && !environment.iter().any(|(known, _)| *known == name) {
            environment.push((name, value));
        }
    }
    environment
}

/// Parses a variable for sessions, `NAME=VALUE` or the NAME of a variable of this process. The error says what was
/// expected.
pub fn variable(text: &str) -> std::result::Result<(String, String), String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, value.to_owned()),
        None => (text, std::env::var(text).map_err(|_| "expected NAME=VALUE, or the NAME of a variable that is set")?),
    };
    let is_name = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if !is_name || name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
        return Err("expected a NAME of letters, digits and '_'".into());
    }
    if OWN.iter().chain(DROPPED).any(|other| name == *other) {
        return Err(format!("{name} is set at login, from the image"));
    }
    // A newline would break the line of sshd's configuration that sets the variable for sessions of `customize`.
    if value.contains(|c: char| c.is_control()) {
        return Err(format!("expected a value of {name} without control characters"));
    }
    Ok((name.to_owned(), value))
}

/// Variables of a session: the client's, then the account's, then those of the image's /etc/environment, which override
/// only names in [`CHANGED`] and add none in [`RESERVED`].
pub(crate) fn session_environment(
    client: Vec<(OsString, OsString)>,
    account: &Account,
    of_image: Vec<(OsString, OsString)>,
) -> Vec<(OsString, OsString)> {
    let values: [&OsStr; OWN.len()] = [
        account.name.as_ref(),
        account.name.as_ref(),
        account.home.as_ref(),
        account.shell.as_ref(),
        LOGIN_PATH.as_ref(),
        "/var/mail/root".as_ref(),
    ];
    let mut environment = client;
    environment.extend(OWN.iter().zip(values).map(|(name, value)| (name.into(), value.to_owned())));
    for (name, value) in of_image {
        let is_among = |patterns: &[&str]| patterns.iter().any(|p| matches(p.as_bytes(), name.as_bytes()));
        match environment.iter_mut().find(|(known, _)| *known == name) {
            Some((_, known)) if is_among(CHANGED) => *known = value,
            None if !is_among(RESERVED) => environment.push((name, value)),
            _ => {}
        }
    }
    environment
}

/// True if `name` matches sshd's `pattern`, in which `*` stands for any bytes and `?` for one byte.
pub(crate) fn matches(pattern: &[u8], name: &[u8]) -> bool {
    // On a mismatch, go back to the last star and let it match one more byte.
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
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// Variables of the root account in these tests.
    const OWN: [(&str, &str); 6] = [
        ("USER", "root"),
        ("LOGNAME", "root"),
        ("HOME", "/home/r"),
        ("SHELL", "/bin/zsh"),
        ("PATH", LOGIN_PATH),
        ("MAIL", "/var/mail/root"),
    ];

    fn environment(given: &[(&str, &str)], keep: &[&str]) -> Vec<(String, String)> {
        let account = Account::parse(b"root:x:0:0::/home/r:/bin/zsh\n", b"");
        let given = given.iter().map(|(n, v)| ((*n).into(), (*v).into()));
        let keep: Vec<_> = keep.iter().map(|k| (*k).to_owned()).collect();
        let text = |s: OsString| s.into_string().unwrap();
        let client = client_environment(given, &keep);
        session_environment(client, &account, Vec::new()).into_iter().map(|(n, v)| (text(n), text(v))).collect()
    }

    #[test]
    fn session_gets_the_jobs_variables_and_none_of_the_containers() {
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
        ]
        .iter()
        .chain(&OWN)
        .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
        .collect();
        wanted.sort();
        assert_eq!(got, wanted);
    }

    #[test]
    fn etc_environment_adds_variables_and_overrides_only_locale_and_path() {
        let given = [("TERM", "xterm"), ("LANG", "client"), ("REMOTE_BUILD_NODE", "job"), ("SSH_CLIENT", "a")];
        let of_image = "TERM LANG LC_ALL REMOTE_BUILD_NODE SSH_CLIENT SSH_AUTH_SOCK IMS_X HOME USER PATH NEW";
        let pair = |(name, value): (&str, &str)| (name.into(), value.into());
        let of_image = of_image.split(' ').map(|name| pair((name, "image"))).collect();
        let client = client_environment(given.map(pair), &["REMOTE_BUILD_NODE".into()]);
        let got = session_environment(client, &Account::parse(b"", b""), of_image);
        let changed = got.iter().filter(|(_, value)| value == "image").map(|(name, _)| name.to_str().unwrap());
        assert_eq!(changed.collect::<Vec<_>>(), ["LANG", "PATH", "LC_ALL", "NEW"]);
    }

    #[test]
    fn patterns_match_as_in_sshd() {
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

    /// The meaning of a pattern, implemented naively.
    fn means(pattern: &[u8], name: &[u8]) -> bool {
        match (pattern, name) {
            ([], []) => true,
            ([b'*', rest @ ..], _) => (0..=name.len()).any(|taken| means(rest, &name[taken..])),
            ([b'?', pattern @ ..], [_, name @ ..]) => means(pattern, name),
            ([p, pattern @ ..], [n, name @ ..]) => p == n && means(pattern, name),
            _ => false,
        }
    }

    fn name() -> impl Strategy<Value = String> {
        prop_oneof![
            "(USER|LOGNAME|HOME|SHELL|PATH|MAIL)",
            "(SSH_AUTH_SOCK|SSH_USER_AUTH|SSH_ORIGINAL_COMMAND|SSH_ASKPASS)",
            "(LD_PRELOAD|BASH_ENV|ENV|IFS|KUBECONFIG|IMAGE_ROOT_PARENT|BASH_FUNC_x%%|PWD|XDG_RUNTIME_DIR|_)",
            "(TERM|COLORTERM|LANG|LANGUAGE|LC_|SSH_|IMS_)[A-Z]{0,2}",
            "[A-Za-z_ =]{0,4}",
        ]
    }

    fn pattern() -> impl Strategy<Value = String> {
        prop_oneof![name(), "[ABHPS_*?]{0,5}", (name(), "[*?]{1,2}").prop_map(|(name, stars)| name + &stars)]
    }

    proptest! {
        #[test]
        fn pattern_matching_agrees_with_a_naive_implementation(pattern in "[AB*?]{0,8}", name in "[AB]{0,10}") {
            prop_assert_eq!(matches(pattern.as_bytes(), name.as_bytes()), means(pattern.as_bytes(), name.as_bytes()));
        }

        #[test]
        fn session_never_gets_a_variable_of_the_container(
            given in vec((name(), "[a-z/]{0,3}"), 0..12),
            keep in vec(pattern(), 0..4),
        ) {
            let given_to: Vec<_> = given.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
            let got = environment(&given_to, &keep.iter().map(String::as_str).collect::<Vec<_>>());
            let wanted = |name: &str| {
                let matched = |pattern: &str| means(pattern.as_bytes(), name.as_bytes());
                (KEPT.iter().any(|p| matched(p)) || keep.iter().any(|p| matched(p))) && !DROPPED.contains(&name)
            };
            for (name, value) in &got {
                prop_assert_eq!(got.iter().filter(|(n, _)| n == name).count(), 1, "{} twice", name);
                let meant = match OWN.iter().find(|(n, _)| n == name) {
                    Some((_, value)) => value,
                    // With duplicate names, the first one counts, as with getenv(3).
                    None if wanted(name) => given_to.iter().find(|(n, _)| n == name).map(|(_, v)| v).unwrap(),
                    None => return Err(TestCaseError::fail(format!("{name} came in"))),
                };
                prop_assert_eq!(value, meant);
            }
            let given_names = given_to.iter().map(|(name, _)| *name).filter(|name| wanted(name));
            for name in OWN.iter().map(|(name, _)| *name).chain(given_names) {
                prop_assert!(got.iter().any(|(n, _)| n == name), "{} is missing", name);
            }
        }
    }
}
