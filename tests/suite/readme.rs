//! The pages say what is: their commands are run, their tables and messages are compared with the source.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ims_sshd::jail::capabilities::KEPT;
use ims_sshd::job::variables::{Program, VARIABLES, Variable};
use testbed::*;

const REFERENCE: &str = include_str!("../../docs/REFERENCE.md");
const TROUBLESHOOTING: &str = include_str!("../../docs/TROUBLESHOOTING.md");
const ADMIN: &str = include_str!("../../docs/ADMIN.md");
const ONE_MACHINE: &str = include_str!("../../docs/ONE_MACHINE.md");
const SECURITY: &str = include_str!("../../SECURITY.md");
const PAST_CVES: &str = include_str!("../../docs/PAST_CVES.md");
const ATTEMPTS: &str = include_str!("../attempts/table.rs");
const MAKEFILE: &str = include_str!("../../Makefile");
/// Files that read variables.
const READERS: [&str; 8] = [
    include_str!("../../src/environment/settings.rs"),
    include_str!("../../src/publish/settings.rs"),
    include_str!("../../src/store/place.rs"),
    include_str!("../../src/ims/place.rs"),
    include_str!("../../src/transfer/network.rs"),
    include_str!("../../src/local/status.rs"),
    include_str!("../../src/log/format.rs"),
    include_str!("../../src/recipe/repositories.rs"),
];
const REFUSED_CALLS: &str = include_str!("../../src/jail/refused_calls.rs");
const ACCEPT_ENV: &str = include_str!("../../src/sshd/accept_env.rs");
const EFFECTIVE: &str = include_str!("../../src/sshd/effective.rs");

/// Pages whose blocks of the language `sh` are run here. Those of docs/KUBERNETES.md are run by tests/pod/walk.rs.
const PAGES: [&str; 5] =
    [include_str!("../../README.md"), ONE_MACHINE, REFERENCE, ADMIN, include_str!("../../docs/PODS.md")];

#[test]
fn every_command_of_the_pages_does_what_it_is_there_for() {
    let commands: BTreeSet<_> = PAGES.into_iter().flat_map(commands).collect();
    assert!(commands.len() >= 20, "{commands:?}");
    for command in commands {
        let words = shell_words::split(command).unwrap();
        match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
            ["make", "install"] => install(command),
            ["make", target] => assert!(makes(target), "{command}: the Makefile has no such target"),
            ["ims-sshd", "customize", "./image.sqsh", "--output", "./out", _, ..] => unattended(command),
            ["ims-sshd", "customize", options @ ..] => customize(command, options.contains(&"--host-script")),
            ["ims-sshd", "prepare", ..] => publish(),
            ["ims-sshd", "package" | "upload", ..] => {}
            ["ims-sshd", "enter", "./image-root", "--env", ..] => {
                assert!(succeed(&mut Desk::new().shell(command)).contains("SITE=lab"), "{command}");
            }
            ["ims-sshd", "enter", "./image-root", "--discard", "--script", script] => {
                let desk = Desk::new();
                std::fs::write(desk.volume.parent.join(script), "echo tried > /etc/tried; cat /etc/tried\n").unwrap();
                assert_eq!(succeed(&mut desk.shell(command)), "tried\n", "{command}");
                assert!(!desk.volume.parent.join("image-root/etc/tried").exists(), "{command}");
            }
            ["ims-sshd", "enter", "./image-root", "--bind", ..] => {
                let desk = Desk::new();
                std::fs::create_dir(desk.volume.parent.join("repo")).unwrap();
                std::fs::write(desk.volume.parent.join("repo/package"), "").unwrap();
                assert_eq!(succeed(&mut desk.shell(command)), "package\n", "{command}");
            }
            ["ims-sshd", "enter", "./image-root", ..] => {
                let output = succeed(&mut Desk::new().shell(command));
                assert!(output.contains("Debian"), "{command}: {output}");
            }
            ["ims-sshd", "enter", "./image.sqsh", options @ ..] => {
                let desk = Desk::new();
                if options.contains(&"--yes") {
                    succeed(&mut desk.shell(command));
                } else {
                    answer(&desk, command);
                }
                let published = walk(&desk.volume.parent.join("out"));
                assert!(published.iter().any(|path| path.ends_with("manifest.json")), "{command}: {published:?}");
            }
            ["ims-sshd", "status", ..] => {
                let (environment, desk) = (Environment::open(Image::Busybox, Mode::Jailed), Desk::new());
                let parent = &environment.parent;
                assert!(succeed(desk.shell(command).env("IMAGE_ROOT_PARENT", parent)).contains("serving"), "{command}");
            }
            ["ims-sshd", "fail"] => {
                let (mut environment, desk) = (Environment::open(Image::Busybox, Mode::Jailed), Desk::new());
                succeed(desk.shell(command).env("IMAGE_ROOT_PARENT", &environment.parent));
                assert!(environment.end() == 0 && environment.signal("failed").exists(), "{command}");
            }
            ["ims-sshd", verdict @ ("complete" | "fail"), "compute"] => {
                let (mut environment, desk) = (Environment::open(Image::Busybox, Mode::Jailed), Desk::new());
                succeed(&mut desk.shell(&command.replace("compute", &environment.parent.display().to_string())));
                assert_eq!(environment.end(), 0, "{command}");
                assert_eq!(environment.signal("failed").exists(), *verdict == "fail", "{command}");
            }
            ["touch", mark @ ("/tmp/complete" | "/tmp/failed")] => {
                let mut environment = Environment::open(Image::Busybox, Mode::Jailed);
                environment.says(command);
                assert_eq!(environment.end(), 0, "{command}");
                assert!(environment.signal(mark.trim_start_matches("/tmp/")).exists(), "{command}");
            }
            _ => panic!("a page shows '{command}', and this test does not know how to run it"),
        }
    }
}

