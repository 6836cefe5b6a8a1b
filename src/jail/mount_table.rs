//! Table of the jail's mounts, which [`super::build`] carries out from top to bottom.

use rustix::mount::MountAttrFlags;

/// Source of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// A new file system of this type with these options.
    New(&'static str, &'static [(&'static str, &'static str)]),
    /// A new tmpfs, limited to a part of the available memory: its content counts as the container's memory, and no
    /// process can be killed to free it.
    Memory {
        /// Mode of the root directory.
        mode: &'static str,
        /// Maximum size, in tenths of the available memory.
        tenths: u64,
    },
    /// The container's tree at this path, with everything mounted below it.
    Container(&'static str),
    /// An empty directory or, for a file, /dev/null.
    Masked,
}

/// Action where the target does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    /// The image lacks the directory: it is created for the life of the jail, recorded, and removed at the end.
    MountPoint,
    /// Create it, since it is in a file system of our own.
    Made,
    /// Skip the mount, since there is nothing to restrict.
    Skipped,
}

/// One mount. Targets are relative to the jail's root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mount {
    /// Target.
    pub target: &'static str,
    /// Source.
    pub(crate) source: Source,
    /// Attributes in addition to those of the source.
    pub(crate) attributes: MountAttrFlags,
    /// Action if the target is missing.
    pub(crate) missing: Missing,
}

const NOSUID: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID;
const NODEV: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV;
const NOEXEC: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOEXEC;
const RDONLY: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_RDONLY;
const NOTHING: MountAttrFlags = MountAttrFlags::empty();

/// Attributes of everything in /proc but the processes: these files belong to the whole machine, and root in the jail
/// could change their modes for everybody.
pub(crate) const KERNEL_FILE_ATTRIBUTES: MountAttrFlags = RDONLY.union(NOSUID).union(NODEV).union(NOEXEC);

/// Attributes of the image root: device nodes in the image cannot be opened.
pub(crate) const ROOT_ATTRIBUTES: MountAttrFlags = NODEV;

const fn mount(target: &'static str, source: Source, attributes: MountAttrFlags, missing: Missing) -> Mount {
    Mount { target, source, attributes, missing }
}

/// Mounts a device node read-only: reading and writing the device still works, but nobody can change the mode of the
/// container's node.
const fn device(node: &'static str) -> Mount {
    mount(node.split_at(1).1, Source::Container(node), RDONLY.union(NOSUID).union(NOEXEC), Missing::Made)
}

const fn masked(target: &'static str) -> Mount {
    mount(target, Source::Masked, RDONLY, Missing::Skipped)
}

const RUN: Mount = mount("run", Source::Memory { mode: "0755", tenths: 1 }, NOSUID.union(NODEV), Missing::MountPoint);

const fn proc(attributes: MountAttrFlags) -> Mount {
    let attributes = attributes.union(NOSUID).union(NODEV).union(NOEXEC);
    mount("proc", Source::New("proc", &[]), attributes, Missing::MountPoint)
}

/// Mounts of an ordinary job's jail.
///
/// /dev is a nodev tmpfs, so nodes that a session makes cannot be opened. The six devices in it are mounts of the
/// container's nodes, since a user namespace cannot create nodes. /proc and /sys are masked as in OCI runtimes
/// (runtime-spec, "Linux masked and read-only paths").
///
/// /proc is read-only as a whole. Its files outside the processes' directories are the machine's, and a write to the
/// init's `oom_score_adj` could have the init killed first. /proc/PID/net shows the container's network: root writes to
/// some of its files without a capability (`recent_mt_proc_write` of net/netfilter/xt_recent.c), and changes modes and
/// owners of all of them, for everybody in that network (`proc_notify_change` of fs/proc/generic.c). Each new process
/// has such a directory, so no mount can cover them all.
pub(crate) const JAILED: &[Mount] = &[
    mount(
        "dev",
        Source::New("tmpfs", &[("mode", "0755"), ("size", "64m")]),
        NOSUID.union(NODEV).union(NOEXEC),
        Missing::MountPoint,
    ),
    device("/dev/null"),
    device("/dev/zero"),
    device("/dev/full"),
    device("/dev/random"),
    device("/dev/urandom"),
    device("/dev/tty"),
    // Mount the container's instance, not a new one, so that `tty` finds the terminal that sshd opened.
    mount("dev/pts", Source::Container("/dev/pts"), NOSUID.union(NOEXEC), Missing::Made),
    mount("dev/shm", Source::Memory { mode: "1777", tenths: 4 }, NOSUID.union(NODEV), Missing::Made),
    mount("dev/mqueue", Source::New("mqueue", &[]), NOSUID.union(NODEV).union(NOEXEC), Missing::Made),
    proc(RDONLY),
    masked("proc/acpi"),
    masked("proc/asound"),
    masked("proc/interrupts"),
    masked("proc/kcore"),
    masked("proc/keys"),
    masked("proc/latency_stats"),
    masked("proc/sched_debug"),
    masked("proc/scsi"),
    masked("proc/timer_list"),
    masked("proc/timer_stats"),
    mount("sys", Source::Container("/sys"), RDONLY.union(NOSUID).union(NODEV).union(NOEXEC), Missing::MountPoint),
    masked("sys/firmware"),
    masked("sys/devices/virtual/powercap"),
    RUN,
];

