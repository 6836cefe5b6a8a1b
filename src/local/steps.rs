//! `ims-sshd prepare`, `package` and `upload`: single steps around the build environment of a pod.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::error::{Attempt, Error, Result};
use crate::image::boot::{self, BootFiles};
use crate::image::exclude::Pattern;
use crate::image::inventory::{Inventory, write_changes};
use crate::image::kind::Opened;
use crate::image::packing::{self, Archive};
use crate::ims::records::Status;
use crate::job::action::Action;
use crate::local::directory;
use crate::local::left_over::{clear_left_over, end_left_over};
use crate::log::output::say;
use crate::publish::anew;
use crate::publish::basis;
use crate::publish::identity::is_in_pod;
use crate::publish::journal::{self, Journal, JournalDirectory};
use crate::publish::manifest::say_result;
use crate::publish::packed;
use crate::publish::prepare::{self, Open};
use crate::publish::publication::{Image, Publication};
use crate::publish::settings::Settings;
use crate::publish::source::Source;
use crate::sys::named;
use crate::sys::tree::Tree;
use crate::transfer::{Work, interruptible};
use crate::volume::holds;
use crate::volume::image_root;
use crate::volume::layout::{BOOT_NAMES, CREATED_IMAGE_ROOT, IMAGE_ROOT, INVENTORY, POD_ERROR};
use crate::volume::open_tree;
use crate::volume::signal_files::{SignalFiles, Step};

/// Reports to IMS that `prepare` refused its arguments or `variables`: its container fails, and no other container of
/// the pod starts. If an environment is open on one of `places`, or another step runs there, the job there continues,
/// and nothing is reported.
pub fn report_refusal(places: &[PathBuf], variables: Vec<(OsString, OsString)>) {
    if places.iter().any(|place| refuse_open_environment(place).is_err() || is_being_made(place)) {
        return;
    }
    let Ok(settings) = Settings::to_report(variables) else { return };
    for place in places {
        mark_pod_error(place, &settings);
    }
    let reported = Work::begin(&settings.network).and_then(|work| {
        let reported = settings.ims_client(&work).set_status(Status::Error).map(drop);
        work.unless_interrupted(reported)
    });
    if let Err(e) = reported {
        tracing::error!("{e}");
    }
}

/// If the job's volume has an image root, creates [`POD_ERROR`] in the volume after a failed preparation: without IMS,
/// a sidecar would learn of the failure in no other way.
fn mark_pod_error(parent: &Path, settings: &Settings) {
    let has_image_root = [IMAGE_ROOT, CREATED_IMAGE_ROOT].iter().any(|name| parent.join(name).exists());
    if settings.job.id.is_some()
        && has_image_root
        && let Ok(Some(files)) = SignalFiles::open(parent)
        && let Err(e) = files.touch(POD_ERROR)
    {
        tracing::warn!("{e}");
    }
}

/// Refuses `place`, an image root or its parent, if an environment is open on it.
fn refuse_open_environment(place: &Path) -> Result<()> {
    for place in [Some(place), place.parent()].into_iter().flatten().filter(|place| place.is_dir()) {
        SignalFiles::open(place)?.map_or(Ok(()), |files| files.refuse_open())?;
    }
    Ok(())
}

/// Returns whether another step runs on `place`.
fn is_being_made(place: &Path) -> bool {
    let Ok(Some(files)) = SignalFiles::open(place) else { return false };
    files.refuse_while_used().is_err()
}

/// Parses the source of `prepare`. Refuses a directory that is open, or that contains the image root's parent.
pub fn source_to_prepare(settings: &Settings, source: &str) -> Result<Source> {
    directory::refuse_open_source(source)?;
    let (source, parent) = (Source::parse(source)?, &settings.job.parent);
    // The root directory of a container may have both.
    if !is_in_pod(settings)
        && let Ok(above) = named::resolve(parent)
        && above != Path::new("/")
        && Tree::open(&above).is_ok_and(|above| image_root::is_one(&above))
    {
        let why = format!("the image root's parent is '{}', an image root itself", parent.display());
        return Err(Error::bad_input(why).advise("name another directory, in which an image root is made"));
    }
    if let Source::Here(path) = &source
        && path.is_dir()
    {
        // Somebody may have given source and parent in the wrong order.
        refuse_open_environment(path)?;
        check_directory(path, parent)?;
    }
    Ok(source)
}

