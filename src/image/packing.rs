//! The image root becomes a squashfs.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use rustix::fs::{FileType, MemfdFlags, OFlags, Stat};

use crate::error::{Attempt, Error, Result};
use crate::image::exclude::{self, Pattern};
use crate::image::kind::{self, Kind};
use crate::printable::listed;
use crate::sys::file_kind::FileKind;
use crate::sys::named;
use crate::sys::process::Entry;
use crate::sys::tree::Tree;
use crate::transfer::Work;
use crate::transfer::confinement::{Confined, STDIN, all_memory};
use crate::transfer::progress::Progress;
use crate::volume::mounts_below::mounts_below;
use crate::volume::open_tree;

/// The least that mksquashfs gets of memory, and which part of all it takes, as it would by itself.
const MEMORY: (u64, u64) = (64 << 20, 4);

const DEFAULT_COMPRESSION: &str = "gzip";

/// Directory in the image where kiwi leaves its description of the image.
const KIWIS: &str = "image";
const KIWIS_DESCRIPTION: &str = "image/config.xml";

/// Extended attributes that a squashfs keeps, and what mksquashfs says of others, which are access lists.
const KEPT: [&str; 3] = ["user.", "trusted.", "security."];
const NOT_KEPT: &str = "Unrecognised xattr prefix ";

/// Most padding after a squashfs that is published unchanged. mksquashfs fills a block of 4 KiB, others one of a
/// device.
const PADDING: u64 = 1 << 20;

/// Location of a packed image.
pub(crate) struct Archive<'a> {
    /// The directory.
    pub(crate) folder: &'a Tree,
    /// Its name there.
    pub(crate) name: &'a str,
}

impl Archive<'_> {
    /// Opens one that is there.
    pub(crate) fn open(&self) -> Result<File> {
        self.folder
            .open_regular(self.name, OFlags::RDONLY | OFlags::NOFOLLOW)
            .attempt(|| format!("open {}", self.shown()))
    }

    /// Opens one that is published as it is, and that somebody else may have packed. It has to be a whole squashfs, with no more after it
    /// than its padding, and no larger than its file system, which a file of holes can be: all of it would be uploaded.
    pub(crate) fn open_squashfs(&self) -> Result<File> {
        let file = self.open()?;
        let shown = self.shown();
        let attempted = || format!("take {shown} as an image");
        let Kind::Squashfs = kind::kind_of_file(&file, &shown, PADDING)? else {
            return Err(Error::new(attempted()).because("it is no squashfs"));
        };
        let size = file.metadata().attempt(attempted)?.len();
        let disk = rustix::fs::fstatvfs(&file).attempt(attempted)?;
        let holds = disk.f_blocks.saturating_mul(disk.f_frsize);
        // Some file systems do not tell.
        if holds > 0 && size > holds {
            return Err(
                Error::new(attempted()).because(format!("it has {size} bytes, and the file system holds {holds}"))
            );
        }
        Ok(file)
    }

    /// Refuses a directory in which no file can be made.
    pub(crate) fn check_place(&self, called: &str) -> Result<()> {
        match self.folder.create_nameless() {
            // Another run makes one at this moment, on a file system on which it has a name.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(e) => Err(Error::bad_input(format!(
                "{called} is '{}': expected a file where one can be made: {e}",
                self.shown()
            ))),
            Ok(_) => Ok(()),
        }
    }

    /// Its path now, for messages.
    pub(crate) fn shown(&self) -> String {
        self.folder.shown().join(self.name).display().to_string()
    }
}

