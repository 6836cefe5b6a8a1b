//! A store in a directory, for a service on one machine. An object is the file `DIRECTORY/<bucket>/<key>`.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ims_sshd::error::{Attempt, Result as Started};
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};

use super::{Failure, Object, Result};
use crate::records::Location;

/// A store in a directory, with a subdirectory for each bucket.
pub struct Directory {
    root: PathBuf,
    /// Key that signs download paths. Random at each start, so that paths signed by an earlier process are invalid.
    key: hmac::Key,
}

/// Number of attempts to create a file in a directory that others keep removing.
const TRIES: usize = 100;

/// Prefix of the paths under which the service itself serves downloads.
pub const DOWNLOADS: &str = "/downloads/";

impl Directory {
    /// Uses `root`, and creates it if it is missing.
    pub fn open(root: &Path) -> Started<Self> {
        let attempted = || format!("use the directory {} as a store", root.display());
        std::fs::create_dir_all(root).attempt(attempted)?;
        let root = root.canonicalize().attempt(attempted)?;
        let mut seed = [0; 32];
        SystemRandom::new().fill(&mut seed).attempt(|| "make a key for download URLs")?;
        Ok(Self { root, key: hmac::Key::new(hmac::HMAC_SHA256, &seed) })
    }

    /// Returns the file of an object. Fails with [`Failure::Missing`] for a key that leads out of the bucket's
    /// directory, that is a second name of another key's file (`a//b`, `./a`), or that names an unfinished file.
    fn file(&self, at: &Location) -> Result<PathBuf> {
        let fits = |part: &str| !matches!(part, "" | "." | "..") && !is_unfinished(part);
        if at.bucket.contains('/') || !fits(&at.bucket) || !at.key.split('/').all(fits) || at.key.contains('\0') {
            return Err(Failure::Missing);
        }
        let file = self.root.join(&at.bucket).join(&at.key);
        // Symbolic links could lead out of the store.
        let inside = file.ancestors().take_while(|path| *path != self.root).all(|path| !path.is_symlink());
        if inside { Ok(file) } else { Err(Failure::Refused(format!("{at} is a symbolic link"))) }
    }

    pub(super) async fn head(&self, at: &Location) -> Result<Object> {
        let metadata = tokio::fs::metadata(self.file(at)?).await.map_err(|e| failure(&e))?;
        if !metadata.is_file() {
            return Err(Failure::Missing);
        }
        // The programs of a pod compute the same ETag for a file.
        let micros = i128::from(metadata.mtime()) * 1_000_000 + i128::from(metadata.mtime_nsec() / 1000);
        let etag = format!("{:x}-{micros:x}-{:x}", metadata.ino(), metadata.len());
        Ok(Object { size: metadata.len(), etag, metadata: std::collections::BTreeMap::new() })
    }

    pub(super) async fn get(&self, at: &Location, limit: u64) -> Result<Vec<u8>> {
        if self.head(at).await?.size >= limit {
            return Err(Failure::TooLarge);
        }
        tokio::fs::read(self.file(at)?).await.map_err(|e| failure(&e))
    }

    pub(super) async fn put(&self, at: &Location, content: Vec<u8>) -> Result<String> {
        self.write(at, 0o777, |new| Box::pin(tokio::fs::write(new, &content))).await
    }

    pub(super) async fn copy(&self, from: &Location, to: &Location) -> Result<String> {
        self.head(from).await?;
        let from = self.file(from)?;
        // Only root may reach the files of an image, since one of them is its /etc/shadow.
        let mode = tokio::fs::metadata(from.parent().expect("below the root")).await.map_err(|e| failure(&e))?.mode();
        // A hard link needs no space. It is safe, since a file of the store is replaced and never written to again.
        self.write(to, mode & 0o777, |new| {
            let from = &from;
            Box::pin(async move {
                match tokio::fs::hard_link(from, &new).await {
                    Ok(()) => Ok(()),
                    Err(_) => tokio::fs::copy(from, &new).await.map(drop),
                }
            })
        })
        .await
    }

