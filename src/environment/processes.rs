//! The end of all that a job still runs.

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

/// How long a process has to end by itself after SIGTERM.
const TERM_TIME: Duration = Duration::from_secs(1);

/// Time for the programs in a jail to save state (an editor's recovery file) before the jail is killed.
const ASK_TIME: Duration = Duration::from_millis(200);

/// Number of processes that the log names; the others are only counted.
const NAMED: usize = 20;

/// Number of processes watched for their end, each by a descriptor.
const WATCHED: usize = 16;

/// Ends every process of the job: each descendant of this process, which has to be a subreaper (or PID 1), and whoever is in `jail`: TERM,
/// and KILL for those that stay. A process that only has its working directory in the image root is not the job's.
pub(crate) fn end_all(jail: Option<&OpenJail>) -> Result<()> {
    let mut ending = Ending::begin();
    let (init, mounts) = (jail.map(OpenJail::init), jail.and_then(|jail| jail.namespace_name("mnt")));
    let visit = |visit: Visitor<'_>| {
        // The init is ended last, by its jail.
        let visit = &mut |entry: &Entry| if Some(entry.pid) == init { ControlFlow::Continue(()) } else { visit(entry) };
        visit_descendants(visit);
        if let Some(mounts) = &mounts {
            visit_those_among(mounts, visit);
        }
    };
    if let Some(jail) = jail {
        let left = ending.ask(visit);
        ending.tell_killed_with(jail, left);
        jail.end()?;
    }
    ending.finish(visit)
}

/// Ends the process `root` of an earlier environment with all that descends from it.
pub(crate) fn end_tree(root: &Entry) -> Result<()> {
    Ending::begin().finish(|visit| {
        let all = Entry::all();
        let root = all.iter().find(|e| e.identity() == root.identity());
        let found = root.into_iter().flat_map(|root| std::iter::once(root.clone()).chain(descendants(&all, root.pid)));
        let _ = found.into_iter().try_for_each(|entry| visit(&entry));
    })
}

type Visitor<'a> = &'a mut dyn FnMut(&Entry) -> ControlFlow<()>;

/// Those that have entered the mount namespace of this name, but are not in the jail's PID namespace, as by `nsenter --mount`.
fn visit_those_among(mounts: &Path, visit: Visitor<'_>) {
    let among = |pid: &Pid| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).is_ok_and(|own| own == mounts);
    let found = numbers(Path::new("/proc")).filter(among).filter_map(Entry::read);
    let _ = found.into_iter().try_for_each(|entry| visit(&entry));
}

/// Processes on their way to their end, in sweeps: what forks faster than one looks is found by the next.
struct Ending {
    began: Instant,
    asked: HashSet<Pid>,
    /// Process groups that were signalled as a whole, and by which sweep.
    groups: HashMap<(Pid, Signal), usize>,
    sweeps: usize,
    /// When the newest of those that the first sweep asked had started. A later process may be what a program has started because it was
    /// asked to end, to save its state.
    newest: Option<u64>,
    killed: Told,
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
            killed: Told::default(),
        }
    }

    /// Asks everybody to end, and waits for that a moment. Returns how many were left in the end.
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

    /// Asks everybody to end, kills whoever has not ended in time, and returns when nobody is left.
    fn finish(mut self, visit: impl Fn(Visitor<'_>)) -> Result<()> {
        // Counted from the first sweep that kills: where memory is used up, the sweep before it can take seconds.
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
                let mut names = Vec::new();
                visit(&mut |entry| {
                    names.push(format!("{} ({})", entry.pid, without_secrets(&entry.command_line())));
                    if names.len() < NAMED { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
                });
                return Err(Error::new(format!("end process {}", names.join(", ")))
                    .because(format!("{} processes are still there after SIGKILL", sweep.left))
                    .advise("they wait for a device or a network file system; the image cannot be trusted"));
            }
            let moment = Duration::from_millis(50);
            wait_for_all(sweep.watched, TERM_TIME.saturating_sub(self.began.elapsed()).max(moment));
        }
    }

    fn sweep(&mut self, visit: &impl Fn(Visitor<'_>), kill: bool) -> Sweep {
        reap();
        self.sweeps += 1;
        let mut sweep = Sweep { left: 0, watched: Vec::new() };
        let (is_first, newest) = (self.newest.is_none(), self.newest.unwrap_or(0));
        visit(&mut |entry| {
            if entry.has_ended() {
                return ControlFlow::Continue(());
            }
            sweep.left += 1;
            if kill {
                self.killed.tell(entry);
                self.signal(entry, Signal::SIGKILL);
            } else if (is_first || entry.start < newest) && self.asked.insert(entry.pid) {
                self.newest = self.newest.max(Some(entry.start));
                self.signal(entry, Signal::SIGTERM);
                // One that is stopped would not hear it.
                self.signal(entry, Signal::SIGCONT);
            }
            if sweep.watched.len() < WATCHED {
                sweep.watched.extend(Handle::open(entry.identity()));
            }
            // To ask has its time; to kill ends only when all are dead.
            if kill || self.began.elapsed() < TERM_TIME { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        sweep
    }

    /// Signals a process, with its group if that is the job's own: a crowd is then signalled at once, and nobody escapes by a fork.
    fn signal(&mut self, entry: &Entry, signal: Signal) {
        // A child that was not waited for keeps the group's number from being another's. Its session was made by a process of the job,
        // since it is not this process's own, and so was every member.
        let own_session = nix::unistd::getsid(None);
        if entry.parent == nix::unistd::getpid() && own_session.is_ok_and(|own| own != entry.session) {
            let sweep = *self.groups.entry((entry.group, signal)).or_insert_with(|| {
                let _ = nix::sys::signal::killpg(entry.group, signal);
                self.sweeps
            });
            // A survivor in a group that an earlier sweep has killed was created since.
            if sweep == self.sweeps || signal != Signal::SIGKILL {
                return;
            }
        }
        // It may have ended since: a number that is another process's by now is not signalled.
        let _ = Handle::open(entry.identity()).and_then(|handle| handle.signal(signal));
    }

    /// Names those who are killed with their jail, of whom the last sweep has found so many left.
    fn tell_killed_with(&mut self, jail: &OpenJail, left: usize) {
        let Some(pids) = jail.namespace_name("pid") else { return };
        visit_descendants(&mut |entry| {
            let is_inside = || std::fs::read_link(format!("/proc/{}/ns/pid", entry.pid)).is_ok_and(|own| own == pids);
            if entry.pid != jail.init() && !entry.has_ended() && is_inside() {
                self.killed.tell(entry);
            }
            // To look at each takes longer than to kill them.
            if self.killed.pids.len() < NAMED { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        self.killed.unnamed = left.saturating_sub(self.killed.pids.len());
    }
}

/// The killed processes, as far as the log names them.
#[derive(Default)]
struct Told {
    pids: HashSet<Pid>,
    unnamed: usize,
}

impl Told {
    fn tell(&mut self, entry: &Entry) {
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

impl Drop for Told {
    fn drop(&mut self) {
        if self.pids.len() >= NAMED && self.unnamed > 0 {
            tracing::warn!("killed at least {} more processes, which did not end after SIGTERM", self.unnamed);
        }
    }
}

/// Waits until all of `handles` have ended, or for `limit`: a sweep for each that ends would take longer than they do.
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
