//! Processes: forked, waited for, found in /proc, and left.

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
use std::time::Duration;

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
pub enum Fork {
    /// This is the new process.
    Child,
    /// This is the old one; the new one's number, in this process's PID namespace.
    Parent(Pid),
}

/// Forks. For `ims-jail-shell` alone, which never starts a thread: a lock held by another thread would stay locked for ever in
/// the child.
pub fn fork() -> io::Result<Fork> {
    // SAFETY: the caller is single-threaded (see above), so the child, which has the only thread, owns every lock and the
    // allocator's state is consistent.
    #[allow(unsafe_code)]
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Child => Ok(Fork::Child),
        ForkResult::Parent { child } => Ok(Fork::Parent(child)),
    }
}

/// Runs `child` in a new process, which ends with the exit code that it returns, and returns that process's number once it has ended or
/// has become another program. Until then the two share their memory, so that none of it has to be copied, as with vfork(2).
/// For `ims-jail-shell` alone, as [`fork`] is.
pub fn spawn(child: impl FnOnce() -> u8) -> io::Result<Pid> {
    /// Bytes; far more than a child needs that soon becomes another program. The kernel provides the pages that are used.
    const STACK: usize = 256 << 10;
    let mut child = Some(child);
    let run = Box::new(|| child.take().map_or(0, |child| isize::from(child())));
    let flags = CloneFlags::CLONE_VM | CloneFlags::CLONE_VFORK;
    // SAFETY: this process has one thread (see `fork`), which the kernel halts until the child is done with the memory that they share:
    // the child finds every lock and the allocator as it would find them in this thread, and what it changes, this one finds changed.
    // It has a stack of its own, so it does not return into frames that are in use.
    #[allow(unsafe_code)]
    let child = unsafe { nix::sched::clone(run, &mut vec![0; STACK], flags, Some(libc::SIGCHLD)) };
    child.map_err(Into::into)
}

/// Ends this process at once, without running anything of Rust's or libc's on the way.
pub fn exit_now(code: u8) -> ! {
    // SAFETY: _exit does not return, and touches nothing of this process's memory.
    #[allow(unsafe_code)]
    unsafe {
        libc::_exit(i32::from(code))
    }
}

