//! Collects an existing directory tree into a [`Plan`], using directory descriptors.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, OFlags, Stat};
use rustix::io::Errno;

use crate::squashfs::error::Failure;
use crate::squashfs::plan::{Attributes, Content, NodeId, Object, Plan, XattrSet, can_hold};
use crate::sys::tree::Tree;
use crate::sys::walk::{Descent, refuse_long};

/// Decision whether an entry goes into the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Leave out the entry and everything below it.
    LeaveOut,
    /// Pack the entry. For a regular file, the value is the source of its content.
    Pack(Content),
    /// Pack the entry without reading its extended attributes: it is known to have none.
    PackBare(Content),
}

/// Called with an extended attribute that a squashfs cannot hold. Arguments: the object's path below the tree, the path
/// at which its attributes can be read, its status, and the attribute's name. May return new permissions for the
/// object.
pub type Unkept<'a> = &'a mut dyn FnMut(&Path, &Path, &Stat, &[u8]) -> Option<u32>;

/// The collected entries.
#[derive(Debug)]
pub struct Gathered {
    /// The plan.
    pub plan: Plan,
    /// Names of the extended attributes that were left out because a squashfs cannot hold them, without duplicates.
    pub not_kept: Vec<OsString>,
}

/// Collects `tree`. Calls `choose` for each entry except the root, with its path and its status from `lstat`. `choose`
/// may change permissions and size in the status; the image then has the changed values, and a file of size 0 is not
/// read. Leaves out extended attributes outside of `user.`, `trusted.` and `security.`. Never follows a symbolic link.
pub fn gather(tree: &Tree, choose: &mut dyn FnMut(&Path, &mut Stat) -> Choice) -> Result<Gathered, Failure> {
    gather_with(tree, choose, &mut |_, _, _, _| None)
}

/// Like [`gather`], but also calls `unkept` for attributes that are left out, except those of the root.
pub fn gather_with(
    tree: &Tree,
    choose: &mut dyn FnMut(&Path, &mut Stat) -> Choice,
    unkept: Unkept,
) -> Result<Gathered, Failure> {
    let root = rustix::fs::fstat(tree).map_err(|error| Failure::Tree(PathBuf::new(), error.into()))?;
    let mut attributes = ExtendedAttributes { not_kept: Vec::new(), names: vec![0; 1 << 16], value: vec![0; 1 << 16] };
    let mut mode = root;
    let xattrs = attributes.of((tree, OsStr::new(".")), Path::new(""), &mut mode, &mut |_, _, _, _| None)?;
    let plan = Plan::new(&of_status(&root, &xattrs))?;
    let mut gathering = Gathering { plan, attributes, linked: HashMap::new(), unkept };
    let mut failure = None;
    let walked = tree.walk_with(&NodeId::ROOT, |parent, path, directory, name, found| {
        let mut found = *found;
        let choice = choose(path, &mut found);
        if choice == Choice::LeaveOut {
            return Ok(None);
        }
        gathering.add(*parent, path, (directory, name), &mut found, choice).map(Some).map_err(|error| {
            failure = Some(error);
            io::ErrorKind::Other.into()
        })
    });
    if let Some(failure) = failure {
        return Err(failure);
    }
    walked.map_err(Failure::Walk)?;
    Ok(Gathered { plan: gathering.plan, not_kept: gathering.attributes.not_kept })
}

struct Gathering<'a> {
    plan: Plan,
    attributes: ExtendedAttributes,
    unkept: Unkept<'a>,
    /// Objects with several hard links that were added already, by device and inode number.
    linked: HashMap<(u64, u64), NodeId>,
}

