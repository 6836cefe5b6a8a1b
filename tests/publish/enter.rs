//! `ims-sshd enter`, from a source to a published image, without a person at a terminal.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};

use nix::sys::signal::Signal;
use testbed::file_server::FileServer;
use testbed::job::*;
use testbed::*;

use crate::customize::nothing_stays;
use crate::unattended::published;

/// `ims-sshd enter SOURCE` with a work directory in `dir`, a command of the image's shell, and the test image's boot
/// files.
fn enter(dir: &Path, source: &str, options: &[&str], command: &str) -> Output {
    let mut enter = ims_sshd(&["enter", source], &[]);
    if options.contains(&"--output") {
        enter.args(["--kernel", "vmlinuz", "--initrd", "initrd", "--json"]);
    }
    enter.arg("--work").arg(dir.join("work")).args(options).args(["--", "sh", "-c", command]).current_dir(dir);
    enter.output().unwrap()
}

#[test]
fn every_kind_of_source_is_entered_and_changes_are_discarded_without_output() {
    let (dir, tree, squashfs) = packed_image();
    let tar = dir.path().join("image.tar.gz");
    succeed(Command::new("tar").args(["-c", "-z", "-f"]).arg(&tar).arg("-C").arg(&tree).arg("."));
    let bytes = std::fs::read(&squashfs).unwrap();
    let server = FileServer::start(bytes.clone(), &[]);
    for source in [squashfs.display().to_string(), tar.display().to_string(), server.url] {
        let output = enter(dir.path(), &source, &[], "touch /etc/new && ls /etc/new && exit 7");
        assert_eq!(output.status.code(), Some(7), "{source}: {output:?}");
        assert_eq!(text(&output.stdout), "/etc/new\n", "nothing of ours is in the command's output");
        assert!(text(&output.stderr).contains("are discarded at the end; --output STORE publishes it"), "{output:?}");
        nothing_stays(dir.path());
    }
    assert!(std::fs::read(&squashfs).unwrap() == bytes, "a source is not changed");
}

#[test]
fn signature_of_a_url_is_in_no_message() {
    let dir = directory();
    let server = FileServer::start(std::fs::read(squashfs_of(&image(dir.path()))).unwrap(), &[]);
    let (shown, signature) = server.url.split_once('?').unwrap();
    for options in [&[][..], &["--in-place"], &["--output", "out"], &["--fresh"]] {
        let output = enter(dir.path(), &server.url, options, "touch /etc/changed");
        let said = text(&output.stdout) + &text(&output.stderr);
        assert!(said.contains(shown) || options == ["--fresh"], "{options:?}: {said}");
        assert!(!said.contains(signature), "{options:?}: {said}");
    }
    succeed(&mut ims_sshd(&["fail", &server.url], &[]));
    let refused = ims_sshd(&["customize", &server.url], &[]).output().unwrap();
    assert!(!text(&refused.stderr).contains(signature), "{refused:?}");
}

/// This program survives SIGXFSZ itself.
#[test]
fn limit_of_file_sizes_ends_a_command_in_the_image_as_elsewhere() {
    let (dir, _, squashfs) = packed_image();
    let command = "grep SigIgn /proc/self/status; ulimit -f 1; head -c 9999 /dev/zero > /tmp/large";
    let output = enter(dir.path(), &squashfs.display().to_string(), &[], command);
    assert_eq!(output.status.signal(), Some(Signal::SIGXFSZ as i32), "{output:?}");
    let said = text(&output.stdout);
    let ignored = u64::from_str_radix(said.trim().strip_prefix("SigIgn:\t").unwrap(), 16).unwrap();
    // The caller of the tests may ignore others.
    assert_eq!(ignored & 1 << (Signal::SIGXFSZ as i32 - 1), 0, "{output:?}");
}

