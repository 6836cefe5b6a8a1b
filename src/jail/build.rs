//! Builds the jail around an image root, from inside its new namespaces. Read it from top to bottom.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sched::CloneFlags;
use rustix::fs::{FileType, Mode};
use rustix::io::Errno;

use crate::error::{Advise, Attempt, Error, Result};
use crate::jail::arguments::NAME;
use crate::jail::hostname;
use crate::jail::looks_like_chroot;
use crate::jail::mount_table::{
    DEV_LINKS, Missing, Mount, PROGRAMS, Proc, ROOT_ATTRIBUTES, Source, mount_table, of_build,
};
use crate::jail::plan::Plan;
use crate::jail::programs::{self, Program};
use crate::jail::resolv_conf;
use crate::jail::slash_run;
use crate::jail::tier::Tier;
use crate::sys::file_kind::FileKind;
use crate::sys::memory;
use crate::sys::mounts::{self, Detached};
use crate::sys::process::OWN_PROGRAM;
use crate::sys::tree::Tree;

/// Builds the jail around the working directory, which is the image root, and moves this process into it. Must be
/// called by the first process of the new namespaces, with a single thread. Returns the [`Programs`] of the jail.
pub(crate) fn build(plan: &Plan) -> Result<Programs> {
    let shown = plan.image_root.display();
    let place = Tree::open(Path::new(".")).attempt(|| format!("open the image root {shown}"))?;
    if plan.tier == Tier::Chroot {
        let helper = File::open(OWN_PROGRAM).attempt(|| "open ims-jail-shell")?;
        mounts::change_root(&place).attempt(|| format!("change the root to {shown}"))?;
        return Ok(Programs { helper: helper.into(), others: Vec::new() });
    }
    hostname::give(plan.hostname.as_deref(), plan.label.as_deref())?;
    // Clear the umask, so that directories get exactly the modes in the tables.
    rustix::process::umask(Mode::empty());

    // Copy the container's mounts and create new file systems, attached nowhere yet, while the container's mounts are
    // visible: in a user namespace the kernel allows a new procfs only where another procfs is visible. Make the image
    // root a mount of its own, which pivot_root(2) and nodev need. Clear nosuid, which an overlay has in the container,
    // because sudo must work in the jail.
    let root = Detached::copy_of_fd(&place, false, ROOT_ATTRIBUTES)
        .and_then(Detached::honouring_setuid)
        .attempt(|| format!("copy the mount of the image root {shown}"))
        .advise("unmount what is mounted below it")?;
    let table = sources(mount_table(plan.dkms, plan.proc))?;
    let resolv_conf = resolv_conf::of_container();
    let of_boot = slash_run::of_boot(&place);
    let (copies, programs) = copy_programs(&plan.programs)?;
    let binds = plan.binds.iter().map(|bind| Ok((bind, bind.copy()?))).collect::<Result<Vec<_>>>()?;

    // From here on, mounts must not propagate between the jail and the container.
    match &plan.bare {
        Some(namespace) => copy_namespace(namespace).attempt(|| "copy the mount namespace of the trial jail"),
        None => mounts::make_all_private().attempt(|| "make the jail's mounts private"),
    }?;
    // From here on, the image root is reached through this mount only.
    let root = mounts::cover_root(root).attempt(|| format!("attach the image root {shown}"))?;

    let mut jail = Jail { root: Tree::from_fd(root), mounted: HashMap::new() };
    for (mount, source) in table {
        carry_out(&mut jail, &mount, source).map_err(|e| e.attempted_on(&mount))?;
        match mount.target {
            "dev" if !plan.dkms => link_dev(&jail)?,
            "run" => {
                make_utmp(&jail)?;
                if let Some(text) = &resolv_conf {
                    put_resolv_conf(&jail, text)?;
                }
                // Create the image's entries of /run after the jail's own: existing entries stay, so the image, which
                // is not trusted, cannot replace them.
                let run = jail.locate("run/-").attempt(|| "fill /run of the jail")?.0;
                slash_run::make(run, &of_boot);
                let root = jail.locate("proc/1/root").attempt(|| "open /proc of the jail")?;
                looks_like_chroot::show_root_of_init(run, root)?;
                if plan.proc == Proc::Container {
                    looks_like_chroot::show_name_of_init(root.0)?;
                }
            }
            _ => {}
        }
    }
    show_programs(&jail, copies)?;

    // Attach the bind mounts last, so that no name in a source is looked up afterwards: a source may contain anything.
    for (bind, copy) in binds {
        bind.attach(copy, &jail.root)?;
    }

    // Use pivot_root(2): a process that may call chroot(2) could leave a chroot. After pivot_root, the old root is gone
    // from this namespace.
    mounts::switch_root(&jail.root).attempt(|| format!("switch the root to {shown}"))?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    Ok(programs)
}

