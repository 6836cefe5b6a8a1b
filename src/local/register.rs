//! Register of what is open on this machine: a directory for each run of `customize` and `enter`, locked as long as the run lasts, also while
//! it fetches and packs. One that is not locked is of a run that was killed, or that has kept changes: see [`left`].

use std::cell::RefCell;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::{Value, json};

use crate::environment::stage::Stage;
use crate::error::{Attempt, Result};
use crate::local::claim::{claim, is_claimed, remove_folder};
use crate::local::work_directory;
use crate::publish::prepare::holds_changes;
use crate::sys::tree::Tree;
use crate::volume::signal_files::SignalFiles;
use crate::volume::state_directory::RUN;

/// Directory of the register, below [`RUN`]; no environment's own directory begins with a dot.
const REGISTER: &str = ".runs";

/// File that holds a run's entry.
const ENTRY: &str = "entry";

/// The same in the work directory: the register is gone when the machine has started anew.
const KEPT_ENTRY: &str = ".ims-sshd.entry";

/// State of changes that are kept.
pub const KEPT: &str = "kept";

/// State of a run that was killed.
pub const KILLED: &str = "killed";

/// An entry is far smaller.
const LIMIT: u64 = 64 << 10;

/// This run's entry, as long as this value lives.
pub struct Entry {
    files: SignalFiles,
    fields: RefCell<Value>,
    /// The work directory, where changes may be kept beyond this run.
    keeps: Option<PathBuf>,
}

impl Entry {
    /// Enters a run of `command` on `source`, which is shown, under `name`, or that with a number. Its changes may be kept in the work directory
    /// `keeps`; the name of others that are kept is taken.
    pub fn make(command: &str, source: &str, name: &str, keeps: Option<PathBuf>) -> Result<Self> {
        let register = place();
        let mut number = 0;
        loop {
            number += 1;
            let name = if number == 1 { name.to_owned() } else { format!("{name}-{number}") };
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
                // Another run was faster.
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
            let entry = Self { files, fields: RefCell::new(fields), keeps };
            entry.write();
            return Ok(entry);
        }
    }

    /// Name of this run.
    pub fn name(&self) -> String {
        self.fields.borrow()["name"].as_str().unwrap_or_default().to_owned()
    }

    /// Tells how far this run is.
    pub fn reach(&self, stage: Stage) {
        self.tell(&[("state", stage.name()), ("since", &now())]);
    }

    /// Tells more of this run.
    pub fn tell(&self, told: &[(&str, &str)]) {
        for (field, value) in told {
            self.fields.borrow_mut()[*field] = json!(value);
        }
        self.write();
    }

    /// Notes in the work directory `place` whose changes those are.
    pub fn note(&self, place: &Tree) {
        if self.keeps.is_none() {
            return;
        }
        let fields = self.fields.borrow();
        let noted = ["name", "command", "source", "command_line", "directory"];
        let note: Value = noted.into_iter().map(|field| (field.to_owned(), fields[field].clone())).collect();
        if let Err(e) = place.replace(KEPT_ENTRY, note.to_string().as_bytes()) {
            tracing::warn!("cannot write {}/{KEPT_ENTRY}: {e}; 'ims-sshd status' tells less", place.shown().display());
        }
    }

    /// An entry that cannot be written is no reason to end a run.
    fn write(&self) {
        let text = self.fields.borrow().to_string();
        if let Err(e) = self.files.parent().replace(ENTRY, text.as_bytes()) {
            tracing::warn!("cannot write {}/{ENTRY}: {e}; 'ims-sshd status' tells less", self.files.path().display());
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if self.keeps.as_deref().is_some_and(is_kept) {
            return self.tell(&[("state", KEPT), ("since", &now())]);
        }
        let _ = remove_folder(self.files.path());
    }
}

/// Entries of all runs that last, by name.
pub fn entries() -> Result<Vec<Value>> {
    Ok(all()?.into_iter().filter_map(|(entry, lasts)| lasts.then_some(entry)).collect())
}

/// Entries of runs that were killed, and of changes that are kept.
pub fn left() -> Vec<Value> {
    let mut left = Vec::new();
    for (mut entry, lasts) in all().unwrap_or_default() {
        let kept = kept_in(&entry);
        let source = entry["source"].as_str().map(Path::new);
        // The source of a run that was killed may be gone, and nothing be left to tell of.
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
    for work in std::fs::read_dir(work_directory::DEFAULT).into_iter().flatten().flatten().map(|entry| entry.path()) {
        let is_known = |entry: &Value| entry["work"].as_str().map(Path::new) == Some(&work);
        if is_kept(&work)
            && !left.iter().any(is_known)
            && let Some(mut entry) = read_in(&work, KEPT_ENTRY)
        {
            (entry["state"], entry["work"], entry["kept"]) = (json!(KEPT), json!(work), json!(true));
            left.push(entry);
        }
    }
    left
}

/// Entries of runs that have ended of which nothing is left: their source, or what they had kept, is gone.
pub fn gone() -> Vec<Value> {
    let left = left();
    let is_gone = |(entry, lasts): &(Value, bool)| !lasts && !left.iter().any(|left| left["name"] == entry["name"]);
    all().unwrap_or_default().into_iter().filter(is_gone).map(|(entry, _)| entry).collect()
}

/// Removes the entry of a run that has ended.
pub fn forget(name: &str) -> Result<()> {
    let path = place().join(name);
    match SignalFiles::open(&path)? {
        Some(files) if !files.is_claimed() => remove_folder(&path),
        _ => Ok(()),
    }
}

/// The work directory in which changes of the run are kept.
pub fn kept_in(entry: &Value) -> Option<PathBuf> {
    entry["work"].as_str().map(PathBuf::from).filter(|work| is_kept(work))
}

/// Returns whether changes are kept in `work`, which no run is using. Changes that are to be discarded do not count.
fn is_kept(work: &Path) -> bool {
    holds_changes(work, &work.join("image-root"))
        && !work_directory::is_to_discard(work)
        && SignalFiles::open(work).ok().flatten().is_some_and(|files| !files.is_claimed())
}

/// All entries, by name, and whether their run lasts.
fn all() -> Result<Vec<(Value, bool)>> {
    let register = place();
    let found = match std::fs::read_dir(&register) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        found => found.attempt(|| "list what is open on this machine").map_err(|e| e.advise("run it as root"))?,
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