impl Gathering<'_> {
    /// Adds the entry `name` of a directory to the plan.
    fn add(
        &mut self,
        parent: NodeId,
        path: &Path,
        (directory, name): (&Tree, &OsStr),
        found: &mut Stat,
        choice: Choice,
    ) -> Result<NodeId, Failure> {
        let failed = |error: io::Error| Failure::Tree(path.to_owned(), error);
        refuse_long(path).map_err(failed)?;
        let kind = FileType::from_raw_mode(found.st_mode);
        let is_shared = found.st_nlink > 1 && kind != FileType::Directory;
        if is_shared && let Some(known) = self.linked.get(&(found.st_dev, found.st_ino)) {
            self.plan.link(parent, name, *known)?;
            return Ok(*known);
        }
        let (content, xattrs) = match choice {
            Choice::PackBare(content) => (content, XattrSet::new()),
            Choice::Pack(content) => (content, self.attributes.of((directory, name), path, found, self.unkept)?),
            Choice::LeaveOut => return Err(failed(io::ErrorKind::InvalidInput.into())),
        };
        let target;
        let object = match kind {
            FileType::Directory => Object::Directory,
            FileType::RegularFile => Object::File { size: u64::try_from(found.st_size).unwrap_or(0), content },
            FileType::Symlink => {
                target = rustix::fs::readlinkat(directory, name, Vec::new()).map_err(|error| failed(error.into()))?;
                Object::Symlink(target.to_bytes())
            }
            FileType::BlockDevice => Object::BlockDevice(found.st_rdev),
            FileType::CharacterDevice => Object::CharacterDevice(found.st_rdev),
            FileType::Fifo => Object::Fifo,
            FileType::Socket => Object::Socket,
            FileType::Unknown => return Err(failed(io::Error::other("it is of an unknown type"))),
        };
        let node = self.plan.add(parent, name, &of_status(found, &xattrs), &object)?;
        if is_shared {
            self.linked.insert((found.st_dev, found.st_ino), node);
        }
        Ok(node)
    }
}

fn of_status<'a>(found: &Stat, xattrs: &'a [(Vec<u8>, Vec<u8>)]) -> Attributes<'a> {
    let (mode, user, group) = (found.st_mode & 0o7777, found.st_uid, found.st_gid);
    Attributes { mode, user, group, modified: found.st_mtime, xattrs }
}

/// Reads extended attributes.
struct ExtendedAttributes {
    not_kept: Vec<OsString>,
    /// Buffer for the list of names; the kernel limits the list and each value to 64 KiB (xattr(7)).
    names: Vec<u8>,
    value: Vec<u8>,
}

impl ExtendedAttributes {
    /// Returns the extended attributes of the entry `name` that an image can hold; error messages name `path`. `unkept`
    /// may change the permissions in `status`.
    fn of(
        &mut self,
        (directory, name): (&Tree, &OsStr),
        path: &Path,
        status: &mut Stat,
        unkept: Unkept,
    ) -> Result<XattrSet, Failure> {
        // The path leads through the directory's descriptor, so the entry need not be opened. A link as last component
        // is not followed.
        let entry = directory.path().join(name);
        let failed = |error: Errno| Failure::Tree(path.to_owned(), error.into());
        let length = match rustix::fs::llistxattr(&entry, &mut self.names[..]) {
            Ok(0) | Err(Errno::NOTSUP) => return Ok(XattrSet::new()),
            other => other.map_err(failed)?,
        };
        let mut found = XattrSet::new();
        for name in self.names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            let shown = OsStr::from_bytes(name);
            if can_hold(name) {
                let length = rustix::fs::lgetxattr(&entry, shown, &mut self.value[..]).map_err(failed)?;
                found.push((name.to_owned(), self.value[..length].to_vec()));
                continue;
            }
            if !self.not_kept.iter().any(|known| known == shown) {
                self.not_kept.push(shown.to_owned());
            }
            if let Some(mode) = unkept(path, &entry, status, name) {
                status.st_mode = status.st_mode & !0o7777 | mode & 0o7777;
            }
        }
        Ok(found)
    }
}

/// Returns a function that opens files of `tree`, for [`write()`](crate::squashfs::write()). It never follows a
/// symbolic link in place of a file.
pub fn opener(tree: &Tree) -> impl FnMut(&Path) -> io::Result<File> {
    let mut descent = Descent::of(tree);
    move |path| {
        let parent = path.parent().unwrap_or(Path::new(""));
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        descent.directory_without_links(parent)?.open_regular(name, OFlags::RDONLY | OFlags::NOFOLLOW)
    }
}
