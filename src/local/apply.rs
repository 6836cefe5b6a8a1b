//! Applies the changes in the upper layer of an overlay to the directory below it.
//!
//! A step reads only the upper layer, which it leaves as it is, and does nothing where the directory is already as
//! wanted; so a run that was killed can be started again at any time. Two steps cannot be repeated: moving the renamed
//! directories into the stage, since other entries may take their old names, and removing the stage. Therefore a record
//! says which steps are done.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::error::{Attempt, Error, Result};
use crate::image::upper_layer::{Directories, ESCAPED, UpperDirectory, directories, is_whiteout, or_dot, shown};
use crate::local::apply_checks::{refuse_edited, refuse_unchangeable};
use crate::local::apply_progress::{Progress, RECORD, Step, has_begun, is_of, is_only_decided};
use crate::sys::attributes::Node;
use crate::sys::signals::Pending;
use crate::sys::tree::Tree;
use crate::sys::walk::Descent;

/// Changes `root` to the content of the overlay of `root` and `upper`, or continues what an interrupted run began. The
/// overlay must be unmounted, and nobody else may write to `root` or `upper`. Once this has begun, it must be called
/// again until everything is applied.
pub(crate) fn apply(work: &Tree, upper: &Tree, root: &Tree) -> Result<()> {
    let attempted = || format!("apply the changes to {}", root.shown().display());
    let directories = directories(upper).attempt(attempted)?;
    if !has_begun(work)? || is_only_decided(work)? && is_of(work, root)? {
        let refused = refuse_unchangeable(upper, root, &directories).and_then(|()| refuse_edited(work, upper, root));
        if let Err(refusal) = refused {
            if Pending::new().check().is_err() {
                return Err(refusal);
            }
            // Nothing is applied yet, so drop the record; the changes can then be resumed as they are.
            work.remove(RECORD).attempt(|| format!("remove {}", work.shown().join(RECORD).display()))?;
            return Err(refusal);
        }
    }
    let (mut begun, stage) = Progress::begin(work, upper, root)?;
    if let Some(stage) = stage {
        let application = Application { upper, root, stage, directories: &directories, pending: Pending::new() };
        if begun.step == Step::Moving {
            application.move_renamed().and_then(|()| root.sync()).attempt(attempted)?;
            begun.step = Step::Placing;
            begun.write(work)?;
        }
        if begun.step == Step::Placing {
            application.place().and_then(|()| root.sync()).attempt(attempted)?;
            begun.step = Step::Placed;
            begun.write(work)?;
        }
        // Only copies are left in the stage: every renamed directory is in its place.
        remove_copies(&application.stage).and_then(|()| root.remove_directory(&begun.stage)).attempt(attempted)?;
    }
    copy_attributes(upper, root).and_then(|()| root.sync()).attempt(attempted)?;
    begun.step = Step::Applied;
    begun.write(work)
}

/// Stops applying changes after an interruption: renamed directories that are still in the stage return to their old
/// places. Changes that were applied already stay.
pub(crate) fn abort(work: &Tree, upper: &Tree, root: &Tree) -> Result<()> {
    let attempted = || format!("abort the changes to {}", root.shown().display());
    let Some(begun) = Progress::read(work).unwrap_or(None) else { return Ok(()) };
    let Some(stage) = begun.stage_to_abort(root).attempt(attempted)? else { return Ok(()) };
    let put_back = || {
        // The order matters: a directory must return before those inside it.
        let directories = directories(upper)?;
        for (source, aside) in renamed(&directories) {
            let above = root.directory_without_links(or_dot(source.parent().unwrap_or(Path::new(""))));
            let name = source.file_name().unwrap_or_default();
            if let Ok(above) = above
                && above.look(name)?.is_none()
                && stage.look(aside)?.is_some()
            {
                rustix::fs::renameat(&stage, aside, &above, name)?;
            }
        }
        remove_copies(&stage)
    };
    put_back().attempt(attempted)?;
    if !stage.names().attempt(attempted)?.is_empty() {
        let shown = stage.shown();
        let why = format!("{} still holds directories that cannot return to their old paths", shown.display());
        let advice = format!("move them to where they belong, then remove {}", shown.display());
        return Err(Error::new(attempted()).because(why).advise(advice));
    }
    root.remove_directory(&begun.stage).map(|_| ()).attempt(attempted)
}

