//! The end of all that a job still runs, and of what it has mounted in its image root.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpid};

use crate::error::{Attempt, Error, Result};
use crate::lifecycle::secrets::without_secrets;
use crate::sys::process::{Entry, Handle, descendants, numbers, own_descendants};
use crate::sys::{mounts, poll};

/// How long a process has to end by itself after SIGTERM.
const TERM_TIME: Duration = Duration::from_secs(1);

/// What is put away, is put away by then.
const ASK_TIME: Duration = Duration::from_millis(200);

/// How long the kernel has to end a process after SIGKILL; one that hangs in a dead network file system takes for ever.
const KILL_TIME: Duration = Duration::from_secs(5);

/// Ends every descendant of this process, which has to be a subreaper (or PID 1), and whoever else stands in `image_root` or among the
/// mounts of its jail, whose namespace's name that is: TERM, and KILL for those that stay.
pub fn end_all(image_root: Option<&Path>, jail: Option<&Path>) -> Result<()> {
    end(|| {
        let mut left = own_descendants();
        if let Some(image_root) = image_root {
            left.extend(standing_in(image_root, jail));
        }
        left
    })
}

/// Asks every descendant of this process but `spared` to end, and waits a moment for those that have something to put away, such as an
/// editor its recovery file. Before the jail's init is killed, which asks nobody. `jail` is the name of its PID namespace.
pub fn ask_to_end(spared: Pid, jail: Option<&Path>) {
    let began = Instant::now();
    let mut asked = Vec::new();
    loop {
        reap();
        let mut left = own_descendants();
        left.retain(|e| e.pid != spared && e.state != 'Z');
        if left.is_empty() || began.elapsed() >= ASK_TIME {
            // The jail's end kills those in it; the others have some more time.
            let jail_of = |pid: Pid| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
            left.iter().filter(|e| jail.is_some() && jail_of(e.pid).as_deref() == jail).for_each(tell_killed);
            return;
        }
        let handles = left.iter().filter_map(|entry| ask_once(entry, &mut asked)).collect();
        wait_for_all(handles, ASK_TIME.saturating_sub(began.elapsed()));
    }
}

/// Ends the process `root` of an earlier environment with all that descends from it.
pub fn end_tree(root: &Entry) -> Result<()> {
    end(|| {
        let all = Entry::all();
        let mut left = descendants(&all, root.pid);
        left.extend(all.into_iter().filter(|e| e.pid == root.pid && e.start == root.start));
        left
    })
}

/// Processes whose root or working folder is in `image_root`, as an administrator's shell from `kubectl exec`. Only those that see the
/// same mounts: another's path of that name is another folder. And those that have entered the jail's mounts, but not its processes.
fn standing_in(image_root: &Path, jail: Option<&Path>) -> Vec<Entry> {
    let link = |pid: Pid, name: &str| std::fs::read_link(format!("/proc/{pid}/{name}")).ok();
    let own_mounts = std::fs::read_link("/proc/self/ns/mnt").ok();
    let this = getpid();
    let stands = |pid: &Pid| {
        let within = |name| link(*pid, name).is_some_and(|path| path.starts_with(image_root));
        let Some(mounts) = link(*pid, "ns/mnt").filter(|_| *pid != this) else { return false };
        jail == Some(mounts.as_path()) || Some(mounts) == own_mounts && (within("cwd") || within("root"))
    };
    numbers(Path::new("/proc")).filter(stands).filter_map(Entry::read).collect()
}

fn end(find: impl Fn() -> Vec<Entry>) -> Result<()> {
    let began = Instant::now();
    let mut asked = Vec::new();
    let mut killed = Vec::new();
    loop {
        reap();
        let left: Vec<Entry> = find().into_iter().filter(|e| e.state != 'Z').collect();
        if left.is_empty() {
            return Ok(());
        }
        let kill_now = began.elapsed() > TERM_TIME;
        let handles = left.iter().filter_map(|entry| {
            let handle = ask_once(entry, &mut asked)?;
            if kill_now && !killed.contains(&entry.pid) {
                tell_killed(entry);
                killed.push(entry.pid);
                let _ = handle.signal(Signal::SIGKILL);
            }
            Some(handle)
        });
        let handles = handles.collect();
        if began.elapsed() > TERM_TIME + KILL_TIME {
            let names: Vec<_> =
                left.iter().map(|e| format!("{} ({})", e.pid, without_secrets(&e.command_line()))).collect();
            return Err(Error::new(format!("end process {}", names.join(", ")))
                .because("it is still there after SIGKILL")
                .advise("it waits for a device or a network file system; the image cannot be trusted"));
        }
        let moment = Duration::from_millis(50);
        wait_for_all(handles, TERM_TIME.saturating_sub(began.elapsed()).max(moment));
    }
}

fn tell_killed(entry: &Entry) {
    let command = without_secrets(&entry.command_line());
    tracing::warn!(pid = entry.pid.as_raw(), command, "killed, since it did not end after SIGTERM");
}

/// Opens `entry` if it is still there and, the first time, asks it to end.
fn ask_once(entry: &Entry, asked: &mut Vec<Pid>) -> Option<Handle> {
    let handle = Handle::open(entry.identity()).ok()?;
    if !asked.contains(&entry.pid) {
        asked.push(entry.pid);
        let _ = handle.signal(Signal::SIGTERM);
        // One that is stopped would not hear it.
        let _ = handle.signal(Signal::SIGCONT);
    }
    Some(handle)
}

/// Waits until all of `handles` have ended, or for `limit`: looking at all processes anew for each that ends would take longer than they
/// do.
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

/// Waits for every child that has ended, ours or inherited, and tells how.
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

/// Takes down what is mounted below the image root at `path` in this mount namespace, such as an administrator's own
/// `mount --bind /proc`: whoever packs the tree would walk into it. Deepest first.
pub fn unmount_below(path: &Path) -> Result<()> {
    let mountinfo = std::fs::read("/proc/self/mountinfo").attempt(|| "read /proc/self/mountinfo")?;
    for mount in mounts::mount_points(&mountinfo).iter().rev() {
        if mount.starts_with(path) && mount != path {
            mounts::unmount(mount)
                .attempt(|| format!("unmount {}", mount.display()))
                .map_err(|e| e.advise("unmount it by hand; packing would walk into it"))?;
            tracing::warn!("unmounted {}, which somebody had mounted there", mount.display());
        }
    }
    Ok(())
}
