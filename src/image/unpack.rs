//! Unpacks an image into a directory, or mounts it below an overlay.

use std::ffi::OsStr;
use std::fs::{File, Permissions};
use std::io::{self, BufReader, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use nix::unistd::Pid;
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use crate::error::{Advise, Attempt, Error, Result};
use crate::image::cpio;
use crate::image::kind::{self, Content, Kind, Opened};
use crate::image::layers::{self, Layer};
use crate::image::tar::{self, Fault, Passed, Plain};
use crate::printable::Printable;
use crate::printable::listed;
use crate::sys::attributes::Node;
use crate::sys::loops::Loop;
use crate::sys::mounts::{self, Detached};
use crate::sys::process::{Entry, numbers};
use crate::sys::tree::Tree;
use crate::transfer::checksum::Expected;
use crate::transfer::confinement::{self, Confined, STDIN};
use crate::transfer::progress::Progress;
use crate::transfer::{TICK, Work};
use crate::volume::mounts_below::refuse_mounts_below;

/// Unpacks `archive` into the new directory `name` of `volume`: copies a directory, merges the layers of a saved
/// container image. Returns the open directory, since its name may lead to another one by the time the caller uses it.
pub(crate) fn unpack(work: &Work, archive: &Opened, volume: &Tree, name: &str) -> Result<Tree> {
    confinement::refuse_to_lose_attributes()?;
    if archive.file().is_none() {
        refuse_mounts(archive)?;
    }
    let before = used(volume);
    let mut progress = Progress::begin("unpacking", None);
    let mut look = |_: &Child| progress.at(used(volume).saturating_sub(before));
    if let Content::Directory(tree) = &archive.content
        && let Some(layers) = layers::layers(tree)?
    {
        return unpack_layers(work, (tree, false), layers, (volume, name), look);
    }
    let target = make(volume, name, ROOT_MODE)?;
    if let Content::Directory(tree) = &archive.content {
        copy(work, archive, tree, &target, look)?;
        return Ok(target);
    }
    match archive.kind()? {
        None => {}
        Some(Kind::Squashfs) => {
            let mut unsquashfs = Command::new("unsquashfs");
            // unsquashfs needs -force because the directory exists.
            unsquashfs.args(["-quiet", "-no-progress", "-force", "-dest", ".", STDIN]);
            extract(work, archive, unsquashfs, archive.as_fd(), &target, look)?;
        }
        Some(Kind::Tar(compressed)) => {
            unpack_tar(work, archive, compressed, &target, &mut look)?;
            if let Some(layers) = layers::layers(&target)? {
                let saved = Removed::beside(volume, name, ".saved");
                volume
                    .rename(name, &saved.name)
                    .attempt(|| format!("rename {}", volume.shown().join(name).display()))?;
                return unpack_layers(work, (&target, true), layers, (volume, name), look);
            }
        }
        Some(Kind::Cpio(compressed)) => unpack_cpio(work, archive, compressed, &target)?,
    }
    Ok(target)
}

/// Mode of an image's root if its archive has no entry for it: 'podman export' writes none.
const ROOT_MODE: u32 = 0o755;

/// Creates the directory in which the confined unpacker works. That directory and the archive are all that the unpacker
/// can reach. It keeps `mode` if the archive has no entry for its root.
fn make(volume: &Tree, name: &str, mode: u32) -> Result<Tree> {
    let attempted = || format!("create the directory {}", volume.shown().join(name).display());
    let root = volume.make_private(name).attempt(attempted)?;
    rustix::fs::chmodat(&root, ".", Mode::from_raw_mode(mode), AtFlags::empty()).attempt(attempted)?;
    Ok(root)
}

/// Refuses to copy a directory below which something is mounted.
fn refuse_mounts(archive: &Opened) -> Result<()> {
    refuse_mounts_below(&archive.shown, &format!("copy {}", archive.shown.display()), "copying")
}

/// Copies the directory `tree`, but nothing that is mounted below it while it is being copied.
fn copy(work: &Work, archive: &Opened, tree: &Tree, target: &Tree, look: impl FnMut(&Child)) -> Result<()> {
    let mut cp = Command::new("cp");
    cp.args(["-aT", "--reflink=auto"]);
    // Copy from a detached copy of the directory's own mount, in which later mounts do not appear. Making it needs
    // CAP_SYS_ADMIN, which a pod may lack.
    let alone = Detached::copy_of_fd(tree, false, MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID);
    // Several device numbers without a mount mean subvolumes, whose content --one-file-system would leave out.
    if alone.is_err() && has_one_device(tree).attempt(|| format!("copy {}", archive.shown.display()))? {
        cp.arg("--one-file-system");
    }
    // The trailing dot makes cp follow the link STDIN.
    cp.arg(Path::new(STDIN).join(".")).arg(".");
    let source = alone.as_ref().map_or(tree.as_fd(), AsFd::as_fd);
    extract(work, archive, cp, source, target, look)?;
    // Without the detached copy, a mount may have hidden files while they were being copied.
    if alone.is_err() { refuse_mounts(archive) } else { Ok(()) }
}

/// Returns whether all directories of a tree have the same device number.
fn has_one_device(tree: &Tree) -> io::Result<bool> {
    let device = rustix::fs::fstat(tree)?.st_dev;
    let mut is_one = true;
    tree.walk(|_, _, _, found| {
        is_one &= found.st_dev == device || FileType::from_raw_mode(found.st_mode) != FileType::Directory;
        Ok(())
    })?;
    Ok(is_one)
}

/// Runs a program that reads `input`, the content of `archive`, from its standard input and unpacks it into `target`.
/// Keeps no copy of `input` open: if it is a pipe, its writer must fail with EPIPE when the program ends.
fn extract(
    work: &Work,
    archive: &Opened,
    mut command: Command,
    input: BorrowedFd,
    target: &Tree,
    look: impl FnMut(&Child),
) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let confined = Confined::unpacking(target, input, archive.size())?;
    let said = work.succeed(&format!("unpack {}", archive.shown.display()), &mut command, Some(&confined), look)?;
    if !said.is_empty() {
        tracing::warn!("{name}: {}", listed(&said.lines().collect::<Vec<_>>()));
    }
    Ok(())
}

