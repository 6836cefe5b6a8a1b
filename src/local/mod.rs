//! The same on one machine, without a pod.

pub mod apply;
pub mod claim;
pub mod command_line;
pub mod customize;
pub mod directory;
pub mod enter;
pub mod job;
pub mod names;
pub mod register;
pub mod script;
pub mod status;
pub mod steps;
pub mod work_directory;

use std::fs::Permissions;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::mount::MountAttrFlags;

use crate::error::{Attempt, Error, Result};
use crate::local::claim::Claim;
use crate::log::redaction;
use crate::printable;
use crate::publish::manifest;
use crate::sys::file_kind::FileKind;
use crate::sys::mounts::{self, Detached};
use crate::sys::named;
use crate::sys::tree::Tree;
use crate::volume;
use crate::volume::signal_files::SignalFiles;
use crate::volume::state_directory::{RUN, name_for};

/// Refuses who is not root.
pub fn need_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(Error::new("open an image root").because("this user may not").advise("run it as root, with sudo"))
}

/// The image root that was named, without links on the way to it.
pub fn image_root(source: &Path) -> Result<PathBuf> {
    need_root()?;
    let refuse = |why: String| Error::bad_input(format!("SOURCE is '{}': {why}", source.display()));
    let real = named::resolve(source).map_err(|e| refuse(e.to_string()))?;
    match real.is_dir() {
        _ if real == Path::new("/") => {
            Err(refuse("that is this machine's own root; expected an unpacked image".into()))
        }
        true => {
            let tree = Tree::open(&real).map_err(|e| refuse(e.to_string()))?;
            volume::image_root::check(&tree, &real, false, refuse).map(|()| real)
        }
        false => Err(refuse("expected a directory, an unpacked image".into())),
    }
}

/// The directory that `source` names, if it is one.
pub fn directory_of(source: &str) -> Option<PathBuf> {
    std::fs::canonicalize(source).ok().filter(|path| path.is_dir())
}

/// Prints `text`. Nobody listening any more is no reason to end an environment.
pub fn say(text: &str) {
    let mut out = std::io::stdout();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Prints `value` in JSON, in one line.
pub fn say_json(value: &serde_json::Value) {
    say(&format!("{}\n", printable::json(&value.to_string())));
}

/// Prints what became of a publication, as upstream prints it: people and scripts search pod logs for it.
pub fn say_result(value: &serde_json::Value) {
    let text = String::from_utf8_lossy(&manifest::indented(value)).into_owned();
    // Records of IMS, and what servers have said, are in it.
    say(&format!("{}\n", printable::json(&redaction::without_known(&text))));
}

/// Mounts that only this program and what it starts see, with terminals of their own: a session in the image must not reach those
/// of this machine's users.
pub fn own_mounts() -> Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
        .attempt(|| "make own mounts")
        .map_err(|e| e.advise("run it as root, with CAP_SYS_ADMIN"))?;
    mounts::make_all_private().attempt(|| "cut own mounts off from the machine's")
}

/// Gives sessions terminals of their own.
pub fn own_terminals() -> Result<()> {
    let attempted = || "mount terminals of their own for sessions on /dev/pts";
    // The machine has 4096 (kernel.pty.max), of which sessions must not use up all.
    let options = [("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5"), ("max", "1024")];
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let target = Tree::open(Path::new("/dev/pts")).attempt(attempted)?;
    // What the machine's users have open stays theirs: this instance lies over it, in our own mounts only.
    Detached::filesystem("devpts", &options, attributes).and_then(|pts| pts.attach(target)).attempt(attempted)?;
    let dev = Tree::open(Path::new("/dev")).attempt(attempted)?;
    let ptmx = dev.look("ptmx").attempt(attempted)?.as_ref().map(crate::sys::file_kind::FileKind::of);
    if ptmx == Some(FileKind::CharacterDevice) {
        let own = Detached::copy_of("/dev/pts/ptmx", false, MountAttrFlags::empty()).attempt(attempted)?;
        dev.handle("ptmx").and_then(|ptmx| own.attach(ptmx)).attempt(attempted)?;
    }
    Ok(())
}

