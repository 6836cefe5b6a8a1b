//! Kept changes: only their own command continues with them, nothing loses them, and none are reported that do not
//! exist.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;
use testbed::job::*;
use testbed::*;

use crate::customize::nothing_stays;
use crate::directory::{CHANGES, CUSTOMIZE, run, state, tree};

/// Runs `lines`, which fail, in the directory `tree`.
fn keep(dir: &Path, lines: &str) -> String {
    let kept = run(dir, &[&CUSTOMIZE[..], &["--", "sh", "-c", &format!("{lines}; exit 3")]].concat());
    assert_eq!(kept.status.code(), Some(3), "{kept:?}");
    text(&kept.stderr)
}

fn refused(output: &Output, why: &[&str]) {
    let said = text(&output.stderr);
    assert!(matches!(output.status.code(), Some(1 | 2)), "{output:?}");
    assert!(why.iter().all(|why| said.contains(why)), "{why:?}: {said}");
}

/// Entry of the changes that are kept below `dir`.
fn entry(dir: &Path) -> Value {
    let all: Value = serde_json::from_str(&succeed(&mut ims_sshd(&["status", "--json"], &[]))).unwrap();
    let is_ours = |entry: &&Value| entry["work"].as_str().is_some_and(|work| work.starts_with(dir.to_str().unwrap()));
    all.as_array().unwrap().iter().find(is_ours).cloned().unwrap_or_default()
}

#[test]
fn directory_with_kept_changes_is_refused_under_other_paths_and_names() {
    let dir = directory();
    let tree = tree(dir.path());
    let before = state(&tree);
    keep(dir.path(), "echo new > /etc/new");
    let name = entry(dir.path())["name"].as_str().unwrap().to_owned();
    let opened_by_nobody = |path: &str| {
        for command in [
            &["enter", path, "--", "touch", "/etc/other"][..],
            &["customize", path, "--work", "work", "--", "touch", "/etc/other"],
            &["customize", path, "--work", "other", "--", "touch", "/etc/other"],
            &["customize", path, "--work", "work", "--output", "out", "--", "touch", "/etc/other"],
            &["customize", path, "--in-place", "--", "touch", "/etc/other"],
            &["package", "--kernel", "vmlinuz", path],
            &["prepare", "parent", path],
        ] {
            let output = run(dir.path(), command);
            refused(&output, &[&format!("changes to it are kept as {name}"), &format!("'ims-sshd fail {name}'")]);
            assert!(!dir.path().join("out").exists() && !dir.path().join("parent/image-root").exists(), "{command:?}");
        }
        let looked = run(dir.path(), &["enter", path, "--work", "work", "--discard", "--", "true"]);
        assert!(looked.status.success() && text(&looked.stderr).contains("do not appear here"), "{looked:?}");
    };
    std::os::unix::fs::symlink("tree", dir.path().join("link")).unwrap();
    let link = ["customize", "link", "--work", "work", "--", "sh", "-c", "test -e /etc/new && exit 3"];
    assert_eq!(run(dir.path(), &link).status.code(), Some(3), "a link names the directory itself");
    let moved = dir.path().join("moved");
    std::fs::rename(&tree, &moved).unwrap();
    opened_by_nobody("moved");
    std::fs::create_dir(&tree).unwrap();
    opened_by_nobody("moved");
    std::fs::remove_dir(&tree).unwrap();
    std::fs::rename(&moved, &tree).unwrap();
    assert_eq!(state(&tree), before);
    // A copy is another directory.
    succeed(Command::new("cp").arg("-aT").arg(&tree).arg(&moved));
    let copy = run(dir.path(), &["enter", "moved", "--", "true"]);
    assert!(copy.status.success(), "{copy:?}");
    let output = run(dir.path(), &[&CUSTOMIZE[..], &["--", "test", "-e", "/etc/new"]].concat());
    assert!(output.status.success(), "{output:?}");
    assert!(tree.join("etc/new").exists());
    nothing_stays(dir.path());
}

