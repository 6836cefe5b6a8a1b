//! A store that is a directory. Others may write to it, as where a group publishes together: they rename what is in it, and put links in
//! its place. So each image's directory is opened once, found to be one that this user has made, and everything in it reached by that
//! descriptor. Nobody else gets in before the owner lets him.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};

use crate::sys::file_kind::FileKind;
use crate::sys::named::{self, WRITABLE};
use crate::sys::tree::Tree;

/// In the name of a file that is not whole yet, which no object has.
const BEGUN: &str = "#1";

/// What a published file lets others do, whom the owner lets into its directory.
const PUBLISHED: Mode = Mode::from_raw_mode(0o644);

/// No manifest is longer, in bytes.
const MOST_OF_A_MANIFEST: u64 = 1 << 20;
const MANIFEST: &str = "manifest.json";

/// A directory of images.
pub(crate) struct Directory {
    root: Tree,
    path: PathBuf,
    /// The image that was looked for last: a job has one.
    held: Mutex<Option<Held>>,
}

/// The directory of an image, open.
#[derive(Clone)]
pub(crate) struct Held {
    id: String,
    /// Its name now: the id, until it is published under another one.
    name: String,
    tree: Arc<Tree>,
}

/// What stands in the place of an image.
pub(crate) enum Found {
    /// Nothing.
    Nothing,
    /// A directory that this user has made.
    Ours(Held),
    /// Something else, and why it is none of ours.
    Others(String),
}

