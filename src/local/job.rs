//! One image from its source to a store: opened, changed by somebody, and then published, kept or discarded. `customize` and `enter`
//! differ in what happens between.

use std::cell::Cell;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::environment::stage::Stage;
use crate::error::{Attempt, Error, Result};
use crate::image::boot;
use crate::image::exclude::Pattern;
use crate::image::inventory::{Inventory, write_changes};
use crate::image::kind::{self, Content, Kind};
use crate::image::packing::{self, Archive};
use crate::image::unpack::{Overlay, UPPER};
use crate::ims::client::Ims;
use crate::local::command_line::CommandLine;
use crate::local::directory::{self, Held};
use crate::local::left_over::{clear_left_over, end_left_over};
use crate::local::names;
use crate::local::register::{self, Entry, goes_on, has_source};
use crate::local::source;
use crate::local::work_directory::{ASIDE, WorkDirectory};
use crate::local::{apply_checks, apply_progress, upper_layer};
use crate::publish::journal::{self, Journal, JournalDirectory};
use crate::publish::manifest::say_result;
use crate::publish::prepare::{holds_changes, known, prepare};
use crate::publish::publication::{Image, Publication};
use crate::publish::settings::Settings;
use crate::publish::source::Source;
use crate::store::{self, Store};
use crate::sys::named;
use crate::sys::tree::Tree;
use crate::transfer::{self, Work, without_query};
use crate::volume::holds;
use crate::volume::layout::{ARCHIVE, IMAGE_ROOT, INVENTORY, OVERLAY};
use crate::volume::open_tree;
use crate::volume::signal_files::SignalFiles;
use crate::volume::state_directory::name_for;

/// Fate of changes that nobody gives up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The image is published in a store.
    Published,
    /// They are applied to the directory that they were made above.
    Applied,
    /// Nothing: one only looks.
    Discarded,
}

/// The command line's settings for the image.
#[derive(Debug)]
pub struct Job {
    /// A directory, a squashfs, a tar archive, or a URL.
    pub source: String,
    /// The command line that is carried out.
    pub command_line: CommandLine,
    /// True if a directory is changed where it is.
    pub in_place: bool,
    /// True if kept changes are dropped first.
    pub fresh: bool,
    /// True if the changes are discarded in any case: they need not fit anywhere.
    pub discards: bool,
    /// Fate of the changes. In place it only matters for [`End::Published`].
    pub end: End,
    /// Settings to fetch, pack and publish the image; their parent is the directory below which changes are kept. None for a directory
    /// that is changed where it is, and nothing else.
    pub settings: Option<Settings>,
    /// The directory below which changes are kept.
    pub work: PathBuf,
    /// Patterns below the image root that are not packed.
    pub exclude: Vec<Pattern>,
    /// What is told of a publication, beside the log.
    pub reports: Reports,
}

/// Reports for programs.
#[derive(Debug)]
pub struct Reports {
    /// File to write the changes to.
    pub changes: Option<PathBuf>,
    /// True if the result is printed.
    pub result: bool,
}

/// Fate of the changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// They are packed and published, or applied to the directory that they were made above.
    Publish,
    /// They stay on this machine, and the same command goes on with them.
    Keep,
    /// They are gone. A directory that was changed where it is stays as it is now.
    Discard,
}

impl Job {
    /// Whether a directory is changed where it is, and nothing is published.
    pub(crate) fn is_in_place(&self) -> bool {
        self.settings.is_none()
    }

    /// Returns whether a mark, or an answer, decides on the changes at the end.
    pub(crate) fn decides(&self) -> bool {
        !self.is_in_place() && self.end != End::Discarded
    }

    /// Tells the fate of changes that were given up.
    fn given_up(&self) -> String {
        if self.in_place {
            format!("the changes stay in {}, which was changed where it is", self.shown())
        } else {
            format!("the changes were thrown away; {} is as it was", self.shown())
        }
    }

