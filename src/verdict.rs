//! What became of the image.

use rustix::fs::{FileType, Stat};

/// Returns whether a file with a mark's name in the image's /tmp is one: a regular file, as `touch` makes it. A directory or link of that
/// name is a program's own, and means nothing.
pub fn is_mark(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::RegularFile
}

/// How a build environment ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// The image is to be packed.
    Complete,
    /// It is not. Wins over [`Verdict::Complete`], which is less.
    Failed,
}

impl Verdict {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Complete, Self::Failed];

    /// The name of its signal file, in the image root's parent as in the jail's /tmp.
    pub fn signal_file(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Failed => "failed",
        }
    }

    /// The other way round.
    pub fn from_signal_file(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|v| v.signal_file() == name)
    }
}
