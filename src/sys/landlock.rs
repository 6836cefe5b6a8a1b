//! Landlock (landlock(7)): restricts which files this thread and its future children can reach.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// Access rights below a directory, or to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Read and execute files, list directories.
    Read,
    /// Everything.
    Write,
}

// From linux/landlock.h. Each ABI version adds rights to those of the previous one.
const EXECUTE: u64 = 1 << 0;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIR: u64 = 1 << 3;
const TRUNCATE: u64 = 1 << 14;
const IOCTL_DEV: u64 = 1 << 15;
const UP_TO_REFER: u64 = (1 << 14) - 1;

/// Rights that can apply to a file; the others are for directories only.
const OF_FILES: u64 = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV;

/// Scopes for signals and abstract sockets, which exist since the ABI version `FIRST_WITH_SCOPES`.
const ALL_SCOPES: u64 = 0b11;
const FIRST_WITH_SCOPES: i32 = 6;

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

/// A set of allowed accesses; everything else is denied.
#[derive(Debug)]
pub(crate) struct Ruleset {
    fd: OwnedFd,
    rights: u64,
}

impl Ruleset {
    /// Creates a ruleset that allows nothing. Fails with ENOSYS or EOPNOTSUPP if the kernel has no Landlock, or only
    /// that of Linux before 5.19, which denies every link and rename between directories.
    pub(crate) fn new() -> io::Result<Self> {
        let rights = match version()? {
            ..2 => return Err(rustix::io::Errno::OPNOTSUPP.into()),
            2 => UP_TO_REFER,
            3 | 4 => UP_TO_REFER | TRUNCATE,
            _ => UP_TO_REFER | TRUNCATE | IOCTL_DEV,
        };
        let scoped = if version()? >= FIRST_WITH_SCOPES { ALL_SCOPES } else { 0 };
        Self::create(rights, scoped)
    }

    /// A ruleset that restricts no file access. A thread under it cannot send signals to processes outside the ruleset,
    /// nor connect to their abstract sockets. `None` if the kernel is older than Linux 6.12, or has no Landlock.
    pub(crate) fn of_scopes() -> io::Result<Option<Self>> {
        match version() {
            Ok(FIRST_WITH_SCOPES..) => Self::create(0, ALL_SCOPES).map(Some),
            _ => Ok(None),
        }
    }

    fn create(rights: u64, scoped: u64) -> io::Result<Self> {
        let attr = RulesetAttr { handled_access_fs: rights, handled_access_net: 0, scoped };
        // A kernel that does not know the field `scoped` accepts it only if it is zero, and callers pass zero to such a
        // kernel.
        // SAFETY: `attr` is a live `struct landlock_ruleset_attr` passed with its size; the kernel only reads it, and
        // returns a new descriptor that nobody else owns.
        #[allow(unsafe_code)]
        let fd = unsafe {
            let number =
                libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attr, size_of::<RulesetAttr>(), 0_u32);
            OwnedFd::from_raw_fd(checked(number)?)
        };
        Ok(Self { fd, rights })
    }

    /// Allows `access` to the file `to`, or to everything below it if it is a directory. `to` may be O_PATH.
    pub(crate) fn allow(&self, to: impl AsFd, access: Access) -> io::Result<()> {
        let to = to.as_fd();
        let wanted = match access {
            Access::Read => EXECUTE | READ_FILE | READ_DIR,
            Access::Write => self.rights,
        };
        let is_directory = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(to)?.st_mode).is_dir();
        let possible = if is_directory { self.rights } else { self.rights & OF_FILES };
        let attr = PathBeneathAttr { allowed_access: wanted & possible, parent_fd: to.as_raw_fd() };
        // SAFETY: both descriptors are open during the call, and `attr` is a live `struct landlock_path_beneath_attr`
        // that the kernel only reads.
        #[allow(unsafe_code)]
        let result = unsafe {
            libc::syscall(libc::SYS_landlock_add_rule, self.fd.as_raw_fd(), PATH_BENEATH, &raw const attr, 0_u32)
        };
        checked(result).map(|_| ())
    }

    /// Applies the ruleset to this thread and its future children. Requires `no_new_privs` or CAP_SYS_ADMIN.
    pub(crate) fn restrict_this_thread(self) -> io::Result<()> {
        // SAFETY: the descriptor is open during the call, which changes only this thread's credentials.
        #[allow(unsafe_code)]
        let result = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, self.fd.as_raw_fd(), 0_u32) };
        checked(result).map(|_| ())
    }
}

/// Version of the kernel's Landlock ABI.
fn version() -> io::Result<i32> {
    // SAFETY: with this flag the kernel takes no structure and returns a number.
    #[allow(unsafe_code)]
    let result =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0_usize, ASK_FOR_VERSION) };
    checked(result)
}

fn checked(result: libc::c_long) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { i32::try_from(result).map_err(io::Error::other) }
}