#[test]
fn changes_are_dropped_by_name_after_their_directory_was_unmounted() {
    let dir = directory();
    let tree = tree(dir.path());
    let mount_point = dir.path().join("mounted");
    std::fs::create_dir(&mount_point).unwrap();
    let mut mounted = Command::new("unshare");
    mounted.args(["-m", "sh", "-c", "mount --bind tree mounted; exec \"$@\"", "sh", &*IMS_SSHD]);
    mounted.args(["customize", "mounted", "--work", "work", "--", "sh", "-c", "echo 1 > /etc/new; exit 3"]);
    let kept = mounted.current_dir(dir.path()).stdin(Stdio::null()).output().unwrap();
    assert_eq!(kept.status.code(), Some(3), "{kept:?}");
    let name = entry(dir.path())["name"].as_str().unwrap().to_owned();
    let again = format!("move or mount it at {} again", mount_point.display());
    for command in [&["customize", "tree", "--work", "work", "--", "true"][..], &["fail", "./tree"]] {
        let output = run(dir.path(), command);
        refused(&output, &[&format!("are kept as {name}"), &format!("'ims-sshd fail {name}' drops them"), &again]);
    }
    let shown = text(&run(dir.path(), &["status", &name]).stdout);
    assert!(shown.contains("the source is not there") && !shown.contains("resume: "), "{shown}");
    let dropped = run(dir.path(), &["fail", &name]);
    assert!(dropped.status.success(), "{dropped:?}");
    assert!(!tree.join("etc/new").exists() && std::fs::read_dir(&mount_point).unwrap().count() == 0);
    let output = run(dir.path(), &[&CUSTOMIZE[..], &["--", "test", "!", "-e", "/etc/new"]].concat());
    assert!(output.status.success(), "{output:?}");
    nothing_stays(dir.path());
}

#[test]
fn nothing_is_kept_of_an_unchanged_image_that_cannot_be_published() {
    let dir = directory();
    squashfs_of(&tree(dir.path()));
    let out = dir.path().join("out");
    let spoil = format!("rm -rf {0}; touch {0} $IMAGE_ROOT_PARENT/complete\n", out.display());
    std::fs::write(dir.path().join("spoil"), spoil).unwrap();
    for source in ["tree", "tree.sqsh"] {
        let arguments = ["customize", source, "--work", "work", "--output", "out", "--host-script", "./spoil"];
        let output = run(dir.path(), &arguments);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(!text(&output.stderr).contains("are kept in"), "{output:?}");
        nothing_stays(dir.path());
        std::fs::remove_file(&out).unwrap();
    }
}

