//! The supervisor's handle of a jail: makes it, records it for sessions, watches it, ends it, and removes its traces
//! from the image root.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, getpid};
use rustix::event::{PollFd, PollFlags};

use crate::error::{Advise, Attempt, Error, Result};
use crate::jail::arguments::{Arguments, NAME, TRANSIENT};
use crate::jail::link::{Link, Message};
use crate::jail::mount_table::mount_table;
use crate::jail::plan::Plan;
use crate::jail::programs::Program;
use crate::jail::record::Record;
use crate::jail::resolv_conf::of_container;
use crate::jail::seal::Seal;
use crate::jail::tier::Tier;
use crate::jailer::binds;
use crate::jailer::mount_points::{self, Made};
use crate::jailer::resolv_conf::{self, ENVIRONMENT, Replaced};
use crate::jailer::unsealed;
use crate::log::redaction::without_secrets;
use crate::sys::poll;
use crate::sys::process::{Entry, Handle, Identity, numbers};
use crate::sys::tree::Tree;
use crate::volume::signal_files::warn_without_inotify;
use crate::volume::state_directory::StateDirectory;
use rustix::fs::AtFlags;
use rustix::fs::StatxFlags;

/// Parameters of a new jail.
pub(crate) struct Wanted<'a> {
    /// Plan of the jail. The image root's path in it is used in messages only.
    pub(crate) plan: Plan,
    /// The image root itself.
    pub(crate) image_root: &'a Tree,
    /// Directory of the record of created mount points: the image root parent.
    pub(crate) record_directory: &'a Tree,
    /// True if changes stay in the image, however the environment ends.
    pub(crate) in_place: bool,
    /// The IMS job.
    pub(crate) job: Option<&'a str>,
}

/// An open jail.
#[derive(Debug)]
pub(crate) struct OpenJail {
    /// True if this container may not create device nodes, so the image's /dev has none.
    pub(crate) without_devices: bool,
    /// Tier of the jail.
    pub(crate) tier: Tier,
    init: Handle,
    link: Link,
    /// Descriptors by which sessions enter: the tier's namespaces or, in the chroot tier, the image root. Sessions open
    /// them through this process's /proc/PID/fd, so they stay open as long as the jail.
    namespaces: Vec<OwnedFd>,
    /// The jail's copy of `ims-jail-shell`, which sessions open in the same way.
    helper: OwnedFd,
    /// Duplicate of the init's inotify. Closing an inotify takes ~10 ms; with a duplicate the init's exit does not wait
    /// for it.
    events: Option<OwnedFd>,
    /// Descriptors of the mount points that were created in the image. They find a mount point that a session has
    /// moved.
    made: Vec<(PathBuf, OwnedFd)>,
    /// The container's resolv.conf in the image, if it replaces the image's own.
    replaced: Option<Replaced>,
}

/// Timeout for making a jail, which takes milliseconds.
const TIME_TO_MAKE: Duration = Duration::from_secs(10);

/// Time for the init to exit by itself, which it does unless a session keeps all processors busy.
const TIME_TO_FINISH: Duration = Duration::from_millis(200);

/// Maximum wait for the kernel to end a killed jail whose processes keep ending.
const END_TIME: Duration = Duration::from_mins(1);

/// Poll interval for a jail's processes that are being ended: a check of thousands takes a moment.
const END_POLL: Duration = Duration::from_millis(500);

/// Poll interval for sealing the image root; the kernel raises no event when another process closes a file.
const TIME_BETWEEN_SEALS: Duration = Duration::from_millis(50);

/// Minimum time for a process outside the jail to close a file whose descriptor a session has sent to the process.
pub(crate) const TIME_TO_CLOSE_FILES: Duration = Duration::from_secs(1);

/// Progress of ending a jail's killed processes.
#[derive(Debug, Default)]
struct Ending {
    /// Processes that were left at the last change.
    left: HashSet<Identity>,
    /// Time of the last change, counted from the first check.
    since: Duration,
}

