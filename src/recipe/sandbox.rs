//! The namespaces that kiwi-ng runs in: a child process of this program makes them, and its own child is their first
//! process. Both ends of what they tell each other are in this file.
//!
//! ```text
//! ims-sshd build ── makes ──► child: mount, PID, IPC, UTS namespaces ── fork ──► init, process 1 ── kiwi-ng
//! ```
//!
//! Whatever ends one of them ends all that come after it, by the kernel: the parent's death signal, and the death of a
//! PID namespace with its first process. The mounts go with the namespace's last process. So nothing has to be cleaned
//! up by a program that might be killed itself.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sched::CloneFlags;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;
use serde::{Deserialize, Serialize};

use crate::error::{Advise, Attempt, Error, Result};
use crate::image::packer::inheritable;
use crate::jail::binfmt;
use crate::jail::init::unshare_with_users;
use crate::sys::architecture::Architecture;
use crate::sys::mounts::{self, Detached};
use crate::sys::poll;
use crate::sys::process::{Fork, children, end_with_us, exit_now, fork, reap};
use crate::sys::signals::{Signals, unblock_signals};
use crate::sys::tree::Tree;

/// First argument of the child.
const CHILD: &str = "build-as-child";

/// This program's own file.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// Directories of the machine that a package manager writes to. In the build each is an overlay in memory, which ends
/// with it: two builds do not share a lock or a cache, and the machine's own packages stay as they are.
pub(crate) const OVERLAID: [&str; 11] = [
    "/etc",
    "/tmp",
    "/usr/local/share/ca-certificates",
    "/usr/share/pki",
    "/var/cache",
    "/var/lib/apt",
    "/var/lib/ca-certificates",
    "/var/lib/dnf",
    "/var/lib/dpkg",
    "/var/log",
    "/var/tmp",
];

/// Directories below the one for the build's own files.
pub(crate) const STATE: &str = "state";
pub(crate) const CACHE: &str = "cache";

/// Where kiwi-ng has its cache, and binds it into the image root.
const KIWI_CACHE: &str = "/var/cache/kiwi";

/// Files of /etc that container engines mount one by one, so that an overlay does not show them.
const MOUNTED_FILES: [&str; 3] = ["hosts", "hostname", "resolv.conf"];

/// Places from which this machine's tools take further authorities, with these tools.
const AUTHORITIES: [(&str, &str); 3] = [
    ("/usr/local/share/ca-certificates", "update-ca-certificates"),
    ("/usr/share/pki/trust/anchors", "update-ca-certificates"),
    ("/etc/pki/ca-trust/source/anchors", "update-ca-trust"),
];

/// Search path of those tools: this process has no variables.
const SYSTEM_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Place of further authorities in an image root of Debian packages.
pub(crate) const DEBIAN_ANCHORS: &str = "usr/local/share/ca-certificates";

/// Device nodes in /dev of a build in a user namespace, where the machine's /dev cannot be bound further.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

/// Directory of programs of the build's own, first in its search path.
pub(crate) const PROGRAMS: &str = "bin";

/// What kiwi-ng calls to mount, in a user namespace: there a bind of a directory fails that has locked mounts below it,
/// and a bind of them all succeeds, which can be removed as a whole only.
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

/// Longest report of the child, in bytes.
const LONGEST_REPORT: u64 = 64 << 10;

/// Orders for the child.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    /// kiwi-ng and its arguments.
    pub(crate) command: Vec<String>,
    /// All of its variables.
    pub(crate) variables: Vec<(String, String)>,
    /// Directory for the build's own files.
    pub(crate) private: PathBuf,
    /// Directories that stay as they are, since the build writes to them or reads them: those above are not overlaid.
    pub(crate) kept: Vec<PathBuf>,
    /// Directories with credentials, which the build does not see.
    pub(crate) hidden: Vec<PathBuf>,
    /// Certificate of the site's authority, for the package manager's own downloads.
    pub(crate) authority: Option<PathBuf>,
    /// Architecture whose programs QEMU runs in this build only.
    pub(crate) emulated: Option<String>,
    /// Image root of Debian packages that gets the authority after kiwi-ng, which cannot put it there.
    pub(crate) trusts_later: Option<PathBuf>,
}

/// How the child ended.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
pub(crate) enum Ended {
    /// kiwi-ng ended with this exit code.
    Code(i32),
    /// A signal killed kiwi-ng.
    Signal(i32),
    /// The namespaces could not be made.
    Failed(String),
}

