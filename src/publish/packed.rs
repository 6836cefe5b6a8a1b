//! Which image root a packed image was made of: published with the kernel and initrd of another one, it would not boot. The record is no
//! proof, since whoever can write to its directory can replace the packed image as well.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use serde_json::{Value, json};

use crate::error::{Attempt, Error, Result};
use crate::image::packing::Archive;
use crate::sys::tree::{Tree, inode_and_birth};
use crate::volume::layout::PACKED;

const LIMIT: u64 = 64 << 10;

/// Records in the directory `notes` that `packed`, which is `archive`, was made of `image_root`.
pub(crate) fn record(notes: &Tree, archive: &Archive, packed: &File, image_root: &Tree) -> Result<()> {
    let attempted = || format!("write {}", notes.shown().join(PACKED).display());
    let fields = json!({
        "name": archive.name,
        "archive": archive_identity(packed).attempt(attempted)?,
        "image_root": root_identity(image_root).attempt(attempted)?.0,
    });
    notes.replace(PACKED, format!("{fields}\n").as_bytes()).attempt(attempted)
}

/// Refuses to publish `packed`, which is `archive`, with what `image_root` boots by, if it was made of another image root. One without a
/// record, which may have been packed by another program, must not be older than the image root.
pub(crate) fn check(notes: &Tree, archive: &Archive, packed: &File, image_root: &Tree) -> Result<()> {
    let attempted = || format!("publish {} with the kernel of {}", archive.shown(), image_root.shown().display());
    let refused = |why| {
        let advice = "'ims-sshd package' packs this image root";
        Err(Error::new(attempted()).because(why).advise(advice))
    };
    let (root, made) = root_identity(image_root).attempt(attempted)?;
    let recorded = read(notes).filter(|record| archive_identity(packed).is_ok_and(|found| record["archive"] == found));
    match recorded {
        Some(record) if record["image_root"] == root => Ok(()),
        Some(_) => refused("it was packed of another image root"),
        None if written(packed).attempt(attempted)? < made => refused("it was written before the image root was made"),
        None => Ok(()),
    }
}

/// Name of the file that was packed last, as recorded in its own directory `notes`.
pub(crate) fn name(notes: &Tree) -> Option<String> {
    let name = read(notes)?["name"].as_str()?.to_owned();
    (!name.is_empty() && !name.starts_with('.') && !name.contains('/')).then_some(name)
}

fn read(notes: &Tree) -> Option<Value> {
    serde_json::from_slice(&notes.read(PACKED, LIMIT).ok()?).ok()
}

fn archive_identity(file: &File) -> io::Result<String> {
    let found = file.metadata()?;
    Ok(format!("{} {} {}.{}", found.ino(), found.len(), found.mtime(), found.mtime_nsec()))
}

fn written(file: &File) -> io::Result<(i64, u32)> {
    let found = file.metadata()?;
    Ok((found.mtime(), u32::try_from(found.mtime_nsec()).unwrap_or(0)))
}

/// An image root's identity, and the time at which it was made; 1970 where the file system keeps none.
fn root_identity(root: &Tree) -> io::Result<(String, (i64, u32))> {
    let (inode, made) = inode_and_birth(root)?;
    Ok((format!("{inode} {}.{}", made.0, made.1), made))
}
