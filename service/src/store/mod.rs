//! Objects to which the links of records point: in S3, or in a directory of this machine.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use ims_sshd::error::Result as Started;

use crate::records::Location;
use crate::settings::Settings;

mod directory;
mod s3;

pub use directory::Directory;
pub use s3::S3;

/// Properties of an object, which a store returns without the object's content.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Object {
    /// Size in bytes.
    pub size: u64,
    /// ETag without quotes.
    pub etag: String,
    /// User metadata, with names in lower case.
    pub metadata: std::collections::BTreeMap<String, String>,
}

/// Reason why a request to a store failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// There is no such object or bucket.
    Missing,
    /// The store answered and refused the request.
    Refused(String),
    /// The store did not answer.
    Unreachable(String),
    /// The object is not smaller than the limit.
    TooLarge,
}

/// Result of a request to a store.
pub type Result<T> = std::result::Result<T, Failure>;

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("there is no such object"),
            Self::Refused(why) | Self::Unreachable(why) => f.write_str(why),
            Self::TooLarge => f.write_str("it is too large"),
        }
    }
}

/// A store of objects.
pub enum Store {
    /// An S3 server.
    S3(Box<S3>),
    /// A directory with a subdirectory for each bucket.
    Directory(Directory),
}

impl Store {
    /// Opens the store that the settings name.
    pub fn open(settings: &Settings) -> Started<Self> {
        match settings.s3_endpoint.strip_prefix("file://") {
            Some(directory) if directory.starts_with('/') => Ok(Self::Directory(Directory::open(directory.as_ref())?)),
            _ => Ok(Self::S3(Box::new(S3::new(&settings.s3_endpoint, settings)?))),
        }
    }

    /// Requests an object's size, ETag and metadata.
    pub async fn head(&self, at: &Location) -> Result<Object> {
        match self {
            Self::S3(s3) => s3.head(at).await,
            Self::Directory(directory) => directory.head(at).await,
        }
    }

    /// Reads an object. Fails with [`Failure::TooLarge`] unless it is smaller than `limit` bytes.
    pub async fn get(&self, at: &Location, limit: u64) -> Result<Vec<u8>> {
        match self {
            Self::S3(s3) => s3.get(at, limit).await,
            Self::Directory(directory) => directory.get(at, limit).await,
        }
    }

    /// Writes an object and returns its ETag.
    pub async fn put(&self, at: &Location, content: Vec<u8>) -> Result<String> {
        match self {
            Self::S3(s3) => s3.put(at, content).await,
            Self::Directory(directory) => directory.put(at, content).await,
        }
    }

    /// Copies an object with its metadata, and returns the copy's ETag.
    pub async fn copy(&self, from: &Location, to: &Location) -> Result<String> {
        match self {
            Self::S3(s3) => s3.copy(from, to).await,
            Self::Directory(directory) => directory.copy(from, to).await,
        }
    }

    /// Removes an object; a missing object is no failure.
    pub async fn remove(&self, at: &Location) -> Result<()> {
        match self {
            Self::S3(s3) => s3.remove(at).await,
            Self::Directory(directory) => directory.remove(at).await,
        }
    }

    /// Removes files that a killed process was writing in a directory, and that nobody has changed for the time `age`.
    pub fn remove_unfinished(&self, age: Duration) {
        if let Self::Directory(directory) = self {
            directory.remove_unfinished(age);
        }
    }

    /// Returns a URL at which an object can be read without credentials during the time `valid`. For a store in a
    /// directory, this is a path below the service's own URL.
    pub async fn signed_url(&self, at: &Location, valid: Duration) -> Result<String> {
        match self {
            Self::S3(s3) => s3.signed_url(at, valid).await,
            Self::Directory(directory) => Ok(directory.signed_path(at, valid)),
        }
    }

    /// Returns the file of the object that a path from [`Store::signed_url`] names; `None` if the signature is wrong or
    /// has expired.
    pub fn signed_file(&self, path: &str, query: &str) -> Option<PathBuf> {
        match self {
            Self::S3(_) => None,
            Self::Directory(directory) => directory.signed_file(path, query),
        }
    }
}
