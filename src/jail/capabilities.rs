//! What root may do in the jail.

use caps::{CapSet, Capability};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// The capabilities that root keeps in the jail, each with who needs it. Everything else leaves the bounding set, so that no
/// program started in the jail, setuid or with file capabilities, gets it back.
pub const KEPT: &[(Capability, &str)] = &[
    (Capability::CAP_AUDIT_WRITE, "su, sudo and login write audit records"),
    (Capability::CAP_CHOWN, "rpm, dpkg and tar give files to their owners"),
    (Capability::CAP_DAC_OVERRIDE, "root edits any file of the image"),
    (Capability::CAP_FOWNER, "rpm, dpkg and rsync set modes and times of others' files"),
    (Capability::CAP_FSETID, "rpm and dpkg keep setuid and setgid bits"),
    (Capability::CAP_KILL, "root ends others' processes in the jail"),
    (Capability::CAP_MKNOD, "packages such as filesystem, and dracut, make device nodes (which open nothing: nodev)"),
    (Capability::CAP_NET_BIND_SERVICE, "a package's test starts its service on its own port"),
    (Capability::CAP_NET_RAW, "ping carries it as a file capability and cannot be started without"),
    (Capability::CAP_SETFCAP, "rpm and setcap store file capabilities"),
    (Capability::CAP_SETGID, "su, sudo, apt's sandbox user"),
    (Capability::CAP_SETPCAP, "programs that give up capabilities of their own"),
    (Capability::CAP_SETUID, "su, sudo, apt's sandbox user"),
    (Capability::CAP_SYS_CHROOT, "rpm --root, dracut, scriptlets that use chroot inside the image"),
];

/// Leaves this process, and whatever it starts, the kept capabilities only, for good. Takes CAP_SETPCAP if there are others.
pub(crate) fn keep_jail_set() -> rustix::io::Result<()> {
    let kept = mask(KEPT);
    // By number and not by name: this kernel may know capabilities that have no name here yet.
    for capability in (0..u64::BITS).map(|number| CapabilitySet::from_bits_retain(1 << number)) {
        if CapabilitySet::contains(&kept, capability) {
            continue;
        }
        if let Err(error) = rustix::thread::remove_capability_from_bounding_set(capability) {
            // It may be gone already, or the kernel's last one may have been the one before.
            match rustix::thread::capability_is_in_bounding_set(capability) {
                Ok(true) => return Err(error),
                Ok(false) => {}
                Err(_) => break,
            }
        }
    }
    hold(kept)
}

/// Leaves this process `kept` only, of those it has. For one that starts no program, which would have what is in the bounding set.
pub(crate) fn hold_only(kept: &[(Capability, &str)]) -> rustix::io::Result<()> {
    hold(mask(kept))
}

fn mask(kept: &[(Capability, &str)]) -> CapabilitySet {
    CapabilitySet::from_bits_retain(kept.iter().fold(0, |mask, (kept, _)| mask | kept.bitmask()))
}

fn hold(kept: CapabilitySet) -> rustix::io::Result<()> {
    rustix::thread::clear_ambient_capability_set()?;
    let left = rustix::thread::capabilities(None)?.permitted & kept;
    let sets = CapabilitySets { effective: left, permitted: left, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets)
}

/// Whether this thread, and what it starts, lacks `capability`.
pub(crate) fn lacks(capability: Capability) -> bool {
    matches!(caps::has_cap(None, CapSet::Effective, capability), Ok(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leads_out_of_the_jail_is_not_kept() {
        for dangerous in [
            Capability::CAP_SYS_ADMIN,
            Capability::CAP_SYS_PTRACE,
            Capability::CAP_SYS_MODULE,
            Capability::CAP_SYS_RAWIO,
            Capability::CAP_DAC_READ_SEARCH,
            Capability::CAP_SYS_BOOT,
            Capability::CAP_SYS_TIME,
            Capability::CAP_NET_ADMIN,
            Capability::CAP_BPF,
            Capability::CAP_PERFMON,
            Capability::CAP_SYSLOG,
            Capability::CAP_CHECKPOINT_RESTORE,
            Capability::CAP_MAC_ADMIN,
            Capability::CAP_MAC_OVERRIDE,
        ] {
            assert!(KEPT.iter().all(|(kept, _)| *kept != dangerous), "{dangerous:?}");
        }
    }
}
