//! One machine, no pod: `customize`, `enter`, `complete`, `fail`, `status`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use testbed::*;

/// A copied image root of its own.
fn image_root() -> tempfile::TempDir {
    let dir = tempfile::tempdir_in(cache()).unwrap();
    succeed(Command::new("cp").arg("-aT").arg(cache().join("busybox")).arg(dir.path().join("image")));
    dir
}

/// Starts `customize` and reads what it prints up to the line that ends its announcement.
fn customize(image_root: &Path, arguments: &[&str]) -> (Ended, String) {
    let child = Command::new(&IMS_SSHD)
        .arg("customize")
        .arg(image_root)
        .arg("--work")
        .arg(image_root.with_file_name("work"))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut child = Ended::new(child);
    let mut printed = String::new();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    while !printed.contains("ims-sshd complete") {
        let length = lines.read_line(&mut printed).unwrap();
        assert!(length > 0, "{printed} {}", text(std::io::read_to_string(child.stderr.take().unwrap()).unwrap()));
    }
    (child, printed)
}

fn run_pasted(printed: &str, command: &str) -> Output {
    let line = printed.lines().find(|l| l.trim_start().starts_with("ssh ")).unwrap();
    Command::new("sh").args(["-c", &format!("{} -o LogLevel=ERROR '{command}'", line.trim())]).output().unwrap()
}

fn parent_in(printed: &str) -> PathBuf {
    let config = printed.split_once("ssh -F ").unwrap().1.split_whitespace().next().unwrap();
    Path::new(config).parent().unwrap().into()
}

