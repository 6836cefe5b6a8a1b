//! What is mounted in the jail, as a table. [`super::build`] carries it out from top to bottom.

use rustix::mount::MountAttrFlags;

/// Where a mount comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// A new file system of this type with these options.
    New(&'static str, &'static [(&'static str, &'static str)]),
    /// What the container has at this path, with all that is mounted below it.
    Container(&'static str),
    /// Nothing to see: an empty folder or, on a file, /dev/null.
    Masked,
}

/// What is done where the target does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    /// The image lacks the folder: made for the life of the jail, recorded, and removed at the end.
    MountPoint,
    /// It stands in a file system of our own: made there.
    Made,
    /// There is then nothing to restrict.
    Skipped,
}

/// One mount. Targets are relative to the jail's root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mount {
    /// Where.
    pub target: &'static str,
    /// What.
    pub(crate) source: Source,
    /// Restrictions, beyond those the source has.
    pub(crate) attributes: MountAttrFlags,
    /// What if the target is missing.
    pub(crate) missing: Missing,
}

const NOSUID: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID;
const NODEV: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV;
const NOEXEC: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOEXEC;
const RDONLY: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_RDONLY;
const NOTHING: MountAttrFlags = MountAttrFlags::empty();

/// Restrictions of what stands in /proc beside the processes: one file for all the machine, whose mode root could change for everybody.
pub(crate) const KERNEL_FILE_ATTRIBUTES: MountAttrFlags = RDONLY.union(NOSUID).union(NODEV).union(NOEXEC);

/// Restrictions of the image root itself: a device node that stands in the image opens nothing.
pub(crate) const ROOT_ATTRIBUTES: MountAttrFlags = NODEV;

const fn mount(target: &'static str, source: Source, attributes: MountAttrFlags, missing: Missing) -> Mount {
    Mount { target, source, attributes, missing }
}

/// Read-only, which keeps nobody from reading and writing the device, but does from changing the mode of the container's node.
const fn device(node: &'static str) -> Mount {
    mount(node.split_at(1).1, Source::Container(node), RDONLY.union(NOSUID).union(NOEXEC), Missing::Made)
}

const fn masked(target: &'static str) -> Mount {
    mount(target, Source::Masked, RDONLY, Missing::Skipped)
}

const RUN: Mount = mount("run", Source::New("tmpfs", &[("mode", "0755")]), NOSUID.union(NODEV), Missing::MountPoint);

const PROC: Mount = mount("proc", Source::New("proc", &[]), NOSUID.union(NODEV).union(NOEXEC), Missing::MountPoint);

/// The jail of an ordinary job.
///
/// /dev is a tmpfs in which nothing that a session makes is a device (nodev); the six nodes below it are mounts of their own, of the
/// container's nodes, since a user namespace can make none.
/// /proc and /sys are masked as OCI runtimes do (runtime-spec, "Linux masked and read-only paths"); of /proc, all that is no process is
/// read-only ([`KERNEL_FILE_ATTRIBUTES`]).
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
    // The container's instance, not a new one: `tty` then finds the terminal that sshd opened.
    mount("dev/pts", Source::Container("/dev/pts"), NOSUID.union(NOEXEC), Missing::Made),
    mount("dev/shm", Source::New("tmpfs", &[("mode", "1777")]), NOSUID.union(NODEV), Missing::Made),
    mount("dev/mqueue", Source::New("mqueue", &[]), NOSUID.union(NODEV).union(NOEXEC), Missing::Made),
    PROC,
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

/// The jail of a job that builds kernel modules (`JOB_ENABLE_DKMS=True`): everything that the container has.
pub(crate) const DKMS: &[Mount] = &[
    mount("dev", Source::Container("/dev"), NOTHING, Missing::MountPoint),
    PROC,
    mount("sys", Source::Container("/sys"), NOTHING, Missing::MountPoint),
    RUN,
];

/// Where the jail's /proc comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Proc {
    /// A procfs of the jail's own, which shows the jail's processes only.
    #[default]
    New,
    /// The container's, with what is masked there, and read-only: it shows the processes outside, whose files (`oom_score_adj`,
    /// `coredump_filter`, `autogroup`, …) any root may write to. For a user namespace: the kernel gives it no new one where that would
    /// uncover what is masked (`mount_too_revealing`).
    Container,
}

/// The table for a job.
pub fn mount_table(dkms: bool, proc: Proc) -> impl Iterator<Item = Mount> {
    let (table, restricted) = if dkms { (DKMS, NOTHING) } else { (JAILED, RDONLY) };
    table.iter().map(move |mount| match (mount.source, proc) {
        (Source::New("proc", _), Proc::Container) => {
            Mount { source: Source::Container("/proc"), attributes: mount.attributes.union(restricted), ..*mount }
        }
        _ => *mount,
    })
}

/// Links in the jail's own /dev, as (name, target).
pub(crate) const DEV_LINKS: &[(&str, &str)] = &[
    // A link and not a node: only so does openpty find the terminal it made below /dev/pts.
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// Directory of the jail's copies of the container's programs, relative to the root: below the jail's own /run, so that
/// the image needs no directory for them.
pub(crate) const PROGRAMS: &str = "run/.ims-sshd";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_image_lacks_is_only_ever_a_top_folder() {
        for m in JAILED.iter().chain(DKMS) {
            if m.missing == Missing::MountPoint {
                assert!(!m.target.contains('/'), "{} would be made inside the image", m.target);
            }
        }
    }

    #[test]
    fn a_mount_stands_after_the_one_it_lies_in() {
        for table in [JAILED, DKMS] {
            for (at, m) in table.iter().enumerate() {
                if let Some((top, _)) = m.target.split_once('/') {
                    assert!(table[..at].iter().any(|earlier| earlier.target == top), "{}", m.target);
                }
            }
        }
    }

    #[test]
    fn nothing_a_session_can_write_to_opens_a_device() {
        assert!(ROOT_ATTRIBUTES.contains(NODEV));
        for m in JAILED {
            let writable_folder = matches!(m.source, Source::New("tmpfs", _));
            assert!(!writable_folder || m.attributes.contains(NODEV), "{}", m.target);
        }
    }
}
