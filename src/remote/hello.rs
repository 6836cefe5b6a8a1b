//! Reports facts about a node before anything is sent to it, and reasons why a job cannot run there.

use std::path::Path;

use rustix::fs::{FileType, Stat};
use rustix::mount::FsOpenFlags;

use crate::remote::job_directory::TMP;
use crate::remote::message::{Hello, Order, Task};
use crate::sshd::{self, sftp_server};
use crate::transfer;

/// File systems that a job mounts; a build does not need the last one, squashfs. Opening a file system loads its kernel
/// module.
const FILE_SYSTEMS: [&str; 4] = ["overlay", "tmpfs", "proc", "squashfs"];

/// Free space that a job needs, as a multiple of the image's size: for the image, the packed image, and what sessions
/// add.
const ROOM: u64 = 2;

/// Returns facts about this machine, and reasons why it cannot run the job.
pub(crate) fn hello(order: &Order) -> Hello {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let free = rustix::fs::statvfs(TMP).map_or(0, |disk| disk.f_bavail.saturating_mul(disk.f_frsize));
    let mut refusals = Vec::new();
    if !rustix::process::geteuid().is_root() {
        refusals.push("the login is not root's".into());
    }
    let is_build = matches!(order.task, Task::Build(_));
    for kind in &FILE_SYSTEMS[..FILE_SYSTEMS.len() - usize::from(is_build)] {
        if let Err(e) = rustix::mount::fsopen(*kind, FsOpenFlags::FSOPEN_CLOEXEC) {
            refusals.push(format!("it cannot mount the file system {kind}: {e}"));
        }
    }
    match &order.task {
        Task::Customize(_) => {
            if !Path::new("/dev/loop-control").exists() {
                refusals.push("it has no /dev/loop-control: the module loop is not loaded".into());
            }
            refusals.extend(sshd::program().err().map(|e| e.to_string()));
            refusals.extend(sftp_server::files().err().map(|e| e.to_string()));
            refusals.extend(transfer::installed("ssh-keygen").err().map(|e| e.to_string()));
        }
        Task::Build(build) => {
            refusals.extend(
                build.programs.iter().filter_map(|name| transfer::installed(name).err()).map(|e| e.to_string()),
            );
        }
    }
    refusals.extend(rustix::fs::lstat(TMP).map_or_else(|e| Some(format!("{TMP}: {e}")), |found| unfit(&found)));
    let needed = order.size.saturating_mul(ROOM);
    if free < needed {
        refusals.push(format!("{TMP} has {free} bytes free, and the job needs {needed}"));
    }
    Hello { arch: std::env::consts::ARCH.into(), kernel: kernel.trim().into(), free, refusals }
}

/// Returns a reason if other users could remove or replace a job's directory in a /tmp with this status.
fn unfit(found: &Stat) -> Option<String> {
    let mode = found.st_mode & 0o7777;
    if FileType::from_raw_mode(found.st_mode) != FileType::Directory || found.st_uid != 0 {
        return Some(format!("{TMP} is no directory of root"));
    }
    (mode & 0o022 != 0 && mode & 0o1000 == 0).then(|| format!("{TMP} has mode {mode:o}, expected 1777"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tmp_in_which_others_can_rename_is_refused() {
        let mut found = rustix::fs::stat("/tmp").unwrap();
        for (mode, user, is_unfit) in [
            (0o041_777, 0, false),
            (0o040_755, 0, false),
            (0o040_777, 0, true),
            (0o040_775, 0, true),
            (0o041_777, 1000, true),
            (0o120_777, 0, true),
        ] {
            (found.st_mode, found.st_uid) = (mode, user);
            assert_eq!(unfit(&found).is_some(), is_unfit, "{mode:o}");
        }
    }
}
