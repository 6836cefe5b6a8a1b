//! Landlock (landlock(7)): which files this thread, and what it starts, can reach from now on.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// Access rights below a directory, or to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Files are read and executed, directories listed.
    Read,
    /// Everything.
    Write,
}

// Rights of linux/landlock.h: what each version of the interface knows begins with those of the one before.
const EXECUTE: u64 = 1 << 0;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
const TRUNCATE: u64 = 1 << 14;
const IOCTL_DEV: u64 = 1 << 15;
const UP_TO_REFER: u64 = (1 << 14) - 1;

/// Rights that a rule on a file, instead of a directory, can give.
const OF_FILES: u64 = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV;

/// Signals and abstract sockets reach nobody outside, since version 6.
const ALL_SCOPES: u64 = 0b11;

/// `struct landlock_ruleset_attr`.
#[repr(C)]
struct RulesetAttr {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct PathBeneathAttr {
    allowed_access: u64,
    parent_fd: i32,
}

const PATH_BENEATH: libc::c_int = 1;
const ASK_FOR_VERSION: u32 = 1;

/// The allowed accesses; everything else is refused.
#[derive(Debug)]
pub struct Ruleset {
    fd: OwnedFd,
    rights: u64,
}

impl Ruleset {
    /// One that allows nothing. ENOSYS or EOPNOTSUPP where the kernel has no Landlock, or one before Linux 5.19, which would refuse every link
    /// and rename from one directory to another.
    pub fn new() -> io::Result<Self> {
        let rights = match version()? {
            ..2 => return Err(rustix::io::Errno::OPNOTSUPP.into()),
            2 => UP_TO_REFER,
            3 | 4 => UP_TO_REFER | TRUNCATE,
            _ => UP_TO_REFER | TRUNCATE | IOCTL_DEV,
        };
        let scoped = if version()? >= 6 { ALL_SCOPES } else { 0 };
        let attr = RulesetAttr { handled_access_fs: rights, handled_access_net: 0, scoped };
        // Older kernels refuse fields that they do not know unless they are zero, which they then are.
        // SAFETY: `attr` is a live `struct landlock_ruleset_attr` whose size is passed with it; the kernel only reads it, and the number that
        // it returns is a new descriptor that nobody else owns.
        #[allow(unsafe_code)]
        let fd = unsafe {
            let number =
                libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attr, size_of::<RulesetAttr>(), 0_u32);
            OwnedFd::from_raw_fd(checked(number)?)
        };
        Ok(Self { fd, rights })
    }

    /// Allows `access` to the file `to`, or to all below it if it is a directory. `to` may be O_PATH.
    pub fn allow(&self, to: impl AsFd, access: Access) -> io::Result<()> {
        let to = to.as_fd();
        let wanted = match access {
            Access::Read => EXECUTE | READ_FILE | READ_DIR,
            Access::Write => self.rights,
        };
        let is_directory = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(to)?.st_mode).is_dir();
        let possible = if is_directory { self.rights } else { self.rights & OF_FILES };
        let attr = PathBeneathAttr { allowed_access: wanted & possible, parent_fd: to.as_raw_fd() };
        // SAFETY: both descriptors are open for the length of the call, and `attr` is a live `struct landlock_path_beneath_attr`, which the
        // kernel only reads.
        #[allow(unsafe_code)]
        let result = unsafe {
            libc::syscall(libc::SYS_landlock_add_rule, self.fd.as_raw_fd(), PATH_BENEATH, &raw const attr, 0_u32)
        };
        checked(result).map(|_| ())
    }

    /// Binds this thread, which must not gain privileges any more (`no_new_privs`), and what it starts.
    pub fn restrict_this_thread(self) -> io::Result<()> {
        // SAFETY: the descriptor is open for the length of the call; the call changes this thread's credentials only.
        #[allow(unsafe_code)]
        let result = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, self.fd.as_raw_fd(), 0_u32) };
        checked(result).map(|_| ())
    }
}

/// Version of the kernel's Landlock ABI.
fn version() -> io::Result<i32> {
    // SAFETY: with this flag the kernel takes no structure, and returns a number.
    #[allow(unsafe_code)]
    let result =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0_usize, ASK_FOR_VERSION) };
    checked(result)
}

fn checked(result: libc::c_long) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { i32::try_from(result).map_err(io::Error::other) }
}
