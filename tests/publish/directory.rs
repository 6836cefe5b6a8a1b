//! A directory as source: changed in an overlay, and then applied, published or dropped; or changed in place.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::job::*;
use testbed::*;

use crate::customize::nothing_stays;

/// A bootable tree with a hard link, and its state, by which `run` tells whether it was changed.
pub fn tree(dir: &Path) -> PathBuf {
    let tree = image(dir);
    for name in ["usr/lib/old/in", "tmp", "etc"] {
        std::fs::create_dir_all(tree.join(name)).unwrap();
    }
    std::fs::write(tree.join("usr/lib/old/in/file"), "inside\n").unwrap();
    std::fs::write(tree.join("usr/one"), "one\n").unwrap();
    std::fs::hard_link(tree.join("usr/one"), tree.join("usr/two")).unwrap();
    tree
}

/// Content, owners, modes, times and links of a tree.
pub fn state(tree: &Path) -> String {
    let find = "find . ! -path './proc*' -printf '%p %y %m %U %G %n %T@ %l\\n' | sort; find . -type f -exec md5sum {} + | sort";
    succeed(Command::new("sh").args(["-c", find]).current_dir(tree))
}

pub fn run(dir: &Path, arguments: &[&str]) -> Output {
    let mut command = ims_sshd(arguments, &[]);
    command.current_dir(dir).output().unwrap()
}

fn work(dir: &Path) -> PathBuf {
    let places: Vec<_> = std::fs::read_dir(dir.join("work/ims-sshd")).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(places.len(), 1, "{places:?}");
    places[0].clone()
}

/// Changes of every kind, made by programs of the image.
pub const CHANGES: &str = "set -e; rm /boot/initrd; mkdir -p /srv/new; echo new > /srv/new/file; chmod 4711 /srv/new/file; \
    echo more >> /usr/two; mv /usr/lib/old /usr/lib/new; rm -r /root; ln -s srv /link; chown 5:6 /etc; touch /tmp/file";

pub const CUSTOMIZE: [&str; 4] = ["customize", "tree", "--work", "work"];

