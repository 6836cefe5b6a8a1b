//! Identity of the source that an image root was made of, or that changes were made to: the same command must not go on with them on another
//! one that has taken its name.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
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

/// Kind of the record, which its seal covers.
const KIND: &str = "source";

/// A record is far smaller.
const LIMIT: u64 = 64 << 10;

/// So much of either end of a file tells it from others: of a squashfs the superblock with its times and its tables, of a compressed archive
/// the checksum.
const END: u64 = 64 << 10;

/// Properties that tell a source from another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// Path, or URL without its signature.
    source: String,
    /// Checksums that it was verified by.
    sums: Option<String>,
    size: u64,
    /// Time of its last change, of a file on this machine.
    modified: Option<String>,
    /// Digest of the ends of a file; inode number and birth time of a directory.
    content: String,
    /// Time at which it was recorded: that of the record's file.
    #[serde(skip)]
    recorded: Option<String>,
}

impl Identity {
    /// Identity of a source that is open, and was verified if checksums are expected.
    pub(crate) fn of(source: &Source, opened: &Opened, expected: &Expected) -> Result<Self> {
        let attempted = || format!("tell {} from other images", opened.shown.display());
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
                // A copy without a name is of now.
                let is_source = matches!(source, Source::Here(_)) && found.nlink() > 0;
                let modified = is_source.then(|| format!("{}.{}", found.mtime(), found.mtime_nsec()));
                (found.len(), modified, format!("file {content}"))
            }
        };
        Ok(Self { source: named(source), sums: sums(expected), size, modified, content, recorded: None })
    }

    /// Returns whether both are of the same image, under whatever path.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        if let (Some(ours), Some(theirs)) = (&self.sums, &other.sums) {
            return ours == theirs;
        }
        // Not the time: a copy of the same bytes, or touch, gives the file another one.
        self.size == other.size && self.content == other.content
    }

    /// Returns whether it is that of the directory `root`, whatever path that has by now.
    pub(crate) fn is_of(&self, root: &Tree) -> bool {
        let is_ours = |found: std::io::Result<String>| found.is_ok_and(|content| content == self.content);
        if !is_ours(of_directory(root)) {
            return false;
        }
        // A snapshot of the file system has all that tells a directory from others, but is not at its path.
        let Ok(there) = File::open(&self.source) else { return true };
        let place = |fd: BorrowedFd<'_>| rustix::fs::fstat(fd).map(|found| (found.st_dev, found.st_ino)).ok();
        place(there.as_fd()) == place(root.as_fd()) || !is_ours(of_directory(&there))
    }

    /// Warns of a file that is the same image, and has been written or copied since.
    pub(crate) fn tell_other_time(&self, now: &Self) {
        if self.sums.is_none()
            && let (Some(before), Some(modified)) = (&self.modified, &now.modified)
            && before != modified
        {
            tracing::warn!(
                "{} has another time than before, and the same size and content at both ends: going on with it",
                now.source
            );
        }
    }

    /// Tells how `now`, which is not the same, differs.
    fn difference(&self, now: &Self) -> String {
        match (&self.sums, &now.sums) {
            (Some(before), Some(sums)) => format!("verified by {before} before, and now by {sums}"),
            _ if self.size != now.size => format!("{} bytes before, and has now {}", self.size, now.size),
            _ if self.content.starts_with("directory") || now.content.starts_with("directory") => {
                "another directory, or a file, before".into()
            }
            _ => format!("{} bytes before as now, with another content", self.size),
        }
    }

    /// Returns whether it is what `source` names, as far as that can be told without fetching it.
    pub(crate) fn is_named(&self, source: &Source, expected: &Expected) -> bool {
        self.source == named(source) && sums(expected).is_none_or(|sums| self.sums.as_ref() == Some(&sums))
    }

    /// Path of the source, or its URL.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// Describes it for messages, with the time at which it was recorded.
    pub(crate) fn shown(&self) -> String {
        let size = if self.size == 0 { String::new() } else { format!(" ({} bytes)", self.size) };
        let time = self.recorded.as_ref().map_or_else(String::new, |time| format!(", {time}"));
        format!("{}{size}{time}", self.source)
    }
}

