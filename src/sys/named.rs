//! Paths named on the command line. They may lead through directories that other users can write to, such as /tmp.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::sys::tree::{Tree, explain_lease};
use std::fs::File;

/// The kernel's limit of links in one path (path_resolution(7)).
const MOST_LINKS: usize = 40;

/// True if `user` is root, the user of this process, or the user who called sudo, whose home is as trustworthy as the
/// command line.
pub(crate) fn is_trusted(user: u32) -> bool {
    let caller = || std::env::var("SUDO_UID").ok()?.parse::<u32>().ok();
    user == 0 || user == rustix::process::geteuid().as_raw() || caller() == Some(user)
}

/// Returns the target of `named`, free of links. Refuses a link owned by another user, who could redirect it at any
/// time (protected_symlinks in proc_sys_fs(5)).
pub(crate) fn resolve(named: &Path) -> io::Result<PathBuf> {
    let absolute = std::path::absolute(named)?;
    let parts = |path: &Path| path.components().rev().map(|name| PathBuf::from(name.as_os_str())).collect::<Vec<_>>();
    let (mut left, mut at, mut links) = (parts(&absolute), PathBuf::from("/"), 0);
    while let Some(name) = left.pop() {
        match name.components().next() {
            Some(Component::ParentDir) => {
                at.pop();
                continue;
            }
            Some(Component::CurDir) => continue,
            _ => {}
        }
        let place = at.join(name);
        let found = std::fs::symlink_metadata(&place)?;
        if !found.is_symlink() {
            if !left.is_empty() && !found.is_dir() {
                return Err(Errno::NOTDIR.into());
            }
            at = place;
            continue;
        }
        if !is_trusted(found.uid()) {
            let (place, user) = (place.display(), found.uid());
            return Err(io::Error::other(format!("{place} is a link, which belongs to user {user}; name its target")));
        }
        links += 1;
        if links > MOST_LINKS {
            return Err(Errno::LOOP.into());
        }
        let target = std::fs::read_link(&place)?;
        // A link in procfs to a descriptor without a path, such as a pipe, is not resolved further: only the link opens
        // the pipe (proc_pid_fd(5)).
        if left.is_empty() && is_of_procfs(&at) && std::fs::symlink_metadata(at.join(&target)).is_err() {
            return Ok(place);
        }
        left.extend(parts(&target));
    }
    Ok(at)
}