#[test]
fn changes_to_a_directory_are_applied_on_complete_with_all_attributes() {
    let dir = directory();
    let tree = tree(dir.path());
    let links = std::fs::metadata(tree.join("usr/one")).unwrap().nlink();
    let output = run(dir.path(), &[&CUSTOMIZE[..], &["--", "sh", "-c", CHANGES]].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(text(&output.stderr).contains(&format!("applied the changes to {}", tree.display())), "{output:?}");
    let of = |name: &str| std::fs::metadata(tree.join(name)).unwrap();
    assert!(!tree.join("boot/initrd").exists() && !tree.join("root").exists() && !tree.join("usr/lib/old").exists());
    assert_eq!(std::fs::read_to_string(tree.join("srv/new/file")).unwrap(), "new\n");
    assert_eq!(of("srv/new/file").mode() & 0o7777, 0o4711);
    assert_eq!(std::fs::read_to_string(tree.join("usr/one")).unwrap(), "one\nmore\n");
    assert_eq!((of("usr/one").ino(), of("usr/two").nlink()), (of("usr/two").ino(), links));
    assert_eq!(std::fs::read_to_string(tree.join("usr/lib/new/in/file")).unwrap(), "inside\n");
    assert_eq!((of("etc").uid(), of("etc").gid()), (5, 6));
    assert_eq!(std::fs::read_link(tree.join("link")).unwrap(), Path::new("srv"));
    assert!(
        tree.join("tmp/file").exists()
            && std::fs::read_dir(&tree).unwrap().all(|e| !e.unwrap().file_name().to_string_lossy().starts_with(".ims"))
    );
    nothing_stays(dir.path());
}

#[test]
fn abandoned_changes_leave_the_directory_unchanged() {
    let dir = directory();
    let tree = tree(dir.path());
    let before = state(&tree);
    let script = dir.path().join("script");
    let lines = "cd $IMAGE_ROOT_PARENT/image-root\nrm -r boot; echo new > etc/new; touch tmp/failed ../failed\n";
    std::fs::write(&script, lines).unwrap();
    for output in [&[][..], &["--output", "out"]] {
        let arguments = [&CUSTOMIZE[..], &["--host-script", script.to_str().unwrap()], output].concat();
        let output = run(dir.path(), &arguments);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let said = text(&output.stdout) + &text(&output.stderr);
        assert!(said.contains("or, to discard the changes: touch /tmp/failed"), "{said}");
        assert!(said.contains(&format!("the changes were discarded; {} is as it was", tree.display())), "{said}");
        assert_eq!(state(&tree), before);
    }
    let looked = run(dir.path(), &["enter", "tree", "--work", "work", "--discard", "--", "sh", "-c", CHANGES]);
    assert!(looked.status.success(), "{looked:?}");
    assert_eq!(state(&tree), before);
    let published = [&CUSTOMIZE[..], &["--output", "out", "--", "touch", "/etc/new"]].concat();
    let published = run(dir.path(), &published);
    assert!(published.status.success(), "{published:?}");
    assert_eq!(state(&tree), before, "what is published leaves its source alone");
    nothing_stays(dir.path());
}

#[test]
fn changes_to_a_directory_are_kept_without_a_verdict() {
    let dir = directory();
    let tree = tree(dir.path());
    let before = state(&tree);
    let failed = run(dir.path(), &[&CUSTOMIZE[..], &["--", "sh", "-c", "echo 1 > /etc/first; exit 3"]].concat());
    assert_eq!(failed.status.code(), Some(3), "{failed:?}");
    let said = text(&failed.stderr);
    assert!(said.contains("the changes are not applied") && said.contains("to resume: "), "{said}");
    assert_eq!(state(&tree), before);
    // Changes in place would lie below the kept ones.
    for command in [
        &["enter", "tree", "--work", "work", "--", "true"][..],
        &["customize", "tree", "--work", "work", "--in-place", "--", "true"],
    ] {
        let refused = run(dir.path(), command);
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        assert!(text(&refused.stderr).contains("changes to it are kept as"), "{refused:?}");
    }
    let output =
        run(dir.path(), &[&CUSTOMIZE[..], &["--", "sh", "-c", "test -e /etc/first && echo 2 > /etc/second"]].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(tree.join("etc/first").exists() && tree.join("etc/second").exists());
    nothing_stays(dir.path());
}

#[test]
fn failure_in_place_says_that_the_changes_stay() {
    let dir = directory();
    let tree = tree(dir.path());
    std::fs::write(dir.path().join("failing"), "exit 3\n").unwrap();
    let stay = format!("the changes stay in {}, which was changed in place", tree.display());
    let failing = ["--", "sh", "-c", "echo 1 > /etc/new; exit 3"];
    for (options, end, code) in [
        (&[][..], &failing[..], 3),
        (&["--output", "out"], &failing, 3),
        (&["--output", "out", "--kernel", "later"], &["--", "rm", "-r", "/boot"], 1),
        (&[], &["--host-script", "./failing"], 1),
        (&["--output", "out"], &["--host-script", "./failing"], 1),
        (&[], &["--", "sh", "-c", "kill -KILL $$"], 1),
    ] {
        std::fs::create_dir_all(tree.join("boot")).unwrap();
        std::fs::write(tree.join("boot/later"), "a kernel").unwrap();
        let output = run(dir.path(), &[&CUSTOMIZE[..], &["--in-place"], options, end].concat());
        assert!(output.status.code().is_none_or(|ended| ended == code), "{options:?} {end:?}: {output:?}");
        assert_eq!(text(&output.stderr).matches(&stay).count(), 1, "{options:?} {end:?}: {output:?}");
    }
    let succeeded = run(dir.path(), &[&CUSTOMIZE[..], &["--in-place", "--", "true"]].concat());
    assert!(succeeded.status.success() && !text(&succeeded.stderr).contains("stay"), "{succeeded:?}");
}

#[test]
fn killed_application_is_finished_first_by_the_same_command() {
    let dir = directory();
    let tree = tree(dir.path());
    let lines = format!("{CHANGES}; exit 3");
    let kept = run(dir.path(), &[&CUSTOMIZE[..], &["--", "sh", "-c", &lines]].concat());
    assert_eq!(kept.status.code(), Some(3), "{kept:?}");
    // State after a kill just after the verdict.
    begun(dir.path(), &tree);
    for command in [
        &["enter", "tree", "--work", "work", "--", "true"][..],
        &["enter", "tree", "--work", "work", "--discard", "--", "true"],
    ] {
        let refused = run(dir.path(), command);
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        assert!(text(&refused.stderr).contains("applying changes to it was interrupted; 'ims-sshd "), "{refused:?}");
    }
    // Refused commands leave no further directory.
    work(dir.path());
    let output = run(dir.path(), &[&CUSTOMIZE[..], &["--", "touch", "/etc/more"]].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(text(&output.stderr).contains("was interrupted; resuming it"), "{output:?}");
    assert!(tree.join("usr/lib/new/in/file").exists() && !tree.join("boot/initrd").exists());
    assert!(tree.join("etc/more").exists(), "the command was run after that");
    assert!(!has_stage(&tree));
    nothing_stays(dir.path());
}

#[test]
fn killed_application_is_given_up_with_fresh() {
    let dir = directory();
    let tree = tree(dir.path());
    let before = state(&tree);
    let kept = run(dir.path(), &[&CUSTOMIZE[..], &["--", "sh", "-c", &format!("{CHANGES}; exit 3")]].concat());
    assert_eq!(kept.status.code(), Some(3), "{kept:?}");
    begun(dir.path(), &tree);
    let output = run(dir.path(), &[&CUSTOMIZE[..], &["--fresh", "--", "sh", "-c", "echo now"]].concat());
    assert!(output.status.success(), "{output:?}");
    assert!(text(&output.stderr).contains("before any was applied; they are dropped"), "{output:?}");
    let untimed =
        |state: &str| state.lines().filter(|line| !line.starts_with(". ")).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(untimed(&state(&tree)), untimed(&before));
    nothing_stays(dir.path());
}

/// None of the changes is applied yet.
#[test]
fn killed_application_that_another_command_resumes_is_told_with_the_earlier_command() {
    let dir = directory();
    let tree = tree(dir.path());
    keep(dir.path());
    let found = std::fs::metadata(&tree).unwrap();
    let record = format!("decided {} .ims-sshd.applying. 0", identity(&found));
    std::fs::write(work(dir.path()).join(".ims-sshd.applying"), record).unwrap();
    let output = run(dir.path(), &[&CUSTOMIZE[..], &["--", "cat", "/etc/new"]].concat());
    assert!(output.status.success() && text(&output.stdout).contains("new"), "{output:?}");
    let said = text(&output.stderr);
    assert!(said.contains("was interrupted; resuming it; another command made them: "), "{said}");
    assert!(said.contains("-- sh -c 'echo new > /etc/new; exit 3'"), "{said}");
    nothing_stays(dir.path());
}

/// Leaves kept changes to `tree`, which `fail` finds.
fn keep(dir: &Path) {
    let kept = run(dir, &[&CUSTOMIZE[..], &["--", "sh", "-c", "echo new > /etc/new; exit 3"]].concat());
    assert_eq!(kept.status.code(), Some(3), "{kept:?}");
}

fn fail(dir: &Path) -> String {
    let failed = run(dir, &["fail", dir.join("tree").to_str().unwrap()]);
    assert!(failed.status.success(), "{failed:?}");
    assert!(!dir.join("work/ims-sshd").exists() || std::fs::read_dir(dir.join("work/ims-sshd")).unwrap().count() == 0);
    let again = run(dir, &["fail", dir.join("tree").to_str().unwrap()]);
    assert!(!again.status.success(), "the entry is gone: {again:?}");
    text(&failed.stdout)
}

#[test]
fn fail_gives_up_a_killed_application_and_reports_the_applied_part() {
    for step in ["decided", "moving", "placing", "applied"] {
        let dir = directory();
        let tree = tree(dir.path());
        keep(dir.path());
        begun(dir.path(), &tree);
        let record = work(dir.path()).join(".ims-sshd.applying");
        let written = std::fs::read_to_string(&record).unwrap();
        let [_, root, stage, number] = written.split(' ').collect::<Vec<_>>().try_into().unwrap();
        if ["decided", "applied"].contains(&step) {
            std::fs::remove_dir(tree.join(stage)).unwrap();
        }
        let number = if step == "decided" { "0" } else { number };
        std::fs::write(&record, format!("{step} {root} {stage} {number}")).unwrap();
        let refused = run(dir.path(), &["enter", "tree", "--", "true"]);
        let open = text(&run(dir.path(), &["status"]).stdout);
        let marked = run(dir.path(), &["complete", tree.to_str().unwrap()]);
        assert!(text(&refused.stderr).contains("' drops those that are not applied; "), "{step}: {refused:?}");
        assert!(text(&marked.stderr).contains("' drops the changes that are not applied; "), "{step}: {marked:?}");
        assert!(open.contains("  drop those that are not applied: ims-sshd fail "), "{step}: {open}");
        let failed = run(dir.path(), &["fail", tree.to_str().unwrap()]);
        let said = text(&failed.stdout);
        let (warned, is) = match step {
            "placing" => ("it keeps those that were applied", "keeps the changes that were applied, which are not all"),
            "applied" => ("all of them are applied", "has all of the changes"),
            _ => ("before any was applied", "is as it was"),
        };
        assert!(text(&failed.stderr).contains(warned), "{step}: {failed:?}");
        assert!(said.contains(&format!("{} {is}", tree.display())), "{step}: {said}");
        let again = said.contains("; to make the others too, run it again: ") && said.contains(" customize tree ");
        assert_eq!(again, step == "placing", "{said}");
        assert!(!has_stage(&tree), "{step}");
        nothing_stays(dir.path());
        let output = run(dir.path(), &["enter", "tree", "--work", "work", "--", "true"]);
        assert!(output.status.success(), "{output:?}");
    }
}

#[test]
fn fail_clears_the_entry_of_a_missing_directory() {
    let dir = directory();
    let tree = tree(dir.path());
    keep(dir.path());
    std::fs::rename(&tree, dir.path().join("renamed")).unwrap();
    let said = fail(dir.path());
    assert!(said.contains(&format!("{} does not exist: it was renamed or removed", tree.display())), "{said}");
    std::fs::rename(dir.path().join("renamed"), &tree).unwrap();
    // Another test's run may take over the name of a killed run that kept nothing.
    let name = format!("missing-{}", std::process::id());
    for command in ["enter", "customize"] {
        let variables = [("IMS_JAIL_HOSTNAME", name.clone())];
        let mut open = ims_sshd(&[command, "tree", "--in-place", "--work", "work"], &variables);
        open.args(["--", "sh", "-c", "echo open; exec sleep 600"]).current_dir(dir.path()).stdout(Stdio::piped());
        let mut open = Ended::new(open.spawn().unwrap());
        std::io::Read::read_exact(open.stdout.as_mut().unwrap(), &mut [0; 5]).unwrap();
        open.kill().unwrap();
        open.wait().unwrap();
        std::fs::rename(&tree, dir.path().join("renamed")).unwrap();
        let said = fail(dir.path());
        assert!(said.contains(&format!("{} does not exist: it was renamed or removed", tree.display())), "{said}");
        std::fs::rename(dir.path().join("renamed"), &tree).unwrap();
    }
    let entered = run(dir.path(), &["enter", "tree", "--", "true"]);
    assert!(entered.status.success(), "{entered:?}");
}

#[test]
fn changes_are_applied_to_the_opened_directory_even_if_renamed() {
    let dir = directory();
    let tree = tree(dir.path());
    let mut customize =
        ims_sshd(&[&CUSTOMIZE[..], &["--", "sh", "-c", "echo 1 > /etc/new; echo ready; read line"]].concat(), &[]);
    customize.current_dir(dir.path()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut customize = customize.spawn().unwrap();
    std::io::Read::read_exact(customize.stdout.as_mut().unwrap(), &mut [0; 6]).unwrap();
    let moved = dir.path().join("moved");
    std::fs::rename(&tree, &moved).unwrap();
    std::fs::create_dir_all(tree.join("etc")).unwrap();
    std::io::Write::write_all(customize.stdin.as_mut().unwrap(), b"\n").unwrap();
    let output = customize.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(moved.join("etc/new").exists() && !tree.join("etc/new").exists(), "{output:?}");
    assert!(text(&output.stderr).contains("now names another directory"), "{output:?}");
}

/// Leaves a directory as a killed application does.
fn stage(tree: &Path) -> PathBuf {
    let stage = tree.join(".ims-sshd.applying.0123456789abcdef");
    std::fs::create_dir(&stage).unwrap();
    std::fs::set_permissions(&stage, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    stage
}

fn identity(found: &std::fs::Metadata) -> String {
    let made = found.created().unwrap().duration_since(std::time::UNIX_EPOCH).unwrap();
    format!("{},{}.{:09}", found.ino(), made.as_secs(), made.subsec_nanos())
}

/// Leaves the state of a program that was killed just after the verdict.
fn begun(dir: &Path, tree: &Path) {
    let stage = stage(tree);
    let found = std::fs::metadata(tree).unwrap();
    let root = identity(&found);
    let name = stage.file_name().unwrap().to_str().unwrap();
    let record = format!("moving {root} {name} {}", std::fs::metadata(&stage).unwrap().ino());
    std::fs::write(work(dir).join(".ims-sshd.applying"), record).unwrap();
}

fn has_stage(tree: &Path) -> bool {
    std::fs::read_dir(tree).unwrap().any(|entry| entry.unwrap().file_name().to_string_lossy().starts_with(".ims-sshd"))
}

#[test]
fn directory_below_an_overlay_is_not_changed_by_another_run() {
    const CLAIMED: &str = "another build environment is open on it; ";
    let dir = directory();
    let tree = tree(dir.path());
    let mut first = ims_sshd(&CUSTOMIZE, &[]);
    first.args(["--", "sh", "-c", "echo open; exec sleep 600"]).current_dir(dir.path()).stdout(Stdio::piped());
    let mut first = Ended::new(first.spawn().unwrap());
    let mut said = [0; 5];
    std::io::Read::read_exact(first.stdout.as_mut().unwrap(), &mut said).unwrap();
    for (command, reason) in [
        (&["enter", "tree", "--", "true"][..], CLAIMED),
        (&["customize", "tree", "--in-place", "--work", "other"], CLAIMED),
        (&["customize", "tree", "--work", "other", "--", "true"], "it is open as tree"),
    ] {
        let refused = run(dir.path(), command);
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        assert!(text(&refused.stderr).contains(reason), "{command:?}: {refused:?}");
    }
    first.kill().unwrap();
    first.wait().unwrap();
    let output = run(dir.path(), &[&CUSTOMIZE[..], &["--", "true"]].concat());
    assert!(output.status.success(), "{output:?}");
    drop(tree);
    nothing_stays(dir.path());
}

#[test]
fn directory_unfit_for_an_overlay_is_refused_but_can_be_changed_in_place() {
    let dir = directory();
    let tree = tree(dir.path());
    std::fs::create_dir(tree.join("mnt")).unwrap();
    let in_mounts = |arguments: &[&str]| {
        let mut command = Command::new("unshare");
        command
            .args(["-m", "sh", "-c", "mount -t tmpfs tmpfs tree/mnt; exec \"$@\"", "sh", &*IMS_SSHD])
            .args(arguments);
        command.current_dir(dir.path()).stdin(Stdio::null()).output().unwrap()
    };
    let refused = in_mounts(&[&CUSTOMIZE[..], &["--", "true"]].concat());
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    let said = text(&refused.stderr);
    assert!(said.contains("the overlay would hide the mount on ") && said.contains("--in-place"), "{said}");
    let inside = run(dir.path(), &["customize", "tree", "--work", "tree/srv", "--", "true"]);
    assert_eq!(inside.status.code(), Some(1), "{inside:?}");
    assert!(text(&inside.stderr).contains("its changes would be kept inside it"), "{inside:?}");
    let in_place = in_mounts(&[&CUSTOMIZE[..], &["--in-place", "--", "touch", "/mnt/file", "/etc/new"]].concat());
    assert!(in_place.status.success(), "{in_place:?}");
    assert!(tree.join("etc/new").exists());

    // The sentence is not printed, since it would not be true.
    let script = dir.path().join("script");
    std::fs::write(&script, "cd $IMAGE_ROOT_PARENT; touch image-root/etc/newer failed\n").unwrap();
    let output =
        run(dir.path(), &[&CUSTOMIZE[..], &["--in-place", "--host-script", script.to_str().unwrap()]].concat());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(!said.contains("give the changes up") && said.contains("the changes stay in"), "{said}");
    assert!(tree.join("etc/newer").exists());
    let file = run(dir.path(), &["customize", "script", "--in-place", "--output", "out"]);
    assert_eq!(file.status.code(), Some(2), "{file:?}");
}

#[test]
fn directory_that_cannot_be_written_to_is_refused_before_the_command_runs() {
    let dir = directory();
    let tree = tree(dir.path());
    let before = state(&tree);
    let in_mounts = |arguments: &[&str]| {
        let mut command = Command::new("unshare");
        let mounts = "mount --bind tree tree; mount -o remount,bind,ro tree; exec \"$@\"";
        command.args(["-m", "sh", "-c", mounts, "sh", &*IMS_SSHD]).args(arguments).current_dir(dir.path());
        command.stdin(Stdio::null()).output().unwrap()
    };
    let refused = in_mounts(&[&CUSTOMIZE[..], &["--", "sh", "-c", "echo ran; touch /etc/new"]].concat());
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    let said = text(&refused.stderr);
    assert!(said.contains(&format!("cannot write to {}", tree.display())) && said.contains("Read-only"), "{said}");
    assert!(text(&refused.stdout).is_empty() && !dir.path().join("work").exists(), "{refused:?}");
    let published = in_mounts(&[&CUSTOMIZE[..], &["--output", "out", "--", "touch", "/etc/new"]].concat());
    assert!(published.status.success(), "{published:?}");
    assert_eq!(state(&tree), before);

    let during = [&CUSTOMIZE[..], &["--", "sh", "-c", "touch /etc/new; echo open; read line; true"]].concat();
    let mut open = ims_sshd(&during, &[]);
    open.current_dir(dir.path()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut open = open.spawn().unwrap();
    std::io::Read::read_exact(open.stdout.as_mut().unwrap(), &mut [0; 5]).unwrap();
    succeed(Command::new("chattr").arg("+i").arg(&tree));
    drop(open.stdin.take());
    let kept = open.wait_with_output().unwrap();
    succeed(Command::new("chattr").arg("-i").arg(&tree));
    let said = text(&kept.stderr);
    assert!(said.contains("the changes are kept in") && !said.contains("some of the changes"), "{said}");
    assert_eq!(state(&tree), before);
    let applied = run(dir.path(), &during);
    assert!(applied.status.success() && tree.join("etc/new").exists(), "{applied:?}");
    nothing_stays(dir.path());
}

#[test]
fn leftovers_of_a_killed_customization_are_reported_and_ended() {
    let dir = directory();
    let tree = tree(dir.path());
    // The parent of a killed run is named after its directory.
    let sshd = || {
        processes_with(&format!("{}-tree", dir.path().file_name().unwrap().to_string_lossy().trim_start_matches('.')))
    };
    let root = tree.display().to_string();
    for command in [
        &["enter", &root, "--", "true"][..],
        &["package", "--kernel", "vmlinuz", "--archive", "packed.sqsh", &root],
        &["customize", &root, "--work", "work", "--", "true"],
    ] {
        // Another test's run may take over the name of a killed run that kept nothing.
        let variables = [("IMS_JAIL_HOSTNAME", format!("left-{}", std::process::id()))];
        let mut customize = ims_sshd(&["customize", &root, "--in-place"], &variables);
        let mut killed = Ended::new(customize.stdout(Stdio::piped()).spawn().unwrap());
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(killed.stdout.take().unwrap()));
        assert!(lines.any(|line| line.unwrap().contains("ims-sshd complete")));
        // Processes of an open environment are not ended.
        let refused = run(dir.path(), &[&CUSTOMIZE[..], &["--", "true"]].concat());
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        assert!(killed.try_wait().unwrap().is_none() && !sshd().is_empty());
        killed.kill().unwrap();
        killed.wait().unwrap();
        assert!(!sshd().is_empty(), "sshd goes on");
        // Its claim ends with the last of its children.
        wait_until("status lists it as killed", || {
            let status = run(dir.path(), &["status", &root]);
            let said = text(&status.stdout);
            said.contains(": killed, was serving since ") && said.contains(&format!("\n  source: {root}\n"))
        });
        let json = run(dir.path(), &["status", "--json", &root]).stdout;
        let listener = serde_json::from_slice::<serde_json::Value>(&json).unwrap()["sshd"].as_u64();
        assert!(listener.is_some_and(|pid| Path::new(&format!("/proc/{pid}")).exists()), "{}", text(&json));
        let output = run(dir.path(), command);
        assert!(output.status.success(), "{command:?}: {output:?}");
        assert!(
            text(&output.stderr).contains("was killed; ended what it left: a listening sshd"),
            "{command:?}: {output:?}"
        );
        assert!(sshd().is_empty(), "{command:?}");
    }
}

#[test]
fn mark_of_another_user_of_the_machine_does_not_count() {
    // Outside the cache, which is in a home that other users may not reach.
    let dir = tempfile::tempdir().unwrap();
    let tree = tree(dir.path());
    std::fs::set_permissions(tree.join("tmp"), PermissionsExt::from_mode(0o1777)).unwrap();
    let root = tree.display().to_string();
    let touch = |name: &str| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=1234", "--regid=1234", "--clear-groups", "touch"]).arg(tree.join("tmp").join(name));
        succeed(&mut command)
    };
    // In a directory that nobody else reaches, every user of the image may mark it.
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o700)).unwrap();
    let as_user = "touch /tmp/complete && chown 1234 /tmp/complete";
    let counted = run(dir.path(), &["customize", &root, "--in-place", "--", "sh", "-c", as_user]);
    assert!(text(&counted.stderr).contains("the image was marked complete"), "{counted:?}");
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    for name in ["complete", "failed"] {
        let mut customize = ims_sshd(&["customize", &root, "--in-place"], &[]);
        let mut open = Ended::new(customize.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap());
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(open.stderr.take().unwrap()));
        assert!(lines.any(|line| line.unwrap().contains("the environment is open")), "it opens");
        touch(name);
        let told = format!("/tmp/{name} of the image belongs to user 1234 and does not count: ");
        assert!(lines.any(|line| line.unwrap().contains(&told)), "{name}");
        std::fs::remove_file(tree.join("tmp").join(name)).unwrap();
        std::fs::write(tree.join("tmp").join(name), "").unwrap();
        let rest: Vec<_> = lines.map(Result::unwrap).collect();
        assert_eq!(open.wait().unwrap().code(), Some(i32::from(name == "failed")), "{rest:?}");
        assert!(rest.iter().any(|line| line.contains("marked from inside the jail")), "{rest:?}");

        let mut enter = ims_sshd(&["enter", &root, "--", "sh", "-c", "touch /tmp/open && sleep 1000"], &[]);
        let mut open = Ended::new(enter.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap());
        wait_until("the jail is open", || tree.join("tmp/open").exists());
        touch(name);
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(open.stderr.take().unwrap()));
        assert!(lines.any(|line| line.unwrap().contains(&told)), "{name}");
        kill(Pid::from_raw(open.id().cast_signed()), Signal::SIGTERM).unwrap();
        let rest: Vec<_> = lines.map(Result::unwrap).collect();
        let ended = open.wait().unwrap();
        assert!(!ended.success() && !rest.iter().any(|line| line.contains("was marked")), "{ended:?} {rest:?}");
        std::fs::remove_file(tree.join("tmp/open")).unwrap();
    }
}

