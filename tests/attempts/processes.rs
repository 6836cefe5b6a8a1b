//! Processes outside.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Resource, Rlimit, Signal};

use crate::kernel_files::writable;
use crate::outcome::{Held, Outcome, Step, any};
use crate::outside::{process, secret, told, visible_processes};
use crate::sys;

/// A harmless signal: permission to send it is permission to send any.
const HARMLESS: Signal = Signal::WINCH;

/// PID of the process outside, and of the jail's init, which is recognized by its root.
fn targets() -> Result<Vec<i32>, Held> {
    let init = std::fs::read_link("/proc/1/root").is_ok_and(|root| root == Path::new("/proc"));
    match (process(), init) {
        (Ok(process), true) => Ok(vec![1, process]),
        (Ok(process), false) => Ok(vec![process]),
        (Err(_), true) => Ok(vec![1]),
        (Err(held), false) => Err(held),
    }
}

fn pid(number: i32) -> Pid {
    Pid::from_raw(number).expect("a process number")
}

/// Traces a process.
pub fn trace() -> Outcome {
    any(targets()?, |process| {
        sys::ptrace_seize(process).step(format!("trace process {process}"))?;
        Ok(format!("traces process {process}"))
    })
}

/// Reads its memory.
pub fn memory() -> Outcome {
    any(targets()?, |process| {
        let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).step(format!("read {process}'s maps"))?;
        let stack = maps.lines().find(|line| line.ends_with("[stack]"));
        let (from, to) = stack.and_then(|line| line.split(' ').next()?.split_once('-')).expect("it has a stack");
        let number = |text| usize::from_str_radix(text, 16).expect("an address");
        let mut stack = vec![0; number(to) - number(from)];
        sys::read_memory(process, number(from), &mut stack).step(format!("read {process}'s memory"))?;
        secret(&stack)
    })
}

/// Opens its memory as a file.
pub fn memory_file() -> Outcome {
    any(targets()?, |process| {
        let path = format!("/proc/{process}/mem");
        std::fs::File::options().write(true).open(&path).step(format!("open {path}"))?;
        Ok(format!("can write to {path}"))
    })
}

/// Reads its environment variables.
pub fn environment() -> Outcome {
    any(visible_processes(), |process| {
        let path = format!("/proc/{process}/environ");
        secret(&std::fs::read(&path).step(format!("read {path}"))?)
    })
}

/// Changes its settings in /proc, and those of its threads: OOM score, contents of a core dump, name, groups.
pub fn settings() -> Outcome {
    let process = process()?;
    let threads = format!("/proc/{process}/task");
    let directories =
        std::fs::read_dir(&threads).step(format!("list {threads}"))?.flatten().map(|thread| thread.path());
    any(directories.chain([format!("/proc/{process}").into()]), |directory| {
        let entries = std::fs::read_dir(&directory).step(format!("list {}", directory.display()))?.flatten();
        any(entries, |entry| {
            let found = entry.metadata().step(format!("look at {}", entry.path().display()))?;
            // Root can open files without any write permission, too.
            if !found.is_file() || found.mode() & 0o222 == 0 {
                return Err(Held::by(
                    format!("open {}", entry.path().display()),
                    "it is no file that can be written to",
                ));
            }
            writable(&entry.path())
        })
    })
}

/// Sends it a signal.
pub fn kill() -> Outcome {
    let process = process()?;
    rustix::process::kill_process(pid(process), HARMLESS).step(format!("send process {process} a signal"))?;
    Ok(format!("sent process {process} a signal"))
}

/// Sends a signal to the leader of this session, which sshd started outside.
pub fn kill_session_leader() -> Outcome {
    let leader = nix::unistd::getsid(None).step("ask for the session's leader")?;
    if leader.as_raw() == 0 {
        return Err(Held::by("find the session's leader", "it is out of sight"));
    }
    if leader == nix::unistd::getpid() {
        return Err(Held::by("find the session's leader", "it is this process"));
    }
    rustix::process::test_kill_process(pid(leader.as_raw())).step("send the session's leader a signal")?;
    Ok(format!("may send signals to process {leader}, which leads this session"))
}

fn handle_on_process() -> Result<OwnedFd, Held> {
    rustix::process::pidfd_open(pid(process()?), PidfdFlags::empty()).step("pidfd_open")
}

/// Duplicates a descriptor of it.
pub fn steal_descriptor() -> Outcome {
    let handle = handle_on_process()?;
    let taken = rustix::process::pidfd_getfd(handle, 0, PidfdGetfdFlags::empty()).step("pidfd_getfd")?;
    Ok(format!("has its standard input: {taken:?}"))
}

/// Reaches it by a file handle from outside instead of a PID.
pub fn process_handle() -> Outcome {
    let handle: sys::Handle = told("PROCESS_HANDLE").parse().expect("a handle");
    let place = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).step("pidfd_open")?;
    let process = handle.open(place, libc::O_RDONLY).step("open_by_handle_at")?;
    rustix::process::pidfd_send_signal(process, HARMLESS).step("send it a signal")?;
    Ok("sent the process a signal".into())
}

/// Changes its limits.
pub fn limits() -> Outcome {
    let process = pid(process()?);
    let limit = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::prlimit(Some(process), Resource::Core, limit).step("prlimit")?;
    Ok("changed its limits".into())
}

/// Sets the limits of the first visible process to their current values.
pub fn limits_of_init() -> Outcome {
    sys::set_limit_again(1).step("prlimit")?;
    Ok("changed the limits of process 1".into())
}

/// Changes settings of the first visible process in /proc.
pub fn settings_of_init() -> Outcome {
    any(["oom_score_adj", "autogroup", "coredump_filter", "comm", "task/1/comm"], |name| {
        writable(&Path::new("/proc/1").join(name))
    })
}
