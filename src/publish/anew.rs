//! `ims-sshd prepare --fresh`: makes a new image root, and drops the old one only once the new one is complete.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Attempt, Error, Result};
use crate::image::kind::Opened;
use crate::image::unpack::{LOWER, Overlay};
use crate::publish::basis;
use crate::publish::identity::Record;
use crate::publish::packed;
use crate::publish::prepare::{self, Open};
use crate::publish::settings::Settings;
use crate::publish::source::Source;
use crate::sys::file_kind::FileKind;
use crate::sys::mounts;
use crate::sys::tree::Tree;
use crate::transfer::Work;
use crate::volume::layout::{ARCHIVE, DROPPED, FRESH, INVENTORY, KEPT_SOURCE, OVERLAY, PACKED, SOURCE, UNPACKED};
use crate::volume::mounts_below::mounts_below;
use crate::volume::{holds, open_tree};

/// Makes the image root from `source` in a directory beside the old image root, then drops the old one with all changes
/// and the images packed from it. After an error, the old one is as it was.
pub(crate) fn prepare(
    work: &Work,
    settings: &Settings,
    source: &Source,
    open: Open,
    image_root: &Path,
) -> Result<Option<Overlay>> {
    let parent = &settings.job.parent;
    let volume = open_tree(parent)?;
    prepare::refuse_links(parent, image_root)?;
    let old = Old::find(&volume, settings, source)?;
    if let (Source::Here(path), true) = (source, image_root.exists())
        && (holds(image_root, path)? || holds(&parent.join(OVERLAY), path)?)
    {
        let why = "it lies in the image root that --fresh drops";
        return Err(Error::new(format!("use {} as an image", path.display())).because(why).advise("move it first"));
    }
    let beside = Beside::make(&volume)?;
    let mut settings_beside = settings.clone();
    settings_beside.job.parent = beside.path();
    let there = beside.path().join(settings.job.image_root());
    let made = prepare::make(work, &settings_beside, source, Some(open), &there).and_then(|(overlay, archive)| {
        // These mounts have shown that the source can be opened; they are made again in the final place.
        overlay.map(Overlay::unmount).transpose()?;
        work.heed()?;
        old.replace(&volume, &beside, settings, source, (image_root, open), archive)
    });
    drop(beside);
    let made = work.unless_interrupted(made).map_err(|error| {
        if !image_root.exists() {
            return error;
        }
        let shown = image_root.display();
        let error_shown = error.to_string();
        let is_full = ["No space left", "are free"].iter().any(|words| error_shown.contains(words));
        error.advise_also(&if is_full {
            format!(
                "{shown} is as it was: the new one is made beside it, and the disk has no space for both; remove \
                 {shown} by hand first"
            )
        } else {
            format!("{shown} is as it was")
        })
    })?;
    if let Err(e) = volume.remove_whole(DROPPED.as_ref()) {
        work.heed().map_err(|e| e.advise(left_in(parent)))?;
        tracing::warn!("cannot remove {}: {e}; remove it by hand", parent.join(DROPPED).display());
    }
    Ok(made)
}

/// Advice for a removal that a signal interrupted.
fn left_in(parent: &Path) -> String {
    format!("what is left of an earlier image root is in {}: the next 'prepare' removes it", parent.display())
}

/// Removes what a killed run has left behind: a new image root that is not complete, and an old one that was dropped.
pub(crate) fn clear(work: &Work, volume: &Tree) -> Result<()> {
    Beside { volume }.unmount()?;
    prepare::await_unpackers(&volume.shown().join(FRESH));
    for name in [FRESH, DROPPED] {
        let removed = volume.remove_whole(name.as_ref());
        let removed = removed.attempt(|| format!("remove {}", volume.shown().join(name).display()));
        work.unless_interrupted(removed).map_err(|e| e.advise_if_interrupted(|| left_in(&volume.shown())))?;
    }
    Ok(())
}

/// The directory beside the old image root in which the new one is made. Dropping the value removes the directory.
struct Beside<'a> {
    volume: &'a Tree,
}

impl<'a> Beside<'a> {
    /// Creates the directory.
    fn make(volume: &'a Tree) -> Result<Self> {
        let beside = Self { volume };
        volume.make_private(FRESH).attempt(|| format!("create the directory {}", beside.path().display()))?;
        Ok(beside)
    }

    fn path(&self) -> PathBuf {
        self.volume.shown().join(FRESH)
    }

    fn unmount(&self) -> Result<()> {
        for place in mounts_below(&self.path())?.iter().rev() {
            mounts::unmount(place).attempt(|| format!("unmount {}", place.display()))?;
        }
        Ok(())
    }
}

impl Drop for Beside<'_> {
    fn drop(&mut self) {
        let _ = self.unmount().map(|()| self.volume.remove_whole(FRESH.as_ref()));
    }
}

/// Files that an earlier `prepare` made, and the image packed from them.
struct Old {
    /// Paths below the image root's parent.
    paths: Vec<PathBuf>,
}

