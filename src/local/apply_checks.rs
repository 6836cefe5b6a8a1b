//! Checks before changes are applied to a directory.

use std::ffi::OsStr;
use std::io;
use std::path::Path;

use rustix::fs::{Access, AtFlags, StatxAttributes, StatxFlags, Timespec, Timestamps, UTIME_NOW};

use crate::error::{Attempt, Error, Result};
use crate::image::upper_layer::{Directories, directories, touched};
use crate::local::apply_progress::{Progress, Step};
use crate::sys::tree::Tree;
use crate::volume::layout::SOURCE;

/// Refuses a directory to which no changes can be applied, for example on a read-only mount.
pub(crate) fn refuse_unwritable(root: &Tree) -> Result<()> {
    // This changes nothing, not even a time.
    rustix::fs::accessat(root, ".", Access::WRITE_OK, AtFlags::empty())
        .attempt(|| format!("write to {}, to which the changes are to be applied", root.shown().display()))
        .map_err(|e| e.advise("make it writable, or name a store for the new image with --output"))
}

/// Refuses, before anything is applied, changes that the file system would refuse halfway.
pub(crate) fn refuse_unchangeable(upper: &Tree, root: &Tree, directories: &Directories) -> Result<()> {
    refuse_unwritable(root)?;
    let attempted = || format!("apply the changes to {}", root.shown().display());
    let fixed = touched(upper, root, directories, |_, directory, name| is_fixed(directory, name)).attempt(attempted)?;
    if let Some(path) = fixed.first() {
        let shown = root.shown().join(path);
        return Err(Error::new(attempted())
            .because(format!("{} is immutable or append-only", shown.display()))
            .advise(format!("'chattr -i -a {}' removes the attribute", shown.display())));
    }
    Ok(())
}

/// Refuses to apply the changes kept in `work` over edits that somebody made in `root` since it was opened.
pub(crate) fn refuse_edited(work: &Tree, upper: &Tree, root: &Tree) -> Result<()> {
    let attempted = || format!("apply the changes to {}", root.shown().display());
    // A removed directory takes no new entries. Its times have changed too, but nobody has edited it.
    if rustix::fs::fstat(root).attempt(attempted)?.st_nlink == 0 {
        return Err(Error::new(attempted())
            .because("this directory was removed while it was open")
            .advise(format!("copy what is needed out of the changes, which are in {}", upper.shown().display())));
    }
    let Some(opened) = work.look(SOURCE).attempt(attempted)? else { return Ok(()) };
    // A run that was killed may have made its stage in the image root, which changes the times of that.
    let has_changed_root = Progress::read(work)?.is_some_and(|progress| progress.step > Step::Decided);
    let is_newer = |path: &Path, directory: &Tree, name: &OsStr| {
        if path == Path::new("") && has_changed_root {
            return Ok(false);
        }
        let found = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        // Compare the ctime, because nobody can set it. For the image root itself compare the mtime, since a rename
        // changes its ctime.
        let changed = if path == Path::new("") {
            (found.st_mtime, found.st_mtime_nsec)
        } else {
            (found.st_ctime, found.st_ctime_nsec)
        };
        Ok(changed > (opened.st_mtime, opened.st_mtime_nsec))
    };
    let edited =
        directories(upper).and_then(|directories| touched(upper, root, &directories, is_newer)).attempt(attempted)?;
    if edited.is_empty() {
        return Ok(());
    }
    let named: Vec<_> = edited.iter().take(3).map(|path| root.shown().join(path).display().to_string()).collect();
    let further = if edited.len() > 3 { format!(" and {} more", edited.len() - 3) } else { String::new() };
    Err(Error::new(attempted())
        .because(format!("it was changed by hand since it was opened: {}{further}", named.join(", ")))
        .advise(format!(
            "the changes are in {}: copy what is needed; then 'ims-sshd fail {}', or the same command with --fresh, \
             drops them",
            upper.shown().display(),
            root.shown().display()
        )))
}

/// Records that the source was checked now: edits after this time conflict with the changes kept in `work`.
pub(crate) fn record_check(work: &Tree) -> Result<()> {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let times = Timestamps { last_access: now, last_modification: now };
    let touched = rustix::fs::utimensat(work, SOURCE, &times, AtFlags::SYMLINK_NOFOLLOW);
    touched.attempt(|| format!("touch {}", work.shown().join(SOURCE).display()))
}

/// Returns whether a flag of the file system (chattr(1)) forbids changes to the file.
fn is_fixed(directory: &Tree, name: &OsStr) -> io::Result<bool> {
    let found = rustix::fs::statx(directory, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)?;
    Ok(found.stx_attributes.intersects(StatxAttributes::IMMUTABLE | StatxAttributes::APPEND))
}
