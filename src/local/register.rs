//! Register of what is open on this machine: a directory for each run of `customize` and `enter`, locked as long as the run lasts, also while
//! it fetches and packs. One that is not locked belongs to a run that was killed, and counts for nothing.

use std::cell::RefCell;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::{Value, json};

use crate::error::{Attempt, Result};
use crate::lifecycle::signal_files::SignalFiles;
use crate::lifecycle::stage::Stage;
use crate::lifecycle::state::RUN;
use crate::local;

/// Directory of the register, below [`RUN`]; no environment's own directory begins with a dot.
const REGISTER: &str = ".runs";

/// File that holds a run's entry.
const ENTRY: &str = "entry";

/// An entry is far smaller.
const LIMIT: u64 = 64 << 10;

/// This run's entry, as long as this value lives.
pub struct Entry {
    files: SignalFiles,
    fields: RefCell<Value>,
}

impl Entry {
    /// Enters a run of `command` on `source`, which is shown, under `name`, or that with a number.
    pub fn make(command: &str, source: &str, name: &str) -> Result<Self> {
        let register = place();
        let mut number = 0;
        loop {
            number += 1;
            let name = if number == 1 { name.to_owned() } else { format!("{name}-{number}") };
            let path = register.join(&name);
            let in_use = || SignalFiles::open(&path).ok().flatten().is_some_and(|files| files.is_claimed());
            if in_use() {
                continue;
            }
            let make = || {
                let mut make = std::fs::DirBuilder::new();
                make.recursive(true).mode(0o700).create(&path).attempt(|| format!("make {}", path.display()))?;
                Ok(path.clone())
            };
            let files = match local::claim(make) {
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
            });
            let entry = Self { files, fields: RefCell::new(fields) };
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
        let _ = local::remove_folder(self.files.path());
    }
}

/// Entries of all runs that last, by name.
pub fn entries() -> Result<Vec<Value>> {
    let register = place();
    let found = match std::fs::read_dir(&register) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        found => found.attempt(|| "list what is open on this machine").map_err(|e| e.advise("run it as root"))?,
    };
    let mut paths: Vec<PathBuf> = found.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    Ok(paths.iter().filter_map(|path| read(path)).collect())
}

fn read(path: &Path) -> Option<Value> {
    let files = SignalFiles::open(path).ok()??;
    let entry = serde_json::from_slice(&files.parent().read(ENTRY, LIMIT).ok()?).ok()?;
    files.is_claimed().then_some(entry)
}

fn place() -> PathBuf {
    Path::new(RUN).join(REGISTER)
}

fn now() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}