#[test]
fn directory_that_other_users_reach_is_warned_of_once() {
    let dir = tempfile::tempdir().unwrap();
    tree(dir.path());
    let warnings = |arguments: &[&str]| -> Vec<String> {
        let output = run(dir.path(), arguments);
        assert!(output.status.success(), "{output:?}");
        let said = text(&output.stderr);
        said.lines().filter(|line| line.contains("other users of this machine reach")).map(str::to_owned).collect()
    };
    let prepared = dir.path().join("parent/image-root");
    for (mode, expected) in [(0o700, 0), (0o755, 1)] {
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(mode)).unwrap();
        for arguments in [
            &["enter", "tree", "--", "true"][..],
            &["enter", "tree", "--discard", "--work", "work", "--", "true"],
            &["customize", "tree", "--in-place", "--", "true"],
            &["customize", "tree", "--work", "work", "--", "touch", "/etc/new"],
            &["prepare", "--open", "overlay", "parent", "tree"],
        ] {
            let told = warnings(arguments);
            assert_eq!(told.len(), expected, "{mode:o} {arguments:?}: {told:?}");
            let closing = format!("; if {0} holds nothing else: 'chmod 0700 {0}'", dir.path().display());
            assert!(told.iter().all(|line| line.contains(&closing)), "{told:?}");
        }
        unmount(&prepared);
    }
}

