//! Programs that read what anybody may have written (archives, images, databases of packages) run with the rights that their work takes:
//! one that is taken over writes nowhere but to its target, reads nothing but its source, reaches no network, and does not fill the machine.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use caps::Capability;
use nix::sched::CloneFlags;
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountAttrFlags;
use rustix::process::Resource;

use crate::error::{Attempt, Error, Result};
use crate::jail::capabilities::{self, lacks};
use crate::jail::refused_calls;
use crate::sys::landlock::{Access, Ruleset};
use crate::sys::mounts::{self, Detached};
use crate::sys::process;
use crate::sys::seccomp;
use crate::sys::signals::hold_none;
use crate::sys::tree::Tree;

/// Capabilities of a program that writes a tree, each with its reason.
const WRITER: &[(Capability, &str)] = &[
    (Capability::CAP_CHOWN, "files have their owners"),
    (Capability::CAP_DAC_OVERRIDE, "directories that nobody may write to are filled"),
    (Capability::CAP_FOWNER, "files of others have their modes and times"),
    (Capability::CAP_FSETID, "setuid and setgid bits are kept"),
    (Capability::CAP_MKNOD, "device nodes are made, which open nothing here"),
    (Capability::CAP_SETFCAP, "files have their capabilities"),
    (Capability::CAP_SYS_ADMIN, "trusted.* and security.* attributes are written; the calls below are refused"),
];

/// Capabilities of these that may be missing: without them a device node cannot be made, and that is an error of its own.
const NOT_NEEDED: [Capability; 2] = [Capability::CAP_MKNOD, Capability::CAP_SYS_ADMIN];

/// Refuses to unpack as root without the capabilities that it takes: programs leave owners and modes out without a word.
pub fn refuse_to_lose_attributes() -> Result<()> {
    let is_lacking = |(needed, _): &&(Capability, &str)| !NOT_NEEDED.contains(needed) && lacks(*needed);
    let lacking = WRITER.iter().find(is_lacking).filter(|_| rustix::process::geteuid().is_root());
    let Some((needed, reason)) = lacking else { return Ok(()) };
    let refused = Error::new("unpack an image").because(format!("{needed} is missing, with which {reason}"));
    Err(refused.advise("give it to the container, with those in docs/CAPABILITIES.md"))
}

/// Capabilities of a program that reads a tree.
const READER: &[(Capability, &str)] = &[
    (Capability::CAP_DAC_OVERRIDE, "files that nobody may read are packed"),
    (Capability::CAP_DAC_READ_SEARCH, "the same"),
    (Capability::CAP_SYS_ADMIN, "trusted.* attributes are hidden from others; the calls below are refused"),
];

/// Calls that lead out: to a network, to other processes, to mounts, to the kernel.
const REFUSED: &[libc::c_long] = &[
    libc::SYS_socket,
    libc::SYS_io_uring_setup,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_open_by_handle_at,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_chroot,
    libc::SYS_pivot_root,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_mount_setattr,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_fanotify_init,
    libc::SYS_add_key,
    libc::SYS_keyctl,
    libc::SYS_request_key,
    libc::SYS_syslog,
    libc::SYS_acct,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
];

/// Files that every program reads: itself, its libraries and their settings. `$PATH` adds more.
const SYSTEM: &[&str] = &[
    "/bin",
    "/etc/alternatives",
    "/etc/group",
    "/etc/ld.so.cache",
    "/etc/ld.so.preload",
    "/etc/localtime",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/rpm",
    "/gnu/store",
    "/lib",
    "/lib32",
    "/lib64",
    "/nix/store",
    "/opt",
    "/sbin",
    "/sys/devices/system/cpu",
    "/usr",
];

/// No file of an image is larger, holes counted: a lastlog with the highest user number has 1.2 TB.
const LARGEST_FILE: u64 = 2 << 40;

/// Path by which a confined program opens its standard input.
pub const STDIN: &str = "/proc/self/fd/0";

/// Additional memory for each processor's threads: stacks and heaps of their own.
const MEMORY_OF_A_PROCESSOR: u64 = 64 << 20;

/// Limits of a confined program.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Limit of its memory, in bytes.
    pub memory: u64,
    /// Limit of each file that it writes, in bytes.
    pub file: u64,
    /// Time until it is ended.
    pub time: Duration,
    /// Volume that it may not fill: it is ended when little space is left.
    pub volume: Option<PathBuf>,
}

