//! An environment leaves no trace of its own in the image root: contents and inodes are the same before and after.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use testbed::*;

#[test]
fn enter_beside_an_open_environment_does_not_fail_the_image() {
    let volume = Volume::new(Image::Busybox);
    std::fs::write(volume.image_root.join("etc/resolv.conf"), "nameserver 192.0.2.1\n").unwrap();
    let mut environment = volume.start(Mode::Jailed).ready();
    let container = std::fs::read_to_string("/etc/resolv.conf").unwrap();
    for _ in 0..2 {
        let mut enter = Command::new(&IMS_SSHD);
        enter.arg("enter").arg(&environment.image_root).args(["--", "cat", "/etc/resolv.conf"]);
        assert_eq!(succeed(enter.stdin(std::process::Stdio::null())), container);
        assert_eq!(
            environment.says("cat /etc/resolv.conf"),
            container.trim_end(),
            "resolv.conf of the environment's sessions stays replaced"
        );
    }
    environment.touch("complete");
    assert_eq!(environment.end(), 0, "{}", environment.log_text());
    assert!(!environment.signal("failed").exists(), "{}", environment.log_text());
    assert_eq!(
        std::fs::read_to_string(environment.image_root.join("etc/resolv.conf")).unwrap(),
        "nameserver 192.0.2.1\n"
    );
}

#[test]
fn image_root_is_the_same_before_and_after_for_every_kind_of_resolv_conf() {
    type Shape = fn(&Path);
    let shapes: [(&str, Shape); 10] = [
        ("no resolv.conf, no mount point", |_| {}),
        ("a dangling link", |root| {
            symlink("../run/systemd/resolve/stub-resolv.conf", root.join("etc/resolv.conf")).unwrap();
        }),
        ("an absolute link", |root| symlink("/run/netconfig/resolv.conf", root.join("etc/resolv.conf")).unwrap()),
        ("a link to a file of the image", |root| {
            std::fs::write(root.join("root/resolv.conf"), "nameserver 192.0.2.1\n").unwrap();
            symlink("/root/resolv.conf", root.join("etc/resolv.conf")).unwrap();
        }),
        ("a link to a file beside it", |root| {
            std::fs::write(root.join("etc/resolv.conf.real"), "nameserver 192.0.2.1\n").unwrap();
            symlink("resolv.conf.real", root.join("etc/resolv.conf")).unwrap();
        }),
        ("a link that dangles elsewhere", |root| symlink("../usr/lib/none", root.join("etc/resolv.conf")).unwrap()),
        ("a link loop", |root| symlink("resolv.conf", root.join("etc/resolv.conf")).unwrap()),
        ("a regular file", |root| std::fs::write(root.join("etc/resolv.conf"), "nameserver 192.0.2.1\n").unwrap()),
        ("the container's text", |root| {
            std::fs::copy("/etc/resolv.conf", root.join("etc/resolv.conf")).unwrap();
        }),
        ("all mount points", |root| {
            for name in ["proc", "sys", "dev", "run"] {
                std::fs::create_dir(root.join(name)).unwrap();
            }
        }),
    ];
    for ((name, shape), tier) in shapes.iter().flat_map(|shape| TIERS.map(|tier| (shape, tier))) {
        let volume = Volume::new(Image::Busybox);
        shape(&volume.image_root);
        let before = digest(&volume.image_root);
        let mut environment = volume.start_with(Mode::Jailed, &[("IMS_JAIL_TIER", tier)]).ready();
        let container = std::fs::read_to_string("/etc/resolv.conf").unwrap();
        assert_eq!(environment.says("cat /etc/resolv.conf"), container.trim_end(), "{tier}, {name}");
        // In the chroot tier the saved file lies in /etc: the image has no /proc, and nothing is mounted.
        let listed = environment.says("ls -A /etc").contains("ims-sshd");
        assert!(tier == "chroot" || !listed, "{tier}, {name}: the saved file is visible");
        assert!(environment.sftp("ls /\n").status.success());
        assert_eq!(environment.complete(), 0);
        let changed = differences(&before, &digest(&environment.image_root));
        assert!(changed.is_empty(), "{tier}, {name}: {changed:#?}");
        let beside: Vec<_> = std::fs::read_dir(&environment.parent).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(!beside.iter().any(|n| n.to_string_lossy().starts_with('.')), "{beside:?}");
    }
}

#[test]
fn directory_named_resolv_conf_stays_as_it_is() {
    let volume = Volume::new(Image::Busybox);
    std::fs::create_dir(volume.image_root.join("etc/resolv.conf")).unwrap();
    std::fs::write(volume.image_root.join("etc/resolv.conf/file"), "the image's\n").unwrap();
    let before = digest(&volume.image_root);
    let mut environment = volume.start(Mode::Jailed).ready();
    assert_eq!(environment.says("cat /etc/resolv.conf/file"), "the image's");
    assert_eq!(environment.complete(), 0);
    let changed = differences(&before, &digest(&environment.image_root));
    assert!(changed.is_empty(), "{changed:#?}");
}

