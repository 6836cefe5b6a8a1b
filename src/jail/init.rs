//! `ims-jail-shell init`: builds the jail, then stays as its first process, which reaps, and watches for a user's mark.
//!
//! When this init ends, the kernel kills every process in the jail. The init ends when the supervisor dies.

use std::convert::Infallible;
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use caps::Capability;
use nix::errno::Errno;
use nix::sched::CloneFlags;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::FdFlags;

use crate::error::{Attempt, Result};
use crate::jail::arguments::Arguments;
use crate::jail::binfmt::{self, Interpreter};
use crate::jail::build::build;
use crate::jail::capabilities;
use crate::jail::link::{Link, Message};
use crate::jail::plan::Plan;
use crate::jail::tier::Tier;
use crate::sys::poll;
use crate::sys::process::{Exec, Fork, close_on_exec_from, exit_now, fork, reap};
use crate::sys::seqpacket::Packets;
use crate::sys::signals::Signals;
use crate::sys::tree::Tree;
use crate::verdict::{Verdict, is_mark};

/// Builds the jail and stays as its first process. `supervisor` is this program's end of the [`Link`].
///
/// The calling process returns as soon as the jail's first process exists, which the supervisor then inherits as the
/// nearest subreaper.
pub fn run(plan: &Plan, supervisor: OwnedFd) -> Result<()> {
    let link = Link::from_fd(supervisor);
    // Hide this process before it is visible in the jail: nobody inside may read its memory or descriptors
    // (CVE-2024-21626, CVE-2019-5736).
    nix::sys::prctl::set_dumpable(false).attempt(|| "hide the jail's init from the jail (PR_SET_DUMPABLE)")?;
    let made = make_namespaces(plan)
        .attempt(|| "make the jail's namespaces")
        .and_then(|()| fork().attempt(|| "start the jail's init"));
    match made {
        Err(e) => link.send(&Message::failed(&e)).attempt(|| "tell the supervisor"),
        Ok(Fork::Parent(init)) => link.send(&Message::Started(init.as_raw())).attempt(|| "tell the supervisor"),
        Ok(Fork::Child) => {
            let Err(e) = make(plan, &link);
            let _ = link.send(&Message::failed(&e));
            exit_now(1)
        }
    }
}

/// Leaves the container's namespaces, except the mount namespace if [`build`] is to copy a bare one. The first child is
/// the first process of the new PID namespace.
fn make_namespaces(plan: &Plan) -> io::Result<()> {
    let mut flags = plan.tier.flags();
    if plan.bare.is_some() {
        flags -= CloneFlags::CLONE_NEWNS;
    }
    if plan.tier != Tier::User {
        return nix::sched::unshare(flags).map_err(Into::into);
    }
    unshare_with_users(flags)
}

/// Moves this process into new namespaces of the kinds `flags`, with a user namespace in which all users and groups
/// keep their numbers. For a process with one thread.
pub(crate) fn unshare_with_users(flags: CloneFlags) -> io::Result<()> {
    // Name this process by descriptor: /proc may show an outer PID namespace, in which this process has another number.
    unshare_with_users_of(&Tree::open(Path::new("/proc/self/."))?, flags)
}

/// Like [`unshare_with_users`], for a process whose /proc cannot be written to: `this` is its directory in another
/// /proc.
pub(crate) fn unshare_with_users_of(this: &Tree, flags: CloneFlags) -> io::Result<()> {
    // A child writes the maps: only a process outside the new user namespace may write a map of more than one user
    // (user_namespaces(7)).
    let (here, outside) = Packets::pair()?;
    match fork()? {
        Fork::Child => {
            drop(here);
            let told = matches!(outside.receive(), Ok(Some(_)));
            let mapped = if told { map_identity(this) } else { Ok(()) };
            let code = mapped.map_or_else(|e| e.raw_os_error().unwrap_or(libc::EIO), |()| 0);
            exit_now(u8::try_from(code).unwrap_or(1))
        }
        Fork::Parent(mapper) => {
            drop(outside);
            let unshared = nix::sched::unshare(flags);
            if unshared.is_ok() {
                here.send(b"unshared")?;
            }
            drop(here);
            let ended = waitpid(mapper, None)?;
            unshared?;
            match ended {
                WaitStatus::Exited(_, 0) => Ok(()),
                WaitStatus::Exited(_, code) => Err(io::Error::from_raw_os_error(code)),
                _ => Err(Errno::EIO.into()),
            }
        }
    }
}

/// Gives all users and groups of the user namespace of `process` the same IDs as in this one.
///
/// Each line of the map has the first ID inside, the first ID outside, and the count (user_namespaces(7)).
fn map_identity(process: &Tree) -> io::Result<()> {
    for file in ["uid_map", "gid_map"] {
        let ours = std::fs::read_to_string(format!("/proc/self/{file}"))?;
        let lines = ours.lines().map(|line| {
            let numbers: Vec<&str> = line.split_ascii_whitespace().collect();
            match numbers.as_slice() {
                [first, _, count] => format!("{first} {first} {count}"),
                _ => String::new(),
            }
        });
        let map = lines.collect::<Vec<_>>().join("\n");
        let file = process.open_at(file, OFlags::WRONLY, Mode::empty())?;
        // Write in one call, because the kernel takes a map only once.
        rustix::io::write(file, map.as_bytes())?;
    }
    Ok(())
}