/// A build that runs.
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
        let mut child = Command::new(OWN_PROGRAM);
        child.args([CHILD, &told.as_raw_fd().to_string(), &report.as_raw_fd().to_string()]);
        child.stdin(Stdio::null()).stdout(input.try_clone().attempt(attempted)?).stderr(input).env_clear();
        // A Ctrl-C is for this program, which ends the build in order.
        child.process_group(0);
        let child = end_with_us(unblock_signals(&mut child)).spawn().attempt(attempted)?;
        Ok(Self { child, report, output: OwnedFd::from(output).into() })
    }

    /// The child, to wait for.
    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// How it ended; `None` if it was killed.
    pub(crate) fn report(&self) -> Option<Ended> {
        let mut text = vec![0; usize::try_from(LONGEST_REPORT).unwrap_or(0)];
        let length = self.report.read_at(&mut text, 0).ok()?;
        serde_json::from_slice(&text[..length]).ok()
    }

    /// Ends all of its processes, and returns when there are none.
    pub(crate) fn end(&mut self) {
        // The first process of the namespace: the kernel ends all others before its death is reported.
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

/// Runs the child, if that is what this process was started as. Returns its exit code.
pub fn run_as_child() -> Option<u8> {
    let mut words = std::env::args_os().skip(1);
    if words.next()? != CHILD {
        return None;
    }
    let (Some(told), Some(report), None) = (words.next(), words.next(), words.next()) else {
        eprintln!("started by 'ims-sshd build', not by hand; see ims-sshd --help");
        return Some(1);
    };
    let open = |number: OsString| File::options().read(true).write(true).open(Path::new("/proc/self/fd").join(number));
    let (Ok(mut told), Ok(report)) = (open(told), open(report)) else { return Some(1) };
    let mut text = Vec::new();
    let order = told
        .read_to_end(&mut text)
        .map_err(io::Error::other)
        .and_then(|_| serde_json::from_slice(&text).map_err(io::Error::other));
    // Inherited descriptors are the parent's: kiwi-ng gets none of them.
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

/// Makes the namespaces, and waits until their first process has ended, which reports how kiwi-ng did.
fn make(order: &Order, report: &File) -> Result<Option<Ended>> {
    let namespaces =
        CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    let attempted = || "make the build's namespaces";
    // The kernel's table of interpreters belongs to a user namespace (since Linux 6.7): one of the build's own leaves
    // nothing on the machine.
    let unshared =
        if order.emulated.is_some() { Err(nix::errno::Errno::EPERM) } else { nix::sched::unshare(namespaces) };
    let has_users = match unshared {
        Ok(()) => false,
        // Without CAP_SYS_ADMIN.
        Err(nix::errno::Errno::EPERM) => {
            unshare_with_users(namespaces | CloneFlags::CLONE_NEWUSER)
                .attempt(attempted)
                .advise("give the container CAP_SYS_ADMIN, or allow user namespaces on the node")?;
            true
        }
        Err(e) => return Err(Error::new(attempted()).because(e)),
    };
    mounts::make_all_private().attempt(|| "make the build's mounts private")?;
    // Read by the init: its end shows that this process has ended.
    let (alive, held) = io::pipe().attempt(attempted)?;
    match fork().attempt(|| "start the build's first process")? {
        Fork::Child => {
            drop(held);
            let ended = first_process(order, has_users, &alive.into()).unwrap_or_else(|e| Ended::Failed(e.to_string()));
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

/// Mounts what the build needs, runs kiwi-ng, and reaps what it leaves.
fn first_process(order: &Order, has_users: bool, alive: &OwnedFd) -> Result<Ended> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .attempt(|| "have the build end with its parent")?;
    // The parent may have ended before that took effect. Its number cannot be asked for: it is in another namespace.
    let mut source = [PollFd::new(alive, PollFlags::empty())];
    if poll::wait(&mut source, std::time::Duration::ZERO).attempt(|| "look for the parent")? > 0 {
        return Ok(Ended::Signal(libc::SIGKILL));
    }
    hide(&order.hidden)?;
    let emulated = order.emulated.as_deref().and_then(Architecture::from_name);
    // Registered as long as it lives.
    let _interpreter = emulated.map(|architecture| binfmt::provide(architecture, "build", true)).transpose()?;
    set_up(order, has_users)?;
    // An overlay shows what a directory has below the mounts in it, the covers among them.
    hide(&order.hidden)?;
    if let Some(authority) = &order.authority {
        trust(authority)?;
    }
    if has_users {
        // Root of the build must not uncover what is hidden: mounts are locked in a namespace of fewer rights.
        unshare_with_users(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)
            .attempt(|| "make the namespaces of kiwi-ng")?;
    }
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

/// Takes credentials out of sight. A mount of its own is removed, so that root in the build cannot uncover it; a plain
/// directory is covered.
fn hide(directories: &[PathBuf]) -> Result<()> {
    for directory in directories {
        let attempted = || format!("hide {} from the build", directory.display());
        let Ok(directory) = std::fs::canonicalize(directory) else { continue };
        let mountinfo = std::fs::read("/proc/self/mountinfo").attempt(attempted)?;
        let here: Vec<_> =
            mounts::mount_points(&mountinfo).into_iter().filter(|point| point.starts_with(&directory)).collect();
        for point in here.iter().rev() {
            // EINVAL: the mount came from a namespace of more rights, and can neither be removed nor uncovered here.
            let _ = mounts::unmount(point);
        }
        let is_empty = std::fs::read_dir(&directory).is_ok_and(|mut entries| entries.next().is_none());
        if directory.is_dir() && !is_empty {
            tmpfs(&directory, "size=4k,mode=0755").attempt(attempted)?;
        }
    }
    Ok(())
}

/// Mounts a new procfs, and an overlay in memory on each of [`OVERLAID`].
fn set_up(order: &Order, has_users: bool) -> Result<()> {
    let state = order.private.join(STATE);
    tmpfs(&state, "mode=0755").attempt(|| format!("mount a file system in memory on {}", state.display()))?;
    for (number, place) in OVERLAID.iter().enumerate() {
        let place = Path::new(place);
        let attempted = || format!("mount an overlay on {}", place.display());
        let is_plain = std::fs::symlink_metadata(place).is_ok_and(|found| found.is_dir());
        if !is_plain || order.kept.iter().any(|kept| kept.starts_with(place)) {
            continue;
        }
        if has_users && has_mounts_below(place).attempt(attempted)? {
            let copy = || copied(place, &state.join(number.to_string()));
            copy().attempt(|| format!("copy {} for the build", place.display()))?;
            continue;
        }
        let files = MOUNTED_FILES.map(|name| (name, std::fs::read(place.join(name)).ok()));
        overlay(place, &state.join(number.to_string()), has_users).attempt(attempted)?;
        if place == Path::new("/etc") {
            for (name, content) in files.into_iter().filter_map(|(name, content)| Some((name, content?))) {
                let file = place.join(name);
                if std::fs::read(&file).ok().as_ref() != Some(&content) {
                    let _ = std::fs::remove_file(&file);
                    std::fs::write(&file, content).attempt(|| format!("write {}", file.display()))?;
                }
            }
        }
    }
    // A memory of its own for the packages of one build, on the volume, since they are many.
    let bound = || {
        std::fs::create_dir_all(KIWI_CACHE)?;
        bind(&order.private.join(CACHE), Path::new(KIWI_CACHE))
    };
    if !order.kept.iter().any(|kept| kept.starts_with("/var/cache")) {
        bound().attempt(|| format!("mount the build's cache on {KIWI_CACHE}"))?;
    }
    let restricted =
        MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let procfs =
        Detached::filesystem("proc", &[], restricted).and_then(|proc| proc.attach(Tree::open(Path::new("/proc"))?));
    match procfs {
        // Parts of the container's /proc are masked, and a user namespace gets no other one (mount_too_revealing).
        Err(e) if has_users && Errno::from_io_error(&e) == Some(Errno::PERM) => {}
        other => drop(other.attempt(|| "mount the build's /proc")?),
    }
    if has_users {
        for (name, text) in MOUNT_PROGRAMS {
            let file = order.private.join(PROGRAMS).join(name);
            let written = std::fs::write(&file, text)
                .and_then(|()| std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)));
            written.attempt(|| format!("write {}", file.display()))?;
        }
        own_devices(&state).attempt(|| "mount the build's /dev and /sys")?;
    }
    Ok(())
}

fn tmpfs(place: &Path, options: &str) -> io::Result<()> {
    let options: Vec<_> = options.split(',').filter_map(|option| option.split_once('=')).collect();
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
    Detached::filesystem("tmpfs", &options, attributes)?.attach(Tree::open(place)?).map(drop)
}

fn bind(from: &Path, to: &Path) -> io::Result<()> {
    Detached::copy_of(from, false, MountAttrFlags::empty())?.attach(Tree::open(to)?).map(drop)
}

/// True if something is mounted below `place`: in a user namespace such mounts are locked, and an overlay above them
/// fails (`clone_private_mount` in the kernel).
fn has_mounts_below(place: &Path) -> io::Result<bool> {
    let mountinfo = std::fs::read("/proc/self/mountinfo")?;
    Ok(mounts::mount_points(&mountinfo).iter().any(|point| point.starts_with(place) && point != place))
}

/// Mounts a copy of `place` on it.
fn copied(place: &Path, copy: &Path) -> io::Result<()> {
    let mut tool = Command::new("cp");
    let output = unblock_signals(tool.arg("-aT").args([place, copy]).stdin(Stdio::null())).output()?;
    if !output.status.success() {
        return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    bind(copy, place)
}

fn overlay(place: &Path, state: &Path, has_users: bool) -> io::Result<()> {
    let [upper, work] = ["upper", "work"].map(|name| state.join(name));
    std::fs::create_dir_all(&upper)?;
    std::fs::create_dir(&work)?;
    // The root of an overlay has the mode of its upper directory.
    std::fs::set_permissions(&upper, std::fs::metadata(place)?.permissions())?;
    let [lower, upper, work] = [place, &upper, &work].map(|path| path.to_string_lossy().into_owned());
    let mut options = vec![("lowerdir", lower.as_str()), ("upperdir", &upper), ("workdir", &work)];
    if has_users {
        // In a user namespace, trusted.* attributes cannot be set.
        options.push(("userxattr", ""));
    }
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV;
    Detached::filesystem("overlay", &options, attributes)?.attach(Tree::open(place)?).map(drop)
}

/// A /dev and a /sys that kiwi-ng can bind into the image root: the mounts below the machine's own are locked in a user
/// namespace (mount_namespaces(7)), and a bind of a part that has such mounts fails.
fn own_devices(state: &Path) -> io::Result<()> {
    let made = state.join("dev");
    std::fs::create_dir(&made)?;
    Detached::filesystem("tmpfs", &[("mode", "0755")], MountAttrFlags::MOUNT_ATTR_NOSUID)?
        .attach(Tree::open(&made)?)?;
    for name in DEVICES {
        let (node, file) = (Path::new("/dev").join(name), made.join(name));
        if node.exists() {
            File::create(&file)?;
            let target = rustix::fs::open(
                &file,
                rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
                rustix::fs::Mode::empty(),
            )?;
            Detached::copy_of(&node, false, MountAttrFlags::empty())?.attach(target)?;
        }
    }
    for (target, name) in [("/proc/self/fd", "fd"), ("fd/0", "stdin"), ("fd/1", "stdout"), ("fd/2", "stderr")] {
        symlink(target, made.join(name))?;
    }
    for name in ["shm", "pts"] {
        std::fs::create_dir(made.join(name))?;
    }
    let dev = Detached::copy_of(&made, true, MountAttrFlags::empty())?;
    dev.attach(Tree::open(Path::new("/dev"))?)?;
    tmpfs(Path::new("/sys"), "mode=0555")
}

/// Adds the site's authority to an image root of Debian packages.
fn trust_in_image(root: &Path, authority: &Path) -> Result<()> {
    let attempted = || "add the site's authority to the image root";
    let tree = Tree::open(root).attempt(attempted)?;
    let content = std::fs::read(authority).attempt(attempted)?;
    tree.make_directories(DEBIAN_ANCHORS).attempt(attempted)?;
    tree.replace(Path::new(DEBIAN_ANCHORS).join("cray_certificate_authority.crt"), &content).attempt(attempted)?;
    let mut tool = Command::new("chroot");
    tool.arg(root).arg("update-ca-certificates").stdin(Stdio::null()).env_clear().env("PATH", SYSTEM_PATH);
    // An image without the tool is warned of later.
    let _ = unblock_signals(&mut tool).output();
    Ok(())
}

/// Tells that the package manager may refuse the site's servers, among the lines of kiwi-ng.
fn tell_untrusted(tool: &str, why: &str) {
    let _ = writeln!(
        io::stderr(),
        "the build's package manager may not trust the site's servers: cannot run {tool}: {why}"
    );
}

/// Adds the site's authority to those that the machine's programs trust, in the build only.
fn trust(authority: &Path) -> Result<()> {
    let there = AUTHORITIES.iter().find(|(place, _)| Path::new(place).is_dir());
    let Some((place, tool)) = there else { return Ok(()) };
    let attempted = || format!("add {} to the authorities of the build", authority.display());
    std::fs::copy(authority, Path::new(place).join("ims-sshd-site.crt")).attempt(attempted)?;
    // Its output is of no use to the reader of a build's log.
    let ran = unblock_signals(Command::new(tool).stdin(Stdio::null()).env("PATH", SYSTEM_PATH)).output();
    match ran {
        Ok(output) if output.status.success() => {}
        Ok(output) => tell_untrusted(tool, String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default()),
        Err(e) => tell_untrusted(tool, &e.to_string()),
    }
    Ok(())
}
