//! Owner, mode, times and extended attributes of a file, ACLs and capabilities among the latter.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, Stat, Uid, XattrFlags};
use rustix::io::Errno;

use crate::sys::tree::{Tree, times};

/// The kernel lets an attribute, and all names of them, be so long.
const LONGEST: usize = 64 << 10;

/// Extended attributes by name.
pub type Attributes = BTreeMap<OsString, Vec<u8>>;

/// The file `name` of a directory, a link itself and not what it leads to. "." is the directory.
#[derive(Debug, Clone, Copy)]
pub struct Node<'a> {
    /// The directory.
    pub directory: &'a Tree,
    /// Name there.
    pub name: &'a OsStr,
}

impl Node<'_> {
    fn open(&self) -> io::Result<Handle> {
        self.directory.handle(self.name).map(Handle)
    }

    /// Its extended attributes; none where the file system has none.
    pub fn attributes(&self) -> io::Result<Attributes> {
        self.open()?.attributes()
    }

    /// Gives it these extended attributes and no others.
    pub fn set_attributes(&self, wanted: &Attributes) -> io::Result<()> {
        self.open()?.set_attributes(wanted)
    }

    /// Gives it the owner, mode and times of a file that looked like `found`, and these extended attributes: all to one file, whatever gets
    /// its name meanwhile.
    pub fn take(&self, found: &Stat, attributes: &Attributes) -> io::Result<()> {
        let handle = self.open()?;
        let path = handle.path();
        // First, since a new owner takes a file's capabilities away.
        rustix::fs::chown(&path, user(found.st_uid), group(found.st_gid))?;
        handle.set_attributes(attributes)?;
        if FileType::from_raw_mode(found.st_mode) != FileType::Symlink {
            rustix::fs::chmod(&path, Mode::from_raw_mode(found.st_mode & 0o7777))?;
        }
        Ok(rustix::fs::utimensat(rustix::fs::CWD, &path, &times(found), AtFlags::empty())?)
    }
}

/// A file that is open as a place only, which any kind of file can be.
struct Handle(OwnedFd);

impl Handle {
    /// Leads to the file itself, which is not followed if it is a link. The functions for any kind of file take paths only.
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

/// The user of this number. None for -1, which is nobody's and which chown(2) takes for "as it is": images and archives can hold it.
pub fn user(number: u32) -> Option<Uid> {
    (number != u32::MAX).then(|| Uid::from_raw(number))
}

/// The group of this number; see [`user`].
pub fn group(number: u32) -> Option<Gid> {
    (number != u32::MAX).then(|| Gid::from_raw(number))
}