/// A directory of ours, removed when dropped.
struct Removed<'a> {
    volume: &'a Tree,
    name: String,
}

impl<'a> Removed<'a> {
    /// Reserves a name beside the directory `name`, and removes anything that has that name.
    fn beside(volume: &'a Tree, name: &str, ending: &str) -> Self {
        let place = Self { volume, name: format!("{name}{ending}") };
        place.remove();
        place
    }

    fn remove(&self) {
        let _ = self.volume.remove_whole(OsStr::new(&self.name));
    }
}

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Start of tar's message about a hard link to a file that is missing.
const TAR_CANNOT_LINK: &str = "Cannot hard link to";

/// Merges the layers. `private` says that no other user can reach `saved`, whoever owns it.
fn unpack_layers(
    work: &Work,
    (saved, private): (&Tree, bool),
    layers: Vec<Layer>,
    (volume, name): (&Tree, &str),
    mut look: impl FnMut(&Child),
) -> Result<Tree> {
    let root = make(volume, name, ROOT_MODE)?;
    for Layer { path, digest, diff_id } in layers {
        let attempted = || format!("unpack the layer {}", path.display());
        let file = saved.open_regular(&path, OFlags::RDONLY | OFlags::NOFOLLOW).attempt(attempted)?;
        let kind = |file: &File| kind::kind_of_file(file, &path.display().to_string(), u64::MAX);
        // An empty layer has only the two zero blocks that end an archive.
        let is_empty = kind::is_empty_tar(&file).attempt(attempted)?;
        let is_compressed = !is_empty && kind(&file)? != Kind::Tar(None);
        let sha256 = digest.or(diff_id.filter(|_| !is_compressed));
        let expected = Expected { md5: None, sha256 };
        let file = if expected.is_given() {
            let shown = format!("the layer {} of the saved image", path.display());
            expected.check(work, file, &shown, (!private).then_some(volume))?
        } else {
            file
        };
        if kind::is_empty_tar(&file).attempt(attempted)? {
            continue;
        }
        let Kind::Tar(compressed) = kind(&file)? else {
            return Err(Error::new(attempted())
                .because("it is not a tar archive")
                .advise("save the container image again"));
        };
        let began = SystemTime::now();
        let directory = Removed::beside(volume, name, ".layer");
        // A layer without an entry for its root leaves the root as it is.
        let mode = rustix::fs::fstat(&root).attempt(attempted)?.st_mode & 0o7777;
        let tree = make(volume, &directory.name, mode)?;
        let layer = Opened { shown: path.clone(), content: Content::File(file) };
        unpack_tar(work, &layer, compressed, &tree, &mut look).map_err(|error| {
            if !error.to_string().contains(TAR_CANNOT_LINK) {
                return error;
            }
            // Each layer is unpacked alone, so a hard link to a file of an earlier layer has no target.
            let why = "it may have a hard link to a file of an earlier layer, which is not supported";
            error.advise(format!(
                "{why}: make one layer of all ('podman create' and 'podman export', or 'crane export')"
            ))
        })?;
        layers::merge(&tree, &root, began).attempt(attempted)?;
    }
    Ok(root)
}