fn ims_sshd(arguments: &[&str]) -> Output {
    Command::new(&IMS_SSHD).args(arguments).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn the_printed_line_logs_in_and_complete_is_success() {
    let image = image_root();
    let (mut child, printed) = customize(&image.path().join("image"), &[]);
    let line = printed.lines().find(|line| line.trim_start().starts_with("ssh ")).unwrap().trim();
    let config = line.strip_prefix("ssh -F ").and_then(|rest| rest.strip_suffix(" image")).expect(line);
    assert!(Path::new(config).starts_with(parent_in(&printed)), "{line}");
    // Other clients take the same file.
    let sftp = feed(Command::new("sftp").args(["-F", config, "-b", "-", "image"]), b"pwd\n");
    assert!(sftp.status.success() && text(&sftp.stderr).is_empty(), "{sftp:?}");
    let output = run_pasted(&printed, "echo in > /root/file; touch /tmp/complete; echo here");
    assert_eq!(text(output.stdout), "here\n");
    assert!(child.wait().unwrap().success());
    assert_eq!(std::fs::read_to_string(image.path().join("image/root/file")).unwrap(), "in\n");
    assert!(!parent_in(&printed).exists(), "the run's directory is left");
    assert!(std::fs::read_dir(image.path().join("image/tmp")).unwrap().next().is_none());
}

#[test]
fn fifty_clients_log_in_at_once_and_one_connection_carries_thirty_sessions() {
    let image = image_root();
    let (mut child, printed) = customize(&image.path().join("image"), &[]);
    let line = printed.lines().find(|line| line.trim_start().starts_with("ssh ")).unwrap().trim();
    let config = line.strip_prefix("ssh -F ").and_then(|rest| rest.strip_suffix(" image")).expect(line);
    let start = |options: &[&str]| {
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", config]).args(options).args(["image", "read line; echo $line"]);
        ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let all_answer = |clients: Vec<std::process::Child>, what: &str| {
        let ends: Vec<_> = clients
            .into_iter()
            .map(|mut client| {
                let _ = client.stdin.take().unwrap().write_all(b"here\n");
                let output = client.wait_with_output().unwrap();
                (text(output.stdout), text(output.stderr))
            })
            .collect();
        let failed: Vec<_> = ends.iter().filter(|(said, why)| said != "here\n" || why.contains("refused")).collect();
        assert!(failed.is_empty(), "{what}: {} failed: {failed:#?}", failed.len());
    };
    // Ansible with 50 forks opens as many connections.
    all_answer((0..50).map(|_| start(&[])).collect(), "connections");
    let socket = image.path().join("master").display().to_string();
    let master = Command::new("ssh").args(["-F", config, "-M", "-S", &socket, "-f", "-N", "image"]).status().unwrap();
    assert!(master.success());
    all_answer((0..30).map(|_| start(&["-S", &socket, "-o", "ControlMaster=no"])).collect(), "sessions");
    succeed(Command::new("ssh").args(["-F", config, "-S", &socket, "-O", "exit", "image"]));
    assert!(ims_sshd(&["complete", &parent_in(&printed).display().to_string()]).status.success());
    assert!(child.wait().unwrap().success());
}

#[test]
fn closed_output_and_closed_terminal_end_customize_in_order() {
    let image = image_root();
    let root = image.path().join("image");
    // The same happens in `customize … 2>&1 | head`.
    let (output, theirs) = std::io::pipe().unwrap();
    let mut command = Command::new(&IMS_SSHD);
    command
        .arg("customize")
        .arg(&root)
        .arg("--work")
        .arg(image.path().join("work"))
        .stdin(Stdio::null())
        .stdout(theirs.try_clone().unwrap())
        .stderr(theirs);
    let mut child = Ended::new(command.spawn().unwrap());
    drop(command);
    let printed = announcement(output);
    let said = run_pasted(&printed, "echo in > /root/file; touch /tmp/complete; echo here");
    assert_eq!(text(said.stdout), "here\n", "nobody reads its log any more");
    assert!(child.wait().unwrap().success());
    assert!(!parent_in(&printed).exists(), "the run's directory is left");

    let mut terminal = Command::new("script");
    terminal.args([
        "-qec",
        &format!("{IMS_SSHD} customize {} --work {}", root.display(), image.path().join("work").display()),
        "/dev/null",
    ]);
    let mut terminal = Ended::new(terminal.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
    let printed = announcement(terminal.stdout.take().unwrap());
    let parent = parent_in(&printed);
    let sshd = || processes_with(&format!("-f {}/", parent.display())).len();
    assert_eq!(sshd(), 1, "{printed}");
    terminal.kill().unwrap();
    wait_until("the close", || !parent.exists());
    assert_eq!(sshd(), 0, "sshd goes on listening");
    wait_until("its end", || processes_with(&format!("customize {}", root.display())).is_empty());
}

/// Output of `customize` up to the line that ends its announcement. Nobody reads the rest.
fn announcement(output: impl std::io::Read) -> String {
    let (mut lines, mut printed) = (BufReader::new(output), String::new());
    while !printed.contains("ims-sshd complete") {
        assert!(lines.read_line(&mut printed).unwrap() > 0, "{printed}");
    }
    printed
}

#[test]
fn a_failed_image_is_exit_code_1_and_stays_as_it_is() {
    let image = image_root();
    let (mut child, printed) = customize(&image.path().join("image"), &["--plain"]);
    let parent = parent_in(&printed);
    let output = run_pasted(&printed, &format!("ls {}/image-root/etc", parent.display()));
    assert_eq!(text(output.stdout), "passwd\n", "a plain session sees it beside itself");
    let parent = parent.display().to_string();
    let status = text(ims_sshd(&["status", &parent]).stdout);
    assert!(status.contains(": serving since ") && status.contains(", tier plain"), "{status}");
    assert!(ims_sshd(&["fail", &parent]).status.success());
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(
        image.path().join("image/bin/busybox").exists(),
        "the image root was mounted there, and is not ours to remove"
    );
}

#[test]
fn status_tells_where_it_is_as_json_too() {
    let environment = Volume::new(Image::Busybox).start(Mode::Jailed);
    wait_until("the entrypoint to wait", || environment.log_text().contains("waiting for"));
    let status = || {
        let output = ims_sshd(&["status", "--json", &environment.parent.display().to_string()]);
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        (report["state"].clone(), report["verdict"].clone())
    };
    assert_eq!(status(), ("waiting".into(), serde_json::Value::Null));
    environment.touch("ready");
    environment.wait_for("sshd_listening");
    assert_eq!(status(), ("serving".into(), serde_json::Value::Null));
    assert!(ims_sshd(&["complete", &environment.parent.display().to_string()]).status.success());
    environment.wait_for("exiting");
    assert_eq!(status(), ("done".into(), "complete".into()));
    let late = ims_sshd(&["fail", &environment.parent.display().to_string()]);
    assert_eq!(late.status.code(), Some(1));
    assert!(text(late.stderr).contains("has already ended"));
    let nowhere = ims_sshd(&["status", "/nowhere"]);
    assert!(text(nowhere.stderr).contains("cannot open the image root parent /nowhere: it does not exist"));
}

#[test]
fn a_script_makes_it_unattended() {
    let image = image_root();
    let script = image.path().join("script");
    std::fs::write(
        &script,
        "echo scripted > $IMAGE_ROOT_PARENT/image-root/root/file; touch $IMAGE_ROOT_PARENT/complete\n",
    )
    .unwrap();
    let output = ims_sshd(&[
        "customize",
        &image.path().join("image").display().to_string(),
        "--host-script",
        &script.display().to_string(),
    ]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(std::fs::read_to_string(image.path().join("image/root/file")).unwrap(), "scripted\n");
}

#[test]
fn an_own_key_and_port_are_used() {
    let image = image_root();
    let key = image.path().join("key");
    succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key));
    let port = free_port().to_string();
    let public = key.with_extension("pub");
    let (mut child, printed) =
        customize(&image.path().join("image"), &["--authorized-key", &public.display().to_string(), "--port", &port]);
    assert!(run_pasted(&printed, "true").status.success(), "the line names the private key beside the public one");
    let login = |key: &Path| {
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "none", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=no"]);
        ssh.args(["-o", "UserKnownHostsFile=/dev/null", "-p", &port, "-i"])
            .arg(key)
            .args(["root@127.0.0.1", "touch /tmp/failed"]);
        ssh.output().unwrap()
    };
    let stranger = image.path().join("stranger");
    succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&stranger));
    assert!(text(login(&stranger).stderr).contains("Permission denied"));
    assert!(login(&key).status.success());
    assert_eq!(child.wait().unwrap().code(), Some(1));
}