    /// Name of the image, as a label of a host name.
    pub(crate) fn label(&self) -> String {
        match &self.settings {
            Some(settings) => names::host_label(&settings.name),
            None => names::host_label(&names::of_source(&self.source)),
        }
    }

    /// The source, for people and for the register: a path is absolute, and a URL has no signature.
    pub(crate) fn shown(&self) -> String {
        match Source::parse(&self.source) {
            Ok(Source::Here(path)) => std::path::absolute(&path).unwrap_or(path).display().to_string(),
            _ => without_query(&self.source),
        }
    }

    /// Takes a directory that is to lie below an overlay.
    fn hold(&self, directory: &Path, source: &Source) -> Result<Held> {
        let place = self.work.join(name_of(source, &self.source));
        if self.end == End::Discarded || !directory::is_half_applied_by(&place) {
            directory::refuse_half_applied(directory)?;
        }
        if self.end == End::Discarded
            && let Some(name) = open_elsewhere("source", directory)
        {
            let why = format!("it is open ({name}), and may be changed below the overlay that is to be discarded");
            let advice = "wait for that to end, or look at a copy";
            return Err(Error::new(format!("open {}", directory.display())).because(why).advise(advice));
        }
        Held::take(directory, &self.work).map_err(|e| self.open_already("source", directory).unwrap_or(e))
    }

    /// Refuses to put the new image, or the changes, into the directory that they are made of.
    fn refuse_inside(&self, source: &Path, settings: &Settings) -> Result<()> {
        let url = settings.store.url.as_deref().unwrap_or_default();
        if let Some(output) = store::named_directory(url).filter(|_| !url.is_empty())
            && holds(source, &output)?
        {
            let why = format!("--output is '{url}': expected a directory outside SOURCE");
            return Err(Error::bad_input(why).advise("the next image would hold this one"));
        }
        // One that lies below an overlay is refused by who mounts that.
        if self.in_place && holds(source, &self.work)? {
            let why = format!("{} lies inside it, and would be packed", self.work.display());
            let attempted = format!("publish {}", source.display());
            return Err(Error::new(attempted).because(why).advise("name another place by --work"));
        }
        Ok(())
    }

    /// Refuses a store that takes no image, and disks on which none fits, before any work is done.
    fn check_store(&self, work: &Work, settings: &Settings, source: &Source, goes_on: bool) -> Result<()> {
        let in_store = work.wait(Store::check(&settings.store, &settings.network))?;
        // Discarding changes, or dropping those that fill the disk, needs no space.
        let Source::Here(path) = source else { return Ok(()) };
        if self.discards {
            return Ok(());
        }
        let image = kind::Opened::open(path)?;
        // A new image is about as large as its source; one that is unpacked takes that much again, and more. A tree is packed to about half.
        let (size, unpacked) = match (&image.content, image.kind()?) {
            (Content::Directory(tree), _) => (size_on_disk(tree)? / 2, 0),
            (_, Some(Kind::Squashfs)) => (image.size(), 0),
            _ => (image.size(), image.size()),
        };
        let work_directory = settings.job.parent.ancestors().find(|place| place.exists()).unwrap_or(Path::new("/"));
        let space = rustix::fs::statvfs(work_directory).ok().map(|disk| disk.f_bavail * disk.f_frsize);
        // Kept changes are dropped first, and free their space.
        let space = space.filter(|_| !(self.fresh && goes_on));
        let on_disks = [
            (space, size + unpacked, settings.job.parent.display().to_string(), "--work names another disk"),
            (in_store, size, "the store".to_owned(), "--output names another disk"),
        ];
        for (space, needed, place, advice) in on_disks {
            let Some(left) = space.filter(|space| *space < needed) else { continue };
            let refusal = too_small(&place, left, needed, advice);
            // This run may free space where changes are kept, and how much smaller a tree is when it is packed nobody knows before.
            if goes_on || image.file().is_none() {
                tracing::warn!("the new image may not fit: {refusal}");
            } else {
                return Err(refusal);
            }
        }
        Ok(())
    }

