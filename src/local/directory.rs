//! A directory as the source of a job: changed above it, in an overlay, or where it is.

use std::path::Path;

use crate::error::{Attempt, Error, Result};
use crate::image::unpack::{INDEX_OF_LINKS, Overlay, UPPER};
use crate::local::apply;
use crate::local::apply_progress;
use crate::local::claim::{is_claimed, refuse_nested, remove_folder};
use crate::local::left_over::{clear_left_over, end_left_over};
use crate::local::register;
use crate::local::run_directory::RunFolder;
use crate::local::upper_layer;
use crate::local::work_directory;
use crate::publish::identity::Record;
use crate::publish::source::Source;
use crate::sys::named;
use crate::sys::tree::Tree;
use crate::volume::holds;
use crate::volume::layout::OVERLAY;
use crate::volume::mounts_below::mounts_below;
use crate::volume::open_tree;
use crate::volume::signal_files::claimed;

/// Commands that change an image root where it is.
pub(crate) const COMMANDS: [&str; 2] = ["customize", "enter"];

/// A directory below an overlay: as long as this value lives, no run changes it where it is. The kernel does not define what the overlay
/// would show.
pub(crate) struct Held {
    folders: Vec<RunFolder>,
}

impl Held {
    /// Takes `directory`, whose changes are kept in a directory of `work`.
    pub(crate) fn take(directory: &Path, work: &Path) -> Result<Self> {
        let refuse = |why: String| Error::new(format!("mount an overlay above {}", directory.display())).because(why);
        if holds(directory, work)? {
            let why = format!("its changes would be kept inside it, in {}", work.display());
            return Err(refuse(why).advise("name another place by --work, or change it where it is (--in-place)"));
        }
        if let Some(mounted) = mounts_below(directory)?.first() {
            let why = format!("something is mounted on {}, which would not be seen", mounted.display());
            return Err(refuse(why).advise("unmount it, or change the directory where it is (--in-place)"));
        }
        end_left_over(directory)?;
        clear_left_over(&COMMANDS, directory)?;
        let mut held = Self { folders: Vec::new() };
        for command in COMMANDS {
            held.folders.push(RunFolder::claim(command, directory)?);
        }
        Ok(held)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for folder in self.folders.drain(..) {
            let _ = remove_folder(folder.path());
        }
    }
}

/// Refuses a directory above which changes are kept, by whatever path that was, unless they are in `own`. Whoever only `looks` is told of them.
pub(crate) fn refuse_kept(directory: &Path, works: &Path, own: Option<&Path>, looks: bool) -> Result<()> {
    let attempted = || format!("open {}", directory.display());
    let root = open_tree(directory)?;
    for entry in register::left_below(works) {
        let Some(work) = register::kept_in(&entry) else { continue };
        let volume = Tree::open(&work).attempt(attempted)?;
        let is_interrupted = apply_progress::has_begun(&volume)?;
        let is_other = || Record::private(&volume).read().is_none_or(|source| !source.is_of(&root));
        if own == Some(&work) && !(looks && is_interrupted) || is_other() {
            continue;
        }
        let [name, source] = ["name", "source"].map(|field| entry[field].as_str().unwrap_or_default());
        let going_on = if Path::new(source).is_dir() {
            format!("to go on with them: {}", register::goes_on(&entry))
        } else {
            format!("to go on with them, move it back to {source}")
        };
        if looks && !is_interrupted {
            tracing::warn!(
                "changes to it are kept as {name}, and not shown here; 'ims-sshd fail {name}' drops them; {going_on}"
            );
            continue;
        }
        let why = if is_interrupted {
            "applying changes to it was interrupted".to_owned()
        } else {
            format!("changes that were made above it are kept as {name}")
        };
        return Err(Error::new(attempted())
            .because(why)
            .advise(format!("'ims-sshd fail {name}' drops them; {going_on}")));
    }
    Ok(())
}

/// Refuses to read a directory that an environment changes, or has changed in part, or above which changes are kept.
pub(crate) fn refuse_open(directory: &Path) -> Result<()> {
    refuse_half_applied(directory)?;
    refuse_kept(directory, Path::new(work_directory::DEFAULT), None, false)?;
    for command in COMMANDS {
        if RunFolder::is_claimed(command, directory)? {
            return Err(claimed(directory));
        }
    }
    refuse_nested(directory)
}

