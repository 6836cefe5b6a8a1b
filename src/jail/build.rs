//! Makes the jail around an image root, from inside its new namespaces. Read from top to bottom.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sched::CloneFlags;
use rustix::fs::{FileType, Mode};
use rustix::mount::MountAttrFlags;

use crate::error::{Advise, Attempt, Error, Result};
use crate::jail::arguments::NAME;
use crate::jail::hostname;
use crate::jail::mount_table::{
    DEV_LINKS, KERNEL_FILE_ATTRIBUTES, Missing, Mount, PROGRAMS, Proc, ROOT_ATTRIBUTES, Source, mount_table,
};
use crate::jail::plan::Plan;
use crate::jail::programs::{self, Program};
use crate::jail::resolv_conf;
use crate::jail::run;
use crate::jail::tier::Tier;
use crate::sys::file_kind::FileKind;
use crate::sys::mounts::{self, Detached};
use crate::sys::tree::Tree;

/// Makes the jail around this process's working folder, which is the image root, and moves the process into it. To be called by the
/// first process of the new namespaces, which must not have another thread. Returns the [`Programs`] of the jail.
pub(crate) fn build(plan: &Plan) -> Result<Programs> {
    let shown = plan.image_root.display();
    let place = Tree::open(Path::new(".")).attempt(|| format!("open the image root {shown}"))?;
    if plan.tier == Tier::Chroot {
        let helper = File::open(OWN_PROGRAM).attempt(|| "open ims-jail-shell")?;
        mounts::change_root(&place).attempt(|| format!("change the root to {shown}"))?;
        return Ok(Programs { helper: helper.into(), others: Vec::new() });
    }
    hostname::give(plan.hostname.as_deref(), plan.label.as_deref())?;
    // Modes of folders are as the tables say them.
    rustix::process::umask(Mode::empty());

    // All that comes from the container, as copies that are attached nowhere yet: soon its mounts are out of sight. So are new file
    // systems: the kernel gives a user namespace a procfs only where one can be seen.
    // The image root becomes a mount of its own: only a mount can be switched to, and only a mount can be nodev. An overlay is nosuid
    // outside, and sudo has to work inside.
    let root = Detached::copy_of_fd(&place, false, ROOT_ATTRIBUTES)
        .and_then(Detached::honouring_setuid)
        .attempt(|| format!("copy the mount of the image root {shown}"))
        .advise("nothing may be mounted below it")?;
    let table = mount_table(plan.dkms, plan.proc);
    let table = table.map(|mount| source(&mount).map(|source| (mount, source)).map_err(|e| e.attempted_on(&mount)));
    let table = table.collect::<Result<Vec<_>>>()?;
    let resolv_conf = resolv_conf::of_container();
    let of_boot = run::of_boot(&place);
    let (copies, programs) = copy_programs(&plan.programs)?;
    let binds = plan.binds.iter().map(|bind| Ok((bind, bind.copy()?))).collect::<Result<Vec<_>>>()?;

    // What is mounted from here on must not appear in the container, nor the other way round.
    match &plan.bare {
        Some(namespace) => copy_namespace(namespace).attempt(|| "copy the mount namespace of the jail on trial"),
        None => mounts::make_all_private().attempt(|| "cut the jail's mounts off from the container's"),
    }?;
    // From here on, the tree is reached through its own mount.
    let root = mounts::cover_root(root).attempt(|| format!("attach the image root {shown}"))?;

    let mut jail = Jail { root: Tree::from_fd(root), mounted: HashMap::new() };
    for (mount, source) in table {
        carry_out(&mut jail, &mount, source).map_err(|e| e.attempted_on(&mount))?;
        match mount.target {
            "dev" if !plan.dkms => furnish_dev(&jail)?,
            // The container's is read-only as a whole.
            "proc" if !plan.dkms && plan.proc == Proc::New => protect_kernel_files(&jail)?,
            "run" => {
                make_utmp(&jail)?;
                if let Some(text) = &resolv_conf {
                    put_resolv_conf(&jail, text)?;
                }
                // After what has to be there: what the image has instead could be anything.
                run::make(jail.locate("run/-").attempt(|| "furnish /run of the jail")?.0, &of_boot);
                show_root_of_init(&jail)?;
                if plan.proc == Proc::Container {
                    show_name_of_init(&jail)?;
                }
            }
            _ => {}
        }
    }
    show_programs(&jail, copies)?;

    // Last: a source may hold anything, and no name of it is looked up.
    for (bind, copy) in binds {
        bind.attach(copy, &jail.root)?;
    }

    // Not chroot: whoever may call chroot again could leave it. The old root is gone from this namespace after this.
    mounts::switch_root(&jail.root).attempt(|| format!("switch the root to {shown}"))?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    Ok(programs)
}

