//! Journal on the volume: records the progress of a job, so that a sidecar that restarts after a crash continues from
//! there. Sessions of a plain job can write to the volume too, so every line is authenticated, and a line that is not
//! authentic is ignored.

use std::cell::OnceCell;
use std::io::Write;

use rustix::fs::{FileType, OFlags};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{Attempt, Error, Result};
use crate::ims::id::Id;
use crate::ims::records::Link;
use crate::publish::authentication::Seal;
use crate::publish::settings::Settings;
use crate::volume::layout::{PUBLICATION, READY, UPLOAD};
use crate::volume::signal_files::SignalFiles;

const LIMIT: u64 = 16 << 20;

/// Maximum number of parts of one multipart upload.
pub(crate) const MOST_PARTS: usize = 10_000;

/// Label under which the line of the journal is authenticated.
const JOURNAL: &str = "journal";
/// Label under which the first line of an upload's record is authenticated.
const KIND_OF_UPLOAD: &str = "upload";

/// Directory of the journal, and the key that authenticates it.
pub(crate) struct JournalDirectory<'a> {
    files: &'a SignalFiles,
    settings: &'a Settings,
    /// True if nobody else writes to the directory.
    is_private: bool,
    /// The seal, created on first use: its key may be kept in a store, which need not exist if nothing is published.
    seal: OnceCell<Seal>,
}

impl<'a> JournalDirectory<'a> {
    /// Directory of the job of `settings`, in the image root's parent.
    pub(crate) fn new(files: &'a SignalFiles, settings: &'a Settings) -> Self {
        Self { files, settings, is_private: false, seal: OnceCell::new() }
    }

    /// Like [`Self::new`], for a directory that nobody else writes to.
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

    /// Text of a file; `None` if the file cannot be read. Warns then, unless the file is missing.
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

    /// Refuses directories and special files in place of the journal: they could not be replaced later, when the image
    /// is published.
    fn refuse_irregular(&self) -> Result<()> {
        for name in [PUBLICATION, UPLOAD] {
            let attempted = || format!("read {}", self.shown(name));
            let found = self.files.parent().look(name).attempt(attempted)?;
            if let Some(kind) = found.and_then(|found| irregular(FileType::from_raw_mode(found.st_mode))) {
                return Err(Error::new(attempted())
                    .because(format!("it is {kind}, expected a file"))
                    .advise("find out who created it, and remove it"));
            }
        }
        Ok(())
    }

    fn ignored(&self, name: &str, why: &str) {
        tracing::warn!("ignored {}: {why}; an image that was published in part is left in the store", self.shown(name));
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        self.files.parent().replace(name, text.as_bytes()).attempt(|| format!("write {}", self.shown(name)))
    }

    fn shown(&self, name: &str) -> String {
        format!("{}/{name}", self.files.path().display())
    }

    /// Removes the journal, once everything is done or rolled back.
    pub(crate) fn clear(&self) -> Result<()> {
        clear(self.files)
    }
}

/// Name of a file type other than a regular file.
fn irregular(kind: FileType) -> Option<&'static str> {
    match kind {
        FileType::RegularFile => None,
        FileType::Directory => Some("a directory"),
        FileType::Symlink => Some("a symbolic link"),
        FileType::Fifo => Some("a fifo"),
        _ => Some("a device or socket"),
    }
}

/// Returns whether there is a journal, which means that an image was published in part.
pub(crate) fn is_begun(files: &SignalFiles) -> Result<bool> {
    let found =
        files.parent().look(PUBLICATION).attempt(|| format!("look for {}/{PUBLICATION}", files.path().display()))?;
    Ok(found.is_some())
}

/// Outcome of the job of `settings` according to the journal, if the job has ended. Anybody may have written the
/// journal, so the result is good enough only for a message.
pub(crate) fn ended(files: &SignalFiles, settings: &Settings) -> Option<&'static str> {
    #[derive(Deserialize)]
    struct End {
        job: Option<String>,
        phase: Phase,
    }
    let text = String::from_utf8(files.parent().read(PUBLICATION, LIMIT).ok()?).ok()?;
    let end = serde_json::from_str::<End>(&text[text.find('{')?..]).ok()?;
    match end.phase {
        _ if end.job != settings.job.id => None,
        Phase::Failed => Some("its image was marked failed"),
        Phase::Published => Some("its image is published"),
        _ => None,
    }
}