/// Fetches and opens `source` in a pod, and reports the job's status to IMS.
pub fn prepare(settings: &Settings, source: &Source, open: Open, is_fresh: bool) -> Result<u8> {
    let parent = &settings.job.parent;
    let image_root = parent.join(settings.job.image_root());
    let work = Work::begin(&settings.network)?;
    let is_new = !parent.exists();
    let (files, unmade) = match SignalFiles::open(parent)?.map_or_else(|| make_parent(parent), Ok) {
        Ok(files) => (Some(files), None),
        Err(error) => (None, Some(error)),
    };
    // These checks precede any report to IMS, since the job of an open environment, or of another `prepare`, continues.
    let claim = match &files {
        Some(files) => {
            files.refuse_open()?;
            let claim = files.claim_for(Step::Prepare)?;
            if is_fresh && image_root.is_dir() {
                directory::refuse_running(&image_root)?;
            }
            if !is_fresh && image_root.exists() {
                refuse_ended(settings, files)?;
            }
            Some(claim)
        }
        None => None,
    };
    let ims = settings.ims_client(&work);
    // Warn only outside a pod; in a pod, all users of the container belong to the image.
    if let (Open::Overlay, Source::Here(path), None) = (open, source, &settings.job.id)
        && path.is_dir()
    {
        directory::warn_if_reachable(&named::resolve(path).attempt(|| format!("open {}", path.display()))?)?;
    }
    let result = ims.set_status(Status::FetchingImage).and_then(|_| {
        unmade.map_or(Ok(()), Err)?;
        anew::clear(&work, &open_tree(&settings.job.parent)?)?;
        if let (Some(node), Some(Action::Customize) | None) = (&settings.job.node, settings.job.action) {
            prepare::fetch(&work, settings, source)?;
            prepare::clear_marks(parent, is_fresh || image_root.exists())?;
            // The container that packs the image does not get these settings, so record them.
            let names = serde_json::to_vec(&settings.boot).attempt(|| "record the names of the boot files")?;
            let volume = open_tree(&settings.job.parent)?;
            volume.replace(BOOT_NAMES, &names).attempt(|| "record the names of the boot files")?;
            tracing::info!("the image is fetched, and will be opened on the build node {node}");
            return Ok(0);
        }
        let made = if is_fresh {
            anew::prepare(&work, settings, source, open, &image_root)?
        } else {
            prepare::prepare(&work, settings, source, Some(open), &image_root)?
        };
        match made {
            Some(overlay) => {
                let mounted = overlay.keep();
                let places: Vec<_> = mounted.iter().rev().map(|place| place.display().to_string()).collect();
                tracing::info!(
                    "the image root is {}, mounted: '{}' undoes that, and keeps the changes",
                    image_root.display(),
                    shell_words::join(std::iter::once("umount".to_owned()).chain(places))
                );
            }
            None => tracing::info!("the image root is {}", image_root.display()),
        }
        Ok(0)
    });
    work.unless_interrupted(result).inspect_err(|_| {
        work.finish_regardless();
        mark_pod_error(parent, settings);
        if let Err(e) = ims.set_status(Status::Error) {
            tracing::error!("{e}");
        }
        drop(claim);
        if is_new {
            // remove_dir fails if the directory has any content, which somebody may need.
            let _ = std::fs::remove_dir(parent);
        }
    })
}

/// Refuses to continue with the image root of a job that has ended, because the sidecar would do nothing more. In a pod
/// that starts over, only warns: the other containers start after this one, find that the job has ended, and exit.
fn refuse_ended(settings: &Settings, files: &SignalFiles) -> Result<()> {
    let Some(how) = journal::ended(files, settings) else { return Ok(()) };
    let parent = files.path().display();
    if is_in_pod(settings) {
        tracing::warn!("the job in {parent} has ended: {how}; nothing is left to do; --fresh begins anew");
        return Ok(());
    }
    Err(Error::new(format!("go on in {parent}"))
        .because(format!("the job there has ended: {how}"))
        .advise("--fresh drops its image root with all changes, and begins anew"))
}

/// Refuses a source directory that contains the image root's parent.
fn check_directory(source: &Path, parent: &Path) -> Result<()> {
    let source = named::resolve(source).attempt(|| format!("open {}", source.display()))?;
    if holds(&source, parent)? {
        let why = format!("the image root's parent is '{}': expected a directory outside SOURCE", parent.display());
        return Err(Error::bad_input(why));
    }
    Ok(())
}

