//! Links of records to objects.

use serde::{Deserialize, Serialize};

/// Link to an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// URL of the object; its scheme is ignored.
    pub path: String,
    /// ETag without quotes; may be empty.
    #[serde(default)]
    pub etag: String,
    /// Type of the link: `s3`.
    #[serde(rename = "type")]
    pub kind: String,
}

/// Bucket and key of an object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Location {
    /// Bucket.
    pub bucket: String,
    /// Key.
    pub key: String,
}

impl Link {
    /// Link to the object at `location`.
    pub fn new(location: &Location, etag: impl Into<String>) -> Self {
        Self { path: location.to_string(), etag: etag.into(), kind: "s3".into() }
    }

    /// Returns the location of the object; `None` if the URL has no bucket or no key.
    pub fn location(&self) -> Option<Location> {
        Location::parse(&self.path)
    }
}

impl Location {
    /// Parses a URL: the host is the bucket, and everything after it, including a query, is the key.
    pub fn parse(url: &str) -> Option<Self> {
        let (_, rest) = url.split_once("://")?;
        let (bucket, key) = rest.split_once('/')?;
        let key = key.split('#').next().unwrap_or_default();
        let fits = !bucket.is_empty() && !key.is_empty() && !url.contains('\0');
        fits.then(|| Self { bucket: bucket.to_owned(), key: key.to_owned() })
    }

    /// Returns the location to which a soft delete moves the object.
    #[must_use]
    pub fn when_deleted(&self) -> Self {
        Self { bucket: self.bucket.clone(), key: format!("{DELETED}{}", self.key) }
    }

    /// Returns the location to which an undelete moves the object; `None` if the object is at no location of a soft
    /// delete.
    pub fn when_undeleted(&self) -> Option<Self> {
        let key = self.key.strip_prefix(DELETED).filter(|key| !key.is_empty())?;
        Some(Self { bucket: self.bucket.clone(), key: key.to_owned() })
    }
}

/// Prefix that a soft delete adds to the keys of objects.
const DELETED: &str = "deleted/";

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "s3://{}/{}", self.bucket, self.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_is_the_bucket_and_the_rest_the_key() {
        let parsed = |url| Location::parse(url).map(|location| (location.bucket, location.key));
        let pair = |bucket: &str, key: &str| Some((bucket.to_owned(), key.to_owned()));
        assert_eq!(parsed("s3://boot-images/a/b c"), pair("boot-images", "a/b c"));
        assert_eq!(parsed("http://ims/k?v=1"), pair("ims", "k?v=1"));
        for wrong in ["", "k", "s3://b/\0", "/a/b", "s3://", "s3://b", "s3://b/", "s3:///k"] {
            assert_eq!(parsed(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn deleted_keys_have_a_prefix() {
        let location = Location::parse("s3://b/k/x").unwrap();
        let deleted = location.when_deleted();
        assert_eq!(deleted.to_string(), "s3://b/deleted/k/x");
        assert_eq!(deleted.when_undeleted(), Some(location.clone()));
        assert_eq!(location.when_undeleted(), None);
        assert_eq!(Location::parse("s3://b/deletedx/k").unwrap().when_undeleted(), None);
    }
}