impl Ending {
    /// Returns whether to keep waiting, `waited` after the first check. Processes that only wait for a processor end in
    /// time. If all processes that are left are stuck, the wait goes on only while some of them end.
    fn goes_on(&mut self, left: &[Entry], all_stuck: bool, waited: Duration) -> bool {
        let now: HashSet<_> = left.iter().map(Entry::identity).collect();
        if now != self.left {
            (self.left, self.since) = (now, waited);
        }
        waited < END_TIME && (!all_stuck || waited.saturating_sub(self.since) < KILL_TIME / 2)
    }
}

/// Name of a process's PID namespace, as in the links below `/proc/PID/ns`.
fn pid_namespace(pid: Pid) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok()
}

/// Describes the process that has a file open for writing on the mount of this number. `init` is the jail's init.
fn holder(mount: u64, init: Pid) -> String {
    let name = |entry: &Entry| format!("process {} ({})", entry.pid, without_secrets(&entry.command_line()));
    let is_inside = |entry: &Entry| pid_namespace(init).is_some_and(|own| pid_namespace(entry.pid) == Some(own));
    let place =
        |entry: &Entry| if is_inside(entry) { "of the jail, which is being ended," } else { "outside the jail" };
    if let Some(entry) = writers_on(mount).first() {
        return format!("{} {} has a file of the image root open for writing", name(entry), place(entry));
    }
    if let Some(entry) = mapped_on(mount).first() {
        return format!("{} {} has a file of the image root mapped for writing", name(entry), place(entry));
    }
    "a file of the image root is open for writing outside the jail: in a process that is not visible from here, or in \
     the queue of a socket that nobody has read yet"
        .into()
}

impl OpenJail {
    /// Makes the jail and records in `state` how to enter it. This process has to be a subreaper (or PID 1). `keep` is
    /// called once the jail's init has started, and returns the names of variables that sessions keep.
    pub(crate) fn open(
        mut wanted: Wanted<'_>,
        state: &StateDirectory,
        keep: impl FnOnce() -> Result<Vec<String>>,
    ) -> Result<Self> {
        let plan = &mut wanted.plan;
        let chrooted = plan.tier == Tier::Chroot;
        let mut lacking = if chrooted {
            mount_points::devices(wanted.image_root)?
        } else {
            mount_points::mount_points(wanted.image_root, mount_table(plan.dkms, plan.proc))?
        };
        let text = match of_container() {
            Some(text) if resolv_conf::needs_replacing(wanted.image_root, &text, !chrooted)? => Some(text),
            _ => None,
        };
        let (placed, lacking_for_binds) = binds::place(wanted.image_root, plan.tier, &plan.binds)?;
        lacking.extend(lacking_for_binds);
        plan.binds = placed;
        let wanted = &wanted;
        let made = Made::make(wanted.image_root, wanted.record_directory, lacking)?;
        let opened = text.map_or(Ok(None), |text| replace(wanted.image_root, &text)).and_then(|replaced| {
            if chrooted {
                copy_sftp_server(wanted, state)?;
            }
            let Started { init, link, mut namespaces, helper, events } = start(wanted)?;
            if events.is_none() {
                warn_without_inotify();
            }
            if chrooted {
                namespaces.push(wanted.image_root.reopen().attempt(|| "open the image root for sessions")?);
            }
            // The init has not been reaped, so its PID cannot belong to another process.
            let ended = || {
                Error::new("make the jail")
                    .because("its init ended without a message")
                    .advise("see the node's log: it may have been killed for lack of memory")
                    .transient()
            };
            let identity = Identity::of(init).ok_or_else(ended)?;
            let handle = Handle::open(identity).map_err(|e| match e.raw_os_error() {
                Some(libc::ESRCH) => ended(),
                _ => Error::new("watch the jail's init").caused_by(e),
            })?;
            let jail = Self {
                without_devices: made.without_devices,
                tier: wanted.plan.tier,
                init: handle,
                link,
                namespaces,
                helper,
                events,
                made: made.mount_points(),
                replaced,
            };
            let recorded = keep().and_then(|keep| jail.record(wanted, keep, identity, state));
            recorded.inspect_err(|_| drop(jail.end()))?;
            Ok(jail)
        });
        opened.inspect_err(|_| {
            let _ = clear_image_root(wanted.image_root, wanted.record_directory);
        })
    }