fn unpack_tar(
    work: &Work,
    archive: &Opened,
    compressed: Option<&str>,
    target: &Tree,
    look: impl FnMut(&Child),
) -> Result<()> {
    let attempted = || format!("unpack {}", archive.shown.display());
    let mut tar = Command::new("tar");
    // tar fails at a member with '..' in its path, and strips the leading '/' of names and hard link targets.
    tar.args(["--extract", "--preserve-permissions", "--numeric-owner", "--acls", "--xattrs", "--xattrs-include=*"]);
    let Some(program) = compressed else {
        let file = from_start(archive)?;
        let checked = tar::check(&mut Plain::new(file), || work.heed().map_err(io::Error::other));
        work.heed()?;
        checked.map_err(|fault| refusal(attempted(), fault))?;
        tar.args(["--file", STDIN]);
        return extract(work, archive, tar, archive.as_fd(), target, look);
    };
    tar.args(["--file", "-"]);
    let (decompressor, decompressed) = Decompressor::start(program, archive, target)?;
    // The archive is decompressed once: the check passes on to tar the bytes that it reads.
    let (input, output) = io::pipe().attempt(attempted)?;
    std::thread::scope(|scope| {
        let (report, result) = mpsc::channel();
        let mut stream = Passed::new(decompressed, output);
        scope.spawn(move || {
            let _ = report.send(tar::check(&mut stream, || Ok(())));
        });
        let extracted = extract(work, archive, tar, input.as_fd(), target, look);
        // If tar has failed, closing the pipe ends the check with EPIPE, and the end of the check does the same to the
        // decompressor.
        drop(input);
        let checked = loop {
            // The check may still be reading a long run of zeros after the end mark, so heed interrupts in the
            // meantime.
            if let Err(interrupted) = work.heed() {
                decompressor.kill();
                return Err(interrupted);
            }
            match result.recv_timeout(TICK) {
                Err(RecvTimeoutError::Timeout) => {}
                checked => break checked.attempt(attempted)?,
            }
        };
        match checked {
            // The output was read to its end, so the exit status covers the checksum at the end of the file.
            Ok(()) | Err(Fault::Cut) => decompressor.end().attempt(attempted)?,
            // The check stopped early, so the decompressor's pipe broke, and its exit status says nothing.
            Err(_) => drop(decompressor.end()),
        }
        match checked {
            Err(Fault::Unread(_)) => extracted.and(checked.map_err(|fault| refusal(attempted(), fault))),
            checked => checked.map_err(|fault| refusal(attempted(), fault)).and(extracted),
        }
    })
}

fn refusal(attempted: String, fault: Fault) -> Error {
    let error = Error::new(attempted);
    match fault {
        Fault::Lossy(why, advice) => error.because(why).advise(advice),
        Fault::Cut => error.because("the tar archive is cut off").advise("copy or fetch it again"),
        Fault::Unread(e) => error.because(e),
    }
}

/// The file of an archive, to be read from its start.
fn from_start(archive: &Opened) -> Result<File> {
    let attempted = || format!("unpack {}", archive.shown.display());
    let file = archive.file().ok_or_else(|| Error::new(attempted()).because("it is a directory"))?;
    let mut file = file.try_clone().attempt(attempted)?;
    file.rewind().attempt(attempted)?;
    Ok(file)
}

/// Maximum number of bytes read of a decompressor's messages.
const MOST_SAID: u64 = 4 << 10;

/// A confined program that decompresses an archive.
struct Decompressor {
    name: String,
    child: Child,
    said: JoinHandle<String>,
}

impl Decompressor {
    /// Starts the decompressor `program`. It reads through the same open file description as `archive`, so the position
    /// of `archive` shows its progress. It may also read `directory`.
    fn start(program: &str, archive: &Opened, directory: &Tree) -> Result<(Self, ChildStdout)> {
        let mut command = Command::new(program);
        command.arg("-dc").stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = Confined::filtering(directory, from_start(archive)?).spawn(&mut command)?;
        let (Some(output), Some(complaints)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(Error::new(format!("run {program}")).because("it has no output"));
        };
        let said = std::thread::spawn(move || {
            let mut said = Vec::new();
            let _ = complaints.take(MOST_SAID).read_to_end(&mut said);
            String::from_utf8_lossy(&said).trim().to_owned()
        });
        Ok((Self { name: program.to_owned(), child, said }, output))
    }

    fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.end();
    }

    /// Waits for the decompressor to end. Its output must have been read to the end, or closed: a full pipe would keep
    /// it from ending.
    fn end(mut self) -> io::Result<()> {
        let status = self.child.wait()?;
        let said = self.said.join().unwrap_or_default();
        let why = match &*said {
            "" => format!("{}: {status}", self.name),
            // Messages of these programs begin with the program's name.
            said => listed(&said.lines().collect::<Vec<_>>()),
        };
        status.success().then_some(()).ok_or_else(|| io::Error::other(why))
    }
}

fn unpack_cpio(work: &Work, archive: &Opened, compressed: Option<&str>, root: &Tree) -> Result<()> {
    let attempted = || format!("unpack {}", archive.shown.display());
    let mut progress = Progress::begin("unpacking", Some(archive.size()));
    let file = from_start(archive)?;
    let position = file.try_clone().attempt(attempted)?;
    let look = || {
        progress.at(rustix::fs::tell(&position)?);
        work.heed().map_err(io::Error::other)
    };
    let unpacked = match compressed {
        None => cpio::unpack(BufReader::with_capacity(1 << 20, file), root, look),
        Some(program) => {
            let (decompressor, output) = Decompressor::start(program, archive, root)?;
            match cpio::unpack(BufReader::with_capacity(1 << 20, output), root, look) {
                // The exit status covers the checksum at the end of the file.
                Ok(()) => decompressor.end(),
                Err(e) => {
                    decompressor.kill();
                    Err(e)
                }
            }
        }
    };
    work.heed()?;
    unpacked.map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => {
            Error::new(attempted()).because("the cpio archive is cut off").advise("copy or fetch it again")
        }
        _ => Error::new(attempted()).because(e),
    })
}

/// Bytes used on the volume.
fn used(volume: &Tree) -> u64 {
    rustix::fs::fstatvfs(volume).map_or(0, |disk| (disk.f_blocks - disk.f_bfree).saturating_mul(disk.f_frsize))
}

// Options that make an overlay behave like a disk. Nobody else can forge a redirect: the upper directory belongs to
// root, and the overlay hides its own attributes from sessions. A redirect in the source has no lower layer to lead to.

/// Allows renaming a directory of the source; without it, rename(2) fails with EXDEV.
pub(crate) const REDIRECT: (&str, &str) = ("redirect_dir", "on");

/// Keeps the names of a file with several hard links together when the file is changed. In return, the kernel refuses
/// an upper directory that was used with another source (ESTALE) or is mounted elsewhere (EBUSY).
pub(crate) const INDEX: (&str, &str) = ("index", "on");

/// Reports one device number for all files, as tar --one-file-system and rsync -x expect.
pub(crate) const ONE_DEVICE: (&str, &str) = ("xino", "on");

/// Switches metacopy off explicitly, because the module's default may be on: an attribute in the source could then give
/// a file the content of another one.
pub(crate) const NO_METACOPY: (&str, &str) = ("metacopy", "off");

/// Overlay options that the kernel dropped: it does so silently if a file system lacks something that an option needs.
fn lacking(image_root: &Path) -> Vec<&'static str> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let is_ours = |line: &&str| mounts::mount_points(line.as_bytes()) == [image_root];
    let options = mounts.lines().rfind(is_ours).and_then(|line| line.rsplit(' ').next()).unwrap_or_default();
    let is_on = |name: &str| match options.split(',').find_map(|option| option.strip_prefix(name)?.strip_prefix('=')) {
        Some(value) => value == "on",
        // The mount table does not show options that equal the module's default.
        None => {
            std::fs::read_to_string(format!("/sys/module/overlay/parameters/{name}")).is_ok_and(|v| v.trim() == "Y")
        }
    };
    [REDIRECT.0, INDEX.0].into_iter().filter(|name| !is_on(name)).collect()
}

fn without(option: &str) -> &'static str {
    match option {
        "index" => "a file with several hard links becomes several files when it is changed",
        _ => "directories of the source cannot be renamed",
    }
}

/// Mount point of a squashfs in an overlay's own directory.
pub(crate) const LOWER: &str = "lower";

/// Upper directory of the overlay, for the changes.
pub(crate) const UPPER: &str = "upper";