/// Directories of the source that were renamed, sorted, and their names in the stage.
fn renamed(directories: &Directories) -> BTreeMap<&Path, &str> {
    let renamed = directories.values().filter(|directory| directory.is_renamed);
    renamed.filter_map(|directory| Some((directory.source.as_deref()?, directory.aside.as_str()))).collect()
}

/// Name in the stage of a new file that is not complete yet.
const NEW: &str = "new";

/// First letter of the name in the stage of a copy of a file with several hard links.
const COPY: char = 'c';

fn remove_copies(stage: &Tree) -> io::Result<()> {
    let is_copy = |name: &&OsString| *name == NEW || name.as_bytes()[0] == COPY as u8;
    stage.names()?.iter().filter(is_copy).try_for_each(|name| stage.remove_whole(name))
}

/// Copies owner, mode, times and extended attributes of one directory to another.
fn copy_attributes(from: &Tree, to: &Tree) -> io::Result<()> {
    let name = OsStr::new(".");
    copy_attributes_of(Node { directory: from, name }, &rustix::fs::fstat(from)?, Node { directory: to, name })
}

/// Restricts access to `to` before it is filled: users who cannot reach the new entries in the end must not reach them
/// in the meantime. The attributes of `from` are copied last.
fn restrict(from: &Tree, to: &Tree) -> io::Result<()> {
    let (wanted, found) = (rustix::fs::fstat(from)?, rustix::fs::fstat(to)?);
    let name = OsStr::new(".");
    let access = |directory| {
        let attributes = shown(Node { directory, name }.attributes()?);
        io::Result::Ok(attributes.get(OsStr::new("system.posix_acl_access")).cloned())
    };
    let is_same = (wanted.st_uid, wanted.st_gid) == (found.st_uid, found.st_gid) && access(from)? == access(to)?;
    let sticky = (wanted.st_mode | found.st_mode) & 0o1000;
    let mode = if is_same { wanted.st_mode & found.st_mode & 0o7777 | sticky } else { 0o700 };
    if wanted.st_uid != found.st_uid {
        rustix::fs::chownat(to, ".", Some(rustix::process::geteuid()), None, AtFlags::empty())?;
    }
    if mode != found.st_mode & 0o7777 {
        rustix::fs::chmodat(to, ".", Mode::from_raw_mode(mode), AtFlags::empty())?;
    }
    Ok(())
}

fn copy_attributes_of(from: Node, found: &Stat, to: Node) -> io::Result<()> {
    match to.take(found, &shown(from.attributes()?)) {
        // The target's file system has no such attributes. Only warn: a session that changed the directory in place
        // would have got this error itself.
        Err(e) if Errno::from_io_error(&e) == Some(Errno::OPNOTSUPP) => {
            let path = to.directory.shown().join(to.name);
            tracing::warn!(
                "dropped the extended attributes of {}: the file system does not support them",
                path.display()
            );
            to.take(found, &to.attributes()?)
        }
        other => other,
    }
}

/// Adds a path to the message of an error.
fn naming(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Changes that are being applied.
struct Application<'a> {
    upper: &'a Tree,
    root: &'a Tree,
    stage: Tree,
    directories: &'a Directories,
    pending: Pending,
}

