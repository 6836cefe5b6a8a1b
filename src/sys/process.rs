//! Starting processes, waiting for them, finding them in /proc, replacing this one.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::ffi::{CString, OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sched::CloneFlags;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, getpid};
use rustix::fs::{Mode, OFlags};
use rustix::process::{PidfdFlags, Resource, Rlimit, getrlimit, setrlimit};

use crate::sys::poll;

/// The two sides of a fork.
pub(crate) enum Fork {
    /// This is the new process.
    Child,
    /// This is the parent; the child's ID is the one in this process's PID namespace.
    Parent(Pid),
}

/// Forks. Only for `ims-jail-shell`, which is single-threaded: a lock held by another thread would stay locked for ever
/// in the child.
pub(crate) fn fork() -> io::Result<Fork> {
    // SAFETY: the caller is single-threaded (see above), so the only thread survives in the child: no lock is held by
    // another thread, and the allocator's state is consistent.
    #[allow(unsafe_code)]
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Child => Ok(Fork::Child),
        ForkResult::Parent { child } => Ok(Fork::Parent(child)),
    }
}

/// Runs `child` in a new process, which exits with the code that `child` returns. Returns the process ID once the new
/// process has exited or called execve. Until then both processes share memory, as with vfork(2), which saves copying
/// page tables. Only for `ims-jail-shell`, like [`fork`].
pub(crate) fn spawn(child: impl FnOnce() -> u8) -> io::Result<Pid> {
    /// Size in bytes, ample for a child that soon calls execve. The kernel allocates only the pages used.
    const STACK: usize = 256 << 10;
    let mut child = Some(child);
    let run = Box::new(|| child.take().map_or(0, |child| isize::from(child())));
    let flags = CloneFlags::CLONE_VM | CloneFlags::CLONE_VFORK;
    // SAFETY: this process has one thread (see `fork`), and CLONE_VFORK suspends it until the child stops using the
    // shared memory. The child therefore finds locks and allocator as this thread left them, and this thread sees its
    // changes. The child runs on a stack of its own, so it does not overwrite frames in use.
    #[allow(unsafe_code)]
    let child = unsafe { nix::sched::clone(run, &mut vec![0; STACK], flags, Some(libc::SIGCHLD)) };
    child.map_err(Into::into)
}

/// Exits at once, without running destructors or atexit handlers.
pub fn exit_now(code: u8) -> ! {
    // SAFETY: _exit does not return, and touches no memory of this process.
    #[allow(unsafe_code)]
    unsafe {
        libc::_exit(i32::from(code))
    }
}

