//! Records which image root an image was packed from: with the kernel and initrd of another one, the image would not
//! boot. The record is no proof, because anybody who can write to its directory can also replace the packed image.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, Stat, XattrFlags};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{Attempt, Error, Result};
use crate::image::exclude::Pattern;
use crate::image::packing::{self, Archive, Packed, Packer};
use crate::image::state::State;
use crate::image::unchanged::Source;
use crate::publish::identity;
use crate::publish::settings::Settings;
use crate::sys::file_kind::FileKind;
use crate::sys::tree::{Tree, inode_and_birth};
use crate::transfer::Work;
use crate::volume::layout::{ARCHIVE, PACKED};

/// Maximum size of the record, in bytes.
const LIMIT: u64 = 64 << 10;
/// Maximum number of archives in the record.
const MOST: usize = 64;

/// Time to wait while another run writes the record.
const TIME_TO_RECORD: Duration = Duration::from_secs(30);

/// An archive that was packed.
#[derive(Serialize, Deserialize)]
struct Entry {
    /// Path of the archive. Earlier releases recorded only its name; the archive is then in the directory of the
    /// record.
    #[serde(alias = "name")]
    file: PathBuf,
    archive: String,
    image_root: String,
    /// The image root's [`State`] when it was packed; earlier releases did not record it.
    state: Option<String>,
    /// The archive's SHA-256; earlier releases did not record it.
    sha256: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Record {
    Archives {
        archives: Vec<Entry>,
    },
    /// Written by earlier releases.
    Last(Entry),
}

/// Extended attribute of an archive that says what it was packed from. Unlike the record, it stays with an archive that
/// is moved. Its value includes the inode number, so that a copy of the attribute on another file does not count.
const MARK: &str = "trusted.ims-sshd.packed";

/// Records in `directory` that `packed`, which is `archive`, was packed from `image_root`, whose [`State`] was `was`
/// then.
fn record(
    work: &Work,
    directory: &Tree,
    archive: &Archive,
    (packed, sha256): (&File, String),
    image_root: &Tree,
    was: String,
) -> Result<()> {
    let record = Archive { directory, name: PACKED };
    let attempted = || format!("write {}", record.shown());
    let new = Entry {
        file: archive.directory.shown().join(archive.name),
        archive: archive_identity(packed).attempt(attempted)?,
        image_root: root_identity(image_root).attempt(attempted)?.0,
        state: Some(was),
        sha256: Some(sha256),
    };
    // Some file systems have no such attributes, so ignore errors; the record suffices.
    let _ = rustix::fs::fsetxattr(packed, MARK, new.mark().as_bytes(), XattrFlags::empty());
    // Runs that record in one directory take turns. Otherwise each would overwrite an entry that the other has added.
    let mut file = record.create_part(work, TIME_TO_RECORD)?;
    let mut archives = read(directory);
    archives.retain(|earlier| earlier.file != new.file);
    archives.drain(..archives.len().saturating_sub(MOST - 1));
    archives.push(new);
    let written = writeln!(file, "{}", json!(Record::Archives { archives }))
        .and_then(|()| file.sync_all())
        .and_then(|()| directory.rename(&record.part(), PACKED))
        // Change the mode only now: before, another run would have taken the `.part` file for somebody else's.
        .and_then(|()| Ok(rustix::fs::fchmod(&file, Mode::from_raw_mode(0o644))?));
    if written.is_err() {
        let _ = directory.remove(record.part());
    }
    written.attempt(attempted)
}

impl Entry {
    fn mark(&self) -> String {
        format!("{}; {}", self.archive, self.image_root)
    }
}

/// [`State`] of a tree.
pub(crate) fn state(tree: &Tree) -> Result<String> {
    let mut state = State::new();
    let walked = tree.walk(|path, _, _, found| {
        state.add(path, found);
        Ok(())
    });
    walked.attempt(|| format!("look through {}", tree.shown().display()))?;
    Ok(state.finish())
}

/// Packs `image_root` into `archive`, and records that in `directory`. Returns the packed file, and the error if it
/// could not be recorded.
pub(crate) fn pack(
    work: &Work,
    directory: &Tree,
    image_root: &Tree,
    archive: &Archive,
    settings: &Settings,
    exclude: &[Pattern],
    source: Option<&Source>,
) -> Result<(File, Result<()>)> {
    let packing = &settings.packing;
    // Without excluded paths, our own packer reports the state of what it packs. In other cases, determine the state
    // before packing, so that changes during the packing are noticed later.
    let is_told = packing.packer == Packer::Own && exclude.is_empty();
    let was = (!is_told).then(|| state(image_root)).transpose();
    let Packed { file, state, sha256 } = packing::pack(work, image_root, archive, packing, exclude, source)?;
    let lost = || Error::new(format!("record {}", archive.shown())).because("its state was not told");
    let was = was.and_then(|was| was.or(state).ok_or_else(lost));
    let recorded = was.and_then(|was| record(work, directory, archive, (&file, sha256), image_root, was));
    Ok((file, recorded))
}

/// Refuses to replace a file that has the name of `archive`, unless it was packed from the same `image_root`.
pub(crate) fn refuse_to_replace(directory: &Tree, archive: &Archive, image_root: &Tree) -> Result<()> {
    let attempted = || format!("pack {} into {}", image_root.shown().display(), archive.shown());
    let refused = |why: &str| {
        let advice = "name another file with --archive, or remove this one";
        Err(Error::new(attempted()).because(why).advise(advice))
    };
    let Some(found) = archive.directory.look(archive.name).attempt(attempted)? else { return Ok(()) };
    let kind = FileKind::of(&found);
    if kind != FileKind::Regular {
        return refused(&format!("it is {kind}"));
    }
    let file = archive.open()?;
    let there = archive_identity(&file).attempt(attempted)?;
    let wanted = format!("{there}; {}", root_identity(image_root).attempt(attempted)?.0);
    let mut mark = [0; 256];
    let length = rustix::fs::fgetxattr(&file, MARK, &mut mark[..]).unwrap_or(0);
    let is_marked = mark.get(..length) == Some(wanted.as_bytes());
    if is_marked || read(directory).iter().any(|packed| packed.mark() == wanted) {
        return Ok(());
    }
    refused("the file exists, and was not packed from this image root")
}

/// Refuses an `archive` that would replace the file from which the image root was made. `advice` says how to choose
/// another archive.
pub(crate) fn refuse_source(directory: &Tree, archive: &Archive, settings: &Settings, advice: &str) -> Result<()> {
    let Some(source) = identity::Record::on(directory, settings)?.read() else { return Ok(()) };
    let source = if source.is_fetched() { directory.shown().join(ARCHIVE) } else { source.source().into() };
    let attempted = || format!("pack into {}", archive.shown());
    let found = archive.directory.look(archive.name).attempt(attempted)?;
    let is_same = |found: &Stat| {
        let source = std::fs::symlink_metadata(&source);
        source.is_ok_and(|source| (source.dev(), source.ino()) == (found.st_dev, found.st_ino))
    };
    if !found.as_ref().is_some_and(is_same) {
        return Ok(());
    }
    Err(Error::new(attempted()).because("the image root was made from this file").advise(advice))
}

/// Refuses to publish `packed`, which is `archive`, with the boot files of `image_root` if it was packed from another
/// image root. If there is no record, since another program packed it, `packed` must not be older than the image root.
pub(crate) fn check(directory: &Tree, archive: &Archive, packed: &File, image_root: &Tree) -> Result<()> {
    let attempted = || format!("publish {} with the kernel of {}", archive.shown(), image_root.shown().display());
    let refused = |why| {
        let advice = "'ims-sshd package' packs this image root";
        Err(Error::new(attempted()).because(why).advise(advice))
    };
    let (root, made) = root_identity(image_root).attempt(attempted)?;
    match recorded(directory, packed) {
        Some(record) if record.image_root == root => Ok(()),
        Some(_) => refused("it was packed from another image root"),
        None if written(packed).attempt(attempted)? < made => refused("it was written before the image root was made"),
        None => Ok(()),
    }
}

/// Refuses to publish `packed`, which is `archive`, if `image_root` was changed since. Accepts an archive without a
/// record, because another program may have packed it.
pub(crate) fn check_unchanged(directory: &Tree, archive: &Archive, packed: &File, image_root: &Tree) -> Result<()> {
    let Some(was) = recorded(directory, packed).and_then(|record| record.state) else { return Ok(()) };
    if state(image_root)? == was {
        return Ok(());
    }
    Err(Error::new(format!("publish {}", archive.shown()))
        .because(format!("{} was changed since it was packed", image_root.shown().display()))
        .advise("'ims-sshd package' packs it again"))
}

/// SHA-256 of `packed` when it was packed, if that is recorded in `directory`.
pub(crate) fn checksum(directory: &Tree, packed: &File) -> Option<String> {
    recorded(directory, packed)?.sha256
}

/// Names of the files in `directory` that are recorded as packed and were not changed since.
pub(crate) fn names(directory: &Tree) -> Vec<String> {
    let here = directory.shown();
    let as_it_was = |packed: Entry| {
        let name = packed.file.file_name()?.to_str()?.to_owned();
        let is_here = packed.file.parent().is_some_and(|above| above == Path::new("") || above == here);
        let file = directory.open_regular(&name, OFlags::RDONLY | OFlags::NOFOLLOW);
        let is_same = file.and_then(|file| archive_identity(&file)).is_ok_and(|found| packed.archive == found);
        (is_here && is_same).then_some(name)
    };
    read(directory).into_iter().filter_map(as_it_was).collect()
}

fn recorded(directory: &Tree, packed: &File) -> Option<Entry> {
    let found = archive_identity(packed).ok()?;
    read(directory).into_iter().rfind(|record| record.archive == found)
}

/// The recorded archives, oldest first.
fn read(directory: &Tree) -> Vec<Entry> {
    let text = directory.read(PACKED, LIMIT).unwrap_or_default();
    match serde_json::from_slice(&text) {
        Ok(Record::Archives { archives }) => archives,
        Ok(Record::Last(packed)) => vec![packed],
        Err(_) => Vec::new(),
    }
}

fn archive_identity(file: &File) -> io::Result<String> {
    let found = file.metadata()?;
    Ok(format!("{} {} {}.{}", found.ino(), found.len(), found.mtime(), found.mtime_nsec()))
}

fn written(file: &File) -> io::Result<(i64, u32)> {
    let found = file.metadata()?;
    Ok((found.mtime(), u32::try_from(found.mtime_nsec()).unwrap_or(0)))
}

/// Identity of an image root, and its birth time; 1970 if the file system keeps none.
fn root_identity(root: &Tree) -> io::Result<(String, (i64, u32))> {
    let (inode, made) = inode_and_birth(root)?;
    Ok((format!("{inode} {}.{}", made.0, made.1), made))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::network::Network;

    #[test]
    fn archives_that_are_packed_at_the_same_time_are_all_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let names: Vec<_> = (0..20).map(|number| format!("{number}.sqsh")).collect();
        std::thread::scope(|scope| {
            for name in &names {
                let dir = dir.path();
                scope.spawn(move || {
                    let limit = Duration::from_mins(1);
                    let network = Network { ca: None, stall_limit: limit, retry_limit: limit, is_shortened: false };
                    let work = &Work::begin(&network).unwrap();
                    let directory = Tree::open(dir).unwrap();
                    let packed = File::create(dir.join(name)).unwrap();
                    let archive = Archive { directory: &directory, name };
                    record(work, &directory, &archive, (&packed, String::new()), &directory, String::new()).unwrap();
                });
            }
        });
        let directory = Tree::open(dir.path()).unwrap();
        let mut recorded = super::names(&directory);
        recorded.sort_by_key(|name| name.trim_end_matches(".sqsh").parse::<u32>().unwrap());
        assert_eq!(recorded, names);
        let mode = directory.look(PACKED).unwrap().unwrap().st_mode & 0o777;
        assert_eq!(mode, 0o644);
    }
}
