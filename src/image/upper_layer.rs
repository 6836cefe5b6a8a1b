//! The upper layer of an overlay: the changes that a session made to a directory below the overlay.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::ops::Bound::{Excluded, Unbounded};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Stat};

use crate::error::{Attempt, Result};
use crate::sys::attributes::{Attributes, Node};
use crate::sys::tree::{Tree, times};
use crate::sys::walk::{Descent, refuse_long};

/// Prefix of the extended attributes in which overlayfs keeps its state of a file in the upper layer.
pub(crate) const STATE: &[u8] = b"trusted.overlay.";

/// Prefix under which overlayfs stores attributes that a session sets with the prefix [`STATE`], as when the session
/// mounts an overlay itself.
pub(crate) const ESCAPED: &[u8] = b"trusted.overlay.overlay.";

/// A directory of the upper layer.
#[derive(Debug)]
pub(crate) struct UpperDirectory {
    /// Directory of the source with which this directory is merged; `None` if this one is new or hides the source's.
    pub(crate) source: Option<PathBuf>,
    /// True if `source` differs from the path of this directory.
    pub(crate) is_renamed: bool,
    /// Name of this directory in the stage while changes are being applied.
    pub(crate) aside: String,
}

/// The directories of an upper layer, by path.
pub(crate) type Directories = BTreeMap<PathBuf, UpperDirectory>;

/// Reads the directories of the upper layer.
pub(crate) fn directories(upper: &Tree) -> io::Result<Directories> {
    let root = UpperDirectory { source: Some(PathBuf::new()), is_renamed: false, aside: String::new() };
    let mut directories = BTreeMap::from([(PathBuf::new(), root)]);
    let (mut open, mut descent) = (vec![PathBuf::new()], Descent::of(upper));
    while let Some(path) = open.pop() {
        let directory = descent.directory_without_links(&path)?;
        for name in directory.names()? {
            let found = rustix::fs::statat(directory, &name, AtFlags::SYMLINK_NOFOLLOW)?;
            if FileType::from_raw_mode(found.st_mode) != FileType::Directory {
                continue;
            }
            let attributes = Node { directory, name: &name }.attributes()?;
            let state = |name: &str| attributes.get(OsStr::new(&format!("trusted.overlay.{name}")));
            let above = directories.get(&path).and_then(|above| above.source.as_ref());
            let (source, is_renamed) = match state("redirect") {
                _ if state("opaque").is_some_and(|value| value == b"y") => (None, false),
                None => (above.map(|above| above.join(&name)), false),
                Some(to) => {
                    let to = PathBuf::from(OsString::from_vec(to.clone()));
                    (to.strip_prefix("/").map(Path::to_owned).ok().or_else(|| above.map(|above| above.join(to))), true)
                }
            };
            let path = path.join(&name);
            refuse_long(&path)?;
            open.push(path.clone());
            directories.insert(path, UpperDirectory { source, is_renamed, aside: format!("d{}", found.st_ino) });
        }
    }
    Ok(directories)
}

/// Returns whether the entry is a whiteout, which hides an entry of the source (overlayfs marks it as device 0/0).
pub(crate) fn is_whiteout(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice && found.st_rdev == 0
}

/// The extended attributes of a file in the upper layer as the overlay shows them.
pub(crate) fn shown(attributes: Attributes) -> Attributes {
    let shown = |name: OsString| match name.as_bytes() {
        escaped if escaped.starts_with(ESCAPED) => {
            Some(OsString::from_vec([STATE, &escaped[ESCAPED.len()..]].concat()))
        }
        state if state.starts_with(STATE) => None,
        _ => Some(name),
    };
    attributes.into_iter().filter_map(|(name, value)| Some((shown(name)?, value))).collect()
}

/// `path`, or "." if it is empty.
pub(crate) fn or_dot(path: &Path) -> &Path {
    if path.as_os_str().is_empty() { Path::new(".") } else { path }
}

/// Copies up every hard link of a changed file: after a change under one name, the other names still lead to the
/// source's file. The overlay of `lower` and `upper` must be mounted at `merged`, with its index in `index`.
pub(crate) fn complete_hard_links(lower: &Tree, upper: &Tree, index: &Path, merged: &Tree) -> Result<()> {
    if std::fs::read_dir(index).map_or(true, |mut entries| entries.next().is_none()) {
        return Ok(());
    }
    let attempted = || format!("find the names of changed files in {}", merged.shown().display());
    let directories = directories(upper).attempt(attempted)?;
    let visit = |path: &Path, directory: &Tree, name: &OsStr, found: &Stat| {
        if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
            return Ok(());
        }
        refuse_long(path)?;
        if upper.handle_without_links(path).is_ok() {
            return Ok(());
        }
        let Some(source) = source_of(&directories, path) else { return Ok(()) };
        let before = rustix::fs::fstat(lower.handle_without_links(source)?)?;
        // Use the link count in the source: the session may have removed all names but one after changing the file.
        if before.st_nlink < 2 {
            return Ok(());
        }
        if (before.st_ctime, before.st_ctime_nsec) == (found.st_ctime, found.st_ctime_nsec) {
            return Ok(());
        }
        // overlayfs copies a name up on any change of its attributes, even to the same values.
        Ok(rustix::fs::utimensat(directory, name, &times(found), AtFlags::SYMLINK_NOFOLLOW)?)
    };
    merged.walk(visit).attempt(attempted)
}