impl Application<'_> {
    /// Moves renamed directories into the stage, the deepest first, because moving a directory invalidates the paths
    /// below it.
    fn move_renamed(&self) -> io::Result<()> {
        for (source, aside) in renamed(self.directories).into_iter().rev() {
            self.pending.check()?;
            if self.stage.look(aside)?.is_some() {
                continue;
            }
            let above = self.root.directory_without_links(or_dot(source.parent().unwrap_or(Path::new(""))))?;
            rustix::fs::renameat(&above, source.file_name().unwrap_or_default(), &self.stage, aside)?;
        }
        Ok(())
    }

    /// Puts everything in its place.
    fn place(&self) -> io::Result<()> {
        // Copies that a killed run made may not have reached the disk, so make them again.
        remove_copies(&self.stage)?;
        let (mut uppers, mut roots) = (Descent::of(self.upper), Descent::of(self.root));
        for (path, directory) in self.directories {
            let both =
                uppers.directory_without_links(path).and_then(|from| Ok((from, roots.directory_without_links(path)?)));
            let at = |e| naming(&self.root.shown().join(path), &e);
            both.map_err(at).and_then(|(from, to)| self.fill(path, from, to, directory.source.is_none()))?;
        }
        // Attributes come last, because placing entries changes the times of their directories.
        let (mut uppers, mut roots) = (Descent::of(self.upper), Descent::of(self.root));
        self.directories.keys().try_for_each(|path| {
            copy_attributes(uppers.directory_without_links(path)?, roots.directory_without_links(path)?)
        })
    }

    /// Places the entries of one directory. If that directory is new, removes all other entries.
    fn fill(&self, path: &Path, from: &Tree, to: &Tree, is_new: bool) -> io::Result<()> {
        restrict(from, to)?;
        let names: BTreeSet<OsString> = from.names()?.into_iter().collect();
        if is_new {
            to.names()?.iter().filter(|name| !names.contains(*name)).try_for_each(|name| to.remove_whole(name))?;
        }
        for name in &names {
            self.pending.check()?;
            let path = path.join(name);
            self.place_entry(&path, from, to, name).map_err(|e| naming(&self.root.shown().join(&path), &e))?;
        }
        Ok(())
    }

    fn place_entry(&self, path: &Path, from: &Tree, to: &Tree, name: &OsStr) -> io::Result<()> {
        let found = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if is_whiteout(&found) {
            to.remove_whole(name)
        } else if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
            self.place_directory(to, name, self.directories.get(path))
        } else {
            self.place_file(from, to, name, &found)
        }
    }

    fn place_directory(&self, to: &Tree, name: &OsStr, directory: Option<&UpperDirectory>) -> io::Result<()> {
        let aside = directory.filter(|directory| directory.is_renamed).map(|directory| directory.aside.as_str());
        if let Some(aside) = aside
            && self.stage.look(aside)?.is_some()
        {
            to.remove_whole(name)?;
            return Ok(rustix::fs::renameat(&self.stage, aside, to, name)?);
        }
        match to.look(name)?.map(|found| FileType::from_raw_mode(found.st_mode)) {
            Some(FileType::Directory) => return Ok(()),
            Some(_) => to.remove_whole(name)?,
            None => {}
        }
        Ok(rustix::fs::mkdirat(to, name, Mode::RWXU)?)
    }

    fn place_file(&self, from: &Tree, to: &Tree, name: &OsStr, found: &Stat) -> io::Result<()> {
        let present = to.look(name)?;
        if present.as_ref().is_some_and(|present| (present.st_dev, present.st_ino) == (found.st_dev, found.st_ino)) {
            return Ok(());
        }
        self.stage.remove(NEW)?;
        if !self.link(from, name)? {
            self.copy(from, name, found)?;
        }
        if present.is_some_and(|present| FileType::from_raw_mode(present.st_mode) == FileType::Directory) {
            to.remove_whole(name)?;
        }
        Ok(rustix::fs::renameat(&self.stage, NEW, to, name)?)
    }

    /// Links the file itself into the stage if both are on one file system: linking is cheap, and hard links stay hard
    /// links. Returns whether that was possible.
    fn link(&self, from: &Tree, name: &OsStr) -> io::Result<bool> {
        // Copy a file with escaped attributes instead, since they must be unescaped. On a link, that would change the
        // inode in the upper layer too, and when the file's next name is placed, its attributes would be taken for
        // overlayfs's own state.
        let is_escaped = |name: &OsString| name.as_bytes().starts_with(ESCAPED);
        if (Node { directory: from, name }).attributes()?.keys().any(is_escaped) {
            return Ok(false);
        }
        match rustix::fs::linkat(from, name, &self.stage, NEW, AtFlags::empty()) {
            Ok(()) => {}
            Err(Errno::XDEV | Errno::PERM | Errno::OPNOTSUPP | Errno::MLINK) => return Ok(false),
            Err(e) => return Err(e.into()),
        }
        let file = Node { directory: &self.stage, name: OsStr::new(NEW) };
        file.set_attributes(&shown(file.attributes()?)).map(|()| true)
    }

    /// Copies the file into the stage. If it has hard links, it is copied once and then linked.
    fn copy(&self, from: &Tree, name: &OsStr, found: &Stat) -> io::Result<()> {
        let copy = format!("{COPY}{}", found.st_ino);
        let linked = || rustix::fs::linkat(&self.stage, &copy, &self.stage, NEW, AtFlags::empty());
        if found.st_nlink > 1 && linked().is_ok() {
            return Ok(());
        }
        match FileType::from_raw_mode(found.st_mode) {
            FileType::RegularFile => {
                let content = from.open_regular(name, OFlags::RDONLY | OFlags::NOFOLLOW)?;
                copy_content(content, self.stage.create_file(NEW)?, found.st_size.cast_unsigned())?;
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(from, name, Vec::new())?;
                rustix::fs::symlinkat(target, &self.stage, NEW)?;
            }
            kind => rustix::fs::mknodat(&self.stage, NEW, kind, Mode::RUSR, found.st_rdev)?,
        }
        let new = Node { directory: &self.stage, name: OsStr::new(NEW) };
        copy_attributes_of(Node { directory: from, name }, found, new)?;
        if found.st_nlink > 1 {
            rustix::fs::renameat(&self.stage, NEW, &self.stage, &copy)?;
            linked()?;
        }
        Ok(())
    }
}

