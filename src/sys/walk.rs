//! Walks and removes an untrusted tree of any depth: down by one name at a time, and up by `..`. Opening each directory
//! by its path would take time that grows with the square of the depth.
//!
//! A walk holds two descriptors, and about a hundred bytes for each level. It fails with [`io::ErrorKind::Interrupted`]
//! (see [`Pending`]) when a signal that ends the program is pending.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::sys::signals::Pending;
use crate::sys::tree::Tree;

/// Maximum length in bytes of a path that a walk records, which bounds the memory for each entry. Programs can use
/// paths of up to 4096 bytes (PATH_MAX).
const LONGEST_RECORDED: usize = 16 << 10;

/// Time after which a pending signal interrupts a removal. A removal that takes less time always finishes: it may be
/// the cleanup after one signal while a second one is pending.
const FINISHED_REGARDLESS: Duration = Duration::from_secs(1);

/// Maximum number of directories that a [`Descent`] keeps open.
const MOST_OPEN: usize = 16;

/// Device and inode number, to check that `..` leads back to where a walk came from.
type Identity = (u64, u64);

impl Tree {
    /// Calls `visit` for the directory itself and everything below it, with the path below the tree, the parent
    /// directory, the name in it, and the status. Follows no link, and never leaves the tree, whatever is renamed
    /// during the walk. Fails with EXDEV at a directory on which something is mounted.
    pub(crate) fn walk(&self, mut visit: impl FnMut(&Path, &Tree, &OsStr, &Stat) -> io::Result<()>) -> io::Result<()> {
        visit(Path::new(""), self, OsStr::new("."), &rustix::fs::fstat(self)?)?;
        self.walk_with(&(), |(), path, directory, name, found| visit(path, directory, name, found).map(Some))
    }

    /// Like [`Tree::walk`], but does not visit the directory itself, and passes `visit` the state of the parent
    /// directory. The state of this directory is `first`; that of any other directory is the value that `visit`
    /// returned for it. If `visit` returns `None`, the directory is not entered.
    pub(crate) fn walk_with<S>(
        &self,
        first: &S,
        mut visit: impl FnMut(&S, &Path, &Tree, &OsStr, &Stat) -> io::Result<Option<S>>,
    ) -> io::Result<()> {
        let pending = Pending::new();
        let mut path = PathBuf::new();
        let mut list = |directory: &Tree, state: &S, path: &mut PathBuf| {
            let mut ahead = Vec::new();
            for name in directory.names()? {
                pending.check()?;
                let found = rustix::fs::statat(directory, &name, AtFlags::SYMLINK_NOFOLLOW);
                path.push(&name);
                let found = found.map_err(|e| about_change(e.into(), path))?;
                let next = visit(state, path, directory, &name, &found).map_err(|e| about_change(e, path))?;
                path.pop();
                if let Some(next) = next.filter(|_| FileType::from_raw_mode(found.st_mode) == FileType::Directory) {
                    ahead.push((name, next));
                }
            }
            io::Result::Ok(ahead)
        };
        let mut here = self.another()?;
        let mut ahead = list(&here, first, &mut path)?;
        let mut above = Vec::new();
        loop {
            if let Some((name, state)) = ahead.pop() {
                pending.check()?;
                path.push(&name);
                let below =
                    here.directory_of_same_mount(&name).map_err(|e| about_change(about_mount(e, &path), &path))?;
                above.push((identity(&here)?, std::mem::take(&mut ahead)));
                here = below;
                ahead = list(&here, &state, &mut path)?;
            } else if let Some((came_from, rest)) = above.pop() {
                here = here.back(came_from)?;
                path.pop();
                ahead = rest;
            } else {
                return Ok(());
            }
        }
    }

    /// Removes the file or the whole directory `name` of this directory; no error if it does not exist. Does not cross
    /// mount points: those are an error.
    pub(crate) fn remove_whole(&self, name: &OsStr) -> io::Result<()> {
        match self.look(name)?.map(|found| FileType::from_raw_mode(found.st_mode)) {
            None => Ok(()),
            Some(FileType::Directory) => self.remove_directories(name, &Pending::after(FINISHED_REGARDLESS)),
            Some(_) => self.remove(name).map(|_| ()),
        }
    }