    fn record(&self, wanted: &Wanted<'_>, keep: Vec<String>, init: Identity, state: &StateDirectory) -> Result<()> {
        let attempted = || format!("write {}", state.jail().display());
        let this = Identity::of(getpid())
            .ok_or_else(|| Error::new(attempted()).because("/proc does not show this process"))?;
        let record = Record {
            tier: wanted.plan.tier,
            init,
            keeper: this,
            descriptors: self.namespaces.iter().map(AsRawFd::as_raw_fd).collect(),
            helper: self.helper.as_raw_fd(),
            dkms: wanted.plan.dkms,
            in_place: wanted.in_place,
            job: wanted.job.map(Into::into),
            image: wanted.plan.label.clone(),
            keep,
        };
        // Replace the file atomically for readers, without fsync: the record describes processes, which a crash of the
        // machine ends.
        let new = state.jail().with_extension("new");
        std::fs::write(&new, record.to_text()).and_then(|()| std::fs::rename(new, state.jail())).attempt(attempted)
    }

    /// Descriptor of the jail's own namespace of this kind; `None` if the tier has none.
    pub(crate) fn namespace_fd(&self, kind: &str) -> Option<&OwnedFd> {
        self.namespaces.get(self.tier.namespaces().iter().position(|(name, _)| *name == kind)?)
    }

    /// Name of the jail's own namespace of this kind, as in the links below `/proc/PID/ns`.
    pub(crate) fn namespace_name(&self, kind: &str) -> Option<PathBuf> {
        let found = rustix::fs::fstat(self.namespace_fd(kind)?).ok()?;
        Some(format!("{kind}:[{}]", found.st_ino).into())
    }

    /// The jail's first process.
    pub(crate) fn init(&self) -> Pid {
        self.init.pid
    }

    /// Readable when [`OpenJail::receive`] has a message.
    pub(crate) fn link(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }

    /// Receives a message of the init, once the link is readable. `None` if the init has ended.
    pub(crate) fn receive(&self) -> Option<Message> {
        self.link.receive().ok().flatten().map(|(message, _)| message)
    }

    /// Ends every process in the jail. On success none is left: the kernel ends the init of a PID namespace only after
    /// all other processes in the namespace. In the chroot tier, which has no PID namespace, only the init ends.
    pub(crate) fn end(&self) -> Result<()> {
        // Have the init check for marks once more and exit. The link then holds the marks that the init found.
        let _ = self.link.finish();
        if !self.init.ends_within(TIME_TO_FINISH) {
            let _ = self.init.signal(Signal::SIGKILL);
        }
        if !self.init.ends_within(KILL_TIME / 2) {
            self.await_end()?;
        }
        while waitpid(self.init.pid, None) == Err(nix::errno::Errno::EINTR) {}
        Ok(())
    }

    /// Waits for the kernel to end the killed processes of the jail, which takes long if there are many and the machine
    /// is loaded. The init's end has killed all of them, and the kernel lets no new process start in their PID
    /// namespace (zap_pid_ns_processes).
    fn await_end(&self) -> Result<()> {
        let failed = |why: String, advice| Err(Error::new("end the jail").because(why).advise(advice));
        let (began, mut ending, mut is_logged) = (Instant::now(), Ending::default(), false);
        loop {
            let left = self.processes();
            let stuck: Vec<_> = left.iter().filter(|entry| entry.is_stuck()).collect();
            let all_stuck = stuck.len() == left.len();
            match (stuck.first(), ending.goes_on(&left, all_stuck, began.elapsed())) {
                (_, true) => {}
                (Some(entry), false) if all_stuck => {
                    let name = format!("{} ({})", entry.pid, without_secrets(&entry.command_line()));
                    let why = format!("process {name} in it is still there after SIGKILL");
                    return failed(why, "it waits for a device or a network file system; the image cannot be trusted");
                }
                _ => {
                    let why = format!(
                        "{} processes in it are still there {} s after SIGKILL",
                        left.len(),
                        END_TIME.as_secs()
                    );
                    return failed(why, "the machine is overloaded: see its load; the image cannot be trusted");
                }
            }
            if self.init.ends_within(END_POLL) {
                return Ok(());
            }
            if began.elapsed() >= KILL_TIME && !std::mem::replace(&mut is_logged, true) {
                tracing::warn!("waiting for the kernel to end {} killed processes of the jail", left.len());
            }
        }
    }

