//! The image root parent, a directory that the containers of a pod share: its signal files and its other content.

pub(crate) mod image_root;
pub mod layout;
pub mod mounts_below;
pub(crate) mod signal_files;
pub mod state_directory;

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::error::{Attempt, Result};
use crate::sys::tree::Tree;

/// Opens the directory at `path`, which must not be a link.
pub(crate) fn open_tree(path: &Path) -> Result<Tree> {
    Tree::open(path).attempt(|| format!("open {}", path.display()))
}

/// Returns whether `place` is `directory` or lies in it, through links and mounts too. `place` need not exist.
pub(crate) fn holds(directory: &Path, place: &Path) -> Result<bool> {
    let attempted = || format!("find {}", place.display());
    let place = std::path::absolute(place).attempt(attempted)?;
    let there = place.ancestors().find(|place| place.exists()).unwrap_or(Path::new("/"));
    let there = std::fs::canonicalize(there).attempt(attempted)?;
    let identity = |path: &Path| std::fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    let wanted = identity(directory);
    Ok(there.ancestors().any(|above| wanted.is_some() && identity(above) == wanted))
}