/// Path in the source of the entry at `path` of the overlay, which must not be in the upper layer.
pub(crate) fn source_of(directories: &Directories, path: &Path) -> Option<PathBuf> {
    // For every directory of the upper layer, all its parents are in that layer too. So the lowest one above `path` is
    // the part that `path` shares with the directory sorted before it.
    let (before, _) = directories.range::<Path, _>((Unbounded, Excluded(path))).next_back()?;
    let above: PathBuf = before.iter().zip(path.iter()).take_while(|(a, b)| a == b).map(|(a, _)| a).collect();
    Some(directories.get(&above)?.source.as_ref()?.join(path.strip_prefix(&above).ok()?))
}

/// Returns whether `upper` changes nothing in `lower`. Entries that equal their originals do not count: opening a jail
/// copies up directories, and resolv.conf, which is restored at the end.
pub(crate) fn is_unchanged(upper: &Tree, lower: &Tree) -> io::Result<bool> {
    let (mut uppers, mut lowers) = (Descent::of(upper), Descent::of(lower));
    let here = OsStr::new(".");
    for (path, directory) in directories(upper)? {
        if directory.source.as_ref() != Some(&path) {
            return Ok(false);
        }
        let from = uppers.directory_without_links(or_dot(&path))?;
        let to = match lowers.directory_without_links(or_dot(&path)) {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(false),
            to => to?,
        };
        if !is_alike(from, to, here)? {
            return Ok(false);
        }
        for name in from.names()? {
            let found = rustix::fs::statat(from, &name, AtFlags::SYMLINK_NOFOLLOW)?;
            let is_alike = match FileType::from_raw_mode(found.st_mode) {
                FileType::Directory => true,
                _ if is_whiteout(&found) => to.look(&name)?.is_none(),
                _ => to.look(&name)?.is_some() && is_alike(from, to, &name)?,
            };
            if !is_alike {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Maximum size of files that are compared, in bytes; larger ones count as changed.
const LARGEST_COMPARED: u64 = 1 << 20;

/// Returns whether `name` is the same in both directories. A directory's times do not count.
fn is_alike(upper: &Tree, lower: &Tree, name: &OsStr) -> io::Result<bool> {
    let nodes = [upper, lower].map(|directory| Node { directory, name });
    let [a, b] = [upper, lower].map(|directory| rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW));
    let (a, b) = (a?, b?);
    let kind = FileType::from_raw_mode(a.st_mode);
    let owned = |found: &Stat| (found.st_mode, found.st_uid, found.st_gid, found.st_rdev);
    let sized = |found: &Stat| (found.st_size, found.st_mtime, found.st_mtime_nsec);
    let is_sized = kind == FileType::Directory || sized(&a) == sized(&b);
    if owned(&a) != owned(&b) || !is_sized || shown(nodes[0].attributes()?) != shown(nodes[1].attributes()?) {
        return Ok(false);
    }
    Ok(match kind {
        FileType::RegularFile => {
            let read = |directory: &Tree| directory.read(name, LARGEST_COMPARED);
            a.st_size.cast_unsigned() <= LARGEST_COMPARED && read(upper)? == read(lower)?
        }
        FileType::Symlink => {
            rustix::fs::readlinkat(upper, name, Vec::new())? == rustix::fs::readlinkat(lower, name, Vec::new())?
        }
        _ => true,
    })
}

/// Paths of `root` that are accepted by `is_meant` and that the changes alter or remove.
pub(crate) fn touched(
    upper: &Tree,
    root: &Tree,
    directories: &Directories,
    is_meant: impl Fn(&Path, &Tree, &OsStr) -> io::Result<bool>,
) -> io::Result<Vec<PathBuf>> {
    let mut touched = Vec::new();
    let moved: BTreeSet<&Path> =
        directories.values().filter(|d| d.is_renamed).filter_map(|d| d.source.as_deref()).collect();
    // Paths that are changed, or removed with everything below them.
    let mut open: Vec<PathBuf> = Vec::new();
    let (mut uppers, mut roots) = (Descent::of(upper), Descent::of(root));
    for (path, upper_directory) in directories {
        let Some(source) = &upper_directory.source else { continue };
        let directory = match roots.directory_without_links(source) {
            // The session created this directory; the source does not have it.
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => continue,
            other => other?,
        };
        if is_meant(source, directory, OsStr::new("."))? {
            touched.push(source.clone());
        }
        for name in uppers.directory_without_links(path)?.names()? {
            let entry = source.join(&name);
            if directories.get(&path.join(&name)).is_none_or(|d| d.source.as_ref() != Some(&entry)) {
                open.push(entry);
            }
        }
    }
    while let Some(path) = open.pop() {
        if moved.contains(path.as_path()) {
            continue;
        }
        let directory = roots.directory_without_links(path.parent().unwrap_or(Path::new("")))?;
        let name = path.file_name().unwrap_or_default();
        let Some(found) = directory.look(name)? else { continue };
        refuse_long(&path)?;
        if is_meant(&path, directory, name)? {
            touched.push(path.clone());
        }
        if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
            open.extend(directory.directory_without_links(name)?.names()?.iter().map(|name| path.join(name)));
        }
    }
    touched.sort();
    Ok(touched)
}
