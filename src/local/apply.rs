//! The changes to a directory, kept in the upper layer of an overlay, become the directory's own.
//!
//! A step looks only at the upper layer, which stays as it is, and does nothing where the directory is already as wanted. So an
//! application that was killed is begun again, as often as needed. Two steps cannot be repeated: to move away the directories that were
//! renamed, whose old names other things may have by now, and to remove the place where they were kept. A record says which are behind.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use ring::rand::{SecureRandom, SystemRandom};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, StatxAttributes, StatxFlags, Timespec, Timestamps, UTIME_NOW};
use rustix::io::Errno;

use crate::error::{Attempt, Error, Result};
use crate::sys::attributes::{Attributes, Node};
use crate::sys::tree::{Descent, Tree, times};
use crate::volume::layout::SOURCE;

/// Beginning of the name of a directory in the one that is changed: what was renamed waits there, and new files until they are whole. A
/// number follows that makes it one that neither the source nor the session has.
const STAGE: &str = ".ims-sshd.applying.";

/// File in the work directory that records how far the application is.
const RECORD: &str = ".ims-sshd.applying";

/// The kernel keeps its notes about a file of the upper layer in attributes of this prefix. What a session has named like this, to mount
/// an overlay of its own, has the last part twice.
const NOTE: &[u8] = b"trusted.overlay.";
const ESCAPED: &[u8] = b"trusted.overlay.overlay.";

/// Steps of an application, by which it is resumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Step {
    /// The image is complete, and nothing is applied yet.
    Decided,
    /// Directories that were renamed are put aside.
    Moving,
    /// Everything gets its place.
    Placing,
    /// Everything has it.
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

/// Content of the record.
#[derive(Debug)]
struct Progress {
    step: Step,
    /// Identity of the directory that is changed.
    root: String,
    /// Name of the stage, and its number once it is made.
    stage: String,
    number: u64,
}

/// A directory of the upper layer.
#[derive(Debug)]
struct Origin {
    /// The directory of the source that it adds to; none if nothing of the source is seen in it.
    below: Option<PathBuf>,
    /// True if that had another name.
    renamed: bool,
    /// Name of it as long as it is put aside.
    aside: String,
}

/// Names of one file that one of them has changed in the overlay: each gets its place in the upper layer. Called while the overlay of
/// `lower` and `upper` is mounted at `merged`, with its index in `index`.
pub(crate) fn complete_hard_links(lower: &Tree, upper: &Tree, index: &Path, merged: &Tree) -> Result<()> {
    if std::fs::read_dir(index).map_or(true, |mut entries| entries.next().is_none()) {
        return Ok(());
    }
    let attempted = || format!("find the names of changed files in {}", merged.shown().display());
    let origins = origins(upper).attempt(attempted)?;
    let visit = |path: &Path, directory: &Tree, name: &OsStr, found: &Stat| {
        if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
            return Ok(());
        }
        if upper.handle_without_links(path).is_ok() {
            return Ok(());
        }
        let Some(source) = below(&origins, path) else { return Ok(()) };
        let before = rustix::fs::fstat(lower.handle_without_links(source)?)?;
        // The count in the source decides: the session may have removed all names but one.
        if before.st_nlink < 2 {
            return Ok(());
        }
        if (before.st_ctime, before.st_ctime_nsec) == (found.st_ctime, found.st_ctime_nsec) {
            return Ok(());
        }
        // Any change of its attributes, even to the same ones, has the kernel link the name.
        Ok(rustix::fs::utimensat(directory, name, &times(found), AtFlags::SYMLINK_NOFOLLOW)?)
    };
    merged.walk(visit).attempt(attempted)
}

/// Path in the source of what is seen at `path` of the overlay and is not in the upper layer.
fn below(origins: &BTreeMap<PathBuf, Origin>, path: &Path) -> Option<PathBuf> {
    let (above, origin) = path.ancestors().skip(1).find_map(|above| Some((above, origins.get(above)?)))?;
    Some(origin.below.as_ref()?.join(path.strip_prefix(above).ok()?))
}

/// Records, on disk, that the changes kept in `work` are to be applied to `root`: from here on no command forgets that.
pub(crate) fn decide(work: &Tree, root: &Tree) -> Result<()> {
    let root_is = identity(root).attempt(|| format!("apply the changes to {}", root.shown().display()))?;
    Progress { step: Step::Decided, root: root_is, stage: STAGE.into(), number: 0 }.write(work)
}

/// Returns whether all of it is still to be done: the overlay has to be mounted once more for [`complete_hard_links`].
pub(crate) fn is_only_decided(work: &Tree) -> Result<bool> {
    Ok(Progress::read(work)?.is_some_and(|progress| progress.step == Step::Decided))
}

/// Returns whether an application was decided on, or has begun, with the changes kept in `work`.
pub(crate) fn has_begun(work: &Tree) -> Result<bool> {
    let attempted = || format!("read {}", work.shown().join(RECORD).display());
    Ok(work.look(RECORD).attempt(attempted)?.is_some())
}

impl Progress {
    fn read(work: &Tree) -> Result<Option<Self>> {
        if !has_begun(work)? {
            return Ok(None);
        }
        let attempted = || format!("read {}", work.shown().join(RECORD).display());
        let text = work.read(RECORD, 4096).attempt(attempted)?;
        let parsed = Self::parse(&text);
        parsed.map(Some).ok_or_else(|| Error::new(attempted()).because("it is not as it was written").advise(DROP))
    }

    fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        let [step, root, stage, number] = text.split(' ').collect::<Vec<_>>().try_into().ok()?;
        let (step, _) = STEPS.iter().find(|(_, name)| *name == step.as_bytes())?;
        let is_name = stage.starts_with(STAGE) && !stage.contains('/');
        is_name.then_some(())?;
        Some(Self { step: *step, root: root.into(), stage: stage.into(), number: number.parse().ok()? })
    }

    fn write(&self, work: &Tree) -> Result<()> {
        let step = STEPS.iter().find(|(known, _)| *known == self.step).map_or(&b""[..], |(_, name)| *name);
        let rest = format!(" {} {} {}", self.root, self.stage, self.number);
        let attempted = || format!("write {}", work.shown().join(RECORD).display());
        work.replace(RECORD, &[step, rest.as_bytes()].concat()).and_then(|()| work.sync()).attempt(attempted)
    }

    /// The stage; none if it is gone.
    fn stage(&self, root: &Tree) -> io::Result<Option<Tree>> {
        let stage = match root.directory_of_same_mount(&self.stage) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let found = rustix::fs::fstat(&stage)?;
        if !is_ours(&found) || found.st_ino != self.number {
            return Err(io::Error::other(format!(
                "another directory has taken the place of {}",
                stage.shown().display()
            )));
        }
        Ok(Some(stage))
    }
}

