//! The tiers of the jail: what a session can do in each, and what each leaves behind.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ims_sshd::sshd::daemon::Daemon;
use ims_sshd::sys::mounts::mount_points;
use testbed::*;

fn open(image: Image, tier: &str) -> Environment {
    Volume::new(image).start_with(Mode::Jailed, &[("IMS_JAIL_TIER", tier)]).ready()
}

#[test]
fn descriptor_shortage_is_an_error_and_no_reason_for_a_weaker_tier() {
    let volume = Volume::new(Image::Busybox);
    let image_root = volume.image_root.display();
    for limit in 22..28 {
        let line = format!("ulimit -n {limit}; exec {IMS_SSHD} enter {image_root} -- test -e /proc/1/comm");
        let output = Command::new("bash").args(["-c", &line]).stdin(Stdio::null()).output().unwrap();
        let said = text(&output.stderr);
        assert!(output.status.success() || said.contains("Too many open files"), "{limit}: {output:?}");
        assert!(!said.contains("tier=\"chroot\""), "{limit}: {said}");
    }
}

#[test]
fn killed_trial_is_an_error_and_no_reason_for_a_weaker_tier() {
    let volume = Volume::new(Image::Busybox);
    // A helper that is killed, as the OOM killer would do it.
    let programs = directory();
    let (program, helper) = (programs.path().join("ims-sshd"), programs.path().join("ims-jail-shell"));
    std::fs::copy(&*IMS_SSHD, &program).unwrap();
    std::fs::write(&helper, "#!/bin/sh\nkill -KILL $$\n").unwrap();
    std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut enter = Command::new(&program);
    let output = enter.arg("enter").arg(&volume.image_root).args(["--", "true"]).output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("the tier is still unknown") && !said.contains("the jail's tier is"), "{said}");
}

#[test]
fn session_in_every_tier_is_root_of_the_image_and_ends_with_the_job() {
    for tier in TIERS {
        let volume = Volume::new(Image::Debian);
        // sshd's own ChrootDirectory refuses a group-writable image root.
        std::fs::set_permissions(&volume.image_root, std::fs::Permissions::from_mode(0o775)).unwrap();
        // Use a shell at a path that does not exist in the container.
        std::fs::create_dir(volume.image_root.join("odd")).unwrap();
        std::fs::copy(volume.image_root.join("bin/bash"), volume.image_root.join("odd/shell")).unwrap();
        std::fs::write(
            volume.image_root.join("etc/passwd"),
            "root:x:0:0:root:/root:/odd/shell\n_apt:x:100:65534::/:/bin/false\n",
        )
        .unwrap();
        let mut environment = volume.start_with(Mode::Jailed, &[("IMS_JAIL_TIER", tier)]).ready();
        let log = environment.log_text();
        assert!(log.contains(&format!("the jail is made tier=\"{tier}\"")), "{log}");
        assert_eq!(environment.says("echo $0 $HOME; cat /etc/motd"), "shell /root\nimage of the tests", "{tier}");
        assert_eq!(environment.run("exit 7").status.code(), Some(7), "{tier}");
        assert_eq!(environment.says("echo x | tee /dev/null; head -c 3 /dev/zero | wc -c"), "x\n3", "{tier}");
        assert_eq!(
            environment.says("touch /root/f && chown 100:65534 /root/f && stat -c %u:%g /root/f"),
            "100:65534",
            "{tier}"
        );
        let container = std::fs::read_to_string("/etc/resolv.conf").unwrap();
        assert_eq!(environment.says("cat /etc/resolv.conf"), container.trim_end(), "{tier}");
        let kept = environment.says("nohup setsid sleep 97100 >/dev/null 2>&1 & echo $!");
        assert!(!kept.is_empty());
        std::fs::write(environment.dir.path().join("sent"), "sent").unwrap();
        let sent = environment.dir.path().join("sent");
        let output = environment.sftp(&format!("pwd\nput {} /root/sent\nls /root/sent\n", sent.display()));
        let shown = text(&output.stdout);
        assert!(output.status.success() && shown.contains("working directory: /root\n"), "{tier}: {output:?}");
        assert_eq!(environment.says("cat /root/sent"), "sent", "{tier}");
        assert_eq!(environment.run("touch /tmp/complete").status.code(), Some(0), "{tier}");
        assert_eq!(environment.end(), 0, "{tier}: {}", environment.log_text());
        assert!(processes_with("sleep 97100").is_empty(), "{tier}: a process was left");
        assert!(environment.signal("complete").exists() && !environment.image_root.join("tmp/complete").exists());
    }
}