/// Refuses a directory that has some of its changes, of a run that was killed as it applied them.
pub(crate) fn refuse_half_applied(directory: &Path) -> Result<()> {
    let attempted = || format!("open {}", directory.display());
    let Some(stage) = apply_progress::stage_in(&open_tree(directory)?).attempt(attempted)? else { return Ok(()) };
    let advice = format!(
        "'ims-sshd customize {0}' goes on with that, with the same --work; with --fresh it gives it up, as 'ims-sshd fail {0}' does; if \
         those changes are gone, remove {0}/{1}",
        directory.display(),
        stage.display()
    );
    Err(Error::new(attempted()).because("applying changes to it was interrupted").advise(advice))
}

/// Returns whether the changes kept in `place` were being applied.
pub(crate) fn is_half_applied_by(place: &Path) -> bool {
    Tree::open(place).is_ok_and(|place| apply_progress::has_begun(&place).unwrap_or(true))
}

/// Refuses to change a directory where it is as long as changes made above it are kept in `place`.
pub(crate) fn refuse_with_changes(directory: &Path, place: &Path) -> Result<()> {
    refuse_half_applied(directory)?;
    if is_claimed(place)? {
        return Err(Error::new(format!("change {} where it is", directory.display()))
            .because("it is open, and is being changed above it")
            .advise("wait for that to end; 'ims-sshd status' names it"));
    }
    if Overlay::changes(&place.join(OVERLAY)) != Some(true) {
        return Ok(());
    }
    let why = format!("changes that were made above it are kept in {}", place.display());
    let advice = format!(
        "'ims-sshd customize' without --in-place goes on with them, 'ims-sshd fail {}' drops them",
        directory.display()
    );
    Err(Error::new(format!("change {} where it is", directory.display())).because(why).advise(advice))
}

/// Opens `directory`, a path without links: once, and what is found by that path later is of no matter.
pub(crate) fn open(directory: &Path) -> Result<Tree> {
    let below = directory.strip_prefix("/").ok().filter(|below| *below != Path::new("")).unwrap_or(Path::new("."));
    let opened = open_tree(Path::new("/"))?.directory_without_links(below);
    opened.attempt(|| format!("open {}", directory.display()))
}

/// Returns whether `directory` still leads to `root`.
fn leads_to(directory: &Path, root: &Tree) -> bool {
    open(directory).is_ok_and(|found| is_same(&found, root))
}

/// Returns whether both are one directory.
pub(crate) fn is_same(a: &Tree, b: &Tree) -> bool {
    let found = |tree| rustix::fs::fstat(tree).map(|found| (found.st_dev, found.st_ino));
    found(a).is_ok_and(|a| found(b) == Ok(a))
}

/// Gives up changes that an earlier run has begun to apply.
pub(crate) fn give_up_changes(directory: &Path, root: &Tree, place: &Tree) -> Result<()> {
    tracing::warn!(
        "applying changes to {} was interrupted; it stays as it is now, and those that are not applied are dropped",
        directory.display()
    );
    if apply_progress::has_ended(place).unwrap_or(false) {
        return Ok(());
    }
    apply::abort(place, &open_tree(&place.shown().join(OVERLAY).join(UPPER))?, root)
}

/// Applies what was changed above `root`, which had the path `directory` when it was opened, and is kept in `place`: what `overlay` shows, or
/// what an earlier run has begun to apply.
pub(crate) fn apply_changes(directory: &Path, root: &Tree, place: &Tree, overlay: Option<Overlay>) -> Result<()> {
    if apply_progress::has_ended(place)? {
        return Ok(());
    }
    if overlay.is_none() {
        tracing::warn!("applying changes to {} was interrupted; going on with that", directory.display());
    }
    let folder = place.shown().join(OVERLAY);
    let upper = open_tree(&folder.join(UPPER))?;
    if let Some(overlay) = overlay {
        upper_layer::complete_hard_links(root, &upper, &folder.join(INDEX_OF_LINKS), &open_tree(&overlay.image_root)?)?;
        overlay.unmount()?;
    }
    apply::apply(place, &upper, root)?;
    tracing::info!("applied the changes to {}", directory.display());
    if !leads_to(directory, root) {
        tracing::warn!(
            "{} is another directory by now; the changes are in the one that was opened, which is {}",
            directory.display(),
            root.shown().display()
        );
    }
    Ok(())
}

/// Refuses a source of `prepare` that is a directory which somebody changes.
pub fn refuse_open_source(source: &str) -> Result<()> {
    match Source::parse(source)? {
        Source::Here(path) if path.is_dir() => {
            refuse_open(&named::resolve(&path).attempt(|| format!("open {}", path.display()))?)
        }
        _ => Ok(()),
    }
}