/// Opens the directory of a file that was named for output, once, and returns it with the file's name there. `called` is what messages call
/// the file.
pub(crate) fn output(file: &Path, called: &str) -> Result<(Tree, String)> {
    let file = std::path::absolute(file).attempt(|| format!("find {}", file.display()))?;
    let refuse = |expected| Err(Error::bad_input(format!("{called} is '{}': expected {expected}", file.display())));
    let (Some(above), Some(name)) = (file.parent(), file.file_name().and_then(OsStr::to_str)) else {
        return refuse("a file");
    };
    let above =
        named::resolve(above).map_err(|e| Error::bad_input(format!("{called} is '{}': {e}", file.display())))?;
    if above == Path::new("/dev") {
        // A new file would replace the machine's /dev/null.
        return refuse("a file outside /dev");
    }
    let tree = open_tree(&above)?;
    if tree.look(name).is_ok_and(|found| found.is_some_and(|found| FileKind::of(&found) == FileKind::Directory)) {
        return refuse("a file, and it is a directory");
    }
    Ok((tree, name.to_owned()))
}

/// The same of a file that is written when all work is done: refused now, if no file can be made there.
pub(crate) fn check_output(file: &Path, called: &str) -> Result<()> {
    let (folder, name) = output(file, called)?;
    Archive { folder: &folder, name: &name }.check_place(called)
}

/// Packs `image_root` to the file `to`, which appears when it is whole, and returns what was written: the name may be another file's by
/// then. What matches `exclude` is left out.
pub(crate) fn pack(
    work: &Work,
    image_root: &Tree,
    to: &Archive,
    packing: &Packing,
    exclude: &[Pattern],
) -> Result<File> {
    let shown = image_root.shown();
    let attempted = format!("pack {}", shown.display());
    nothing_is_mounted_below(&shown, &attempted)?;
    nobody_stands_in(&shown, &attempted)?;
    let excluded = exclude::find(image_root, exclude).attempt(|| attempted.clone())?;
    if excluded.is_all {
        let why = "--exclude leaves nothing of it";
        return Err(Error::new(attempted).because(why).advise("name patterns that match less"));
    }
    for pattern in &excluded.useless {
        tracing::warn!("--exclude '{pattern}' matches nothing in the image");
    }
    refuse_holes(image_root, &excluded.paths, &attempted)?;
    let part = format!("{}.part", to.name);
    // A new file: neither a link nor what an earlier mksquashfs may still write to is in its place.
    let file = to.folder.create_file(&part).attempt(|| format!("create {}.part", to.shown()))?;
    let result = squash(work, image_root, (&file, to.folder), packing, &excluded.paths, &attempted)
        .and_then(|()| if exclude.is_empty() { attributes_are_kept(image_root, &file, &attempted) } else { Ok(()) })
        .and_then(|()| file.sync_all().attempt(|| format!("write {}.part", to.shown())))
        .and_then(|()| to.folder.rename(&part, to.name).attempt(|| format!("rename {}.part", to.shown())));
    if result.is_err() {
        let _ = to.folder.remove(&part);
    }
    result.map(|()| file)
}

