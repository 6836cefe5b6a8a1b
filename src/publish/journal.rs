//! Record of completed steps, on the volume: a sidecar that restarts after a crash continues from there. Sessions of a
//! plain job write to the volume too, so every line is authenticated, and lines that are not authentic are treated as
//! absent.

use std::cell::OnceCell;
use std::io::Write;

use rustix::fs::{FileType, OFlags};
use serde_json::{Value, json};

use crate::error::{Attempt, Error, Result};
use crate::ims::id::Id;
use crate::publish::authentication::Seal;
use crate::publish::settings::Settings;
use crate::volume::layout::{PUBLICATION, READY, UPLOAD};
use crate::volume::signal_files::SignalFiles;

const LIMIT: u64 = 16 << 20;

/// A store takes no more parts than this of one object.
pub(crate) const MOST_PARTS: usize = 10_000;

/// Labels under which lines are authenticated, one for each file.
const JOURNAL: &str = "journal";
const KIND_OF_UPLOAD: &str = "upload";

/// Directory of the records, and the key that authenticates them.
pub(crate) struct Notes<'a> {
    files: &'a SignalFiles,
    settings: &'a Settings,
    /// Whether nobody else writes there.
    is_private: bool,
    /// Made when it is needed: it may come of a store that nothing is published in.
    seal: OnceCell<Seal>,
}

impl<'a> Notes<'a> {
    /// Notes of the job of `settings`, in the image root's parent.
    pub(crate) fn new(files: &'a SignalFiles, settings: &'a Settings) -> Self {
        Self { files, settings, is_private: false, seal: OnceCell::new() }
    }

    /// The same in a directory of our own, that nobody else writes to.
    pub(crate) fn private(files: &'a SignalFiles, settings: &'a Settings) -> Self {
        Self { is_private: true, ..Self::new(files, settings) }
    }

    fn seal(&self) -> Result<&Seal> {
        if let Some(seal) = self.seal.get() {
            return Ok(seal);
        }
        let made = Seal::of(self.settings, self.files.parent(), self.is_private)?;
        Ok(self.seal.get_or_init(|| made))
    }

    /// The text of a file; `None` if there is none, and nothing that could be one.
    fn text(&self, name: &str) -> Option<String> {
        let text = self.files.parent().read(name, LIMIT);
        let text = text.and_then(|text| String::from_utf8(text).map_err(std::io::Error::other));
        match text {
            Ok(text) => Some(text),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => {
                self.ignored(name, &e.to_string());
                None
            }
        }
    }

    /// Refuses what is no file in the place of one: it could not be replaced when the image is published.
    fn refuse_irregular(&self) -> Result<()> {
        for name in [PUBLICATION, UPLOAD] {
            let attempted = || format!("read {}", self.shown(name));
            let found = self.files.parent().look(name).attempt(attempted)?;
            if let Some(kind) = found.and_then(|found| irregular(FileType::from_raw_mode(found.st_mode))) {
                return Err(Error::new(attempted())
                    .because(format!("it is {kind}, expected a file"))
                    .advise("see who made it, and remove it"));
            }
        }
        Ok(())
    }

    fn ignored(&self, name: &str, why: &str) {
        tracing::warn!(
            "ignored {}: {why}; what was published in part before, if anything was, is left in the store",
            self.shown(name)
        );
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        self.files.parent().replace(name, text.as_bytes()).attempt(|| format!("write {}", self.shown(name)))
    }

    fn shown(&self, name: &str) -> String {
        format!("{}/{name}", self.files.path().display())
    }

    /// Removes all notes: everything is done, or rolled back.
    pub(crate) fn clear(&self) -> Result<()> {
        clear(self.files)
    }
}

/// What there is instead of a regular file.
fn irregular(kind: FileType) -> Option<&'static str> {
    match kind {
        FileType::RegularFile => None,
        FileType::Directory => Some("a directory"),
        FileType::Symlink => Some("a symbolic link"),
        FileType::Fifo => Some("a fifo"),
        _ => Some("a device or socket"),
    }
}

/// Returns whether something was published in part.
pub(crate) fn is_begun(files: &SignalFiles) -> Result<bool> {
    let found =
        files.parent().look(PUBLICATION).attempt(|| format!("look for {}/{PUBLICATION}", files.path().display()))?;
    Ok(found.is_some())
}

/// Removes whatever notes stand there.
pub(crate) fn clear(files: &SignalFiles) -> Result<()> {
    files.remove(UPLOAD)?;
    files.remove(PUBLICATION)
}