/// The jail's copies of the container's programs, to be kept open ([`programs::copy`]).
pub(crate) struct Programs {
    /// `ims-jail-shell`. In the chroot tier it is the container's own: where nothing can be mounted, no copy could be kept as it is.
    pub(crate) helper: OwnedFd,
    /// sftp-server, its loader and its libraries.
    pub(crate) others: Vec<OwnedFd>,
}

/// The jail while it is made.
struct Jail {
    root: Tree,
    /// What is mounted on the image's own folders so far, by their names.
    mounted: HashMap<&'static str, Tree>,
}

impl Jail {
    /// The tree to find `path` in, and the path there. What lies in a mount of ours is found by way of that mount: whoever renames
    /// things in the image meanwhile has no say in it, and so cannot keep a part of /proc from being restricted.
    fn locate<'a>(&self, path: &'a str) -> io::Result<(&Tree, &'a str)> {
        match path.split_once('/') {
            Some((mount, rest)) => Ok((self.mounted.get(mount).ok_or(io::ErrorKind::NotFound)?, rest)),
            None => Ok((&self.root, path)),
        }
    }
}

/// A step of one mount that failed.
struct Failure(io::Error);

impl Failure {
    fn attempted_on(self, mount: &Mount) -> Error {
        let what = match mount.source {
            Source::New(kind, _) => format!("a new {kind}"),
            Source::Container(path) => format!("the container's {path}"),
            Source::Masked => "nothing (a mask)".into(),
        };
        Error::new(format!("mount {what} on /{} of the jail", mount.target)).because(self.0)
    }
}

impl<E: Into<io::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

/// What is to be mounted, attached nowhere yet. Nothing for a mask, which depends on what it is to cover.
fn source(mount: &Mount) -> std::result::Result<Option<Detached>, Failure> {
    Ok(match mount.source {
        Source::New(kind, options) => Some(Detached::filesystem(kind, options, mount.attributes)?),
        Source::Container(path) => Some(Detached::copy_of(path, true, mount.attributes)?),
        Source::Masked => None,
    })
}

/// Moves this process into a mount namespace of its own that begins as a copy of the one that can be opened at `path`.
fn copy_namespace(path: &Path) -> io::Result<()> {
    nix::sched::setns(File::open(path)?, CloneFlags::CLONE_NEWNS)?;
    nix::sched::unshare(CloneFlags::CLONE_NEWNS).map_err(Into::into)
}

fn carry_out(jail: &mut Jail, mount: &Mount, source: Option<Detached>) -> std::result::Result<(), Failure> {
    let (tree, path) = jail.locate(mount.target)?;
    let target = match tree.handle(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound && mount.missing == Missing::Skipped => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound && mount.missing == Missing::Made => {
            tree.make_mount_point(path, source.as_ref().map_or(Ok(true), is_folder)?)?;
            tree.handle(path)?
        }
        other => other?,
    };
    let found = rustix::fs::fstat(&target)?;
    let is_folder = FileType::from_raw_mode(found.st_mode) == FileType::Directory;
    // A handle on a link is a handle on the link itself, so a mount could not go astray; but a linked /proc or /dev would still
    // be where the image wants it and not where programs look.
    if mount.missing == Missing::MountPoint && !is_folder {
        return Err(Failure(io::Error::new(io::ErrorKind::NotADirectory, format!("it is {}", FileKind::of(&found)))));
    }
    let source = match source {
        Some(source) => source,
        None if is_folder => Detached::filesystem("tmpfs", &[("size", "4k"), ("mode", "0555")], mount.attributes)?,
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

/// Whether what is mounted is a directory, and not one file.
fn is_folder(mount: &Detached) -> io::Result<bool> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(mount)?.st_mode) == FileType::Directory)
}

fn furnish_dev(jail: &Jail) -> Result<()> {
    for (name, target) in DEV_LINKS {
        let attempted = || format!("link /dev/{name} in the jail");
        let dev = jail.mounted.get("dev").ok_or("it is not mounted").attempt(attempted)?;
        rustix::fs::symlinkat(*target, dev, *name).attempt(attempted)?;
    }
    Ok(())
}

