//! A mount namespace and terminals for this run alone: a session in an image must not reach the mounts and terminals of
//! the machine's users.

use std::path::Path;

use rustix::mount::MountAttrFlags;

use crate::error::{Attempt, Result};
use crate::sys::file_kind::FileKind;
use crate::sys::mounts::{self, Detached};
use crate::sys::tree::Tree;

/// Puts this program, and everything it starts, into a mount namespace of its own.
pub fn own_mounts() -> Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
        .attempt(|| "create a mount namespace")
        .map_err(|e| e.advise("run it as root, with CAP_SYS_ADMIN"))?;
    mounts::make_all_private().attempt(|| "make the mounts of this run private")
}

/// Mounts a devpts for sessions, in this run's mount namespace only.
pub fn own_terminals() -> Result<()> {
    let attempted = || "mount a devpts for sessions on /dev/pts";
    // Sessions must not use up the machine's 4096 terminals (kernel.pty.max).
    let options = [("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5"), ("max", "1024")];
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let target = Tree::open(Path::new("/dev/pts")).attempt(attempted)?;
    Detached::filesystem("devpts", &options, attributes).and_then(|pts| pts.attach(target)).attempt(attempted)?;
    let dev = Tree::open(Path::new("/dev")).attempt(attempted)?;
    let ptmx = dev.look("ptmx").attempt(attempted)?.as_ref().map(FileKind::of);
    if ptmx == Some(FileKind::CharacterDevice) {
        let own = Detached::copy_of("/dev/pts/ptmx", false, MountAttrFlags::empty()).attempt(attempted)?;
        dev.handle("ptmx").and_then(|ptmx| own.attach(ptmx)).attempt(attempted)?;
    }
    Ok(())
}
