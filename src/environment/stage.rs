//! Stages of a job, with the names that `status` prints and probes compare.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::time::SystemTime;

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use crate::sys::tree::Tree;
use crate::volume::layout::STAGE;

/// Stages of a job, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Stage {
    /// The job waits for the signal file ready.
    Waiting,
    /// Configuration, jail and sshd are being made.
    Preparing,
    /// sshd accepts sessions.
    Serving,
    /// A verdict exists; sessions end, and the image root is released.
    Closing,
    /// The changes in an overlay are being applied to its directory.
    Applying,
    /// The image root is being packed into a squashfs.
    Packing,
    /// The packed image is being uploaded to its store.
    Uploading,
    /// Nothing is left to do.
    Done,
}

impl Stage {
    /// All stages, in their order.
    pub const ALL: [Self; 8] = [
        Self::Waiting,
        Self::Preparing,
        Self::Serving,
        Self::Closing,
        Self::Applying,
        Self::Packing,
        Self::Uploading,
        Self::Done,
    ];

    /// Name of the stage.
    pub fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Preparing => "preparing",
            Self::Serving => "serving",
            Self::Closing => "closing",
            Self::Applying => "applying",
            Self::Packing => "packing",
            Self::Uploading => "uploading",
            Self::Done => "done",
        }
    }
}

/// A stage that the status shows until this value is dropped.
pub(crate) struct Shown<'a> {
    parent: &'a Tree,
    file: File,
}

impl<'a> Shown<'a> {
    /// Shows `stage` to anyone who asks for the status of `parent`, in other containers too.
    pub(crate) fn begin(parent: &'a Tree, stage: Stage) -> io::Result<Self> {
        let file = parent.create_file(STAGE)?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        let shown = Self { parent, file };
        shown.next(stage)?;
        Ok(shown)
    }

    /// Shows the next stage. Its name must not be shorter than that of the stage before, since the write does not
    /// truncate the file; the only caller goes from `packing` to `uploading`.
    pub(crate) fn next(&self, stage: Stage) -> io::Result<()> {
        self.file.write_all_at(stage.name().as_bytes(), 0)
    }
}

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        let _ = self.parent.remove(STAGE);
    }
}

/// Stage that a publisher shows in `parent`, and since when.
pub(crate) fn shown(parent: &Tree) -> Option<(Stage, SystemTime)> {
    let mut file = parent.open_regular(STAGE, OFlags::RDONLY | OFlags::NOFOLLOW).ok()?;
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) != Err(Errno::WOULDBLOCK) {
        return None;
    }
    let mut name = String::new();
    file.by_ref().take(16).read_to_string(&mut name).ok()?;
    let stage = Stage::ALL.into_iter().find(|stage| stage.name() == name)?;
    Some((stage, file.metadata().and_then(|file| file.modified()).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stage_is_shown_while_its_publisher_lives() {
        let dir = tempfile::tempdir().unwrap();
        let parent = Tree::open(dir.path()).unwrap();
        assert!(shown(&parent).is_none());
        let publisher = Shown::begin(&parent, Stage::Packing).unwrap();
        assert_eq!(shown(&parent).unwrap().0, Stage::Packing);
        publisher.next(Stage::Uploading).unwrap();
        assert_eq!(shown(&parent).unwrap().0, Stage::Uploading);
        drop(publisher);
        assert!(shown(&parent).is_none() && std::fs::read_dir(dir.path()).unwrap().next().is_none());
        // Stand in for a killed publisher, which leaves an unlocked file.
        std::fs::write(dir.path().join(STAGE), "packing").unwrap();
        assert!(shown(&parent).is_none());
    }
}
