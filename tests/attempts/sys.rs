//! System calls of the attempts that no crate wraps; all unsafe code is here.
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
    // SAFETY: only called with a descriptor that a system call has just opened for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A file handle: name_to_handle_at(2).
#[repr(C)]
#[derive(Clone, Debug)]
pub struct Handle {
    length: u32,
    kind: i32,
    bytes: [u8; 128],
}

impl Handle {
    /// The handle of what `fd` refers to.
    pub fn of(fd: impl AsFd) -> io::Result<Self> {
        let mut handle = Self { length: 128, kind: 0, bytes: [0; 128] };
        let mut mount: c_int = 0;
        let (fd, flags) = (fd.as_fd().as_raw_fd(), libc::AT_EMPTY_PATH);
        // SAFETY: `handle` has the kernel's layout and states its size; `mount` is an int of ours.
        let result = unsafe {
            libc::syscall(libc::SYS_name_to_handle_at, fd, c"".as_ptr(), &raw mut handle, &raw mut mount, flags)
        };
        checked(result).map(|_| handle)
    }

    /// Opens it on the file system of `place`.
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

/// Starts tracing a process without stopping it.
pub fn ptrace_seize(process: i32) -> io::Result<()> {
    // SAFETY: SEIZE uses neither address nor data.
    checked(unsafe { libc::syscall(libc::SYS_ptrace, 0x4206_usize, process, 0_usize, 0_usize) }).map(drop)
}

/// Takes a write lease on a file that nobody else has open.
pub fn lease(file: impl AsFd) -> io::Result<()> {
    // SAFETY: F_SETLEASE takes a number.
    checked(unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) }.into()).map(drop)
}

/// Sets a limit of a process to its current value.
pub fn set_limit_again(process: i32) -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    let (none, none_mut) = (std::ptr::null(), std::ptr::null_mut());
    // SAFETY: the kernel writes one limit, ours.
    checked(unsafe { libc::prlimit(process, libc::RLIMIT_CORE, none, &raw mut limit) }.into())?;
    // SAFETY: the kernel reads one limit.
    checked(unsafe { libc::prlimit(process, libc::RLIMIT_CORE, &raw const limit, none_mut) }.into()).map(drop)
}

/// Reads another process's memory at `address`; returns the number of bytes read.
pub fn read_memory(process: i32, address: usize, into: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let remote = libc::iovec { iov_base: std::ptr::without_provenance_mut(address), iov_len: into.len() };
    // SAFETY: `local` is the caller's buffer; the kernel checks `remote`, an address in the other process.
    let read = unsafe { libc::process_vm_readv(process, &raw const local, 1, &raw const remote, 1, 0) };
    checked(read as c_long).map(|read| read.unsigned_abs() as usize)
}

/// Pushes one byte into a terminal as if typed.
pub fn push_input(terminal: impl AsFd, byte: u8) -> io::Result<()> {
    // SAFETY: TIOCSTI reads one byte.
    checked(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSTI, &raw const byte) }.into()).map(drop)
}

/// Makes `terminal` this session's controlling terminal, stealing it from its session.
pub fn steal_terminal(terminal: impl AsFd) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes a number.
    checked(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSCTTY, 1) }.into()).map(drop)
}

/// The mount namespace after `namespace` (`NS_MNT_GET_NEXT`) or before it (`NS_MNT_GET_PREV`).
pub fn neighbour(namespace: BorrowedFd<'_>, after: bool) -> io::Result<OwnedFd> {
    let request: c_ulong = if after { 0x8010_b70b } else { 0x8010_b70c };
    let mut information = [0_u64; 2];
    // SAFETY: the kernel writes a struct mnt_ns_info, 16 bytes as encoded in the request number.
    owned(unsafe { libc::ioctl(namespace.as_raw_fd(), request as _, &raw mut information) }.into())
}

/// The user namespace that owns `namespace` (`NS_GET_USERNS`).
pub fn owner(namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: the request takes no argument.
    owned(unsafe { libc::ioctl(namespace.as_raw_fd(), 0xb701) }.into())
}

/// Reads the flags of network interface `lo`; if `set`, sets the same flags.
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

