//! The work directory of a job on this machine, with everything that belongs to the image. It must be owned by root,
//! because it contains setuid programs of the image and the image's /etc/shadow, which other users of the machine must
//! neither reach nor replace.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Advise, Attempt, Error, Result};
use crate::local::claim::{claim, is_claimed};
use crate::publish::prepare::holds_changes;
use crate::sys::named::refuse_changeable;
use crate::volume::layout::{CLAIM, IMAGE_ROOT, OVERLAY};
use crate::volume::signal_files::SignalFiles;

/// Default directory for the work directories of all runs.
pub const DEFAULT: &str = "/var/lib/ims-sshd";

/// Separates the name of a work directory from a number, if the changes in the directory are discarded at the end.
const TO_DISCARD: &str = "+discard";

/// Returns whether changes in `place` are discarded at the end.
pub(crate) fn is_to_discard(place: &Path) -> bool {
    place.file_name().is_some_and(|name| name.to_string_lossy().contains(TO_DISCARD))
}

/// Directory for earlier changes, put aside until the changes of a new run replace them or they are restored.
pub(crate) const ASIDE: &str = ".aside";

/// Name of [`ASIDE`] while it is being filled or emptied.
const MOVING: &str = ".aside.moving";

/// Returns whether `work` holds changes, in use or put aside.
pub(crate) fn holds_any_changes(work: &Path) -> bool {
    let places = [work.to_owned(), work.join(ASIDE), work.join(MOVING)];
    places.iter().any(|place| holds_changes(place, &place.join(IMAGE_ROOT)))
}

/// Drops the changes put aside in `work`. Returns whether there were any.
pub(crate) fn drop_aside(work: &Path) -> Result<bool> {
    let attempted = || format!("drop the earlier changes in {}", work.display());
    let Some(files) = SignalFiles::open(work)? else { return Ok(false) };
    if files.parent().look(ASIDE).attempt(attempted)?.is_none() {
        return Ok(false);
    }
    // Rename the directory first, so that the changes count as dropped even if some file cannot be removed.
    let dropped = format!(".dropped-{ASIDE}-{}", std::process::id());
    files.parent().rename(ASIDE, &dropped).attempt(attempted)?;
    files.parent().remove_whole(OsStr::new(&dropped)).attempt(attempted).map(|()| true)
}

/// A run's work directory, claimed as long as this value lives.
pub(crate) struct WorkDirectory {
    files: SignalFiles,
}

impl WorkDirectory {
    /// Creates the directory `name` below `all`, or claims the directory that an earlier run left behind. Fails if
    /// another run uses it.
    pub(crate) fn claim(all: &Path, name: &str) -> Result<Self> {
        let all = own(all)?;
        let place = claim(|| own(&all.join(name))).map(|files| Self { files })?;
        // A killed run may have put changes aside without replacing them.
        place.restore_aside().map(|_| place)
    }

    /// Like [`Self::claim`], for changes that are discarded at the end. Claims the first `name` with a number that no
    /// run uses, and removes files that a killed run left there.
    pub(crate) fn claim_to_discard(all: &Path, name: &str) -> Result<Self> {
        let mut number = 1;
        loop {
            let name = format!("{name}{TO_DISCARD}{number}");
            let in_use = || is_claimed(&all.join(&name)).unwrap_or(false);
            match Self::claim(all, &name) {
                Err(_) if in_use() => number += 1,
                claimed => return claimed.and_then(|place| place.clear().map(|()| place)),
            }
        }
    }

    /// Path of the directory, without symbolic links.
    pub(crate) fn path(&self) -> &Path {
        self.files.path()
    }

    /// Files in the directory, among them the records of a publication.
    pub(crate) fn files(&self) -> &SignalFiles {
        &self.files
    }

    /// Puts the kept changes aside, until others replace them or [`Self::restore_aside`] restores them.
    pub(crate) fn put_aside(&self) -> Result<()> {
        let attempted = || format!("put aside the changes kept in {}", self.path().display());
        let parent = self.files.parent();
        let aside = parent.make_private(MOVING).attempt(attempted)?;
        for name in self.kept_names()? {
            rustix::fs::renameat(parent, &name, &aside, &name).attempt(attempted)?;
        }
        // Rename the directory last, so that it is complete once it has its final name.
        parent.rename(MOVING, ASIDE).attempt(attempted)
    }

    /// Restores changes that were put aside, and removes those that have begun to replace them. Returns whether there
    /// were changes put aside.
    pub(crate) fn restore_aside(&self) -> Result<bool> {
        let attempted = || format!("restore the changes put aside in {}", self.path().display());
        let parent = self.files.parent();
        if parent.look(ASIDE).attempt(attempted)?.is_some() {
            self.kept_names()?.iter().try_for_each(|name| parent.remove_whole(name)).attempt(attempted)?;
            parent.rename(ASIDE, MOVING).attempt(attempted)?;
        }
        if parent.look(MOVING).attempt(attempted)?.is_none() {
            return Ok(false);
        }
        let aside = parent.directory_without_links(MOVING).attempt(attempted)?;
        for name in aside.names().attempt(attempted)? {
            rustix::fs::renameat(&aside, &name, parent, &name).attempt(attempted)?;
        }
        parent.remove_directory(MOVING).map(|_| true).attempt(attempted)
    }

