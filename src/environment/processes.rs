//! Ends the processes of a job: SIGTERM first, then SIGKILL.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::error::{Error, Result};
use crate::jailer::open::{KILL_TIME, OpenJail};
use crate::log::redaction::without_secrets;
use crate::sys::poll;
use crate::sys::process::{Entry, Handle, descendants, numbers, reap, visit_descendants};

/// Time for a process to end by itself after SIGTERM.
const TERM_TIME: Duration = Duration::from_secs(1);

/// Time for the programs in a jail to save state (an editor's recovery file) before the jail is killed.
const ASK_TIME: Duration = Duration::from_millis(200);

/// Maximum number of processes that the log names; any more are only counted.
const NAMED: usize = 20;

/// Maximum number of processes watched for their end, each by a descriptor.
const WATCHED: usize = 16;

/// Ends every process of the job: each descendant of this process, which has to be a subreaper (or PID 1), and every
/// process in `jail`. A process that only has its working directory in the image root does not belong to the job.
pub(crate) fn end_all(jail: Option<&OpenJail>) -> Result<()> {
    let mut ending = Ending::begin();
    let (init, mounts) = (jail.map(OpenJail::init), jail.and_then(|jail| jail.namespace_name("mnt")));
    let visit = |visit: Visitor<'_>| {
        // Leave the init out: `OpenJail::end` ends it last.
        let visit = &mut |entry: &Entry| if Some(entry.pid) == init { ControlFlow::Continue(()) } else { visit(entry) };
        visit_descendants(visit);
        if let Some(mounts) = &mounts {
            visit_entered(mounts, visit);
        }
    };
    if let Some(jail) = jail {
        let left = ending.ask(visit);
        ending.log_killed_with(jail, left);
        jail.end()?;
    }
    ending.finish(visit)
}

/// Ends the process `root` of an earlier environment and its descendants.
pub(crate) fn end_tree(root: &Entry) -> Result<()> {
    Ending::begin().finish(|visit| {
        let all = Entry::all();
        let root = all.iter().find(|e| e.identity() == root.identity());
        let found = root.into_iter().flat_map(|root| std::iter::once(root.clone()).chain(descendants(&all, root.pid)));
        let _ = found.into_iter().try_for_each(|entry| visit(&entry));
    })
}

type Visitor<'a> = &'a mut dyn FnMut(&Entry) -> ControlFlow<()>;

/// Visits processes that have entered the mount namespace with this name from outside, for example by `nsenter
/// --mount`. They need not be in the jail's PID namespace.
fn visit_entered(mounts: &Path, visit: Visitor<'_>) {
    let has_entered = |pid: &Pid| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).is_ok_and(|own| own == mounts);
    let found = numbers(Path::new("/proc")).filter(has_entered).filter_map(Entry::read);
    let _ = found.into_iter().try_for_each(|entry| visit(&entry));
}

/// State of ending processes in sweeps: a process that forks during one sweep is found by the next.
struct Ending {
    began: Instant,
    /// Processes that got SIGTERM.
    asked: HashSet<Pid>,
    /// Process groups that were signalled as a whole, and in which sweep.
    groups: HashMap<(Pid, Signal), usize>,
    sweeps: usize,
    /// Start time of the newest process that the first sweep found. A process that starts later gets no SIGTERM: a
    /// program may have started it on SIGTERM, to save the program's state.
    newest: Option<u64>,
    killed: Killed,
}

/// Result of one sweep.
struct Sweep {
    left: usize,
    watched: Vec<Handle>,
}

impl Ending {
    fn begin() -> Self {
        Self {
            began: Instant::now(),
            asked: HashSet::new(),
            groups: HashMap::new(),
            sweeps: 0,
            newest: None,
            killed: Killed::default(),
        }
    }

