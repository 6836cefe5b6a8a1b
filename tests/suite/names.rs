//! Open images have names on this machine: in `status`, for `complete` and `fail`, in the prompt and in the greeting.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use testbed::*;

/// A directory with an image root that is called `name`.
fn image(name: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir_in(cache()).unwrap();
    let image = dir.path().join(name);
    succeed(Command::new("cp").arg("-aT").arg(cache().join("busybox")).arg(&image));
    (dir, image)
}

/// Returns a name that no other image has, so that tests beside this one do not count.
fn unique(what: &str) -> String {
    format!("{what}-{}", std::process::id())
}

/// Starts `customize`; returns what it prints until it is open.
fn customize(source: &Path) -> (Ended, String) {
    let mut command = Command::new(&IMS_SSHD);
    command.arg("customize").arg(source).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = Ended::new(command.spawn().unwrap());
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut printed = String::new();
    while !printed.contains("ims-sshd complete") {
        printed += &(lines.next().expect(&printed) + "\n");
    }
    (child, printed)
}

fn ims_sshd(arguments: &[&str]) -> Output {
    Command::new(&IMS_SSHD).args(arguments).env_remove("IMAGE_ROOT_PARENT").stdin(Stdio::null()).output().unwrap()
}

fn listed() -> serde_json::Value {
    serde_json::from_str(&succeed(Command::new(&IMS_SSHD).args(["status", "--json"]).env_remove("IMAGE_ROOT_PARENT")))
        .unwrap()
}

fn is_listed(name: &str) -> bool {
    listed().as_array().unwrap().iter().any(|run| run["name"] == name)
}

#[test]
fn a_mark_where_no_environment_is_open_is_an_error_and_leaves_no_file() {
    let (dir, image) = image("image-root");
    let elsewhere = tempfile::tempdir().unwrap();
    for (command, mark) in [("complete", "complete"), ("fail", "failed")] {
        for path in [elsewhere.path(), &image, dir.path()] {
            let output = ims_sshd(&[command, path.to_str().unwrap()]);
            assert_eq!(output.status.code(), Some(1), "{path:?} {output:?}");
            assert!(text(&output.stderr).contains("no environment is open there"), "{output:?}");
            assert!(!path.join(mark).exists(), "{path:?}");
        }
        let output = ims_sshd(&[command, "no-such-name"]);
        assert!(!output.status.success() && text(&output.stderr).contains("cannot find 'no-such-name'"), "{output:?}");
    }
    // Nothing was ever open there, or it could be: what can be told is told.
    let output = ims_sshd(&["status", elsewhere.path().to_str().unwrap()]);
    assert!(output.status.code() == Some(1) && text(&output.stderr).contains("holds neither"), "{output:?}");
    let (parent, root) = (dir.path().display(), image.display());
    let told = format!("{parent}: not open\n  prepared: {root}\n  open: ims-sshd enter {root}\n");
    assert_eq!(succeed(Command::new(&IMS_SSHD).arg("status").arg(dir.path())), told);
}

#[test]
fn another_container_marks_an_image_before_its_environment_opens() {
    let volume = tempfile::tempdir().unwrap();
    std::fs::write(volume.path().join("ready"), "").unwrap();
    let output = ims_sshd(&["fail", volume.path().to_str().unwrap()]);
    assert!(output.status.success() && text(&output.stderr).contains("no environment is open in"), "{output:?}");
    assert!(volume.path().join("failed").exists());
}

