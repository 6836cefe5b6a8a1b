//! What has been done already, on the volume: whoever begins again after a crash goes on from there.

use serde_json::{Value, json};

use crate::error::{Attempt, Result};
use crate::lifecycle::signal_files::SignalFiles;

/// Where it is kept, in the image root's parent.
const FILE: &str = ".ims-sshd.publication";

const LIMIT: u64 = 1 << 20;

/// How far a sidecar was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Nothing has been done.
    Begun,
    /// The environment was told that it may open.
    Ready,
    /// The environment has ended well.
    Packing,
}

const PHASES: [(Phase, &str); 3] = [(Phase::Begun, "begun"), (Phase::Ready, "ready"), (Phase::Packing, "packing")];

/// The notes of one job.
#[derive(Debug, Clone, PartialEq)]
pub struct Journal {
    job: Option<String>,
    /// How far the sidecar was.
    pub phase: Phase,
    /// Empty images of this name that stood before ours was asked for; nothing as long as it was not.
    pub known: Option<Vec<String>>,
    /// The new image.
    pub image: Option<String>,
    /// What the pod's resolv.conf said when it was put into the image.
    pub resolv_conf: Option<String>,
}

impl Journal {
    /// Reads what was noted for this job; another job's notes mean nothing.
    pub fn open(files: &SignalFiles, job: Option<&str>) -> Self {
        let noted = files.parent().read(FILE, LIMIT).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let noted: Value = noted.unwrap_or_default();
        let text = |name: &str| noted[name].as_str().map(str::to_owned);
        let job = job.map(str::to_owned);
        if text("job") != job || noted.is_null() {
            return Self { job, phase: Phase::Begun, known: None, image: None, resolv_conf: None };
        }
        let phase = PHASES.iter().find(|(_, name)| noted["phase"] == *name).map_or(Phase::Begun, |(phase, _)| *phase);
        let known =
            noted["known"].as_array().map(|ids| ids.iter().filter_map(|i| i.as_str().map(str::to_owned)).collect());
        Self { job, phase, known, image: text("image"), resolv_conf: text("resolv_conf") }
    }

    /// Writes it down before what it tells is done.
    pub fn note(&self, files: &SignalFiles) -> Result<()> {
        let phase = PHASES.iter().find(|(phase, _)| *phase == self.phase).map_or("begun", |(_, name)| *name);
        let text = json!({
            "job": self.job, "phase": phase, "known": self.known, "image": self.image, "resolv_conf": self.resolv_conf,
        });
        let attempted = || format!("write {}/{FILE}", files.path().display());
        files.parent().replace(FILE, text.to_string().as_bytes()).attempt(attempted)
    }

    /// All is done, or taken back.
    pub fn clear(files: &SignalFiles) -> Result<()> {
        files.remove(FILE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_found_again_by_the_same_job_alone() {
        let dir = tempfile::tempdir().unwrap();
        let files = SignalFiles::open(dir.path()).unwrap().unwrap();
        let mut journal = Journal::open(&files, Some("7"));
        assert_eq!(journal.phase, Phase::Begun);
        journal.phase = Phase::Packing;
        journal.known = Some(vec!["a".into()]);
        journal.image = Some("b".into());
        journal.note(&files).unwrap();
        assert_eq!(Journal::open(&files, Some("7")), journal);
        assert_eq!(Journal::open(&files, Some("8")).image, None);
        Journal::clear(&files).unwrap();
        assert_eq!(Journal::open(&files, Some("7")).phase, Phase::Begun);
    }
}
