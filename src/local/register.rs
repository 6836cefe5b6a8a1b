//! Register of the runs of `customize` and `enter` on this machine. Each run has a directory there, which is locked
//! until the run ends. An unlocked directory belongs to a run that was killed or that kept changes; see [`left`].

use std::cell::{Cell, RefCell};
use std::fs::Metadata;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::environment::stage::Stage;
use crate::error::{Attempt, Error, Result};
use crate::local::apply_progress;
use crate::local::claim::{claim, is_claimed, remove_directory};
use crate::local::command_line;
use crate::local::names;
use crate::local::unattended;
use crate::local::work_directory;
use crate::publish::identity::Record;
use crate::sys::tree::Tree;
use crate::volume::signal_files::SignalFiles;
use crate::volume::state_directory::RUN;

/// Directory of the register, below [`RUN`]; no other directory there has a name that begins with a dot.
const REGISTER: &str = ".runs";

/// File that holds a run's entry.
const ENTRY: &str = "entry";

/// Copy of the entry in the work directory, because the register does not survive a reboot.
const KEPT_ENTRY: &str = ".ims-sshd.entry";

/// Field of an entry: the path on the command line, if it is a link or leads through one.
pub(crate) const LINK: &str = "link";

/// Value of an entry's `state`: the run has ended, and its changes are kept.
pub(crate) const KEPT: &str = "kept";

/// Value of an entry's `state`: kept changes are only partly applied to their directory.
pub(crate) const HALF_APPLIED: &str = "half-applied";

/// Value of an entry's `state`: the run was killed.
pub(crate) const KILLED: &str = "killed";

/// Maximum time for which processes of a finished run hold the run's lock.
const TIME_TO_END: Duration = Duration::from_secs(2);

/// Size limit of an entry, in bytes.
const LIMIT: u64 = 64 << 10;

/// This run's entry, which lasts as long as this value lives.
pub(crate) struct Entry {
    files: SignalFiles,
    fields: RefCell<Value>,
    /// The work directory, if changes may stay in it after this run.
    keeps: Option<PathBuf>,
    /// Entry of the earlier run whose changes are in the work directory; restored if this run does not open the image.
    before: Option<Value>,
    is_open: Cell<bool>,
}

impl Entry {
    /// Registers a run of `command` on `source` under `name`, with a number appended if another run has that name. The
    /// run's changes may be kept in the work directory `keeps`. If an earlier run's changes are there already, the new
    /// run gets that run's name, unless a person has `chosen` another one. A chosen name that another run has is an
    /// error.
    pub(crate) fn make(
        command: &str,
        source: &str,
        (name, chosen): (&str, bool),
        keeps: Option<PathBuf>,
    ) -> Result<Self> {
        let register = place();
        let before = keeps.as_deref().and_then(|work| {
            let is_ours = |(entry, lasts): &(Value, bool)| !lasts && kept_in(entry).as_deref() == Some(work);
            let known = all().unwrap_or_default().into_iter().find(is_ours).map(|(entry, _)| entry);
            known.or_else(|| kept_entry(work))
        });
        let known = before.as_ref().and_then(|before| before["name"].as_str()).map(str::to_owned);
        let _alone = alone()?;
        if let Some(run) = keeps.as_deref().and_then(open_in_use) {
            return Err(Error::new(format!("open {source}"))
                .because(format!("it is open as {}", run["name"].as_str().unwrap_or_default()))
                .advise(how_it_ends(&run)));
        }
        let mut renamed = known.as_deref().filter(|known| chosen && *known != name);
        let mut number = 0_u32;
        loop {
            number += 1;
            if let Some(known) = renamed.filter(|_| number > 1) {
                if !is_numbered(known, name) {
                    return Err(Error::new(format!("open {source} as {name}"))
                        .because("another run has this name")
                        .advise(format!("choose another name; 'ims-sshd status {name}' shows that run")));
                }
                // The kept changes have the chosen name with a number: keep that name.
                (number, renamed) = (1, None);
            }
            let name = match (number, &known) {
                (1, Some(known)) if renamed.is_none() => known.clone(),
                (1, _) => name.to_owned(),
                _ => numbered(name, number),
            };
            let path = register.join(&name);
            let in_use = || is_claimed(&path).unwrap_or(false);
            let is_kept = || {
                let left = read(&path).map(|(entry, _)| entry);
                left.is_some_and(|left| kept_in(&left).is_some_and(|work| Some(work) != keeps))
            };
            if in_use() || is_kept() {
                continue;
            }
            let make = || {
                let mut make = std::fs::DirBuilder::new();
                make.recursive(true).mode(0o700).create(&path).attempt(|| format!("make {}", path.display()))?;
                Ok(path.clone())
            };
            let files = match claim(make) {
                // Another run has claimed this name in the meantime.
                Err(_) if in_use() => continue,
                claimed => claimed?,
            };
            let fields = json!({
                "name": name,
                "command": command,
                "source": source,
                "pid": std::process::id(),
                "state": Stage::Preparing.name(),
                "since": now(),
                "work": keeps,
            });
            if let Some(renamed) = renamed {
                forget_kept(renamed, keeps.as_deref())?;
            }
            let entry = Self { files, fields: RefCell::new(fields), keeps, before, is_open: Cell::new(false) };
            entry.write();
            return Ok(entry);
        }
    }

