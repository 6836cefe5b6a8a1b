//! The command line of `ims-jail-shell`, which ims-sshd, sshd and the program itself write, and its `main` reads.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::jail::plan::Plan;
use crate::jail::tier::Tier;

/// File name of the program, next to ims-sshd and in the jail.
pub(crate) const NAME: &str = "ims-jail-shell";

/// Exit code of `try` after a transient error (EX_TEMPFAIL in sysexits.h).
pub const TRANSIENT: u8 = 75;

/// A command of the program. `JAIL` is the file of the jail's [`Record`](crate::jail::record::Record).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arguments {
    /// `init`, with the arguments of a plan: make the jail around the working directory and become its first process.
    /// Standard input is the socket to the supervisor.
    Init(Plan),
    /// `serve TIER`: become the first process of the jail, from inside it.
    Serve(Tier),
    /// `session JAIL`, and `-c 'exec ims-jail-shell session JAIL'` where sshd starts the program as login shell: enter
    /// the jail and carry out `SSH_ORIGINAL_COMMAND`, or start a login shell.
    Session(PathBuf),
    /// `enter JAIL [-- PROGRAM [ARGUMENT]...]`: enter the jail and run a program of the image, or a login shell.
    Enter(PathBuf, Vec<OsString>),
    /// `inside`, with the words of an errand: carry out the request of `session` or `enter`, inside the jail.
    Inside(Vec<OsString>),
    /// `try JAIL`: enter the jail and exit, as a test.
    Try(PathBuf),
    /// `seal JAIL`: make the jail's mount of the image root read-only once the jail's processes have ended, and print
    /// the result.
    Seal(PathBuf),
}

impl Arguments {
    /// The words after the program's name.
    pub fn to_words(&self) -> Vec<OsString> {
        let (name, words): (&str, Vec<OsString>) = match self {
            Self::Init(plan) => ("init", plan.to_arguments()),
            Self::Serve(tier) => ("serve", vec![tier.name().into()]),
            Self::Session(jail) => ("session", vec![jail.into()]),
            Self::Enter(jail, program) => ("enter", [&[jail.into(), "--".into()], program.as_slice()].concat()),
            Self::Inside(errand) => ("inside", errand.clone()),
            Self::Try(jail) => ("try", vec![jail.into()]),
            Self::Seal(jail) => ("seal", vec![jail.into()]),
        };
        [vec![name.into()], words].concat()
    }

    /// The program's name and these words, for execve(2).
    pub(crate) fn to_argv(&self) -> Vec<OsString> {
        [vec![NAME.into()], self.to_words()].concat()
    }

    /// Parses the words; `None` if they are invalid. The words always come from this project's programs, so clap is not
    /// needed: building its parser would take a tenth of the time that a session needs to start.
    pub fn from_words(words: &[OsString]) -> Option<Self> {
        let (name, words) = words.split_first()?;
        Some(match (name.to_str()?, words) {
            ("init", plan) => Self::Init(Plan::from_arguments(plan)?),
            ("serve", [tier]) => Self::Serve(Tier::from_name(tier.to_str()?)?),
            ("session", [jail]) => Self::Session(jail.into()),
            ("-c", [line]) => Self::from_forced_command(line.to_str()?)?,
            ("enter", [jail]) => Self::Enter(jail.into(), Vec::new()),
            ("enter", [jail, dashes, program @ ..]) if dashes == "--" => Self::Enter(jail.into(), program.to_vec()),
            ("inside", errand) => Self::Inside(errand.to_vec()),
            ("try", [jail]) => Self::Try(jail.into()),
            ("seal", [jail]) => Self::Seal(jail.into()),
            _ => return None,
        })
    }

    /// Command line with which sshd starts `program` for every session in the jail of the record `jail`.
    pub(crate) fn forced_command(program: &Path, jail: &Path) -> String {
        // `exec` replaces the login shell, so that sshd sees the helper's exit code or signal itself.
        let words = ["exec", &program.to_string_lossy(), "session", &jail.to_string_lossy()].map(str::to_owned);
        shell_words::join(words)
    }

    /// Parses the command line with which sshd starts the program as login shell.
    fn from_forced_command(line: &str) -> Option<Self> {
        match shell_words::split(line).ok()?.as_slice() {
            [exec, _, session, jail] if exec == "exec" && session == "session" => Some(Self::Session(jail.into())),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use std::os::unix::ffi::OsStringExt;

    proptest! {
        #[test]
        fn arguments_round_trip_through_their_words(jail in "-{0,2}\\PC{0,9}", words in vec(vec(1..=255_u8, 0..6), 0..4)) {
            let (path, words) = (PathBuf::from(&jail), words.into_iter().map(OsString::from_vec).collect::<Vec<_>>());
            let plan = Plan { image_root: "/".into(), label: Some(jail.clone()), ..Plan::default() };
            for arguments in [
                Arguments::Init(plan),
                Arguments::Serve(Tier::User),
                Arguments::Session(path.clone()),
                Arguments::Enter(path.clone(), words.clone()),
                Arguments::Inside(words),
                Arguments::Try(path.clone()),
                Arguments::Seal(path.clone()),
            ] {
                prop_assert_eq!(Arguments::from_words(&arguments.to_words()), Some(arguments));
            }
            let forced = Arguments::forced_command(&path, &path);
            prop_assert_eq!(Arguments::from_words(&["-c".into(), forced.into()]), Some(Arguments::Session(path)));
        }
    }

    #[test]
    fn login_shell_runs_nothing_but_the_forced_command() {
        for line in
            ["", "exec", "id", "exec x session", "exec x enter /jail", "x session /jail", "exec x session a b", "'"]
        {
            assert_eq!(Arguments::from_words(&["-c".into(), line.into()]), None, "{line}");
        }
    }
}
