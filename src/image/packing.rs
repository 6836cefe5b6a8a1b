//! Packing of an image root into a squashfs.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::error::{Attempt, Error, Result};
use crate::image::access_list;
use crate::image::exclude::{self, Pattern};
use crate::image::holes::{self, Holes, sparse_logs};
use crate::image::kind::{self, Kind};
use crate::image::packer::{self, Order};
use crate::image::times::OutOfRange;
use crate::image::unchanged::Source;
use crate::printable::listed;
use crate::sys::file_kind::FileKind;
use crate::sys::memory;
use crate::sys::named;
use crate::sys::process::{self, Entry};
use crate::sys::tree::Tree;
use crate::transfer::checksum::sha256_of_file;
use crate::transfer::confinement::{Confined, STDIN};
use crate::transfer::progress::{Progress, parts_in_words};
use crate::transfer::{Work, installed};
use crate::volume::mounts_below::refuse_mounts_below;
use crate::volume::open_tree;

/// Minimum memory for mksquashfs in bytes, and the divisor that gives its share of the available memory: a quarter,
/// like mksquashfs's own default.
const MEMORY: (u64, u64) = (64 << 20, 4);

const DEFAULT_COMPRESSION: &str = "gzip";

/// Directory in which kiwi leaves its description of the image.
const KIWI: &str = "image";
const KIWI_DESCRIPTION: &str = "image/config.xml";

/// Prefixes of extended attributes that a squashfs can store.
const KEPT: [&str; 3] = ["user.", "trusted.", "security."];
/// Start of mksquashfs's message about an extended attribute with another prefix (POSIX ACLs).
const NOT_KEPT: &str = "Unrecognised xattr prefix ";

/// Maximum padding in bytes after a squashfs that is published unchanged. mksquashfs pads to 4 KiB; other tools pad to
/// a device's block size.
const PADDING: u64 = 1 << 20;

/// Location of a packed image.
pub(crate) struct Archive<'a> {
    /// Directory of the file.
    pub(crate) directory: &'a Tree,
    /// Name in that directory.
    pub(crate) name: &'a str,
}

impl Archive<'_> {
    /// Opens an archive that exists.
    pub(crate) fn open(&self) -> Result<File> {
        self.directory
            .open_regular(self.name, OFlags::RDONLY | OFlags::NOFOLLOW)
            .attempt(|| format!("open {}", self.shown()))
    }

    /// Opens a squashfs that is published unchanged and that another program may have packed. It must be complete, have
    /// nothing after it but padding, and be no larger than its file system: a sparse file can claim any size, and all
    /// of it would be uploaded.
    pub(crate) fn open_squashfs(&self) -> Result<File> {
        let file = self.open()?;
        let shown = self.shown();
        let attempted = || format!("use {shown} as an image");
        let Kind::Squashfs = kind::kind_of_file(&file, &shown, PADDING)? else {
            return Err(Error::new(attempted()).because("it is not a squashfs"));
        };
        let size = file.metadata().attempt(attempted)?.len();
        let disk = rustix::fs::fstatvfs(&file).attempt(attempted)?;
        let holds = disk.f_blocks.saturating_mul(disk.f_frsize);
        // Some file systems report no size.
        if holds > 0 && size > holds {
            return Err(
                Error::new(attempted()).because(format!("it has {size} bytes, but its file system only {holds}"))
            );
        }
        Ok(file)
    }

    /// Refuses a directory in which no file can be created.
    pub(crate) fn check_place(&self, called: &str) -> Result<()> {
        match self.directory.create_nameless() {
            // On a file system without O_TMPFILE, the test file has a name, and another run is creating it right now.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(e) => Err(Error::bad_input(format!(
                "{called} is '{}': expected a path where a file can be created: {e}",
                self.shown()
            ))),
            Ok(_) => Ok(()),
        }
    }

    /// Creates and locks the `.part` file, into which the image is written before it gets the archive's name. While
    /// another run packs into the same archive, waits for its lock, for at most `patience`. Replaces a `.part` file
    /// that a killed run has left behind or that other users can lock.
    pub(crate) fn create_part(&self, work: &Work, patience: Duration) -> Result<File> {
        let (directory, name) = (self.directory, self.part());
        let attempted = || format!("create {}.part", self.shown());
        let identity = |found: Stat| (found.st_dev, found.st_ino);
        let is_named = |file: &File| -> io::Result<bool> {
            Ok(directory.look(&name)?.map(identity) == Some(identity(rustix::fs::fstat(file)?)))
        };
        // Other users cannot open a file with this owner and mode, so none of them can hold its lock.
        let is_own = |file: &File| {
            let user = rustix::process::geteuid().as_raw();
            rustix::fs::fstat(file)
                .is_ok_and(|found| found.st_uid == user && found.st_mode & 0o066 == 0 && found.st_nlink <= 1)
        };
        let began = Instant::now();
        loop {
            work.heed()?;
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
            let (file, is_new) = match directory.open_at(&name, flags, Mode::from_raw_mode(0o600)) {
                Ok(file) => (file.into(), true),
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e).attempt(attempted),
                Err(_) => match directory.open_regular(&name, OFlags::RDWR | OFlags::NOFOLLOW) {
                    Ok(file) if is_own(&file) => (file, false),
                    // Another run has just renamed this file to the archive's name. Open the file that has the `.part`
                    // name now.
                    Ok(file) if !is_named(&file).attempt(attempted)? => continue,
                    Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                    _ => {
                        // The file is another user's, or not a regular file.
                        directory.remove(&name).attempt(attempted)?;
                        continue;
                    }
                },
            };
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) if began.elapsed() < patience => std::thread::sleep(LOCK_AGAIN),
                Err(Errno::WOULDBLOCK) => {
                    let refused = Error::new(attempted()).because("another run is packing into it");
                    return Err(refused.advise("wait until that run has ended, or name another archive"));
                }
                // This run now has the lock, or the file system has no locks. Start over if the name has come to lead
                // to another file.
                _ if !is_named(&file).attempt(attempted)? => {}
                _ if is_new => return Ok(file),
                _ => drop(directory.remove(&name).attempt(attempted)?),
            }
        }
    }

    /// Name of the file that the image is written to before it gets its own name.
    pub(crate) fn part(&self) -> String {
        format!("{}.part", self.name)
    }

    /// Current path, for messages.
    pub(crate) fn shown(&self) -> String {
        self.directory.shown().join(self.name).display().to_string()
    }
}