impl Old {
    /// Finds the files to drop. Keeps files that this program did not make, and the new source.
    fn find(volume: &Tree, settings: &Settings, source: &Source) -> Result<Self> {
        let source = match source {
            Source::Here(path) => std::fs::metadata(path).map(|found| (found.dev(), found.ino())).ok(),
            _ => None,
        };
        let mut archives = packed::names(volume);
        if Record::on(volume, settings)?.read().is_some_and(|before| before.is_fetched()) {
            archives.push(ARCHIVE.to_owned());
        }
        archives.retain(|name| {
            let found = volume.look(name).ok().flatten();
            found.is_some_and(|found| Some((found.st_dev, found.st_ino)) != source)
        });
        let own = [settings.job.image_root(), OVERLAY, INVENTORY, UNPACKED, KEPT_SOURCE, PACKED]
            .into_iter()
            .map(str::to_owned);
        Ok(Self { paths: own.chain(archives).map(PathBuf::from).collect() })
    }

    /// Replaces the old image root by the new one, which is complete in `beside`.
    fn replace(
        &self,
        volume: &Tree,
        beside: &Beside,
        settings: &Settings,
        source: &Source,
        (image_root, open): (&Path, Open),
        archive: Option<Opened>,
    ) -> Result<Option<Overlay>> {
        let parent = &settings.job.parent;
        let attempted = || format!("replace {}", image_root.display());
        let made = volume.directory_without_links(FRESH).attempt(attempted)?;
        let identity = Record::on(&made, settings)?.read();
        let identity = identity
            .ok_or_else(|| Error::new(attempted()).because(format!("{} has vanished", beside.path().display())))?;
        // Use the real path, because the mount table contains no symbolic links.
        let real = volume.shown();
        let ours = [real.join(settings.job.image_root()), real.join(OVERLAY).join(LOWER)];
        // A place can have several mounts on top of each other, so go through all of them.
        for place in mounts_below(&real)?.iter().rev().filter(|place| ours.contains(place)) {
            mounts::unmount(place).attempt(|| format!("unmount {}", place.display()))?;
        }
        let mut aside = Moved { volume, to: volume.make_private(DROPPED).attempt(attempted)?, names: Vec::new() };
        let record = Record::on(volume, settings)?;
        let put_in_place = |aside: &mut Moved| {
            let is_mark = |name: &&str| {
                let found = volume.look(name).ok().flatten();
                found.is_some_and(|found| FileKind::of(&found) != FileKind::Directory)
            };
            let marks: Vec<&Path> = prepare::marks().filter(is_mark).map(Path::new).collect();
            for path in self.paths.iter().map(PathBuf::as_path).chain([Path::new(SOURCE)]).chain(marks) {
                aside.put(path).attempt(|| format!("put {} aside", parent.join(path).display()))?;
            }
            let move_in = |path: &str| {
                let (above, name) = above_of(&made, Path::new(path))?;
                if above.look(name)?.is_some() { above.rename_to(name, volume, path) } else { Ok(()) }
            };
            for path in [ARCHIVE, OVERLAY, INVENTORY] {
                move_in(path).attempt(|| format!("rename {}", made.shown().join(path).display()))?;
            }
            basis::move_to(&made, volume, settings)?;
            record.write(&identity)?;
            match archive.filter(|_| open == Open::Overlay) {
                Some(archive) => Overlay::mount(&archive, &parent.join(OVERLAY), image_root).map(Some),
                // The image root gets its name last, because an image root with its final name counts as complete.
                None => {
                    let path = settings.job.image_root();
                    let above = Path::new(path).parent().filter(|above| *above != Path::new(""));
                    let moved =
                        above.map_or(Ok(()), |above| volume.make_directories(above)).and_then(|()| move_in(path));
                    moved.attempt(attempted).map(|()| None)
                }
            }
        };
        let put = put_in_place(&mut aside);
        if put.is_err() {
            for path in [OVERLAY, INVENTORY, UNPACKED, KEPT_SOURCE, SOURCE, settings.job.image_root()].map(Path::new) {
                let _ = above_of(volume, path).and_then(|(above, name)| above.remove_whole(name.as_ref()));
            }
            if let Err(e) = aside.put_back() {
                // Choose a name that no later run removes.
                let kept = format!("{DROPPED}.{}", std::process::id());
                let _ = volume.rename(DROPPED, &kept);
                tracing::error!("cannot put the old image root back: {e}; it is in {}", parent.join(kept).display());
            }
            return put;
        }
        prepare::clear_marks(parent, false)?;
        let shown = match source {
            Source::Here(path) => path.display().to_string(),
            _ => identity.source().to_owned(),
        };
        tracing::info!("dropped what was in {} before, and began anew with {shown}", image_root.display());
        put
    }
}

/// Files and directories that were moved out of the way, to be removed, or put back after an error.
struct Moved<'a> {
    volume: &'a Tree,
    to: Tree,
    names: Vec<PathBuf>,
}

impl Moved<'_> {
    fn put(&mut self, path: &Path) -> io::Result<()> {
        let (above, name) = match above_of(self.volume, path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            found => found?,
        };
        if above.look(name)?.is_some() {
            above.rename_to(name, &self.to, self.names.len().to_string())?;
            self.names.push(path.to_owned());
        }
        Ok(())
    }

    fn put_back(&self) -> io::Result<()> {
        for (number, path) in self.names.iter().enumerate().rev() {
            self.to.rename_to(&number.to_string(), self.volume, path)?;
        }
        Ok(())
    }
}

/// The directory above `path`, and the name in it.
fn above_of<'a>(volume: &Tree, path: &'a Path) -> io::Result<(Tree, &'a str)> {
    let above = path.parent().filter(|above| *above != Path::new("")).unwrap_or(Path::new("."));
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    volume.directory_without_links(above).map(|above| (above, name))
}
