//! `ims-sshd prepare`: makes an image root from a source image; leaves nothing behind if that fails.

use std::fs::File;
use std::path::Path;

use rustix::io::Errno;

use crate::error::{Attempt, Error, Result};
use crate::image::inventory::Inventory;
use crate::image::kind::{Content, Kind, Opened};
use crate::image::layers::layers;
use crate::image::overlay_files;
use crate::image::packing::{self, Archive};
use crate::image::unpack::{LOWER, Overlay, unpack};
use crate::publish::basis;
use crate::publish::download;
use crate::publish::identity::{Identity, Record, is_in_pod, named};
use crate::publish::journal;
use crate::publish::settings::Settings;
use crate::publish::source::Source;
use crate::store;
use crate::sys::file_kind::FileKind;
use crate::sys::tree::Tree;
use crate::transfer::Work;
use crate::transfer::confinement;
use crate::verdict::Verdict;
use crate::volume::image_root;
use crate::volume::layout::{
    ARCHIVE, EXITING, FETCHING, INVENTORY, OVERLAY, POD_ERROR, READY, REMOTE_PORT, SSHD_LISTENING, TRANSFER, UNPACKING,
};
use crate::volume::open_tree;
use crate::volume::signal_files::SignalFiles;

/// Way to make an image root from an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Open {
    /// Unpacks it. For a pod, in which a container does not see another one's mounts.
    Unpack,
    /// Mounts a squashfs, or a directory, below an overlay that takes the changes; fast, whatever the size.
    Overlay,
}

/// Removes the journal of what was published in part, and an image packed elsewhere: a new image root has neither.
pub(crate) fn clear_published(files: &SignalFiles) -> Result<()> {
    journal::clear(files).and_then(|()| files.retract(TRANSFER))
}

/// Signal files and marks that an earlier job or an earlier pod has left.
pub(crate) fn marks() -> impl Iterator<Item = &'static str> {
    let verdicts = Verdict::ALL.map(Verdict::signal_file);
    [READY, SSHD_LISTENING, EXITING, POD_ERROR, REMOTE_PORT].into_iter().chain(verdicts)
}

/// Removes the files of [`marks`], for an image root that exists or is about to get its name. A refused command leaves
/// them, since the old image root may be complete. Keeps the journal if the image root `stays`: the sidecar continues
/// with what this job published in part.
pub(crate) fn clear_marks(parent: &Path, stays: bool) -> Result<()> {
    let Some(files) = SignalFiles::open(parent)? else { return Ok(()) };
    marks().try_for_each(|name| files.retract(name))?;
    // Without an image root, anything that was published in part or packed elsewhere belongs to another image root.
    if stays { Ok(()) } else { clear_published(&files) }
}

/// Makes the image root from `source`, in the best way unless `open` says how. Removes everything if that fails. An
/// image root that exists is complete, since it gets its name last.
pub(crate) fn prepare(
    work: &Work,
    settings: &Settings,
    source: &Source,
    open: Option<Open>,
    image_root: &Path,
) -> Result<Option<Overlay>> {
    make(work, settings, source, open, image_root).map(|(overlay, _)| overlay)
}