    fn remove_directories(&self, name: &OsStr, pending: &Pending) -> io::Result<()> {
        let (mut here, mut ahead) = (self.another()?, vec![name.to_owned()]);
        let mut above = Vec::new();
        loop {
            if let Some(name) = ahead.pop() {
                pending.check()?;
                let below = here.directory_of_same_mount(&name)?;
                above.push((identity(&here)?, std::mem::take(&mut ahead), name));
                here = below;
                ahead = here.remove_files(pending)?;
            } else if let Some((came_from, rest, name)) = above.pop() {
                pending.check()?;
                here = here.back(came_from)?;
                rustix::fs::unlinkat(&here, name, AtFlags::REMOVEDIR)?;
                ahead = rest;
            } else {
                return Ok(());
            }
        }
    }

    /// Removes everything in this directory but directories, and returns the names of the directories.
    fn remove_files(&self, pending: &Pending) -> io::Result<Vec<OsString>> {
        let mut directories = Vec::new();
        for name in self.names()? {
            pending.check()?;
            match rustix::fs::unlinkat(self, &name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::ISDIR) => directories.push(name),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(directories)
    }

    /// Opens the directory above this one; an error if it is not `came_from`, where the walk came from.
    fn back(&self, came_from: Identity) -> io::Result<Tree> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let above = Tree::from_fd(rustix::fs::openat(self, "..", flags, Mode::empty())?);
        if identity(&above)? == came_from { Ok(above) } else { Err(io::Error::other("a directory in it was moved")) }
    }

    /// Another descriptor of this directory.
    fn another(&self) -> io::Result<Tree> {
        self.as_fd().try_clone_to_owned().map(Tree::from_fd)
    }
}

/// Explains an error of opening the directory `path` if something is mounted there; returns other errors unchanged.
fn about_mount(error: io::Error, path: &Path) -> io::Error {
    if error.kind() != io::ErrorKind::CrossesDevices {
        return error;
    }
    let why = format!("something is mounted on /{}; unmount it", path.display());
    io::Error::new(io::ErrorKind::CrossesDevices, why)
}

/// Explains the error that the listed name `path` does not exist; returns other errors unchanged. The directory may be
/// on an overlay, which lists, but does not find, names that were created in its lower directory while the overlay was
/// mounted, and whiteouts of another overlay there.
fn about_change(error: io::Error, path: &Path) -> io::Error {
    if error.raw_os_error() != Some(Errno::NOENT.raw_os_error()) {
        return error;
    }
    let why = format!(
        "/{} is listed, but not found: the directory was changed from outside while open, or the source has a whiteout of \
         an overlay there",
        path.display()
    );
    io::Error::new(io::ErrorKind::NotFound, why)
}

fn identity(directory: &Tree) -> io::Result<Identity> {
    let found = rustix::fs::fstat(directory)?;
    Ok((found.st_dev, found.st_ino))
}

/// Refuses to record a path longer than [`LONGEST_RECORDED`]: no program can use such a path, and many of them would
/// fill the memory.
pub(crate) fn refuse_long(path: &Path) -> io::Result<()> {
    if path.as_os_str().len() <= LONGEST_RECORDED {
        return Ok(());
    }
    let shown = path.iter().take(3).collect::<PathBuf>();
    let levels = path.iter().count();
    let why = format!(
        "/{}/… is {levels} directories deep, with a path longer than {LONGEST_RECORDED} bytes",
        shown.display()
    );
    Err(io::Error::new(io::ErrorKind::InvalidFilename, why))
}

/// Opens directories of a tree by path. Each lookup starts at the nearest ancestor that is still open from an earlier
/// lookup, so that opening directories in the order of their paths takes time linear in their number. Opened
/// directories must not be renamed as long as this value is used.
pub(crate) struct Descent<'a> {
    tree: &'a Tree,
    /// Opened directories with their paths, each below the previous one.
    open: Vec<(PathBuf, Tree)>,
    pending: Pending,
}

impl<'a> Descent<'a> {
    /// Starts at the tree's own directory.
    pub(crate) fn of(tree: &'a Tree) -> Self {
        Self { tree, open: Vec::new(), pending: Pending::new() }
    }

    /// Opens the directory `path` below the tree, or the tree itself if `path` is empty; fails if a component is a
    /// link.
    pub(crate) fn directory_without_links(&mut self, path: &Path) -> io::Result<&Tree> {
        self.pending.check()?;
        while self.open.last().is_some_and(|(above, _)| !path.starts_with(above)) {
            self.open.pop();
        }
        let (from, rest) = match self.open.last() {
            Some((above, from)) => (from, path.strip_prefix(above).unwrap_or(path)),
            None => (self.tree, path),
        };
        let rest = if rest.as_os_str().is_empty() { Path::new(".") } else { rest };
        let found = from.directory_without_links(rest)?;
        if self.open.len() == MOST_OPEN {
            self.open.remove(0);
        }
        self.open.push((path.to_owned(), found));
        Ok(self.open.last().map_or(self.tree, |(_, found)| found))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::signals::Signals;
    use nix::sys::signal::Signal;

    const DEEP: usize = 50_000;

    /// A tree of `levels` nested directories, with a file in each.
    fn deep(levels: usize) -> (tempfile::TempDir, Tree) {
        // A file system in memory: on a disk, each directory takes milliseconds to create and to remove.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let tree = Tree::open(dir.path()).unwrap();
        let mut at = tree.another().unwrap();
        for _ in 0..levels {
            rustix::fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
            at = at.directory("d").unwrap();
            at.touch("f").unwrap();
        }
        (dir, tree)
    }

    /// Largest size of this process in memory so far, in bytes.
    fn peak() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
    }

