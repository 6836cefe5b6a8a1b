//! Completions in the shells themselves, and man pages as `man` shows them.

use std::os::unix::fs::{chown, lchown, symlink};
use std::process::Command;

use testbed::*;

/// Lines that are begun, and an offer that has to come.
const OFFERS: [(&str, &str); 6] = [
    ("ims-sshd cust", "customize"),
    ("ims-sshd customize --po", "--port"),
    ("ims-sshd enter --disc", "--discard"),
    ("ims-sshd package --excl", "--exclude"),
    ("ims-sshd status --js", "--json"),
    ("ims-sshd completions zs", "zsh"),
];

fn completions(shell: &str) -> (tempfile::TempDir, std::path::PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    // zsh looks for this name.
    let file = directory.path().join("_ims-sshd");
    std::fs::write(&file, succeed(Command::new(&IMS_SSHD).args(["completions", shell]))).unwrap();
    (directory, file)
}

#[test]
fn bash_completes_commands_and_their_options() {
    let (_directory, script) = completions("bash");
    let (directory, _) = completions("bash");
    std::fs::write(directory.path().join("image.sqsh"), "").unwrap();
    let mut bash = Command::new("bash");
    let mut terminal =
        Terminal::with(bash.args(["--norc", "--noprofile", "-i"]).current_dir(&directory).env("PS1", "first# "));
    terminal.see("first# ");
    terminal.line(&format!("cd {}; source {}; PS1='[pro'\"mpt]# \"", directory.path().display(), script.display()));
    terminal.see("[prompt]# ");
    for (line, offer) in OFFERS {
        terminal.keys(&format!("{line}\t"));
        terminal.see(offer);
        // Discards the line.
        terminal.key('u');
    }
    terminal.keys("ims-sshd customize imag\t");
    terminal.see("image.sqsh");
    leave(terminal);
}

#[test]
fn zsh_completes_commands_and_their_options() {
    let (directory, _) = completions("zsh");
    let mut zsh = Command::new("zsh");
    let mut terminal = Terminal::with(zsh.args(["-f", "-i"]).env("PS1", "first# "));
    terminal.see("first# ");
    let shown = directory.path().display();
    terminal.line(&format!("fpath=({shown} $fpath); autoload -U compinit; compinit -D -u; PS1='[pro'\"mpt]# \""));
    terminal.see("[prompt]# ");
    for (line, offer) in OFFERS {
        terminal.keys(&format!("{line}\t"));
        terminal.see(offer);
        // Discards the line.
        terminal.key('u');
    }
    leave(terminal);
}

/// Ends the shell, which heeds no signal at a prompt.
fn leave(mut terminal: Terminal) {
    terminal.key('u');
    terminal.line("exit");
    terminal.end();
}

#[test]
fn fish_completes_commands_and_their_options() {
    let (_directory, script) = completions("fish");
    // clap_complete has none for fish of what stands for itself.
    for (line, offer) in &OFFERS[..5] {
        let asked = format!("source {}; complete -C '{line}'", script.display());
        let offers = succeed(Command::new("fish").args(["--no-config", "-c", &asked]));
        assert!(offers.lines().any(|line| line.split('\t').next() == Some(*offer)), "{line}: {offers}");
    }
}