/// Builds the jail around this process, which then becomes the jail's own copy of this program to [`serve`]. That exec
/// drops the container's descriptors, the log, and the container's program, which /proc/1/exe would lead to.
fn make(plan: &Plan, link: &Link) -> Result<Infallible> {
    // Open the directory now, by its path in the container. Its links are opened after the build, and then lead to the
    // jail's namespaces.
    let own = Tree::open(Path::new("/proc/self/ns")).attempt(|| "open the directory of this process's namespaces")?;
    let null = File::options().read(true).write(true).open("/dev/null").attempt(|| "open /dev/null")?;
    // Start a session, because the scheduler's autogroup belongs to the session: writing to /proc/1/autogroup would
    // otherwise change the nice value of the supervisor or of the caller of 'enter'.
    nix::unistd::setsid().attempt(|| "make a session of the jail's init")?;
    // Register the interpreter before the root is switched, because its file is in the container.
    let interpreter = plan.emulated.map(|architecture| binfmt::provide(architecture, "jail", true)).transpose()?;
    let programs = build(plan)?;
    let open = |name: &str| rustix::fs::openat(&own, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let namespaces = plan.tier.namespaces().iter().map(|(name, _)| Ok(open(name)?)).collect::<io::Result<Vec<_>>>();
    let namespaces = namespaces.attempt(|| "open the jail's namespaces")?;
    let descriptors: Vec<_> = namespaces.iter().map(AsFd::as_fd).chain([programs.helper.as_fd()]).collect();
    link.send_with(&Message::Made, &descriptors).attempt(|| "tell the supervisor")?;
    // Standard input stays: it is the socket to the supervisor.
    rustix::stdio::dup2_stdout(&null)
        .and_then(|()| rustix::stdio::dup2_stderr(&null))
        .attempt(|| "close the container's streams")?;
    close_on_exec_from(3).attempt(|| "mark descriptors close-on-exec")?;
    // Keep these descriptors open until the init ends, so that the binfmt_misc entry and the copies of programs stay.
    let kept = interpreter.iter().filter_map(Interpreter::table).chain(programs.others.iter().map(AsFd::as_fd));
    for kept in kept {
        rustix::io::fcntl_setfd(kept, FdFlags::empty()).attempt(|| "keep the jail's programs open")?;
    }
    let copy = Exec::new(Path::new(""), &Arguments::Serve(plan.tier).to_argv(), [])
        .attempt(|| "build the init's command line")?;
    copy.replace_this_process_by(&programs.helper).attempt(|| "start the jail's ims-jail-shell")
}

/// Serves as the jail's init, after the exec at the end of [`make`]. `supervisor` is this program's end of the
/// [`Link`]. Returns the exit code.
pub fn serve(tier: Tier, supervisor: OwnedFd) -> u8 {
    let link = Link::from_fd(supervisor);
    match prepare(tier) {
        Ok(inside) => watch_over(&link, inside),
        Err(e) => {
            let _ = link.send(&Message::failed(&e));
            1
        }
    }
}

/// Resources of the jail's init.
struct Inside {
    signals: Signals,
    watch: Watch,
}

fn prepare(tier: Tier) -> Result<Inside> {
    // Hide again, because exec resets the dumpable flag. The supervisor lets nobody into the jail before this call.
    nix::sys::prctl::set_dumpable(false).attempt(|| "hide the jail's init from the jail (PR_SET_DUMPABLE)")?;
    let _ = nix::sys::prctl::set_name(comm(&Tree::open(Path::new("/")).attempt(|| "open the image root")?));
    let signals = Signals::block(&[Signal::SIGCHLD]).attempt(|| "block SIGCHLD")?;
    let kept = [(Capability::CAP_DAC_READ_SEARCH, "it only checks names, and a user's /tmp may have any mode")];
    capabilities::keep_only(&kept).attempt(|| "drop capabilities of the jail's init")?;
    let watch = Watch::start(tier);
    Ok(Inside { signals, watch })
}

/// Name that /proc/1/comm has on the booted image. Ansible's `service_mgr`, Chef and Puppet choose the service manager
/// by this name, and should choose the same one as on the node.
fn comm(image_root: &Tree) -> &'static CStr {
    let is_there = |path: &str| matches!(image_root.look(path), Ok(Some(_)));
    let init = ["sbin/init", "usr/sbin/init"].into_iter().find(|path| is_there(path));
    let program = init.and_then(|init| image_root.leads_to(init).ok());
    match program.as_deref().and_then(Path::file_name).and_then(OsStr::to_str) {
        Some("systemd") => c"systemd",
        // runit-init replaces itself with runit.
        Some("runit-init" | "runit") => c"runit",
        // SUSE's initrd starts systemd even if there is no link at /sbin/init.
        None if is_there("usr/lib/systemd/systemd") => c"systemd",
        // Other inits have no telling name on a node either: Ansible then checks for their files.
        _ => c"init",
    }
}

