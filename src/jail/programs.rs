//! Copies of the container's programs that run in a jail or are shown there.
//!
//! A process in the jail can open the file of a running program (/proc/PID/exe), and root in the jail owns root's
//! files. If that file were the container's own, root in the jail could change its mode, owner and attributes, and take
//! leases on it even through a read-only mount (compare CVE-2019-5736).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::mount::MountAttrFlags;

use crate::error::{Attempt, Result};
use crate::sys::mounts::{self, Detached};
use crate::sys::tree::Tree;

const ATTRIBUTES: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NODEV);

/// A program to copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Name in the jail, below [`PROGRAMS`](crate::jail::mount_table::PROGRAMS).
    pub name: String,
    /// File of the container, not a link.
    pub file: PathBuf,
}

/// Copies `programs` into a read-only tmpfs, and returns the copies, open for reading. While a copy is open, the kernel
/// grants no write lease on it (fcntl(2), `F_SETLEASE`). Otherwise a process in the jail could take such a lease, and
/// every further session would have to wait until the lease ends.
pub(crate) fn copy<'a>(programs: impl IntoIterator<Item = &'a Program>) -> Result<(Detached, Vec<OwnedFd>)> {
    let attempted = || "make a tmpfs for the jail's programs";
    let tmpfs = Detached::filesystem("tmpfs", &[("mode", "0755")], ATTRIBUTES).attempt(attempted)?;
    let directory = Tree::from_fd(tmpfs.as_fd().try_clone_to_owned().attempt(attempted)?);
    let copy = |name: &str, file: &Path| -> io::Result<OwnedFd> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let mut copy = File::from(directory.open_at(name, flags, Mode::from_raw_mode(0o755))?);
        io::copy(&mut File::open(file)?, &mut copy)?;
        directory.open_at(name, OFlags::RDONLY, Mode::empty())
    };
    let one = |program: &Program| {
        copy(&program.name, &program.file).attempt(|| format!("copy {} for the jail", program.file.display()))
    };
    let copies = programs.into_iter().map(one).collect::<Result<_>>()?;
    mounts::restrict(tmpfs.as_fd(), ATTRIBUTES | MountAttrFlags::MOUNT_ATTR_RDONLY)
        .attempt(|| "make the jail's programs read-only")?;
    Ok((tmpfs, copies))
}