/// One program's place and rights.
pub struct Confined<'a> {
    /// Its working directory.
    directory: &'a Tree,
    /// Its access to that directory.
    access: Access,
    /// Its standard input, a file or a directory, and its access to that: [`STDIN`] leads to it, whatever has its name.
    stdin: Option<(OwnedFd, Access)>,
    capabilities: &'static [(Capability, &'static str)],
    /// How far it goes.
    pub limits: Limits,
}

impl<'a> Confined<'a> {
    /// It writes a tree into `target`, out of `source`, a file or a directory of `size` bytes, its standard input.
    pub fn unpacking(target: &'a Tree, source: BorrowedFd<'_>, size: u64) -> Result<Self> {
        let limits = Limits {
            memory: memory(),
            file: LARGEST_FILE,
            time: Duration::from_hours(1) + Duration::from_secs(size >> 20),
            volume: Some(target.path()),
        };
        let stdin = Some((source.try_clone_to_owned().attempt(|| "hand the archive on")?, Access::Read));
        Ok(Self { directory: target, access: Access::Write, stdin, capabilities: WRITER, limits })
    }

    /// It reads the tree `image_root` and writes `output`, its standard input, which lies in `volume`.
    pub fn packing(image_root: &'a Tree, output: &File, volume: &Tree) -> Result<Self> {
        let used = rustix::fs::fstatvfs(image_root).map_or(0, |disk| (disk.f_blocks - disk.f_bfree) * disk.f_frsize);
        let limits = Limits {
            memory: memory(),
            file: LARGEST_FILE,
            // To compress a megabyte takes less than a second, and holes of an hour's work are as large as a file may be.
            time: Duration::from_hours(6) + Duration::from_secs(used >> 20),
            volume: Some(volume.path()),
        };
        // mksquashfs opens it anew.
        let stdin = Some((output.try_clone().attempt(|| "hand the archive on")?.into(), Access::Write));
        Ok(Self { directory: image_root, access: Access::Read, stdin, capabilities: READER, limits })
    }

    /// It answers questions about a database in `directory`, a copy.
    pub fn asking(directory: &'a Tree) -> Self {
        let limits = Limits { memory: 1 << 30, file: 1 << 30, time: Duration::from_mins(2), volume: None };
        Self { directory, access: Access::Write, stdin: None, capabilities: &[], limits }
    }

    /// It makes something of `input`, a file, that its caller reads.
    pub fn filtering(directory: &'a Tree, input: File) -> Self {
        let limits = Limits { memory: memory(), file: 0, time: Duration::from_hours(1), volume: None };
        let stdin = Some((input.into(), Access::Read));
        Self { directory, access: Access::Read, stdin, capabilities: &[], limits }
    }

