//! Work directory of a job on this machine, owned by root, for all that belongs to the image. Setuid programs of the
//! image and its /etc/shadow lie below, which the machine's other users must neither reach nor exchange.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Attempt, Error, Result};
use crate::local::claim::{claim, is_claimed};
use crate::publish::prepare::holds_changes;
use crate::sys::named::{WRITABLE, is_trusted};
use crate::volume::layout::{CLAIM, IMAGE_ROOT, OVERLAY};
use crate::volume::signal_files::SignalFiles;

/// The directory of all jobs, where the command line names none.
pub const DEFAULT: &str = "/var/lib/ims-sshd";

/// A bit of a directory's mode with which others can change only what is theirs.
const STICKY: u32 = 0o1000;

/// Separates a job's name from a number, where changes are discarded at the end.
const TO_DISCARD: &str = "+discard";

/// Returns whether changes in `place` are discarded at the end.
pub(crate) fn is_to_discard(place: &Path) -> bool {
    place.file_name().is_some_and(|name| name.to_string_lossy().contains(TO_DISCARD))
}

/// Directory for what is to be dropped as soon as something has taken its place.
pub(crate) const ASIDE: &str = ".aside";

/// Its name as long as it is filled or emptied.
const MOVING: &str = ".aside.moving";

/// Returns whether changes are in `work`, or put aside there.
pub(crate) fn holds_any_changes(work: &Path) -> bool {
    let places = [work.to_owned(), work.join(ASIDE), work.join(MOVING)];
    places.iter().any(|place| holds_changes(place, &place.join(IMAGE_ROOT)))
}

/// Drops what is put aside in `work`. Returns whether anything was.
pub(crate) fn drop_aside(work: &Path) -> Result<bool> {
    let attempted = || format!("drop what was changed before in {}", work.display());
    let Some(files) = SignalFiles::open(work)? else { return Ok(false) };
    if files.parent().look(ASIDE).attempt(attempted)?.is_none() {
        return Ok(false);
    }
    // A name that nothing has: what cannot be removed must not keep it from being dropped.
    let dropped = format!(".dropped-{ASIDE}-{}", std::process::id());
    files.parent().rename(ASIDE, &dropped).attempt(attempted)?;
    files.parent().remove_whole(OsStr::new(&dropped)).attempt(attempted).map(|()| true)
}

/// One job's directory, claimed as long as this value lives.
pub(crate) struct WorkDirectory {
    files: SignalFiles,
}

impl WorkDirectory {
    /// Makes the directory `name` below `all`, or finds it as an earlier run has left it. Another run that is using it is an error.
    pub(crate) fn claim(all: &Path, name: &str) -> Result<Self> {
        let all = own(all)?;
        let place = claim(|| own(&all.join(name))).map(|files| Self { files })?;
        // Of a run that was killed before anything took its place.
        place.take_back().map(|_| place)
    }

    /// The same for changes that are discarded at the end: the first of `name` with a number that no other run is using, without what a run
    /// that was killed has left in it.
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

    /// The directory, without links on the way to it.
    pub(crate) fn path(&self) -> &Path {
        self.files.path()
    }

    /// Its files, among them what is noted of a publication.
    pub(crate) fn files(&self) -> &SignalFiles {
        &self.files
    }

    /// Puts all that is kept aside, to be dropped when something has taken its place, or [`Self::take_back`] has it there again.
    pub(crate) fn put_aside(&self) -> Result<()> {
        let attempted = || format!("put aside what is kept in {}", self.path().display());
        let parent = self.files.parent();
        let aside = parent.make_private(MOVING).attempt(attempted)?;
        for name in self.kept_names()? {
            rustix::fs::renameat(parent, &name, &aside, &name).attempt(attempted)?;
        }
        // At one stroke: whoever finds that name finds all of it there.
        parent.rename(MOVING, ASIDE).attempt(attempted)
    }