/// Installs what was built for the tests, and publishes an image with that from another directory.
fn install(command: &str) {
    let desk = Desk::new();
    let (top, dir) = (Path::new(env!("CARGO_MANIFEST_DIR")), desk.volume.dir.path());
    let built = Path::new(&IMS_SSHD).parent().unwrap();
    let rust = Path::new(env!("CARGO")).parent().unwrap();
    let path = format!("{}:{}", rust.display(), std::env::var("PATH").unwrap());
    let (stage, root) = (dir.join("stage"), dir.join("root"));
    succeed(Command::new(top.join("deploy/stage")).env("PATH", &path).arg(built).arg(&stage));
    let line = format!("{command} STAGE={} DESTDIR={}", stage.display(), root.display());
    succeed(Command::new("sh").args(["-c", &line]).env("PATH", &path).env_remove("MAKEFLAGS").current_dir(top));
    let installed = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", root.join("usr/local/bin").display());
    let mut publish = desk.shell("exec ims-sshd enter \"$SOURCE\" --output \"$OUT\" --yes -- touch /etc/installed");
    publish.current_dir("/").env("PATH", installed);
    let (source, out) = (desk.volume.parent.join("image.sqsh"), desk.volume.parent.join("out"));
    succeed(publish.env("SOURCE", source).env("OUT", &out));
    assert!(walk(&out).iter().any(|path| path.ends_with("manifest.json")), "{command}");
}

/// Enters an image at a terminal, leaves it again, and has it published.
fn answer(desk: &Desk, command: &str) {
    let mut terminal = desk.terminal(command);
    terminal.see("# ");
    terminal.line("exit");
    terminal.see("[k]: ");
    terminal.line("y");
    let (code, screen) = terminal.end();
    assert_eq!(code, 0, "{command}: {screen}");
}

/// Publishes an image without anybody logging in.
fn unattended(command: &str) {
    let desk = Desk::new();
    succeed(&mut desk.shell(command));
    let published = walk(&desk.volume.parent.join("out"));
    assert!(published.iter().any(|path| path.ends_with("manifest.json")), "{command}: {published:?}");
}

/// Runs the three steps of docs/ONE_MACHINE.md one after the other, each on what the one before has made.
fn publish() {
    let desk = Desk::new();
    for step in ["prepare", "package", "upload"] {
        let all = commands(ONE_MACHINE);
        let command = all.iter().find(|command| command.starts_with(&format!("ims-sshd {step}"))).unwrap();
        succeed(&mut desk.shell(command));
    }
    let published = walk(&desk.volume.parent.join("store"));
    assert!(published.iter().any(|path| path.ends_with("manifest.json")), "{published:?}");
}

#[test]
fn containers_of_a_pod_run_by_hand_on_one_machine() {
    let desk = Desk::new();
    let (_, lines) = ONE_MACHINE.split_once("\n```bash\n").unwrap();
    let lines = lines.split("\n```").next().unwrap();
    assert!(lines.contains("entrypoint") && lines.matches("2222").count() == 2, "{lines}");
    let login = format!("ssh {} ", shell_words::join(ssh_options(&desk.volume.key)));
    let lines = lines.replace("2222", &desk.volume.port.to_string()).replace("\nssh ", &format!("\n{login}"));
    // An environment that cannot open ends the wait.
    let lines = lines.replace("; do sleep", "; do test ! -e job/failed || exit 1; sleep");
    // Without a login nobody would end the programs.
    let lines = format!("set -e\ntrap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT\n{lines}");
    succeed(&mut desk.shell(&lines));
    let published = desk.volume.parent.join("store/image");
    for file in ["rootfs", "kernel", "initrd", "manifest.json"] {
        assert!(published.join(file).is_file(), "{:?}", walk(&published));
    }
}