/// How far a sidecar was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Nothing has been done.
    Begun,
    /// The environment was told that it may open.
    Ready,
    /// The environment has ended well.
    Packing,
    /// The packed image is whole. Packed again it would be another one, of which no part has been sent.
    Packed,
    /// The job has ended: its image is published.
    Published,
    /// The job has ended: its image was marked failed.
    Failed,
}

const PHASES: [(Phase, &str); 6] = [
    (Phase::Begun, "begun"),
    (Phase::Ready, "ready"),
    (Phase::Packing, "packing"),
    (Phase::Packed, "packed"),
    (Phase::Published, "published"),
    (Phase::Failed, "failed"),
];

/// How far one job is.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Journal {
    /// How far the sidecar was.
    pub(crate) phase: Phase,
    /// Identifies the request for the new image's record, and is kept in its metadata; nothing until the request.
    pub(crate) request: Option<Id>,
    /// The new image.
    pub(crate) image: Option<Id>,
    /// Link of the new image's manifest, once that is uploaded.
    pub(crate) link: Option<Value>,
    /// Set once IMS may know the job as a success: until IMS says that it does not, nothing is rolled back.
    pub(crate) is_told: bool,
}

impl Journal {
    /// Reads how far this job is. Read once: from then on what is in memory counts, whatever becomes of the file.
    pub(crate) fn read(notes: &Notes) -> Result<Self> {
        let mut journal = Self { phase: Phase::Begun, request: None, image: None, link: None, is_told: false };
        notes.refuse_irregular()?;
        let Some(text) = notes.text(PUBLICATION) else { return Ok(journal) };
        // `prepare` of a pod that begins again takes it away: then everything before the packing is done again.
        let may_be_open = notes.files.stands(READY)?;
        let Some(authentic) = notes.seal()?.open(JOURNAL, &text) else {
            let claimed = text.find('{').and_then(|at| serde_json::from_str::<Value>(&text[at..]).ok());
            let is_of_another_job = claimed.is_some_and(|claimed| claimed["job"] != json!(notes.settings.job.id));
            if !is_of_another_job {
                notes.ignored(PUBLICATION, "this job's sidecar has not written it, or its keys have changed");
                // An environment that is open, or has ended, is not begun again. Who can write the file can create 'ready' too.
                journal.phase = if may_be_open { Phase::Ready } else { Phase::Begun };
            }
            return Ok(journal);
        };
        let fields: Value = serde_json::from_str(authentic).unwrap_or_default();
        let id = |id: &Value| id.as_str().and_then(Id::parse);
        let phase = PHASES.iter().find(|(_, name)| fields["phase"] == *name).map_or(Phase::Begun, |(phase, _)| *phase);
        journal.phase = if phase == Phase::Ready && !may_be_open { Phase::Begun } else { phase };
        journal.request = id(&fields["request"]);
        journal.image = id(&fields["image"]);
        journal.link = Some(fields["link"].clone()).filter(Value::is_object);
        journal.is_told = fields["told"] == true;
        Ok(journal)
    }

    /// Forgets the new image: it is published, rolled back, or not this job's.
    pub(crate) fn forget_image(&mut self) {
        (self.request, self.image, self.link, self.is_told) = (None, None, None, false);
    }

    /// Writes it down before what it tells is done.
    pub(crate) fn write(&self, notes: &Notes) -> Result<()> {
        let phase = PHASES.iter().find(|(phase, _)| *phase == self.phase).map_or("begun", |(_, name)| *name);
        let [request, image] = [&self.request, &self.image].map(|id| id.as_ref().map(Id::as_str));
        let (job, link, told) = (&notes.settings.job.id, &self.link, self.is_told);
        let text =
            json!({ "job": job, "phase": phase, "request": request, "image": image, "link": link, "told": told });
        notes.write(PUBLICATION, &notes.seal()?.line(JOURNAL, &text.to_string()))
    }
}

/// An object on its way to a store in parts.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Upload {
    /// Where it is to be.
    pub(crate) url: String,
    /// Its key in that store.
    pub(crate) place: String,
    /// What it comes to when it is whole.
    pub(crate) md5: String,
    /// How large each part is, but for the last one.
    pub(crate) part: u64,
    /// What the store calls it as long as it is in parts.
    pub(crate) id: String,
    /// The store's ETags of the parts that are there.
    pub(crate) parts: Vec<Option<String>>,
}

