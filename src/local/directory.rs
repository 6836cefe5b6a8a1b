//! A directory as the source of a run: changed in an overlay, or in place.

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path};

use crate::error::{Attempt, Error, Result};
use crate::image::unpack::{INDEX_OF_LINKS, Overlay, UPPER};
use crate::image::upper_layer;
use crate::jailer::unsealed;
use crate::local::apply;
use crate::local::apply_progress::{self, Applied};
use crate::local::claim::{is_claimed, refuse_nested, remove_directory};
use crate::local::left_over::{clear_left_over, end_left_over};
use crate::local::register;
use crate::local::run_directory::RunDirectory;
use crate::local::work_directory;
use crate::publish::identity::Record;
use crate::publish::source::Source;
use crate::sys::attributes::Node;
use crate::sys::named::{self, WRITABLE, is_trusted};
use crate::sys::tree::Tree;
use crate::verdict::Markers;
use crate::volume::holds;
use crate::volume::layout::{CREATED_IMAGE_ROOT, IMAGE_ROOT, OVERLAY};
use crate::volume::mounts_below::{mounts_below, refuse_mounts_below};
use crate::volume::open_tree;
use crate::volume::signal_files::{SignalFiles, claimed};

/// Commands that change an image root in place.
pub(crate) const COMMANDS: [&str; 2] = ["customize", "enter"];

/// A claim of a directory that lies below an overlay. As long as it lives, no run changes the directory in place, since
/// the kernel leaves undefined what the overlay would then show.
pub(crate) struct Held {
    directories: Vec<RunDirectory>,
}

impl Held {
    /// Claims `directory`; changes to it are kept below `work`.
    pub(crate) fn take(directory: &Path, work: &Path) -> Result<Self> {
        let refuse = |why: String| Error::new(format!("mount an overlay above {}", directory.display())).because(why);
        if holds(directory, work)? {
            let why = format!("its changes would be kept inside it, in {}", work.display());
            return Err(
                refuse(why).advise("name another directory with --work, or change the source itself with --in-place")
            );
        }
        if let Some(mounted) = mounts_below(directory)?.first() {
            let why = format!("the overlay would hide the mount on {}", mounted.display());
            return Err(refuse(why).advise("unmount it, or change the directory in place with --in-place"));
        }
        end_left_over(directory)?;
        clear_left_over(&COMMANDS, directory)?;
        let mut held = Self { directories: Vec::new() };
        for command in COMMANDS {
            held.directories.push(RunDirectory::claim(command, directory)?);
        }
        refuse_while_used(directory)?;
        Ok(held)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        for directory in self.directories.drain(..) {
            let _ = remove_directory(directory.path());
        }
    }
}

/// Refuses a directory for which there are kept changes, made under any path, except those in `own`. A run that
/// discards its changes (`looks`) gets a warning instead.
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
        let resuming = if register::has_source(&entry) {
            format!("to resume: {}", register::resuming_line(&entry))
        } else {
            format!("to resume them, move or mount it at {source} again")
        };
        if looks && !is_interrupted {
            tracing::warn!(
                "changes to it are kept as {name} and do not appear here; 'ims-sshd fail {name}' drops them; {resuming}"
            );
            continue;
        }
        let (why, dropped) = if is_interrupted {
            ("applying changes to it was interrupted".to_owned(), "those that are not applied")
        } else {
            (format!("changes to it are kept as {name}"), "them")
        };
        return Err(Error::new(attempted())
            .because(why)
            .advise(format!("'ims-sshd fail {name}' drops {dropped}; {resuming}")));
    }
    Ok(())
}

/// Refuses to read a directory that is open, that has kept changes, or that an interrupted run has changed only in
/// part.
pub(crate) fn refuse_open(directory: &Path) -> Result<()> {
    // This check comes first, because its error has the command line that resumes the changes.
    refuse_kept(directory, Path::new(work_directory::DEFAULT), None, false)?;
    refuse_half_applied(directory)?;
    refuse_running(directory)?;
    unsealed::refuse(&open_tree(directory)?)?;
    refuse_nested(directory)
}

/// Refuses a directory that a run has open.
pub(crate) fn refuse_running(directory: &Path) -> Result<()> {
    for command in COMMANDS {
        if RunDirectory::is_claimed(command, directory)? {
            let run = register::run_elsewhere("source", directory);
            return Err(run.map_or_else(
                || claimed(directory),
                |run| {
                    Error::new(format!("claim {}", directory.display()))
                        .because("another build environment is open on it")
                        .advise(register::how_it_ends(&run))
                },
            ));
        }
    }
    Ok(())
}

/// The image root parents of a directory, if its name is that of an image root; a parent is at most two levels above.
pub(crate) fn parents_of(image_root: &Path) -> Result<Vec<SignalFiles>> {
    let is_parent =
        |parent: &&Path| [IMAGE_ROOT, CREATED_IMAGE_ROOT].iter().any(|name| parent.join(name) == image_root);
    let parents = image_root.ancestors().skip(1).take(2).filter(is_parent);
    parents.filter_map(|parent| SignalFiles::open(parent).transpose()).collect()
}

