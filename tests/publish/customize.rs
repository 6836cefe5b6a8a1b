//! From a source to a published image on one machine.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::file_server::{Fault, FileServer};
use crate::job::*;
use crate::s3_server::{Bucket, Closed, Gate};
use crate::support::*;

/// A script that changes the image and marks it.
fn script(dir: &Path, verdict: &str) -> PathBuf {
    let file = dir.join(format!("script-{verdict}"));
    let lines = format!("set -e\ncd $IMAGE_ROOT_PARENT\necho new > image-root/etc/motd\ntouch {verdict}\n");
    std::fs::write(&file, lines).unwrap();
    file
}

fn customize(dir: &Path, source: &str, output: &str, verdict: &str, variables: &[(&str, String)]) -> Output {
    let mut command = ims_sshd(&["customize", source, "--output", output, "--script"], variables);
    command.arg(script(dir, verdict)).arg("--work").arg(dir.join("work")).current_dir(dir);
    command.output().unwrap()
}

pub fn nothing_stays(dir: &Path) {
    assert_eq!(std::fs::read_dir(dir.join("work/ims-sshd")).unwrap().count(), 0);
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(dir.to_str().unwrap()), "{mounts}");
    assert!(!succeed(Command::new("losetup").arg("--list")).contains(dir.to_str().unwrap()));
}

#[test]
fn every_kind_of_source_is_opened_changed_and_published() {
    let dir = folder();
    let tree = image(dir.path());
    let squashfs = squashfs_of(&tree);
    let tar = dir.path().join("image.tar.gz");
    succeed(Command::new("tar").args(["-c", "-z", "-f"]).arg(&tar).arg("-C").arg(&tree).arg("."));
    let server = FileServer::start(std::fs::read(&squashfs).unwrap(), &[Fault::ResetAfter(100_000)]);
    let before = std::fs::read(&squashfs).unwrap();
    let sources = [squashfs.display().to_string(), tar.display().to_string(), server.url, tree.display().to_string()];
    for (number, source) in sources.iter().enumerate() {
        // A store of its own each, so that what is in it is this one's.
        let store = dir.path().join(format!("out-{number}"));
        std::fs::rename(tree.join("boot/vmlinuz"), tree.join("boot/vmlinuz-6.1.0")).ok();
        let named = [
            ("KERNEL_FILENAME", if number == 3 { "auto" } else { "vmlinuz" }.into()),
            ("INITRD_FILENAME", "initrd".into()),
        ];
        let output = customize(dir.path(), source, store.to_str().unwrap(), "complete", &named);
        assert!(output.status.success(), "{source}: {output:?}");
        let id = report(&output)["ims_image_record"]["id"].as_str().unwrap().to_owned();
        let published = dir.path().join(format!("published-{number}"));
        let rootfs = store.join(&id).join("rootfs");
        succeed(Command::new("unsquashfs").args(["-quiet", "-no-progress", "-dest"]).args([&published, &rootfs]));
        assert_eq!(std::fs::read_to_string(published.join("etc/motd")).unwrap(), "new\n");
        let mut keys: Vec<_> = std::fs::read_dir(store.join(&id)).unwrap().map(|e| e.unwrap().file_name()).collect();
        keys.sort();
        assert_eq!(keys, ["boot_parameters", "initrd", "kernel", "manifest.json", "rootfs"]);
        assert_eq!(std::fs::read(store.join(&id).join("kernel")).unwrap(), b"a kernel");
        nothing_stays(dir.path());
    }
    assert!(std::fs::read(&squashfs).unwrap() == before, "a source is not changed");
    assert!(tree.join("etc/motd").exists(), "but a folder is, in its place");
}

#[test]
fn an_image_marked_failed_is_not_published() {
    let dir = folder();
    let squashfs = squashfs_of(&image(dir.path())).display().to_string();
    let store = dir.path().join("out");
    let output = customize(dir.path(), &squashfs, store.to_str().unwrap(), "failed", &[]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!store.exists());
    nothing_stays(dir.path());
}

#[test]
fn what_was_changed_is_kept_when_it_could_not_be_published() {
    let dir = folder();
    let bucket = Bucket::new();
    let squashfs = squashfs_of(&image(dir.path())).display().to_string();
    let mut variables = bucket.variables();
    variables.extend([("KERNEL_FILENAME", "vmlinuz".into()), ("INITRD_FILENAME", "initrd".into())]);
    let output = customize(dir.path(), &squashfs, "s3://no-such-bucket", "complete", &variables);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("the same command goes on with it"), "{output:?}");
    let output = customize(dir.path(), &squashfs, &format!("s3://{}", bucket.name), "complete", &variables);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(bucket.keys().len(), 5);
    nothing_stays(dir.path());
}