/// Marks every descriptor from `first` on close-on-exec, including those that another program left open.
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    let flags = i32::try_from(libc::CLOSE_RANGE_CLOEXEC).map_err(io::Error::other)?;
    // SAFETY: the flag only marks descriptors; none is closed under an owner's feet.
    #[allow(unsafe_code)]
    let result = unsafe { libc::close_range(first, u32::MAX, flags) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Closes every descriptor from 3 on. For a program that has just started and has opened nothing itself.
pub fn close_all_but_streams() -> io::Result<()> {
    // SAFETY: the caller has opened nothing yet, so no value of this process owns any of these descriptors.
    #[allow(unsafe_code)]
    let result = unsafe { libc::close_range(3, u32::MAX, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Waits for every child that has ended, ours or inherited. Returns how each did.
pub fn reap() -> Vec<WaitStatus> {
    let mut ended = Vec::new();
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return ended,
            Ok(status) => ended.push(status),
            Err(_) => {}
        }
    }
}

/// Ends this process as another one ended: with its exit code, or dying of the same signal, without a core dump of our own.
/// sshd reports a death by signal to the client only if the forced command itself dies of it.
pub fn end_like(status: WaitStatus) -> u8 {
    match status {
        WaitStatus::Exited(_, code) => u8::try_from(code & 0xff).unwrap_or(u8::MAX),
        WaitStatus::Signaled(_, signal, _) => die_of(signal),
        _ => 1,
    }
}

fn die_of(signal: Signal) -> u8 {
    // Not dumpable means no core file, whatever the limits say.
    let _ = nix::sys::prctl::set_dumpable(false);
    let _ = crate::sys::signals::default_disposition(signal);
    let _ = nix::sys::signal::SigSet::all().thread_unblock();
    let _ = nix::sys::signal::raise(signal);
    // Only for a signal that does not kill: what a shell would say.
    128_u8.wrapping_add(u8::try_from(signal as i32).unwrap_or(0))
}

/// Which process is meant, in a way that no later one of the same number fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks after boot (/proc/PID/stat field 22).
    pub start: u64,
}

impl Identity {
    /// Process `pid`, which must not be able to end meanwhile: this one, or a child that was not waited for.
    pub fn of(pid: Pid) -> Option<Self> {
        Entry::read(pid).map(|entry| Self { pid: pid.as_raw(), start: entry.start })
    }

    /// Reads what was written with [`fmt::Display`].
    pub fn parse(text: &str) -> Option<Self> {
        let (pid, start) = text.trim_end().split_once(' ')?;
        Some(Self { pid: pid.parse().ok()?, start: start.parse().ok()? })
    }

    /// Opens anew what the process has open under these numbers. ESRCH if it has ended; EACCES if this one may not look at it
    /// (ptrace(2), PTRACE_MODE_READ), as root may at root's that have no more capabilities.
    pub fn open_descriptors(self, numbers: &[i32]) -> io::Result<Vec<OwnedFd>> {
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

/// A process that is still the one that was meant: a descriptor that no later process of the same number can take over.
#[derive(Debug)]
pub struct Handle {
    /// The process's descriptor (pidfd), readable when it has ended.
    pub fd: OwnedFd,
    /// Its number.
    pub pid: Pid,
}

impl Handle {
    /// Opens the process. ESRCH if it has ended.
    pub fn open(process: Identity) -> io::Result<Self> {
        let raw = rustix::process::Pid::from_raw(process.pid).ok_or(io::ErrorKind::InvalidInput)?;
        let fd = rustix::process::pidfd_open(raw, PidfdFlags::empty())?;
        let pid = Pid::from_raw(process.pid);
        // Read after the descriptor was opened: if the number had changed hands before, the time tells.
        match Entry::read(pid) {
            Some(entry) if entry.start == process.start && !entry.has_ended() => Ok(Self { fd, pid }),
            _ => Err(rustix::io::Errno::SRCH.into()),
        }
    }

    /// Whether it has ended, or does within `limit`.
    pub fn ends_within(&self, limit: Duration) -> bool {
        use rustix::event::{PollFd, PollFlags};
        poll::wait(&mut [PollFd::new(&self.fd, PollFlags::IN)], limit).is_ok_and(|ready| ready > 0)
    }

    /// Sends it a signal; ESRCH if it has ended, never another process's.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let signal = rustix::process::Signal::from_named_raw(signal as i32).ok_or(io::ErrorKind::InvalidInput)?;
        rustix::process::pidfd_send_signal(&self.fd, signal).map_err(Into::into)
    }
}

/// Has the kernel kill what `command` starts when this thread ends, however it ends. What writes to a volume must not go on after those who
/// would read the result.
pub fn end_with_us(command: &mut Command) -> &mut Command {
    let parent = getpid();
    let bound = move || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        // The parent may have ended before the kernel was told.
        if nix::unistd::getppid() == parent { Ok(()) } else { Err(io::ErrorKind::Interrupted.into()) }
    };
    // SAFETY: between fork and exec two system calls run, prctl and getppid; neither allocates nor takes a lock.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(bound)
    }
}

/// Has `command` begin with these limits, each at most what this process has.
pub fn limited<const N: usize>(command: &mut Command, limits: [(Resource, u64); N]) -> &mut Command {
    let limits = limits.map(|(resource, most)| {
        let most = Some(getrlimit(resource).maximum.map_or(most, |maximum| maximum.min(most)));
        (resource, Rlimit { current: most, maximum: most })
    });
    let lower = move || limits.iter().try_for_each(|(resource, limit)| Ok(setrlimit(*resource, *limit)?));
    // SAFETY: between fork and exec prlimit runs, once a limit, on values that were made before; it neither allocates nor takes a lock.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(lower)
    }
}