/// Opens the target of `named`, resolved by [`resolve`], as an O_PATH handle that is not a link.
pub(crate) fn open(named: &Path) -> io::Result<OwnedFd> {
    let real = resolve(named)?;
    let handle = open_without_links(&real)?;
    if FileType::from_raw_mode(rustix::fs::fstat(&handle)?.st_mode) != FileType::Symlink {
        Ok(handle)
    } else if real.parent().is_some_and(is_of_procfs) {
        Ok(rustix::fs::open(&real, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
    } else {
        // The handle is a link, created after the path was resolved.
        Err(Errno::LOOP.into())
    }
}

/// Opens the object of `handle` for reading. A regular file that another program has leased is an error: waiting for
/// the end of a lease takes up to 45 s (`lease-break-time`), and any user can lease a file of their own
/// (F_SETLEASE(2const)).
pub(crate) fn reopen(handle: &OwnedFd) -> io::Result<File> {
    let place = format!("/proc/self/fd/{}", handle.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::NOCTTY | OFlags::CLOEXEC;
    if FileType::from_raw_mode(rustix::fs::fstat(handle)?.st_mode) != FileType::RegularFile {
        return Ok(rustix::fs::open(place, flags, Mode::empty())?.into());
    }
    let file = rustix::fs::open(place, flags | OFlags::NONBLOCK, Mode::empty()).map_err(explain_lease)?;
    // Clear NONBLOCK, which programs that inherit the file do not expect.
    rustix::fs::fcntl_setfl(&file, OFlags::empty())?;
    Ok(file.into())
}

/// Opens the target of `named`, resolved by [`resolve`], for reading, as [`reopen`] does.
pub(crate) fn open_file(named: &Path) -> io::Result<File> {
    reopen(&open(named)?)
}

/// Reads the regular file `named` of at most `limit` bytes, resolved by [`resolve`]. A device or a FIFO is refused and
/// not opened: it may have no end, or never answer.
pub(crate) fn read(named: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let real = resolve(named)?;
    let (Some(above), Some(name)) = (real.parent(), real.file_name()) else { return Err(Errno::ISDIR.into()) };
    Tree::open(above)?.read(name, limit)
}

/// Opens the absolute path `real` as a handle; ELOOP if a component other than the last is a link.
pub(crate) fn open_without_links(real: &Path) -> io::Result<OwnedFd> {
    let below = real.strip_prefix("/").ok().filter(|below| *below != Path::new("")).unwrap_or(Path::new("."));
    Tree::open(Path::new("/"))?.handle_without_links(below)
}

/// Resolves the part of `named` that exists, and appends the rest.
pub(crate) fn resolve_beginning(named: &Path) -> io::Result<PathBuf> {
    let absolute = std::path::absolute(named)?;
    let there = |place: &&Path| std::fs::symlink_metadata(place).is_ok();
    let there = absolute.ancestors().find(there).unwrap_or(Path::new("/"));
    // Path::join with an empty path would add a slash.
    let missing = absolute.strip_prefix(there).unwrap_or(Path::new(""));
    Ok(resolve(there)?.components().chain(missing.components()).collect())
}

fn is_of_procfs(directory: &Path) -> bool {
    rustix::fs::statfs(directory).is_ok_and(|found| found.f_type == rustix::fs::PROC_SUPER_MAGIC)
}

/// True if another user can change the content of an open file.
pub(crate) fn can_be_changed(file: &File) -> io::Result<bool> {
    let found = file.metadata()?;
    Ok(!is_trusted(found.uid()) || found.mode() & WRITABLE != 0)
}

/// The topmost missing directory above `named`; `None` if at most the last component would have to be created.
pub(crate) fn missing_parent(named: &Path) -> Option<PathBuf> {
    let absolute = std::path::absolute(named).ok()?;
    let is_missing = |place: &&Path| std::fs::symlink_metadata(place).is_err();
    absolute.ancestors().skip(1).take_while(is_missing).last().map(Path::to_owned)
}

/// Mode bits that let users other than the owner change a file or a directory.
pub(crate) const WRITABLE: u32 = 0o022;

/// Mode bit that lets users change only their own files in a directory.
const STICKY: u32 = 0o1000;

/// Fails if another user could replace the directory `place` or a directory above it, or write to `place`. With
/// `shared`, `place` may be like /tmp: writable by everyone, but sticky.
pub(crate) fn refuse_changeable(place: &Path, shared: bool) -> io::Result<()> {
    // Check symbolic links in the path too: their owner decides where they lead.
    for above in place.ancestors() {
        let found = std::fs::symlink_metadata(above)?;
        if !is_trusted(found.uid()) {
            let (above, owner) = (above.display(), found.uid());
            return Err(io::Error::other(format!("{above} belongs to user {owner}, who can replace what is there")));
        }
        let is_open = found.mode() & WRITABLE != 0 && !found.is_symlink();
        if is_open && (found.mode() & STICKY == 0 || above == place && !shared) {
            let why = format!("users other than its owner can write to {}", above.display());
            return Err(io::Error::other(why));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::fs::{lchown, symlink};

    #[test]
    fn path_is_resolved_like_in_the_kernel_except_links_of_other_users() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(at("tree/etc")).unwrap();
        std::fs::write(at("tree/file"), "").unwrap();
        for (target, name, owner) in [
            ("tree", "ours", 0),
            ("tree", "theirs", 1234),
            ("theirs", "behind", 0),
            (".", "way", 1234),
            ("nothing", "dangling", 0),
            ("loop", "loop", 0),
        ] {
            symlink(target, at(name)).unwrap();
            lchown(at(name), Some(owner), Some(owner)).unwrap();
        }
        for name in ["tree", "ours/etc", "ours/etc/../file", "dangling", "loop", "tree/missing", "tree/file/x", "."] {
            let (wanted, found) = (std::fs::canonicalize(at(name)), resolve(&at(name)));
            let text = |e: io::Error| e.to_string();
            assert_eq!(found.map_err(text), wanted.map_err(text), "{name}");
        }
        for name in ["theirs", "theirs/etc", "behind/file", "way/tree", "ours/../way/tree/file"] {
            let refused = resolve(&at(name)).unwrap_err().to_string();
            assert!(refused.contains("which belongs to user 1234"), "{name}: {refused}");
            assert!(open(&at(name)).is_err() && resolve_beginning(&at(name).join("new")).is_err(), "{name}");
        }
        assert_eq!(resolve_beginning(&at("ours/new/out")).unwrap(), resolve(&at("tree")).unwrap().join("new/out"));
        assert!(open_without_links(&at("ours")).is_ok(), "a handle on the link itself");
        assert!(open_without_links(&at("ours/file")).is_err());
    }

    #[test]
    fn descriptor_without_a_path_is_opened_by_its_link_in_procfs() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(b"said").unwrap();
        drop(writer);
        let handle = open(Path::new(&format!("/dev/fd/{}", reader.as_raw_fd()))).unwrap();
        let mut said = String::new();
        let path = format!("/proc/self/fd/{}", handle.as_raw_fd());
        std::fs::File::open(path).unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(said, "said");
    }
}