/// Opens the directory of an output file, once, and returns it with the file's name. `called` is the file's name in
/// messages.
pub(crate) fn output(file: &Path, called: &str) -> Result<(Tree, String)> {
    let file = std::path::absolute(file).attempt(|| format!("find {}", file.display()))?;
    let refuse = |expected| Err(Error::bad_input(format!("{called} is '{}': expected {expected}", file.display())));
    let (Some(above), Some(name)) = (file.parent(), file.file_name().and_then(OsStr::to_str)) else {
        return refuse("a file");
    };
    let above =
        named::resolve(above).map_err(|e| Error::bad_input(format!("{called} is '{}': {e}", file.display())))?;
    if above == Path::new("/dev") {
        // Renaming the new file into place would replace the machine's /dev/null.
        return refuse("a file outside /dev");
    }
    let tree = open_tree(&above)?;
    if tree.look(name).is_ok_and(|found| found.is_some_and(|found| FileKind::of(&found) == FileKind::Directory)) {
        return refuse("a file, found a directory");
    }
    Ok((tree, name.to_owned()))
}

/// Checks early that an output file, written only when all work is done, can be created.
pub(crate) fn check_output(file: &Path, called: &str) -> Result<()> {
    let (directory, name) = output(file, called)?;
    Archive { directory: &directory, name: &name }.check_place(called)
}

/// A packed image.
pub(crate) struct Packed {
    /// The file. The name under which it was written may lead to another file by now.
    pub(crate) file: File,
    /// [`State`](crate::image::state::State) of the image root as it was packed, if the packer has reported it.
    pub(crate) state: Option<String>,
    /// SHA-256 of the file, in hexadecimal digits.
    pub(crate) sha256: String,
}