/// Opens the directory that is named as a store, and makes it where it is missing. Links of other users are refused.
pub(crate) fn open_or_make(named: &Path) -> io::Result<(Tree, PathBuf)> {
    let path = named::resolve_beginning(named)?;
    let there = path.ancestors().find(|place| place.symlink_metadata().is_ok()).unwrap_or(Path::new("/"));
    let mut tree = Tree::from_fd(named::open_without_links(there)?);
    for name in path.strip_prefix(there).unwrap_or(Path::new("")) {
        match rustix::fs::mkdirat(&tree, name, Mode::from_raw_mode(0o777)) {
            // Another run has just made it.
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
        tree = tree.directory_without_links(name)?;
    }
    // A file in its place is told now.
    tree.directory_without_links(".").map(|tree| (tree, path))
}

impl Directory {
    /// Opens it, and makes it where it is missing.
    pub(crate) fn open(named: &Path) -> io::Result<Self> {
        let (root, path) = open_or_make(named)?;
        Ok(Self { root, path, held: Mutex::default() })
    }

    /// Its path, without links.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What stands in the place of the image `id`.
    pub(crate) fn find(&self, id: &str) -> io::Result<Found> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = held.as_ref().filter(|held| held.id == id) {
            return Ok(Found::Ours(held.clone()));
        }
        match self.root.look(id)? {
            None => return Ok(Found::Nothing),
            Some(found) if FileType::from_raw_mode(found.st_mode) != FileType::Directory => {
                return Ok(Found::Others(format!("{} is {}", self.shown(id), FileKind::of(&found))));
            }
            Some(_) => {}
        }
        let tree = self.root.directory_of_same_mount(id)?;
        let others = match self.others(&tree)? {
            // Somebody may have given the id to an image that is published.
            None if !may_be(&tree, id)? => Some("holds the manifest of another image".into()),
            other => other,
        };
        if let Some(why) = others {
            return Ok(Found::Others(format!("{} {why}", self.shown(id))));
        }
        let found = Held { id: id.to_owned(), name: id.to_owned(), tree: Arc::new(tree) };
        Ok(Found::Ours(held.insert(found).clone()))
    }

    /// The directory of the image `id`, which is made where it is missing.
    fn make(&self, id: &str) -> io::Result<Held> {
        let is_new = match self.find(id)? {
            Found::Ours(_) => false,
            Found::Others(why) => return Err(io::Error::other(why)),
            Found::Nothing => {
                rustix::fs::mkdirat(&self.root, id, Mode::RWXU)?;
                true
            }
        };
        let held = match self.find(id)? {
            Found::Ours(held) if !is_new || held.tree.names()?.is_empty() => held,
            _ => {
                self.forget();
                return Err(self.exchanged(id));
            }
        };
        // One that was made before, by hand, or that somebody has put in the place of the new one.
        if rustix::fs::fstat(&held.tree)?.st_mode & 0o077 != 0 {
            rustix::fs::chmodat(held.tree.as_ref(), ".", Mode::RWXU, AtFlags::empty())?;
        }
        Ok(held)
    }

    fn forget(&self) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Returns why an open directory is none that this user has made.
    fn others(&self, tree: &Tree) -> io::Result<Option<String>> {
        let found = rustix::fs::fstat(tree)?;
        let is_ours = found.st_uid == rustix::process::geteuid().as_raw()
            // NFS gives what root makes to nobody (root_squash, exports(5)).
            || found.st_uid == rustix::fs::fstat(self.root.create_nameless()?)?.st_uid;
        Ok(match is_ours {
            false => Some(format!("belongs to user {}", found.st_uid)),
            true if found.st_mode & WRITABLE != 0 => Some("can be written to by others".into()),
            true => None,
        })
    }

    fn exchanged(&self, name: &str) -> io::Error {
        let place = self.shown(name);
        io::Error::other(format!(
            "{place} is not the directory that this job has made; see who else may write to {}",
            self.path.display()
        ))
    }

    fn shown(&self, name: &str) -> String {
        self.path.join(name).display().to_string()
    }

    /// Begins the object `key` of the image `id`.
    pub(crate) fn begin(&self, id: &str, key: &str) -> io::Result<File> {
        self.make(id)?.tree.create_file(begun(key))
    }

    /// Opens the object `key` of the image `id`, which was begun, to write more of it.
    pub(crate) fn go_on(&self, id: &str, key: &str) -> io::Result<File> {
        let Found::Ours(held) = self.find(id)? else { return Err(io::ErrorKind::NotFound.into()) };
        let file = held.tree.open_regular(begun(key), OFlags::WRONLY | OFlags::NOFOLLOW)?;
        // Another name of it would be a file of somebody else's.
        if file.metadata()?.nlink() == 1 { Ok(file) } else { Err(self.exchanged(&held.name)) }
    }

    /// Makes an object of what was begun.
    pub(crate) fn complete(&self, id: &str, key: &str) -> io::Result<()> {
        let Found::Ours(held) = self.find(id)? else { return Err(io::ErrorKind::NotFound.into()) };
        held.tree.rename(&begun(key), key)
    }

    /// Puts an object in one piece.
    pub(crate) fn put(&self, id: &str, key: &str, content: &[u8]) -> io::Result<()> {
        self.begin(id, key)?.write_all_at(content, 0)?;
        self.complete(id, key)
    }

    /// What the object `key` of the image `id` is; `None` where there is none.
    pub(crate) fn look(&self, id: &str, key: &str) -> io::Result<Option<Stat>> {
        match self.find(id)? {
            Found::Ours(held) => held.tree.look(key),
            Found::Nothing => Ok(None),
            Found::Others(why) => Err(io::Error::other(why)),
        }
    }

    /// Removes an object, and what was begun of it; one that is not there is no error.
    pub(crate) fn remove(&self, id: &str, key: &str, is_whole: bool) -> io::Result<()> {
        match self.find(id)? {
            Found::Ours(held) if is_whole => held.tree.remove(key).map(|_| ()),
            Found::Ours(held) => held.tree.remove(begun(key)).map(|_| ()),
            Found::Nothing => Ok(()),
            Found::Others(why) => Err(io::Error::other(why)),
        }
    }

    /// Removes what of an image is no object: files that were begun, and its directory if it is empty.
    pub(crate) fn sweep(&self, id: &str) -> io::Result<()> {
        let Found::Ours(held) = self.find(id)? else { return Ok(()) };
        for begun in held.tree.names()?.iter().filter(|name| name.as_bytes().contains(&b'#')) {
            held.tree.remove(begun)?;
        }
        if held.tree.names()?.is_empty() && self.leads_to(&held.name, &held.tree)? {
            self.root.remove_directory(&held.name)?;
            self.forget();
        }
        Ok(())
    }

    /// The first of `name`, and that with a number, that no image has.
    pub(crate) fn free_name(&self, name: &str) -> String {
        let is_taken = |name: &str| {
            let is_there = self.root.look(name).is_ok_and(|found| found.is_some());
            is_there && !self.is_left_empty(name).unwrap_or(false)
        };
        let mut free = name.to_owned();
        let mut number = 1;
        while is_taken(&free) {
            number += 1;
            free = format!("{name}-{number}");
        }
        free
    }

    /// Returns whether `name` is a place that an older version had taken for an image when it was killed.
    fn is_left_empty(&self, name: &str) -> io::Result<bool> {
        let Some(found) = self.root.look(name)? else { return Ok(false) };
        let is_closed = FileType::from_raw_mode(found.st_mode) == FileType::Directory && found.st_mode & 0o777 == 0o700;
        if !is_closed || found.st_uid != rustix::process::geteuid().as_raw() {
            return Ok(false);
        }
        Ok(self.root.directory_of_same_mount(name)?.names()?.is_empty())
    }

    /// Puts an image that is whole in its place `name`, unless something has it. Returns whether it has been done.
    pub(crate) fn place(&self, id: &str, name: &str) -> io::Result<bool> {
        let Found::Ours(held) = self.find(id)? else { return Err(self.exchanged(id)) };
        for key in held.tree.names()? {
            let file = held.tree.open_regular(&key, OFlags::RDONLY | OFlags::NOFOLLOW)?;
            if file.metadata()?.nlink() == 1 {
                rustix::fs::fchmod(file, PUBLISHED)?;
            }
        }
        if !self.leads_to(&held.name, &held.tree)? {
            return Err(self.exchanged(&held.name));
        }
        if name == held.name {
            return Ok(true);
        }
        let renamed = match self.root.rename_to(&held.name, &self.root, name) {
            // The kernel replaces no directory but an empty one.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && self.is_left_empty(name)? => {
                self.root.rename(&held.name, name)
            }
            other => other,
        };
        match renamed {
            Err(e) if matches!(e.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty) => Ok(false),
            Err(e) => Err(e),
            Ok(()) => {
                let is_there = self.leads_to(name, &held.tree)?;
                let placed = Held { name: name.to_owned(), ..held };
                *self.held.lock().unwrap_or_else(PoisonError::into_inner) = Some(placed);
                if is_there { Ok(true) } else { Err(self.exchanged(name)) }
            }
        }
    }

    /// Returns whether `name` is this directory, and not what somebody else has put in its place.
    fn leads_to(&self, name: &str, tree: &Tree) -> io::Result<bool> {
        let made = rustix::fs::fstat(tree)?;
        let found = self.root.look(name)?;
        Ok(found.is_some_and(|found| (found.st_dev, found.st_ino) == (made.st_dev, made.st_ino)))
    }
}

fn begun(key: &str) -> String {
    format!("{key}{BEGUN}")
}

/// Returns whether a directory may be the image `id`: the manifest comes last, and names it.
fn may_be(tree: &Tree, id: &str) -> io::Result<bool> {
    if tree.look(MANIFEST)?.is_none_or(|found| FileType::from_raw_mode(found.st_mode) != FileType::RegularFile) {
        return Ok(true);
    }
    let manifest = tree.read(MANIFEST, MOST_OF_A_MANIFEST)?;
    Ok(manifest.windows(id.len()).any(|window| window == id.as_bytes()))
}

/// A file's mark: another one where its content may be another, as web servers make ETags.
pub(crate) fn etag(found: &Stat) -> String {
    let micros = i128::from(found.st_mtime) * 1_000_000 + i128::from(found.st_mtime_nsec / 1000);
    format!("{:x}-{micros:x}-{:x}", found.st_ino, found.st_size)
}