/// Marks every descriptor from `first` up close-on-exec, including inherited ones.
pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
    let flags = i32::try_from(libc::CLOSE_RANGE_CLOEXEC).map_err(io::Error::other)?;
    // SAFETY: the flag only marks descriptors; none is closed while a value owns it.
    #[allow(unsafe_code)]
    let result = unsafe { libc::close_range(first, u32::MAX, flags) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Closes every descriptor from 3 up. Only for a program that has just started and has opened nothing itself.
pub(crate) fn close_all_but_streams() -> io::Result<()> {
    // SAFETY: the caller has opened nothing yet, so no value in this process owns any of these descriptors.
    #[allow(unsafe_code)]
    let result = unsafe { libc::close_range(3, u32::MAX, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// File of this program, which is the open one even if its path leads to another by now.
pub(crate) const OWN_PROGRAM: &str = "/proc/self/exe";

/// Maximum duration of one [`reap`]. A fork bomb's orphans may end faster than they can be reaped, so that a `reap`
/// without this limit would never return.
const TIME_TO_REAP: Duration = Duration::from_millis(50);

/// Reaps ended children, ours or adopted, and returns their statuses. If there may be more, SIGCHLD is raised again.
pub(crate) fn reap() -> Vec<WaitStatus> {
    let mut ended = Vec::new();
    let began = Instant::now();
    while began.elapsed() < TIME_TO_REAP {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return ended,
            Ok(status) => ended.push(status),
            Err(_) => {}
        }
    }
    // Raise SIGCHLD again. Signals of the same number do not queue, so no other signal may come for the children that
    // are still to be reaped.
    let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), Signal::SIGCHLD);
    ended
}

/// Ends this process as another one ended: with its exit code, or by raising the same signal, without a core dump. sshd
/// reports a death by signal to the client only if the forced command itself dies of it.
pub(crate) fn end_like(status: WaitStatus) -> u8 {
    match status {
        WaitStatus::Exited(_, code) => u8::try_from(code & 0xff).unwrap_or(u8::MAX),
        WaitStatus::Signaled(_, signal, _) => die_of(signal),
        _ => 1,
    }
}

fn die_of(signal: Signal) -> u8 {
    // A process that is not dumpable writes no core file, whatever the limits say.
    let _ = nix::sys::prctl::set_dumpable(false);
    let _ = crate::sys::signals::default_disposition(signal);
    let _ = nix::sys::signal::SigSet::all().thread_unblock();
    let _ = nix::sys::signal::raise(signal);
    // Reached only if the signal does not kill; the code is what a shell would return.
    128_u8.wrapping_add(u8::try_from(signal as i32).unwrap_or(0))
}

/// Identifies a process even if its ID is reused later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// PID of the process.
    pub pid: i32,
    /// Start of the process, in clock ticks after boot (/proc/PID/stat field 22).
    pub(crate) start: u64,
}

impl Identity {
    /// Identity of process `pid`, which must not be reaped before this function returns: this process, or a child not
    /// yet waited for.
    pub fn of(pid: Pid) -> Option<Self> {
        Entry::read(pid).map(|entry| Self { pid: pid.as_raw(), start: entry.start })
    }

    /// Parses the output of [`fmt::Display`].
    pub fn parse(text: &str) -> Option<Self> {
        let (pid, start) = text.trim_end().split_once(' ')?;
        Some(Self { pid: pid.parse().ok()?, start: start.parse().ok()? })
    }

    /// Reopens these descriptors of the process. ESRCH if it has ended; EACCES if this process may not inspect it
    /// (PTRACE_MODE_READ in ptrace(2): root may inspect root's processes with no more capabilities than its own).
    pub(crate) fn open_descriptors(self, numbers: &[i32]) -> io::Result<Vec<OwnedFd>> {
        let path = format!("/proc/{}", self.pid);
        let process = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let open = |name: &str| rustix::fs::openat(&process, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        match Entry::from_stat(open("stat")?.into()) {
            Some(entry) if entry.start == self.start => {}
            _ => return Err(rustix::io::Errno::SRCH.into()),
        }
        numbers.iter().map(|number| open(&format!("fd/{number}")).map_err(Into::into)).collect()
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.pid, self.start)
    }
}

/// A pidfd, which keeps referring to the same process even if the ID is reused.
#[derive(Debug)]
pub struct Handle {
    /// The pidfd; readable once the process has ended.
    pub fd: OwnedFd,
    /// PID of the process.
    pub(crate) pid: Pid,
}

impl Handle {
    /// Opens the process. ESRCH if it has ended; any other error says nothing about that.
    pub fn open(process: Identity) -> io::Result<Self> {
        let raw = rustix::process::Pid::from_raw(process.pid).ok_or(io::ErrorKind::InvalidInput)?;
        let fd = rustix::process::pidfd_open(raw, PidfdFlags::empty())?;
        let pid = Pid::from_raw(process.pid);
        // Read the start time after opening the pidfd: if the ID was reused before that, the start time differs.
        let entry = match File::open(format!("/proc/{pid}/stat")) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            stat => stat.ok().and_then(Entry::from_stat),
        };
        match entry {
            Some(entry) if entry.start == process.start && !entry.has_ended() => Ok(Self { fd, pid }),
            _ => Err(rustix::io::Errno::SRCH.into()),
        }
    }

    /// Returns whether the process has ended or ends within `limit`.
    pub fn ends_within(&self, limit: Duration) -> bool {
        use rustix::event::{PollFd, PollFlags};
        poll::wait(&mut [PollFd::new(&self.fd, PollFlags::IN)], limit).is_ok_and(|ready| ready > 0)
    }

    /// Sends the process a signal, and never a later process with the same ID; ESRCH if the process has ended.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let signal = rustix::process::Signal::from_named_raw(signal as i32).ok_or(io::ErrorKind::InvalidInput)?;
        rustix::process::pidfd_send_signal(&self.fd, signal).map_err(Into::into)
    }
}

