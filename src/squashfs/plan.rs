//! The planned content of an image, in memory: all entries with their attributes, and each file's source of content.
//!
//! An entry takes about 90 bytes and its name, so an image of 200,000 files needs some 25 MB.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::squashfs::error::Limit;
use crate::squashfs::format::{Kind, LONGEST_NAME, LONGEST_TARGET, NONE};

/// Owner, permissions, time and extended attributes of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attributes<'a> {
    /// Permission bits, including set-user-ID, set-group-ID and sticky. The bits of the type are ignored.
    pub mode: u32,
    /// Owner.
    pub user: u32,
    /// Group.
    pub group: u32,
    /// Time of the last modification, in seconds. An image can hold 0 to 2³²-1; other times are clamped.
    pub modified: i64,
    /// Extended attributes by their full names, in any order. Names outside of `user.`, `trusted.` and `security.` are
    /// an error: see [`can_hold`].
    pub xattrs: &'a [(Vec<u8>, Vec<u8>)],
}

/// Returns whether an image can hold an extended attribute with this name. POSIX ACLs, for example, do not fit.
pub fn can_hold(xattr: &[u8]) -> bool {
    crate::squashfs::format::split_xattr(xattr).is_some()
}

/// An object of a file system, without its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Object<'a> {
    /// A directory.
    Directory,
    /// A regular file of `size` bytes.
    File {
        /// Length of the file in bytes.
        size: u64,
        /// Source of the file's content.
        content: Content,
    },
    /// A symbolic link with its target.
    Symlink(&'a [u8]),
    /// A block device, with its numbers as in `st_rdev`.
    BlockDevice(u64),
    /// A character device, with its numbers as in `st_rdev`.
    CharacterDevice(u64),
    /// A FIFO.
    Fifo,
    /// A socket.
    Socket,
}

/// Source of the content of a regular file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// The file is read and compressed.
    Read,
    /// The content is known to equal that of the source's file with this inode number, so its blocks are taken over. If
    /// the source has no such file of this size, the file is read instead.
    Taken(u32),
}

/// Identifies an object of a [`Plan`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeId(pub(crate) u32);

impl NodeId {
    /// The root directory.
    pub const ROOT: Self = Self(0);

    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// An object of the plan, which becomes one inode.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Node {
    pub(crate) mode: u16,
    pub(crate) user: u32,
    pub(crate) group: u32,
    pub(crate) modified: u32,
    /// Index of the object's set of extended attributes in [`Plan::xattrs`], or [`NONE`].
    pub(crate) xattrs: u32,
    /// Number of the object's names; for a directory, the number of its subdirectories.
    pub(crate) links: u32,
    /// Index of the first entry that names the object.
    pub(crate) entry: u32,
    pub(crate) body: NodeBody,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum NodeBody {
    /// Index of the entry that was added to the directory last, or [`NONE`].
    Directory(u32),
    File {
        size: u64,
        content: Content,
    },
    /// Start and length of the target in [`Plan::bytes`].
    Symlink(u64, u16),
    Device {
        is_block: bool,
        number: u32,
    },
    Special(Kind),
}

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
struct Entry {
    parent: u32,
    node: u32,
    /// Index of the entry that was added to the same directory before this one, or [`NONE`].
    before: u32,
    name: u64,
    length: u8,
}

/// Extended attributes of an object, sorted by name.
pub(crate) type XattrSet = Vec<(Vec<u8>, Vec<u8>)>;

/// The planned content of an image.
#[derive(Debug)]
pub struct Plan {
    nodes: Vec<Node>,
    entries: Vec<Entry>,
    /// Names of entries and targets of symbolic links.
    bytes: Vec<u8>,
    xattrs: Vec<XattrSet>,
    xattr_sets: HashMap<XattrSet, u32>,
}

impl Plan {
    /// A plan that contains only a root directory.
    pub fn new(root: &Attributes) -> Result<Self, Limit> {
        let (xattrs, xattr_sets) = (Vec::new(), HashMap::new());
        let mut plan = Self { nodes: Vec::new(), entries: Vec::new(), bytes: Vec::new(), xattrs, xattr_sets };
        plan.add_node(root, NodeBody::Directory(NONE), NONE)?;
        Ok(plan)
    }

