//! Mounts made by the session.

use std::ffi::CStr;
use std::path::Path;

use rustix::fs::{CWD, FileType};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, OpenTreeFlags, UnmountFlags, fsconfig_create, fsmount,
    fsopen, mount, mount_bind, mount_move, open_tree, unmount,
};

use crate::kernel_files::{Place, mount_and_write, writable};
use crate::outcome::{Held, Outcome, Step, any};

/// Paths that a jail masks.
pub const COVERED: [&str; 9] = [
    "/proc/kcore",
    "/proc/keys",
    "/proc/timer_list",
    "/proc/sys",
    "/proc/sysrq-trigger",
    "/proc/irq",
    "/proc/bus",
    "/sys/firmware",
    "/sys",
];

/// A new procfs has no masked paths.
pub fn new_proc() -> Outcome {
    mount_and_write("proc", &["sys/kernel/core_pattern", "sysrq-trigger"])
}

/// A new sysfs is writable.
pub fn new_sys() -> Outcome {
    mount_and_write("sysfs", &["kernel/uevent_helper", "kernel/rcu_expedited", "kernel/profiling"])
}

/// A new cgroup file system shows all cgroups of the machine.
pub fn new_cgroup() -> Outcome {
    mount_and_write("cgroup2", &["cgroup.procs"])
}

/// A new devtmpfs has all devices of the machine.
pub fn new_dev() -> Outcome {
    let place = Place::new();
    mount("devtmpfs", &place.0, "devtmpfs", MountFlags::empty(), None).step("mount a new devtmpfs")?;
    let kmsg = place.0.join("kmsg");
    let found = std::fs::metadata(&kmsg).step(format!("find {}", kmsg.display()))?;
    Ok(format!("{} is there: {:?}", kmsg.display(), found.file_type()))
}

/// Like `new_proc`, through fsopen(2).
pub fn fsmount_proc() -> Outcome {
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC).step("fsopen proc")?;
    fsconfig_create(&context).step("fsconfig")?;
    let new = fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).step("fsmount")?;
    let file =
        rustix::fs::statat(&new, "sys/kernel/core_pattern", rustix::fs::AtFlags::empty()).step("find a setting")?;
    Ok(format!("has a procfs of its own, with a file of mode {:o}", file.st_mode))
}

/// A copied mount lacks the mounts on top of it.
pub fn copy_of_proc() -> Outcome {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let copy = open_tree(CWD, "/proc", flags).step("open_tree /proc")?;
    writable(Path::new(&format!("/proc/self/fd/{}/sys/kernel/core_pattern", std::os::fd::AsRawFd::as_raw_fd(&copy))))
}

/// A bind mount lacks the mounts on top of its source too.
pub fn bind_of_proc() -> Outcome {
    let place = Place::new();
    mount_bind("/proc", &place.0).step("mount /proc elsewhere")?;
    writable(&place.0.join("sys/kernel/core_pattern"))
}

/// Unmounts the masks.
pub fn unmount_covers() -> Outcome {
    any(COVERED, |path| {
        unmount(path, UnmountFlags::DETACH).step(format!("unmount {path}"))?;
        Ok(format!("unmounted {path}"))
    })
}

/// Moves the masks away.
pub fn move_covers() -> Outcome {
    let place = Place::new();
    let file = place.0.with_extension("file");
    std::fs::write(&file, "").expect("a file can be made");
    let outcome = any(COVERED, |path| {
        let to = if Path::new(path).is_dir() { &place.0 } else { &file };
        mount_move(path, to).step(format!("move the mount {path}"))?;
        let _ = unmount(to, UnmountFlags::DETACH);
        Ok(format!("moved the mount {path}"))
    });
    let _ = std::fs::remove_file(file);
    outcome
}

/// Remounts read-only mounts writable.
pub fn remount() -> Outcome {
    const READ_ONLY: [&CStr; 4] = [c"/proc/sys", c"/proc/sysrq-trigger", c"/sys", c"/proc/irq"];
    any(READ_ONLY, |path| {
        crate::sys::make_writable(path).step(format!("make the mount {} writable", path.to_string_lossy()))?;
        Ok(format!("made the mount {} writable", path.to_string_lossy()))
    })
}

/// Circumvents `nodev` with a new mount.
pub fn devices_in_a_new_tmpfs() -> Outcome {
    let place = Place::new();
    mount("tmpfs", &place.0, "tmpfs", MountFlags::empty(), None).step("mount a tmpfs")?;
    let node = place.0.join("kmsg");
    let (mode, device) = (rustix::fs::Mode::from_raw_mode(0o600), rustix::fs::makedev(1, 11));
    rustix::fs::mknodat(CWD, &node, FileType::CharacterDevice, mode, device).step("make a device")?;
    std::fs::File::open(&node).step("open the device")?;
    Ok("opened the kernel's log".into())
}

/// Changes the root, and then looks for the old one below it.
pub fn pivot_root() -> Outcome {
    let place = Place::new();
    mount("tmpfs", &place.0, "tmpfs", MountFlags::empty(), None).step("mount a tmpfs")?;
    let old = place.0.join("old");
    std::fs::create_dir(&old).step("make a directory")?;
    rustix::process::pivot_root(&place.0, &old).step("pivot_root")?;
    match std::fs::read_dir("/old").map(Iterator::count) {
        Ok(count) => Ok(format!("changed the root; the old one has {count} entries")),
        Err(_) => Err(Held::by("look at the old root", "it is not there")),
    }
}