#[test]
fn shells_complete_the_names_of_what_is_open() {
    let name = format!("completed-{}", std::process::id());
    let dir = tempfile::tempdir_in(cache()).unwrap();
    let image = dir.path().join(&name);
    succeed(Command::new("cp").arg("-aT").arg(cache().join("busybox")).arg(&image));
    let mut open = Command::new(&IMS_SSHD);
    open.arg("enter").arg(&image).args(["sh", "-c", "echo open; exec sleep 600"]).stdout(std::process::Stdio::piped());
    let mut open = Ended::new(open.spawn().unwrap());
    std::io::Read::read_exact(open.stdout.as_mut().unwrap(), &mut [0; 5]).unwrap();
    let programs = std::path::Path::new(&IMS_SSHD).parent().unwrap().display().to_string();
    let path = format!("{programs}:/usr/bin:/bin");

    let (_directory, script) = completions("bash");
    for command in ["complete", "fail", "status"] {
        let asked = format!(
            "source {}; COMP_WORDS=(ims-sshd {command} compl); COMP_CWORD=2; _ims__sshd ims-sshd compl {command}; echo ${{COMPREPLY[*]}}",
            script.display()
        );
        let offers = succeed(Command::new("bash").args(["-c", &asked]).env("PATH", &path));
        assert!(offers.split_whitespace().any(|offer| offer == name), "{command}: {offers}");
    }
    let (_directory, script) = completions("fish");
    let asked = format!("source {}; complete -C 'ims-sshd fail compl'", script.display());
    let offers = succeed(Command::new("fish").args(["--no-config", "-c", &asked]).env("PATH", &path));
    assert!(offers.lines().any(|offer| offer == name), "{offers}");
    let (directory, _) = completions("zsh");
    let mut zsh = Command::new("zsh");
    let mut terminal = Terminal::with(zsh.args(["-f", "-i"]).env("PS1", "first# ").env("PATH", &path));
    terminal.see("first# ");
    let shown = directory.path().display();
    terminal.line(&format!("fpath=({shown} $fpath); autoload -U compinit; compinit -D -u; PS1='[pro'\"mpt]# \""));
    terminal.see("[prompt]# ");
    terminal.keys(&format!("ims-sshd status {}\t", &name[..12]));
    terminal.see(&name);
    leave(terminal);
}

#[test]
fn man_shows_a_page_of_every_command_with_all_its_sections() {
    let directory = tempfile::tempdir().unwrap();
    succeed(Command::new(&IMS_SSHD).arg("man").arg(directory.path()));
    let mut pages = walk(directory.path());
    pages.retain(|page| page.is_file());
    let help = succeed(Command::new(&IMS_SSHD).arg("--help"));
    let commands = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let commands = commands.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   ")).count();
    assert_eq!(pages.len(), commands, "one for each command but 'help', and the program's own");
    for page in &pages {
        let output =
            Command::new("man").args(["-l", "--warnings=w"]).arg(page).env("MANWIDTH", "100").output().unwrap();
        let (shown, complaints) = (text(output.stdout), text(output.stderr));
        assert!(output.status.success() && complaints.is_empty(), "{page:?}: {complaints}");
        let mut sections = vec!["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "ENVIRONMENT", "EXIT STATUS", "EXAMPLES"];
        if !["completions", "man"].iter().any(|name| page.ends_with(format!("ims-sshd-{name}.1"))) {
            sections.push("FILES");
        }
        for section in sections {
            assert!(shown.contains(&format!("\n{section}\n")), "{page:?} lacks {section}: {shown}");
        }
        assert_eq!(shown.contains("\nCOMMANDS\n"), page.ends_with("ims-sshd.1"), "{page:?}: {shown}");
        assert!(!shown.to_lowercase().contains("subcommand"), "{page:?}: {shown}");
        assert!(!shown.contains("EXTRA") && !shown.contains('`') && !shown.contains("]("), "{page:?}: {shown}");
    }
}

#[test]
fn man_pages_are_new_files_and_no_link_or_fifo_of_another_user_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let [pages, victim, way] = ["pages", "victim", "way"].map(|name| dir.path().join(name));
    std::fs::create_dir(&pages).unwrap();
    std::fs::write(&victim, "kept").unwrap();
    symlink(&victim, pages.join("ims-sshd.1")).unwrap();
    succeed(Command::new("mkfifo").arg(pages.join("ims-sshd-enter.1")));
    symlink(&pages, &way).unwrap();
    lchown(&way, Some(1234), Some(1234)).unwrap();
    for path in [pages.join("ims-sshd.1"), pages.clone()] {
        lchown(path, Some(1234), Some(1234)).unwrap();
    }
    chown(pages.join("ims-sshd-enter.1"), Some(1234), Some(1234)).unwrap();
    let man = |to: &std::path::Path| {
        let line = ["10", &*IMS_SSHD, "man", to.to_str().unwrap()];
        Command::new("timeout").args(line).output().unwrap()
    };
    let output = man(&pages);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(std::fs::read_to_string(&victim).unwrap(), "kept");
    for name in ["ims-sshd.1", "ims-sshd-enter.1"] {
        assert!(std::fs::symlink_metadata(pages.join(name)).unwrap().is_file(), "{name}");
    }
    let refused = man(&way.join("deeper"));
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(text(&refused.stderr).contains("is a link, which belongs to user 1234"), "{refused:?}");
    assert!(!pages.join("deeper").exists());
}
