//! `ims-sshd node --shell`: the command to which an administrator may restrict IMS's key on a node. It answers the
//! questions that IMS asks each node, and runs jobs of exactly this version. The key then permits nothing else.

use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::error::{Attempt, Error, Result};
use crate::log::output::say;
use crate::remote::job_directory;
use crate::remote::message::is_of_log;
use crate::remote::provision::{self, Programs};
use crate::sys::architecture::Architecture;

/// Answer to IMS's question for the path of podman. It makes IMS accept the node, although jobs of this program do not
/// use podman.
const PODMAN: &str = "/usr/bin/podman";

/// A request that the near side or IMS may send.
#[derive(Debug, PartialEq, Eq)]
enum Request<'a> {
    /// `uname -i`: the architecture.
    Architecture,
    /// `which podman`: the path of podman.
    Podman,
    /// The number of jobs on this node.
    Load,
    /// Check whether this node has the programs with these digests.
    Look(&'a [String]),
    /// Receive the programs; always refused, since the node runs the installed programs.
    Take,
    /// Run the program at this path as the far side of a job, with these variables.
    Job(&'a str, &'a [String]),
}

/// Parses a command line, given as the text `line` and split into `words`.
fn parse<'a>(line: &str, words: &'a [String]) -> Option<Request<'a>> {
    match line {
        "uname -i" => return Some(Request::Architecture),
        "which podman" => return Some(Request::Podman),
        "ls -d1 /tmp/* | grep /tmp/ims_ | wc -l" => return Some(Request::Load),
        _ => {}
    }
    let is_of_log = |word: &String| word.split_once('=').is_some_and(|(name, _)| is_of_log(name));
    match words {
        [sh, c, text, name, rest @ ..] if [sh, c, name].map(String::as_str) == ["sh", "-c", "sh"] => {
            if *text == provision::look() {
                Some(Request::Look(rest))
            } else {
                (*text == provision::take()).then_some(Request::Take)
            }
        }
        [env, log @ .., program, node] if env == "env" && node == "node" && log.iter().all(is_of_log) => {
            Some(Request::Job(program, log))
        }
        _ => None,
    }
}

/// Carries out the command in `SSH_ORIGINAL_COMMAND`.
pub(crate) fn run() -> Result<u8> {
    let line = std::env::var("SSH_ORIGINAL_COMMAND").unwrap_or_default();
    let words = shell_words::split(&line).unwrap_or_default();
    let refused = || Err(Error::new("run a command on this node").because("only build jobs of IMS may use this key"));
    let Some(request) = parse(&line, &words) else { return refused() };
    let arch = Architecture::OWN.name();
    match request {
        Request::Architecture => say(&format!("{arch}\n")),
        Request::Podman => say(&format!("{PODMAN}\n")),
        Request::Load => say(&format!("{}\n", job_directory::count()?)),
        Request::Look(digests) => {
            let is_ours = digests.first() == Some(&Programs::own()?.name);
            say(&provision::seen(arch, is_ours));
        }
        Request::Take => {
            return Err(Error::new("take a program")
                .because("this node runs the one that is installed")
                .advise("install ims-sshd and ims-jail-shell of the job's container image there"));
        }
        Request::Job(program, log) => {
            if program != Programs::own()?.path() {
                return refused();
            }
            let own = std::env::current_exe().attempt(|| "find this program's own file")?;
            let mut job = Command::new(own);
            job.arg("node").envs(log.iter().filter_map(|word| word.split_once('=')));
            return Err(job.exec()).attempt(|| "start the job");
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_questions_of_ims_and_jobs_are_understood() {
        let understood = |line: &str| {
            let words = shell_words::split(line).unwrap_or_default();
            parse(line, &words).map(|request| format!("{request:?}"))
        };
        for line in
            ["uname -i", "which podman", "ls -d1 /tmp/* | grep /tmp/ims_ | wc -l", "env LOG_LEVEL=debug /x node"]
        {
            assert!(understood(line).is_some(), "{line}");
        }
        let look = shell_words::join(["sh", "-c", &provision::look(), "sh", "a", "b"]);
        assert_eq!(understood(&look).unwrap(), "Look([\"a\", \"b\"])");
        for line in [
            "",
            "sh",
            "uname -i; id",
            "uname  -i",
            "env PATH=/x /x node",
            "env /x node --shell",
            "sh -c id sh",
            "'",
            "which podman\nid",
        ] {
            assert_eq!(understood(line), None, "{line}");
        }
    }
}