impl Upload {
    /// Reads what was noted, if anything was.
    pub(crate) fn read(notes: &Notes) -> Result<Option<Self>> {
        let Some(text) = notes.text(UPLOAD) else { return Ok(None) };
        let seal = notes.seal()?;
        let mut lines = text.split_inclusive('\n');
        let Some(first) = lines.next().and_then(|line| seal.open(KIND_OF_UPLOAD, line)) else {
            notes.ignored(UPLOAD, "this job's sidecar has not written it, or its keys have changed");
            return Ok(None);
        };
        let Some(mut upload) = Self::parse(first) else { return Ok(None) };
        let kind = upload.kind_of_part();
        for line in lines {
            // A line that was cut off, and one that somebody has added, is of a part that is sent again.
            let part = seal.open(&kind, line).and_then(|line| line.split_once(' '));
            let Some((number, mark)) = part else { continue };
            if let Some(number) = number.parse().ok().filter(|number| *number < MOST_PARTS) {
                upload.set(number, mark);
            }
        }
        Ok(Some(upload))
    }

    fn parse(line: &str) -> Option<Self> {
        let noted: Value = serde_json::from_str(line).ok()?;
        let text = |name: &str| noted[name].as_str().map(str::to_owned);
        let (url, place, md5, id) = (text("url")?, text("place")?, text("md5")?, text("id")?);
        Some(Self { url, place, md5, part: noted["part"].as_u64()?, id, parts: Vec::new() })
    }

    /// Notes it as it is.
    pub(crate) fn write(&self, notes: &Notes) -> Result<()> {
        let seal = notes.seal()?;
        let what = json!({ "url": self.url, "place": self.place, "md5": self.md5, "part": self.part, "id": self.id });
        let mut text = seal.line(KIND_OF_UPLOAD, &what.to_string());
        for (number, mark) in self.parts.iter().enumerate() {
            text += &mark.as_ref().map_or(String::new(), |mark| self.line(seal, number, mark));
        }
        notes.write(UPLOAD, &text)
    }

    /// Notes that a part is there. In one piece, and not waited for: it outlives this program, and need not outlive the machine.
    pub(crate) fn add(&mut self, notes: &Notes, number: usize, mark: &str) -> Result<()> {
        self.set(number, mark);
        let line = self.line(notes.seal()?, number, mark);
        let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::NOFOLLOW;
        let file = notes.files.parent().open_regular(UPLOAD, flags);
        // Somebody has removed it.
        file.and_then(|mut file| file.write_all(line.as_bytes())).or_else(|_| self.write(notes))
    }

    fn set(&mut self, number: usize, mark: &str) {
        self.parts.resize(self.parts.len().max(number + 1), None);
        self.parts[number] = Some(mark.to_owned());
    }

    fn line(&self, seal: &Seal, number: usize, mark: &str) -> String {
        seal.line(&self.kind_of_part(), &format!("{number} {mark}"))
    }

    fn kind_of_part(&self) -> String {
        format!("part of {}", self.id)
    }