/// Like [`prepare`]; also returns the archive that the image root was made from by this call.
pub(crate) fn make(
    work: &Work,
    settings: &Settings,
    source: &Source,
    open: Option<Open>,
    image_root: &Path,
) -> Result<(Option<Overlay>, Option<Opened>)> {
    if open == Some(Open::Unpack) {
        // Check this now, before the source is fetched.
        confinement::refuse_to_lose_attributes()?;
    }
    let parent = &settings.job.parent;
    let volume = open_tree(parent)?;
    let stays = image_root.exists();
    // Only `prepare` gives `open`, and only with `prepare` do other containers wait for signal files.
    let clear_marks = || if open.is_some() { clear_marks(parent, stays) } else { Ok(()) };
    refuse_links(parent, image_root)?;
    await_unpackers(&volume.shown().join(UNPACKING));
    remove(&volume, UNPACKING)?;
    let known = known(settings, source, &volume, image_root)?;
    let known = known.inspect(|(known, now)| known.tell_other_time(now.as_ref())).map(|(known, _)| known);
    let record = Record::on(&volume, settings)?;
    let has_overlay = Overlay::changes(&parent.join(OVERLAY)).is_some();
    if let (Some(known), true, Some(open)) = (&known, has_overlay, open) {
        if open == Open::Unpack {
            let why = "it is below an overlay";
            let advice = "--open overlay goes on with it; --fresh drops it with all changes, and begins anew";
            return Err(Error::new(format!("unpack to {}", image_root.display())).because(why).advise(advice));
        }
        if Overlay::is_mounted(&parent.join(OVERLAY), image_root) {
            clear_marks()?;
            tracing::info!(
                "{} is mounted already, made of {}: continuing with it and its changes",
                image_root.display(),
                known.shown()
            );
            return Ok((None, None));
        }
    }
    // An image root without an overlay was unpacked by an earlier run of `prepare` or, if it could not be published, of
    // `customize`.
    if let Some(known) = known.as_ref().filter(|_| !has_overlay && open != Some(Open::Overlay)) {
        clear_marks()?;
        tracing::info!(
            "{} is there already, made of {}: continuing with it and its changes; --fresh drops it and begins \
             anew",
            image_root.display(),
            known.shown()
        );
        return Ok((None, None));
    }
    // `customize` and `enter` keep a fetched image in a directory of their own, as long as changes to it are kept.
    let kept = known.is_some()
        && open.is_none()
        && !matches!(source, Source::Here(_))
        && volume.look(ARCHIVE).is_ok_and(|f| f.is_some());
    // Skip this check in an IMS job: the volume is the job's own, and an earlier container of the job may have fetched
    // the file that is there.
    if settings.job.id.is_none() {
        refuse_to_fetch_over(source, &volume, &record)?;
    }
    if known.is_none() {
        // A kept source and its inventory are useless now: somebody has removed their image root.
        basis::forget(&volume);
    }
    let compare = |opened: &Opened| {
        let identity = Identity::of(source, opened, &settings.expected)?;
        match &known {
            Some(before) if !before.is_same(&identity) => {
                Err(Record::refusal(&image_root.display().to_string(), source, known.as_ref(), Some(&identity)))
            }
            Some(_) => Ok(()),
            None => record.write(&identity),
        }
    };
    let mut unpacked = true;
    let archive = if kept {
        Opened::open(&parent.join(ARCHIVE))
    } else {
        archive(work, settings, source, open, &volume, compare)
    };
    let result = archive.and_then(|archive| {
        match way(work, &archive, open, has_overlay, image_root)? {
            Open::Overlay => {
                unpacked = false;
                let mounted = mount(&archive, &volume, parent, image_root, clear_marks)?;
                Ok((Some(mounted), Some(archive)))
            }
            Open::Unpack => {
                let tree = unpack(work, &archive, &volume, UNPACKING)?;
                check(&archive, &tree)?;
                Inventory::of(work, &tree)?.save(&volume, INVENTORY)?;
                // Take these steps last, but before anybody else can reach the tree.
                let is_fetched = !matches!(source, Source::Here(_));
                basis::keep(work, settings, is_fetched, &archive, &volume, &tree)?;
                clear_marks()?;
                give_name(&tree, parent, image_root)?;
                Ok((None, Some(archive)))
            }
        }
    });
    // Keep an archive below an overlay, because the changes are based on it.
    let ours = matches!(source, Source::Web(_) | Source::S3(..)) && !has_overlay;
    if result.is_err() || unpacked {
        let _ = remove(&volume, UNPACKING);
        for name in ours.then_some(ARCHIVE).into_iter().chain([FETCHING]) {
            let _ = volume.remove(name);
        }
    }
    if result.is_err() && known.is_none() {
        basis::forget(&volume);
        let _ = volume.remove(INVENTORY);
        let _ = record.remove();
    }
    result
}

/// Mounts an archive below an overlay. Calls `ready` once the overlay shows an image.
fn mount(
    archive: &Opened,
    volume: &Tree,
    parent: &Path,
    image_root: &Path,
    ready: impl Fn() -> Result<()>,
) -> Result<Overlay> {
    let directory = parent.join(OVERLAY);
    // Changes of an earlier run are kept even if the overlay cannot be mounted now.
    let is_new = !directory.exists();
    let mounted = Overlay::mount(archive, &directory, image_root)
        .and_then(|overlay| check(archive, &open_tree(image_root)?).map(|()| overlay))
        .and_then(|overlay| ready().map(|()| overlay));
    mounted.inspect_err(|_| {
        if is_new {
            let _ = remove(volume, OVERLAY).map(|()| std::fs::remove_dir(image_root));
        }
    })
}