/// Has the kernel kill `command`'s process when this thread ends, however it ends. A writer to a volume must not
/// outlive the process that reads its result.
pub(crate) fn end_with_us(command: &mut Command) -> &mut Command {
    signal_after_us(command, rustix::process::Signal::KILL)
}

/// Has the kernel ask `command`'s process to end, by SIGTERM, when this thread ends, however it ends.
pub fn terminate_after_us(command: &mut Command) -> &mut Command {
    signal_after_us(command, rustix::process::Signal::TERM)
}

fn signal_after_us(command: &mut Command, signal: rustix::process::Signal) -> &mut Command {
    let parent = getpid();
    let bound = move || {
        rustix::process::set_parent_process_death_signal(Some(signal))?;
        // The parent may have ended before prctl took effect.
        if nix::unistd::getppid() == parent { Ok(()) } else { Err(io::ErrorKind::Interrupted.into()) }
    };
    // SAFETY: between fork and exec only prctl and getppid run; neither allocates nor takes a lock.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(bound)
    }
}

/// Starts `command` with these limits, each capped at this process's own hard limit.
pub(crate) fn limited<const N: usize>(command: &mut Command, limits: [(Resource, u64); N]) -> &mut Command {
    let limits = limits.map(|(resource, most)| {
        let most = Some(getrlimit(resource).maximum.map_or(most, |maximum| maximum.min(most)));
        (resource, Rlimit { current: most, maximum: most })
    });
    let lower = move || limits.iter().try_for_each(|(resource, limit)| Ok(setrlimit(*resource, *limit)?));
    // SAFETY: between fork and exec only setrlimit runs, on values computed before; it neither allocates nor takes a
    // lock.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(lower)
    }
}

/// Output of a child with piped output, once it has ended; `None` if it was still running after `limit` and was killed.
pub fn output_within(child: Child, limit: Duration) -> io::Result<Option<Output>> {
    let identity = Identity::of(Pid::from_raw(child.id().cast_signed())).ok_or(io::ErrorKind::NotFound)?;
    std::thread::scope(|scope| {
        let is_late = scope.spawn(move || {
            // Opening fails if the child has already ended; then it is not late.
            let late = Handle::open(identity).ok().filter(|handle| !handle.ends_within(limit));
            late.is_some_and(|handle| handle.signal(Signal::SIGKILL).is_ok())
        });
        let output = child.wait_with_output()?;
        Ok((!is_late.join().unwrap_or(false)).then_some(output))
    })
}

/// Flag of a process that is exiting (the kernel's `PF_EXITING`).
const EXITING: i64 = 4;
/// Bit of SIGKILL in a set of signals in /proc/PID/status (proc_pid_status(5)).
const KILL: u64 = 1 << (libc::SIGKILL - 1);

/// Fields of /proc/PID/stat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// PID.
    pub pid: Pid,
    /// PID of the parent.
    pub parent: Pid,
    /// Short name (`comm`), at most 15 bytes.
    pub name: String,
    /// State letter; `Z` for a zombie.
    pub state: char,
    /// The kernel's flags (`PF_*` in its include/linux/sched.h).
    flags: i64,
    /// Process group ID.
    pub(crate) group: Pid,
    /// Session ID.
    pub(crate) session: Pid,
    /// Device number of the controlling terminal, 0 for none.
    pub(crate) terminal: u64,
    /// Start of the process, in clock ticks after boot.
    pub(crate) start: u64,
    /// Number of threads.
    pub(crate) threads: u64,
    /// Minor page faults of reaped children; grows with each child that is reaped.
    pub(crate) faults_of_children: u64,
}