    /// Adds an object as the entry `name` of the directory `parent`. The order of additions does not matter.
    pub fn add(
        &mut self,
        parent: NodeId,
        name: &OsStr,
        attributes: &Attributes,
        object: &Object,
    ) -> Result<NodeId, Limit> {
        let body = match *object {
            Object::Directory => NodeBody::Directory(NONE),
            Object::File { size, content } => NodeBody::File { size, content },
            Object::Symlink(target) => {
                let length = u16::try_from(target.len()).ok().filter(|_| target.len() <= LONGEST_TARGET);
                let length = length.filter(|length| *length > 0).ok_or(Limit::Target(target.len()))?;
                let start = self.bytes.len() as u64;
                self.bytes.extend_from_slice(target);
                NodeBody::Symlink(start, length)
            }
            Object::BlockDevice(number) => NodeBody::Device { is_block: true, number: device_number(number)? },
            Object::CharacterDevice(number) => NodeBody::Device { is_block: false, number: device_number(number)? },
            Object::Fifo => NodeBody::Special(Kind::Fifo),
            Object::Socket => NodeBody::Special(Kind::Socket),
        };
        let entry = u32::try_from(self.entries.len()).map_err(|_| Limit::Number)?;
        let node = self.add_node(attributes, body, entry)?;
        self.add_entry(parent, name, node)?;
        Ok(node)
    }

    /// Adds another name (a hard link) to an object that is no directory.
    pub fn link(&mut self, parent: NodeId, name: &OsStr, node: NodeId) -> Result<(), Limit> {
        if matches!(self.node(node).body, NodeBody::Directory(_)) {
            return Err(Limit::Parent);
        }
        self.add_entry(parent, name, node)?;
        self.nodes[node.index()].links += 1;
        Ok(())
    }

    /// Number of objects. An object with several hard links counts once.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Always false, since a plan contains at least the root directory.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    fn add_node(&mut self, attributes: &Attributes, body: NodeBody, entry: u32) -> Result<NodeId, Limit> {
        let number = u32::try_from(self.nodes.len()).ok().filter(|number| *number < NONE - 1).ok_or(Limit::Number)?;
        let clamped = attributes.modified.clamp(0, u32::MAX.into());
        let node = Node {
            mode: u16::try_from(attributes.mode & 0o7777).unwrap_or(0),
            user: attributes.user,
            group: attributes.group,
            modified: u32::try_from(clamped).unwrap_or(0),
            xattrs: self.xattr_set(attributes.xattrs)?,
            links: if matches!(body, NodeBody::Directory(_)) { 2 } else { 1 },
            entry,
            body,
        };
        self.nodes.push(node);
        Ok(NodeId(number))
    }

    fn xattr_set(&mut self, xattrs: &[(Vec<u8>, Vec<u8>)]) -> Result<u32, Limit> {
        if xattrs.is_empty() {
            return Ok(NONE);
        }
        for (name, value) in xattrs {
            if !can_hold(name) || u16::try_from(name.len()).is_err() || value.len() > 1 << 16 {
                return Err(Limit::Xattr(name.clone()));
            }
        }
        let mut set = xattrs.to_vec();
        set.sort_unstable();
        let next = u32::try_from(self.xattrs.len()).map_err(|_| Limit::Number)?;
        Ok(match self.xattr_sets.get(&set) {
            Some(known) => *known,
            None => {
                self.xattrs.push(set.clone());
                self.xattr_sets.insert(set, next);
                next
            }
        })
    }