    /// Processes of the jail without its init, or only the init if no other is left. In the chroot tier only the init
    /// is found.
    fn processes(&self) -> Vec<Entry> {
        let own = self.namespace_name("pid");
        let is_inside = |pid: &Pid| *pid != self.init.pid && own.is_some() && pid_namespace(*pid) == own;
        let found: Vec<_> = numbers(Path::new("/proc")).filter(is_inside).filter_map(Entry::read).collect();
        if found.is_empty() { Entry::read(self.init.pid).into_iter().collect() } else { found }
    }

    /// Makes sure, after the jail's end, that no process outside the jail can write to the image root any more: a
    /// session can have sent descriptors of files in the image root to such a process. Waits until `limit` for files
    /// that are open for writing to be closed, then fails. An image root `in_place` is recorded then, so that no other
    /// run opens it.
    pub(crate) fn seal(state: &StateDirectory, limit: Instant, in_place: Option<&Tree>) -> Result<()> {
        let attempted = || "release the image root";
        let init = Record::read(&state.jail()).attempt(attempted)?.init;
        let holder = |mount| holder(mount, Pid::from_raw(init.pid));
        let mut is_logged = false;
        loop {
            let output = helper_output(&Arguments::Seal(state.jail())).attempt(attempted)?;
            let mount = match Seal::parse(&output).ok_or("ims-jail-shell is of another version").attempt(attempted)? {
                Seal::Sealed => return Ok(()),
                Seal::Busy(mount) => mount,
            };
            if Instant::now() >= limit {
                in_place.map_or(Ok(()), |image_root| unsealed::record(image_root, mount))?;
                return Err(Error::new(attempted()).because(holder(mount))).advise(
                    "a session passed the file on; end that process, or the owner of the socket, before marking the image",
                );
            }
            if !std::mem::replace(&mut is_logged, true) {
                tracing::warn!("{}: waiting for it to close the file", holder(mount));
            }
            std::thread::sleep(TIME_BETWEEN_SEALS);
        }
    }

    /// Removes the jail's traces from the image root after its end: restores resolv.conf and removes the mount points.
    pub(crate) fn clear(self, image_root: &Tree, record_directory: &Tree) -> Result<()> {
        let events = self.events;
        // Close the inotify in the background; if no thread can be started, dropping the closure here closes the
        // inotify.
        let _ = std::thread::Builder::new().spawn(move || drop(events));
        if self.replaced.as_ref().map(Replaced::restore).transpose()? == Some(true) {
            tracing::info!("{RESOLV_CONF_EDITED}");
        }
        log_kept(&mount_points::remove_moved(image_root, &self.made)?);
        clear_image_root(image_root, record_directory).map(|_| ())
    }
}

const RESOLV_CONF_EDITED: &str = "a session changed /etc/resolv.conf: the change stays in the image";

/// Restores the image root from the records of this environment or of an earlier one that was killed. Returns whether
/// there was anything to restore.
pub(crate) fn clear_image_root(image_root: &Tree, record_directory: &Tree) -> Result<bool> {
    let replaced = ENVIRONMENT.restore(image_root)?;
    if replaced == Some(true) {
        tracing::info!("{RESOLV_CONF_EDITED}");
    }
    let made = Made::left_over(image_root, record_directory);
    let found = made.is_some() || replaced.is_some();
    if let Some(made) = made {
        log_kept(&made.remove()?);
    }
    Ok(found)
}

fn log_kept(paths: &[PathBuf]) {
    for path in paths {
        tracing::info!(
            "/{} was made for the jail and stays in the image, since something was put into it",
            path.display()
        );
    }
}

/// Puts the container's resolv.conf into the image. A full or read-only image is entered without it.
fn replace(image_root: &Tree, text: &[u8]) -> Result<Option<Replaced>> {
    match ENVIRONMENT.replace(image_root, text) {
        // Another run on this image root has replaced the file already: its replacement serves this jail too.
        Err(e) if e.kind() == ErrorKind::ResourceBusy => Ok(None),
        Err(e)
            if matches!(
                e.kind(),
                ErrorKind::ReadOnlyFilesystem | ErrorKind::StorageFull | ErrorKind::QuotaExceeded
            ) =>
        {
            tracing::warn!("cannot {REPLACE}: {e}; names are resolved by the image's own");
            Ok(None)
        }
        other => {
            let advice =
                "the image's /etc has to be writable; 'lsattr -d' shows whether 'chattr +i' has made it immutable";
            other.attempt(|| REPLACE).advise(advice).map(Some)
        }
    }
}