#[test]
fn kept_changes_are_refused_after_edits_by_hand() {
    let dir = directory();
    let tree = tree(dir.path());
    let edits: [(&str, &dyn Fn()); 4] = [
        ("usr/one", &|| std::fs::write(tree.join("usr/one"), "by hand\n").unwrap()),
        ("etc", &|| std::fs::write(tree.join("etc/new"), "by hand\n").unwrap()),
        ("gone/in/file", &|| std::fs::write(tree.join("gone/in/file"), "by hand\n").unwrap()),
        ("usr", &|| std::fs::remove_file(tree.join("usr/two")).unwrap()),
    ];
    std::fs::create_dir_all(tree.join("gone/in")).unwrap();
    for (path, edit) in edits {
        std::fs::write(tree.join("gone/in/file"), "").unwrap();
        keep(dir.path(), "echo more >> /usr/one; echo new > /etc/new; rm -r /gone");
        // Edits of files that the changes do not touch are allowed.
        std::fs::write(tree.join("boot/other"), "by hand\n").unwrap();
        edit();
        let before = state(&tree);
        let output = run(dir.path(), &[&CUSTOMIZE[..], &["--", "true"]].concat());
        refused(&output, &["was changed by hand", &format!("{}", tree.join(path).display()), "'ims-sshd fail "]);
        assert_eq!(state(&tree), before);
        let fresh = run(dir.path(), &[&CUSTOMIZE[..], &["--fresh", "--", "true"]].concat());
        assert!(fresh.status.success(), "{fresh:?}");
        assert_eq!(state(&tree), before);
    }
    let during = "echo more >> /usr/one; echo open; read line";
    let mut open = ims_sshd(&[&CUSTOMIZE[..], &["--", "sh", "-c", during]].concat(), &[]);
    open.current_dir(dir.path()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut open = open.spawn().unwrap();
    std::io::Read::read_exact(open.stdout.as_mut().unwrap(), &mut [0; 5]).unwrap();
    std::fs::write(tree.join("usr/one"), "by hand\n").unwrap();
    std::io::Write::write_all(open.stdin.as_mut().unwrap(), b"\n").unwrap();
    let output = open.wait_with_output().unwrap();
    refused(&output, &["was changed by hand", "usr/one", "the changes are kept in"]);
    assert_eq!(std::fs::read_to_string(tree.join("usr/one")).unwrap(), "by hand\n");
}

#[test]
fn directory_that_is_removed_while_it_is_open_is_told_with_where_its_changes_are() {
    let dir = directory();
    let tree = tree(dir.path());
    let command = "echo more >> /usr/one; echo open; read line";
    let mut open = ims_sshd(&[&CUSTOMIZE[..], &["--", "sh", "-c", command]].concat(), &[]);
    open.current_dir(dir.path()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut open = open.spawn().unwrap();
    std::io::Read::read_exact(open.stdout.as_mut().unwrap(), &mut [0; 5]).unwrap();
    std::fs::remove_dir_all(&tree).unwrap();
    std::io::Write::write_all(open.stdin.as_mut().unwrap(), b"\n").unwrap();
    let output = open.wait_with_output().unwrap();
    refused(&output, &["was removed while it was open", "copy what is needed out of the changes", "'ims-sshd fail "]);
    let said = text(&output.stderr);
    let upper = said.split("which are in ").nth(1).unwrap().split(';').next().unwrap();
    assert!(std::fs::read_to_string(Path::new(upper).join("usr/one")).unwrap().ends_with("more\n"), "{said}");
    let name = entry(dir.path())["name"].as_str().unwrap().to_owned();
    succeed(&mut ims_sshd(&["fail", &name], &[]));
    nothing_stays(dir.path());
}

#[test]
fn edits_by_hand_between_runs_without_kept_changes_are_allowed() {
    let dir = directory();
    let tree = tree(dir.path());
    let mut killed = ims_sshd(&[&CUSTOMIZE[..], &["--", "sh", "-c", "echo open; exec sleep 600"]].concat(), &[]);
    let mut killed = Ended::new(killed.current_dir(dir.path()).stdout(Stdio::piped()).spawn().unwrap());
    std::io::Read::read_exact(killed.stdout.as_mut().unwrap(), &mut [0; 5]).unwrap();
    killed.kill().unwrap();
    killed.wait().unwrap();
    std::fs::write(tree.join("usr/one"), "by hand\n").unwrap();
    let output = run(dir.path(), &[&CUSTOMIZE[..], &["--", "sh", "-c", "echo more >> /usr/one"]].concat());
    assert!(output.status.success(), "{output:?}");
    assert_eq!(std::fs::read_to_string(tree.join("usr/one")).unwrap(), "by hand\nmore\n");
    nothing_stays(dir.path());
}

#[test]
fn kept_changes_of_a_file_are_continued_through_any_link_or_path() {
    let dir = directory();
    squashfs_of(&tree(dir.path()));
    let at = |name: &str| dir.path().join(name);
    for (target, link) in [("tree.sqsh", "current.sqsh"), (".", "here")] {
        std::os::unix::fs::symlink(target, at(link)).unwrap();
    }
    std::fs::create_dir(at("other")).unwrap();
    let customize = |source: &str, lines: &str| {
        run(dir.path(), &["customize", source, "--work", "work", "--output", "out", "--", "sh", "-c", lines])
    };
    let kept = customize("current.sqsh", "echo 1 > /etc/kept; exit 3");
    assert_eq!(kept.status.code(), Some(3), "{kept:?}");
    for source in ["tree.sqsh", "here/current.sqsh", "other/../tree.sqsh", "current.sqsh"] {
        let again = customize(source, "test -e /etc/kept && exit 3");
        assert_eq!(again.status.code(), Some(3), "{source}: {again:?}");
    }
    // These are other files, or may be.
    std::fs::hard_link(at("tree.sqsh"), at("hard.sqsh")).unwrap();
    std::fs::copy(at("tree.sqsh"), at("second.sqsh")).unwrap();
    let name = entry(dir.path())["name"].as_str().unwrap().to_owned();
    let warned = |source: &str, resuming: &str| {
        let output = customize(source, "test ! -e /etc/kept");
        let said = text(&output.stderr);
        assert!(output.status.success(), "{source}: {output:?}");
        assert!(
            said.contains(&format!("{} that are kept as {name} in", at("tree.sqsh").display())),
            "{source}: {said}"
        );
        assert!(said.contains("this run does not use the changes") && said.contains(resuming), "{source}: {said}");
    };
    warned("hard.sqsh", "to resume them: ");
    std::fs::remove_file(at("current.sqsh")).unwrap();
    std::os::unix::fs::symlink("second.sqsh", at("current.sqsh")).unwrap();
    warned(
        "current.sqsh",
        &format!("let {} lead to {} again", at("current.sqsh").display(), at("tree.sqsh").display()),
    );
    let published = customize("tree.sqsh", "test -e /etc/kept");
    assert!(published.status.success() && !text(&published.stderr).contains("does not use"), "{published:?}");
    nothing_stays(dir.path());
}

#[test]
fn name_of_a_run_is_told_to_root_alone() {
    let dir = directory();
    tree(dir.path());
    keep(dir.path(), "echo new > /etc/new");
    let name = entry(dir.path())["name"].as_str().unwrap().to_owned();
    for command in ["fail", "complete", "status"] {
        let mut as_user = Command::new("setpriv");
        as_user.args(["--reuid=1234", "--regid=1234", "--clear-groups", &*IMS_SSHD, command, &name]);
        refused(&as_user.output().unwrap(), &["Permission denied", "run it as root"]);
    }
    assert!(run(dir.path(), &["fail", &name]).status.success());
    nothing_stays(dir.path());
}

/// A port that is in use.
fn busy() -> (std::net::TcpListener, String) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    (listener, port)
}

#[test]
fn refused_command_keeps_changes_and_their_command_line() {
    let dir = directory();
    let tree = tree(dir.path());
    squashfs_of(&tree);
    let (_listener, port) = busy();
    for source in ["tree", "tree.sqsh"] {
        let common = ["customize", source, "--work", "work"];
        let named = ["--kernel", "vmlinuz", "--initrd", "initrd"];
        let kept = [
            &common[..],
            &["--output", "out", "--exclude", "srv/x"],
            &named,
            &["sh", "-c", "test -e /kept || touch /kept; exit 3"],
        ];
        let output = run(dir.path(), &kept.concat());
        assert_eq!(output.status.code(), Some(3), "{output:?}");
        let before = entry(dir.path());
        assert!(before["command_line"].as_str().unwrap().contains("--exclude"), "{before}");
        std::thread::sleep(Duration::from_millis(1100));
        let output = ["--output", "out"];
        for mistake in [
            &["--output", "/proc/x", "--", "true"][..],
            &[output[0], output[1], "--kernel", "vmlinuz-9", "--", "true"],
            &[output[0], output[1], "--initrd", "initrd-9", "--", "true"],
            &[output[0], output[1], "--changes", "/proc/q", "--kernel", "vmlinuz", "--initrd", "initrd", "--", "true"],
            &[output[0], output[1], "--port", &port, "--kernel", "vmlinuz", "--initrd", "initrd"],
            &[output[0], output[1], "--listen", "192.0.2.1", "--kernel", "vmlinuz", "--initrd", "initrd"],
        ] {
            for fresh in [&[][..], &["--fresh"]] {
                let output = run(dir.path(), &[&common[..], fresh, mistake].concat());
                let said = text(&output.stderr);
                assert!(!output.status.success(), "{mistake:?}");
                assert_eq!(entry(dir.path()), before, "{fresh:?} {mistake:?}: {said}");
                assert!(!said.contains("dropped"), "{said}");
                assert!(!said.contains("to resume: ") || said.contains("--exclude"), "{said}");
            }
        }
        let missing = dir.path().join("aside");
        std::fs::rename(dir.path().join(source), &missing).unwrap();
        refused(&run(dir.path(), &[&common[..], &["--output", "out", "--", "true"]].concat()), &["No such file"]);
        let status = succeed(&mut ims_sshd(&["status", before["name"].as_str().unwrap()], &[]));
        assert!(!status.contains("resume: ") && status.contains("  drop: ims-sshd fail"), "{status}");
        std::fs::rename(&missing, dir.path().join(source)).unwrap();
        assert_eq!(entry(dir.path()), before);
        let output =
            run(dir.path(), &[&common[..], &["--output", "out"], &named, &["--", "test", "-e", "/kept"]].concat());
        assert!(output.status.success(), "{output:?}");
        nothing_stays(dir.path());
        std::fs::remove_dir_all(dir.path().join("out")).unwrap();
    }
}

/// A tree whose changes were being applied when the run was killed, `milliseconds` after that was seen.
fn killed_while_applying(milliseconds: u64) -> (TempDir, PathBuf) {
    // On a loaded machine a run may end before it is seen to apply few files.
    for files in [500, 2000, 8000, 32_000] {
        let dir = directory();
        let tree = tree(dir.path());
        let lines = format!("{CHANGES}; for i in $(seq {files}); do echo $i > /srv/$i; done");
        let mut killed = ims_sshd(&[&CUSTOMIZE[..], &["--", "sh", "-c", &lines]].concat(), &[]);
        let mut killed = Ended::new(killed.current_dir(dir.path()).spawn().unwrap());
        let pid = killed.id();
        let own = || {
            let runs = std::fs::read_dir("/run/ims-sshd/.runs").unwrap().flatten();
            let entries = runs.filter_map(|run| std::fs::read_to_string(run.path().join("entry")).ok());
            entries.map(|entry| serde_json::from_str::<Value>(&entry).unwrap()).find(|entry| entry["pid"] == pid)
        };
        let began = Instant::now();
        let is_seen = loop {
            assert!(began.elapsed() < Duration::from_mins(2), "nothing is applied");
            match own() {
                Some(entry) if entry["state"] == "applying" => break true,
                _ if killed.try_wait().unwrap().is_some() => break false,
                _ => {}
            }
        };
        if is_seen {
            std::thread::sleep(Duration::from_millis(milliseconds));
            killed.kill().unwrap();
            killed.wait().unwrap();
            return (dir, tree);
        }
    }
    panic!("no run was seen while it applied its changes");
}

#[test]
fn killed_application_is_not_dropped_by_another_command() {
    for milliseconds in [0, 5, 20, 60] {
        let (dir, tree) = killed_while_applying(milliseconds);
        let status = text(run(dir.path(), &["status"]).stdout);
        // Once everything is applied, the record goes, and after it what is left of the work directory.
        let work = dir.path().join("work/ims-sshd").read_dir().unwrap().next();
        if work.is_some_and(|work| work.unwrap().path().join(".ims-sshd.applying").exists()) {
            let entered = run(dir.path(), &["enter", "tree", "--work", "work", "--discard", "--", "true"]);
            refused(&entered, &["applying changes to it was interrupted"]);
        }
        let arguments = ["--output", "out", "--kernel", "vmlinuz", "--initrd", "auto", "--", "true"];
        let output = run(dir.path(), &[&CUSTOMIZE[..], &arguments].concat());
        assert!(
            tree.join("usr/lib/new/in/file").exists() && tree.join("srv/500").exists(),
            "{milliseconds}: {output:?} {status}"
        );
        assert!(!tree.join("boot/initrd").exists(), "{output:?}");
        assert_eq!(std::fs::read_to_string(tree.join("usr/one")).unwrap(), "one\nmore\n");
    }
}

#[test]
fn full_disk_while_applying_names_the_file_and_the_state() {
    let dir = directory();
    tree(dir.path());
    std::fs::create_dir(dir.path().join("disk")).unwrap();
    let script = "mount -t tmpfs -o size=12m tmpfs disk; cp -a tree disk/tree; \
        $0 customize disk/tree --work work -- sh -c 'echo new > /bin/new; dd if=/dev/zero of=/usr/big bs=65536 count=400' 2>&1; \
        echo ended $?; $0 status --json; $0 status; mount -o remount,size=60m disk; \
        $0 customize disk/tree --work work -- true 2>&1; echo ended $?; du -m disk/tree/usr/big";
    let output =
        Command::new("unshare").args(["-m", "sh", "-c", script, &*IMS_SSHD]).current_dir(dir.path()).output().unwrap();
    let said = text(&output.stdout);
    let (first, rest) = said.split_once("ended 1\n").unwrap_or_else(|| panic!("{said}"));
    assert!(first.contains("disk/tree/usr/big") && first.contains("No space left on device"), "{first}");
    assert!(first.contains("some of the changes are applied") && !first.contains("the changes are kept"), "{first}");
    assert!(first.contains("free space") && first.contains("'ims-sshd fail "), "{first}");
    assert!(rest.contains("\"state\":\"half-applied\"") && rest.contains(": half applied since"), "{rest}");
    assert!(rest.contains("ended 0\n25\t"), "{rest}");
}

#[test]
fn nothing_is_kept_without_changes() {
    let dir = directory();
    let tree = tree(dir.path());
    squashfs_of(&tree);
    let (_listener, port) = busy();
    let named = ["--output", "out", "--kernel", "vmlinuz", "--initrd", "initrd"];
    for source in [&["tree"][..], &[&["tree.sqsh"], &named[..]].concat()] {
        let common = [&["customize", "--work", "work"], source].concat();
        for options in [&["--port", &port][..], &["--listen", "192.0.2.1"], &["--", "false"], &["--", "cat", "/etc/x"]]
        {
            let output = run(dir.path(), &[&common[..], options].concat());
            let said = text(&output.stderr);
            assert!(!output.status.success() && !said.contains("are kept in"), "{options:?}: {said}");
            nothing_stays(dir.path());
        }
        let mut open = ims_sshd(&common, &[]);
        open.current_dir(dir.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut open = open.spawn().unwrap();
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(open.stdout.as_mut().unwrap()));
        assert!(lines.any(|line| line.unwrap().contains("ims-sshd complete")));
        drop(lines);
        kill(Pid::from_raw(open.id().cast_signed()), Signal::SIGINT).unwrap();
        let output = open.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{output:?}");
        assert!(!text(&output.stderr).contains("is kept in"), "{output:?}");
        nothing_stays(dir.path());
        // A file with the same size and time but other content is a change.
        for change in
            ["chmod 700 /etc", "rmdir /tmp", "touch /usr/one", "echo eno > /usr/one", "ln /usr/one /usr/three"]
        {
            let output = run(dir.path(), &[&common[..], &["--", "sh", "-c", &format!("{change}; exit 3")]].concat());
            assert!(text(&output.stderr).contains("the changes are kept in"), "{change}: {output:?}");
            let fresh = run(dir.path(), &[&common[..], &["--fresh", "--", "false"]].concat());
            assert_eq!(fresh.status.code(), Some(1), "{fresh:?}");
            nothing_stays(dir.path());
        }
    }
}

#[test]
fn mounted_overlay_is_continued_and_not_unpacked_over() {
    let dir = directory();
    squashfs_of(&tree(dir.path()));
    let script = "set -e; $0 prepare --open overlay parent tree.sqsh; echo more > parent/image-root/etc/more; \
        $0 prepare --open overlay parent tree.sqsh; cat parent/image-root/etc/more; \
        ! $0 prepare parent tree.sqsh; umount parent/image-root parent/overlay/lower; ! $0 prepare parent tree.sqsh; \
        $0 prepare --fresh parent tree.sqsh; test ! -e parent/image-root/etc/more";
    let output =
        Command::new("unshare").args(["-m", "sh", "-c", script, &*IMS_SSHD]).current_dir(dir.path()).output().unwrap();
    let said = text(&output.stderr);
    assert!(output.status.success() && text(&output.stdout) == "more\n", "{output:?}");
    assert!(said.contains("parent/image-root is mounted already, made of "), "{said}");
    let refusal = "it is below an overlay; --open overlay goes on with it;";
    assert_eq!(said.matches(refusal).count(), 2, "{said}");
}

#[test]
fn dkms_gives_a_command_the_containers_devices_and_capabilities() {
    let dir = directory();
    tree(dir.path());
    for (dkms, code) in [("false", 1), ("True", 0)] {
        let mut customize = ims_sshd(&CUSTOMIZE, &[("JOB_ENABLE_DKMS", dkms.into())]);
        customize.args(["--", "sh", "-c", "mount -t tmpfs t /tmp && umount /tmp"]).current_dir(dir.path());
        let output = customize.output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{dkms}: {output:?}");
    }
    nothing_stays(dir.path());
}

#[test]
fn name_of_a_resuming_command_becomes_the_name_of_its_run() {
    let dir = directory();
    squashfs_of(&tree(dir.path()));
    std::fs::copy(dir.path().join("tree.sqsh"), dir.path().join("second.sqsh")).unwrap();
    let [first, other, last, taken] =
        ["first", "other", "last", "taken"].map(|n| format!("{n}-{}", std::process::id()));
    let customize = |source: &str, options: &[&str], command: &str| {
        let common = ["customize", source, "--work", "work", "--output", "out", "--kernel", "vmlinuz"];
        run(dir.path(), &[&common[..], options, &["--", "sh", "-c", command]].concat())
    };
    let is_known = |name: &str| ims_sshd(&["status", name], &[]).output().unwrap().status.success();
    let kept_as = |name: &str, output: &Output| {
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(9), format!("{name}\n")), "{output:?}");
        assert!(text(&output.stderr).contains(&format!("'ims-sshd fail {name}' drops them")), "{output:?}");
        assert!(is_known(name), "{output:?}");
    };
    let command = "hostname; touch /etc/new; exit 9";
    kept_as(&first, &customize("tree.sqsh", &["--name", &first], command));
    kept_as(&other, &customize("tree.sqsh", &["--name", &other], command));
    assert!(!is_known(&first));
    // Without a name it is the earlier one.
    kept_as(&other, &customize("tree.sqsh", &[], command));
    // A name that another run has is refused, and a command that is refused later changes no name.
    kept_as(&taken, &customize("second.sqsh", &["--name", &taken], command));
    let before = succeed(&mut ims_sshd(&["status", &other], &[]));
    refused(&customize("tree.sqsh", &["--name", &taken], "touch /etc/x"), &[&taken, "another run has this name"]);
    assert!(!customize("tree.sqsh", &["--name", &last, "--initrd", "no"], "true").status.success());
    assert!(!is_known(&last));
    assert_eq!(succeed(&mut ims_sshd(&["status", &other], &[])), before);
    succeed(&mut ims_sshd(&["fail", &taken], &[]));
    let published = customize("tree.sqsh", &["--name", &last], "hostname; test -e /etc/new");
    assert!(published.status.success() && text(&published.stdout) == format!("{last}\n"), "{published:?}");
    assert!(dir.path().join("out").join(&last).is_dir() && !is_known(&other) && !is_known(&last));
    nothing_stays(dir.path());
}

