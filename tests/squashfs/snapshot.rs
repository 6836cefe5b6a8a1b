//! A tree as the kernel shows it, and the same of a squashfs that is mounted.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use backhand::{FilesystemReader, InnerNode};
use ims_sshd::squashfs::gather::{Choice, gather, opener};
use ims_sshd::squashfs::{Compression, Content, Inventory, Options, Reader, Summary};
use ims_sshd::sys::tree::Tree;
use testbed::{Mounted, mount};

/// Everything of an entry that a squashfs holds, as text that can be compared.
pub type Snapshot = BTreeMap<PathBuf, String>;

/// Takes a snapshot of the tree at `root`.
pub fn of_tree(root: &Path) -> Snapshot {
    let mut snapshot = Snapshot::new();
    let mut first_names: HashMap<u64, PathBuf> = HashMap::new();
    let mut ahead = vec![PathBuf::new()];
    while let Some(path) = ahead.pop() {
        let real = root.join(&path);
        let found = fs::symlink_metadata(&real).unwrap();
        if found.is_dir() {
            let mut names: Vec<_> = fs::read_dir(&real).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            // The first one by name is the last one in the list.
            ahead.extend(names.into_iter().rev().map(|name| path.join(name)));
        }
        let first = first_names.entry(found.ino()).or_insert_with(|| path.clone()).clone();
        let mut text = format!(
            "mode {:o} owner {}:{} time {} links {}",
            found.mode(),
            found.uid(),
            found.gid(),
            found.mtime(),
            found.nlink()
        );
        let kind = found.file_type();
        if kind.is_file() {
            write!(text, " size {} content {}", found.size(), content(&real)).unwrap();
        } else if kind.is_symlink() {
            write!(text, " to {}", fs::read_link(&real).unwrap().as_os_str().as_bytes().escape_ascii()).unwrap();
        } else if kind.is_block_device() || kind.is_char_device() {
            write!(text, " device {:x}", found.rdev()).unwrap();
        }
        if first != path {
            write!(text, " is {}", first.as_os_str().as_bytes().escape_ascii()).unwrap();
        }
        for (name, value) in xattrs(&real) {
            write!(text, " {}={}", name.display(), value.escape_ascii()).unwrap();
        }
        snapshot.insert(path, text);
    }
    snapshot
}

fn content(path: &Path) -> String {
    shown(&fs::read(path).unwrap())
}

