//! Faults of a source image, and reasons why an image could not be written.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// A fault of a source image.
#[derive(Debug)]
pub enum Fault {
    /// The file is not a squashfs.
    NoSquashfs,
    /// The squashfs has a version or compression that this module cannot read.
    Unsupported(String),
    /// The image contradicts itself or is truncated.
    Damaged(String),
    /// The image exceeds a limit for sources; `reader.rs` has the limits.
    TooLarge(String),
    /// The system could not read the file.
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

/// Reason why an image could not be written.
#[derive(Debug)]
pub enum Failure {
    /// A file of the tree could not be read, or changed while it was being read.
    Tree(PathBuf, io::Error),
    /// The tree could not be traversed; the error names the file.
    Walk(io::Error),
    /// The source turned out to be damaged.
    Source(Fault),
    /// A squashfs cannot hold a property of the tree.
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
            Self::Walk(error) | Self::Output(error) => error.fmt(f),
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

/// A property of a tree that a squashfs cannot hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Limit {
    /// A name that is empty or too long, or contains a slash or a zero byte.
    Name(Vec<u8>),
    /// Two entries of one directory have the same name.
    Twice(PathBuf),
    /// Length of a symbolic link's target that is empty or too long.
    Target(usize),
    /// An extended attribute outside the three name spaces, or with a value above 64 KiB.
    Xattr(Vec<u8>),
    /// An entry was added to an object that is no directory, or a directory would get a second name.
    Parent,
    /// More than 65,535 different owners and groups.
    Ids,
    /// A table of more than 4 GiB.
    Table,
    /// A directory whose listing takes more than 4 GiB.
    Listing,
    /// More than 2³²-2 inodes, or a device number that does not fit 12 bits (major) and 20 bits (minor).
    Number,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => write!(f, "'{}' is no name of a file", name.escape_ascii()),
            Self::Twice(path) => write!(f, "{} is there twice", path.display()),
            Self::Target(length) => write!(f, "a link's target has {length} bytes"),
            Self::Xattr(name) => {
                write!(f, "a squashfs has no place for the extended attribute {}", name.escape_ascii())
            }
            Self::Parent => f.write_str("only a directory has entries, and it has one name"),
            Self::Ids => f.write_str("a squashfs holds at most 65535 owners and groups, and the tree has more"),
            Self::Table => f.write_str("a table of a squashfs holds at most 4 GiB, and more is needed"),
            Self::Listing => f.write_str("a directory has more entries than a squashfs can list"),
            Self::Number => f.write_str("a number is too large for a squashfs"),
        }
    }
}

impl std::error::Error for Limit {}
