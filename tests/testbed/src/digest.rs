//! Descriptions of trees and mounts, to compare them before and after.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ims_sshd::sys::mounts::mount_points;

/// All paths below `directory`, and `directory` itself, sorted.
pub fn walk(directory: &Path) -> Vec<PathBuf> {
    let mut found = vec![directory.to_owned()];
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                directories.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

/// True if `path` itself is a regular file, and not a link to one.
pub fn is_regular(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|m| m.is_file())
}

/// Everything visible in a tree: a description and the content of each path. Access times and inode change times are
/// left out, since no program can restore them.
pub type Digest = BTreeMap<PathBuf, (String, Vec<u8>)>;

pub fn digest(root: &Path) -> Digest {
    let mut read = HashSet::new();
    let mut describe = |path: &Path| {
        let m = std::fs::symlink_metadata(path).unwrap();
        let content = match m.file_type() {
            t if t.is_symlink() => std::fs::read_link(path).unwrap().into_os_string().into_encoded_bytes(),
            // The content of a file with several hard links is read once.
            t if t.is_file() && read.insert(m.ino()) => std::fs::read(path).unwrap(),
            _ => Vec::new(),
        };
        let size = if m.is_dir() { 0 } else { m.size() };
        let owner = format!("{}:{}", m.uid(), m.gid());
        let times = format!("{}.{}", m.mtime(), m.mtime_nsec());
        (format!("{} {:o} {owner} {} {:x} {size} {times}", m.ino(), m.mode(), m.nlink(), m.rdev()), content)
    };
    walk(root).into_iter().map(|path| (path.strip_prefix(root).unwrap().to_owned(), describe(&path))).collect()
}

/// The differences between two digests, as text for a person.
pub fn differences(before: &Digest, after: &Digest) -> Vec<String> {
    let describe = |seen: Option<&(String, Vec<u8>)>| seen.map_or("nothing".to_owned(), |(text, _)| text.clone());
    let paths: BTreeSet<_> = before.keys().chain(after.keys()).collect();
    paths
        .into_iter()
        .filter(|path| before.get(*path) != after.get(*path))
        .map(|path| format!("/{}: {} -> {}", path.display(), describe(before.get(path)), describe(after.get(path))))
        .collect()
}

/// Mounts that this thread and its children see and that are not among `before`, as mount IDs and mount points. Mounts
/// that are gone do not count, since they vanish with the directory that they are on, and move with it.
pub fn new_mounts(before: &[(u32, PathBuf)]) -> Vec<(u32, PathBuf)> {
    let mountinfo = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let numbers = mountinfo.lines().map(|line| line.split(' ').next().unwrap().parse().unwrap());
    let mut now: Vec<(u32, PathBuf)> = numbers.zip(mount_points(mountinfo.as_bytes())).collect();
    now.retain(|(number, _)| !before.iter().any(|(known, _)| known == number));
    now
}
