//! One run of `customize` or `enter`, from the source to a store: an image is opened and changed in a session, and then
//! published, kept or discarded.

use std::cell::Cell;
use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::environment::stage::Stage;
use crate::error::{Attempt, Error, Result};
use crate::image::boot;
use crate::image::exclude::Pattern;
use crate::image::inventory::{Inventory, write_changes};
use crate::image::kind;
use crate::image::packing::{self, Archive};
use crate::image::unpack::{Overlay, UPPER};
use crate::image::upper_layer;
use crate::ims::client::Ims;
use crate::jailer::unsealed;
use crate::local::command_line::CommandLine;
use crate::local::directory::{self, Held};
use crate::local::left_over::end_left_over;
use crate::local::names;
use crate::local::register::{self, Entry, LINK, resuming_line};
use crate::local::source;
use crate::local::unattended::{self, Unattended};
use crate::local::work_directory::{ASIDE, WorkDirectory};
use crate::local::{apply_checks, apply_progress, space};
use crate::publish::basis;
use crate::publish::identity;
use crate::publish::journal::{Journal, JournalDirectory, is_begun};
use crate::publish::manifest::say_result;
use crate::publish::prepare::{holds_changes, known, prepare};
use crate::publish::publication::{Image, Publication};
use crate::publish::settings::Settings;
use crate::publish::source::Source;
use crate::store::{self, Store};
use crate::sys::tree::Tree;
use crate::transfer::Work;
use crate::verdict::Markers;
use crate::volume::holds;
use crate::volume::layout::{ARCHIVE, IMAGE_ROOT, INVENTORY, OVERLAY};
use crate::volume::open_tree;
use crate::volume::signal_files::SignalFiles;
use crate::volume::state_directory::name_for;

/// Use of the changes at the end of a run that succeeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Publishes the image in a store.
    Published,
    /// Applies the changes to the source, which is a directory.
    Applied,
    /// Discards the changes even if the run succeeds: the session was only for looking.
    Discarded,
}

/// A run as the command line describes it.
#[derive(Debug)]
pub struct Run {
    /// A directory, a squashfs, a tar archive, or a URL. A path is absolute and has no links, so that changes are kept
    /// for the image itself.
    pub source: Source,
    /// SOURCE on the command line.
    pub named: String,
    /// The command line itself.
    pub command_line: CommandLine,
    /// Name of the image, if an option or a variable gives one.
    pub name: Option<String>,
    /// The build node on which the image is changed, as `HOST` or `USER@HOST`; `None` for this machine.
    pub node: Option<String>,
    /// True if a directory is changed in place.
    pub in_place: bool,
    /// True if changes that an earlier run kept are dropped first.
    pub fresh: bool,
    /// True if the changes are discarded however the session ends.
    pub discards: bool,
    /// The command or script that changes the image without a person.
    pub unattended: Option<Unattended>,
    /// Use of the changes. If a directory is changed in place, only [`End::Published`] makes a difference.
    pub end: End,
    /// Settings to fetch, pack and publish the image; their image root parent is the directory below which changes are
    /// kept. `None` if a directory is changed in place and not published.
    pub settings: Option<Settings>,
    /// The directory below which changes are kept.
    pub work: PathBuf,
    /// Patterns of paths that are not packed.
    pub exclude: Vec<Pattern>,
    /// Reports of a publication, in addition to the log.
    pub reports: Reports,
}

/// Reports for programs.
#[derive(Debug)]
pub struct Reports {
    /// File to write the changes to.
    pub changes: Option<PathBuf>,
    /// True if the result is printed, and nothing else is printed on standard output.
    pub result: bool,
}

/// Fate of the changes at the end of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The changes are packed and published, or applied to the source. A directory that is changed in place has them
    /// already.
    Publish,
    /// The changes stay on this machine, and the same command resumes them. A directory that was changed in place stays
    /// as it is now.
    Keep,
    /// The changes are dropped. A directory that was changed in place stays as it is now.
    Discard,
}