fn shown(content: &[u8]) -> String {
    if content.len() < 40 {
        return content.escape_ascii().to_string();
    }
    let hash = ring::digest::digest(&ring::digest::SHA256, content);
    hash.as_ref().iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

fn xattrs(path: &Path) -> Vec<(OsString, Vec<u8>)> {
    let mut names = vec![0; 65536];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let mut found: Vec<_> = names
        .map(|name| {
            let name = std::ffi::OsStr::from_bytes(name).to_owned();
            let mut value = vec![0; 65536];
            let length = rustix::fs::lgetxattr(path, &name, &mut value[..]).unwrap();
            value.truncate(length);
            (name, value)
        })
        .collect();
    found.sort();
    found
}

/// Takes a snapshot of an image that the kernel mounts at `place`.
pub fn of_image(image: &Path, place: &Path) -> Snapshot {
    fs::create_dir_all(place).unwrap();
    mount(&["-t", "squashfs", "-o", "loop,ro", image.to_str().unwrap()], place);
    let mounted = Mounted(place.to_owned());
    let snapshot = of_tree(place);
    // A child of another test has copies of this process's descriptors until it executes its program.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while nix::mount::umount(place).is_err() {
        assert!(std::time::Instant::now() < deadline, "{} stays busy", place.display());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    std::mem::forget(mounted);
    snapshot
}

/// Takes a snapshot of an image by the reader.
pub fn of_reader(image: &Path) -> Snapshot {
    let reader = Reader::open(File::open(image).unwrap()).unwrap();
    let mut snapshot = Snapshot::new();
    let mut first_names: HashMap<u32, PathBuf> = HashMap::new();
    let walked = reader.walk(true, &mut |entry| {
        let first = first_names.entry(entry.number()).or_insert_with(|| entry.path.to_owned()).clone();
        let (mode, time, links) = (entry.kind() | entry.mode(), entry.modified(), entry.links());
        let mut text = format!("mode {mode:o} owner {}:{} time {time} links {links}", entry.user, entry.group);
        if entry.kind() == 0o100_000 {
            let mut content = Vec::new();
            reader.content(entry, &mut |part| {
                content.extend_from_slice(part);
                Ok(())
            })?;
            write!(text, " size {} content {}", entry.size(), shown(&content)).unwrap();
        } else if !entry.target().is_empty() {
            write!(text, " to {}", entry.target().escape_ascii()).unwrap();
        } else if let Some((major, minor)) = entry.device() {
            write!(text, " device {:x}", rustix::fs::makedev(major, minor)).unwrap();
        }
        if first != entry.path {
            write!(text, " is {}", first.as_os_str().as_bytes().escape_ascii()).unwrap();
        }
        for (name, value) in &entry.xattrs {
            write!(text, " {}={}", std::ffi::OsStr::from_bytes(name).display(), value.escape_ascii()).unwrap();
        }
        snapshot.insert(entry.path.to_owned(), text);
        Ok(())
    });
    walked.unwrap();
    snapshot
}

/// Panics unless the crate `backhand` reads the same of an image, but for extended attributes and hard links, which it
/// does not show. Returns whether it can read the image at all.
pub fn backhand_agrees(expected: &Snapshot, image: &Path, what: &str) -> bool {
    let Ok(image) = FilesystemReader::from_reader(BufReader::new(File::open(image).unwrap())) else { return false };
    let mut found = 0;
    for node in image.files() {
        let path = node.fullpath.strip_prefix("/").unwrap();
        let header = node.header;
        let (kind, rest) = match &node.inner {
            InnerNode::Dir(_) => (0o040_000, String::new()),
            InnerNode::File(file) => {
                let mut content = Vec::new();
                image.file(file).reader_checked().unwrap().read_to_end(&mut content).unwrap();
                (0o100_000, format!(" size {} content {}", file.file_len(), shown(&content)))
            }
            InnerNode::Symlink(link) => (0o120_000, format!(" to {}", link.link.as_os_str().as_bytes().escape_ascii())),
            InnerNode::CharacterDevice(device) => (0o020_000, shown_device(device.device_number)),
            InnerNode::BlockDevice(device) => (0o060_000, shown_device(device.device_number)),
            InnerNode::NamedPipe => (0o010_000, String::new()),
            InnerNode::Socket => (0o140_000, String::new()),
        };
        let mode = kind | u32::from(header.permissions);
        let begin = format!("mode {mode:o} owner {}:{} time {} links ", header.uid, header.gid, header.mtime);
        let wanted = expected.get(path).unwrap_or_else(|| panic!("{what}: backhand found /{}", path.display()));
        let agrees = wanted
            .strip_prefix(&begin)
            .is_some_and(|wanted| wanted.trim_start_matches(|digit: char| digit.is_ascii_digit()).starts_with(&rest));
        assert!(agrees, "{what}: /{}\n  expected {wanted}\n  backhand {begin}*{rest}", path.display());
        found += 1;
    }
    assert_eq!(found, expected.len(), "{what}: number of entries that backhand found");
    true
}

/// A device number as the kernel encodes it for file systems.
fn shown_device(number: u32) -> String {
    let (major, minor) = (number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xf_ff00);
    format!(" device {:x}", rustix::fs::makedev(major, minor))
}

/// Panics with the entries that differ.
pub fn assert_same(expected: &Snapshot, found: &Snapshot, what: &str) {
    let mut different = String::new();
    for path in expected.keys().chain(found.keys().filter(|path| !expected.contains_key(*path))) {
        let (wanted, is) = (expected.get(path), found.get(path));
        if wanted != is && different.len() < 4000 {
            writeln!(different, "/{}\n  expected {wanted:?}\n  found    {is:?}", path.display()).unwrap();
        }
    }
    assert!(different.is_empty(), "{what}:\n{different}");
}

/// Packs the tree at `root` into `image`.
pub fn pack(root: &Path, image: &Path, options: &Options) -> Summary {
    pack_from(root, None, image, options)
}

/// Content of regular files that is taken over: the inode number in the source by that in the tree.
pub type Unchanged = HashMap<u64, u32>;

/// Packs the tree at `root`, and takes over what is unchanged of the source.
pub fn pack_from(root: &Path, source: Option<(&Inventory, &Unchanged)>, image: &Path, options: &Options) -> Summary {
    let tree = Tree::open(root).unwrap();
    let gathered = gather(&tree, &mut |_, found| {
        let known = source.and_then(|(_, unchanged)| unchanged.get(&found.st_ino));
        Choice::Pack(known.map_or(Content::Read, |number| Content::Taken(*number)))
    });
    let gathered = gathered.unwrap();
    // A new file: a loop device may still have the content of the old one.
    let _ = fs::remove_file(image);
    let output = File::options().read(true).write(true).create_new(true).open(image).unwrap();
    let source = source.map(|(source, _)| source);
    ims_sshd::squashfs::write(&gathered.plan, source, options, &mut opener(&tree), &output, &|_| {}).unwrap()
}

/// Entries of the image, with every file of the tree at `root`, from which it was made, marked unchanged.
pub fn inventory(image: &Path, root: &Path) -> (Inventory, Unchanged, Options) {
    let reader = Reader::open(File::open(image).unwrap()).unwrap();
    let options = reader.options();
    let mut unchanged = Unchanged::new();
    let walked = reader.walk(false, &mut |entry| {
        if entry.kind() == 0o100_000 {
            let found = fs::symlink_metadata(root.join(entry.path)).unwrap();
            unchanged.insert(found.ino(), entry.number());
        }
        Ok(())
    });
    walked.unwrap();
    (Inventory::new(reader).unwrap(), unchanged, options)
}

/// Options with a block size.
pub fn options(compression: Compression, block_size: u32) -> Options {
    let method = ims_sshd::squashfs::Method::new(compression, block_size);
    Options { method, block_size, ..Options::new(compression) }
}