/// The container's /proc is read-only, which programs of a session tolerate: writing through /proc/self/fd does not
/// write to /proc.
#[test]
fn packages_and_user_changes_work_with_the_containers_proc() {
    let volume = Volume::new(Image::Managed);
    let mut environment = volume.start_where_proc_is_masked(Mode::Jailed, &[("IMS_JAIL_TIER", "user")]).ready();
    assert!(environment.log_text().contains("/proc is the container's, read-only"), "{}", environment.log_text());
    for (command, said) in [
        ("sudo -n sh -c 'echo $HOME'", "/root"),
        ("su - -c 'echo $0'", "-bash"),
        ("echo y > /dev/stdout; echo z > /proc/self/fd/1", "y\nz"),
        ("bash -c 'cat <(echo a)'", "a"),
        // When memory runs out, the kernel kills sessions (oom_score_adj 500) before the supervisor.
        ("cat /proc/self/comm /proc/self/oom_score_adj", "cat\n500"),
        ("python3 -c 'import subprocess as s; print(s.check_output([\"true\"], preexec_fn=lambda: None))'", "b''"),
        ("(echo 5 > /proc/self/oom_score_adj) 2>&1 | grep -o 'Read-only file system'", "Read-only file system"),
    ] {
        assert_eq!(environment.says(command), said, "{command}");
    }
    let package = environment.image_root.join("tried");
    std::fs::create_dir_all(package.join("DEBIAN")).unwrap();
    let control =
        "Package: tried\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@example.org>\nDescription: tried\n";
    std::fs::write(package.join("DEBIAN/control"), control).unwrap();
    std::fs::write(package.join("DEBIAN/postinst"), "#!/bin/sh\nuseradd -m tried && su tried -c id > /tried.id\n")
        .unwrap();
    std::fs::set_permissions(package.join("DEBIAN/postinst"), std::fs::Permissions::from_mode(0o755)).unwrap();
    environment.says("dpkg-deb -b /tried /tried.deb >&2 && apt-get -q install -y /tried.deb >&2");
    assert!(environment.says("cat /tried.id").contains("(tried)"));
    assert_eq!(environment.complete(), 0);
}

#[test]
fn terminal_has_a_name_where_devpts_can_be_mounted_and_works_without_one() {
    for (tier, name) in [("namespace", "/dev/pts/"), ("user", "/dev/pts/"), ("chroot", "not a tty")] {
        let environment = open(Image::Debian, tier);
        let output =
            environment.ssh(&["-tt"]).arg("tty; stty size; echo typed < /dev/tty > /dev/tty").output().unwrap();
        let shown = text(&output.stdout);
        assert!(shown.starts_with(name) && shown.contains("typed"), "{tier}: {shown}");
    }
}

#[test]
fn tier_user_has_an_identity_map_no_mknod_and_read_only_device_nodes() {
    let environment = open(Image::Debian, "user");
    let own = std::fs::read_link("/proc/self/ns/user").unwrap();
    assert_ne!(environment.says("readlink /proc/self/ns/user"), own.display().to_string());
    let map = environment.says("cat /proc/self/uid_map");
    let outside = std::fs::read_to_string("/proc/self/uid_map").unwrap();
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), outside.split_whitespace().collect::<Vec<_>>());
    assert_eq!(environment.says("ps -e -o comm= | sort -u | head -1; cat /proc/1/comm"), "bash\ninit");
    let refused = environment.run("mknod /root/disk b 8 0");
    assert!(text(&refused.stderr).contains("Operation not permitted"), "{refused:?}");
    let chmod = environment.run("chmod 600 /dev/null");
    assert!(
        text(&chmod.stderr).contains("Read-only file system"),
        "the mode of the container's node was changed: {chmod:?}"
    );
    assert_eq!(std::fs::metadata("/dev/null").unwrap().permissions().mode() & 0o777, 0o666);
}

#[test]
fn dkms_package_finds_the_files_devices_and_mounts_that_a_kernel_build_needs() {
    let volume = Volume::new(Image::Debian);
    let tree = volume.image_root.join("root/module");
    std::fs::create_dir_all(tree.join("DEBIAN")).unwrap();
    std::fs::create_dir_all(tree.join("usr/src/module-1.0")).unwrap();
    std::fs::write(tree.join("DEBIAN/control"), "Package: module-dkms\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <n@example.org>\nDescription: a module\n").unwrap();
    // Reads what dkms, depmod and a module's configure script read, mounts as initrd builders do, and creates a device
    // node.
    let script = "#!/bin/sh -e\n\
        test -r /proc/version && grep -q processor /proc/cpuinfo && test -e /proc/modules && test -w /proc/sys/kernel/hostname\n\
        test -d /sys/module && test -d /sys/devices/system/cpu && test -w /sys/module\n\
        test -c /dev/null && test -c /dev/kmsg && head -c 1 /dev/urandom > /dev/null\n\
        mkdir -p /tmp/build && mount -t tmpfs tmpfs /tmp/build && cp -r /usr/src/module-1.0 /tmp/build && umount /tmp/build && rmdir /tmp/build\n\
        mknod /usr/src/module-1.0/node c 1 3\n";
    let postinst = tree.join("DEBIAN/postinst");
    std::fs::write(&postinst, script).unwrap();
    std::fs::set_permissions(&postinst, std::fs::Permissions::from_mode(0o755)).unwrap();
    let environment = volume.start_with(Mode::Jailed, &[("JOB_ENABLE_DKMS", "True")]).ready();
    let built = environment.run("cd /root && dpkg-deb --build module && dpkg -i module.deb");
    assert!(built.status.success(), "{built:?}");
    let log = environment.log_text();
    let warned = log.lines().find(|line| line.contains("with JOB_ENABLE_DKMS a session has the container's devices"));
    assert!(warned.is_some_and(|line| line.contains(" WARN the jail's tier is ")), "{log}");
    // Without DKMS the same script fails, so the test is able to fail.
    let environment = open(Image::Debian, "namespace");
    assert!(!environment.run(&format!("cat > /root/p <<'END'\n{script}END\nsh -e /root/p")).status.success());
}

