//! `ims-jail-shell init`: makes the jail, then is its first process: reaps, and watches for a user's mark.
//!
//! When it ends, the kernel ends every process in the jail; when the supervisor dies, it ends.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::thread::CapabilitySet;

use crate::error::{Attempt, Result};
use crate::jail::NAMESPACES;
use crate::jail::build::{Plan, build};
use crate::jail::capabilities;
use crate::jail::link::{Link, Message};
use crate::sys::process::{Fork, exit_now, fork};
use crate::sys::signals::Signals;
use crate::verdict::Verdict;

/// Makes the jail and stays as its first process. `supervisor` is this program's end of the [`Link`].
///
/// Returns in the process that was called, as soon as the jail's own first process exists; that one is then the supervisor's
/// child, which is the nearest subreaper.
pub fn run(plan: &Plan, supervisor: OwnedFd) -> Result<()> {
    let link = Link::from_fd(supervisor);
    // Before anything of this process can be seen from the jail: nobody inside may look into it (CVE-2024-21626, CVE-2019-5736).
    nix::sys::prctl::set_dumpable(false).attempt(|| "hide the jail's init from those inside")?;
    let made = nix::sched::unshare(NAMESPACES)
        .attempt(|| "make the jail's namespaces")
        .map_err(|e| e.advise("the container needs CAP_SYS_ADMIN (privileged) for a jail"))
        .and_then(|()| fork().attempt(|| "start the jail's init"));
    match made {
        Err(e) => link.send(&Message::Failed(e.to_string())).attempt(|| "tell the supervisor"),
        Ok(Fork::Parent(init)) => link.send(&Message::Started(init.as_raw())).attempt(|| "tell the supervisor"),
        Ok(Fork::Child) => {
            let code = match prepare(plan) {
                Ok((signals, watch)) => serve(&link, &signals, watch),
                Err(e) => {
                    let _ = link.send(&Message::Failed(e.to_string()));
                    1
                }
            };
            exit_now(code)
        }
    }
}

fn prepare(plan: &Plan) -> Result<(Signals, Watch)> {
    let _ = nix::sys::prctl::set_name(c"ims-jail-init");
    let signals = Signals::hold(&[Signal::SIGCHLD]).attempt(|| "hold back SIGCHLD")?;
    build(plan)?;
    // It only looks at names from now on, whatever the modes of a user's /tmp.
    capabilities::keep_only(CapabilitySet::DAC_READ_SEARCH)
        .attempt(|| "give up the capabilities of the jail's init")?;
    let watch = Watch::start().attempt(|| "watch /tmp of the jail")?;
    // The log and whatever else came with the start is none of the jail's business.
    let null = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .attempt(|| "open /dev/null of the jail")?;
    rustix::stdio::dup2_stdin(&null)
        .and_then(|()| rustix::stdio::dup2_stdout(&null))
        .and_then(|()| rustix::stdio::dup2_stderr(&null))
        .attempt(|| "let go of the container's streams")?;
    Ok((signals, watch))
}

/// How long a mark can stay unseen at the most if no event tells of it, as on a network file system another node writes to.
const LOOK_EVERY: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

fn serve(link: &Link, signals: &Signals, mut watch: Watch) -> u8 {
    if link.send(&Message::Ready).is_err() {
        return 1;
    }
    let mut told = Vec::new();
    loop {
        for verdict in Verdict::ALL {
            let marked = rustix::fs::lstat(Path::new("/tmp").join(verdict.signal_file())).is_ok();
            if marked && !told.contains(&verdict) {
                if link.send(&Message::Marked(verdict)).is_err() {
                    return 1;
                }
                told.push(verdict);
            }
        }
        watch.renew();
        let mut sources = vec![
            PollFd::new(link, PollFlags::RDHUP),
            PollFd::new(signals, PollFlags::IN),
            PollFd::from_borrowed_fd(watch.events.as_fd(), PollFlags::IN),
        ];
        if let Some(mounts) = &watch.mounts {
            sources.push(PollFd::new(mounts, PollFlags::PRI));
        }
        match rustix::event::poll(&mut sources, Some(&LOOK_EVERY)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return 1,
        }
        if !sources[0].revents().is_empty() {
            return 1;
        }
        while let Ok(Some(_)) = signals.next() {}
        reap();
        watch.drain();
    }
}

fn reap() {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
            Ok(_) | Err(_) => {}
        }
    }
}

/// Watches /tmp *as users see it*: a /tmp that is replaced, linked elsewhere or mounted over is followed at once.
struct Watch {
    events: Inotify,
    /// The kernel raises a priority event on this when the jail's mounts change.
    mounts: Option<std::fs::File>,
    tmp: Option<(WatchDescriptor, (u64, u64))>,
}

impl Watch {
    fn start() -> nix::Result<Self> {
        let events = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let names =
            AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVE | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_ONLYDIR;
        events.add_watch("/", names)?;
        let mut watch = Self { events, mounts: std::fs::File::open("/proc/self/mountinfo").ok(), tmp: None };
        watch.renew();
        Ok(watch)
    }

    /// Watches the folder that /tmp is now, if it is another one than before.
    fn renew(&mut self) {
        let now = rustix::fs::stat("/tmp").ok().map(|s| (s.st_dev, s.st_ino));
        if now == self.tmp.map(|(_, id)| id) {
            return;
        }
        if let Some((old, _)) = self.tmp.take() {
            let _ = self.events.rm_watch(old);
        }
        let names = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_ONLYDIR;
        if let (Some(id), Ok(watch)) = (now, self.events.add_watch("/tmp", names)) {
            self.tmp = Some((watch, id));
        }
    }

    fn drain(&self) {
        while self.events.read_events().is_ok_and(|events| !events.is_empty()) {}
    }
}
