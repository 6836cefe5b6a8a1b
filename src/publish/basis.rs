//! The squashfs that an image root was made from, from which the packer copies unchanged files.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest;
use rustix::fs::OFlags;

use crate::error::{Attempt, Error, Result};
use crate::image::kind::{Kind, Opened};
use crate::image::packing::Packer;
use crate::image::unchanged::{self, Inventory, Source};
use crate::publish::authentication::Seal;
use crate::publish::identity::{Record, is_own};
use crate::publish::settings::Settings;
use crate::sys::tree::Tree;
use crate::transfer::Work;
use crate::volume::layout::{ARCHIVE, FETCHING, KEPT_SOURCE, OVERLAY, UNPACKED};

/// Label under which the inventory of an unpacked image root is authenticated.
const KIND: &str = "unpacked";

/// Maximum size of an inventory in bytes: that of a million files with long names.
const LIMIT: u64 = 256 << 20;

/// Free space that is needed to keep a source, as a multiple of its size.
const ROOM: u64 = 3;

/// Source of `image_root`, whose records are in `directory`, with the evidence by which unchanged files are recognized.
/// Returns `None` if the image is to be packed from scratch, and logs the reason if there could be a source. With
/// `is_last`, a source that was kept for this purpose is removed once the image is packed. Fails only if a signal
/// interrupts.
pub(crate) fn of(
    work: &Work,
    settings: &Settings,
    directory: &Tree,
    image_root: &Tree,
    is_last: bool,
) -> Result<Option<Source>> {
    if settings.packing.packer != Packer::Own || settings.packing.is_from_scratch {
        return Ok(None);
    }
    let found = match below_overlay(settings, directory, image_root) {
        Ok(None) => unpacked(settings, directory, image_root),
        found => found,
    };
    let mut source = match work.unless_interrupted(found) {
        Err(interrupted) if interrupted.is_interruption() => return Err(interrupted),
        Err(why) => {
            tracing::info!("packing everything anew: {why}");
            None
        }
        Ok(source) => source,
    };
    if let (true, Some(source), Ok(Some(_))) = (is_last, &mut source, directory.look(KEPT_SOURCE)) {
        source.is_dropped = directory.directory_without_links(".").ok().map(|directory| (directory, KEPT_SOURCE));
    }
    Ok(source)
}

/// Source of an image root that is an overlay; `None` if it is no overlay, or an overlay above a directory.
fn below_overlay(settings: &Settings, directory: &Tree, image_root: &Tree) -> Result<Option<Source>> {
    let attempted = || format!("find the source of {}", image_root.shown().display());
    if directory.look(OVERLAY).attempt(attempted)?.is_none() {
        return Ok(None);
    }
    let Some(record) = Record::on(directory, settings)?.read() else { return Ok(None) };
    let fetched = directory.shown().join(ARCHIVE);
    let opened = Opened::open(if record.is_fetched() { &fetched } else { Path::new(record.source()) })?;
    if opened.file().is_none() || opened.kind()? != Some(Kind::Squashfs) {
        return Ok(None);
    }
    let overlay = directory.shown().join(OVERLAY);
    unchanged::of_overlay(&overlay, image_root, opened.into_file()?).attempt(attempted)?.map(Some)
}

/// Source of an image root that was unpacked; `None` if there is no inventory of it.
fn unpacked(settings: &Settings, directory: &Tree, image_root: &Tree) -> Result<Option<Source>> {
    let attempted = || format!("use {}", directory.shown().join(UNPACKED).display());
    if directory.look(UNPACKED).attempt(attempted)?.is_none() {
        return Ok(None);
    }
    let seal = seal_of(settings, directory)?;
    let inventory = load(directory, seal.as_ref())?;
    // The sidecar can read files that other writers to the volume cannot read, so do not open any path that they
    // recorded.
    if inventory.source().is_some() && seal.is_none() && !is_own(directory, settings, 0o022)? {
        return Err(Error::new(attempted())
            .because("it names a squashfs outside the volume, and other programs could have written it")
            .advise("IMAGE_KEEP_SOURCE=true for 'ims-sshd prepare' keeps a copy of it there"));
    }
    let squashfs = open_source(directory, &inventory)?;
    inventory.source_of(image_root, squashfs).map(Some).map_err(|why| Error::new(attempted()).because(why))
}

fn open_source(directory: &Tree, inventory: &Inventory) -> Result<File> {
    match inventory.source() {
        Some(path) => Opened::open(path)?.into_file(),
        None => {
            let opened = directory.open_regular(KEPT_SOURCE, OFlags::RDONLY | OFlags::NOFOLLOW);
            opened.attempt(|| format!("open {}", directory.shown().join(KEPT_SOURCE).display()))
        }
    }
}

/// Takes the inventory of `root`, which was just unpacked from `archive` in `directory`, and keeps a fetched squashfs
/// if there is room for it. Both serve only to pack faster: without them, the image is packed from scratch. Fails only
/// if a signal interrupts.
pub(crate) fn keep(
    work: &Work,
    settings: &Settings,
    is_fetched: bool,
    archive: &Opened,
    directory: &Tree,
    root: &Tree,
) -> Result<()> {
    if settings.packing.packer != Packer::Own || archive.kind().ok().flatten() != Some(Kind::Squashfs) {
        return Ok(());
    }
    let Some(squashfs) = archive.file() else { return Ok(()) };
    let kept = try_to_keep(work, settings, is_fetched, (squashfs, &archive.shown), directory, root);
    if let Err(why) = work.unless_interrupted(kept) {
        forget(directory);
        if why.is_interruption() {
            return Err(why);
        }
        tracing::info!("the image will be packed from scratch: {why}");
    }
    Ok(())
}