    /// Refuses to go on with changes of another source; where they would be discarded anyway, drops them.
    fn refuse_others(&self, ims: &Ims, settings: &Settings, source: &Source, place: &WorkDirectory) -> Result<()> {
        if self.in_place {
            return Ok(());
        }
        match known(settings, source, place.files().parent(), &place.path().join(IMAGE_ROOT)) {
            Err(_) if self.discards => drop_changes(ims, settings, place),
            known => known.map(|_| ()),
        }
    }

    /// Why the source cannot be opened now, if another run has it open, whose register's `field` is `path`.
    fn open_already(&self, field: &str, path: &Path) -> Option<Error> {
        let run = run_elsewhere(field, path)?;
        let name = run["name"].as_str().unwrap_or_default();
        let ending = if run["command"] == "enter" {
            format!("it ends with its shell or command (process {})", run["pid"])
        } else if run["image_root_parent"].is_null() {
            format!("wait for its command, or 'ims-sshd fail {name}' ends it and drops what was changed")
        } else {
            format!("'ims-sshd complete {name}' or 'ims-sshd fail {name}' ends it")
        };
        Some(Error::new(format!("open {}", self.shown())).because(format!("it is open as {name}")).advise(ending))
    }

    /// Claims the work directory. Tells whoever only looks of changes that are not shown.
    fn claim(&self, source: &Source, all: &Path) -> Result<WorkDirectory> {
        let name = name_of(source, &self.source);
        if self.end != End::Discarded {
            let place = all.join(&name);
            return WorkDirectory::claim(all, &name).map_err(|e| self.open_already("work", &place).unwrap_or(e));
        }
        let (place, source) = (all.join(&name), self.shown());
        if let Some(name) = open_elsewhere("work", &place) {
            tracing::warn!("{source} is open ({name}): what is changed there is not shown here");
        } else if holds_changes(&place, &place.join(IMAGE_ROOT)) {
            let dropping = shell_words::join(["ims-sshd", "fail", &source]);
            tracing::warn!(
                "changes to {source} are kept, and not shown here: --output STORE goes on with them, '{dropping}' drops them"
            );
        }
        WorkDirectory::claim_to_discard(all, &name)
    }

    /// Enters this job into the register of what is open on this machine.
    pub(crate) fn register(&self) -> Result<Entry> {
        let work = std::fs::canonicalize(&self.work).unwrap_or_else(|_| self.work.clone());
        let source = Source::parse(&self.source)?;
        let keeps = (self.decides()).then(|| work.join(name_of(&source, &self.source)));
        let CommandLine { command, line, directory } = &self.command_line;
        let entry = Entry::make(command, &self.shown(), &self.label(), keeps)?;
        entry.tell(&[("command_line", line), ("directory", &directory.to_string_lossy())]);
        Ok(entry)
    }

