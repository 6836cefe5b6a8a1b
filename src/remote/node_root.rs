//! The root directory of a job on a node: a temporary overlay over the node's own root directory. A session finds the
//! node's tools in it, but cannot change the node.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::mount::MountAttrFlags;

use crate::error::{Attempt, Result};
use crate::jail::resolv_conf::{RESOLV_CONF, of_container};
use crate::sys::file_kind::FileKind;
use crate::sys::mounts::{self, Detached};
use crate::sys::tree::Tree;

/// Path of the image root parent in a job's environment.
pub(crate) const PARENT: &str = "/mnt/image";

/// Directory, in a job's environment, with this program and its helper.
pub(crate) const PROGRAMS: &str = "/run/ims-sshd-programs";

/// Directory, in a job's environment, for the files that are sent back.
pub(crate) const RESULTS: &str = "/run/ims-sshd-results";

/// Directory, in a build, for the files that are sent back. It is below /mnt, since /mnt exists everywhere and a build
/// does not use it.
pub(crate) const BUILD_RESULTS: &str = "/mnt/ims-sshd-results";
/// Directory, in a build, for the files that the order contains.
pub(crate) const BUILD_OWN: &str = "/mnt/ims-sshd-job";

/// System directories that may be separate file systems. Other mounts (homes, data, other jobs) stay hidden from the
/// job.
const SYSTEM: [&str; 9] = ["/boot", "/etc", "/opt", "/root", "/srv", "/usr", "/usr/local", "/var", "/var/lib"];

/// Sets up the root directory in the job's directory `place`, and enters it; the working directory is then the new
/// root. This process must have its own mount namespace.
pub(crate) fn enter(place: &Path, (image, results): (&Path, &Path)) -> Result<()> {
    let programs = std::env::current_exe().attempt(|| "find this program's own file")?;
    let programs = programs.parent().unwrap_or(Path::new("/"));
    let resolv_conf = of_container();
    let layers = place.join("root");
    let top = layers.join("top");
    let attempted = || format!("mount a root directory on {}", top.display());
    std::fs::create_dir_all(&top).attempt(attempted)?;
    // Attach the overlay before anything is mounted in it, since nothing can be mounted on a detached mount.
    let target = Tree::open(&top).attempt(attempted)?;
    let root = Tree::from_fd(overlay(Path::new("/"), &layers.join("0"))?.attach(target).attempt(attempted)?);
    let mounted = std::fs::read("/proc/self/mountinfo").attempt(|| "read /proc/self/mountinfo")?;
    let mut below: Vec<PathBuf> = mounts::mount_points(&mounted);
    below.retain(|point| SYSTEM.iter().any(|path| Path::new(path) == point));
    below.sort();
    below.dedup();
    for (number, point) in below.iter().enumerate() {
        attach(overlay(point, &layers.join((number + 1).to_string()))?, &root, point)?;
    }
    let none = MountAttrFlags::empty();
    let quiet = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let tmp = layers.join("tmp");
    let attempted = || format!("create the directory {}", tmp.display());
    std::fs::create_dir(&tmp).attempt(attempted)?;
    std::fs::set_permissions(&tmp, Permissions::from_mode(0o1777)).attempt(attempted)?;
    let new = |kind: &str, options: &[(&str, &str)]| {
        Detached::filesystem(kind, options, quiet).attempt(|| format!("mount a new {kind}"))
    };
    let shown = |path: &Path, recursive: bool, attributes: MountAttrFlags| {
        Detached::copy_of(path, recursive, attributes).attempt(|| format!("show {}", path.display()))
    };
    let read_only = MountAttrFlags::MOUNT_ATTR_RDONLY;
    for (point, detached) in [
        ("/proc", new("proc", &[])?),
        ("/sys", shown(Path::new("/sys"), true, none)?),
        ("/dev", shown(Path::new("/dev"), true, none)?),
        ("/tmp", shown(&tmp, false, quiet)?),
        ("/run", new("tmpfs", &[("mode", "0755"), ("source", "ims-sshd")])?),
        (PROGRAMS, shown(programs, false, read_only)?),
        (RESULTS, shown(results, false, quiet)?),
        (PARENT, shown(image, false, none)?),
    ] {
        attach(detached, &root, Path::new(point))?;
    }
    if let Some(text) = resolv_conf {
        replace_link(&root, &text).attempt(|| "write /etc/resolv.conf")?;
    }
    mounts::switch_root(&root).attempt(|| "enter the job's root directory")
}