#[test]
fn changes_are_kept_when_a_signal_ends_customize_before_a_verdict() {
    let dir = folder();
    let squashfs = squashfs_of(&image(dir.path())).display().to_string();
    let interrupting = dir.path().join("interrupting");
    std::fs::write(&interrupting, "echo kept > $IMAGE_ROOT_PARENT/image-root/etc/kept; kill -INT $PPID\n").unwrap();
    let mut command = ims_sshd(&["customize", &squashfs, "--output", "out", "--script"], &[]);
    command.arg(interrupting).arg("--work").arg(dir.path().join("work")).current_dir(dir.path());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    assert!(text(&output.stderr).contains("the same command goes on with it"), "{output:?}");
    assert!(!dir.path().join("out").exists());
    let named = [("KERNEL_FILENAME", "vmlinuz".into()), ("INITRD_FILENAME", "initrd".into())];
    let output = customize(dir.path(), &squashfs, "out", "complete", &named);
    assert!(output.status.success(), "{output:?}");
    assert!(text(&output.stderr).contains("going on with what was changed before"), "{output:?}");
    let id = report(&output)["ims_image_record"]["id"].as_str().unwrap().to_owned();
    let listed = succeed(Command::new("unsquashfs").arg("-l").arg(dir.path().join("out").join(id).join("rootfs")));
    assert!(listed.contains("etc/kept") && listed.contains("etc/motd") && !listed.contains("tmp/failed"), "{listed}");
    nothing_stays(dir.path());
}

#[test]
fn what_was_published_in_part_is_taken_back_when_the_image_is_given_up() {
    let dir = folder();
    let (bucket, gate) = (Bucket::new(), Gate::start(0, Closed::Silent));
    let tree = image(dir.path());
    let random = feed(Command::new("head").args(["-c", "20M", "/dev/urandom"]), b"").stdout;
    std::fs::write(tree.join("random"), random).unwrap();
    let squashfs = squashfs_of(&tree).display().to_string();
    let output = format!("s3://{}", bucket.name);
    let mut variables = bucket.variables();
    variables.extend([("KERNEL_FILENAME", "vmlinuz".into()), ("INITRD_FILENAME", "initrd".into())]);
    variables.push(("S3_ENDPOINT", gate.endpoint.clone()));
    let mut command = ims_sshd(&["customize", &squashfs, "--output", &output, "--script"], &variables);
    command.arg(script(dir.path(), "complete")).arg("--work").arg(dir.path().join("work"));
    let mut child = command.stdout(std::process::Stdio::null()).spawn().unwrap();
    wait_until("a part to be sent", || gate.parts() > 0);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(bucket.begun(), 1);
    let output = customize(dir.path(), &squashfs, &output, "failed", &bucket.variables());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!((bucket.begun(), bucket.keys().len()), (0, 0));
    nothing_stays(dir.path());
}

#[test]
fn a_customization_that_was_killed_while_it_was_open_is_gone_on_with() {
    let dir = folder();
    let squashfs = squashfs_of(&image(dir.path())).display().to_string();
    let boot = [("KERNEL_FILENAME", "vmlinuz".into()), ("INITRD_FILENAME", "initrd".into())];
    let first = dir.path().join("first");
    std::fs::write(&first, "echo kept > $IMAGE_ROOT_PARENT/image-root/etc/kept; touch \"$0.done\"\n").unwrap();
    let mut command = ims_sshd(&["customize", &squashfs, "--output", "out", "--script"], &boot);
    command.arg(&first).arg("--work").arg(dir.path().join("work")).current_dir(dir.path());
    let mut killed = command.stdout(std::process::Stdio::null()).spawn().unwrap();
    wait_until("the script to end", || dir.path().join("first.done").exists());
    killed.kill().unwrap();
    killed.wait().unwrap();
    let output = customize(dir.path(), &squashfs, "out", "complete", &boot);
    assert!(output.status.success(), "{output:?}");
    let id = report(&output)["ims_image_record"]["id"].as_str().unwrap().to_owned();
    let rootfs = dir.path().join("out").join(id).join("rootfs");
    assert_eq!(succeed(Command::new("unsquashfs").arg("-cat").arg(rootfs).arg("etc/kept")), "kept\n");
    nothing_stays(dir.path());
}

#[test]
fn an_image_that_nobody_boots_is_published_without_a_kernel() {
    let dir = folder();
    let tree = image(dir.path());
    std::fs::remove_dir_all(tree.join("boot")).unwrap();
    let squashfs = squashfs_of(&tree).display().to_string();
    let output = customize(dir.path(), &squashfs, "out", "complete", &[]);
    assert!(output.status.success(), "{output:?}");
    assert!(text(&output.stderr).contains("published without one"), "{output:?}");
    assert_eq!(report(&output)["ims_image_artifacts"].as_array().unwrap().len(), 1);
}