    /// Opens the image and gives its root to `session`, which says what becomes of the changes. Returns what the session returned
    /// beside that. Unless the job [`Job::is_in_place`], the caller has called [`local::own_mounts`] before.
    pub(crate) fn run<T>(mut self, entry: &Entry, session: impl FnOnce(&Path) -> Result<(Fate, T)>) -> Result<T> {
        let source = Source::parse(&self.source)?;
        if let Source::Here(path) = &source {
            named::resolve(path).map_err(|e| Error::bad_input(format!("SOURCE is '{}': {e}", path.display())))?;
        }
        let directory = match &source {
            Source::Here(path) if path.is_dir() => Some(source::image_root(path)?),
            _ => None,
        };
        match &directory {
            Some(directory) => self.refuse_kept(directory, &source)?,
            None => self.warn_of_kept(&source),
        }
        if let (Some(settings), Some(directory)) = (&self.settings, &directory) {
            self.refuse_inside(directory, settings)?;
        }
        let Some(mut settings) = self.settings.take() else {
            let image_root = directory.ok_or_else(|| Error::bad_input("expected a directory"))?;
            let (fate, value) = session(&image_root)?;
            if fate == Fate::Discard {
                tracing::info!("{}", self.given_up());
            }
            return Ok(value);
        };
        let root = directory.as_deref().filter(|_| !self.in_place).map(directory::open).transpose()?;
        let changed = directory.as_deref().zip(root.as_ref());
        let _held = directory
            .as_deref()
            .filter(|_| !self.in_place)
            .map(|directory| self.hold(directory, &source))
            .transpose()?;
        let publishes = self.end == End::Published;
        if let Source::Here(path) = &source {
            let refuse = |e| Error::bad_input(format!("SOURCE is '{}': {e}", path.display()));
            if !std::fs::metadata(path).map_err(refuse)?.is_dir() {
                kind::Opened::open(path)?.kind()?;
            }
        }
        let work = Work::begin(&settings.network)?;
        let ims = settings.ims_client(&work);
        if publishes {
            transfer::installed("mksquashfs")?;
            let place = settings.job.parent.join(name_of(&source, &self.source));
            self.check_store(&work, &settings, &source, holds_changes(&place, &place.join(IMAGE_ROOT)))?;
            self.reports.changes.as_deref().map(|file| packing::check_output(file, "--changes")).transpose()?;
        }
        let place = work.unless_interrupted(self.claim(&source, &settings.job.parent))?;
        place.path().clone_into(&mut settings.job.parent);
        let parent = &settings.job.parent;
        let mounted = parent.join(IMAGE_ROOT);
        entry.tell(&[("work", &parent.display().to_string())]);
        end_left_over(&mounted)?;
        if let Some(changed) = changed.filter(|_| apply_progress::has_begun(place.files().parent()).unwrap_or(true)) {
            let ended = self.end_application(entry, &ims, &settings, &source, changed, &place);
            work.unless_interrupted(ended)?;
        }
        work.unless_interrupted(self.check_kept(&ims, &settings, &source, &place, root.as_ref()))?;
        entry.note(place.files().parent());
        if holds_changes(parent, &mounted) {
            tracing::info!(
                "going on with what was changed before, which is kept in {}; --fresh drops it and begins anew",
                parent.display()
            );
        }
        let journal = JournalDirectory::private(place.files(), &settings);
        let (files, is_unchanged) = (place.files(), Cell::new(false));
        let opened = Opened {
            job: &self,
            entry,
            settings: &settings,
            work: &work,
            files,
            ims: &ims,
            journal: &journal,
            is_unchanged: &is_unchanged,
        };
        let result = opened.carry_out(&source, directory.as_deref(), root.as_ref(), &mounted, session);
        let result = work.unless_interrupted(result);
        let left = |e: Error| e.advise_if_interrupted(|| left_in(files.path()));
        // What was to be dropped is dropped once the image is open.
        if !entry.is_open() && work.last(place.take_back()).map_err(left)? {
            is_unchanged.set(false);
        }
        let kept = || self.kept_in(files.parent(), entry);
        if self.end != End::Discarded && holds_changes(parent, &mounted) && !is_unchanged.get() {
            match result {
                Ok((Fate::Keep, value)) => {
                    tracing::warn!("{}", kept());
                    return Ok(value);
                }
                Err(error) => return Err(error.advise_also(&kept())),
                Ok(_) => {}
            }
        }
        opened.publication(&journal).give_up(&mut Journal::read(&journal)?)?;
        let path = place.path().to_owned();
        work.last(place.remove()).map_err(|e| e.advise_if_interrupted(|| left_in(&path)))?;
        let (fate, value) = result?;
        if fate == Fate::Discard {
            tracing::info!("{}", self.given_up());
        }
        Ok(value)
    }

