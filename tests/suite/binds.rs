//! Bind mounts: a job's directories and files of the container appear in the jail, and leave no trace in the image
//! root.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use testbed::*;

/// Paths of the administrator beside the image: a package repository with a mount below it, a licence file, and a
/// writable directory.
struct Sources {
    dir: PathBuf,
    _disk: Mounted,
    _parent: TempDir,
}

impl Sources {
    fn new() -> Self {
        let parent = directory();
        let dir = parent.path().join("sources");
        for directory in ["repo/disk", "work", "with space"] {
            std::fs::create_dir_all(dir.join(directory)).unwrap();
        }
        let disk = dir.join("repo/disk");
        mount(&["-t", "tmpfs", "tmpfs"], &disk);
        std::fs::write(dir.join("repo/package"), "package").unwrap();
        std::fs::write(dir.join("repo/disk/inner"), "inner").unwrap();
        std::fs::write(dir.join("licence"), "licensed").unwrap();
        succeed(Command::new("mknod").arg(dir.join("work/null")).args(["c", "1", "3"]));
        std::fs::copy(cache().join("busybox/bin/busybox"), dir.join("work/setuid")).unwrap();
        std::os::unix::fs::chown(dir.join("work/setuid"), Some(0), Some(0)).unwrap();
        std::fs::set_permissions(dir.join("work/setuid"), std::fs::Permissions::from_mode(0o4755)).unwrap();
        Self { dir, _disk: Mounted(disk), _parent: parent }
    }

    fn binds(&self) -> String {
        let dir = self.dir.display();
        format!("{dir}/repo:/opt/vendor/repo:ro\n{dir}/licence:/etc/licence:ro {dir}/work:/srv '{dir}/with space'")
    }
}

fn start(volume: Volume, further: &[(&str, &str)], binds: &str) -> Environment {
    volume.start_with(Mode::Jailed, &[further, &[("IMS_JAIL_BINDS", binds)]].concat())
}

#[test]
fn bind_mounts_appear_in_the_jail_and_leave_no_trace_in_the_image() {
    let dkms = [("JOB_ENABLE_DKMS", "True")];
    for further in [&[("IMS_JAIL_TIER", "namespace")][..], &[("IMS_JAIL_TIER", "user")], &dkms] {
        let volume = Volume::new(Image::Busybox);
        std::fs::create_dir(volume.image_root.join("srv")).unwrap();
        std::fs::write(volume.image_root.join("etc/licence"), "the image's own").unwrap();
        let sources = Sources::new();
        let before = digest(&volume.image_root);
        let sources_before = digest(&sources.dir);
        let mut environment = start(volume, further, &sources.binds()).ready();
        let says = |command: &str| environment.says(command);
        let refused = |command: &str| {
            let output = environment.run(command);
            assert!(!output.status.success(), "{further:?}: {command}: {output:?}");
            text(&output.stderr)
        };
        assert_eq!(
            says("cat /opt/vendor/repo/package /opt/vendor/repo/disk/inner /etc/licence"),
            "packageinnerlicensed"
        );
        assert!(says("ls -d '/root'/../*").contains("/root/../srv"));
        assert!(says(&format!("test -d '{}/with space' && echo there", sources.dir.display())).contains("there"));
        for write in [
            "touch /opt/vendor/repo/new",
            "touch /opt/vendor/repo/disk/new",
            "echo more >> /etc/licence",
            "chmod 777 /etc/licence",
        ] {
            assert!(refused(write).contains("Read-only file system"), "{further:?}: {write}");
        }
        // No path leads out: the parent of a bind mount is the image.
        assert_eq!(says("cd /opt/vendor/repo/disk && cd ../../.. && pwd && ls"), "/opt\nvendor");
        assert_eq!(says("ls /srv/.. | grep -c sources; true"), "0");
        assert!(!refused("echo x > /srv/null").is_empty(), "a device node in the source opens nothing");
        assert_eq!(says("grep ' /srv ' /proc/mounts | grep nosuid | grep -c nodev"), "1", "{further:?}");
        if further != dkms {
            for remount in ["mount -o remount,rw /opt/vendor/repo", "mount -o remount,bind,rw /opt/vendor/repo"] {
                refused(remount);
            }
            assert!(refused("touch /opt/vendor/repo/new").contains("Read-only file system"), "{further:?}");
        }
        assert_eq!(digest(&sources.dir), sources_before, "{further:?}");
        says("echo written > /srv/new; rm /srv/setuid");
        assert_eq!(std::fs::read_to_string(sources.dir.join("work/new")).unwrap(), "written\n");
        assert!(!sources.dir.join("work/setuid").exists());
        assert_eq!(environment.complete(), 0);
        let changed = differences(&before, &digest(&environment.image_root));
        assert!(changed.is_empty(), "{further:?}: {changed:#?}");
    }
}

