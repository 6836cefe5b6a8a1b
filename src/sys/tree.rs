//! Access to an untrusted directory by descriptor only.
//!
//! Every lookup is one `openat2` with `RESOLVE_IN_ROOT`, so that a link in the tree, absolute or with `..`, never leads
//! out of it. (CVE-2021-30465, CVE-2026-41579 and CVE-2026-47766 are about launchers that used a path.)

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RenameFlags, ResolveFlags, Stat, StatVfsMountFlags, StatxFlags, Timespec,
    Timestamps,
};
use rustix::io::Errno;

use crate::sys::file_kind::FileKind;

/// Number of retries of a lookup that raced with a rename or a mount (the kernel returns EAGAIN).
const RACE_RETRIES: usize = 128;

/// A long path is opened in parts. A part ends once it is longer than this, in bytes: one more name (255 bytes) still
/// fits below PATH_MAX.
const LONGEST_PART: usize = 3000;

/// The kernel's limit of links in one path (path_resolution(7)).
const MOST_LINKS: usize = 40;

/// State of a file system with respect to writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Condition {
    /// Writes succeed.
    Writable,
    /// No blocks or no inodes are left.
    Full,
    /// Mounted read-only.
    ReadOnly,
}

/// An open directory; names below it are resolved as if it were `/`.
#[derive(Debug)]
pub struct Tree {
    directory: OwnedFd,
}

/// Explains the error of an open with `NONBLOCK`, which is EAGAIN if another program holds a lease on the file.
pub(crate) fn explain_lease(errno: Errno) -> io::Error {
    match errno {
        Errno::AGAIN => io::Error::new(
            io::ErrorKind::WouldBlock,
            "another program, which 'lslocks' shows, holds a lease on it; end that program, or copy the file",
        ),
        other => other.into(),
    }
}

