//! A store of images, by URL: `s3://bucket[/prefix]` or a folder.

use std::path::{Path as FilePath, PathBuf};
use std::time::Duration;

use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::signer::Signer;
use object_store::{
    Attribute, Attributes, BackoffConfig, Certificate, ClientOptions, ObjectStore, ObjectStoreExt, PutMultipartOptions,
    PutPayload, RetryConfig,
};

use crate::error::{Attempt, Error, Result};
use crate::publish::settings::{self, Network, Validate};
use crate::publish::work::{authorities, in_full};

/// How long a URL that was signed here is good for.
const SIGNED_FOR: Duration = Duration::from_hours(6);

/// Where images are kept.
pub struct Store {
    objects: Box<dyn ObjectStore>,
    /// Before every key.
    prefix: Path,
    /// What a published object's URL begins with.
    url: String,
    /// Whether objects have types and metadata, which files have not.
    described: bool,
}

impl Store {
    /// Opens the store that the variables name. A folder is made if it is not there.
    pub fn open(settings: &settings::Store, network: &Network) -> Result<Self> {
        let Some(url) = &settings.url else {
            return Err(Error::bad_input("no store is named: expected S3_BUCKET, IMAGE_STORE or --store"));
        };
        let refuse =
            || Error::bad_input(format!("the store is '{url}': expected s3://BUCKET, file:///FOLDER or a folder"));
        if let Some(rest) = url.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            if bucket.is_empty() {
                return Err(refuse());
            }
            let objects = Box::new(s3(bucket, settings, network)?);
            let prefix = Path::parse(prefix.trim_matches('/')).map_err(|_| refuse())?;
            return Ok(Self { objects, prefix, url: format!("s3://{bucket}"), described: true });
        }
        let folder = match url.split_once("://") {
            Some(("file", path)) => PathBuf::from(path),
            Some(_) => return Err(refuse()),
            None => PathBuf::from(url),
        };
        let attempted = || format!("open the store {}", folder.display());
        std::fs::create_dir_all(&folder).attempt(attempted)?;
        let folder = std::fs::canonicalize(&folder).attempt(attempted)?;
        let objects = LocalFileSystem::new_with_prefix(&folder).attempt(attempted)?;
        let url = format!("file://{}", folder.display());
        Ok(Self { objects: Box::new(objects), prefix: Path::default(), url, described: false })
    }

    /// The URL of a key.
    pub fn url_of(&self, key: &str) -> String {
        format!("{}/{}", self.url, self.path(key))
    }

    fn path(&self, key: &str) -> Path {
        key.split('/').fold(self.prefix.clone(), Path::join)
    }

    /// Begins an object that is put together of parts.
    pub async fn begin(
        &self,
        key: &str,
        media_type: &'static str,
        metadata: &[(&'static str, String)],
    ) -> object_store::Result<Box<dyn object_store::MultipartUpload>> {
        let options = PutMultipartOptions { attributes: self.attributes(media_type, metadata), ..Default::default() };
        self.objects.put_multipart_opts(&self.path(key), options).await
    }

    /// Puts a small object in one piece.
    pub async fn put(
        &self,
        key: &str,
        content: Vec<u8>,
        media_type: &'static str,
        metadata: &[(&'static str, String)],
    ) -> object_store::Result<()> {
        let options = self.attributes(media_type, metadata).into();
        self.objects.put_opts(&self.path(key), PutPayload::from(content), options).await.map(|_| ())
    }

    fn attributes(&self, media_type: &'static str, metadata: &[(&'static str, String)]) -> Attributes {
        let mut attributes = Attributes::new();
        if self.described {
            attributes.insert(Attribute::ContentType, media_type.into());
            for (name, value) in metadata {
                attributes.insert(Attribute::Metadata((*name).into()), in_ascii(value).into());
            }
        }
        attributes
    }

    /// The store's own mark of an object's content, without quotes, and the object's size.
    pub async fn head(&self, key: &str) -> object_store::Result<(String, u64)> {
        let found = self.objects.head(&self.path(key)).await?;
        Ok((found.e_tag.unwrap_or_default().trim_matches('"').to_owned(), found.size))
    }

    /// Deletes these keys; one that is not there is no error.
    pub async fn delete(&self, keys: impl Iterator<Item = String>) -> object_store::Result<()> {
        for key in keys {
            match self.objects.delete(&self.path(&key)).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// What of an image lies in a folder and is no object (any more): the folder itself, and beginnings of files.
    pub fn sweep(&self, image: &str) {
        if let Some(folder) = self.url.strip_prefix("file://").filter(|_| !image.is_empty()) {
            let folder = FilePath::new(folder).join(image);
            let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
            for begun in entries.filter(|e| e.file_name().to_string_lossy().contains('#')) {
                let _ = std::fs::remove_file(begun.path());
            }
            let _ = std::fs::remove_dir(folder);
        }
    }
}

/// A URL that leads to an object without further keys.
pub async fn sign(bucket: &str, key: &str, settings: &settings::Store, network: &Network) -> Result<String> {
    let attempted = || format!("sign a URL of s3://{bucket}/{key}");
    let path = Path::parse(key).attempt(attempted)?;
    let url = s3(bucket, settings, network)?.signed_url(reqwest::Method::GET, &path, SIGNED_FOR).await;
    url.map(|url| url.to_string()).map_err(|e| Error::new(attempted()).because(in_full(&e)))
}

fn s3(bucket: &str, settings: &settings::Store, network: &Network) -> Result<AmazonS3> {
    let Some((access, secret)) = &settings.keys else {
        return Err(Error::bad_input("S3_ACCESS_KEY and S3_SECRET_KEY are not set: expected the store's keys"));
    };
    let mut options = ClientOptions::new()
        .with_connect_timeout(network.stall_limit)
        // Of one request: a part of an object at the most.
        .with_timeout(network.stall_limit.saturating_mul(10))
        .with_allow_http(true)
        .with_allow_invalid_certificates(settings.validate == Validate::No);
    for certificate in authorities(network, &settings.validate)? {
        let certificate = Certificate::from_der(&certificate).attempt(|| "take the certificates of CA_CERT")?;
        options = options.with_root_certificate(certificate);
    }
    let retry = RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(10),
            base: 2.,
        },
        max_retries: 50,
        retry_timeout: network.retry_limit,
    };
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(bucket)
        .with_access_key_id(access)
        .with_secret_access_key(secret)
        .with_region("us-east-1")
        .with_client_options(options)
        .with_retry(retry);
    if let Some(endpoint) = &settings.endpoint {
        // Over TLS nothing is lost by it, and the content is not read once more for its checksum.
        builder = builder.with_endpoint(endpoint).with_unsigned_payload(endpoint.starts_with("https:"));
    }
    builder.build().map_err(|e| Error::new(format!("open the store s3://{bucket}")).because(in_full(&e)))
}

/// What is not ASCII has no place in a header: written as in a URL.
fn in_ascii(text: &str) -> String {
    use std::fmt::Write;
    text.bytes().fold(String::new(), |mut written, byte| {
        if byte.is_ascii_graphic() && byte != b'%' || byte == b' ' {
            written.push(char::from(byte));
        } else {
            let _ = write!(written, "%{byte:02X}");
        }
        written
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_ascii_whatever_an_image_is_called() {
        assert_eq!(in_ascii("compute-1.0 x"), "compute-1.0 x");
        assert_eq!(in_ascii("größe 100%\n"), "gr%C3%B6%C3%9Fe 100%25%0A");
    }
}