/// Creates the image root's parent, closed to other users, who must not reach setuid programs of the image. A volume
/// that exists keeps its mode.
fn make_parent(parent: &Path) -> Result<SignalFiles> {
    let attempted = || format!("create the directory {}", parent.display());
    if let Some(missing) = named::missing_parent(parent) {
        return Err(Error::new(attempted())
            .because(format!("{} does not exist", missing.display()))
            .advise("create it first"));
    }
    let mut make = std::fs::DirBuilder::new();
    make.recursive(true).mode(0o700).create(named::resolve_beginning(parent).attempt(attempted)?).attempt(attempted)?;
    SignalFiles::open(parent)?.ok_or_else(|| removed(parent))
}

fn removed(parent: &Path) -> Error {
    Error::new(format!("open {}", parent.display())).because("it has been removed").advise("run it again")
}

/// An image root, and the locations of its archive and of the records about it.
struct Place {
    image_root: Tree,
    /// Directory of the records.
    files: SignalFiles,
    archive_directory: Tree,
    archive_name: String,
    /// Directory with the record of the image root's source, if it is not the directory of `files`.
    source_directory: Option<Tree>,
}

impl Place {
    /// `named` is an image root or the parent of one. For an image root, the archive is created in the current
    /// directory.
    fn of(settings: &Settings, named: Option<&Path>, archive: Option<&Path>) -> Result<Self> {
        let parent = named.unwrap_or(&settings.job.parent);
        let is_parent = named.is_none() || parent.join(settings.job.image_root()).is_dir();
        let directory = real(if is_parent { parent } else { Path::new(".") }).map_err(|e| match named {
            Some(_) => e,
            None => e.advise(
                "name the image root: without an argument it is the one in IMAGE_ROOT_PARENT, by default /mnt/image",
            ),
        })?;
        let files = SignalFiles::open(&directory)?.ok_or_else(|| missing(&directory))?;
        let image_root = if is_parent {
            image_root::open(&files, settings.job.image_root())?
        } else if parent.is_dir() {
            open_tree(&real(parent)?)?
        } else {
            return Err(missing(parent));
        };
        let archive = archive.map_or_else(|| directory.join(settings.archive()), Path::to_owned);
        let (archive_directory, archive_name) = packing::output(&archive, "the archive")?;
        // The named image root may lie in a parent, whose records name the source of the image root.
        let shown = image_root.shown();
        let above = shown.parent().filter(|_| !is_parent && shown.ends_with(IMAGE_ROOT));
        let source_directory = above.map(open_tree).transpose()?;
        Ok(Self { image_root, files, archive_directory, archive_name, source_directory })
    }

    fn archive(&self) -> Archive<'_> {
        Archive { directory: &self.archive_directory, name: &self.archive_name }
    }

    /// Removes the archive, if its name still leads to `packed`.
    fn remove_archive(&self, packed: &File) {
        let there = self.archive_directory.look(&self.archive_name);
        if let (Ok(Some(there)), Ok(ours)) = (there, rustix::fs::fstat(packed))
            && (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
        {
            let _ = self.archive_directory.remove(&self.archive_name);
        }
    }

    fn boot(&self, settings: &Settings) -> Result<Option<BootFiles>> {
        boot::find_if_any(&self.image_root, &settings.boot, settings.job.arch())
    }
}

fn real(path: &Path) -> Result<PathBuf> {
    named::resolve(path).attempt(|| format!("open {}", path.display()))
}

fn missing(image_root: &Path) -> Error {
    let why = match std::fs::metadata(image_root) {
        Err(e) => e.to_string(),
        Ok(_) => "expected an unpacked image".into(),
    };
    Error::bad_input(format!("the image root is '{}': {why}", image_root.display()))
}

/// Packs an image root.
pub fn package(
    settings: &Settings,
    named: Option<&Path>,
    archive: Option<&Path>,
    exclude: &[Pattern],
    changes: Option<&Path>,
) -> Result<u8> {
    let archive = pack(settings, named, archive, exclude, changes)?;
    say(&format!("{archive}\n"));
    Ok(0)
}

