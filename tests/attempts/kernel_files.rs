//! Kernel settings, which apply to the whole machine. Opening one for writing is the evidence; nothing is written.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;

use crate::outcome::{Held, Outcome, Step, any};

/// Opens `path` for writing.
pub fn writable(path: &Path) -> Outcome {
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::NOCTTY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).step(format!("open {} for writing", path.display()))?;
    Ok(format!("can write to {}", path.display()))
}

/// `echo b` to it restarts the machine.
pub fn sysrq_trigger() -> Outcome {
    writable(Path::new("/proc/sysrq-trigger"))
}

/// The program that the kernel starts, outside, on a core dump.
pub fn core_pattern() -> Outcome {
    writable(Path::new("/proc/sys/kernel/core_pattern"))
}

/// The program that the kernel starts, outside, to load a module.
pub fn modprobe() -> Outcome {
    writable(Path::new("/proc/sys/kernel/modprobe"))
}

/// The program that the kernel starts, outside, to power off.
pub fn poweroff_command() -> Outcome {
    writable(Path::new("/proc/sys/kernel/poweroff_cmd"))
}

/// The program that the kernel starts, outside, for every new device.
pub fn uevent_helper() -> Outcome {
    writable(Path::new("/sys/kernel/uevent_helper"))
}

/// A mount point in the root; removed on drop if the mount was refused.
pub struct Place(pub PathBuf);

impl Place {
    /// Creates it.
    pub fn new() -> Self {
        let path = PathBuf::from(format!("/tmp/mount-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory can be made");
        Self(path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// Mounts a new file system of `kind` and looks for a writable one of `files` in it.
pub fn mount_and_write(kind: &str, files: &[&str]) -> Outcome {
    let place = Place::new();
    rustix::mount::mount(kind, &place.0, kind, MountFlags::empty(), None).step(format!("mount a new {kind}"))?;
    any(files, |file| writable(&place.0.join(file)))
}

/// Interpreters that the kernel starts for files of a type.
pub fn binfmt_register() -> Outcome {
    writable(Path::new("/proc/sys/fs/binfmt_misc/register")).or_else(|_| mount_and_write("binfmt_misc", &["register"]))
}

fn hierarchies() -> Vec<PathBuf> {
    let entries = std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).chain([PathBuf::from("/sys/fs/cgroup")]).collect()
}

/// The program that the kernel starts, outside, when a cgroup becomes empty.
pub fn release_agent() -> Outcome {
    any(hierarchies(), |directory| writable(&directory.join("release_agent")))
}

/// Another cgroup, with other limits.
pub fn cgroup() -> Outcome {
    any(hierarchies(), |directory| writable(&directory.join("cgroup.procs")))
}

/// A writable file below `directory`, except those that `passes` exempts.
pub fn any_below(directory: &Path, passes: &dyn Fn(&Path) -> bool) -> Outcome {
    let entries = std::fs::read_dir(directory).step(format!("list {}", directory.display()))?;
    any(entries.flatten().filter(|entry| !passes(&entry.path())), |entry| {
        let path = entry.path();
        let found = entry.metadata().step(format!("look at {}", path.display()))?;
        if found.is_dir() {
            return any_below(&path, passes);
        }
        // Root can open files without any write permission, too.
        if !found.is_file() || found.mode() & 0o222 == 0 {
            return Err(Held::by(format!("open {}", path.display()), "it is no file that can be written to"));
        }
        writable(&path)
    })
}

/// Any setting in /proc. Files in process directories concern only that process; pressure files (PSI) are opened for
/// writing to wait for an event.
pub fn any_in_proc() -> Outcome {
    any_below(Path::new("/proc"), &|path| {
        let top = path.strip_prefix("/proc").ok().and_then(|p| p.components().next()?.as_os_str().to_str());
        top.is_none_or(|top| top.parse::<i32>().is_ok() || top == "pressure")
    })
}

/// Sets the mode of a file in /proc to its current value; modes are shared by all procfs mounts of the machine.
pub fn mode_in_proc() -> Outcome {
    let files = ["version", "meminfo", "stat", "cpuinfo", "self/net/tcp", "thread-self/net/udp"];
    any(files.map(|name| Path::new("/proc").join(name)), |path| {
        let permissions = std::fs::metadata(&path).step(format!("look at {}", path.display()))?.permissions();
        std::fs::set_permissions(&path, permissions).step(format!("change the mode of {}", path.display()))?;
        Ok(format!("changed the mode of {}", path.display()))
    })
}

/// Any setting in /sys.
pub fn any_in_sys() -> Outcome {
    any_below(Path::new("/sys"), &|_| false)
}

/// The machine's memory.
pub fn kernel_memory() -> Outcome {
    let mut magic = [0; 4];
    let mut file = std::fs::File::open("/proc/kcore").step("open /proc/kcore")?;
    file.read_exact(&mut magic).step("read /proc/kcore")?;
    Ok(format!("/proc/kcore begins with {magic:x?}"))
}

/// Directory in which the jail shows files of the environment, read-only.
const SHOWN: &str = "/run/.ims-sshd";

fn shown() -> Vec<PathBuf> {
    std::fs::read_dir(SHOWN).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// The environment's programs, as shown in the jail.
pub fn shown_programs() -> Outcome {
    any(shown(), |path| writable(&path))
}

/// A lease on one of them, which blocks everybody else who opens it.
pub fn lease_on_shown_programs() -> Outcome {
    any(shown(), |path| {
        let file = std::fs::File::open(&path).step(format!("open {}", path.display()))?;
        crate::sys::lease(&file).step(format!("take a lease on {}", path.display()))?;
        Ok(format!("has a lease on {}", path.display()))
    })
}

/// Writes to one of them after remounting it writable.
pub fn shown_programs_remounted() -> Outcome {
    any(shown(), |path| {
        let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).expect("a name");
        crate::sys::make_writable(&name).step(format!("make the mount {} writable", path.display()))?;
        writable(&path)
    })
}

/// A lease on a kernel file shown in the jail, which blocks everybody else who opens it.
pub fn lease_on_kernel_files() -> Outcome {
    let files =
        ["/sys/kernel/profiling", "/sys/kernel/uevent_seqnum", "/sys/kernel/fscaps", "/sys/kernel/rcu_expedited"];
    let cgroups = hierarchies().into_iter().map(|directory| directory.join("cgroup.controllers"));
    any(files.map(PathBuf::from).into_iter().chain(cgroups), |path| {
        let file = std::fs::File::open(&path).step(format!("open {}", path.display()))?;
        crate::sys::lease(&file).step(format!("take a lease on {}", path.display()))?;
        Ok(format!("has a lease on {}", path.display()))
    })
}