#[test]
fn another_host_key_than_the_environments_is_refused() {
    let image = image_root();
    let (mut child, printed) = customize(&image.path().join("image"), &[]);
    let run = parent_in(&printed);
    let known = std::fs::read_to_string(run.join("known_hosts")).unwrap();
    let other = run.join("id_ed25519.pub");
    std::fs::write(run.join("known_hosts"), format!("image {}", std::fs::read_to_string(other).unwrap())).unwrap();
    let refused = run_pasted(&printed, "true");
    assert_eq!(refused.status.code(), Some(255), "{refused:?}");
    assert!(text(refused.stderr).contains("Host key verification failed"));
    std::fs::write(run.join("known_hosts"), known).unwrap();
    assert!(run_pasted(&printed, "touch /tmp/complete").status.success());
    assert!(child.wait().unwrap().success());
}

#[test]
fn sessions_of_customize_do_not_reach_the_machines_terminals() {
    let image = image_root();
    let (mut child, printed) = customize(&image.path().join("image"), &[]);
    assert_eq!(text(run_pasted(&printed, "ls /dev/pts").stdout), "ptmx\n");
    let mounts = text(run_pasted(&printed, "cat /proc/self/mountinfo").stdout);
    assert!(mounts.lines().any(|line| line.contains(" /dev/pts ") && line.contains("max=1024")), "{mounts}");
    run_pasted(&printed, "touch /tmp/complete");
    assert!(child.wait().unwrap().success());
}

#[test]
fn enter_runs_a_command_in_the_jail_and_passes_its_end_on() {
    let image = image_root();
    let path = image.path().join("image").display().to_string();
    let output = ims_sshd(&["enter", &path, "--", "sh", "-c", "cat /proc/1/comm; echo $PATH; exit 7"]);
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    let said = text(output.stdout);
    assert!(said.starts_with("init\n/usr/local/sbin:"), "{said}");
    let output =
        feed(Command::new(&IMS_SSHD).args(["enter", &path]), b"echo $0; pwd; touch /root/file; (sleep 6543 &)\n");
    assert_eq!(text(output.stdout), "-sh\n/root\n");
    assert!(processes_with("sleep 6543").is_empty(), "what is left inside ends with it");
    assert!(!image.path().join("image/proc").exists() && image.path().join("image/root/file").exists());
    let missing = ims_sshd(&["enter", &path, "--", "no-such-program"]);
    assert_eq!(missing.status.code(), Some(127));
    let killed = ims_sshd(&["enter", &path, "--", "sh", "-c", "kill -KILL $$"]);
    assert_eq!(killed.status.signal(), Some(9));
    let register = std::fs::read_dir("/run/ims-sshd/.runs").into_iter().flatten().flatten();
    let texts = register.filter_map(|run| std::fs::read_to_string(run.path().join("entry")).ok());
    assert!(!texts.into_iter().any(|text| text.contains(&path)), "a run that has ended is not registered");
}