/// Packs `image_root` into the file `to`, without the paths that `exclude` matches. The file appears under its name
/// only when it is complete. Our own packer copies from `source` what is unchanged.
pub(crate) fn pack(
    work: &Work,
    image_root: &Tree,
    to: &Archive,
    packing: &Packing,
    exclude: &[Pattern],
    source: Option<&Source>,
) -> Result<Packed> {
    let shown = image_root.shown();
    let attempted = format!("pack {}", shown.display());
    refuse_mounts_below(&shown, &attempted, "packing")?;
    no_process_is_inside(&shown, &attempted)?;
    let excluded = exclude::find(image_root, exclude).attempt(|| attempted.clone())?;
    if excluded.is_all {
        let why = "--exclude matches everything in it";
        return Err(Error::new(attempted).because(why).advise("name patterns that match less"));
    }
    for pattern in &excluded.useless {
        tracing::warn!("--exclude '{pattern}' matches nothing in the image");
    }
    let part = to.part();
    let (file, packed) = match packing.packer {
        Packer::Mksquashfs => {
            let narrowed = look_through(image_root, &excluded.paths, packing.epoch.is_none(), &attempted)?;
            let file = to.create_part(work, TIME_TO_UNLOCK)?;
            let paths = (&*excluded.paths, &*narrowed);
            let packed = squash(work, image_root, (&file, to.directory), packing, paths, &attempted);
            let is_checked = exclude.is_empty();
            let checked = |()| if is_checked { attributes_are_kept(image_root, &file, &attempted) } else { Ok(()) };
            let packed = packed.and_then(checked).map(|()| None);
            (file, packed)
        }
        Packer::Own => {
            let order = order(image_root, packing, &excluded.paths);
            let file = to.create_part(work, TIME_TO_UNLOCK)?;
            let packed = packer::pack(work, image_root, (&file, to.directory), &order, source, &attempted);
            (file, packed.map(Some))
        }
    };
    if let Ok(Some(outcome)) = &packed {
        let [all, taken, compressed] = parts_in_words(outcome.length, outcome.taken);
        tracing::info!("packed {all}, of which {taken} were taken over from the source and {compressed} compressed");
    }
    let result = packed
        .and_then(|outcome| {
            let sha256 = write_through(work, &file, to)?;
            Ok((outcome.and_then(|outcome| outcome.state), sha256))
        })
        .and_then(|told| {
            source.map_or(Ok(()), Source::drop_squashfs).attempt(|| "remove the source image")?;
            to.directory.rename(&part, to.name).attempt(|| format!("rename {}.part", to.shown()))?;
            Ok(told)
        });
    if result.is_err() {
        let _ = to.directory.remove(&part);
    }
    result.map(|(state, sha256)| Packed { file, state, sha256 })
}

/// Syncs `file`, which is to become `archive`, to the disk, and computes its SHA-256 at the same time.
fn write_through(work: &Work, file: &File, archive: &Archive) -> Result<String> {
    std::thread::scope(|scope| {
        let syncing = scope.spawn(|| file.sync_all());
        let sha256 = sha256_of_file(work, file, &archive.shown());
        let synced = syncing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        synced.attempt(|| format!("write {}.part", archive.shown()))?;
        sha256
    })
}

/// Collects the instructions for our own packer.
fn order(image_root: &Tree, packing: &Packing, excluded: &[PathBuf]) -> Order {
    let emptied = logs_to_empty(image_root, excluded);
    for (name, found) in &emptied {
        tell_emptied(name, found);
    }
    let kiwi = owner_of_kiwi_directory(image_root).map(|_| (PathBuf::from(KIWI), 0o700));
    Order {
        compression: packing.compression,
        epoch: packing.epoch,
        memory: memory::available().map_or(MEMORY.0, |all| all / MEMORY.1),
        left_out: excluded.to_vec(),
        emptied: emptied.into_iter().map(|(name, _)| name.into()).collect(),
        modes: kiwi.into_iter().collect(),
        // The packer does not read excluded entries, so its state would lack them.
        tells_state: excluded.is_empty(),
    }
}

/// The sparse logs of the image that are not excluded anyway.
fn logs_to_empty(image_root: &Tree, excluded: &[PathBuf]) -> Vec<(String, Stat)> {
    let is_packed = |(name, _): &(String, Stat)| !excluded.iter().any(|path| Path::new(name).starts_with(path));
    sparse_logs(image_root).into_iter().filter(is_packed).collect()
}

fn tell_emptied(name: &str, found: &Stat) {
    tracing::warn!("/{name} is packed empty: nearly all of its {} bytes are holes", found.st_size);
}