impl Run {
    /// Returns whether a directory is changed in place and not published.
    pub(crate) fn is_in_place(&self) -> bool {
        self.settings.is_none()
    }

    /// Returns whether a mark or an answer decides what happens to the changes at the end.
    pub(crate) fn decides(&self) -> bool {
        !self.is_in_place() && self.end != End::Discarded
    }

    /// Logs the fate of changes that were neither published nor applied, unless they are kept in a work directory.
    fn tell_of_end(&self, fate: Fate) {
        match fate {
            Fate::Discard if !self.in_place => {
                tracing::info!("the changes were discarded; {} is as it was", self.shown());
            }
            Fate::Discard => tracing::info!("{}", self.stay_in_place()),
            Fate::Keep if self.in_place => tracing::warn!("{}", self.stay_in_place()),
            _ => {}
        }
    }

    /// Message about changes to a directory that was changed in place.
    fn stay_in_place(&self) -> String {
        format!("the changes stay in {}, which was changed in place", self.shown())
    }

    /// Name of the image as a label of a host name.
    fn label(&self) -> String {
        match (&self.name, &self.settings) {
            (Some(name), _) => names::host_label(name),
            (_, Some(settings)) => names::host_label(&settings.name),
            _ => names::host_label(&names::of_source(&self.named)),
        }
    }

    /// Name of the work directory for `source`. It differs for a node, so that changes made on this machine and on a
    /// node do not mix.
    pub(super) fn place_name(&self, source: &Source) -> String {
        name_of(source) + if self.node.is_some() { "+node" } else { "" }
    }

    /// The source as shown to people and in the register: an absolute path, or a URL without its signature.
    pub(crate) fn shown(&self) -> String {
        identity::named(&self.source)
    }

    /// The path on the command line, made absolute, if it leads to the source through a symbolic link.
    fn link(&self) -> Option<String> {
        let Ok(Source::Here(path)) = Source::parse(&self.named) else { return None };
        let path = std::path::absolute(path).ok()?;
        (path != Path::new(&self.shown())).then(|| path.display().to_string())
    }

    /// Claims a directory that is to lie below an overlay.
    fn hold(&self, directory: &Path, source: &Source) -> Result<Held> {
        let place = self.work.join(name_of(source));
        if self.end == End::Discarded || !directory::is_half_applied_by(&place) {
            directory::refuse_half_applied(directory)?;
        }
        if self.end == End::Discarded
            && let Some(name) = open_elsewhere("source", directory)
        {
            let why = format!("it is open ({name}), and may change below the overlay");
            let advice = "wait until that closes, or open a copy";
            return Err(Error::new(format!("open {}", directory.display())).because(why).advise(advice));
        }
        Held::take(directory, &self.work).map_err(|e| self.open_already("source", directory).unwrap_or(e))
    }

    /// Refuses to put the new image, or the changes, into the source itself.
    fn refuse_inside(&self, source: &Path, settings: &Settings) -> Result<()> {
        let url = settings.store.url.as_deref().unwrap_or_default();
        if let Some(output) = store::named_directory(url).filter(|_| !url.is_empty())
            && holds(source, &output)?
        {
            let why = format!("--output is '{url}': expected a directory outside SOURCE");
            return Err(Error::bad_input(why).advise("the next image would contain this one"));
        }
        // For a directory below an overlay, [`Held::take`] checks this.
        if self.in_place && holds(source, &self.work)? {
            let why = format!("{} is inside it and would be packed", self.work.display());
            let attempted = format!("publish {}", source.display());
            return Err(Error::new(attempted).because(why).advise("name another directory with --work"));
        }
        Ok(())
    }

