//! What can be wrong with a source image, and why an image was not written.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::squashfs::plan::Limit;

/// What is wrong with a source image.
#[derive(Debug)]
pub enum Fault {
    /// The file is no squashfs at all.
    NoSquashfs,
    /// A squashfs that this module cannot read: another version or compression.
    Unsupported(String),
    /// It contradicts itself, or is cut off.
    Damaged(String),
    /// It holds more than is read of a source; the limits are in `reader.rs`.
    TooLarge(String),
    /// The system could not read it.
    Read(io::Error),
}

impl Fault {
    pub(crate) fn damaged(how: impl Into<String>) -> Self {
        Self::Damaged(how.into())
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSquashfs => f.write_str("it is no squashfs"),
            Self::Unsupported(what) => write!(f, "a squashfs of {what}"),
            Self::Damaged(how) => write!(f, "the squashfs is damaged: {how}"),
            Self::TooLarge(what) => write!(f, "the squashfs has {what}"),
            Self::Read(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Fault {}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Read(error)
    }
}

/// Why an image was not written.
#[derive(Debug)]
pub enum Failure {
    /// A file of the tree could not be read, or changed meanwhile.
    Tree(PathBuf, io::Error),
    /// The source turned out to be damaged.
    Source(Fault),
    /// A squashfs cannot hold it.
    Limit(Limit),
    /// The image could not be written.
    Output(io::Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tree(path, error) => write!(f, "/{}: {error}", path.display()),
            Self::Source(fault) => write!(f, "source: {fault}"),
            Self::Limit(limit) => limit.fmt(f),
            Self::Output(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Failure {}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

impl From<Limit> for Failure {
    fn from(limit: Limit) -> Self {
        Self::Limit(limit)
    }
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self::Source(fault)
    }
}
