//! Record of the image root that an image was packed from: with another one's kernel and initrd, the image would not
//! boot. The record is no proof: whoever can write to its directory can also replace the packed image.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{Attempt, Error, Result};
use crate::image::packing::Archive;
use crate::sys::tree::{Tree, inode_and_birth};
use crate::volume::layout::PACKED;

const LIMIT: u64 = 64 << 10;

#[derive(Serialize, Deserialize)]
struct Record {
    name: String,
    archive: String,
    image_root: String,
}

/// Records in `directory` that `packed`, which is `archive`, was packed from `image_root`.
pub(crate) fn record(directory: &Tree, archive: &Archive, packed: &File, image_root: &Tree) -> Result<()> {
    let attempted = || format!("write {}", directory.shown().join(PACKED).display());
    let record = Record {
        name: archive.name.to_owned(),
        archive: archive_identity(packed).attempt(attempted)?,
        image_root: root_identity(image_root).attempt(attempted)?.0,
    };
    directory.replace(PACKED, format!("{}\n", json!(record)).as_bytes()).attempt(attempted)
}

/// Refuses to publish `packed`, which is `archive`, with the boot files of `image_root` if it was packed from another
/// image root. Without a record, as another program leaves it, `packed` must not be older than the image root.
pub(crate) fn check(directory: &Tree, archive: &Archive, packed: &File, image_root: &Tree) -> Result<()> {
    let attempted = || format!("publish {} with the kernel of {}", archive.shown(), image_root.shown().display());
    let refused = |why| {
        let advice = "'ims-sshd package' packs this image root";
        Err(Error::new(attempted()).because(why).advise(advice))
    };
    let (root, made) = root_identity(image_root).attempt(attempted)?;
    let recorded = read(directory).filter(|record| archive_identity(packed).is_ok_and(|found| record.archive == found));
    match recorded {
        Some(record) if record.image_root == root => Ok(()),
        Some(_) => refused("it was packed from another image root"),
        None if written(packed).attempt(attempted)? < made => refused("it was written before the image root was made"),
        None => Ok(()),
    }
}

/// Name of the file in `directory` that was packed last.
pub(crate) fn name(directory: &Tree) -> Option<String> {
    let name = read(directory)?.name;
    (!name.is_empty() && !name.starts_with('.') && !name.contains('/')).then_some(name)
}

fn read(directory: &Tree) -> Option<Record> {
    serde_json::from_slice(&directory.read(PACKED, LIMIT).ok()?).ok()
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
