//! Cost of entering the jail, in counts that do not depend on the load of the machine: those of `ims-jail-shell` as the
//! image has it, from its start until the image's program begins. A change that costs more has to say so here.
//!
//! It starts twice: the outer stage joins the jail and executes, in a child, the jail's copy, which reads the image
//! without any descriptor of the container.
//!
//! Counted by ptrace(2), step by step: Debian's valgrind does not know pidfd_open(2).

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use ims_sshd::volume::state_directory::StateDirectory;
use nix::libc::c_long;
use nix::sys::ptrace::{self, Event, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use testbed::{Image, Mode, Volume};

use crate::podman::{IMAGE, podman, succeed};

/// Instructions, without those of two starts and ends of the program that do nothing: the C library's start depends on
/// the processor. An idle start prints the usage: the longer that text, the lower this number.
const INSTRUCTIONS: u64 = 87_600;

/// All system calls, including those of the C library's and the runtime's start. The second start takes 11; 7 pass the
/// request on, close descriptors and resolve what the image names. Three check whether a stream is open or only names a
/// file. Four set the umask and restore the caller's.
const SYSTEM_CALLS: u64 = 146;

/// Tolerance above the committed number, in percent.
const MARGIN: u64 = 5;

#[test]
fn session_start_stays_within_committed_instructions_and_system_calls() {
    // The image's programs open the environment: its jail has a copy of them.
    let volume = Volume::new(Image::Busybox);
    let container = succeed(&mut podman(&["create", IMAGE]));
    let [program, ims_sshd] = ["ims-jail-shell", "ims-sshd"].map(|name| {
        let copy = volume.dir.path().join(name);
        succeed(podman(&["cp", &format!("{container}:/usr/bin/{name}")]).arg(&copy));
        copy
    });
    succeed(&mut podman(&["rm", &container]));
    let environment = volume.start_by(&ims_sshd, Mode::Jailed, &[]).ready();

    let record = StateDirectory::of(&environment.parent).unwrap().jail();
    // sshd starts the program through the login shell.
    let line = format!("exec {} session {}", program.display(), record.display());
    let session = ["-c".as_ref(), line.as_ref()];
    let begins = |arguments: &[_], go_on: GoOn| count(&program, arguments, go_on);
    // Without arguments, the program prints its usage and ends.
    let instructions = begins(&session, ptrace::step) - 2 * begins(&[], ptrace::step);
    // Each call stops the process twice, before and after; the last one is execve, which does not return.
    let system_calls = begins(&session, ptrace::syscall).div_ceil(2);
    println!("{instructions} instructions, {system_calls} system calls");
    for (counted, committed, of) in
        [(instructions, INSTRUCTIONS, "instructions"), (system_calls, SYSTEM_CALLS, "system calls")]
    {
        assert!(counted * 100 <= committed * (100 + MARGIN), "{counted} {of}, where {committed} are committed");
    }
}

/// How a stopped process continues to the next count.
type GoOn = fn(Pid, Option<Signal>) -> nix::Result<()>;

/// Number of stops of `program` until it ends, or until its copy in a child executes another program.
fn count(program: &Path, arguments: &[&std::ffi::OsStr], go_on: GoOn) -> u64 {
    let mut shell = Command::new("sh");
    shell.args(["-c", r#"kill -STOP $$; exec "$@""#, "sh"]).arg(program).args(arguments);
    shell.env_clear().env("SSH_ORIGINAL_COMMAND", "true").env("SSH_CONNECTION", "192.0.2.1 40000 192.0.2.2 22");
    // Sockets, as from sshd: a file would be copied, and /dev/null opened again.
    let (session, _sshd) = UnixStream::pair().unwrap();
    let stream = || OwnedFd::from(session.try_clone().unwrap());
    shell.stdin(stream()).stdout(stream()).stderr(stream());
    // Waited for by its PID, like its child.
    let parent = Pid::from_raw(shell.spawn().unwrap().id().cast_signed());
    assert_eq!(waitpid(parent, Some(WaitPidFlag::WUNTRACED)), Ok(WaitStatus::Stopped(parent, Signal::SIGSTOP)));
    let options = Options::PTRACE_O_TRACEEXEC | Options::PTRACE_O_TRACEVFORK | Options::PTRACE_O_EXITKILL;
    ptrace::seize(parent, options).unwrap();
    kill(parent, Signal::SIGCONT).unwrap();
    let is = |status, event: Event| matches!(status, WaitStatus::PtraceEvent(_, _, e) if e == event as i32);
    while !is(waitpid(parent, None).unwrap(), Event::PTRACE_EVENT_EXEC) {
        ptrace::cont(parent, None).unwrap();
    }
    // The kernel stops the parent until the child has executed the copy, and the parent is not continued: there is one
    // process to wait for at a time.
    let (mut counted, mut process, mut is_copy) = (0, parent, false);
    loop {
        go_on(process, None).unwrap();
        match waitpid(process, None).unwrap() {
            WaitStatus::Exited(..) => break,
            status if is(status, Event::PTRACE_EVENT_EXEC) && is_copy => break,
            status if is(status, Event::PTRACE_EVENT_EXEC) => is_copy = true,
            status if is(status, Event::PTRACE_EVENT_VFORK) => {
                let child: c_long = ptrace::getevent(process).unwrap();
                process = Pid::from_raw(child.try_into().unwrap());
                // It starts stopped.
                waitpid(process, None).unwrap();
                go_on(parent, None).unwrap();
            }
            _ => counted += 1,
        }
    }
    // No process, if it has ended and was waited for.
    for halted in [process, parent] {
        let _ = kill(halted, Signal::SIGKILL);
        let _ = waitpid(halted, None);
    }
    counted
}
