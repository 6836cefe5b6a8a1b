//! Record of a command or script that has succeeded, in the work directory with the changes that it made. If these
//! could not be applied or published, the same command or script is not run again.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest::{Context, SHA256};

use crate::jail::binds::Bind;
use crate::sys::tree::Tree;

/// Name of the record while the command or script runs. It is renamed at the end, when a full disk might have no space
/// for a new file.
const RUNNING: &str = ".ims-sshd.running";

/// Name of the record once the command or script has succeeded.
const SUCCEEDED: &str = ".ims-sshd.succeeded";

/// Size limit of the record, in bytes.
const LIMIT: u64 = 4096;

/// A command, or a script of this machine, that changes the image without a person.
#[derive(Debug, Clone)]
pub struct Unattended {
    /// `command` or `script`.
    what: &'static str,
    /// Digest of everything that distinguishes this command or script from others. Options of the run, such as the
    /// location of the new image, do not count.
    digest: String,
}

impl Unattended {
    /// A command of `words`, or a script that has this `content`.
    pub(crate) fn of(
        what: &'static str,
        words: &[OsString],
        content: &[u8],
        variables: &[(String, String)],
        binds: &[Bind],
    ) -> Self {
        let mut digest = Context::new(&SHA256);
        let settings = format!("{variables:?}{binds:?}");
        for part in words.iter().map(|word| word.as_bytes()).chain([content, settings.as_bytes()]) {
            digest.update(&(part.len() as u64).to_le_bytes());
            digest.update(part);
        }
        Self { what, digest: URL_SAFE_NO_PAD.encode(digest.finish()) }
    }

    fn record(&self) -> String {
        format!("{} {}\n", self.what, self.digest)
    }

    /// Prepares the record in `work`, before the command or script runs.
    pub(crate) fn begin(&self, work: &Tree) {
        // Ignore a full disk: at the end it may have space for the record.
        let _ = work.replace(RUNNING, self.record().as_bytes());
    }

    /// Records in `work` that the command or script has succeeded.
    pub(crate) fn succeed(&self, work: &Tree) {
        let renamed = work.rename(RUNNING, SUCCEEDED);
        if let Err(e) = renamed.or_else(|_| work.replace(SUCCEEDED, self.record().as_bytes())) {
            tracing::warn!(
                "cannot record in {} that the {} has succeeded: {e}; with the changes kept there, it is run again",
                work.shown().display(),
                self.what
            );
        }
    }

    /// Returns whether the changes in `work` were made by this command or script, and it succeeded.
    pub(crate) fn has_succeeded(&self, work: &Tree) -> bool {
        work.read(SUCCEEDED, LIMIT).is_ok_and(|record| record == self.record().as_bytes())
    }
}

/// `command` or `script`, whichever made the changes in `work` and succeeded; `None` if neither did.
pub(crate) fn succeeded(work: &Tree) -> Option<&'static str> {
    let record = work.read(SUCCEEDED, LIMIT).ok()?;
    ["command", "script"].into_iter().find(|what| record.starts_with(what.as_bytes()))
}

/// Removes the record from `work`, because something else changes the image from now on.
pub(crate) fn forget(work: &Tree) {
    if let Err(e) = work.remove(SUCCEEDED) {
        tracing::warn!("cannot remove {}: {e}", work.shown().join(SUCCEEDED).display());
    }
}
