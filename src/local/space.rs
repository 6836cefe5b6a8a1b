//! Disk space: refuses disks on which the new image would not fit, before any work is done.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::error::{Attempt, Error, Result};
use crate::image::kind::{Content, Kind, Opened};
use crate::publish::settings::Settings;
use crate::store;
use crate::sys::tree::Tree;

/// Refuses to open the image in `source` if the new one will not fit on the disk of the changes, or into a store with
/// `in_store` bytes left. If both are on one disk, the packed image needs its space twice, since it is copied. Only
/// warns if this is uncertain, because a run that `resumes` may free space, or because the packed size of a directory
/// is unknown. A run that `drops_kept` changes frees their space.
pub(crate) fn check(
    settings: &Settings,
    source: &Path,
    in_store: Option<u64>,
    resumes: bool,
    drops_kept: bool,
) -> Result<()> {
    let image = Opened::open(source)?;
    // Estimates: a new image is as large as its source; unpacking it takes as much again; a tree is packed to half its
    // size.
    let (size, unpacked) = match (&image.content, image.kind()?) {
        (Content::Directory(tree), _) => (size_on_disk(tree)? / 2, 0),
        (_, Some(Kind::Squashfs)) => (image.size(), 0),
        _ => (image.size(), image.size()),
    };
    let work_directory = settings.job.parent.ancestors().find(|place| place.exists()).unwrap_or(Path::new("/"));
    let space = rustix::fs::statvfs(work_directory).ok().map(|disk| disk.f_bavail * disk.f_frsize);
    // A run that drops kept changes frees an unknown amount of space first, so do not check the current amount.
    let space = space.filter(|_| !drops_kept);
    let work = settings.job.parent.display();
    let store = store::named_directory(settings.store.url.as_deref().unwrap_or_default());
    let store = store.and_then(|store| disk_of(&std::path::absolute(store).ok()?));
    let of_changes = if store.is_some() && store == disk_of(work_directory) {
        (space, size + unpacked + size, format!("{work} and the store"), "--work or --output")
    } else {
        (space, size + unpacked, work.to_string(), "--work")
    };
    let on_disks = [of_changes, (in_store, size, "the store".to_owned(), "--output")];
    for (space, needed, place, option) in on_disks {
        let Some(left) = space.filter(|space| *space < needed) else { continue };
        let refusal = too_small(&place, left, needed, option);
        if resumes || image.file().is_none() {
            tracing::warn!("the new image may not fit in {place}: {}", refusal.reason());
        } else {
            return Err(refusal);
        }
    }
    Ok(())
}

/// Device number of the disk that holds `path`, or will hold it.
fn disk_of(path: &Path) -> Option<u64> {
    path.ancestors().find_map(|place| std::fs::metadata(place).ok()).map(|found| found.dev())
}

/// Returns whether the disk of `place` has space for the few files that opening an image needs.
pub(crate) fn has_room(place: &Tree) -> bool {
    rustix::fs::fstatvfs(place).is_ok_and(|disk| disk.f_bavail.saturating_mul(disk.f_frsize) >= 1 << 20)
}

/// The error for a `place` that has `left` bytes and needs `needed`; `option` names another place.
pub(crate) fn too_small(place: &str, left: u64, needed: u64, option: &str) -> Error {
    let (bytes, unit) = if needed < 64 << 20 { (1_u64 << 10, "KiB") } else { (1 << 20, "MiB") };
    // Round in opposite directions, so that the two numbers never look the same.
    let [left, needed] = [left / bytes, needed.div_ceil(bytes)];
    let why = format!("{left} {unit} are left there, and about {needed} {unit} are needed");
    Error::new(format!("store the new image in {place}"))
        .because(why)
        .advise(format!("name a directory on another disk with {option}"))
}

/// Returns the bytes that a tree takes on its disk; holes and further hard links do not count.
fn size_on_disk(tree: &Tree) -> Result<u64> {
    let (mut size, mut linked) = (0, HashSet::new());
    let walked = tree.walk(|_, _, _, found| {
        if found.st_nlink == 1 || linked.insert((found.st_dev, found.st_ino)) {
            size += u64::try_from(found.st_blocks).unwrap_or(0) * 512;
        }
        Ok(())
    });
    walked.attempt(|| format!("look through {}", tree.shown().display())).map(|()| size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_space_left_never_looks_like_the_space_needed() {
        for (left, needed, why) in [
            ((1 << 20) + 1, (1 << 20) + 2000, "1024 KiB are left there, and about 1026 KiB are needed"),
            (0, 1, "0 KiB are left there, and about 1 KiB are needed"),
            ((5 << 30) - 1, (5 << 30) - 1 + 4096, "5119 MiB are left there, and about 5121 MiB are needed"),
            (3 << 20, 5 << 30, "3 MiB are left there, and about 5120 MiB are needed"),
        ] {
            let said = too_small("/srv", left, needed, "").to_string();
            assert!(said.contains(why), "{said}");
        }
    }
}
