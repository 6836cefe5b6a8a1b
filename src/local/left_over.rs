//! Leftovers of a killed run: ended and cleared before the next run.

use std::path::Path;

use crate::environment::recovery;
use crate::error::Result;
use crate::jailer::open;
use crate::local::claim::{is_claimed, remove_folder};
use crate::local::run_directory::RunFolder;
use crate::volume::open_tree;
use crate::volume::signal_files::SignalFiles;
use crate::volume::state_directory::StateDirectory;

/// sshd's log, in the directory of the run.
pub(crate) const SSHD_LOG: &str = "sshd.log";

/// Ends the sshd of a customization of `image_root` that was killed. Its mounts live as long as it does, and keep the changes from being
/// mounted again.
pub(crate) fn end_left_over(image_root: &Path) -> Result<()> {
    let parent = RunFolder::place("customize", image_root);
    if !is_claimed(&parent)? && StateDirectory::place(&parent).exists() {
        let found = recovery::end_left_over(&StateDirectory::of(&parent)?, Some(&parent.join(SSHD_LOG)))?;
        if !found.is_empty() {
            tracing::warn!("a customization of this image was killed before; ended: {}", found.join("; "));
        }
    }
    Ok(())
}

/// Removes what runs of `commands` on `image_root` have left that were killed: what they have added to it, and their directories.
pub(crate) fn clear_left_over(commands: &[&str], image_root: &Path) -> Result<()> {
    for command in commands {
        if SignalFiles::open(&RunFolder::place(command, image_root))?.is_none_or(|files| files.is_claimed()) {
            continue;
        }
        let folder = RunFolder::claim(command, image_root)?;
        open::clear_image_root(&open_tree(image_root)?, &open_tree(folder.path())?)?;
        if StateDirectory::place(folder.path()).exists() {
            StateDirectory::of(folder.path())?.remove()?;
        }
        remove_folder(folder.path())?;
    }
    Ok(())
}