fn squash(
    work: &Work,
    image_root: &Tree,
    (part, volume): (&File, &Tree),
    packing: &Packing,
    (excluded, narrowed): (&[PathBuf], &[Narrowed]),
    attempted: &str,
) -> Result<()> {
    let mut mksquashfs = Command::new("mksquashfs");
    // The image root and the output are passed as descriptors: on a shared volume the names may lead elsewhere by the
    // time mksquashfs opens them.
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
    if let Some(owner) = owner_of_kiwi_directory(image_root) {
        mksquashfs.args(["-p", &format!("{KIWI} m 700 {owner}")]);
    }
    let emptied = logs_to_empty(image_root, excluded);
    for (name, found) in &emptied {
        let (mode, user, group) = (found.st_mode & 0o7777, found.st_uid, found.st_gid);
        tell_emptied(name, found);
        mksquashfs.args(["-p", &format!("{name} f {mode:o} {user} {group} true")]);
    }
    let is_defined = |path: &Path| path == Path::new(KIWI) || emptied.iter().any(|(name, _)| Path::new(name) == path);
    let (definitions, further) = definitions(narrowed.iter().filter(|narrowed| !is_defined(&narrowed.path)));
    let definitions = (!definitions.is_empty()).then(|| packer::inheritable(&definitions)).transpose();
    let definitions = definitions.attempt(|| attempted)?;
    if let Some(definitions) = &definitions {
        mksquashfs.args(["-pf", &format!("/proc/self/fd/{}", definitions.as_raw_fd())]);
    }
    for definition in further {
        mksquashfs.arg("-p").arg(definition);
    }
    let left_out = excluded.iter().map(PathBuf::as_path).chain(emptied.iter().map(|(name, _)| Path::new(name)));
    let (list, arguments) = exclude::listed(left_out);
    // The list must stay open until mksquashfs has ended.
    let list = (!list.is_empty()).then(|| packer::inheritable(&list)).transpose().attempt(|| attempted)?;
    if let Some(list) = &list {
        mksquashfs.args(["-wildcards", "-ef", &format!("/proc/self/fd/{}", list.as_raw_fd())]);
    }
    if !arguments.is_empty() {
        mksquashfs.args(["-wildcards", "-e"]).args(arguments);
    }
    // Only a terminal shows the total, so do not spend time on counting it for others.
    let total = if io::stderr().is_terminal() { Some(size_of(image_root).attempt(|| attempted)?) } else { None };
    let mut progress = Progress::begin("packing", total);
    let size = || part.metadata().map_or(0, |found| found.len());
    let look = |child: &Child| progress.between(has_read(child).unwrap_or(0), size());
    let confined = Confined::packing(image_root, part, volume)?;
    let said = work.succeed(attempted, &mut mksquashfs, Some(&confined), look)?;
    let (mut not_kept, said): (Vec<_>, Vec<_>) = said.lines().partition(|line| line.starts_with(NOT_KEPT));
    // mksquashfs repeats the message for every file.
    not_kept.sort_unstable();
    not_kept.dedup();
    for line in not_kept {
        tracing::warn!("mksquashfs: {line}: a squashfs cannot store it");
    }
    if !said.is_empty() {
        // mksquashfs skips what it cannot read, with a message and exit code 0.
        return Err(Error::new(attempted).because(listed(&said)));
    }
    Ok(())
}

/// Owner of /image, if kiwi left its description of the image there. The description may hold passwords of
/// repositories, so the packed image gives only the owner access.
fn owner_of_kiwi_directory(image_root: &Tree) -> Option<String> {
    let is = |path: &str, wanted: FileType| {
        let found = image_root.handle_without_links(path).and_then(|fd| Ok(rustix::fs::fstat(fd)?));
        found.ok().filter(|found| FileType::from_raw_mode(found.st_mode) == wanted)
    };
    let found = is(KIWI, FileType::Directory).filter(|_| is(KIWI_DESCRIPTION, FileType::RegularFile).is_some());
    found.map(|found| format!("{} {}", found.st_uid, found.st_gid))
}

/// A file that is packed with fewer rights for its group, see [`access_list::narrowed`].
struct Narrowed {
    path: PathBuf,
    /// Mode with the rights of the group's entry, limited by the mask.
    mode: u32,
    user: u32,
    group: u32,
}

