//! The kernel's audit log, to which Debian's sshd writes each login on a terminal. On EPERM sshd ends the session;
//! without audit support it goes on (linux_audit_record_event in OpenSSH's audit-linux.c). A container without
//! CAP_AUDIT_WRITE gets EPERM unless its seccomp profile hides the audit log, as podman's does.

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, netlink, socket_with};
use rustix::thread::CapabilitySet;

use crate::error::{Attempt, Result};
use crate::jail::refused_calls;
use crate::sys::seccomp;

/// Hides the audit log from children of this thread if they may not write to it. A filter needs CAP_SYS_ADMIN or
/// `no_new_privs`; the latter would break the setuid programs of sessions.
pub(crate) fn hide_from_sshd() -> Result<()> {
    let held = rustix::thread::capabilities(None).attempt(|| "read this process's capabilities")?.effective;
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

/// True if the kernel has no audit support, or a seccomp profile pretends so.
fn is_hidden() -> bool {
    let opened = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::AUDIT));
    // libaudit interprets these errors as a kernel without audit support.
    matches!(opened, Err(Errno::INVAL | Errno::PROTONOSUPPORT | Errno::AFNOSUPPORT))
}