    /// Name of this run.
    pub(crate) fn name(&self) -> String {
        self.fields.borrow()["name"].as_str().unwrap_or_default().to_owned()
    }

    /// Records the stage that this run has reached.
    pub(crate) fn reach(&self, stage: Stage) {
        self.set(&[("state", stage.name()), ("since", &now())]);
        if stage == Stage::Serving && !self.is_open.replace(true) {
            self.take_over();
        }
    }

    /// Continues with the changes in `place` without opening the image; from here on, the changes are this run's.
    pub(crate) fn resume(&self, place: &Tree) {
        self.is_open.set(true);
        self.record_in(place);
    }

    /// Drops changes that were put aside; from here on, the kept changes are this run's.
    fn take_over(&self) {
        let Some(work) = &self.keeps else { return };
        if let Ok(place) = Tree::open(work) {
            unattended::forget(&place);
            self.record_in(&place);
        }
        match work_directory::drop_aside(work) {
            Ok(true) => tracing::info!("dropped the earlier changes; starting over"),
            Ok(false) => {}
            Err(e) => tracing::warn!("{e}"),
        }
    }

    /// Returns whether this run has opened the image, or continues with changes that an earlier run completed.
    pub(crate) fn is_open(&self) -> bool {
        self.is_open.get()
    }

    /// Entry of the earlier run whose changes are kept, as long as this run has not taken them over.
    pub(crate) fn before(&self) -> Option<&Value> {
        self.before.as_ref().filter(|_| !self.is_open())
    }

    /// Sets fields of the entry.
    pub(crate) fn set(&self, told: &[(&str, &str)]) {
        for (field, value) in told {
            self.fields.borrow_mut()[*field] = json!(value);
        }
        self.write();
    }

    /// Records in the work directory `place` that its changes are this run's, unless they still belong to an earlier
    /// run.
    pub(crate) fn record_in(&self, place: &Tree) {
        if self.keeps.is_none() || self.before().is_some() {
            return;
        }
        let fields = self.fields.borrow();
        let recorded = ["name", "command", "source", LINK, "command_line", "directory"];
        let record: Value =
            recorded.into_iter().filter_map(|field| Some((field.to_owned(), fields.get(field)?.clone()))).collect();
        if let Err(e) = place.replace(KEPT_ENTRY, record.to_string().as_bytes()) {
            tracing::warn!("cannot write {}/{KEPT_ENTRY}: {e}; 'ims-sshd status' shows less", place.shown().display());
        }
    }