    /// Refuses anything that would keep the image from being published, before any work is done.
    fn check_publication(&self, work: &Work, ims: &Ims, settings: &Settings, source: &Source) -> Result<()> {
        work.unless_interrupted(ims.job())?;
        settings.packing.packer.check()?;
        let place = settings.job.parent.join(name_of(source));
        let resumes = holds_changes(&place, &place.join(IMAGE_ROOT));
        work.unless_interrupted(self.check_store(work, settings, source, resumes))?;
        self.reports.changes.as_deref().map_or(Ok(()), |file| packing::check_output(file, "--changes").map(drop))
    }

    /// Refuses a store that accepts no image, and disks on which the image does not fit, before any work is done.
    fn check_store(&self, work: &Work, settings: &Settings, source: &Source, resumes: bool) -> Result<()> {
        let in_store = work.wait(Store::check(&settings.store, &settings.network))?;
        match source {
            // Discarding changes needs no space.
            Source::Here(path) if !self.discards => {
                space::check(settings, path, in_store, resumes, self.fresh && resumes)
            }
            _ => Ok(()),
        }
    }

    /// Refuses to resume changes to another source. If the run discards its changes anyway, drops the kept ones
    /// instead.
    fn refuse_others(&self, ims: &Ims, settings: &Settings, source: &Source, place: &WorkDirectory) -> Result<()> {
        if self.in_place {
            return Ok(());
        }
        match known(settings, source, place.files().parent(), &place.path().join(IMAGE_ROOT)) {
            Err(_) if self.discards => drop_changes(ims, settings, place),
            known => known.map(|_| ()),
        }
    }

    /// The error for a source that another run has open; that run's entry has `path` in `field`. `None` if there is no
    /// such run.
    fn open_already(&self, field: &str, path: &Path) -> Option<Error> {
        let run = register::run_elsewhere(field, path)?;
        let (name, ending) = (run["name"].as_str().unwrap_or_default(), register::how_it_ends(&run));
        Some(Error::new(format!("open {}", self.shown())).because(format!("it is open as {name}")).advise(ending))
    }

    /// Claims the work directory. Before a session that is only for looking, warns that it does not show kept changes.
    fn claim(&self, source: &Source, all: &Path) -> Result<WorkDirectory> {
        let name = name_of(source);
        if self.end != End::Discarded {
            let place = all.join(&name);
            return WorkDirectory::claim(all, &name).map_err(|e| self.open_already("work", &place).unwrap_or(e));
        }
        let (place, source) = (all.join(&name), self.shown());
        if let Some(name) = open_elsewhere("work", &place) {
            tracing::warn!("{source} is open ({name}): changes made there do not appear here");
        } else if holds_changes(&place, &place.join(IMAGE_ROOT)) {
            let dropping = shell_words::join(["ims-sshd", "fail", &source]);
            let real = std::fs::canonicalize(&place).ok();
            let kept = register::left_below(all).into_iter().find(|entry| register::kept_in(entry) == real);
            let resuming = kept.as_ref().map_or_else(|| "the same command with --output STORE".into(), resuming_line);
            tracing::warn!(
                "changes to {source} are kept and do not appear here; '{dropping}' drops them; to resume: {resuming}"
            );
        }
        WorkDirectory::claim_to_discard(all, &name)
    }

    /// Registers this run.
    pub(crate) fn register(&self) -> Result<Entry> {
        let work = std::fs::canonicalize(&self.work).unwrap_or_else(|_| self.work.clone());
        let keeps = (self.decides()).then(|| work.join(self.place_name(&self.source)));
        let CommandLine { command, line, directory, .. } = &self.command_line;
        let entry = Entry::make(command, &self.shown(), (&self.label(), self.name.is_some()), keeps)?;
        entry.set(&[("command_line", line), ("directory", &directory.to_string_lossy())]);
        if let Some(link) = self.link() {
            entry.set(&[(LINK, &link)]);
        }
        Ok(entry)
    }

