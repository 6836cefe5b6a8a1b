//! What root may do in the jail.

use rustix::thread::{CapabilitySet, CapabilitySets};

/// The capabilities that root keeps in the jail, each with who needs it. Everything else leaves the bounding set, so that no
/// program started in the jail, setuid or with file capabilities, gets it back.
pub const KEPT: &[(CapabilitySet, &str)] = &[
    (CapabilitySet::AUDIT_WRITE, "su, sudo and login write audit records"),
    (CapabilitySet::CHOWN, "rpm, dpkg and tar give files to their owners"),
    (CapabilitySet::DAC_OVERRIDE, "root edits any file of the image"),
    (CapabilitySet::FOWNER, "rpm, dpkg and rsync set modes and times of others' files"),
    (CapabilitySet::FSETID, "rpm and dpkg keep setuid and setgid bits"),
    (CapabilitySet::KILL, "root ends others' processes in the jail"),
    (CapabilitySet::MKNOD, "packages such as filesystem, and dracut, make device nodes (which open nothing: nodev)"),
    (CapabilitySet::NET_BIND_SERVICE, "a package's test starts its service on its own port"),
    (CapabilitySet::NET_RAW, "ping carries it as a file capability and cannot be started without"),
    (CapabilitySet::SETFCAP, "rpm and setcap store file capabilities"),
    (CapabilitySet::SETGID, "su, sudo, apt's sandbox user"),
    (CapabilitySet::SETPCAP, "programs that give up capabilities of their own"),
    (CapabilitySet::SETUID, "su, sudo, apt's sandbox user"),
    (CapabilitySet::SYS_CHROOT, "rpm --root, dracut, scriptlets that use chroot inside the image"),
];

/// Leaves this process, and whatever it starts, the kept capabilities only, for good. Takes CAP_SETPCAP if there are others.
pub fn keep_jail_set() -> rustix::io::Result<()> {
    let kept = KEPT.iter().map(|(capability, _)| *capability).collect();
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
    hold_only(kept)
}

/// Leaves this process `kept` only, of those it has. For one that starts no program, which would have what is in the bounding set.
pub fn hold_only(kept: CapabilitySet) -> rustix::io::Result<()> {
    rustix::thread::clear_ambient_capability_set()?;
    let left = rustix::thread::capabilities(None)?.permitted & kept;
    let sets = CapabilitySets { effective: left, permitted: left, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leads_out_of_the_jail_is_not_kept() {
        for dangerous in [
            CapabilitySet::SYS_ADMIN,
            CapabilitySet::SYS_PTRACE,
            CapabilitySet::SYS_MODULE,
            CapabilitySet::SYS_RAWIO,
            CapabilitySet::DAC_READ_SEARCH,
            CapabilitySet::SYS_BOOT,
            CapabilitySet::SYS_TIME,
            CapabilitySet::NET_ADMIN,
            CapabilitySet::BPF,
            CapabilitySet::PERFMON,
            CapabilitySet::SYSLOG,
            CapabilitySet::CHECKPOINT_RESTORE,
            CapabilitySet::MAC_ADMIN,
            CapabilitySet::MAC_OVERRIDE,
        ] {
            assert!(KEPT.iter().all(|(kept, _)| *kept != dangerous), "{dangerous:?}");
        }
    }
}
