//! Sends this program to a node, into a directory that is named after the program's digest. So a second job need not
//! send the program again, and another version gets another directory.

use std::io::Seek;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use crate::error::{Attempt, Error, Result};
use crate::image::packer::inheritable;
use crate::jail::arguments::NAME;
use crate::jailer::open;
use crate::printable::Printable;
use crate::remote::connection::{Connection, Heed, finish, said};
use crate::sys::architecture::Architecture;
use crate::transfer::checksum::sha256_of;

/// Directory of the programs on a node. `customize` also keeps changes in this directory, which other users must not
/// see.
const PLACE: &str = "/var/lib/ims-sshd";

/// Time limit for a node to report whether it has the programs.
const TIME_TO_LOOK: Duration = Duration::from_secs(30);
/// Time limit for a node to receive both programs.
const TIME_TO_TAKE: Duration = Duration::from_mins(1);

/// Shell function that checks the two programs in `$place/$1`: they belong to root, other users cannot change them, and
/// their digests are $2 and $3.
const IS_WHOLE: &str = r#"
PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C
export PATH LC_ALL
umask 022
place=/var/lib/ims-sshd
is_whole() {
    case "$(stat -c '%u %a %F' "$place" 2>/dev/null)" in
        '0 700 directory' | '0 755 directory') ;;
        *) return 1 ;;
    esac
    [ "$(stat -c '%u %a %F' "$place/$1" "$place/$1/ims-sshd" "$place/$1/ims-jail-shell" 2>/dev/null)" = "0 755 directory
0 755 regular file
0 755 regular file" ] && printf '%s  ims-sshd\n%s  ims-jail-shell\n' "$2" "$3" | (cd "$place/$1" && sha256sum -c --status)
}
"#;

/// First line that [`look`] prints. If something comes before, the user's shell on the node has printed it.
const FIRST: &str = "ims-sshd looks at this node";

/// Maximum number of characters of that shell's output that a message quotes.
const LONGEST_LINE: usize = 80;

/// Script that prints the node's architecture, and whether the node has the programs. It also sets the time
/// of the programs' directory, which shows when a job last needed them.
const LOOK: &str = r#"
uname -m
if is_whole "$@"; then touch "$place/$1"; echo whole; else echo missing; fi
"#;

/// Script that receives the two programs, within $5 seconds each; the first one has $4 bytes. It renames their
/// directory once both are complete, unless another job was faster. It also removes incomplete directories that a crash
/// has left behind, and versions that no job runs and no job has needed for a day.
const TAKE: &str = r#"
set -e
mkdir -m 700 "$place" 2>/dev/null || [ -d "$place" ]
find "$place" -maxdepth 1 -name '.new.*' -mmin +60 -exec rm -rf {} + || true
new=$(mktemp -d "$place/.new.XXXXXXXX")
trap 'rm -rf "$new"' EXIT
# A message that nobody reads any more ends the shell by SIGPIPE, which would not run the line above.
trap 'exit 1' HUP INT TERM PIPE
timeout "$5" head -c "$4" >"$new/ims-sshd"
timeout "$5" cat >"$new/ims-jail-shell"
chmod 755 "$new" "$new/ims-sshd" "$new/ims-jail-shell"
is_whole "${new##*/}" "$2" "$3" || { echo 'the programs were altered or cut off on the way' >&2; exit 1; }
if ! mv -T "$new" "$place/$1" 2>/dev/null && ! is_whole "$@"; then
    old=$(mktemp -d "$place/.new.XXXXXXXX")
    mv "$place/$1" "$old"
    rm -rf "$old"
    mv -T "$new" "$place/$1"