const DROP: &str =
    "the same command with --fresh, or 'ims-sshd fail' with the directory, gives up what is not applied yet";

/// Returns whether only root reaches its content.
fn is_ours(found: &Stat) -> bool {
    found.st_uid == rustix::process::geteuid().as_raw() && found.st_mode.trailing_zeros() >= 6
}

/// Returns a text that tells a directory from another, also after a reboot, which may change the number of its device.
fn identity(root: &Tree) -> io::Result<String> {
    let found = rustix::fs::statx(root, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS | StatxFlags::BTIME)?;
    let made = if found.stx_mask & StatxFlags::BTIME.bits() == 0 {
        format!("{}:{}", found.stx_dev_major, found.stx_dev_minor)
    } else {
        format!("{}.{:09}", found.stx_btime.tv_sec, found.stx_btime.tv_nsec)
    };
    Ok(format!("{},{made}", found.stx_ino))
}

/// Name of the stage of an application to `root`, if one has left it there.
pub(crate) fn stage_in(root: &Tree) -> io::Result<Option<OsString>> {
    for name in root.names()?.into_iter().filter(|name| name.as_bytes().starts_with(STAGE.as_bytes())) {
        let found = root.look(&name)?;
        if found.is_some_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::Directory && is_ours(&found)) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// Begins an application, or looks how far it is.
fn begin(work: &Tree, upper: &Tree, root: &Tree) -> Result<(Progress, Option<Tree>)> {
    let attempted = || format!("apply the changes to {}", root.shown().display());
    let root_is = identity(root).attempt(attempted)?;
    if let Some(begun) = Progress::read(work)? {
        if begun.root != root_is {
            let why = "it is another directory than the one that has some of them";
            return Err(Error::new(attempted()).because(why).advise(format!("put that in its place; {DROP}")));
        }
        if begun.number != 0 {
            let stage = begun.stage(root).attempt(attempted)?;
            if stage.is_none() && begun.step < Step::Placed {
                let why = format!("{} is gone, with the directories that were put aside in it", begun.stage);
                return Err(Error::new(attempted()).because(why).advise(DROP));
            }
            return Ok((begun, stage));
        }
        // Killed as it was made: it is empty, and of no use to who has put another thing there.
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
    let mut begun = Progress { step: Step::Moving, root: root_is, stage, number: 0 };
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

/// Changes `root` to what the overlay of it and `upper` has shown, or goes on with that. The overlay is mounted no more, and nobody else
/// writes to either. Once this has begun the image is complete: it ends only when everything is applied.
pub(crate) fn apply(work: &Tree, upper: &Tree, root: &Tree) -> Result<()> {
    let attempted = || format!("apply the changes to {}", root.shown().display());
    let origins = origins(upper).attempt(attempted)?;
    if !has_begun(work)? || is_only_decided(work)? && is_of(work, root)? {
        let refused = refuse_unchangeable(upper, root, &origins).and_then(|()| refuse_edited(work, upper, root));
        if let Err(refusal) = refused {
            // Nothing is applied: whoever goes on finds the changes as they were.
            work.remove(RECORD).attempt(|| format!("remove {}", work.shown().join(RECORD).display()))?;
            return Err(refusal);
        }
    }
    let (mut begun, stage) = begin(work, upper, root)?;
    if let Some(stage) = stage {
        let application = Application { upper, root, stage, origins: &origins };
        if begun.step == Step::Moving {
            application.put_aside().and_then(|()| root.sync()).attempt(attempted)?;
            begun.step = Step::Placing;
            begun.write(work)?;
        }
        if begun.step == Step::Placing {
            application.place().and_then(|()| root.sync()).attempt(attempted)?;
            begun.step = Step::Placed;
            begun.write(work)?;
        }
        // Only copies are left in it: all that was put aside has its place.
        remove_copies(&application.stage).and_then(|()| root.remove_directory(&begun.stage)).attempt(attempted)?;
    }
    take_attributes(upper, root).and_then(|()| root.sync()).attempt(attempted)?;
    begun.step = Step::Applied;
    begun.write(work)
}

/// Returns whether all is applied. Any part of the changes kept in `work` may be gone by then.
pub(crate) fn has_ended(work: &Tree) -> Result<bool> {
    Progress::read(work).map(|progress| progress.is_some_and(|progress| progress.step == Step::Applied))
}

/// Returns whether `root` is the directory to which the changes kept in `work` were being applied.
pub(crate) fn is_of(work: &Tree, root: &Tree) -> Result<bool> {
    let root = identity(root).attempt(|| format!("look at {}", root.shown().display()))?;
    Ok(Progress::read(work).is_ok_and(|progress| progress.is_some_and(|progress| progress.root == root)))
}

/// Gives an application up that was interrupted: what was put aside gets its old place again. What is applied stays.
pub(crate) fn give_up(work: &Tree, upper: &Tree, root: &Tree) -> Result<()> {
    let attempted = || format!("give up the changes to {}", root.shown().display());
    let Some(begun) = Progress::read(work).unwrap_or(None) else { return Ok(()) };
    if begun.step == Step::Applied || begun.root != identity(root).attempt(attempted)? {
        return Ok(());
    }
    if begun.number == 0 {
        let _ = root.remove_directory(&begun.stage);
        return Ok(());
    }
    let Some(stage) = begun.stage(root).attempt(attempted)? else { return Ok(()) };
    let put_back = || {
        // Directories that held others come first.
        let origins = origins(upper)?;
        let by_source: BTreeMap<_, _> =
            origins.values().filter(|o| o.renamed).filter_map(|o| Some((o.below.as_ref()?, &o.aside))).collect();
        for (source, aside) in by_source {
            let above = root.directory_without_links(this(source.parent().unwrap_or(Path::new(""))));
            let name = source.file_name().unwrap_or_default();
            if let Ok(above) = above
                && above.look(name)?.is_none()
                && stage.look(aside)?.is_some()
            {
                rustix::fs::renameat(&stage, aside.as_str(), &above, name)?;
            }
        }
        remove_copies(&stage)
    };
    put_back().attempt(attempted)?;
    if !stage.names().attempt(attempted)?.is_empty() {
        let why = format!("{} holds directories whose old places are taken", stage.shown().display());
        return Err(Error::new(attempted()).because(why).advise("move them where they belong, and remove it"));
    }
    root.remove_directory(&begun.stage).map(|_| ()).attempt(attempted)
}

/// Refuses, before anything is applied, what the file system would refuse halfway.
fn refuse_unchangeable(upper: &Tree, root: &Tree, origins: &BTreeMap<PathBuf, Origin>) -> Result<()> {
    let attempted = || format!("apply the changes to {}", root.shown().display());
    let fixed = touched(upper, root, origins, |_, directory, name| is_fixed(directory, name)).attempt(attempted)?;
    if let Some(path) = fixed.first() {
        let shown = root.shown().join(path);
        return Err(Error::new(attempted())
            .because(format!("{} may not be changed (immutable, or append-only)", shown.display()))
            .advise(format!("'chattr -i -a {}' lets it be changed", shown.display())));
    }
    Ok(())
}

/// Refuses to put the changes kept in `work` over what somebody has changed in `root` since it was opened.
pub(crate) fn refuse_edited(work: &Tree, upper: &Tree, root: &Tree) -> Result<()> {
    let attempted = || format!("put the changes over {}", root.shown().display());
    let Some(opened) = work.look(SOURCE).attempt(attempted)? else { return Ok(()) };
    let is_newer = |path: &Path, directory: &Tree, name: &OsStr| {
        let found = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        // A rename of the image root itself changes its ctime alone. Nobody can set the ctime.
        let changed = if path == Path::new("") {
            (found.st_mtime, found.st_mtime_nsec)
        } else {
            (found.st_ctime, found.st_ctime_nsec)
        };
        Ok(changed > (opened.st_mtime, opened.st_mtime_nsec))
    };
    let edited = origins(upper).and_then(|origins| touched(upper, root, &origins, is_newer)).attempt(attempted)?;
    if edited.is_empty() {
        return Ok(());
    }
    let named: Vec<_> = edited.iter().take(3).map(|path| root.shown().join(path).display().to_string()).collect();
    let further = if edited.len() > 3 { format!(" and {} more", edited.len() - 3) } else { String::new() };
    Err(Error::new(attempted())
        .because(format!("it was changed by hand since it was opened: {}{further}", named.join(", ")))
        .advise(format!(
            "the changed files are in {}: copy what is needed; then 'ims-sshd fail {}', or the same command with --fresh, drops the changes",
            upper.shown().display(),
            root.shown().display()
        )))
}

/// Records that the source was looked at now, and that what is changed in it from here on is not in the changes kept in `work`.
pub(crate) fn look_again(work: &Tree) -> Result<()> {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let times = Timestamps { last_access: now, last_modification: now };
    let touched = rustix::fs::utimensat(work, SOURCE, &times, AtFlags::SYMLINK_NOFOLLOW);
    touched.attempt(|| format!("touch {}", work.shown().join(SOURCE).display()))
}

/// Returns whether `upper` changes nothing of `lower`. The jail has directories copied, and the resolv.conf that it gives back.
pub(crate) fn is_unchanged(upper: &Tree, lower: &Tree) -> io::Result<bool> {
    let (mut uppers, mut lowers) = (Descent::of(upper), Descent::of(lower));
    let here = OsStr::new(".");
    for (path, origin) in origins(upper)? {
        if origin.below.as_ref() != Some(&path) {
            return Ok(false);
        }
        let from = uppers.directory_without_links(this(&path))?;
        let to = match lowers.directory_without_links(this(&path)) {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(false),
            to => to?,
        };
        if !is_alike(from, to, here)? {
            return Ok(false);
        }
        for name in from.names()? {
            let found = rustix::fs::statat(from, &name, AtFlags::SYMLINK_NOFOLLOW)?;
            let is_alike = match FileType::from_raw_mode(found.st_mode) {
                FileType::Directory => true,
                _ if is_whiteout(&found) => to.look(&name)?.is_none(),
                _ => to.look(&name)?.is_some() && is_alike(from, to, &name)?,
            };
            if !is_alike {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Larger files are taken for changed.
const LARGEST_COMPARED: u64 = 1 << 20;

/// Returns whether `name` is alike in both, but for the time of a directory.
fn is_alike(upper: &Tree, lower: &Tree, name: &OsStr) -> io::Result<bool> {
    let nodes = [upper, lower].map(|directory| Node { directory, name });
    let [a, b] = [upper, lower].map(|directory| rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW));
    let (a, b) = (a?, b?);
    let kind = FileType::from_raw_mode(a.st_mode);
    let owned = |found: &Stat| (found.st_mode, found.st_uid, found.st_gid, found.st_rdev);
    let sized = |found: &Stat| (found.st_size, found.st_mtime, found.st_mtime_nsec);
    let is_sized = kind == FileType::Directory || sized(&a) == sized(&b);
    if owned(&a) != owned(&b) || !is_sized || shown(nodes[0].attributes()?) != shown(nodes[1].attributes()?) {
        return Ok(false);
    }
    Ok(match kind {
        FileType::RegularFile => {
            let read = |directory: &Tree| directory.read(name, LARGEST_COMPARED);
            a.st_size.cast_unsigned() <= LARGEST_COMPARED && read(upper)? == read(lower)?
        }
        FileType::Symlink => {
            rustix::fs::readlinkat(upper, name, Vec::new())? == rustix::fs::readlinkat(lower, name, Vec::new())?
        }
        _ => true,
    })
}

/// Paths of `root` that the changes alter or remove, and that are `meant`.
fn touched(
    upper: &Tree,
    root: &Tree,
    origins: &BTreeMap<PathBuf, Origin>,
    meant: impl Fn(&Path, &Tree, &OsStr) -> io::Result<bool>,
) -> io::Result<Vec<PathBuf>> {
    let mut touched = Vec::new();
    let moved: BTreeSet<&Path> = origins.values().filter(|o| o.renamed).filter_map(|o| o.below.as_deref()).collect();
    // Paths that are changed, or removed with all that is in them.
    let mut open: Vec<PathBuf> = Vec::new();
    let (mut uppers, mut roots) = (Descent::of(upper), Descent::of(root));
    for (path, origin) in origins {
        let Some(below) = &origin.below else { continue };
        let directory = match roots.directory_without_links(below) {
            // The session made it; the directory does not have it.
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => continue,
            other => other?,
        };
        if meant(below, directory, OsStr::new("."))? {
            touched.push(below.clone());
        }
        for name in uppers.directory_without_links(path)?.names()? {
            let source = below.join(&name);
            if origins.get(&path.join(&name)).is_none_or(|o| o.below.as_ref() != Some(&source)) {
                open.push(source);
            }
        }
    }
    while let Some(path) = open.pop() {
        if moved.contains(path.as_path()) {
            continue;
        }
        let directory = roots.directory_without_links(path.parent().unwrap_or(Path::new("")))?;
        let name = path.file_name().unwrap_or_default();
        let Some(found) = directory.look(name)? else { continue };
        if meant(&path, directory, name)? {
            touched.push(path.clone());
        }
        if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
            open.extend(directory.directory_without_links(name)?.names()?.iter().map(|name| path.join(name)));
        }
    }
    touched.sort();
    Ok(touched)
}

fn is_fixed(directory: &Tree, name: &OsStr) -> io::Result<bool> {
    let found = rustix::fs::statx(directory, name, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)?;
    Ok(found.stx_attributes.intersects(StatxAttributes::IMMUTABLE | StatxAttributes::APPEND))
}

/// Name of a new file until it is whole, and the first letter of a file's that has several names.
const NEW: &str = "new";
const COPY: char = 'c';

fn remove_copies(stage: &Tree) -> io::Result<()> {
    let is_copy = |name: &&OsString| *name == NEW || name.as_bytes()[0] == COPY as u8;
    stage.names()?.iter().filter(is_copy).try_for_each(|name| stage.remove_whole(name))
}

fn this(path: &Path) -> &Path {
    if path.as_os_str().is_empty() { Path::new(".") } else { path }
}

/// The directories of the upper layer, by path.
fn origins(upper: &Tree) -> io::Result<BTreeMap<PathBuf, Origin>> {
    let root = Origin { below: Some(PathBuf::new()), renamed: false, aside: String::new() };
    let mut origins = BTreeMap::from([(PathBuf::new(), root)]);
    let (mut open, mut descent) = (vec![PathBuf::new()], Descent::of(upper));
    while let Some(path) = open.pop() {
        let directory = descent.directory_without_links(&path)?;
        for name in directory.names()? {
            let found = rustix::fs::statat(directory, &name, AtFlags::SYMLINK_NOFOLLOW)?;
            if FileType::from_raw_mode(found.st_mode) != FileType::Directory {
                continue;
            }
            let notes = Node { directory, name: &name }.attributes()?;
            let note = |name: &str| notes.get(OsStr::new(&format!("trusted.overlay.{name}")));
            let above = origins.get(&path).and_then(|origin| origin.below.as_ref());
            let (below, renamed) = match note("redirect") {
                _ if note("opaque").is_some_and(|value| value == b"y") => (None, false),
                None => (above.map(|above| above.join(&name)), false),
                Some(to) => {
                    let to = PathBuf::from(OsString::from_vec(to.clone()));
                    (to.strip_prefix("/").map(Path::to_owned).ok().or_else(|| above.map(|above| above.join(to))), true)
                }
            };
            let path = path.join(&name);
            open.push(path.clone());
            origins.insert(path, Origin { below, renamed, aside: format!("d{}", found.st_ino) });
        }
    }
    Ok(origins)
}

fn is_whiteout(found: &Stat) -> bool {
    FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice && found.st_rdev == 0
}

/// The extended attributes of a file of the upper layer as the overlay has shown them.
fn shown(attributes: Attributes) -> Attributes {
    let shown = |name: OsString| match name.as_bytes() {
        escaped if escaped.starts_with(ESCAPED) => Some(OsString::from_vec([NOTE, &escaped[ESCAPED.len()..]].concat())),
        note if note.starts_with(NOTE) => None,
        _ => Some(name),
    };
    attributes.into_iter().filter_map(|(name, value)| Some((shown(name)?, value))).collect()
}

/// Gives the directory `to` what `from` has.
fn take_attributes(from: &Tree, to: &Tree) -> io::Result<()> {
    let name = OsStr::new(".");
    take(Node { directory: from, name }, &rustix::fs::fstat(from)?, Node { directory: to, name })
}

/// Lets nobody reach what is put into `to` who may not reach it in the end: its own attributes come last, as they were in `from`.
fn restrict(from: &Tree, to: &Tree) -> io::Result<()> {
    let (wanted, found) = (rustix::fs::fstat(from)?, rustix::fs::fstat(to)?);
    let name = OsStr::new(".");
    let access = |directory| {
        let attributes = shown(Node { directory, name }.attributes()?);
        io::Result::Ok(attributes.get(OsStr::new("system.posix_acl_access")).cloned())
    };
    let is_same = (wanted.st_uid, wanted.st_gid) == (found.st_uid, found.st_gid) && access(from)? == access(to)?;
    let sticky = (wanted.st_mode | found.st_mode) & 0o1000;
    let mode = if is_same { wanted.st_mode & found.st_mode & 0o7777 | sticky } else { 0o700 };
    if wanted.st_uid != found.st_uid {
        rustix::fs::chownat(to, ".", Some(rustix::process::geteuid()), None, AtFlags::empty())?;
    }
    if mode != found.st_mode & 0o7777 {
        rustix::fs::chmodat(to, ".", Mode::from_raw_mode(mode), AtFlags::empty())?;
    }
    Ok(())
}

fn take(from: Node, found: &Stat, to: Node) -> io::Result<()> {
    match to.take(found, &shown(from.attributes()?)) {
        // A file system without them: a change in place would have failed in the session.
        Err(e) if Errno::from_io_error(&e) == Some(Errno::OPNOTSUPP) => {
            let path = to.directory.shown().join(to.name);
            tracing::warn!("left out the extended attributes of {}: the file system takes none", path.display());
            to.take(found, &to.attributes()?)
        }
        other => other,
    }
}

fn naming(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

struct Application<'a> {
    upper: &'a Tree,
    root: &'a Tree,
    stage: Tree,
    origins: &'a BTreeMap<PathBuf, Origin>,
}

impl Application<'_> {
    /// Puts the directories aside that were renamed, the deepest first: by then a path of the source still leads to each.
    fn put_aside(&self) -> io::Result<()> {
        let renamed = self.origins.values().filter(|origin| origin.renamed);
        let renamed: BTreeMap<&Path, &str> =
            renamed.filter_map(|origin| Some((origin.below.as_deref()?, origin.aside.as_str()))).collect();
        for (source, aside) in renamed.into_iter().rev() {
            if self.stage.look(aside)?.is_some() {
                continue;
            }
            let above = self.root.directory_without_links(this(source.parent().unwrap_or(Path::new(""))))?;
            rustix::fs::renameat(&above, source.file_name().unwrap_or_default(), &self.stage, aside)?;
        }
        Ok(())
    }

    fn place(&self) -> io::Result<()> {
        // Copies of a run that was killed may not have reached the disk.
        remove_copies(&self.stage)?;
        let (mut uppers, mut roots) = (Descent::of(self.upper), Descent::of(self.root));
        for (path, origin) in self.origins {
            let both =
                uppers.directory_without_links(path).and_then(|from| Ok((from, roots.directory_without_links(path)?)));
            let at = |e| naming(&self.root.shown().join(path), &e);
            both.map_err(at).and_then(|(from, to)| self.fill(path, from, to, origin.below.is_none()))?;
        }
        // Placing entries has changed the times of their directories.
        let (mut uppers, mut roots) = (Descent::of(self.upper), Descent::of(self.root));
        self.origins.keys().try_for_each(|path| {
            take_attributes(uppers.directory_without_links(path)?, roots.directory_without_links(path)?)
        })
    }

    /// Gives a directory the entries that the upper layer has of it, and removes those that are seen no more.
    fn fill(&self, path: &Path, from: &Tree, to: &Tree, is_new: bool) -> io::Result<()> {
        restrict(from, to)?;
        let names: BTreeSet<OsString> = from.names()?.into_iter().collect();
        if is_new {
            to.names()?.iter().filter(|name| !names.contains(*name)).try_for_each(|name| to.remove_whole(name))?;
        }
        for name in &names {
            let path = path.join(name);
            self.place_entry(&path, from, to, name).map_err(|e| naming(&self.root.shown().join(&path), &e))?;
        }
        Ok(())
    }

    fn place_entry(&self, path: &Path, from: &Tree, to: &Tree, name: &OsStr) -> io::Result<()> {
        let found = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if is_whiteout(&found) {
            to.remove_whole(name)
        } else if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
            self.place_directory(to, name, self.origins.get(path))
        } else {
            self.place_file(from, to, name, &found)
        }
    }

    fn place_directory(&self, to: &Tree, name: &OsStr, origin: Option<&Origin>) -> io::Result<()> {
        let aside = origin.filter(|origin| origin.renamed).map(|origin| origin.aside.as_str());
        if let Some(aside) = aside
            && self.stage.look(aside)?.is_some()
        {
            to.remove_whole(name)?;
            return Ok(rustix::fs::renameat(&self.stage, aside, to, name)?);
        }
        match to.look(name)?.map(|found| FileType::from_raw_mode(found.st_mode)) {
            Some(FileType::Directory) => return Ok(()),
            Some(_) => to.remove_whole(name)?,
            None => {}
        }
        Ok(rustix::fs::mkdirat(to, name, Mode::RWXU)?)
    }

    fn place_file(&self, from: &Tree, to: &Tree, name: &OsStr, found: &Stat) -> io::Result<()> {
        let present = to.look(name)?;
        if present.as_ref().is_some_and(|present| (present.st_dev, present.st_ino) == (found.st_dev, found.st_ino)) {
            return Ok(());
        }
        self.stage.remove(NEW)?;
        if !self.link(from, name)? {
            self.copy(from, name, found)?;
        }
        if present.is_some_and(|present| FileType::from_raw_mode(present.st_mode) == FileType::Directory) {
            to.remove_whole(name)?;
        }
        Ok(rustix::fs::renameat(&self.stage, NEW, to, name)?)
    }

    /// Links the file itself, where both are on one file system: it costs nothing, and its names stay names of one file.
    fn link(&self, from: &Tree, name: &OsStr) -> io::Result<bool> {
        // Linking would rename these attributes in the shared inode, and the next name of the file would take them for notes.
        let is_escaped = |name: &OsString| name.as_bytes().starts_with(ESCAPED);
        if (Node { directory: from, name }).attributes()?.keys().any(is_escaped) {
            return Ok(false);
        }
        match rustix::fs::linkat(from, name, &self.stage, NEW, AtFlags::empty()) {
            Ok(()) => {}
            Err(Errno::XDEV | Errno::PERM | Errno::OPNOTSUPP | Errno::MLINK) => return Ok(false),
            Err(e) => return Err(e.into()),
        }
        let file = Node { directory: &self.stage, name: OsStr::new(NEW) };
        file.set_attributes(&shown(file.attributes()?)).map(|()| true)
    }

    /// Copies it. A file of several names is copied once.
    fn copy(&self, from: &Tree, name: &OsStr, found: &Stat) -> io::Result<()> {
        let copy = format!("{COPY}{}", found.st_ino);
        let linked = || rustix::fs::linkat(&self.stage, &copy, &self.stage, NEW, AtFlags::empty());
        if found.st_nlink > 1 && linked().is_ok() {
            return Ok(());
        }
        match FileType::from_raw_mode(found.st_mode) {
            FileType::RegularFile => {
                let content = from.open_regular(name, OFlags::RDONLY | OFlags::NOFOLLOW)?;
                copy_content(content, self.stage.create_file(NEW)?, found.st_size.cast_unsigned())?;
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(from, name, Vec::new())?;
                rustix::fs::symlinkat(target, &self.stage, NEW)?;
            }
            kind => rustix::fs::mknodat(&self.stage, NEW, kind, Mode::RUSR, found.st_rdev)?,
        }
        let new = Node { directory: &self.stage, name: OsStr::new(NEW) };
        take(Node { directory: from, name }, found, new)?;
        if found.st_nlink > 1 {
            rustix::fs::renameat(&self.stage, NEW, &self.stage, &copy)?;
            linked()?;
        }
        Ok(())
    }
}

/// Copies `size` bytes, and no holes.
fn copy_content(mut from: File, mut to: File, size: u64) -> io::Result<()> {
    let mut at = 0;
    while at < size {
        at = match rustix::fs::seek(&from, rustix::fs::SeekFrom::Data(at)) {
            Ok(at) => at,
            // Nothing but a hole.
            Err(Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let end = rustix::fs::seek(&from, rustix::fs::SeekFrom::Hole(at))?;
        from.seek(SeekFrom::Start(at))?;
        to.seek(SeekFrom::Start(at))?;
        io::copy(&mut Read::by_ref(&mut from).take(end - at), &mut to)?;
        at = end;
    }
    to.set_len(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::unpack::{INDEX, NO_METACOPY, ONE_DEVICE, REDIRECT};
    use crate::sys::mounts::{self, Detached};
    use nix::sys::signal::Signal;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use rustix::mount::MountAttrFlags;
    use std::fmt::Write as _;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    /// Operations of programs on a tree. Most fail on most trees, which does not matter.
    #[derive(Debug, Clone)]
    enum Change {
        Write(PathBuf, u8),
        Append(PathBuf),
        MakeDirectory(PathBuf),
        Remove(PathBuf),
        /// Another name that is left shows what has become of the file.
        WriteAndRemove(PathBuf),
        Rename(PathBuf, PathBuf),
        Link(PathBuf, PathBuf),
        Symlink(PathBuf, PathBuf),
        Mode(PathBuf, u32),
        Owner(PathBuf, u32),
        Attribute(PathBuf, &'static str, &'static [u8]),
        Node(PathBuf, u32),
        Sparse(PathBuf),
    }

    /// An ACL of version 2: the owner, user 5, the group, the mask, others.
    const ACL: &[u8] = b"\x02\0\0\0\x01\0\x07\0\xff\xff\xff\xff\x02\0\x04\0\x05\0\0\0\x04\0\x05\0\xff\xff\xff\xff\x10\0\x05\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";

    /// A capability set of version 2: CAP_NET_BIND_SERVICE.
    const CAPABILITY: &[u8] = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

    fn path() -> impl Strategy<Value = PathBuf> {
        vec(prop::sample::select(vec!["a", "b", "c"]), 1..4).prop_map(|names| names.into_iter().collect())
    }

    fn change() -> impl Strategy<Value = Change> {
        use Change::*;
        let attribute = prop::sample::select(vec![
            ("system.posix_acl_access", ACL),
            ("system.posix_acl_default", ACL),
            ("security.capability", CAPABILITY),
            ("trusted.overlay.opaque", b"y"),
            ("trusted.mine", b"1"),
        ]);
        prop_oneof![
            3 => (path(), any::<u8>()).prop_map(|(p, b)| Write(p, b)),
            2 => path().prop_map(Append),
            4 => path().prop_map(MakeDirectory),
            2 => path().prop_map(Remove),
            2 => path().prop_map(WriteAndRemove),
            5 => (path(), path()).prop_map(|(a, b)| Rename(a, b)),
            3 => (path(), path()).prop_map(|(a, b)| Link(a, b)),
            1 => (path(), path()).prop_map(|(a, b)| Symlink(a, b)),
            1 => (path(), prop::sample::select(vec![0o600, 0o755, 0o4711, 0o1777])).prop_map(|(p, m)| Mode(p, m)),
            1 => (path(), 0_u32..3).prop_map(|(p, u)| Owner(p, u)),
            2 => (path(), attribute).prop_map(|(p, (n, v))| Attribute(p, n, v)),
            1 => (path(), 0_u32..3).prop_map(|(p, n)| Node(p, n)),
            1 => path().prop_map(Sparse),
        ]
    }

    impl Change {
        fn make(&self, root: &Path) {
            let at = |path: &Path| root.join(path);
            // Opening a fifo waits.
            let is_node = |path: &Path| std::fs::metadata(at(path)).is_ok_and(|found| !found.is_file());
            let _ = match self {
                Self::Write(path, _) | Self::Append(path) | Self::WriteAndRemove(path) | Self::Sparse(path)
                    if is_node(path) =>
                {
                    Ok(())
                }
                Self::Write(path, byte) => std::fs::write(at(path), [*byte; 9]),
                Self::Append(path) => {
                    File::options().append(true).open(at(path)).and_then(|mut f| io::Write::write_all(&mut f, b"+"))
                }
                Self::MakeDirectory(path) => std::fs::create_dir_all(at(path)),
                Self::WriteAndRemove(path) => {
                    std::fs::write(at(path), "gone").and_then(|()| std::fs::remove_file(at(path)))
                }
                Self::Remove(path) => std::fs::remove_dir_all(at(path)).or_else(|_| std::fs::remove_file(at(path))),
                Self::Rename(from, to) => std::fs::rename(at(from), at(to)),
                Self::Link(from, to) => std::fs::hard_link(at(from), at(to)),
                Self::Symlink(target, path) => symlink(target, at(path)),
                Self::Mode(path, mode) => std::fs::set_permissions(at(path), PermissionsExt::from_mode(*mode)),
                Self::Owner(path, user) => {
                    lchown(at(path), Some(*user), Some(*user)).and_then(|()| chown(root, Some(*user), None))
                }
                Self::Attribute(path, name, value) => {
                    rustix::fs::lsetxattr(at(path), *name, value, rustix::fs::XattrFlags::empty()).map_err(Into::into)
                }
                Self::Node(path, number) => {
                    let kind = [FileType::Fifo, FileType::CharacterDevice, FileType::BlockDevice][*number as usize];
                    let device = if kind == FileType::Fifo { 0 } else { rustix::fs::makedev(1, 3) };
                    rustix::fs::mknodat(rustix::fs::CWD, at(path), kind, Mode::RUSR, device).map_err(Into::into)
                }
                Self::Sparse(path) => File::create(at(path)).and_then(|file| {
                    file.set_len(1 << 20)?;
                    std::os::unix::fs::FileExt::write_all_at(&file, b"data", 600 << 10)
                }),
            };
        }
    }

    /// A tree as programs see it, in words.
    fn tree(root: &Path) -> String {
        let mut text = String::new();
        let mut names: BTreeMap<(u64, u64), PathBuf> = BTreeMap::new();
        let mut paths = Vec::new();
        Tree::open(root)
            .unwrap()
            .walk(|path, _, _, _| {
                paths.push(path.to_owned());
                Ok(())
            })
            .unwrap();
        paths.sort();
        for path in paths {
            let place = root.join(&path);
            let found = std::fs::symlink_metadata(&place).unwrap();
            let directory = Tree::open(place.parent().unwrap()).unwrap();
            let name = if path.as_os_str().is_empty() { root.file_name() } else { place.file_name() };
            let attributes = Node { directory: &directory, name: name.unwrap() }.attributes().unwrap();
            let first = names.entry((found.dev(), found.ino())).or_insert_with(|| path.clone()).clone();
            let content = if found.is_file() { std::fs::read(&place).unwrap() } else { Vec::new() };
            let target = std::fs::read_link(&place).unwrap_or_default();
            let links = if found.is_dir() { 0 } else { found.nlink() };
            let size = if found.is_file() { found.len() } else { 0 };
            let is_sparse = found.blocks() * 1024 < size;
            let times = (found.mtime(), found.mtime_nsec());
            let _ = writeln!(
                text,
                "{path:?} {:o} {} {} {times:?} {size} {is_sparse} {links} {first:?} {target:?} {} {attributes:?} {}",
                found.mode(),
                found.uid(),
                found.gid(),
                if found.is_file() { 0 } else { found.rdev() },
                &content.escape_ascii().to_string().replace("\\x00", ""),
            );
        }
        text
    }

    fn mount(kind: &str, options: &[(&str, &str)], at: &Path) {
        std::fs::create_dir_all(at).unwrap();
        let mount = Detached::filesystem(kind, options, MountAttrFlags::MOUNT_ATTR_NODEV).unwrap();
        mount.attach(Tree::open(at).unwrap()).unwrap();
    }

    /// Changes `source` above an overlay, applies that, and compares. `limits`: at so many system calls it is killed and begun again.
    fn compare(
        before: &[Change],
        changes: &[Change],
        another_disk: bool,
        limits: &[u32],
    ) -> std::result::Result<(), String> {
        let dir = tempfile::tempdir().unwrap();
        let [place, root, merged] = ["disk", "disk/root", "merged"].map(|name| dir.path().join(name));
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("this test needs root");
        mounts::make_all_private().unwrap();
        mount("tmpfs", &[], &place);
        if another_disk {
            mount("tmpfs", &[], &root);
        }
        for name in ["root", "upper", "work", "record"] {
            std::fs::create_dir_all(place.join(name)).unwrap();
        }
        // The kernel would take these, in the source, for notes of an overlay that it is the upper layer of.
        let is_note = |change: &&Change| matches!(change, Change::Attribute(_, "trusted.overlay.opaque", _));
        for change in before.iter().filter(|change| !is_note(change)) {
            change.make(&root);
        }
        let root_attributes = std::fs::metadata(&root).unwrap();
        chown(place.join("upper"), Some(root_attributes.uid()), Some(root_attributes.gid())).unwrap();
        std::fs::set_permissions(place.join("upper"), root_attributes.permissions()).unwrap();
        let [lower, upper, inner] =
            [&root, &place.join("upper"), &place.join("work")].map(|p| p.to_str().unwrap().to_owned());
        let layers = [("lowerdir", lower.as_str()), ("upperdir", &upper), ("workdir", &inner)];
        let options: Vec<_> = layers.into_iter().chain([REDIRECT, INDEX, ONE_DEVICE, NO_METACOPY]).collect();
        mount("overlay", &options, &merged);
        for change in changes {
            change.make(&merged);
        }
        let [upper, lower] = ["upper", "root"].map(|name| Tree::open(&place.join(name)).unwrap());
        complete_hard_links(&lower, &upper, &place.join("work/index"), &Tree::open(&merged).unwrap()).unwrap();
        let wanted = tree(&merged);
        mounts::unmount(&merged).unwrap();
        for limit in limits.iter().map(Some).chain([None]) {
            // A program of its own, which can be killed. It starts with this thread's mounts.
            let program = std::env::current_exe().unwrap();
            let mut child = match limit {
                None => Command::new(program),
                Some(limit) => {
                    let mut strace = Command::new("strace");
                    let inject = format!("inject={CHANGING}:signal=KILL:when={limit}");
                    strace
                        .args(["-f", "-o", "/dev/null", "-e", &format!("trace={CHANGING}"), "-e", &inject])
                        .arg(program);
                    strace
                }
            };
            child.args(["--ignored", "--exact", "local::apply::tests::applied_by_a_program_that_is_killed"]);
            match child.env(PLACE, &place).stdout(Stdio::null()).status().unwrap() {
                ended if ended.success() => break,
                ended if ended.signal() == Some(Signal::SIGKILL as i32) => {}
                other => return Err(format!("{other}")),
            }
        }
        // The links of the upper layer count no more.
        std::fs::remove_dir_all(place.join("upper")).unwrap();
        std::fs::remove_dir_all(place.join("work")).unwrap();
        let found = tree(&root);
        let different = || {
            let lines = |of: &str, not_in: &str| {
                of.lines().filter(|l| !not_in.lines().any(|o| o == *l)).collect::<Vec<_>>().join("\n")
            };
            format!("wanted:\n{}\nfound:\n{}", lines(&wanted, &found), lines(&found, &wanted))
        };
        let same = wanted == found;
        let result = if same { Ok(()) } else { Err(different()) };
        if another_disk {
            mounts::unmount(&root).unwrap();
        }
        mounts::unmount(&place).unwrap();
        result
    }

    /// System calls that change a directory.
    const CHANGING: &str = "renameat,renameat2,linkat,unlinkat,mkdirat,utimensat";

    const PLACE: &str = "IMS_SSHD_TEST_PLACE";

    #[test]
    #[ignore = "the other one starts it"]
    fn applied_by_a_program_that_is_killed() {
        let place = PathBuf::from(std::env::var_os(PLACE).unwrap());
        let [upper, root, record] = ["upper", "root", "record"].map(|name| Tree::open(&place.join(name)).unwrap());
        apply(&record, &upper, &root).unwrap();
    }

    /// Checks that the result of `before` and `changes` is applied, on one disk and across two.
    fn applied(before: &[Change], changes: &[Change]) {
        for another_disk in [false, true] {
            let (before, changes) = (before.to_vec(), changes.to_vec());
            let compared = std::thread::spawn(move || compare(&before, &changes, another_disk, &[4])).join();
            assert_eq!(compared.unwrap(), Ok(()));
        }
    }

    #[test]
    fn another_name_of_a_file_keeps_what_was_written_by_one_that_is_gone() {
        let [a, b] = ["a", "b"].map(PathBuf::from);
        let before = [Change::Write(a.clone(), b'1'), Change::Link(a.clone(), b)];
        applied(&before, &[Change::Write(a.clone(), b'2'), Change::Remove(a)]);
    }

    #[test]
    fn a_tree_that_is_deeper_than_any_path_is_applied_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let [upper, root, record] = three(dir.path());
        let mut at = Tree::open(&dir.path().join("upper")).unwrap();
        for _ in 0..1100 {
            rustix::fs::mkdirat(&at, "deep", Mode::RWXU).unwrap();
            at = at.directory("deep").unwrap();
        }
        at.touch("file").unwrap();
        apply(&record, &upper, &root).unwrap();
        let deepest: PathBuf = std::iter::repeat_n("deep", 1100).collect();
        assert!(root.directory_without_links(&deepest).unwrap().look("file").unwrap().is_some());
        for tree in [&upper, &root] {
            tree.remove_whole(OsStr::new("deep")).unwrap();
        }
    }

    fn three(dir: &Path) -> [Tree; 3] {
        ["upper", "root", "record"].map(|name| {
            std::fs::create_dir(dir.join(name)).unwrap();
            Tree::open(&dir.join(name)).unwrap()
        })
    }

    #[test]
    fn what_a_session_calls_like_a_stage_is_a_file_as_any_other_and_a_stage_of_others_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        let [upper, root, record] = three(dir.path());
        std::fs::write(dir.path().join("upper/.ims-sshd.applying"), "theirs").unwrap();
        apply(&record, &upper, &root).unwrap();
        assert_eq!(root.read(".ims-sshd.applying", 9).unwrap(), b"theirs");
        record.remove(RECORD).unwrap();
        let (begun, _) = begin(&record, &upper, &root).unwrap();
        let stage = dir.path().join("root").join(&begun.stage);
        std::fs::remove_dir(&stage).unwrap();
        assert!(apply(&record, &upper, &root).unwrap_err().to_string().contains("is gone"));
        std::fs::create_dir(&stage).unwrap();
        chown(&stage, Some(1234), Some(1234)).unwrap();
        assert!(apply(&record, &upper, &root).unwrap_err().to_string().contains("another directory has taken"));
    }

    #[test]
    fn a_directory_that_becomes_private_is_so_before_anything_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let [upper, root, _] = three(dir.path());
        for (before, after, owner, between) in [
            (0o755, 0o700, 0, 0o700),
            (0o700, 0o755, 0, 0o700),
            (0o1777, 0o755, 0, 0o1755),
            (0o755, 0o755, 1234, 0o700),
        ] {
            for (tree, mode, owner) in [("upper", after, 0), ("root", before, owner)] {
                std::fs::set_permissions(dir.path().join(tree), PermissionsExt::from_mode(mode)).unwrap();
                chown(dir.path().join(tree), Some(owner), None).unwrap();
            }
            restrict(&upper, &root).unwrap();
            let found = std::fs::metadata(dir.path().join("root")).unwrap();
            assert_eq!((found.mode() & 0o7777, found.uid()), (between, 0));
        }
    }

    #[test]
    fn what_the_file_system_lets_nobody_change_is_refused_before_anything_is_applied() {
        let dir = tempfile::tempdir().unwrap();
        let [upper, root, record] = three(dir.path());
        for name in ["upper/a", "upper/fixed", "root/fixed"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        let fixed = dir.path().join("root/fixed");
        let chattr = |flag: &str| Command::new("chattr").arg(flag).arg(&fixed).status().unwrap().success();
        // Not every disk has it.
        if !chattr("+i") {
            return;
        }
        let refused = apply(&record, &upper, &root);
        let names = root.names();
        assert!(chattr("-i"));
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("root/fixed may not be changed") && refused.contains("chattr -i -a"), "{refused}");
        assert_eq!(names.unwrap(), ["fixed"]);
        assert!(!has_begun(&record).unwrap());
        apply(&record, &upper, &root).unwrap();
    }

    #[test]
    fn what_was_put_aside_has_its_place_again_once_an_application_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let [upper, root, record] = three(dir.path());
        for name in ["root/old", "root/old/in", "upper/new"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let redirect = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(dir.path().join("upper/new"), "trusted.overlay.redirect", b"old", redirect).unwrap();
        let (begun, stage) = begin(&record, &upper, &root).unwrap();
        let origins = origins(&upper).unwrap();
        Application { upper: &upper, root: &root, stage: stage.unwrap(), origins: &origins }.put_aside().unwrap();
        assert_eq!(root.names().unwrap(), [begun.stage.as_str()]);
        give_up(&record, &upper, &root).unwrap();
        assert_eq!(root.names().unwrap(), ["old"]);
        assert!(dir.path().join("root/old/in").exists());
    }

    #[test]
    fn a_file_of_two_names_keeps_what_looks_like_a_note_of_an_overlay() {
        let path = |name: &str| PathBuf::from(name);
        for make in [Change::Symlink(path("a"), path("a")), Change::Write(path("a"), 1)] {
            let note = Change::Attribute(path("a"), "trusted.overlay.opaque", b"y");
            let changes = [note, Change::Link(path("a"), path("b"))];
            let compared = std::thread::spawn(move || compare(&[make], &changes, false, &[])).join();
            assert_eq!(compared.unwrap(), Ok(()));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn a_directory_becomes_what_the_overlay_showed_however_often_it_is_killed(
            before in vec(change(), 0..30), changes in vec(change(), 0..30), another_disk: bool,
            limits in vec(1_u32..40, 0..4)
        ) {
            // Mounts of its own are a thread's.
            let compared = std::thread::spawn(move || compare(&before, &changes, another_disk, &limits)).join();
            prop_assert_eq!(compared.unwrap(), Ok(()));
        }
    }
}
