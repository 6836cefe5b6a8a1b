//! The directory of one run on an image root, below /run.

use std::fs::Permissions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::error::{Attempt, Result};
use crate::local::claim::{Claim, claim, is_claimed, remove_files};
use crate::volume::signal_files::SignalFiles;
use crate::volume::state_directory::{RUN, name_for};

/// The folder of one run on an image root; the image root's parent, as a pod's environment has one.
pub(crate) struct RunFolder {
    files: SignalFiles,
    claim: Claim,
}

impl RunFolder {
    /// Makes and claims the folder for `image_root`, of which only one run can be open. Others can open what they know the name of: who has
    /// an authorized key, ssh's configuration. Private keys are root's.
    pub(crate) fn claim(command: &str, image_root: &Path) -> Result<Self> {
        let path = Self::place(command, image_root);
        let all = Path::new(RUN).join(command);
        let by_inode = Claim::take(command, image_root)?;
        let files = claim(|| {
            let attempted = || format!("make the folder {}", path.display());
            std::fs::create_dir_all(&path).attempt(attempted)?;
            for folder in [Path::new(RUN), &all, &path] {
                std::fs::set_permissions(folder, Permissions::from_mode(0o711)).attempt(attempted)?;
            }
            Ok(path.clone())
        })?;
        // Signals of an earlier run that was killed mean nothing now. What it noted for us to clear up has a hidden name.
        remove_files(&path, |name| !name.starts_with('.'))?;
        Ok(Self { files, claim: by_inode })
    }

    /// Returns its path, whether or not it exists.
    pub(crate) fn place(command: &str, image_root: &Path) -> PathBuf {
        Path::new(RUN).join(command).join(name_for(image_root))
    }

    /// The folder.
    pub(crate) fn path(&self) -> &Path {
        self.files.path()
    }

    /// Its signal files.
    pub(crate) fn signal_files(&self) -> &SignalFiles {
        &self.files
    }

    /// Returns whether a run of `command` has the image root open, by this path or another.
    pub(crate) fn is_claimed(command: &str, image_root: &Path) -> Result<bool> {
        Ok(is_claimed(&Self::place(command, image_root))? || Claim::is_taken(command, image_root)?)
    }

    /// Its signal files, and with them the claims, which also last as long as these values do.
    pub(crate) fn into_signal_files(self) -> Result<(SignalFiles, (Option<OwnedFd>, Claim))> {
        let claim = self.files.share_claim().attempt(|| format!("keep {} claimed", self.path().display()))?;
        Ok((self.files, (claim, self.claim)))
    }
}
