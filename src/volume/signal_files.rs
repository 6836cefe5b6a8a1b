//! Signal files, by which one container of the pod notifies another: each is a file in the image root parent.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, UNIX_EPOCH};

use notify::{RecursiveMode, Watcher};
use rustix::event::EventfdFlags;
use rustix::fs::{FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::error::{Advise, Attempt, Error, Result};
use crate::printable::Printable;
use crate::sys::file_kind::FileKind;
use crate::sys::tree::Tree;
use crate::verdict::Verdict;
use crate::volume::layout::{CLAIM, READY, RESERVED, SSHD_LISTENING, STEP_CLAIM};

/// Content of a mark that a sidecar creates instead of `ready` when it gives up, with the pod's host name in between.
/// An environment obeys such a mark even if the mark is older than the environment. Any other older mark belongs to an
/// earlier job.
const INSTEAD_OF_READY: [&[u8]; 2] = [b"by the sidecar on ", b", instead of 'ready'\n"];

/// Maximum length of a sidecar's mark in bytes; a host name has at most 64.
const INSTEAD_LIMIT: u64 = 256;

/// Age at which a sidecar's mark with another host name counts as an earlier pod's. This job's sidecar may start before
/// the environment, but not by this much: pulling an image and starting a container takes less.
const EARLIER: Duration = Duration::from_mins(10);

/// Identity of a signal file, to distinguish it from an earlier file of the same name: inode, and seconds and
/// nanoseconds of its ctime.
pub(crate) type Stamp = (u64, i64, u64);

/// Poll interval for signal files: the delay where the file system raises no event.
pub(crate) const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A command that makes, packs or publishes the image root of a parent. Only one runs on a parent at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// `prepare`: a second one would write to the same directory, or remove it.
    Prepare,
    /// `package`: a concurrent `prepare --fresh` would remove the image root.
    Package,
    /// `upload`: two uploads with one journal would publish, and roll back, the same image.
    Upload,
    /// `sidecar`: it publishes as `upload` does.
    Sidecar,
}

impl Step {
    const ALL: [Self; 4] = [Self::Prepare, Self::Package, Self::Upload, Self::Sidecar];

    /// Name of the command.
    fn name(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Package => "package",
            Self::Upload => "upload",
            Self::Sidecar => "sidecar",
        }
    }

    /// Advice in the error message when this step needs a claim that another step has.
    fn advice(self) -> &'static str {
        match self {
            Self::Sidecar => "the job goes on with that command; each job needs a volume of its own",
            _ => "wait until that command has ended",
        }
    }
}

/// Maximum size of the text in the lock file, in bytes: a name and a process id.
const HOLDER_LIMIT: u64 = 64;

/// The step that has the lock, and its process id in its own PID namespace. Root of another container can change this
/// text, so it must not be used for anything but messages.
fn holder(lock: OwnedFd) -> Option<(Step, u32)> {
    let mut text = String::new();
    File::from(lock).take(HOLDER_LIMIT).read_to_string(&mut text).ok()?;
    let (name, process) = text.trim_end().split_once(' ')?;
    Some((Step::ALL.into_iter().find(|step| step.name() == name)?, process.parse().ok()?))
}

/// Names the holder of a lock, for a message.
fn held_by(holder: Option<(Step, u32)>) -> String {
    match holder {
        Some((step, process)) => format!("'ims-sshd {}' has it, as process {process}", step.name()),
        None => "another prepare, package, upload or sidecar has it".into(),
    }
}

/// Lock that keeps other steps away while it lives. The kernel drops it with the process.
pub(crate) struct StepClaim<'a> {
    files: &'a SignalFiles,
    lock: Option<OwnedFd>,
}

impl Drop for StepClaim<'_> {
    fn drop(&mut self) {
        if self.lock.is_some() {
            let _ = self.files.parent.remove(STEP_CLAIM);
        }
    }
}