    /// Processor time of this thread so far.
    fn spent() -> Duration {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
    }

    #[test]
    fn walk_names_a_file_that_is_removed_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::open(dir.path()).unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        for name in ["d/a", "d/b"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let mut removed = None;
        let walked = tree.walk(|path, _, _, _| {
            if path.starts_with("d/a") || path.starts_with("d/b") {
                let other = if path.ends_with("a") { "b" } else { "a" };
                std::fs::remove_file(dir.path().join("d").join(other))?;
                removed = Some(other);
            }
            Ok(())
        });
        let why = format!("/d/{} is listed, but not found: the directory was changed from outside", removed.unwrap());
        assert!(walked.unwrap_err().to_string().starts_with(&why));
    }

    #[test]
    fn deep_tree_is_walked_and_removed_in_time_and_memory_linear_in_its_size() {
        let (_dir, tree) = deep(DEEP);
        let (began, before) = (spent(), peak());
        let (mut entries, mut longest) = (0, 0);
        let count = |path: &Path, _: &Tree, _: &OsStr, _: &Stat| {
            (entries, longest) = (entries + 1, longest.max(path.as_os_str().len()));
            Ok(())
        };
        tree.walk(count).unwrap();
        assert_eq!((entries, longest), (1 + 2 * DEEP, 2 * DEEP + 1));
        tree.remove_whole(OsStr::new("d")).unwrap();
        assert!(tree.names().unwrap().is_empty());
        let (took, grown) = (spent().saturating_sub(began), peak() - before);
        assert!(took < Duration::from_secs(20), "{took:?}");
        // A high limit: memory of other tests in this process counts too.
        assert!(grown < 256 << 20, "{grown} bytes");
    }

    #[test]
    fn pending_signal_ends_a_removal_and_the_next_one_goes_on() {
        // A thread of its own, since the signal mask belongs to a thread.
        let ended = std::thread::spawn(|| {
            let (_dir, tree) = deep(1000);
            let signals = Signals::block(&[Signal::SIGTERM]).unwrap();
            nix::sys::signal::raise(Signal::SIGTERM).unwrap();
            let ended = |result: io::Result<()>| result.unwrap_err().kind() == io::ErrorKind::Interrupted;
            assert!(ended(tree.remove_directories(OsStr::new("d"), &Pending::new())));
            assert!(ended(tree.walk(|_, _, _, _| Ok(()))));
            // A short removal finishes although the signal is pending.
            tree.remove_whole(OsStr::new("d")).unwrap();
            assert_eq!(signals.next().unwrap(), Some(Signal::SIGTERM));
        });
        ended.join().unwrap();
    }

    #[test]
    fn directory_that_is_moved_out_during_a_walk_ends_it() {
        let (dir, tree) = deep(3);
        let outside = tempfile::tempdir_in("/dev/shm").unwrap();
        let moved = tree.walk(|path, _, _, _| match path.to_str() {
            Some("d/d/d") => std::fs::rename(dir.path().join("d/d"), outside.path().join("d")),
            _ => Ok(()),
        });
        assert_eq!(moved.unwrap_err().to_string(), "a directory in it was moved");
    }

    #[test]
    fn descent_opens_siblings_of_a_deep_directory() {
        let (dir, tree) = deep(20);
        let above: PathBuf = std::iter::repeat_n("d", 20).collect();
        let mut descent = Descent::of(&tree);
        descent.directory_without_links(&above).unwrap();
        for name in ["a", "b", "c"] {
            std::fs::create_dir(dir.path().join(&above).join(name)).unwrap();
            std::fs::write(dir.path().join(&above).join(name).join(name), "").unwrap();
            let found = descent.directory_without_links(&above.join(name)).unwrap();
            assert_eq!(found.names().unwrap(), [name]);
        }
        assert!(descent.directory_without_links(Path::new("")).unwrap().look("d").unwrap().is_some());
    }
}