fn squash(
    work: &Work,
    image_root: &Tree,
    (part, volume): (&File, &Tree),
    packing: &Packing,
    excluded: &[PathBuf],
    attempted: &str,
) -> Result<()> {
    let mut mksquashfs = Command::new("mksquashfs");
    // Both by descriptor: on a shared volume a name may lead elsewhere by the time that mksquashfs opens it.
    mksquashfs.args([".", STDIN]);
    mksquashfs.args(["-noappend", "-quiet", "-no-progress", "-xattrs"]);
    match packing.compression.unwrap_or(DEFAULT_COMPRESSION) {
        "none" => mksquashfs.args(["-noI", "-noD", "-noF", "-noX"]),
        algorithm => mksquashfs.args(["-comp", algorithm]),
    };
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    mksquashfs.args(["-processors", &processors.to_string(), "-mem", &format!("{}M", memory() >> 20)]);
    if let Some(epoch) = packing.epoch {
        mksquashfs.args(["-mkfs-time", &epoch.to_string(), "-all-time", &epoch.to_string()]);
    }
    if let Some(owner) = kiwis_own(image_root) {
        mksquashfs.args(["-p", &format!("{KIWIS} m 700 {owner}")]);
    }
    let emptied = sparse_logs(image_root, excluded);
    for (name, found) in &emptied {
        let (mode, user, group) = (found.st_mode & 0o7777, found.st_uid, found.st_gid);
        tracing::warn!("/{name} is packed empty: of its {} bytes nearly all are holes", found.st_size);
        mksquashfs.args(["-p", &format!("{name} f {mode:o} {user} {group} true")]);
    }
    let left_out = excluded.iter().map(PathBuf::as_path).chain(emptied.iter().map(|(name, _)| Path::new(name)));
    let (list, arguments) = exclude::listed(left_out);
    // Open until mksquashfs has ended.
    let list = (!list.is_empty()).then(|| handed_on(&list)).transpose().attempt(|| attempted)?;
    if let Some(list) = &list {
        mksquashfs.args(["-wildcards", "-ef", &format!("/proc/self/fd/{}", list.as_raw_fd())]);
    }
    if !arguments.is_empty() {
        mksquashfs.args(["-wildcards", "-e"]).args(arguments);
    }
    // Who looks on sees how much there is; to count it takes a while.
    let total = if io::stderr().is_terminal() { Some(size_of(image_root).attempt(|| attempted)?) } else { None };
    let mut progress = Progress::begin("packing", total);
    let size = || part.metadata().map_or(0, |found| found.len());
    let look = |child: &Child| progress.between(has_read(child).unwrap_or(0), size());
    let confined = Confined::packing(image_root, part, volume)?;
    let said = work.succeed(attempted, &mut mksquashfs, Some(&confined), look)?;
    let (mut not_kept, said): (Vec<_>, Vec<_>) = said.lines().partition(|line| line.starts_with(NOT_KEPT));
    // It says so of every file.
    not_kept.sort_unstable();
    not_kept.dedup();
    for line in not_kept {
        tracing::warn!("mksquashfs: {line}: a squashfs has no place for it");
    }
    if !said.is_empty() {
        // It passes over what it cannot read, and only says so.
        return Err(Error::new(attempted).because(listed(&said)));
    }
    Ok(())
}

/// The owner of /image, where kiwi has left its description of the image there, which may hold the passwords of repositories. Then nobody
/// else can read it in the packed image.
fn kiwis_own(image_root: &Tree) -> Option<String> {
    let is = |path: &str, wanted: FileType| {
        let found = image_root.handle_without_links(path).and_then(|fd| Ok(rustix::fs::fstat(fd)?));
        found.ok().filter(|found| FileType::from_raw_mode(found.st_mode) == wanted)
    };
    let found = is(KIWIS, FileType::Directory).filter(|_| is(KIWIS_DESCRIPTION, FileType::RegularFile).is_some());
    found.map(|found| format!("{} {}", found.st_uid, found.st_gid))
}

/// Logs with a place for each user's number, which are as large as the highest number asks for, and nearly empty. mksquashfs reads holes as
/// if they were data, which takes minutes for what no image needs.
const SPARSE_LOGS: [&str; 3] = ["lastlog", "faillog", "tallylog"];
const LOGS: &str = "var/log";
const LARGE_HOLE: i64 = 1 << 30;

/// Most bytes of all large holes together. An hour of mksquashfs is some TiB of them.
const MOST_HOLES: i64 = 64 << 30;

/// Those of the image that are not left out anyway.
fn sparse_logs(image_root: &Tree, excluded: &[PathBuf]) -> Vec<(String, Stat)> {
    let Ok(logs) = image_root.directory_without_links(Path::new(LOGS)) else { return Vec::new() };
    let found = SPARSE_LOGS.into_iter().filter_map(|name| Some((name, logs.look(name).ok()??)));
    let sparse = found.filter(|(_, found)| large_hole(found).is_some());
    let sparse = sparse.map(|(name, found)| (format!("{LOGS}/{name}"), found));
    sparse.filter(|(name, _)| !excluded.iter().any(|path| Path::new(name).starts_with(path))).collect()
}

