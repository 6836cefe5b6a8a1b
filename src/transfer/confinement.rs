//! Confinement of programs that read untrusted data (archives, images, package databases). If such a program is
//! exploited, it can write only to its target and read only its source; it reaches no network, and cannot fill the disk
//! or memory.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use caps::Capability;
use nix::sched::CloneFlags;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::mount::MountAttrFlags;
use rustix::process::Resource;

use crate::error::{Attempt, Error, Result};
use crate::jail::capabilities::{self, lacks};
use crate::jail::refused_calls;
use crate::sys::landlock::{Access, Ruleset};
use crate::sys::memory;
use crate::sys::mounts::{self, Detached};
use crate::sys::process;
use crate::sys::seccomp;
use crate::sys::signals::unblock_signals;
use crate::sys::tree::Tree;
use crate::sys::umask;
use crate::transfer::progress::size_in_words;

/// Capabilities of a program that writes a tree, with reasons.
const WRITER: &[(Capability, &str)] = &[
    (Capability::CAP_CHOWN, "set the owners of files"),
    (Capability::CAP_DAC_OVERRIDE, "fill directories that nobody may write to"),
    (Capability::CAP_FOWNER, "set modes and times of other users' files"),
    (Capability::CAP_FSETID, "keep setuid and setgid bits"),
    (Capability::CAP_MKNOD, "create device nodes, which cannot be opened here"),
    (Capability::CAP_SETFCAP, "set file capabilities"),
    (Capability::CAP_SYS_ADMIN, "write trusted.* and security.* attributes; the calls below are refused"),
];

/// Capabilities of `WRITER` that may be missing: without them, creating a device node fails with an error of its own.
const NOT_NEEDED: [Capability; 2] = [Capability::CAP_MKNOD, Capability::CAP_SYS_ADMIN];

/// Refuses to unpack without the needed capabilities, since unpackers would skip owners and modes silently.
pub(crate) fn refuse_to_lose_attributes() -> Result<()> {
    let is_lacking = |(needed, _): &&(Capability, &str)| !NOT_NEEDED.contains(needed) && lacks(*needed);
    let Some((needed, reason)) = WRITER.iter().find(is_lacking) else { return Ok(()) };
    let refused = Error::new("unpack an image").because(format!("{needed} is missing, which is needed to {reason}"));
    Err(refused.advise(if rustix::process::geteuid().is_root() {
        "give the container this capability, and the others in docs/CAPABILITIES.md"
    } else {
        "run it as root"
    }))
}

/// Capabilities of a program that reads a tree, with reasons.
const READER: &[(Capability, &str)] = &[
    (Capability::CAP_DAC_OVERRIDE, "read files that nobody may read"),
    (Capability::CAP_DAC_READ_SEARCH, "the same"),
    (Capability::CAP_SYS_ADMIN, "read trusted.* attributes; the calls below are refused"),
];

/// System calls that reach networks, other processes, mounts, or kernel settings.
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

/// Files that every program may read: programs, libraries and their configuration. The directories in `$PATH` are
/// added.
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

/// Maximum size of a file in an image, in bytes, holes included: a lastlog for the highest user ID has 1.2 TB.
const LARGEST_FILE: u64 = 2 << 40;

/// Path by which a confined program can reopen its standard input.
pub(crate) const STDIN: &str = "/proc/self/fd/0";

/// Additional memory per processor for threads, each with a stack and a heap, in bytes.
const MEMORY_OF_A_PROCESSOR: u64 = 64 << 20;

/// Limits of a confined program.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// Data segment limit, in bytes.
    pub(crate) memory: u64,
    /// Limit of each written file, in bytes.
    pub(crate) file: u64,
    /// Time after which the program is killed.
    pub(crate) time: Duration,
    /// Volume to watch: the program is killed when the free space falls below a reserve.
    pub(crate) volume: Option<PathBuf>,
}

/// Working directory, input and access rights of one program.
pub(crate) struct Confined<'a> {
    /// Working directory of the program.
    directory: &'a Tree,
    /// Access of the program to its working directory.
    access: Access,
    /// Standard input of the program, a file or a directory, with the program's access to it. [`STDIN`] opens it, even
    /// if its name has been replaced.
    stdin: Option<(OwnedFd, Access)>,
    /// Further files that the program may read.
    readable: Vec<OwnedFd>,
    capabilities: &'static [(Capability, &'static str)],
    /// Resource limits.
    pub(crate) limits: Limits,
}