impl Entry {
    /// Reads /proc/PID/stat; `None` if the process does not exist.
    pub fn read(pid: Pid) -> Option<Self> {
        Self::from_stat(File::open(format!("/proc/{pid}/stat")).ok()?)
    }

    fn from_stat(mut stat: File) -> Option<Self> {
        // procfs returns the whole line, at most 52 numbers, to the first read that has room for it.
        let mut line = [0; 2048];
        let length = stat.read(&mut line).ok()?;
        Self::parse(&line[..length])
    }

    /// PID and start time.
    pub(crate) fn identity(&self) -> Identity {
        Identity { pid: self.pid.as_raw(), start: self.start }
    }

    /// Parses a line in the format of proc(5): the name is in parentheses and may contain any byte, so the last `)`
    /// ends it.
    fn parse(stat: &[u8]) -> Option<Self> {
        let open = stat.iter().position(|&b| b == b'(')?;
        let close = stat.iter().rposition(|&b| b == b')')?;
        let pid = std::str::from_utf8(&stat[..open]).ok()?.trim().parse().ok()?;
        let rest: Vec<&str> = std::str::from_utf8(stat.get(close + 1..)?).ok()?.split_whitespace().collect();
        let number = |at: usize| rest.get(at)?.parse::<i64>().ok();
        Some(Self {
            pid: Pid::from_raw(pid),
            name: String::from_utf8_lossy(stat.get(open + 1..close)?).into_owned(),
            state: rest.first()?.chars().next()?,
            parent: Pid::from_raw(i32::try_from(number(1)?).ok()?),
            group: Pid::from_raw(i32::try_from(number(2)?).ok()?),
            session: Pid::from_raw(i32::try_from(number(3)?).ok()?),
            terminal: number(4)?.cast_unsigned() & 0xffff_ffff,
            flags: number(6)?,
            start: rest.get(19)?.parse().ok()?,
            threads: rest.get(17)?.parse().ok()?,
            faults_of_children: rest.get(8)?.parse().ok()?,
        })
    }

    /// True for a zombie. If only the process's first thread has ended, the state is `Z` too, but the process still
    /// runs.
    pub(crate) fn has_ended(&self) -> bool {
        self.state == 'Z' && self.threads <= 1
    }

    /// True if a thread of the process is in uninterruptible sleep (state `D`), for example waiting for a device.
    pub(crate) fn is_stuck(&self) -> bool {
        let threads = || numbers(Path::new(&format!("/proc/{}/task", self.pid)));
        let stat = |thread| File::open(format!("/proc/{}/task/{thread}/stat", self.pid)).ok();
        let is_stuck = |thread| stat(thread).and_then(Self::from_stat).is_some_and(|thread| thread.state == 'D');
        self.state == 'D' || self.threads > 1 && threads().any(is_stuck)
    }