    /// It is whole, or rolled back.
    pub(crate) fn clear(notes: &Notes) -> Result<()> {
        notes.files.remove(UPLOAD)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const IDS: [&str; 2] = ["46a2731e-a1d0-4f98-ba92-4f78c756bb12", "00000000-0000-4000-8000-000000000001"];

    fn settings(job: &str) -> Settings {
        let variables = [("IMS_JOB_ID", job), ("S3_ACCESS_KEY", "a"), ("S3_SECRET_KEY", "s"), ("S3_BUCKET", "b")];
        Settings::read(None, variables.map(|(n, v)| (n.into(), v.into()))).unwrap()
    }

    fn volume() -> (tempfile::TempDir, SignalFiles) {
        let dir = tempfile::tempdir().unwrap();
        let files = SignalFiles::open(dir.path()).unwrap().unwrap();
        (dir, files)
    }

    fn journal() -> Journal {
        let [a, b] = IDS.map(|id| Id::parse(id).unwrap());
        let link = Some(json!({ "path": "s3://b/p/manifest.json", "etag": "e", "type": "s3" }));
        Journal { phase: Phase::Packing, request: Some(a), image: Some(b), link, is_told: true }
    }

    fn upload() -> Upload {
        let [url, place, md5, id] = ["s3://b/p/k", "k", "d41d8", "an id"].map(str::to_owned);
        Upload { url, place, md5, part: 16, id, parts: vec![Some(String::new()), None, Some("\"c\"".into())] }
    }

    #[test]
    fn a_journal_is_read_by_the_same_job_alone() {
        let (_dir, files) = volume();
        let (ours, other) = (settings("7"), settings("8"));
        let notes = Notes::new(&files, &ours);
        let absent = Journal { phase: Phase::Begun, request: None, image: None, link: None, is_told: false };
        assert_eq!(Journal::read(&notes).unwrap(), absent);
        journal().write(&notes).unwrap();
        assert_eq!(Journal::read(&Notes::new(&files, &ours)).unwrap(), journal());
        files.touch(READY).unwrap();
        assert_eq!(Journal::read(&Notes::new(&files, &other)).unwrap(), absent);
        notes.clear().unwrap();
        assert_eq!(Journal::read(&notes).unwrap(), absent);
    }

    #[test]
    fn what_is_no_file_in_the_place_of_a_record_is_refused_at_the_start() {
        let ours = settings("7");
        for name in [PUBLICATION, UPLOAD] {
            for (make, kind) in [("mkdir", "a directory"), ("mkfifo", "a fifo"), ("ln -s /dev/zero", "a symbolic link")]
            {
                let (dir, files) = volume();
                let script = format!("{make} {name}");
                let made = std::process::Command::new("sh").args(["-c", &script]).current_dir(dir.path()).status();
                assert!(made.unwrap().success());
                let refused = Journal::read(&Notes::new(&files, &ours)).unwrap_err().to_string();
                assert!(refused.contains(name) && refused.contains(kind), "{refused}");
            }
        }
    }

    #[test]
    fn an_environment_that_may_be_open_is_not_begun_again_when_the_journal_is_forged() {
        let (dir, files) = volume();
        let ours = settings("7");
        let phase = || Journal::read(&Notes::new(&files, &ours)).unwrap().phase;
        let mut ready = journal();
        ready.phase = Phase::Ready;
        ready.write(&Notes::new(&files, &ours)).unwrap();
        assert_eq!(phase(), Phase::Begun, "a pod that begins again has no 'ready'");
        files.touch(READY).unwrap();
        assert_eq!(phase(), Phase::Ready);
        std::fs::write(dir.path().join(PUBLICATION), r#"x {"job":"7","phase":"packed","image":"../.."}"#).unwrap();
        assert_eq!(phase(), Phase::Ready);
        files.remove(READY).unwrap();
        assert_eq!(phase(), Phase::Begun);
    }

    #[test]
    fn parts_of_an_upload_are_read_but_for_a_line_that_was_cut_off() {
        let (dir, files) = volume();
        let ours = settings("7");
        let notes = Notes::new(&files, &ours);
        assert_eq!(Upload::read(&notes).unwrap(), None);
        let mut begun = Upload { parts: Vec::new(), ..upload() };
        begun.write(&notes).unwrap();
        begun.add(&notes, 2, "\"c\"").unwrap();
        begun.add(&notes, 0, "").unwrap();
        assert_eq!(begun, upload());
        assert_eq!(Upload::read(&notes).unwrap(), Some(upload()));
        let file = dir.path().join(UPLOAD);
        let whole = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, &whole[..whole.len() - 1]).unwrap();
        assert_eq!(Upload::read(&notes).unwrap().unwrap().parts, [None, None, Some("\"c\"".into())]);
        // Somebody removes it amid the upload.
        std::fs::remove_file(&file).unwrap();
        begun.add(&notes, 1, "b").unwrap();
        assert_eq!(Upload::read(&notes).unwrap(), Some(begun));
    }

    proptest! {
        /// Whatever one byte, or one line, is replaced by: what was written is read, or less of it, and never anything else.
        #[test]
        fn nothing_but_what_was_written_is_ever_read(
            at in 0.0..1.0_f64, byte: u8, inserted in proptest::option::of("[ -~\n]{0,80}"), cut: bool
        ) {
            let (dir, files) = volume();
            let ours = settings("7");
            let notes = Notes::new(&files, &ours);
            journal().write(&notes).unwrap();
            upload().write(&notes).unwrap();
            for name in [PUBLICATION, UPLOAD] {
                let file = dir.path().join(name);
                let mut text = std::fs::read(&file).unwrap();
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
                let at = (text.len() as f64 * at) as usize;
                match &inserted {
                    Some(inserted) => drop(text.splice(at..at, inserted.bytes())),
                    None if cut => text.truncate(at),
                    None => text[at] = byte,
                }
                std::fs::write(&file, text).unwrap();
            }
            let read = Journal::read(&notes).unwrap();
            prop_assert!(read == journal() || (read.image, read.request, read.phase) == (None, None, Phase::Begun));
            if let Some(read) = Upload::read(&notes).unwrap() {
                prop_assert_eq!(&Upload { parts: Vec::new(), ..read.clone() }, &Upload { parts: Vec::new(), ..upload() });
                for (number, mark) in read.parts.iter().enumerate() {
                    prop_assert!(mark.is_none() || upload().parts.get(number) == Some(mark));
                }
            }
        }
    }
}