/// Watches all events on the file system of `path`.
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
    // SAFETY: the kernel reads as many bytes as the size in the attributes.
    owned(unsafe { libc::syscall(libc::SYS_perf_event_open, &raw const attributes, -1, 0, -1, 0_usize) })
}

/// Loads a BPF program for a tracepoint that returns 0.
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

/// Loads an invalid kernel module: with the privilege, the error is that it is invalid.
pub fn load_module() -> io::Result<()> {
    // SAFETY: the kernel reads one byte.
    checked(unsafe { libc::syscall(libc::SYS_init_module, c"x".as_ptr(), 1_usize, c"".as_ptr()) }).map(drop)
}

/// Loads a kernel with no segments.
pub fn load_kernel() -> io::Result<()> {
    // SAFETY: there are no segments to read.
    checked(unsafe { libc::syscall(libc::SYS_kexec_load, 0_usize, 0_usize, 0_usize, 1_usize) }).map(drop)
}

/// Requests a restart with a wrong magic number: with the privilege, which is checked first, the error says so.
pub fn reboot_wrongly() -> io::Result<()> {
    // SAFETY: these numbers have no effect.
    checked(unsafe { libc::syscall(libc::SYS_reboot, 0, 0, 0, 0_usize) }).map(drop)
}

/// Sets the clock's status to its current value.
pub fn set_clock_status() -> io::Result<()> {
    // SAFETY: a timex is plain data, for which zeros are valid; they mean reading only.
    let mut clock: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `clock` is ours.
    checked(unsafe { libc::adjtimex(&raw mut clock) }.into())?;
    clock.modes = libc::ADJ_STATUS;
    // SAFETY: as above.
    checked(unsafe { libc::adjtimex(&raw mut clock) }.into()).map(drop)
}

/// Clears the read-only flag of the mount at `path` in this mount namespace.
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
    /// Creates it with `key`.
    pub fn make(key: i32, text: &[u8]) -> io::Result<Self> {
        let this = Self::at(key, libc::IPC_CREAT | libc::IPC_EXCL | 0o600)?;
        // SAFETY: the memory is 4096 bytes long, and nobody else has it yet.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), this.place, text.len().min(4096)) };
        Ok(this)
    }

    /// Attaches existing memory with `key`.
    pub fn of(key: i32) -> io::Result<Self> {
        Self::at(key, 0)
    }

    fn at(key: i32, flags: c_int) -> io::Result<Self> {
        // SAFETY: takes numbers.
        let id = unsafe { libc::shmget(key, 4096, flags) };
        checked(id.into())?;
        // SAFETY: the kernel chooses the address.
        let place = unsafe { libc::shmat(id, std::ptr::null(), 0) };
        if place.addr() == usize::MAX { Err(io::Error::last_os_error()) } else { Ok(Self { id, place: place.cast() }) }
    }

    /// Its contents.
    pub fn read(&self) -> Vec<u8> {
        let mut copy = vec![0; 4096];
        // SAFETY: the memory is 4096 bytes long and stays attached while this process lives.
        unsafe { std::ptr::copy_nonoverlapping(self.place, copy.as_mut_ptr(), copy.len()) };
        copy
    }

    /// Removes it.
    pub fn remove(&self) {
        // SAFETY: this command takes no buffer.
        unsafe { libc::shmctl(self.id, libc::IPC_RMID, std::ptr::null_mut()) };
    }
}

/// Creates the POSIX message queue `name` with one message.
pub fn make_queue(name: &CStr, message: &[u8]) -> io::Result<()> {
    // SAFETY: default attributes; the message is ours.
    unsafe {
        let queue = libc::mq_open(name.as_ptr(), libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY, 0o600, 0);
        checked(queue.into())?;
        checked(libc::mq_send(queue, message.as_ptr().cast(), message.len(), 0).into()).map(drop)
    }
}

