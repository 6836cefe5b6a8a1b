//! A session that did nothing leaves no trace in the image root: the tree is the same before and after, byte and inode.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use crate::support::*;

/// All that one can see of a tree, but for times of access and of change of the inode, which nobody can put back.
fn digest(root: &Path) -> BTreeMap<PathBuf, String> {
    let describe = |path: &Path| {
        let m = std::fs::symlink_metadata(path).unwrap();
        let content = match m.file_type() {
            t if t.is_symlink() => std::fs::read_link(path).unwrap().display().to_string(),
            t if t.is_file() => format!("{:?}", std::fs::read(path).unwrap()),
            _ => String::new(),
        };
        let size = if m.is_dir() { 0 } else { m.size() };
        format!(
            "{} {:o} {}:{} {} {size} {}.{} {content}",
            m.ino(),
            m.mode(),
            m.uid(),
            m.gid(),
            m.nlink(),
            m.mtime(),
            m.mtime_nsec()
        )
    };
    walk(root).into_iter().map(|path| (path.strip_prefix(root).unwrap().to_owned(), describe(&path))).collect()
}

#[test]
fn a_tree_is_the_same_before_and_after() {
    type Shape = fn(&Path);
    let shapes: [(&str, Shape); 6] = [
        ("no resolv.conf, no mount point", |_| {}),
        ("a dangling link", |root| {
            symlink("../run/systemd/resolve/stub-resolv.conf", root.join("etc/resolv.conf")).unwrap();
        }),
        ("an absolute link", |root| symlink("/run/netconfig/resolv.conf", root.join("etc/resolv.conf")).unwrap()),
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
        let after = digest(&environment.image_root);
        for (path, then) in &before {
            assert_eq!(after.get(path), Some(then), "{name}: /{}", path.display());
        }
        assert_eq!(
            after.len(),
            before.len(),
            "{name}: {:?}",
            after.keys().filter(|p| !before.contains_key(*p)).collect::<Vec<_>>()
        );
        let beside: Vec<_> = std::fs::read_dir(&environment.parent).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(!beside.iter().any(|n| n.to_string_lossy().starts_with('.')), "{beside:?}");
    }
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