/// Removes the journal, whoever wrote it. A directory in its place, which is never ours, is renamed.
pub(crate) fn clear(files: &SignalFiles) -> Result<()> {
    files.retract(UPLOAD)?;
    files.retract(PUBLICATION)
}

/// Progress of a sidecar.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Phase {
    /// Nothing has been done.
    #[default]
    Begun,
    /// The environment may open.
    Ready,
    /// The environment has closed, and the image was not marked failed.
    Packing,
    /// The image is packed. It must not be packed again: this would give other bytes, with which a begun upload could
    /// not continue.
    Packed,
    /// The job has ended: its image is published.
    Published,
    /// The job has ended: its image was marked failed.
    Failed,
}

/// Progress of one job.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Journal {
    job: Option<String>,
    /// Progress of the sidecar.
    pub(crate) phase: Phase,
    /// ID of the request that creates the image's record; the record has this ID in its metadata. `None` before the
    /// request.
    pub(crate) request: Option<Id>,
    /// ID of the new image.
    pub(crate) image: Option<Id>,
    /// Link to the manifest, once that is uploaded.
    pub(crate) link: Option<Link>,
    /// True if this run has set the link, or has found the link set to an image that equals its own. A link in the
    /// journal alone is no proof: with a restored journal, the image may have been published long ago.
    #[serde(skip)]
    pub(crate) is_own_link: bool,
    /// True if IMS may have recorded the job as a success. Nothing is rolled back then, until IMS says otherwise.
    #[serde(rename = "told")]
    pub(crate) is_told: bool,
}

/// The job that a journal names, as read from a journal that cannot be authenticated.
#[derive(Deserialize)]
struct Claim {
    job: Option<String>,
}

impl Journal {
    /// Reads the journal of this job. Call it once: from then on the value in memory counts, even if the file is
    /// changed.
    pub(crate) fn read(directory: &JournalDirectory) -> Result<Self> {
        let job = &directory.settings.job.id;
        let new = Self { job: job.clone(), ..Self::default() };
        directory.refuse_irregular()?;
        let Some(text) = directory.text(PUBLICATION) else { return Ok(new) };
        // `prepare` removes 'ready' when a pod starts over; then every phase before packing starts over, too.
        let may_be_open = directory.files.stands(READY)?;
        let read = directory.seal()?.open(JOURNAL, &text).and_then(|line| serde_json::from_str::<Self>(line).ok());
        if let Some(mut journal) = read {
            if journal.phase == Phase::Ready && !may_be_open {
                journal.phase = Phase::Begun;
            }
            return Ok(journal);
        }
        let claim = text.find('{').and_then(|at| serde_json::from_str::<Claim>(&text[at..]).ok());
        if claim.is_some_and(|claim| claim.job != *job) {
            return Ok(new);
        }
        directory.ignored(PUBLICATION, "this job's sidecar has not written it, or its keys have changed");
        // If 'ready' is there, the environment is open or has closed, so do not start it again. Forging the journal
        // gains nothing here, since a forger can create 'ready' too.
        Ok(Self { phase: if may_be_open { Phase::Ready } else { Phase::Begun }, ..new })
    }

    /// Removes the new image from the journal, because it is published, rolled back, or not this job's.
    pub(crate) fn forget_image(&mut self) {
        (self.request, self.image, self.link) = (None, None, None);
        (self.is_own_link, self.is_told) = (false, false);
    }

    /// Writes the journal. Call it before the step that it records.
    pub(crate) fn write(&self, directory: &JournalDirectory) -> Result<()> {
        directory.write(PUBLICATION, &directory.seal()?.line(JOURNAL, &json!(self).to_string()))
    }
}