    /// Refuses a directory above which other changes are kept than those that this run goes on with.
    fn refuse_kept(&self, directory: &Path, source: &Source) -> Result<()> {
        let place = self.work.join(name_of(source, &self.source));
        if self.in_place {
            end_left_over(directory)?;
            directory::refuse_with_changes(directory, &place)?;
        }
        let own = std::fs::canonicalize(place).ok();
        let looks = self.end == End::Discarded && !self.in_place;
        directory::refuse_kept(directory, &self.work, own.as_deref(), looks)
    }

    /// Warns of changes to a source that are kept below another work directory, with which this run does not continue.
    fn warn_of_kept(&self, source: &Source) {
        let own = std::fs::canonicalize(self.work.join(name_of(source, &self.source))).ok();
        let (mut left, shown) = (register::left(), self.shown());
        left.extend(register::left_below(&self.work));
        let mut told = HashSet::new();
        for entry in left.iter().filter(|entry| entry["source"] == *shown) {
            let Some(work) = register::kept_in(entry) else { continue };
            if own.as_ref() == Some(&work) || !told.insert(work.clone()) {
                continue;
            }
            let name = entry["name"].as_str().unwrap_or_default();
            tracing::warn!(
                "changes to {shown} are kept as {name} in {}, and not used here; 'ims-sshd fail {name}' drops them; to go on \
                 with them: {}",
                work.display(),
                goes_on(entry)
            );
        }
    }

    /// Ends an application that was interrupted, or gives it up.
    fn end_application(
        &self,
        entry: &Entry,
        ims: &Ims,
        settings: &Settings,
        source: &Source,
        (directory, root): (&Path, &Tree),
        place: &WorkDirectory,
    ) -> Result<()> {
        let record = place.files().parent();
        if self.fresh {
            if self.end == End::Published {
                boot::check_named(root, &settings.boot, settings.job.arch())?;
            }
            directory::give_up_changes(directory, root, record)?;
            return drop_changes(ims, settings, place);
        }
        entry.reach(Stage::Applying);
        let applied = apply_progress::is_only_decided(record).and_then(|is_whole| {
            let mounted = place.path().join(IMAGE_ROOT);
            let overlay = if is_whole { prepare(ims.work, settings, source, None, &mounted)? } else { None };
            directory::apply_changes(directory, root, record, overlay)
        });
        applied.map_err(|e| e.advise_also(&self.kept_in(record, entry)))?;
        place.clear()
    }

    /// Puts aside what `--fresh` drops, and refuses to go on with changes to another source, or to a directory that was edited since.
    fn check_kept(
        &self,
        ims: &Ims,
        settings: &Settings,
        source: &Source,
        place: &WorkDirectory,
        root: Option<&Tree>,
    ) -> Result<()> {
        let (record, mounted) = (place.files().parent(), place.path().join(IMAGE_ROOT));
        if self.fresh && holds_changes(place.path(), &mounted) {
            // Changes that fill the disk leave no place for anything beside them.
            if has_room(record) {
                place.put_aside()?;
            } else {
                drop_changes(ims, settings, place)?;
            }
        }
        self.refuse_others(ims, settings, source, place)?;
        if let Some(root) = root.filter(|_| !self.discards && holds_changes(place.path(), &mounted)) {
            apply_checks::refuse_edited(record, &open_tree(&place.path().join(OVERLAY).join(UPPER))?, root)?;
            apply_checks::record_check(record)?;
        }
        Ok(())
    }

    /// Says where changes are kept, and what can be done with them.
    fn kept_in(&self, place: &Tree, entry: &Entry) -> String {
        let (shown, name) = (place.shown(), entry.name());
        let (shown, line) = (shown.display(), entry.before().map_or_else(|| self.command_line.line.clone(), goes_on));
        if !apply_progress::has_begun(place).unwrap_or(true) {
            return format!(
                "what was changed is kept in {shown}; 'ims-sshd fail {name}' drops it; to go on with it: {line}"
            );
        }
        let how_many = if apply_progress::is_only_decided(place).unwrap_or(false) { "none" } else { "some" };
        format!(
            "{how_many} of the changes are in it already, and all are in {shown}; if a disk is full, free space on it; 'ims-sshd fail {name}' \
             gives up those that are not; to apply them: {line}"
        )
    }
}