    /// Opens the image and calls `session` with its root and with the users whose marks count in it. `session` returns
    /// the fate of the changes and the value to return. If the command or script of an earlier run succeeded but its
    /// changes could not be applied or published, does that without a session, and returns `done`. Unless
    /// [`Run::is_in_place`], the caller must have called [`own_mounts`](crate::local::mounts::own_mounts).
    pub(crate) fn carry_out<T: Copy>(
        mut self,
        entry: &Entry,
        done: T,
        session: impl FnOnce(&Path, Markers) -> Result<(Fate, T)>,
    ) -> Result<T> {
        let source = self.source.clone();
        let directory = match &source {
            Source::Here(path) if path.is_dir() => Some(source::image_root(path)?),
            _ => None,
        };
        if let Some(directory) = &directory {
            self.refuse_kept(directory, &source)?;
            unsealed::refuse(&open_tree(directory)?)?;
        }
        self.warn_of_kept(&source);
        if let (Some(settings), Some(directory)) = (&self.settings, &directory) {
            self.refuse_inside(directory, settings)?;
        }
        let markers = directory.as_deref().map_or(Ok(Markers::Everyone), directory::markers)?;
        let session = |image_root: &Path| session(image_root, markers);
        let Some(mut settings) = self.settings.take() else {
            let image_root = directory.ok_or_else(|| Error::bad_input("expected a directory"))?;
            let (fate, value) = session(&image_root)?;
            self.tell_of_end(fate);
            return Ok(value);
        };
        let root = directory.as_deref().filter(|_| !self.in_place).map(directory::open).transpose()?;
        if let (Some(root), End::Applied) = (&root, self.end) {
            apply_checks::refuse_unwritable(root)?;
        }
        let changed = directory.as_deref().zip(root.as_ref());
        let _held = directory
            .as_deref()
            .filter(|_| !self.in_place)
            .map(|directory| self.hold(directory, &source))
            .transpose()?;
        refuse_unknown_kind(&source)?;
        let work = Work::begin(&settings.network)?;
        let ims = settings.ims_client(&work);
        if self.end == End::Published {
            self.check_publication(&work, &ims, &settings, &source)?;
        }
        let place = work.unless_interrupted(self.claim(&source, &settings.job.parent))?;
        place.path().clone_into(&mut settings.job.parent);
        let parent = &settings.job.parent;
        let mounted = parent.join(IMAGE_ROOT);
        entry.set(&[("work", &parent.display().to_string())]);
        end_left_over(&mounted)?;
        let done = Some(done).filter(|_| self.has_succeeded(&place, root.as_ref()));
        if let Some(changed) = changed.filter(|_| apply_progress::has_begun(place.files().parent()).unwrap_or(true)) {
            let finished = self.finish_application(entry, &ims, &settings, &source, changed, &place);
            work.unless_interrupted(finished)?;
            if let (Some(value), End::Applied) = (done.as_ref(), self.end) {
                tracing::info!(
                    "the command had succeeded before and was not run again; the next time, the same line runs it"
                );
                let path = place.path().to_owned();
                work.last(place.remove()).map_err(|e| e.advise_if_interrupted(|| left_in(&path)))?;
                return Ok(*value);
            }
        }
        work.unless_interrupted(self.check_kept(&ims, &settings, &source, &place, root.as_ref()))?;
        entry.record_in(place.files().parent());
        if holds_changes(parent, &mounted) {
            self.tell_of_resuming(parent, entry, done.is_some());
        }
        let journal = JournalDirectory::private(place.files(), &settings);
        let (files, is_unchanged) = (place.files(), Cell::new(false));
        let opened = Opened {
            run: &self,
            entry,
            settings: &settings,
            work: &work,
            files,
            ims: &ims,
            journal: &journal,
            is_unchanged: &is_unchanged,
        };
        let places = (directory.as_deref(), root.as_ref(), &*mounted);
        let result = opened.open_and_close(&source, places, done, session);
        let result = work.unless_interrupted(result);
        let left = |e: Error| e.advise_if_interrupted(|| left_in(files.path()));
        // Changes that were put aside are dropped once the image is open. If this run has not opened it, restore them.
        if !entry.is_open() && work.last(place.restore_aside()).map_err(left)? {
            is_unchanged.set(false);
        }
        let kept = || self.kept_in(files.parent(), entry);
        // An upload that has begun is kept too: the same command goes on with it.
        let is_unchanged = is_unchanged.get() && !(result.is_err() && is_begun(files)?);
        if self.end != End::Discarded && holds_changes(parent, &mounted) && !is_unchanged {
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
        self.tell_of_end(fate);
        Ok(value)
    }

    /// The command line of the run that made the kept changes, if it differs from this one.
    fn made_by_another(&self, entry: &Entry) -> Option<String> {
        let line = entry.before()?["command_line"].as_str()?;
        self.command_line.differs(line).map(str::to_owned)
    }

    /// Returns whether this run's command or script has succeeded before, with changes kept in `place` or applied to
    /// `root`.
    fn has_succeeded(&self, place: &WorkDirectory, root: Option<&Tree>) -> bool {
        let record = place.files().parent();
        let is_resumed = !self.in_place && !self.fresh && !self.discards && self.end != End::Discarded;
        is_resumed
            && self.unattended.as_ref().is_some_and(|unattended| unattended.has_succeeded(record))
            && (holds_changes(place.path(), &place.path().join(IMAGE_ROOT))
                || root.is_some_and(|root| apply_progress::is_of(record, root).unwrap_or(false)))
    }

    /// Logs that changes kept in `place` are resumed. Warns if another command made them. If the command
    /// `has_succeeded` in making them, says that it is not run again.
    fn tell_of_resuming(&self, place: &Path, entry: &Entry, has_succeeded: bool) {
        let shown = place.display();
        match self.made_by_another(entry) {
            _ if has_succeeded => tracing::info!(
                "resuming the changes kept in {shown}; the command that made them has succeeded and is not run again; \
                 --fresh drops them and runs it again"
            ),
            Some(other) => tracing::warn!(
                "resuming the changes kept in {shown}, which another command made: {other}; --fresh drops them and \
                 starts over"
            ),
            None => tracing::info!("resuming the changes kept in {shown}; --fresh drops them and starts over"),
        }
    }

    /// Refuses a directory for which there are kept changes that this run does not resume.
    fn refuse_kept(&self, directory: &Path, source: &Source) -> Result<()> {
        let place = self.work.join(name_of(source));
        if self.in_place {
            end_left_over(directory)?;
            // This check comes first, because its error has the command line that resumes the changes.
            directory::refuse_kept(directory, &self.work, None, false)?;
            return directory::refuse_with_changes(directory, &place);
        }
        let own = std::fs::canonicalize(place).ok();
        directory::refuse_kept(directory, &self.work, own.as_deref(), self.end == End::Discarded)
    }

    /// Warns of kept changes that this run does not resume: changes to the same file or URL that are kept below another
    /// work directory or under another hard link, and changes to the image to which the symbolic link on the command
    /// line led before.
    fn warn_of_kept(&self, source: &Source) {
        let own = std::fs::canonicalize(self.work.join(name_of(source))).ok();
        let (mut left, shown, link) = (register::left(), self.shown(), self.link());
        left.extend(register::left_below(&self.work));
        let place = |path: &str| std::fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
        let is_directory = source::directory_of(source).is_some();
        let is_meant = |entry: &&Value| {
            let Some(other) = entry["source"].as_str() else { return false };
            let is_same = other == shown || place(other).is_some_and(|other| place(&shown) == Some(other));
            is_same && !is_directory || other != shown && link.as_deref().is_some_and(|link| entry[LINK] == link)
        };
        let mut told = HashSet::new();
        for entry in left.iter().filter(is_meant) {
            let Some(work) = register::kept_in(entry) else { continue };
            if own.as_ref() == Some(&work) || !told.insert(work.clone()) {
                continue;
            }
            let [name, source, link] = ["name", "source", LINK].map(|field| entry[field].as_str().unwrap_or_default());
            let resuming = if register::has_source(entry) {
                format!("to resume them: {}", resuming_line(entry))
            } else {
                format!("to resume them, let {link} lead to {source} again")
            };
            // After a reboot, no other command finds changes that are kept below another work directory.
            let is_listed = |other: &Value| other["name"] == entry["name"] && other["work"] == entry["work"];
            let dropping = if register::left().iter().any(is_listed) {
                format!("; to drop them: ims-sshd fail {name}")
            } else {
                String::new()
            };
            tracing::warn!(
                "this run does not use the changes to {source} that are kept as {name} in {}; {resuming}{dropping}",
                work.display()
            );
        }
    }

    /// Applies the rest of changes that an interrupted run began to apply; with `--fresh`, drops the rest.
    fn finish_application(
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
            directory::abort_changes(directory, root, record)?;
            return drop_changes(ims, settings, place);
        }
        entry.reach(Stage::Applying);
        if !apply_progress::has_ended(record).unwrap_or(false) {
            let of = self.made_by_another(entry);
            let of = of.map_or_else(String::new, |line| format!("; another command made them: {line}"));
            tracing::warn!("applying changes to {} was interrupted; resuming it{of}", directory.display());
        }
        let applied = apply_progress::is_only_decided(record).and_then(|is_whole| {
            let mounted = place.path().join(IMAGE_ROOT);
            let overlay = if is_whole { prepare(ims.work, settings, source, None, &mounted)? } else { None };
            directory::apply_changes(directory, root, record, overlay)
        });
        applied.map_err(|e| e.advise_also(&self.kept_in(record, entry)))?;
        place.clear()
    }

