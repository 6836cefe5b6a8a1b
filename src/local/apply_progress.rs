//! A record of how far the changes to a directory have been applied, so that a killed run can be resumed.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;

use ring::rand::{SecureRandom, SystemRandom};
use rustix::fs::{FileType, Stat};

use crate::error::{Attempt, Error, Result};
use crate::sys::tree::{Tree, inode_and_birth};

/// Prefix of the stage's name. The stage is a directory inside the directory that is changed. It holds renamed
/// directories until they get their new places, and new files until they are complete. A random number follows the
/// prefix, so that no entry of the source or of a session has the same name.
const STAGE: &str = ".ims-sshd.applying.";

/// File in the work directory that records how far the changes are applied.
pub(crate) const RECORD: &str = ".ims-sshd.applying";

/// Steps of applying changes. After an interruption, the recorded step is the first one to be repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
pub(crate) enum Step {
    /// The image is complete, and nothing is applied yet.
    Decided,
    /// Renamed directories are being moved into the stage.
    Moving,
    /// Everything is being put in its place.
    Placing,
    /// Everything is in its place.
    Placed,
    /// Nothing is left to do.
    Applied,
}

const STEPS: [(Step, &[u8]); 5] = [
    (Step::Decided, b"decided"),
    (Step::Moving, b"moving"),
    (Step::Placing, b"placing"),
    (Step::Placed, b"placed"),
    (Step::Applied, b"applied"),
];

/// Advice if the rest of the changes cannot be applied.
pub(crate) const DROP: &str =
    "the same command with --fresh, or 'ims-sshd fail' with the directory, drops what is not applied yet";

/// Content of the record.
#[derive(Debug)]
pub(crate) struct Progress {
    /// The current step.
    pub(crate) step: Step,
    /// Identity of the directory that is changed, from [`identity`].
    root: String,
    /// Name of the stage.
    pub(crate) stage: String,
    /// Inode number of the stage; 0 until it exists.
    number: u64,
}

/// Records on disk the decision to apply the changes kept in `work` to `root`, so that a later command applies them if
/// this one is killed.
pub(crate) fn decide(work: &Tree, root: &Tree) -> Result<()> {
    let root_is = identity(root).attempt(|| format!("apply the changes to {}", root.shown().display()))?;
    Progress { step: Step::Decided, root: root_is, stage: STAGE.into(), number: 0 }.write(work)
}

/// Returns whether nothing is applied yet, not even a stage exists, though the decision is recorded. If so, the overlay
/// must be mounted again to complete hard links.
pub(crate) fn is_only_decided(work: &Tree) -> Result<bool> {
    Ok(Progress::read(work)?.is_some_and(|progress| progress.step <= Step::Moving && progress.number == 0))
}

/// Returns whether the changes kept in `work` are to be applied, or are being applied.
pub(crate) fn has_begun(work: &Tree) -> Result<bool> {
    let attempted = || format!("read {}", work.shown().join(RECORD).display());
    Ok(work.look(RECORD).attempt(attempted)?.is_some())
}

/// Returns whether everything is applied. The changes kept in `work` may then be incomplete, because they are removed
/// next.
pub(crate) fn has_ended(work: &Tree) -> Result<bool> {
    Progress::read(work).map(|progress| progress.is_some_and(|progress| progress.step == Step::Applied))
}

/// Share of the changes that stays in the directory if applying them is aborted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Applied {
    Nothing,
    Part,
    Everything,
}

/// Share of the changes kept in `work` that is applied. If the record is damaged, assumes a part.
pub(crate) fn applied(work: &Tree) -> Applied {
    match Progress::read(work) {
        Ok(None) => Applied::Nothing,
        // Aborting moves the renamed directories back.
        Ok(Some(progress)) if progress.step <= Step::Moving => Applied::Nothing,
        Ok(Some(progress)) if progress.step == Step::Applied => Applied::Everything,
        Ok(Some(_)) | Err(_) => Applied::Part,
    }
}

/// Returns whether `root` is the directory to which the changes kept in `work` were being applied.
pub(crate) fn is_of(work: &Tree, root: &Tree) -> Result<bool> {
    let root = identity(root).attempt(|| format!("look at {}", root.shown().display()))?;
    Ok(Progress::read(work).is_ok_and(|progress| progress.is_some_and(|progress| progress.root == root)))
}

impl Progress {
    /// Reads the record in `work`; `None` if there is none.
    pub(crate) fn read(work: &Tree) -> Result<Option<Self>> {
        if !has_begun(work)? {
            return Ok(None);
        }
        let attempted = || format!("read {}", work.shown().join(RECORD).display());
        let text = work.read(RECORD, 4096).attempt(attempted)?;
        let parsed = Self::parse(&text);
        parsed.map(Some).ok_or_else(|| Error::new(attempted()).because("it is damaged").advise(DROP))
    }

    fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        let [step, root, stage, number] = text.split(' ').collect::<Vec<_>>().try_into().ok()?;
        let (step, _) = STEPS.iter().find(|(_, name)| *name == step.as_bytes())?;
        let is_name = stage.starts_with(STAGE) && !stage.contains('/');
        is_name.then_some(())?;
        Some(Self { step: *step, root: root.into(), stage: stage.into(), number: number.parse().ok()? })
    }

    /// Writes the record to disk.
    pub(crate) fn write(&self, work: &Tree) -> Result<()> {
        let step = STEPS.iter().find(|(known, _)| *known == self.step).map_or(&b""[..], |(_, name)| *name);
        let rest = format!(" {} {} {}", self.root, self.stage, self.number);
        let attempted = || format!("write {}", work.shown().join(RECORD).display());
        work.replace(RECORD, &[step, rest.as_bytes()].concat()).and_then(|()| work.sync()).attempt(attempted)
    }

    /// Opens the stage; `None` if it does not exist.
    pub(crate) fn open_stage(&self, root: &Tree) -> io::Result<Option<Tree>> {
        let stage = match root.directory_of_same_mount(&self.stage) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let found = rustix::fs::fstat(&stage)?;
        if !is_private_to_root(&found) || found.st_ino != self.number {
            return Err(io::Error::other(format!(
                "another directory has taken the place of {}",
                stage.shown().display()
            )));
        }
        Ok(Some(stage))
    }

    /// Begins to apply `upper` to `root`, or continues what an interrupted run began. Returns the stage too, unless it
    /// has been removed already.
    pub(crate) fn begin(work: &Tree, upper: &Tree, root: &Tree) -> Result<(Self, Option<Tree>)> {
        let attempted = || format!("apply the changes to {}", root.shown().display());
        let root_is = identity(root).attempt(attempted)?;
        if let Some(begun) = Self::read(work)? {
            if begun.root != root_is {
                let why = "it is not the directory to which some of them were applied";
                return Err(Error::new(attempted())
                    .because(why)
                    .advise(format!("put the right directory back at this path; {DROP}")));
            }
            if begun.number != 0 {
                let stage = begun.open_stage(root).attempt(attempted)?;
                if stage.is_none() && begun.step < Step::Placed {
                    let why = format!("{} is gone, with the renamed directories in it", begun.stage);
                    return Err(Error::new(attempted()).because(why).advise(DROP));
                }
                return Ok((begun, stage));
            }
            // If the run was killed before it recorded the stage, the stage is still empty. A directory that is not
            // empty is somebody else's, and its removal fails.
            let _ = root.remove_directory(&begun.stage);
        }
        let stage = loop {
            let mut number = [0; 8];
            SystemRandom::new().fill(&mut number).map_err(io::Error::other).attempt(attempted)?;
            let name = format!("{STAGE}{:016x}", u64::from_ne_bytes(number));
            if root.look(&name).attempt(attempted)?.is_none() && upper.look(&name).attempt(attempted)?.is_none() {
                break name;
            }
        };
        let mut begun = Self { step: Step::Moving, root: root_is, stage, number: 0 };
        begun.write(work)?;
        let make = || {
            let stage = root.make_private(&begun.stage)?;
            root.sync()?;
            io::Result::Ok((rustix::fs::fstat(&stage)?.st_ino, stage))
        };
        let (number, stage) = make().attempt(attempted)?;
        begun.number = number;
        begun.write(work)?;
        Ok((begun, Some(stage)))
    }

    /// The stage whose directories must return to their old places; `None` if there is nothing to undo. Removes a stage
    /// that is not recorded yet.
    pub(crate) fn stage_to_abort(&self, root: &Tree) -> io::Result<Option<Tree>> {
        if self.step == Step::Applied || self.root != identity(root)? {
            return Ok(None);
        }
        if self.number == 0 {
            let _ = root.remove_directory(&self.stage);
            return Ok(None);
        }
        self.open_stage(root)
    }
}

/// Identity of a directory: its inode number and birth time, which a reboot does not change. On a file system without
/// birth times, the device number takes their place, which a reboot may change.
fn identity(root: &Tree) -> io::Result<String> {
    let (inode, made) = inode_and_birth(root)?;
    let device = rustix::fs::fstat(root)?.st_dev;
    Ok(match made {
        (0, 0) => format!("{inode},{}:{}", rustix::fs::major(device), rustix::fs::minor(device)),
        (seconds, nanoseconds) => format!("{inode},{seconds}.{nanoseconds:09}"),
    })
}

/// Name of the stage that an interrupted run left in `root`, if there is one.
pub(crate) fn stage_in(root: &Tree) -> io::Result<Option<OsString>> {
    for name in root.names()?.into_iter().filter(|name| name.as_bytes().starts_with(STAGE.as_bytes())) {
        let found = root.look(&name)?;
        if found.is_some_and(|found| {
            FileType::from_raw_mode(found.st_mode) == FileType::Directory && is_private_to_root(&found)
        }) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// Returns whether the directory belongs to root and nobody else can reach its content.
fn is_private_to_root(found: &Stat) -> bool {
    found.st_uid == rustix::process::geteuid().as_raw() && found.st_mode.trailing_zeros() >= 6
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::apply::apply;
    use crate::volume::layout::SOURCE;
    use std::time::{Duration, SystemTime};

    #[test]
    fn run_that_was_killed_when_it_had_made_the_stage_is_resumed() {
        let dir = tempfile::tempdir().unwrap();
        let [work, upper, root] = ["work", "upper", "root"].map(|name| {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            Tree::open(&dir.path().join(name)).unwrap()
        });
        std::fs::write(dir.path().join("upper/new"), "new").unwrap();
        let opened = std::fs::File::create(dir.path().join("work").join(SOURCE)).unwrap();
        opened.set_modified(SystemTime::now() - Duration::from_secs(9)).unwrap();
        let (mut begun, _) = Progress::begin(&work, &upper, &root).unwrap();
        begun.number = 0;
        begun.write(&work).unwrap();
        apply(&work, &upper, &root).unwrap();
        assert_eq!(root.names().unwrap(), ["new"]);
    }
}