    /// Names of the entries that an earlier run left, except the lock file and changes put aside.
    fn kept_names(&self) -> Result<Vec<OsString>> {
        let names = self.files.parent().names().attempt(|| format!("list {}", self.path().display()))?;
        Ok(names.into_iter().filter(|name| ![CLAIM, ASIDE, MOVING].iter().any(|own| name == own)).collect())
    }

    /// Removes what an earlier run left behind in the directory.
    pub(crate) fn clear(&self) -> Result<()> {
        let attempted = || format!("clear {}", self.path().display());
        let parent = self.files.parent();
        // Rename these first: a run that found only half of the changes would resume them, and lose renamed
        // directories.
        for name in [OVERLAY, IMAGE_ROOT] {
            let dropped = format!(".dropped-{name}");
            parent.remove_whole(OsStr::new(&dropped)).attempt(attempted)?;
            if parent.look(name).attempt(attempted)?.is_some() {
                parent.rename(name, &dropped).attempt(attempted)?;
            }
        }
        let mut names = parent.names().attempt(attempted)?;
        // Hidden files, which are the records of the changes, come last, so that no changes are ever left without a
        // record.
        names.sort_by(|a, b| b.cmp(a));
        for name in names {
            let removed = parent.remove_whole(&name);
            removed.attempt(|| format!("remove {}", self.path().join(&name).display()))?;
        }
        Ok(())
    }

    /// Removes the directory and everything in it.
    pub(crate) fn remove(self) -> Result<()> {
        self.clear()?;
        std::fs::remove_dir(self.path()).attempt(|| format!("remove {}", self.path().display()))
    }
}

/// Creates the directory `path` (mode 0700) if it does not exist, and returns its path without symbolic links. Fails if
/// another user could replace the directory or any above it.
pub(crate) fn own(path: &Path) -> Result<PathBuf> {
    let attempted = || format!("keep files of an image in {}", path.display());
    let advice = "name with --work a directory that only root can change, as well as all directories above it";
    let refuse = |why: String| Err::<PathBuf, _>(Error::new(attempted()).because(why).advise(advice));
    // Runs twice: before the directory is created, and on the result.
    let check = |there: &Path| {
        let check = |place: &Path| refuse_changeable(place, there != path).attempt(attempted).advise(advice);
        check(there)?;
        let real = std::fs::canonicalize(there).attempt(attempted)?;
        check(&real)?;
        Ok(real)
    };
    // Use symlink_metadata, since a link must be checked even if its target does not exist.
    if let Some(there) = path.ancestors().find(|place| std::fs::symlink_metadata(place).is_ok()) {
        check(there)?;
    }
    let mut make = std::fs::DirBuilder::new();
    make.recursive(true).mode(0o700).create(path).attempt(attempted)?;
    let real = check(path)?;
    let found = std::fs::symlink_metadata(&real).attempt(attempted)?;
    if found.uid() != 0 {
        return refuse(format!("it belongs to user {}", found.uid()));
    }
    if found.mode() & 0o077 != 0 {
        std::fs::set_permissions(&real, std::fs::Permissions::from_mode(0o700)).attempt(attempted)?;
    }
    Ok(real)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_another_user_can_replace_is_refused_before_anything_is_created() {
        let dir = tempfile::tempdir().unwrap();
        let theirs = dir.path().join("theirs");
        std::fs::create_dir(&theirs).unwrap();
        std::os::unix::fs::chown(&theirs, Some(1234), Some(1234)).unwrap();
        for work in ["ims-sshd", "new/ims-sshd"] {
            let error = own(&theirs.join(work)).unwrap_err().to_string();
            assert!(error.contains("belongs to user 1234"), "{error}");
            assert_eq!(std::fs::read_dir(&theirs).unwrap().count(), 0, "{work}");
        }
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path().join("missing"), &link).unwrap();
        std::os::unix::fs::lchown(&link, Some(1234), Some(1234)).unwrap();
        let error = own(&link.join("ims-sshd")).unwrap_err().to_string();
        assert!(error.contains("link belongs to user 1234"), "{error}");
        let open = dir.path().join("open");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, PermissionsExt::from_mode(0o777)).unwrap();
        own(&open.join("ims-sshd")).unwrap_err();
        assert_eq!(std::fs::read_dir(&open).unwrap().count(), 0);
        std::fs::set_permissions(&open, PermissionsExt::from_mode(0o1777)).unwrap();
        assert_eq!(own(&open.join("ims-sshd")).unwrap(), open.canonicalize().unwrap().join("ims-sshd"));
    }

    #[test]
    fn partly_dropped_changes_count_as_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let place = WorkDirectory::claim(&dir.path().join("all"), "job").unwrap();
        let within = |path: &str| place.path().join(path);
        std::fs::create_dir_all(within("overlay/upper/stuck")).unwrap();
        std::fs::write(within("overlay/upper/file"), "changed").unwrap();
        let stuck = within("overlay/upper/stuck");
        rustix::mount::mount("t", &stuck, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
        // The first attempt fails halfway, as if killed.
        let error = place.clear().unwrap_err();
        rustix::mount::unmount(within(".dropped-overlay/upper/stuck"), rustix::mount::UnmountFlags::empty()).unwrap();
        assert!(!within("overlay").exists(), "{error}");
        place.clear().unwrap();
        assert!(!within(".dropped-overlay").exists());
    }
}
