//! The jail's host name, which its root can change.
//!
//! sethostname(2) needs CAP_SYS_ADMIN in the user namespace that owns the UTS namespace, and that capability would open
//! the jail. But the user who created a user namespace has every capability in it from outside (user_namespaces(7)). So
//! the jail's UTS namespace belongs to a user namespace that the jail's root created, which owns nothing else and has
//! no process. `super::refused_calls` keeps everybody from entering that user namespace.

use std::fs::File;
use std::os::fd::AsFd;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::wait::waitpid;

use crate::error::{Attempt, Result};
use crate::sys::process::{Fork, exit_now, fork};
use crate::sys::seqpacket::Packets;

/// Moves this process into a UTS namespace whose host name the jail's root can change, and sets the host name `name`,
/// or else `label`. If such a namespace cannot be created, root cannot change the name, and a failure to set `label` is
/// ignored.
pub(crate) fn give(name: Option<&str>, label: Option<&str>) -> Result<()> {
    let attempted = || "make the jail's UTS namespace";
    let (here, outside) = Packets::pair().attempt(attempted)?;
    match fork().attempt(attempted)? {
        Fork::Child => {
            drop(here);
            if unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWUTS).is_ok()
                && let Ok(namespace) = File::open("/proc/self/ns/uts")
            {
                let _ = outside.send_with(b"made", &[namespace.as_fd()]);
            }
            exit_now(0)
        }
        Fork::Parent(child) => {
            drop(outside);
            let made = here.receive_with().attempt(attempted)?;
            waitpid(child, None).attempt(attempted)?;
            for namespace in made.into_iter().flat_map(|(_, namespaces)| namespaces) {
                // Ignore a failure: a security module may grant no capabilities in user namespaces.
                let _ = setns(namespace, CloneFlags::CLONE_NEWUTS);
            }
        }
    }
    let Some(name) = name else {
        let _ = label.map(nix::unistd::sethostname);
        return Ok(());
    };
    nix::unistd::sethostname(name).attempt(|| format!("set the jail's host name to {name}"))
}