/// Covers /mnt and /tmp by directories of the job, for a build. The rest of the node stays visible: kiwi-ng later gets
/// its own root directory, which shows only the parts that it reads.
pub(crate) fn enter_for_build(place: &Path, (image, results): (&Path, &Path)) -> Result<()> {
    let tmp = place.join("tmp");
    let attempted = || format!("create the directory {}", tmp.display());
    std::fs::create_dir(&tmp).attempt(attempted)?;
    std::fs::set_permissions(&tmp, Permissions::from_mode(0o1777)).attempt(attempted)?;
    let quiet = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let none = MountAttrFlags::empty();
    let new = |kind: &str, options: &[(&str, &str)]| {
        Detached::filesystem(kind, options, quiet).attempt(|| format!("mount a new {kind}"))
    };
    let shown = |path: &Path, attributes: MountAttrFlags| {
        Detached::copy_of(path, false, attributes).attempt(|| format!("show {}", path.display()))
    };
    // Copy these mounts before /tmp is covered, since the job's directories are in /tmp.
    let mounts = [
        ("/proc", new("proc", &[])?),
        ("/mnt", new("tmpfs", &[("mode", "0755"), ("source", "ims-sshd")])?),
        (PARENT, shown(image, none)?),
        (BUILD_RESULTS, shown(results, quiet)?),
        ("/tmp", shown(&tmp, quiet)?),
    ];
    for (point, detached) in mounts {
        // Open / for each mount: a descriptor from before the previous mount would lead below that mount.
        let root = Tree::open(Path::new("/")).attempt(|| "open /")?;
        attach(detached, &root, Path::new(point))?;
    }
    Ok(())
}

/// Returns an overlay over `lower`, without the file systems that are mounted below `lower`.
fn overlay(lower: &Path, layers: &Path) -> Result<Detached> {
    let attempted = || format!("mount an overlay over {}", lower.display());
    let [upper, work] = ["upper", "work"].map(|name| layers.join(name));
    for directory in [&upper, &work] {
        std::fs::create_dir_all(directory).attempt(attempted)?;
    }
    // Copy the mode, since the root of an overlay gets the mode of the upper directory.
    let mode = std::fs::metadata(lower).attempt(attempted)?.permissions();
    std::fs::set_permissions(&upper, mode).attempt(attempted)?;
    let [lower, upper, work] = [lower, &upper, &work].map(|path| path.to_string_lossy().into_owned());
    let options = [("lowerdir", lower.as_str()), ("upperdir", &upper), ("workdir", &work), ("source", "ims-sshd")];
    Detached::filesystem("overlay", &options, MountAttrFlags::empty()).attempt(attempted)
}

fn attach(mount: Detached, root: &Tree, point: &Path) -> Result<()> {
    let point = point.strip_prefix("/").unwrap_or(point);
    let target = root.make_directories(point).and_then(|()| root.directory(point));
    target.and_then(|target| mount.attach(target)).attempt(|| format!("mount on /{}", point.display())).map(drop)
}

/// Replaces resolv.conf by `text`, the node's content, if it is a link: the link may lead into the node's /run.
fn replace_link(root: &Tree, text: &[u8]) -> std::io::Result<()> {
    let is_link = root.look(RESOLV_CONF)?.is_some_and(|found| FileKind::of(&found) == FileKind::SymbolicLink);
    if is_link { root.replace(RESOLV_CONF, text) } else { Ok(()) }
}
