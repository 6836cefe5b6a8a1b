//! State of a tree: a digest that differs if anything in the tree was changed.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest::{Context, SHA256};
use rustix::fs::Stat;

/// A digest of the path, mode, size and time of change (ctime) of everything in a tree, in the order of a walk. The
/// kernel updates the ctime at every change of content, attributes or names, and no program can set it back.
pub(crate) struct State(Context);

impl State {
    /// State of an empty tree.
    pub(crate) fn new() -> Self {
        Self(Context::new(&SHA256))
    }

    /// Adds an entry; the first one is the tree's own directory, whose path is empty.
    pub(crate) fn add(&mut self, path: &Path, found: &Stat) {
        self.0.update(path.as_os_str().as_bytes());
        let (mode, size, seconds, nanoseconds) = (found.st_mode, found.st_size, found.st_ctime, found.st_ctime_nsec);
        self.0.update(format!("\0{mode} {size} {seconds}.{nanoseconds}\0").as_bytes());
    }

    /// The digest, as text.
    pub(crate) fn finish(self) -> String {
        URL_SAFE_NO_PAD.encode(self.0.finish())
    }
}
