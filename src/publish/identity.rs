//! Identity of the source from which an image root or changes were made. If another source has taken its path or URL
//! since, the same command must not continue with that image root or those changes.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{Attempt, Error, Result};
use crate::image::kind::{Content, Opened};
use crate::publish::authentication::Seal;
use crate::publish::settings::Settings;
use crate::publish::source::Source;
use crate::sys::tree::{Tree, inode_and_birth};
use crate::transfer::checksum::Expected;
use crate::transfer::without_query;
use crate::volume::layout::SOURCE;

/// Label under which the record is authenticated.
const KIND: &str = "source";

/// Maximum size of a record, in bytes.
const LIMIT: u64 = 64 << 10;

/// Number of bytes at each end of a file that identify it: a squashfs has its superblock with times and its tables
/// there, a compressed archive its checksum.
const END: u64 = 64 << 10;

/// Properties that distinguish one source from another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// Path, or URL without its signature.
    source: String,
    /// Checksums that the source was verified against.
    sums: Option<String>,
    size: u64,
    /// Time of modification, for a file on this machine.
    modified: Option<String>,
    /// For a file, a digest of its first and last bytes; for a directory, its inode number and birth time.
    content: String,
    /// Time at which the identity was recorded, from the time of modification of the record's file.
    #[serde(skip)]
    recorded: Option<String>,
}

impl Identity {
    /// Identity of an open source, which was verified if checksums are expected.
    pub(crate) fn of(source: &Source, opened: &Opened, expected: &Expected) -> Result<Self> {
        let attempted = || format!("identify {}", opened.shown.display());
        let (size, modified, content) = match &opened.content {
            Content::Directory(tree) => (0, None, of_directory(tree).attempt(attempted)?),
            Content::File(file) => {
                let found = file.metadata().attempt(attempted)?;
                let mut digest = digest::Context::new(&digest::SHA256);
                for at in [0, found.len().saturating_sub(END)] {
                    let mut bytes = vec![0; usize::try_from(END.min(found.len())).unwrap_or(0)];
                    file.read_exact_at(&mut bytes, at).attempt(attempted)?;
                    digest.update(&bytes);
                }
                let content = URL_SAFE_NO_PAD.encode(digest.finish());
                // A file without a name is a copy that was made just now, so its time means nothing.
                let is_source = matches!(source, Source::Here(_)) && found.nlink() > 0;
                let modified = is_source.then(|| format!("{}.{}", found.mtime(), found.mtime_nsec()));
                (found.len(), modified, format!("file {content}"))
            }
        };
        Ok(Self { source: named(source), sums: sums(expected), size, modified, content, recorded: None })
    }

    /// Returns whether both are the same image, whatever their paths.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        if let (Some(ours), Some(theirs)) = (&self.sums, &other.sums) {
            return ours == theirs;
        }
        // The time does not count: copying a file changes it.
        self.size == other.size && self.content == other.content
    }

    /// Returns whether this is the identity of the directory `root`, whatever its path now.
    pub(crate) fn is_of(&self, root: &Tree) -> bool {
        let is_ours = |found: std::io::Result<String>| found.is_ok_and(|content| content == self.content);
        if !is_ours(of_directory(root)) {
            return false;
        }
        // A directory in a snapshot of the file system has the same inode number and birth time. So if the recorded
        // path leads to such a directory, it must be `root` itself.
        let mut open = File::options();
        open.read(true).custom_flags(libc::O_DIRECTORY | libc::O_NONBLOCK);
        let Ok(there) = open.open(&self.source) else { return true };
        let place = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).map(|found| (found.st_dev, found.st_ino)).ok();
        place(there.as_fd()) == place(root.as_fd()) || !is_ours(of_directory(&there))
    }

    /// Warns that a file has another time although it is the same image: it was written again or copied since.
    pub(crate) fn tell_other_time(&self, now: Option<&Self>) {
        if self.sums.is_none()
            && let Some(now) = now
            && let (Some(before), Some(modified)) = (&self.modified, &now.modified)
            && before != modified
        {
            tracing::warn!(
                "{} has another time than before, but the same size and the same content at both ends: going on \
                 with it",
                now.source
            );
        }
    }

    /// Describes how `now` differs from this identity, given that they are not the same image.
    fn difference(&self, now: &Self) -> String {
        match (&self.sums, &now.sums) {
            (Some(before), Some(sums)) => format!("its checksum was {before}, and is now {sums}"),
            _ if self.size != now.size => format!("its size was {} bytes, and is now {}", self.size, now.size),
            _ if self.content.starts_with("directory") || now.content.starts_with("directory") => {
                "another directory, or a file, was there".into()
            }
            _ => format!("its size is still {} bytes, but its content differs", self.size),
        }
    }

    /// Returns whether this is the identity of `source`, as far as that can be decided without fetching it.
    pub(crate) fn is_named(&self, source: &Source, expected: &Expected) -> bool {
        self.source == named(source) && sums(expected).is_none_or(|sums| self.sums.as_ref() == Some(&sums))
    }

    /// Returns whether the source was fetched, and not a path of this machine.
    pub(crate) fn is_fetched(&self) -> bool {
        !Path::new(&self.source).is_absolute()
    }

    /// Path of the source, or its URL.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// Describes the source for messages, with the time at which the identity was recorded.
    pub(crate) fn shown(&self) -> String {
        let size = if self.size == 0 { String::new() } else { format!(" ({} bytes)", self.size) };
        let time = self.recorded.as_ref().map_or_else(String::new, |time| format!(", {time}"));
        format!("{}{size}{time}", self.source)
    }
}

