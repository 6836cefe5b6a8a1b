//! Claims of image roots by device and inode, since a bind mount is another path to the same directory. They do not
//! replace the locked directory of a run ([`RunDirectory`]): leftovers of a killed run have to be found by path,
//! because an overlay gets a new device number each time it is mounted, and is not visible from other mount namespaces.

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

/// File in a claim that holds the image root's path.
const PATH: &str = "path";

/// Maximum length of a path, in bytes (PATH_MAX).
const LIMIT: u64 = 4096;

/// An image root that is claimed for one command.
pub(crate) struct Claim {
    files: SignalFiles,
}

impl Claim {
    /// Claims the image root for `command` as long as the value lives. Refuses an image root that contains another open
    /// image root or is inside one, because each would be changed and packed with the other.
    pub(crate) fn take(command: &str, image_root: &Path) -> Result<Self> {
        let path = place(command, &look(image_root)?);
        let make = || {
            let attempted = || format!("create {}", path.display());
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).attempt(attempted)?;
            Ok(path.clone())
        };
        remove_abandoned();
        let mut retries = 0..10;
        let claim = loop {
            match claim(make) {
                // Try again: another run may be removing this claim because it was abandoned.
                Err(_) if retries.next().is_some() => std::thread::sleep(Duration::from_millis(5)),
                Err(_) if is_claimed(&path)? => return Err(claimed(image_root)),
                taken => break Self { files: taken? },
            }
        };
        // Write the path before looking for others: if two runs start at the same time, at least one sees the other.
        let written = claim.files.parent().replace(PATH, image_root.as_os_str().as_bytes());
        written.attempt(|| format!("write {}/{PATH}", path.display()))?;
        refuse_nested(image_root).map(|()| claim)
    }

    /// Returns whether a run of `command` has claimed the image root, by any path.
    pub(crate) fn is_taken(command: &str, image_root: &Path) -> Result<bool> {
        is_claimed(&place(command, &look(image_root)?))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let _ = remove_directory(self.files.path());
        remove_abandoned();
    }
}

/// Removes claims of killed runs. No later run would reuse them, because an overlay gets a new device number each time
/// it is mounted.
fn remove_abandoned() {
    for entry in std::fs::read_dir(Path::new(RUN).join(CLAIMS)).into_iter().flatten().flatten() {
        let path = entry.path();
        // Lock the claim first, so that a run that takes it at the same time notices the removal.
        if let Ok(Some(mut files)) = SignalFiles::open(&path)
            && files.claim().is_ok()
        {
            let _ = remove_directory(&path);
        }
    }
}

/// Refuses a directory that contains an open image root or is inside one.
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
        // A claim without a path is still being created; its owner will find the claim of this run.
        let path = SignalFiles::open(&entry.path())?.and_then(|files| files.parent().read(PATH, LIMIT).ok());
        let path = path.map(|path| PathBuf::from(OsString::from_vec(path)));
        let shown = path.as_deref().map_or_else(|| "a directory above it".into(), |path| path.display().to_string());
        let why = if above.iter().any(|above| above == claimed) {
            format!("it is inside {shown}, which is open")
        } else if path.is_some_and(|path| holds(directory, &path).unwrap_or(false)) {
            format!("{shown} inside it is open")
        } else {
            continue;
        };
        return Err(Error::new(format!("open {}", directory.display()))
            .because(why)
            .advise("wait until that closes; 'ims-sshd status' names it"));
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

/// Removes a directory with the files in it. Never descends into subdirectories: an image root may be mounted on one.
pub(crate) fn remove_directory(path: &Path) -> Result<()> {
    remove_files(path, |_| true)?;
    std::fs::remove_dir(path).attempt(|| format!("remove {}", path.display()))
}

/// Removes the entries of a directory whose names `which` accepts; subdirectories only if they are empty.
pub(crate) fn remove_files(path: &Path, which: impl Fn(&str) -> bool) -> Result<()> {
    let attempted = || format!("clear {}", path.display());
    for entry in std::fs::read_dir(path).attempt(attempted)? {
        let entry = entry.attempt(attempted)?;
        if which(&entry.file_name().to_string_lossy()) {
            let is_directory = entry.file_type().attempt(attempted)?.is_dir();
            let remove = if is_directory { std::fs::remove_dir } else { std::fs::remove_file };
            remove(entry.path()).attempt(|| format!("remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

/// Claims the directory that `make` creates or finds. Tries again if its previous owner has removed it in the meantime.
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