/// Takes a message from the POSIX message queue `name`.
pub fn take_from_queue(name: &CStr) -> io::Result<Vec<u8>> {
    let mut message = vec![0; 64 << 10];
    // SAFETY: the buffer has the length given.
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

/// A keyring of this process (this and the numbers below are from linux/keyctl.h).
const PROCESS_KEYRING: c_int = -2;
/// The keyring that processes inherit.
pub const SESSION_KEYRING: c_int = -3;
/// A keyring shared by all processes of a user, in one user namespace.
pub const USER_KEYRING: c_int = -4;
const KEYCTL_JOIN_SESSION_KEYRING: c_int = 1;
const KEYCTL_LINK: c_int = 8;
const KEYCTL_UNLINK: c_int = 9;
const KEYCTL_SEARCH: c_int = 10;
const KEYCTL_READ: c_int = 11;

/// Adds a key to `ring`; returns its serial number.
pub fn add_key(name: &CStr, text: &[u8], ring: i32) -> io::Result<i32> {
    // SAFETY: names end with a NUL byte; the text has the length given.
    let key =
        unsafe { libc::syscall(libc::SYS_add_key, c"user".as_ptr(), name.as_ptr(), text.as_ptr(), text.len(), ring) };
    checked(key).map(|key| key as i32)
}

/// Removes a key from `ring`.
pub fn remove_key(key: i32, ring: i32) {
    // SAFETY: takes numbers.
    unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_UNLINK, key, ring) };
}

/// Starts a new session keyring.
pub fn new_session_keyring() -> io::Result<()> {
    // SAFETY: no name is given.
    checked(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0_usize) }).map(drop)
}

/// Reads the key `name` of `ring` after linking that keyring into one of this process: reading requires possession.
pub fn read_key(name: &CStr, ring: i32) -> io::Result<Vec<u8>> {
    let mut text = vec![0; 4096];
    // SAFETY: numbers, names that end with a NUL byte, and a buffer of the length given.
    let length = unsafe {
        checked(libc::syscall(libc::SYS_keyctl, KEYCTL_LINK, ring, PROCESS_KEYRING))?;
        let key = libc::syscall(libc::SYS_keyctl, KEYCTL_SEARCH, ring, c"user".as_ptr(), name.as_ptr(), 0);
        libc::syscall(libc::SYS_keyctl, KEYCTL_READ, checked(key)?, text.as_mut_ptr(), text.len())
    };
    text.truncate(checked(length)?.unsigned_abs() as usize);
    Ok(text)
}

/// A 32-bit system call (int 0x80), which any program may use if the kernel supports it. Pointers must be below 4 GB.
pub fn call_by_32_bits(number: i32, arguments: [u32; 5]) -> io::Result<i32> {
    #[cfg(target_arch = "x86_64")]
    {
        let mut result = number;
        // SAFETY: callers pass numbers, or addresses of a `LowMemory`. The compiler reserves the first argument's
        // register, so it is restored.
        unsafe {
            std::arch::asm!(
                "xchg {first:r}, rbx",
                "int 0x80",
                "xchg {first:r}, rbx",
                first = inout(reg) u64::from(arguments[0]) => _,
                inout("eax") result,
                in("ecx") arguments[1],
                in("edx") arguments[2],
                in("esi") arguments[3],
                in("edi") arguments[4],
                out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            );
        }
        if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (number, arguments);
        Err(io::Error::from_raw_os_error(libc::ENOSYS))
    }
}

/// unshare(2) as a 32-bit call.
pub fn unshare_by_32_bits(flags: c_int) -> io::Result<()> {
    call_by_32_bits(310, [flags.cast_unsigned(), 0, 0, 0, 0]).map(drop)
}

/// Words at an address below 4 GB.
pub struct LowMemory(*mut u32);

impl LowMemory {
    pub fn new(words: &[u32]) -> io::Result<Self> {
        #[cfg(target_arch = "x86_64")]
        let low = libc::MAP_32BIT;
        #[cfg(not(target_arch = "x86_64"))]
        let low = 0;
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | low);
        // SAFETY: new memory, never freed, at an address that the kernel chooses.
        let place = unsafe { libc::mmap(std::ptr::null_mut(), 4096, access, kind, -1, 0) };
        if place == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let place = place.cast::<u32>();
        // SAFETY: there is room for 1024 words.
        unsafe { std::ptr::copy_nonoverlapping(words.as_ptr(), place, words.len().min(1024)) };
        Ok(Self(place))
    }

    /// Address of a word.
    pub fn address(&self, word: usize) -> u32 {
        u32::try_from(self.0.addr() + 4 * word).expect("it is below 4 GB")
    }

    /// The first word, as a descriptor that a system call has just opened for us.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        // SAFETY: the memory is ours.
        owned(unsafe { self.0.read_volatile() }.into())
    }
}

