//! Packing an image root into a squashfs.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::job::*;
use testbed::*;

fn package(arguments: &[&str]) -> Output {
    let mut command = ims_sshd(&["package"], &[("SOURCE_DATE_EPOCH", "1700000000".into())]);
    // The record of an archive is written to the current directory.
    let place = directory();
    let output = command.args(arguments).current_dir(place.path()).output().unwrap();
    assert!(output.status.code().is_some(), "{output:?}");
    output
}

fn refused(tree: &Path, archive: &Path, reason: &str) {
    let output = package(&["--archive", archive.to_str().unwrap(), tree.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains(reason), "expected '{reason}': {}", text(&output.stderr));
    nothing_is_packed(archive.parent().unwrap());
}

fn nothing_is_packed(directory: &Path) {
    let names = std::fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name());
    let left: Vec<_> = names.filter(|n| n.to_string_lossy().starts_with("image.sqsh")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn packing_is_reproducible_byte_for_byte() {
    let (dir, tree) = bootable_image();
    let packed = |name: &str, compression: &str| {
        let archive = dir.path().join(name);
        let output =
            package(&["--compression", compression, "--archive", archive.to_str().unwrap(), tree.to_str().unwrap()]);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(text(output.stdout).trim(), archive.to_str().unwrap());
        std::fs::read(archive).unwrap()
    };
    for compression in ["gzip", "zstd", "xz"] {
        let first = packed("first.sqsh", compression);
        succeed(Command::new("touch").arg("-h").arg(tree.join("etc/passwd")));
        assert!(first == packed("second.sqsh", compression), "{compression}");
        let said = succeed(Command::new("unsquashfs").arg("-s").arg(dir.path().join("first.sqsh")));
        assert!(said.contains(&format!("Compression {compression}")), "{said}");
    }
}

#[test]
fn archive_whose_record_cannot_be_written_is_removed() {
    let (dir, tree) = bootable_image();
    let record = dir.path().join(".ims-sshd.packed");
    std::fs::create_dir_all(record.join("in")).unwrap();
    let mut command = ims_sshd(&["package", "--archive", "image.sqsh"], &[]);
    let output = command.arg(&tree).current_dir(dir.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains(".ims-sshd.packed"), "{output:?}");
    nothing_is_packed(dir.path());
}

#[test]
fn image_root_is_packed_into_its_parent() {
    let dir = directory();
    let parent = dir.path().join("parent");
    std::fs::create_dir(&parent).unwrap();
    std::fs::rename(image(dir.path()), parent.join("image-root")).unwrap();
    let output = package(&["--name", "compute", parent.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
    assert!(parent.join("compute.sqsh").exists() && !parent.join("compute.sqsh.part").exists());
}

#[test]
fn missing_kernel_is_refused_with_a_list_of_boot() {
    let (dir, tree) = bootable_image();
    let archive = dir.path().join("image.sqsh");
    std::fs::rename(tree.join("boot/vmlinuz"), tree.join("boot/vmlinuz-6.1.0")).unwrap();
    let named = |reason: &str| {
        let paths = ["--archive", archive.to_str().unwrap(), tree.to_str().unwrap()];
        let output = package(&[&["--kernel", "vmlinuz"], &paths[..]].concat());
        assert!(!output.status.success() && text(&output.stderr).contains(reason), "{output:?}");
        nothing_is_packed(dir.path());
    };
    named("/boot holds initrd, kernel-parameters, vmlinuz-6.1.0");
    std::os::unix::fs::symlink("/etc/hostname", tree.join("boot/vmlinuz")).unwrap();
    named("find the kernel /boot/vmlinuz in the image");
    let output = package(&["--kernel", "auto", "--archive", archive.to_str().unwrap(), tree.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn image_without_a_kernel_is_packed_unless_a_kernel_is_named() {
    let dir = directory();
    let parent = dir.path().join("work");
    std::fs::create_dir(&parent).unwrap();
    std::fs::rename(image(dir.path()), parent.join("image-root")).unwrap();
    std::fs::remove_dir_all(parent.join("image-root/boot")).unwrap();
    let parent = parent.to_str().unwrap();
    let refused = package(&["--kernel", "vmlinuz", parent]);
    assert!(text(&refused.stderr).contains("/boot holds nothing"), "{refused:?}");
    let output = package(&[parent]);
    assert!(output.status.success() && text(&output.stderr).contains("the image has no kernel"), "{output:?}");
    let store = dir.path().join("out");
    succeed(&mut ims_sshd(&["upload", "--store", store.to_str().unwrap(), parent], &[]));
    assert!(walk(&store).iter().any(|path| path.ends_with("manifest.json")));
    assert!(!walk(&store).iter().any(|path| path.ends_with("kernel")));
}

#[test]
fn image_without_an_initrd_is_published_with_a_warning() {
    let dir = directory();
    let tree = image(dir.path());
    std::fs::remove_file(tree.join("boot/initrd")).unwrap();
    let squashfs = squashfs_of(&tree);
    for (options, warnings) in [(&[][..], 2), (&["--initrd", "none"], 0)] {
        let mut customize = ims_sshd(&["customize", "--name", "compute", "--output", "out", "--work", "work"], &[]);
        customize.args(options).arg(&squashfs).args(["--", "echo", "ran"]).current_dir(dir.path());
        let output = customize.output().unwrap();
        let said = text(&output.stderr);
        assert!(output.status.success(), "{options:?}: {said}");
        assert_eq!(said.matches("no initrd").count(), warnings, "{options:?}: {said}");
        assert!(!said.contains("regular file"), "{said}");
        let out = dir.path().join("out");
        let names: Vec<_> = walk(&out).iter().map(|p| p.file_name().unwrap().to_str().unwrap().to_owned()).collect();
        assert!(
            names.contains(&"kernel".to_owned()) && !names.contains(&"initrd".to_owned()),
            "{options:?}: {names:?}"
        );
        std::fs::remove_dir_all(out).unwrap();
    }
    // A file that is named must exist.
    let archive = dir.path().join("image.sqsh");
    let refused = package(&["--initrd", "initrd", "--archive", archive.to_str().unwrap(), tree.to_str().unwrap()]);
    assert!(
        text(&refused.stderr).contains("cannot find the initrd /boot/initrd in the image: /boot holds"),
        "{refused:?}"
    );
    assert_eq!(refused.status.code(), Some(1));
}

#[test]
fn packing_is_refused_with_mounts_or_processes_in_the_image_root() {
    let (dir, tree) = bootable_image();
    let archive = dir.path().join("image.sqsh");
    std::fs::create_dir(tree.join("proc")).unwrap();
    let script = "mount -t proc proc $1/proc && exec $0 package --archive $2 $1";
    let output =
        Command::new("unshare").args(["-m", "sh", "-c", script, &*IMS_SSHD]).args([&tree, &archive]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("something is mounted on"), "{output:?}");
    let mut somebody = Command::new("cat").current_dir(tree.join("etc")).stdin(Stdio::piped()).spawn().unwrap();
    refused(&tree, &archive, &format!("process {} (cat) has its root or working directory in it", somebody.id()));
    drop(somebody.stdin.take());
    somebody.wait().unwrap();
    // Its working directory stays outside, and it reports when it is there.
    let script = "import os, sys; os.chroot(sys.argv[1]); print(flush=True); sys.stdin.read()";
    let mut somebody = Command::new("/usr/bin/python3")
        .args(["-c", script])
        .arg(&tree)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    somebody.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
    refused(&tree, &archive, &format!("process {} (python3) has its root or working directory in it", somebody.id()));
    drop(somebody.stdin.take());
    somebody.wait().unwrap();
    assert!(package(&["--archive", archive.to_str().unwrap(), tree.to_str().unwrap()]).status.success());
}

#[test]
fn file_capabilities_and_attributes_are_packed() {
    let (dir, tree) = bootable_image();
    succeed(Command::new("setcap").arg("cap_net_raw+ep").arg(tree.join("bin/busybox")));
    let attributes = [("user.note", "one"), ("user.other", "two")];
    for (name, value) in attributes {
        let path = tree.join("etc/passwd");
        rustix::fs::setxattr(&path, name, value.as_bytes(), rustix::fs::XattrFlags::empty()).unwrap();
    }
    let archive = dir.path().join("image.sqsh");
    let output = package(&["--archive", archive.to_str().unwrap(), tree.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
    let unpacked = dir.path().join("unpacked");
    succeed(Command::new("unsquashfs").args(["-quiet", "-no-progress", "-dest"]).args([&unpacked, &archive]));
    assert!(succeed(Command::new("getcap").arg(unpacked.join("bin/busybox"))).contains("cap_net_raw=ep"));
    let mut value = [0; 16];
    let length = rustix::fs::getxattr(unpacked.join("etc/passwd"), "user.other", &mut value[..]).unwrap();
    assert_eq!(&value[..length], b"two");
}

#[test]
fn kiwi_description_is_packed_readable_for_root_only() {
    let (dir, tree) = bootable_image();
    std::fs::create_dir(tree.join("image")).unwrap();
    let mode = |packed: &str, name: &str| {
        let archive = dir.path().join(packed);
        let output = package(&["--archive", archive.to_str().unwrap(), tree.to_str().unwrap()]);
        assert!(output.status.success(), "{output:?}");
        let unpacked = archive.with_extension("d");
        succeed(Command::new("unsquashfs").args(["-quiet", "-no-progress", "-dest"]).args([&unpacked, &archive]));
        std::fs::metadata(unpacked.join(name)).unwrap().permissions().mode() & 0o7777
    };
    assert_eq!(mode("other", "image"), 0o755, "a directory of somebody else's");
    std::fs::write(tree.join("image/config.xml"), "<repository password='x'/>").unwrap();
    assert_eq!((mode("first", "image"), mode("second", "image/config.xml")), (0o700, 0o644));
    assert_eq!(std::fs::metadata(tree.join("image")).unwrap().permissions().mode() & 0o777, 0o755, "the source stays");
    std::fs::rename(tree.join("image"), tree.join("elsewhere")).unwrap();
    std::os::unix::fs::symlink("elsewhere", tree.join("image")).unwrap();
    assert_eq!(mode("link", "elsewhere"), 0o755);
}

#[test]
fn lost_attributes_are_noticed() {
    let (dir, tree) = bootable_image();
    succeed(Command::new("setcap").arg("cap_net_raw+ep").arg(tree.join("bin/busybox")));
    // A mksquashfs that was built without them.
    let few = dir.path().join("few");
    std::fs::create_dir(&few).unwrap();
    let mksquashfs = few.join("mksquashfs");
    std::fs::write(&mksquashfs, "#!/bin/sh\nexec /usr/bin/mksquashfs \"$@\" -no-xattrs\n").unwrap();
    std::fs::set_permissions(&mksquashfs, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = ims_sshd(&["package", "--archive", "image.sqsh"], &[("IMAGE_PACKER", "mksquashfs".into())]);
    let output = command.arg(&tree).env("PATH", &few).current_dir(dir.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(
        text(&output.stderr).contains("1 different sets of extended attributes, and the squashfs has 0"),
        "{output:?}"
    );
    nothing_is_packed(dir.path());
}

#[test]
fn access_control_lists_are_left_out_with_a_warning() {
    let (dir, tree) = bootable_image();
    // Version, then tag, permissions and number of each entry, as systemd's packages set for the journal's directory.
    let entries: [(u16, u16, u32); 5] =
        [(0x01, 6, u32::MAX), (0x02, 4, 1000), (0x04, 4, u32::MAX), (0x10, 4, u32::MAX), (0x20, 4, u32::MAX)];
    let entries = entries.iter().flat_map(|(tag, permissions, id)| {
        [&tag.to_le_bytes()[..], &permissions.to_le_bytes(), &id.to_le_bytes()].concat()
    });
    let list: Vec<_> = 2_u32.to_le_bytes().into_iter().chain(entries).collect();
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(tree.join("etc/passwd"), "system.posix_acl_access", &list, flags).unwrap();
    let archive = dir.path().join("image.sqsh");
    let output = package(&["--archive", archive.to_str().unwrap(), tree.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
    assert!(text(&output.stderr).contains("system.posix_acl_access"), "{output:?}");
}

#[test]
fn times_that_a_squashfs_cannot_hold_become_the_nearest_with_a_warning() {
    use std::os::unix::fs::MetadataExt;
    let (dir, tree) = bootable_image();
    for (name, date) in [("early", "1969-07-20"), ("late", "2107-01-01"), ("last", "2106-02-07 06:28:15")] {
        succeed(Command::new("touch").args(["-d", &format!("{date} UTC")]).arg(tree.join(name)));
    }
    let packed = |packer: &str, epoch: Option<&str>| {
        let mut variables = vec![("IMAGE_PACKER", packer.to_owned())];
        variables.extend(epoch.map(|epoch| ("SOURCE_DATE_EPOCH", epoch.to_owned())));
        let archive = dir.path().join("image.sqsh");
        let arguments = ["package", "--archive", archive.to_str().unwrap(), tree.to_str().unwrap()];
        let output = ims_sshd(&arguments, &variables).current_dir(dir.path()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let _ = std::fs::remove_dir_all(dir.path().join("unpacked"));
        let mut unsquashfs = Command::new("unsquashfs");
        succeed(unsquashfs.args(["-quiet", "-no-progress", "-dest"]).arg(dir.path().join("unpacked")).arg(&archive));
        std::fs::remove_file(archive).unwrap();
        let time = |name: &str| std::fs::metadata(dir.path().join("unpacked").join(name)).unwrap().mtime();
        (text(&output.stderr), ["early", "late", "last"].map(time))
    };
    let (said, times) = packed("ims-sshd", None);
    assert_eq!(times, [0, u32::MAX.into(), u32::MAX.into()]);
    let warned: Vec<_> = said.lines().filter(|line| line.contains("nearest time")).collect();
    assert!(warned.len() == 1 && warned[0].contains("packed 2 files with"), "{said}");
    assert!(warned[0].contains("first /early") || warned[0].contains("first /late"), "{said}");
    let (said, _) = packed("mksquashfs", None);
    assert!(said.contains("packed 2 files with a wrong time"), "{said}");
    let (said, times) = packed("ims-sshd", Some("7"));
    assert!(times == [7; 3] && !said.contains("time that can"), "{said}");
}

/// mksquashfs packs an empty file instead, and succeeds.
#[test]
fn unreadable_file_is_an_error() {
    let (dir, tree) = bootable_image();
    let file = squashfs_of(&tree);
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 4096].fill(0xaa);
    std::fs::write(&file, bytes).unwrap();
    // Opened in place, nothing has read the whole tree before.
    let script = "mkdir mounted && mount -t squashfs -o loop,ro $1 mounted && $0 package --archive image.sqsh mounted";
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script, &*IMS_SSHD]).arg(&file).current_dir(dir.path());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains("cannot pack"), "{output:?}");
    nothing_is_packed(dir.path());
}

/// Values of `IMAGE_PACKER`, with the process that packs.
const PACKERS: [(&str, &str); 2] = [("ims-sshd", "pack-as-child"), ("mksquashfs", "mksquashfs")];

/// A tree that takes some time to pack, and a program whose packer is packing it.
fn packing(dir: &Path, (packer, process): (&str, &str)) -> (PathBuf, Child, Pid) {
    let tree = image(dir);
    let random = feed(Command::new("head").args(["-c", "16M", "/dev/urandom"]), b"").stdout;
    std::fs::write(tree.join("random"), random).unwrap();
    let variables = [("IMAGE_PACKER", packer.to_owned())];
    let mut command = ims_sshd(&["package", "--compression", "xz", "--archive", "image.sqsh"], &variables);
    let child = command.arg(&tree).current_dir(dir).spawn().unwrap();
    let begun = |archive: std::fs::Metadata| archive.len() > 1 << 20;
    wait_until("the archive to grow", || dir.join("image.sqsh.part").metadata().is_ok_and(begun));
    let packing = at_work_in(&tree, process);
    (tree, child, Pid::from_raw(packing[0].cast_signed()))
}

#[test]
fn terminated_package_leaves_nothing() {
    for packer in PACKERS {
        let dir = directory();
        let (_, mut child, packing) = packing(dir.path(), packer);
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(143));
        assert!(kill(packing, None).is_err(), "{packer:?} goes on");
        nothing_is_packed(dir.path());
    }
}

/// Each signal, while the packer works for another command.
#[test]
fn signal_during_packing_sets_the_exit_code() {
    for (signal, code) in [(Signal::SIGINT, 130), (Signal::SIGTERM, 143), (Signal::SIGHUP, 129)] {
        let dir = directory();
        let (_, mut child, _) = packing(dir.path(), PACKERS[0]);
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code), "package");
        nothing_is_packed(dir.path());

        let squashfs = squashfs_of(&dir.path().join("tree")).display().to_string();
        let mut command = ims_sshd(&["customize", &squashfs, "--output", "out", "--work", "work"], &[]);
        command.args(["--compression", "xz", "--kernel", "vmlinuz", "--initrd", "initrd", "touch", "/etc/new"]);
        let mut child = Ended::new(command.current_dir(dir.path()).stderr(Stdio::piped()).spawn().unwrap());
        let work = dir.path().join("work");
        let is_part =
            |file: &PathBuf| file.ends_with("packed.sqsh.part") && file.metadata().is_ok_and(|f| f.len() > 1 << 20);
        wait_until("the archive to grow", || work.exists() && walk(&work).iter().any(is_part));
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        let said = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(code), "customize: {said}");
        let interrupted = format!("interrupted by {signal}; the changes are kept in ");
        assert!(said.contains(&interrupted), "{said}");
        assert!(!dir.path().join("out").exists());
    }
}

#[test]
fn packer_ends_with_its_killed_parent() {
    for packer in PACKERS {
        let dir = directory();
        let (tree, mut child, packing) = packing(dir.path(), packer);
        // A program that ignores the signal.
        kill(packing, Signal::SIGSTOP).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        // At once: the packer may still be ending.
        let mut command = ims_sshd(&["package", "--compression", "none", "--archive", "image.sqsh"], &[]);
        let output = command.arg(&tree).current_dir(dir.path()).output().unwrap();
        assert!(output.status.success(), "{packer:?}: {output:?}");
        assert!(dir.path().join("image.sqsh").exists() && !dir.path().join("image.sqsh.part").exists());
        wait_until("the packer to be reaped", || kill(packing, None).is_err());
    }
}

/// Trees outside an image root parent, which have no claim in common.
#[test]
fn second_run_that_packs_into_one_archive_is_refused() {
    for (packer, process) in PACKERS {
        let dir = directory();
        let (_, first, packing) = packing(dir.path(), (packer, process));
        let mut first = Ended::new(first);
        kill(packing, Signal::SIGSTOP).unwrap();
        let (other, tree) = bootable_image();
        let pack = |variables: &[(&str, String)]| {
            let mut command = ims_sshd(&["package", "--archive"], variables);
            command.arg(dir.path().join("image.sqsh")).arg(&tree).current_dir(other.path()).output().unwrap()
        };
        let second = pack(&[("IMAGE_PACKER", packer.to_owned())]);
        let said = text(&second.stderr);
        assert_eq!(second.status.code(), Some(1), "{said}");
        let why = "image.sqsh.part: another run is packing into it; wait until that run has ended, or name";
        assert!(said.contains(why), "{said}");
        kill(packing, Signal::SIGCONT).unwrap();
        assert!(first.wait().unwrap().success());
        succeed(Command::new("unsquashfs").arg("-s").arg(dir.path().join("image.sqsh")));
        // What a killed run or another user has left is replaced, whatever it is.
        let part = dir.path().join("image.sqsh.part");
        std::fs::remove_file(dir.path().join("image.sqsh")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &part).unwrap();
        assert!(pack(&[]).status.success());
        for (owner, mode) in [(0, 0o600), (0, 0o644), (1234, 0o600)] {
            std::fs::write(&part, "left").unwrap();
            std::fs::set_permissions(&part, std::fs::Permissions::from_mode(mode)).unwrap();
            std::os::unix::fs::chown(&part, Some(owner), None).unwrap();
            let lock = std::fs::File::open(&part).unwrap();
            if (owner, mode) != (0, 0o600) {
                lock.lock().unwrap();
            }
            let output = pack(&[]);
            assert!(output.status.success(), "{owner} {mode:o}: {output:?}");
        }
        assert!(!part.exists());
    }
}

#[test]
fn packing_waits_for_the_packer_of_a_killed_run() {
    let (dir, tree) = bootable_image();
    let archive = dir.path().join("image.sqsh");
    for name in ["mksquashfs", "exe", "ims-sshd-packer"] {
        let program = dir.path().join(name);
        std::fs::copy("/bin/cat", &program).unwrap();
        let mut packer = Command::new(&program).current_dir(&tree).stdin(Stdio::piped()).spawn().unwrap();
        let mut command = ims_sshd(&["package", "--archive"], &[]);
        command.args([&archive, &tree]).current_dir(dir.path());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let waiting = format!("waiting for process {} ({name}), which a killed run has left in", packer.id());
        assert!(lines.any(|line| line.contains(&waiting)), "{name}");
        assert!(!archive.exists());
        drop(packer.stdin.take());
        packer.wait().unwrap();
        let further: Vec<_> = lines.collect();
        assert!(child.wait().unwrap().success(), "{further:?}");
        std::fs::remove_file(&archive).unwrap();
    }
}

#[test]
fn excluded_files_are_left_out_and_changes_are_reported() {
    let (dir, tree) = bootable_image();
    std::fs::create_dir_all(tree.join("var/lib/dpkg")).unwrap();
    let status = |version: &str| format!("Package: bash\nStatus: install ok installed\nVersion: {version}\n");
    std::fs::write(tree.join("var/lib/dpkg/status"), status("5.1")).unwrap();
    let parent = dir.path().join("parent");
    let [parent_text, tree_text] = [&parent, &tree].map(|p| p.to_str().unwrap());
    assert!(ims_sshd(&["prepare", parent_text, tree_text], &[]).status().unwrap().success());
    let root = parent.join("image-root");
    std::fs::write(root.join("etc/motd"), "new").unwrap();
    std::fs::write(root.join("etc/passwd"), "changed").unwrap();
    std::fs::remove_file(root.join("boot/kernel-parameters")).unwrap();
    std::fs::write(root.join("var/lib/dpkg/status"), status("5.2")).unwrap();
    let changes = dir.path().join("changes.json");
    let output = package(&["--exclude", "etc/mo*", "--changes", changes.to_str().unwrap(), parent_text]);
    assert!(output.status.success(), "{output:?}");
    let changes: serde_json::Value = serde_json::from_slice(&std::fs::read(changes).unwrap()).unwrap();
    assert_eq!(changes["added"], serde_json::json!(["/etc/motd"]));
    assert_eq!(changes["removed"], serde_json::json!(["/boot/kernel-parameters"]));
    assert_eq!(changes["altered"], serde_json::json!(["/etc/passwd", "/var/lib/dpkg/status"]));
    assert_eq!(changes["packages"]["altered"], serde_json::json!({"bash": ["5.1", "5.2"]}));
    let list = succeed(Command::new("unsquashfs").arg("-l").arg(parent.join("image.sqsh")));
    assert!(list.contains("/etc/passwd") && !list.contains("/etc/motd"), "{list}");
}

#[test]
fn report_of_changes_replaces_links_and_special_files() {
    let (dir, tree) = bootable_image();
    let parent = dir.path().join("parent");
    let [parent_text, tree_text] = [&parent, &tree].map(|p| p.to_str().unwrap());
    assert!(ims_sshd(&["prepare", parent_text, tree_text], &[]).status().unwrap().success());
    // A directory of another user, who also knows the name of the temporary file.
    let script = "ln -s ../precious to-a-file; ln -s ../absent to-nothing; ln ../precious hard; mkfifo fifo; echo old > old; \
                  for name in to-a-file to-nothing hard fifo old new; do ln -s ../precious .$name.ims-sshd; done";
    let theirs = dir.path().join("theirs");
    std::fs::create_dir(&theirs).unwrap();
    std::fs::write(dir.path().join("precious"), "precious").unwrap();
    succeed(Command::new("sh").args(["-c", script]).current_dir(&theirs));
    for name in ["to-a-file", "to-nothing", "hard", "fifo", "old", "new"] {
        let file = theirs.join(name);
        // Opening the fifo would block forever.
        let mut package = Command::new("timeout");
        package.args(["-s", "KILL", "100", &*IMS_SSHD, "package", "--changes"]).arg(&file).arg(&parent);
        succeed(&mut package);
        assert!(file.symlink_metadata().unwrap().is_file(), "{name}");
        let told: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        assert!(told["added"].is_array(), "{name}: {told}");
        assert_eq!(std::fs::read(dir.path().join("precious")).unwrap(), b"precious", "{name}");
        assert!(!dir.path().join("absent").exists(), "{name}");
    }
    // Replacing a device would break the machine; this is a /dev of the test's own.
    let script = "mount -t tmpfs tmpfs /dev && mknod -m 666 /dev/null c 1 3 && ln -s /proc/self/fd/1 /dev/stdout && \
                  ! $0 package $1 /dev/$2 $3 && test -c /dev/null && test -L /dev/stdout";
    for (option, name) in [("--changes", "null"), ("--changes", "stdout"), ("--archive", "null")] {
        let mut shell = Command::new("unshare");
        shell.args(["-m", "sh", "-c", script, &*IMS_SSHD, option, name]).arg(&parent);
        let output = shell.output().unwrap();
        assert!(output.status.success(), "{option} {name}: {output:?}");
        assert!(text(&output.stderr).contains("expected a file outside /dev"), "{option} {name}: {output:?}");
    }
}

#[test]
fn rpm_packages_are_reported_without_changing_the_image() {
    let dir = directory();
    let (tree, parent) = (dir.path().join("source"), dir.path().join("parent"));
    let database = tree.join("usr/lib/sysimage/rpm");
    std::fs::create_dir_all(&database).unwrap();
    std::fs::create_dir_all(tree.join("var/lib")).unwrap();
    // The root is the image's, not this machine's.
    std::os::unix::fs::symlink("/usr/lib/sysimage/rpm", tree.join("var/lib/rpm")).unwrap();
    std::fs::write(tree.join("usr/lib/os-release"), "ID=test\n").unwrap();
    make_bootable(&tree);
    let parent_text = parent.to_str().unwrap();
    let output = ims_sshd(&["prepare", parent_text, tree.to_str().unwrap()], &[]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    // A package is installed.
    let root = parent.join("image-root");
    std::fs::copy(cache().join("rpm/var/lib/rpm/rpmdb.sqlite"), root.join("usr/lib/sysimage/rpm/rpmdb.sqlite"))
        .unwrap();
    let before = digest(&root);
    let changes = dir.path().join("changes.json");
    let packed = |path: &str| -> (serde_json::Value, String) {
        let mut command = ims_sshd(&["package", "--changes", changes.to_str().unwrap(), parent_text], &[]);
        let output = command.env("PATH", path).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        (serde_json::from_slice(&std::fs::read(&changes).unwrap()).unwrap(), text(&output.stderr))
    };
    let (told, said) = packed("/usr/sbin:/usr/bin:/sbin:/bin");
    assert_eq!(told["packages"]["added"], serde_json::json!({"system.x86_64": "1-1"}), "{said}");
    assert_eq!(differences(&before, &digest(&root)), [""; 0]);
    let few = dir.path().join("few");
    std::fs::create_dir(&few).unwrap();
    let (told, said) = packed(few.to_str().unwrap());
    assert_eq!(told["added"], serde_json::json!(["/usr/lib/sysimage/rpm/rpmdb.sqlite"]));
    assert!(
        said.contains("cannot list rpm's packages in /usr/lib/sysimage/rpm of the image: cannot run rpm"),
        "{said}"
    );
}

#[test]
fn full_disk_leaves_no_archive() {
    let (dir, tree) = bootable_image();
    let disk = dir.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let script =
        "mount -t tmpfs -o size=64k tmpfs $2 && $0 package --archive $2/image.sqsh $1; code=$?; ls -A $2; exit $code";
    let output =
        Command::new("unshare").args(["-m", "sh", "-c", script, &*IMS_SSHD]).args([&tree, &disk]).output().unwrap();
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), String::new()), "{}", text(&output.stderr));
}

#[test]
fn exclude_patterns_are_relative_to_the_image_root() {
    let (dir, tree) = bootable_image();
    let archive = dir.path().join("image.sqsh");
    let [tree, archive] = [&tree, &archive].map(|path| path.to_str().unwrap());
    let packed = |patterns: &[&str]| {
        let patterns = patterns.iter().flat_map(|pattern| ["--exclude", pattern]);
        let arguments: Vec<_> = patterns.chain(["--archive", archive, tree]).collect();
        package(&arguments)
    };
    assert!(packed(&["/boot/kernel*", "./bin/sh", "etc/pass*"]).status.success());
    let list = succeed(Command::new("unsquashfs").arg("-l").arg(archive));
    assert!(list.contains("/boot/vmlinuz") && list.contains("/bin/cat"), "{list}");
    assert!(!list.contains("kernel-parameters") && !list.contains("/bin/sh\n") && !list.contains("/passwd"), "{list}");
    for pattern in ["/", "", "./", "//"] {
        let output = packed(&[pattern]);
        assert_eq!(output.status.code(), Some(2), "{pattern}: {output:?}");
        assert!(text(&output.stderr).contains("below the image root"), "{pattern}: {output:?}");
    }
}

/// The sparse lastlog is as large as one for the highest user number.
#[test]
fn sparse_lastlog_is_packed_empty_and_other_sparse_files_whole() {
    let (dir, tree) = bootable_image();
    let logs = tree.join("var/log");
    std::fs::create_dir_all(&logs).unwrap();
    for (name, size) in [("lastlog", 300 << 30), ("faillog", 4 << 30), ("disk", 64 << 20)] {
        std::fs::write(logs.join(name), "data").unwrap();
        std::fs::File::options().write(true).open(logs.join(name)).unwrap().set_len(size).unwrap();
    }
    std::fs::set_permissions(logs.join("lastlog"), std::fs::Permissions::from_mode(0o664)).unwrap();
    std::os::unix::fs::chown(logs.join("lastlog"), Some(0), Some(43)).unwrap();
    succeed(Command::new("setfattr").args(["-n", "user.only", "-v", "here"]).arg(logs.join("lastlog")));
    let archive = dir.path().join("image.sqsh");
    let [tree, archive] = [&tree, &archive].map(|path| path.to_str().unwrap());
    let began = std::time::Instant::now();
    let output = package(&["--archive", archive, tree]);
    assert!(output.status.success(), "{output:?}");
    assert!(began.elapsed() < std::time::Duration::from_mins(1), "{:?}", began.elapsed());
    assert!(text(&output.stderr).contains("/var/log/lastlog is packed empty"), "{output:?}");
    let list = succeed(Command::new("unsquashfs").args(["-lln", archive, "var/log"]));
    let line = |name: &str| list.lines().find(|line| line.ends_with(name)).unwrap().to_owned();
    assert!(line("/lastlog").starts_with("-rw-rw-r-- 0/43 ") && line("/lastlog").contains(" 0 20"), "{list}");
    assert!(line("/faillog").contains(" 0 20") && line("/disk").contains(" 67108864 20"), "{list}");
    // A pattern can still exclude it.
    assert!(package(&["--exclude", "/var/log/l*", "--archive", archive, tree]).status.success());
    assert!(!succeed(Command::new("unsquashfs").args(["-l", archive])).contains("lastlog"));
}

/// Packs `tree` without matching files; returns the output and the packed paths.
fn packed_without(tree: &Path, patterns: &[&str]) -> (String, Vec<PathBuf>) {
    let unpacked = tempfile::tempdir_in(tree.parent().unwrap()).unwrap();
    let archive = unpacked.path().join("packed.sqsh");
    let patterns = patterns.iter().flat_map(|pattern| ["--exclude", pattern]);
    let paths = ["--archive", archive.to_str().unwrap(), tree.to_str().unwrap()];
    let output = package(&patterns.chain(paths).collect::<Vec<_>>());
    assert!(output.status.success(), "{output:?}");
    let to = unpacked.path().join("tree");
    succeed(Command::new("unsquashfs").args(["-quiet", "-no-progress", "-dest"]).args([&to, &archive]));
    let mut paths: Vec<_> = walk(&to).iter().map(|path| path.strip_prefix(&to).unwrap().to_owned()).collect();
    paths.sort();
    (text(&output.stderr), paths)
}

#[test]
fn exclude_pattern_leaves_out_only_what_it_matches() {
    let dir = directory();
    let tree = image(dir.path());
    for name in [
        "usr/share/doc/x",
        "usr/share/zoneinfo/UTC",
        "usr/doc",
        "opt/share/doc",
        "root/.ssh/id",
        "root/.profile",
        "root/key",
        "usr/lib/.cached.pyc",
        "usr/lib/a.pyc",
        "srv/a.pyc/kept?",
        "srv/b",
        "srv/c/b/c/b",
        "usr/share/docs",
    ] {
        let path = tree.join(name);
        if !path.exists() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let _ = std::fs::write(&path, name);
        }
    }
    let (_, all) = packed_without(&tree, &[]);
    for (patterns, wanted) in [
        (&["... share/doc"][..], &["usr/share/doc", "usr/share/doc/x", "opt/share/doc"][..]),
        (&["root/*"], &["root/.ssh", "root/.ssh/id", "root/.profile", "root/key"]),
        (&["root/?profile", "root/.s*"], &["root/.profile", "root/.ssh", "root/.ssh/id"]),
        (&["... *.pyc"], &["usr/lib/.cached.pyc", "usr/lib/a.pyc", "srv/a.pyc", "srv/a.pyc/kept?"]),
        (&["/usr/lib/*.pyc", "usr/lib/[!x].pyc"], &["usr/lib/.cached.pyc", "usr/lib/a.pyc"]),
        (&["... doc"], &["usr/share/doc", "usr/share/doc/x", "usr/doc", "opt/share/doc"]),
        (&["usr/share/doc", "usr/share/doc/*"], &["usr/share/doc", "usr/share/doc/x"]),
    ] {
        let (said, packed) = packed_without(&tree, patterns);
        let left_out: Vec<_> = all.iter().filter(|path| !packed.contains(path)).collect();
        let mut wanted: Vec<_> = wanted.iter().map(Path::new).collect();
        wanted.sort();
        assert_eq!(left_out, wanted, "{patterns:?}");
        assert!(!said.contains("WARN"), "{patterns:?}: {said}");
    }
    let (said, packed) = packed_without(&tree, &["usr/shar", "root/key"]);
    assert!(said.contains("--exclude 'usr/shar' matches nothing") && !said.contains("'root/key' matches"), "{said}");
    assert_eq!(packed.len(), all.len() - 1);
}

#[test]
fn excluded_names_may_contain_any_bytes() {
    use std::os::unix::ffi::OsStrExt;
    let dir = directory();
    let tree = image(dir.path());
    let left_out = tree.join("srv/left out");
    std::fs::create_dir_all(&left_out).unwrap();
    let deep = "d/".repeat(20);
    let names: [&[u8]; 13] = [
        b" lead",
        b"#hash",
        b"a*b",
        b"new\nline",
        b"back\\slash",
        b"trail ",
        b"[x]",
        b"+(a)",
        b"... x",
        b"\\*",
        b"\xff\xfe",
        b"-e",
        b"tab\t",
    ];
    for (number, name) in names.iter().enumerate() {
        let name = std::ffi::OsStr::from_bytes(name);
        for place in [left_out.clone(), tree.join(&deep)] {
            std::fs::create_dir_all(&place).unwrap();
            std::fs::write(place.join(name), number.to_string()).unwrap();
        }
        std::fs::write(tree.join(name), "").unwrap();
    }
    for name in ["axb", "x", "a", "back", "lead", "srv/kept"] {
        std::fs::write(tree.join(name), "").unwrap();
    }
    std::fs::hard_link(left_out.join("#hash"), tree.join("srv/another name")).unwrap();
    let (_, all) = packed_without(&tree, &[]);
    let (_, packed) = packed_without(&tree, &["... left out/*"]);
    let gone: Vec<_> = all.iter().filter(|path| !packed.contains(path)).collect();
    assert!(gone.len() == names.len() && gone.iter().all(|path| path.starts_with("srv/left out")), "{gone:?}");
    // Each name is a line, or an argument, of its own.
    let (_, packed) = packed_without(
        &tree,
        &["[ #+.\\-]*", "a[*]b", "new*", "tab*", "back?slash", "trail ", "[[]x]", "??", "... [ab]*b"],
    );
    let gone: Vec<_> = all.iter().filter(|path| !packed.contains(path)).collect();
    let is_special = |path: &&&PathBuf| names.iter().any(|name| path.as_os_str().as_bytes() == *name);
    assert_eq!(gone.iter().filter(is_special).count(), names.len(), "{gone:?}");
    assert!(!gone.iter().any(|path| ["x", "a", "back", "lead"].iter().any(|name| path.ends_with(name))), "{gone:?}");
}

#[test]
fn useless_exclude_patterns_are_refused() {
    let dir = directory();
    let tree = image(dir.path());
    let archive = dir.path().join("image.sqsh");
    for (pattern, code, reason) in [
        ("*", 2, "matches everything"),
        ("... *", 2, "matches everything"),
        ("?*", 1, "matches everything"),
        ("... ?*", 1, "matches everything"),
        ("usr/**/doc", 2, "'... doc'"),
        ("usr/[a", 2, "expected"),
        ("usr/../etc", 2, "without '..'"),
    ] {
        let arguments = ["--exclude", pattern, "--archive", archive.to_str().unwrap(), tree.to_str().unwrap()];
        let output = package(&arguments);
        let said = text(&output.stderr);
        assert!(output.status.code() == Some(code) && said.contains(reason), "{pattern}: {said}");
        nothing_is_packed(dir.path());
    }
}

#[test]
fn unwritable_archive_or_report_is_refused_before_packing() {
    let dir = directory();
    let tree = image(dir.path());
    let parent = dir.path().join("parent");
    let [parent_text, tree_text] = [&parent, &tree].map(|p| p.to_str().unwrap());
    assert!(ims_sshd(&["prepare", parent_text, tree_text], &[]).status().unwrap().success());
    std::fs::create_dir(dir.path().join("directory")).unwrap();
    let directory = dir.path().join("directory").display().to_string();
    for (option, file, reason) in [
        ("--archive", directory.as_str(), "found a directory"),
        ("--changes", &directory, "found a directory"),
        ("--archive", "/proc/q", "'/proc/q'"),
        ("--changes", "/proc/q", "'/proc/q'"),
    ] {
        let mut package = ims_sshd(&["package", option, file, parent_text], &[]);
        let output = package.output().unwrap();
        let said = text(&output.stderr);
        assert!(output.status.code() == Some(2) && said.contains(reason), "{option} {file}: {said}");
        assert!(!said.contains("packed"), "{option} {file}: {said}");
        if option == "--changes" {
            let mut customize =
                ims_sshd(&["customize", tree_text, "--output", "out", "--work", "work", option, file], &[]);
            let output = customize.args(["--", "echo", "ran"]).current_dir(dir.path()).output().unwrap();
            let said = text(&output.stderr);
            assert!(output.status.code() == Some(2) && said.contains(reason), "{option} {file}: {said}");
            assert_eq!(text(&output.stdout), "", "{said}");
        }
    }
}

#[test]
fn huge_sparse_files_cause_a_warning_or_an_error_before_packing() {
    let (dir, tree) = bootable_image();
    let archive = dir.path().join("image.sqsh");
    let grow = |size: u64| std::fs::File::create(tree.join("disk")).unwrap().set_len(size).unwrap();
    let packed = |further: &[&str]| {
        let arguments = [further, &["--archive", archive.to_str().unwrap(), tree.to_str().unwrap()]].concat();
        package(&arguments)
    };
    grow(8 << 40);
    let began = std::time::Instant::now();
    let output = packed(&[]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains("have 8192 GiB of holes, expected at most 64: /disk"), "{output:?}");
    assert!(began.elapsed() < std::time::Duration::from_secs(20) && !archive.exists());
    assert!(packed(&["--exclude", "disk"]).status.success());
    grow(2 << 30);
    let output = packed(&["--compression", "none"]);
    assert!(output.status.success(), "{output:?}");
    assert!(archive.metadata().unwrap().len() < 100 << 20, "holes take no space");
    // mksquashfs reads them.
    let variables = [("IMAGE_PACKER", "mksquashfs".to_owned())];
    let mut command = ims_sshd(&["package", "--compression", "none", "--archive", "image.sqsh"], &variables);
    let output = command.arg(&tree).current_dir(dir.path()).output().unwrap();
    assert!(output.status.success() && text(&output.stderr).contains("take long to pack: /disk"), "{output:?}");
}

#[test]
fn group_of_a_file_with_an_access_list_gets_no_more_in_the_image_than_its_entry_allows() {
    let (dir, tree) = bootable_image();
    // The mask, which stands where the mode has the group's rights, lets user 1000 write.
    let names = ["etc/shared", "etc/a b\"c\\d", "etc/#x\ny", " first", "etc/narrow"];
    for name in names {
        std::fs::write(tree.join(name), "").unwrap();
        std::fs::set_permissions(tree.join(name), PermissionsExt::from_mode(0o640)).unwrap();
    }
    std::fs::create_dir(tree.join("srv")).unwrap();
    for (name, list) in [("etc/narrow", "u:1000:r,g::r,m::r"), ("srv", "u:1000:rwx,g::rx")] {
        succeed(Command::new("setfacl").args(["-m", list]).arg(tree.join(name)));
    }
    for name in &names[..4] {
        succeed(Command::new("setfacl").args(["-m", "u:1000:rw"]).arg(tree.join(name)));
        let mode = std::fs::metadata(tree.join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o660, "{name}");
    }
    let [archive, packed] = ["image.sqsh", "packed"].map(|name| dir.path().join(name));
    let output = package(&["--archive", archive.to_str().unwrap(), tree.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
    let told = "packed with the rights that the access list gives the group";
    let said = text(&output.stderr);
    assert!(said.contains(told) && said.contains("/etc/shared (640)") && !said.contains("narrow"), "{said}");
    succeed(Command::new("unsquashfs").args(["-quiet", "-no-progress", "-dest"]).args([&packed, &archive]));
    let mode = |name: &str| std::fs::metadata(packed.join(name)).unwrap().permissions().mode() & 0o777;
    for name in names {
        assert_eq!(mode(name), 0o640, "{name}");
    }
    assert_eq!(mode("srv"), std::fs::metadata(tree.join("srv")).unwrap().permissions().mode() & 0o707 | 0o050);
}