#[test]
fn bind_mount_points_are_removed_after_a_kill_and_after_a_new_jail() {
    let volume = Volume::new(Image::Busybox);
    let sources = Sources::new();
    let before = digest(&volume.image_root);
    let mut environment = start(volume, &[], &sources.binds()).ready();
    nix::sys::signal::kill(environment.jails_init(), nix::sys::signal::Signal::SIGKILL).unwrap();
    wait_until("the jail to be made again", || environment.log_text().matches("the jail is made").count() == 2);
    wait_until("a session in it", || environment.run("cat /etc/licence").stdout == b"licensed");
    environment.entrypoint.kill().unwrap();
    environment.end();
    assert!(
        environment.image_root.join("opt/vendor/repo").exists() && environment.image_root.join("etc/licence").exists()
    );
    environment.entrypoint = environment.volume.entrypoint(Mode::Jailed, &[]).spawn().unwrap();
    environment.status = None;
    wait_until("the second environment to be open", || {
        environment.log_text().matches("the environment is open").count() == 2
    });
    assert!(!environment.run("ls /opt").status.success());
    assert_eq!(environment.complete(), 0);
    let changed = differences(&before, &digest(&environment.image_root));
    assert!(changed.is_empty(), "{changed:#?}");
}

#[test]
fn bind_mount_points_are_removed_although_a_session_moved_their_directory() {
    for tier in NAMESPACE_TIERS {
        let volume = Volume::new(Image::Busybox);
        let sources = Sources::new();
        let image_root = volume.image_root.clone();
        std::fs::create_dir_all(image_root.join("opt/own")).unwrap();
        std::fs::write(image_root.join("opt/own/file"), "").unwrap();
        let dir = sources.dir.display();
        let binds = format!("{dir}/repo:/opt/own/a/repo {dir}/licence:/opt/own/licence {dir}/work:/opt/own/work");
        let mut environment = start(volume, &[("IMS_JAIL_TIER", tier)], &binds).ready();
        environment.says("mv /opt/own /opt/moved; mv /opt/moved/a /srv-a; mkdir -p /opt/own/a/repo");
        assert_eq!(environment.complete(), 0, "{tier}: {}", environment.log_text());
        let left = |path: &str| -> Vec<_> {
            let entries = std::fs::read_dir(image_root.join(path)).unwrap();
            entries.map(|entry| entry.unwrap().file_name()).collect()
        };
        assert_eq!(left("opt/moved"), ["file"], "{tier}");
        assert!(!image_root.join("srv-a").exists(), "{tier}");
    }
}

#[test]
fn invalid_binds_are_refused_before_sshd_listens() {
    type Shape = fn(&Path);
    let nothing: Shape = |_| {};
    // Fields: binds with sources below the administrator's, changes of the image, tier, message.
    let cases: [(&str, Shape, &str, &str); 17] = [
        ("missing:/opt", nothing, "", "missing': No such file"),
        ("repo:/", nothing, "", "that is the image root itself"),
        ("repo:/proc/x", nothing, "", "/proc is the jail's own"),
        ("repo:/sys", nothing, "", "/sys is the jail's own"),
        ("repo:/dev/shm", nothing, "", "/dev is the jail's own"),
        ("repo:/run/repo", nothing, "", "/run is the jail's own"),
        ("repo:/opt/../proc", nothing, "", "without '..'"),
        ("repo:opt", nothing, "", "expected an absolute path"),
        ("repo:/opt:rx", nothing, "", "expected SOURCE[:TARGET[:ro]]"),
        ("/:/opt", nothing, "", "it overlaps /proc"),
        ("/run/ims-sshd:/opt", nothing, "", "it overlaps /run/ims-sshd"),
        ("repo:/opt work:/opt", nothing, "", "no target may equal another one or lie in it"),
        ("repo:/opt work:/opt/work", nothing, "", "no target may equal another one or lie in it"),
        ("repo:/out/x", |root| symlink("/etc", root.join("out")).unwrap(), "", "leads out of the image root"),
        ("repo:/up/x", |root| symlink("../../..", root.join("up")).unwrap(), "", "leads out of the image root"),
        ("licence:/root", nothing, "", "the source is a regular file, and the target is a "),
        ("repo:/opt", nothing, "chroot", "in the tier 'chroot' nothing can be mounted"),
    ];
    for (binds, shape, tier, why) in cases {
        let volume = Volume::new(Image::Busybox);
        let sources = Sources::new();
        std::fs::create_dir_all("/run/ims-sshd").unwrap();
        shape(&volume.image_root);
        let before = digest(&volume.image_root);
        let binds = binds.split(' ').map(|bind| match bind.starts_with('/') {
            true => bind.to_owned(),
            false => format!("{}/{bind}", sources.dir.display()),
        });
        let binds = binds.collect::<Vec<_>>().join("\n");
        let mut environment = start(volume, &[("IMS_JAIL_TIER", tier)], &binds);
        environment.touch("ready");
        assert_ne!(environment.end(), 0, "{binds}");
        let log = environment.log_text();
        assert!(log.contains(why) && !log.contains("sshd is listening"), "{binds}: {log}");
        let mut changed = differences(&before, &digest(&environment.image_root));
        // A failed job is marked there.
        changed.retain(|line| !line.starts_with("/tmp"));
        assert!(changed.is_empty(), "{binds}: {changed:#?}");
    }
}