const REPLACE: &str = "put the container's /etc/resolv.conf into the image";

/// Copies sftp-server for a jail in which nothing can be mounted.
fn copy_sftp_server(wanted: &Wanted<'_>, state: &StateDirectory) -> Result<()> {
    let directory = state.sftp();
    let copy = || -> std::io::Result<()> {
        std::fs::create_dir_all(&directory)?;
        let programs = &wanted.plan.programs;
        programs.iter().try_for_each(|Program { name, file }| std::fs::copy(file, directory.join(name)).map(drop))
    };
    copy().attempt(|| format!("copy sftp-server to {}", directory.display()))
}

/// A started init, the socket to it, and the descriptors that [`Message::Made`] and [`Message::Ready`] carry.
struct Started {
    init: Pid,
    link: Link,
    namespaces: Vec<OwnedFd>,
    helper: OwnedFd,
    events: Option<OwnedFd>,
}

/// Starts the init and waits until the jail is ready.
fn start(wanted: &Wanted<'_>) -> Result<Started> {
    let (ours, theirs) = Link::pair().attempt(|| "make a socket to the jail's init")?;
    // Name the image root by descriptor: its path may lead to another directory by now.
    let image_root = format!("/proc/self/fd/{}", wanted.image_root.as_fd().as_raw_fd());
    let mut command = helper(&Arguments::Init(wanted.plan.clone()))?;
    let program = PathBuf::from(command.get_program());
    let attempted = || format!("start {}", program.display());
    command.stdin(Stdio::from(theirs.into_fd())).current_dir(image_root).env_clear();
    let status = command.status().attempt(attempted)?;
    // Close this process's copy of the init's end, so that the socket closes when the init ends.
    drop(command);
    let (mut init, mut namespaces, mut events) = (None, Vec::new(), None::<Vec<OwnedFd>>);
    let failed = |init: Option<Pid>, error: Error| {
        if let Some(init) = init {
            let _ = kill(init, Signal::SIGKILL);
            let _ = waitpid(init, None);
        }
        Err(error)
    };
    let unmade = |why: String| Error::new("make the jail").because(why).transient();
    // The messages of the init and those of the process that started the init may arrive in any order.
    loop {
        if let (Some(init), Some(mut events)) = (init, events.take_if(|_| init.is_some())) {
            let another_version = || {
                Error::new("make the jail")
                    .because("its init is of another version")
                    .advise("install ims-sshd and ims-jail-shell of the same version")
            };
            let helper = namespaces.pop().ok_or_else(another_version)?;
            return Ok(Started { init, link: ours, namespaces, helper, events: events.pop() });
        }
        let mut sources = [PollFd::new(&ours, PollFlags::IN)];
        let ready = poll::wait(&mut sources, TIME_TO_MAKE);
        if matches!(ready, Ok(0)) {
            let why = format!("its init was not ready within {} s", TIME_TO_MAKE.as_secs());
            return failed(init, unmade(why));
        }
        match ours.receive().attempt(|| "receive a message from the jail's init")? {
            Some((Message::Started(pid), _)) => init = Some(Pid::from_raw(pid)),
            Some((Message::Made, descriptors)) => namespaces = descriptors,
            Some((Message::Ready, descriptors)) => events = Some(descriptors),
            Some((Message::Failed { why, is_transient }, _)) => {
                return failed(init, Error::told(&why, is_transient));
            }
            // Ignore the message: the mark itself, a file in the image's /tmp, is not lost.
            Some((Message::Marked(..), _)) => {}
            None => {
                return failed(init, unmade(format!("{} ended without a message ({status})", program.display())));
            }
        }
    }
}

/// Path of `ims-jail-shell`, which is installed next to this program.
pub(crate) fn program() -> Result<PathBuf> {
    let own = std::env::current_exe().attempt(|| "find this program's own file")?;
    let beside = own.with_file_name(NAME);
    if beside.exists() {
        Ok(beside)
    } else {
        Err(Error::new("find ims-jail-shell")
            .because(format!("{} does not exist", beside.display()))
            .advise("install ims-sshd and ims-jail-shell into the same directory"))
    }
}