/// The open image root parent. Signal files are created and looked up by its descriptor, never through a link.
pub struct SignalFiles {
    parent: Tree,
    path: PathBuf,
    /// The environment's claim, kept until this value is dropped: two environments on one parent would end each other's
    /// processes.
    lock: Option<OwnedFd>,
}

impl SignalFiles {
    /// Opens the parent; `None` if it does not exist.
    pub(crate) fn open(path: &Path) -> Result<Option<Self>> {
        match Tree::open(path) {
            Ok(parent) => Ok(Some(Self { parent, path: path.to_owned(), lock: None })),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e)
                .attempt(|| format!("open the image root parent {}", path.display()))
                .advise("it has to be a directory, not a link to one"),
        }
    }

    /// Path of the parent, for messages and for programs that take a path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The parent itself.
    pub(crate) fn parent(&self) -> &Tree {
        &self.parent
    }

    /// Claims the parent for this environment until this value is dropped.
    pub(crate) fn claim(&mut self) -> Result<()> {
        let attempted = || claiming(&self.path);
        // Retry: `status` takes a shared lock for a moment, which is not a claim. On a busy machine the moment may be
        // long.
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(10) {
            let Some(lock) = self.lockable(true).attempt(attempted)? else { continue };
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                // Another environment may have removed its claim between this open and the lock.
                Ok(()) if !self.is_lockable(&lock) => continue,
                Ok(()) => {
                    self.lock = Some(lock);
                    return Ok(());
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(e) => return Err(e).attempt(attempted),
            }
            if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared) == Err(rustix::io::Errno::WOULDBLOCK) {
                break;
            }
            drop(lock);
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(claimed(&self.path))
    }

    /// Opens the file that a claim locks. Anyone who can open a file can lock it (flock(2)), so the lock needs a file
    /// that only root can open: the parent directory if its mode allows no one else, otherwise a file in the parent.
    /// Returns `None` if that file is missing and `create` is false, or if another user owns it.
    fn lockable(&self, create: bool) -> io::Result<Option<OwnedFd>> {
        let parent = rustix::fs::fstat(&self.parent)?;
        if parent.st_mode & 0o044 == 0 {
            return self.parent.reopen().map(Some);
        }
        let (flag, bits) = if create { (OFlags::CREATE, 0o600) } else { (OFlags::empty(), 0) };
        // Open for reading only: a writable descriptor would keep the volume from being remounted read-only.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | flag;
        let file = match self.parent.open_at(CLAIM, flags, Mode::from_raw_mode(bits)) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            // Lock the parent directory instead: the next write reports that the volume is full or read-only.
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::ReadOnlyFilesystem
                ) =>
            {
                return self.parent.reopen().map(Some);
            }
            Err(e) => return Err(e),
        };
        let found = rustix::fs::fstat(&file)?;
        // Another user who created the file may still have it open, and could lock it.
        let is_ours = found.st_uid == rustix::process::geteuid().as_raw() && found.st_mode & 0o066 == 0;
        if !is_ours && create {
            self.parent.remove(CLAIM)?;
        }
        Ok(is_ours.then_some(file))
    }

    /// Returns whether `lock` still is the file that a claim locks.
    fn is_lockable(&self, lock: &OwnedFd) -> bool {
        let identity = |file: BorrowedFd<'_>| rustix::fs::fstat(file).map(|found| (found.st_dev, found.st_ino)).ok();
        let named = self.lockable(false).ok().flatten();
        let places = [Some(self.parent.as_fd()), named.as_ref().map(AsFd::as_fd)];
        places.into_iter().flatten().any(|place| identity(place) == identity(lock.as_fd()))
    }

    /// Claims the parent for `step` until the returned value is dropped. Fails if another step has the claim. If the
    /// lock cannot be taken for any other reason, the claim succeeds without a lock, and the step itself works or
    /// reports the reason.
    pub(crate) fn claim_for(&self, step: Step) -> Result<StepClaim<'_>> {
        let mut claim = StepClaim { files: self, lock: None };
        // Limit the tries: another process may remove the file each time.
        for _ in 0..100 {
            let lock = match self.step_lock(OFlags::CREATE) {
                Ok(Some(lock)) => lock,
                // Replace a file that is not ours: the user who created it may still have it open and locked.
                Ok(None) if self.retract(STEP_CLAIM).is_ok() => continue,
                Ok(None) => break,
                Err(e) => {
                    tracing::debug!("cannot look for another step: {e}");
                    break;
                }
            };
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {
                    let named = self.parent.look(STEP_CLAIM).ok().flatten();
                    let found = rustix::fs::fstat(&lock).ok();
                    let identity = |found: Stat| (found.st_dev, found.st_ino);
                    // If the inodes differ, the previous step has removed the file that was locked here, so try again.
                    if named.is_some() && named.map(identity) == found.map(identity) {
                        // Ignore an error, such as a full volume: only a message will lack the name. Write by path: a
                        // descriptor that stays writable would keep the volume from being remounted read-only.
                        let path = format!("/proc/self/fd/{}", lock.as_raw_fd());
                        let _ = std::fs::write(path, format!("{} {}\n", step.name(), std::process::id()));
                        claim.lock = Some(lock);
                        break;
                    }
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    // If a shared lock is possible, no step has the claim: a command that only checks for one holds a
                    // shared lock for a moment.
                    if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared).is_ok() {
                        std::thread::sleep(Duration::from_millis(1));
                        continue;
                    }
                    let attempted = format!("claim {} for this {}", self.path.display(), step.name());
                    return Err(Error::new(attempted).because(held_by(holder(lock))).advise(step.advice()));
                }
                // The file system has no locks.
                Err(_) => break,
            }
        }
        Ok(claim)
    }

    /// Opens the file that the claim of a step locks; `None` if something else has its name, if other users can open
    /// the file, or if it has another hard link.
    fn step_lock(&self, flag: OFlags) -> io::Result<Option<OwnedFd>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | flag;
        let bits = if flag.is_empty() { 0 } else { 0o600 };
        let lock = match self.parent.open_at(STEP_CLAIM, flags, Mode::from_raw_mode(bits)) {
            Err(e) if matches!(Errno::from_io_error(&e), Some(Errno::LOOP | Errno::ISDIR | Errno::NXIO)) => {
                return Ok(None);
            }
            opened => opened?,
        };
        let found = rustix::fs::fstat(&lock)?;
        let is_private = found.st_uid == rustix::process::geteuid().as_raw() && found.st_mode & 0o066 == 0;
        // The lock's holder writes to the file, so the file must not be a hard link to another one.
        let is_own = FileKind::of(&found) == FileKind::Regular && found.st_nlink <= 1;
        Ok((is_private && is_own).then_some(lock))
    }

    /// Fails if a step is creating or packing the image root, which must not change during the step.
    pub(crate) fn refuse_while_used(&self) -> Result<()> {
        let Ok(Some(lock)) = self.step_lock(OFlags::empty()) else { return Ok(()) };
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared) != Err(rustix::io::Errno::WOULDBLOCK) {
            return Ok(());
        }
        match holder(lock) {
            // These do not use the image root: a sidecar waits for the session, and `upload` reads the packed image.
            Some((Step::Sidecar | Step::Upload, _)) => Ok(()),
            other => {
                let attempted = format!("open the image root in {}", self.path.display());
                Err(Error::new(attempted).because(held_by(other)).advise("wait until that command has ended"))
            }
        }
    }

    /// Duplicates the descriptor of the claim, which keeps the claim after this value is dropped.
    pub(crate) fn share_claim(&self) -> io::Result<Option<OwnedFd>> {
        self.lock.as_ref().map(OwnedFd::try_clone).transpose()
    }

    /// Returns whether another process has claimed the parent.
    pub(crate) fn is_claimed(&self) -> bool {
        let Ok(Some(lock)) = self.lockable(false) else { return false };
        rustix::fs::flock(lock, FlockOperation::NonBlockingLockShared) == Err(rustix::io::Errno::WOULDBLOCK)
    }

    /// Refuses a parent whose image root is open in a build environment. An environment that still waits for `ready`
    /// has not opened the image root, so `prepare` may run.
    pub(crate) fn refuse_open(&self) -> Result<()> {
        if self.is_claimed() && (self.stands(READY)? || self.stands(SSHD_LISTENING)?) {
            return Err(claimed(&self.path));
        }
        Ok(())
    }

    /// Returns whether the signal file `name` exists. A file of that name that is not regular is an error.
    pub(crate) fn stands(&self, name: &str) -> Result<bool> {
        let shown = || format!("{}/{name}", self.path.display());
        let found = self.parent.look(name).attempt(|| format!("look for {}", shown()))?;
        match found.as_ref().map(FileKind::of) {
            None => Ok(false),
            Some(FileKind::Regular) => Ok(true),
            Some(other) => Err(Error::new(format!("use {} as a signal file", shown()))
                .because(format!("it is {other}"))
                .advise("remove it and create a regular file with 'touch'")),
        }
    }

    /// Creates the signal file `name` if it does not exist. Anything else of that name is renamed, never followed.
    pub(crate) fn touch(&self, name: &str) -> Result<()> {
        let attempted = || format!("create {}/{name}", self.path.display());
        if let Ok(Some(odd)) =
            self.parent.look(name).map(|found| found.filter(|f| FileKind::of(f) != FileKind::Regular))
        {
            self.move_away(name, &odd).attempt(attempted)?;
        }
        self.create(&self.parent, name.as_ref())
            .attempt(attempted)
            .advise("the volume has to be writable and to have space")
    }

    /// Creates the file `name` below `tree`, which lies on the parent's volume. On a full volume, one of the reserved
    /// files is renamed, or, if the volume was full before any could be reserved, `ready` gets another link.
    pub(crate) fn create(&self, tree: &Tree, name: &Path) -> io::Result<()> {
        match tree.touch(name) {
            Err(e) if matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                let reserved = RESERVED.iter().any(|reserved| self.parent.rename_to(reserved, tree, name).is_ok());
                if reserved || self.parent.link_to(READY, tree, name).is_ok() { Ok(()) } else { Err(e) }
            }
            other => other.map(|_| ()),
        }
    }

    /// Creates the reserved files, which are renamed to the verdict and `exiting` on a full volume.
    pub(crate) fn reserve(&self) -> Result<()> {
        for name in RESERVED {
            self.parent
                .touch(name)
                .attempt(|| format!("create {}/{name}", self.path.display()))
                .advise("the volume has to be writable and to have space")?;
        }
        Ok(())
    }

    /// Removes the reserved files that were not needed.
    pub(crate) fn release_reserve(&self) -> Result<()> {
        RESERVED.iter().try_for_each(|name| self.remove(name))
    }

    /// Marks the image for an environment that waits for `ready`.
    pub(crate) fn mark_instead_of_ready(&self, verdict: Verdict) -> Result<()> {
        let name = verdict.signal_file();
        let text = [INSTEAD_OF_READY[0], host_name().trim_ascii(), INSTEAD_OF_READY[1]].concat();
        // A full volume may have no block for the text and still an inode for an empty file.
        self.parent.replace(name, &text).or_else(|_| self.retract(name).and_then(|()| self.touch(name)))
    }

    /// Verdict for an environment that still waits for `ready`, if there is a mark. `old` is the stamp of a `failed`
    /// that existed when the environment started.
    pub(crate) fn verdict_instead_of_ready(&self, old: Option<Stamp>) -> Option<Verdict> {
        let failed = Verdict::Failed.signal_file();
        if self.stands(failed).is_ok_and(|stands| stands) && self.stamp(failed) != old {
            return Some(Verdict::Failed);
        }
        [Verdict::Failed, Verdict::Complete]
            .into_iter()
            .find(|verdict| self.sidecar_of(verdict.signal_file()).is_some())
    }

    /// Host name of the sidecar that created the mark `name` instead of `ready`; `None` if no sidecar created it.
    fn sidecar_of(&self, name: &str) -> Option<Vec<u8>> {
        let text = self.parent.read(name, INSTEAD_LIMIT).ok()?;
        Some(text.strip_prefix(INSTEAD_OF_READY[0])?.strip_suffix(INSTEAD_OF_READY[1])?.to_vec())
    }

    /// Removes marks that the sidecar of an earlier pod created instead of `ready`: they would close the new
    /// environment.
    pub(crate) fn remove_marks_of_earlier_pods(&self) -> Result<()> {
        let here = host_name();
        for name in Verdict::ALL.map(Verdict::signal_file) {
            let Some(host) = self.sidecar_of(name).filter(|host| host != here.trim_ascii()) else { continue };
            let Some(found) = self.parent.look(name).attempt(|| format!("look for {}/{name}", self.path.display()))?
            else {
                continue;
            };
            let made = UNIX_EPOCH + Duration::from_secs(u64::try_from(found.st_mtime).unwrap_or(0));
            if made.elapsed().is_ok_and(|age| age > EARLIER) {
                self.remove(name)?;
                let made = humantime::format_rfc3339_seconds(made);
                let host = String::from_utf8_lossy(&host);
                tracing::info!(
                    "removed '{name}' of an earlier pod: the sidecar on {} created it at {made}",
                    Printable(&host)
                );
            }
        }
        Ok(())
    }

    /// Stamps of the verdict files, in the order of [`Verdict::ALL`].
    pub(crate) fn verdict_stamps(&self) -> [Option<Stamp>; 2] {
        Verdict::ALL.map(|verdict| self.stamp(verdict.signal_file()))
    }

    /// Removes verdict files that existed when this run started (with the stamps `old`) and are older than `ready`.
    /// They belong to an earlier job: a mark of this job is created after `ready`.
    pub(crate) fn remove_marks_of_earlier_jobs(&self, old: [Option<Stamp>; 2]) -> Result<()> {
        let Some((_, seconds, nanoseconds)) = self.stamp(READY) else { return Ok(()) };
        for (verdict, old) in Verdict::ALL.into_iter().zip(old) {
            let name = verdict.signal_file();
            let is_earlier =
                old.is_some_and(|old| self.stamp(name) == Some(old) && (old.1, old.2) < (seconds, nanoseconds));
            // A file that is not regular is reported later, as an error.
            if is_earlier && self.stands(name).unwrap_or(false) {
                self.remove(name)?;
                tracing::info!(
                    "removed '{name}', which is older than '{READY}': it belongs to an earlier job on this volume"
                );
            }
        }
        Ok(())
    }

    /// Stamp of the file `name`.
    pub(crate) fn stamp(&self, name: &str) -> Option<Stamp> {
        let found = self.parent.look(name).ok()??;
        Some((found.st_ino, found.st_ctime, found.st_ctime_nsec))
    }

    /// Removes the signal file `name` if it exists.
    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        self.parent.remove(name).attempt(|| format!("remove {}/{name}", self.path.display())).map(|_| ())
    }

    /// Retracts the mark `name`: whatever has that name is removed, or renamed if it is a directory.
    pub(crate) fn retract(&self, name: &str) -> Result<()> {
        let attempted = || format!("remove {}/{name}", self.path.display());
        match self.parent.remove(name) {
            Err(e) if e.kind() == io::ErrorKind::IsADirectory => {
                self.parent.look(name).and_then(|found| found.map_or(Ok(()), |odd| self.move_away(name, &odd)))
            }
            other => other.map(|_| ()),
        }
        .attempt(attempted)
    }

    /// Renames something that blocks a signal file to a unique name.
    fn move_away(&self, name: &str, odd: &Stat) -> io::Result<()> {
        let aside = format!("{name}.{}", odd.st_ino);
        self.parent.rename_to(name, &self.parent, &aside)?;
        tracing::warn!("{name} was {} and has been renamed to {aside}", FileKind::of(odd));
        Ok(())
    }

    /// Returns whether `name` still leads to `tree`.
    pub(crate) fn holds(&self, name: &str, tree: &Tree) -> bool {
        let identity = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
        match (self.parent.look(name), rustix::fs::fstat(tree)) {
            (Ok(Some(now)), Ok(then)) => identity(now) == identity(then),
            _ => false,
        }
    }

    /// Verdict of the signal files; `failed` wins over `complete`.
    pub(crate) fn verdict(&self) -> Result<Option<Verdict>> {
        for verdict in [Verdict::Failed, Verdict::Complete] {
            if self.stands(verdict.signal_file())? {
                return Ok(Some(verdict));
            }
        }
        Ok(None)
    }
}

