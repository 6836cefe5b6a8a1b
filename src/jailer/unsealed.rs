//! Image roots that a process outside can still write to, by a descriptor that a session passed on: the mount of their
//! jail could not be made read-only ([`seal`](crate::jail::seal)), and lives as long as such a descriptor. An overlay
//! is busy until then. A directory that is changed in place is not, so it is recorded, until the machine restarts.

use std::fs::DirBuilder;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::Pid;
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use crate::error::{Attempt, Error, Result};
use crate::log::redaction::without_secrets;
use crate::sys::process::{Entry, numbers};
use crate::sys::tree::Tree;
use crate::volume::state_directory::RUN;

/// Directory of the records, below [`RUN`].
const DIRECTORY: &str = ".unsealed";

/// Records that the mount of a jail of `image_root` could not be made read-only.
pub(super) fn record(image_root: &Tree, mount: u64) -> Result<()> {
    let write = || {
        let path = place(image_root)?;
        DirBuilder::new().recursive(true).mode(0o700).create(Path::new(RUN).join(DIRECTORY))?;
        writeln!(std::fs::File::options().create(true).append(true).mode(0o600).open(path)?, "{mount}")
    };
    write().attempt(|| format!("record that {} is not read-only outside", image_root.shown().display()))
}

/// Refuses an image root if a process has a file of it open on a recorded mount.
pub(crate) fn refuse(image_root: &Tree) -> Result<()> {
    let attempted = || format!("open {}", image_root.shown().display());
    let Ok(text) = std::fs::read_to_string(place(image_root).attempt(attempted)?) else { return Ok(()) };
    let mounts: Vec<u64> = text.lines().filter_map(|line| line.parse().ok()).collect();
    let device = rustix::fs::fstat(image_root).attempt(attempted)?.st_dev;
    let Some(holder) = numbers(Path::new("/proc")).filter(|pid| has_open(*pid, &mounts, device)).find_map(Entry::read)
    else {
        return Ok(());
    };
    let (pid, line) = (holder.pid, without_secrets(&holder.command_line()));
    Err(Error::new(attempted())
        .because(format!(
            "process {pid} ({line}) has a file of the directory open, which a session of an earlier run passed on"
        ))
        .advise("end that process"))
}

fn place(image_root: &Tree) -> io::Result<PathBuf> {
    let found = rustix::fs::fstat(image_root)?;
    Ok(Path::new(RUN).join(DIRECTORY).join(format!("{:x}-{}", found.st_dev, found.st_ino)))
}

/// Returns whether a process has a file on one of these mounts open or mapped. The kernel uses a mount's number again,
/// so the file must be on this device, and the mount in no mount namespace, as that of a jail that has ended.
fn has_open(pid: Pid, mounts: &[u64], device: u64) -> bool {
    let is_on_one = |link: PathBuf| {
        let found = statx(CWD, &link, AtFlags::STATX_DONT_SYNC, StatxFlags::MNT_ID);
        found.is_ok_and(|found| mounts.contains(&found.stx_mnt_id))
            && std::fs::metadata(link).is_ok_and(|found| found.dev() == device)
    };
    let listed =
        |directory: &str| std::fs::read_dir(format!("/proc/{pid}/{directory}")).into_iter().flatten().flatten();
    let has_one = || listed("fd").chain(listed("map_files")).any(|link| is_on_one(link.path()));
    has_one()
        && !std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).is_ok_and(|text| {
            text.lines().filter_map(|line| line.split(' ').next()?.parse().ok()).any(|mount| mounts.contains(&mount))
        })
}
