//! An archive becomes a tree: written out, or mounted below an overlay.

use std::fs::{File, Permissions};
use std::io::{self, BufReader};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::SystemTime;

use nix::unistd::Pid;
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use crate::error::{Attempt, Error, Result};
use crate::printable::Printable;
use crate::publish::confined::Confined;
use crate::publish::progress::Progress;
use crate::publish::source::{self, Kind};
use crate::publish::work::Work;
use crate::publish::{cpio, layers};
use crate::sys::mounts::{self, Detached};
use crate::sys::process::{Entry, numbers};
use crate::sys::tree::Tree;

/// Writes the tree out of `archive` (a file, or a directory that is copied) to `to`, which must not exist. Of a container's image that was
/// saved the tree is that of its layers.
pub fn unpack(work: &Work, archive: &Path, to: &Path) -> Result<()> {
    let attempted = format!("unpack {}", archive.display());
    let volume = to.parent().map(Path::to_owned).unwrap_or_default();
    let before = used(&volume);
    let mut progress = Progress::begin("unpacking", None);
    let mut look = |_: &Child| progress.at(used(&volume).saturating_sub(before));
    if archive.is_dir() {
        if layers_in(archive)?.is_some() {
            return unpack_layers(work, archive, to, look);
        }
        let mut copy = Command::new("cp");
        copy.args(["-aT", "--reflink=auto"]).arg(archive).arg(".");
        let target = make(to)?;
        return work.succeed(&attempted, &mut copy, Some(&Confined::unpacking(&target, archive)?), look).map(|_| ());
    }
    match source::kind(archive)? {
        Kind::Squashfs => {
            let mut unsquashfs = Command::new("unsquashfs");
            // Forced, since its directory is there.
            unsquashfs.args(["-quiet", "-no-progress", "-force", "-dest", "."]).arg(archive);
            let target = make(to)?;
            let confined = Confined::unpacking(&target, archive)?;
            let said = work.succeed(&attempted, &mut unsquashfs, Some(&confined), look)?;
            if !said.is_empty() {
                tracing::warn!("unsquashfs: {}", said.lines().collect::<Vec<_>>().join(", "));
            }
            Ok(())
        }
        Kind::Tar(compressed) => {
            unpack_tar(work, archive, compressed, to, &mut look)?;
            if layers_in(to)?.is_none() {
                return Ok(());
            }
            let saved = Removed(beside(to, ".saved"));
            std::fs::rename(to, &saved.0).attempt(|| format!("rename {}", to.display()))?;
            unpack_layers(work, &saved.0, to, look)
        }
        Kind::Cpio(compressed) => unpack_cpio(work, archive, compressed, to),
    }
}

/// Makes the directory in which what unpacks stands: it reaches nothing else but the archive.
fn make(to: &Path) -> Result<Tree> {
    let attempted = || format!("make the directory {}", to.display());
    std::fs::DirBuilder::new().mode(0o700).create(to).attempt(attempted)?;
    Tree::open(to).attempt(attempted)
}

/// A directory of ours that is gone when this is.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A place beside `to`, where nothing is.
fn beside(to: &Path, ending: &str) -> PathBuf {
    let mut name = to.file_name().unwrap_or_default().to_owned();
    name.push(ending);
    let place = to.with_file_name(name);
    let _ = std::fs::remove_dir_all(&place);
    place
}

/// The layers of the container's image that is saved in a directory.
pub fn layers_in(saved: &Path) -> Result<Option<Vec<PathBuf>>> {
    let tree = Tree::open(saved).attempt(|| format!("open {}", saved.display()))?;
    layers::layers(&tree)
}

fn unpack_layers(work: &Work, saved: &Path, to: &Path, mut look: impl FnMut(&Child)) -> Result<()> {
    let root = make(to)?;
    for layer in layers_in(saved)?.unwrap_or_default() {
        let archive = saved.join(&layer);
        let attempted = || format!("unpack the layer {}", layer.display());
        // One that changes nothing holds nothing but the two blocks that end an archive.
        if source::is_empty_tar(&archive).attempt(attempted)? {
            continue;
        }
        let Kind::Tar(compressed) = source::kind(&archive)? else {
            return Err(Error::new(attempted()).because("it is no tar archive"));
        };
        let began = SystemTime::now();
        let directory = Removed(beside(to, ".layer"));
        unpack_tar(work, &archive, compressed, &directory.0, &mut look)?;
        let tree = Tree::open(&directory.0).attempt(attempted)?;
        layers::merge(&tree, &root, began).attempt(attempted)?;
    }
    Ok(())
}

