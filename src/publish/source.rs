//! Source of an image: where it is fetched from.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::log::redaction::without_secrets;

/// Location of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// An http or https URL; presigned if the server requires that.
    Web(String),
    /// An object in a store: bucket and key.
    S3(String, String),
    /// A file or directory on this machine.
    Here(PathBuf),
}

impl Source {
    /// Parses a source from the command line.
    pub fn parse(text: &str) -> Result<Self> {
        let refuse =
            |expected: &str| Error::bad_input(format!("SOURCE is '{}': expected {expected}", without_secrets(text)));
        match text.split_once("://") {
            Some(("http" | "https", _)) => Ok(Self::Web(text.to_owned())),
            Some(("s3", rest)) => match rest.split_once('/') {
                Some((bucket, key)) if !bucket.is_empty() && !key.is_empty() => {
                    Ok(Self::S3(bucket.to_owned(), key.to_owned()))
                }
                _ => Err(refuse("s3://BUCKET/KEY")),
            },
            Some(("file", path)) if path.starts_with('/') => Ok(Self::Here(path.into())),
            // The URL names a host.
            Some(("file", _)) => Err(refuse("file:///ABSOLUTE/PATH, or a path without 'file://'")),
            Some(_) => {
                Err(refuse("a URL of http, https, s3 or file, a directory, a squashfs or an archive of tar or cpio"))
            }
            None if text.is_empty() => Err(refuse("a URL, a directory, a squashfs or an archive of tar or cpio")),
            None => Ok(Self::Here(text.into())),
        }
    }
}

/// Replaces the directory of a published image by the root file system in it; returns any other source as it is.
pub fn rootfs_of(named: String) -> String {
    let path = Path::new(&named);
    let is_published = ["manifest.json", "rootfs"].iter().all(|name| path.join(name).is_file());
    if is_published { path.join("rootfs").to_string_lossy().into_owned() } else { named }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_a_url_or_a_path() {
        assert_eq!(Source::parse("https://h/k?x=1").unwrap(), Source::Web("https://h/k?x=1".into()));
        assert_eq!(Source::parse("s3://b/a/k").unwrap(), Source::S3("b".into(), "a/k".into()));
        assert_eq!(Source::parse("./image").unwrap(), Source::Here("./image".into()));
        assert_eq!(Source::parse("file:///srv/image").unwrap(), Source::Here("/srv/image".into()));
        for wrong in ["", "ftp://h/k", "s3://bucket", "s3:///key", "file://image"] {
            assert_eq!(Source::parse(wrong).unwrap_err().exit_code(), 2, "{wrong}");
        }
    }
}
