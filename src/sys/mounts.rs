//! Mounts by descriptor: created detached, then attached to a target that is a descriptor too. The kernel never gets a
//! path below an untrusted tree, and there is no fallback by path for kernels without these calls (before Linux 5.12).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

/// A mount that is not attached yet.
#[derive(Debug)]
pub(crate) struct Detached {
    fd: OwnedFd,
}

impl Detached {
    /// Creates a file system of type `kind` with `options` (name, value; empty for a flag) and mount attributes.
    pub(crate) fn filesystem(kind: &str, options: &[(&str, &str)], attributes: MountAttrFlags) -> io::Result<Self> {
        let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (name, value) in options {
            match *value {
                "" => rustix::mount::fsconfig_set_flag(&context, *name)?,
                value => rustix::mount::fsconfig_set_string(&context, *name, value)?,
            }
        }
        rustix::mount::fsconfig_create(&context)?;
        Ok(Self { fd: rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)? })
    }

    /// A private copy of the mount at `path` of a *trusted* tree, with additional `attributes`; `recursive` includes
    /// the mounts below it.
    pub(crate) fn copy_of(path: impl AsRef<Path>, recursive: bool, attributes: MountAttrFlags) -> io::Result<Self> {
        Self::copy(CWD, path.as_ref(), recursive, attributes)
    }

    /// Like [`Detached::copy_of`], but copies the directory or file that `fd` refers to.
    pub(crate) fn copy_of_fd(fd: impl AsFd, recursive: bool, attributes: MountAttrFlags) -> io::Result<Self> {
        Self::copy(fd.as_fd(), Path::new(""), recursive, attributes)
    }

    fn copy(at: BorrowedFd<'_>, path: &Path, recursive: bool, attributes: MountAttrFlags) -> io::Result<Self> {
        let mut flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
        if recursive {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        if path.as_os_str().is_empty() {
            flags |= OpenTreeFlags::AT_EMPTY_PATH;
        }
        let fd = rustix::mount::open_tree(at, path, flags)?;
        // Make the copy private: a copy of a shared mount joins the original's peer group, and mounts would propagate.
        set_attributes(fd.as_fd(), c"", attributes, libc::MS_PRIVATE, recursive)?;
        Ok(Self { fd })
    }

    /// Clears `nosuid`, so that setuid bits and file capabilities take effect. No error if another user namespace has
    /// locked the flag: the mount stays as it is.
    pub(crate) fn honouring_setuid(self) -> io::Result<Self> {
        let attr_clr = u64::from(MountAttrFlags::MOUNT_ATTR_NOSUID.bits());
        match change_attributes(self.fd.as_fd(), c"", &MountAttr { attr_clr, ..MountAttr::default() }, false) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => Ok(self),
            other => other.map(|()| self),
        }
    }

    /// Attaches the mount on `target` itself: a link is covered, not followed. Returns a handle on the mount's root.
    pub(crate) fn attach(self, target: impl AsFd) -> io::Result<OwnedFd> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        rustix::mount::move_mount(&self.fd, "", target.as_fd(), "", flags)?;
        Ok(self.fd)
    }
}

impl From<Detached> for OwnedFd {
    /// The mount's root, which no path leads to.
    fn from(mount: Detached) -> Self {
        mount.fd
    }
}

