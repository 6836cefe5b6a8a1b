//! The data directory: closed to other users, and used by one service at a time.

use std::fs::{DirBuilder, File, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use ims_sshd::error::{Attempt, Error, Result};
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::records::Kind;
use crate::settings::DATA;

/// Name of the database file in the data directory.
pub const DATABASE: &str = "ims.sqlite";

/// Names of the database's files, after [`DATABASE`].
const DATABASES: [&str; 4] = ["", "-wal", "-shm", "-journal"];

/// Name of the token's file in the data directory.
pub const TOKEN: &str = "token";

/// Bits of a mode that let other users write to a directory.
const OTHERS_WRITE: u32 = 0o022;

/// Creates the data directory, for this user alone. Creates the directories above it for the default path only: with a
/// misspelled path the service would start without its records. Refuses a directory of another user. Takes away other
/// users' right to write to an existing directory, since they could replace the database.
pub fn make(directory: &Path) -> Result<()> {
    let attempted = || format!("use the data directory {}", directory.display());
    let parent = directory.parent().filter(|parent| parent.try_exists().is_ok_and(|exists| !exists));
    match parent.filter(|parent| !parent.as_os_str().is_empty()) {
        Some(parent) if directory == Path::new(DATA) => std::fs::create_dir_all(parent).attempt(attempted)?,
        Some(parent) => {
            let refused = Error::new(attempted()).because(format!("{} does not exist", parent.display()));
            return Err(refused.advise("create it, or name another directory with --data"));
        }
        None => {}
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

/// Refuses a file of the data directory that other users can replace or write. Missing files are fine.
pub fn check(directory: &Path) -> Result<()> {
    let database = DATABASES.map(|suffix| format!("{DATABASE}{suffix}"));
    let others = Kind::ALL.into_iter().filter_map(Kind::file).chain([TOKEN]).map(str::to_owned);
    for name in database.iter().cloned().chain(others) {
        let path = directory.join(&name);
        let attempted = || format!("use {}", path.display());
        let found = match std::fs::symlink_metadata(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => continue,
            found => found.attempt(attempted)?,
        };
        let will_be_closed = database.contains(&name) && is_ours(found.uid());
        let reason = match () {
            () if found.is_symlink() => "it is a symbolic link".into(),
            () if !found.is_file() => "it is no regular file".into(),
            () if !is_trusted(found.uid()) => format!("it belongs to the user {}", found.uid()),
            // The group may write: Kubernetes gives that right to the group of a volume.
            () if found.mode() & 0o002 != 0 && !will_be_closed => "all users can write to it".into(),
            () => continue,
        };
        let refused = Error::new(attempted()).because(reason);
        return Err(refused.advise("remove it, or put a file of the service's user in its place"));
    }
    Ok(())
}

/// Creates the database file if it is missing, and closes it to other users. SQLite gives the files beside it the same
/// mode.
pub fn close_database(directory: &Path) -> Result<()> {
    for suffix in DATABASES {
        let path = directory.join(format!("{DATABASE}{suffix}"));
        let attempted = || format!("close {} to other users", path.display());
        match path.symlink_metadata() {
            Err(_) if suffix.is_empty() => {
                File::options().write(true).create_new(true).mode(0o600).open(&path).attempt(attempted)?;
            }
            Ok(found) if is_ours(found.uid()) && found.mode() & 0o077 != 0 => {
                std::fs::set_permissions(&path, Permissions::from_mode(0o600)).attempt(attempted)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Refuses an export from a data directory without a database, which would be one without records, and an export into
/// another service's data directory: that service would import the files at its next start.
pub fn check_export(data: &Path, into: &Path) -> Result<()> {
    let refuse = |why: String, advice| {
        Err(Error::new(format!("export the records into {}", into.display())).because(why).advise(advice))
    };
    if !data.join(DATABASE).exists() {
        let why = format!("{} holds no records of a service", data.display());
        return refuse(why, "name the service's data directory with --data");
    }
    if into.join(DATABASE).exists() && into.canonicalize().ok() != data.canonicalize().ok() {
        let why =
            format!("it is the data directory of another service, and the records are those of {}", data.display());
        return refuse(why, "name the service's data directory with --data, or an empty directory for the files");
    }
    Ok(())
}

/// Locks a directory for this process, until the returned descriptor is dropped. Fails if another service holds the
/// lock.
pub fn lock(directory: &Path) -> Result<File> {
    let attempted = || format!("lock {}", directory.display());
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

fn is_ours(user: u32) -> bool {
    user == rustix::process::geteuid().as_raw()
}

/// Volumes of Kubernetes belong to root, whatever the user of the service is.
fn is_trusted(user: u32) -> bool {
    is_ours(user) || user == 0
}