/// The jail's copies of the container's programs, to be kept open ([`programs::copy`]).
pub(crate) struct Programs {
    /// `ims-jail-shell`. In the chroot tier it is the container's own file: without mounts no copy could be protected.
    pub(crate) helper: OwnedFd,
    /// sftp-server, its loader and its libraries.
    pub(crate) others: Vec<OwnedFd>,
}

/// The jail while it is being built.
struct Jail {
    root: Tree,
    /// Mounts on directories of the image so far, by their names.
    mounted: HashMap<&'static str, Tree>,
}

impl Jail {
    /// Tree and relative path for `path`. A path below one of our mounts is resolved from that mount: somebody who
    /// renames things in the image at that moment cannot keep a part of /proc from being restricted.
    fn locate<'a>(&self, path: &'a str) -> io::Result<(&Tree, &'a str)> {
        match path.split_once('/') {
            Some((mount, rest)) => Ok((self.mounted.get(mount).ok_or(io::ErrorKind::NotFound)?, rest)),
            None => Ok((&self.root, path)),
        }
    }
}

/// A failed step of one mount.
struct Failure(io::Error);

impl Failure {
    fn attempted_on(self, mount: &Mount) -> Error {
        let what = match mount.source {
            Source::New(kind, _) => format!("a new {kind}"),
            Source::Memory { .. } => "a new tmpfs".into(),
            Source::Container(path) => format!("the container's {path}"),
            Source::Masked => "nothing (a mask)".into(),
        };
        Error::new(format!("mount {what} on /{} of the jail", mount.target)).caused_by(self.0)
    }
}

impl<E: Into<io::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

/// The file system to mount, still detached; `None` for a mask, which depends on the type of its target.
fn source(mount: &Mount) -> std::result::Result<Option<Detached>, Failure> {
    Ok(match mount.source {
        Source::New(kind, options) => Some(Detached::filesystem(kind, options, mount.attributes)?),
        Source::Memory { mode, tenths } => {
            let size = memory::available().map(|all| all / 10 * tenths);
            // One inode for each page is the kernel's own ratio.
            let limits = size.map(|size| (size.to_string(), (size / 4096).to_string()));
            let limits = limits.as_ref().map(|(bytes, inodes)| [("size", &**bytes), ("nr_inodes", inodes)]);
            let options: Vec<_> = [("mode", mode)].into_iter().chain(limits.into_iter().flatten()).collect();
            Some(Detached::filesystem("tmpfs", &options, mount.attributes)?)
        }
        Source::Container(path) => Some(Detached::copy_of(path, true, mount.attributes)?),
        Source::Masked => None,
    })
}

/// The mounts of a table, still detached.
fn sources(table: impl Iterator<Item = Mount>) -> Result<Vec<(Mount, Option<Detached>)>> {
    table.map(|mount| source(&mount).map(|source| (mount, source)).map_err(|e| e.attempted_on(&mount))).collect()
}

/// Mounts /dev, /proc, /sys and /run of a recipe's build on the directories of these names in `root`, and returns
/// `root`. /proc is the container's if the kernel refuses a new procfs because parts of the container's /proc are
/// masked (`mount_too_revealing`).
pub(crate) fn mount_for_build(root: Tree) -> Result<Tree> {
    let is_refused = matches!(Detached::filesystem("proc", &[], ROOT_ATTRIBUTES),
        Err(e) if Errno::from_io_error(&e) == Some(Errno::PERM));
    let proc = if is_refused { Proc::Container } else { Proc::New };
    let table = sources(of_build(proc))?;
    let mut jail = Jail { root, mounted: HashMap::new() };
    for (mount, source) in table {
        carry_out(&mut jail, &mount, source).map_err(|e| e.attempted_on(&mount))?;
    }
    link_dev(&jail)?;
    Ok(jail.root)
}