#[test]
fn a_script_whose_interpreter_is_missing_or_has_windows_line_ends_is_told_so() {
    let image = image_root();
    let (path, script) = (image.path().join("image").display().to_string(), image.path().join("script"));
    for (content, told) in [
        ("#!/bin/no-bash -e\ntrue\n", "its first line names /bin/no-bash, which the image lacks"),
        ("#!/bin/sh\r\ntrue\r\n", "its first line has Windows line ends"),
    ] {
        std::fs::write(&script, content).unwrap();
        let output = ims_sshd(&["enter", &path, "--", "/script"]);
        assert!(text(&output.stderr).contains("the program or its loader"), "{output:?}");
        std::fs::copy(&script, image.path().join("image/odd")).unwrap();
        succeed(Command::new("chmod").arg("+x").arg(image.path().join("image/odd")));
        let output = ims_sshd(&["enter", &path, "--", "/odd"]);
        assert_eq!(output.status.code(), Some(127), "{output:?}");
        assert!(text(&output.stderr).contains(told), "{output:?}");
    }
}

#[test]
fn an_option_after_the_command_is_refused_unless_two_hyphens_stand_before_the_command() {
    let image = image_root();
    let path = image.path().join("image").display().to_string();
    for arguments in [
        &["enter", &path, "sh", "-c", "touch /late", "--discard"][..],
        &["enter", &path, "touch", "/late", "--log-format=json"],
        &["customize", "image.sqsh", "touch", "/late", "--output", "out"],
    ] {
        let output = ims_sshd(arguments);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(text(&output.stderr).contains("options come before the command"), "{output:?}");
    }
    assert!(!image.path().join("image/late").exists());
    for command in [&["--", "echo", "--discard"][..], &["echo", "--help"], &["echo", "--version"]] {
        let output = ims_sshd(&[&["enter", &path], command].concat());
        assert_eq!(text(&output.stdout).trim(), *command.last().unwrap(), "{output:?}");
    }
}

#[test]
fn enter_ends_nothing_but_what_it_started() {
    let image = image_root();
    let root = image.path().join("image");
    let mut editor = Ended::new(Command::new("sleep").arg("6544").current_dir(root.join("bin")).spawn().unwrap());
    for tier in TIERS {
        let line = format!("cd {} && {IMS_SSHD} enter . -- sh -c 'sleep 6545 &' && echo still here", root.display());
        let mut shell = Command::new("sh");
        let output = shell.args(["-c", &line]).env("IMS_JAIL_TIER", tier).stdin(Stdio::null()).output().unwrap();
        assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("still here\n", Some(0)), "{output:?}");
        assert!(processes_with("sleep 6545").is_empty(), "{tier}: what is left inside ends with it");
        assert!(editor.try_wait().unwrap().is_none(), "{tier}: somebody else's process was ended");
    }
    // A customization script that stands in the image root while it enters it.
    let volume = Volume::new(Image::Busybox);
    let script = volume.dir.path().join("script");
    let lines = format!(
        "cd $IMAGE_ROOT_PARENT/image-root && {IMS_SSHD} enter . -- touch /root/entered && touch $IMAGE_ROOT_PARENT/complete\n"
    );
    std::fs::write(&script, lines).unwrap();
    let mut environment = volume.start_with(Mode::Plain, &[("CUSTOMIZATION_SCRIPT", script.to_str().unwrap())]);
    environment.touch("ready");
    assert_eq!(environment.end(), 0, "{}", environment.log_text());
    assert!(environment.signal("complete").exists() && environment.image_root.join("root/entered").exists());
}

#[test]
fn an_image_root_that_cannot_be_is_refused() {
    for (command, path, reason, code) in [
        ("customize", "/", "the machine's own root", 2),
        ("customize", "/nowhere", "No such file", 2),
        ("customize", "/etc/passwd", "--output is missing", 2),
        ("enter", "/", "the machine's own root", 2),
        ("enter", "/nowhere", "No such file", 2),
        ("enter", "/etc/passwd", "cannot use /etc/passwd as an image", 1),
        ("enter", "", "expected a URL, a ", 2),
    ] {
        let output = ims_sshd(&[command, path]);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert!(text(&output.stderr).contains(reason), "{output:?}");
    }
}