/// Name of another run that is open, in the register's `field` of which is `path`.
fn open_elsewhere(field: &str, path: &Path) -> Option<String> {
    run_elsewhere(field, path).map(|run| run["name"].as_str().unwrap_or_default().into())
}

fn run_elsewhere(field: &str, path: &Path) -> Option<Value> {
    let path = std::fs::canonicalize(path).ok()?;
    let is_meant = |run: &Value| {
        let there = run[field].as_str().and_then(|there| std::fs::canonicalize(there).ok());
        there.is_some_and(|there| there == path) && run["pid"] != std::process::id()
    };
    register::entries().ok()?.into_iter().find(is_meant)
}

/// Returns whether the disk of `place` has space for the few files of an image that is opened.
fn has_room(place: &Tree) -> bool {
    rustix::fs::fstatvfs(place).is_ok_and(|disk| disk.f_bavail.saturating_mul(disk.f_frsize) >= 1 << 20)
}

/// Drops what a run has left that has ended: changes that are kept, its sshd, and what it has added to the image. Returns what the source is
/// now, in words.
pub(crate) fn drop_left(entry: &Value) -> Result<&'static str> {
    source::need_root()?;
    let (name, source) = (entry["name"].as_str().unwrap_or_default(), entry["source"].as_str().unwrap_or_default());
    let path = Path::new(source);
    let is_gone = !has_source(entry);
    let work = entry["work"].as_str().map(Path::new).filter(|work| work.is_dir());
    // Without a work directory it was changed where it is.
    let mut source_is = if work.is_some() { "is as it was" } else { "stays as it is now" };
    if let Some((all, own)) = work.and_then(|work| Some((work.parent()?, work.file_name()?.to_str()?))) {
        let place = WorkDirectory::claim(all, own)?;
        if journal::is_begun(place.files())? {
            let command = shell_words::join(["ims-sshd", "enter", source]);
            return Err(Error::new(format!("drop what was changed in {source}"))
                .because("a part of it was uploaded already")
                .advise(format!("'{command} --output STORE --discard true' removes that too")));
        }
        let record = place.files().parent();
        if apply_progress::has_begun(record)? {
            if !apply_progress::is_only_decided(record).unwrap_or(false) {
                source_is = "stays as it is now, with those that were applied";
            }
            if path.is_dir() {
                let directory = source::image_root(path)?;
                let _held = Held::take(&directory, all)?;
                let root = directory::open(&directory)?;
                if !apply_progress::is_of(record, &root)? {
                    source_is = "is not the directory to which some of them were applied";
                }
                directory::give_up_changes(&directory, &root, record)?;
            }
        }
        let mounted = place.path().join(IMAGE_ROOT);
        end_left_over(&mounted)?;
        if mounted.exists() {
            clear_left_over(&directory::COMMANDS, &mounted)?;
        }
        place.remove()?;
    }
    if path.is_dir() {
        let directory = source::image_root(path)?;
        end_left_over(&directory)?;
        clear_left_over(&directory::COMMANDS, &directory)?;
    } else if is_gone {
        end_left_over(&named::resolve_beginning(path).unwrap_or_else(|_| path.to_owned()))?;
        source_is = "is not there: it was renamed or removed";
    }
    register::forget(name)?;
    Ok(source_is)
}

/// Drops what was changed before, and what was published of it in part.
fn drop_changes(ims: &Ims, settings: &Settings, place: &WorkDirectory) -> Result<()> {
    let directory = JournalDirectory::private(place.files(), settings);
    let publication = Publication { work: ims.work, settings, ims, directory: &directory };
    publication.give_up(&mut Journal::read(&directory)?)?;
    place.clear()?;
    tracing::info!("dropped what was changed before; beginning anew");
    Ok(())
}