/// A socket of any kind.
pub fn socket(family: c_int, kind: c_int, protocol: c_int) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers.
    owned(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) }.into())
}

/// A socket by a 32-bit call, or by socketcall(2) if `multiplexed`.
pub fn socket_by_32_bits(family: u32, kind: u32, protocol: u32, multiplexed: bool) -> io::Result<OwnedFd> {
    let arguments = LowMemory::new(&[family, kind, protocol])?;
    let socket = if multiplexed {
        call_by_32_bits(102, [1, arguments.address(0), 0, 0, 0])
    } else {
        call_by_32_bits(359, [family, kind, protocol, 0, 0])
    };
    owned(socket?.into())
}

/// From asm-generic/socket.h.
const SO_PASSPIDFD: c_int = 76;
const SO_PEERPIDFD: c_int = 77;
const SCM_PIDFD: c_int = 4;

/// A pidfd of the process listening at the other end of a socket.
pub fn peer(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let (mut handle, mut length): (c_int, libc::socklen_t) = (-1, 4);
    let place = (&raw mut handle).cast();
    // SAFETY: the kernel writes one int.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_PEERPIDFD, place, &raw mut length) };
    checked(result.into())?;
    owned(handle.into())
}

/// The same by a 32-bit call, or by socketcall(2) if `multiplexed`.
pub fn peer_by_32_bits(socket: BorrowedFd<'_>, multiplexed: bool) -> io::Result<OwnedFd> {
    let memory = LowMemory::new(&[0, 4])?;
    let (level, option) = (libc::SOL_SOCKET.cast_unsigned(), SO_PEERPIDFD.cast_unsigned());
    let arguments = [socket.as_raw_fd().cast_unsigned(), level, option, memory.address(0), memory.address(1)];
    if multiplexed {
        let arguments = LowMemory::new(&arguments)?;
        call_by_32_bits(102, [15, arguments.address(0), 0, 0, 0])?;
    } else {
        call_by_32_bits(365, arguments)?;
    }
    memory.descriptor()
}

/// Requests a pidfd of the sender with each message.
pub fn ask_for_senders(socket: BorrowedFd<'_>) -> io::Result<()> {
    let yes: c_int = 1;
    let place = (&raw const yes).cast();
    // SAFETY: the kernel reads one int.
    checked(unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_PASSPIDFD, place, 4) }.into()).map(drop)
}

/// Receives a message; returns the pidfd of its sender.
pub fn sender(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let (mut byte, mut control) = ([0_u8; 1], [0_u64; 16]);
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    // SAFETY: a msghdr is plain data, for which zeros are valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the message points only to memory of ours; the kernel returns the length it has written.
    unsafe {
        checked(libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) as c_long)?;
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if ((*header).cmsg_level, (*header).cmsg_type) == (libc::SOL_SOCKET, SCM_PIDFD) {
                return owned(libc::CMSG_DATA(header).cast::<c_int>().read_unaligned().into());
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Err(io::Error::from_raw_os_error(libc::ENOENT))
}

/// A ring for submitting work to the kernel: io_uring_setup(2).
pub fn ring() -> io::Result<OwnedFd> {
    let mut parameters = [0_u32; 30];
    // SAFETY: the kernel reads and writes a struct io_uring_params of 120 bytes.
    owned(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) })
}

/// A handler of this process's page faults in user mode: userfaultfd(2).
pub fn page_fault_handler() -> io::Result<OwnedFd> {
    const UFFD_USER_MODE_ONLY: c_int = 1;
    // SAFETY: takes a number.
    owned(unsafe { libc::syscall(libc::SYS_userfaultfd, UFFD_USER_MODE_ONLY | libc::O_CLOEXEC) })
}

/// Reads the kernel log.
pub fn read_kernel_log() -> io::Result<usize> {
    const SYSLOG_ACTION_READ_ALL: c_int = 3;
    let mut text = [0_u8; 4096];
    let length = text.len() as c_int;
    // SAFETY: the buffer has the length given.
    let read = unsafe { libc::klogctl(SYSLOG_ACTION_READ_ALL, text.as_mut_ptr().cast(), length) };
    checked(read.into()).map(|read| read.unsigned_abs() as usize)
}
