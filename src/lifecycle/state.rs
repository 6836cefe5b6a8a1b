//! The environment's own folder below /run: what its helper and its sshd read, and nobody else writes.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::error::{Attempt, Result};
use crate::sys::tree::escape;

/// All environments of this machine or container have their folders here.
pub const RUN: &str = "/run/ims-sshd";

/// One environment's folder.
#[derive(Debug, Clone)]
pub struct StateFolder {
    path: PathBuf,
}

impl StateFolder {
    /// Where the folder of the environment on `parent` is, or would be.
    pub fn place(parent: &Path) -> PathBuf {
        Path::new(RUN).join(escape(parent))
    }

    /// The folder of the environment on the image root parent `parent`; made if it is not there.
    pub fn of(parent: &Path) -> Result<Self> {
        let state = Self { path: Self::place(parent) };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&state.path)
            .attempt(|| format!("make the folder {}", state.path.display()))
            .map_err(|e| e.advise("/run has to be writable; give a read-only container a tmpfs there"))?;
        Ok(state)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the jail is.
    pub fn jail(&self) -> PathBuf {
        self.path.join("jail")
    }

    /// sshd's configuration fragment.
    pub fn fragment(&self) -> PathBuf {
        self.path.join("sshd.conf")
    }

    /// Which process sshd's listener is.
    pub fn sshd(&self) -> PathBuf {
        self.path.join("sshd")
    }

    /// The copy of the container's resolv.conf that the jail sees.
    pub fn resolv_conf(&self) -> PathBuf {
        self.path.join("resolv.conf")
    }

    /// Removes the folder and the files in it.
    pub fn remove(&self) -> Result<()> {
        let attempted = || format!("remove {}", self.path.display());
        for entry in std::fs::read_dir(&self.path).attempt(attempted)? {
            entry.and_then(|e| std::fs::remove_file(e.path())).attempt(attempted)?;
        }
        std::fs::remove_dir(&self.path).attempt(attempted)
    }
}
