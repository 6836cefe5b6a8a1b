//! The directory of one run on an image root, below /run.

use std::fs::Permissions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::error::{Attempt, Result};
use crate::local::claim::{Claim, claim, is_claimed, remove_files};
use crate::volume::signal_files::SignalFiles;
use crate::volume::state_directory::{RUN, name_for};

/// The claims of a run, held as long as this value lives.
pub(crate) struct RunClaim {
    _lock: Option<OwnedFd>,
    _claim: Claim,
}

/// Directory of one run on an image root. The run uses it as the image root's parent, like the volume in a pod.
pub(crate) struct RunDirectory {
    files: SignalFiles,
    claim: Claim,
}

impl RunDirectory {
    /// Creates and claims the directory for `image_root`, on which only one run can be open. Other users can open files
    /// in it but not list them, because a person with an authorized key needs ssh's configuration. Only root can read
    /// private keys.
    pub(crate) fn claim(command: &str, image_root: &Path) -> Result<Self> {
        let path = Self::place(command, image_root);
        let all = Path::new(RUN).join(command);
        let by_inode = Claim::take(command, image_root)?;
        let files = claim(|| {
            let attempted = || format!("create the directory {}", path.display());
            std::fs::create_dir_all(&path).attempt(attempted)?;
            for directory in [Path::new(RUN), &all, &path] {
                std::fs::set_permissions(directory, Permissions::from_mode(0o711)).attempt(attempted)?;
            }
            Ok(path.clone())
        })?;
        // Remove the signal files of a killed run, which mean nothing now. Its records for cleanup have hidden names,
        // and stay.
        remove_files(&path, |name| !name.starts_with('.'))?;
        Ok(Self { files, claim: by_inode })
    }

    /// Path of the directory for `image_root`, whether or not it exists.
    pub(crate) fn place(command: &str, image_root: &Path) -> PathBuf {
        Path::new(RUN).join(command).join(name_for(image_root))
    }

    /// Path of the directory.
    pub(crate) fn path(&self) -> &Path {
        self.files.path()
    }

    /// The signal files in the directory.
    pub(crate) fn signal_files(&self) -> &SignalFiles {
        &self.files
    }

    /// Returns whether a run of `command` has the image root open, by any path.
    pub(crate) fn is_claimed(command: &str, image_root: &Path) -> Result<bool> {
        Ok(is_claimed(&Self::place(command, image_root))? || Claim::is_taken(command, image_root)?)
    }

    /// Splits off the signal files, for a supervisor that drops them before the run ends; the rest keeps the claims.
    pub(crate) fn into_signal_files(self) -> Result<(SignalFiles, RunClaim)> {
        let lock = self.files.share_claim().attempt(|| format!("keep {} claimed", self.path().display()))?;
        Ok((self.files, RunClaim { _lock: lock, _claim: self.claim }))
    }
}
