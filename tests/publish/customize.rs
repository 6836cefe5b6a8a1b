//! `ims-sshd customize`, from a source to a published image on one machine.

use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ims_sshd::volume::state_directory::name_for;
use testbed::file_server::{Fault, FileServer};
use testbed::job::*;
use testbed::s3_server::{Bucket, Closed, Gate};
use testbed::*;

/// A script that changes the image and marks it.
fn script(dir: &Path, verdict: &str) -> PathBuf {
    let file = dir.join(format!("script-{verdict}"));
    let lines = format!("set -e\ncd $IMAGE_ROOT_PARENT\necho new > image-root/etc/motd\ntouch {verdict}\n");
    std::fs::write(&file, lines).unwrap();
    file
}

fn customize(dir: &Path, source: &str, output: &str, verdict: &str, variables: &[(&str, String)]) -> Output {
    let mut command = ims_sshd(&["customize", source, "--json", "--output", output, "--host-script"], variables);
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
fn early_refusal_leaves_no_state_directory() {
    let (dir, tree, squashfs) = packed_image();
    for (sources, arguments, variable, reason) in [
        ([&tree, &squashfs], vec![], ("IMS_JAIL_HOSTNAME", "node_1"), "as in host names"),
        ([&tree, &squashfs], vec![], ("IMS_CLOSE_GRACE", "soon"), "whole seconds"),
        ([&tree, &squashfs], vec![], ("IMS_JAIL_TIER", "strong"), "'auto' or"),
        ([&tree, &squashfs], vec![], ("JOB_ENABLE_DKMS", "perhaps"), "'true' or 'false'"),
        ([&tree, &squashfs], vec!["--listen", "192.0.2.1"], ("IMS_CLOSE_GRACE", "1"), "a free port on 192.0.2.1"),
    ] {
        for source in sources {
            let mut command = ims_sshd(&["customize"], &[(variable.0, variable.1.to_owned())]);
            command.arg(source).args(&arguments).arg("--work").arg(dir.path().join("work"));
            if source == &squashfs {
                command.arg("--output").arg(dir.path().join("out"));
            }
            let output = command.output().unwrap();
            assert!(!output.status.success() && text(&output.stderr).contains(reason), "{variable:?}: {output:?}");
            // A long path is shortened at its beginning.
            let unique = dir.path().file_name().unwrap().to_str().unwrap().trim_start_matches(".tmp").to_owned();
            let all = std::fs::read_dir("/run/ims-sshd/customize").unwrap().map(|entry| entry.unwrap().file_name());
            let left: Vec<_> = all.filter(|name| name.to_string_lossy().contains(&unique)).collect();
            assert!(left.is_empty(), "{variable:?} {arguments:?}: {left:?}");
        }
    }
}

#[test]
fn every_kind_of_source_is_opened_changed_and_published() {
    let (dir, tree, squashfs) = packed_image();
    let tar = dir.path().join("image.tar.gz");
    succeed(Command::new("tar").args(["-c", "-z", "-f"]).arg(&tar).arg("-C").arg(&tree).arg("."));
    let server = FileServer::start(std::fs::read(&squashfs).unwrap(), &[Fault::ResetAfter(100_000)]);
    let before = std::fs::read(&squashfs).unwrap();
    let sources = [squashfs.display().to_string(), tar.display().to_string(), server.url, tree.display().to_string()];
    for (number, source) in sources.iter().enumerate() {
        // Each has a store of its own.
        let store = dir.path().join(format!("out-{number}"));
        std::fs::rename(tree.join("boot/vmlinuz"), tree.join("boot/vmlinuz-6.1.0")).ok();
        let named = [
            ("KERNEL_FILENAME", if number == 3 { "auto" } else { "vmlinuz" }.into()),
            ("INITRD_FILENAME", "initrd".into()),
        ];
        let output = customize(dir.path(), source, store.to_str().unwrap(), "complete", &named);
        assert!(output.status.success(), "{source}: {output:?}");
        let id = place_of(&report(&output));
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
    assert!(!tree.join("etc/motd").exists(), "a directory neither");
}

#[test]
fn image_marked_failed_is_not_published() {
    let (dir, _, squashfs) = packed_image();
    let squashfs = squashfs.display().to_string();
    let store = dir.path().join("out");
    let output = customize(dir.path(), &squashfs, store.to_str().unwrap(), "failed", &[]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!store.exists());
    nothing_stays(dir.path());
}

#[test]
fn changes_are_kept_if_publication_fails() {
    let dir = directory();
    let bucket = Bucket::new();
    let squashfs = squashfs_of(&image(dir.path())).display().to_string();
    let mut variables = bucket.variables();
    variables.extend([("KERNEL_FILENAME", "vmlinuz".into()), ("INITRD_FILENAME", "initrd".into())]);
    // The directory could be created at first.
    let script =
        "echo new > $IMAGE_ROOT_PARENT/image-root/etc/motd; cd \"${0%/*}\"; touch gone $IMAGE_ROOT_PARENT/complete\n";
    std::fs::write(dir.path().join("losing"), script).unwrap();
    let mut command = ims_sshd(&["customize", &squashfs, "--output", "gone", "--host-script"], &variables);
    command.arg(dir.path().join("losing")).arg("--work").arg(dir.path().join("work")).current_dir(dir.path());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("to publish the image, without "), "{output:?}");
    let output = customize(dir.path(), &squashfs, &format!("s3://{}", bucket.name), "complete", &variables);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(bucket.keys().len(), 5);
    nothing_stays(dir.path());
}

#[test]
fn host_script_that_has_marked_the_image_is_not_run_again_to_publish_it() {
    let (dir, _, squashfs) = packed_image();
    let script = "set -e; cd \"${0%/*}\"; echo line >> $IMAGE_ROOT_PARENT/image-root/etc/lines\n\
        echo ran >> runs; [ -e runs-2 ] || touch gone; touch $IMAGE_ROOT_PARENT/complete\n";
    std::fs::write(dir.path().join("script"), script).unwrap();
    let run = || {
        let mut command =
            ims_sshd(&["customize", squashfs.to_str().unwrap(), "--output", "gone", "--work", "work"], &[]);
        command.args(["--kernel", "vmlinuz", "--initrd", "initrd", "--host-script", "./script"]);
        command.current_dir(dir.path()).output().unwrap()
    };
    let failed = run();
    assert_eq!(failed.status.code(), Some(1), "{failed:?}");
    assert!(text(&failed.stderr).contains(", without running the script again: "), "{failed:?}");
    std::fs::remove_file(dir.path().join("gone")).unwrap();
    let output = run();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(std::fs::read_to_string(dir.path().join("runs")).unwrap(), "ran\n");
    nothing_stays(dir.path());
}

/// Only a verdict drops changes.
#[test]
fn changes_are_kept_when_a_signal_or_a_failing_script_ends_customize_before_a_verdict() {
    let change = "echo kept > $IMAGE_ROOT_PARENT/image-root/etc/kept";
    for (end, code) in [
        ("kill -INT $PPID", 130),
        ("kill -TERM $PPID; sleep 60", 143),
        ("kill -HUP $PPID; sleep 60", 129),
        ("exit 3", 1),
        ("kill -KILL $$", 1),
        ("mkdir $IMAGE_ROOT_PARENT/failed", 1),
    ] {
        let (dir, _, squashfs) = packed_image();
        let squashfs = squashfs.display().to_string();
        let ending = dir.path().join("ending");
        std::fs::write(&ending, format!("{change}; {end}\n")).unwrap();
        let mut command = ims_sshd(&["customize", &squashfs, "--json", "--output", "out", "--host-script"], &[]);
        command.arg(ending).arg("--work").arg(dir.path().join("work")).current_dir(dir.path());
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{end}: {output:?}");
        let said = text(&output.stderr);
        assert!(said.contains("'ims-sshd fail tree"), "{end}: {said}");
        assert!(!dir.path().join("out").exists());
        let named = [("KERNEL_FILENAME", "vmlinuz".into()), ("INITRD_FILENAME", "initrd".into())];
        let output = customize(dir.path(), &squashfs, "out", "complete", &named);
        assert!(output.status.success(), "{end}: {output:?}");
        assert!(text(&output.stderr).contains("resuming the changes kept in"), "{end}: {output:?}");
        let id = place_of(&report(&output));
        let listed = succeed(Command::new("unsquashfs").arg("-l").arg(dir.path().join("out").join(id).join("rootfs")));
        assert!(
            listed.contains("etc/kept") && listed.contains("etc/motd") && !listed.contains("tmp/failed"),
            "{listed}"
        );
        nothing_stays(dir.path());
    }
}

#[test]
fn partial_publication_is_rolled_back_when_the_image_is_given_up() {
    let dir = directory();
    let (bucket, gate) = (Bucket::new(), Gate::start(0, Closed::Silent));
    let tree = image(dir.path());
    let random = feed(Command::new("head").args(["-c", "20M", "/dev/urandom"]), b"").stdout;
    std::fs::write(tree.join("random"), random).unwrap();
    let squashfs = squashfs_of(&tree).display().to_string();
    let output = format!("s3://{}", bucket.name);
    let mut variables = bucket.variables();
    variables.extend([("KERNEL_FILENAME", "vmlinuz".into()), ("INITRD_FILENAME", "initrd".into())]);
    variables.push(("S3_ENDPOINT", gate.endpoint.clone()));
    let mut command = ims_sshd(&["customize", &squashfs, "--output", &output, "--host-script"], &variables);
    command.arg(script(dir.path(), "complete")).arg("--work").arg(dir.path().join("work"));
    let mut child = command.stdout(std::process::Stdio::null()).spawn().unwrap();
    wait_until("a part to be sent", || gate.parts() > 0);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(bucket.unfinished_uploads(), 1);
    let output = customize(dir.path(), &squashfs, &output, "failed", &bucket.variables());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!((bucket.unfinished_uploads(), bucket.keys().len()), (0, 0));
    nothing_stays(dir.path());
}

#[test]
fn killed_customization_can_be_continued() {
    let (dir, _, squashfs) = packed_image();
    let squashfs = squashfs.display().to_string();
    let boot = [("KERNEL_FILENAME", "vmlinuz".into()), ("INITRD_FILENAME", "initrd".into())];
    let first = dir.path().join("first");
    std::fs::write(&first, "echo kept > $IMAGE_ROOT_PARENT/image-root/etc/kept; touch \"$0.done\"\n").unwrap();
    let mut command = ims_sshd(&["customize", &squashfs, "--json", "--output", "out", "--host-script"], &boot);
    command.arg(&first).arg("--work").arg(dir.path().join("work")).current_dir(dir.path());
    let mut killed = command.stdout(std::process::Stdio::null()).spawn().unwrap();
    wait_until("the script to end", || dir.path().join("first.done").exists());
    killed.kill().unwrap();
    killed.wait().unwrap();
    let output = customize(dir.path(), &squashfs, "out", "complete", &boot);
    assert!(output.status.success(), "{output:?}");
    let id = place_of(&report(&output));
    let rootfs = dir.path().join("out").join(id).join("rootfs");
    assert_eq!(succeed(Command::new("unsquashfs").arg("-cat").arg(rootfs).arg("etc/kept")), "kept\n");
    nothing_stays(dir.path());
}

#[test]
fn enter_cleans_up_after_a_killed_customization() {
    let (dir, _, squashfs) = packed_image();
    let squashfs = squashfs.display().to_string();
    for answer in ["--yes", "--discard"] {
        let mut command = ims_sshd(&["customize", &squashfs, "--output", "out", "--work", "work"], &[]);
        let mut killed = command.current_dir(dir.path()).stdout(std::process::Stdio::piped()).spawn().unwrap();
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(killed.stdout.take().unwrap()));
        assert!(lines.any(|line| line.unwrap().contains("ims-sshd complete")));
        killed.kill().unwrap();
        killed.wait().unwrap();
        let places = std::fs::read_dir(dir.path().join("work/ims-sshd")).unwrap();
        let places: Vec<_> = places.map(|entry| entry.unwrap().path().canonicalize().unwrap()).collect();
        let run = Path::new("/run/ims-sshd/customize").join(name_for(&places[0].join("image-root")));
        let state = Path::new("/run/ims-sshd").join(name_for(&run));
        assert!(run.exists() && state.exists());
        let mut enter = ims_sshd(&["enter", &squashfs, "--output", "out", "--work", "work", answer, "true"], &[]);
        let output = enter.current_dir(dir.path()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert!(!run.exists() && !state.exists(), "{answer}");
        nothing_stays(dir.path());
    }
}

#[test]
fn image_that_is_never_booted_is_published_without_a_kernel() {
    let (dir, tree) = bootable_image();
    std::fs::remove_dir_all(tree.join("boot")).unwrap();
    let squashfs = squashfs_of(&tree).display().to_string();
    let output = customize(dir.path(), &squashfs, "out", "complete", &[]);
    assert!(output.status.success(), "{output:?}");
    assert!(text(&output.stderr).contains("the image has no kernel"), "{output:?}");
    assert_eq!(report(&output)["ims_image_artifacts"].as_array().unwrap().len(), 1);
}

/// Renames a directory by rename(2), where `mv` would copy, and changes a file by one of its names.
const AS_ON_A_DISK: &str = "set -e\ncd $IMAGE_ROOT_PARENT/image-root\n\
    /usr/bin/python3 -c 'import os; os.rename(\"opt/old\", \"opt/new\"); os.rename(\"opt/new/in\", \"srv/in\")'\n\
    chmod 600 usr/one; echo more >> usr/two\n\
    /usr/bin/python3 -c 'import os; assert len({os.lstat(p).st_dev for p in (\".\", \"usr/one\", \"opt/new/leaf\")}) == 1'\n\
    touch ../complete\n";

#[test]
fn mounted_source_supports_directory_renames_and_hard_links() {
    let (dir, tree) = bootable_image();
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
    // A directory on a disk is customized in place; an archive is mounted below an overlay.
    let published = [&squashfs, &tree].map(|source| {
        let store = dir.path().join(format!("{}.out", source.file_name().unwrap().display()));
        let boot = [("KERNEL_FILENAME", "vmlinuz".into()), ("INITRD_FILENAME", "initrd".into())];
        let mut command = ims_sshd(&["customize", source.to_str().unwrap(), "--json", "--output"], &boot);
        command.arg(&store).arg("--host-script").arg(&file).arg("--work").arg(dir.path().join("work"));
        command.args((source == &tree).then_some("--in-place"));
        let changes = store.with_extension("changes");
        let output = command.arg("--changes").arg(&changes).current_dir(dir.path()).output().unwrap();
        assert!(output.status.success(), "{source:?}: {output:?}");
        assert!(!text(&output.stderr).contains("lacks"), "{output:?}");
        let id = place_of(&report(&output));
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
    // A process that marks the image when it is ended, outside and inside the image; also in plain mode.
    for (number, (plain, mark)) in
        [(false, "failed"), (false, "image-root/tmp/failed"), (true, "failed")].into_iter().enumerate()
    {
        let (dir, _, squashfs) = packed_image();
        let squashfs = squashfs.display().to_string();
        let lines = format!(
            "cd $IMAGE_ROOT_PARENT\n(trap 'touch {mark}; exit' TERM; touch set; while :; do sleep 0.1; done) &\n\
             until [ -e set ]; do sleep 0.1; done\nrm set\ntouch complete\n"
        );
        let script = dir.path().join("late");
        std::fs::write(&script, lines).unwrap();
        let store = dir.path().join("out");
        let named = [("KERNEL_FILENAME", "vmlinuz".into()), ("INITRD_FILENAME", "initrd".into())];
        let mut command = ims_sshd(&["customize", &squashfs, "--output"], &named);
        command.arg(&store).arg("--host-script").arg(script).arg("--work").arg(dir.path().join("work"));
        let output = command.args(plain.then_some("--plain")).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{number}: {output:?}");
        assert!(!store.exists(), "{number}: the image was published");
        nothing_stays(dir.path());
    }
}

#[test]
fn other_users_have_no_access_to_an_image_during_customization() {
    let (dir, tree) = bootable_image();
    std::fs::write(tree.join("etc/shadow"), "root:secret:::::::\n").unwrap();
    std::fs::set_permissions(tree.join("bin/busybox"), Permissions::from_mode(0o4755)).unwrap();
    let squashfs = squashfs_of(&tree);
    let script = dir.path().join("script");
    let lines = "set -e\nroot=$IMAGE_ROOT_PARENT/image-root\ncp --preserve=mode $root/bin/busybox $root/bin/changed\n\
                 for place in /var/lib /var/lib/ims-sshd /var/lib/ims-sshd/*/overlay/upper/bin/changed \
                 $IMAGE_ROOT_PARENT/ssh_config $IMAGE_ROOT_PARENT/id_ed25519; do\n\
                 stat -c '%n %a %u' $place\n\
                 setpriv --reuid 65534 --clear-groups sh -c 'cat $0 || ls $0/' $place > /dev/null 2>&1 || continue\n\
                 echo nobody reads $place\ndone\n\
                 stat -c '%n %a %u' /var/lib/ims-sshd/*\n\
                 touch /srv/gone $IMAGE_ROOT_PARENT/complete\n";
    std::fs::write(&script, lines).unwrap();
    // Without --work, variables do not matter.
    let run = "mount -t tmpfs tmpfs /var/lib; mount -t tmpfs -o mode=0755 tmpfs /srv; $0 customize $1 --output $2 --host-script $3; \
               find /var/lib/ims-sshd -type f -name '*.sqsh' -printf '%f %m\\n'; ls -d /var/tmp/ims-sshd* /tmp/ims-sshd* 2> /dev/null; \
               cd /srv; stat -c '%n %a %u' out out/* out/*/*; as='setpriv --reuid 65534 --clear-groups'; \
               $as ls out; $as cat out/*/rootfs > /dev/null && echo nobody reads the image";
    let customize = |output: &str| {
        let named = [("KERNEL_FILENAME", "vmlinuz"), ("INITRD_FILENAME", "initrd"), ("TMPDIR", "/tmp")];
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", run, &*IMS_SSHD]).arg(&squashfs).arg(output).arg(&script).envs(named);
        let output = command.current_dir(dir.path()).output().unwrap();
        let said = text(&output.stdout) + &text(&output.stderr);
        let reached: Vec<_> = said.split("nobody reads ").skip(1).map(|rest| rest.lines().next().unwrap()).collect();
        // A person with a key of his own needs the last part.
        assert!(reached.len() == 2 && reached[0] == "/var/lib" && reached[1].ends_with("/ssh_config"), "{said}");
        for mode in
            ["/var/lib/ims-sshd 700 0", "/overlay/upper/bin/changed 4755 0", "tree.sqsh 700 0", "/id_ed25519 600 0"]
        {
            assert!(said.lines().any(|line| line.ends_with(mode)), "{mode}: {said}");
        }
        said
    };
    // An image that could not be published is kept.
    let said = customize("/srv/gone");
    assert!(said.contains("\npacked.sqsh 600\n"), "{said}");
    let said = customize("/srv/out");
    assert!(said.contains("\nout 755 0\nout/") && said.contains("/rootfs: Permission denied"), "{said}");
    assert!(!said.contains(".sqsh 6") && !said.contains("/tmp/ims-sshd"), "{said}");
}

#[test]
fn work_directory_that_others_can_exchange_is_refused() {
    let dir = directory();
    let place = |name: &str, mode: u32, owner: u32| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        std::os::unix::fs::chown(&path, Some(owner), Some(owner)).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        path
    };
    let link = |name: &str, target: &Path, owner: u32| {
        let path = dir.path().join(name);
        std::os::unix::fs::symlink(target, &path).unwrap();
        std::os::unix::fs::lchown(&path, Some(owner), Some(owner)).unwrap();
    };
    place("foreign/ims-sshd", 0o700, 65534);
    place("open/ims-sshd", 0o777, 0);
    place("sticky/ims-sshd", 0o1777, 0);
    place("group/ims-sshd", 0o775, 0);
    place("home", 0o755, 1234);
    place("homes/deep/ims-sshd", 0o700, 0);
    place("homes", 0o755, 1234);
    place("everybodys", 0o777, 0);
    place("tmp", 0o1777, 0);
    place("wide/ims-sshd", 0o755, 0);
    let real = place("real", 0o755, 0);
    link("tmp/link", &real, 65534);
    link("roots-link", &real, 0);
    std::fs::create_dir(dir.path().join("below-link")).unwrap();
    link("below-link/ims-sshd", &real, 65534);
    std::fs::create_dir(dir.path().join("file")).unwrap();
    std::fs::write(dir.path().join("file/ims-sshd"), "").unwrap();
    // Only a superblock: mounting it fails.
    let mut superblock = b"hsqs".to_vec();
    superblock.resize(4096, 0);
    superblock[40..48].copy_from_slice(&4096_u64.to_le_bytes());
    std::fs::write(dir.path().join("empty.sqsh"), superblock).unwrap();
    let work_in = |name: &str, caller: Option<&str>| {
        let mut command = ims_sshd(&["customize", "empty.sqsh", "--output", "out", "--work", name], &[]);
        if let Some(caller) = caller {
            command.env("SUDO_UID", caller);
        }
        let output = command.current_dir(dir.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        text(&output.stderr)
    };
    for (name, reason) in [
        ("foreign", "belongs to user 65534"),
        ("open", "users other than its owner can write to"),
        ("sticky", "users other than its owner can write to"),
        ("group", "users other than its owner can write to"),
        ("home", "belongs to user 1234"),
        ("homes/deep", "belongs to user 1234"),
        ("everybodys", "users other than its owner can write to"),
        ("tmp/link", "belongs to user 65534"),
        ("below-link", "belongs to user 65534"),
        ("file", "File exists"),
    ] {
        let said = work_in(name, Some("77"));
        assert!(said.contains("cannot keep files of an image in") && said.contains(reason), "{name}: {said}");
    }
    for (name, caller) in [
        ("tmp", None),
        ("wide", None),
        ("roots-link", None),
        ("new", None),
        ("home", Some("1234")),
        ("homes/deep", Some("1234")),
    ] {
        let said = work_in(name, caller);
        assert!(said.contains("cannot mount "), "{name}: {said}");
        let made = dir.path().join(name).join("ims-sshd").metadata().unwrap();
        assert_eq!((made.permissions().mode() & 0o7777, made.uid()), (0o700, 0), "{name}");
    }
}

#[test]
fn second_customization_of_a_source_is_refused_with_the_first_one() {
    let (dir, _, squashfs) = packed_image();
    let squashfs = squashfs.display().to_string();
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let waiting = dir.path().join("waiting");
    std::fs::write(&waiting, format!("read line < {}; touch $IMAGE_ROOT_PARENT/failed\n", fifo.display())).unwrap();
    let mut command = ims_sshd(&["customize", &squashfs, "--json", "--output", "out", "--host-script"], &[]);
    command.arg(&waiting).arg("--work").arg(dir.path().join("work")).current_dir(dir.path());
    let mut first = command.spawn().unwrap();
    // The open returns when the script reads.
    let mut goes_on = std::fs::File::options().write(true).open(&fifo).unwrap();
    let second = command.output().unwrap();
    assert_eq!(second.status.code(), Some(1), "{second:?}");
    assert!(text(&second.stderr).contains("it is open as tree"), "{second:?}");
    std::io::Write::write_all(&mut goes_on, b"\n").unwrap();
    assert_eq!(first.wait().unwrap().code(), Some(1));
    nothing_stays(dir.path());
}

/// Everything that can be checked before the work is checked then.
#[test]
fn hopeless_customizations_are_refused_before_the_environment_opens() {
    let (dir, _, squashfs) = packed_image();
    let file = |name: &str, text: &str| {
        std::fs::write(dir.path().join(name), text).unwrap();
        name.to_owned()
    };
    succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(dir.path().join("key")));
    let public = std::fs::read_to_string(dir.path().join("key.pub")).unwrap();
    file("empty", "");
    file("comment", &format!("# {public}"));
    let converted = succeed(Command::new("ssh-keygen").args(["-e", "-f"]).arg(dir.path().join("key.pub")));
    file("rfc4716", &converted);
    nix::unistd::mkfifo(&dir.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let expired = format!("no-pty,expiry-time=\"20200101\" {public}");
    file("expired", &expired);
    file("options", &format!("# one\n\nno-pty,command=\"echo a b\" {public}{expired}"));
    let script = dir.path().join("script");
    std::fs::write(&script, "touch \"$0.ran\"; touch $IMAGE_ROOT_PARENT/failed\n").unwrap();
    for disk in ["small", "larger"] {
        std::fs::create_dir(dir.path().join(disk)).unwrap();
    }
    // The image fits here, but not both in the work directory and in the store.
    let larger = std::fs::metadata(&squashfs).unwrap().len() * 3 / 2;
    let run = |arguments: &[&str]| {
        let mut command = Command::new("unshare");
        // Half of the image fits; even root cannot write to a read-only mount.
        let mounts = "mount -t tmpfs -o size=500k tmpfs small; mount -t tmpfs -o size=$LARGER tmpfs larger; mkdir -m 700 ro; mount --bind ro ro; mount -o remount,bind,ro ro; exec \"$@\"";
        command
            .args(["-m", "sh", "-c", mounts, "sh", &*IMS_SSHD, "customize"])
            .arg(&squashfs)
            .args(["--host-script"])
            .arg(&script)
            .env("LARGER", larger.to_string());
        let _ = std::fs::remove_file(dir.path().join("script.ran"));
        let output = command.args(arguments).current_dir(dir.path()).output().unwrap();
        (output.status.code(), dir.path().join("script.ran").exists(), text(&output.stderr))
    };
    for (arguments, code, reason) in [
        (&["--output", "out", "--authorized-key", "key"][..], 2, "it is a private key"),
        (&["--output", "out", "--authorized-key", "empty"], 2, "it holds no public key"),
        (&["--output", "out", "--authorized-key", "comment"], 2, "it holds no public key"),
        (&["--output", "out", "--authorized-key", "rfc4716"], 2, "RFC 4716"),
        (&["--output", "out", "--authorized-key", "expired"], 2, "every key in it has expired"),
        (&["--output", "out", "--authorized-key", "fifo"], 2, "expected a regular file"),
        (&["--output", "out", "--authorized-key", "missing"], 2, "No such file"),
        (&["--output", "out", "--kernel", "nonesuch"], 1, "cannot find the kernel /boot/nonesuch in the image"),
        (&["--output", "out", "--initrd", "nonesuch"], 1, "cannot find the initrd /boot/nonesuch in the image"),
        (&["--output", "s3:/b"], 2, "the store is 's3:/b'"),
        (&["--output", "/proc/out"], 1, "cannot write to the store /proc/out"),
        (&["--output", "ro"], 1, "cannot write to the store"),
        (&["--output", "out", "--work", "small"], 1, "name a directory on another disk with --work"),
        (&["--output", "small/out"], 1, "name a directory on another disk with --output"),
        (
            &["--output", "larger/out", "--work", "larger"],
            1,
            "name a directory on another disk with --work or --output",
        ),
    ] {
        let arguments: Vec<_> = if arguments.contains(&"--work") {
            arguments.to_vec()
        } else {
            arguments.iter().copied().chain(["--work", "work"]).collect()
        };
        let (ended, ran, said) = run(&arguments);
        assert_eq!((ended, ran), (Some(code), false), "{arguments:?}: {said}");
        assert!(said.contains(reason) && !said.contains("are kept in"), "{arguments:?}: {said}");
    }
    for arguments in [
        &["--output", "out", "--authorized-key", "options", "--kernel", "vmlinuz", "--initrd", "initrd"][..],
        &["--output", "out", "--authorized-key", "key.pub"],
    ] {
        let (ended, ran, said) = run(&[arguments, &["--work", "work"]].concat());
        assert_eq!((ended, ran), (Some(1), true), "{arguments:?}: {said}");
        assert_eq!(said.contains("the key in line 4 of"), arguments.contains(&"options"), "{arguments:?}: {said}");
    }
}

#[test]
fn missing_program_is_reported_early_with_its_package() {
    let (dir, _, squashfs) = packed_image();
    let path = dir.path().join("bin");
    std::fs::create_dir(&path).unwrap();
    for (missing, package) in [("mksquashfs", "squashfs-tools"), ("ssh-keygen", "openssh-client")] {
        for name in ["mksquashfs", "ssh-keygen", "mount"] {
            let link = path.join(name);
            let _ = std::fs::remove_file(&link);
            if name != missing {
                let found = succeed(Command::new("sh").args(["-c", &format!("command -v {name}")]));
                std::os::unix::fs::symlink(found.trim(), &link).unwrap();
            }
        }
        let only = [("PATH", path.display().to_string()), ("IMAGE_PACKER", "mksquashfs".into())];
        let output = customize(dir.path(), squashfs.to_str().unwrap(), "out", "complete", &only);
        let said = String::from_utf8_lossy(&output.stderr);
        let message = format!("cannot run {missing}: it is not installed; install the package {package}");
        assert!(said.contains(&message) && !said.contains("is open"), "{said}");
        assert!(dir.path().join("work").exists() == (missing == "ssh-keygen"), "{said}");
    }
    nothing_stays(dir.path());
    // Our own packer needs none of squashfs-tools.
    for name in ["ssh-keygen", "touch"] {
        let found = succeed(Command::new("sh").args(["-c", &format!("command -v {name}")]));
        std::os::unix::fs::symlink(found.trim(), path.join(name)).unwrap();
    }
    std::fs::remove_file(path.join("mksquashfs")).unwrap();
    let only = [("PATH", path.display().to_string())];
    let output = customize(dir.path(), squashfs.to_str().unwrap(), "out", "complete", &only);
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn printed_ssh_command_logs_in_or_says_where_to_put_the_key() {
    let dir = directory();
    image(dir.path());
    let keys = dir.path().join("100% own");
    std::fs::create_dir(&keys).unwrap();
    succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(keys.join("key")));
    for (from, to) in [("key.pub", "alone.pub"), ("key", "private")] {
        std::fs::copy(keys.join(from), dir.path().join(to)).unwrap();
    }
    for (key, told) in [("100% own/key.pub", ""), ("alone.pub", " -i YOUR_KEY")] {
        let mut open = ims_sshd(&["customize", "tree", "--work", "work", "--authorized-key", key], &[]);
        let mut open = Ended::new(open.current_dir(dir.path()).stdout(std::process::Stdio::piped()).spawn().unwrap());
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(open.stdout.take().unwrap()));
        let line = lines
            .find_map(|line| Some(line.unwrap().trim().to_owned()).filter(|line| line.starts_with("ssh ")))
            .unwrap();
        assert_eq!(line.contains(" -i YOUR_KEY "), !told.is_empty(), "{line}");
        let line = line.replace("YOUR_KEY", "private");
        let said = succeed(Command::new("sh").args(["-c", &format!("{line} echo in")]).current_dir(dir.path()));
        assert_eq!(said, "in\n");
    }
}

#[test]
fn full_disk_of_the_work_directory_is_told_by_its_own_path() {
    let (dir, _, squashfs) = packed_image();
    let disk = dir.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let mut open = Command::new("unshare");
    open.args(["-m", "sh", "-c", "mount -t tmpfs -o size=12m tmpfs disk; exec \"$@\"", "sh", &*IMS_SSHD]);
    open.arg("customize").arg(&squashfs).args(["--work", "disk", "--output", "out"]).current_dir(dir.path());
    let piped = std::process::Stdio::piped;
    let mut open = Ended::new(open.stdout(piped()).stderr(piped()).spawn().unwrap());
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(open.stdout.take().unwrap()));
    assert!(lines.any(|line| line.unwrap().trim().starts_with("ssh ")));
    // The program's own mount namespace has this disk.
    let fill = format!("/proc/{}/root{}/fill", open.id(), disk.display());
    let mut fill = std::fs::File::create(fill).unwrap();
    let written = std::io::copy(&mut std::io::repeat(1), &mut fill).unwrap_err();
    assert_eq!(written.kind(), std::io::ErrorKind::StorageFull);
    let mut said = String::new();
    std::io::Read::read_to_string(open.stderr.as_mut().unwrap(), &mut said).unwrap();
    assert_eq!(open.wait().unwrap().code(), Some(1), "{said}");
    for end in ["is full and no session is open", "is still full: closing as failed"] {
        let is_told = |line: &str| {
            let place = line.split("the volume of ").nth(1).and_then(|rest| rest.split_once(&format!(" {end}")));
            place.is_some_and(|(place, _)| Path::new(place).starts_with(&disk))
        };
        assert!(said.lines().any(is_told), "{end}: {said}");
    }
}
