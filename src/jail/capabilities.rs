//! What root may do in the jail.

use caps::{CapSet, Capability, CapsHashSet, errors::CapsError};

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

/// Leaves this process the kept capabilities only, for good.
pub fn keep_jail_set() -> Result<(), CapsError> {
    keep_only(&KEPT.iter().map(|(capability, _)| *capability).collect())
}

/// Leaves this process `kept` only, of those it has, for good: bounding, ambient, inheritable, permitted, effective.
pub fn keep_only(kept: &CapsHashSet) -> Result<(), CapsError> {
    for capability in caps::all().difference(kept) {
        // An older kernel does not know the newest capabilities: what it does not know it does not give either.
        if caps::has_cap(None, CapSet::Bounding, *capability).unwrap_or(false) {
            caps::drop(None, CapSet::Bounding, *capability)?;
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    let left: CapsHashSet = caps::read(None, CapSet::Permitted)?.intersection(kept).copied().collect();
    caps::set(None, CapSet::Effective, &left)?;
    caps::set(None, CapSet::Permitted, &left)?;
    caps::clear(None, CapSet::Inheritable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leads_out_of_the_jail_is_not_kept() {
        use Capability::*;
        for dangerous in [
            CAP_SYS_ADMIN,
            CAP_SYS_PTRACE,
            CAP_SYS_MODULE,
            CAP_SYS_RAWIO,
            CAP_DAC_READ_SEARCH,
            CAP_SYS_BOOT,
            CAP_SYS_TIME,
            CAP_NET_ADMIN,
            CAP_BPF,
            CAP_PERFMON,
            CAP_SYSLOG,
            CAP_CHECKPOINT_RESTORE,
            CAP_MAC_ADMIN,
            CAP_MAC_OVERRIDE,
        ] {
            assert!(KEPT.iter().all(|(kept, _)| *kept != dangerous), "{dangerous}");
        }
    }
}