    /// Starts `command`. It goes on when this program ends.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        let attempted = format!("run {}", command.get_program().display());
        self.prepare(clear_environment(command))?;
        let start = || self.enter().and_then(|()| hold_none(command).spawn().attempt(|| "start it"));
        let started = std::thread::scope(|scope| scope.spawn(start).join());
        started.map_err(|_| Error::new(&attempted))?.map_err(|e| Error::new(&attempted).because(e))
    }

    /// Confines this thread for good, and all that it starts.
    pub fn enter(&self) -> Result<()> {
        let rules = self.rules().attempt(|| "choose the files that it reaches")?;
        if Self::has_mounts() {
            self.own_mounts().attempt(|| "set up mounts that can only be read")?;
        }
        rustix::thread::set_no_new_privs(true).attempt(|| "forgo new privileges")?;
        capabilities::hold_only(self.capabilities).attempt(|| "give up capabilities")?;
        if let Some(rules) = rules {
            rules.restrict_this_thread().attempt(|| "give up files with Landlock")?;
        }
        seccomp::filter(&refused_calls::refusing(REFUSED)).attempt(|| "give up system calls")
    }

    /// Has `command` begin with its standard input, and with the limits that the kernel keeps.
    pub fn prepare(&self, command: &mut Command) -> Result<()> {
        // /dev/null is opened here: there, no device can be.
        let input = match &self.stdin {
            Some((input, _)) => input.try_clone(),
            None => File::open("/dev/null").map(OwnedFd::from),
        };
        command.stdin(Stdio::from(input.attempt(|| "open its standard input")?));
        // Mounts of its own come with a working directory. Without them the child goes there itself: seccomp profiles of containers refuse
        // unshare(2), which would give this thread one.
        if !Self::has_mounts() {
            command.current_dir(self.directory.path());
        }
        let seconds = self.limits.time.as_secs() * processors();
        let limits = [
            // Not of addresses, which threads reserve and never use.
            (Resource::Data, self.limits.memory),
            (Resource::Fsize, self.limits.file),
            (Resource::Cpu, seconds),
            // A core would hold files of the image.
            (Resource::Core, 0),
        ];
        process::limited(command, limits);
        Ok(())
    }

    /// Whether the volume that is written to is nearly full: the machine goes on, though an archive unpacks to more than anybody has.
    pub fn volume_is_full(&self) -> bool {
        let volume = self.limits.volume.as_ref().and_then(|path| rustix::fs::statvfs(path).ok());
        volume.is_some_and(|disk| disk.f_bavail * disk.f_frsize < reserve(disk.f_blocks * disk.f_frsize))
    }

    /// All files but those that it needs, out of its reach. `None` where the kernel cannot do so.
    fn rules(&self) -> std::io::Result<Option<Ruleset>> {
        let rules = match Ruleset::new() {
            Ok(rules) => rules,
            Err(e) => {
                static TOLD: OnceLock<()> = OnceLock::new();
                TOLD.get_or_init(|| {
                    // So it is in every pod without CAP_SYS_ADMIN: Landlock confines them there.
                    tracing::debug!("programs that unpack and pack are not kept from other files: no Landlock: {e}");
                });
                return Ok(None);
            }
        };
        let path = std::env::var_os("PATH").unwrap_or_default();
        let system = SYSTEM.iter().map(PathBuf::from).chain(std::env::split_paths(&path));
        for place in system {
            if let Ok(place) = reach(&place) {
                rules.allow(place, Access::Read)?;
            }
        }
        rules.allow(self.directory, self.access)?;
        if let Some((stdin, access)) = &self.stdin {
            rules.allow(stdin, *access)?;
        }
        Ok(Some(rules))
    }

    /// Mounts of this thread's own, in which nothing but the target can be changed, modes and owners included (which Landlock leaves
    /// alone), and no device can be opened.
    fn own_mounts(&self) -> std::io::Result<()> {
        let restricted = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
        let writable = self.access == Access::Write;
        let target = writable.then(|| Detached::copy_of_fd(self.directory, false, restricted)).transpose()?;
        // A working directory is carried over into the new namespace; descriptors are not.
        nix::sched::unshare(CloneFlags::CLONE_FS)?;
        rustix::process::fchdir(self.directory)?;
        nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
        mounts::make_all_private_and(restricted | MountAttrFlags::MOUNT_ATTR_RDONLY)?;
        if let Some(target) = target {
            let here = Tree::open(Path::new("."))?;
            rustix::process::fchdir(target.attach(here)?)?;
        }
        Ok(())
    }

    /// Whether a program can have mounts of its own; tried once.
    fn has_mounts() -> bool {
        static WORK: OnceLock<bool> = OnceLock::new();
        *WORK.get_or_init(|| {
            let attempt = || {
                nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
                mounts::make_all_private_and(MountAttrFlags::MOUNT_ATTR_RDONLY)
            };
            let tried = std::thread::scope(|scope| scope.spawn(attempt).join());
            let failed = tried.unwrap_or_else(|_| Err(std::io::ErrorKind::Other.into())).err();
            if let Some(e) = &failed {
                tracing::info!("programs that unpack and pack have no read-only mounts of their own: {e}");
            }
            failed.is_none()
        })
    }
}

/// Leaves `command` no variable but `$PATH`, and the language of its messages. Others hold keys and tokens, or options that change what a
/// program does (`TAR_OPTIONS`, `GZIP`).
pub fn clear_environment(command: &mut Command) -> &mut Command {
    command.env_clear().env("LANG", "C");
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    command
}

/// Part of a disk that is left for others.
fn reserve(disk: u64) -> u64 {
    (disk / 50).min(1 << 30)
}

fn reach(path: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

/// Most of what the container has; a program that wants more says so, before the kernel ends whichever process it likes.
fn memory() -> u64 {
    (all_memory().unwrap_or(0) / 4 * 3).max(1 << 30) + processors() * MEMORY_OF_A_PROCESSOR
}

fn processors() -> u64 {
    std::thread::available_parallelism().map_or(1, |number| number.get() as u64)
}

/// Where limits of memory are, in either version of cgroups, as a container sees its own.
const MEMORY_LIMITS: [&str; 2] = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];

/// Memory that the container may take of the node's.
pub fn all_memory() -> Option<u64> {
    let limits = MEMORY_LIMITS.iter().filter_map(|file| std::fs::read_to_string(file).ok()?.trim().parse().ok());
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = meminfo.split_whitespace().nth(1).and_then(|kilobytes| kilobytes.parse::<u64>().ok());
    limits.chain(total.map(|kilobytes| kilobytes << 10)).min()
}
