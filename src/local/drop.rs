//! Drops what a finished run left behind, for `ims-sshd fail` with the name of that run.

use std::path::Path;

use serde_json::Value;

use crate::error::{Attempt, Error, Result};
use crate::local::apply_progress::{self, Applied};
use crate::local::directory::{self, Held};
use crate::local::left_over::{clear_left_over, end_left_over};
use crate::local::register;
use crate::local::source;
use crate::local::work_directory::WorkDirectory;
use crate::publish::journal;
use crate::sys::named;
use crate::volume::layout::IMAGE_ROOT;
use crate::volume::state_directory::StateDirectory;

/// State of a source to which only some of the changes were applied.
pub(crate) const PART: &str = "keeps the changes that were applied, which are not all";

/// Drops what a finished run left behind: its kept changes, its sshd, and its mount points in the image. Returns a verb
/// phrase that describes the state of the source.
pub(crate) fn drop_left(entry: &Value) -> Result<&'static str> {
    source::need_root()?;
    let (name, source) = (entry["name"].as_str().unwrap_or_default(), entry["source"].as_str().unwrap_or_default());
    let path = Path::new(source);
    // This need not be the image root any more: it may be the mount point of one that was unmounted.
    let resolve = || named::resolve(path).attempt(|| format!("open {source}"));
    let directory = path.is_dir().then(resolve).transpose()?;
    let work = entry["work"].as_str().map(Path::new).filter(|work| work.is_dir());
    // A run without a work directory changed the source in place.
    let mut source_is = if work.is_some() { "is as it was" } else { "stays as it is now" };
    if let Some((all, own)) = work.and_then(|work| Some((work.parent()?, work.file_name()?.to_str()?))) {
        let place = WorkDirectory::claim(all, own)?;
        if journal::is_begun(place.files())? {
            let command = shell_words::join(["ims-sshd", "enter", source]);
            return Err(Error::new(format!("drop the changes to {source}"))
                .because("part of the new image is uploaded already")
                .advise(format!("'{command} --output STORE --discard true' removes that as well")));
        }
        let record = place.files().parent();
        if apply_progress::has_begun(record)? {
            source_is = match apply_progress::applied(record) {
                Applied::Nothing => source_is,
                Applied::Part => PART,
                Applied::Everything => "has all of the changes",
            };
            if let Some(directory) = &directory {
                let root = directory::open(directory)?;
                if apply_progress::is_of(record, &root)? {
                    let _held = Held::take(directory, all)?;
                    directory::abort_changes(directory, &root, record)?;
                } else {
                    source_is = "is not the directory to which they were being applied";
                }
            }
        }
        let mounted = place.path().join(IMAGE_ROOT);
        end_left_over(&mounted)?;
        if mounted.exists() {
            clear_left_over(&directory::COMMANDS, &mounted)?;
        }
        // The directories of a run on a node have the name of the work directory itself.
        clear_left_over(&directory::COMMANDS, place.path())?;
        if StateDirectory::place(place.path()).exists() {
            StateDirectory::of(place.path())?.remove()?;
        }
        place.remove()?;
    }
    if let Some(directory) = &directory {
        end_left_over(directory)?;
        clear_left_over(&directory::COMMANDS, directory)?;
    } else if path.is_absolute() && !path.exists() {
        end_left_over(&named::resolve_beginning(path).unwrap_or_else(|_| path.to_owned()))?;
        source_is = "does not exist: it was renamed or removed";
    }
    register::forget(name)?;
    Ok(source_is)
}