impl Tree {
    /// Opens the directory `path`. Fails with ENOTDIR if the last component is a link, which in an untrusted place
    /// could lead to another tree.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(Self { directory: rustix::fs::open(path, flags, Mode::empty())? })
    }

    /// Takes a directory that is already open.
    pub(crate) fn from_fd(directory: OwnedFd) -> Self {
        Self { directory }
    }

    /// Opens `path` below the tree. Links are resolved inside it, the last component too unless `flags` contain
    /// `NOFOLLOW`.
    pub(crate) fn open_at(&self, path: impl AsRef<Path>, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        self.resolve(path.as_ref(), flags, mode, ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
    }

    fn resolve(&self, path: &Path, flags: OFlags, mode: Mode, resolve: ResolveFlags) -> io::Result<OwnedFd> {
        for _ in 0..RACE_RETRIES {
            match rustix::fs::openat2(&self.directory, path, flags | OFlags::CLOEXEC, mode, resolve) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other.map_err(Into::into),
            }
        }
        Err(Errno::AGAIN.into())
    }

    /// A handle on `path`, following links that stay in the tree. EXDEV for a link that leads out of the tree, as every
    /// absolute link does.
    pub(crate) fn beneath(&self, path: impl AsRef<Path>) -> io::Result<OwnedFd> {
        self.resolve(path.as_ref(), OFlags::PATH, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS)
    }

    /// Current path of `found` below the tree it was opened in. A rename can make the path outdated at any time.
    pub(crate) fn path_of(&self, found: &OwnedFd) -> io::Result<PathBuf> {
        let own = std::fs::read_link(self.path())?;
        let found = std::fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
        found.strip_prefix(own).map(Path::to_owned).map_err(|_| io::ErrorKind::NotFound.into())
    }

    /// A handle on the object at `path` itself, even if it is a link.
    pub(crate) fn handle(&self, path: impl AsRef<Path>) -> io::Result<OwnedFd> {
        self.open_at(path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())
    }

    /// Opens a directory below the tree as a tree of its own.
    pub(crate) fn directory(&self, path: impl AsRef<Path>) -> io::Result<Tree> {
        Ok(Tree { directory: self.open_at(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())? })
    }

    /// Opens the directory `path` below the tree; ELOOP or ENOTDIR if a component is a link.
    pub(crate) fn directory_without_links(&self, path: impl AsRef<Path>) -> io::Result<Tree> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        Ok(Tree { directory: self.open_without_links(path, flags)? })
    }

    /// Like [`Tree::directory_without_links`], but fails with EXDEV at a mount point: the directory is on the same
    /// mount as this tree, so that names can be renamed between the two.
    pub(crate) fn directory_of_same_mount(&self, path: impl AsRef<Path>) -> io::Result<Tree> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        Ok(Tree { directory: self.resolve_in_parts(path.as_ref(), OFlags::PATH | OFlags::DIRECTORY, resolve)? })
    }

    /// A handle on `path`; ELOOP if a component other than the last is a link. A link at the end is opened itself.
    pub(crate) fn handle_without_links(&self, path: impl AsRef<Path>) -> io::Result<OwnedFd> {
        self.open_without_links(path, OFlags::PATH | OFlags::NOFOLLOW)
    }

    fn open_without_links(&self, path: impl AsRef<Path>, flags: OFlags) -> io::Result<OwnedFd> {
        self.resolve_in_parts(path.as_ref(), flags, ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
    }

    /// Opens `path`, in several parts if it is longer than PATH_MAX (4096 bytes), as a path in a deep tree can be.
    fn resolve_in_parts(&self, path: &Path, flags: OFlags, resolve: ResolveFlags) -> io::Result<OwnedFd> {
        let (mut above, mut part) = (None::<OwnedFd>, PathBuf::new());
        let open = |above: Option<OwnedFd>, part: &Path, flags| match above {
            None => self.resolve(part, flags, Mode::empty(), resolve),
            Some(above) => Tree { directory: above }.resolve(part, flags, Mode::empty(), resolve),
        };
        for name in path.components() {
            if part.as_os_str().len() > LONGEST_PART {
                above = Some(open(above.take(), &part, OFlags::PATH | OFlags::DIRECTORY)?);
                part.clear();
            }
            part.push(name);
        }
        open(above, &part, flags)
    }

    /// Status of `path`, not following a link at the end; `None` if nothing is there.
    pub(crate) fn look(&self, path: impl AsRef<Path>) -> io::Result<Option<Stat>> {
        let path = path.as_ref();
        // A name directly in this directory needs no descriptor; the process may have run out of them.
        let found = if path.components().eq([Component::Normal(path.as_os_str())]) {
            rustix::fs::statat(&self.directory, path, AtFlags::SYMLINK_NOFOLLOW).map_err(Into::into)
        } else {
            self.handle(path).and_then(|fd| Ok(rustix::fs::fstat(fd)?))
        };
        match found {
            Ok(found) => Ok(Some(found)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Target of `path` with every link resolved, the last one too, relative to the tree's root. Components that do not
    /// exist are taken literally. ELOOP if the links form a cycle.
    pub(crate) fn leads_to(&self, path: impl AsRef<Path>) -> io::Result<PathBuf> {
        let mut found = PathBuf::new();
        let mut ahead = path.as_ref().to_owned();
        let mut links = 0;
        loop {
            let mut components = ahead.components();
            let Some(next) = components.next() else { return Ok(found) };
            let rest = components.as_path().to_owned();
            match next {
                Component::ParentDir => drop(found.pop()),
                Component::RootDir => found.clear(),
                Component::Normal(name) => found.push(name),
                Component::CurDir | Component::Prefix(_) => {}
            }
            ahead = match next {
                Component::Normal(_) => match self.target(&found)? {
                    Some(target) => {
                        links += 1;
                        if links > MOST_LINKS {
                            return Err(Errno::LOOP.into());
                        }
                        found.pop();
                        target.join(rest)
                    }
                    None => rest,
                },
                _ => rest,
            };
        }
    }

    /// Target of the link at `path`; `None` if it is not a link.
    fn target(&self, path: &Path) -> io::Result<Option<PathBuf>> {
        let link = match self.handle(path) {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(None),
            other => other?,
        };
        match rustix::fs::readlinkat(&link, "", Vec::new()) {
            Ok(target) => Ok(Some(OsStr::from_bytes(target.to_bytes()).into())),
            // readlinkat(2) fails like this on a handle that is not a link.
            Err(Errno::NOENT | Errno::INVAL) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Reads a regular file of at most `limit` bytes; a larger one, sparse or not, is refused without reading. See
    /// [`Tree::open_regular`].
    pub(crate) fn read(&self, path: impl AsRef<Path>, limit: u64) -> io::Result<Vec<u8>> {
        let file = self.open_regular(path, OFlags::RDONLY)?;
        let too_large = || io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {limit} bytes"));
        let size = file.metadata()?.len();
        if size > limit {
            return Err(too_large());
        }
        // Limit the read too: files of procfs have size 0, and other files may have grown since.
        let mut text = Vec::with_capacity(usize::try_from(size).unwrap_or(0) + 1);
        file.take(limit + 1).read_to_end(&mut text)?;
        if text.len() as u64 > limit { Err(too_large()) } else { Ok(text) }
    }

    /// Reads the first `length` bytes of a regular file, or all of a shorter one.
    pub(crate) fn read_beginning(&self, path: impl AsRef<Path>, length: usize) -> io::Result<Vec<u8>> {
        let mut text = Vec::with_capacity(length);
        self.open_regular(path, OFlags::RDONLY)?.take(length as u64).read_to_end(&mut text)?;
        Ok(text)
    }

    /// Opens the regular file `path` with `flags` (access mode, `APPEND`, `NOFOLLOW`); links are resolved inside the
    /// tree. Any other type is an error and is not opened: opening a device or a FIFO has effects, and may block for
    /// ever. A file that another process has leased (`F_SETLEASE`) fails with EAGAIN instead of blocking for 45 s.
    pub(crate) fn open_regular(&self, path: impl AsRef<Path>, flags: OFlags) -> io::Result<File> {
        let path = path.as_ref();
        let handle = self.open_at(path, OFlags::PATH | (flags & OFlags::NOFOLLOW), Mode::empty())?;
        let found = rustix::fs::fstat(&handle)?;
        if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("it is {}", FileKind::of(&found))));
        }
        let flags = (flags - OFlags::NOFOLLOW) | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        if let Some(own) = own_descriptors()? {
            // Reopens the very inode that was checked, even if its name has been replaced since.
            let opened = rustix::fs::openat(own, handle.as_raw_fd().to_string(), flags, Mode::empty());
            return Ok(opened.map_err(explain_lease)?.into());
        }
        // Without procfs (a jail of the chroot tier), open by name again. Only root in the jail can replace the name in
        // between, and root can open any device anyway.
        let file = self.open_at(path, flags | OFlags::NOFOLLOW, Mode::empty())?;
        let opened = rustix::fs::fstat(&file)?;
        let same = (opened.st_dev, opened.st_ino) == (found.st_dev, found.st_ino);
        if same { Ok(file.into()) } else { Err(Errno::AGAIN.into()) }
    }

    /// Creates the empty file `name` of this directory, mode 0600, open for reading and writing; replaces an existing
    /// one.
    pub(crate) fn create_file(&self, name: impl AsRef<Path>) -> io::Result<File> {
        self.remove(&name)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        Ok(self.open_at(name, flags, Mode::from_raw_mode(0o600))?.into())
    }

    /// Creates an empty unnamed file (O_TMPFILE) on this directory's file system; no other user can open it.
    pub(crate) fn create_nameless(&self) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::TMPFILE;
        match self.open_at(".", flags, Mode::from_raw_mode(0o600)) {
            // NFS, for one, has no O_TMPFILE.
            Err(e) if matches!(Errno::from_io_error(&e), Some(Errno::OPNOTSUPP | Errno::ISDIR)) => {
                let name = ".ims-sshd.copy";
                let file = self.create_file(name)?;
                self.remove(name)?;
                Ok(file)
            }
            other => Ok(other?.into()),
        }
    }

    /// Renames `from` to `to` in this directory; replaces an existing file.
    pub(crate) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        rustix::fs::renameat(&self.directory, from, &self.directory, to).map_err(Into::into)
    }

    /// A path to this directory that survives renames of it. Valid for this process while this value lives, and as the
    /// working directory of a child.
    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.directory.as_raw_fd()).into()
    }

    /// Current path of the directory, for messages.
    pub(crate) fn shown(&self) -> PathBuf {
        std::fs::read_link(self.path()).unwrap_or_else(|_| self.path())
    }

    /// Creates the file `path` if nothing is there, and never through a link. Returns whether it was created.
    pub(crate) fn touch(&self, path: impl AsRef<Path>) -> io::Result<bool> {
        let (parent, name) = self.parent_of(path.as_ref())?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        match parent.open_at(&name, flags, Mode::from_raw_mode(0o644)) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Replaces `path`, even if it is a link, by a file with `text`: a reader sees either the old or the new content.
    /// Mode 0644; synced to disk.
    pub(crate) fn replace(&self, path: impl AsRef<Path>, text: &[u8]) -> io::Result<()> {
        let (parent, name) = self.parent_of(path.as_ref())?;
        let mut temporary = OsString::from(".");
        temporary.push(&name);
        temporary.push(".ims-sshd");
        parent.remove(&temporary)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let mode = Mode::from_raw_mode(0o644);
        let mut file = File::from(parent.open_at(&temporary, flags, mode)?);
        // Restores mode bits that the umask or a default ACL of the directory removed.
        let written = rustix::fs::fchmod(&file, mode)
            .map_err(Into::into)
            .and_then(|()| file.write_all(text))
            .and_then(|()| file.sync_all())
            .and_then(|()| Ok(rustix::fs::renameat(&parent.directory, &temporary, &parent.directory, &name)?));
        if written.is_err() {
            let _ = parent.remove(&temporary);
        }
        written
    }

    /// Renames `from` in this directory to `to` below `tree`; EEXIST if that exists. Needs no space and no inode.
    pub(crate) fn rename_to(&self, from: &str, tree: &Tree, to: impl AsRef<Path>) -> io::Result<()> {
        let (parent, name) = tree.parent_of(to.as_ref())?;
        match rustix::fs::renameat_with(&self.directory, from, &parent.directory, &name, RenameFlags::NOREPLACE) {
            // NFS, CephFS and most FUSE file systems do not support the flag.
            Err(Errno::INVAL) => match parent.look(&name)? {
                None => rustix::fs::renameat(&self.directory, from, &parent.directory, &name),
                Some(_) => Err(Errno::EXIST),
            },
            other => other,
        }
        .map_err(Into::into)
    }

    /// Renames `from` in this directory to `to` in `tree`; replaces an existing file.
    pub(crate) fn rename_over(&self, from: &str, tree: &Tree, to: &str) -> io::Result<()> {
        rustix::fs::renameat(&self.directory, from, &tree.directory, to).map_err(Into::into)
    }

    /// Hard-links `from` in this directory to `to` below `tree`; EEXIST if that exists. Needs no inode on most file
    /// systems.
    pub(crate) fn link_to(&self, from: &str, tree: &Tree, to: impl AsRef<Path>) -> io::Result<()> {
        let (parent, name) = tree.parent_of(to.as_ref())?;
        rustix::fs::linkat(&self.directory, from, &parent.directory, &name, AtFlags::empty()).map_err(Into::into)
    }

    /// Checks whether the tree's file system is read-only or full.
    pub(crate) fn condition(&self) -> io::Result<Condition> {
        let fs = rustix::fs::fstatvfs(&self.directory)?;
        Ok(if fs.f_flag.contains(StatVfsMountFlags::RDONLY) {
            Condition::ReadOnly
        } else if fs.f_blocks > 0 && fs.f_bfree == 0 || fs.f_files > 0 && fs.f_ffree == 0 {
            Condition::Full
        } else {
            Condition::Writable
        })
    }

    /// Removes the file or link `path`; no error if it does not exist. Returns whether something was removed.
    pub(crate) fn remove(&self, path: impl AsRef<Path>) -> io::Result<bool> {
        self.unlink(path.as_ref(), AtFlags::empty())
    }

    /// Removes the empty directory `path`; no error if it does not exist. Returns whether something was removed.
    pub(crate) fn remove_directory(&self, path: impl AsRef<Path>) -> io::Result<bool> {
        self.unlink(path.as_ref(), AtFlags::REMOVEDIR)
    }

    /// Creates the empty directory `name`, mode 0700, and opens it. Another user who can rename here could swap in a
    /// directory of their own, so a directory that is not ours or not empty is refused.
    pub(crate) fn make_private(&self, name: &str) -> io::Result<Tree> {
        rustix::fs::mkdirat(&self.directory, name, Mode::RWXU)?;
        let made = self.directory_of_same_mount(name)?;
        let found = rustix::fs::fstat(&made)?;
        let is_ours = found.st_uid == rustix::process::geteuid().as_raw() && found.st_mode.trailing_zeros() >= 6;
        if !is_ours || !made.names()?.is_empty() {
            return Err(io::Error::other(
                "another directory has taken its place; use a parent in which only root can rename",
            ));
        }
        // If the parent has a default ACL, a new directory and all that is unpacked into it inherit that ACL (acl(5)).
        for name in ["system.posix_acl_default", "system.posix_acl_access"] {
            match rustix::fs::removexattr(made.path(), name) {
                Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
                Err(e) => return Err(e.into()),
            }
        }
        // In a setgid directory, a new directory inherits the group and the bit (inode(7)); unpacking an archive does
        // not always reset them.
        if found.st_mode & 0o2000 != 0 {
            rustix::fs::chownat(&made, ".", None, Some(rustix::process::getegid()), AtFlags::empty())?;
        }
        rustix::fs::chmodat(&made, ".", Mode::RWXU, AtFlags::empty())?;
        Ok(made)
    }

    /// Creates the directory `path` (mode 0755) and its missing parents.
    pub(crate) fn make_directories(&self, path: impl AsRef<Path>) -> io::Result<()> {
        let ancestors: Vec<_> = path.as_ref().ancestors().filter(|path| path.file_name().is_some()).collect();
        for path in ancestors.into_iter().rev() {
            // Creates one name at a time: mkdirat(2) with a longer path would follow links out of the tree.
            let (above, name) = self.parent_of(path)?;
            match rustix::fs::mkdirat(&above, name, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Creates the directory (mode 0755) or empty file `path`, and preserves its parent's times.
    pub(crate) fn make_mount_point(&self, path: impl AsRef<Path>, directory: bool) -> io::Result<()> {
        let (parent, name) = self.parent_of(path.as_ref())?;
        parent.keeping_times(|| {
            if directory {
                rustix::fs::mkdirat(&parent.directory, &name, Mode::from_raw_mode(0o755))?;
            } else {
                parent.touch(&name)?;
            }
            Ok(())
        })
    }

    /// Removes what [`Tree::make_mount_point`] created if it is still empty, and preserves the parent's times. Returns
    /// whether it is gone.
    pub(crate) fn remove_mount_point(&self, path: impl AsRef<Path>) -> io::Result<bool> {
        let Some(made) = self.look(path.as_ref())? else { return Ok(true) };
        let (parent, name) = self.parent_of(path.as_ref())?;
        parent.keeping_times(|| match FileType::from_raw_mode(made.st_mode) {
            FileType::Directory => match parent.remove_directory(&name) {
                Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(false),
                other => other.map(|_| true),
            },
            FileType::RegularFile if made.st_size == 0 => parent.remove(&name).map(|_| true),
            _ => Ok(false),
        })
    }

    /// Creates the character device `path` (mode 0666), and preserves its parent's times.
    pub(crate) fn make_device(&self, path: impl AsRef<Path>, major: u32, minor: u32) -> io::Result<()> {
        let (parent, name) = self.parent_of(path.as_ref())?;
        let device = rustix::fs::makedev(major, minor);
        parent.keeping_times(|| {
            let mode = Mode::from_raw_mode(0o666);
            rustix::fs::mknodat(&parent.directory, &name, FileType::CharacterDevice, mode, device)?;
            // Override the umask by descriptor: a rename by someone else must not redirect chmod to another file.
            let node = parent.handle(&name)?;
            if rustix::fs::fstat(&node)?.st_rdev != device {
                return Err(Errno::EXIST.into());
            }
            rustix::fs::chmod(format!("/proc/self/fd/{}", node.as_raw_fd()), mode).map_err(Into::into)
        })
    }

    /// Removes what [`Tree::make_device`] created, or a regular file written in its place, and preserves the parent's
    /// times. Returns whether it is gone.
    pub(crate) fn remove_device(&self, path: impl AsRef<Path>, major: u32, minor: u32) -> io::Result<bool> {
        let Some(found) = self.look(path.as_ref())? else { return Ok(true) };
        let (parent, name) = self.parent_of(path.as_ref())?;
        match FileType::from_raw_mode(found.st_mode) {
            FileType::CharacterDevice if found.st_rdev == rustix::fs::makedev(major, minor) => {}
            FileType::RegularFile => {}
            _ => return Ok(false),
        }
        parent.keeping_times(|| parent.remove(&name)).map(|_| true)
    }

    /// Names in the directory, in no order.
    pub(crate) fn names(&self) -> io::Result<Vec<OsString>> {
        self.first_names(usize::MAX)
    }

    /// The first `most` names, in no order.
    pub(crate) fn first_names(&self, most: usize) -> io::Result<Vec<OsString>> {
        let entries = rustix::fs::Dir::read_from(self.reopen()?)?;
        let names = entries.map(|entry| Ok(OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned()));
        names.filter(|name| !name.as_ref().is_ok_and(|name| name == "." || name == "..")).take(most).collect()
    }

    /// Writes the tree's file system to disk (syncfs(2)).
    pub(crate) fn sync(&self) -> io::Result<()> {
        // syncfs fails on an O_PATH descriptor.
        let directory = rustix::fs::openat(
            &self.directory,
            ".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        rustix::fs::syncfs(directory).map_err(Into::into)
    }

    /// Opens this directory for reading, as `flock` and `fsync` require.
    pub(crate) fn reopen(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(&self.directory, ".", flags, Mode::empty()).map_err(Into::into)
    }

    fn unlink(&self, path: &Path, flags: AtFlags) -> io::Result<bool> {
        let (parent, name) = match self.parent_of(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            other => other?,
        };
        match rustix::fs::unlinkat(&parent.directory, &name, flags) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// The parent directory of `path`, resolved inside the tree, and the last component.
    fn parent_of(&self, path: &Path) -> io::Result<(Tree, OsString)> {
        let name = path
            .file_name()
            .filter(|_| !path.as_os_str().as_bytes().ends_with(b"/"))
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a path without a last name"))?;
        let parent = path.parent().filter(|p| p.components().any(|c| matches!(c, Component::Normal(_))));
        let directory = match parent {
            Some(parent) => self.directory(parent)?,
            None => Tree { directory: self.directory.try_clone()? },
        };
        Ok((directory, name.to_owned()))
    }

    /// Runs `change` and restores this directory's access and modification times: the image root must look untouched.
    pub(crate) fn keeping_times<T>(&self, change: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let before = rustix::fs::fstat(&self.directory)?;
        let result = change()?;
        let times = times(&before);
        rustix::fs::utimensat(self.reopen()?, ".", &times, AtFlags::empty())?;
        Ok(result)
    }
}

impl AsFd for Tree {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// `/proc/self/fd`, used to reopen O_PATH descriptors. `None` if /proc is not procfs but a directory of the image,
/// whose `self/fd/7` may be a link to anything.
fn own_descriptors() -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = match rustix::fs::open("/proc/self/fd", flags, Mode::empty()) {
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
        other => other?,
    };
    let is_procfs = rustix::fs::fstatfs(&directory)?.f_type == rustix::fs::PROC_SUPER_MAGIC;
    Ok(is_procfs.then_some(directory))
}

/// Access and modification times, as utimensat(2) takes them.
pub(crate) fn times(found: &Stat) -> Timestamps {
    let time = |tv_sec, nanoseconds: u64| Timespec { tv_sec, tv_nsec: nanoseconds.cast_signed() };
    Timestamps {
        last_access: time(found.st_atime, found.st_atime_nsec),
        last_modification: time(found.st_mtime, found.st_mtime_nsec),
    }
}

/// Inode number and birth time (seconds, nanoseconds) of an open directory. The number alone may be reused.
pub(crate) fn inode_and_birth(directory: impl AsFd) -> io::Result<(u64, (i64, u32))> {
    let found = rustix::fs::statx(directory, "", AtFlags::EMPTY_PATH, StatxFlags::INO | StatxFlags::BTIME)?;
    Ok((found.stx_ino, (found.stx_btime.tv_sec, found.stx_btime.tv_nsec)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_never_lead_out_of_the_tree() {
        let outside = tempfile::tempdir().unwrap();
        let inside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), "x").unwrap();
        symlink(outside.path(), inside.path().join("absolute")).unwrap();
        symlink("../../../../../..", inside.path().join("up")).unwrap();
        let tree = Tree::open(inside.path()).unwrap();
        assert!(tree.read("absolute/secret", 10).is_err());
        assert!(tree.touch("absolute/made").is_err());
        assert!(tree.touch("up/made").unwrap());
        assert!(inside.path().join("made").exists(), "`..` stops at the tree's root");
        assert!(!outside.path().join("made").exists());
    }

    #[test]
    fn leads_to_resolves_links_below_the_root_and_keeps_missing_components() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::open(dir.path()).unwrap();
        std::fs::create_dir_all(dir.path().join("etc/real")).unwrap();
        for (target, link) in [
            ("../run/resolve/stub", "etc/relative"),
            ("/run", "var-run"),
            ("../var-run/there", "etc/twice"),
            ("loop", "loop"),
            ("real/../relative", "etc/up"),
            ("../../../../etc", "out"),
        ] {
            symlink(target, dir.path().join(link)).unwrap();
        }
        for (path, wanted) in [
            ("etc/relative", "run/resolve/stub"),
            ("/etc/twice", "run/there"),
            ("etc/up", "run/resolve/stub"),
            ("out/relative", "run/resolve/stub"),
            ("etc/missing/../x", "etc/x"),
            ("etc/real", "etc/real"),
            ("", ""),
        ] {
            assert_eq!(tree.leads_to(path).unwrap(), Path::new(wanted), "{path}");
        }
        assert!(tree.leads_to("loop/x").is_err());
    }

    #[test]
    fn touch_never_creates_a_file_through_a_link() {
        let outside = tempfile::tempdir().unwrap();
        let inside = tempfile::tempdir().unwrap();
        symlink(outside.path().join("target"), inside.path().join("complete")).unwrap();
        let tree = Tree::open(inside.path()).unwrap();
        assert!(!tree.touch("complete").unwrap());
        assert!(!outside.path().join("target").exists());
    }

    #[test]
    fn private_directory_does_not_inherit_setgid() {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::chown(dir.path(), None, Some(1234)).unwrap();
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o2775)).unwrap();
        let tree = Tree::open(dir.path()).unwrap();
        tree.make_private("made").unwrap();
        let found = std::fs::metadata(dir.path().join("made")).unwrap();
        assert_eq!((found.mode() & 0o7777, found.gid()), (0o700, rustix::process::getegid().as_raw()));
        assert_eq!(tree.make_private("made").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }

    #[test]
    fn tree_is_not_opened_through_a_link() {
        let real = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        symlink(real.path(), other.path().join("link")).unwrap();
        assert_eq!(Tree::open(&other.path().join("link")).unwrap_err().kind(), io::ErrorKind::NotADirectory);
    }

    #[test]
    fn mount_points_are_removed_without_a_trace_unless_filled() {
        let dir = tempfile::tempdir().unwrap();
        let before = std::fs::metadata(dir.path()).unwrap().modified().unwrap();
        let tree = Tree::open(dir.path()).unwrap();
        tree.make_mount_point("proc", true).unwrap();
        tree.make_mount_point("file", false).unwrap();
        assert!(tree.remove_mount_point("proc").unwrap());
        assert!(tree.remove_mount_point("file").unwrap());
        assert!(tree.remove_mount_point("never").unwrap());
        assert_eq!(std::fs::metadata(dir.path()).unwrap().modified().unwrap(), before);
        tree.make_mount_point("run", true).unwrap();
        std::fs::write(dir.path().join("run/users"), "").unwrap();
        assert!(!tree.remove_mount_point("run").unwrap());
    }

    #[test]
    fn read_refuses_a_fifo_and_a_large_file() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::open(dir.path()).unwrap();
        rustix::fs::mknodat(&tree, "fifo", FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        assert!(tree.read("fifo", 10).is_err());
        std::fs::write(dir.path().join("large"), [0; 11]).unwrap();
        assert_eq!(tree.read("large", 10).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(tree.read("large", 11).unwrap().len(), 11);
    }

    #[test]
    fn replace_replaces_a_link_and_not_its_target() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("target"), "old").unwrap();
        symlink("target", dir.path().join("link")).unwrap();
        Tree::open(dir.path()).unwrap().replace("link", b"new").unwrap();
        assert_eq!(std::fs::read(dir.path().join("link")).unwrap(), b"new");
        assert_eq!(std::fs::read(dir.path().join("target")).unwrap(), b"old");
    }
}