fn try_to_keep(
    work: &Work,
    settings: &Settings,
    is_fetched: bool,
    (squashfs, shown): (&File, &Path),
    directory: &Tree,
    root: &Tree,
) -> Result<()> {
    let attempted = || "keep its source".to_owned();
    // On request, copy a local source to the volume. A sidecar without a secret opens a source only there, since other
    // containers could have recorded any other path.
    let is_copied = !is_fetched && settings.keep_source == Some(true);
    let copied = is_copied.then(|| copy(work, squashfs, directory, KEPT_SOURCE)).transpose()?;
    let squashfs = copied.as_ref().unwrap_or(squashfs);
    let found = squashfs.metadata().attempt(attempted)?;
    if found.nlink() == 0 {
        return Err(Error::new(attempted()).because("other users can write to the directory that holds the source"));
    }
    let source: Option<PathBuf> = if is_fetched {
        let disk = rustix::fs::fstatvfs(directory).attempt(attempted)?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        let wanted = settings.keep_source.unwrap_or(free >= found.len().saturating_mul(ROOM));
        if !wanted {
            let why =
                if settings.keep_source.is_some() { "IMAGE_KEEP_SOURCE is false" } else { "too little space is free" };
            return Err(Error::new(attempted()).because(why));
        }
        directory.rename(ARCHIVE, KEPT_SOURCE).attempt(attempted)?;
        None
    } else {
        (!is_copied).then(|| shown.to_owned())
    };
    let inventory = Inventory::of(root, squashfs, source).map_err(|why| Error::new(attempted()).because(why))?;
    save(directory, seal_of(settings, directory)?.as_ref(), &inventory)
}

/// Copies a file of this machine to the volume, as `name`.
pub(crate) fn copy(work: &Work, mut from: &File, volume: &Tree, name: &str) -> Result<File> {
    let attempted = || format!("copy the image to {}", volume.shown().join(name).display());
    let mut to = volume.create_file(FETCHING).attempt(attempted)?;
    let mut fill = || {
        // The file was read before, to find out its type.
        from.rewind().attempt(attempted)?;
        loop {
            work.heed()?;
            if std::io::copy(&mut from.take(64 << 20), &mut to).attempt(attempted)? == 0 {
                return volume.rename(FETCHING, name).attempt(attempted);
            }
        }
    };
    fill().inspect_err(|_| drop(volume.remove(FETCHING)))?;
    Ok(to)
}

/// Removes a source that was kept, and its inventory.
pub(crate) fn forget(directory: &Tree) {
    for name in [UNPACKED, KEPT_SOURCE] {
        let _ = directory.remove(name);
    }
}

/// Moves a kept source and its inventory from the private directory `from` to `to`, along with the image root.
pub(crate) fn move_to(from: &Tree, to: &Tree, settings: &Settings) -> Result<()> {
    let attempted = || format!("move the image's source to {}", to.shown().display());
    if from.look(UNPACKED).attempt(attempted)?.is_none() {
        return Ok(());
    }
    let mut inventory = load(from, seal_of(settings, from)?.as_ref())?;
    if inventory.source().is_none() {
        from.rename_to(KEPT_SOURCE, to, KEPT_SOURCE).attempt(attempted)?;
        inventory.moved(&open_source(to, &inventory)?).attempt(attempted)?;
    }
    save(to, seal_of(settings, to)?.as_ref(), &inventory)
}

/// Seal for the inventory of an image root in `directory`, regardless of who can reach that directory; `None` if the
/// job has no secret.
fn seal_of(settings: &Settings, directory: &Tree) -> Result<Option<Seal>> {
    Seal::has_secret(settings).then(|| Seal::of(settings, directory, false)).transpose()
}

/// Writes an inventory below a line that authenticates it.
fn save(directory: &Tree, seal: Option<&Seal>, inventory: &Inventory) -> Result<()> {
    let bytes = inventory.encode();
    let sum = sum(&bytes);
    let line = seal.map_or_else(|| format!("{sum}\n"), |seal| seal.line(KIND, &sum));
    let attempted = || format!("write {}", directory.shown().join(UNPACKED).display());
    directory.replace(UNPACKED, &[line.as_bytes(), &bytes].concat()).attempt(attempted)
}

/// Reads an inventory. With `seal`, refuses an inventory that this job has not written. Without a seal, nothing can be
/// verified and anybody may have written the inventory, so one with a sealed line is accepted like any other.
fn load(directory: &Tree, seal: Option<&Seal>) -> Result<Inventory> {
    let attempted = || format!("use {}", directory.shown().join(UNPACKED).display());
    let read = directory.read(UNPACKED, LIMIT).attempt(attempted)?;
    let refused = |why: &str| Error::new(attempted()).because(why);
    let end = read.iter().position(|byte| *byte == b'\n').ok_or_else(|| refused("it is damaged"))? + 1;
    let (line, bytes) = read.split_at(end);
    let line = std::str::from_utf8(line).map_err(|_| refused("it is damaged"))?;
    let told = match seal {
        Some(seal) => seal.open(KIND, line).ok_or_else(|| refused("this job has not written it"))?,
        None => line.trim_end().rsplit(' ').next().unwrap_or_default(),
    };
    if told != sum(bytes) {
        return Err(refused("it is damaged"));
    }
    Inventory::decode(bytes).ok_or_else(|| refused("it is damaged"))
}

fn sum(bytes: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode(digest::digest(&digest::SHA256, bytes))
}