/// Makes all in /proc that is no process read-only, and the directory of the jail's init, by a mount of each on itself: whoever is root in
/// the jail could otherwise have the kernel end the init before others (`oom_score_adj`), or slow it down (`autogroup`).
fn protect_kernel_files(jail: &Jail) -> Result<()> {
    let attempted = || "make /proc of the jail read-only where it is not the sessions'";
    let (proc, _) = jail.locate("proc/self").attempt(attempted)?;
    let protect = |name: &str| -> io::Result<()> {
        let file = proc.handle(name)?;
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
        // Links have no mode; what is something else is masked by the container.
        if matches!(kind, FileType::RegularFile | FileType::Directory) {
            Detached::copy_of_fd(&file, true, KERNEL_FILE_ATTRIBUTES)?.attach(file)?;
        }
        Ok(())
    };
    for name in proc.names().attempt(attempted)? {
        let name = name.to_string_lossy();
        if name == "1" || !name.bytes().all(|b| b.is_ascii_digit()) {
            protect(&name).attempt(|| format!("make /proc/{name} of the jail read-only"))?;
        }
    }
    Ok(())
}

/// Nobody is logged in yet, as on a node that has just booted: screen, for one, complains if there is no such file to write to.
fn make_utmp(jail: &Jail) -> Result<()> {
    let attempted = || "make /run/utmp in the jail";
    let (run, name) = jail.locate("run/utmp").attempt(attempted)?;
    run.touch(name).attempt(attempted).map(|_| ())
}

/// Covers the link /proc/1/root with one to /proc: nobody inside may follow the kernel's own, as the init is hidden from them. systemctl,
/// udevadm and Ansible follow it and take themselves to be in a chroot if it leads to another directory than `/`; where they
/// cannot follow it, they try to reach a running systemd and fail.
fn show_root_of_init(jail: &Jail) -> Result<()> {
    const NAME: &str = ".ims-sshd.root";
    let show = || -> io::Result<()> {
        let ((run, _), (proc, link)) = (jail.locate("run/-")?, jail.locate("proc/1/root")?);
        let target = match proc.handle(link) {
            // A /proc of the container that hides others' processes (hidepid).
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        // A link can be mounted on a link, and is then followed as any is. The mount outlives its name.
        rustix::fs::symlinkat("/proc", run, NAME)?;
        Detached::copy_of_fd(run.handle(NAME)?, false, MountAttrFlags::empty())?.attach(target)?;
        run.remove(NAME).map(|_| ())
    };
    show().attempt(|| "mount a link on /proc/1/root of the jail")
}

/// Gives the container's first process the name of the jail's, if the jail shows the container's /proc.
fn show_name_of_init(jail: &Jail) -> Result<()> {
    let show = || -> io::Result<()> {
        let (proc, _) = jail.locate("proc/-")?;
        Detached::copy_of_fd(proc.handle("self/comm")?, false, KERNEL_FILE_ATTRIBUTES)?
            .attach(proc.handle("1/comm")?)?;
        Ok(())
    };
    show().attempt(|| "show the init's name in /proc of the jail")
}

/// Has links at /etc/resolv.conf that lead below /run find the container's text.
fn put_resolv_conf(jail: &Jail, text: &[u8]) -> Result<()> {
    for name in resolv_conf::files_below_run(&jail.root) {
        let attempted = || format!("put the container's resolv.conf at /run/{} of the jail", name.display());
        let (run, _) = jail.locate("run/-").attempt(attempted)?;
        run.make_directories(name.parent().unwrap_or(Path::new(""))).attempt(attempted)?;
        run.replace(&name, text).attempt(attempted)?;
    }
    Ok(())
}

/// This program's file, by the container's /proc.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// Copies this program and `further` ones.
fn copy_programs(further: &[Program]) -> Result<(Detached, Programs)> {
    let own = Program { name: NAME.into(), file: OWN_PROGRAM.into() };
    let (tmpfs, mut copies) = programs::copy(std::iter::once(&own).chain(further))?;
    Ok((tmpfs, Programs { helper: copies.remove(0), others: copies }))
}

/// Shows the copies in the jail: an image need not have an sftp-server, nor a libc, nor our architecture.
fn show_programs(jail: &Jail, copies: Detached) -> Result<()> {
    let show = || -> io::Result<()> {
        let (run, name) = jail.locate(PROGRAMS)?;
        run.make_mount_point(name, true)?;
        copies.attach(run.handle(name)?).map(drop)
    };
    show().attempt(|| format!("show the jail's programs at /{PROGRAMS}"))
}