/// Identity of a directory, whatever its path. The device number is not part of it, because it may change on a reboot.
fn of_directory(directory: impl AsFd) -> std::io::Result<String> {
    let (inode, made) = inode_and_birth(directory)?;
    Ok(format!("directory {inode} {}.{}", made.0, made.1))
}

pub(crate) fn named(source: &Source) -> String {
    match source {
        Source::Here(path) => std::path::absolute(path).unwrap_or_else(|_| path.clone()).display().to_string(),
        Source::Web(url) => without_query(url),
        Source::S3(bucket, key) => format!("s3://{bucket}/{key}"),
    }
}

fn sums(expected: &Expected) -> Option<String> {
    let all = [("md5", &expected.md5), ("sha256", &expected.sha256)];
    let all: Vec<_> = all.iter().filter_map(|(name, sum)| Some(format!("{name}={}", sum.as_ref()?))).collect();
    (!all.is_empty()).then(|| all.join(" "))
}

/// File that holds an identity.
pub(crate) struct Record<'a> {
    volume: &'a Tree,
    /// Authenticates the record; `None` in a directory that nobody else can reach, and for a job without a secret.
    seal: Option<Seal>,
}

impl<'a> Record<'a> {
    /// Record of the job of `settings` on a volume. It is sealed if others can reach the volume.
    pub(crate) fn on(volume: &'a Tree, settings: &Settings) -> Result<Self> {
        Ok(Self { volume, seal: seal_of(volume, settings)? })
    }

    /// Record in a directory that nobody else writes to.
    pub(crate) fn private(volume: &'a Tree) -> Self {
        Self { volume, seal: None }
    }