impl Narrowed {
    fn of(path: &Path, directory: &Tree, name: &OsStr, found: &Stat) -> Option<Self> {
        if path.as_os_str().is_empty() {
            return None;
        }
        let mode = access_list::narrowed(&directory.path().join(name), found)?;
        Some(Self { path: path.to_owned(), mode, user: found.st_uid, group: found.st_gid })
    }
}

/// Definitions for mksquashfs that set modes: the content of a file (`-pf`), and arguments (`-p`) for definitions that
/// do not fit into a line of that file.
fn definitions<'a>(narrowed: impl Iterator<Item = &'a Narrowed>) -> (Vec<u8>, Vec<OsString>) {
    let (mut file, mut arguments) = (Vec::new(), Vec::new());
    for Narrowed { path, mode, user, group } in narrowed {
        let name = path.as_os_str().as_bytes();
        // mksquashfs takes any character after a backslash literally.
        let mut definition: Vec<u8> = name.iter().flat_map(|&byte| [b'\\', byte]).collect();
        definition.extend(format!(" m {mode:o} {user} {group}").bytes());
        if name.contains(&b'\n') || definition.len() > LONGEST_DEFINITION {
            arguments.push(OsString::from_vec(definition));
        } else {
            file.extend(definition);
            file.push(b'\n');
        }
    }
    (file, arguments)
}

/// Maximum length of a definition in a file for mksquashfs, in bytes: a line of the file holds at most 16 KiB.
const LONGEST_DEFINITION: usize = 16_000;

/// Refuses holes that would keep mksquashfs busy for hours, and warns about those that take minutes. `excluded` paths
/// do not count. Returns the files that are packed with fewer rights for their group, and warns about them; if the
/// image `keeps_times`, also warns about times that a squashfs cannot store.
fn look_through(image_root: &Tree, excluded: &[PathBuf], keeps_times: bool, attempted: &str) -> Result<Vec<Narrowed>> {
    let mut out_of_range = OutOfRange::default();
    let mut narrowed = Vec::new();
    let mut holes = Holes::new(&sparse_logs(image_root));
    let walked = image_root.walk(|path, directory, name, found| {
        if !excluded.iter().any(|left_out| path.starts_with(left_out)) {
            narrowed.extend(Narrowed::of(path, directory, name, found));
            holes.add(path, found);
            if keeps_times {
                out_of_range.add(path, found);
            }
        }
        Ok(())
    });
    walked.attempt(|| attempted)?;
    if let Some(why) = holes.refusal() {
        return Err(Error::new(attempted).because(why).advise(holes::ADVICE));
    }
    if let Some((held, names)) = holes.found() {
        tracing::warn!("sparse files ({held} GiB of holes) take long to pack: {names}");
    }
    out_of_range.tell("a wrong time (IMAGE_PACKER=ims-sshd takes the nearest)");
    if !narrowed.is_empty() {
        let shown = narrowed.iter().map(|Narrowed { path, mode, .. }| format!("/{} ({mode:o})", path.display()));
        packer::tell_narrowed(&shown.collect::<Vec<_>>());
    }
    Ok(narrowed)
}

/// Size of all files below `root`, in bytes.
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

/// Bytes that a process has read so far, according to /proc/PID/io.
fn has_read(child: &Child) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{}/io", child.id())).ok()?;
    text.lines().find_map(|line| line.strip_prefix("rchar: ")?.parse().ok())
}

/// Names of processes that pack: mksquashfs, and the packer's child before (`exe`) and after it has named itself.
const PACKING: [&str; 3] = ["mksquashfs", "exe", packer::NAME];

/// Time for the packer of a killed run to end: the kernel kills the packer along with its run, which takes a while.
const TIME_TO_END: Duration = Duration::from_secs(10);

/// Time for which locking an archive is retried: the lock of a killed run's packer is released a moment after the
/// packer has ended.
const TIME_TO_UNLOCK: Duration = Duration::from_secs(1);
/// Interval between attempts to lock an archive.
const LOCK_AGAIN: Duration = Duration::from_millis(20);

/// Refuses to pack while a process has its root or working directory in the image root, since it may still write there.
fn no_process_is_inside(image_root: &Path, attempted: &str) -> Result<()> {
    match inside(image_root, &PACKING) {
        Some(entry) => Err(Error::new(attempted)
            .because(format!("process {} ({}) has its root or working directory in it", entry.pid, entry.name))
            .advise("end it first: its unfinished writes would be packed")),
        None => Ok(()),
    }
}