#[test]
fn file_created_below_an_open_overlay_is_named_when_the_environment_closes() {
    let dir = directory();
    let tree = tree(dir.path());
    let script = dir.path().join("script");
    let below = tree.join("tmp/failed");
    let lines = format!(
        "cd $IMAGE_ROOT_PARENT/image-root\necho more >> usr/two\ntouch {}\ntouch ../complete\n",
        below.display()
    );
    std::fs::write(&script, lines).unwrap();
    let with_script = ["--host-script", script.to_str().unwrap()];
    for (end, attempted) in
        [(&[][..], "cannot find the names of changed files in "), (&["--output", "out"], "cannot pack ")]
    {
        let output = run(dir.path(), &[&CUSTOMIZE[..], &with_script, end].concat());
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let why = "/tmp/failed is listed, but not found: the directory was changed from outside while open";
        let said = text(&output.stderr);
        assert!(said.lines().any(|line| line.contains(attempted) && line.contains(&format!(": {why}"))), "{said}");
        std::fs::remove_file(&below).unwrap();
        fail(dir.path());
    }
    nothing_stays(dir.path());
}

#[test]
fn source_behind_a_link_of_another_user_is_refused() {
    let dir = directory();
    let tree = tree(dir.path());
    squashfs_of(&tree);
    let link = |target: &Path, name: &str, owner| {
        let link = dir.path().join(name);
        std::os::unix::fs::symlink(target, &link).unwrap();
        std::os::unix::fs::lchown(&link, Some(owner), Some(owner)).unwrap();
    };
    link(&tree, "theirs", 1234);
    link(dir.path(), "way", 1234);
    link(Path::new("theirs"), "behind", 0);
    link(&tree, "ours", 0);
    for source in ["theirs", "behind", "way/tree", "ours/../way/tree.sqsh"] {
        for command in [&["enter", source, "--discard"][..], &["customize", source, "--output", "out"]] {
            let refused = run(dir.path(), &[command, &["--work", "work", "--", "true"]].concat());
            assert_eq!(refused.status.code(), Some(2), "{refused:?}");
            assert!(text(&refused.stderr).contains("which belongs to user 1234"), "{source}: {refused:?}");
        }
    }
    let entered = run(dir.path(), &["enter", "ours", "--work", "work", "--discard", "--", "true"]);
    assert!(entered.status.success(), "{entered:?}");
}