#[test]
fn plain_mode_warns_about_binds() {
    let volume = Volume::new(Image::Busybox);
    let sources = Sources::new();
    let binds = sources.binds();
    let mut environment = volume.start_with(Mode::Plain, &[("IMS_JAIL_BINDS", &binds)]).ready();
    assert!(environment.log_text().contains("IMS_JAIL_BINDS has no effect in plain mode"));
    assert_eq!(environment.complete(), 0);
    let output = Command::new(&IMS_SSHD).args(["customize", "--plain", "--bind", "/srv", "/nowhere"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("cannot be used with"), "{output:?}");
}

#[test]
fn bind_source_in_the_image_root_is_refused_by_any_path() {
    let volume = Volume::new(Image::Busybox);
    let other = volume.dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    mount(&["--bind", volume.image_root.to_str().unwrap()], &other);
    for source in [volume.image_root.join("etc"), other.join("etc"), other.clone()] {
        let bind = format!("{}:/mnt", source.display());
        let mut enter = Command::new(&IMS_SSHD);
        let output =
            enter.args(["enter", "--bind", &bind]).arg(&volume.image_root).args(["--", "true"]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{bind}: {output:?}");
        assert!(text(&output.stderr).contains("the source lies in the image root"), "{bind}: {output:?}");
    }
    succeed(Command::new("umount").arg(&other));
}

#[test]
fn enter_and_customize_show_binds_but_do_not_pack_them() {
    let volume = Volume::new(Image::Busybox);
    let sources = Sources::new();
    symlink(&sources.dir, volume.dir.path().join("sources")).unwrap();
    let squashfs = volume.dir.path().join("image.sqsh");
    succeed(Command::new("mksquashfs").arg(&volume.image_root).arg(&squashfs).args(["-quiet", "-no-progress"]));
    let script = volume.dir.path().join("script");
    // The image root as seen outside while the jail is open.
    std::fs::write(
        &script,
        "cd $IMAGE_ROOT_PARENT; test -z \"$(ls -A image-root/opt/repo)\" && chroot image-root touch /etc/new && touch complete\n",
    )
    .unwrap();
    let ends: [&[&str]; 2] =
        [&["--host-script", "script"], &["--yes", "--", "sh", "-c", "cat /opt/repo/package; touch /etc/new"]];
    for (command, end) in ["customize", "enter"].into_iter().zip(ends) {
        let mut program = Command::new(&IMS_SSHD);
        program.args([command, "image.sqsh", "--bind", "sources/repo:/opt/repo:ro", "--output", command]);
        program.args(["--work", "work"]).args(end).current_dir(volume.dir.path());
        let said = succeed(&mut program);
        assert!(command == "customize" || said.starts_with("package"), "{said}");
        let published =
            walk(&volume.dir.path().join(command)).into_iter().find(|path| path.ends_with("rootfs")).unwrap();
        let files = succeed(Command::new("unsquashfs").arg("-l").arg(published));
        assert!(files.contains("etc/new") && !files.contains("/opt"), "{command}: {files}");
    }
    assert_eq!(std::fs::metadata(sources.dir.join("repo/package")).unwrap().nlink(), 1);
}