    /// Creates a new file, which `content` fills, and renames it to the object's file, so that no reader finds a part.
    /// Creates missing directories with `mode`.
    async fn write<'a, C>(&self, at: &Location, mode: u32, content: C) -> Result<String>
    where
        C: Fn(PathBuf) -> std::pin::Pin<Box<dyn Future<Output = std::io::Result<()>> + Send + 'a>> + Send,
    {
        let file = self.file(at)?;
        let directory = file.parent().expect("below the root").to_owned();
        let new = directory.join(format!(".{}", crate::records::new_id()));
        let mut filled = Ok(());
        for _ in 0..TRIES {
            filled = async {
                tokio::fs::DirBuilder::new().recursive(true).mode(mode).create(&directory).await?;
                content(new.clone()).await
            }
            .await;
            // The removal of another object removes directories that are empty at that moment.
            if !filled.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound) {
                break;
            }
        }
        let written = async {
            filled?;
            tokio::fs::File::open(&new).await?.sync_all().await?;
            tokio::fs::rename(&new, &file).await?;
            // If both names are hard links to one file, the rename did nothing and the new name still exists.
            let _ = tokio::fs::remove_file(&new).await;
            tokio::fs::File::open(&directory).await?.sync_all().await
        };
        if let Err(error) = written.await {
            let _ = tokio::fs::remove_file(&new).await;
            return Err(failure(&error));
        }
        Ok(self.head(at).await?.etag)
    }

    /// Removes files that a killed process was writing, and the directories that this empties. The last change of such
    /// a file is at least `age` ago, since another process may still be writing a younger one.
    pub(super) fn remove_unfinished(&self, age: Duration) {
        remove_unfinished(&self.root, 0, SystemTime::now() - age);
    }

    pub(super) async fn remove(&self, at: &Location) -> Result<()> {
        let file = self.file(at)?;
        match tokio::fs::remove_file(&file).await.map_err(|e| failure(&e)) {
            Ok(()) | Err(Failure::Missing) => {}
            Err(failure) => return Err(failure),
        }
        let buckets = self.root.join(&at.bucket);
        for directory in file.ancestors().skip(1).take_while(|directory| *directory != buckets) {
            if tokio::fs::remove_dir(directory).await.is_err() {
                break;
            }
        }
        Ok(())
    }

    pub(super) fn signed_path(&self, at: &Location, valid: Duration) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let expires = now.saturating_add(valid).as_secs();
        let path = format!("{DOWNLOADS}{}/{}", at.bucket, at.key);
        let signature = hex(hmac::sign(&self.key, format!("{path}\n{expires}").as_bytes()).as_ref());
        format!("{}?expires={expires}&signature={signature}", super::s3::escaped_path(&path))
    }

    pub(super) fn signed_file(&self, path: &str, query: &str) -> Option<PathBuf> {
        let value = |name: &str| query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
        let (expires, signature) = (value("expires")?, unhex(value("signature")?)?);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs();
        hmac::verify(&self.key, format!("{path}\n{expires}").as_bytes(), &signature).ok()?;
        let (bucket, key) = path.strip_prefix(DOWNLOADS)?.split_once('/')?;
        let at = Location { bucket: bucket.to_owned(), key: key.to_owned() };
        (expires.parse::<u64>().ok()? >= now).then(|| self.file(&at).ok())?
    }
}

/// Removes unfinished files below `directory` that have not changed after `before`, and directories that become empty
/// by this, but no buckets. Returns whether it removed something directly in `directory`. `depth` is 0 for the store's
/// root, and 1 for its buckets.
fn remove_unfinished(directory: &Path, depth: usize, before: SystemTime) -> bool {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) => {
            tracing::warn!("cannot look for unfinished files in {}: {error}", directory.display());
            return false;
        }
    };
    let mut has_removed = false;
    for entry in entries.flatten() {
        let Ok(metadata) = entry.metadata() else { continue };
        let path = entry.path();
        if metadata.is_dir() {
            // The kernel refuses to remove a directory that still has entries. A writer that finds its directory
            // removed creates it again.
            let is_emptied = remove_unfinished(&path, depth + 1, before);
            has_removed |= is_emptied && depth > 0 && std::fs::remove_dir(&path).is_ok();
            continue;
        }
        let name = entry.file_name();
        // A hard link changes the ctime of the file, and not its mtime.
        let changed = UNIX_EPOCH + Duration::from_secs(u64::try_from(metadata.ctime()).unwrap_or_default());
        if name.to_str().is_some_and(is_unfinished) && metadata.is_file() && changed <= before {
            match std::fs::remove_file(&path) {
                Ok(()) => {
                    has_removed = true;
                    tracing::info!("removed an unfinished file: {}", path.display());
                }
                Err(error) => tracing::warn!("cannot remove the unfinished file {}: {error}", path.display()),
            }
        }
    }
    has_removed
}

