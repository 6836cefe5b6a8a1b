//! A session that did nothing leaves no trace in the image root: the tree is the same before and after, byte and inode.

use std::os::unix::fs::symlink;
use std::path::Path;

use crate::support::*;

#[test]
fn a_tree_is_the_same_before_and_after() {
    type Shape = fn(&Path);
    let shapes: [(&str, Shape); 8] = [
        ("no resolv.conf, no mount point", |_| {}),
        ("a dangling link", |root| {
            symlink("../run/systemd/resolve/stub-resolv.conf", root.join("etc/resolv.conf")).unwrap();
        }),
        ("an absolute link", |root| symlink("/run/netconfig/resolv.conf", root.join("etc/resolv.conf")).unwrap()),
        ("a link to a file of the image", |root| {
            std::fs::write(root.join("root/resolv.conf"), "nameserver 192.0.2.1\n").unwrap();
            symlink("/root/resolv.conf", root.join("etc/resolv.conf")).unwrap();
        }),
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
    for (name, shape) in shapes {
        let volume = Volume::new(Image::Busybox);
        shape(&volume.image_root);
        let before = digest(&volume.image_root);
        let mut environment = volume.start(Mode::Jailed).ready();
        let container = std::fs::read_to_string("/etc/resolv.conf").unwrap();
        assert_eq!(environment.says("cat /etc/resolv.conf"), container.trim_end(), "{name}: DNS as in the container");
        assert!(environment.sftp("ls /\n").status.success());
        assert_eq!(environment.complete(), 0);
        let changed = differences(&before, &digest(&environment.image_root));
        assert!(changed.is_empty(), "{name}: {changed:#?}");
        let beside: Vec<_> = std::fs::read_dir(&environment.parent).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(!beside.iter().any(|n| n.to_string_lossy().starts_with('.')), "{beside:?}");
    }
}

#[test]
fn a_folder_in_the_place_of_resolv_conf_stays_as_it_is() {
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
fn a_debian_image_is_not_written_to_at_all() {
    let mut environment = Environment::open(Image::Debian, Mode::Jailed);
    environment.says("true");
    let mut mounts = nothing_mounted_below(&environment);
    assert_eq!(environment.complete(), 0);
    mounts.extend(nothing_mounted_below(&environment));
    assert_eq!(mounts, [""; 0]);
    // The overlay copies up what is touched in any way: only /etc, for the moment in which it holds a mount point.
    assert_eq!(environment.changes(), [Path::new("etc")]);
}

/// Mounts below the image root that others can see; the jail's own are private to it.
fn nothing_mounted_below(environment: &Environment) -> Vec<String> {
    let below = format!("{}/", environment.image_root.display());
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    mounts.lines().filter(|l| l.contains(&below)).map(ToOwned::to_owned).collect()
}

#[test]
fn an_edited_resolv_conf_is_the_images_own_and_never_the_containers() {
    let container = std::fs::read_to_string("/etc/resolv.conf").unwrap();
    let volume = Volume::new(Image::Busybox);
    std::fs::write(volume.image_root.join("etc/resolv.conf"), "nameserver 192.0.2.1\n").unwrap();
    let mut environment = volume.start(Mode::Jailed).ready();
    environment.says("echo 'nameserver 192.0.2.7' > /etc/resolv.conf");
    assert_eq!(environment.complete(), 0);
    assert_eq!(std::fs::read_to_string("/etc/resolv.conf").unwrap(), container);
    assert_eq!(
        std::fs::read_to_string(environment.image_root.join("etc/resolv.conf")).unwrap(),
        "nameserver 192.0.2.7\n"
    );

    // With the container's text already in it, nothing is mounted on the file and it can be replaced.
    let volume = Volume::new(Image::Busybox);
    std::fs::write(volume.image_root.join("etc/resolv.conf"), &container).unwrap();
    let mut environment = volume.start(Mode::Jailed).ready();
    environment.says("echo new > /etc/new && mv /etc/new /etc/resolv.conf");
    assert_eq!(environment.complete(), 0);
    assert_eq!(std::fs::read_to_string(environment.image_root.join("etc/resolv.conf")).unwrap(), "new\n");
}