#[test]
fn a_run_is_marked_by_its_name_its_source_and_every_path_that_was_printed() {
    let name = unique("marked");
    let (_dir, image) = image(&name);
    for (at, verdict) in ["complete", "complete", "fail", "complete"].into_iter().enumerate() {
        let (mut child, printed) = customize(&image);
        let login = printed.lines().find(|line| line.trim_start().starts_with("ssh ")).unwrap().trim();
        let run = Path::new(login.split(' ').nth(2).unwrap()).parent().unwrap();
        assert!(printed.contains(&format!("ims-sshd complete {name} ")), "{printed}");

        let known = ims_sshd(&["status"]);
        let known = text(&known.stdout);
        let (_, said) = known.split_once(&format!("{name}: serving since ")).unwrap_or_else(|| panic!("{known}"));
        assert!(said.contains(&format!("\n  source: {}\n", image.display())), "{said}");
        assert!(said.contains(&format!("\n  log in: {login}\n")), "{said}");
        for (is, code) in [("serving", 0), ("waiting,serving", 0), ("closing", 1), ("packing,uploading", 1)] {
            assert_eq!(ims_sshd(&["status", &name, "--is", is]).status.code(), Some(code), "{is}");
        }

        let (source, path) = (image.display().to_string(), run.display().to_string());
        let end = run.file_name().unwrap().to_str().unwrap();
        let output = ims_sshd(&[verdict, [&name.to_uppercase(), &source, &path, end][at]]);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(child.wait().unwrap().code(), Some(i32::from(verdict == "fail")), "{printed}");
        assert!(!is_listed(&name), "{}", listed());
    }
    let output = ims_sshd(&["status", &name, "--is", "serving"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

#[test]
fn two_runs_of_one_name_are_told_apart() {
    let name = unique("twin");
    let (_first, first) = image(&name);
    let (_second, second) = image(&name);
    let (mut one, printed) = customize(&first);
    assert!(printed.contains(&format!("ims-sshd complete {name} ")), "{printed}");
    let (mut two, printed) = customize(&second);
    assert!(printed.contains(&format!("ims-sshd complete {name}-2 ")), "{printed}");
    let login = printed.lines().find(|line| line.trim_start().starts_with("ssh ")).unwrap().trim();
    let called = succeed(Command::new("sh").args(["-c", &format!("{login} -o BatchMode=yes hostname")]));
    assert_eq!(called, format!("{name}-2\n"));
    let packed = ims_sshd(&["package", second.to_str().unwrap()]);
    let wanted = format!("'ims-sshd complete {name}-2' or 'ims-sshd fail {name}-2' ends it");
    assert!(packed.status.code() == Some(1) && text(&packed.stderr).contains(&wanted), "{packed:?}");
    for (name, run, source) in [(format!("{name}-2"), &mut two, &second), (name.clone(), &mut one, &first)] {
        // The only one is refused too: it may be somebody else's.
        for mark in ["complete", "fail"] {
            let output = ims_sshd(&[mark]);
            assert!(!output.status.success() && text(&output.stderr).contains("no name is given"), "{output:?}");
            assert!(text(&output.stderr).contains(&name), "{output:?}");
        }
        let output = ims_sshd(&["complete", &name]);
        assert_eq!(text(&output.stdout), format!("marked {name} ({}) complete\n", source.display()), "{output:?}");
        assert!(run.wait().unwrap().success());
    }
    // A run that was killed keeps its name, as long as there are changes of it.
    let (mut killed, _) = customize(&first);
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(text(ims_sshd(&["status", &name]).stdout).contains(": killed, was serving since "), "{}", listed());
    let (mut again, printed) = customize(&second);
    assert!(printed.contains(&format!("ims-sshd complete {name}-2 ")), "{printed}");
    assert!(ims_sshd(&["complete", &format!("{name}-2")]).status.success() && again.wait().unwrap().success());
    // Clears what was killed.
    let (mut first, _) = customize(&first);
    assert!(ims_sshd(&["complete", &name]).status.success() && first.wait().unwrap().success());
}

#[test]
fn changes_that_are_kept_are_listed_told_of_and_dropped_by_fail() {
    let name = unique("kept");
    let (dir, image) = image(&name);
    let squashfs = dir.path().join(format!("{name}.sqsh"));
    succeed(Command::new("mksquashfs").args([&image, &squashfs]).args(["-quiet", "-no-progress"]));
    let [source, out, work] =
        [squashfs, dir.path().join("out"), dir.path().join("work")].map(|p| p.display().to_string());
    let enter = |options: &[&str], command| {
        ims_sshd(&[&["enter", &source, "--work", &work][..], options, &["--", "/bin/sh", "-c", command]].concat())
    };
    let publish = ["--output", &out, "--yes"];
    let told = "are kept and do not appear here";
    for at in [&name, &source] {
        let failed = enter(&publish, "touch /kept; exit 3");
        assert!(text(&failed.stderr).contains(&format!("'ims-sshd fail {name}' drops them")), "{failed:?}");
        let known = text(ims_sshd(&["status"]).stdout);
        let (_, said) = known.split_once(&format!("{name}: kept changes since ")).unwrap_or_else(|| panic!("{known}"));
        assert!(said.contains(&format!("\n  source: {source}\n  changes: {work}/")), "{said}");
        let line =
            format!("{IMS_SSHD} enter {source} --work {work} --output {out} --yes -- /bin/sh -c 'touch /kept; exit 3'");
        assert!(said.contains(&format!("\n  resume: {line}\n  drop: ims-sshd fail {name}\n")), "{said}");
        // A run that only looks has another name, and is told.
        let look = enter(&[], "test ! -e /kept");
        assert!(look.status.success() && text(&look.stderr).contains(told), "{look:?}");
        assert!(!enter(&publish, "test -e /kept || exit 0; exit 3").status.success());
        let refused = ims_sshd(&["complete", at]);
        assert!(text(&refused.stderr).contains("to resume: "), "{refused:?}");
        let dropped = ims_sshd(&["fail", at]);
        assert!(text(&dropped.stdout).starts_with(&format!("dropped the kept changes of {name};")), "{dropped:?}");
        assert!(!is_listed(&name) && !Path::new(&out).exists(), "{}", listed());
        assert!(!text(enter(&[], "true").stderr).contains(told));
        assert_eq!(std::fs::read_dir(dir.path().join("work/ims-sshd")).unwrap().count(), 0);
    }
}

#[test]
fn a_killed_run_keeps_its_name_and_fail_clears_up_after_it() {
    let name = unique("killed");
    let (_dir, image) = image(&name);
    let source = image.display().to_string();
    for at in [&name, &source] {
        let (mut killed, printed) = customize(&image);
        let login = printed.lines().find(|line| line.trim_start().starts_with("ssh ")).unwrap().trim().to_owned();
        succeed(Command::new("sh").args(["-c", &format!("{login} -o BatchMode=yes touch /root/changed")]));
        killed.kill().unwrap();
        killed.wait().unwrap();
        let said = text(ims_sshd(&["status", at]).stdout);
        assert!(said.starts_with(&format!("{name}: killed, was serving since ")), "{said}");
        assert!(said.contains(&format!("\n  source: {source}\n  changes: /var/lib/ims-sshd/")), "{said}");
        assert!(said.contains(&format!("\n  drop: ims-sshd fail {name}\n")), "{said}");
        let refused = ims_sshd(&["complete", at]);
        assert!(text(&refused.stderr).contains("to resume: "), "{refused:?}");
        let dropped = ims_sshd(&["fail", at]);
        assert!(dropped.status.success(), "{dropped:?}");
        assert!(!is_listed(&name) && !image.join("root/changed").exists());
        let run = Path::new(login.split(' ').nth(2).unwrap()).parent().unwrap();
        assert!(processes_with(&format!("-f {}/", run.display())).is_empty() && !run.exists());
    }
}

#[test]
fn a_run_is_listed_while_it_packs_and_cannot_be_marked_then() {
    let name = unique("packs");
    let (dir, image) = image(&name);
    let mut noise = std::fs::File::open("/dev/urandom").map(|noise| std::io::Read::take(noise, 24 << 20)).unwrap();
    std::io::copy(&mut noise, &mut std::fs::File::create(image.join("noise")).unwrap()).unwrap();
    let squashfs = dir.path().join(format!("{name}.sqsh"));
    succeed(Command::new("mksquashfs").args([&image, &squashfs]).args(["-quiet", "-no-progress", "-noD", "-noF"]));
    for (command, answer) in [("enter", &["--yes"][..]), ("customize", &[])] {
        let mut packs = Command::new(&IMS_SSHD);
        packs.arg(command).arg(&squashfs).args(["--output", "out", "--work", "work", "--compression", "xz"]);
        packs.args(answer).args(["--", "/bin/sh", "-c", "cp /noise /louder"]).current_dir(dir.path());
        let mut packs = Ended::new(packs.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        wait_until("packing", || {
            assert!(packs.try_wait().unwrap().is_none(), "it has ended unseen");
            ims_sshd(&["status", &name, "--is", "packing"]).status.success()
        });
        let output = ims_sshd(&["complete", squashfs.to_str().unwrap()]);
        assert!(!output.status.success() && text(&output.stderr).contains("is being published"), "{output:?}");
        let mut second = Command::new(&IMS_SSHD);
        second.arg("customize").arg(&squashfs).args(["--output", "out", "--work", "work", "--", "true"]);
        let second = second.current_dir(dir.path()).output().unwrap();
        let stop = format!("wait until it is published; to stop that, send SIGINT to process {}", packs.id());
        assert!(!second.status.success() && text(&second.stderr).contains(&stop), "{second:?}");
        assert!(packs.wait().unwrap().success());
    }
    assert!(!is_listed(&name));
}

#[test]
fn host_name_greeting_and_prompt_say_which_image_it_is() {
    let name = unique("Where.1");
    let label = name.replace('.', "-").to_lowercase();
    let (_dir, image) = image(&name);
    let _ = std::fs::remove_file(image.join("etc/profile"));
    let own = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let mut enter = Command::new(&IMS_SSHD);
    let mut terminal = Terminal::with(enter.arg("enter").arg(&image));
    terminal.see(&format!("You are in the image root of {label}. When done: exit"));
    terminal.see(&format!("root@{label}:/root# "));
    terminal.line("hostname; echo \"<$PS1>\" | grep -c '[$]PWD'");
    terminal.see(&format!("{label}\r\n1\r\n"));
    terminal.line("exit");
    assert_eq!(terminal.end().0, 0);
    // A command is given no prompt.
    let mut enter = Command::new(&IMS_SSHD);
    let said = succeed(enter.arg("enter").arg(&image).args([
        "--",
        "/bin/sh",
        "-c",
        "hostname; env | grep ^PS1= || echo none",
    ]));
    assert_eq!(said, format!("{label}\nnone\n"));

    let (mut child, printed) = customize(&image);
    let login = printed.lines().find(|line| line.trim_start().starts_with("ssh ")).unwrap().trim();
    let ssh =
        |command: &str| succeed(Command::new("sh").args(["-c", &format!("{login} -o BatchMode=yes '{command}'")]));
    assert_eq!(ssh("hostname; env | grep ^PS1= || echo none"), format!("{label}\nnone\n"));
    let mut terminal = Terminal::with(Command::new("sh").args(["-c", &format!("exec {login}")]));
    terminal.see(&format!("You are in the image root of {label}. When done: touch /tmp/complete"));
    terminal.see(&format!("root@{label}:/root# "));
    terminal.line("touch /tmp/complete");
    terminal.end();
    assert!(child.wait().unwrap().success());
    assert_eq!(std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), own);
}
