//! Mounts of this program's own: a session in an image must not reach those of this machine's users.

use std::path::Path;

use rustix::mount::MountAttrFlags;

use crate::error::{Attempt, Result};
use crate::sys::file_kind::FileKind;
use crate::sys::mounts::{self, Detached};
use crate::sys::tree::Tree;

/// Mounts that only this program and what it starts see, with terminals of their own: a session in the image must not reach those
/// of this machine's users.
pub(crate) fn own_mounts() -> Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
        .attempt(|| "make own mounts")
        .map_err(|e| e.advise("run it as root, with CAP_SYS_ADMIN"))?;
    mounts::make_all_private().attempt(|| "cut own mounts off from the machine's")
}

/// Gives sessions terminals of their own.
pub(crate) fn own_terminals() -> Result<()> {
    let attempted = || "mount terminals of their own for sessions on /dev/pts";
    // The machine has 4096 (kernel.pty.max), of which sessions must not use up all.
    let options = [("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5"), ("max", "1024")];
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let target = Tree::open(Path::new("/dev/pts")).attempt(attempted)?;
    // What the machine's users have open stays theirs: this instance lies over it, in our own mounts only.
    Detached::filesystem("devpts", &options, attributes).and_then(|pts| pts.attach(target)).attempt(attempted)?;
    let dev = Tree::open(Path::new("/dev")).attempt(attempted)?;
    let ptmx = dev.look("ptmx").attempt(attempted)?.as_ref().map(crate::sys::file_kind::FileKind::of);
    if ptmx == Some(FileKind::CharacterDevice) {
        let own = Detached::copy_of("/dev/pts/ptmx", false, MountAttrFlags::empty()).attempt(attempted)?;
        dev.handle("ptmx").and_then(|ptmx| own.attach(ptmx)).attempt(attempted)?;
    }
    Ok(())
}