fi
for old in "$place"/*; do
    name=${old##*/}
    case $name in "$1" | *[!0-9a-f]*) continue ;; esac
    [ ${#name} = 64 ] && [ -f "$old/ims-sshd" ] && [ -f "$old/ims-jail-shell" ] || continue
    [ -n "$(find "$old" -maxdepth 0 -mmin +1440)" ] || continue
    readlink /proc/[0-9]*/exe 2>/dev/null | grep -q -F "$old/" || rm -rf "$old"
done
"#;

/// Makes sure that the node has this program, and returns the program's path there.
pub(crate) fn provide(connection: &Connection, heed: Heed<'_>) -> Result<String> {
    let Programs { content, first, digests, name } = &Programs::own()?;
    let arguments = [name.as_str(), &digests[0], &digests[1], &first.to_string(), &TIME_TO_TAKE.as_secs().to_string()];

    let attempted = || format!("look at the build node {}", connection.host());
    let mut looking = script(connection, &look(), &arguments);
    let output =
        run(looking.stdin(Stdio::null()), TIME_TO_LOOK, heed).map_err(|e| Error::new(attempted()).because(e))?;
    let said = succeeded(&output, attempted)?;
    let unusable = || format!("use the build node {}", connection.host());
    let Some(said) = said.strip_prefix(FIRST) else {
        let why = said.lines().next().map_or_else(
            || "the user's shell there runs no command".to_owned(),
            |line| {
                let line: String = line.chars().take(LONGEST_LINE).collect();
                format!("the user's shell there prints text of its own before a command: '{}'", Printable(line))
            },
        );
        return Err(Error::new(unusable())
            .because(why)
            .advise("correct the shell's startup files, such as ~/.bashrc; scp needs that too"));
    };
    let (arch, state) = said.trim().split_once('\n').unwrap_or((said.trim(), ""));
    let own = Architecture::OWN.name();
    if arch != own {
        let why = format!("it is {arch}, and this program is for {own}");
        return Err(Error::new(unusable())
            .because(why)
            .advise("name a node of the image's architecture, from a container image of that architecture"));
    }
    if state != "whole" {
        let attempted = || format!("send ims-sshd to the build node {}", connection.host());
        let mut input = inheritable(content).attempt(attempted)?;
        input.rewind().attempt(attempted)?;
        let mut taking = script(connection, &take(), &arguments);
        let output = run(taking.stdin(input), TIME_TO_TAKE, heed).map_err(|e| Error::new(attempted()).because(e))?;
        succeeded(&output, attempted)?;
        tracing::info!(bytes = content.len(), "sent ims-sshd to {}:{PLACE}/{name}", connection.host());
    }
    Ok(Programs::path_of(name))
}

/// Returns the script that checks whether a node has the programs.
pub(crate) fn look() -> String {
    format!("{IS_WHOLE}echo '{FIRST}'{LOOK}")
}

/// Returns what the script of [`look`] prints, for a node whose shell answers itself.
pub(super) fn seen(arch: &str, is_whole: bool) -> String {
    format!("{FIRST}\n{arch}\n{}\n", if is_whole { "whole" } else { "missing" })
}

/// Returns the script that receives the programs.
pub(crate) fn take() -> String {
    format!("{IS_WHOLE}{TAKE}")
}

/// This program and `ims-jail-shell`.
pub(crate) struct Programs {
    /// Content of both programs, one after the other.
    content: Vec<u8>,
    /// Length of the first program, in bytes.
    first: usize,
    digests: [String; 2],
    /// Name of the programs' directory on a node.
    pub(crate) name: String,
}

impl Programs {
    /// Reads the executable of this process, and its helper.
    pub(crate) fn own() -> Result<Self> {
        let read = |program: &Path| std::fs::read(program).attempt(|| format!("read {}", program.display()));
        let mut content = read(&std::env::current_exe().attempt(|| "find this program's own file")?)?;
        let (first, second) = (content.len(), read(&open::program()?)?);
        let digests = [sha256_of(&content), sha256_of(&second)];
        content.extend(second);
        let list = format!("{}  ims-sshd\n{}  {NAME}\n", digests[0], digests[1]);
        Ok(Self { content, first, digests, name: sha256_of(list.as_bytes()) })
    }

    fn path_of(name: &str) -> String {
        format!("{PLACE}/{name}/ims-sshd")
    }

    /// Returns the path of `ims-sshd` on a node.
    pub(crate) fn path(&self) -> String {
        Self::path_of(&self.name)
    }
}

fn script(connection: &Connection, text: &str, arguments: &[&str]) -> Command {
    connection.command(&[&["sh", "-c", text, "sh"], arguments].concat())
}

fn run(command: &mut Command, limit: Duration, heed: Heed<'_>) -> Result<Output> {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().attempt(|| "run ssh")?;
    finish(child, limit, heed)
}

fn succeeded(output: &Output, attempted: impl FnOnce() -> String) -> Result<String> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = said(&output.stderr[..]);
    let why = if said.is_empty() { output.status.to_string() } else { said };
    Err(Error::new(attempted()).because(why))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_that_were_cut_off_leave_nothing_even_if_nobody_reads_the_message() {
        let node = tempfile::tempdir().unwrap();
        let script = take().replace("/var/lib/ims-sshd", node.path().to_str().unwrap());
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut taking = std::process::Command::new("sh");
        taking.args(["-c", &script, "sh", &"a".repeat(64), "1", "2", "5", "10"]).stdin(Stdio::null());
        assert!(!taking.stdout(Stdio::null()).stderr(writer).status().unwrap().success());
        assert_eq!(std::fs::read_dir(node.path()).unwrap().count(), 0);
    }
}