/// What a child whose output is piped has printed once it has ended; `None` if it did not within `limit`, and was killed.
pub fn output_within(child: Child, limit: Duration) -> io::Result<Option<Output>> {
    let identity = Identity::of(Pid::from_raw(child.id().cast_signed())).ok_or(io::ErrorKind::NotFound)?;
    std::thread::scope(|scope| {
        let is_late = scope.spawn(move || {
            // One that has ended already cannot be opened.
            let late = Handle::open(identity).ok().filter(|handle| !handle.ends_within(limit));
            late.is_some_and(|handle| handle.signal(Signal::SIGKILL).is_ok())
        });
        let output = child.wait_with_output()?;
        Ok((!is_late.join().unwrap_or(false)).then_some(output))
    })
}

/// What /proc tells of one process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its number.
    pub pid: Pid,
    /// Its parent's.
    pub parent: Pid,
    /// The kernel's short name of its program, at most 15 bytes.
    pub name: String,
    /// Its state letter: `Z` for one that has ended and was not waited for.
    pub state: char,
    /// Its process group's number.
    pub group: Pid,
    /// Its session's number.
    pub session: Pid,
    /// Its controlling terminal as a device number, 0 for none.
    pub terminal: u64,
    /// When it started, in clock ticks after boot.
    pub start: u64,
    /// How many threads it has.
    pub threads: u64,
    /// Minor page faults of its children that have ended and were waited for: grows with each of them.
    pub faults_of_children: u64,
}

impl Entry {
    /// Reads /proc/PID/stat; `None` if there is no such process (any more).
    pub fn read(pid: Pid) -> Option<Self> {
        Self::from_stat(File::open(format!("/proc/{pid}/stat")).ok()?)
    }

    fn from_stat(mut stat: File) -> Option<Self> {
        // The kernel gives the whole line to the first read that has room for it: 52 numbers at the most.
        let mut line = [0; 2048];
        let length = stat.read(&mut line).ok()?;
        Self::parse(&line[..length])
    }

    /// Which process it is.
    pub fn identity(&self) -> Identity {
        Identity { pid: self.pid.as_raw(), start: self.start }
    }

    /// The format is proc(5)'s: the name stands in parentheses and may itself hold any byte, so the last `)` ends it.
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
            start: rest.get(19)?.parse().ok()?,
            threads: rest.get(17)?.parse().ok()?,
            faults_of_children: rest.get(8)?.parse().ok()?,
        })
    }

    /// Whether it has ended and only its parent has not waited for it yet. A process whose first thread alone has ended is still there.
    pub fn has_ended(&self) -> bool {
        self.state == 'Z' && self.threads <= 1
    }

    /// All processes this one can see.
    pub fn all() -> Vec<Self> {
        numbers(Path::new("/proc")).filter_map(Self::read).collect()
    }

    /// The path of its terminal, where that is a pty.
    pub fn terminal_path(&self) -> Option<PathBuf> {
        // dev_t as the kernel prints it: minor bits 0-7 and 20-31, major bits 8-19; ptys have majors 136 to 143.
        let major = (self.terminal >> 8) & 0xfff;
        let minor = (self.terminal & 0xff) | ((self.terminal >> 12) & 0xfff00);
        (136..=143).contains(&major).then(|| PathBuf::from(format!("/dev/pts/{}", (major - 136) * 256 + minor)))
    }

    /// Sends it a signal, if it is still there.
    pub fn signal(&self, signal: Signal) {
        let _ = Handle::open(self.identity()).and_then(|handle| handle.signal(signal));
    }

    /// Whether it was started as a login shell without a command: a name that begins with a dash (login(1)), and nothing more.
    pub fn is_login_shell(&self) -> bool {
        let line = std::fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        line.starts_with(b"-") && line.iter().position(|&b| b == 0) == Some(line.len() - 1)
    }

    /// Its command line; its short name where there is none. It may hold secrets, and control characters.
    pub fn command_line(&self) -> String {
        let raw = std::fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        let words: Vec<_> = raw.split(|&b| b == 0).filter(|w| !w.is_empty()).map(String::from_utf8_lossy).collect();
        match words.as_slice() {
            [] => format!("[{}]", self.name),
            // A title that the process gave itself.
            [title] => title.clone().into_owned(),
            words => shell_words::join(words),
        }
    }
}

/// The processes or threads that a directory of proc(5) has directories of.
pub fn numbers(directory: &Path) -> impl Iterator<Item = Pid> + use<> {
    let entries = std::fs::read_dir(directory).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).map(Pid::from_raw)
}