fn unpack_tar(
    work: &Work,
    archive: &Path,
    compressed: Option<&str>,
    to: &Path,
    look: impl FnMut(&Child),
) -> Result<()> {
    let target = make(to)?;
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--preserve-permissions", "--numeric-owner", "--acls", "--xattrs", "--xattrs-include=*"]);
    if let Some(program) = compressed {
        tar.arg(format!("--use-compress-program={program}"));
    }
    tar.arg("--file").arg(archive);
    // It fails at a member whose path has '..' in it, and leaves out the leading '/' of others and of what hard links lead to.
    let said = work.succeed(
        &format!("unpack {}", archive.display()),
        &mut tar,
        Some(&Confined::unpacking(&target, archive)?),
        look,
    )?;
    if !said.is_empty() {
        tracing::warn!("tar: {}", said.lines().collect::<Vec<_>>().join(", "));
    }
    Ok(())
}

fn unpack_cpio(work: &Work, archive: &Path, compressed: Option<&str>, to: &Path) -> Result<()> {
    let attempted = || format!("unpack {}", archive.display());
    let root = make(to)?;
    let file = File::open(archive).attempt(attempted)?;
    let size = file.metadata().attempt(attempted)?.len();
    let mut progress = Progress::begin("unpacking", Some(size));
    let position = file.try_clone().attempt(attempted)?;
    let look = || {
        // The program that unpacks it first reads by the same descriptor.
        progress.at(rustix::fs::tell(&position)?);
        work.heed().map_err(io::Error::other)
    };
    let unpacked = match compressed {
        None => cpio::unpack(BufReader::with_capacity(1 << 20, file), &root, look),
        Some(program) => {
            let mut command = Command::new(program);
            command.arg("-dc").stdout(Stdio::piped());
            let mut child = Confined::filtering(&root, file).spawn(&mut command)?;
            let content = child.stdout.take().map(|out| BufReader::with_capacity(1 << 20, out));
            let unpacked = content.map_or(Ok(()), |content| cpio::unpack(content, &root, look));
            if unpacked.is_err() {
                let _ = child.kill();
            }
            let status = child.wait().attempt(attempted)?;
            // It has read all there is, up to the checksum at the end.
            unpacked.and_then(|()| {
                let failed = || io::Error::other(format!("{program}: {status}"));
                status.success().then_some(()).ok_or_else(failed)
            })
        }
    };
    work.heed()?;
    unpacked.map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => Error::new(attempted()).because("the cpio archive is cut off"),
        _ => Error::new(attempted()).because(e),
    })
}

/// What is used of the volume that `path` is on, in bytes.
fn used(path: &Path) -> u64 {
    rustix::fs::statvfs(path).map_or(0, |disk| (disk.f_blocks - disk.f_bfree).saturating_mul(disk.f_frsize))
}

// Options that make an overlay behave as a disk does. Nobody else can redirect a change: the upper directory is root's alone, and the
// overlay hides its own attributes from sessions. A redirect in the source has no further layer to lead to.

/// A directory of the source can be renamed; without it, rename(2) fails with EXDEV.
const REDIRECT: (&str, &str) = ("redirect_dir", "on");

/// A file of several names stays one file when one of them is changed. The kernel then refuses changes to another source (ESTALE), and
/// changes that are mounted elsewhere (EBUSY).
const INDEX: (&str, &str) = ("index", "on");

/// All files are of one device, as tar --one-file-system and rsync -x expect.
const ONE_DEVICE: (&str, &str) = ("xino", "on");

/// Whatever the module's default is: an attribute in the source could else lend a file the content of another.
const NO_METACOPY: (&str, &str) = ("metacopy", "off");

/// Those of the options that the kernel has left out, which it does without an error where a file system lacks what they need.
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
        "index" => "a file of several names becomes several files when one of them is changed",
        _ => "directories of the source cannot be renamed",
    }
}

/// Directory for the changes, in an overlay's own directory.
const UPPER: &str = "upper";

/// A tree that is mounted: the source below, what is changed above it.
#[derive(Debug)]
pub struct Overlay {
    /// Where it is seen.
    pub image_root: PathBuf,
    /// The source itself, as it was.
    pub lower: PathBuf,
    mounted: Vec<PathBuf>,
}