    /// Puts aside the changes that `--fresh` drops. Refuses to resume changes to another source, or to a directory that
    /// was edited since.
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
            // If the disk is too full for new changes beside the old ones, drop the old ones at once.
            if space::has_room(record) {
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

    /// Message that says where changes are kept, and what can be done with them.
    fn kept_in(&self, place: &Tree, entry: &Entry) -> String {
        let before = entry.before().and_then(|before| before["name"].as_str());
        let (shown, name) = (place.shown(), before.map_or_else(|| entry.name(), str::to_owned));
        let (shown, line) =
            (shown.display(), entry.before().map_or_else(|| self.command_line.line.clone(), resuming_line));
        let succeeded = unattended::succeeded(place);
        let again = succeeded.map_or_else(String::new, |what| format!(", without running the {what} again"));
        if !apply_progress::has_begun(place).unwrap_or(true) {
            let going_on = match (succeeded, self.end) {
                (None, _) => "resume",
                (_, End::Published) => "publish the image",
                (_, End::Applied | End::Discarded) => "apply them",
            };
            let kept = format!("the changes are kept in {shown}; 'ims-sshd fail {name}' drops them");
            return format!("{kept}; to {going_on}{again}: {line}");
        }
        let how_many = if apply_progress::is_only_decided(place).unwrap_or(false) { "none" } else { "some" };
        format!(
            "{how_many} of the changes are applied, and all are in {shown}; if a disk is full, free space on it; \
             'ims-sshd fail {name}' drops those that are not applied; to apply them{again}: \
             {line}"
        )
    }
}

/// Refuses a source file that is no image.
fn refuse_unknown_kind(source: &Source) -> Result<()> {
    if let Source::Here(path) = source {
        let refuse = |e| Error::bad_input(format!("SOURCE is '{}': {e}", path.display()));
        if !std::fs::metadata(path).map_err(refuse)?.is_dir() {
            kind::Opened::open(path)?.kind()?;
        }
    }
    Ok(())
}

/// Name of another open run whose entry has `path` in `field`.
fn open_elsewhere(field: &str, path: &Path) -> Option<String> {
    register::run_elsewhere(field, path).map(|run| run["name"].as_str().unwrap_or_default().into())
}

/// Drops the kept changes, and rolls back an unfinished publication of them.
pub(super) fn drop_changes(ims: &Ims, settings: &Settings, place: &WorkDirectory) -> Result<()> {
    let directory = JournalDirectory::private(place.files(), settings);
    let publication = Publication { work: ims.work, settings, ims, directory: &directory };
    publication.give_up(&mut Journal::read(&directory)?)?;
    place.clear()?;
    tracing::info!("dropped the earlier changes; starting over");
    Ok(())
}

/// Advice for a removal that a signal interrupted.
pub(super) fn left_in(place: &Path) -> String {
    format!("what is left to remove is in {}: the same command removes it, or 'rm -r'", place.display())
}

/// Name of the work directory for `source`, made from its absolute path, or its URL without the signature.
fn name_of(source: &Source) -> String {
    name_for(Path::new(&identity::named(source)))
}

/// A run with its work directory.
struct Opened<'a> {
    run: &'a Run,
    entry: &'a Entry,
    settings: &'a Settings,
    work: &'a Work,
    files: &'a SignalFiles,
    ims: &'a Ims<'a>,
    journal: &'a JournalDirectory<'a>,
    /// Set if nothing was changed, so that there are no changes to keep.
    is_unchanged: &'a Cell<bool>,
}