#[test]
fn successful_command_is_published_with_yes_and_kept_without_an_answer() {
    let (dir, _, squashfs) = packed_image();
    let squashfs = squashfs.display().to_string();
    let unanswered = enter(dir.path(), &squashfs, &["--output", "out"], "touch /etc/first");
    assert_eq!(unanswered.status.code(), Some(1), "{unanswered:?}");
    let said = text(&unanswered.stderr);
    assert!(said.contains("--yes publishes it") && said.contains("to resume: "), "{said}");

    let failed = enter(dir.path(), &squashfs, &["--output", "out", "--yes"], "touch /etc/second; exit 9");
    assert_eq!(failed.status.code(), Some(9), "{failed:?}");
    assert!(text(&failed.stderr).contains("the command ended with exit code 9: the image is not published"));
    let script = dir.path().join("change.sh");
    std::fs::write(&script, "#!/bin/sh\nkill -KILL $$\n").unwrap();
    let options = ["enter", &squashfs, "--work", "work", "--output", "out", "--yes", "--script", "change.sh"];
    let killed = ims_sshd(&options, &[]).current_dir(dir.path()).output().unwrap();
    assert!(
        text(&killed.stderr).contains("the script was killed by SIGKILL: the image is not published"),
        "{killed:?}"
    );
    assert!(!dir.path().join("out").exists());

    let output = enter(dir.path(), &squashfs, &["--output", "out", "--yes"], "test -e /etc/first && rm /bin/ls");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(report(&output)["result"], "success");
    let files = published(dir.path());
    assert!(files.contains("etc/first") && files.contains("etc/second") && !files.contains("bin/ls\n"), "{files}");
    nothing_stays(dir.path());
}

#[test]
fn output_of_a_command_is_not_mixed_with_ours() {
    let dir = directory();
    squashfs_of(&image(dir.path()));
    for place in ["out/tree,", "out/tree is an earlier one"] {
        let mut enter = ims_sshd(&["enter", "tree.sqsh", "--work", "work", "--output", "out", "--yes"], &[]);
        let output =
            enter.args(["--kernel", "vmlinuz", "--", "echo", "done"]).current_dir(dir.path()).output().unwrap();
        assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(0), "done\n"), "{output:?}");
        let said = text(&output.stderr);
        let last = said.lines().last().unwrap();
        assert!(last.contains("the image is ") && last.contains(place), "{said}");
    }
}

#[test]
fn script_can_be_tried_without_changing_the_image() {
    let (dir, tree) = bootable_image();
    squashfs_of(&tree);
    std::fs::write(dir.path().join("try.sh"), "echo tried > /etc/tried; cat /etc/tried; exit 3\n").unwrap();
    for source in [&["tree", "--discard"][..], &["tree.sqsh"]] {
        let mut enter = ims_sshd(&["enter"], &[]);
        enter.args(source).args(["--work", "work", "--script", "./try.sh"]).current_dir(dir.path());
        let output = enter.output().unwrap();
        assert_eq!(
            (output.status.code(), text(&output.stdout).as_str()),
            (Some(3), "tried\n"),
            "{source:?}: {output:?}"
        );
        assert!(!tree.join("etc/tried").exists());
        nothing_stays(dir.path());
    }
}

#[test]
fn looking_at_a_source_names_what_is_open_on_it() {
    let (dir, tree) = bootable_image();
    let name = format!("looked-at-{}", std::process::id());
    let named = dir.path().join(format!("{name}.sqsh"));
    std::fs::rename(squashfs_of(&tree), &named).unwrap();
    std::fs::rename(&tree, dir.path().join(&name)).unwrap();
    for (source, options) in [(format!("{name}.sqsh"), &["--output", "out"][..]), (name.clone(), &[])] {
        let mut open = ims_sshd(&["customize", &source, "--work", "work"], &[]);
        open.args(options)
            .args(["--", "sh", "-c", "touch /etc/new; echo open; exec sleep 600"])
            .current_dir(dir.path());
        let mut open = Ended::new(open.stdout(std::process::Stdio::piped()).spawn().unwrap());
        std::io::Read::read_exact(open.stdout.as_mut().unwrap(), &mut [0; 5]).unwrap();
        let output = enter(dir.path(), &source, &["--discard"], "test ! -e /etc/new");
        let said = text(&output.stderr);
        assert!(said.contains(&format!("is open ({name})")) && !said.contains("fail"), "{said}");
        // A directory may change below the other run's overlay, a file does not.
        assert_eq!(output.status.code(), Some(i32::from(options.is_empty())), "{said}");
        let refused = ims_sshd(&["complete", &name], &[]).output().unwrap();
        let stop = format!("'ims-sshd fail {name}' ends it, and drops the changes");
        assert!(text(&refused.stderr).contains(&stop), "{refused:?}");
        open.kill().unwrap();
        open.wait().unwrap();
        let kept = enter(dir.path(), &source, &["--discard"], "test ! -e /etc/new");
        let said = text(&kept.stderr);
        assert!(kept.status.success() && said.contains("are kept and do not appear here"), "{said}");
        assert!(said.contains("'ims-sshd fail "), "{said}");
        succeed(&mut ims_sshd(&["fail", &name], &[]));
    }
}