    fn add_entry(&mut self, parent: NodeId, name: &OsStr, node: NodeId) -> Result<(), Limit> {
        let name = name.as_bytes();
        let is_name = !matches!(name, b"" | b"." | b"..") && !name.iter().any(|byte| matches!(byte, b'/' | 0));
        let length = u8::try_from(name.len()).ok().filter(|_| is_name && name.len() <= LONGEST_NAME);
        let length = length.ok_or_else(|| Limit::Name(name.to_owned()))?;
        let number = u32::try_from(self.entries.len()).ok().filter(|number| *number != NONE).ok_or(Limit::Number)?;
        let is_directory = matches!(self.node(node).body, NodeBody::Directory(_));
        let above = &mut self.nodes[parent.index()];
        let NodeBody::Directory(last) = &mut above.body else { return Err(Limit::Parent) };
        let before = std::mem::replace(last, number);
        above.links += u32::from(is_directory);
        let start = self.bytes.len() as u64;
        self.bytes.extend_from_slice(name);
        self.entries.push(Entry { parent: parent.0, node: node.0, before, name: start, length });
        Ok(())
    }

    pub(crate) fn node(&self, node: NodeId) -> &Node {
        &self.nodes[node.index()]
    }

    pub(crate) fn xattrs_of(&self, set: u32) -> Option<&XattrSet> {
        self.xattrs.get(set as usize)
    }

    fn slice(&self, start: u64, length: usize) -> &[u8] {
        // Callers only pass ranges that were appended before, so none is out of bounds.
        let start = usize::try_from(start).unwrap_or(usize::MAX);
        self.bytes.get(start..start.saturating_add(length)).unwrap_or(&[])
    }

    /// Returns the name of an entry.
    pub(crate) fn name(&self, entry: u32) -> &[u8] {
        let entry = &self.entries[entry as usize];
        self.slice(entry.name, entry.length.into())
    }

    /// Returns the object that an entry names.
    pub(crate) fn node_of(&self, entry: u32) -> NodeId {
        NodeId(self.entries[entry as usize].node)
    }

    /// Returns the target of a symbolic link.
    pub(crate) fn target(&self, (start, length): (u64, u16)) -> &[u8] {
        self.slice(start, length.into())
    }

    /// Returns the directory to which an object was added; the root is its own parent.
    pub(crate) fn parent(&self, node: NodeId) -> NodeId {
        self.entries.get(self.node(node).entry as usize).map_or(NodeId::ROOT, |entry| NodeId(entry.parent))
    }

    /// Returns the path of an object below the root: by the first name that was added, if it has several.
    pub(crate) fn path(&self, node: NodeId) -> PathBuf {
        let mut names = Vec::new();
        let mut at = node;
        while at != NodeId::ROOT {
            names.push(OsStr::from_bytes(self.name(self.node(at).entry)));
            at = self.parent(at);
        }
        names.iter().rev().collect()
    }

    /// Returns the entries of a directory, sorted by name.
    pub(crate) fn entries(&self, directory: NodeId) -> Result<Vec<u32>, Limit> {
        let NodeBody::Directory(mut next) = self.node(directory).body else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        while next != NONE {
            found.push(next);
            next = self.entries[next as usize].before;
        }
        found.sort_unstable_by(|a, b| self.name(*a).cmp(self.name(*b)));
        if let Some(pair) = found.windows(2).find(|pair| self.name(pair[0]) == self.name(pair[1])) {
            return Err(Limit::Twice(self.path(directory).join(OsStr::from_bytes(self.name(pair[0])))));
        }
        Ok(found)
    }

    /// Returns all objects, each once: the entries of a directory in the order of their names, each after everything
    /// below it, then the directory itself. The root comes last.
    pub(crate) fn in_order(&self) -> Result<Vec<NodeId>, Limit> {
        let mut ordered = Vec::with_capacity(self.nodes.len());
        let mut is_seen = vec![false; self.nodes.len()];
        let mut open = vec![(NodeId::ROOT, self.entries(NodeId::ROOT)?.into_iter())];
        while let Some((directory, rest)) = open.last_mut() {
            let Some(entry) = rest.next() else {
                ordered.push(*directory);
                open.pop();
                continue;
            };
            let node = self.node_of(entry);
            if std::mem::replace(&mut is_seen[node.index()], true) {
                continue;
            }
            match self.node(node).body {
                NodeBody::Directory(_) => open.push((node, self.entries(node)?.into_iter())),
                _ => ordered.push(node),
            }
        }
        Ok(ordered)
    }
}

