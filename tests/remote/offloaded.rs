//! `customize --node`: people and scripts without IMS.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use ims_sshd::volume::state_directory::StateDirectory;
use nix::sys::signal::Signal;
use serde_json::Value;
use testbed::job::*;
use testbed::node::{Lab, signal};
use testbed::*;

use crate::hostile::{NODE, host_key};
use crate::remote::Remote;

/// A machine with a source, a store, and a configuration of ssh in which the node is called `builder`.
struct Machine<'a> {
    lab: &'a Lab,
    dir: tempfile::TempDir,
    source: PathBuf,
}

impl<'a> Machine<'a> {
    fn new(lab: &'a Lab) -> Self {
        let dir = directory();
        let source = squashfs_of(&image(dir.path()));
        let key = dir.path().join("key");
        std::fs::copy(&lab.key, &key).unwrap();
        std::fs::set_permissions(&key, PermissionsExt::from_mode(0o600)).unwrap();
        let config = format!(
            "Host builder\n  HostName {}\n  User root\n  IdentityFile {}\n  StrictHostKeyChecking no\n  \
             UserKnownHostsFile /dev/null\n  LogLevel ERROR\n",
            lab.nodes[0].address,
            key.display()
        );
        std::fs::write(dir.path().join("config"), config).unwrap();
        // The configuration of root is this machine's own. A later -F counts.
        std::fs::create_dir(dir.path().join("bin")).unwrap();
        let ssh = dir.path().join("bin/ssh");
        std::fs::write(&ssh, format!("#!/bin/sh\nexec /usr/bin/ssh -F {}/config \"$@\"\n", dir.path().display()))
            .unwrap();
        std::fs::set_permissions(&ssh, PermissionsExt::from_mode(0o755)).unwrap();
        Self { lab, dir, source }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn command(&self, arguments: &[&str], source: &Path, output: &str, further: &[&str]) -> Command {
        self.command_on("builder", arguments, source, output, further)
    }

    fn command_on(&self, node: &str, arguments: &[&str], source: &Path, output: &str, further: &[&str]) -> Command {
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", self.path("bin"));
        let variables =
            [("PATH", path), ("IMAGE_COMPRESSION", "none".into()), ("REMOTE_HEARTBEAT_TIMEOUT_COUNT", "1".into())];
        let mut command = ims_sshd(&["customize", "--node", node, "--json", "--output", output], &variables);
        command.args(["--work", &self.path("work")]).args(arguments).arg(source).args(further);
        let mut command = self.lab.moved(&command);
        command.current_dir(self.dir.path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn run(&self, arguments: &[&str], source: &Path, further: &[&str]) -> Output {
        self.command(arguments, source, &self.path("store"), further).output().unwrap()
    }

    /// Starts one for people, and waits until they can log in. Returns it with its status.
    fn open(&self, arguments: &[&str]) -> (Child, Value) {
        let mut command = self.command(arguments, &self.source, &self.path("store"), &[]);
        let child = command.stderr(std::fs::File::create(self.path("log")).unwrap()).spawn().unwrap();
        let mut status = Value::Null;
        wait_until("it to be open", || {
            status = self.status();
            status["state"] == "serving"
        });
        (child, status)
    }

    fn status(&self) -> Value {
        let output = ims_sshd(&["status", "--json", self.source.to_str().unwrap()], &[]).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// A command line in a session.
    fn says(&self, status: &Value, command: &str) -> String {
        let words = shell_words::split(status["login"].as_str().unwrap()).unwrap();
        let mut ssh = self.lab.command(&words[0]);
        let output = ssh.args(&words[1..]).arg(command).stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{command}: {output:?}");
        text(output.stdout).trim_end().to_owned()
    }

    /// The published image of that report, unpacked.
    fn published(&self, output: &Output) -> PathBuf {
        let place = Path::new(&self.path("store")).join(place_of(&report(output)));
        let tree = place.join("tree");
        let mut unpack = Command::new("unsquashfs");
        succeed(unpack.args(["-quiet", "-no-progress", "-dest"]).args([&tree, &place.join("rootfs")]));
        assert_eq!(std::fs::read(place.join("kernel")).unwrap(), b"a kernel");
        tree
    }

    fn keeps_nothing(&self) {
        assert_eq!(std::fs::read_dir(self.path("work/ims-sshd")).unwrap().count(), 0);
    }
}

#[test]
fn people_change_an_image_on_a_node_and_it_is_published_from_here() {
    let lab = Lab::new();
    let before = lab.nodes[0].state();
    let machine = Machine::new(&lab);
    let changes = machine.path("changes.json");
    let (child, status) = machine.open(&["--changes", &changes, "--exclude", "etc/left-out", "--env", "COLOUR=blue"]);
    assert_eq!(status["node"], "builder");
    let shown = ims_sshd(&["status", machine.source.to_str().unwrap()], &[]).output().unwrap();
    assert!(text(&shown.stdout).contains("  node: builder\n"), "{shown:?}");
    let asked = machine.status();
    assert_eq!((&asked["tier"], &asked["sessions"]), (&"namespace".into(), &Value::Array(Vec::new())), "{asked}");
    assert_eq!(lab.nodes[0].jobs().len(), 1);
    assert_eq!(machine.says(&status, "echo $COLOUR"), "blue");
    // The image's name, and not the node's.
    let name = status["name"].as_str().unwrap();
    assert_eq!(machine.says(&status, "cat /proc/sys/kernel/hostname"), name);
    let words = shell_words::split(status["login"].as_str().unwrap()).unwrap();
    let mut shell = machine.lab.command(&words[0]);
    let greeted = feed(shell.arg("-tt").args(&words[1..]), b"exit\n");
    assert!(text(&greeted.stdout).contains(&format!("You are in the image root of {name}.")), "{greeted:?}");
    machine.says(&status, "echo changed > /etc/changed; touch /etc/left-out");
    machine.says(&status, "touch /tmp/complete");
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}\n{}", std::fs::read_to_string(machine.path("log")).unwrap());
    serde_json::from_slice::<Value>(&output.stdout).expect("JSON and nothing else");
    let published = machine.published(&output);
    assert_eq!(std::fs::read_to_string(published.join("etc/changed")).unwrap(), "changed\n");
    assert!(!published.join("etc/left-out").exists());
    let changes: Value = serde_json::from_slice(&std::fs::read(changes).unwrap()).unwrap();
    assert!(changes["added"].as_array().unwrap().contains(&"/etc/changed".into()), "{changes}");
    machine.keeps_nothing();
    assert_eq!(machine.status(), Value::Null);
    lab.nodes[0].is_as_before(&before);
}

#[test]
fn fail_or_a_signal_ends_it_without_an_image_here_and_there() {
    let lab = Lab::new();
    let before = lab.nodes[0].state();
    let machine = Machine::new(&lab);
    for (how, code) in [("fail", 1), ("signal", 143), ("killed", 137)] {
        let (mut child, status) = machine.open(&["--plain"]);
        assert_eq!(
            machine.says(&status, "ls /mnt/image/image-root/boot/vmlinuz"),
            "/mnt/image/image-root/boot/vmlinuz"
        );
        match how {
            "fail" => {
                let marked = ims_sshd(&["fail", machine.source.to_str().unwrap()], &[]).output().unwrap();
                assert!(marked.status.success(), "{marked:?}");
            }
            "signal" => signal(&child, Signal::SIGTERM),
            _ => signal(&child, Signal::SIGKILL),
        }
        let status = child.wait().unwrap();
        let ended =
            status.code().unwrap_or_else(|| 128 + std::os::unix::process::ExitStatusExt::signal(&status).unwrap());
        assert_eq!(ended, code, "{how}: {}", std::fs::read_to_string(machine.path("log")).unwrap());
        lab.nodes[0].is_as_before(&before);
        assert!(!Path::new(&machine.path("store")).exists());
        let (log, ended) = (std::fs::read_to_string(machine.path("log")).unwrap(), "no changes are kept");
        assert_eq!(log.matches(ended).count(), usize::from(how != "killed"), "{log}");
        assert!(!log.contains("cannot go on with the job: "), "{log}");
    }
    // The last one was killed.
    let shown = ims_sshd(&["status", machine.source.to_str().unwrap()], &[]).output().unwrap();
    let shown = text(&shown.stdout);
    assert!(shown.contains("\n  run again: ") && !shown.contains("resume"), "{shown}");
    let output = machine.run(&[], &machine.source, &["true"]);
    assert!(output.status.success(), "{output:?}");
    machine.keeps_nothing();
}

#[test]
fn fail_clears_what_a_killed_run_on_a_node_has_left() {
    let lab = Lab::new();
    let machine = Machine::new(&lab);
    let (mut child, status) = machine.open(&["--plain"]);
    let parent = Path::new(status["image_root_parent"].as_str().unwrap());
    let state = StateDirectory::place(parent);
    let run = state.with_file_name("customize").join(state.file_name().unwrap());
    signal(&child, Signal::SIGKILL);
    child.wait().unwrap();
    assert!(state.exists() && run.exists());
    let dropped = ims_sshd(&["fail", machine.source.to_str().unwrap()], &[]).output().unwrap();
    assert!(dropped.status.success(), "{dropped:?}");
    assert_eq!((state.exists(), run.exists()), (false, false));
    machine.keeps_nothing();
}

#[test]
fn command_or_script_makes_the_image_of_any_source_on_a_node() {
    let lab = Lab::new();
    let before = lab.nodes[0].state();
    let machine = Machine::new(&lab);
    let tree = machine.dir.path().join("tree");
    let tar = machine.dir.path().join("image.tar.gz");
    succeed(Command::new("tar").args(["-c", "-z", "-f"]).arg(&tar).arg("-C").arg(&tree).arg("."));
    let script = machine.path("change.sh");
    // What it starts must not read the rest of it.
    std::fs::write(&script, "#!/bin/sh -e\ncat > /etc/input\necho \"$0\" > /etc/changed\n").unwrap();
    let output = machine.run(&["--script", &script], &tar, &[]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(std::fs::read_to_string(machine.published(&output).join("etc/input")).unwrap(), "");
    let output = machine.run(&[], &tree, &["sh", "-c", "echo 'two  words' > /etc/changed"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(std::fs::read_to_string(machine.published(&output).join("etc/changed")).unwrap(), "two  words\n");
    assert!(!tree.join("etc/changed").exists(), "a source stays as it is");
    let images = || std::fs::read_dir(machine.path("store")).unwrap().count();
    let published = images();
    let output = machine.run(&[], &machine.source, &["sh", "-c", "exit 7"]);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert!(text(&output.stderr).contains("the command ended with exit code 7: the image is not published"));
    std::fs::write(&script, "#!/bin/sh\nexit 8\n").unwrap();
    let output = machine.run(&["--script", &script], &machine.source, &[]);
    assert!(text(&output.stderr).contains("the script ended with exit code 8: the image is not published"));
    let output = machine.run(&[], &machine.source, &["touch", "/tmp/failed"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let log = text(&output.stderr);
    assert!(log.contains("the image was marked failed: the image is not published"), "{log}");
    assert_eq!(images(), published);
    machine.keeps_nothing();
    lab.nodes[0].is_as_before(&before);
}

#[test]
fn directory_is_packed_only_for_a_node_that_can_be_reached() {
    let lab = Lab::new();
    let machine = Machine::new(&lab);
    let strict = std::fs::read_to_string(machine.path("config")).unwrap().replace("Checking no", "Checking yes");
    std::fs::write(machine.path("config"), strict).unwrap();
    let tree = machine.dir.path().join("tree");
    for (node, why, advice) in [
        ("builder", "Host key verification failed", "'ssh builder' by hand asks"),
        ("nowhere.invalid", "Could not resolve hostname", "'ssh -G HOST' shows"),
    ] {
        let mut command = machine.command_on(node, &[], &tree, &machine.path("store"), &["true"]);
        let output = command.output().unwrap();
        let log = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{log}");
        assert!(log.contains(why) && log.contains(advice) && !log.contains("packing"), "{log}");
        machine.keeps_nothing();
    }
}

/// In place of ssh: the far side writes hostile lines to its standard error, and then more than a pipe holds.
const HOSTILE: &str = r#"#!/bin/sh
case "$*" in *' node')
    printf '\033[2J\r2026-01-01T00:00:00Z  WARN the image is sound\n{"level":"INFO","message":"forged"}\n' >&2
    head -c 100000 /dev/zero | tr '\0' x >&2
    printf '\n2026-01-01T00:00:00Z  WARN its disk is full\n' >&2
    yes "$(head -c 900 /dev/zero | tr '\0' z)" | head -n 20000 >&2
    echo 'the very last line' >&2 ;;
esac
exec /usr/bin/ssh -F "${0%/bin/ssh}/config" "$@"
"#;

#[test]
fn standard_error_of_a_node_becomes_bounded_events_of_the_log() {
    let lab = Lab::new();
    let machine = Machine::new(&lab);
    std::fs::write(machine.path("bin/ssh"), HOSTILE).unwrap();
    for format in ["json", "text"] {
        let mut command = machine.command(&[], &machine.source, &machine.path("store"), &["true"]);
        let output = command.env("LOG_FORMAT", format).output().unwrap();
        let log = text(&output.stderr);
        assert!(output.status.success(), "{log}");
        assert!(!log.contains(['\x1b', '\r']), "{log}");
        let events: Vec<_> = log.lines().filter(|line| line.contains("builder says: ")).collect();
        // Eight megabytes, and the last lines.
        assert!((7_000..9_000).contains(&events.len()), "{}", events.len());
        assert!(events.iter().all(|line| line.len() < 1200), "{log}");
        for words in ["the image is sound", "the very last line"] {
            assert_eq!(log.matches(words).count(), 1, "{words}");
        }
        assert!(log.contains("lines of builder were left out of the log here"), "{log}");
        for line in log.lines() {
            let event: Value = if format == "json" { serde_json::from_str(line).unwrap() } else { Value::Null };
            if line.contains("its disk is full") {
                assert!(event["level"] == "WARN" || line.contains("  WARN builder says: its disk"), "{line}");
            }
            let is_ours = event["timestamp"].is_string() || format == "text" && line.starts_with("20");
            assert!(is_ours && !line.starts_with("2026-01-01") && event["message"] != "forged", "{line}");
        }
    }
    machine.keeps_nothing();
}

#[test]
fn packed_image_that_could_not_be_published_is_kept_and_the_same_command_publishes_it() {
    let lab = Lab::new();
    let machine = Machine::new(&lab);
    for end in ["resumed", "dropped"] {
        let store = machine.path("store");
        let (child, status) = machine.open(&[]);
        machine.says(&status, "echo changed > /etc/changed");
        // It could be written to when the run began.
        let _ = std::fs::remove_dir_all(&store);
        std::fs::write(&store, "").unwrap();
        machine.says(&status, "touch /tmp/complete");
        let output = child.wait_with_output().unwrap();
        let log = std::fs::read_to_string(machine.path("log")).unwrap();
        assert_eq!(output.status.code(), Some(1), "{log}");
        assert!(log.contains("the packed image is kept in "), "{log}");
        assert_eq!(lab.nodes[0].jobs().len(), 0);
        std::fs::remove_file(&store).unwrap();
        assert_eq!(machine.status()["state"], "kept");
        if end == "resumed" {
            let output = machine.run(&[], &machine.source, &[]);
            assert!(output.status.success(), "{output:?}");
            let published = machine.published(&output);
            assert_eq!(std::fs::read_to_string(published.join("etc/changed")).unwrap(), "changed\n");
        } else {
            let dropped = ims_sshd(&["fail", machine.source.to_str().unwrap()], &[]).output().unwrap();
            assert!(dropped.status.success(), "{dropped:?}");
        }
        machine.keeps_nothing();
    }
}

#[test]
fn unusable_image_from_a_node_is_not_kept_and_nobody_is_told_to_resume() {
    let lab = Lab::new();
    let machine = Machine::new(&lab);
    std::fs::write(machine.path("bin/ssh"), NODE).unwrap();
    let changes = machine.path("changes.json");
    let squashfs = format!("file(data=open('{}', 'rb').read())", machine.source.display());
    for (says, arguments, words) in [
        ("file()", &[][..], "as an image: it is a squashfs cut off"),
        (&squashfs, &["--changes", &changes], "read the node's report of changes: "),
    ] {
        let mut command = machine.command(arguments, &machine.source, &machine.path("store"), &[]);
        command.env("SAYS", format!("opened(), {says}, say('sent'), beat()")).env("HOST_KEY", host_key(&lab));
        let output = command.output().unwrap();
        let log = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{log}");
        for words in [words, "no changes are kept; run the command again"] {
            assert!(log.contains(words), "no '{words}': {log}");
        }
        assert!(!log.contains("resume"), "{log}");
        machine.keeps_nothing();
    }
}

#[test]
fn commands_of_the_page_do_what_they_are_there_for() {
    let page = include_str!("../../docs/REMOTE_NODES.md");
    let blocks = page.split("```console\n").skip(1).map(|rest| rest.split("\n```").next().unwrap());
    let lab = Lab::new();
    let machine = Machine::new(&lab);
    // The page's image has a package manager.
    let tree = machine.dir.path().join("tree");
    std::fs::create_dir_all(tree.join("usr/bin")).unwrap();
    std::fs::write(
        tree.join("usr/bin/zypper"),
        "#!/bin/sh\n[ \"$*\" = '--non-interactive update' ] && echo updated > /etc/updated\n",
    )
    .unwrap();
    std::fs::set_permissions(tree.join("usr/bin/zypper"), PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::rename(squashfs_of(&tree), machine.path("image.sqsh")).unwrap();
    std::os::unix::fs::symlink(&*IMS_SSHD, machine.path("bin/ims-sshd")).unwrap();
    let mut seen = 0;
    for line in blocks.flat_map(str::lines) {
        seen += 1;
        let command = line.strip_prefix("# ").unwrap_or_else(|| panic!("{line}"));
        let mut shell = lab.command("sh");
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", machine.path("bin"));
        shell.env("PATH", path).current_dir(machine.dir.path()).stdin(Stdio::null());
        if command.starts_with("ssh root@NODE ") {
            let said = succeed(shell.arg("-c").arg(command.replace("NODE", "builder")));
            assert!(said.contains("/sshd") && said.contains("/tmp"), "{said}");
        } else if command.starts_with("ssh-keyscan NODE ") {
            succeed(shell.arg("-c").arg(command.replace("NODE", &lab.nodes[0].address)));
            std::fs::rename(machine.path("known_hosts"), lab.key.with_file_name("known_hosts")).unwrap();
            let mut remote = Remote::new(&lab, &lab.nodes[0], Mode::Jailed);
            remote.open();
            remote.run("touch /tmp/failed");
            assert_eq!(remote.end(), 0, "{}", remote.log());
        } else {
            assert!(command.starts_with("ims-sshd customize --node root@builder ./image.sqsh"), "{command}");
            let log = std::fs::File::create(machine.path("log")).unwrap();
            let mut child = shell.arg("-c").arg(command).stdout(Stdio::null()).stderr(log).spawn().unwrap();
            if !command.contains(" -- ") {
                let marked = || {
                    let mut mark = ims_sshd(&["complete", &machine.path("image.sqsh")], &[]);
                    mark.output().unwrap().status.success()
                };
                wait_until("it to be open and marked", marked);
            }
            assert!(child.wait().unwrap().success(), "{}", std::fs::read_to_string(machine.path("log")).unwrap());
            let published = std::fs::read_dir(machine.path("out")).unwrap().flatten();
            let is_updated = |place: std::fs::DirEntry| {
                let mut look = Command::new("unsquashfs");
                look.arg("-cat").arg(place.path().join("rootfs")).arg("etc/updated");
                text(look.output().unwrap().stdout).contains("updated")
            };
            assert_eq!(
                published.filter(|place| place.file_type().unwrap().is_dir()).any(is_updated),
                command.contains(" -- ")
            );
        }
    }
    assert_eq!(seen, 4);
}

#[test]
fn options_that_make_no_sense_with_a_node_are_refused() {
    let lab = Lab::new();
    let machine = Machine::new(&lab);
    let source = machine.source.to_str().unwrap();
    for (arguments, words) in [
        (vec!["--node", "builder"], "--output"),
        (vec!["--node", "builder", "--output", "out", "--bind", "/mnt"], "--bind"),
        (vec!["--node", "builder", "--output", "out", "--host-script", "/bin/true"], "--host-script"),
        (vec!["--node=-oProxyCommand=touch x", "--output", "out"], "expected HOST or USER@HOST"),
        (vec!["--node", "a b", "--output", "out"], "expected HOST or USER@HOST"),
    ] {
        let refused = ims_sshd(&["customize"], &[]).args(arguments).arg(source).output().unwrap();
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        assert!(text(&refused.stderr).contains(words), "{refused:?}");
    }
}
