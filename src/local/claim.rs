//! Claims of image roots by device and inode: a bind mount is another path to the same directory. They are no substitute for the locked
//! directory of a run (see [`RunFolder`]): what a run that was killed has left is found by its path, since an overlay has another
//! device each time that it is mounted, and none in the mounts of others.

use std::ffi::OsString;
use std::fs::Metadata;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Attempt, Error, Result};
use crate::volume::holds;
use crate::volume::signal_files::{SignalFiles, claimed};
use crate::volume::state_directory::RUN;

/// Directory of claims, below [`RUN`].
const CLAIMS: &str = ".claims";

/// File in a claim that holds the image root's path, by which the directories above it are found.
const PATH: &str = "path";

/// The kernel takes no longer path.
const LIMIT: u64 = 4096;

/// An image root that is claimed for one command.
pub(crate) struct Claim {
    files: SignalFiles,
}

impl Claim {
    /// Claims the image root for `command`, as long as the value lives. An image root that lies in one that is open, or that one lies in, is
    /// refused: each would be packed, and changed, with the other.
    pub(crate) fn take(command: &str, image_root: &Path) -> Result<Self> {
        let path = place(command, &look(image_root)?);
        let make = || {
            let attempted = || format!("make {}", path.display());
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).attempt(attempted)?;
            Ok(path.clone())
        };
        remove_abandoned();
        let mut retries = 0..10;
        let claim = loop {
            match claim(make) {
                // Another run may be removing it, as abandoned.
                Err(_) if retries.next().is_some() => std::thread::sleep(Duration::from_millis(5)),
                Err(_) if is_claimed(&path)? => return Err(claimed(image_root)),
                taken => break Self { files: taken? },
            }
        };
        // Written before others are looked for: of two that begin at once, at least one sees the other.
        let written = claim.files.parent().replace(PATH, image_root.as_os_str().as_bytes());
        written.attempt(|| format!("write {}/{PATH}", path.display()))?;
        refuse_nested(image_root).map(|()| claim)
    }

    /// Returns whether a run of `command` has claimed the image root, by whatever path.
    pub(crate) fn is_taken(command: &str, image_root: &Path) -> Result<bool> {
        is_claimed(&place(command, &look(image_root)?))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let _ = remove_folder(self.files.path());
        remove_abandoned();
    }
}

/// Removes claims of killed runs. No later run takes those again: an overlay has another device each time.
fn remove_abandoned() {
    for entry in std::fs::read_dir(Path::new(RUN).join(CLAIMS)).into_iter().flatten().flatten() {
        let path = entry.path();
        // Locked meanwhile, so that a run that takes it now notices.
        if let Ok(Some(mut files)) = SignalFiles::open(&path)
            && files.claim().is_ok()
        {
            let _ = remove_folder(&path);
        }
    }
}

/// Refuses a directory that lies in an image root that is open, or that holds one.
pub(crate) fn refuse_nested(directory: &Path) -> Result<()> {
    let here = look(directory)?;
    let real = std::fs::canonicalize(directory).attempt(|| format!("open {}", directory.display()))?;
    let above: Vec<String> =
        real.ancestors().skip(1).filter_map(|above| Some(identity(&std::fs::metadata(above).ok()?))).collect();
    for entry in std::fs::read_dir(Path::new(RUN).join(CLAIMS)).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some((_, claimed)) = name.to_str().and_then(|name| name.split_once('-')) else { continue };
        if claimed == identity(&here) || !is_claimed(&entry.path())? {
            continue;
        }
        // One that is being made has no path yet: who makes it looks for this one.
        let path = SignalFiles::open(&entry.path())?.and_then(|files| files.parent().read(PATH, LIMIT).ok());
        let path = path.map(|path| PathBuf::from(OsString::from_vec(path)));
        let shown = path.as_deref().map_or_else(|| "a directory above it".into(), |path| path.display().to_string());
        let why = if above.iter().any(|above| above == claimed) {
            format!("it lies in {shown}, which is open")
        } else if path.is_some_and(|path| holds(directory, &path).unwrap_or(false)) {
            format!("{shown}, which lies in it, is open")
        } else {
            continue;
        };
        return Err(Error::new(format!("open {}", directory.display()))
            .because(why)
            .advise("wait until that is closed; 'ims-sshd status' names it"));
    }
    Ok(())
}

fn place(command: &str, image_root: &Metadata) -> PathBuf {
    Path::new(RUN).join(CLAIMS).join(format!("{command}-{}", identity(image_root)))
}

fn identity(directory: &Metadata) -> String {
    format!("{:x}-{}", directory.dev(), directory.ino())
}

fn look(image_root: &Path) -> Result<Metadata> {
    std::fs::metadata(image_root).attempt(|| format!("open {}", image_root.display()))
}

/// Removes a folder with the files in it. Never descends: an image root may be mounted below.
pub(crate) fn remove_folder(path: &Path) -> Result<()> {
    remove_files(path, |_| true)?;
    std::fs::remove_dir(path).attempt(|| format!("remove {}", path.display()))
}

pub(crate) fn remove_files(path: &Path, which: impl Fn(&str) -> bool) -> Result<()> {
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
pub(crate) fn claim(make: impl Fn() -> Result<PathBuf>) -> Result<SignalFiles> {
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
pub(crate) fn is_claimed(path: &Path) -> Result<bool> {
    Ok(SignalFiles::open(path)?.is_some_and(|files| files.is_claimed()))
}