    /// Writes the entry. A failure is only logged, so that it does not end the run.
    fn write(&self) {
        let text = self.fields.borrow().to_string();
        if let Err(e) = self.files.parent().replace(ENTRY, text.as_bytes()) {
            tracing::warn!("cannot write {}/{ENTRY}: {e}; 'ims-sshd status' shows less", self.files.path().display());
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if self.keeps.as_deref().is_some_and(is_kept) {
            if let Some(before) = self.before() {
                let name = self.name();
                if before["name"] == name || !restore(before) {
                    self.fields.replace(before.clone());
                    self.fields.borrow_mut()["name"] = json!(name);
                    return self.write();
                }
                let _ = remove_directory(self.files.path());
                return;
            }
            return self.set(&[("state", KEPT), ("since", &now())]);
        }
        let _ = remove_directory(self.files.path());
    }
}

/// Restores the entry of a finished run. Returns false if another run has taken the name.
fn restore(entry: &Value) -> bool {
    let Some(path) = entry["name"].as_str().map(|name| place().join(name)) else { return false };
    if std::fs::DirBuilder::new().mode(0o700).create(&path).is_err() {
        return false;
    }
    let written = Tree::open(&path).and_then(|directory| directory.replace(ENTRY, entry.to_string().as_bytes()));
    written.inspect_err(|_| drop(remove_directory(&path))).is_ok()
}

/// Removes the entry `name` of changes kept in `work`, because they have another name now.
fn forget_kept(name: &str, work: Option<&Path>) -> Result<()> {
    match read(&place().join(name)) {
        Some((entry, false)) if kept_in(&entry).as_deref() == work => remove_ended(name),
        _ => Ok(()),
    }
}

/// Returns whether `known` is `name` with a number appended.
fn is_numbered(known: &str, name: &str) -> bool {
    let number = known.rsplit_once('-').and_then(|(_, number)| number.parse().ok());
    number.is_some_and(|number| numbered(name, number) == known)
}

/// Appends `number` to `name`, shortened so that the result is a valid label of a host name.
fn numbered(name: &str, number: u32) -> String {
    let end = format!("-{number}");
    let longest = names::LONGEST - end.len();
    name.get(..longest).unwrap_or(name).trim_end_matches('-').to_owned() + &end
}

/// Entries of all runs that have not ended, by name.
pub(crate) fn entries() -> Result<Vec<Value>> {
    Ok(all()?.into_iter().filter_map(|(entry, lasts)| lasts.then_some(entry)).collect())
}

/// Locks the register until the returned value is dropped. If two runs on one source start at the same time, the
/// second is thus refused before it takes a name.
fn alone() -> Result<OwnedFd> {
    let register = place();
    let attempted = || format!("lock {}", register.display());
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&register).attempt(attempted)?;
    let opened = OwnedFd::from(std::fs::File::open(&register).attempt(attempted)?);
    rustix::fs::flock(&opened, rustix::fs::FlockOperation::LockExclusive).attempt(attempted)?;
    Ok(opened)
}

