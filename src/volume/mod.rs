//! The image root's parent, which the containers of a pod share: its signal files, and what lies in it.

pub mod image_root;
pub mod layout;
pub mod signal_files;
pub mod state_directory;

use std::path::Path;

use crate::error::{Attempt, Result};
use crate::sys::tree::Tree;

/// Opens a directory that was named, whose last name must not be a link.
pub fn open_tree(path: &Path) -> Result<Tree> {
    Tree::open(path).attempt(|| format!("open {}", path.display()))
}
