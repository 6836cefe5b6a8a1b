//! Man pages and shell completions, generated from the command line's definition.

use std::io::{self, Write};
use std::path::Path;

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Inline, Roff, bold, roman};

use crate::job::variables::Program::{self, Environment, Job, Local, Log, Publishing, Recipe, Sidecar, Status};
use crate::job::variables::{VARIABLES, Variable};
use crate::store::directory::open_or_make;
use crate::sys::tree::Tree;

/// Name and description of a file or an exit code.
type Entry = (&'static str, &'static str);

const SIGNAL_FILES: &[Entry] = &[
    ("IMAGE_ROOT_PARENT/image-root", "The image root; build/image-root in a create job."),
    ("IMAGE_ROOT_PARENT/complete", "The image is to be packed."),
    ("IMAGE_ROOT_PARENT/failed", "The image is not to be packed; takes precedence over complete."),
    ("IMAGE_ROOT_PARENT/ready", "The environment may open."),
    ("IMAGE_ROOT_PARENT/sshd_listening", "sshd accepts connections."),
    ("IMAGE_ROOT_PARENT/exiting", "The environment has closed, and nothing writes to the image root any more."),
];
const MARKS: &[Entry] =
    &[("/tmp/complete, /tmp/failed", "Files that a session creates in the image to mark it complete or failed.")];
const RUN: &[Entry] = &[("/run/ims-sshd", "State of open environments.")];
const WORK: &[Entry] =
    &[("/var/lib/ims-sshd", "Changes until they are published or discarded; --work names another directory.")];
const RECIPE: &[Entry] = &[
    ("/etc/cray/template_dictionary", "Values for the templates of a recipe, in a pod."),
    ("/etc/cray/ca/certificate_authority.crt", "Certificate of the site's authority, in a pod."),
];
const BUILT: &[Entry] = &[
    ("IMAGE_ROOT_PARENT/build/image-root", "The image root."),
    ("IMAGE_ROOT_PARENT/kiwi.log", "Log of kiwi-ng, with all details."),
    ("IMAGE_ROOT_PARENT/build_failed", "In a job, the reason why kiwi-ng failed."),
];
const CREATED: &[Entry] =
    &[("/var/lib/ims-sshd.create", "Recipes and what is built of them; --work names another directory.")];
const LOGINS: &[Entry] = &[
    ("/run/ims-sshd/customize/NAME/ssh_config", "Configuration for ssh, scp, sftp and Ansible; the host is image."),
    ("/run/ims-sshd/customize/NAME/sshd.log", "Log of the environment's sshd."),
];

const REFUSED: Entry = ("2", "The command line or a variable was refused.");
const SIGNALS: Entry = ("129, 130, 143", "Interrupted by SIGHUP, SIGINT or SIGTERM.");
const DONE: &[Entry] =
    &[("0", "The command succeeded."), ("1", "The command failed; standard error says why."), REFUSED];

/// Sections of a man page that clap does not generate.
struct Page {
    /// Programs whose variables it lists.
    variables: &'static [Program],
    files: &'static [&'static [Entry]],
    exit: &'static [Entry],
}

