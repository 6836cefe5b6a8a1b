//! Attaches an open file to a loop device (loop(4)). mount(8) and losetup(8) would open the file again by its path,
//! which may lead to another file by then.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};

// From linux/loop.h; LOOP_CONFIGURE exists since Linux 5.8.
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4c05;
const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;

/// Number of retries: another program may take the free device first.
const TRIES: usize = 100;

/// `struct loop_info64`. `before` begins with the file's device and inode, the loop device's own number, and the part
/// of the file that the loop device shows: its offset and length, where length 0 is the whole file.
#[repr(C)]
struct Info {
    before: [u64; 6],
    encrypt_key_size: u32,
    flags: u32,
    behind: [u64; 22],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// A read-only loop device. The kernel frees it when neither this value nor a mount uses it.
#[derive(Debug)]
pub(crate) struct Loop {
    path: PathBuf,
    _device: OwnedFd,
}

impl Loop {
    /// Attaches `file` to a free loop device.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let fd = u32::try_from(file.as_raw_fd()).map_err(io::Error::other)?;
        let flags = READ_ONLY | AUTOCLEAR;
        let info = Info { before: [0; 6], encrypt_key_size: 0, flags, behind: [0; 22] };
        let config = Config { fd, block_size: 0, info, reserved: [0; 8] };
        let control = open(Path::new("/dev/loop-control"), OFlags::RDWR)?;
        let mut tries = 0;
        loop {
            // SAFETY: this ioctl takes no argument, and changes nothing in this process.
            #[allow(unsafe_code)]
            let number = checked(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) })?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = open(&path, OFlags::RDONLY)?;
            // SAFETY: `config` is a live `struct loop_config`, as this ioctl takes; the kernel only reads it, and takes
            // its own reference to the file.
            #[allow(unsafe_code)]
            let configured = checked(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) });
            match configured {
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) && tries < TRIES => tries += 1,
                other => return other.map(|_| Self { path, _device: device }),
            }
        }
    }

    /// Path of the device, for mounting.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// Returns whether the block device `device` is a loop device that shows `file` as a whole. False if unknown.
pub(crate) fn shows(device: u64, file: &File) -> bool {
    let shown = || {
        let path = PathBuf::from(format!("/dev/loop{}", rustix::fs::minor(device)));
        let opened = open(&path, OFlags::RDONLY)?;
        let found = rustix::fs::fstat(&opened)?;
        if FileType::from_raw_mode(found.st_mode) != FileType::BlockDevice || found.st_rdev != device {
            return Ok(false);
        }
        let mut info = Info { before: [0; 6], encrypt_key_size: 0, flags: 0, behind: [0; 22] };
        // SAFETY: `info` is a live `struct loop_info64`, which this ioctl fills.
        #[allow(unsafe_code)]
        checked(unsafe { libc::ioctl(opened.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) })?;
        let found = rustix::fs::fstat(file)?;
        let [device, inode, _, offset, length, _] = info.before;
        Ok::<_, io::Error>((device, inode, offset, length) == (found.st_dev, found.st_ino, 0, 0))
    };
    shown().unwrap_or(false)
}

fn open(path: &Path, access: OFlags) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, access | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?)
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