#[test]
fn debian_image_is_changed_in_no_directory_but_etc_and_proc() {
    let mut environment = Environment::open(Image::Debian, Mode::Jailed);
    environment.says("true");
    let mut mounts = nothing_mounted_below(&environment);
    assert_eq!(environment.complete(), 0);
    mounts.extend(nothing_mounted_below(&environment));
    assert_eq!(mounts, [""; 0]);
    // The overlay copies up every directory that is written to: those that held the new and the saved resolv.conf.
    assert_eq!(environment.changes(), [Path::new("etc"), Path::new("proc")]);
}

/// Mounts below the image root in the test's own namespace; the jail's are not visible there.
fn nothing_mounted_below(environment: &Environment) -> Vec<String> {
    let below = format!("{}/", environment.image_root.display());
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    mounts.lines().filter(|l| l.contains(&below)).map(ToOwned::to_owned).collect()
}

#[test]
fn resolv_conf_is_restored_after_a_killed_environment_in_every_tier() {
    type Shape = fn(&Path);
    let shapes: [Shape; 3] = [
        |_| {},
        |file| std::fs::write(file, "nameserver 192.0.2.1\n").unwrap(),
        |file| symlink("/run/netconfig/resolv.conf", file).unwrap(),
    ];
    let container = std::fs::read_to_string("/etc/resolv.conf").unwrap();
    for (number, (shape, tier)) in shapes.iter().flat_map(|shape| TIERS.map(|tier| (shape, tier))).enumerate() {
        let volume = Volume::new(Image::Busybox);
        shape(&volume.image_root.join("etc/resolv.conf"));
        std::fs::create_dir(volume.image_root.join("dev")).unwrap();
        let before = digest(&volume.image_root);
        let mut environment = volume.start_with(Mode::Jailed, &[("IMS_JAIL_TIER", tier)]).ready();
        environment.entrypoint.kill().unwrap();
        environment.end();
        let Environment { volume, .. } = &environment;
        environment.entrypoint = volume.entrypoint(Mode::Jailed, &[("IMS_JAIL_TIER", tier)]).spawn().unwrap();
        environment.status = None;
        wait_until("the second environment to be open", || {
            environment.log_text().matches("the environment is open").count() == 2
        });
        assert!(environment.log_text().contains("its additions to the image"), "{}", environment.log_text());
        assert_eq!(environment.says("cat /etc/resolv.conf"), container.trim_end(), "{tier}");
        assert_eq!(environment.complete(), 0);
        let changed = differences(&before, &digest(&environment.image_root));
        assert!(changed.is_empty(), "{tier}, {number}: {changed:#?}");
    }
}

/// Operations of people, Ansible and packages on the file. They need a POSIX shell and sed.
const OPERATIONS: [&str; 10] = [
    "true",
    "echo nameserver 192.0.2.7 > /etc/resolv.conf",
    "echo new > /etc/.new && mv /etc/.new /etc/resolv.conf",
    "rm /etc/resolv.conf",
    "mv /etc/resolv.conf /etc/moved",
    "mv /etc/resolv.conf /etc/moved && echo new > /etc/resolv.conf",
    "ln -snf /run/systemd/resolve/stub-resolv.conf /etc/resolv.conf",
    "ln -sf ../run/NetworkManager/resolv.conf /etc/resolv.conf",
    "sed -i '$!d; s/.*/#/' /etc/resolv.conf",
    "chmod 600 /etc/resolv.conf",
];

#[test]
fn resolv_conf_is_renamed_removed_and_replaced_as_on_a_node() {
    const FILES: &str = "cd /etc; for f in resolv.conf moved .new; do [ ! -h $f ] || readlink $f; [ ! -f $f ] || { echo $f; stat -c %a $f; cat $f; }; done";
    let container = std::fs::read_to_string("/etc/resolv.conf").unwrap();
    for tier in TIERS {
        for operation in OPERATIONS {
            let own = |volume: &Volume| {
                std::fs::write(volume.image_root.join("etc/resolv.conf"), "#\nnameserver 192.0.2.1\n").unwrap();
            };
            // A chroot stands in for a node, where the file is the image's own.
            let node = Volume::new(Image::Debian);
            own(&node);
            let chroot =
                |line: &str| Command::new("chroot").arg(&node.image_root).args(["sh", "-c", line]).output().unwrap();
            let wanted = chroot(operation);

            let volume = Volume::new(Image::Debian);
            own(&volume);
            let mut environment = volume.start_with(Mode::Jailed, &[("IMS_JAIL_TIER", tier)]).ready();
            let got = environment.run(operation);
            assert_eq!(
                (got.status.code(), text(got.stderr)),
                (wanted.status.code(), text(wanted.stderr)),
                "{tier}: {operation}"
            );
            if operation.starts_with("ln ") && tier != "chroot" {
                assert_eq!(environment.says("cat /etc/resolv.conf"), container.trim_end(), "{tier}: {operation}");
            }
            assert_eq!(environment.complete(), 0);
            let files = |root: &Path| {
                let mut command = Command::new("chroot");
                text(command.arg(root).args(["sh", "-c", FILES]).output().unwrap().stdout)
            };
            let (wanted, got) = (files(&node.image_root), files(&environment.image_root));
            // The one difference from a node: chmod changes the new file, so its text stays as well.
            let got =
                if operation.starts_with("chmod") { got.replace(&container, "#\nnameserver 192.0.2.1\n") } else { got };
            assert_eq!(got, wanted, "{tier}: {operation}");
        }
    }
    assert_eq!(std::fs::read_to_string("/etc/resolv.conf").unwrap(), container);
}

