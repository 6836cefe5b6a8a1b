//! A store that is a directory. Other users may write to it, as in a group that publishes together, and could rename
//! entries or replace them by links. Therefore each image's directory is opened once and checked to belong to this
//! user, and everything in it is accessed through that descriptor. Other users have no access to it before the image is
//! published.

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

/// Suffix of a partial file; no object's name contains it.
const PARTIAL: &str = "#1";

/// Mode of a published file: readable for all users whom the owner lets into its directory.
const PUBLISHED: Mode = Mode::from_raw_mode(0o644);

/// Maximum size of a manifest, in bytes.
const LARGEST_MANIFEST: u64 = 1 << 20;
const MANIFEST: &str = "manifest.json";

/// A directory of images.
pub(crate) struct Directory {
    root: Tree,
    path: PathBuf,
    /// The directory of the image that was opened last; a job has one image.
    held: Mutex<Option<Held>>,
}

/// Open directory of an image.
#[derive(Clone)]
pub(crate) struct Held {
    id: String,
    /// Current name, which is the image's ID until the image is published.
    name: String,
    tree: Arc<Tree>,
}

/// State of the path of an image's directory.
pub(crate) enum Found {
    /// Nothing is there.
    Nothing,
    /// A directory of this user is there.
    Ours(Held),
    /// Something else is there, with the reason why it is not this user's.
    Others(String),
}