impl Drop for SignalFiles {
    fn drop(&mut self) {
        // Remove the file before unlocking it: a process that opened the file before its removal finds that the name is
        // gone.
        if self.lock.is_some() {
            let _ = self.parent.remove(CLAIM);
        }
    }
}

/// Host name. All containers of a pod share it, and no other pod has it.
fn host_name() -> Vec<u8> {
    std::fs::read("/proc/sys/kernel/hostname").unwrap_or_default()
}

fn claiming(path: &Path) -> String {
    format!("claim {}", path.display())
}

/// Error of a parent that another environment has claimed.
pub(crate) fn claimed(path: &Path) -> Error {
    Error::new(claiming(path)).because("another build environment is open on it").advise(
        "'ims-sshd status' names it; an 'enter' ends with its shell or command, others with 'ims-sshd complete NAME' or 'ims-sshd fail NAME'",
    )
}

/// Warns once that inotify is unavailable, so that marks and signal files are only polled.
pub(crate) fn warn_without_inotify() {
    static TOLD: std::sync::Once = std::sync::Once::new();
    TOLD.call_once(|| {
        tracing::warn!(
            "no inotify instance is left for root (fs.inotify.max_user_instances): polling marks and signal files \
             every {} s",
            LOOK_EVERY.as_secs()
        );
    });
}

