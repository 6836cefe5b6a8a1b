//! The system calls of the attempts that no crate wraps, and all that is unsafe here.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_int, c_long, c_ulong};
use std::fmt::{Display, Formatter};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::str::FromStr;

fn checked(result: c_long) -> io::Result<c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(result: c_long) -> io::Result<OwnedFd> {
    let fd = c_int::try_from(checked(result)?).map_err(io::Error::other)?;
    // SAFETY: only called with what a system call has just opened for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A name of a file that is not a path: name_to_handle_at(2).
#[repr(C)]
#[derive(Clone, Debug)]
pub struct Handle {
    length: u32,
    kind: i32,
    bytes: [u8; 128],
}

impl Handle {
    /// Of what `fd` is open on.
    pub fn of(fd: impl AsFd) -> io::Result<Self> {
        let mut handle = Self { length: 128, kind: 0, bytes: [0; 128] };
        let mut mount: c_int = 0;
        let (fd, flags) = (fd.as_fd().as_raw_fd(), libc::AT_EMPTY_PATH);
        // SAFETY: `handle` has the kernel's layout and says how much room it has; `mount` is an int of ours.
        let result = unsafe {
            libc::syscall(libc::SYS_name_to_handle_at, fd, c"".as_ptr(), &raw mut handle, &raw mut mount, flags)
        };
        checked(result).map(|_| handle)
    }

    /// Opens it on the file system that `place` is on.
    pub fn open(&self, place: impl AsFd, flags: c_int) -> io::Result<OwnedFd> {
        let fd = place.as_fd().as_raw_fd();
        // SAFETY: the kernel only reads `self`, which has its layout.
        owned(unsafe { libc::syscall(libc::SYS_open_by_handle_at, fd, &raw const *self, flags | libc::O_CLOEXEC) })
    }
}

impl Display for Handle {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.kind)?;
        self.bytes[..self.length as usize].iter().try_for_each(|byte| write!(f, ":{byte}"))
    }
}

impl FromStr for Handle {
    type Err = std::num::ParseIntError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut numbers = text.split(':');
        let mut handle = Self { length: 0, kind: numbers.next().unwrap_or_default().parse()?, bytes: [0; 128] };
        for (byte, number) in handle.bytes.iter_mut().zip(numbers) {
            *byte = number.parse()?;
            handle.length += 1;
        }
        Ok(handle)
    }
}

/// Begins to trace a process, without stopping it.
pub fn ptrace_seize(process: i32) -> io::Result<()> {
    // SAFETY: SEIZE uses neither address nor data.
    checked(unsafe { libc::syscall(libc::SYS_ptrace, 0x4206_usize, process, 0_usize, 0_usize) }).map(drop)
}

/// Reads another process's memory at `address`; returns how much was read.
pub fn read_memory(process: i32, address: usize, into: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let remote = libc::iovec { iov_base: std::ptr::without_provenance_mut(address), iov_len: into.len() };
    // SAFETY: `local` is the caller's buffer; `remote` is an address of the other process, which the kernel checks.
    let read = unsafe { libc::process_vm_readv(process, &raw const local, 1, &raw const remote, 1, 0) };
    checked(read as c_long).map(|read| read.unsigned_abs() as usize)
}

/// Pushes one byte into a terminal as if it had been typed.
pub fn push_input(terminal: impl AsFd, byte: u8) -> io::Result<()> {
    // SAFETY: TIOCSTI reads one byte.
    checked(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSTI, &raw const byte) }.into()).map(drop)
}

/// Makes `terminal` this session's controlling one, taking it away from the session that has it.
pub fn steal_terminal(terminal: impl AsFd) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes a number.
    checked(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSCTTY, 1) }.into()).map(drop)
}

/// The mount namespace after that which `namespace` is open on (`NS_MNT_GET_NEXT`), or before (`NS_MNT_GET_PREV`).
pub fn neighbour(namespace: BorrowedFd<'_>, after: bool) -> io::Result<OwnedFd> {
    let request: c_ulong = if after { 0x8010_b70b } else { 0x8010_b70c };
    let mut information = [0_u64; 2];
    // SAFETY: the kernel writes a struct mnt_ns_info, the 16 bytes that the request's number says.
    owned(unsafe { libc::ioctl(namespace.as_raw_fd(), request as _, &raw mut information) }.into())
}

/// Reads the flags of network interface `lo` and sets the same ones, if `set`.
pub fn loopback_flags(socket: impl AsFd, set: bool) -> io::Result<()> {
    // SAFETY: an ifreq is plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(b"lo") {
        *place = byte.cast_signed() as _;
    }
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: both requests take an ifreq.
    let mut result = unsafe { libc::ioctl(fd, libc::SIOCGIFFLAGS as _, &raw mut request) };
    if set && result == 0 {
        // SAFETY: as above.
        result = unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS as _, &raw mut request) };
    }
    checked(result.into()).map(drop)
}