/// Waits for processes that a killed run has left behind in `directory`, then returns one that is still there, if any;
/// see [`process::inside`].
pub(crate) fn inside(directory: &Path, programs: &[&str]) -> Option<Entry> {
    process::inside(directory, programs, TIME_TO_END, |entry| {
        let (pid, name, shown) = (entry.pid, &entry.name, directory.display());
        tracing::info!("waiting for process {pid} ({name}), which a killed run has left in {shown}");
    })
}

/// Memory for mksquashfs: a share of the container's limit, not of the node's memory.
fn memory() -> u64 {
    share_of_memory(memory::available())
}

fn share_of_memory(all: Option<u64>) -> u64 {
    (all.unwrap_or(0) / MEMORY.1).max(MEMORY.0)
}

/// Verifies that the squashfs has as many sets of extended attributes (file capabilities among them) as there are
/// distinct sets in the image root: a squashfs stores each set once, and counts the sets.
fn attributes_are_kept(image_root: &Tree, squashfs: &File, attempted: &str) -> Result<()> {
    let mut sets = HashSet::new();
    // mksquashfs packs new empty files in place of the sparse logs, without their attributes.
    let emptied = sparse_logs(image_root);
    let collected = image_root.walk(|_, parent, name, found| {
        let is_emptied = |(_, log): &(String, Stat)| (log.st_dev, log.st_ino) == (found.st_dev, found.st_ino);
        if emptied.iter().any(is_emptied) { Ok(()) } else { collect_attributes(&parent.path().join(name), &mut sets) }
    });
    collected.attempt(|| attempted)?;
    let kept = attribute_sets(squashfs).attempt(|| "read the packed image")?;
    if kept == sets.len() as u64 {
        return Ok(());
    }
    Err(Error::new(attempted)
        .because(format!("it has {} different sets of extended attributes, and the squashfs has {kept}", sets.len())))
}

type Attributes = Vec<(Vec<u8>, Vec<u8>)>;

fn collect_attributes(path: &Path, sets: &mut HashSet<Attributes>) -> io::Result<()> {
    let mut names = [0; 4096];
    let length = match rustix::fs::llistxattr(path, &mut names[..]) {
        // No attributes, or a file system without any.
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

/// Number of attribute sets in a squashfs. Byte 56 of the superblock has the position of the attribute table, and byte
/// 8 of that table the number.
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

/// Settings of the packed image.
#[derive(Debug, Clone)]
pub(crate) struct Packing {
    /// `IMAGE_COMPRESSION`, one of [`COMPRESSIONS`]; `None` means the compression of the source or, without a source,
    /// the default.
    pub(crate) compression: Option<&'static str>,
    /// `SOURCE_DATE_EPOCH`: the time given to all files of the image, in seconds since 1970.
    pub(crate) epoch: Option<u64>,
    /// `IMAGE_PACKER`: the program that packs.
    pub(crate) packer: Packer,
    /// `--from-scratch`: all files are compressed anew, also those that did not change.
    pub(crate) is_from_scratch: bool,
}

/// The program that packs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packer {
    /// Our own packer, which copies unchanged files from the source.
    Own,
    /// mksquashfs, which compresses everything.
    Mksquashfs,
}

impl Packer {
    /// Fails early if the packer is a separate program that is not installed.
    pub(crate) fn check(self) -> Result<()> {
        if self == Self::Mksquashfs { installed("mksquashfs") } else { Ok(()) }
    }
}

/// Values of `IMAGE_PACKER`.
pub(crate) const PACKERS: [(&str, Packer); 2] = [("ims-sshd", Packer::Own), ("mksquashfs", Packer::Mksquashfs)];

/// Values of `IMAGE_COMPRESSION`.
pub const COMPRESSIONS: [&str; 4] = ["gzip", "zstd", "xz", "none"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mksquashfs_gets_a_quarter_of_the_memory_limit() {
        assert_eq!(share_of_memory(Some(8 << 30)), 2 << 30);
        assert_eq!(share_of_memory(Some(100 << 20)), 64 << 20);
        assert_eq!(share_of_memory(None), 64 << 20);
        assert!(memory() >= 64 << 20);
    }
}