/// A directory with a squashfs of a busybox that boots, for a person at a terminal.
fn desk() -> tempfile::TempDir {
    let dir = image_root();
    let image = dir.path().join("image");
    std::fs::create_dir(image.join("boot")).unwrap();
    for name in ["vmlinuz-6.1.0", "initrd-6.1.0"] {
        std::fs::write(image.join("boot").join(name), name).unwrap();
    }
    std::fs::write(image.join("etc/profile"), format!("PS1='{PROMPT}'\n")).unwrap();
    let squashfs = dir.path().join("image.sqsh");
    succeed(Command::new("mksquashfs").args([&image, &squashfs]).args(["-quiet", "-no-progress"]));
    dir
}

/// `ims-sshd enter image.sqsh` in a terminal, once the shell in the image prompts.
fn enter_at_a_terminal(desk: &Path, options: &str) -> Terminal {
    let line = format!("cd {} && exec {IMS_SSHD} enter image.sqsh --work work {options}", desk.display());
    let mut terminal = Terminal::with(Command::new("sh").args(["-c", &line]));
    terminal.see(PROMPT);
    terminal
}

/// Files of the one image that was published.
fn published(desk: &Path) -> String {
    let images: Vec<_> = std::fs::read_dir(desk.join("out")).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(images.len(), 1, "{images:?}");
    assert!(images[0].join("manifest.json").exists());
    succeed(Command::new("unsquashfs").arg("-l").arg(images[0].join("rootfs")))
}

fn is_empty(directory: PathBuf) -> bool {
    std::fs::read_dir(directory).map_or(true, |mut entries| entries.next().is_none())
}

#[test]
fn enter_asks_at_the_end_whether_to_publish_and_goes_on_with_what_was_kept() {
    let desk = desk();
    let path = desk.path();
    let mut terminal = enter_at_a_terminal(path, "--output out");
    assert_eq!(terminal.ask("touch /root/first; echo $0"), "-sh");
    terminal.line("false; exit");
    terminal.see("(d)iscard them [k]: ");
    terminal.line("what");
    terminal.see("(d)iscard them [k]: ");
    terminal.line("");
    let (code, screen) = terminal.end();
    assert_eq!(code, 0, "{screen}");
    assert!(screen.contains("to resume: ") && is_empty(path.join("out")), "{screen}");

    // To look at it without publishing anything is to look at the source, and leaves what is kept alone.
    let mut terminal = enter_at_a_terminal(path, "");
    assert_eq!(terminal.ask("echo /root/*"), "/root/*");
    terminal.line("exit 9");
    assert_eq!(terminal.end().0, 9);

    let mut terminal = enter_at_a_terminal(path, "--output out");
    assert_eq!(terminal.ask("touch /root/second; echo /root/*"), "/root/first /root/second");
    terminal.line("exit");
    terminal.see("(d)iscard them [k]: ");
    terminal.key('c');
    assert_eq!(terminal.end().0, 0, "it is kept");

    let mut terminal = enter_at_a_terminal(path, "--output out");
    terminal.line("exit");
    terminal.see("(d)iscard them [k]: ");
    terminal.line("y");
    let (code, screen) = terminal.end();
    assert_eq!(code, 0, "{screen}");
    let files = published(path);
    assert!(files.contains("root/first") && files.contains("root/second"), "{files}");
    assert!(is_empty(path.join("work/ims-sshd")), "the work directory is left");
}