#[test]
fn unwritable_log_does_not_lose_the_image() {
    let (dir, _, squashfs) = packed_image();
    let squashfs = squashfs.display().to_string();
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    let mut enter = ims_sshd(&["enter", &squashfs, "--output", "out", "--yes", "--kernel", "vmlinuz"], &[]);
    enter.args(["--initrd", "initrd", "--work", "work", "--", "touch", "/etc/new"]).current_dir(dir.path());
    assert_eq!(enter.stdout(full()).stderr(full()).status().unwrap().code(), Some(0));
    assert!(published(dir.path()).contains("etc/new"));
    nothing_stays(dir.path());
}

#[test]
fn marks_and_discard_decide_before_the_exit_code() {
    let (dir, _, squashfs) = packed_image();
    let squashfs = squashfs.display().to_string();
    let yes: &[&str] = &["--output", "out", "--yes"];
    let discard: &[&str] = &["--output", "out", "--discard"];
    for (options, command, code) in
        [(yes, "touch /tmp/failed", 1), (yes, "touch /tmp/complete /tmp/failed", 1), (discard, "exit 4", 4)]
    {
        let output = enter(dir.path(), &squashfs, options, command);
        assert_eq!(output.status.code(), Some(code), "{command}: {output:?}");
        assert!(!dir.path().join("out").exists());
        nothing_stays(dir.path());
    }
    let output = enter(dir.path(), &squashfs, &["--output", "out"], "touch /tmp/complete /etc/new; exit 5");
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    assert!(!dir.path().join("out").exists(), "a command that failed wins over a mark");
    let output = enter(dir.path(), &squashfs, &["--output", "out"], "touch /tmp/complete");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let files = published(dir.path());
    assert!(files.contains("etc/new") && !files.contains("tmp/complete"), "{files}");
    nothing_stays(dir.path());
}

#[test]
fn every_verdict_file_is_obeyed_reported_and_removed() {
    let (dir, tree) = bootable_image();
    squashfs_of(&tree);
    std::fs::create_dir_all(dir.path().join("work/ims-sshd")).unwrap();
    let (gone, applied) = ("the changes were discarded", "applied the changes to");
    let (stays, has, published) = ("the changes stay in", "the changes are in", "the image is ");
    for (command, source, options, on_complete, on_failed) in [
        ("enter", "tree", &[][..], has, stays),
        ("enter", "tree", &["--in-place"], has, stays),
        ("enter", "tree", &["--discard"], gone, gone),
        ("enter", "tree", &["--output", "out"], published, gone),
        ("enter", "tree", &["--output", "out", "--in-place"], published, stays),
        ("enter", "tree", &["--output", "out", "--discard"], gone, gone),
        ("enter", "tree.sqsh", &[], gone, gone),
        ("enter", "tree.sqsh", &["--output", "out"], published, gone),
        ("customize", "tree", &[], applied, gone),
        ("customize", "tree", &["--in-place"], has, stays),
        ("customize", "tree", &["--output", "out"], published, gone),
        ("customize", "tree", &["--output", "out", "--in-place"], published, stays),
        ("customize", "tree.sqsh", &["--output", "out"], published, gone),
    ] {
        for (mark, told, code) in [("complete", on_complete, 0), ("failed", on_failed, 1)] {
            for is_shell in [false, true] {
                // The shell of `customize` is an SSH session.
                if is_shell && command == "customize" {
                    continue;
                }
                let mut run = ims_sshd(&[command, source, "--work", "work"], &[]);
                run.args(options).current_dir(dir.path());
                let line = format!("touch /tmp/{mark} && echo {mark} > /etc/changed\n");
                let output = if is_shell {
                    feed(&mut run, line.as_bytes())
                } else {
                    run.args(["--", "sh", "-c", &line]).output().unwrap()
                };
                let (said, case) = (text(&output.stderr), format!("{command} {source} {options:?} {mark} {is_shell}"));
                assert_eq!(output.status.code(), Some(code), "{case}: {said}");
                let words = [gone, applied, stays, has, published].map(|word| said.matches(word).count());
                assert_eq!((said.matches(told).count(), words.iter().sum()), (1, 1), "{case}: {said}");
                assert!(said.contains(&format!("the image was marked {mark}")), "{case}: {said}");
                for place in [tree.clone(), dir.path().join("out/tree/rootfs")] {
                    assert!(!place.join("tmp").join(mark).exists(), "{case}: the mark stays");
                }
                let is_published = dir.path().join("out/tree").exists();
                assert_eq!(is_published, told == published, "{case}");
                let is_changed =
                    std::fs::read_to_string(tree.join("etc/changed")).is_ok_and(|text| text.trim() == mark);
                let in_place = options.is_empty() && source == "tree" || options.contains(&"--in-place");
                let changes = in_place && !(command == "customize" && options.is_empty()) || told == applied;
                assert_eq!(is_changed, changes, "{case}");
                if is_published {
                    assert!(!crate::unattended::published(dir.path()).contains("tmp/complete"), "{case}");
                    std::fs::remove_dir_all(dir.path().join("out")).unwrap();
                }
                let _ = std::fs::remove_file(tree.join("etc/changed"));
                nothing_stays(dir.path());
            }
        }
    }
}

