//! Sealing, the last step of a jail: once its processes have ended, the image root becomes read-only for processes
//! outside that still have descriptors of it.
//!
//! A session can send descriptors to a process outside, for example through an abstract Unix socket (unix(7)), since
//! the network is the container's. Such descriptors outlive the jail, and all belong to the jail's own mount of the
//! image root. The kernel makes that mount read-only only if no file on it is open for writing (mount_setattr(2),
//! EBUSY); afterwards nobody can open a file for writing through that mount.

use std::io;

use nix::sched::CloneFlags;
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use crate::error::{Attempt, Result};
use crate::jail::enter::{join_namespaces, open_descriptors};
use crate::jail::record::Record;
use crate::jail::tier::Tier;
use crate::sys::mounts;

/// Result of one attempt.
#[derive(Debug, PartialEq, Eq)]
pub enum Seal {
    /// The jail's mount of the image root is read-only.
    Sealed,
    /// A file is open for writing on the mount with this ID, as in /proc/PID/fdinfo; 0 before Linux 5.8, which does not
    /// report it.
    Busy(u64),
}

impl Seal {
    /// Text that `ims-jail-shell seal` prints.
    pub fn to_text(&self) -> String {
        match self {
            Self::Sealed => "sealed".into(),
            Self::Busy(mount) => format!("busy {mount}"),
        }
    }

    /// Parses the text of [`Seal::to_text`].
    pub(crate) fn parse(text: &str) -> Option<Self> {
        match text.trim_end().split_once(' ') {
            None if text.trim_end() == "sealed" => Some(Self::Sealed),
            Some(("busy", mount)) => mount.parse().ok().map(Self::Busy),
            _ => None,
        }
    }
}

/// Makes the jail's mount of the image root read-only. This process joins the jail's mount namespace for that, so no
/// process of the jail may be left. Does nothing for a jail without mounts of its own, nor with DKMS, where a session
/// can leave the jail, and have mounts and loop devices of its own.
pub fn seal(record: &Record) -> Result<Seal> {
    if record.tier == Tier::Chroot || record.dkms {
        return Ok(Seal::Sealed);
    }
    let descriptors = open_descriptors(record, &record.descriptors)?;
    join_namespaces(&descriptors, record.tier, CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)?;
    make_root_read_only().attempt(|| "make the jail's mount of the image root read-only")
}

fn make_root_read_only() -> io::Result<Seal> {
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    match mounts::restrict(std::os::fd::AsFd::as_fd(&root), MountAttrFlags::MOUNT_ATTR_RDONLY) {
        Err(e) if Errno::from_io_error(&e) == Some(Errno::BUSY) => {
            let found = rustix::fs::statx(&root, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
            Ok(Seal::Busy(found.stx_mnt_id))
        }
        other => other.map(|()| Seal::Sealed),
    }
}
