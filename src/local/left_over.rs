//! Cleanup after a killed run, before the next one.

use std::path::Path;

use crate::environment::recovery;
use crate::error::Result;
use crate::jailer::open;
use crate::local::claim::{is_claimed, remove_directory};
use crate::local::run_directory::RunDirectory;
use crate::volume::open_tree;
use crate::volume::signal_files::SignalFiles;
use crate::volume::state_directory::StateDirectory;

/// sshd's log, in the directory of the run.
pub(crate) const SSHD_LOG: &str = "sshd.log";

/// Ends the sshd that a killed customization of `image_root` left running. The mount namespace of that sshd keeps the
/// overlay busy, so that it could not be mounted again.
pub(crate) fn end_left_over(image_root: &Path) -> Result<()> {
    let parent = RunDirectory::place("customize", image_root);
    if !is_claimed(&parent)? && StateDirectory::place(&parent).exists() {
        let found = recovery::end_left_over(&StateDirectory::of(&parent)?, Some(&parent.join(SSHD_LOG)))?;
        if !found.is_empty() {
            tracing::warn!(
                "an earlier customization of this image was killed; ended what it left: {}",
                found.join("; ")
            );
        }
    }
    Ok(())
}

/// Removes what killed runs of `commands` left behind: their mount points in `image_root`, and their directories.
pub(crate) fn clear_left_over(commands: &[&str], image_root: &Path) -> Result<()> {
    for command in commands {
        if SignalFiles::open(&RunDirectory::place(command, image_root))?.is_none_or(|files| files.is_claimed()) {
            continue;
        }
        let directory = RunDirectory::claim(command, image_root)?;
        open::clear_image_root(&open_tree(image_root)?, &open_tree(directory.path())?)?;
        if StateDirectory::place(directory.path()).exists() {
            StateDirectory::of(directory.path())?.remove()?;
        }
        remove_directory(directory.path())?;
    }
    Ok(())
}