/// Advice for a removal that a signal interrupted.
fn left_in(place: &Path) -> String {
    format!("what is left to remove is in {}: the same command removes it, or 'rm -r'", place.display())
}

fn too_small(place: &str, left: u64, needed: u64, advice: &str) -> Error {
    let (bytes, unit) = if needed < 64 << 20 { (1_u64 << 10, "KiB") } else { (1 << 20, "MiB") };
    // Rounded apart, so that the two never look the same.
    let [left, needed] = [left / bytes, needed.div_ceil(bytes)];
    let why = format!("{left} {unit} are left there, and it needs about {needed} {unit}");
    Error::new(format!("keep the new image in {place}")).because(why).advise(advice)
}

/// Returns the bytes that a tree takes on its disk: holes and further names of a file count for nothing.
fn size_on_disk(tree: &Tree) -> Result<u64> {
    let (mut size, mut linked) = (0, HashSet::new());
    let walked = tree.walk(|_, _, _, found| {
        if found.st_nlink == 1 || linked.insert((found.st_dev, found.st_ino)) {
            size += u64::try_from(found.st_blocks).unwrap_or(0) * 512;
        }
        Ok(())
    });
    walked.attempt(|| format!("look through {}", tree.shown().display())).map(|()| size)
}

/// Name of this source's job directory. A URL counts without its signature, and the current directory does not matter.
fn name_of(source: &Source, text: &str) -> String {
    match source {
        Source::Here(path) => name_for(&std::path::absolute(path).unwrap_or_else(|_| path.clone())),
        _ => name_for(Path::new(&without_query(text))),
    }
}

/// A job on its workplace.
struct Opened<'a> {
    job: &'a Job,
    entry: &'a Entry,
    settings: &'a Settings,
    work: &'a Work,
    files: &'a SignalFiles,
    ims: &'a Ims<'a>,
    journal: &'a JournalDirectory<'a>,
    /// True if nothing was changed, and nobody has decided on it.
    is_unchanged: &'a Cell<bool>,
}