/// Wakes the event loop when something happens in a directory. The wake-up is only a hint: a network file system raises
/// no event for another node's writes, so the event loop polls as well.
pub(crate) struct Watch {
    wake: OwnedFd,
    /// The watched directory and its watcher; `None` if the kernel has no watch left.
    watched: Option<(PathBuf, notify::RecommendedWatcher)>,
}

impl Watch {
    /// Creates a watch that has no directory yet.
    pub(crate) fn new() -> Result<Self> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self { wake: wake.attempt(|| "make an event descriptor")?, watched: None })
    }

    /// Watches `path` or, until it exists, its nearest existing ancestor.
    pub(crate) fn on(&mut self, path: &Path) {
        let Some(directory) = path.ancestors().find(|p| p.is_dir()) else { return };
        if self.watched.as_ref().is_some_and(|(watched, _)| watched == directory) {
            return;
        }
        let Ok(wake) = self.wake.try_clone() else { return };
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Ignore reads of the directory, which the event loop itself causes.
            if !matches!(event, Ok(notify::Event { kind: notify::EventKind::Access(_), .. })) {
                let _ = rustix::io::write(&wake, &1_u64.to_ne_bytes());
            }
        });
        self.watched = watcher.ok().and_then(|mut watcher| {
            watcher.watch(directory, RecursiveMode::NonRecursive).ok()?;
            Some((directory.to_owned(), watcher))
        });
        if self.watched.is_none() {
            warn_without_inotify();
        }
    }

    /// Resets the wake-up descriptor.
    pub(crate) fn drain(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.wake, &mut count);
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn parent() -> (tempfile::TempDir, SignalFiles) {
        let dir = tempfile::tempdir().unwrap();
        let files = SignalFiles::open(dir.path()).unwrap().unwrap();
        (dir, files)
    }

    #[test]
    fn failed_wins_over_complete() {
        let (dir, files) = parent();
        assert_eq!(files.verdict().unwrap(), None);
        std::fs::write(dir.path().join("complete"), "").unwrap();
        assert_eq!(files.verdict().unwrap(), Some(Verdict::Complete));
        files.touch("failed").unwrap();
        assert_eq!(files.verdict().unwrap(), Some(Verdict::Failed));
    }

    #[test]
    fn file_that_is_not_regular_is_refused_as_a_signal_file_and_moved_away_by_touch() {
        let (dir, files) = parent();
        std::fs::create_dir(dir.path().join("complete")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("failed")).unwrap();
        assert!(files.stands("complete").unwrap_err().to_string().contains("a directory"));
        assert!(files.stands("failed").unwrap_err().to_string().contains("a symbolic link"));
        files.touch("failed").unwrap();
        assert!(files.stands("failed").unwrap(), "the link in its way was renamed");
    }

    #[test]
    fn parent_is_claimed_by_one_environment_at_a_time() {
        let (dir, mut files) = parent();
        assert!(!files.is_claimed());
        files.claim().unwrap();
        let mut second = SignalFiles::open(dir.path()).unwrap().unwrap();
        assert!(second.is_claimed());
        assert!(second.claim().unwrap_err().to_string().contains("another build environment"));
        drop(files);
        // A child that another test has just forked has the descriptor open until it calls exec.
        let began = Instant::now();
        while let Err(error) = second.claim() {
            assert!(began.elapsed() < Duration::from_secs(5), "{error}");
        }
    }

    #[test]
    fn claim_ignores_locks_of_other_users_on_a_parent_that_they_can_read() {
        for mode in [0o755, 0o1777, 0o700] {
            let (dir, mut files) = parent();
            std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(mode)).unwrap();
            let theirs = dir.path().join(CLAIM);
            if mode == 0o1777 {
                std::fs::write(&theirs, "").unwrap();
                std::os::unix::fs::chown(&theirs, Some(1000), None).unwrap();
            }
            // Any user can lock the directory ('flock -x DIR') and, where the mode allows it, create a file of that
            // name.
            let directory = (mode != 0o700).then(|| std::fs::File::open(dir.path()).unwrap());
            let file = std::fs::File::open(&theirs).ok();
            for held in directory.iter().chain(&file) {
                rustix::fs::flock(held, FlockOperation::NonBlockingLockExclusive).unwrap();
            }
            files.claim().unwrap_or_else(|e| panic!("{mode:o}: {e}"));
            let mut second = SignalFiles::open(dir.path()).unwrap().unwrap();
            assert!(second.is_claimed() && second.claim().is_err(), "{mode:o}");
            if mode != 0o700 {
                assert_eq!(std::fs::metadata(&theirs).unwrap().permissions().mode() & 0o777, 0o600);
            }
            drop(files);
            assert!(!theirs.exists());
        }
    }

    #[test]
    fn shared_lock_of_status_does_not_keep_an_environment_from_claiming_the_parent() {
        let (dir, mut files) = parent();
        // Stand in for a `status` that is preempted while it has the shared lock.
        let directory = std::fs::File::open(dir.path()).unwrap();
        rustix::fs::flock(&directory, FlockOperation::LockShared).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(200));
                drop(directory);
            });
            files.claim().unwrap();
        });
    }

    #[test]
    fn watch_wakes_when_a_missing_parent_is_created() {
        let dir = tempfile::tempdir().unwrap();
        let late = dir.path().join("late");
        assert!(SignalFiles::open(&late).unwrap().is_none());
        let mut watch = Watch::new().unwrap();
        watch.on(&late);
        std::fs::create_dir(&late).unwrap();
        let mut woken = [rustix::event::PollFd::new(&watch, rustix::event::PollFlags::IN)];
        assert_eq!(crate::sys::poll::wait(&mut woken, Duration::from_secs(5)).unwrap(), 1);
    }
}