/// Text that tells a directory from another, under whatever path. The number of its device may change when the machine starts anew.
fn of_directory(directory: impl AsFd) -> std::io::Result<String> {
    let (inode, made) = inode_and_birth(directory)?;
    Ok(format!("directory {inode} {}.{}", made.0, made.1))
}

fn named(source: &Source) -> String {
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

/// The file that holds the identity.
pub(crate) struct Record<'a> {
    volume: &'a Tree,
    /// None in a directory that nobody else can write to, and where the job has no secret.
    seal: Option<Seal>,
}

impl<'a> Record<'a> {
    /// The record of `settings`' job on a volume. A volume that others write to could have one that they have written.
    pub(crate) fn on(volume: &'a Tree, settings: &Settings) -> Result<Self> {
        let found = rustix::fs::fstat(volume).attempt(|| format!("look at {}", volume.shown().display()))?;
        let is_private = found.st_uid == nix::unistd::geteuid().as_raw() && found.st_mode.trailing_zeros() >= 6;
        let is_sealed = !is_private && Seal::has_secret(settings);
        Ok(Self { volume, seal: is_sealed.then(|| Seal::of(settings, volume, false)).transpose()? })
    }

    /// The record in a directory of our own, that nobody else writes to.
    pub(crate) fn private(volume: &'a Tree) -> Self {
        Self { volume, seal: None }
    }

    /// Reads the identity; nothing if there is none, or somebody else has written it.
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

    /// Writes it down.
    pub(crate) fn write(&self, identity: &Identity) -> Result<()> {
        let text = json!(identity).to_string();
        let line = self.seal.as_ref().map_or_else(|| format!("{text}\n"), |seal| seal.line(KIND, &text));
        let attempted = || format!("write {}/{SOURCE}", self.volume.shown().display());
        self.volume.replace(SOURCE, line.as_bytes()).attempt(attempted)
    }

    /// Why one cannot go on with what is at `place`, which is of another source than `source`, or of an unknown one.
    pub(crate) fn refusal(place: &str, source: &Source, known: Option<&Identity>, now: Option<&Identity>) -> Error {
        let why = match known {
            Some(known) if known.source == named(source) => {
                let was = now.map_or_else(String::new, |now| format!(", which was {}", known.difference(now)));
                let time = known.recorded.as_ref().map_or_else(String::new, |time| format!(", {time}"));
                format!("it was made of what {} was before{time}{was}", known.source)
            }
            Some(known) => format!("it was made of {}", known.shown()),
            None => "it is there already, and nothing reliable says of what it was made".into(),
        };
        let advice = "--fresh drops it with all changes and begins anew ('enter --discard' drops it too); to go on with it, \
            give the source that it was made of";
        Error::new(format!("go on with {place} for {}", named(source))).because(why).advise(advice)
    }

    /// Removes it, with what it told of.
    pub(crate) fn remove(&self) -> Result<()> {
        self.volume.remove(SOURCE).attempt(|| format!("remove {}/{SOURCE}", self.volume.shown().display())).map(|_| ())
    }
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
    fn an_image_is_the_same_under_another_name_and_another_one_at_its_path_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("image");
        let any = Expected { md5: None, sha256: None };
        std::fs::write(&file, vec![1; 200_000]).unwrap();
        let before = of(&file, &any);
        let moved = dir.path().join("moved");
        std::fs::rename(&file, &moved).unwrap();
        assert!(before.is_same(&of(&moved, &any)));
        for (content, difference) in [
            (vec![1; 200_001], Some("200000 bytes before, and has now 200001")),
            ([vec![1; 199_999], vec![2]].concat(), Some("with another content")),
            (Vec::new(), Some("has now 0")),
            // A copy, with the time of when it was made.
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
    fn a_record_on_a_volume_of_others_is_believed_with_the_jobs_seal_alone() {
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
