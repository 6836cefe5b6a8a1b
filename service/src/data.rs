//! The data directory: closed to other users, and used by one service at a time.

use std::fs::{DirBuilder, File, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;

use ims_sshd::error::{Attempt, Error, Result};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

/// Name of the database file in the data directory.
pub const DATABASE: &str = "ims.sqlite";

/// Bits of a mode that let other users write to a directory.
const OTHERS_WRITE: u32 = 0o022;

/// Creates the data directory, for this user alone. Refuses one of another user, and takes the right to write to an
/// existing one from others: they could replace the database.
pub fn make(directory: &Path) -> Result<()> {
    let attempted = || format!("use the data directory {}", directory.display());
    if let Some(parent) = directory.parent() {
        std::fs::create_dir_all(parent).attempt(attempted)?;
    }
    match DirBuilder::new().mode(0o700).create(directory) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
        other => return other.attempt(attempted),
    }
    let found = directory.metadata().attempt(attempted)?;
    if !is_trusted(found.uid()) {
        let refused = Error::new(attempted()).because(format!("it belongs to the user {}", found.uid()));
        return Err(refused.advise("give it to the user of the service, or name another one with --data"));
    }
    if is_ours(found.uid()) && found.mode() & OTHERS_WRITE != 0 {
        let closed = Permissions::from_mode(found.mode() & 0o7777 & !OTHERS_WRITE);
        std::fs::set_permissions(directory, closed).attempt(attempted)?;
    }
    Ok(())
}

/// Creates the database file if it is missing, and closes it to other users. SQLite gives the files beside it the same
/// mode. Refuses a symbolic link and a file of another user.
pub fn close_database(directory: &Path) -> Result<()> {
    for (suffix, create) in [("", OFlags::CREATE), ("-wal", OFlags::empty()), ("-shm", OFlags::empty())] {
        let path = directory.join(format!("{DATABASE}{suffix}"));
        let attempted = || format!("use {}", path.display());
        match own_file(&path, create) {
            Err(Errno::NOENT) if !suffix.is_empty() => {}
            Err(Errno::LOOP) => {
                let refused = Error::new(attempted()).because("it is a symbolic link");
                return Err(refused.advise("put the file itself in its place"));
            }
            other => {
                let file = other.attempt(attempted)?;
                let found = file.metadata().attempt(attempted)?;
                if !found.is_file() || !is_trusted(found.uid()) {
                    let reason =
                        format!("it is no regular file of the service's user, but of the user {}", found.uid());
                    return Err(Error::new(attempted()).because(reason).advise("remove it, or give it to that user"));
                }
                if is_ours(found.uid()) && found.mode() & 0o077 != 0 {
                    file.set_permissions(Permissions::from_mode(0o600)).attempt(attempted)?;
                }
            }
        }
    }
    Ok(())
}

/// Locks a directory for this process, until the returned descriptor is dropped. Fails if another service holds the
/// lock.
pub fn lock(directory: &Path) -> Result<File> {
    let attempted = || format!("use {} alone", directory.display());
    let locked = File::open(directory).attempt(attempted)?;
    match rustix::fs::flock(&locked, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(locked),
        Err(Errno::WOULDBLOCK) => {
            let refused = Error::new(attempted()).because("another service is using it");
            Err(refused.advise("stop that service, or name another directory"))
        }
        Err(error) => Err(Error::new(attempted()).because(error)),
    }
}

/// Opens a file for this user alone. Does not follow a symbolic link, nor wait for the other end of a named pipe.
fn own_file(path: &Path, create: OFlags) -> std::result::Result<File, Errno> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | create;
    rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map(File::from)
}

fn is_ours(user: u32) -> bool {
    user == rustix::process::geteuid().as_raw()
}

/// Volumes of Kubernetes belong to root, whatever the user of the service is.
fn is_trusted(user: u32) -> bool {
    is_ours(user) || user == 0
}