/// Multipart upload of an object.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Upload {
    /// URL of the object.
    pub(crate) url: String,
    /// Key of the object in its store.
    pub(crate) place: String,
    /// MD5 of the whole object.
    pub(crate) md5: String,
    /// Size of each part but the last, in bytes.
    pub(crate) part: u64,
    /// ID of the upload in the store.
    pub(crate) id: String,
    /// ETags of the uploaded parts.
    #[serde(skip)]
    pub(crate) parts: Vec<Option<String>>,
}

impl Upload {
    /// Reads the recorded upload, if there is one.
    pub(crate) fn read(directory: &JournalDirectory) -> Result<Option<Self>> {
        let Some(text) = directory.text(UPLOAD) else { return Ok(None) };
        let seal = directory.seal()?;
        let mut lines = text.split_inclusive('\n');
        let Some(first) = lines.next().and_then(|line| seal.open(KIND_OF_UPLOAD, line)) else {
            directory.ignored(UPLOAD, "this job's sidecar has not written it, or its keys have changed");
            return Ok(None);
        };
        let Ok(mut upload) = serde_json::from_str::<Self>(first) else { return Ok(None) };
        let kind = upload.kind_of_part();
        for line in lines {
            // Ignore a truncated last line and lines that somebody else added. Their parts are sent again.
            let part = seal.open(&kind, line).and_then(|line| line.split_once(' '));
            let Some((number, etag)) = part else { continue };
            if let Some(number) = number.parse().ok().filter(|number| *number < MOST_PARTS) {
                upload.set(number, etag);
            }
        }
        Ok(Some(upload))
    }

    /// Records the upload with its parts.
    pub(crate) fn write(&self, directory: &JournalDirectory) -> Result<()> {
        let seal = directory.seal()?;
        let mut text = seal.line(KIND_OF_UPLOAD, &json!(self).to_string());
        for (number, etag) in self.parts.iter().enumerate() {
            text += &etag.as_ref().map_or(String::new(), |etag| self.line(seal, number, etag));
        }
        directory.write(UPLOAD, &text)
    }

    /// Records an uploaded part. Appends one line and does not sync: the line has to outlive this process, but need not
    /// outlive the machine.
    pub(crate) fn add(&mut self, directory: &JournalDirectory, number: usize, etag: &str) -> Result<()> {
        self.set(number, etag);
        let line = self.line(directory.seal()?, number, etag);
        let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::NOFOLLOW;
        let file = directory.files.parent().open_regular(UPLOAD, flags);
        // Somebody may have removed the file. If so, write a new one.
        file.and_then(|mut file| file.write_all(line.as_bytes())).or_else(|_| self.write(directory))
    }

    fn set(&mut self, number: usize, etag: &str) {
        self.parts.resize(self.parts.len().max(number + 1), None);
        self.parts[number] = Some(etag.to_owned());
    }

    fn line(&self, seal: &Seal, number: usize, etag: &str) -> String {
        seal.line(&self.kind_of_part(), &format!("{number} {etag}"))
    }

    fn kind_of_part(&self) -> String {
        format!("part of {}", self.id)
    }

    /// Removes the record, because the object is complete or the upload was aborted.
    pub(crate) fn clear(directory: &JournalDirectory) -> Result<()> {
        directory.files.remove(UPLOAD)
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
        let link = Some(Link::new("s3://b/p/manifest.json".into(), "e".into()));
        let job = Some("7".into());
        Journal {
            job,
            phase: Phase::Packing,
            request: Some(a),
            image: Some(b),
            link,
            is_own_link: false,
            is_told: true,
        }
    }

    fn upload() -> Upload {
        let [url, place, md5, id] = ["s3://b/p/k", "k", "d41d8", "an id"].map(str::to_owned);
        Upload { url, place, md5, part: 16, id, parts: vec![Some(String::new()), None, Some("\"c\"".into())] }
    }

    #[test]
    fn journal_is_read_by_its_own_job_only() {
        let (_dir, files) = volume();
        let (ours, other) = (settings("7"), settings("8"));
        let directory = JournalDirectory::new(&files, &ours);
        let absent = |job: &str| Journal { job: Some(job.into()), ..Journal::default() };
        assert_eq!(Journal::read(&directory).unwrap(), absent("7"));
        journal().write(&directory).unwrap();
        assert_eq!(Journal::read(&JournalDirectory::new(&files, &ours)).unwrap(), journal());
        files.touch(READY).unwrap();
        assert_eq!(Journal::read(&JournalDirectory::new(&files, &other)).unwrap(), absent("8"));
        directory.clear().unwrap();
        assert_eq!(Journal::read(&directory).unwrap(), absent("7"));
    }