/// Encodes a device number as a squashfs stores it: 12 bits for the major number, 20 bits for the minor number.
fn device_number(device: u64) -> Result<u32, Limit> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    if major >= 1 << 12 || minor >= 1 << 20 {
        return Err(Limit::Number);
    }
    Ok((minor & 0xff) | major << 8 | (minor & !0xff) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(names: &[(&str, &str)]) -> Plan {
        let mut plan = Plan::new(&Attributes::default()).unwrap();
        let mut made = HashMap::from([("", NodeId::ROOT)]);
        for (path, kind) in names {
            let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
            let object = match *kind {
                "directory" => Object::Directory,
                _ => Object::File { size: 1, content: Content::Read },
            };
            let node = plan.add(made[parent], OsStr::new(name), &Attributes::default(), &object).unwrap();
            made.insert(path, node);
        }
        plan
    }

    fn paths(plan: &Plan) -> Vec<String> {
        plan.in_order().unwrap().into_iter().map(|node| plan.path(node).display().to_string()).collect()
    }

    #[test]
    fn order_does_not_depend_on_that_of_adding() {
        let sorted = [("a", "directory"), ("a/x", "file"), ("a.b", "file"), ("b", "directory"), ("b/é", "file")];
        let other = [("b", "directory"), ("a.b", "file"), ("b/é", "file"), ("a", "directory"), ("a/x", "file")];
        assert_eq!(paths(&plan(&sorted)), ["a/x", "a", "a.b", "b/é", "b", ""]);
        assert_eq!(paths(&plan(&other)), paths(&plan(&sorted)));
    }

    #[test]
    fn links_are_counted_as_a_file_system_does() {
        let mut plan = plan(&[("a", "directory"), ("a/b", "directory"), ("f", "file")]);
        let file = plan.in_order().unwrap().into_iter().find(|node| plan.path(*node) == *"f").unwrap();
        plan.link(NodeId::ROOT, OsStr::new("g"), file).unwrap();
        assert_eq!((plan.node(file).links, plan.node(NodeId::ROOT).links), (2, 3));
        assert_eq!(plan.link(file, OsStr::new("h"), file), Err(Limit::Parent));
        assert_eq!(plan.link(NodeId::ROOT, OsStr::new("h"), NodeId::ROOT), Err(Limit::Parent));
        plan.link(NodeId::ROOT, OsStr::new("a"), file).unwrap();
        assert_eq!(plan.in_order(), Err(Limit::Twice("a".into())));
    }

    #[test]
    fn what_an_image_cannot_hold_is_refused() {
        let mut plan = Plan::new(&Attributes::default()).unwrap();
        let mut add = |name: &str, xattr: Option<&str>, object: Object| {
            let xattrs: Vec<_> = xattr.into_iter().map(|name| (name.into(), vec![1])).collect();
            let attributes = Attributes { xattrs: &xattrs, ..Attributes::default() };
            plan.add(NodeId::ROOT, OsStr::new(name), &attributes, &object).err()
        };
        let long = "n".repeat(256);
        for name in ["", ".", "..", "a/b", "a\0b", &long] {
            assert_eq!(add(name, None, Object::Fifo), Some(Limit::Name(name.into())));
        }
        assert_eq!(add(&long[..255], None, Object::Fifo), None);
        assert_eq!(add("t", None, Object::Symlink(b"")), Some(Limit::Target(0)));
        assert_eq!(add("t", None, Object::Symlink(&[b't'; 4096])), Some(Limit::Target(4096)));
        let acl = "system.posix_acl_access";
        assert_eq!(add("x", Some(acl), Object::Fifo), Some(Limit::Xattr(acl.into())));
        assert_eq!(add("d", None, Object::BlockDevice(rustix::fs::makedev(4096, 0))), Some(Limit::Number));
        assert_eq!(add("e", None, Object::BlockDevice(rustix::fs::makedev(4095, (1 << 20) - 1))), None);
    }
}