/// Opens the directory of a store; creates it if it is missing. Refuses links of other users.
pub(crate) fn open_or_make(named: &Path) -> io::Result<(Tree, PathBuf)> {
    let path = named::resolve_beginning(named)?;
    refuse_missing_parent(named)?;
    let there = path.ancestors().find(|place| place.symlink_metadata().is_ok()).unwrap_or(Path::new("/"));
    let mut tree = Tree::from_fd(named::open_without_links(there)?);
    for name in path.strip_prefix(there).unwrap_or(Path::new("")) {
        match rustix::fs::mkdirat(&tree, name, Mode::from_raw_mode(0o755)) {
            // Another run may just have created it.
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
        tree = tree.directory_without_links(name)?;
    }
    // Fails here if the last part is a file.
    tree.directory_without_links(".").map(|tree| (tree, path))
}

/// Refuses a store whose parent does not exist, since a typing error would create a tree of directories.
pub(crate) fn refuse_missing_parent(named: &Path) -> io::Result<()> {
    let Some(missing) = named::missing_parent(named) else { return Ok(()) };
    let tilde = if named.starts_with("~") { " (a shell does not expand a quoted ~)" } else { "" };
    Err(io::Error::other(format!("{} does not exist{tilde}; create it first", missing.display())))
}

impl Directory {
    /// Opens the store; creates the directory if it is missing.
    pub(crate) fn open(named: &Path) -> io::Result<Self> {
        let (root, path) = open_or_make(named)?;
        Ok(Self { root, path, held: Mutex::default() })
    }

    /// Path of the directory, without links.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the directory of the image `id`, if it exists.
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
            // Somebody may have renamed a published image to this ID.
            None if !may_be(&tree, id)? => Some("holds the manifest of another image".into()),
            other => other,
        };
        if let Some(why) = others {
            return Ok(Found::Others(format!("{} {why}", self.shown(id))));
        }
        let found = Held { id: id.to_owned(), name: id.to_owned(), tree: Arc::new(tree) };
        Ok(Found::Ours(held.insert(found).clone()))
    }

    /// Opens the directory of the image `id`; creates it if it is missing.
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
        // A directory that existed before, or was created manually, may be open to others.
        if rustix::fs::fstat(&held.tree)?.st_mode & 0o077 != 0 {
            rustix::fs::chmodat(held.tree.as_ref(), ".", Mode::RWXU, AtFlags::empty())?;
        }
        Ok(held)
    }

    fn forget(&self) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Reason why an open directory is not this user's alone; `None` if it belongs to this user and others cannot write
    /// to it.
    fn others(&self, tree: &Tree) -> io::Result<Option<String>> {
        let found = rustix::fs::fstat(tree)?;
        let is_ours = found.st_uid == rustix::process::geteuid().as_raw()
            // NFS maps root to nobody (root_squash, exports(5)).
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

    /// Creates a partial file for the object `key` of the image `id`.
    pub(crate) fn begin(&self, id: &str, key: &str) -> io::Result<File> {
        self.make(id)?.tree.create_file(partial(key))
    }

    /// Opens the partial file of the object `key` of the image `id` for writing.
    pub(crate) fn go_on(&self, id: &str, key: &str) -> io::Result<File> {
        let Found::Ours(held) = self.find(id)? else { return Err(io::ErrorKind::NotFound.into()) };
        let file = held.tree.open_regular(partial(key), OFlags::WRONLY | OFlags::NOFOLLOW)?;
        // A file with several hard links may be somebody else's.
        if file.metadata()?.nlink() == 1 { Ok(file) } else { Err(self.exchanged(&held.name)) }
    }

    /// Turns the partial file into the object.
    pub(crate) fn complete(&self, id: &str, key: &str) -> io::Result<()> {
        let Found::Ours(held) = self.find(id)? else { return Err(io::ErrorKind::NotFound.into()) };
        held.tree.rename(&partial(key), key)
    }

    /// Writes a whole object.
    pub(crate) fn put(&self, id: &str, key: &str, content: &[u8]) -> io::Result<()> {
        self.begin(id, key)?.write_all_at(content, 0)?;
        self.complete(id, key)
    }

    /// Metadata of the object `key` of the image `id`; `None` if it does not exist.
    pub(crate) fn look(&self, id: &str, key: &str) -> io::Result<Option<Stat>> {
        match self.find(id)? {
            Found::Ours(held) => held.tree.look(key),
            Found::Nothing => Ok(None),
            Found::Others(why) => Err(io::Error::other(why)),
        }
    }

    /// Removes an object, or its partial file unless `is_whole`. Does nothing if there is no such file.
    pub(crate) fn remove(&self, id: &str, key: &str, is_whole: bool) -> io::Result<()> {
        match self.find(id)? {
            Found::Ours(held) if is_whole => held.tree.remove(key).map(|_| ()),
            Found::Ours(held) => held.tree.remove(partial(key)).map(|_| ()),
            Found::Nothing => Ok(()),
            Found::Others(why) => Err(io::Error::other(why)),
        }
    }

    /// Removes partial files of an image, and its directory if it is empty.
    pub(crate) fn sweep(&self, id: &str) -> io::Result<()> {
        let Found::Ours(held) = self.find(id)? else { return Ok(()) };
        for partial in held.tree.names()?.iter().filter(|name| name.as_bytes().contains(&b'#')) {
            held.tree.remove(partial)?;
        }
        if held.tree.names()?.is_empty() && self.leads_to(&held.name, &held.tree)? {
            self.root.remove_directory(&held.name)?;
            self.forget();
        }
        Ok(())
    }

    /// First unused name among `name` and `name` with a number.
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

    /// Returns whether `name` is an empty directory that an earlier version reserved for an image before being killed.
    fn is_left_empty(&self, name: &str) -> io::Result<bool> {
        let Some(found) = self.root.look(name)? else { return Ok(false) };
        let is_closed = FileType::from_raw_mode(found.st_mode) == FileType::Directory && found.st_mode & 0o777 == 0o700;
        if !is_closed || found.st_uid != rustix::process::geteuid().as_raw() {
            return Ok(false);
        }
        Ok(self.root.directory_of_same_mount(name)?.names()?.is_empty())
    }

    /// Renames a complete image to `name`, unless that exists. Returns whether the image was renamed.
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
            // The name is that of an empty directory, which a plain rename can replace.
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

    /// Returns whether `name` still refers to this directory.
    fn leads_to(&self, name: &str, tree: &Tree) -> io::Result<bool> {
        let made = rustix::fs::fstat(tree)?;
        let found = self.root.look(name)?;
        Ok(found.is_some_and(|found| (found.st_dev, found.st_ino) == (made.st_dev, made.st_ino)))
    }
}

fn partial(key: &str) -> String {
    format!("{key}{PARTIAL}")
}

/// Returns whether a directory may be that of the image `id`. The manifest, which is written last, contains the ID.
fn may_be(tree: &Tree, id: &str) -> io::Result<bool> {
    if tree.look(MANIFEST)?.is_none_or(|found| FileType::from_raw_mode(found.st_mode) != FileType::RegularFile) {
        return Ok(true);
    }
    let manifest = tree.read(MANIFEST, LARGEST_MANIFEST)?;
    Ok(manifest.windows(id.len()).any(|window| window == id.as_bytes()))
}

/// ETag of a file. It changes whenever the content may have changed, as with web servers.
pub(crate) fn etag(found: &Stat) -> String {
    let micros = i128::from(found.st_mtime) * 1_000_000 + i128::from(found.st_mtime_nsec / 1000);
    format!("{:x}-{micros:x}-{:x}", found.st_ino, found.st_size)
}