impl Overlay {
    /// Mounts `source`, a squashfs or a folder, at `image_root`; `folder` takes what is changed. One that was mounted like this before is
    /// found as it was left. To be mounted by one container after the other, never by two at a time.
    pub fn mount(work: &Work, source: &Path, folder: &Path, image_root: &Path) -> Result<Self> {
        let attempted = || format!("mount {} on {}", source.display(), image_root.display());
        let [squashfs, upper, inner] = ["lower", UPPER, "work"].map(|name| folder.join(name));
        let first = !upper.exists();
        for made in [folder, &squashfs, &upper, &inner, image_root] {
            std::fs::create_dir_all(made).attempt(|| format!("make the folder {}", made.display()))?;
        }
        // Setuid programs in the upper directory count; in the overlay, which others may see, they do not.
        std::fs::set_permissions(folder, Permissions::from_mode(0o700)).attempt(attempted)?;
        let mut overlay = Self { image_root: image_root.to_owned(), lower: source.to_owned(), mounted: Vec::new() };
        if source.is_dir() && layers_in(source)?.is_some() {
            let saved = Error::new(attempted()).because("it is a saved image of a container");
            return Err(saved.advise("unpack its layers (--open unpack)"));
        }
        if !source.is_dir() {
            if source::kind(source)? != Kind::Squashfs {
                return Err(Error::new(attempted()).because("it is no squashfs").advise("unpack it (--open unpack)"));
            }
            let mut mount = Command::new("mount");
            mount.args(["-t", "squashfs", "-o", "loop,ro,nodev,nosuid"]).args([source, &squashfs]);
            work.succeed(&attempted(), &mut mount, None, |_| {})
                .map_err(|e| e.advise("a loop device and CAP_SYS_ADMIN are needed; without them, --open unpack"))?;
            overlay.mounted.push(squashfs.clone());
            overlay.lower = squashfs;
        }
        // The root's owner, mode and time are the upper folder's.
        let root = std::fs::metadata(&overlay.lower).attempt(attempted)?;
        if first {
            copy_root(&root, &upper).attempt(attempted)?;
        }
        let names = [overlay.lower.as_path(), &upper, &inner].map(escape);
        let layers = [("lowerdir", names[0].as_str()), ("upperdir", &names[1]), ("workdir", &names[2])];
        let mount = |further: &[(&'static str, &'static str)]| {
            let options: Vec<_> = layers.iter().chain(further).copied().collect();
            let target = Tree::open(image_root)?;
            // The machine's users may see it: no setuid program of the image runs outside a jail, which honours them inside.
            let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
            Detached::filesystem("overlay", &options, attributes)?.attach(target)
        };
        let mounted = mount(&[REDIRECT, INDEX, ONE_DEVICE, NO_METACOPY]);
        // Without the index the kernel would mount it all the same, and one would see half of what the other changes.
        if mounted.as_ref().is_err_and(|e| Errno::from_io_error(e) == Some(Errno::BUSY)) {
            let holder = process_with(&upper).map_or("another mount, or an open file of one".into(), |entry| {
                format!("process {} ({})", entry.pid, Printable(&entry.name))
            });
            let error =
                Error::new(attempted()).because(format!("the changes in {} are in use by {holder}", upper.display()));
            return Err(error.advise("end that process, or unmount what it has mounted"));
        }
        mounted
            .attempt(attempted)
            .map_err(|e| e.advise(format!("if {} holds changes to another image, remove it", folder.display())))?;
        overlay.mounted.push(image_root.to_owned());
        for option in lacking(image_root) {
            tracing::warn!("the overlay on {} lacks {option}: {}", image_root.display(), without(option));
        }
        Ok(overlay)
    }

    /// Whether anything was changed above the source; nothing if there is no overlay in `folder`.
    pub fn changes(folder: &Path) -> Option<bool> {
        std::fs::read_dir(folder.join(UPPER)).ok().map(|mut names| names.next().is_some())
    }

    /// Takes the mounts down.
    pub fn unmount(mut self) -> Result<()> {
        self.take_down()
    }

    /// Leaves them as they are when this program ends.
    pub fn keep(mut self) {
        self.mounted.clear();
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

/// A process that sees an overlay of the upper directory `upper` mounted, by proc_pid_mountinfo(5).
fn process_with(upper: &Path) -> Option<Entry> {
    let option = format!("upperdir={}", upper.display());
    let is_there = |text: &str| text.lines().any(|line| line.split([' ', ',']).any(|word| word == option));
    let sees = |pid: &Pid| std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).is_ok_and(|text| is_there(&text));
    numbers(Path::new("/proc")).filter(sees).find_map(Entry::read)
}

fn copy_root(root: &std::fs::Metadata, upper: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    std::os::unix::fs::chown(upper, Some(root.uid()), Some(root.gid()))?;
    std::fs::set_permissions(upper, std::fs::Permissions::from_mode(root.mode() & 0o7777))?;
    std::fs::File::open(upper)?.set_modified(root.modified()?)
}

/// A path as an option of overlay takes it.
fn escape(path: &Path) -> String {
    let text = String::from_utf8_lossy(path.as_os_str().as_bytes());
    text.replace('\\', "\\\\").replace(':', "\\:").replace(',', "\\,")
}