/// Refuses to open an image root while `prepare` replaces it, or while it is being packed. Call this after claiming the
/// image root: those steps look for a claim once they have their own, so at least one side sees the other.
pub(crate) fn refuse_while_used(image_root: &Path) -> Result<()> {
    let real = named::resolve(image_root).attempt(|| format!("open {}", image_root.display()))?;
    parents_of(&real)?.iter().try_for_each(SignalFiles::refuse_while_used)
}

/// Refuses a directory to which a killed run applied only some of its changes.
pub(crate) fn refuse_half_applied(directory: &Path) -> Result<()> {
    let attempted = || format!("open {}", directory.display());
    let Some(stage) = apply_progress::stage_in(&open_tree(directory)?).attempt(attempted)? else { return Ok(()) };
    let advice = format!(
        "'ims-sshd customize {0}', with the same --work, resumes that; with --fresh it drops what is not applied, as \
         does 'ims-sshd fail {0}'; if the changes are gone, remove {0}/{1}",
        directory.display(),
        stage.display()
    );
    Err(Error::new(attempted()).because("applying changes to it was interrupted").advise(advice))
}

/// Returns whether the changes kept in `place` are to be applied to their directory, or are partly applied.
pub(crate) fn is_half_applied_by(place: &Path) -> bool {
    Tree::open(place).is_ok_and(|place| apply_progress::has_begun(&place).unwrap_or(true))
}

/// Refuses to change a directory in place while changes to it are kept in `place`.
pub(crate) fn refuse_with_changes(directory: &Path, place: &Path) -> Result<()> {
    refuse_half_applied(directory)?;
    if is_claimed(place)? {
        return Err(Error::new(format!("change {} in place", directory.display()))
            .because("it is open, and is being changed in an overlay")
            .advise("wait until that closes; 'ims-sshd status' names it"));
    }
    if Overlay::changes(&place.join(OVERLAY)) != Some(true) {
        return Ok(());
    }
    let why = format!("changes to it are kept in {}", place.display());
    let advice = format!(
        "'ims-sshd customize' without --in-place resumes them, 'ims-sshd fail {}' drops them",
        directory.display()
    );
    Err(Error::new(format!("change {} in place", directory.display())).because(why).advise(advice))
}

/// Opens `directory`, a path without symbolic links. The result stays the same directory, whatever the path names
/// later.
pub(crate) fn open(directory: &Path) -> Result<Tree> {
    let below = directory.strip_prefix("/").ok().filter(|below| *below != Path::new("")).unwrap_or(Path::new("."));
    let opened = open_tree(Path::new("/"))?.directory_without_links(below);
    opened.attempt(|| format!("open {}", directory.display()))
}

/// Extended attribute that holds an ACL.
const ACL: &str = "system.posix_acl_access";

/// Returns whether other users of the machine can reach `directory`, a path without symbolic links. They can if some
/// user other than root may search this directory and each one above it.
fn is_reachable(directory: &Path) -> Result<bool> {
    let attempted = || format!("open {}", directory.display());
    let mut at = open_tree(Path::new("/"))?;
    let mut is_reachable = is_searched_by_others(&at).attempt(attempted)?;
    for name in directory.components().filter(|name| matches!(name, Component::Normal(_))) {
        at = at.directory_without_links(name).attempt(attempted)?;
        is_reachable &= is_searched_by_others(&at).attempt(attempted)?;
    }
    Ok(is_reachable)
}

/// Returns whether a user other than root may search the directory. If the directory has an ACL, assumes that some user
/// may.
fn is_searched_by_others(directory: &Tree) -> io::Result<bool> {
    let found = rustix::fs::fstat(directory)?;
    let by_all = found.st_mode & 0o001 != 0;
    let by_group = found.st_mode & 0o010 != 0 && found.st_gid != 0;
    let here = Node { directory, name: OsStr::new(".") };
    // An owner other than root counts as well, since an owner may change the mode.
    Ok(by_all || by_group || !is_trusted(found.st_uid) || here.attributes()?.contains_key(OsStr::new(ACL)))
}

/// Warns if other users of the machine can reach the image root `directory`. Returns whether they can.
pub(crate) fn warn_if_reachable(directory: &Path) -> Result<bool> {
    let is_reachable = is_reachable(directory)?;
    if is_reachable {
        let above = directory.parent().filter(|above| *above != Path::new("/"));
        let is_own = |above: &&Path| above.metadata().is_ok_and(|found| found.mode() & WRITABLE == 0);
        let closing = above
            .filter(is_own)
            .map_or(String::new(), |above| format!("; if {0} holds nothing else: 'chmod 0700 {0}'", above.display()));
        tracing::warn!(
            "other users of this machine reach {}: they can run its setuid programs and write to its /tmp; keep it in \
             a directory with mode 0700, as /var/lib/machines is{closing}",
            directory.display()
        );
    }
    Ok(is_reachable)
}