/// Command that runs `ims-jail-shell` with these arguments.
pub(crate) fn helper(arguments: &Arguments) -> Result<Command> {
    let mut command = Command::new(program()?);
    command.args(arguments.to_words());
    Ok(command)
}

/// Runs `ims-jail-shell`. Returns its standard output, or the error that it has told.
pub(crate) fn helper_output(arguments: &Arguments) -> Result<String> {
    let mut command = helper(arguments)?;
    let attempted = || format!("run {NAME}");
    let output = command.env_clear().current_dir("/").stdin(Stdio::null()).output().attempt(attempted)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    if message.trim().is_empty() {
        let why = format!("it ended without a message ({})", output.status);
        return Err(Error::new(attempted()).because(why).transient());
    }
    let is_transient = output.status.code() == Some(TRANSIENT.into());
    Err(Error::told(message.trim().trim_start_matches(&format!("{NAME}: ")), is_transient))
}

/// Time for the kernel to end a process after SIGKILL. A process that hangs in a dead network file system never ends.
/// The sum of this time and the time that processes get after SIGTERM is less than the 5 s that the environment may
/// take to close after the grace period.
pub(crate) const KILL_TIME: Duration = Duration::from_millis(3500);

/// Returns the processes that have a file open for writing on the mount of this number.
fn writers_on(mount: u64) -> Vec<Entry> {
    // Format of proc_pid_fdinfo(5): `flags:` of open(2) in octal, and `mnt_id:`.
    let is_writer = |text: &str| {
        let field = |name| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let flags = field("flags:").and_then(|flags| i32::from_str_radix(flags, 8).ok()).unwrap_or(0);
        flags & libc::O_ACCMODE != libc::O_RDONLY
            && flags & libc::O_PATH == 0
            && field("mnt_id:").and_then(|number| number.parse().ok()) == Some(mount)
    };
    let writes = |pid: &Pid| {
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
        descriptors.filter_map(|entry| std::fs::read_to_string(entry.path()).ok()).any(|text| is_writer(&text))
    };
    numbers(Path::new("/proc")).filter(writes).filter_map(Entry::read).collect()
}

/// Returns the processes that have a file on the mount of this number mapped for writing. Finds none if this process
/// lacks CAP_SYS_ADMIN in the initial user namespace, without which the kernel does not follow the links
/// (proc_pid_map_files(5)).
fn mapped_on(mount: u64) -> Vec<Entry> {
    let is_writable = |link: &Path| std::fs::symlink_metadata(link).is_ok_and(|found| found.mode() & 0o200 != 0);
    let is_on_it = |link: &Path| {
        let found = rustix::fs::statx(rustix::fs::CWD, link, AtFlags::empty(), StatxFlags::MNT_ID);
        found.is_ok_and(|found| found.stx_mnt_id == mount)
    };
    let maps = |pid: &Pid| {
        let links = std::fs::read_dir(format!("/proc/{pid}/map_files")).into_iter().flatten().flatten();
        links.map(|link| link.path()).any(|link| is_writable(&link) && is_on_it(&link))
    };
    numbers(Path::new("/proc")).filter(maps).filter_map(Entry::read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn killed_jail_is_waited_for_while_its_processes_end_or_can() {
        let child = |_| std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let mut children: Vec<_> = (0..2).map(child).collect();
        let entry = |child: &std::process::Child| Entry::read(Pid::from_raw(child.id().cast_signed())).unwrap();
        let all: Vec<_> = children.iter().map(entry).collect();
        let ms = Duration::from_millis;
        let mut ending = Ending::default();
        assert!(ending.goes_on(&all, true, ms(0)), "the first look");
        assert!(ending.goes_on(&all, true, ms(1_500)), "a disk may be slow");
        assert!(ending.goes_on(&all[..1], true, ms(2_000)), "one has ended");
        assert!(ending.goes_on(&all[..1], false, ms(30_000)), "it waits for a processor");
        assert!(!ending.goes_on(&all[..1], true, ms(30_000)), "nothing changes any more");
        assert!(!ending.goes_on(&all, false, ms(60_000)), "the limit is over");
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