/// Watches all that happens on the file system of `path`.
pub fn watch_file_system(path: &CStr) -> io::Result<()> {
    // SAFETY: takes numbers.
    let group = owned(unsafe { libc::fanotify_init(libc::FAN_CLASS_CONTENT | libc::FAN_CLOEXEC, 0) }.into())?;
    let flags = libc::FAN_MARK_ADD | libc::FAN_MARK_FILESYSTEM;
    // SAFETY: `path` ends with a NUL byte.
    let result =
        unsafe { libc::fanotify_mark(group.as_raw_fd(), flags, libc::FAN_OPEN, libc::AT_FDCWD, path.as_ptr()) };
    checked(result.into()).map(drop)
}

/// Counts events of all processes on the first processor.
pub fn count_events_of_all() -> io::Result<OwnedFd> {
    // struct perf_event_attr, version 0: type PERF_TYPE_SOFTWARE and size, config PERF_COUNT_SW_CPU_CLOCK.
    let attributes: [u64; 8] = [1 | 64 << 32, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: the kernel reads as many bytes as the attributes' size says.
    owned(unsafe { libc::syscall(libc::SYS_perf_event_open, &raw const attributes, -1, 0, -1, 0_usize) })
}

/// Loads a program into the kernel that would run at a tracepoint, and returns 0.
pub fn load_bpf_tracer() -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: *const u64,
        license: *const std::ffi::c_char,
        rest: [u64; 13],
    }
    // r0 = 0; exit
    let instructions: [u64; 2] = [0xb7, 0x95];
    let load = Load { kind: 5, count: 2, instructions: instructions.as_ptr(), license: c"GPL".as_ptr(), rest: [0; 13] };
    // SAFETY: the kernel reads `load`, and through it the instructions and the license, which outlive the call.
    owned(unsafe { libc::syscall(libc::SYS_bpf, 5, &raw const load, size_of::<Load>()) })
}

/// Loads a kernel module that is none: who may, is told that it is none.
pub fn load_module() -> io::Result<()> {
    // SAFETY: the kernel reads one byte.
    checked(unsafe { libc::syscall(libc::SYS_init_module, c"x".as_ptr(), 1_usize, c"".as_ptr()) }).map(drop)
}

/// Loads a kernel to start of no parts.
pub fn load_kernel() -> io::Result<()> {
    // SAFETY: there are no segments to read.
    checked(unsafe { libc::syscall(libc::SYS_kexec_load, 0_usize, 0_usize, 0_usize, 1_usize) }).map(drop)
}

/// Asks for a restart with a magic number that is wrong: who may, is told so (the right to it is looked at first).
pub fn reboot_wrongly() -> io::Result<()> {
    // SAFETY: with these numbers nothing happens.
    checked(unsafe { libc::syscall(libc::SYS_reboot, 0, 0, 0, 0_usize) }).map(drop)
}

/// Sets the clock's status to what it is.
pub fn set_clock_status() -> io::Result<()> {
    // SAFETY: a timex is plain data, for which zeros are valid: nothing is set, all is read.
    let mut clock: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `clock` is ours.
    checked(unsafe { libc::adjtimex(&raw mut clock) }.into())?;
    clock.modes = libc::ADJ_STATUS;
    // SAFETY: as above.
    checked(unsafe { libc::adjtimex(&raw mut clock) }.into()).map(drop)
}

/// Takes the read-only flag from the mount at `path`, in this mount namespace.
pub fn make_writable(path: &CStr) -> io::Result<()> {
    // struct mount_attr: set, clear, propagation, user namespace.
    let attributes: [u64; 4] = [0, 1, 0, 0];
    let size = size_of_val(&attributes);
    // SAFETY: the kernel reads `size` bytes of `attributes`.
    let result =
        unsafe { libc::syscall(libc::SYS_mount_setattr, libc::AT_FDCWD, path.as_ptr(), 0, attributes.as_ptr(), size) };
    checked(result).map(drop)
}

/// System V shared memory of 4096 bytes.
pub struct SharedMemory {
    id: c_int,
    place: *mut u8,
}

impl SharedMemory {
    /// Makes that of `key`.
    pub fn make(key: i32, text: &[u8]) -> io::Result<Self> {
        let this = Self::at(key, libc::IPC_CREAT | libc::IPC_EXCL | 0o600)?;
        // SAFETY: the memory is 4096 bytes long, and nobody else knows it yet.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), this.place, text.len().min(4096)) };
        Ok(this)
    }

    /// That of `key`, which somebody has made.
    pub fn of(key: i32) -> io::Result<Self> {
        Self::at(key, 0)
    }

    fn at(key: i32, flags: c_int) -> io::Result<Self> {
        // SAFETY: takes numbers.
        let id = unsafe { libc::shmget(key, 4096, flags) };
        checked(id.into())?;
        // SAFETY: the kernel chooses where.
        let place = unsafe { libc::shmat(id, std::ptr::null(), 0) };
        if place.addr() == usize::MAX { Err(io::Error::last_os_error()) } else { Ok(Self { id, place: place.cast() }) }
    }

