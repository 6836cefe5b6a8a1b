//! One machine, no pod: `customize`, `enter`, `complete`, `fail`, `status`.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::support::*;

/// A copied image root of its own.
fn image_root() -> tempfile::TempDir {
    let dir = tempfile::tempdir_in(cache()).unwrap();
    succeed(Command::new("cp").arg("-aT").arg(cache().join("busybox")).arg(dir.path().join("image")));
    dir
}

/// Starts `customize` and reads what it prints up to the line that ends its announcement.
fn customize(image_root: &Path, arguments: &[&str]) -> (Ended, String) {
    let child = Command::new(IMS_SSHD)
        .arg("customize")
        .arg(image_root)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut child = Ended(child);
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
    let (_, rest) = printed.split_once("ims-sshd complete ").unwrap();
    rest.split_whitespace().next().unwrap().into()
}

fn ims_sshd(arguments: &[&str]) -> Output {
    Command::new(IMS_SSHD).args(arguments).stdin(Stdio::null()).output().unwrap()
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
    assert!(!parent_in(&printed).exists(), "the run's folder is left");
    assert!(std::fs::read_dir(image.path().join("image/tmp")).unwrap().next().is_none());
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
    assert!(status.starts_with(&format!("{parent}: serving since ")) && status.contains(", tier plain"), "{status}");
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
    assert!(text(late.stderr).contains("has ended already"));
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
        "--script",
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
    assert!(run_pasted(&printed, "true").status.code() == Some(255), "the key is not ssh's default one");
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
        feed(Command::new(IMS_SSHD).args(["enter", &path]), b"echo $0; pwd; touch /root/file; (sleep 6543 &)\n");
    assert_eq!(text(output.stdout), "-sh\n/root\n");
    assert!(processes_with("sleep 6543").is_empty(), "what is left inside ends with it");
    assert!(!image.path().join("image/proc").exists() && image.path().join("image/root/file").exists());
    let missing = ims_sshd(&["enter", &path, "--", "no-such-program"]);
    assert_eq!(missing.status.code(), Some(127));
    let killed = ims_sshd(&["enter", &path, "--", "sh", "-c", "kill -KILL $$"]);
    assert_eq!(killed.status.signal(), Some(9));
}

#[test]
fn enter_ends_nothing_but_what_it_started() {
    let image = image_root();
    let root = image.path().join("image");
    let mut editor = Ended(Command::new("sleep").arg("6544").current_dir(root.join("bin")).spawn().unwrap());
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
    for (path, reason) in
        [("/", "this machine's own root"), ("/nowhere", "No such file"), ("/etc/passwd", "expected a folder")]
    {
        for command in ["customize", "enter"] {
            let output = ims_sshd(&[command, path]);
            assert_eq!(output.status.code(), Some(2), "{output:?}");
            assert!(text(&output.stderr).contains(reason), "{output:?}");
        }
    }
}

#[test]
fn it_answers_to_the_name_of_the_script_it_replaces() {
    let dir = tempfile::tempdir().unwrap();
    let name = dir.path().join("entrypoint.sh");
    std::os::unix::fs::symlink(IMS_SSHD, &name).unwrap();
    let output = Command::new(&name).env_clear().env("IMS_ACTION", "create").arg(dir.path()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(text(output.stderr).contains("no shell is wanted"));
}