/// Mounts of a job that builds kernel modules (`JOB_ENABLE_DKMS=True`), which sees all the container's devices.
pub(crate) const DKMS: &[Mount] = &[
    mount("dev", Source::Container("/dev"), NOTHING, Missing::MountPoint),
    proc(NOTHING),
    mount("sys", Source::Container("/sys"), NOTHING, Missing::MountPoint),
    RUN,
];

/// Mounts of a build: those of a jail, with two exceptions. /sys is empty. /dev/pts is a new instance, since root in
/// the build would own the terminals of root on the machine.
pub(crate) fn of_build(proc: Proc) -> impl Iterator<Item = Mount> {
    const TERMINALS: Source = Source::New("devpts", &[("newinstance", ""), ("ptmxmode", "0666"), ("mode", "0620")]);
    const NO_SYS: Source = Source::New("tmpfs", &[("size", "4k"), ("mode", "0555")]);
    mount_table(false, proc).map(|mount| match mount.target {
        "dev/pts" => Mount { source: TERMINALS, ..mount },
        // Not read-only, because Debian's base-files sets the mode of /sys.
        "sys" => Mount { source: NO_SYS, attributes: mount.attributes.difference(RDONLY), ..mount },
        _ => mount,
    })
}

/// Source of the jail's /proc.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Proc {
    /// A procfs of the jail's own, which shows only the jail's processes.
    #[default]
    New,
    /// The container's procfs, with its masks; it shows the processes outside. Used for a user namespace, where the
    /// kernel refuses a new procfs that would reveal what is masked (`mount_too_revealing`).
    Container,
}

/// Mounts of a job.
pub fn mount_table(dkms: bool, proc: Proc) -> impl Iterator<Item = Mount> {
    let table = if dkms { DKMS } else { JAILED };
    table.iter().map(move |mount| match (mount.source, proc) {
        (Source::New("proc", _), Proc::Container) => Mount { source: Source::Container("/proc"), ..*mount },
        _ => *mount,
    })
}

/// Links in the jail's own /dev, as (name, target).
pub(crate) const DEV_LINKS: &[(&str, &str)] = &[
    // A link and not a node, because openpty otherwise does not find its terminal below /dev/pts.
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// Directory for the jail's copies of the container's programs, relative to the root. It is below the jail's own /run,
/// so that the image needs no directory for it.
pub(crate) const PROGRAMS: &str = "run/.ims-sshd";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_created_in_the_image_are_top_level_directories() {
        for m in JAILED.iter().chain(DKMS) {
            if m.missing == Missing::MountPoint {
                assert!(!m.target.contains('/'), "{} would be made inside the image", m.target);
            }
        }
    }

    #[test]
    fn mounts_come_after_the_mount_that_contains_them() {
        for table in [JAILED, DKMS] {
            for (at, m) in table.iter().enumerate() {
                if let Some((top, _)) = m.target.split_once('/') {
                    assert!(table[..at].iter().any(|earlier| earlier.target == top), "{}", m.target);
                }
            }
        }
    }

    #[test]
    fn device_nodes_cannot_be_opened_on_writable_mounts() {
        assert!(ROOT_ATTRIBUTES.contains(NODEV));
        for m in JAILED {
            let is_writable = matches!(m.source, Source::New("tmpfs", _) | Source::Memory { .. });
            assert!(!is_writable || m.attributes.contains(NODEV), "{}", m.target);
        }
    }
}