    /// Sends SIGTERM to all processes and waits up to [`ASK_TIME`]. Returns how many are left.
    fn ask(&mut self, visit: impl Fn(Visitor<'_>)) -> usize {
        loop {
            let sweep = self.sweep(&visit, false);
            let limit = self.began + ASK_TIME;
            if sweep.left == 0 || Instant::now() >= limit {
                return sweep.left;
            }
            wait_for_all(sweep.watched, limit.saturating_duration_since(Instant::now()));
        }
    }

    /// Sends SIGTERM to all processes, kills those that do not end in time, and returns when none is left.
    fn finish(mut self, visit: impl Fn(Visitor<'_>)) -> Result<()> {
        // The time limit starts at the first sweep that kills: when memory is used up, the sweep before it can take
        // seconds.
        let mut killing: Option<Instant> = None;
        loop {
            if self.began.elapsed() >= TERM_TIME {
                killing.get_or_insert_with(Instant::now);
            }
            let is_over = killing.is_some_and(|since| since.elapsed() >= KILL_TIME);
            let sweep = self.sweep(&visit, killing.is_some());
            if sweep.left == 0 {
                return Ok(());
            }
            if is_over {
                let (mut names, mut is_stuck) = (Vec::new(), false);
                visit(&mut |entry| {
                    is_stuck |= entry.is_stuck();
                    names.push(format!("{} ({})", entry.pid, without_secrets(&entry.command_line())));
                    if names.len() < NAMED { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
                });
                return Err(Error::new(format!("end process {}", names.join(", ")))
                    .because(format!("{} processes are still there after SIGKILL", sweep.left))
                    .advise(if is_stuck {
                        "they wait for a device or a network file system; the image cannot be trusted"
                    } else {
                        "the machine is overloaded: see its load; the image cannot be trusted"
                    }));
            }
            let moment = Duration::from_millis(50);
            wait_for_all(sweep.watched, TERM_TIME.saturating_sub(self.began.elapsed()).max(moment));
        }
    }

    fn sweep(&mut self, visit: &impl Fn(Visitor<'_>), kill: bool) -> Sweep {
        self.sweeps += 1;
        let mut sweep = Sweep { left: 0, watched: Vec::new() };
        let (is_first, newest) = (self.newest.is_none(), self.newest.unwrap_or(0));
        visit(&mut |entry| {
            if entry.has_ended() {
                return ControlFlow::Continue(());
            }
            sweep.left += 1;
            if kill {
                self.killed.log(entry);
                self.signal(entry, Signal::SIGKILL);
            } else if (is_first || entry.start < newest) && self.asked.insert(entry.pid) {
                self.newest = self.newest.max(Some(entry.start));
                self.signal(entry, Signal::SIGTERM);
                // A stopped process handles SIGTERM only once it continues.
                self.signal(entry, Signal::SIGCONT);
            }
            if sweep.watched.len() < WATCHED {
                sweep.watched.extend(Handle::open(entry.identity()));
            }
            // A sweep that sends SIGTERM stops when the time for that is over; a sweep that kills visits every process.
            if kill || self.began.elapsed() < TERM_TIME { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        // Reap only after every process has got its signal: during a fork bomb, reaping takes long.
        reap();
        sweep
    }

    /// Signals a process, or its whole process group if that belongs to the job. One killpg reaches thousands of
    /// processes at once, and none escapes by a fork.
    fn signal(&mut self, entry: &Entry, signal: Signal) {
        // Signal the whole group if the process is a child of this one, but in another session. A child that has not
        // been reaped keeps its group's number from being reused. A process of the job created its session, so every
        // member of the group belongs to the job.
        let own_session = nix::unistd::getsid(None);
        if entry.parent == nix::unistd::getpid() && own_session.is_ok_and(|own| own != entry.session) {
            let sweep = *self.groups.entry((entry.group, signal)).or_insert_with(|| {
                let _ = nix::sys::signal::killpg(entry.group, signal);
                self.sweeps
            });
            // If the group was killed in an earlier sweep, this process was forked after that, so signal it alone.
            if sweep == self.sweeps || signal != Signal::SIGKILL {
                return;
            }
        }
        // Signal by pidfd: the process may have ended and its PID may be another process's.
        let _ = Handle::open(entry.identity()).and_then(|handle| handle.signal(signal));
    }

    /// Logs the processes that the jail's end is about to kill; the last sweep found `left` of them.
    fn log_killed_with(&mut self, jail: &OpenJail, left: usize) {
        let Some(pids) = jail.namespace_name("pid") else { return };
        visit_descendants(&mut |entry| {
            let is_inside = || std::fs::read_link(format!("/proc/{}/ns/pid", entry.pid)).is_ok_and(|own| own == pids);
            if entry.pid != jail.init() && !entry.has_ended() && is_inside() {
                self.killed.log(entry);
            }
            // Log only some: reading every process takes longer than killing all of them.
            if self.killed.pids.len() < NAMED { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        self.killed.unnamed = left.saturating_sub(self.killed.pids.len());
    }
}

/// Killed processes: the log names the first [`NAMED`] and counts the rest.
#[derive(Default)]
struct Killed {
    pids: HashSet<Pid>,
    unnamed: usize,
}

impl Killed {
    fn log(&mut self, entry: &Entry) {
        if self.pids.contains(&entry.pid) {
            return;
        }
        if self.pids.len() >= NAMED {
            self.unnamed += 1;
            return;
        }
        self.pids.insert(entry.pid);
        let command = without_secrets(&entry.command_line());
        tracing::warn!(pid = entry.pid.as_raw(), command, "killed, since it did not end after SIGTERM");
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        if self.pids.len() >= NAMED && self.unnamed > 0 {
            tracing::warn!("killed at least {} more processes, which did not end after SIGTERM", self.unnamed);
        }
    }
}

/// Waits until all of `handles` have ended, or for `limit`. A sweep after each process that ends would take longer in
/// total.
fn wait_for_all(mut handles: Vec<Handle>, limit: Duration) {
    use rustix::event::{PollFd, PollFlags};
    let began = Instant::now();
    while !handles.is_empty() && began.elapsed() < limit {
        let left = limit.saturating_sub(began.elapsed());
        let mut sources: Vec<_> = handles.iter().map(|h| PollFd::new(&h.fd, PollFlags::IN)).collect();
        let _ = poll::wait(&mut sources, left);
        let mut ended = sources.iter().map(|s| !s.revents().is_empty()).collect::<Vec<_>>().into_iter();
        handles.retain(|_| ended.next() != Some(true));
    }
}