#[test]
fn verdict_file_in_an_open_image_belongs_to_its_environment() {
    let (dir, tree) = bootable_image();
    let mut open = ims_sshd(&["customize", "tree", "--in-place"], &[]);
    let mut open = Ended::new(open.current_dir(dir.path()).stdout(std::process::Stdio::piped()).spawn().unwrap());
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(open.stdout.take().unwrap()));
    assert!(lines.any(|line| line.unwrap().contains("ims-sshd complete")));
    let output = enter(dir.path(), "tree", &[], "touch /tmp/failed");
    let said = text(&output.stderr);
    assert!(
        output.status.success() && said.contains("tree is also open elsewhere: a mark in it counts for that"),
        "{said}"
    );
    assert!(!said.contains("was marked"), "{said}");
    assert_eq!(open.wait().unwrap().code(), Some(1));
    assert!(!tree.join("tmp/failed").exists());
}

#[test]
fn directory_is_published_unchanged_or_changed_in_place() {
    let (dir, tree) = bootable_image();
    let source = tree.display().to_string();
    let discarded = enter(dir.path(), &source, &["--output", "out", "--discard"], "touch /etc/new /tmp/complete");
    assert_eq!(discarded.status.code(), Some(0), "{discarded:?}");
    assert!(text(&discarded.stderr).contains("the changes were discarded"), "{discarded:?}");
    assert!(!dir.path().join("out").exists() && !tree.join("etc/new").exists());
    let output = enter(dir.path(), &source, &["--output", "out", "--yes"], "touch /etc/new");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(published(dir.path()).contains("etc/new") && !tree.join("etc/new").exists());
    // Without an output its variables are not read, so wrong ones do not matter.
    let mut plain = ims_sshd(&["enter", &source, "--", "touch", "/etc/new"], &[("IMAGE_COMPRESSION", "rar".into())]);
    assert!(plain.output().unwrap().status.success() && tree.join("etc/new").exists());
    nothing_stays(dir.path());
}

#[test]
fn source_can_be_entered_concurrently_and_after_a_kill() {
    let (dir, _, squashfs) = packed_image();
    let squashfs = squashfs.display().to_string();
    let mut killed = ims_sshd(&["enter", &squashfs, "--work"], &[]);
    killed.arg(dir.path().join("work")).args(["--", "sh", "-c", "touch /etc/new; echo made; exec sleep 600"]);
    let mut killed = Ended::new(killed.stdout(std::process::Stdio::piped()).spawn().unwrap());
    let mut said = [0; 5];
    std::io::Read::read_exact(killed.stdout.as_mut().unwrap(), &mut said).unwrap();
    // Others can enter it meanwhile, each with changes of their own.
    let meanwhile = enter(dir.path(), &squashfs, &[], "test ! -e /etc/new");
    assert_eq!(meanwhile.status.code(), Some(0), "{meanwhile:?}");
    killed.kill().unwrap();
    killed.wait().unwrap();
    wait_until("the loop device to be free", || {
        !succeed(Command::new("losetup").arg("--list")).contains(dir.path().to_str().unwrap())
    });
    let output = enter(dir.path(), &squashfs, &[], "test ! -e /etc/new");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    nothing_stays(dir.path());
}

#[test]
fn directory_of_a_published_image_stands_for_its_rootfs() {
    let (dir, _, squashfs) = packed_image();
    let squashfs = squashfs.display().to_string();
    let output = enter(dir.path(), &squashfs, &["--output", "out", "--yes"], "touch /etc/new");
    assert!(output.status.success(), "{output:?}");
    let published = std::fs::read_dir(dir.path().join("out")).unwrap().next().unwrap().unwrap().path();
    let entered = enter(dir.path(), &published.display().to_string(), &[], "test -e /etc/new");
    assert!(entered.status.success(), "{entered:?}");
    let unpacked = dir.path().join("unpacked");
    succeed(ims_sshd(&["prepare", unpacked.to_str().unwrap(), published.to_str().unwrap()], &[]).arg("--fresh"));
    assert!(unpacked.join("image-root/etc/new").exists());
}
