//! Makes the jail look like a chroot to systemctl, udevadm and Ansible, whatever the environment variables are.

use std::io;

use rustix::mount::MountAttrFlags;

use crate::error::{Attempt, Result};
use crate::jail::mount_table::KERNEL_FILE_ATTRIBUTES;
use crate::sys::mounts::Detached;
use crate::sys::tree::Tree;

/// Covers the link /proc/1/root, which is `link` in `proc`, with a link to /proc. Nobody inside may follow the kernel's
/// own link, because the init is not dumpable. systemctl, udevadm and Ansible follow the link, and conclude that they
/// are in a chroot if it leads elsewhere than to `/`. If they cannot follow it, they try to reach a running systemd and
/// fail.
pub(super) fn show_root_of_init(run: &Tree, (proc, link): (&Tree, &str)) -> Result<()> {
    const NAME: &str = ".ims-sshd.root";
    let show = || -> io::Result<()> {
        let target = match proc.handle(link) {
            // The container's /proc hides other users' processes (hidepid), so there is no link to cover.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        // A link mounted on another link takes its place: programs follow the mounted link. The mount stays when the
        // name of its source is removed.
        rustix::fs::symlinkat("/proc", run, NAME)?;
        Detached::copy_of_fd(run.handle(NAME)?, false, MountAttrFlags::empty())?.attach(target)?;
        run.remove(NAME).map(|_| ())
    };
    show().attempt(|| "mount a link on /proc/1/root of the jail")
}

/// If the jail shows the container's /proc, covers the name of the container's first process (/proc/1/comm) with the
/// name of the jail's init.
pub(super) fn show_name_of_init(proc: &Tree) -> Result<()> {
    let show = || -> io::Result<()> {
        Detached::copy_of_fd(proc.handle("self/comm")?, false, KERNEL_FILE_ATTRIBUTES)?
            .attach(proc.handle("1/comm")?)?;
        Ok(())
    };
    show().attempt(|| "show the init's name in /proc of the jail")
}