#[test]
fn packages_that_own_or_link_resolv_conf_are_installed_and_names_are_still_resolved() {
    // The packages systemd-resolved and resolvconf create the link in this way.
    const LINKS: &str = "#!/bin/sh\nset -e\n[ ! -f /etc/resolv.conf ] || mv /etc/resolv.conf /etc/.resolv.conf.bak\n\
        ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf\n";
    let container = std::fs::read_to_string("/etc/resolv.conf").unwrap();
    for tier in NAMESPACE_TIERS {
        let volume = Volume::new(Image::Debian);
        std::fs::write(volume.image_root.join("etc/resolv.conf"), "nameserver 192.0.2.1\n").unwrap();
        for (package, file, postinst) in [("owner", "etc/resolv.conf", ""), ("resolved", "srv/resolved", LINKS)] {
            let tree = volume.image_root.join("root").join(package);
            std::fs::create_dir_all(tree.join("DEBIAN")).unwrap();
            std::fs::create_dir_all(tree.join(file).parent().unwrap()).unwrap();
            std::fs::write(tree.join(file), "nameserver 192.0.2.8\n").unwrap();
            let control = format!(
                "Package: {package}\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\nDescription: a package\n"
            );
            std::fs::write(tree.join("DEBIAN/control"), control).unwrap();
            if !postinst.is_empty() {
                std::fs::write(tree.join("DEBIAN/postinst"), postinst).unwrap();
                std::fs::set_permissions(tree.join("DEBIAN/postinst"), std::fs::Permissions::from_mode(0o755)).unwrap();
            }
        }
        let mut environment = volume.start_with(Mode::Jailed, &[("IMS_JAIL_TIER", tier)]).ready();
        environment.says("cd /root && dpkg-deb -b resolved && dpkg -i resolved.deb");
        assert_eq!(environment.says("cat /etc/resolv.conf"), container.trim_end(), "{tier}");
        environment.says("cd /root && dpkg-deb -b owner && rm /etc/resolv.conf && dpkg -i owner.deb");
        assert_eq!(environment.says("cat /etc/resolv.conf"), "nameserver 192.0.2.8", "{tier}");
        assert_eq!(environment.complete(), 0);
        let read = |name: &str| std::fs::read_to_string(environment.image_root.join("etc").join(name)).unwrap();
        assert_eq!(read("resolv.conf"), "nameserver 192.0.2.8\n");
        assert_eq!(read(".resolv.conf.bak"), "nameserver 192.0.2.1\n", "the package has moved the image's own file");
    }
}

#[test]
fn read_only_image_root_is_entered_without_replacing_resolv_conf() {
    let volume = Volume::new(Image::Busybox);
    for name in ["proc", "sys", "dev", "run"] {
        std::fs::create_dir(volume.image_root.join(name)).unwrap();
    }
    symlink("/run/resolvconf/resolv.conf", volume.image_root.join("etc/resolv.conf")).unwrap();
    let bind = |options: &str| {
        let mut mount = Command::new("mount");
        succeed(mount.args(["-o", options]).args([&volume.image_root, &volume.image_root]));
    };
    bind("bind");
    bind("remount,bind,ro");
    let enter = || {
        let mut enter = Command::new(&IMS_SSHD);
        enter.arg("enter").arg(&volume.image_root).args(["--", "cat", "/etc/resolv.conf"]).output().unwrap()
    };
    assert_eq!(text(enter().stdout), std::fs::read_to_string("/etc/resolv.conf").unwrap());
    bind("remount,bind,rw");
    std::fs::remove_file(volume.image_root.join("etc/resolv.conf")).unwrap();
    std::fs::write(volume.image_root.join("etc/resolv.conf"), "the image's\n").unwrap();
    bind("remount,bind,ro");
    let output = enter();
    assert_eq!(text(&output.stdout), "the image's\n");
    assert!(text(&output.stderr).contains("Read-only file system"), "{output:?}");
}