impl<'a> Confined<'a> {
    /// For a program that unpacks `source` (a file, directory or pipe, its standard input) into `target`. Its time
    /// limit depends on `size`, the bytes of the archive.
    pub(crate) fn unpacking(target: &'a Tree, source: BorrowedFd<'_>, size: u64) -> Result<Self> {
        let limits = Limits {
            memory: memory(),
            file: LARGEST_FILE,
            time: Duration::from_hours(1) + Duration::from_secs(size >> 20),
            volume: Some(target.path()),
        };
        let stdin = Some((source.try_clone_to_owned().attempt(|| "duplicate the archive's descriptor")?, Access::Read));
        Ok(Self { directory: target, access: Access::Write, stdin, readable: Vec::new(), capabilities: WRITER, limits })
    }

    /// For a program that packs the tree `image_root` into `output`, its standard input, which lies in `volume`.
    pub(crate) fn packing(image_root: &'a Tree, output: &File, volume: &Tree) -> Result<Self> {
        let used = rustix::fs::fstatvfs(image_root).map_or(0, |disk| (disk.f_blocks - disk.f_bfree) * disk.f_frsize);
        let limits = Limits {
            memory: memory(),
            file: LARGEST_FILE,
            // Compressing a megabyte takes less than a second; the base allows for holes up to the largest file size.
            time: Duration::from_hours(6) + Duration::from_secs(used >> 20),
            volume: Some(volume.path()),
        };
        // mksquashfs reopens its standard input by path.
        let stdin = Some((output.try_clone().attempt(|| "duplicate the archive's descriptor")?.into(), Access::Write));
        Ok(Self {
            directory: image_root,
            access: Access::Read,
            stdin,
            readable: Vec::new(),
            capabilities: READER,
            limits,
        })
    }