#[test]
fn interrupted_application_is_refused_by_every_command_in_the_same_words() {
    let dir = directory();
    tree(dir.path());
    std::fs::create_dir(dir.path().join("disk")).unwrap();
    let script = "mount -t tmpfs -o size=12m tmpfs disk; cp -a tree disk/tree; \
        $0 customize disk/tree --work work -- sh -c 'dd if=/dev/zero of=/usr/big bs=65536 count=400'; \
        refuse() { echo refused; $0 enter disk/tree --work work -- true; $0 enter disk/tree --work work --discard -- true; \
        $0 package --kernel vmlinuz disk/tree; }; exec 2>&1; refuse; rm -r disk/tree/.ims-sshd.applying.*; refuse";
    let output =
        Command::new("unshare").args(["-m", "sh", "-c", script, &*IMS_SSHD]).current_dir(dir.path()).output().unwrap();
    let said = text(&output.stdout);
    assert_eq!(said.matches("refused\n").count(), 2, "{said}");
    assert_eq!(said.matches("applying changes to it was interrupted; 'ims-sshd fail ").count(), 6, "{said}");
    assert_eq!(said.matches("drops those that are not applied; to resume: ").count(), 6, "{said}");
}

/// Runs `customize` of a directory on a small disk, which the command `$1` fills in one way or another.
fn on_a_small_disk(dir: &Path, script: &str, command: &str) -> String {
    tree(dir);
    std::fs::create_dir(dir.join("disk")).unwrap();
    let run = "run() { $0 customize \"$@\" 2>&1; echo \"ended $?\"; }; ";
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", &format!("{run}{script}"), &*IMS_SSHD, command])
        .current_dir(dir)
        .output()
        .unwrap();
    text(&output.stdout)
}