    /// What is in it.
    pub fn read(&self) -> Vec<u8> {
        let mut copy = vec![0; 4096];
        // SAFETY: the memory is 4096 bytes long and stays attached as long as this process lives.
        unsafe { std::ptr::copy_nonoverlapping(self.place, copy.as_mut_ptr(), copy.len()) };
        copy
    }

    /// Gives it back.
    pub fn remove(&self) {
        // SAFETY: this command takes no buffer.
        unsafe { libc::shmctl(self.id, libc::IPC_RMID, std::ptr::null_mut()) };
    }
}

/// Makes the POSIX message queue `name` with one message.
pub fn make_queue(name: &CStr, message: &[u8]) -> io::Result<()> {
    // SAFETY: the default attributes are used; the message is ours.
    unsafe {
        let queue = libc::mq_open(name.as_ptr(), libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY, 0o600, 0);
        checked(queue.into())?;
        checked(libc::mq_send(queue, message.as_ptr().cast(), message.len(), 0).into()).map(drop)
    }
}

/// Takes a message from the POSIX message queue `name`.
pub fn take_from_queue(name: &CStr) -> io::Result<Vec<u8>> {
    let mut message = vec![0; 64 << 10];
    // SAFETY: the buffer is as long as it is said to be.
    let length = unsafe {
        let queue = libc::mq_open(name.as_ptr(), libc::O_RDONLY | libc::O_NONBLOCK);
        checked(queue.into())?;
        libc::mq_receive(queue, message.as_mut_ptr().cast(), message.len(), std::ptr::null_mut())
    };
    message.truncate(checked(length as c_long)?.unsigned_abs() as usize);
    Ok(message)
}

/// Removes the POSIX message queue `name`.
pub fn remove_queue(name: &CStr) {
    // SAFETY: `name` ends with a NUL byte.
    unsafe { libc::mq_unlink(name.as_ptr()) };
}

/// A keyring of this process alone (linux/keyctl.h, as all numbers here).
const PROCESS_KEYRING: c_int = -2;
/// The keyring that a process inherits.
pub const SESSION_KEYRING: c_int = -3;
/// A keyring that every process of a user shares, in one user namespace.
pub const USER_KEYRING: c_int = -4;
const KEYCTL_JOIN_SESSION_KEYRING: c_int = 1;
const KEYCTL_LINK: c_int = 8;
const KEYCTL_UNLINK: c_int = 9;
const KEYCTL_SEARCH: c_int = 10;
const KEYCTL_READ: c_int = 11;

/// Adds a key to `ring`; returns its number.
pub fn add_key(name: &CStr, text: &[u8], ring: i32) -> io::Result<i32> {
    // SAFETY: names end with a NUL byte, the text is as long as it is said to be.
    let key =
        unsafe { libc::syscall(libc::SYS_add_key, c"user".as_ptr(), name.as_ptr(), text.as_ptr(), text.len(), ring) };
    checked(key).map(|key| key as i32)
}

/// Takes a key out of `ring`.
pub fn remove_key(key: i32, ring: i32) {
    // SAFETY: takes numbers.
    unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_UNLINK, key, ring) };
}

/// Starts a session keyring of this process's own.
pub fn new_session_keyring() -> io::Result<()> {
    // SAFETY: no name is given.
    checked(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0_usize) }).map(drop)
}

/// Reads the key `name` of `ring`, once that keyring is linked into one of this process's own: only then may its keys be read.
pub fn read_key(name: &CStr, ring: i32) -> io::Result<Vec<u8>> {
    let mut text = vec![0; 4096];
    // SAFETY: numbers, names that end with a NUL byte, and a buffer that is as long as it is said to be.
    let length = unsafe {
        checked(libc::syscall(libc::SYS_keyctl, KEYCTL_LINK, ring, PROCESS_KEYRING))?;
        let key = libc::syscall(libc::SYS_keyctl, KEYCTL_SEARCH, ring, c"user".as_ptr(), name.as_ptr(), 0);
        libc::syscall(libc::SYS_keyctl, KEYCTL_READ, checked(key)?, text.as_mut_ptr(), text.len())
    };
    text.truncate(checked(length)?.unsigned_abs() as usize);
    Ok(text)
}

/// unshare(2) by the calls of 32-bit programs, which every program may use where the kernel has them.
pub fn unshare_by_32_bits(flags: c_int) -> io::Result<()> {
    #[cfg(target_arch = "x86_64")]
    {
        let mut result: i32 = 310;
        // SAFETY: this call takes a number, in ebx, which the compiler keeps for itself: it is put back.
        unsafe {
            std::arch::asm!(
                "xchg {flags:r}, rbx",
                "int 0x80",
                "xchg {flags:r}, rbx",
                flags = inout(reg) i64::from(flags) => _,
                inout("eax") result,
                out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            );
        }
        if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = flags;
        Err(io::Error::from_raw_os_error(libc::ENOSYS))
    }
}