/// The children of process `parent`, by the kernel's lists, so that the machine's other processes cost nothing. This process, as a
/// subreaper or PID 1, has no descendant as long as it has no child.
pub fn children(parent: Pid) -> Vec<Pid> {
    let list = |thread: Pid| std::fs::read_to_string(format!("/proc/{parent}/task/{thread}/children"));
    if parent == getpid() && list(parent).is_err() {
        // The kernel lacks CONFIG_PROC_CHILDREN.
        return Entry::all().iter().filter(|e| e.parent == parent).map(|e| e.pid).collect();
    }
    let lists = numbers(Path::new(&format!("/proc/{parent}/task"))).filter_map(|thread| list(thread).ok());
    lists
        .flat_map(|list| list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .map(Pid::from_raw)
        .collect()
}

/// Calls `visit` for each process that descends from this one, at once when it is found and after the list of its own children was read,
/// until `visit` breaks. A process whose parent ends meanwhile may be missed; it is a child of this process then.
pub fn visit_descendants(visit: &mut dyn FnMut(&Entry) -> ControlFlow<()>) {
    let mut found = children(getpid());
    while let Some(pid) = found.pop() {
        found.extend(children(pid));
        if Entry::read(pid).is_some_and(|entry| visit(&entry).is_break()) {
            return;
        }
    }
}

/// Those of `all` that descend from `ancestor`, nearest first.
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

/// While this lives, processes that this one starts are ended before it when memory is used up: a tenth of the memory counts as theirs
/// (proc_pid_oom_score_adj(5)).
#[derive(Debug)]
pub struct Expendable {
    before: Option<i32>,
}

impl Expendable {
    const FILE: &str = "/proc/self/oom_score_adj";

    /// From now on. Without effect where that may not be set.
    pub fn children() -> Self {
        let before: Option<i32> = std::fs::read_to_string(Self::FILE).ok().and_then(|text| text.trim().parse().ok());
        let set = |own: &i32| std::fs::write(Self::FILE, (own + 100).min(1000).to_string()).is_ok();
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

/// A program with all that execve(2) takes.
#[derive(Debug)]
pub struct Exec {
    path: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Exec {
    /// EINVAL for a string that holds a NUL byte.
    pub fn new<'a>(
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

    /// The program's file.
    pub fn path(&self) -> &Path {
        Path::new(OsStr::from_bytes(self.path.as_bytes()))
    }

    /// Returns only on failure.
    pub fn replace_this_process(&self) -> nix::Result<Infallible> {
        nix::unistd::execve(&self.path, &self.arguments, &self.environment)
    }

    /// Becomes the program that is open as `program`, whatever the path says. Returns only on failure.
    pub fn replace_this_process_by(&self, program: impl AsFd) -> nix::Result<Infallible> {
        nix::unistd::execveat(program, c"", &self.arguments, &self.environment, AtFlags::AT_EMPTY_PATH)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_may_hold_anything() {
        let line = b"17 (a) S 1 (b) R 5 6 7 34817 8 0 0 0 0 0 0 0 0 0 20 0 1 0 4711 0 0";
        let entry = Entry::parse(line).unwrap();
        assert_eq!((entry.name.as_str(), entry.parent.as_raw(), entry.start), ("a) S 1 (b", 5, 4711));
        assert_eq!(entry.terminal_path(), Some(PathBuf::from("/dev/pts/1")));
        assert_eq!(Entry::parse(b"17 (a"), None);
        let ended = Entry { state: 'Z', ..entry };
        assert!(ended.has_ended() && !Entry { threads: 3, ..ended }.has_ended());
    }

    #[test]
    fn a_handle_is_refused_when_the_number_has_changed_hands() {
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
    fn a_descendant_is_found_while_its_parent_ends() {
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
            // It is found by the first look or, where its parent ended during that, by the second.
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
        };
        let all = [entry(1, 0), entry(2, 1), entry(3, 2), entry(4, 0), entry(5, 4)];
        let found: Vec<_> = descendants(&all, Pid::from_raw(1)).iter().map(|e| e.pid.as_raw()).collect();
        assert_eq!(found, [2, 3]);
    }
}
