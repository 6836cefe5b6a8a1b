//! The effective configuration as sshd prints it (`sshd -T`), the only parser of sshd_config that is right by
//! definition.

use std::process::{Command, Stdio};
use std::thread::JoinHandle;

use crate::error::{Attempt, Error, Result};
use crate::sshd::{self, accept_env};
use crate::sys::process::output_within;

/// A running `sshd -T`. It takes some 10 ms; several run at once, each in a thread of its own, since starting a program
/// blocks until the kernel has begun it.
pub(crate) struct Question(JoinHandle<Result<Effective>>);

impl Question {
    /// Starts `sshd -T` for `user` with these options.
    pub(crate) fn put(options: &[String], user: &'static str) -> Result<Self> {
        let options = options.to_owned();
        let thread = std::thread::Builder::new().spawn(move || Effective::ask(&options, user));
        thread.map(Self).attempt(|| "have sshd check its configuration")
    }

    /// Waits for the output.
    pub(crate) fn answer(self) -> Result<Effective> {
        self.0.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// The effective configuration for one user: keywords in lower case with their values, in sshd's order.
#[derive(Debug, Clone, Default)]
pub struct Effective {
    lines: Vec<(String, String)>,
}

impl Effective {
    /// Runs `sshd -T` for `user` with these options. On failure, sshd's complaint is the error's cause.
    pub fn ask(options: &[String], user: &str) -> Result<Self> {
        let attempted = || format!("have sshd check its configuration (sshd {} -T)", shell_words::join(options));
        let sshd = Command::new(sshd::program()?)
            .args(options)
            .args(["-T", "-C", &format!("user={user},host=localhost,addr=127.0.0.1,laddr=127.0.0.1,lport=22")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .attempt(attempted)?;
        let Some(output) = output_within(sshd, sshd::TIME_LIMIT).attempt(attempted)? else {
            return Err(sshd::late(attempted()));
        };
        if output.status.success() {
            return Ok(Self::parse(&output.stdout));
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said: Vec<&str> = said.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
        let why = if said.is_empty() { output.status.to_string() } else { said.join(", ") };
        Err(Error::new(attempted()).because(why))
    }

    /// Parses the output of `sshd -T`.
    pub fn parse(text: &[u8]) -> Self {
        let lines = String::from_utf8_lossy(text)
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(keyword, value)| (keyword.to_ascii_lowercase(), value.to_owned()))
            .collect();
        Self { lines }
    }

    /// All lines: keywords with their values.
    pub(crate) fn lines(&self) -> impl Iterator<Item = (&str, &str)> {
        self.lines.iter().map(|(keyword, value)| (keyword.as_str(), value.as_str()))
    }

    /// All values of `keyword`.
    pub(crate) fn all<'a>(&'a self, keyword: &'a str) -> impl Iterator<Item = &'a str> {
        self.lines.iter().filter(move |(k, _)| k == keyword).map(|(_, value)| value.as_str())
    }

    /// The first value of `keyword`.
    pub(crate) fn first<'a>(&'a self, keyword: &'a str) -> Option<&'a str> {
        self.all(keyword).next()
    }

    /// Variables that sshd sets in sessions (SetEnv).
    pub fn set_env(&self) -> Vec<(String, String)> {
        self.all("setenv").filter_map(|v| v.split_once('=')).map(|(n, v)| (n.to_owned(), v.to_owned())).collect()
    }

    /// Patterns of the variables that clients may set (AcceptEnv).
    pub(crate) fn accept_env(&self) -> impl Iterator<Item = &str> {
        self.all("acceptenv").flat_map(str::split_ascii_whitespace)
    }

    /// Number of addresses to listen on.
    pub(crate) fn listen_addresses(&self) -> usize {
        self.all("listenaddress").count()
    }

    /// Checks that `force_command` jails root's sessions, and that nothing bypasses it.
    pub fn check_jail(&self, force_command: &str) -> Result<()> {
        let wanted = [
            ("forcecommand", force_command),
            ("permittty", "yes"),
            ("allowstreamlocalforwarding", "no"),
            ("permittunnel", "no"),
            ("x11forwarding", "no"),
            ("permituserrc", "no"),
            ("chrootdirectory", "none"),
            ("permituserenvironment", "no"),
        ];
        let refuse = |what: String| {
            Err(Error::new("open a jailed environment")
                .because(what)
                .advise("change SSHD_OPTIONS or sshd's configuration: a session could land outside the jail"))
        };
        for (keyword, value) in wanted {
            let found = self.first(keyword).unwrap_or("missing");
            if found != value {
                return refuse(format!("sshd's effective {keyword} for root is '{found}' and not '{value}'"));
            }
        }
        self.accept_env().try_for_each(|pattern| accept_env::judge("sshd's effective configuration", pattern))
    }

    /// Checks that users other than root are denied: their sessions would run outside the jail.
    pub fn check_denied(&self) -> Result<()> {
        if self.all("denyusers").any(|users| users.split_ascii_whitespace().any(|u| u == "*")) {
            return Ok(());
        }
        Err(Error::new("open a jailed environment")
            .because("sshd's effective configuration lets in users other than root"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = "forcecommand exec x\npermittty yes\nallowstreamlocalforwarding no\npermittunnel no\nx11forwarding no\n\
                        permituserrc no\nchrootdirectory none\npermituserenvironment no\nacceptenv LANG\nacceptenv LC_*\n";

    #[test]
    fn a_configuration_that_forces_the_helper_passes() {
        Effective::parse(GOOD.as_bytes()).check_jail("exec x").unwrap();
    }

    #[test]
    fn every_bypass_of_the_helper_is_refused_by_name() {
        for (from, to, named) in [
            ("forcecommand exec x", "forcecommand none", "forcecommand"),
            ("forcecommand exec x\n", "", "forcecommand"),
            ("permittunnel no", "permittunnel yes", "permittunnel"),
            ("allowstreamlocalforwarding no", "allowstreamlocalforwarding yes", "allowstreamlocalforwarding"),
            ("permituserrc no", "permituserrc yes", "permituserrc"),
            ("permituserenvironment no", "permituserenvironment yes", "permituserenvironment"),
            ("chrootdirectory none", "chrootdirectory /x", "chrootdirectory"),
            ("acceptenv LANG", "acceptenv *", "AcceptEnv *"),
            ("acceptenv LANG", "acceptenv LD_PRE*", "LD_*"),
            ("acceptenv LANG", "acceptenv BASH_ENV", "BASH_ENV"),
        ] {
            let message =
                Effective::parse(GOOD.replace(from, to).as_bytes()).check_jail("exec x").unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }

    #[test]
    fn users_other_than_root_are_denied() {
        Effective::parse(b"denyusers *\n").check_denied().unwrap();
        assert!(Effective::parse(b"denyusers bob\n").check_denied().is_err());
    }

    proptest! {
        #[test]
        fn output_of_sshd_is_parsed_line_by_line(
            lines in prop::collection::vec(("[a-z]{1,4}|AcceptEnv|setenv", "[!-~\u{e9}][ -~\u{e9}]{0,8}"), 0..6),
            asked in "[a-z]{1,2}",
        ) {
            let answer = lines.iter().map(|(keyword, value)| format!("{keyword} {value}\n")).collect::<Vec<_>>().concat();
            let effective = Effective::parse(answer.as_bytes());
            for keyword in lines.iter().map(|(keyword, _)| keyword.to_ascii_lowercase()).chain([asked]) {
                let values: Vec<_> =
                    lines.iter().filter(|(k, _)| k.eq_ignore_ascii_case(&keyword)).map(|(_, value)| value.as_str()).collect();
                prop_assert_eq!(effective.all(&keyword).collect::<Vec<_>>(), values.clone());
                prop_assert_eq!(effective.first(&keyword), values.first().copied());
            }
        }

        #[test]
        fn effective_value_that_differs_is_refused(
            at in any::<prop::sample::Index>(),
            value in "yes|no|none|exec|exec x |exec xx| ?exec y|/|all",
            more in "(acceptenv [A-Z]{2}_X\n|port 22\n){0,2}",
        ) {
            let mut lines: Vec<&str> = GOOD.lines().collect();
            let at = at.index(lines.len() - 2);
            let (keyword, meant) = lines[at].split_once(' ').unwrap();
            let changed = format!("{keyword} {value}");
            lines[at] = &changed;
            let answer = more + &lines.join("\n");
            prop_assert_eq!(Effective::parse(answer.as_bytes()).check_jail("exec x").is_ok(), value == meant);
        }
    }
}