#[test]
fn command_that_has_succeeded_is_not_run_again_to_apply_its_changes() {
    // The disk of the directory is full, and then the disk of the changes.
    for (script, counts) in [
        (
            "mount -t tmpfs -o size=12m tmpfs disk; cp -a tree disk/tree; run disk/tree --work work -- sh -c \"$1\"; \
             mount -o remount,size=90m disk; run disk/tree --work work -- sh -c \"$1\"; \
             grep -c line disk/tree/etc/fstab; run disk/tree --work work -- sh -c \"$1\"; \
             grep -c line disk/tree/etc/fstab",
            ["0\n1\n", "0\n2\n"],
        ),
        (
            "mount -t tmpfs -o size=12m tmpfs disk; run tree --work disk --output out -- sh -c \"$1\"; \
             mount -o remount,size=90m disk; run tree --work disk --output out -- sh -c \"$1\"; \
             unsquashfs -cat out/tree/rootfs etc/fstab | grep -c line; \
             run tree --work disk --output out -- sh -c \"$1\"; \
             unsquashfs -cat out/tree-2/rootfs etc/fstab | grep -c line",
            ["0\n1\n", "0\n1\n"],
        ),
    ] {
        let dir = directory();
        let command = "echo line >> /etc/fstab; dd if=/dev/zero of=/usr/big bs=65536 count=400; echo ran";
        let said = on_a_small_disk(dir.path(), script, command);
        let parts: Vec<_> = said.split("ended ").collect();
        assert!(parts.len() == 4 && parts[1].starts_with("1\n"), "{said}");
        assert!(parts[0].contains("ran\n") && parts[0].contains(", without running the command again: "), "{said}");
        assert!(!parts[1].contains("ran\n"), "{said}");
        assert!(parts[2].starts_with(counts[0]) && parts[2].contains("ran\n"), "nothing is kept, so it is run: {said}");
        assert!(parts[3].starts_with(counts[1]), "{said}");
    }
}