#[test]
fn changes_are_kept_when_the_terminal_goes_away() {
    let desk = desk();
    let path = desk.path().display();
    let enter = format!("{IMS_SSHD} enter {path}/image.sqsh --work {path}/work --output {path}/out");
    let mut script = Command::new("script");
    script.args(["-q", "-c", &format!("exec {enter}"), "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut script = Ended::new(script.spawn().unwrap());
    script.stdin.as_mut().unwrap().write_all(b"touch /root/first; echo ma''de\n").unwrap();
    let mut seen = BufReader::new(script.stdout.take().unwrap()).lines();
    assert!(seen.any(|line| line.unwrap().contains("made")));
    script.kill().unwrap();
    script.wait().unwrap();
    // The work directory stays claimed until the first command has ended.
    wait_until("the same command to go on with what was kept", || {
        let again = format!("{enter} --yes -- test -e /root/first");
        Command::new("sh").args(["-c", &again]).stdout(Stdio::null()).status().unwrap().success()
    });
    assert!(published(desk.path()).contains("root/first"));
}

#[test]
fn changes_are_discarded_when_the_person_who_entered_says_so() {
    let desk = desk();
    let mut terminal = enter_at_a_terminal(desk.path(), "--output out");
    terminal.line("touch /root/new; exit");
    terminal.see("(d)iscard them [k]: ");
    terminal.line("d");
    assert_eq!(terminal.end().0, 0);
    let mut terminal = enter_at_a_terminal(desk.path(), "--output out --discard");
    assert_eq!(terminal.ask("echo /root/*; touch /root/newer"), "/root/*");
    terminal.line("exit 3");
    let (code, screen) = terminal.end();
    assert_eq!(code, 3, "{screen}");
    assert!(!screen.contains("[k]: ") && is_empty(desk.path().join("out")), "{screen}");
    assert!(is_empty(desk.path().join("work/ims-sshd")));
}

#[test]
fn a_mark_in_the_shell_that_was_entered_ends_it_and_answers() {
    let desk = desk();
    let path = desk.path();
    let mut terminal = enter_at_a_terminal(path, "--output out");
    terminal.line("touch /etc/new /tmp/failed");
    let (code, screen) = terminal.end();
    assert_eq!(code, 1, "{screen}");
    assert!(screen.contains("marked failed; this session ends now") && is_empty(path.join("out")), "{screen}");
    assert!(is_empty(path.join("work/ims-sshd")));

    // The person's own shell finds the terminal as it was, whatever the image's line editor has made of it.
    let mut terminal = own_shell();
    terminal.line(&format!("cd {}; stty -a | md5sum > before", path.display()));
    terminal.see(PROMPT);
    terminal.line(&format!("{IMS_SSHD} enter image.sqsh --work work --output out"));
    terminal.see(PROMPT);
    terminal.line("touch /etc/newer /tmp/complete");
    terminal.see("marked complete and will be packed; this session ends now");
    terminal.see(PROMPT);
    assert_eq!(terminal.ask("stty -a | md5sum | cmp - before && echo same"), "same");
    terminal.line("exit");
    terminal.end();
    let files = published(path);
    assert!(files.contains("etc/newer") && !files.contains("etc/new\n") && !files.contains("tmp/complete"), "{files}");

    let mut published = Command::new("sh");
    let line = format!("cd {} && exec {IMS_SSHD} enter image --work work --output again", path.display());
    let mut terminal = Terminal::with(published.args(["-c", &line]));
    terminal.see(PROMPT);
    terminal.line("touch /etc/place; exit");
    terminal.see("(d)iscard them [k]: ");
    terminal.line("d");
    let (code, screen) = terminal.end();
    assert_eq!(code, 0, "{screen}");
    assert!(screen.contains("the changes were discarded"), "{screen}");
    assert!(!path.join("image/etc/place").exists() && is_empty(path.join("again")));

    // In a directory that is changed where it is, neither mark stays.
    let image = path.join("image");
    for (mark, code) in [("complete", 0), ("failed", 1)] {
        let mut command = Command::new(&IMS_SSHD);
        let mut terminal = Terminal::with(command.arg("enter").arg(&image));
        terminal.see(PROMPT);
        terminal.line(&format!("touch /etc/{mark} /tmp/{mark}"));
        assert_eq!(terminal.end().0, code, "{mark}");
        assert!(image.join("etc").join(mark).exists() && !image.join("tmp").join(mark).exists(), "{mark}");
    }
}

/// The changes to a directory are applied, and nothing is packed.
#[test]
fn people_at_a_shell_are_told_that_the_changes_to_a_directory_are_applied() {
    let image = image_root();
    for (verdict, told) in [
        ("failed", "the image was marked failed, and its changes will not be applied; this session ends now"),
        ("complete", "the image was marked complete, and its changes will be applied; this session ends now"),
    ] {
        let (mut child, printed) = customize(&image.path().join("image"), &[]);
        let line = printed.lines().find(|line| line.trim_start().starts_with("ssh ")).unwrap().trim();
        let mut ssh = Command::new("sh");
        let mut terminal = Terminal::with(ssh.args(["-c", &format!("exec {line}")]));
        terminal.see("root@image");
        terminal.line(&format!("touch /tmp/{verdict}"));
        terminal.see(told);
        terminal.end();
        assert_eq!(child.wait().unwrap().code(), Some(i32::from(verdict == "failed")));
    }
}

#[test]
fn it_answers_to_the_name_of_the_script_it_replaces() {
    let dir = tempfile::tempdir().unwrap();
    let name = dir.path().join("entrypoint.sh");
    std::os::unix::fs::symlink(&*IMS_SSHD, &name).unwrap();
    let output = Command::new(&name).env_clear().env("IMS_ACTION", "create").arg(dir.path()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(text(output.stderr).contains("no shell is wanted"));
}