    /// True if the process is exiting, or has a pending SIGKILL.
    pub(crate) fn is_dying(&self) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let pending = status.lines().filter_map(|line| line.strip_prefix("SigPnd:").or(line.strip_prefix("ShdPnd:")));
        let is_killed = |set: &str| u64::from_str_radix(set.trim(), 16).is_ok_and(|set| set & KILL != 0);
        self.flags & EXITING != 0 || pending.into_iter().any(is_killed)
    }

    /// All processes visible to this one.
    pub fn all() -> Vec<Self> {
        numbers(Path::new("/proc")).filter_map(Self::read).collect()
    }

    /// Path of the controlling terminal if that is a pty.
    pub(crate) fn terminal_path(&self) -> Option<PathBuf> {
        // The kernel's dev_t encoding: minor in bits 0-7 and 20-31, major in bits 8-19; ptys have majors 136 to 143.
        let major = (self.terminal >> 8) & 0xfff;
        let minor = (self.terminal & 0xff) | ((self.terminal >> 12) & 0xfff00);
        (136..=143).contains(&major).then(|| PathBuf::from(format!("/dev/pts/{}", (major - 136) * 256 + minor)))
    }

    /// Sends the process a signal unless it has ended.
    pub fn signal(&self, signal: Signal) {
        let _ = Handle::open(self.identity()).and_then(|handle| handle.signal(signal));
    }

    /// True if the process was started as a login shell without a command: a single argument that begins with a dash
    /// (login(1)).
    pub(crate) fn is_login_shell(&self) -> bool {
        let line = std::fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        line.starts_with(b"-") && line.iter().position(|&b| b == 0) == Some(line.len() - 1)
    }

    /// Command line of the process, or its short name in brackets if the command line is empty. May contain secrets and
    /// control characters.
    pub fn command_line(&self) -> String {
        let raw = std::fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        let words: Vec<_> = raw.split(|&b| b == 0).filter(|w| !w.is_empty()).map(String::from_utf8_lossy).collect();
        match words.as_slice() {
            [] => format!("[{}]", self.name),
            // A title that the process has set itself.
            [title] => title.clone().into_owned(),
            words => shell_words::join(words),
        }
    }
}

/// Returns a process other than this one that has its root or working directory in `directory`; `directory` must be a
/// path without links. Waits up to `limit` for the end of processes that a killed run of this program has left behind:
/// those that are dying, and those whose short names are in `programs`. Calls `waiting` before it waits.
pub(crate) fn inside(
    directory: &Path,
    programs: &[&str],
    limit: Duration,
    mut waiting: impl FnMut(&Entry),
) -> Option<Entry> {
    let began = Instant::now();
    let is_inside = |entry: &Entry| {
        let link = |name: &str| std::fs::read_link(format!("/proc/{}/{name}", entry.pid)).ok();
        entry.pid != getpid() && ["cwd", "root"].into_iter().filter_map(link).any(|path| path.starts_with(directory))
    };
    loop {
        let mut inside: Vec<_> = Entry::all().into_iter().filter(is_inside).collect();
        let is_left = |entry: &Entry| programs.contains(&&*entry.name) || entry.is_dying();
        if let Some(other) = inside.iter().position(|entry| !is_left(entry)) {
            return Some(inside.swap_remove(other));
        }
        let entry = inside.pop()?;
        waiting(&entry);
        match Handle::open(entry.identity()) {
            Ok(handle) if handle.ends_within(limit.saturating_sub(began.elapsed())) => {}
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
            _ => return Some(entry),
        }
    }
}

/// PIDs or thread IDs: the numeric names in a directory of /proc.
pub(crate) fn numbers(directory: &Path) -> impl Iterator<Item = Pid> + use<> {
    let entries = std::fs::read_dir(directory).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).map(Pid::from_raw)
}