/// Work directory of the overlay, which only the kernel uses.
const INNER: &str = "work";
/// Index of changed files with several hard links.
pub(crate) const INDEX_OF_LINKS: &str = "work/index";

/// Time for the kernel to tear down the mounts of a process that has just ended.
const TIME_TO_UNMOUNT: Duration = Duration::from_secs(3);

/// A mounted overlay: the source below, the changes above it.
#[derive(Debug)]
pub(crate) struct Overlay {
    /// Mount point.
    pub(crate) image_root: PathBuf,
    /// The source, unchanged.
    pub(crate) lower: Tree,
    mounted: Vec<PathBuf>,
}

impl Overlay {
    /// Mounts an overlay of `source`, a squashfs or a directory, at `image_root`. `directory` holds the changes, also
    /// those of an earlier mount, with which the overlay continues. Two containers must never mount an overlay of one
    /// `directory` at the same time.
    pub(crate) fn mount(source: &Opened, directory: &Path, image_root: &Path) -> Result<Self> {
        let attempted = || format!("mount {} on {}", source.shown.display(), image_root.display());
        let [squashfs, upper, inner] = [LOWER, UPPER, INNER].map(|name| directory.join(name));
        let first = !upper.exists();
        for made in [directory, &squashfs, &upper, &inner, image_root] {
            std::fs::create_dir_all(made).attempt(|| format!("create the directory {}", made.display()))?;
        }
        // Keep other users out of the directory: setuid programs work in the upper layer, even though the overlay
        // itself is nosuid.
        std::fs::set_permissions(directory, Permissions::from_mode(0o700)).attempt(attempted)?;
        // Users of this machine may see the overlay, so it is nosuid: setuid programs of the image work only inside a
        // jail.
        let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
        let mut mounted_below = Vec::new();
        let lower = match &source.content {
            Content::Directory(tree) if layers::layers(tree)?.is_some() => {
                let saved = Error::new(attempted()).because("it is a saved container image");
                return Err(saved.advise("unpack its layers (--open unpack)"));
            }
            Content::Directory(tree) => tree.as_fd().try_clone_to_owned().map(Tree::from_fd).attempt(attempted)?,
            Content::File(_) if source.kind()? != Some(Kind::Squashfs) => {
                return Err(Error::new(attempted())
                    .because("it is not a squashfs")
                    .advise("unpack it (--open unpack)"));
            }
            Content::File(file) => {
                // A run that was killed, or somebody who unmounted the overlay alone, may have left the squashfs
                // mounted.
                unmount_all(&squashfs)?;
                mount_squashfs(file, &squashfs, attributes)
                    .attempt(attempted)
                    .advise("provide a loop device and CAP_SYS_ADMIN, or unpack the image instead (--open unpack)")?;
                mounted_below.push(squashfs.clone());
                Tree::open(&squashfs).attempt(attempted)?
            }
        };
        let mut overlay = Self { image_root: image_root.to_owned(), lower, mounted: mounted_below };
        // The root of an overlay takes owner, mode and times from the upper directory, so give the upper directory
        // those of the source.
        if first {
            copy_root(&overlay.lower, &upper).attempt(attempted)?;
        }
        // Mount the directory that was opened, even if its path leads elsewhere by now.
        let names = [overlay.lower.path().as_path(), &upper, &inner].map(escape);
        let layers = [("lowerdir", names[0].as_str()), ("upperdir", &names[1]), ("workdir", &names[2])];
        let mount = |further: &[(&'static str, &'static str)]| {
            let options: Vec<_> = layers.iter().chain(further).copied().collect();
            let target = Tree::open(image_root)?;
            Detached::filesystem("overlay", &options, attributes)?.attach(target)
        };
        let is_busy = |e: &io::Error| Errno::from_io_error(e) == Some(Errno::BUSY);
        let began = Instant::now();
        // Wait while the upper directory is busy, instead of mounting it without the index: the kernel would allow
        // that, and each of two runs would see half of the other's changes.
        let mounted = loop {
            match mount(&[REDIRECT, INDEX, ONE_DEVICE, NO_METACOPY]) {
                // The jail of a killed run may still be ending, and no event reports its end.
                Err(e) if is_busy(&e) && began.elapsed() < TIME_TO_UNMOUNT => std::thread::sleep(TIME_TO_UNMOUNT / 300),
                other => break other,
            }
        };
        if mounted.as_ref().is_err_and(is_busy) {
            let holder = process_with(&upper)
                .map_or("another mount, or by a file that is open in one".into(), |entry| {
                    format!("process {} ({})", entry.pid, Printable(&entry.name))
                });
            let error =
                Error::new(attempted()).because(format!("the changes in {} are in use by {holder}", upper.display()));
            return Err(error.advise("end that process, or unmount what it has mounted"));
        }
        mounted
            .attempt(attempted)
            .map_err(|e| e.advise(format!("if {} holds changes to another image, remove it", directory.display())))?;
        overlay.mounted.push(image_root.to_owned());
        for option in lacking(image_root) {
            tracing::warn!("the overlay on {} lacks {option}: {}", image_root.display(), without(option));
        }
        Ok(overlay)
    }

