//! Runs kiwi-ng in its own namespaces. A child process of this program creates the namespaces, and a child of that
//! child is their first process. This file has both ends of the communication between these processes.
//!
//! ```text
//! ims-sshd build ── makes ──► child: user, mount, PID, IPC, UTS namespaces ── fork ──► init, process 1 ── kiwi-ng
//! ```
//!
//! A recipe's scripts run as root alongside kiwi-ng. Root in the user namespace is also user 0 outside of it, and so
//! owns the machine's files. Therefore the build has its own root directory ([`View`]), which contains only those parts
//! of the machine that it needs. A second user namespace locks the mounts in this root directory (mount_namespaces(7)).
//!
//! If one of the processes ends for any reason, the kernel ends all processes after it in the diagram: by the parent's
//! death signal, and because a PID namespace dies with its first process. The mounts disappear with the last process of
//! their namespace. So no cleanup depends on a program that might itself be killed.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sched::CloneFlags;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{AtFlags, Mode};
use rustix::mount::MountAttrFlags;
use serde::{Deserialize, Serialize};

use crate::error::{Attempt, Error, Result};
use crate::image::packer::inheritable;
use crate::jail::build::mount_for_build;
use crate::jail::init::{unshare_with_users, unshare_with_users_of};
use crate::jail::{binfmt, capabilities, refused_calls};
use crate::sys::architecture::Architecture;
use crate::sys::landlock::Ruleset;
use crate::sys::mounts::{self, Detached};
use crate::sys::poll;
use crate::sys::process::{Fork, OWN_PROGRAM, children, end_with_us, exit_now, fork, reap};
use crate::sys::seccomp;
use crate::sys::signals::{Signals, unblock_signals};
use crate::sys::tree::Tree;

/// First argument of the child's command line.
const CHILD: &str = "build-as-child";

/// First argument of a child that only tries whether it may make the namespaces.
const TRIAL: &str = "try-namespaces-of-a-build";

/// Namespaces of a build.
const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWUSER
    .union(CloneFlags::CLONE_NEWNS)
    .union(CloneFlags::CLONE_NEWPID)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS);

/// Name of this program in the list of processes.
const NAME: &str = "ims-sshd";

/// Directories of the machine that the build sees unchanged and read-only.
const SHOWN: [&str; 7] = ["/bin", "/lib", "/lib32", "/lib64", "/libx32", "/sbin", "/usr"];

/// Directories of which the build gets a writable copy in memory. Only files that every user of the machine may read
/// are copied, so no credentials get into the build.
const COPIED: [&str; 4] = ["/etc", "/usr/local/share/ca-certificates", "/usr/share/pki", "/var/lib/ca-certificates"];

/// Other directories of the build, which are initially empty, and their modes. Package managers write to those below
/// `var`, so two builds share no lock and no cache, and the machine's own packages stay unchanged.
const EMPTY: [(&str, u32); 14] = [
    ("dev", 0o755),
    ("mnt", 0o755),
    ("opt", 0o755),
    ("proc", 0o555),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("var/cache", 0o755),
    ("var/lib/apt", 0o755),
    ("var/lib/dnf", 0o755),
    ("var/lib/dpkg", 0o755),
    ("var/lib/rpm", 0o755),
    ("var/log", 0o755),
    ("var/tmp", 0o1777),
];

/// Directory for downloaded packages, inside the directory for the build's own files. It is on the volume, since
/// packages need much space.
pub(crate) const CACHE: &str = "cache";

/// Home directory outside of the image root, inside the directory for the build's own files.
pub(crate) const HOME: &str = "home";

/// Path of the home directory. In the image root it is the image's, where a recipe's scripts expect it.
pub(crate) const ROOTS_HOME: &str = "/root";

/// Directory of kiwi-ng's cache, which kiwi-ng also binds into the image root.
const KIWI_CACHE: &str = "/var/cache/kiwi";

/// Files in /etc that may be links to directories that the build does not see. Their content is copied.
const LINKED_FILES: [&str; 3] = ["hosts", "hostname", "resolv.conf"];