/// Maximum number of bytes of a file that are copied between two checks for a signal.
const PIECE: u64 = 64 << 20;

/// Copies a file of `size` bytes, keeping its holes.
fn copy_content(mut from: File, mut to: File, size: u64) -> io::Result<()> {
    let mut at = 0;
    while at < size {
        at = match rustix::fs::seek(&from, rustix::fs::SeekFrom::Data(at)) {
            Ok(at) => at,
            // The rest of the file is a hole.
            Err(Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let end = rustix::fs::seek(&from, rustix::fs::SeekFrom::Hole(at))?.min(at + PIECE);
        Pending::new().check()?;
        from.seek(SeekFrom::Start(at))?;
        to.seek(SeekFrom::Start(at))?;
        io::copy(&mut Read::by_ref(&mut from).take(end - at), &mut to)?;
        at = end;
    }
    to.set_len(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::unpack::{INDEX, NO_METACOPY, ONE_DEVICE, REDIRECT};
    use crate::image::upper_layer::complete_hard_links;
    use crate::sys::mounts::{self, Detached};
    use nix::sys::signal::Signal;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use rustix::mount::MountAttrFlags;
    use std::fmt::Write as _;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
    use std::os::unix::process::ExitStatusExt;
    use std::path::PathBuf;
    use std::process::{Command, Stdio};

    /// Operations of programs on a tree. Most of them fail on most trees, which does not matter.
    #[derive(Debug, Clone)]
    enum Change {
        Write(PathBuf, u8),
        Append(PathBuf),
        MakeDirectory(PathBuf),
        Remove(PathBuf),
        /// Writes to a file and removes it; another hard link of the file, if there is one, shows the result.
        WriteAndRemove(PathBuf),
        Rename(PathBuf, PathBuf),
        Link(PathBuf, PathBuf),
        Symlink(PathBuf, PathBuf),
        Mode(PathBuf, u32),
        Owner(PathBuf, u32),
        Attribute(PathBuf, &'static str, &'static [u8]),
        Node(PathBuf, u32),
        Sparse(PathBuf),
    }

    /// An ACL of version 2: the owner, user 5, the group, the mask, others.
    const ACL: &[u8] = b"\x02\0\0\0\x01\0\x07\0\xff\xff\xff\xff\x02\0\x04\0\x05\0\0\0\x04\0\x05\0\xff\xff\xff\xff\
        \x10\0\x05\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";

    /// A capability set of version 2: CAP_NET_BIND_SERVICE.
    const CAPABILITY: &[u8] = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

    fn path() -> impl Strategy<Value = PathBuf> {
        vec(prop::sample::select(vec!["a", "b", "c"]), 1..4).prop_map(|names| names.into_iter().collect())
    }

    fn change() -> impl Strategy<Value = Change> {
        use Change::*;
        let attribute = prop::sample::select(vec![
            ("system.posix_acl_access", ACL),
            ("system.posix_acl_default", ACL),
            ("security.capability", CAPABILITY),
            ("trusted.overlay.opaque", b"y"),
            ("trusted.mine", b"1"),
        ]);
        prop_oneof![
            3 => (path(), any::<u8>()).prop_map(|(p, b)| Write(p, b)),
            2 => path().prop_map(Append),
            4 => path().prop_map(MakeDirectory),
            2 => path().prop_map(Remove),
            2 => path().prop_map(WriteAndRemove),
            5 => (path(), path()).prop_map(|(a, b)| Rename(a, b)),
            3 => (path(), path()).prop_map(|(a, b)| Link(a, b)),
            1 => (path(), path()).prop_map(|(a, b)| Symlink(a, b)),
            1 => (path(), prop::sample::select(vec![0o600, 0o755, 0o4711, 0o1777])).prop_map(|(p, m)| Mode(p, m)),
            1 => (path(), 0_u32..3).prop_map(|(p, u)| Owner(p, u)),
            2 => (path(), attribute).prop_map(|(p, (n, v))| Attribute(p, n, v)),
            1 => (path(), 0_u32..3).prop_map(|(p, n)| Node(p, n)),
            1 => path().prop_map(Sparse),
        ]
    }

    impl Change {
        fn make(&self, root: &Path) {
            let at = |path: &Path| root.join(path);
            // Skip files that are not regular: opening a fifo would block.
            let is_node = |path: &Path| std::fs::metadata(at(path)).is_ok_and(|found| !found.is_file());
            let _ = match self {
                Self::Write(path, _) | Self::Append(path) | Self::WriteAndRemove(path) | Self::Sparse(path)
                    if is_node(path) =>
                {
                    Ok(())
                }
                Self::Write(path, byte) => std::fs::write(at(path), [*byte; 9]),
                Self::Append(path) => {
                    File::options().append(true).open(at(path)).and_then(|mut f| io::Write::write_all(&mut f, b"+"))
                }
                Self::MakeDirectory(path) => std::fs::create_dir_all(at(path)),
                Self::WriteAndRemove(path) => {
                    std::fs::write(at(path), "gone").and_then(|()| std::fs::remove_file(at(path)))
                }
                Self::Remove(path) => std::fs::remove_dir_all(at(path)).or_else(|_| std::fs::remove_file(at(path))),
                Self::Rename(from, to) => std::fs::rename(at(from), at(to)),
                Self::Link(from, to) => std::fs::hard_link(at(from), at(to)),
                Self::Symlink(target, path) => symlink(target, at(path)),
                Self::Mode(path, mode) => std::fs::set_permissions(at(path), PermissionsExt::from_mode(*mode)),
                Self::Owner(path, user) => {
                    lchown(at(path), Some(*user), Some(*user)).and_then(|()| chown(root, Some(*user), None))
                }
                Self::Attribute(path, name, value) => {
                    rustix::fs::lsetxattr(at(path), *name, value, rustix::fs::XattrFlags::empty()).map_err(Into::into)
                }
                Self::Node(path, number) => {
                    let kind = [FileType::Fifo, FileType::CharacterDevice, FileType::BlockDevice][*number as usize];
                    let device = if kind == FileType::Fifo { 0 } else { rustix::fs::makedev(1, 3) };
                    rustix::fs::mknodat(rustix::fs::CWD, at(path), kind, Mode::RUSR, device).map_err(Into::into)
                }
                Self::Sparse(path) => File::create(at(path)).and_then(|file| {
                    file.set_len(1 << 20)?;
                    std::os::unix::fs::FileExt::write_all_at(&file, b"data", 600 << 10)
                }),
            };
        }
    }

    /// Describes a tree as programs see it, one line an entry.
    fn tree(root: &Path) -> String {
        let mut text = String::new();
        let mut names: BTreeMap<(u64, u64), PathBuf> = BTreeMap::new();
        let mut paths = Vec::new();
        Tree::open(root)
            .unwrap()
            .walk(|path, _, _, _| {
                paths.push(path.to_owned());
                Ok(())
            })
            .unwrap();
        paths.sort();
        for path in paths {
            let place = root.join(&path);
            let found = std::fs::symlink_metadata(&place).unwrap();
            let directory = Tree::open(place.parent().unwrap()).unwrap();
            let name = if path.as_os_str().is_empty() { root.file_name() } else { place.file_name() };
            let attributes = Node { directory: &directory, name: name.unwrap() }.attributes().unwrap();
            let first = names.entry((found.dev(), found.ino())).or_insert_with(|| path.clone()).clone();
            let content = if found.is_file() { std::fs::read(&place).unwrap() } else { Vec::new() };
            let target = std::fs::read_link(&place).unwrap_or_default();
            let links = if found.is_dir() { 0 } else { found.nlink() };
            let size = if found.is_file() { found.len() } else { 0 };
            let is_sparse = found.blocks() * 1024 < size;
            let times = (found.mtime(), found.mtime_nsec());
            let _ = writeln!(
                text,
                "{path:?} {:o} {} {} {times:?} {size} {is_sparse} {links} {first:?} {target:?} {} {attributes:?} {}",
                found.mode(),
                found.uid(),
                found.gid(),
                if found.is_file() { 0 } else { found.rdev() },
                &content.escape_ascii().to_string().replace("\\x00", ""),
            );
        }
        text
    }

    fn mount(kind: &str, options: &[(&str, &str)], at: &Path) {
        std::fs::create_dir_all(at).unwrap();
        let mount = Detached::filesystem(kind, options, MountAttrFlags::MOUNT_ATTR_NODEV).unwrap();
        mount.attach(Tree::open(at).unwrap()).unwrap();
    }

    /// Changes `root` in an overlay, applies the changes, and compares the results. For each number in `limits`, the
    /// process that applies them is killed after so many system calls, and started again.
    fn compare(
        before: &[Change],
        changes: &[Change],
        another_disk: bool,
        limits: &[u32],
    ) -> std::result::Result<(), String> {
        let dir = tempfile::tempdir().unwrap();
        let [place, root, merged] = ["disk", "disk/root", "merged"].map(|name| dir.path().join(name));
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("this test needs root");
        mounts::make_all_private().unwrap();
        mount("tmpfs", &[], &place);
        if another_disk {
            mount("tmpfs", &[], &root);
        }
        for name in ["root", "upper", "work", "record"] {
            std::fs::create_dir_all(place.join(name)).unwrap();
        }
        // Skip attributes of this name, which overlayfs would take for its own state if the source had them.
        let is_state = |change: &&Change| matches!(change, Change::Attribute(_, "trusted.overlay.opaque", _));
        for change in before.iter().filter(|change| !is_state(change)) {
            change.make(&root);
        }
        let root_attributes = std::fs::metadata(&root).unwrap();
        chown(place.join("upper"), Some(root_attributes.uid()), Some(root_attributes.gid())).unwrap();
        std::fs::set_permissions(place.join("upper"), root_attributes.permissions()).unwrap();
        let [lower, upper, inner] =
            [&root, &place.join("upper"), &place.join("work")].map(|p| p.to_str().unwrap().to_owned());
        let layers = [("lowerdir", lower.as_str()), ("upperdir", &upper), ("workdir", &inner)];
        let options: Vec<_> = layers.into_iter().chain([REDIRECT, INDEX, ONE_DEVICE, NO_METACOPY]).collect();
        mount("overlay", &options, &merged);
        for change in changes {
            change.make(&merged);
        }
        let [upper, lower] = ["upper", "root"].map(|name| Tree::open(&place.join(name)).unwrap());
        complete_hard_links(&lower, &upper, &place.join("work/index"), &Tree::open(&merged).unwrap()).unwrap();
        let wanted = tree(&merged);
        mounts::unmount(&merged).unwrap();
        for limit in limits.iter().map(Some).chain([None]) {
            // Run this in a process of its own, which can be killed; it inherits this thread's mounts.
            let program = std::env::current_exe().unwrap();
            let mut child = match limit {
                None => Command::new(program),
                Some(limit) => {
                    let mut strace = Command::new("strace");
                    let inject = format!("inject={CHANGING}:signal=KILL:when={limit}");
                    strace
                        .args(["-f", "-o", "/dev/null", "-e", &format!("trace={CHANGING}"), "-e", &inject])
                        .arg(program);
                    strace
                }
            };
            child.args(["--ignored", "--exact", "local::apply::tests::applied_by_a_program_that_is_killed"]);
            match child.env(PLACE, &place).stdout(Stdio::null()).status().unwrap() {
                ended if ended.success() => break,
                ended if ended.signal() == Some(Signal::SIGKILL as i32) => {}
                other => return Err(format!("{other}")),
            }
        }
        // Remove the upper layer, since its hard links would be counted.
        std::fs::remove_dir_all(place.join("upper")).unwrap();
        std::fs::remove_dir_all(place.join("work")).unwrap();
        let found = tree(&root);
        let different = || {
            let lines = |of: &str, not_in: &str| {
                of.lines().filter(|l| !not_in.lines().any(|o| o == *l)).collect::<Vec<_>>().join("\n")
            };
            format!("wanted:\n{}\nfound:\n{}", lines(&wanted, &found), lines(&found, &wanted))
        };
        let same = wanted == found;
        let result = if same { Ok(()) } else { Err(different()) };
        if another_disk {
            mounts::unmount(&root).unwrap();
        }
        mounts::unmount(&place).unwrap();
        result
    }

    /// System calls that change a directory.
    const CHANGING: &str = "renameat,renameat2,linkat,unlinkat,mkdirat,utimensat";

    const PLACE: &str = "IMS_SSHD_TEST_PLACE";

    #[test]
    #[ignore = "another test starts it"]
    fn applied_by_a_program_that_is_killed() {
        let place = PathBuf::from(std::env::var_os(PLACE).unwrap());
        let [upper, root, record] = ["upper", "root", "record"].map(|name| Tree::open(&place.join(name)).unwrap());
        apply(&record, &upper, &root).unwrap();
    }

    /// Checks that the changes are applied correctly to a tree that `before` creates, on one disk and across two.
    fn applied(before: &[Change], changes: &[Change]) {
        for another_disk in [false, true] {
            let (before, changes) = (before.to_vec(), changes.to_vec());
            let compared = std::thread::spawn(move || compare(&before, &changes, another_disk, &[4])).join();
            assert_eq!(compared.unwrap(), Ok(()));
        }
    }

    #[test]
    fn a_hard_link_keeps_what_was_written_through_a_removed_name() {
        let [a, b] = ["a", "b"].map(PathBuf::from);
        let before = [Change::Write(a.clone(), b'1'), Change::Link(a.clone(), b)];
        applied(&before, &[Change::Write(a.clone(), b'2'), Change::Remove(a)]);
    }

    #[test]
    fn a_tree_deeper_than_the_longest_path_is_applied_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let [upper, root, record] = three(dir.path());
        let mut at = Tree::open(&dir.path().join("upper")).unwrap();
        for _ in 0..1100 {
            rustix::fs::mkdirat(&at, "deep", Mode::RWXU).unwrap();
            at = at.directory("deep").unwrap();
        }
        at.touch("file").unwrap();
        apply(&record, &upper, &root).unwrap();
        let deepest: PathBuf = std::iter::repeat_n("deep", 1100).collect();
        assert!(root.directory_without_links(&deepest).unwrap().look("file").unwrap().is_some());
        for tree in [&upper, &root] {
            tree.remove_whole(OsStr::new("deep")).unwrap();
        }
    }

    fn three(dir: &Path) -> [Tree; 3] {
        ["upper", "root", "record"].map(|name| {
            std::fs::create_dir(dir.join(name)).unwrap();
            Tree::open(&dir.join(name)).unwrap()
        })
    }

    #[test]
    fn a_file_named_like_a_stage_is_applied_and_a_foreign_stage_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let [upper, root, record] = three(dir.path());
        std::fs::write(dir.path().join("upper/.ims-sshd.applying"), "theirs").unwrap();
        apply(&record, &upper, &root).unwrap();
        assert_eq!(root.read(".ims-sshd.applying", 9).unwrap(), b"theirs");
        record.remove(RECORD).unwrap();
        let (begun, _) = Progress::begin(&record, &upper, &root).unwrap();
        let stage = dir.path().join("root").join(&begun.stage);
        std::fs::remove_dir(&stage).unwrap();
        assert!(apply(&record, &upper, &root).unwrap_err().to_string().contains("is gone"));
        std::fs::create_dir(&stage).unwrap();
        chown(&stage, Some(1234), Some(1234)).unwrap();
        assert!(apply(&record, &upper, &root).unwrap_err().to_string().contains("another directory has taken"));
    }

    #[test]
    fn a_directory_that_becomes_private_is_private_before_it_is_filled() {
        let dir = tempfile::tempdir().unwrap();
        let [upper, root, _] = three(dir.path());
        for (before, after, owner, between) in [
            (0o755, 0o700, 0, 0o700),
            (0o700, 0o755, 0, 0o700),
            (0o1777, 0o755, 0, 0o1755),
            (0o755, 0o755, 1234, 0o700),
        ] {
            for (tree, mode, owner) in [("upper", after, 0), ("root", before, owner)] {
                std::fs::set_permissions(dir.path().join(tree), PermissionsExt::from_mode(mode)).unwrap();
                chown(dir.path().join(tree), Some(owner), None).unwrap();
            }
            restrict(&upper, &root).unwrap();
            let found = std::fs::metadata(dir.path().join("root")).unwrap();
            assert_eq!((found.mode() & 0o7777, found.uid()), (between, 0));
        }
    }

    #[test]
    fn an_immutable_file_is_refused_before_anything_is_applied() {
        let dir = tempfile::tempdir().unwrap();
        let [upper, root, record] = three(dir.path());
        for name in ["upper/a", "upper/fixed", "root/fixed"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        let fixed = dir.path().join("root/fixed");
        let chattr = |flag: &str| Command::new("chattr").arg(flag).arg(&fixed).status().unwrap().success();
        // Not every file system supports the immutable flag.
        if !chattr("+i") {
            return;
        }
        let refused = apply(&record, &upper, &root);
        let names = root.names();
        assert!(chattr("-i"));
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("root/fixed is immutable") && refused.contains("chattr -i -a"), "{refused}");
        assert_eq!(names.unwrap(), ["fixed"]);
        assert!(!has_begun(&record).unwrap());
        apply(&record, &upper, &root).unwrap();
    }

    #[test]
    fn a_renamed_directory_returns_to_its_place_when_an_application_is_aborted() {
        let dir = tempfile::tempdir().unwrap();
        let [upper, root, record] = three(dir.path());
        for name in ["root/old", "root/old/in", "upper/new"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let redirect = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(dir.path().join("upper/new"), "trusted.overlay.redirect", b"old", redirect).unwrap();
        let (begun, stage) = Progress::begin(&record, &upper, &root).unwrap();
        let directories = directories(&upper).unwrap();
        Application {
            upper: &upper,
            root: &root,
            stage: stage.unwrap(),
            directories: &directories,
            pending: Pending::new(),
        }
        .move_renamed()
        .unwrap();
        assert_eq!(root.names().unwrap(), [begun.stage.as_str()]);
        abort(&record, &upper, &root).unwrap();
        assert_eq!(root.names().unwrap(), ["old"]);
        assert!(dir.path().join("root/old/in").exists());
    }

    #[test]
    fn a_file_with_hard_links_keeps_attributes_named_like_overlayfs_state() {
        let path = |name: &str| PathBuf::from(name);
        for make in [Change::Symlink(path("a"), path("a")), Change::Write(path("a"), 1)] {
            let state = Change::Attribute(path("a"), "trusted.overlay.opaque", b"y");
            let changes = [state, Change::Link(path("a"), path("b"))];
            let compared = std::thread::spawn(move || compare(&[make], &changes, false, &[])).join();
            assert_eq!(compared.unwrap(), Ok(()));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn a_directory_becomes_what_the_overlay_showed_however_often_the_run_is_killed(
            before in vec(change(), 0..30), changes in vec(change(), 0..30), another_disk: bool,
            limits in vec(1_u32..40, 0..4)
        ) {
            // Use a thread, because `compare` needs a mount namespace of its own, and those belong to threads.
            let compared = std::thread::spawn(move || compare(&before, &changes, another_disk, &limits)).join();
            prop_assert_eq!(compared.unwrap(), Ok(()));
        }
    }
}