/// Runs it until it is open, logs in as it says, and marks the image; one with a script does that by itself.
fn customize(command: &str, script: bool) {
    let desk = Desk::new();
    let mut program = Ended::new(desk.shell(&format!("exec {command}")).stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(program.stdout.take().unwrap()).lines().map(Result::unwrap);
    let login =
        lines.find(|line| line.trim_start().starts_with("ssh ")).unwrap_or_else(|| panic!("{command}: no ssh line"));
    if !script {
        let session = format!("{login} -o BatchMode=yes 'cat /etc/motd && touch /tmp/complete'");
        assert!(succeed(&mut desk.shell(&session)).contains("image of the tests"), "{command}");
    }
    lines.for_each(drop);
    assert_eq!(program.wait().unwrap().code(), Some(0), "{command}");
    assert!(!script || desk.volume.image_root.join("installed").exists(), "{command}: the script has not run");
}

/// A directory as the pages' reader has it: `./image-root`, a script, a key of their own, and the programs on the path.
pub struct Desk {
    pub volume: Volume,
}

impl Desk {
    pub fn new() -> Self {
        let volume = Volume::new(Image::Debian);
        let script = "#!/bin/sh\nset -e\n/bin/busybox true\ntouch /installed\n";
        std::fs::write(volume.parent.join("install.sh"), script).unwrap();
        let script =
            "#!/bin/sh\nset -e\ntouch \"$IMAGE_ROOT_PARENT/image-root/installed\" \"$IMAGE_ROOT_PARENT/complete\"\n";
        std::fs::write(volume.parent.join("copy-in.sh"), script).unwrap();
        std::fs::create_dir(volume.dir.path().join(".ssh")).unwrap();
        std::fs::copy(volume.key.with_extension("pub"), volume.dir.path().join(".ssh/id_ed25519.pub")).unwrap();
        // An image that boots, as far as its files' names say.
        let tree = volume.dir.path().join("image");
        succeed(Command::new("cp").arg("-aT").arg(cache().join("busybox")).arg(&tree));
        for (file, content) in
            [("boot/vmlinuz-6.1.0", ""), ("boot/initrd-6.1.0", ""), ("etc/motd", "image of the tests")]
        {
            std::fs::create_dir_all(tree.join(file).parent().unwrap()).unwrap();
            std::fs::write(tree.join(file), content).unwrap();
        }
        let squashfs = volume.parent.join("image.sqsh");
        succeed(Command::new("mksquashfs").args([&tree, &squashfs]).args(["-quiet", "-no-progress"]));
        Self { volume }
    }

    pub fn shell(&self, line: &str) -> Command {
        let programs = Path::new(&IMS_SSHD).parent().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", line]).current_dir(&self.volume.parent).stdin(Stdio::null()).env_clear();
        command.env("HOME", self.volume.dir.path()).env("TMPDIR", self.volume.dir.path());
        command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", programs.display()));
        command
    }

    /// At a terminal.
    pub fn terminal(&self, line: &str) -> Terminal {
        let shell = self.shell(line);
        let mut there = Command::new("sh");
        there.args(["-c", &format!("cd {} && exec {line}", self.volume.parent.display())]);
        there.envs(shell.get_envs().filter_map(|(name, value)| Some((name, value?))));
        Terminal::with(&there)
    }
}

fn makes(target: &str) -> bool {
    MAKEFILE.lines().any(|line| line.split_once(':').is_some_and(|(name, _)| name == target))
}

#[test]
fn every_variable_that_is_read_is_in_the_table_and_the_other_way_round() {
    let table: BTreeSet<_> = VARIABLES.iter().map(|variable| variable.name.to_owned()).collect();
    let sources = sources().into_iter().filter(|path| !path.ends_with("job/variables.rs"));
    let texts: String = sources.map(|path| std::fs::read_to_string(path).unwrap()).collect();
    let unread: Vec<_> = table.iter().filter(|name| !texts.contains(&format!("\"{name}\""))).collect();
    assert!(unread.is_empty(), "in src/job/variables.rs, and read nowhere: {unread:?}");
    let read: BTreeSet<_> = READERS.into_iter().flat_map(names_in).collect();
    // Sessions are given others, of which the reference has a table of its own.
    let is_given = |name: &&String| REFERENCE.contains(&format!("| `{name}` |"));
    let missing: Vec<_> = read.difference(&table).filter(|name| !is_given(name)).collect();
    assert!(missing.is_empty(), "not in src/job/variables.rs: {missing:?}");
}

#[test]
fn the_reference_has_the_table_of_variables() {
    const HEAD: &str = "| variable | format | default |\n|---|---|---|\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/REFERENCE.md");
    // The first table is of the build environment and the log, the second of what comes before and after.
    let is_first =
        |variable: &&Variable| variable.readers.iter().any(|by| [Program::Environment, Program::Log].contains(by));
    let (first, second): (Vec<_>, Vec<_>) = VARIABLES.iter().partition(is_first);
    let mut parts = REFERENCE.split(HEAD);
    let mut written = parts.next().unwrap().to_owned();
    for (part, variables) in parts.zip([first, second]) {
        let rows: String = variables.into_iter().map(|variable| variable.row() + "\n").collect();
        written += &format!("{HEAD}{rows}{}", &part[part.find("\n\n").unwrap() + 1..]);
    }
    if written != REFERENCE {
        std::fs::write(&path, written).unwrap();
        panic!("the tables of {} were not those of src/job/variables.rs: written anew", path.display());
    }
}