/// The page of the command `name`, or of the program itself if there is no such command.
fn page_of(name: &str) -> Page {
    match name {
        "entrypoint" => Page {
            variables: &[Environment],
            files: &[SIGNAL_FILES, MARKS, RUN],
            exit: &[
                ("0", "The image was marked complete or failed, or the job wanted no shell."),
                ("1", "The environment could not be opened, or it failed; the log says why."),
                REFUSED,
                ("129, 130, 143", "Interrupted by SIGHUP, SIGINT or SIGTERM; the image is marked failed."),
            ],
        },
        "customize" => Page {
            variables: &[Local, Publishing],
            files: &[MARKS, LOGINS, WORK, RUN],
            exit: &[
                ("0", "The image was marked complete, and published if requested."),
                ("1", "The image was marked failed, or the environment failed; the log says which."),
                REFUSED,
                SIGNALS,
            ],
        },
        "enter" => Page {
            variables: &[Local, Publishing],
            files: &[MARKS, WORK, RUN],
            exit: &[
                ("0", "The image was published, or the command exited with 0."),
                ("1", "The image was marked failed, or was not published because nobody could answer."),
                REFUSED,
                ("126, 127", "The program cannot be started, or the image has no program of that name."),
                ("255", "The jail could not be entered."),
                ("others", "Exit code of the command; if a signal killed the command, it kills this program too."),
            ],
        },
        "prepare" | "sidecar" | "package" | "upload" => Page {
            variables: if name == "sidecar" { &[Job, Publishing, Sidecar] } else { &[Job, Publishing] },
            files: &[SIGNAL_FILES],
            exit: &[
                ("0", "The command succeeded. sidecar: also if a customized image was marked failed."),
                ("1", "The command failed and rolled back its work; the log says why."),
                REFUSED,
                SIGNALS,
            ],
        },
        "fetch-recipe" | "wait-for-repos" | "ca-rpm" => Page {
            variables: &[Recipe],
            files: &[RECIPE],
            exit: &[
                ("0", "The command succeeded."),
                ("1", "The command failed and left nothing behind; the log says why."),
                REFUSED,
                SIGNALS,
            ],
        },
        "create" => Page {
            variables: &[Publishing, Recipe],
            files: &[RECIPE, CREATED],
            exit: &[
                ("0", "The image was built and published."),
                ("1", "A step failed; the log says why, and what was built stays."),
                REFUSED,
                SIGNALS,
            ],
        },
        "build" => Page {
            variables: &[Job, Recipe],
            files: &[RECIPE, BUILT],
            exit: &[
                ("0", "The image root was built; in a job, also if kiwi-ng failed, which build_failed says."),
                ("1", "The build was refused or failed; the log says why."),
                REFUSED,
                ("129, 130, 143", "Interrupted by SIGHUP, SIGINT or SIGTERM; nothing of the build runs or is mounted."),
            ],
        },
        "complete" | "fail" | "status" => Page { variables: &[Status], files: &[SIGNAL_FILES, RUN], exit: DONE },
        "completions" | "man" => Page { variables: &[], files: &[], exit: DONE },
        _ => Page { variables: &[Environment, Publishing, Sidecar], files: &[SIGNAL_FILES, WORK, RUN], exit: DONE },
    }
}

/// Writes a man page for `program` and one per command into the directory `into`.
pub fn write_pages(program: Command, into: &Path) -> io::Result<()> {
    // Write each page to a new file in the directory that was opened, since another user may write there too.
    let (into, _) = open_or_make(into)?;
    let mut program = naming_commands(program).disable_help_subcommand(true);
    program.build();
    for command in program.get_subcommands().filter(|command| !command.is_hide_set()) {
        write_page(command, &page_of(command.get_name()), &into)?;
    }
    write_page(&program, &page_of(""), &into)
}

/// Makes the man pages of `program` and its commands say COMMAND where clap_mangen would say SUBCOMMAND.
pub fn naming_commands(program: Command) -> Command {
    let program = program.subcommand_value_name("COMMAND").subcommand_help_heading("COMMANDS");
    program.mut_subcommands(naming_commands)
}

fn write_page(command: &Command, page: &Page, into: &Tree) -> io::Result<()> {
    let man = Man::new(command.clone());
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    let mut synopsis = Vec::new();
    man.render_synopsis_section(&mut synopsis)?;
    text.extend(with_values(&String::from_utf8_lossy(&synopsis), command).bytes());
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut text)?;
    }
    let mut roff = Roff::new();
    environment(&mut roff, page);
    entries(&mut roff, "FILES", page.files.iter().copied().flatten());
    entries(&mut roff, "EXIT STATUS", page.exit);
    if let Some(examples) = command.get_after_help() {
        roff.control("SH", ["EXAMPLES"]).control("nf", []);
        for line in examples.to_string().lines().skip(1) {
            roff.text([roman(line.trim_start())]);
        }
        roff.control("fi", []);
    }
    roff.to_writer(&mut text)?;
    into.replace(man.get_filename(), &text)
}

/// Adds the values of options, which clap_mangen omits from the synopsis.
fn with_values(synopsis: &str, command: &Command) -> String {
    let options = command.get_arguments().filter(|option| option.get_action().takes_values());
    options.fold(synopsis.to_owned(), |text, option| {
        let long = option.get_long().unwrap_or_default().replace('-', "\\-");
        let values: Vec<_> = option.get_value_names().into_iter().flatten().map(clap::builder::Str::as_str).collect();
        let (end, value) = (format!("\\fB\\-\\-{long}\\fR]"), values.join(" ").replace('-', "\\-"));
        text.replace(&end, &format!("{} \\fI{value}\\fR]", &end[..end.len() - 1]))
    })
}