impl AsFd for Detached {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Makes every mount of this namespace private: mounts no longer propagate in or out.
pub(crate) fn make_all_private() -> io::Result<()> {
    make_all_private_and(MountAttrFlags::empty())
}

/// Makes every mount private and adds `attributes` to it.
pub(crate) fn make_all_private_and(attributes: MountAttrFlags) -> io::Result<()> {
    set_attributes(CWD, c"/", attributes, libc::MS_PRIVATE, true)
}

/// Makes every mount of this namespace a slave: mounts propagate in but not out.
pub(crate) fn make_all_followers() -> io::Result<()> {
    set_attributes(CWD, c"/", MountAttrFlags::empty(), libc::MS_SLAVE, true)
}

/// Attaches `mount` over this namespace's root; lookups still see the old root. Returns the mount's own root, for
/// [`switch_root`].
pub(crate) fn cover_root(mount: Detached) -> io::Result<OwnedFd> {
    mount.attach(own_root()?)
}

fn own_root() -> io::Result<OwnedFd> {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open("/", flags, rustix::fs::Mode::empty()).map_err(Into::into)
}

/// Makes `new_root` (the root of an attached mount) this namespace's root and detaches the old one.
pub(crate) fn switch_root(new_root: impl AsFd) -> io::Result<()> {
    let old_root = own_root()?;
    rustix::process::fchdir(new_root)?;
    // With "." twice, the old root is stacked on the new one (pivot_root(2)), so no directory is needed for it.
    rustix::process::pivot_root(".", ".")?;
    // Change to the old root before detaching ".": with the new root as ".", the second round of the loop below would
    // detach the new root itself.
    rustix::process::fchdir(&old_root)?;
    // Make the old root private first, so that the detach does not propagate to the original namespace.
    set_attributes(CWD, c".", MountAttrFlags::empty(), libc::MS_PRIVATE, true)?;
    // EINVAL means that "." is no longer a mount of this namespace.
    loop {
        match rustix::mount::unmount(".", UnmountFlags::DETACH) {
            Ok(()) => {}
            Err(Errno::INVAL) => break,
            Err(e) => return Err(e.into()),
        }
    }
    rustix::process::chdir("/").map_err(Into::into)
}

/// Makes `root` this process's root and working directory. No security boundary: a process that may call chroot(2) can
/// leave it.
pub(crate) fn change_root(root: impl AsFd) -> io::Result<()> {
    rustix::process::fchdir(root)?;
    rustix::process::chroot(".").map_err(Into::into)
}

/// Adds mount attributes to an attached mount, given its root.
pub(crate) fn restrict(mount: BorrowedFd<'_>, attributes: MountAttrFlags) -> io::Result<()> {
    set_attributes(mount, c"", attributes, 0, false)
}

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
#[derive(Default)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

fn set_attributes(
    at: BorrowedFd<'_>,
    path: &std::ffi::CStr,
    set: MountAttrFlags,
    propagation: libc::c_ulong,
    recursive: bool,
) -> io::Result<()> {
    let change = MountAttr { attr_set: u64::from(set.bits()), propagation, ..MountAttr::default() };
    change_attributes(at, path, &change, recursive)
}

fn change_attributes(at: BorrowedFd<'_>, path: &std::ffi::CStr, change: &MountAttr, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: `at` is open during the call, `path` is NUL-terminated, and `change` is a live `struct mount_attr` passed
    // with its size; the kernel only reads all three.
    #[allow(unsafe_code)]
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            at.as_raw_fd(),
            path.as_ptr(),
            flags,
            std::ptr::from_ref(change),
            size_of::<MountAttr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Mount points listed in `/proc/self/mountinfo`.
///
/// In the format of proc(5), the fifth field is the mount point, with space, tab, newline and backslash as octal
/// escapes.
pub fn mount_points(mountinfo: &[u8]) -> Vec<std::path::PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    mountinfo
        .split(|&b| b == b'\n')
        .filter_map(|line| line.split(|&b| b == b' ').nth(4))
        .map(|escaped| std::ffi::OsString::from_vec(unescape(escaped)).into())
        .collect()
}

fn unescape(escaped: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(escaped.len());
    let mut rest = escaped;
    while let Some((&first, tail)) = rest.split_first() {
        if let (b'\\', Some(digits)) = (first, tail.get(..3))
            && digits.iter().all(|d| (b'0'..=b'7').contains(d))
        {
            let value = digits.iter().fold(0_u32, |v, d| v * 8 + u32::from(d - b'0'));
            text.push(u8::try_from(value & 0xff).unwrap_or(b'?'));
            rest = &tail[3..];
        } else {
            text.push(first);
            rest = tail;
        }
    }
    text
}

/// Unmounts the topmost mount at the trusted path `path`, even if the mount is busy (`MNT_DETACH`).
pub fn unmount(path: &Path) -> io::Result<()> {
    rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;
    use std::path::PathBuf;

    #[test]
    fn mount_points_are_unescaped() {
        let text = b"36 35 98:0 / /mnt/a\\040b\\134c rw,noatime master:1 - ext3 /dev/root rw\n37 36 0:5 / /proc rw - proc proc rw\n";
        assert_eq!(mount_points(text), [Path::new("/mnt/a b\\c"), Path::new("/proc")]);
        assert!(mount_points(b"\n\nshort line\n").is_empty());
    }

    /// Escapes a path as the kernel does (seq_path_root, from fs/proc_namespace.c).
    fn escaped(path: &[u8]) -> Vec<u8> {
        let one = |b: &u8| if b" \t\n\\".contains(b) { format!("\\{b:03o}").into_bytes() } else { vec![*b] };
        path.iter().flat_map(one).collect()
    }

    fn path() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![3 => 1..=255_u8, 1 => prop::sample::select(b" \t\n\\01347#/".to_vec())];
        vec(byte, 0..20).prop_map(|rest| [&b"/"[..], &rest].concat())
    }

    proptest! {
        #[test]
        fn every_mount_point_is_found_and_unescaped(mounts in vec((path(), path(), "( (shared|master):[0-9]{1,3}){0,2}"), 0..6)) {
            let line = |(root, point, tags): &(Vec<u8>, Vec<u8>, String)| {
                let fields = [b"36 35 98:0".to_vec(), escaped(root), escaped(point), format!("rw{tags} - ext3 /dev/root rw\n").into()];
                fields.join(&b' ')
            };
            let points: Vec<PathBuf> = mounts.iter().map(|(_, point, _)| OsString::from_vec(point.clone()).into()).collect();
            prop_assert_eq!(mount_points(&mounts.iter().flat_map(line).collect::<Vec<_>>()), points);
        }

        #[test]
        fn arbitrary_mountinfo_does_not_panic(text in vec(prop_oneof![any::<u8>(), prop::sample::select(b" \n\\0789".to_vec())], 0..120)) {
            let lines = text.split(|&b| b == b'\n').filter(|line| line.split(|&b| b == b' ').count() >= 5).count();
            prop_assert_eq!(mount_points(&text).len(), lines);
        }
    }
}