#[test]
fn every_message_of_the_pages_is_one_that_the_programs_print() {
    let source: String = sources().iter().map(|path| literals(&std::fs::read_to_string(path).unwrap())).collect();
    let missing = std::cell::RefCell::new(Vec::new());
    let check = |message: &str| {
        let fixed = message.strip_prefix("cannot ").unwrap_or(message);
        for part in fixed.split(": ").filter(|part| *part != "…" && !source.contains(part)) {
            missing.borrow_mut().push(format!("'{part}' of '{message}'"));
        }
    };
    let rows: Vec<_> = table(section(TROUBLESHOOTING, "## Messages")).collect();
    assert!(rows.len() > 100);
    rows.iter().for_each(|row| check(&code(&row[0])));
    // Messages printed now stand beside the earlier ones.
    let earlier: Vec<_> = table(section(TROUBLESHOOTING, "## Messages of earlier versions")).collect();
    assert!(earlier.len() > 20);
    for row in &earlier {
        let old = code(&row[0]);
        assert!(!rows.iter().any(|row| code(&row[0]) == old), "'{old}' is printed now");
        codes(&row[1]).for_each(check);
    }
    let monitored = table(section(ADMIN, "## What to monitor"));
    monitored.flat_map(|row| codes(&row[0]).map(str::to_owned).collect::<Vec<_>>()).for_each(|sign| check(&sign));
    assert!(missing.borrow().is_empty(), "nowhere in src/: {:#?}", missing.borrow());
}

#[test]
fn the_sample_of_the_log_in_json_is_one_that_the_programs_write() {
    let source: String = sources().iter().map(|path| literals(&std::fs::read_to_string(path).unwrap())).collect();
    let blocks = ADMIN.split("\n```json\n").skip(1).flat_map(|rest| rest.split("\n```").next().unwrap().lines());
    let lines: Vec<serde_json::Value> = blocks.map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.len() > 15);
    for line in lines {
        let message = line["message"].as_str().unwrap();
        let message = message.strip_prefix("closing: ").unwrap_or(message);
        // From the first path on, it is another one in each job.
        let same: Vec<_> = message.split(' ').take_while(|word| !word.contains('/')).collect();
        let same = same.join(" ");
        let known = if same == message { same } else { same + " …" };
        assert!(source.contains(&known), "nothing in src/ prints '{message}'");
    }
}

#[test]
fn security_md_has_the_capabilities_and_the_checks_of_the_source() {
    let mut rows: Vec<String> = KEPT.iter().map(|(capability, who)| format!("| `{capability}` | {who} |")).collect();
    assert_eq!(rows.len(), SECURITY.matches("| `CAP_").count());
    let (_, calls) = REFUSED_CALLS.split_once("const CALLS").unwrap();
    let calls = literals_of(calls.split_once("\n];").unwrap().0);
    let (_, documented) = SECURITY.split_once("\n## System calls\n").unwrap();
    let documented = documented.split("\n## ").next().unwrap();
    assert_eq!(calls.len(), 2 * table(documented).count());
    for call in calls.chunks(2) {
        rows.extend([format!("| `{}` |", call[0]), format!("| {} |", call[1])]);
    }
    let (_, checks) = EFFECTIVE.split_once("let wanted = [").unwrap();
    let checks = checks.lines().map(str::trim).skip(1).take_while(|line| *line != "];");
    rows.extend(checks.map(|line| format!("| `{}` |", line.split('"').nth(1).unwrap())));
    let (_, dangerous) = ACCEPT_ENV.split_once("const DANGEROUS").unwrap();
    let dangerous = dangerous.lines().skip(1).take_while(|line| *line != "];");
    rows.extend(dangerous.map(|line| format!("`{}`", line.trim().trim_matches([',', '"']))));
    assert!(rows.len() > 40);
    for row in rows {
        assert!(SECURITY.contains(&row), "SECURITY.md lacks {row}");
    }
}