#[test]
fn every_path_on_the_command_line_is_refused_behind_a_link_of_another_user() {
    let dir = directory();
    tree(dir.path());
    std::os::unix::fs::symlink(dir.path(), dir.path().join("way")).unwrap();
    std::os::unix::fs::lchown(dir.path().join("way"), Some(1234), Some(1234)).unwrap();
    std::fs::write(dir.path().join("script"), "touch /tmp/made\n").unwrap();
    std::fs::write(dir.path().join("key"), "ssh-ed25519 AAAAC3Nz me\n").unwrap();
    std::fs::create_dir(dir.path().join("bound")).unwrap();
    for arguments in [
        &["enter", "tree", "--discard", "--bind", "way/bound:/srv", "--", "true"][..],
        &["customize", "tree", "--script", "way/script"],
        &["customize", "tree", "--host-script", "way/script"],
        &["customize", "tree", "--authorized-key", "way/key"],
        &["customize", "tree", "--output", "way/out", "--kernel", "vmlinuz", "--", "true"],
        &["customize", "tree", "--output", "out", "--changes", "way/new", "--", "true"],
        &["prepare", "parent", "way/tree"],
        &["prepare", "way/parent", "tree"],
        &["package", "way/tree"],
        &["package", "tree", "--archive", "way/new"],
        &["fail", "way/tree"],
    ] {
        let refused = run(dir.path(), arguments);
        assert!(matches!(refused.status.code(), Some(1 | 2)), "{arguments:?}: {refused:?}");
        let said = text(&refused.stderr);
        assert!(said.contains("way is a link, which belongs to user 1234; name its target"), "{arguments:?}: {said}");
    }
    for made in ["out", "new", "parent", "tree/tmp/made"] {
        assert!(!dir.path().join(made).exists(), "{made}");
    }
}

