//! Collects a real directory tree into a [`Plan`], by descriptor.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, OFlags, Stat};

use crate::squashfs::error::Failure;
use crate::squashfs::plan::{Attributes, Content, NodeId, Object, Plan, XattrSet, can_hold};
use crate::sys::attributes::Node;
use crate::sys::tree::Tree;
use crate::sys::walk::{Descent, refuse_long};

/// What is to be done with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// It is left out, with all that is below it.
    LeaveOut,
    /// It is packed; the content of a regular file comes from there.
    Pack(Content),
}

/// What was collected.
#[derive(Debug)]
pub struct Gathered {
    /// The plan.
    pub plan: Plan,
    /// Names of extended attributes that a squashfs cannot hold, each once.
    pub not_kept: Vec<OsString>,
}

/// Collects `tree`. `choose` is asked about each entry but the root, by its path and status, as of the kernel's `lstat`.
/// Extended attributes outside of `user.`, `trusted.` and `security.` are left out. Never follows a link.
pub fn gather(tree: &Tree, choose: &mut dyn FnMut(&Path, &Stat) -> Choice) -> Result<Gathered, Failure> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error: rustix::io::Errno| Failure::Tree(path, error.into())
    };
    let mut collector = Collector::default();
    let root = rustix::fs::fstat(tree).map_err(failed(Path::new("")))?;
    let xattrs = collector.xattrs(Node { directory: tree, name: OsStr::new(".") }, Path::new(""))?;
    let mut plan = Plan::new(&attributes(&root, &xattrs))?;
    let mut descent = Descent::of(tree);
    let mut directories = vec![(PathBuf::new(), NodeId::ROOT)];
    let mut linked: HashMap<(u64, u64), NodeId> = HashMap::new();
    while let Some((path, parent)) = directories.pop() {
        let in_tree = |error: io::Error| Failure::Tree(path.clone(), error);
        let directory = descent.directory_without_links(&path).map_err(in_tree)?;
        for name in directory.names().map_err(in_tree)? {
            let below = path.join(&name);
            let found = rustix::fs::statat(directory, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed(&below))?;
            let Choice::Pack(content) = choose(&below, &found) else { continue };
            refuse_long(&below).map_err(in_tree)?;
            let kind = FileType::from_raw_mode(found.st_mode);
            let is_shared = found.st_nlink > 1 && kind != FileType::Directory;
            if is_shared && let Some(known) = linked.get(&(found.st_dev, found.st_ino)) {
                plan.link(parent, &name, *known)?;
                continue;
            }
            let xattrs = collector.xattrs(Node { directory, name: &name }, &below)?;
            let target;
            let object = match kind {
                FileType::Directory => Object::Directory,
                FileType::RegularFile => Object::File { size: u64::try_from(found.st_size).unwrap_or(0), content },
                FileType::Symlink => {
                    target = rustix::fs::readlinkat(directory, &name, Vec::new()).map_err(failed(&below))?;
                    Object::Symlink(target.to_bytes())
                }
                FileType::BlockDevice => Object::BlockDevice(found.st_rdev),
                FileType::CharacterDevice => Object::CharacterDevice(found.st_rdev),
                FileType::Fifo => Object::Fifo,
                FileType::Socket => Object::Socket,
                FileType::Unknown => {
                    return Err(Failure::Tree(below, io::Error::other("it is of an unknown type")));
                }
            };
            let node = plan.add(parent, &name, &attributes(&found, &xattrs), &object)?;
            if is_shared {
                linked.insert((found.st_dev, found.st_ino), node);
            }
            if kind == FileType::Directory {
                directories.push((below, node));
            }
        }
    }
    Ok(Gathered { plan, not_kept: collector.not_kept })
}

fn attributes<'a>(found: &Stat, xattrs: &'a [(Vec<u8>, Vec<u8>)]) -> Attributes<'a> {
    let (mode, user, group) = (found.st_mode & 0o7777, found.st_uid, found.st_gid);
    Attributes { mode, user, group, modified: found.st_mtime, xattrs }
}

#[derive(Default)]
struct Collector {
    not_kept: Vec<OsString>,
}

impl Collector {
    /// Extended attributes of an entry that an image can hold.
    fn xattrs(&mut self, node: Node, path: &Path) -> Result<XattrSet, Failure> {
        let all = node.attributes().map_err(|error| Failure::Tree(path.to_owned(), error))?;
        let (kept, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|(name, _)| can_hold(name.as_bytes()));
        for (name, _) in others {
            if !self.not_kept.contains(&name) {
                self.not_kept.push(name);
            }
        }
        Ok(kept.into_iter().map(|(name, value)| (name.as_bytes().to_vec(), value)).collect())
    }
}

/// Opens the files of `tree` for [`write()`](crate::squashfs::write()). A link in the place of a file is not followed.
pub fn opener(tree: &Tree) -> impl FnMut(&Path) -> io::Result<File> {
    let mut descent = Descent::of(tree);
    move |path| {
        let parent = path.parent().unwrap_or(Path::new(""));
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        descent.directory_without_links(parent)?.open_regular(name, OFlags::RDONLY | OFlags::NOFOLLOW)
    }
}
