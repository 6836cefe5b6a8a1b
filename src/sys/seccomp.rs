//! System calls that this process and its children are refused from now on (seccomp(2)).

use std::io;

pub use libc::sock_filter as Instruction;

/// Has the kernel run `program` before every system call of this process and of all that it starts. Takes
/// CAP_SYS_ADMIN, so that programs still gain rights by being setuid, or `no_new_privs`.
pub fn filter(program: &[Instruction]) -> io::Result<()> {
    let length = u16::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    // SAFETY: `program` is as long as it says; the kernel only reads it, and copies it.
    #[allow(unsafe_code)]
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