/// Returns whether a file has the name of one that is being written: a dot and an ID of [`crate::records::new_id`].
fn is_unfinished(name: &str) -> bool {
    let id = name.strip_prefix('.');
    id.is_some_and(|text| uuid::Uuid::parse_str(text).is_ok_and(|id| id.to_string() == text))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes all");
        text
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

fn failure(error: &std::io::Error) -> Failure {
    match error.kind() {
        // No object can have a name that is too long for a file.
        ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::InvalidFilename => Failure::Missing,
        _ => Failure::Refused(format!("cannot use the store: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn objects_are_kept_as_files_and_never_outside() {
        let directory = tempfile::tempdir().unwrap();
        let store = Directory::open(directory.path()).unwrap();
        let at = |bucket: &str, key: &str| Location { bucket: bucket.into(), key: key.into() };
        let (from, to) = (at("b", "x/y"), at("b", "deleted/x/y"));
        store.put(&from, b"content".into()).await.unwrap();
        store.copy(&from, &to).await.unwrap();
        store.copy(&from, &to).await.unwrap();
        store.remove(&from).await.unwrap();
        store.remove(&from).await.unwrap();
        assert_eq!(store.get(&to, 8).await.unwrap(), b"content");
        assert_eq!(store.get(&to, 7).await, Err(Failure::TooLarge));
        assert_eq!(store.head(&from).await, Err(Failure::Missing));
        assert!(!directory.path().join("b/x").exists());
        std::os::unix::fs::symlink("/etc", directory.path().join("b/link")).unwrap();
        for (bucket, key) in
            [("..", "x"), ("b", "../../x"), ("a/b", "x"), ("b", "/etc/passwd"), ("b", "x/"), ("b", "\0")]
        {
            assert_eq!(store.head(&at(bucket, key)).await, Err(Failure::Missing), "{bucket} {key}");
        }
        // An object has one name: otherwise, records could own it under several.
        for (bucket, key) in
            [(".", "b/deleted/x/y"), ("b", "./deleted/x/y"), ("b", "deleted//x/y"), ("b", "deleted/./x/y")]
        {
            assert_eq!(store.head(&at(bucket, key)).await, Err(Failure::Missing), "{bucket} {key}");
        }
        // The cleanup would remove such an object.
        let unfinished = at("b", &format!("x/.{}", crate::records::new_id()));
        assert_eq!(store.put(&unfinished, b"content".into()).await, Err(Failure::Missing));
        assert!(matches!(store.head(&at("b", "link/passwd")).await, Err(Failure::Refused(_))));
        let left: Vec<_> = std::fs::read_dir(directory.path().join("b/deleted/x")).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[test]
    fn unfinished_files_are_removed_and_objects_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let store = Directory::open(directory.path()).unwrap();
        let id = crate::records::new_id();
        std::fs::create_dir_all(directory.path().join("b/k")).unwrap();
        let [unfinished, hidden, named] =
            [format!("b/k/.{id}"), "b/k/.profile".into(), format!("b/k/{id}")].map(|at| directory.path().join(at));
        for file in [&unfinished, &hidden, &named] {
            std::fs::write(file, "x").unwrap();
        }
        store.remove_unfinished(Duration::from_hours(1));
        assert!(unfinished.exists(), "it may still be written to");
        store.remove_unfinished(Duration::ZERO);
        assert!(!unfinished.exists() && hidden.exists() && named.exists());
    }

    #[test]
    fn cleanup_removes_the_directories_that_it_empties_but_no_bucket() {
        let directory = tempfile::tempdir().unwrap();
        let store = Directory::open(directory.path()).unwrap();
        let at = |path: &str| directory.path().join(path);
        for emptied in ["b/deleted/x", "b/kept", "emptied"] {
            std::fs::create_dir_all(at(emptied)).unwrap();
            std::fs::write(at(emptied).join(format!(".{}", crate::records::new_id())), "x").unwrap();
        }
        std::fs::write(at("b/kept/object"), "x").unwrap();
        std::fs::create_dir_all(at("b/empty")).unwrap();
        store.remove_unfinished(Duration::ZERO);
        assert!(!at("b/deleted").exists());
        assert!(at("b/kept/object").exists() && at("emptied").exists());
        assert!(at("b/empty").exists(), "a writer may have just made it");
    }

    #[test]
    fn a_signed_path_is_valid_for_its_time_only() {
        let directory = tempfile::tempdir().unwrap();
        let store = Directory::open(directory.path()).unwrap();
        let at = Location { bucket: "b".into(), key: "k".into() };
        let signed = store.signed_path(&at, Duration::from_mins(1));
        let (path, query) = signed.split_once('?').unwrap();
        assert!(store.signed_file(path, query).unwrap().ends_with("b/k"));
        assert_eq!(store.signed_file("/downloads/b/other", query), None);
        assert_eq!(store.signed_file(path, &query.replace("expires=", "expires=1")), None);
        assert_eq!(store.signed_file(path, ""), None);
        let old = store.signed_path(&at, Duration::ZERO);
        let seconds: u64 = old.split("expires=").nth(1).unwrap().split('&').next().unwrap().parse().unwrap();
        assert!(seconds > 0);
    }
}