/// Programs that unpack, by their short names.
const UNPACKERS: [&str; 6] = ["tar", "unsquashfs", "cp", "gzip", "xz", "zstd"];

/// Waits for the unpackers of a killed run, which would write to `directory` while it is removed.
pub(crate) fn await_unpackers(directory: &Path) {
    if directory.exists() {
        // Ignore the result: a process of somebody else in the directory does not matter.
        let _ = packing::inside(directory, &UNPACKERS);
    }
}

/// Fetches `source` for a remote job, as a squashfs in the image root's parent. The node opens it.
pub(crate) fn fetch(work: &Work, settings: &Settings, source: &Source) -> Result<()> {
    let image = squashfs(work, settings, source)?;
    let volume = open_tree(&settings.job.parent)?;
    let attempted = || format!("look for {ARCHIVE}");
    let own = rustix::fs::fstat(&image).attempt(attempted)?;
    let is_there = |there: rustix::fs::Stat| (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino);
    if volume.look(ARCHIVE).attempt(attempted)?.is_some_and(is_there) {
        return Ok(());
    }
    basis::copy(work, &image, &volume, ARCHIVE).map(drop)
}

/// The squashfs that a remote job begins with: `source` itself, if it is one on this machine, else a file in the image
/// root's parent that was fetched or packed here.
pub(crate) fn squashfs(work: &Work, settings: &Settings, source: &Source) -> Result<File> {
    let volume = open_tree(&settings.job.parent)?;
    let record = Record::on(&volume, settings)?;
    if settings.job.id.is_none() {
        refuse_to_fetch_over(source, &volume, &record)?;
    }
    let write = |opened: &Opened| record.write(&Identity::of(source, opened, &settings.expected)?);
    let fetched = archive(work, settings, source, Some(Open::Overlay), &volume, write).and_then(|opened| {
        if opened.kind()? == Some(Kind::Squashfs) {
            opened.into_file()
        } else {
            squash(work, settings, &opened, &volume)
        }
    });
    fetched.inspect_err(|_| {
        for name in [FETCHING, ARCHIVE] {
            let _ = volume.remove(name);
        }
        let _ = record.remove();
    })
}

/// Packs a directory, or what is in an archive, to where a fetched squashfs lies.
fn squash(work: &Work, settings: &Settings, source: &Opened, volume: &Tree) -> Result<File> {
    let unpacked = match &source.content {
        Content::Directory(tree) if layers(tree)?.is_none() => None,
        _ => {
            confinement::refuse_to_lose_attributes()?;
            remove(volume, UNPACKING)?;
            Some(unpack(work, source, volume, UNPACKING)?)
        }
    };
    let packed = match (&unpacked, &source.content) {
        (Some(tree), _) | (None, Content::Directory(tree)) => check(source, tree).and_then(|()| {
            tracing::info!("packing {}, since a build node takes a squashfs", source.shown.display());
            let to = Archive { directory: volume, name: FETCHING };
            packing::pack(work, tree, &to, &settings.packing, &[], None)
        }),
        (None, Content::File(_)) => Err(Error::new("pack the image").because("it is no directory")),
    };
    drop(unpacked);
    let removed = remove(volume, UNPACKING);
    let packed = packed?;
    removed?;
    volume.rename(FETCHING, ARCHIVE).attempt(|| format!("rename {FETCHING}"))?;
    Ok(packed.file)
}

/// Gives an unpacked tree the name of the image root.
fn give_name(tree: &Tree, parent: &Path, image_root: &Path) -> Result<()> {
    if let Some(above) = image_root.parent() {
        std::fs::create_dir_all(above).attempt(|| format!("create the directory {}", above.display()))?;
    }
    let unpacking = parent.join(UNPACKING);
    std::fs::rename(&unpacking, image_root).attempt(|| format!("rename {}", unpacking.display()))?;
    // Somebody who can write to the volume may have put another directory there.
    if is_same(tree, &open_tree(image_root)?).unwrap_or(false) {
        return Ok(());
    }
    let taken = format!("another directory has taken the place of {}", unpacking.display());
    Err(Error::new(format!("unpack to {}", image_root.display())).because(taken))
}