/// How many bytes of a file are in holes, if these are large.
fn large_hole(found: &Stat) -> Option<i64> {
    let is_file = FileType::from_raw_mode(found.st_mode) == FileType::RegularFile;
    let hole = found.st_size.saturating_sub(found.st_blocks.saturating_mul(512));
    (is_file && hole > LARGE_HOLE).then_some(hole)
}

/// Refuses holes that keep mksquashfs busy for hours, and warns of others that take it minutes. What is `excluded` does not count.
fn refuse_holes(image_root: &Tree, excluded: &[PathBuf], attempted: &str) -> Result<()> {
    let (mut names, mut holes, mut seen) = (Vec::new(), 0_i64, HashSet::new());
    for (_, log) in sparse_logs(image_root, &[]) {
        seen.insert((log.st_dev, log.st_ino));
    }
    let walked = image_root.walk(|path, _, _, found| {
        if let Some(hole) = large_hole(found)
            && !excluded.iter().any(|left_out| path.starts_with(left_out))
            && seen.insert((found.st_dev, found.st_ino))
        {
            names.push(format!("/{}", path.display()));
            holes = holes.saturating_add(hole);
        }
        Ok(())
    });
    walked.attempt(|| attempted)?;
    if holes > MOST_HOLES {
        return Err(Error::new(attempted)
            .because(format!(
                "holes in its files come to {} GiB, expected {} at the most: {}",
                holes >> 30,
                MOST_HOLES >> 30,
                listed(&names)
            ))
            .advise("remove them, or leave them out (--exclude): each byte is packed as a zero"));
    }
    if !names.is_empty() {
        tracing::warn!("files of holes ({} GiB) take long to pack: {}", holes >> 30, listed(&names));
    }
    Ok(())
}

/// A file in memory that a program inherits: Landlock lets it open that by its descriptor, as it does what is on no disk.
fn handed_on(content: &[u8]) -> io::Result<File> {
    // Kernels before 6.3 do not know the flag, and later ones may insist on it (vm.memfd_noexec).
    let made = rustix::fs::memfd_create("excluded", MemfdFlags::NOEXEC_SEAL)
        .or_else(|_| rustix::fs::memfd_create("excluded", MemfdFlags::empty()))?;
    let file = File::from(made);
    file.write_all_at(content, 0)?;
    Ok(file)
}

/// What all files below `root` come to, in bytes.
fn size_of(root: &Tree) -> io::Result<u64> {
    let mut size = 0;
    root.walk(|_, _, _, found| {
        if FileType::from_raw_mode(found.st_mode) != FileType::Directory {
            size += u64::try_from(found.st_size).unwrap_or(0);
        }
        Ok(())
    })?;
    Ok(size)
}

/// How many bytes a program has read so far, by proc(5).
fn has_read(child: &Child) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{}/io", child.id())).ok()?;
    text.lines().find_map(|line| line.strip_prefix("rchar: ")?.parse().ok())
}

/// mksquashfs would walk into what is mounted, and never come back from /proc.
fn nothing_is_mounted_below(image_root: &Path, attempted: &str) -> Result<()> {
    match mounts_below(image_root)?.first() {
        Some(mount) => Err(Error::new(attempted)
            .because(format!("something is mounted on {}", mount.display()))
            .advise("unmount it: packing would walk into it")),
        None => Ok(()),
    }
}

/// Who has its root or working folder there may still write.
fn nobody_stands_in(image_root: &Path, attempted: &str) -> Result<()> {
    let stands = |entry: &Entry| {
        let link = |name: &str| std::fs::read_link(format!("/proc/{}/{name}", entry.pid)).ok();
        ["cwd", "root"].into_iter().filter_map(link).any(|path| path.starts_with(image_root))
    };
    match Entry::all().into_iter().find(|e| e.pid != nix::unistd::getpid() && stands(e)) {
        Some(entry) => Err(Error::new(attempted)
            .because(format!("process {} ({}) stands in it", entry.pid, entry.name))
            .advise("end it first: what it writes would be packed in part")),
        None => Ok(()),
    }
}