    #[test]
    fn special_files_in_place_of_the_journal_are_refused_at_start() {
        let ours = settings("7");
        for name in [PUBLICATION, UPLOAD] {
            for (make, kind) in [("mkdir", "a directory"), ("mkfifo", "a fifo"), ("ln -s /dev/zero", "a symbolic link")]
            {
                let (dir, files) = volume();
                let script = format!("{make} {name}");
                let made = std::process::Command::new("sh").args(["-c", &script]).current_dir(dir.path()).status();
                assert!(made.unwrap().success());
                let refused = Journal::read(&JournalDirectory::new(&files, &ours)).unwrap_err().to_string();
                assert!(refused.contains(name) && refused.contains(kind), "{refused}");
            }
        }
    }

    #[test]
    fn forged_journal_does_not_restart_an_environment_that_may_be_open() {
        let (dir, files) = volume();
        let ours = settings("7");
        let phase = || Journal::read(&JournalDirectory::new(&files, &ours)).unwrap().phase;
        let mut ready = journal();
        ready.phase = Phase::Ready;
        ready.write(&JournalDirectory::new(&files, &ours)).unwrap();
        assert_eq!(phase(), Phase::Begun, "a pod that starts over has no 'ready'");
        files.touch(READY).unwrap();
        assert_eq!(phase(), Phase::Ready);
        std::fs::write(dir.path().join(PUBLICATION), r#"x {"job":"7","phase":"packed","image":"../.."}"#).unwrap();
        assert_eq!(phase(), Phase::Ready);
        files.remove(READY).unwrap();
        assert_eq!(phase(), Phase::Begun);
    }

    #[test]
    fn uploaded_parts_are_read_except_a_truncated_line() {
        let (dir, files) = volume();
        let ours = settings("7");
        let directory = JournalDirectory::new(&files, &ours);
        assert_eq!(Upload::read(&directory).unwrap(), None);
        let mut begun = Upload { parts: Vec::new(), ..upload() };
        begun.write(&directory).unwrap();
        begun.add(&directory, 2, "\"c\"").unwrap();
        begun.add(&directory, 0, "").unwrap();
        assert_eq!(begun, upload());
        assert_eq!(Upload::read(&directory).unwrap(), Some(upload()));
        let file = dir.path().join(UPLOAD);
        let whole = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, &whole[..whole.len() - 1]).unwrap();
        assert_eq!(Upload::read(&directory).unwrap().unwrap().parts, [None, None, Some("\"c\"".into())]);
        // Somebody removes the file during the upload.
        std::fs::remove_file(&file).unwrap();
        begun.add(&directory, 1, "b").unwrap();
        assert_eq!(Upload::read(&directory).unwrap(), Some(begun));
    }

    proptest! {
        /// Replaces a byte, inserts text, or truncates; only lines that were written may be read back.
        #[test]
        fn damaged_or_forged_lines_are_never_read(
            at in 0.0..1.0_f64, byte: u8, inserted in proptest::option::of("[ -~\n]{0,80}"), cut: bool
        ) {
            let (dir, files) = volume();
            let ours = settings("7");
            let directory = JournalDirectory::new(&files, &ours);
            journal().write(&directory).unwrap();
            upload().write(&directory).unwrap();
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
            let read = Journal::read(&directory).unwrap();
            prop_assert!(read == journal() || (read.image, read.request, read.phase) == (None, None, Phase::Begun));
            if let Some(read) = Upload::read(&directory).unwrap() {
                let without_parts = |upload: &Upload| Upload { parts: Vec::new(), ..upload.clone() };
                prop_assert_eq!(without_parts(&read), without_parts(&upload()));
                for (number, etag) in read.parts.iter().enumerate() {
                    prop_assert!(etag.is_none() || upload().parts.get(number) == Some(etag));
                }
            }
        }
    }
}