#[test]
fn every_test_and_every_file_that_the_page_of_past_cves_names_exists() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = ["src", "tests"].map(|directory| walk(&top.join(directory))).concat();
    let text: String =
        files.iter().filter(|file| file.is_file()).map(|file| std::fs::read_to_string(file).unwrap()).collect();
    let rows: Vec<Vec<&str>> =
        PAST_CVES.lines().filter(|line| line.starts_with("| CVE-")).map(|line| line.split(" | ").collect()).collect();
    assert!(rows.len() > 40);
    for row in &rows {
        let [cve, .., test] = row[..] else { panic!("{row:?}") };
        assert_eq!(row.len(), 5, "{cve}");
        assert_eq!(rows.iter().filter(|other| other[0] == cve).count(), 1, "{cve} twice");
        for name in codes(test) {
            let named =
                |rest: &str| rest.split_once("fn ").is_some_and(|(_, rest)| rest.starts_with(&format!("{name}(")));
            let attempted = || ATTEMPTS.contains(&format!("\"{name}\","));
            assert!(text.split("#[test]").skip(1).any(named) || attempted(), "{cve}: there is no test '{name}'");
        }
        assert!(test.contains('`') || test.starts_with('-'), "{cve}: {test}");
    }
    for file in codes(PAST_CVES).filter(|code| code.starts_with("src/")) {
        assert!(top.join(file).is_file(), "there is no {file}");
    }
}

/// Texts between backticks.
fn codes(markdown: &str) -> impl Iterator<Item = &str> {
    markdown.split('`').skip(1).step_by(2)
}

/// String literals as they are meant: those of several lines in one.
fn literals_of(source: &str) -> Vec<String> {
    let joined: String = source.split("\\\n").map(str::trim_start).collect();
    joined.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The lines of all blocks that are marked as `sh`.
fn commands(markdown: &str) -> Vec<&str> {
    let blocks = markdown.split("\n```sh\n").skip(1).map(|rest| rest.split("\n```").next().unwrap());
    blocks.flat_map(str::lines).filter(|line| !line.is_empty()).collect()
}

fn section(page: &'static str, heading: &str) -> &'static str {
    let (_, rest) = page.split_once(&format!("\n{heading}\n")).unwrap();
    rest.split("\n## ").next().unwrap()
}

/// Rows of all tables in it whose first cell begins with code.
fn table(section: &str) -> impl Iterator<Item = Vec<String>> {
    section
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| line.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect())
}

/// Text between the first two backticks.
fn code(cell: &str) -> String {
    cell.split('`').nth(1).unwrap().to_owned()
}

/// String literals that look like a variable's name, in the part that is no test.
fn names_in(source: &str) -> Vec<String> {
    let source = source.split("#[cfg(test)]").next().unwrap();
    let name = |text: &&str| {
        text.len() > 1
            && text.contains('_')
            && text.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_')
    };
    source.split('"').filter(name).map(str::to_owned).collect()
}

fn sources() -> Vec<PathBuf> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    walk(&src).into_iter().filter(|path| path.extension() == Some("rs".as_ref())).collect()
}

/// A source's text with its string literals as they are printed: in one line, with `…` for what is put in.
fn literals(source: &str) -> String {
    let source = source.split("#[cfg(test)]").next().unwrap();
    let mut joined = String::new();
    for (at, piece) in source.split("\\\n").enumerate() {
        joined += if at == 0 { piece } else { piece.trim_start() };
    }
    for (constant, value) in [("{READY}", "ready"), ("{EXITING}", "exiting"), ("{POD_ERROR}", "pod_error")] {
        joined = joined.replace(constant, value);
    }
    let mut text = String::new();
    let mut rest = joined.as_str();
    while let Some((before, after)) = rest.split_once('{') {
        text += before;
        rest = match after.split_once('}') {
            Some((inside, after)) if inside.bytes().all(|b| b.is_ascii_alphanumeric() || b"_:?".contains(&b)) => {
                text.push('…');
                after
            }
            _ => {
                text.push('{');
                after
            }
        };
    }
    (text + rest).replace("……", "…")
}