    /// Lets the program read and execute these files too.
    pub(crate) fn reading<'f>(mut self, files: impl Iterator<Item = BorrowedFd<'f>>) -> Result<Self> {
        let owned = files.map(|file| file.try_clone_to_owned()).collect::<std::io::Result<Vec<_>>>();
        self.readable.extend(owned.attempt(|| "duplicate descriptors for a program")?);
        Ok(self)
    }

    /// For a program that queries a copied database in `directory`.
    pub(crate) fn asking(directory: &'a Tree) -> Self {
        let limits = Limits { memory: 1 << 30, file: 1 << 30, time: Duration::from_mins(2), volume: None };
        Self { directory, access: Access::Write, stdin: None, readable: Vec::new(), capabilities: &[], limits }
    }

    /// For a program that only computes. It may read `directory`, which it starts in.
    pub(crate) fn computing(directory: &'a Tree) -> Self {
        Self { access: Access::Read, ..Self::asking(directory) }
    }

    /// For a program that reads the file `input` and writes a few words.
    pub(crate) fn inspecting(directory: &'a Tree, input: OwnedFd) -> Self {
        Self { stdin: Some((input, Access::Read)), ..Self::computing(directory) }
    }

    /// For a program that converts the file `input` to standard output.
    pub(crate) fn filtering(directory: &'a Tree, input: File) -> Self {
        let limits = Limits { memory: memory(), file: 0, time: Duration::from_hours(1), volume: None };
        let stdin = Some((input.into(), Access::Read));
        Self { directory, access: Access::Read, stdin, readable: Vec::new(), capabilities: &[], limits }
    }

    /// Starts `command`. If this process is killed, the kernel does not kill the program, which then ends because its
    /// output is closed.
    pub(crate) fn spawn(&self, command: &mut Command) -> Result<Child> {
        let attempted = format!("run {}", command.get_program().display());
        self.prepare(clear_environment(command))?;
        let start = || self.enter().and_then(|()| unblock_signals(command).spawn().attempt(|| "start it"));
        let started = std::thread::scope(|scope| scope.spawn(start).join());
        started.map_err(|_| Error::new(&attempted))?.map_err(|e| Error::new(&attempted).because(e))
    }

    /// Confines this thread and its future children, for good.
    pub(crate) fn enter(&self) -> Result<()> {
        let rules = self.rules().attempt(|| "choose the files that it may open")?;
        if Self::has_mounts() {
            self.own_mounts().attempt(|| "set up read-only mounts")?;
        }
        rustix::thread::set_no_new_privs(true).attempt(|| "set no_new_privs")?;
        capabilities::keep_only(self.capabilities).attempt(|| "drop capabilities")?;
        if let Some(rules) = rules {
            rules.restrict_this_thread().attempt(|| "restrict file access with Landlock")?;
        }
        seccomp::filter(&refused_calls::refusing(REFUSED)).attempt(|| "install the seccomp filter")
    }

    /// Sets standard input and resource limits of `command`.
    pub(crate) fn prepare(&self, command: &mut Command) -> Result<()> {
        // Without an input, open /dev/null here, because the confined program cannot open devices.
        let input = match &self.stdin {
            Some((input, _)) => input.try_clone(),
            None => File::open("/dev/null").map(OwnedFd::from),
        };
        umask::with_own(command).stdin(Stdio::from(input.attempt(|| "open its standard input")?));
        // `own_mounts` also changes the working directory. Without it, have the child change its own: this thread
        // cannot, since container seccomp profiles deny the unshare(2) that would give it a working directory of its
        // own.
        if !Self::has_mounts() {
            command.current_dir(self.directory.path());
        }
        let seconds = self.limits.time.as_secs() * processors();
        let limits = [
            // Limit the data segment, not the address space, which threads reserve and never use.
            (Resource::Data, self.limits.memory),
            (Resource::Fsize, self.limits.file),
            (Resource::Cpu, seconds),
            // A core dump would contain files of the image.
            (Resource::Core, 0),
        ];
        process::limited(command, limits);
        Ok(())
    }

    /// Message if the volume has less free space than the reserve. The volume is watched because an archive may unpack
    /// to more than any disk holds.
    pub(crate) fn full_volume(&self) -> Option<String> {
        let path = self.limits.volume.as_ref()?;
        let disk = rustix::fs::statvfs(path).ok()?;
        let (free, whole) = (disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize);
        let is_full = free < reserve(whole);
        is_full.then(|| {
            // `path` is that of a descriptor, so show where it leads.
            let shown = std::fs::read_link(path).unwrap_or_else(|_| path.clone());
            let [free, whole] = [free, whole].map(size_in_words);
            format!("the file system of {} has almost no space left, {free} of {whole}", shown.display())
        })
    }

    /// Landlock rules that deny all other files; `None` if the kernel lacks Landlock.
    fn rules(&self) -> std::io::Result<Option<Ruleset>> {
        let rules = match Ruleset::new() {
            Ok(rules) => rules,
            Err(e) => {
                static TOLD: OnceLock<()> = OnceLock::new();
                TOLD.get_or_init(|| {
                    tracing::info!(
                        "Landlock is not available, so programs that pack and unpack can reach all files: {e}"
                    );
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
        if let Some((stdin, access)) = &self.stdin
            // Landlock has no rules for pipes (EBADFD), and needs none for a file that is open already.
            && FileType::from_raw_mode(rustix::fs::fstat(stdin)?.st_mode) != FileType::Fifo
        {
            rules.allow(stdin, *access)?;
        }
        for file in &self.readable {
            rules.allow(file, Access::Read)?;
        }
        Ok(Some(rules))
    }

    /// Gives this thread a mount namespace in which only the target is writable and no device can be opened. Landlock
    /// would not prevent changes of modes and owners.
    fn own_mounts(&self) -> std::io::Result<()> {
        let restricted = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
        let writable = self.access == Access::Write;
        let target = writable.then(|| Detached::copy_of_fd(self.directory, false, restricted)).transpose()?;
        // unshare(2) carries the working directory into the new namespace, but no descriptors; so make the target the
        // working directory first.
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

    /// True if mount namespaces can be created; this is tried once.
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
                // Log at DEBUG, because this happens in every pod without CAP_SYS_ADMIN; there Landlock confines these
                // programs.
                tracing::debug!("programs that pack and unpack have no read-only mounts of their own: {e}");
            }
            failed.is_none()
        })
    }
}

/// Removes all variables of `command` but `$PATH`, and sets a language for messages. Other variables hold keys and
/// tokens, or options such as `TAR_OPTIONS` and `GZIP`.
pub(crate) fn clear_environment(command: &mut Command) -> &mut Command {
    command.env_clear().env("LANG", "C");
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    command
}

/// Free space to keep on a disk of `disk` bytes, in bytes.
fn reserve(disk: u64) -> u64 {
    (disk / 50).min(1 << 30)
}

fn reach(path: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

/// Memory limit in bytes: most of the container's memory, so that a program at its limit reports an error before the
/// OOM killer chooses a process.
fn memory() -> u64 {
    (memory::available().unwrap_or(0) / 4 * 3).max(1 << 30) + processors() * MEMORY_OF_A_PROCESSOR
}

fn processors() -> u64 {
    std::thread::available_parallelism().map_or(1, |number| number.get() as u64)
}
