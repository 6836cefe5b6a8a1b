//! Entering the jail: this process joins all its namespaces.
//!
//! The child that this process starts in the jail still has descriptors of the container and runs the container's
//! program, so it must not resolve a path of the image: a symbolic link to /proc/self/fd/4, or a script whose
//! interpreter is /proc/self/exe, would lead outside (CVE-2024-21626, CVE-2019-5736). The child becomes the jail's own
//! copy of this program, with no descriptors but the three streams.

use std::os::fd::OwnedFd;

use nix::sched::CloneFlags;

use crate::error::{Advise, Attempt, Result};
use crate::jail::record::Record;
use crate::jail::tier::Tier;
use crate::sys::mounts::change_root;
use crate::sys::process::Handle;

/// A jail that this process has joined.
pub struct Joined {
    /// Init of the jail.
    pub init: Handle,
    /// The jail's copy of this program, open.
    pub helper: OwnedFd,
}

/// Moves this process into the jail: its root becomes the image root, and its children live in the jail's PID
/// namespace. Processes inside cannot see this process.
pub fn join(record: &Record) -> Result<Joined> {
    let hide = || nix::sys::prctl::set_dumpable(false).attempt(|| "hide this process from the jail (PR_SET_DUMPABLE)");
    // Until its exec, the child in the jail has this program's memory and descriptors, which nobody inside may read
    // (CVE-2024-21626).
    hide()?;
    let attempted = || format!("reach the jail's init (process {})", record.init.pid);
    let init = Handle::open(record.init).attempt(attempted).map_err(|e| e.advise(gone(record)))?;
    // Use the supervisor's duplicates of the namespace descriptors, not /proc/PID/ns of the init: the init is not
    // dumpable, so opening that would need CAP_SYS_PTRACE.
    let numbers = [&record.descriptors[..], &[record.helper]].concat();
    let mut descriptors = open_descriptors(record, &numbers).advise("the build environment has just ended")?;
    let helper = descriptors
        .pop()
        .ok_or("it is missing from the record")
        .attempt(|| "open the jail's copy of ims-jail-shell")?;
    // On an error this process ends: nothing is ever started in a half-entered jail.
    join_namespaces(&descriptors, record.tier, CloneFlags::all())?;
    if let (Tier::Chroot, [image_root]) = (record.tier, descriptors.as_slice()) {
        change_root(image_root).attempt(|| "change the root to the image root")?;
    }
    // Hide again: a change of credentials, as by joining a user namespace, resets the dumpable flag to fs.suid_dumpable
    // (prctl(2), PR_SET_DUMPABLE).
    hide()?;
    Ok(Joined { init, helper })
}

/// Advice for a jail whose init has ended.
fn gone(record: &Record) -> &'static str {
    match Handle::open(record.keeper) {
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {
            "the build environment was killed: run 'ims-sshd status' there"
        }
        _ => "it has just ended; if the build environment is not closing, log in again in a moment",
    }
}

/// Duplicates the keeper's descriptors `numbers`.
pub(crate) fn open_descriptors(record: &Record, numbers: &[i32]) -> Result<Vec<OwnedFd>> {
    let attempted = || format!("open the jail's namespaces, which process {} keeps open", record.keeper.pid);
    record.keeper.open_descriptors(numbers).attempt(attempted)
}

/// Joins those namespaces of `descriptors` that are of the given kinds.
pub(crate) fn join_namespaces(descriptors: &[OwnedFd], tier: Tier, kinds: CloneFlags) -> Result<()> {
    for (descriptor, (name, flag)) in
        descriptors.iter().zip(tier.namespaces()).filter(|(_, (_, flag))| kinds.contains(*flag))
    {
        nix::sched::setns(descriptor, *flag).attempt(|| format!("enter the jail's {name} namespace"))?;
    }
    Ok(())
}