    /// Reads the identity; `None` if there is none, or if somebody else wrote it.
    pub(crate) fn read(&self) -> Option<Identity> {
        let text = String::from_utf8(self.volume.read(SOURCE, LIMIT).ok()?).ok()?;
        let line = match &self.seal {
            Some(seal) => seal.open(KIND, &text)?,
            None => &text,
        };
        let identity: Identity = serde_json::from_str(line).ok()?;
        let written = self.volume.look(SOURCE).ok()?.and_then(|found| u64::try_from(found.st_mtime).ok());
        let written = written.map(|seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        let recorded = written.map(|time| humantime::format_rfc3339_seconds(time).to_string());
        Some(Identity { recorded, ..identity })
    }

    /// Returns whether only this job can have written what [`Record::read`] returns.
    pub(crate) fn is_sealed(&self) -> bool {
        self.seal.is_some()
    }

    /// Writes the identity.
    pub(crate) fn write(&self, identity: &Identity) -> Result<()> {
        let text = json!(identity).to_string();
        let line = self.seal.as_ref().map_or_else(|| format!("{text}\n"), |seal| seal.line(KIND, &text));
        let attempted = || format!("write {}/{SOURCE}", self.volume.shown().display());
        self.volume.replace(SOURCE, line.as_bytes()).attempt(attempted)
    }

    /// Error for `place`, which was made from another source than `source`, or from an unknown one.
    pub(crate) fn refusal(place: &str, source: &Source, known: Option<&Identity>, now: Option<&Identity>) -> Error {
        let why = match known {
            Some(known) if known.source == named(source) => {
                let was = now.map_or_else(String::new, |now| format!("; {}", known.difference(now)));
                let time = known.recorded.as_ref().map_or_else(String::new, |time| format!(", {time}"));
                format!("it was made of an earlier version of {}{time}{was}", known.source)
            }
            Some(known) => format!("it was made of {}", known.shown()),
            None => "it is there already, and no reliable record says what it was made of".into(),
        };
        let advice = "--fresh drops it with all changes and begins anew; to go on with it, give the source that it was made \
            of";
        Error::new(format!("go on with {place} for {}", named(source))).because(why).advise(advice)
    }

    /// Removes the record.
    pub(crate) fn remove(&self) -> Result<()> {
        self.volume.remove(SOURCE).attempt(|| format!("remove {}/{SOURCE}", self.volume.shown().display())).map(|_| ())
    }
}

/// Seal for records of the job of `settings` on a volume; `None` if nobody else can reach the volume, or if the job has
/// no secret.
fn seal_of(volume: &Tree, settings: &Settings) -> Result<Option<Seal>> {
    let is_sealed = Seal::has_secret(settings) && !is_own(volume, settings, 0o077)?;
    is_sealed.then(|| Seal::of(settings, volume, false)).transpose()
}

/// Returns whether the volume is that of a pod, whose other containers write to it.
pub(crate) fn is_in_pod(settings: &Settings) -> bool {
    settings.job.id.is_some() || settings.job.action.is_some()
}

/// Returns whether only programs of this user can have written the records in `directory`: the directory belongs to
/// this user, and its mode has none of the bits `closed`. In a pod this is never certain, because sessions of other
/// containers are root as well.
pub(crate) fn is_own(directory: &Tree, settings: &Settings, closed: u32) -> Result<bool> {
    let found = rustix::fs::fstat(directory).attempt(|| format!("look at {}", directory.shown().display()))?;
    Ok(!is_in_pod(settings) && found.st_uid == nix::unistd::geteuid().as_raw() && found.st_mode & closed == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn of(path: &Path, expected: &Expected) -> Identity {
        Identity::of(&Source::Here(path.to_owned()), &Opened::open(path).unwrap(), expected).unwrap()
    }

    fn settings(secret: &str) -> Settings {
        let variables = [("S3_ACCESS_KEY", "a"), ("S3_SECRET_KEY", secret), ("S3_BUCKET", "b")];
        let given = variables.into_iter().filter(|(_, value)| !value.is_empty() && !secret.is_empty());
        Settings::read(None, given.map(|(n, v)| (n.into(), v.into()))).unwrap()
    }

    #[test]
    fn identity_follows_a_renamed_image_and_not_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("image");
        let any = Expected { md5: None, sha256: None };
        std::fs::write(&file, vec![1; 200_000]).unwrap();
        let before = of(&file, &any);
        let moved = dir.path().join("moved");
        std::fs::rename(&file, &moved).unwrap();
        assert!(before.is_same(&of(&moved, &any)));
        for (content, difference) in [
            (vec![1; 200_001], Some("its size was 200000 bytes, and is now 200001")),
            ([vec![1; 199_999], vec![2]].concat(), Some("its content differs")),
            (Vec::new(), Some("is now 0")),
            // A copy with a time of its own.
            (vec![1; 200_000], None),
        ] {
            std::fs::write(&file, content).unwrap();
            let now = of(&file, &any);
            assert_eq!(before.is_same(&now), difference.is_none());
            assert!(difference.is_none_or(|difference| before.difference(&now).contains(difference)));
        }
        let sums = |sum: &str| Expected { md5: None, sha256: Some(sum.into()) };
        assert!(of(&file, &sums("a")).is_same(&of(&moved, &sums("a"))), "verified by the same checksum");
        assert!(!of(&file, &sums("a")).is_same(&of(&file, &sums("b"))));
        let other = dir.path().join("tree");
        std::fs::create_dir(&other).unwrap();
        assert!(!of(dir.path(), &any).is_same(&of(&other, &any)));
    }

    #[test]
    fn record_on_a_shared_volume_is_believed_only_with_the_jobs_seal() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let volume = Tree::open(dir.path()).unwrap();
        let mode = |bits| std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(bits)).unwrap();
        let identity = of(dir.path(), &Expected { md5: None, sha256: None });
        let (ours, theirs, none) = (settings("ours"), settings("theirs"), settings(""));
        let read = |settings: &Settings| {
            let read = Record::on(&volume, settings).unwrap().read()?;
            assert!(read.recorded.is_some());
            Some(Identity { recorded: None, ..read })
        };
        mode(0o777);
        Record::on(&volume, &none).unwrap().write(&identity).unwrap();
        assert_eq!(Record::on(&volume, &ours).unwrap().read(), None, "anybody could have written it");
        assert_eq!(read(&none), Some(identity.clone()));
        Record::on(&volume, &ours).unwrap().write(&identity).unwrap();
        assert_eq!(read(&ours), Some(identity.clone()));
        assert_eq!(Record::on(&volume, &theirs).unwrap().read(), None);
        mode(0o700);
        Record::on(&volume, &ours).unwrap().write(&identity).unwrap();
        assert_eq!(read(&theirs), Some(identity));
    }
}