/// Children of process `parent`, from the kernel's `children` lists, at a cost independent of the machine's other
/// processes. As a subreaper or PID 1, this process has no descendants if it has no children.
pub(crate) fn children(parent: Pid) -> Vec<Pid> {
    let list = |thread: Pid| std::fs::read_to_string(format!("/proc/{parent}/task/{thread}/children"));
    if parent == getpid() && list(parent).is_err() {
        // A kernel without CONFIG_PROC_CHILDREN.
        return Entry::all().iter().filter(|e| e.parent == parent).map(|e| e.pid).collect();
    }
    let lists = numbers(Path::new(&format!("/proc/{parent}/task"))).filter_map(|thread| list(thread).ok());
    lists
        .flat_map(|list| list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .map(Pid::from_raw)
        .collect()
}

/// Calls `visit` for each descendant of this process, after the descendant's own children have been listed, until
/// `visit` breaks. A process whose parent ends during the visit may be missed. This process (a subreaper or PID 1) has
/// then adopted it, so the next visit finds it.
pub(crate) fn visit_descendants(visit: &mut dyn FnMut(&Entry) -> ControlFlow<()>) {
    let mut found = children(getpid());
    while let Some(pid) = found.pop() {
        found.extend(children(pid));
        if Entry::read(pid).is_some_and(|entry| visit(&entry).is_break()) {
            return;
        }
    }
}

/// Entries of `all` that descend from `ancestor`, nearest first.
pub fn descendants(all: &[Entry], ancestor: Pid) -> Vec<Entry> {
    let mut of_parent: HashMap<Pid, Vec<&Entry>> = HashMap::new();
    for entry in all.iter().filter(|e| e.pid != ancestor) {
        of_parent.entry(entry.parent).or_default().push(entry);
    }
    let mut found: Vec<Entry> = Vec::new();
    let mut parents = VecDeque::from([ancestor]);
    while let Some(parent) = parents.pop_front() {
        for entry in of_parent.remove(&parent).unwrap_or_default() {
            parents.push_back(entry.pid);
            found.push(entry.clone());
        }
    }
    found
}

/// While this value lives, the OOM killer prefers new children to this process: their score rises by half of the memory
/// (proc_pid_oom_score_adj(5)). A smaller share may not suffice: a tenth of 200 MB is less than what this process maps.
#[derive(Debug)]
pub(crate) struct Expendable {
    before: Option<i32>,
}

impl Expendable {
    const FILE: &str = "/proc/self/oom_score_adj";

    /// Raises the score of children that are started from now on, until the value is dropped. Does nothing if this
    /// process may not set the score.
    pub(crate) fn children() -> Self {
        let before: Option<i32> = std::fs::read_to_string(Self::FILE).ok().and_then(|text| text.trim().parse().ok());
        let set = |own: &i32| std::fs::write(Self::FILE, (own + 500).min(1000).to_string()).is_ok();
        Self { before: before.filter(set) }
    }
}

impl Drop for Expendable {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            let _ = std::fs::write(Self::FILE, before.to_string());
        }
    }
}

/// Everything execve(2) takes.
#[derive(Debug)]
pub(crate) struct Exec {
    path: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Exec {
    /// Fails with EINVAL if a string contains a NUL byte.
    pub(crate) fn new<'a>(
        path: &Path,
        arguments: &[OsString],
        environment: impl IntoIterator<Item = (&'a OsStr, &'a OsStr)>,
    ) -> nix::Result<Self> {
        let c_string = |bytes: &[u8]| CString::new(bytes).map_err(|_| nix::errno::Errno::EINVAL);
        let pair = |(name, value): (&OsStr, &OsStr)| c_string(&[name.as_bytes(), b"=", value.as_bytes()].concat());
        Ok(Self {
            path: c_string(path.as_os_str().as_bytes())?,
            arguments: arguments.iter().map(|a| c_string(a.as_bytes())).collect::<nix::Result<_>>()?,
            environment: environment.into_iter().map(pair).collect::<nix::Result<_>>()?,
        })
    }

    /// Calls execve(2). Returns only on failure.
    pub(crate) fn replace_this_process(&self) -> nix::Result<Infallible> {
        nix::unistd::execve(&self.path, &self.arguments, &self.environment)
    }

