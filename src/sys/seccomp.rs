//! Filters system calls of this process and its future children (seccomp(2)).

use std::io;

pub(crate) use libc::sock_filter as Instruction;

/// Runs the BPF `program` before every system call of this process and its future children. Requires CAP_SYS_ADMIN,
/// which keeps setuid programs working, or `no_new_privs`.
pub(crate) fn filter(program: &[Instruction]) -> io::Result<()> {
    let length = u16::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    // SAFETY: `program` points to as many instructions as it says; the kernel only reads and copies them.
    #[allow(unsafe_code)]
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
