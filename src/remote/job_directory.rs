//! A job's directory on a node, `/tmp/ims_JOB`. IMS counts these directories to find out how busy a node is.
//!
//! A job's first process holds a lock in the directory as long as it lives. If the lock is free, the job was killed or
//! the node went down, and the next job removes the directory.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::error::{Attempt, Error, Result};
use crate::sys::tree::Tree;

/// Parent directory of the jobs' directories.
pub(crate) const TMP: &str = "/tmp";

/// Prefix of the directories' names. IMS expects this prefix.
const PREFIX: &str = "ims_";

/// Prefix of a directory's name until its lock is taken.
const NEW: &str = ".ims-sshd.";

/// Name of the lock file in a job's directory.
const LOCK: &str = ".ims-sshd.lock";

/// Directory in a job's directory, shared by sessions and the environment.
pub(crate) const IMAGE: &str = "image";
/// Directory in a job's directory, for the files that are sent back.
pub(crate) const RESULTS: &str = "results";

/// The directory of a running job.
pub(crate) struct JobDirectory {
    tmp: Tree,
    name: String,
    tree: Tree,
    _lock: OwnedFd,
}

impl JobDirectory {
    /// Creates the directory, which must not exist yet. First removes the directories of dead jobs.
    pub(crate) fn make(job: &str) -> Result<Self> {
        Self::make_in(Path::new(TMP), job)
    }

    fn make_in(tmp: &Path, job: &str) -> Result<Self> {
        let name = format!("{PREFIX}{job}");
        let shown = tmp.join(&name);
        let attempted = || format!("create the directory {}", shown.display());
        let tmp = Tree::open(tmp).attempt(attempted)?;
        sweep(&tmp);
        // Lock the directory before it gets its name, so that no other job takes it for the directory of a dead job.
        let new = format!("{NEW}{job}.{}", std::process::id());
        let tree = tmp.make_private(&new).attempt(attempted)?;
        let made = fill(&tree).and_then(|lock| {
            rustix::fs::renameat_with(&tmp, &new, &tmp, &name, RenameFlags::NOREPLACE)?;
            Ok(lock)
        });
        let lock = made.map_err(|e| {
            let _ = tmp.remove_whole(new.as_ref());
            let refused = Error::new(attempted());
            if Errno::from_io_error(&e) != Some(Errno::EXIST) {
                return refused.because(e);
            }
            let is_ours = lock(&tmp, &name).is_err_and(|e| Errno::from_io_error(&e) == Some(Errno::WOULDBLOCK));
            if is_ours {
                return refused.because("the job runs there already");
            }
            refused.because("it exists, and no job of this program made it").advise("see what it is, and remove it")
        })?;
        Ok(Self { tmp, name, tree, _lock: lock })
    }

    /// Returns the directory itself.
    pub(crate) fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Returns the path of the directory of `job`.
    pub(crate) fn path(job: &str) -> PathBuf {
        Path::new(TMP).join(format!("{PREFIX}{job}"))
    }

    /// Removes the directory with everything in it.
    pub(crate) fn remove(self) -> Result<()> {
        let attempted = || format!("remove {}", self.tmp.shown().join(&self.name).display());
        self.tmp.remove_whole(self.name.as_ref()).attempt(attempted)
    }
}

/// Returns the number of jobs on the node, counted in the same way as IMS does.
pub(crate) fn count() -> Result<usize> {
    let attempted = || format!("list {TMP}");
    let names = Tree::open(Path::new(TMP)).and_then(|tmp| tmp.names()).attempt(attempted)?;
    Ok(names.iter().filter(|name| name.to_string_lossy().starts_with(PREFIX)).count())
}

fn fill(tree: &Tree) -> io::Result<OwnedFd> {
    for name in [IMAGE, RESULTS] {
        tree.make_private(name)?;
    }
    let lock = tree.create_file(LOCK)?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
    Ok(lock.into())
}

/// Locks the directory `name`. Fails unless root owns it and a job of this program created it.
fn lock(tmp: &Tree, name: &str) -> io::Result<OwnedFd> {
    let tree = tmp.directory_without_links(name)?;
    let file = tree.open_regular(LOCK, OFlags::RDONLY | OFlags::NOFOLLOW)?;
    for found in [rustix::fs::fstat(&tree)?, rustix::fs::fstat(&file)?] {
        if found.st_uid != rustix::process::geteuid().as_raw() || found.st_mode & 0o022 != 0 {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
    }
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(file.into())
}

/// Removes the directories of dead jobs.
fn sweep(tmp: &Tree) {
    for name in tmp.names().unwrap_or_default() {
        let Some(name) = name.to_str().filter(|name| name.starts_with(PREFIX) || name.starts_with(NEW)) else {
            continue;
        };
        let Ok(_lock) = lock(tmp, name) else { continue };
        match tmp.remove_whole(name.as_ref()) {
            Ok(()) => tracing::info!("removed {}, which a dead job has left", tmp.shown().join(name).display()),
            Err(e) => tracing::warn!("cannot remove {}: {e}", tmp.shown().join(name).display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn only_directories_of_dead_jobs_are_removed() {
        let tmp = tempfile::tempdir().unwrap();
        let live = JobDirectory::make_in(tmp.path(), "live").unwrap();
        let dead = JobDirectory::make_in(tmp.path(), "dead").unwrap();
        std::fs::write(tmp.path().join("ims_dead/image/file"), "").unwrap();
        drop(dead);
        // Test with upstream's directory, which has no lock file, and with one that another user made to look like
        // ours.
        for name in ["ims_upstream", "ims_other", "other"] {
            std::fs::create_dir(tmp.path().join(name)).unwrap();
        }
        let others = tmp.path().join("ims_other");
        std::fs::write(others.join(LOCK), "").unwrap();
        std::os::unix::fs::chown(&others, Some(1000), None).unwrap();
        std::fs::write(tmp.path().join("other").join(LOCK), "").unwrap();
        JobDirectory::make_in(tmp.path(), "next").unwrap().remove().unwrap();
        let mut left: Vec<_> = std::fs::read_dir(tmp.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["ims_live", "ims_other", "ims_upstream", "other"]);
        live.remove().unwrap();
    }

    #[test]
    fn directory_or_link_that_is_not_ours_is_refused_and_stays() {
        let tmp = tempfile::tempdir().unwrap();
        std::fs::create_dir(tmp.path().join("ims_a")).unwrap();
        std::fs::create_dir(tmp.path().join("target")).unwrap();
        symlink("target", tmp.path().join("ims_b")).unwrap();
        let _live = JobDirectory::make_in(tmp.path(), "c").unwrap();
        for (job, why) in
            [("a", "no job of this program"), ("b", "no job of this program"), ("c", "runs there already")]
        {
            let refused = JobDirectory::make_in(tmp.path(), job).err().unwrap().to_string();
            assert!(refused.contains(why), "{refused}");
        }
        let mode = std::fs::metadata(tmp.path().join("ims_c")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        assert_eq!(std::fs::read_dir(tmp.path()).unwrap().count(), 4);
    }
}
