//! Mounts below an image root, by a session, an administrator or a program that was killed.

use std::path::{Path, PathBuf};

use crate::error::{Attempt, Error, Result};
use crate::sys::mounts;

/// Mount points below `path` in this mount namespace, oldest mount first.
pub(crate) fn mounts_below(path: &Path) -> Result<Vec<PathBuf>> {
    let mountinfo = std::fs::read("/proc/self/mountinfo").attempt(|| "read /proc/self/mountinfo")?;
    let mut found = mounts::mount_points(&mountinfo);
    found.retain(|mount| mount.starts_with(path) && mount != path);
    Ok(found)
}

/// Refuses mounts below the directory `path`: `reader` would walk into them, and never finish reading a /proc.
/// `attempted` completes "cannot …".
pub fn refuse_mounts_below(path: &Path, attempted: &str, reader: &str) -> Result<()> {
    match mounts_below(path)?.first() {
        Some(mount) => Err(Error::new(attempted)
            .because(format!("something is mounted on {}", mount.display()))
            .advise(format!("unmount it: {reader} would walk into it"))),
        None => Ok(()),
    }
}

/// Unmounts everything below the image root at `path`, newest mount first. Otherwise a packer would walk into mounts
/// that an administrator forgot, such as one by `mount --bind /proc`.
pub(crate) fn unmount_below(path: &Path) -> Result<()> {
    for mount in mounts_below(path)?.iter().rev() {
        mounts::unmount(mount)
            .attempt(|| format!("unmount {}", mount.display()))
            .map_err(|e| e.advise("unmount it by hand; packing would walk into it"))?;
        tracing::warn!("unmounted {}, which somebody had mounted there", mount.display());
    }
    Ok(())
}
