//! Capabilities of root in the jail.

use caps::{CapSet, Capability};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// Capabilities that root keeps in the jail, each with the programs that need it. All others leave the bounding set, so
/// that no program in the jail, setuid or with file capabilities, regains them.
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

/// Capability that root has in a build in addition to [`KEPT`], in the build's own user namespace.
pub(crate) const OF_BUILD: (Capability, &str) =
    (Capability::CAP_SYS_ADMIN, "kiwi-ng and debootstrap mount /proc and others in the image root");

/// Reduces this process and everything it starts to the kept capabilities, for good. Needs CAP_SETPCAP if there are
/// others to drop.
pub(crate) fn keep_jail_set() -> rustix::io::Result<()> {
    keep_for_good(mask(KEPT))
}

/// Reduces this process and everything it starts to the capabilities of a build, for good.
pub(crate) fn keep_build_set() -> rustix::io::Result<()> {
    keep_for_good(mask(KEPT) | mask(&[OF_BUILD]))
}

fn keep_for_good(kept: CapabilitySet) -> rustix::io::Result<()> {
    // Iterate over numbers, because the kernel may have capabilities that this program has no name for.
    for capability in (0..u64::BITS).map(|number| CapabilitySet::from_bits_retain(1 << number)) {
        if CapabilitySet::contains(&kept, capability) {
            continue;
        }
        if let Err(error) = rustix::thread::remove_capability_from_bounding_set(capability) {
            // The capability may already be gone, or be beyond the kernel's last one.
            match rustix::thread::capability_is_in_bounding_set(capability) {
                Ok(true) => return Err(error),
                Ok(false) => {}
                Err(_) => break,
            }
        }
    }
    set(kept)
}

/// Reduces this process to `kept`. Only for a process that starts no program: a started program would get all
/// capabilities of the bounding set.
pub(crate) fn keep_only(kept: &[(Capability, &str)]) -> rustix::io::Result<()> {
    set(mask(kept))
}

fn mask(kept: &[(Capability, &str)]) -> CapabilitySet {
    CapabilitySet::from_bits_retain(kept.iter().fold(0, |mask, (kept, _)| mask | kept.bitmask()))
}

fn set(kept: CapabilitySet) -> rustix::io::Result<()> {
    rustix::thread::clear_ambient_capability_set()?;
    let left = rustix::thread::capabilities(None)?.permitted & kept;
    let sets = CapabilitySets { effective: left, permitted: left, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets)
}

/// True if this thread, and what it starts, lacks `capability`.
pub(crate) fn lacks(capability: Capability) -> bool {
    matches!(caps::has_cap(None, CapSet::Effective, capability), Ok(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_that_lead_out_of_the_jail_are_dropped() {
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