/// Refuses to fetch `source` where somebody's file has the name that a fetched image gets.
fn refuse_to_fetch_over(source: &Source, volume: &Tree, record: &Record) -> Result<()> {
    let attempted = || format!("fetch {}", named(source));
    if matches!(source, Source::Here(_)) || volume.look(ARCHIVE).attempt(attempted)?.is_none() {
        return Ok(());
    }
    // An earlier run that was killed may have fetched the file.
    if record.read().is_some_and(|before| before.is_fetched()) {
        return Ok(());
    }
    let why = format!("{} exists, and was not fetched", volume.shown().join(ARCHIVE).display());
    Err(Error::new(attempted()).because(why).advise("rename or remove that file: the image is kept there"))
}

/// Refuses a source that does not contain an image root.
fn check(source: &Opened, tree: &Tree) -> Result<()> {
    let refused = |why| Error::new(format!("use {} as an image", source.shown.display())).because(why);
    image_root::check(tree, &source.shown, source.file().is_some(), refused)
}

/// Recorded identity of the source of an existing image root, and that of `source` if it is on this machine; `None` if
/// there is no image root. Fails if they are not the same image, as far as this can be decided without fetching it.
pub(crate) fn known(
    settings: &Settings,
    source: &Source,
    volume: &Tree,
    image_root: &Path,
) -> Result<Option<(Identity, Option<Identity>)>> {
    if Overlay::changes(&settings.job.parent.join(OVERLAY)).is_none() && !image_root.exists() {
        return Ok(None);
    }
    let known = Record::on(volume, settings)?.read();
    let now = match source {
        Source::Here(path) => Some(Identity::of(source, &Opened::open(path)?, &settings.expected)?),
        _ => None,
    };
    let is_same = |known: &Identity| match &now {
        Some(now) => known.is_same(now),
        None => known.is_named(source, &settings.expected),
    };
    match known {
        Some(known) if is_same(&known) => Ok(Some((known, now))),
        other => Err(Record::refusal(&image_root.display().to_string(), source, other.as_ref(), now.as_ref())),
    }
}

/// Takes an inventory of the lower layer of an overlay on `volume`, unless there is one. Only a report of changes needs
/// it.
pub(crate) fn take_inventory_below(work: &Work, settings: &Settings, volume: &Tree) -> Result<()> {
    let attempted = || format!("look for {}", volume.shown().join(INVENTORY).display());
    let has_overlay = volume.look(OVERLAY).attempt(attempted)?.is_some();
    if !has_overlay || volume.look(INVENTORY).attempt(attempted)?.is_some() {
        return Ok(());
    }
    let mounted = volume.directory_without_links(Path::new(OVERLAY).join(LOWER)).attempt(attempted)?;
    let below = if mounted.names().attempt(attempted)?.is_empty() {
        // A source that is a directory is not mounted there, but recorded.
        let record = Record::on(volume, settings)?;
        let source = record.read().filter(|_| record.is_sealed() || !is_in_pod(settings));
        match source.filter(|source| Path::new(source.source()).is_dir()) {
            Some(source) => open_tree(Path::new(source.source()))?,
            None => return Ok(()),
        }
    } else {
        mounted
    };
    Inventory::of(work, &below)?.save(volume, INVENTORY)
}

/// Returns whether `parent` has an image root that may have been changed: an unpacked one, an overlay with an upper
/// layer that is not empty, or an image that a node has packed.
pub(crate) fn holds_changes(parent: &Path, image_root: &Path) -> bool {
    match Overlay::changes(&parent.join(OVERLAY)) {
        Some(changes) => changes,
        None => image_root.exists() || parent.join(TRANSFER).exists(),
    }
}

