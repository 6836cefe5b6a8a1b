//! The verdict on the image.

use rustix::fs::{FileType, Stat};

/// Returns whether a file with a verdict file's name in the image's /tmp counts as a mark. Only a regular file does, as
/// `touch` creates one: a program may have made a directory or link of that name.
pub(crate) fn is_mark(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::RegularFile
}

/// Users whose marks in the image's /tmp count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Markers {
    /// Everyone: only processes in the jail reach the image's /tmp.
    Everyone,
    /// Root alone: other users of the machine can create files in the image's /tmp.
    Root,
}

impl Markers {
    /// Returns whether a mark of the user `owner` counts.
    pub(crate) fn include(self, owner: u32) -> bool {
        self == Self::Everyone || owner == 0
    }
}

/// How a build environment ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// The image will be packed.
    Complete,
    /// The image will not be packed. Takes precedence over [`Verdict::Complete`].
    Failed,
}

impl Verdict {
    /// Both verdicts.
    pub(crate) const ALL: [Self; 2] = [Self::Complete, Self::Failed];

    /// Name of the verdict file, both in the image root's parent and in the jail's /tmp.
    pub(crate) fn signal_file(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Failed => "failed",
        }
    }

    /// The verdict with that file name.
    pub(crate) fn from_signal_file(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|v| v.signal_file() == name)
    }
}