    /// Executes the open file `program` with these arguments and variables; ignores `path` (execveat(2)). Returns only
    /// on failure.
    pub(crate) fn replace_this_process_by(&self, program: impl AsFd) -> nix::Result<Infallible> {
        nix::unistd::execveat(program, c"", &self.arguments, &self.environment, AtFlags::AT_EMPTY_PATH)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_name_may_contain_parentheses_and_spaces() {
        let line = b"17 (a) S 1 (b) R 5 6 7 34817 8 0 0 0 0 0 0 0 0 0 20 0 1 0 4711 0 0";
        let entry = Entry::parse(line).unwrap();
        assert_eq!((entry.name.as_str(), entry.parent.as_raw(), entry.start), ("a) S 1 (b", 5, 4711));
        assert_eq!(entry.terminal_path(), Some(PathBuf::from("/dev/pts/1")));
        assert_eq!(Entry::parse(b"17 (a"), None);
        let ended = Entry { state: 'Z', ..entry };
        assert!(ended.has_ended() && !Entry { threads: 3, ..ended }.has_ended());
    }

    #[test]
    fn handle_is_refused_when_the_process_id_was_reused() {
        let me = nix::unistd::getpid();
        let this = Identity::of(me).unwrap();
        assert_eq!(Identity::parse(&this.to_string()), Some(this));
        let later = Identity { start: this.start + 1, ..this };
        assert_eq!(Handle::open(this).unwrap().pid, me);
        assert_eq!(Handle::open(later).unwrap_err().raw_os_error(), Some(libc::ESRCH));
        assert_eq!(this.open_descriptors(&[0, 1]).unwrap().len(), 2);
        assert_eq!(later.open_descriptors(&[0]).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }

    #[test]
    fn process_that_cannot_be_looked_at_has_not_ended() {
        const CHILD: &str = "IMS_SSHD_TEST_FEW_DESCRIPTORS";
        if std::env::var_os(CHILD).is_none() {
            // The limit holds for all threads, so set it in a process of its own.
            let name = "sys::process::tests::process_that_cannot_be_looked_at_has_not_ended";
            let mut child = Command::new(std::env::current_exe().unwrap());
            let output = child.args(["--exact", name]).env(CHILD, "1").output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
            return;
        }
        let this = Identity::of(getpid()).unwrap();
        setrlimit(Resource::Nofile, Rlimit { current: Some(64), maximum: Some(64) }).unwrap();
        let mut open: Vec<_> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
        // The pidfd takes the last one.
        open.pop();
        assert_eq!(Handle::open(this).unwrap_err().raw_os_error(), Some(libc::EMFILE));
    }

    #[test]
    fn descendant_is_found_while_its_parent_ends() {
        use std::process::{Command, Stdio};
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        for _ in 0..300 {
            let mut shell = Command::new("sh");
            shell.args(["-c", "sleep 60 & echo $!; read line"]).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut shell = shell.spawn().unwrap();
            let mut line = [0; 16];
            let length = shell.stdout.take().unwrap().read(&mut line).unwrap();
            let child = Pid::from_raw(std::str::from_utf8(&line[..length]).unwrap().trim().parse().unwrap());
            drop(shell.stdin.take());
            // The first pass finds the child or, if the child's parent ended during that pass, the second.
            let mut found = false;
            for _ in 0..2 {
                visit_descendants(&mut |entry| {
                    found |= entry.pid == child;
                    ControlFlow::Continue(())
                });
            }
            shell.wait().unwrap();
            nix::sys::signal::kill(child, Signal::SIGKILL).unwrap();
            nix::sys::wait::waitpid(child, None).unwrap();
            assert!(found, "process {child} was missed");
        }
    }

    #[test]
    fn descendants_are_found_through_generations() {
        let entry = |pid, parent| Entry {
            pid: Pid::from_raw(pid),
            parent: Pid::from_raw(parent),
            name: String::new(),
            state: 'S',
            group: Pid::from_raw(1),
            session: Pid::from_raw(1),
            terminal: 0,
            start: 0,
            threads: 1,
            faults_of_children: 0,
            flags: 0,
        };
        let all = [entry(1, 0), entry(2, 1), entry(3, 2), entry(4, 0), entry(5, 4)];
        let found: Vec<_> = descendants(&all, Pid::from_raw(1)).iter().map(|e| e.pid.as_raw()).collect();
        assert_eq!(found, [2, 3]);
    }
}