/// Way to open an archive: the `wanted` one, or else the best one, which is an overlay above a squashfs or a directory.
/// No new overlay is mounted above a squashfs that holds files of another one: the image would lose them.
fn way(work: &Work, archive: &Opened, wanted: Option<Open>, has_overlay: bool, image_root: &Path) -> Result<Open> {
    let is_squashfs = archive.kind()? == Some(Kind::Squashfs);
    let best = match &archive.content {
        Content::Directory(tree) if layers(tree)?.is_none() => Open::Overlay,
        Content::File(_) if is_squashfs => Open::Overlay,
        _ => Open::Unpack,
    };
    let open = wanted.unwrap_or(best);
    if open == Open::Unpack || !is_squashfs || has_overlay {
        return Ok(open);
    }
    let Some(found) = overlay_files::first_in(work, archive)? else { return Ok(open) };
    let why = format!("it holds files of another overlay ({}), which an overlay hides", found.display());
    if wanted.is_some() {
        let refused = Error::new(format!("mount {} on {}", archive.shown.display(), image_root.display()));
        return Err(refused.because(why).advise("unpack it (--open unpack)"));
    }
    tracing::info!("unpacking {} instead of mounting an overlay above it: {why}", archive.shown.display());
    Ok(Open::Unpack)
}

/// Opens the archive or directory on this machine, fetched if it has to be. What was checked is accessed by its
/// descriptor.
fn archive(
    work: &Work,
    settings: &Settings,
    source: &Source,
    open: Option<Open>,
    volume: &Tree,
    compare: impl Fn(&Opened) -> Result<()>,
) -> Result<Opened> {
    let url = match source {
        Source::Here(path) => {
            let Opened { shown, content } = Opened::open(path)?;
            let content = match content {
                content if !settings.expected.is_given() => content,
                Content::Directory(_) => {
                    return Err(Error::new(format!("use {} as an image", shown.display()))
                        .because("it is a directory, which has no checksum")
                        .advise("leave the checksum out"));
                }
                Content::File(file) => {
                    Content::File(settings.expected.check(work, file, &shown.display().to_string(), Some(volume))?)
                }
            };
            let opened = Opened { shown, content };
            return compare(&opened).map(|()| opened);
        }
        Source::Web(url) => url.clone(),
        Source::S3(bucket, key) => work.wait(store::sign(bucket, key, &settings.store, &settings.network))?,
    };
    // Unpacking needs the same space again, or more.
    let copies = if open == Some(Open::Unpack) { 2 } else { 1 };
    let file = download::fetch(work, &url, &settings.expected, volume, FETCHING, copies)?;
    let opened = Opened { shown: settings.job.parent.join(ARCHIVE), content: Content::File(file) };
    compare(&opened)?;
    volume.rename(FETCHING, ARCHIVE).attempt(|| format!("rename {}/{FETCHING}", settings.job.parent.display()))?;
    Ok(opened)
}

/// Refuses links in place of directories: left by an earlier job, they would lead the image or its changes elsewhere.
pub(crate) fn refuse_links(parent: &Path, image_root: &Path) -> Result<()> {
    let tree = open_tree(parent)?;
    let places = ["", "lower", "upper", "work"].map(|name| Path::new(OVERLAY).join(name));
    let image_root = image_root.strip_prefix(parent).ok().into_iter().flat_map(Path::ancestors).map(Path::to_owned);
    for place in places.into_iter().chain(image_root).filter(|place| !place.as_os_str().is_empty()) {
        let shown = parent.join(&place);
        let attempted = || format!("open {}", shown.display());
        let is_link = match tree.handle_without_links(&place) {
            Ok(found) => FileKind::of(&rustix::fs::fstat(&found).attempt(attempted)?) == FileKind::SymbolicLink,
            Err(e) => Errno::from_io_error(&e) == Some(Errno::LOOP),
        };
        if is_link {
            return Err(Error::new(attempted()).because("it is a symbolic link").advise("remove it"));
        }
    }
    Ok(())
}

fn is_same(a: &Tree, b: &Tree) -> std::io::Result<bool> {
    let [a, b] = [rustix::fs::fstat(a)?, rustix::fs::fstat(b)?];
    Ok((a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
}

/// Removes the tree `name` from a directory, if it exists.
fn remove(volume: &Tree, name: &str) -> Result<()> {
    volume.remove_whole(name.as_ref()).attempt(|| format!("remove {}", volume.shown().join(name).display()))
}