    /// True if anything was changed above the source; `None` if there is no overlay in `directory`.
    pub(crate) fn changes(directory: &Path) -> Option<bool> {
        std::fs::read_dir(directory.join(UPPER)).ok().map(|mut names| names.next().is_some())
    }

    /// True if the overlay of `directory` is mounted at `image_root` in this mount namespace.
    pub(crate) fn is_mounted(directory: &Path, image_root: &Path) -> bool {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let (place, upper) = (real(image_root), directory.join(UPPER));
        let options = [&upper, &real(&upper)].map(|upper| format!("upperdir={}", escape(upper)));
        let is_there = |line: &&str| mounts::mount_points(line.as_bytes()) == [place.as_path()];
        let top = mounts.lines().rfind(is_there);
        top.is_some_and(|line| line.split([' ', ',']).any(|word| options.iter().any(|option| word == option)))
    }

    /// Unmounts the overlay, and the squashfs below it.
    pub(crate) fn unmount(mut self) -> Result<()> {
        self.take_down()
    }

    /// Keeps the mounts when this program ends, and returns the mount points, lowest first.
    pub(crate) fn keep(mut self) -> Vec<PathBuf> {
        std::mem::take(&mut self.mounted)
    }

    fn take_down(&mut self) -> Result<()> {
        while let Some(place) = self.mounted.pop() {
            mounts::unmount(&place).attempt(|| format!("unmount {}", place.display()))?;
        }
        Ok(())
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = self.take_down();
    }
}

/// Unmounts everything that is mounted on `place`, where mounts may be stacked.
fn unmount_all(place: &Path) -> Result<()> {
    let attempted = || format!("unmount {}", place.display());
    let real = std::fs::canonicalize(place).attempt(attempted)?;
    let mounted = std::fs::read("/proc/self/mountinfo").attempt(|| "read /proc/self/mountinfo")?;
    mounts::mount_points(&mounted)
        .iter()
        .filter(|mounted| **mounted == real)
        .try_for_each(|mounted| mounts::unmount(mounted).attempt(attempted))
}

/// A process in whose mount namespace an overlay with the upper directory `upper` is mounted (proc_pid_mountinfo(5)).
fn process_with(upper: &Path) -> Option<Entry> {
    let option = format!("upperdir={}", upper.display());
    let is_there = |text: &str| text.lines().any(|line| line.split([' ', ',']).any(|word| word == option));
    let sees = |pid: &Pid| std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).is_ok_and(|text| is_there(&text));
    numbers(Path::new("/proc")).filter(sees).find_map(Entry::read)
}

/// Mounts the squashfs in `file`, even if its name leads elsewhere by now.
fn mount_squashfs(file: &File, place: &Path, attributes: MountAttrFlags) -> io::Result<()> {
    let target = Tree::open(place)?;
    let device = Loop::of(file)?;
    let options = [("source", &*device.path().to_string_lossy()), ("ro", "")];
    Detached::filesystem("squashfs", &options, attributes)?.attach(target).map(|_| ())
}

fn copy_root(root: &Tree, upper: &Path) -> io::Result<()> {
    let upper = Tree::open(upper)?;
    let [from, to] = [root, &upper].map(|directory| Node { directory, name: OsStr::new(".") });
    let mut attributes = from.attributes()?;
    // Leave out attributes of another overlay that had the source as its upper layer: they would mislead this one.
    attributes.retain(|name, _| !name.as_bytes().starts_with(b"trusted.overlay."));
    to.take(&rustix::fs::fstat(root)?, &attributes)
}

/// Escapes a path for an overlay mount option.
fn escape(path: &Path) -> String {
    let text = String::from_utf8_lossy(path.as_os_str().as_bytes());
    text.replace('\\', "\\\\").replace(':', "\\:").replace(',', "\\,")
}
