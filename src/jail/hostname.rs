//! The jail's host name: its own, and its root's to change.
//!
//! sethostname(2) asks for CAP_SYS_ADMIN in the user namespace that owns the UTS namespace. That capability would open the jail. But
//! who has made a user namespace has every capability in it from outside (user_namespaces(7)): so the jail's UTS namespace belongs to
//! one that its root has made, in which nothing else is and no process lives. `super::refused_calls` keeps everybody from entering it.

use std::fs::File;
use std::os::fd::AsFd;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::wait::waitpid;

use crate::error::{Attempt, Result};
use crate::sys::process::{Fork, exit_now, fork};
use crate::sys::seqpacket::Packets;

/// Gives this process, in a new UTS namespace, another one that root may name, and the jail's `name` to it. Where none can be had,
/// the name cannot be changed from inside, and the jail does without `label`, its name where none is asked for.
pub(crate) fn give(name: Option<&str>, label: Option<&str>) -> Result<()> {
    let attempted = || "make a UTS namespace that the jail's root may name";
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
                // Refused where a security module gives nobody rights in user namespaces.
                let _ = setns(namespace, CloneFlags::CLONE_NEWUTS);
            }
        }
    }
    let Some(name) = name else {
        let _ = label.map(nix::unistd::sethostname);
        return Ok(());
    };
    nix::unistd::sethostname(name).attempt(|| format!("name the jail {name}"))
}
