//! Signal files: what one container of the pod tells another, by creating a file in the image root's parent.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, UNIX_EPOCH};

use notify::{RecursiveMode, Watcher};
use rustix::event::EventfdFlags;
use rustix::fs::{FlockOperation, Mode, OFlags, Stat};

use crate::error::{Advise, Attempt, Error, Result};
use crate::printable::Printable;
use crate::sys::file_kind::FileKind;
use crate::sys::tree::Tree;
use crate::verdict::Verdict;
use crate::volume::layout::{CLAIM, READY, RESERVED, SIDECAR_CLAIM};

/// Content of a sidecar's mark for an environment that waits for `ready`, which will not come; the pod's host name stands between. It counts
/// though it was made before the environment began to wait; other marks from before are an earlier job's.
const INSTEAD_OF_READY: [&[u8]; 2] = [b"by the sidecar on ", b", instead of 'ready'\n"];

/// The content is no longer: a host name has at most 64 bytes.
const INSTEAD_LIMIT: u64 = 256;

/// A sidecar's mark of another host name that is older is an earlier pod's. A container's start takes less, with its image fetched.
const EARLIER: Duration = Duration::from_mins(10);

/// Tells a signal file from one that had its name before: inode, and time of its last change.
pub(crate) type Stamp = (u64, i64, u64);

/// How long a signal file can stay unseen at the most where the file system raises no event.
pub(crate) const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Keeps other sidecars away.
pub(crate) struct SidecarClaim<'a> {
    files: &'a SignalFiles,
    lock: Option<OwnedFd>,
}

impl Drop for SidecarClaim<'_> {
    fn drop(&mut self) {
        if self.lock.is_some() {
            let _ = self.files.parent.remove(SIDECAR_CLAIM);
        }
    }
}

/// The image root's parent, open: signal files are made and looked for by descriptor, and never through a link.
pub struct SignalFiles {
    parent: Tree,
    path: PathBuf,
    /// Held for life: two environments on one parent would end each other.
    lock: Option<OwnedFd>,
}