/// Poll interval for marks. A mark raises no event if, for example, another node creates it on a network file system.
const LOOK_EVERY: Duration = Duration::from_secs(1);

fn watch_over(link: &Link, inside: Inside) -> u8 {
    let Inside { signals, mut watch } = inside;
    let events: Vec<_> = watch.events.iter().map(AsFd::as_fd).collect();
    if link.send_with(&Message::Ready, &events).is_err() {
        return 1;
    }
    drop(events);
    let mut told = Vec::new();
    let mut tell_marks = || {
        for verdict in Verdict::ALL {
            let found = rustix::fs::lstat(Path::new("/tmp").join(verdict.signal_file()));
            // Report a mark once for each owner: the supervisor decides whose marks count.
            let Some(owner) = found.ok().filter(is_mark).map(|found| found.st_uid) else { continue };
            if !told.contains(&(verdict, owner)) {
                link.send(&Message::Marked(verdict, owner))?;
                told.push((verdict, owner));
            }
        }
        io::Result::Ok(())
    };
    loop {
        if tell_marks().is_err() {
            return 1;
        }
        watch.renew();
        let mut sources = vec![PollFd::new(link, PollFlags::RDHUP), PollFd::new(&signals, PollFlags::IN)];
        sources.extend(watch.events.iter().map(|events| PollFd::from_borrowed_fd(events.as_fd(), PollFlags::IN)));
        if let Some(mounts) = &watch.mounts {
            sources.push(PollFd::new(mounts, PollFlags::PRI));
        }
        match poll::wait(&mut sources, LOOK_EVERY) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return 1,
        }
        if !sources[0].revents().is_empty() {
            // The supervisor is closing the environment, or has died. A mark made while the jail's processes are being
            // ended is seen only here, because /tmp may be a mount of the jail's own.
            let _ = tell_marks();
            return 1;
        }
        while let Ok(Some(_)) = signals.next() {}
        reap();
        watch.drain();
    }
}

/// Watches /tmp *as users see it*: a /tmp that is replaced, linked elsewhere or mounted over is followed at once.
struct Watch {
    /// `None` if root has no inotify instance or watch left, which a session can use up; /tmp is then checked at
    /// intervals.
    events: Option<Inotify>,
    /// Mount table, on which the kernel raises a priority event when the jail's mounts change. `None` where /proc is
    /// the image's and may contain anything.
    mounts: Option<File>,
    tmp: Option<(WatchDescriptor, (u64, u64))>,
}

impl Watch {
    fn start(tier: Tier) -> Self {
        let names =
            AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVE | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_ONLYDIR;
        let events = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).ok();
        let events = events.filter(|events| events.add_watch("/", names).is_ok());
        let mounts = if tier == Tier::Chroot { None } else { File::open("/proc/self/mountinfo").ok() };
        let mut watch = Self { events, mounts, tmp: None };
        watch.renew();
        watch
    }

    /// Watches the directory that is now at /tmp, if that one is not watched already.
    fn renew(&mut self) {
        let Some(events) = &self.events else { return };
        let now = rustix::fs::stat("/tmp").ok().map(|s| (s.st_dev, s.st_ino));
        if now == self.tmp.map(|(_, id)| id) {
            return;
        }
        if let Some((old, _)) = self.tmp.take() {
            let _ = events.rm_watch(old);
        }
        let names = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_ONLYDIR;
        if let (Some(id), Ok(watch)) = (now, events.add_watch("/tmp", names)) {
            self.tmp = Some((watch, id));
        }
    }

    fn drain(&self) {
        let Some(events) = &self.events else { return };
        while events.read_events().is_ok_and(|events| !events.is_empty()) {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn jail_init_has_the_name_of_the_booted_images_init() {
        for (link, file, wanted) in [
            ("/lib/systemd/systemd", "lib/systemd/systemd", c"systemd"),
            ("../lib/systemd/systemd", "usr/lib/systemd/systemd", c"systemd"),
            ("", "usr/lib/systemd/systemd", c"systemd"),
            ("runit-init", "sbin/runit-init", c"runit"),
            ("/bin/busybox", "usr/lib/systemd/systemd", c"init"),
            ("openrc-init", "sbin/openrc-init", c"init"),
            ("", "etc/passwd", c"init"),
            ("init", "sbin/other", c"init"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir(dir.path().join("sbin")).unwrap();
            if !link.is_empty() {
                symlink(link, dir.path().join("sbin/init")).unwrap();
            }
            std::fs::create_dir_all(dir.path().join(file).parent().unwrap()).unwrap();
            std::fs::write(dir.path().join(file), "").unwrap();
            assert_eq!(comm(&Tree::open(dir.path()).unwrap()), wanted, "{link} {file}");
        }
    }
}