impl Opened<'_> {
    /// Source in, image out.
    fn carry_out<T>(
        &self,
        source: &Source,
        directory: Option<&Path>,
        root: Option<&Tree>,
        mounted: &Path,
        session: impl FnOnce(&Path) -> Result<(Fate, T)>,
    ) -> Result<(Fate, T)> {
        let (image_root, overlay) = match directory {
            Some(directory) if self.job.in_place => (directory.to_owned(), None),
            _ => (mounted.to_owned(), prepare(self.work, self.settings, source, None, mounted)?),
        };
        if let (Some(directory), Some(root), Some(overlay)) = (directory, root, &overlay)
            && !directory::is_same(&overlay.lower, root)
        {
            let why = "another directory has taken its place";
            return Err(Error::new(format!("open {}", directory.display())).because(why));
        }
        if self.job.end == End::Applied && overlay.is_none() {
            return Err(Error::bad_input(format!("SOURCE is '{}': a saved image of a container", self.job.source))
                .advise("name by --output where the new image is put"));
        }
        if let (Some(_), None) = (&self.job.reports.changes, &overlay) {
            Inventory::of(self.work, &open_tree(&image_root)?)?.save(self.files.parent(), INVENTORY)?;
        }
        if self.settings.store.url.is_some() {
            // Closed before the session: an open directory keeps a mount.
            let (root, names, arch) = (open_tree(&image_root)?, &self.settings.boot, self.settings.job.arch());
            boot::check_named(&root, names, arch)?;
            boot::warn_of_missing_initrd(&root, names, arch);
        }
        self.give_up_aside()?;
        let ended = session(&image_root);
        if let (Some(overlay), Ok((Fate::Keep, _)) | Err(_)) = (&overlay, &ended) {
            let upper = open_tree(&self.files.path().join(OVERLAY).join(UPPER))?;
            self.is_unchanged.set(upper_layer::is_unchanged(&upper, &overlay.lower).unwrap_or(false));
        }
        let (fate, value) = ended?;
        match (fate, self.job.end, directory.zip(root)) {
            (Fate::Publish, End::Published, _) => self.publish(source, &image_root, overlay)?,
            (Fate::Publish, End::Applied, Some((directory, root))) => {
                // Before it is told: a run that is killed from here on has it applied by the next.
                apply_progress::decide(self.files.parent(), root)?;
                self.entry.reach(Stage::Applying);
                directory::apply_changes(directory, root, self.files.parent(), overlay)?;
            }
            _ => {}
        }
        Ok((fate, value))
    }

    /// Gives up what was published in part of changes that are put aside, to be dropped.
    fn give_up_aside(&self) -> Result<()> {
        let Some(aside) = SignalFiles::open(&self.files.path().join(ASIDE))? else { return Ok(()) };
        let directory = JournalDirectory::private(&aside, self.settings);
        self.publication(&directory).give_up(&mut Journal::read(&directory)?)
    }

    fn publication<'a>(&'a self, directory: &'a JournalDirectory) -> Publication<'a> {
        Publication { work: self.work, settings: self.settings, ims: self.ims, directory }
    }

    fn publish(&self, source: &Source, image_root: &Path, overlay: Option<Overlay>) -> Result<()> {
        let Self { job, settings, work, .. } = self;
        self.entry.reach(Stage::Packing);
        let mut packing = settings.packing.clone();
        let fetched = settings.job.parent.join(ARCHIVE);
        let archive = if let Source::Here(path) = source { path } else { &fetched };
        packing.compression = packing.compression.or_else(|| kind::compression(archive));
        let (workplace, tree) = (self.files.parent(), open_tree(image_root)?);
        if let Some(to) = &job.reports.changes {
            if let Some(overlay) = &overlay {
                Inventory::of(work, &overlay.lower)?.save(workplace, INVENTORY)?;
            }
            write_changes(work, workplace, &tree, to)?;
        }
        let boot = boot::find_if_any(&tree, &settings.boot, settings.job.arch())?;
        let archive = Archive { directory: workplace, name: "packed.sqsh" };
        let rootfs = packing::pack(work, &tree, &archive, &packing, &job.exclude)?;
        drop(tree);
        if let Some(overlay) = overlay {
            overlay.unmount()?;
        }
        let mut journal = Journal::read(self.journal)?;
        let size = rootfs.metadata().attempt(|| format!("look at {}", archive.shown()))?.len();
        // An interrupted upload has left its parts there, which take no further space.
        if journal.image.is_none()
            && let Some(left) = work.wait(Store::check(&settings.store, &settings.network))?
            && left < size
        {
            return Err(too_small("the store", left, size, "--output names another disk"));
        }
        let image = Image { rootfs, boot, debug_kernel: None };
        self.entry.reach(Stage::Uploading);
        let report = self.publication(self.journal).publish(&mut journal, image)?;
        if job.reports.result {
            say_result(&report);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_disk_never_looks_like_what_is_needed() {
        for (left, needed, why) in [
            ((1 << 20) + 1, (1 << 20) + 2000, "1024 KiB are left there, and it needs about 1026 KiB"),
            (0, 1, "0 KiB are left there, and it needs about 1 KiB"),
            ((5 << 30) - 1, (5 << 30) - 1 + 4096, "5119 MiB are left there, and it needs about 5121 MiB"),
            (3 << 20, 5 << 30, "3 MiB are left there, and it needs about 5120 MiB"),
        ] {
            let said = too_small("/srv", left, needed, "").to_string();
            assert!(said.contains(why), "{said}");
        }
    }
}