impl SignalFiles {
    /// Opens the parent; `None` if it does not exist (yet).
    pub(crate) fn open(path: &Path) -> Result<Option<Self>> {
        match Tree::open(path) {
            Ok(parent) => Ok(Some(Self { parent, path: path.to_owned(), lock: None })),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e)
                .attempt(|| format!("open the image root parent {}", path.display()))
                .advise("it has to be a directory, not a link to one"),
        }
    }

    /// The parent's path, for messages and for programs that are told it.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The parent itself.
    pub(crate) fn parent(&self) -> &Tree {
        &self.parent
    }

    /// Claims the parent for this environment, as long as this value lives.
    pub(crate) fn claim(&mut self) -> Result<()> {
        let attempted = || claiming(&self.path);
        // More than one try: `status` looks by sharing the lock for a moment, which is no claim, however long the machine makes of it.
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(10) {
            let Some(lock) = self.lockable(true).attempt(attempted)? else { continue };
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                // It may have been the claim of one who has removed it since.
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

    /// Opens the file that a claim locks: the parent itself, where only root can open it, else a file in it that only root can open, since
    /// anybody who can open a file can lock it (flock(2)). Nothing if the file is missing and is not to be `made`, or is not root's.
    fn lockable(&self, made: bool) -> io::Result<Option<OwnedFd>> {
        let parent = rustix::fs::fstat(&self.parent)?;
        if parent.st_mode & 0o044 == 0 {
            return self.parent.reopen().map(Some);
        }
        let (create, bits) = if made { (OFlags::CREATE, 0o600) } else { (OFlags::empty(), 0) };
        // Not for writing, which would keep the volume from being made read-only.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | create;
        let file = match self.parent.open_at(CLAIM, flags, Mode::from_raw_mode(bits)) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            // A full volume, or one that cannot be written to: what comes next tells so.
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
        // Another user who made it may have it open.
        let is_ours = found.st_uid == rustix::process::geteuid().as_raw() && found.st_mode & 0o066 == 0;
        if !is_ours && made {
            self.parent.remove(CLAIM)?;
        }
        Ok(is_ours.then_some(file))
    }

    /// Returns whether `lock` is the file that a claim locks, and has not been removed.
    fn is_lockable(&self, lock: &OwnedFd) -> bool {
        let identity = |file: BorrowedFd<'_>| rustix::fs::fstat(file).map(|found| (found.st_dev, found.st_ino)).ok();
        let named = self.lockable(false).ok().flatten();
        let places = [Some(self.parent.as_fd()), named.as_ref().map(AsFd::as_fd)];
        places.into_iter().flatten().any(|place| identity(place) == identity(lock.as_fd()))
    }

    /// Claims the parent for its sidecar, which stands beside the environment, as long as the value that is returned lives. An error if
    /// another one has it; where that cannot be told, what comes next goes on, or says why it cannot.
    pub(crate) fn claim_for_sidecar(&self) -> Result<SidecarClaim<'_>> {
        let mut claim = SidecarClaim { files: self, lock: None };
        // Somebody may remove it, again and again.
        for _ in 0..100 {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CREATE;
            let lock = self.parent.open_at(SIDECAR_CLAIM, flags, Mode::from_raw_mode(0o600));
            let Ok(lock) = lock.inspect_err(|e| tracing::debug!("cannot look for another sidecar: {e}")) else { break };
            let Ok(found) = rustix::fs::fstat(&lock) else { break };
            if found.st_uid != rustix::process::geteuid().as_raw() || found.st_mode & 0o066 != 0 {
                // Another user who made it may have it open, and locked.
                let _ = self.parent.remove(SIDECAR_CLAIM);
                continue;
            }
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {
                    let named = self.parent.look(SIDECAR_CLAIM).ok().flatten();
                    // A file of another number: the run that had this one has removed it.
                    if named.is_some_and(|named| (named.st_dev, named.st_ino) == (found.st_dev, found.st_ino)) {
                        claim.lock = Some(lock);
                        break;
                    }
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(Error::new(format!("take care of {}", self.path.display()))
                        .because("another sidecar does")
                        .advise("the job goes on with that one; a volume is one job's"));
                }
                // A file system without locks.
                Err(_) => break,
            }
        }
        Ok(claim)
    }

    /// A descriptor that keeps the claim beyond this value's life.
    pub(crate) fn share_claim(&self) -> io::Result<Option<OwnedFd>> {
        self.lock.as_ref().map(OwnedFd::try_clone).transpose()
    }

    /// Whether another process has claimed the parent.
    pub(crate) fn is_claimed(&self) -> bool {
        let Ok(Some(lock)) = self.lockable(false) else { return false };
        rustix::fs::flock(lock, FlockOperation::NonBlockingLockShared) == Err(rustix::io::Errno::WOULDBLOCK)
    }

    /// Whether the signal file `name` stands there. Only a regular file is one; what else has the name is an error.
    pub(crate) fn stands(&self, name: &str) -> Result<bool> {
        let shown = || format!("{}/{name}", self.path.display());
        let found = self.parent.look(name).attempt(|| format!("look for {}", shown()))?;
        match found.as_ref().map(FileKind::of) {
            None => Ok(false),
            Some(FileKind::Regular) => Ok(true),
            Some(other) => Err(Error::new(format!("take {} as a signal file", shown()))
                .because(format!("it is {other}"))
                .advise("remove it; 'touch' makes a regular file")),
        }
    }

    /// Creates the signal file `name`, or finds it there. What else has the name is put aside, never followed.
    pub(crate) fn touch(&self, name: &str) -> Result<()> {
        let attempted = || format!("create {}/{name}", self.path.display());
        if let Ok(Some(odd)) =
            self.parent.look(name).map(|found| found.filter(|f| FileKind::of(f) != FileKind::Regular))
        {
            self.put_aside(name, &odd).attempt(attempted)?;
        }
        self.create(&self.parent, name.as_ref())
            .attempt(attempted)
            .advise("the volume has to be writable and to have space")
    }

    /// Creates the file `name` below `tree`, which lies on the parent's volume: if the volume is full, with one of the reserved files, or
    /// as another name of `ready`, where it was full before any could be reserved.
    pub(crate) fn create(&self, tree: &Tree, name: &Path) -> io::Result<()> {
        match tree.touch(name) {
            Err(e) if matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                let reserved = RESERVED.iter().any(|reserved| self.parent.rename_to(reserved, tree, name).is_ok());
                if reserved || self.parent.link_to(READY, tree, name).is_ok() { Ok(()) } else { Err(e) }
            }
            other => other.map(|_| ()),
        }
    }

    /// Puts files aside, to have them when a full volume takes no new one: a verdict has to be told all the same.
    pub(crate) fn reserve(&self) -> Result<()> {
        for name in RESERVED {
            self.parent
                .touch(name)
                .attempt(|| format!("create {}/{name}", self.path.display()))
                .advise("the volume has to be writable and to have space")?;
        }
        Ok(())
    }

    /// Removes what of the reserve was not needed.
    pub(crate) fn release_reserve(&self) -> Result<()> {
        RESERVED.iter().try_for_each(|name| self.remove(name))
    }

    /// Marks the image for an environment that waits for `ready`.
    pub(crate) fn mark_instead_of_ready(&self, verdict: Verdict) -> Result<()> {
        let name = verdict.signal_file();
        let text = [INSTEAD_OF_READY[0], host_name().trim_ascii(), INSTEAD_OF_READY[1]].concat();
        // A full volume takes no new file, but perhaps an empty one.
        self.parent.replace(name, &text).or_else(|_| self.retract(name).and_then(|()| self.touch(name)))
    }

    /// The verdict of an environment that waits for `ready`, if it has one already. `old` is the stamp of the `failed` from before.
    pub(crate) fn verdict_instead_of_ready(&self, old: Option<Stamp>) -> Option<Verdict> {
        let failed = Verdict::Failed.signal_file();
        if self.stands(failed).is_ok_and(|stands| stands) && self.stamp(failed) != old {
            return Some(Verdict::Failed);
        }
        [Verdict::Failed, Verdict::Complete]
            .into_iter()
            .find(|verdict| self.sidecar_of(verdict.signal_file()).is_some())
    }

    /// Host name of the sidecar that made the mark `name` instead of `ready`, if one did.
    fn sidecar_of(&self, name: &str) -> Option<Vec<u8>> {
        let text = self.parent.read(name, INSTEAD_LIMIT).ok()?;
        Some(text.strip_prefix(INSTEAD_OF_READY[0])?.strip_suffix(INSTEAD_OF_READY[1])?.to_vec())
    }

    /// Removes marks that the sidecar of an earlier pod made instead of `ready`: they would close an environment that has just begun.
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
                    "removed '{name}' of an earlier pod: the sidecar on {} made it at {made}",
                    Printable(&host)
                );
            }
        }
        Ok(())
    }

    /// Stamps of the verdicts, as in [`Verdict::ALL`].
    pub(crate) fn verdict_stamps(&self) -> [Option<Stamp>; 2] {
        Verdict::ALL.map(|verdict| self.stamp(verdict.signal_file()))
    }

    /// Removes verdicts that stood when this run began, with the stamps `old`, and are older than `ready`. They are an earlier job's: whoever
    /// creates `ready` has removed those, and a mark of this job is made after it.
    pub(crate) fn remove_marks_of_earlier_jobs(&self, old: [Option<Stamp>; 2]) -> Result<()> {
        let Some((_, seconds, nanoseconds)) = self.stamp(READY) else { return Ok(()) };
        for (verdict, old) in Verdict::ALL.into_iter().zip(old) {
            let name = verdict.signal_file();
            let is_earlier =
                old.is_some_and(|old| self.stamp(name) == Some(old) && (old.1, old.2) < (seconds, nanoseconds));
            // What is no signal file is an error later.
            if is_earlier && self.stands(name).unwrap_or(false) {
                self.remove(name)?;
                tracing::info!(
                    "removed '{name}', which is older than '{READY}': an earlier job on this volume was marked so"
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

    /// Removes the signal file `name` if it stands there.
    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        self.parent.remove(name).attempt(|| format!("remove {}/{name}", self.path.display())).map(|_| ())
    }

    /// Takes the mark `name` back: whatever has that name is removed, or put aside.
    pub(crate) fn retract(&self, name: &str) -> Result<()> {
        let attempted = || format!("remove {}/{name}", self.path.display());
        match self.parent.remove(name) {
            Err(e) if e.kind() == io::ErrorKind::IsADirectory => {
                self.parent.look(name).and_then(|found| found.map_or(Ok(()), |odd| self.put_aside(name, &odd)))
            }
            other => other.map(|_| ()),
        }
        .attempt(attempted)
    }

    /// Gives what is no signal file another name, which nothing else has.
    fn put_aside(&self, name: &str, odd: &Stat) -> io::Result<()> {
        let aside = format!("{name}.{}", odd.st_ino);
        self.parent.rename_to(name, &self.parent, &aside)?;
        tracing::warn!("{name} was {} and has been renamed to {aside}", FileKind::of(odd));
        Ok(())
    }

    /// Whether `tree` is still what stands at `name`.
    pub(crate) fn holds(&self, name: &str, tree: &Tree) -> bool {
        let identity = |stat: rustix::fs::Stat| (stat.st_dev, stat.st_ino);
        match (self.parent.look(name), rustix::fs::fstat(tree)) {
            (Ok(Some(now)), Ok(then)) => identity(now) == identity(then),
            _ => false,
        }
    }

    /// The verdict that stands there. `failed` wins.
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
        // Under the lock: who has opened it meanwhile finds that it is gone.
        if self.lock.is_some() {
            let _ = self.parent.remove(CLAIM);
        }
    }
}

/// Host name, which all containers of a pod share and no other pod has.
fn host_name() -> Vec<u8> {
    std::fs::read("/proc/sys/kernel/hostname").unwrap_or_default()
}

fn claiming(path: &Path) -> String {
    format!("claim {}", path.display())
}

/// Why nothing else can be done with `path`.
pub(crate) fn claimed(path: &Path) -> Error {
    Error::new(claiming(path)).because("another build environment is open on it").advise(
        "'ims-sshd status' names it; an 'enter' ends with its shell or command, others with 'ims-sshd fail NAME'",
    )
}

/// Warns, once, that one looks at intervals.
pub(crate) fn warn_without_inotify() {
    static TOLD: std::sync::Once = std::sync::Once::new();
    TOLD.call_once(|| {
        tracing::warn!(
            "root has no inotify instance left (fs.inotify.max_user_instances): marks and signal files are seen within {} s",
            LOOK_EVERY.as_secs()
        );
    });
}

/// Wakes the event loop when something happens in a folder. A hint and no more: a network file system tells nothing of another node's
/// writes, so whoever waits has to look at intervals too.
pub(crate) struct Watch {
    wake: OwnedFd,
    /// The folder that is watched, and by what; nothing if the kernel has no watch to spare.
    watched: Option<(PathBuf, notify::RecommendedWatcher)>,
}

impl Watch {
    /// A watch on nothing.
    pub(crate) fn new() -> Result<Self> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        Ok(Self { wake: wake.attempt(|| "make an event descriptor")?, watched: None })
    }

    /// Watches `path`, or as long as it does not exist the nearest folder above it that does.
    pub(crate) fn on(&mut self, path: &Path) {
        let Some(folder) = path.ancestors().find(|p| p.is_dir()) else { return };
        if self.watched.as_ref().is_some_and(|(watched, _)| watched == folder) {
            return;
        }
        let Ok(wake) = self.wake.try_clone() else { return };
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reads of the folder, ours among them, are no news.
            if !matches!(event, Ok(notify::Event { kind: notify::EventKind::Access(_), .. })) {
                let _ = rustix::io::write(&wake, &1_u64.to_ne_bytes());
            }
        });
        self.watched = watcher.ok().and_then(|mut watcher| {
            watcher.watch(folder, RecursiveMode::NonRecursive).ok()?;
            Some((folder.to_owned(), watcher))
        });
        if self.watched.is_none() {
            warn_without_inotify();
        }
    }

    /// Takes note of what woke us.
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
    fn what_is_no_regular_file_is_no_signal_file() {
        let (dir, files) = parent();
        std::fs::create_dir(dir.path().join("complete")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("failed")).unwrap();
        assert!(files.stands("complete").unwrap_err().to_string().contains("a directory"));
        assert!(files.stands("failed").unwrap_err().to_string().contains("a symbolic link"));
        files.touch("failed").unwrap();
        assert!(files.stands("failed").unwrap(), "what was in the way has been put aside");
    }

    #[test]
    fn a_parent_is_claimed_by_one() {
        let (dir, mut files) = parent();
        assert!(!files.is_claimed());
        files.claim().unwrap();
        let mut second = SignalFiles::open(dir.path()).unwrap().unwrap();
        assert!(second.is_claimed());
        assert!(second.claim().unwrap_err().to_string().contains("another build environment"));
        drop(files);
        // A child that another test has just started has it open until it becomes another program.
        let began = Instant::now();
        while let Err(error) = second.claim() {
            assert!(began.elapsed() < Duration::from_secs(5), "{error}");
        }
    }

    #[test]
    fn no_other_user_can_lock_a_parent_that_he_can_read() {
        for mode in [0o755, 0o1777, 0o700] {
            let (dir, mut files) = parent();
            std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(mode)).unwrap();
            let theirs = dir.path().join(CLAIM);
            if mode == 0o1777 {
                std::fs::write(&theirs, "").unwrap();
                std::os::unix::fs::chown(&theirs, Some(1000), None).unwrap();
            }
            // Any user can do this: 'flock -x DIR' and, where he may make files, one of that name.
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
    fn to_look_whether_a_parent_is_claimed_does_not_keep_others_from_claiming_it() {
        let (dir, mut files) = parent();
        // As one who looks, and whom the kernel lets wait in the midst of it.
        let folder = std::fs::File::open(dir.path()).unwrap();
        rustix::fs::flock(&folder, FlockOperation::LockShared).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(200));
                drop(folder);
            });
            files.claim().unwrap();
        });
    }

    #[test]
    fn a_parent_that_does_not_exist_is_watched_for() {
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