/// Packs an image root, and returns the archive's path.
pub(crate) fn pack(
    settings: &Settings,
    named: Option<&Path>,
    archive: Option<&Path>,
    exclude: &[Pattern],
    changes: Option<&Path>,
) -> Result<String> {
    interruptible(&settings.network, |work| pack_place(work, settings, (named, archive), exclude, changes))
}

fn pack_place(
    work: &Work,
    settings: &Settings,
    (named, archive): (Option<&Path>, Option<&Path>),
    exclude: &[Pattern],
    changes: Option<&Path>,
) -> Result<String> {
    let place = Place::of(settings, named, archive)?;
    place.archive().check_place("the archive")?;
    packed::refuse_source(place.files.parent(), &place.archive(), settings, "name another file with --archive")?;
    packed::refuse_to_replace(place.files.parent(), &place.archive(), &place.image_root)?;
    let shown = place.image_root.shown();
    let refused = |why| Error::new(format!("pack {}", shown.display())).because(why);
    image_root::check(&place.image_root, &shown, false, refused)?;
    place.boot(settings)?;
    if holds(&shown, &place.archive_directory.shown())? {
        let why = format!("the archive is '{}': expected a file outside the image root", place.archive().shown());
        return Err(Error::bad_input(why).advise("name one with --archive"));
    }
    directory::refuse_open(&shown)?;
    let parents = directory::parents_of(&shown)?;
    parents.iter().try_for_each(SignalFiles::refuse_open)?;
    // Processes of a killed run could still write to the image while it is packed.
    end_left_over(&shown)?;
    clear_left_over(&directory::COMMANDS, &shown)?;
    let _claims = parents.iter().map(|files| files.claim_for(Step::Package)).collect::<Result<Vec<_>>>()?;
    directory::refuse_running(&shown)?;
    if let Some(file) = changes {
        // Check these now, because they are used only after the packing.
        packing::check_output(file, "--changes")?;
        prepare::take_inventory_below(work, settings, place.files.parent())?;
        Inventory::load(place.files.parent(), INVENTORY)?;
    }
    let parent = place.files.parent();
    let source_directory = place.source_directory.as_ref().unwrap_or(parent);
    let source = basis::of(work, settings, source_directory, &place.image_root, false)?;
    let (packed, recorded) =
        packed::pack(work, parent, &place.image_root, &place.archive(), settings, exclude, source.as_ref())?;
    // Remove an archive without a record, since the next run would refuse to replace it.
    recorded.inspect_err(|_| place.remove_archive(&packed))?;
    if let Some(file) = changes {
        write_changes(work, place.files.parent(), &place.image_root, file)?;
    }
    Ok(place.archive().shown())
}

/// Uploads a packed image with its boot files, and registers it if there is an IMS.
pub fn upload(
    settings: &Settings,
    named: Option<&Path>,
    archive: Option<&Path>,
    debug_kernel: Option<&Path>,
) -> Result<u8> {
    interruptible(&settings.network, |work| upload_place(work, settings, (named, archive), debug_kernel))
}

fn upload_place(
    work: &Work,
    settings: &Settings,
    (named, archive): (Option<&Path>, Option<&Path>),
    debug_kernel: Option<&Path>,
) -> Result<u8> {
    let place = Place::of(settings, named, archive)?;
    let _claim = place.files.claim_for(Step::Upload)?;
    let rootfs = place.archive().open_squashfs().map_err(|e| e.advise("'ims-sshd package' creates it"))?;
    let (records, archive) = (place.files.parent(), place.archive());
    packed::check(records, &archive, &rootfs, &place.image_root)?;
    packed::check_unchanged(records, &archive, &rootfs, &place.image_root)?;
    let debug_kernel = debug_kernel.map(Opened::open).transpose()?.map(Opened::into_file).transpose()?;
    let recorded = packed::checksum(records, &rootfs);
    let image = Image { rootfs, recorded, boot: place.boot(settings)?, debug_kernel };
    let ims = settings.ims_client(work);
    // Ask IMS now, so that no hours are spent on uploading for a job that IMS does not know.
    ims.job()?;
    let directory = JournalDirectory::new(&place.files, settings);
    let mut journal = Journal::read(&directory)?;
    let report = Publication { work, settings, ims: &ims, directory: &directory }.publish(&mut journal, image)?;
    say_result(&report);
    Ok(0)
}