    /// Puts what was put aside back, and removes what has begun to take its place. Returns whether anything was aside.
    pub(crate) fn take_back(&self) -> Result<bool> {
        let attempted = || format!("take back what was put aside in {}", self.path().display());
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

    /// Names of what an earlier run has left, but for the file that is locked.
    fn kept_names(&self) -> Result<Vec<OsString>> {
        let names = self.files.parent().names().attempt(|| format!("list {}", self.path().display()))?;
        Ok(names.into_iter().filter(|name| ![CLAIM, ASIDE, MOVING].iter().any(|own| name == own)).collect())
    }

    /// Removes what an earlier run has left in it.
    pub(crate) fn clear(&self) -> Result<()> {
        let attempted = || format!("clear {}", self.path().display());
        let parent = self.files.parent();
        // Changes go at one stroke: a run that finds half of them would go on with those, and lose what they had moved.
        for name in [OVERLAY, IMAGE_ROOT] {
            let dropped = format!(".dropped-{name}");
            parent.remove_whole(OsStr::new(&dropped)).attempt(attempted)?;
            if parent.look(name).attempt(attempted)?.is_some() {
                parent.rename(name, &dropped).attempt(attempted)?;
            }
        }
        let mut names = parent.names().attempt(attempted)?;
        // Hidden files, which record the changes, come last: a run that is killed here has less of them than it says.
        names.sort_by(|a, b| b.cmp(a));
        for name in names {
            let removed = parent.remove_whole(&name);
            removed.attempt(|| format!("remove {}", self.path().join(&name).display()))?;
        }
        Ok(())
    }

    /// Removes it with what is in it.
    pub(crate) fn remove(self) -> Result<()> {
        self.clear()?;
        std::fs::remove_dir(self.path()).attempt(|| format!("remove {}", self.path().display()))
    }
}

/// Makes the directory `path` (mode 0700) if it is not there, and returns it without links, once it is certain that only root decides
/// what is found by that path.
fn own(path: &Path) -> Result<PathBuf> {
    let attempted = || format!("keep files of an image in {}", path.display());
    let advice = "name a directory by --work that only root can change, and all above it";
    let refuse = |why: String| Err::<PathBuf, _>(Error::new(attempted()).because(why).advise(advice));
    // Called before anything is made there, and once more with what was made.
    let check = |there: &Path| {
        let real = std::fs::canonicalize(there).attempt(attempted)?;
        // The links on the way first: each is a decision of whoever made it.
        for place in there.ancestors().chain(real.ancestors()) {
            let found = std::fs::symlink_metadata(place).attempt(attempted)?;
            if !is_trusted(found.uid()) {
                let owner = found.uid();
                return refuse(format!("{} belongs to user {owner}, who can exchange what is there", place.display()));
            }
            let is_open = found.mode() & WRITABLE != 0 && !found.is_symlink();
            if is_open && (there == path && place == real || found.mode() & STICKY == 0) {
                return refuse(format!("others than its owner can write to {}", place.display()));
            }
        }
        Ok(real)
    };
    if let Some(there) = path.ancestors().find(|place| place.exists()) {
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
    fn a_place_that_another_user_can_exchange_is_refused_before_anything_is_made_there() {
        let dir = tempfile::tempdir().unwrap();
        let theirs = dir.path().join("theirs");
        std::fs::create_dir(&theirs).unwrap();
        std::os::unix::fs::chown(&theirs, Some(1234), Some(1234)).unwrap();
        for work in ["ims-sshd", "new/ims-sshd"] {
            let error = own(&theirs.join(work)).unwrap_err().to_string();
            assert!(error.contains("belongs to user 1234"), "{error}");
            assert_eq!(std::fs::read_dir(&theirs).unwrap().count(), 0, "{work}");
        }
        let open = dir.path().join("open");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, PermissionsExt::from_mode(0o777)).unwrap();
        own(&open.join("ims-sshd")).unwrap_err();
        assert_eq!(std::fs::read_dir(&open).unwrap().count(), 0);
        std::fs::set_permissions(&open, PermissionsExt::from_mode(0o1777)).unwrap();
        assert_eq!(own(&open.join("ims-sshd")).unwrap(), open.canonicalize().unwrap().join("ims-sshd"));
    }

    #[test]
    fn changes_that_are_dropped_in_part_are_gone_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let place = WorkDirectory::claim(&dir.path().join("all"), "job").unwrap();
        let within = |path: &str| place.path().join(path);
        std::fs::create_dir_all(within("overlay/upper/stuck")).unwrap();
        std::fs::write(within("overlay/upper/file"), "changed").unwrap();
        let stuck = within("overlay/upper/stuck");
        rustix::mount::mount("t", &stuck, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
        // It ends in the middle, as by a kill.
        let error = place.clear().unwrap_err();
        rustix::mount::unmount(within(".dropped-overlay/upper/stuck"), rustix::mount::UnmountFlags::empty()).unwrap();
        assert!(!within("overlay").exists(), "{error}");
        place.clear().unwrap();
        assert!(!within(".dropped-overlay").exists());
    }
}
