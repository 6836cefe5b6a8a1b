//! Entering the jail: this process joins all its namespaces.
//!
//! The child that it starts there holds descriptors of the container and runs the container's program, so it must not look at anything that
//! the image says: a path such as /proc/self/fd/4 or an interpreter such as /proc/self/exe would lead outside (CVE-2024-21626,
//! CVE-2019-5736). It becomes the jail's own copy of this program, without descriptors but the three streams.

use std::os::fd::OwnedFd;

use nix::sched::CloneFlags;

use crate::error::{Advise, Attempt, Result};
use crate::jail::record::Record;
use crate::jail::tier::Tier;
use crate::sys::mounts::change_root;
use crate::sys::process::Handle;

/// A jail that this process has joined.
pub struct Joined {
    /// The jail's init.
    pub init: Handle,
    /// The jail's copy of this program, open.
    pub helper: OwnedFd,
}

/// Moves this process into the jail: its root becomes the image root, its children live in the jail's PID namespace. It cannot
/// be seen from inside itself.
pub fn join(record: &Record) -> Result<Joined> {
    let hide = || nix::sys::prctl::set_dumpable(false).attempt(|| "hide from those inside the jail");
    // Until exec, the child has this program's memory and descriptors; nobody inside may look into it (CVE-2024-21626).
    hide()?;
    let gone = "it has just ended; if the build environment is not closing, log in again in a moment";
    let attempted = || format!("reach the jail's init (process {})", record.init.pid);
    let init = Handle::open(record.init).attempt(attempted).advise(gone)?;
    // The descriptors themselves, which the supervisor had from the init, and not the init's files below /proc: for those, since it is
    // hidden from everybody, one would need CAP_SYS_PTRACE.
    let numbers = [&record.doors[..], &[record.helper]].concat();
    let mut doors = open_doors(record, &numbers).advise("the build environment has just ended")?;
    let helper = doors.pop().ok_or("there is none").attempt(|| "open the jail's copy of ims-jail-shell")?;
    // If one of them stays closed, this process ends: nothing is ever started in a jail half entered.
    pass(&doors, record.tier, CloneFlags::all())?;
    if let (Tier::Chroot, [image_root]) = (record.tier, doors.as_slice()) {
        change_root(image_root).attempt(|| "change the root to the image root")?;
    }
    // A change of credentials, as by joining a user namespace, resets dumpable to fs.suid_dumpable (prctl(2),
    // PR_SET_DUMPABLE).
    hide()?;
    Ok(Joined { init, helper })
}

/// Opens those of the keeper's descriptors.
pub(crate) fn open_doors(record: &Record, numbers: &[i32]) -> Result<Vec<OwnedFd>> {
    let attempted = || format!("open the jail's namespaces, which process {} holds", record.keeper.pid);
    record.keeper.open_descriptors(numbers).attempt(attempted)
}

/// Joins the namespaces of these kinds that `doors` lead to.
pub(crate) fn pass(doors: &[OwnedFd], tier: Tier, kinds: CloneFlags) -> Result<()> {
    for (door, (name, flag)) in doors.iter().zip(tier.namespaces()).filter(|(_, (_, flag))| kinds.contains(*flag)) {
        nix::sched::setns(door, *flag).attempt(|| format!("enter the jail's {name} namespace"))?;
    }
    Ok(())
}