/// Directories from which this machine's tools read additional CA certificates, each with its tool.
const AUTHORITIES: [(&str, &str); 3] = [
    ("/usr/local/share/ca-certificates", "update-ca-certificates"),
    ("/usr/share/pki/trust/anchors", "update-ca-certificates"),
    ("/etc/pki/ca-trust/source/anchors", "update-ca-trust"),
];

/// Debian's file with all CA certificates; next, its directory with a file for each certificate.
const DEBIAN_BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";
const DEBIAN_CERTIFICATES: &str = "/etc/ssl/certs";

/// Value of `PATH` for the tools in [`AUTHORITIES`], since this process has no environment variables.
const SYSTEM_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Directory of additional CA certificates in an image root of Debian packages.
pub(crate) const DEBIAN_ANCHORS: &str = "usr/local/share/ca-certificates";

/// Directory of replacement programs for the build, first in the build's `PATH`.
pub(crate) const PROGRAMS: &str = "bin";

/// Replacements for mount and umount, which kiwi-ng calls. In a user namespace, binding a directory fails if locked
/// mounts are below it. Binding it recursively succeeds, but the result can only be unmounted as a whole.
const MOUNT_PROGRAMS: [(&str, &str); 2] = [
    (
        "mount",
        "#!/bin/sh
PATH=${PATH#*:}
said=$(mount \"$@\" 2>&1) && exit
[ \"$1 $2\" = '-n --bind' ] && mount -n --rbind \"$3\" \"$4\" && exit
echo \"$said\" >&2
exit 32
",
    ),
    (
        "umount",
        "#!/bin/sh
PATH=${PATH#*:}
said=$(umount \"$@\" 2>&1) || umount -l \"$@\" || { echo \"$said\" >&2; exit 32; }
",
    ),
];

/// Attributes of writable mounts. Device nodes in such mounts cannot be opened.
const WRITABLE: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV;
/// Attributes of read-only mounts. Device nodes in such mounts cannot be opened.
const READ_ONLY: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV.union(MountAttrFlags::MOUNT_ATTR_RDONLY);

/// Maximum size of the child's report, in bytes.
const LONGEST_REPORT: u64 = 64 << 10;

/// Everything that the child needs to know about a build.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    /// kiwi-ng and its arguments.
    pub(crate) command: Vec<String>,
    /// The environment variables of kiwi-ng; it gets no others.
    pub(crate) variables: Vec<(String, String)>,
    /// Directory for the build's own files.
    pub(crate) private: PathBuf,
    /// Image root parent, to which the build writes.
    pub(crate) parent: PathBuf,
    /// Directories that the build can read: the recipe, repositories, kiwi-ng. Their paths contain no symbolic links.
    pub(crate) shown: Vec<PathBuf>,
    /// Directories with credentials, which are hidden from the build.
    pub(crate) hidden: Vec<PathBuf>,
    /// Certificate of the site's certificate authority, for downloads of the package manager.
    pub(crate) authority: Option<PathBuf>,
    /// Architecture whose programs QEMU runs, in this build only; `None` if no emulation is needed.
    pub(crate) emulated: Option<String>,
    /// Image root of Debian packages, if the certificate must be added to it after kiwi-ng has ended because kiwi-ng
    /// itself cannot add it.
    pub(crate) trusts_later: Option<PathBuf>,
}

/// Result of the child: how kiwi-ng ended, or why it could not be started.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
pub(crate) enum Ended {
    /// kiwi-ng ended with this exit code.
    Code(i32),
    /// A signal killed kiwi-ng.
    Signal(i32),
    /// The namespaces or mounts of the build could not be set up.
    Failed(String),
}

/// A running build.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    report: File,
    /// Output of kiwi-ng.
    pub(crate) output: File,
}

impl Running {
    /// Starts kiwi-ng.
    pub(crate) fn start(order: &Order) -> Result<Self> {
        let attempted = || "start kiwi-ng";
        let told = serde_json::to_vec(order).attempt(attempted)?;
        let (told, report) = (inheritable(&told).attempt(attempted)?, inheritable(b"").attempt(attempted)?);
        let (output, input) = io::pipe().attempt(attempted)?;
        let program = own_copy().attempt(attempted)?;
        let mut child = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
        child.arg0(NAME).args([CHILD, &told.as_raw_fd().to_string(), &report.as_raw_fd().to_string()]);
        child.stdin(Stdio::null()).stdout(input.try_clone().attempt(attempted)?).stderr(input).env_clear();
        // A process group of its own: Ctrl-C then reaches only this program, which ends the build cleanly.
        child.process_group(0);
        let child = end_with_us(unblock_signals(&mut child)).spawn().attempt(attempted)?;
        Ok(Self { child, report, output: OwnedFd::from(output).into() })
    }

    /// Returns the child, for a caller that waits for it.
    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Returns how kiwi-ng ended; `None` if the child was killed before it could report.
    pub(crate) fn report(&self) -> Option<Ended> {
        let mut text = vec![0; usize::try_from(LONGEST_REPORT).unwrap_or(0)];
        let length = self.report.read_at(&mut text, 0).ok()?;
        serde_json::from_slice(&text[..length]).ok()
    }

    /// Kills all processes of the build, and returns when none is left.
    pub(crate) fn end(&mut self) {
        // Kill the first process of the PID namespace. The kernel kills all other processes of the namespace before it
        // reports that one's death.
        for init in children(Pid::from_raw(self.child.id().cast_signed())) {
            let _ = nix::sys::signal::kill(init, Signal::SIGKILL);
        }
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

/// Copies this program into memory, to run the child from the copy. Otherwise processes of the build could change mode
/// and owner of the machine's file through /proc/1/exe.
fn own_copy() -> io::Result<File> {
    use rustix::fs::{MemfdFlags, SealFlags};
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Try with `EXEC` first: later kernels may require it (vm.memfd_noexec), and kernels before 6.3 reject it.
    let made =
        rustix::fs::memfd_create(NAME, flags | MemfdFlags::EXEC).or_else(|_| rustix::fs::memfd_create(NAME, flags))?;
    let mut copy = File::from(made);
    io::copy(&mut File::open(OWN_PROGRAM)?, &mut copy)?;
    // Not `WRITE`, which fails with EBUSY if the kernel happens to hold one of the pages (`memfd_wait_for_pins`). The two
    // differ only for writable mappings that exist already, and there are none.
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE;
    rustix::fs::fcntl_add_seals(&copy, seals)?;
    // Return a read-only descriptor: a file that is open for writing cannot be executed (ETXTBSY).
    File::open(format!("/proc/self/fd/{}", copy.as_raw_fd()))
}

/// Runs the child, if this process was started as the child, and returns its exit code; otherwise returns `None`.
pub fn run_as_child() -> Option<u8> {
    let mut words = std::env::args_os().skip(1);
    let first = words.next()?;
    if first == TRIAL {
        let Err(e) = make_namespaces() else { return Some(0) };
        eprintln!("{}", e.reason());
        return Some(1);
    }
    if first != CHILD {
        return None;
    }
    let (Some(told), Some(report), None) = (words.next(), words.next(), words.next()) else {
        eprintln!("started by 'ims-sshd build', not by hand; see ims-sshd --help");
        return Some(1);
    };
    let _ = rustix::thread::set_name(c"ims-sshd");
    let open = |number: OsString| File::options().read(true).write(true).open(Path::new("/proc/self/fd").join(number));
    let (Ok(mut told), Ok(report)) = (open(told), open(report)) else { return Some(1) };
    let mut text = Vec::new();
    let order = told
        .read_to_end(&mut text)
        .map_err(io::Error::other)
        .and_then(|_| serde_json::from_slice(&text).map_err(io::Error::other));
    // Close inherited descriptors on exec, so that kiwi-ng gets none of the parent's.
    let closed = crate::sys::process::close_on_exec_from(3);
    let ended = match order.and_then(|order: Order| closed.map(|()| order)) {
        Ok(order) => make(&order, &report).unwrap_or_else(|e| Some(Ended::Failed(e.to_string()))),
        Err(e) => Some(Ended::Failed(e.to_string())),
    };
    if let Some(ended) = ended {
        tell(&report, &ended);
        return Some(1);
    }
    Some(0)
}

fn tell(report: &File, ended: &Ended) {
    let _ = serde_json::to_vec(ended).map(|text| report.write_all_at(&text, 0));
}

/// Refuses a machine or a container in which no build can make its namespaces.
pub(crate) fn check_namespaces() -> Result<()> {
    let mut child = Command::new(OWN_PROGRAM);
    child.arg0(NAME).arg(TRIAL).stdin(Stdio::null()).env_clear();
    let output = end_with_us(unblock_signals(&mut child)).output().attempt(|| "try the namespaces of a build")?;
    if output.status.success() {
        return Ok(());
    }
    let why = String::from_utf8_lossy(&output.stderr);
    let why = why.lines().last().unwrap_or("the process that tried was killed").to_owned();
    Err(Error::new("make the namespaces of a build").because(why).advise(
        "allow user namespaces on the node (user.max_user_namespaces, seccomp, AppArmor); see docs/RECIPES.md, Build",
    ))
}

/// Moves this process into the namespaces of a build.
fn make_namespaces() -> Result<()> {
    let attempted = || "make the build's namespaces";
    unshare_with_users(NAMESPACES).map_err(|e| {
        let failed = Error::new(attempted());
        // ENOSPC has nothing to do with a disk here (user_namespaces(7)).
        if e.kind() == io::ErrorKind::StorageFull {
            return failed.because("the limit of user namespaces is reached, or is 0 (ENOSPC)");
        }
        failed.because(e)
    })?;
    // Try out a mount: some containers permit new namespaces, but no mounts in them.
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
    mounts::make_all_private()
        .and_then(|()| Detached::filesystem("tmpfs", &[], attributes).map(drop))
        .attempt(|| "mount in the build's namespaces")
}

/// Creates the namespaces, and waits until their first process ends. That process reports how kiwi-ng ended.
fn make(order: &Order, report: &File) -> Result<Option<Ended>> {
    make_namespaces()?;
    let attempted = || "make the build's namespaces";
    // Lets the first process detect the end of this process: it polls one end of the pipe, and only this process holds
    // the other.
    let (alive, held) = io::pipe().attempt(attempted)?;
    match fork().attempt(|| "start the build's first process")? {
        Fork::Child => {
            drop(held);
            let ended = first_process(order, &alive.into()).unwrap_or_else(|e| Ended::Failed(e.to_string()));
            tell(report, &ended);
            exit_now(0)
        }
        Fork::Parent(init) => {
            drop(alive);
            loop {
                match waitpid(init, None) {
                    Err(nix::errno::Errno::EINTR) => {}
                    _ => return Ok(None),
                }
            }
        }
    }
}

/// Mounts what the build needs, runs kiwi-ng, and reaps the processes that kiwi-ng leaves behind.
fn first_process(order: &Order, alive: &OwnedFd) -> Result<Ended> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .attempt(|| "have the build end with its parent")?;
    // The parent may have ended before the death signal was set. getppid(2) cannot show that, since the parent is in
    // another PID namespace.
    let mut source = [PollFd::new(alive, PollFlags::empty())];
    if poll::wait(&mut source, std::time::Duration::ZERO).attempt(|| "look for the parent")? > 0 {
        return Ok(Ended::Signal(libc::SIGKILL));
    }
    let emulated = order.emulated.as_deref().and_then(Architecture::from_name);
    // Keep the interpreter registered until this value is dropped.
    let _interpreter = emulated.map(|architecture| binfmt::provide(architecture, "build", true)).transpose()?;
    // Open /proc now, since the build's own /proc is read-only.
    let in_proc = Tree::open(Path::new("/proc/self/.")).attempt(|| "open /proc")?;
    View::enter(order)?;
    take_input().attempt(|| "open /dev/null of the build")?;
    write_mount_programs(&order.private)?;
    if let Some(authority) = &order.authority {
        trust(authority)?;
    }
    confine(&in_proc)?;
    drop(in_proc);
    let signals = Signals::block(&[Signal::SIGCHLD]).attempt(|| "block signals")?;
    let (program, arguments) = order.command.split_first().ok_or_else(|| Error::new("start kiwi-ng"))?;
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(order.variables.iter().map(|(n, v)| (n, v))).current_dir("/");
    let kiwi = unblock_signals(&mut command).spawn().attempt(|| format!("start {program}"))?;
    let kiwi = Pid::from_raw(kiwi.id().cast_signed());
    loop {
        for ended in reap() {
            match ended {
                WaitStatus::Exited(pid, code) if pid == kiwi => {
                    let root = order.trusts_later.as_ref().filter(|_| code == 0);
                    if let (Some(root), Some(authority)) = (root, &order.authority) {
                        trust_in_image(root, authority)?;
                    }
                    return Ok(Ended::Code(code));
                }
                WaitStatus::Signaled(pid, signal, _) if pid == kiwi => return Ok(Ended::Signal(signal as i32)),
                _ => {}
            }
        }
        let mut sources = [PollFd::new(&signals, PollFlags::IN)];
        let _ = poll::wait(&mut sources, std::time::Duration::from_secs(1));
        let _ = signals.next();
    }
}

/// Root directory of a build, in memory, while it is being set up.
struct View {
    root: Tree,
}

impl View {
    /// Sets up the root directory and moves this process into it. After that, no path leads to other directories of the
    /// machine.
    fn enter(order: &Order) -> Result<()> {
        let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
        // Attach the root without switching to it: until the switch, paths still lead to the machine's files.
        let root = Detached::filesystem("tmpfs", &[("mode", "0755")], attributes)
            .and_then(mounts::cover_root)
            .attempt(|| "mount a root directory for the build")?;
        let view = Self { root: Tree::from_fd(root) };
        for (name, mode) in EMPTY {
            let made = view.root.make_directories(name).and_then(|()| {
                rustix::fs::chmodat(&view.root, name, Mode::from_raw_mode(mode), AtFlags::empty()).map_err(Into::into)
            });
            made.attempt(|| format!("create /{name} of the build"))?;
        }
        for place in SHOWN.map(Path::new) {
            view.show_part(place).attempt(|| format!("show {} to the build", place.display()))?;
        }
        let hidden: Vec<_> = order.hidden.iter().filter_map(|place| std::fs::canonicalize(place).ok()).collect();
        for place in COPIED.map(Path::new).into_iter().filter(|place| place.is_dir()) {
            view.copy(place, &hidden).attempt(|| format!("copy {} for the build", place.display()))?;
        }
        // Mount parents before their subdirectories: a parent that is mounted later would cover the subdirectory.
        let mut shown: Vec<_> = order.shown.iter().map(|place| (place.clone(), place, READ_ONLY)).collect();
        let (cache, home) = (order.private.join(CACHE), order.private.join(HOME));
        shown.push((KIWI_CACHE.into(), &cache, WRITABLE));
        shown.push((ROOTS_HOME.into(), &home, WRITABLE));
        shown.push((order.parent.clone(), &order.parent, WRITABLE));
        shown.sort_by(|(a, ..), (b, ..)| a.cmp(b));
        for (target, source, attributes) in shown {
            view.show(source, &target, attributes).attempt(|| format!("show {} to the build", source.display()))?;
        }
        for place in &hidden {
            view.hide(place).attempt(|| format!("hide {} from the build", place.display()))?;
        }
        let root = mount_for_build(view.root)?;
        mounts::switch_root(&root).attempt(|| "switch to the root directory of the build")
    }

    /// Makes a part of the machine visible to the build. If it is a symbolic link, copies the link.
    fn show_part(&self, place: &Path) -> io::Result<()> {
        match std::fs::read_link(place) {
            Ok(target) => Ok(rustix::fs::symlinkat(target, &self.root, relative(place))?),
            Err(_) if !place.is_dir() => Ok(()),
            Err(_) => self.show(place, place, READ_ONLY),
        }
    }

    fn show(&self, source: &Path, target: &Path, attributes: MountAttrFlags) -> io::Result<()> {
        self.attach(Detached::copy_of(source, true, attributes)?, target)
    }

    fn attach(&self, mount: Detached, target: &Path) -> io::Result<()> {
        self.root.make_directories(relative(target))?;
        mount.attach(self.root.directory(relative(target))?).map(drop)
    }

    fn copy(&self, place: &Path, hidden: &[PathBuf]) -> io::Result<()> {
        let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
        let copy = Detached::filesystem("tmpfs", &[("mode", "0755")], attributes)?;
        let tree = Tree::from_fd(copy.as_fd().try_clone_to_owned()?);
        let top = tree.path();
        copy_readable(place, &top, hidden)?;
        if place == Path::new("/etc") {
            for name in LINKED_FILES {
                if let Ok(content) = std::fs::read(place.join(name)) {
                    let _ = std::fs::remove_file(top.join(name));
                    std::fs::write(top.join(name), content)?;
                }
            }
        }
        self.attach(copy, place)
    }

    /// Covers a directory with credentials, if the build can see it.
    fn hide(&self, place: &Path) -> io::Result<()> {
        if self.root.look(relative(place)).ok().flatten().is_none() {
            return Ok(());
        }
        let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_RDONLY;
        self.attach(Detached::filesystem("tmpfs", &[("size", "4k"), ("mode", "0555")], attributes)?, place)
    }
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

/// Copies the files of a directory that every user of the machine may read. Leaves out mounts in the directory, since a
/// pod mounts credentials as files that everybody may read.
fn copy_readable(from: &Path, to: &Path, hidden: &[PathBuf]) -> io::Result<()> {
    let device = std::fs::symlink_metadata(from)?.dev();
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (path, copy, found) = (entry.path(), to.join(entry.file_name()), entry.metadata()?);
        if found.is_symlink() {
            symlink(std::fs::read_link(&path)?, copy)?;
        } else if found.is_file() && found.mode() & 0o004 != 0 {
            let mut file = File::create_new(&copy)?;
            io::copy(&mut File::open(&path)?, &mut file)?;
            file.set_permissions(found.permissions())?;
        } else if found.is_dir() && found.mode() & 0o005 == 0o005 && found.dev() == device && !hidden.contains(&path) {
            std::fs::create_dir(&copy)?;
            copy_readable(&path, &copy, hidden)?;
        }
    }
    Ok(())
}

/// Opens /dev/null as standard input. The inherited standard input may be a file of the machine, whose mode and owner
/// the build could change.
fn take_input() -> io::Result<()> {
    rustix::stdio::dup2_stdin(File::open("/dev/null")?).map_err(Into::into)
}

fn write_mount_programs(private: &Path) -> Result<()> {
    for (name, text) in MOUNT_PROGRAMS {
        let file = private.join(PROGRAMS).join(name);
        let written = std::fs::write(&file, text)
            .and_then(|()| std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)));
        written.attempt(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

/// Takes privileges that a build does not need from this process and its future children. `in_proc` is the directory of
/// this process in a writable /proc.
fn confine(in_proc: &Tree) -> Result<()> {
    // Root in the build must not remove or change mounts. In another user namespace with fewer rights, the mounts are
    // locked.
    unshare_with_users_of(in_proc, CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)
        .attempt(|| "make the namespaces of kiwi-ng")?;
    // Landlock keeps the build from connecting to abstract sockets: the build shares the container's network, to which
    // they belong.
    if let Some(scopes) = Ruleset::of_scopes().attempt(|| "make the build's Landlock rules")? {
        scopes.restrict_this_thread().attempt(|| "apply the build's Landlock rules")?;
    }
    capabilities::keep_build_set().attempt(|| "drop capabilities")?;
    seccomp::filter(refused_calls::program()).attempt(|| "install the seccomp filter")
}

/// Adds the certificate of the site's authority to an image root of Debian packages.
fn trust_in_image(root: &Path, authority: &Path) -> Result<()> {
    let attempted = || "add the site's authority to the image root";
    let tree = Tree::open(root).attempt(attempted)?;
    let content = std::fs::read(authority).attempt(attempted)?;
    tree.make_directories(DEBIAN_ANCHORS).attempt(attempted)?;
    tree.replace(Path::new(DEBIAN_ANCHORS).join("cray_certificate_authority.crt"), &content).attempt(attempted)?;
    let mut tool = Command::new("chroot");
    tool.arg(root).arg("update-ca-certificates").stdin(Stdio::null()).env_clear().env("PATH", SYSTEM_PATH);
    // Ignore a missing tool: a later check warns about it.
    let _ = unblock_signals(&mut tool).output();
    Ok(())
}

/// Prints a warning into kiwi-ng's output: the package manager may refuse the site's servers.
fn tell_untrusted(tool: &str, why: &str) {
    let _ = writeln!(
        io::stderr(),
        "the build's package manager may not trust the site's servers: cannot run {tool}: {why}"
    );
}

/// Adds a certificate to Debian's files; returns false if they do not exist. Debian's own tool would take about a
/// second: it rebuilds the files with a shell script that starts four programs for each certificate.
fn add_to_debian_bundle(authority: &Path) -> io::Result<bool> {
    let mut bundle = match File::options().append(true).open(DEBIAN_BUNDLE) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        bundle => bundle?,
    };
    std::fs::copy(authority, Path::new(DEBIAN_CERTIFICATES).join("ims-sshd-site.pem"))?;
    bundle.write_all(b"\n")?;
    io::copy(&mut File::open(authority)?, &mut bundle)?;
    Ok(true)
}

/// Makes programs in the build trust the site's authority, in addition to those that the machine's programs trust.
fn trust(authority: &Path) -> Result<()> {
    let there = AUTHORITIES.iter().find(|(place, _)| Path::new(place).is_dir());
    let Some(&(place, mut tool)) = there else { return Ok(()) };
    let attempted = || format!("add {} to the authorities of the build", authority.display());
    std::fs::copy(authority, Path::new(place).join("ims-sshd-site.crt")).attempt(attempted)?;
    let mut command = Command::new(tool);
    if add_to_debian_bundle(authority).attempt(attempted)? {
        (command, tool) = (Command::new("openssl"), "openssl");
        command.args(["rehash", DEBIAN_CERTIFICATES]);
    }
    // Capture the output, which would not help a reader of the build's log.
    let ran = unblock_signals(command.stdin(Stdio::null()).env("PATH", SYSTEM_PATH)).output();
    match ran {
        Ok(output) if output.status.success() => {}
        Ok(output) => tell_untrusted(tool, String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default()),
        Err(e) => tell_untrusted(tool, &e.to_string()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_of_the_program_cannot_be_changed() {
        let copy = own_copy().unwrap();
        let path = format!("/proc/self/fd/{}", copy.as_raw_fd());
        let mut writable = File::options().write(true).open(&path).unwrap();
        let refused = writable.write_all(b"x").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        assert!(writable.set_len(0).is_err() && File::options().write(true).truncate(true).open(path).is_err());
        assert_eq!(copy.metadata().unwrap().len(), std::fs::metadata(OWN_PROGRAM).unwrap().len());
    }

    #[test]
    fn files_that_only_root_may_read_are_not_copied() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let write = |name: &str, mode| {
            let file = from.path().join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, name).unwrap();
            std::fs::set_permissions(file, PermissionsExt::from_mode(mode)).unwrap();
        };
        write("passwd", 0o644);
        write("shadow", 0o640);
        write("ssl/certs/a.pem", 0o755);
        write("ssl/private/key", 0o644);
        write("oauth/client-secret", 0o644);
        std::fs::set_permissions(from.path().join("ssl/private"), PermissionsExt::from_mode(0o710)).unwrap();
        symlink("shadow", from.path().join("link")).unwrap();
        nix::unistd::mkfifo(&from.path().join("fifo"), nix::sys::stat::Mode::S_IRWXO).unwrap();
        copy_readable(from.path(), to.path(), &[from.path().join("oauth")]).unwrap();
        let tree = Tree::open(to.path()).unwrap();
        let mut found = Vec::new();
        tree.walk(|path, _, _, stat| {
            found.push((path.display().to_string(), stat.st_mode & 0o777));
            Ok(())
        })
        .unwrap();
        found.retain(|(name, _)| to.path().join(name).is_file() || name == "link");
        found.sort();
        assert_eq!(found, [("link".into(), 0o777), ("passwd".into(), 0o644), ("ssl/certs/a.pem".into(), 0o755)]);
        assert!(!to.path().join("oauth").exists() && !to.path().join("ssl/private").exists());
    }
}