/// Moves this process into a copy of the mount namespace at `path`.
fn copy_namespace(path: &Path) -> io::Result<()> {
    nix::sched::setns(File::open(path)?, CloneFlags::CLONE_NEWNS)?;
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).map_err(Into::into)
}

fn carry_out(jail: &mut Jail, mount: &Mount, source: Option<Detached>) -> std::result::Result<(), Failure> {
    let (tree, path) = jail.locate(mount.target)?;
    let target = match tree.handle(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound && mount.missing == Missing::Skipped => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound && mount.missing == Missing::Made => {
            tree.make_mount_point(path, source.as_ref().map_or(Ok(true), is_directory)?)?;
            tree.handle(path)?
        }
        other => other?,
    };
    let found = rustix::fs::fstat(&target)?;
    let is_directory = FileType::from_raw_mode(found.st_mode) == FileType::Directory;
    // Refuse a link. The handle is on the link itself, so a mount could not leave the image, but a mount on a linked
    // /proc or /dev would not be where programs look.
    if mount.missing == Missing::MountPoint && !is_directory {
        return Err(Failure(io::Error::new(io::ErrorKind::NotADirectory, format!("it is {}", FileKind::of(&found)))));
    }
    let source = match source {
        Some(source) => source,
        None if is_directory => Detached::filesystem("tmpfs", &[("size", "4k"), ("mode", "0555")], mount.attributes)?,
        None => {
            let (dev, null) = jail.locate("dev/null")?;
            Detached::copy_of_fd(dev.handle(null)?, false, mount.attributes)?
        }
    };
    let top = Tree::from_fd(source.attach(target)?);
    if path == mount.target {
        jail.mounted.insert(mount.target, top);
    }
    Ok(())
}

/// True if a directory is mounted, and not a single file.
fn is_directory(mount: &Detached) -> io::Result<bool> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(mount)?.st_mode) == FileType::Directory)
}

fn link_dev(jail: &Jail) -> Result<()> {
    for (name, target) in DEV_LINKS {
        let attempted = || format!("link /dev/{name} in the jail");
        let dev = jail.mounted.get("dev").ok_or("it is not mounted").attempt(attempted)?;
        rustix::fs::symlinkat(*target, dev, *name).attempt(attempted)?;
    }
    Ok(())
}

/// Creates an empty utmp, as on a node that has just booted: screen complains without it.
fn make_utmp(jail: &Jail) -> Result<()> {
    let attempted = || "make /run/utmp in the jail";
    let (run, name) = jail.locate("run/utmp").attempt(attempted)?;
    run.touch(name).attempt(attempted).map(|_| ())
}

/// Creates the targets of links at /etc/resolv.conf that lead below /run, with the container's text.
fn put_resolv_conf(jail: &Jail, text: &[u8]) -> Result<()> {
    for name in resolv_conf::files_below_run(&jail.root) {
        let attempted = || format!("put the container's resolv.conf at /run/{} of the jail", name.display());
        let (run, _) = jail.locate("run/-").attempt(attempted)?;
        run.make_directories(name.parent().unwrap_or(Path::new(""))).attempt(attempted)?;
        run.replace(&name, text).attempt(attempted)?;
    }
    Ok(())
}

/// Copies this program and the `further` ones.
fn copy_programs(further: &[Program]) -> Result<(Detached, Programs)> {
    let own = Program { name: NAME.into(), file: OWN_PROGRAM.into() };
    let (tmpfs, mut copies) = programs::copy(std::iter::once(&own).chain(further))?;
    Ok((tmpfs, Programs { helper: copies.remove(0), others: copies }))
}

/// Mounts the copies in the jail: an image may lack sftp-server or a libc, or be for another architecture.
fn show_programs(jail: &Jail, copies: Detached) -> Result<()> {
    let show = || -> io::Result<()> {
        let (run, name) = jail.locate(PROGRAMS)?;
        run.make_mount_point(name, true)?;
        copies.attach(run.handle(name)?).map(drop)
    };
    show().attempt(|| format!("show the jail's programs at /{PROGRAMS}"))
}
