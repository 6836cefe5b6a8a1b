//! `ims-sshd package` and `ims-sshd upload`: the steps of a sidecar, one by one.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::error::{Attempt, Error, Result};
use crate::lifecycle::signal_files::SignalFiles;
use crate::local::{say, say_json};
use crate::publish::boot::{self, BootFiles};
use crate::publish::ims::Ims;
use crate::publish::package;
use crate::publish::prepare::INVENTORY;
use crate::publish::settings::Settings;
use crate::publish::sidecar::write_changes;
use crate::publish::upload::{Image, Publication};
use crate::publish::work::Work;
use crate::sys::tree::Tree;

/// An image root, and the folder that its archive and the notes about it are in.
struct Place {
    image_root: PathBuf,
    folder: PathBuf,
    archive: PathBuf,
}

impl Place {
    /// `named` is an image root's parent, or an image root; the archive of the latter is put where one stands.
    fn of(settings: &Settings, named: Option<&Path>, archive: Option<&Path>) -> Result<Self> {
        let parent = named.unwrap_or(&settings.parent);
        let below = parent.join(settings.image_root());
        let (image_root, folder) = if below.is_dir() || named.is_none() {
            (below, parent.to_owned())
        } else {
            (parent.to_owned(), ".".into())
        };
        if !image_root.is_dir() {
            let shown = image_root.display();
            return Err(Error::bad_input(format!("the image root is '{shown}': expected an unpacked image")));
        }
        let archive = archive.map_or_else(|| folder.join(settings.archive()), Path::to_owned);
        let archive = std::path::absolute(&archive).attempt(|| format!("find {}", archive.display()))?;
        let folder = std::fs::canonicalize(&folder).attempt(|| format!("open {}", folder.display()))?;
        Ok(Self { image_root, folder, archive })
    }

    fn boot(&self, settings: &Settings) -> Result<BootFiles> {
        let real = std::fs::canonicalize(&self.image_root).attempt(|| format!("open {}", self.image_root.display()))?;
        let tree = Tree::open(&real).attempt(|| format!("open {}", real.display()))?;
        boot::find(&tree, &settings.boot, settings.arch)
    }
}

/// Packs an image root.
pub fn package(
    settings: &Settings,
    named: Option<&Path>,
    archive: Option<&Path>,
    exclude: &[String],
    changes: Option<&Path>,
) -> Result<u8> {
    let place = Place::of(settings, named, archive)?;
    place.boot(settings)?;
    let work = Work::begin(&settings.network)?;
    package::pack(&work, &place.image_root, &place.archive, &settings.packing, exclude)?;
    if let Some(file) = changes {
        write_changes(&work, &place.folder.join(INVENTORY), &place.image_root, file)?;
    }
    say(&format!("{}\n", place.archive.display()));
    Ok(0)
}

/// Uploads a packed image with its boot files, and registers it where there is an IMS.
pub fn upload(
    settings: &Settings,
    named: Option<&Path>,
    archive: Option<&Path>,
    debug_kernel: Option<&Path>,
) -> Result<u8> {
    let place = Place::of(settings, named, archive)?;
    let attempted = |file: &Path| format!("open {}", file.display());
    let rootfs = File::open(&place.archive)
        .attempt(|| attempted(&place.archive))
        .map_err(|e| e.advise("'ims-sshd package' makes it"))?;
    let debug_kernel = debug_kernel.map(|file| File::open(file).attempt(|| attempted(file))).transpose()?;
    let image = Image { rootfs, boot: Some(place.boot(settings)?), debug_kernel };
    let work = Work::begin(&settings.network)?;
    let files = SignalFiles::open(&place.folder)?.ok_or_else(|| Error::new(attempted(&place.folder)))?;
    let ims = Ims::of(&work, settings);
    let report = Publication { work: &work, settings, ims, files: &files }.publish(image)?;
    say_json(&report);
    Ok(0)
}
