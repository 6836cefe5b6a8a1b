//! Owner, mode, times and extended attributes of a file. Extended attributes include ACLs and file capabilities.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, Stat, Uid, XattrFlags};
use rustix::io::Errno;

use crate::sys::tree::{Tree, times};

/// Maximum size of one value, and of the list of names, in bytes: the kernel's limits (xattr(7)).
const LONGEST: usize = 64 << 10;

/// Extended attributes by name.
pub(crate) type Attributes = BTreeMap<OsString, Vec<u8>>;

/// The file `name` of a directory; a link is not followed. "." is the directory itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Node<'a> {
    /// The directory.
    pub(crate) directory: &'a Tree,
    /// Name in that directory.
    pub(crate) name: &'a OsStr,
}

impl Node<'_> {
    fn open(&self) -> io::Result<Handle> {
        self.directory.handle(self.name).map(Handle)
    }

    /// The file's extended attributes; empty if the file system does not support them.
    pub(crate) fn attributes(&self) -> io::Result<Attributes> {
        self.open()?.attributes()
    }

    /// Sets exactly these extended attributes and removes all others.
    pub(crate) fn set_attributes(&self, wanted: &Attributes) -> io::Result<()> {
        self.open()?.set_attributes(wanted)
    }

    /// Sets owner, mode and times from `found`, and these extended attributes. All are set on the same inode, even if
    /// the name is replaced in between.
    pub(crate) fn take(&self, found: &Stat, attributes: &Attributes) -> io::Result<()> {
        let handle = self.open()?;
        let path = handle.path();
        // Change the owner before the attributes: chown(2) clears a file's capabilities.
        rustix::fs::chown(&path, user(found.st_uid), group(found.st_gid))?;
        handle.set_attributes(attributes)?;
        if FileType::from_raw_mode(found.st_mode) != FileType::Symlink {
            rustix::fs::chmod(&path, Mode::from_raw_mode(found.st_mode & 0o7777))?;
        }
        Ok(rustix::fs::utimensat(rustix::fs::CWD, &path, &times(found), AtFlags::empty())?)
    }
}

/// An O_PATH descriptor of a file, which may be of any type.
struct Handle(OwnedFd);

impl Handle {
    /// A path to this very inode, even if it is a link. Needed because fchown(2) and the like refuse O_PATH
    /// descriptors.
    fn path(&self) -> PathBuf {
        Path::new("/proc/self/fd").join(self.0.as_raw_fd().to_string())
    }

    fn attributes(&self) -> io::Result<Attributes> {
        let (path, mut names, mut value) = (self.path(), vec![0; LONGEST], vec![0; LONGEST]);
        let length = match rustix::fs::listxattr(&path, names.as_mut_slice()) {
            Err(Errno::OPNOTSUPP) => 0,
            other => other?,
        };
        let names = names[..length].split(|&b| b == 0).filter(|name| !name.is_empty()).map(OsStr::from_bytes);
        names
            .map(|name| {
                let length = rustix::fs::getxattr(&path, name, value.as_mut_slice())?;
                Ok((name.to_owned(), value[..length].to_vec()))
            })
            .collect()
    }

    fn set_attributes(&self, wanted: &Attributes) -> io::Result<()> {
        let (path, present) = (self.path(), self.attributes()?);
        for name in present.keys().filter(|name| !wanted.contains_key(*name)) {
            rustix::fs::removexattr(&path, name)?;
        }
        for (name, value) in wanted.iter().filter(|(name, value)| present.get(*name) != Some(value)) {
            rustix::fs::setxattr(&path, name, value, XattrFlags::empty())?;
        }
        Ok(())
    }
}

/// User ID for chown(2). `None` for -1, which an image may contain: -1 is no valid user ID, and chown(2) takes it as
/// "leave the owner unchanged".
pub(crate) fn user(number: u32) -> Option<Uid> {
    (number != u32::MAX).then(|| Uid::from_raw(number))
}

/// Group ID for chown(2); `None` for -1, see [`user`].
pub(crate) fn group(number: u32) -> Option<Gid> {
    (number != u32::MAX).then(|| Gid::from_raw(number))
}
