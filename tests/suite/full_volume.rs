//! Full and read-only volumes: an image whose verdict cannot be written is never complete.

use std::io::Write;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use testbed::*;

/// Volume whose image root parent is a file system of limited size, like an emptyDir with a size limit.
fn limited(options: &str) -> Volume {
    let volume = Volume::new(Image::Busybox);
    mount(&["-t", "tmpfs", "-o", options, "tmpfs"], &volume.parent);
    std::fs::create_dir(&volume.image_root).unwrap();
    succeed(Command::new("cp").arg("-aT").arg(cache().join("busybox")).arg(&volume.image_root));
    volume
}

/// Fills the file system at `directory`: uses up its inodes, then its blocks.
fn fill(directory: &Path) {
    let mut files: Vec<std::fs::File> = Vec::new();
    while let Ok(file) = std::fs::File::create(directory.join(format!("fill.{}", files.len()))) {
        files.push(file);
    }
    if let Some(last) = files.last_mut() {
        while last.write_all(&[1; 4096]).is_ok() {}
    }
    assert!(std::fs::File::create(directory.join("one more")).is_err());
}

#[test]
fn complete_mark_that_cannot_be_created_on_a_full_volume_fails_the_environment() {
    let mut environment = limited("size=8m,nr_inodes=120").start(Mode::Jailed).ready();
    fill(&environment.image_root.join("root"));
    let mark = environment.run("touch /tmp/complete");
    assert_eq!(mark.status.code(), Some(1), "{mark:?}");
    assert!(text(&mark.stderr).contains("No space left on device"), "{mark:?}");
    environment.fails_visibly(
        1,
        &[
            "is full and no session is open: closing as failed unless space is freed",
            "is still full: closing as failed",
        ],
    );
    assert!(environment.image_root.join("tmp/failed").exists());
}

#[test]
fn environment_on_a_full_volume_stays_open_if_space_is_freed_in_time() {
    let mut environment = limited("size=8m,nr_inodes=120").start(Mode::Jailed).ready();
    fill(&environment.image_root.join("root"));
    environment.wait_for_log("is full and no session is open");
    environment.says("rm -f /root/fill*; touch /tmp/complete");
    assert_eq!(environment.end(), 0, "{}", environment.log_text());
    assert!(environment.signal("complete").exists());
}

#[test]
fn failed_and_exiting_are_created_on_a_full_volume() {
    for mode in MODES {
        let mut environment = limited("size=8m,nr_inodes=120").start(mode).ready();
        fill(&environment.image_root.join("root"));
        environment.send(Signal::SIGTERM);
        environment.fails_visibly(143, &["received SIGTERM"]);
        assert_eq!(environment.image_root.join("tmp/failed").exists(), mode == Mode::Jailed);
        let left: Vec<_> = std::fs::read_dir(&environment.parent).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(left.iter().all(|n| !n.to_string_lossy().starts_with('.')), "{left:?}");
    }
}

#[test]
fn complete_mark_from_the_jail_reaches_the_parent_on_a_full_volume() {
    let mut environment = limited("size=8m,nr_inodes=120").start(Mode::Jailed).ready();
    let root = environment.image_root.join("root");
    fill(&root);
    std::fs::remove_file(root.join("fill.0")).unwrap();
    environment.says("touch /tmp/complete");
    assert_eq!(environment.end(), 0, "{}", environment.log_text());
    assert!(environment.signal("complete").exists() && environment.signal("exiting").exists());
}

/// Volume on a loop-mounted ext4 with as few inodes as possible; unmounting it releases the loop device.
fn disk() -> Volume {
    let volume = Volume::new(Image::Busybox);
    let disk = volume.dir.path().join("disk");
    std::fs::File::create(&disk).unwrap().set_len(8 << 20).unwrap();
    succeed(Command::new("mkfs.ext4").args(["-q", "-N", "128", "-O", "^has_journal", "-m", "0"]).arg(&disk));
    mount(&["-o", "loop", &disk.display().to_string()], &volume.parent);
    std::fs::create_dir(&volume.image_root).unwrap();
    succeed(Command::new("cp").arg("-aT").arg(cache().join("busybox")).arg(&volume.image_root));
    volume
}

#[test]
fn failed_and_exiting_are_created_on_a_disk_that_is_full_before_the_environment_opens() {
    for mode in MODES {
        let volume = disk();
        volume.touch("ready");
        fill(&volume.image_root.join("root"));
        let mut environment = volume.start(mode);
        environment.fails_visibly(
            1,
            &["/.ims-sshd.reserve-1: No space left on device", "the volume has to be writable and to have space"],
        );
        assert_eq!(environment.image_root.join("tmp/failed").exists(), mode == Mode::Jailed);
    }
}

#[test]
fn volume_remounted_read_only_ends_the_environment_with_the_reason_in_the_log() {
    let mut environment = limited("size=8m").start(Mode::Jailed).ready();
    // Try until it succeeds: the kernel refuses a read-only remount while a file is open for writing.
    let remount = || Command::new("mount").args(["-o", "remount,ro"]).arg(&environment.parent).status().unwrap();
    wait_until("the volume to become read-only", || remount().success());
    assert_eq!(environment.end(), 1);
    let log = environment.log_text();
    assert!(log.contains("has become read-only") && log.contains("/failed: Read-only file system"), "{log}");
    assert!(!environment.signal("exiting").exists() && !environment.signal("complete").exists());
}

#[test]
fn full_run_directory_or_full_sshd_configuration_directory_fails_the_environment() {
    type Case<'a> = (&'a str, &'a str, &'a dyn Fn(&mut Volume));
    let run = |volume: &mut Volume| {
        std::fs::create_dir_all("/run/ims-sshd").unwrap();
        mount(&["-t", "tmpfs", "-o", "nr_inodes=2", "tmpfs"], Path::new("/run/ims-sshd"));
        let _ = volume;
    };
    let config = |volume: &mut Volume| {
        let etc = volume.dir.path().join("etc");
        std::fs::create_dir(&etc).unwrap();
        mount(&["-t", "tmpfs", "-o", "size=64k,mode=755", "tmpfs"], &etc);
        std::fs::copy(&volume.config, etc.join("sshd_config")).unwrap();
        volume.config = etc.join("sshd_config");
        fill(&etc);
    };
    let cases: [Case; 2] = [
        ("cannot create the directory", "trial: No space left on device", &run),
        ("cannot write", "sshd_config: No space left on device", &config),
    ];
    for (attempted, reason, full) in cases {
        let mut volume = Volume::new(Image::Busybox);
        full(&mut volume);
        volume.touch("ready");
        let before = std::fs::read(&volume.config).unwrap();
        let mut environment = volume.start(Mode::Jailed);
        environment.fails_visibly(1, &[attempted, reason]);
        assert_eq!(std::fs::read(&environment.config).unwrap(), before, "the configuration was changed");
        assert!(environment.image_root.join("tmp/failed").exists());
        for place in [Path::new("/run/ims-sshd"), &environment.dir.path().join("etc")] {
            unmount(place);
        }
    }
}
