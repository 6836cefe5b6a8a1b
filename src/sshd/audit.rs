//! The kernel's audit log, to which Debian's sshd writes each login on a terminal. Where it may not (EPERM), it ends the session; where the
//! kernel has no audit, it goes on (linux_audit_record_event of OpenSSH's audit-linux.c). A container without CAP_AUDIT_WRITE is told the
//! former unless its seccomp profile hides the audit log, as podman's does.

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, netlink, socket_with};
use rustix::thread::CapabilitySet;

use crate::error::{Attempt, Result};
use crate::jail::refused_calls;
use crate::sys::seccomp;

/// Hides the audit log from what this thread starts, if that may not write to it. A filter takes CAP_SYS_ADMIN or `no_new_privs`; the
/// latter is not set here, since sessions need setuid programs.
pub fn hide_from_sshd() -> Result<()> {
    let held = rustix::thread::capabilities(None).attempt(|| "look at this process's capabilities")?.effective;
    if held.contains(CapabilitySet::AUDIT_WRITE)
        || is_hidden()
        || seccomp::filter(&refused_calls::without_audit()).is_ok()
    {
        return Ok(());
    }
    tracing::warn!(
        "logins on a terminal will fail: sshd lacks CAP_AUDIT_WRITE; give the container AUDIT_WRITE, or allowPrivilegeEscalation: false"
    );
    Ok(())
}

/// Whether the kernel has no audit, or a profile says so.
fn is_hidden() -> bool {
    let opened = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::AUDIT));
    // What libaudit takes for it.
    matches!(opened, Err(Errno::INVAL | Errno::PROTONOSUPPORT | Errno::AFNOSUPPORT))
}