/// Returns whose marks count in the image root `directory`, or in an overlay above it. Other users of the machine who
/// can reach the image root can create files in its /tmp, which has mode 1777: this warns of that, and then only root's
/// marks count.
pub(crate) fn markers(directory: &Path) -> Result<Markers> {
    Ok(if warn_if_reachable(directory)? { Markers::Root } else { Markers::Everyone })
}

/// Returns whether `directory` still names `root`.
fn still_names(directory: &Path, root: &Tree) -> bool {
    open(directory).is_ok_and(|found| is_same(&found, root))
}

/// Returns whether both are the same directory.
pub(crate) fn is_same(a: &Tree, b: &Tree) -> bool {
    let found = |tree| rustix::fs::fstat(tree).map(|found| (found.st_dev, found.st_ino));
    found(a).is_ok_and(|a| found(b) == Ok(a))
}

/// Stops applying the changes that an earlier run began to apply to `root`.
pub(crate) fn abort_changes(directory: &Path, root: &Tree, place: &Tree) -> Result<()> {
    let applied = apply_progress::applied(place);
    tracing::warn!(
        "applying changes to {} was interrupted{}",
        directory.display(),
        match applied {
            Applied::Nothing => " before any was applied; they are dropped",
            Applied::Part => "; it keeps those that were applied, and the others are dropped",
            Applied::Everything => " at its end; all of them are applied",
        }
    );
    if applied == Applied::Everything {
        return Ok(());
    }
    apply::abort(place, &open_tree(&place.shown().join(OVERLAY).join(UPPER))?, root)
}

/// Applies the changes kept in `place` to `root`, which had the path `directory` when it was opened. `overlay` is
/// `None` if an earlier run has begun to apply them.
pub(crate) fn apply_changes(directory: &Path, root: &Tree, place: &Tree, overlay: Option<Overlay>) -> Result<()> {
    if apply_progress::has_ended(place)? {
        return Ok(());
    }
    let layers = place.shown().join(OVERLAY);
    let upper = open_tree(&layers.join(UPPER))?;
    if let Some(overlay) = overlay {
        upper_layer::complete_hard_links(root, &upper, &layers.join(INDEX_OF_LINKS), &open_tree(&overlay.image_root)?)?;
        overlay.unmount()?;
    }
    apply::apply(place, &upper, root)?;
    tracing::info!("applied the changes to {}", directory.display());
    if !still_names(directory, root) {
        tracing::warn!(
            "{} now names another directory; the changes are in the one that was opened, which is {}",
            directory.display(),
            root.shown().display()
        );
    }
    Ok(())
}

/// Refuses, as a source of `prepare`, a directory that a run has open or below which something is mounted.
pub fn refuse_open_source(source: &str) -> Result<()> {
    match Source::parse(source)? {
        Source::Here(path) if path.is_dir() => {
            let directory = named::resolve(&path).attempt(|| format!("open {}", path.display()))?;
            refuse_open(&directory)?;
            refuse_mounts_below(&directory, &format!("use {} as an image", directory.display()), "copying")
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, chown};

    #[test]
    fn directory_is_reachable_if_every_directory_on_the_way_lets_others_through() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap().join("above/root");
        let above = root.parent().unwrap();
        std::fs::create_dir_all(&root).unwrap();
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
        for (mode, owner, group, expected) in [
            (0o700, 0, 0, false),
            (0o750, 0, 0, false),
            (0o750, 0, 1234, true),
            (0o701, 0, 0, true),
            (0o740, 0, 1234, false),
            (0o700, 1234, 0, true),
        ] {
            for (changed, other) in [(above, &*root), (&root, above)] {
                chown(changed, Some(owner), Some(group)).unwrap();
                std::fs::set_permissions(changed, PermissionsExt::from_mode(mode)).unwrap();
                chown(other, Some(0), Some(0)).unwrap();
                std::fs::set_permissions(other, PermissionsExt::from_mode(0o755)).unwrap();
                assert_eq!(is_reachable(&root).unwrap(), expected, "{mode:o} {owner} {group}");
            }
        }
        chown(&root, Some(0), Some(0)).unwrap();
        std::fs::set_permissions(&root, PermissionsExt::from_mode(0o700)).unwrap();
        assert!(!is_reachable(&root).unwrap());
        // Version 2, then owner rwx, user 1234 --x, group ---, mask --x, others ---.
        let entry = |tag: u16, may: u16, id: u32| {
            [&tag.to_le_bytes()[..], &may.to_le_bytes()[..], &id.to_le_bytes()[..]].concat()
        };
        let none = u32::MAX;
        let entries = [entry(1, 7, none), entry(2, 1, 1234), entry(4, 0, none), entry(16, 1, none), entry(32, 0, none)];
        let acl = [&2_u32.to_le_bytes()[..], &entries.concat()].concat();
        rustix::fs::setxattr(&root, ACL, &acl, rustix::fs::XattrFlags::empty()).unwrap();
        assert!(is_reachable(&root).unwrap());
    }
}