fn mount_tmpfs(place: &Path) {
    succeed(Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(place));
}

fn mounted_inside(environment: &Environment) -> Vec<PathBuf> {
    let mut found = mount_points(environment.says("cat /proc/self/mountinfo").as_bytes());
    found.sort();
    found
}

#[test]
fn jail_has_the_same_mounts_whatever_is_mounted_in_the_container() {
    for tier in NAMESPACE_TIERS {
        let usual = mounted_inside(&open(Image::Busybox, tier));
        let beside = directory();
        let mounts = beside.path().join("mounts");
        std::fs::create_dir(&mounts).unwrap();
        mount_tmpfs(&mounts);
        let _mounts = Mounted(mounts.clone());
        let volume = Volume::new(Image::Busybox);
        for number in 0..1000 {
            let place = mounts.join(number.to_string());
            std::fs::create_dir_all(&place).unwrap();
            rustix::mount::mount("tmpfs", &place, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
        }
        let mut environment = volume.start_with(Mode::Jailed, &[("IMS_JAIL_TIER", tier)]).ready();
        assert_eq!(mounted_inside(&environment), usual, "{tier}");
        // A jail that is made again has the same mounts too, and none that the first one left.
        let namespace = |init| std::fs::File::open(format!("/proc/{init}/ns/mnt")).unwrap();
        // Keep the namespace open: otherwise the kernel may give its inode number to the next one.
        let first = namespace(environment.jails_init());
        nix::sys::signal::kill(environment.jails_init(), nix::sys::signal::Signal::SIGKILL).unwrap();
        wait_until("another jail", || environment.log_text().matches("the jail is made").count() == 2);
        assert_eq!(mounted_inside(&environment), usual, "{tier}, made again");
        let second = namespace(environment.jails_init());
        assert_ne!(second.metadata().unwrap().ino(), first.metadata().unwrap().ino(), "{tier}");
        assert_eq!(environment.complete(), 0);
    }
}

#[test]
fn later_mounts_are_visible_only_where_they_are_made() {
    for tier in NAMESPACE_TIERS {
        let volume = Volume::new(Image::Busybox);
        for name in ["outside", "inside"] {
            std::fs::create_dir(volume.image_root.join(name)).unwrap();
        }
        // Share mounts, as systemd does, and a container with Kubernetes' mountPropagation: Bidirectional.
        succeed(Command::new("mount").args(["--make-rshared", "/"]));
        // DKMS lets a session mount.
        let variables = [("IMS_JAIL_TIER", tier), ("JOB_ENABLE_DKMS", "True")];
        let environment = volume.start_with(Mode::Jailed, &variables).ready();
        let before = (mounted_inside(&environment), new_mounts(&[]));
        let outside = environment.image_root.join("outside");
        for place in [&outside, Path::new("/sys/kernel"), Path::new("/dev/shm")] {
            mount_tmpfs(place);
        }
        assert_eq!(mounted_inside(&environment), before.0, "{tier}");
        assert_eq!(new_mounts(&before.1).len(), 3);
        // sshd has a mount namespace of its own, but unmounts propagate to it: it does not keep a volume of the
        // container busy.
        let sshd = Daemon::recorded(&environment.state_directory().join("sshd")).unwrap().pid;
        let seen_by_sshd = || {
            let mounts = std::fs::read(format!("/proc/{sshd}/mountinfo")).unwrap();
            mount_points(&mounts).contains(&outside)
        };
        assert!(seen_by_sshd());
        succeed(Command::new("umount").arg(&outside));
        assert!(!seen_by_sshd());
        mount_tmpfs(&outside);
        environment.says("for place in /inside /sys/kernel /dev/shm; do mount -t tmpfs tmpfs $place; done");
        assert_eq!(mounted_inside(&environment).len(), before.0.len() + 3, "{tier}");
        assert_eq!(new_mounts(&before.1).len(), 3, "{tier}");
    }
}