impl Opened<'_> {
    /// Prepares the image, runs the session, and publishes or applies the changes.
    fn open_and_close<T>(
        &self,
        source: &Source,
        (directory, root, mounted): (Option<&Path>, Option<&Tree>, &Path),
        done: Option<T>,
        session: impl FnOnce(&Path) -> Result<(Fate, T)>,
    ) -> Result<(Fate, T)> {
        let (image_root, overlay) = match directory {
            Some(directory) if self.run.in_place => (directory.to_owned(), None),
            _ => (mounted.to_owned(), prepare(self.work, self.settings, source, None, mounted)?),
        };
        if let (Some(directory), Some(root), Some(overlay)) = (directory, root, &overlay)
            && !directory::is_same(&overlay.lower, root)
        {
            let why = "another directory has taken its place meanwhile";
            return Err(Error::new(format!("open {}", directory.display())).because(why));
        }
        if self.run.end == End::Applied && overlay.is_none() {
            let why = "is a saved container image, to which no changes can be applied";
            return Err(Error::bad_input(format!("SOURCE is '{}', which {why}", self.run.named))
                .advise("name a store for a new image with --output"));
        }
        if let (Some(_), None) = (&self.run.reports.changes, &overlay) {
            Inventory::of(self.work, &open_tree(&image_root)?)?.save(self.files.parent(), INVENTORY)?;
        }
        if self.settings.store.url.is_some() {
            // The directory is closed before the session: while open, it would keep the overlay busy.
            let (root, names, arch) = (open_tree(&image_root)?, &self.settings.boot, self.settings.job.arch());
            boot::check_named(&root, names, arch)?;
            boot::warn_of_missing_initrd(&root, names, arch);
        }
        self.roll_back_aside()?;
        let (fate, value) = match done {
            Some(value) => {
                self.entry.resume(self.files.parent());
                (Fate::Publish, value)
            }
            None => self.run_session(&image_root, overlay.as_ref(), session)?,
        };
        match (fate, self.run.end, directory.zip(root)) {
            (Fate::Publish, End::Published, _) => self
                .publish(source, &image_root, overlay)
                .map_err(|e| if self.run.in_place { e.advise_also(&self.run.stay_in_place()) } else { e })?,
            (Fate::Publish, End::Applied, Some((directory, root))) => {
                // Record the decision first: if this run is killed from here on, the next one applies the changes.
                apply_progress::decide(self.files.parent(), root)?;
                self.entry.reach(Stage::Applying);
                directory::apply_changes(directory, root, self.files.parent(), overlay)?;
            }
            _ => {}
        }
        Ok((fate, value))
    }

    /// Runs the session. If the command or script of the run succeeds and the changes are to be published or applied,
    /// records that success.
    fn run_session<T>(
        &self,
        image_root: &Path,
        overlay: Option<&Overlay>,
        session: impl FnOnce(&Path) -> Result<(Fate, T)>,
    ) -> Result<(Fate, T)> {
        let unattended = self.run.unattended.as_ref().filter(|_| !self.run.in_place);
        if let Some(unattended) = unattended {
            unattended.begin(self.files.parent());
        }
        let ended = session(image_root);
        let may_be_kept = match &ended {
            Ok((Fate::Discard, _)) => false,
            // Publishing may fail.
            Ok((Fate::Publish, _)) => self.run.end == End::Published,
            Ok((Fate::Keep, _)) | Err(_) => true,
        };
        if let Some(overlay) = overlay.filter(|_| may_be_kept) {
            let upper = open_tree(&self.files.path().join(OVERLAY).join(UPPER))?;
            self.is_unchanged.set(upper_layer::is_unchanged(&upper, &overlay.lower).unwrap_or(false));
        }
        if let (Ok((Fate::Publish, _)), Some(unattended)) = (&ended, unattended) {
            unattended.succeed(self.files.parent());
        }
        ended
    }

    /// Rolls back an unfinished publication of changes that are put aside.
    fn roll_back_aside(&self) -> Result<()> {
        let Some(aside) = SignalFiles::open(&self.files.path().join(ASIDE))? else { return Ok(()) };
        let directory = JournalDirectory::private(&aside, self.settings);
        self.publication(&directory).give_up(&mut Journal::read(&directory)?)
    }

    fn publication<'a>(&'a self, directory: &'a JournalDirectory) -> Publication<'a> {
        Publication { work: self.work, settings: self.settings, ims: self.ims, directory }
    }

    fn publish(&self, source: &Source, image_root: &Path, overlay: Option<Overlay>) -> Result<()> {
        let Self { run, settings, work, .. } = self;
        self.entry.reach(Stage::Packing);
        let mut packing = settings.packing.clone();
        let fetched = settings.job.parent.join(ARCHIVE);
        let archive = if let Source::Here(path) = source { path } else { &fetched };
        packing.compression = packing.compression.or_else(|| kind::compression(archive));
        let (workplace, tree) = (self.files.parent(), open_tree(image_root)?);
        if let Some(to) = &run.reports.changes {
            if let Some(overlay) = &overlay {
                Inventory::of(work, &overlay.lower)?.save(workplace, INVENTORY)?;
            }
            write_changes(work, workplace, &tree, to)?;
        }
        let boot = boot::find_if_any(&tree, &settings.boot, settings.job.arch())?;
        let archive = Archive { directory: workplace, name: "packed.sqsh" };
        let basis = basis::of(work, settings, workplace, &tree, false)?;
        let rootfs = packing::pack(work, &tree, &archive, &packing, &run.exclude, basis.as_ref())?.file;
        // `basis` may hold the source open, which lies below the overlay and would keep it busy.
        drop(basis);
        drop(tree);
        if let Some(overlay) = overlay {
            overlay.unmount()?;
        }
        let mut journal = Journal::read(self.journal)?;
        let size = rootfs.metadata().attempt(|| format!("look at {}", archive.shown()))?.len();
        // If an upload was interrupted, its parts take up space in the store already, so skip this check.
        if journal.image.is_none()
            && let Some(left) = work.wait(Store::check(&settings.store, &settings.network))?
            && left < size
        {
            return Err(space::too_small("the store", left, size, "--output"));
        }
        let image = Image { rootfs, recorded: None, boot, debug_kernel: None };
        self.entry.reach(Stage::Uploading);
        let report = self.publication(self.journal).publish(&mut journal, image)?;
        if run.reports.result {
            say_result(&report);
        }
        Ok(())
    }
}