/// What mksquashfs may take: a share of what the container has, and not of what the node has.
fn memory() -> u64 {
    share_of_memory(all_memory())
}

fn share_of_memory(all: Option<u64>) -> u64 {
    (all.unwrap_or(0) / MEMORY.1).max(MEMORY.0)
}

/// Every set of extended attributes, file capabilities among them, is in the squashfs: it keeps each set once, and counts them.
fn attributes_are_kept(image_root: &Tree, squashfs: &File, attempted: &str) -> Result<()> {
    let mut sets = HashSet::new();
    let emptied = sparse_logs(image_root, &[]);
    let collected = image_root.walk(|_, folder, name, found| {
        let is_emptied = |(_, log): &(String, Stat)| (log.st_dev, log.st_ino) == (found.st_dev, found.st_ino);
        if emptied.iter().any(is_emptied) { Ok(()) } else { collect_attributes(&folder.path().join(name), &mut sets) }
    });
    collected.attempt(|| attempted)?;
    let kept = attribute_sets(squashfs).attempt(|| "read the packed image")?;
    if kept == sets.len() as u64 {
        return Ok(());
    }
    Err(Error::new(attempted)
        .because(format!("it has {} different sets of extended attributes, and the squashfs {kept}", sets.len())))
}

type Attributes = Vec<(Vec<u8>, Vec<u8>)>;

fn collect_attributes(path: &Path, sets: &mut HashSet<Attributes>) -> io::Result<()> {
    let mut names = [0; 4096];
    let length = match rustix::fs::llistxattr(path, &mut names[..]) {
        // No attributes, or a file system that has none.
        Ok(0) | Err(rustix::io::Errno::NOTSUP) => return Ok(()),
        other => other?,
    };
    let mut set = Attributes::new();
    for name in names[..length].split(|&b| b == 0).filter(|n| KEPT.iter().any(|kept| n.starts_with(kept.as_bytes()))) {
        let mut value = vec![0; 65536];
        let name_text = OsStr::from_bytes(name);
        let length = rustix::fs::lgetxattr(path, name_text, &mut value[..])?;
        value.truncate(length);
        set.push((name.to_owned(), value));
    }
    if !set.is_empty() {
        set.sort();
        sets.insert(set);
    }
    Ok(())
}

/// How many sets a squashfs has: its superblock says at byte 56 where their table is, and that how many at its byte 8.
fn attribute_sets(file: &File) -> io::Result<u64> {
    let mut number = [0; 8];
    file.read_exact_at(&mut number, 56)?;
    let table = u64::from_le_bytes(number);
    if table == u64::MAX {
        return Ok(0);
    }
    let mut count = [0; 4];
    file.read_exact_at(&mut count, table + 8)?;
    Ok(u32::from_le_bytes(count).into())
}

/// How the packed image is made.
#[derive(Debug, Clone)]
pub(crate) struct Packing {
    /// `IMAGE_COMPRESSION`, one of [`COMPRESSIONS`]; the source's or the default if there is none.
    pub(crate) compression: Option<&'static str>,
    /// `SOURCE_DATE_EPOCH`: the time that all in the image gets, in seconds.
    pub(crate) epoch: Option<u64>,
}

/// Compressions of the packed image.
pub const COMPRESSIONS: [&str; 4] = ["gzip", "zstd", "xz", "none"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_a_quarter_of_the_least_that_limits_it() {
        assert_eq!(share_of_memory(Some(8 << 30)), 2 << 30);
        assert_eq!(share_of_memory(Some(100 << 20)), 64 << 20);
        assert_eq!(share_of_memory(None), 64 << 20);
        assert!(memory() >= 64 << 20);
    }
}
