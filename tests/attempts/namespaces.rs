//! Other namespaces: those outside, and new ones in which the process has all capabilities.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::sched::{CloneFlags, setns, unshare};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};
use rustix::process::{Pid, PidfdFlags};

use crate::child;
use crate::kernel_files::{Place, any_below, writable};
use crate::mounts::COVERED;
use crate::outcome::{Held, Outcome, Step, any};
use crate::outside::{file, process, read_secret, told, visible_processes};
use crate::sys;

fn enter_mounts(namespace: impl AsFd) -> Outcome {
    setns(namespace, CloneFlags::CLONE_NEWNS).step("enter the mount namespace")?;
    read_secret(&file())
}

/// Mount namespaces of all visible processes.
pub fn of_visible_processes() -> Outcome {
    any(visible_processes(), |process| {
        let path = format!("/proc/{process}/ns/mnt");
        enter_mounts(File::open(&path).step(format!("open {path}"))?)
    })
}

/// Other namespaces of all visible processes.
pub fn other_kinds_of_visible_processes() -> Outcome {
    any(visible_processes(), |process| {
        any(["user", "pid", "ipc", "uts", "cgroup", "net", "time"], |kind| {
            let path = format!("/proc/{process}/ns/{kind}");
            let name = |path: &str| std::fs::read_link(path).step(format!("read {path}"));
            if name(&path)? == name(&format!("/proc/self/ns/{kind}"))? {
                return Err(Held::by(format!("find another namespace at {path}"), "it is this process's own"));
            }
            setns(File::open(&path).step(format!("open {path}"))?, CloneFlags::empty())
                .step(format!("enter {path}"))?;
            Ok(format!("entered {path}"))
        })
    })
}

/// Namespaces of the process outside, through a pidfd.
pub fn of_process() -> Outcome {
    let process = Pid::from_raw(process()?).expect("a process number");
    enter_mounts(rustix::process::pidfd_open(process, PidfdFlags::empty()).step("pidfd_open")?)
}

/// Namespaces of the process outside, through a file handle.
pub fn by_handle() -> Outcome {
    let handle: sys::Handle = told("NAMESPACE_HANDLE").parse().expect("a handle");
    let place = File::open("/proc/self/ns/mnt").step("open /proc/self/ns/mnt")?;
    enter_mounts(handle.open(place, libc::O_RDONLY).step("open_by_handle_at")?)
}

/// From one mount namespace to the next, through all in the kernel.
pub fn neighbours() -> Outcome {
    any([true, false], |after| {
        let mut here: OwnedFd = File::open("/proc/self/ns/mnt").step("open /proc/self/ns/mnt")?.into();
        loop {
            here = sys::neighbour(here.as_fd(), after).step("ask for the next mount namespace")?;
            if let Ok(secret) = enter_mounts(&here) {
                return Ok(secret);
            }
        }
    })
}

/// A new mount namespace in the same user namespace.
pub fn new_mounts() -> Outcome {
    unshare(CloneFlags::CLONE_NEWNS).step("unshare the mount namespace")?;
    Ok("has a mount namespace of its own".into())
}

/// Enters a new user namespace, with every capability in it, and other new namespaces that it owns.
fn every_capability(others: CloneFlags) -> Result<(), Held> {
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | others).step("unshare the user namespace")?;
    for (name, text) in [("setgroups", "deny"), ("uid_map", "0 0 1"), ("gid_map", "0 0 1")] {
        std::fs::write(format!("/proc/self/{name}"), text).step(format!("write /proc/self/{name}"))?;
    }
    Ok(())
}

/// A new user namespace through 32-bit system calls.
pub fn nested_by_32_bits() -> Outcome {
    sys::unshare_by_32_bits(libc::CLONE_NEWUSER | libc::CLONE_NEWNS).step("unshare the user namespace")?;
    Ok("has a user namespace of its own".into())
}

/// The user namespace that owns the UTS namespace: its owner may enter it, and gains every capability there.
pub fn owner_of_the_name() -> Outcome {
    let names = File::open("/proc/self/ns/uts").step("open /proc/self/ns/uts")?;
    let owner = sys::owner(names.as_fd()).step("ask for its user namespace")?;
    let number = |fd: &dyn AsRawFd| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok();
    if number(&owner) == std::fs::read_link("/proc/self/ns/user").ok() {
        return Err(std::io::Error::from_raw_os_error(libc::ENOENT)).step("find another user namespace");
    }
    setns(owner, CloneFlags::CLONE_NEWUSER).step("enter it")?;
    unshare(CloneFlags::CLONE_NEWNS).step("unshare the mount namespace")?;
    Ok("has every capability in a user namespace, and mounts of its own".into())
}

/// Unmounts masks in a new user namespace.
pub fn nested_uncover() -> Outcome {
    every_capability(CloneFlags::empty())?;
    let uncovered = any(COVERED, |path| {
        unmount(path, UnmountFlags::DETACH).step(format!("unmount {path}"))?;
        Ok(format!("unmounted {path}"))
    });
    let writable_again = || {
        sys::make_writable(c"/proc/sys").step("make the mount /proc/sys writable")?;
        writable(Path::new("/proc/sys/kernel/core_pattern"))
    };
    let elsewhere = || {
        let place = Place::new();
        mount_bind("/proc", &place.0).step("mount /proc elsewhere")?;
        writable(&place.0.join("sys/kernel/core_pattern"))
    };
    uncovered.or_else(|_| writable_again()).or_else(|_| elsewhere())
}

/// Mounts a new procfs in a new user namespace, with a new PID namespace.
pub fn nested_proc() -> Outcome {
    if child::is_this() {
        let place = Place::new();
        mount("proc", &place.0, "proc", MountFlags::empty(), None).step("mount a new proc")?;
        return writable(&place.0.join("sys/kernel/core_pattern"));
    }
    every_capability(CloneFlags::CLONE_NEWPID)?;
    child::goes_on()
}

/// Mounts a new sysfs in a new user namespace, with a new network namespace.
pub fn nested_sys() -> Outcome {
    every_capability(CloneFlags::CLONE_NEWNET)?;
    let place = Place::new();
    mount("sysfs", &place.0, "sysfs", MountFlags::empty(), None).step("mount a new sysfs")?;
    any_below(&place.0.join("kernel"), &|_| false)
}

/// Mounts the cgroup file system in a new user namespace, with this process's cgroup and all below it.
pub fn nested_cgroup() -> Outcome {
    every_capability(CloneFlags::CLONE_NEWCGROUP)?;
    let place = Place::new();
    mount("cgroup2", &place.0, "cgroup2", MountFlags::empty(), None).step("mount a new cgroup2")?;
    any(["cgroup.kill", "cgroup.freeze", "cgroup.procs"], |file| writable(&place.0.join(file)))
}