#[test]
fn output_or_work_directory_inside_the_source_is_refused() {
    let dir = directory();
    let tree = tree(dir.path());
    std::os::unix::fs::symlink("tree/etc", dir.path().join("link")).unwrap();
    let before = state(&tree);
    for source in ["tree", "./link/.."] {
        for output in ["tree", "tree/new/out", "link", "link/out", "link/../usr"] {
            for in_place in [&[][..], &["--in-place"]] {
                let options = ["customize", source, "--work", "work", "--output", output];
                let refused = run(dir.path(), &[&options[..], in_place, &["--", "true"]].concat());
                assert_eq!(refused.status.code(), Some(2), "{source} {output}: {refused:?}");
                let said = text(&refused.stderr);
                assert!(
                    said.contains(&format!("--output is '{output}': expected a directory outside SOURCE")),
                    "{said}"
                );
            }
        }
    }
    for (options, code, reason) in [
        (&["--work", "link"][..], 1, "its changes would be kept inside it, in "),
        (&["--work", "link", "--in-place"], 1, "/link/ims-sshd is inside it and would be packed"),
        (&["--work", "tree/etc", "--in-place"], 1, "/tree/etc/ims-sshd is inside it and would be packed"),
        (&["--work", "tree/x/y", "--in-place"], 2, "/tree/x does not exist; create it first"),
    ] {
        let options = [&["customize", "tree", "--output", "out"][..], options, &["--", "true"]].concat();
        let refused = run(dir.path(), &options);
        assert_eq!(refused.status.code(), Some(code), "{options:?}: {refused:?}");
        assert!(text(&refused.stderr).contains(reason), "{options:?}: {refused:?}");
    }
    for archive in ["tree/image.sqsh", "link/image.sqsh"] {
        let refused = run(dir.path(), &["package", "--kernel", "vmlinuz", "--archive", archive, "tree"]);
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        assert!(text(&refused.stderr).contains("expected a file outside the image root"), "{refused:?}");
    }
    let refused = run(dir.path(), &["prepare", "link/parent", "tree"]);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert_eq!(state(&tree), before);
    // The other order is allowed.
    let output = run(dir.path(), &["customize", "tree", "--work", "work", "--output", ".", "--", "true"]);
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn directory_open_in_an_environment_is_neither_packed_nor_prepared() {
    let dir = directory();
    let tree = tree(dir.path());
    let refused = |what: &str| {
        for command in [&["package", "--kernel", "vmlinuz", "tree"][..], &["prepare", "parent", "tree"]] {
            let refused = run(dir.path(), command);
            assert_eq!(refused.status.code(), Some(1), "{what}: {refused:?}");
            let said = text(&refused.stderr);
            assert!(said.contains(what), "{said}");
            assert!(!dir.path().join("tree.sqsh").exists() && !dir.path().join("parent/image-root").exists());
        }
    };
    for command in [&["enter", "tree"][..], &["customize", "tree", "--in-place"], &CUSTOMIZE] {
        let mut open = ims_sshd(command, &[]);
        open.args(["--", "sh", "-c", "echo open; exec sleep 600"]).current_dir(dir.path()).stdout(Stdio::piped());
        let mut open = Ended::new(open.spawn().unwrap());
        let mut said = [0; 5];
        std::io::Read::read_exact(open.stdout.as_mut().unwrap(), &mut said).unwrap();
        refused(&format!("cannot claim {}: another build environment is open on it", tree.display()));
    }
    stage(&tree);
    refused("applying changes to it was interrupted");
}

#[test]
fn empty_directory_in_place_of_a_verdict_file_is_removed() {
    let dir = directory();
    let tree = tree(dir.path());
    std::fs::create_dir_all(tree.join("tmp/failed")).unwrap();
    let script = dir.path().join("script");
    let lines =
        "cd $IMAGE_ROOT_PARENT/image-root\necho 2 > etc/new\nmkdir tmp/complete tmp/failed\ntouch ../complete\n";
    std::fs::write(&script, lines).unwrap();
    for (end, content) in [
        (&["--", "sh", "-c", "mkdir /tmp/failed /tmp/complete && echo 1 > /etc/new"][..], "1\n"),
        (&["--host-script", script.to_str().unwrap()], "2\n"),
    ] {
        let output = run(dir.path(), &[&CUSTOMIZE[..], end].concat());
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let told = "removed the empty directory /tmp/complete of the image, which had the name of a mark";
        assert!(text(&output.stderr).contains(told), "{output:?}");
        assert_eq!(std::fs::read_to_string(tree.join("etc/new")).unwrap(), content);
        assert!(!tree.join("tmp/complete").exists() && !tree.join("tmp/failed").exists());
    }
    let full = run(dir.path(), &[&CUSTOMIZE[..], &["--", "mkdir", "-p", "/tmp/complete/in"]].concat());
    assert_eq!(full.status.code(), Some(1), "{full:?}");
    assert!(
        text(&full.stderr).contains("a non-empty directory with the name of a mark: remove it from the image"),
        "{full:?}"
    );
    assert!(!tree.join("tmp/complete").exists(), "not applied");
    std::fs::create_dir_all(tree.join("tmp/complete/in")).unwrap();
    let refused = run(dir.path(), &[&CUSTOMIZE[..], &["--fresh", "--", "true"]].concat());
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(text(&refused.stderr).contains("remove it from the image"), "{refused:?}");
    fail(dir.path());
    nothing_stays(dir.path());
}

#[test]
fn open_directory_is_refused_under_another_path() {
    let dir = directory();
    let tree = tree(dir.path());
    let other = dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    mount(&["--bind", tree.to_str().unwrap()], &other);
    let _mounted = Mounted(other.clone());
    let mut open = ims_sshd(&["customize", "tree", "--work", "work"], &[]);
    open.args(["--", "sh", "-c", "echo open; exec sleep 600"]).current_dir(dir.path());
    let mut open = Ended::new(open.stdout(std::process::Stdio::piped()).spawn().unwrap());
    std::io::Read::read_exact(open.stdout.as_mut().unwrap(), &mut [0; 5]).unwrap();
    for command in [
        &["customize", "other", "--work", "work2", "--", "true"][..],
        &["customize", "other", "--in-place", "--", "true"],
        &["enter", "other", "--", "true"],
        &["package", "--kernel", "vmlinuz", "other"],
        &["prepare", "parent", "other"],
    ] {
        let refused = run(dir.path(), command);
        assert_eq!(refused.status.code(), Some(1), "{command:?}: {refused:?}");
        let said = text(&refused.stderr);
        assert!(said.contains("another build environment is open on it"), "{said}");
    }
    open.kill().unwrap();
    open.wait().unwrap();
    // Its changes are also kept after a kill.
    let kept = run(dir.path(), &["enter", "other", "--", "true"]);
    assert!(text(&kept.stderr).contains("changes to it are kept as"), "{kept:?}");
    fail(dir.path());
    let output = run(dir.path(), &["enter", "other", "--", "true"]);
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn directory_inside_or_above_an_open_one_is_refused_but_an_archive_is_not() {
    let dir = directory();
    let outer = tree(dir.path());
    let inner = outer.join("in");
    succeed(Command::new("cp").arg("-aT").arg(cache().join("busybox")).arg(&inner));
    make_bootable(&inner);
    squashfs_of(&inner);
    for (open, other, why) in [
        (&outer, "tree/in", format!("it is inside {}, which is open", outer.display())),
        (&inner, "tree", format!("{} inside it is open", inner.display())),
    ] {
        for opening in [&["customize"][..], &["customize", "--in-place"], &["enter"], &["enter", "--discard"]] {
            let mut first = ims_sshd(opening, &[]);
            first.arg(open).args(["--work", &opening.concat(), "--", "sh", "-c", "echo open; exec sleep 600"]);
            let mut first = Ended::new(first.current_dir(dir.path()).stdout(Stdio::piped()).spawn().unwrap());
            std::io::Read::read_exact(first.stdout.as_mut().unwrap(), &mut [0; 5]).unwrap();
            for command in [
                &["customize", other, "--work", "work2", "--", "true"][..],
                &["customize", other, "--in-place", "--", "true"],
                &["enter", other, "--", "true"],
                &["enter", other, "--discard", "--", "true"],
                &["package", "--kernel", "vmlinuz", other],
                &["prepare", "parent", other],
            ] {
                let refused = run(dir.path(), command);
                assert_eq!(refused.status.code(), Some(1), "{opening:?} {command:?}: {refused:?}");
                assert!(text(&refused.stderr).contains(&why), "{opening:?} {command:?}: {refused:?}");
            }
            let looked = run(dir.path(), &["enter", "tree/in.sqsh", "--work", "work2", "--", "true"]);
            assert!(looked.status.success(), "{looked:?}");
            first.kill().unwrap();
            first.wait().unwrap();
            run(dir.path(), &["fail", open.to_str().unwrap()]);
        }
    }
    let entered = run(dir.path(), &["enter", "tree", "--", "true"]);
    assert!(entered.status.success(), "{entered:?}");
}

#[test]
fn claims_of_killed_runs_are_removed_when_a_later_run_ends() {
    let (dir, tree) = bootable_image();
    let work = dir.path().join("work");
    let customize = || {
        let mut command = ims_sshd(&["customize", tree.to_str().unwrap(), "--work", work.to_str().unwrap()], &[]);
        command.args(["--", "sh", "-c"]);
        command
    };
    for _ in 0..2 {
        let mut killed = Ended::new(customize().arg("touch /began; sleep 100").spawn().unwrap());
        wait_until("the command runs", || {
            work.exists() && walk(&work).iter().any(|path| path.ends_with("upper/began"))
        });
        killed.kill().unwrap();
        killed.wait().unwrap();
    }
    assert!(customize().arg("rm -f /began").output().unwrap().status.success());
    let claims = std::fs::read_dir("/run/ims-sshd/.claims").unwrap().map(|entry| entry.unwrap().path());
    // Other tests run meanwhile; theirs name other directories.
    let is_ours = |claim: &PathBuf| {
        std::fs::read_to_string(claim.join("path")).is_ok_and(|path| path.starts_with(dir.path().to_str().unwrap()))
    };
    let left: Vec<_> = claims.filter(is_ours).collect();
    assert!(left.is_empty(), "{left:?}");
}