fn environment(roff: &mut Roff, page: &Page) {
    roff.control("SH", ["ENVIRONMENT"]);
    let is_read = |variable: &&Variable| variable.readers.iter().any(|by| *by == Log || page.variables.contains(by));
    for variable in VARIABLES.iter().filter(is_read) {
        roff.control("TP", []).text(marked_up(&format!("`{}`", variable.name)));
        roff.text(marked_up(&format!("{}. Default: {}.", variable.format, variable.default)));
    }
}

fn entries<'a>(roff: &mut Roff, heading: &str, entries: impl IntoIterator<Item = &'a Entry>) {
    let mut entries = entries.into_iter().peekable();
    if entries.peek().is_none() {
        return;
    }
    roff.control("SH", [heading]);
    for (name, meaning) in entries {
        roff.control("TP", []).text([bold(*name)]).text([roman(*meaning)]);
    }
}

/// Parses the Markdown of a table cell: code becomes bold, a link its text.
fn marked_up(cell: &str) -> Vec<Inline> {
    let mut text = String::new();
    let mut rest = cell;
    while let Some((before, after)) = rest.split_once("](") {
        let (before, link) = before.rsplit_once('[').unwrap_or((before, ""));
        text = text + before + link;
        rest = after.split_once(')').map_or(after, |(_, after)| after);
    }
    text += rest;
    let pieces = text.split('`').enumerate();
    pieces.map(|(at, piece)| if at % 2 == 1 { bold(piece) } else { roman(piece) }).collect()
}

/// Writes completions of `program` for `shell`.
pub fn write_completions(program: &mut Command, shell: Shell, to: &mut impl Write) -> io::Result<()> {
    let name = program.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, program, &name, &mut script);
    // clap_complete 4.6 names bash's branches in two ways if the program's name contains a hyphen, so that none matches
    // (clap-rs/clap#6421).
    let [wrong, right] = ["__subcmd__", "__"].map(|hyphen| name.replace('-', hyphen) + "__subcmd__");
    let script = String::from_utf8_lossy(&script).replace(&wrong, &right);
    to.write_all(with_names(&script, shell).as_bytes())
}

/// Commands that take a run's name.
const NAMED: [&str; 3] = ["complete", "fail", "status"];

/// Shell command that prints the names of runs; nothing unless root.
const NAMES: &str = r"ims-sshd status 2>/dev/null | sed -n 's/^\([^ /:]*\): .*/\1/p'";

/// Adds the names of runs to completions that need them; clap_complete only completes files.
fn with_names(script: &str, shell: Shell) -> String {
    match shell {
        Shell::Bash => NAMED.iter().fold(script.to_owned(), |script, command| {
            // This matches the commands themselves, and not those below `help`, whose branches have other names.
            let branch = format!("        ims__sshd__subcmd__{command})\n            opts=\"");
            script.replace(&branch, &format!("{branch}$({NAMES}) "))
        }),
        Shell::Zsh => {
            let lines = script.lines().map(|line| match line.strip_suffix(":_files' \\") {
                Some(begin) if begin.starts_with("'::name ") => format!("{begin}:_ims-sshd_names' \\\n"),
                _ => format!("{line}\n"),
            });
            let names =
                format!("\n_ims-sshd_names() {{\n    compadd -- $({NAMES})\n    _files\n}}\n\n_ims-sshd() {{\n");
            lines.collect::<String>().replacen("\n_ims-sshd() {\n", &names, 1)
        }
        Shell::Fish => {
            let commands = NAMED.join(" ");
            format!(
                "{script}complete -c ims-sshd -n \"__fish_ims_sshd_using_subcommand {commands}\" -a \"({NAMES})\"\n"
            )
        }
        _ => script.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_becomes_bold_and_a_link_becomes_its_text() {
        let marked = marked_up("`A` or [see](#there), `B`");
        assert_eq!(marked, [roman(""), bold("A"), roman(" or see, "), bold("B"), roman("")]);
    }
}