/// Removes a folder with the files in it. Never descends: an image root may be mounted below.
pub fn remove_folder(path: &Path) -> Result<()> {
    remove_files(path, |_| true)?;
    std::fs::remove_dir(path).attempt(|| format!("remove {}", path.display()))
}

fn remove_files(path: &Path, which: impl Fn(&str) -> bool) -> Result<()> {
    let attempted = || format!("clear {}", path.display());
    for entry in std::fs::read_dir(path).attempt(attempted)? {
        let entry = entry.attempt(attempted)?;
        if which(&entry.file_name().to_string_lossy()) {
            let is_folder = entry.file_type().attempt(attempted)?.is_dir();
            let remove = if is_folder { std::fs::remove_dir } else { std::fs::remove_file };
            remove(entry.path()).attempt(|| format!("remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

/// Claims the directory that `make` makes or finds, and does so once more if it was removed meanwhile, by the run that had it before.
fn claim(make: impl Fn() -> Result<PathBuf>) -> Result<SignalFiles> {
    loop {
        let path = make()?;
        let attempted = || format!("open {}", path.display());
        let Some(mut files) = SignalFiles::open(&path)? else { continue };
        files.claim()?;
        let claimed = rustix::fs::fstat(files.parent()).attempt(attempted)?;
        match std::fs::symlink_metadata(&path) {
            Ok(found) if (found.dev(), found.ino()) == (claimed.st_dev, claimed.st_ino) => return Ok(files),
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e).attempt(attempted),
            _ => {}
        }
    }
}

/// Returns whether a run has claimed the directory `path`, which may be missing.
pub fn is_claimed(path: &Path) -> Result<bool> {
    Ok(SignalFiles::open(path)?.is_some_and(|files| files.is_claimed()))
}

/// The folder of one run on an image root; the image root's parent, as a pod's environment has one.
pub struct RunFolder {
    files: SignalFiles,
    claim: Claim,
}

impl RunFolder {
    /// Makes and claims the folder for `image_root`, of which only one run can be open. Others can open what they know the name of: who has
    /// an authorized key, ssh's configuration. Private keys are root's.
    pub fn claim(command: &str, image_root: &Path) -> Result<Self> {
        let path = Self::place(command, image_root);
        let all = Path::new(RUN).join(command);
        let by_inode = Claim::take(command, image_root)?;
        let files = claim(|| {
            let attempted = || format!("make the folder {}", path.display());
            std::fs::create_dir_all(&path).attempt(attempted)?;
            for folder in [Path::new(RUN), &all, &path] {
                std::fs::set_permissions(folder, Permissions::from_mode(0o711)).attempt(attempted)?;
            }
            Ok(path.clone())
        })?;
        // Signals of an earlier run that was killed mean nothing now. What it noted for us to clear up has a hidden name.
        remove_files(&path, |name| !name.starts_with('.'))?;
        Ok(Self { files, claim: by_inode })
    }

    /// Returns its path, whether or not it exists.
    pub fn place(command: &str, image_root: &Path) -> PathBuf {
        Path::new(RUN).join(command).join(name_for(image_root))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.files.path()
    }

    /// Returns whether a run of `command` has the image root open, by this path or another.
    pub fn is_claimed(command: &str, image_root: &Path) -> Result<bool> {
        Ok(is_claimed(&Self::place(command, image_root))? || Claim::is_taken(command, image_root)?)
    }

    /// Its signal files, and with them the claims, which also last as long as these values do.
    pub fn into_signal_files(self) -> Result<(SignalFiles, (Option<OwnedFd>, Claim))> {
        let claim = self.files.share_claim().attempt(|| format!("keep {} claimed", self.path().display()))?;
        Ok((self.files, (claim, self.claim)))
    }
}
