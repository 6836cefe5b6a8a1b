//! The command line of a run, as shown to a person who wants to resume its kept changes.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::log::redaction::without_secrets;
use crate::printable::Printable;
use crate::transfer::without_query;

/// Options that drop the changes kept by an earlier run.
const DROPPING: [&str; 2] = ["--fresh", "--discard"];

/// Options that change nothing but what is printed.
const PRINTING: [&str; 1] = ["--json"];

/// A run's command line.
#[derive(Debug, Clone)]
pub struct CommandLine {
    /// Name of the command: `customize` or `enter`.
    pub(crate) command: &'static str,
    /// The line that resumes kept changes. Secrets are masked, and URLs have no signature.
    pub(crate) line: String,
    /// The end of `line`: the command that runs in the image.
    inside: String,
    /// The directory to which relative paths in `line` refer.
    pub(crate) directory: PathBuf,
}

impl CommandLine {
    /// Makes the line from `words`: the first is the program, and the last `inside` words are the command that runs in
    /// the image.
    pub fn new(command: &'static str, words: &[OsString], inside: usize) -> Self {
        let (own, inside) = words.split_at(words.len().saturating_sub(inside));
        let own = own.iter().filter(|word| DROPPING.iter().all(|option| *word != option));
        let [line, inside] = [own.chain(inside).collect::<Vec<_>>(), inside.iter().collect()].map(|words| {
            let quoted = words.into_iter().map(|word| quoted(&word.to_string_lossy())).collect::<Vec<_>>();
            without_query(&without_secrets(&quoted.join(" ")))
        });
        let directory = std::env::current_dir().unwrap_or_else(|_| "/".into());
        Self { command, line, inside, directory }
    }

    /// Returns `other`, the line of an earlier run, if it differs from this line in more than the path of the program
    /// and options that affect only the output.
    pub(crate) fn differs<'a>(&self, other: &'a str) -> Option<&'a str> {
        let arguments = |line: &str| {
            let (own, inside) = line.strip_suffix(&self.inside).map_or((line, ""), |own| (own, self.inside.as_str()));
            let own = own.split(' ').skip(1).filter(|word| PRINTING.iter().all(|option| word != option));
            (own.collect::<Vec<_>>().join(" "), inside.to_owned())
        };
        (arguments(&self.line) != arguments(other)).then_some(other)
    }
}

/// Returns `line`, which was typed in `directory`, in a form that can be pasted in the current directory.
pub(crate) fn from_here(line: &str, directory: &Path) -> String {
    if std::env::current_dir().is_ok_and(|here| here == directory) {
        return line.to_owned();
    }
    format!("cd {} && {line}", quoted(&directory.to_string_lossy()))
}

/// Quotes `word` for bash, zsh and ksh, in one line of printable characters.
fn quoted(word: &str) -> String {
    if Printable(word).to_string() == word {
        return shell_words::quote(word).into_owned();
    }
    let escaped = word.chars().map(|c| match c {
        '\'' | '\\' => format!("\\{c}"),
        '\n' => "\\n".to_owned(),
        '\t' => "\\t".to_owned(),
        c if c.is_ascii_control() => format!("\\x{:02x}", c as u32),
        c if Printable(c.to_string()).to_string() == c.to_string() => c.to_string(),
        c => format!("\\U{:08x}", c as u32),
    });
    format!("$'{}'", escaped.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn line(words: &[&str], inside: usize) -> String {
        CommandLine::new("enter", &words.iter().map(OsString::from).collect::<Vec<_>>(), inside).line
    }

    #[test]
    fn a_shown_line_has_no_secrets_and_no_options_that_drop_changes() {
        for (words, inside, pasted) in [
            (
                &["ims-sshd", "enter", "a b", "--fresh", "--", "rm", "--fresh"][..],
                2,
                "ims-sshd enter 'a b' -- rm --fresh",
            ),
            (&["ims-sshd", "enter", "x", "--output", "out", "--discard"], 0, "ims-sshd enter x --output out"),
            (&["ims-sshd", "enter", "x", "sh", "-c", "a\nb 'c'"], 3, "ims-sshd enter x sh -c $'a\\nb \\'c\\''"),
            (&["ims-sshd", "enter", "x", "--env", "DB_PASS=secret"], 0, "ims-sshd enter x --env 'DB_PASS=***'"),
            (&["ims-sshd", "enter", "https://s3/x?X-Amz-Signature=s&y=z"], 0, "ims-sshd enter 'https://s3/x'"),
        ] {
            assert_eq!(line(words, inside), pasted);
        }
        assert_eq!(from_here("true", &std::env::current_dir().unwrap()), "true");
        assert_eq!(from_here("true", Path::new("/a b")), "cd '/a b' && true");
    }

    #[test]
    fn a_line_differs_in_more_than_program_and_options_of_printing() {
        let line = |text: &str, inside: usize| {
            let words: Vec<_> = text.split(' ').map(OsString::from).collect();
            CommandLine::new("customize", &words, inside)
        };
        for (line, other, differs) in [
            (line("ims-sshd customize x -- true", 1), "/usr/bin/ims-sshd customize x -- true", false),
            (line("ims-sshd customize x --json -- true", 1), "ims-sshd customize x -- true", false),
            (line("ims-sshd customize x -- true", 1), "ims-sshd customize --json x -- true", false),
            (line("ims-sshd customize x", 0), "ims-sshd customize x --json", false),
            (line("ims-sshd customize x -- true", 1), "ims-sshd customize x -- false", true),
            (line("ims-sshd customize x -- list", 1), "ims-sshd customize x -- list --json", true),
            (line("ims-sshd customize x -- list --json", 2), "ims-sshd customize x -- list", true),
            (line("ims-sshd customize x", 0), "ims-sshd customize x --in-place", true),
        ] {
            assert_eq!(line.differs(other).is_some(), differs, "{line:?} {other}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(50))]
        #[test]
        fn bash_reads_a_quoted_word_as_it_was(word in "[^\\x00]{0,20}") {
            let shown = quoted(&word);
            prop_assert!(!shown.chars().any(char::is_control), "{shown:?}");
            let mut bash = std::process::Command::new("bash");
            let echoed = bash.env("LC_ALL", "C.UTF-8").args(["-c", &format!("printf %s {shown}")]).output().unwrap();
            prop_assert_eq!(String::from_utf8_lossy(&echoed.stdout), word);
        }
    }
}