/// Renames a directory by rename(2), where `mv` would copy, and changes a file by one of its names.
const AS_ON_A_DISK: &str = "set -e\ncd $IMAGE_ROOT_PARENT/image-root\n\
    /usr/bin/python3 -c 'import os; os.rename(\"opt/old\", \"opt/new\"); os.rename(\"opt/new/in\", \"srv/in\")'\n\
    chmod 600 usr/one; echo more >> usr/two\n\
    /usr/bin/python3 -c 'import os; assert len({os.lstat(p).st_dev for p in (\".\", \"usr/one\", \"opt/new/leaf\")}) == 1'\n\
    touch ../complete\n";

#[test]
fn a_mounted_source_takes_directory_renames_and_changes_to_hard_links_as_a_disk_does() {
    let dir = folder();
    let tree = image(dir.path());
    for name in ["opt/old/in", "srv", "usr"] {
        std::fs::create_dir_all(tree.join(name)).unwrap();
    }
    std::fs::write(tree.join("opt/old/in/file"), "inside\n").unwrap();
    std::fs::write(tree.join("opt/old/leaf"), "leaf\n").unwrap();
    std::fs::write(tree.join("usr/one"), "one\n").unwrap();
    for name in ["two", "three"] {
        std::fs::hard_link(tree.join("usr/one"), tree.join("usr").join(name)).unwrap();
    }
    let squashfs = squashfs_of(&tree);
    let file = dir.path().join("script");
    std::fs::write(&file, AS_ON_A_DISK).unwrap();
    // A directory is customized where it is, on a disk; an archive is mounted below an overlay.
    let published = [&squashfs, &tree].map(|source| {
        let store = dir.path().join(format!("{}.out", source.file_name().unwrap().display()));
        let boot = [("KERNEL_FILENAME", "vmlinuz".into()), ("INITRD_FILENAME", "initrd".into())];
        let mut command = ims_sshd(&["customize", source.to_str().unwrap(), "--output"], &boot);
        command.arg(&store).arg("--script").arg(&file).arg("--work").arg(dir.path().join("work"));
        let changes = store.with_extension("changes");
        let output = command.arg("--changes").arg(&changes).current_dir(dir.path()).output().unwrap();
        assert!(output.status.success(), "{source:?}: {output:?}");
        assert!(!text(&output.stderr).contains("lacks"), "{output:?}");
        let id = report(&output)["ims_image_record"]["id"].as_str().unwrap().to_owned();
        let to = store.join("unpacked");
        let mut unsquashfs = Command::new("unsquashfs");
        succeed(unsquashfs.args(["-quiet", "-no-progress", "-dest"]).arg(&to).arg(store.join(id).join("rootfs")));
        let changes: serde_json::Value = serde_json::from_slice(&std::fs::read(changes).unwrap()).unwrap();
        let find = "find . -path ./proc -prune -o -type f -printf '%p %m %n %s\\n' | sort; cat usr/three srv/in/file opt/new/leaf";
        (succeed(Command::new("sh").args(["-c", find]).current_dir(to)), changes)
    });
    assert_eq!(published[0], published[1]);
    let (files, changes) = &published[0];
    assert!(files.contains("./usr/three 600 3 9\n") && files.ends_with("one\nmore\ninside\nleaf\n"), "{files}");
    assert_eq!(changes["altered"], serde_json::json!(["/usr/one", "/usr/three", "/usr/two"]));
    assert!(changes["removed"].as_array().unwrap().contains(&"/opt/old/leaf".into()), "{changes}");
    nothing_stays(dir.path());
}

#[test]
fn late_failed_mark_is_not_published() {
    // A process that marks the image as it is ended, outside and in the image; in plain mode too.
    for (number, (plain, mark)) in
        [(false, "failed"), (false, "image-root/tmp/failed"), (true, "failed")].into_iter().enumerate()
    {
        let dir = folder();
        let tree = image(dir.path());
        let squashfs = squashfs_of(&tree).display().to_string();
        let lines = format!(
            "cd $IMAGE_ROOT_PARENT\n(trap 'touch {mark}; exit' TERM; touch set; while :; do sleep 0.1; done) &\n\
             until [ -e set ]; do sleep 0.1; done\nrm set\ntouch complete\n"
        );
        let script = dir.path().join("late");
        std::fs::write(&script, lines).unwrap();
        let store = dir.path().join("out");
        let named = [("KERNEL_FILENAME", "vmlinuz".into()), ("INITRD_FILENAME", "initrd".into())];
        let mut command = ims_sshd(&["customize", &squashfs, "--output"], &named);
        command.arg(&store).arg("--script").arg(script).arg("--work").arg(dir.path().join("work"));
        let output = command.args(plain.then_some("--plain")).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{number}: {output:?}");
        assert!(!store.exists(), "{number}: the image was published");
        nothing_stays(dir.path());
    }
}
