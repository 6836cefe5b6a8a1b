//! What has been done already, on the volume: whoever begins again after a crash goes on from there.

use std::io::Write;

use rustix::fs::{Mode, OFlags};
use serde_json::{Value, json};

use crate::error::{Attempt, Result};
use crate::lifecycle::signal_files::SignalFiles;

/// Where it is kept, in the image root's parent.
const FILE: &str = ".ims-sshd.publication";

/// Of an upload, beside it: the parts that have been sent, one a line, which costs the same for the last as for the first.
const PARTS: &str = ".ims-sshd.upload";

const LIMIT: u64 = 16 << 20;

/// A store takes no more parts than this of one object.
pub const MOST_PARTS: usize = 10_000;

/// How far a sidecar was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Nothing has been done.
    Begun,
    /// The environment was told that it may open.
    Ready,
    /// The environment has ended well.
    Packing,
    /// The packed image is whole. Packed again it would be another one, of which no part has been sent.
    Packed,
}

const PHASES: [(Phase, &str); 4] =
    [(Phase::Begun, "begun"), (Phase::Ready, "ready"), (Phase::Packing, "packing"), (Phase::Packed, "packed")];

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
}

impl Journal {
    /// Reads what was noted for this job; another job's notes mean nothing.
    pub fn open(files: &SignalFiles, job: Option<&str>) -> Self {
        let noted = files.parent().read(FILE, LIMIT).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let noted: Value = noted.unwrap_or_default();
        let text = |name: &str| noted[name].as_str().map(str::to_owned);
        let job = job.map(str::to_owned);
        if text("job") != job || noted.is_null() {
            return Self { job, phase: Phase::Begun, known: None, image: None };
        }
        let phase = PHASES.iter().find(|(_, name)| noted["phase"] == *name).map_or(Phase::Begun, |(phase, _)| *phase);
        let known =
            noted["known"].as_array().map(|ids| ids.iter().filter_map(|i| i.as_str().map(str::to_owned)).collect());
        Self { job, phase, known, image: text("image") }
    }

    /// Writes it down before what it tells is done.
    pub fn note(&self, files: &SignalFiles) -> Result<()> {
        let phase = PHASES.iter().find(|(phase, _)| *phase == self.phase).map_or("begun", |(_, name)| *name);
        let text = json!({
            "job": self.job, "phase": phase, "known": self.known, "image": self.image,
        });
        let attempted = || format!("write {}/{FILE}", files.path().display());
        files.parent().replace(FILE, text.to_string().as_bytes()).attempt(attempted)
    }

    /// All is done, or taken back.
    pub fn clear(files: &SignalFiles) -> Result<()> {
        Upload::clear(files)?;
        files.remove(FILE)
    }
}

/// An object on its way to a store in parts.
#[derive(Debug, Clone, PartialEq)]
pub struct Upload {
    /// Where it is to be.
    pub url: String,
    /// Its key in that store.
    pub place: String,
    /// What it comes to when it is whole.
    pub md5: String,
    /// How large each part is, but for the last one.
    pub part: u64,
    /// What the store calls it as long as it is in parts.
    pub id: String,
    /// The store's marks of the parts that are there.
    pub parts: Vec<Option<String>>,
}

impl Upload {
    /// Reads what was noted, if anything was.
    pub fn open(files: &SignalFiles) -> Option<Self> {
        let text = files.parent().read(PARTS, LIMIT).ok()?;
        let text = String::from_utf8(text).ok()?;
        // Of a line that was cut off one does not know how it goes on.
        let mut lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
        let noted: Value = serde_json::from_str(lines.next()?).ok()?;
        let text = |name: &str| noted[name].as_str().map(str::to_owned);
        let (url, place, md5, id) = (text("url")?, text("place")?, text("md5")?, text("id")?);
        let mut upload = Self { url, place, md5, part: noted["part"].as_u64()?, id, parts: Vec::new() };
        for (number, mark) in lines.filter_map(|line| line.split_once(' ')) {
            upload.set(number.parse().ok().filter(|number| *number < MOST_PARTS)?, mark);
        }
        Some(upload)
    }

    /// Notes it as it is.
    pub fn note(&self, files: &SignalFiles) -> Result<()> {
        let what = json!({ "url": self.url, "place": self.place, "md5": self.md5, "part": self.part, "id": self.id });
        let mut text = format!("{what}\n");
        for (number, mark) in self.parts.iter().enumerate() {
            text += &mark.as_ref().map_or(String::new(), |mark| line(number, mark));
        }
        files.parent().replace(PARTS, text.as_bytes()).attempt(|| attempted(files))
    }

    /// Notes that a part is there. In one piece, and not waited for: it outlives this program, and need not outlive the machine.
    pub fn add(&mut self, files: &SignalFiles, number: usize, mark: &str) -> Result<()> {
        self.set(number, mark);
        let file = files.parent().open_at(PARTS, OFlags::WRONLY | OFlags::APPEND | OFlags::NOFOLLOW, Mode::empty());
        file.and_then(|file| std::fs::File::from(file).write_all(line(number, mark).as_bytes()))
            .attempt(|| attempted(files))
    }

    fn set(&mut self, number: usize, mark: &str) {
        self.parts.resize(self.parts.len().max(number + 1), None);
        self.parts[number] = Some(mark.to_owned());
    }

    /// It is whole, or taken back.
    pub fn clear(files: &SignalFiles) -> Result<()> {
        files.remove(PARTS)
    }
}

fn line(number: usize, mark: &str) -> String {
    format!("{number} {mark}\n")
}

fn attempted(files: &SignalFiles) -> String {
    format!("write {}/{PARTS}", files.path().display())
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

    #[test]
    fn the_parts_of_an_upload_are_found_again_but_for_what_was_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let files = SignalFiles::open(dir.path()).unwrap().unwrap();
        assert_eq!(Upload::open(&files), None);
        let [url, place, md5, id] = ["s3://b/p/k", "k", "d41d8", "an id"].map(str::to_owned);
        let mut upload = Upload { url, place, md5, part: 16, id, parts: Vec::new() };
        upload.note(&files).unwrap();
        upload.add(&files, 2, "\"c\"").unwrap();
        upload.add(&files, 0, "").unwrap();
        assert_eq!(upload.parts, [Some(String::new()), None, Some("\"c\"".into())]);
        assert_eq!(Upload::open(&files).as_ref(), Some(&upload));
        upload.note(&files).unwrap();
        let file = dir.path().join(PARTS);
        let whole = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, whole + "1 \"b").unwrap();
        assert_eq!(Upload::open(&files), Some(upload));
        // What stands there may be anybody's; a number that no part has takes no memory.
        std::fs::write(
            &file,
            r#"{"url":"u","place":"p","md5":"m","part":1,"id":"i"}"#.to_owned() + "\n18446744073709551615 x\n",
        )
        .unwrap();
        assert_eq!(Upload::open(&files), None);
        Journal::clear(&files).unwrap();
        assert!(!file.exists());
    }
}