/// Like [`open_in`], but waits for the last processes of a finished run: they hold the run's lock a moment longer.
fn open_in_use(work: &Path) -> Option<Value> {
    let began = Instant::now();
    loop {
        let run = open_in(work)?;
        if process(&run).is_some() || began.elapsed() >= TIME_TO_END {
            return Some(run);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Entry of the open run that keeps its changes in `work`, a directory that need not exist yet.
fn open_in(work: &Path) -> Option<Value> {
    entries().ok()?.into_iter().find(|run| run["work"].as_str().map(Path::new) == Some(work))
}

/// Another open run whose entry has `path` in `field`.
pub(crate) fn run_elsewhere(field: &str, path: &Path) -> Option<Value> {
    let path = std::fs::canonicalize(path).ok()?;
    let is_meant = |run: &Value| {
        let there = run[field].as_str().and_then(|there| std::fs::canonicalize(there).ok());
        there.is_some_and(|there| there == path) && run["pid"] != std::process::id()
    };
    entries().ok()?.into_iter().find(is_meant)
}

/// Advice on how to end, or wait for, the open run of `entry`.
pub(crate) fn how_it_ends(entry: &Value) -> String {
    let name = entry["name"].as_str().unwrap_or_default();
    let state = entry["state"].as_str().unwrap_or_default();
    // In these states a mark is refused, and no command runs any more.
    if ["packing", "uploading"].contains(&state) {
        format!("wait until it is published; to stop that, send SIGINT to process {}", entry["pid"])
    } else if state == "applying" {
        "wait until its changes are applied; nothing stops that".into()
    } else if entry["command"] == "enter" {
        format!("it ends with its shell or command (process {})", entry["pid"])
    } else if entry["image_root_parent"].is_null() {
        format!("wait for its command, or 'ims-sshd fail {name}' ends it and drops the changes")
    } else {
        format!("'ims-sshd complete {name}' or 'ims-sshd fail {name}' ends it")
    }
}

/// Entries of killed runs and of kept changes.
pub(crate) fn left() -> Vec<Value> {
    left_below(Path::new(work_directory::DEFAULT))
}

/// Like [`left`], but also with changes kept below `works`: after a reboot, only the work directories have a record of
/// them.
pub(crate) fn left_below(works: &Path) -> Vec<Value> {
    let mut left = Vec::new();
    for (mut entry, lasts) in all().unwrap_or_default() {
        let kept = kept_in(&entry);
        let source = entry["source"].as_str().map(Path::new);
        // A killed run is left out if it kept nothing and its source is gone: there is nothing to clean up.
        let is_there = source.is_some_and(|source| source.is_relative() || source.exists());
        if lasts || kept.is_none() && (entry["state"] == KEPT || !is_there) {
            continue;
        }
        if entry["state"] != KEPT {
            (entry["was"], entry["state"]) = (entry["state"].take(), json!(KILLED));
        }
        entry["kept"] = json!(kept.is_some());
        entry.as_object_mut().map(|fields| fields.remove("login"));
        left.push(entry);
    }
    for work in std::fs::read_dir(works).into_iter().flatten().flatten().map(|entry| entry.path()) {
        let is_known = |entry: &Value| entry["work"].as_str().map(Path::new) == Some(&work);
        if is_kept(&work)
            && !left.iter().any(is_known)
            && let Some(mut entry) = kept_entry(&work)
        {
            entry["kept"] = json!(true);
            left.push(entry);
        }
    }
    for entry in &mut left {
        let begun = kept_in(entry).and_then(|work| apply_progress::has_begun(&Tree::open(&work).ok()?).ok());
        if begun == Some(true) {
            entry["state"] = json!(HALF_APPLIED);
        }
    }
    left
}

/// Entry of the changes kept in `work`, from the copy in that directory.
fn kept_entry(work: &Path) -> Option<Value> {
    let mut entry = read_in(work, KEPT_ENTRY).filter(|_| is_kept(work))?;
    (entry["state"], entry["work"]) = (json!(KEPT), json!(work));
    Some(entry)
}

/// The command line that resumes the changes of the run of `entry`, in a form that can be pasted in the current
/// directory.
pub(crate) fn resuming_line(entry: &Value) -> String {
    match (entry["command_line"].as_str(), entry["directory"].as_str()) {
        (Some(line), Some(directory)) => command_line::from_here(line, Path::new(directory)),
        // The changes were kept by a release that did not record its command line.
        _ => format!("the same 'ims-sshd {}' again", entry["command"].as_str().unwrap_or("customize")),
    }
}

/// Returns whether the command line of a run still leads to its source, as far as this machine can tell.
pub(crate) fn has_source(entry: &Value) -> bool {
    let source = Path::new(entry["source"].as_str().unwrap_or_default());
    // A URL is not an absolute path.
    if !source.is_absolute() {
        return true;
    }
    let link = entry[LINK].as_str().map(Path::new);
    let is_named = link.is_none_or(|link| std::fs::canonicalize(link).is_ok_and(|real| real == source));
    // Another directory may have taken its path, such as the mount point of one that was unmounted.
    let is_other = |directory: &Tree| {
        let known = kept_in(entry).and_then(|work| Record::private(&Tree::open(&work).ok()?).read());
        known.is_some_and(|known| !known.is_of(directory))
    };
    is_named && source.exists() && !(source.is_dir() && Tree::open(source).is_ok_and(|source| is_other(&source)))
}

/// Entries of finished runs that left nothing behind, because their source or the changes that they kept are gone.
pub(crate) fn gone() -> Vec<Value> {
    let left = left();
    let is_gone = |(entry, lasts): &(Value, bool)| !lasts && !left.iter().any(|left| left["name"] == entry["name"]);
    all().unwrap_or_default().into_iter().filter(is_gone).map(|(entry, _)| entry).collect()
}

/// Process of an open run; `None` if the process is in another PID namespace. The recorded PID is then that of an
/// unrelated process here, or of none. A run's process has the entry's directory open until the run ends, so check for
/// that.
pub(crate) fn process(entry: &Value) -> Option<Pid> {
    let pid = entry["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok())?;
    let directory = std::fs::metadata(place().join(entry["name"].as_str()?)).ok()?;
    let mut open = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
    let is_it = |found: Metadata| (found.dev(), found.ino()) == (directory.dev(), directory.ino());
    open.any(|file| std::fs::metadata(file.path()).is_ok_and(is_it)).then_some(Pid::from_raw(pid))
}

/// Removes the entry of a run that has ended.
pub(crate) fn forget(name: &str) -> Result<()> {
    // Another run may be about to claim this name.
    let _alone = alone()?;
    remove_ended(name)
}

fn remove_ended(name: &str) -> Result<()> {
    let path = place().join(name);
    match SignalFiles::open(&path)? {
        Some(files) if !files.is_claimed() => remove_directory(&path),
        _ => Ok(()),
    }
}

/// The work directory in which the run's changes are kept.
pub(crate) fn kept_in(entry: &Value) -> Option<PathBuf> {
    entry["work"].as_str().map(PathBuf::from).filter(|work| is_kept(work))
}

/// Returns whether changes are kept in `work`, no run uses it, and they are not to be discarded.
fn is_kept(work: &Path) -> bool {
    work_directory::holds_any_changes(work)
        && !work_directory::is_to_discard(work)
        && SignalFiles::open(work).ok().flatten().is_some_and(|files| !files.is_claimed())
}

/// All entries, sorted by name, each with true if its run has not ended.
fn all() -> Result<Vec<(Value, bool)>> {
    let register = place();
    let found = match std::fs::read_dir(&register) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        found => found.attempt(|| "list the runs on this machine").map_err(|e| e.advise("run it as root"))?,
    };
    let mut paths: Vec<PathBuf> = found.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    Ok(paths.iter().filter_map(|path| read(path)).collect())
}

fn read(path: &Path) -> Option<(Value, bool)> {
    let files = SignalFiles::open(path).ok()??;
    Some((read_in(path, ENTRY)?, files.is_claimed()))
}

fn read_in(directory: &Path, name: &str) -> Option<Value> {
    serde_json::from_slice(&Tree::open(directory).ok()?.read(name, LIMIT).ok()?).ok()
}

fn place() -> PathBuf {
    Path::new(RUN).join(REGISTER)
}

fn now() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_for_a_run_that_is_marked_names_no_mark() {
        for (state, wanted) in [
            ("serving", "'ims-sshd complete tree' or 'ims-sshd fail tree' ends it"),
            ("packing", "wait until it is published; to stop that, send SIGINT to process 7"),
            ("uploading", "wait until it is published; to stop that, send SIGINT to process 7"),
            ("applying", "wait until its changes are applied; nothing stops that"),
        ] {
            let entry = json!({
                "name": "tree", "command": "customize", "state": state, "pid": 7, "image_root_parent": "/run/x",
            });
            assert_eq!(how_it_ends(&entry), wanted);
        }
    }

    #[test]
    fn numbered_name_is_a_label_of_a_host_name() {
        assert_eq!(numbered("tree", 2), "tree-2");
        let long = format!("{}-b", "a".repeat(names::LONGEST - 2));
        assert_eq!(numbered(&long, 10), format!("{}-10", "a".repeat(names::LONGEST - 3)));
    }
}
