//! A store of images, by URL: `s3://bucket[/prefix]` or a directory. The bucket may itself be a directory, which the
//! service of one machine uses instead of an S3 server.

pub(crate) mod bucket;
pub(crate) mod directory;
pub(crate) mod error;
pub(crate) mod place;
pub(crate) mod requests;

use std::future::Future;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::client::{HttpClient, HttpConnector};
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::signer::Signer;
use object_store::{
    Attribute, Attributes, ClientOptions, GetOptions, MultipartId, ObjectStore, ObjectStoreExt, PutPayload, RetryConfig,
};
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};

use crate::error::{Advise, Attempt, Error, Result};
use crate::ims::id::Id;
use crate::log::redaction::without_secrets;
use crate::store::bucket::Asked;
use crate::store::directory::{Directory, Found, etag};
use crate::store::error::{cause, failure};
use crate::store::place::{Place, SIGNED_FOR};
use crate::store::requests::{Outage, Requests, Slice};
use crate::sys::named;
use crate::sys::tree::Tree;
use crate::transfer::checksum::Sha256;
use crate::transfer::network::{Network, Validate};
use crate::transfer::{Redirects, client};

/// Store of images.
pub(crate) struct Store {
    objects: Objects,
    /// Prefix of every key.
    prefix: Path,
    /// Beginning of the URLs of published objects.
    url: String,
}

enum Objects {
    /// A bucket, and the builder for further clients of it: each multipart upload needs a client with its own headers.
    S3 {
        bucket: Arc<AmazonS3>,
        builder: Box<AmazonS3Builder>,
        requests: Requests,
        region: String,
    },
    Directory(Arc<Directory>),
}

/// Metadata key of an object's MD5.
pub(crate) const MD5: &str = "md5sum";

/// Metadata key of an object's SHA-256.
pub(crate) const SHA256: &str = "sha256sum";

/// Media type and metadata of an object. A file in a directory has neither.
pub(crate) struct Description {
    /// Media type.
    pub(crate) media_type: &'static str,
    /// Metadata, as keys and values.
    pub(crate) metadata: Vec<(&'static str, String)>,
}

/// Owner of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The object does not exist.
    Nobody,
    /// This job.
    Ours,
    /// Unknown, as for a file, a manifest, or an object that another program uploaded.
    Untold,
    /// Another image or job.
    Another,
}

/// Beginning of the key of a test upload. A random part follows, because several jobs may test a store at the same
/// time.
const PROBE: &str = ".ims-sshd.probe";

/// Maximum time for which a person waits for the retries of a store; if the store does not answer, twice that.
const SOON: Duration = Duration::from_secs(10);

/// Region for which requests are signed if none is set; stores other than Amazon's ignore it.
const DEFAULT_REGION: &str = "us-east-1";

/// Number of attempts to abort a test upload.
const TRIES_TO_SWEEP: usize = 3;

impl Store {
    /// Opens the store that the variables name. Creates a directory if it does not exist.
    pub(crate) fn open(settings: &Place, network: &Network) -> Result<Self> {
        let Some(url) = &settings.url else {
            return Err(Error::bad_input("no store is named: expected S3_BUCKET, IMAGE_STORE or --store"));
        };
        let refuse = || {
            let expected = if url.starts_with("file:") {
                // After two slashes a URL names a host.
                "file:///ABSOLUTE/DIRECTORY, or the path of a directory without 'file://'"
            } else {
                "s3://BUCKET, file:///DIRECTORY or a directory"
            };
            Error::bad_input(format!("the store is '{}': expected {expected}", without_secrets(url)))
        };
        if let Some(rest) = url.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            // The crate panics on characters that are invalid in a URL.
            if bucket.is_empty() || !bucket.chars().all(|c| c.is_ascii_alphanumeric() || ".-_".contains(c)) {
                return Err(refuse());
            }
            if let Some(buckets) = settings.endpoint.as_deref().and_then(|url| url.strip_prefix(place::DIRECTORY)) {
                // In a directory, such a name would lead elsewhere or be hidden; no bucket's name begins with a dot.
                if !prefix.is_empty() || bucket.starts_with('.') {
                    return Err(refuse());
                }
                let named = std::path::Path::new(buckets).join(bucket);
                let directory = Directory::open(&named).attempt(|| format!("open the store {}", named.display()))?;
                let (objects, url) = (Objects::Directory(Arc::new(directory)), format!("s3://{bucket}"));
                return Ok(Self { objects, prefix: Path::default(), url });
            }
            let (builder, connector) = s3(bucket, settings, network)?;
            let objects = Objects::S3 {
                bucket: Arc::new(build(bucket, builder.clone())?),
                builder: Box::new(builder),
                requests: connector.requests(&HeaderMap::new())?,
                region: settings.region.clone().unwrap_or_else(|| DEFAULT_REGION.into()),
            };
            let prefix = Path::parse(prefix.trim_matches('/')).map_err(|_| refuse())?;
            return Ok(Self { objects, prefix, url: format!("s3://{bucket}") });
        }
        let named = named_directory(url).ok_or_else(refuse)?;
        let directory = Directory::open(&named).attempt(|| format!("open the store {}", named.display()))?;
        let url = format!("file://{}", directory.path().display());
        Ok(Self { objects: Objects::Directory(Arc::new(directory)), prefix: Path::default(), url })
    }

    /// Checks that the store accepts an object; leaves nothing there and creates no directory. Returns the free space
    /// in bytes if it is known.
    pub(crate) async fn check(settings: &Place, network: &Network) -> Result<Option<u64>> {
        let url = settings.url.as_deref().unwrap_or_default();
        let attempted = || format!("write to the store {}", without_secrets(url));
        if let Some(directory) = named_directory(url) {
            directory::refuse_missing_parent(&directory).attempt(attempted)?;
            let directory = named::resolve_beginning(&directory).attempt(attempted)?;
            let place = directory.ancestors().find(|place| place.exists()).unwrap_or(&directory);
            // A file without a name leaves nothing behind if this process is killed.
            let tried = match Tree::open(place).and_then(|tree| tree.create_nameless()) {
                // On a file system without O_TMPFILE, the file gets a name for a moment, and another job has just used
                // that name.
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
                other => other.map(|_| ()),
            };
            tried.attempt(attempted).advise("name a directory that can be written to, or s3://BUCKET")?;
            return Ok(rustix::fs::statvfs(place).ok().map(|disk| disk.f_bavail * disk.f_frsize));
        }
        let probe = format!("{PROBE}.{}", Id::random()?);
        let tried = Self::open(settings, network)?.try_bucket(&probe).await;
        tried.map(|()| None).map_err(|e| Error::new(attempted()).because(cause(&e)))
    }

    /// Like [`Store::check`], but gives up soon, since a person waits. Only warns about a failure that may be over when
    /// the image is uploaded.
    pub(crate) async fn check_soon(settings: &Place, network: &Network) -> Result<()> {
        let url = settings.url.as_deref().unwrap_or_default();
        if named_directory(url).is_some() {
            return Self::check(settings, network).await.map(|_| ());
        }
        let is_shortened = network.retry_limit > SOON;
        let network = Network { retry_limit: network.retry_limit.min(SOON), is_shortened, ..network.clone() };
        let store = Self::open(settings, &network)?;
        let probe = format!("{PROBE}.{}", Id::random()?);
        let shown = without_secrets(url);
        let why = match tokio::time::timeout(SOON * 2, store.try_bucket(&probe)).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(e @ object_store::Error::Generic { .. })) => cause(&e),
            Ok(Err(e)) => return Err(Error::new(format!("write to the store {shown}")).because(cause(&e))),
            Err(_) => format!("no answer within {} s", (SOON * 2).as_secs()),
        };
        tracing::warn!(
            "cannot write to the store {shown} yet: {why}; the image is published only if the store works by then"
        );
        Ok(())
    }

    /// Starts an upload below `probe` in a bucket, and aborts it, even if the response with the upload's ID was lost.
    async fn try_bucket(&self, probe: &str) -> object_store::Result<()> {
        let Objects::S3 { bucket, .. } = &self.objects else { return Ok(()) };
        let path = self.path(&format!("{probe}/begun"));
        let begun = bucket.create_multipart(&path).await;
        if matches!(begun, Ok(_) | Err(object_store::Error::Generic { .. })) {
            for _ in 0..TRIES_TO_SWEEP {
                if self.sweep(probe).await.is_ok() {
                    return begun.map(|_| ());
                }
            }
        }
        // Ignore whether listing worked: keys that may upload objects need not be allowed to list uploads.
        bucket.abort_multipart(&path, &begun?).await
    }

    /// Returns whether the store is a directory, in which people find an image by the name of its directory.
    pub(crate) fn is_directory(&self) -> bool {
        matches!(self.objects, Objects::Directory(_))
    }

    /// Path or URL of an image, for messages.
    pub(crate) fn shown(&self, image: &str) -> String {
        match &self.objects {
            Objects::S3 { .. } => self.url_of(image),
            Objects::Directory(directory) => directory.path().join(image).display().to_string(),
        }
    }

    /// In a directory, the first unused name among `name` and `name` with a number; in a bucket, `name`.
    pub(crate) fn free_name(&self, name: &str) -> String {
        match &self.objects {
            Objects::S3 { .. } => name.to_owned(),
            Objects::Directory(directory) => directory.free_name(name),
        }
    }

    /// In a directory, renames a complete image to `name`, unless that exists. Returns whether the image is at `name`.
    pub(crate) fn place(&self, image: &str, name: &str) -> std::io::Result<bool> {
        match &self.objects {
            Objects::S3 { .. } => Ok(true),
            Objects::Directory(directory) => directory.place(image, name),
        }
    }

    /// URL of an object.
    pub(crate) fn url_of(&self, key: &str) -> String {
        format!("{}/{}", self.url, self.path(key))
    }

    fn path(&self, key: &str) -> Path {
        key.split('/').fold(self.prefix.clone(), Path::join)
    }

    /// Starts a multipart upload, and returns its ID.
    pub(crate) async fn begin(&self, key: &str, description: &Description) -> object_store::Result<MultipartId> {
        match &self.objects {
            Objects::S3 { builder, .. } => {
                // The crate takes no metadata for an upload whose ID it returns, but it sends a client's default
                // headers with each request.
                let options = ClientOptions::new().with_default_headers(description.headers()?);
                let describing = builder.as_ref().clone().with_client_options(options).build()?;
                describing.create_multipart(&self.path(key)).await
            }
            Objects::Directory(directory) => {
                let (image, name) = parts(key)?;
                directory.begin(image, name).map_err(|e| failure(key, e))?;
                Ok(MultipartId::new())
            }
        }
    }

    /// Uploads part `number` of an object, and returns its ETag. Replaces a part that was uploaded before.
    /// A bucket needs the SHA-256 of the content, a directory does not.
    pub(crate) fn put_part(
        &self,
        key: &str,
        id: &MultipartId,
        number: usize,
        content: Slice,
        sha256: Option<Sha256>,
    ) -> impl Future<Output = object_store::Result<String>> + Send + 'static {
        let (path, key, id) = (self.path(key), key.to_owned(), id.clone());
        let place = match &self.objects {
            Objects::S3 { bucket, requests, region, .. } => Ok((bucket.clone(), requests.clone(), region.clone())),
            Objects::Directory(directory) => Err(directory.clone()),
        };
        async move {
            match place {
                Ok((bucket, requests, region)) => {
                    let asked = Asked { bucket: &bucket, requests: &requests, region: &region };
                    asked.put_part(&path, &id, number, &content, sha256.as_ref()).await
                }
                Err(directory) => {
                    let (image, name) = parts(&key)?;
                    let at = content.at;
                    let written = directory.go_on(image, name).and_then(|file| file.write_all_at(&content.read()?, at));
                    written.map(|()| String::new()).map_err(|e| failure(&key, e))
                }
            }
        }
    }

    /// Completes an upload of parts that have these ETags.
    pub(crate) async fn complete(&self, key: &str, id: &MultipartId, etags: Vec<String>) -> object_store::Result<()> {
        match &self.objects {
            Objects::S3 { bucket, .. } => {
                let parts = etags.into_iter().map(|content_id| PartId { content_id }).collect();
                bucket.complete_multipart(&self.path(key), id, parts).await.map(|_| ())
            }
            Objects::Directory(directory) => {
                let (image, name) = parts(key)?;
                directory.complete(image, name).map_err(|e| failure(key, e))
            }
        }
    }

    /// Aborts an upload, if it exists.
    pub(crate) async fn abort(&self, key: &str, id: &MultipartId) -> object_store::Result<()> {
        let aborted = match &self.objects {
            Objects::S3 { bucket, .. } => bucket.abort_multipart(&self.path(key), id).await,
            Objects::Directory(directory) => {
                let (image, name) = parts(key)?;
                directory.remove(image, name, false).map_err(|e| failure(key, e))
            }
        };
        match aborted {
            Err(object_store::Error::NotFound { .. }) => Ok(()),
            other => other,
        }
    }

    /// Uploads a small object in one request.
    pub(crate) async fn put(&self, key: &str, content: Vec<u8>, description: &Description) -> object_store::Result<()> {
        match &self.objects {
            Objects::S3 { bucket, .. } => {
                let attributes = description.attributes();
                bucket.put_opts(&self.path(key), PutPayload::from(content), attributes.into()).await.map(|_| ())
            }
            Objects::Directory(directory) => {
                let (image, name) = parts(key)?;
                directory.put(image, name, &content).map_err(|e| failure(key, e))
            }
        }
    }

    /// ETag of an object, without quotes, and its size.
    pub(crate) async fn head(&self, key: &str) -> object_store::Result<(String, u64)> {
        match &self.objects {
            Objects::S3 { bucket, .. } => {
                let found = bucket.head(&self.path(key)).await?;
                Ok((found.e_tag.unwrap_or_default().trim_matches('"').to_owned(), found.size))
            }
            Objects::Directory(directory) => {
                let (image, name) = parts(key)?;
                let found = directory.look(image, name).map_err(|e| failure(key, e))?;
                let found = found.ok_or_else(|| failure(key, std::io::Error::from(std::io::ErrorKind::NotFound)))?;
                Ok((etag(&found), u64::try_from(found.st_size).unwrap_or(0)))
            }
        }
    }

    /// Returns whether the ETag of an object can be the MD5 of its content. Always false in a directory.
    pub(crate) async fn can_have_md5(&self, key: &str) -> object_store::Result<bool> {
        let Objects::S3 { bucket, requests, region, .. } = &self.objects else { return Ok(false) };
        Asked { bucket, requests, region }.can_have_md5(&self.path(key)).await
    }

    /// Returns whether an object exists and has this size and MD5. Always false for files, which have no metadata.
    pub(crate) async fn holds(&self, key: &str, size: u64, md5: &str) -> bool {
        let Objects::S3 { bucket, .. } = &self.objects else { return false };
        let head = GetOptions { head: true, ..GetOptions::default() };
        let sum = Attribute::Metadata(MD5.into());
        let found = bucket.get_opts(&self.path(key), head).await;
        found
            .is_ok_and(|found| found.meta.size == size && found.attributes.get(&sum).is_some_and(|s| s.as_ref() == md5))
    }

    /// Returns whether an object exists.
    pub(crate) async fn is_there(&self, key: &str) -> object_store::Result<bool> {
        match self.head(key).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Owner of an object, according to its metadata: an object of ours has `metadata`. A file belongs to the owner of
    /// its directory.
    pub(crate) async fn owner(&self, key: &str, metadata: &[(&'static str, String)]) -> object_store::Result<Owner> {
        let bucket = match &self.objects {
            Objects::S3 { bucket, .. } => bucket,
            Objects::Directory(directory) => {
                let (image, name) = parts(key)?;
                if let Found::Others(why) = directory.find(image).map_err(|e| failure(key, e))? {
                    tracing::warn!("{why}");
                    return Ok(Owner::Another);
                }
                let found = directory.look(image, name).map_err(|e| failure(key, e))?;
                return Ok(found.map_or(Owner::Nobody, |_| Owner::Untold));
            }
        };
        let head = GetOptions { head: true, ..GetOptions::default() };
        let found = match bucket.get_opts(&self.path(key), head).await {
            Err(object_store::Error::NotFound { .. }) => return Ok(Owner::Nobody),
            other => other?,
        };
        let is_as_ours = |(name, value): &(&'static str, String)| {
            let told = found.attributes.get(&Attribute::Metadata((*name).into()))?;
            Some(told.as_ref() == in_ascii(value))
        };
        let told: Vec<_> = metadata.iter().filter_map(is_as_ours).collect();
        Ok(match told.iter().all(|is_same| *is_same) {
            _ if told.is_empty() => Owner::Untold,
            true => Owner::Ours,
            false => Owner::Another,
        })
    }

    /// Deletes an object, if it exists, and checks that it is gone.
    pub(crate) async fn delete(&self, key: &str) -> object_store::Result<()> {
        let asked = match &self.objects {
            Objects::S3 { bucket, requests, region, .. } => Asked { bucket, requests, region },
            Objects::Directory(directory) => {
                let (image, name) = parts(key)?;
                return directory.remove(image, name, true).map_err(|e| failure(key, e));
            }
        };
        asked.delete(&self.path(key)).await?;
        if self.is_there(key).await? {
            return Err(failure(
                key,
                std::io::Error::other("the store answers that it is deleted, but it is still there"),
            ));
        }
        Ok(())
    }

    /// Removes the remains of unfinished uploads of an image: in a bucket, aborts them; in a directory, removes partial
    /// files, and the image's directory if it is empty.
    pub(crate) async fn sweep(&self, image: &str) -> object_store::Result<()> {
        let asked = match &self.objects {
            Objects::S3 { bucket, requests, region, .. } => Asked { bucket, requests, region },
            Objects::Directory(directory) => return directory.sweep(image).map_err(|e| failure(image, e)),
        };
        for (name, id) in asked.below(&self.path(image)).await? {
            self.abort(&format!("{image}/{name}"), &id).await?;
        }
        Ok(())
    }
}

/// Splits the key of an object in a directory into its image and its name.
fn parts(key: &str) -> object_store::Result<(&str, &str)> {
    let is_name = |name: &str| !matches!(name, "" | "." | "..") && !name.contains('/');
    key.split_once('/')
        .filter(|(image, name)| is_name(image) && is_name(name))
        .ok_or_else(|| failure(key, std::io::Error::from(std::io::ErrorKind::InvalidInput)))
}

/// Directory that a URL or a path names as a store; `None` if it names another kind of store.
pub(crate) fn named_directory(url: &str) -> Option<PathBuf> {
    match url.split_once("://") {
        // Without a third slash the URL names a host.
        Some(("file", path)) if path.starts_with('/') => Some(path.into()),
        Some(_) => None,
        // A URL with too few slashes; no directory has such a name.
        None if ["s3:", "file:", "http:", "https:"].iter().any(|scheme| url.starts_with(scheme)) => None,
        None => Some(url.into()),
    }
}

impl Description {
    fn attributes(&self) -> Attributes {
        let mut attributes = Attributes::from_iter([(Attribute::ContentType, self.media_type)]);
        for (name, value) in &self.metadata {
            attributes.insert(Attribute::Metadata((*name).into()), in_ascii(value).into());
        }
        attributes
    }

    fn headers(&self) -> object_store::Result<HeaderMap> {
        let mut headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(self.media_type))]);
        for (name, value) in &self.metadata {
            let name = HeaderName::try_from(format!("x-amz-meta-{name}")).map_err(|e| failure(name, e))?;
            headers.insert(name, HeaderValue::try_from(in_ascii(value)).map_err(|e| failure(value, e))?);
        }
        Ok(headers)
    }
}

/// Presigned URL of an object.
pub(crate) async fn sign(bucket: &str, key: &str, settings: &Place, network: &Network) -> Result<String> {
    let attempted = || format!("sign a URL of s3://{bucket}/{key}");
    let path = Path::parse(key).attempt(attempted)?;
    let (builder, _) = s3(bucket, settings, network)?;
    let url = build(bucket, builder)?.signed_url(reqwest::Method::GET, &path, SIGNED_FOR).await;
    url.map(|url| url.to_string()).map_err(|e| Error::new(attempted()).because(cause(&e)))
}

/// Builder of a client for a bucket.
fn s3(bucket: &str, settings: &Place, network: &Network) -> Result<(AmazonS3Builder, Connector)> {
    if settings.endpoint.as_deref().is_some_and(|url| url.starts_with(place::DIRECTORY)) {
        return Err(Error::bad_input(format!(
            "S3_ENDPOINT is a directory: name a file in it, not one in s3://{bucket}"
        )));
    }
    let Some((access, secret)) = &settings.keys else {
        return Err(Error::bad_input(
            "the store's keys are not set: expected S3_ACCESS_KEY and S3_SECRET_KEY, \
             or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ));
    };
    // Without this check, the crate would send the keys and the image to Amazon.
    if settings.endpoint.is_none() && settings.region.is_none() {
        return Err(Error::bad_input(format!(
            "no server is named for the store s3://{bucket}: expected its URL in S3_ENDPOINT or AWS_ENDPOINT_URL, \
             or AWS_REGION if it is Amazon's"
        )));
    }
    // Build a client to check the CA file: the crate would report a wrong one as an error of the store.
    let connector = Connector { network: network.clone(), validate: settings.validate.clone(), outage: Arc::default() };
    connector.client(&HeaderMap::new())?;
    // Disable the crate's retries: the connector's client retries, within the limits of the variables.
    let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(bucket)
        .with_access_key_id(access)
        .with_secret_access_key(secret)
        .with_region(settings.region.as_deref().unwrap_or(DEFAULT_REGION))
        .with_retry(retry)
        .with_http_connector(connector.clone());
    if let Some(token) = &settings.token {
        builder = builder.with_token(token);
    }
    if let Some(endpoint) = &settings.endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    Ok((builder, connector))
}

/// Builds HTTP clients for a store with the same TLS settings as for other servers.
#[derive(Debug, Clone)]
pub(crate) struct Connector {
    network: Network,
    validate: Validate,
    outage: Arc<Outage>,
}

impl Connector {
    fn client(&self, headers: &HeaderMap) -> Result<reqwest::Client> {
        let builder = client(&self.network, &self.validate, Redirects::SameServer)?.default_headers(headers.clone());
        // Timeout of one request, which sends at most one part of an object.
        let builder = builder.timeout(self.network.stall_limit.saturating_mul(10)).http1_only();
        builder.build().attempt(|| "set up TLS")
    }

    fn requests(&self, headers: &HeaderMap) -> Result<Requests> {
        Ok(Requests::new(self.client(headers)?, self.network.clone(), self.outage.clone()))
    }
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let headers = options.get_default_headers().cloned().unwrap_or_default();
        Ok(HttpClient::new(self.requests(&headers).map_err(|e| failure("", e))?))
    }
}

fn build(bucket: &str, builder: AmazonS3Builder) -> Result<AmazonS3> {
    let built = builder.build();
    built.map_err(|e| Error::new(format!("open the store s3://{bucket}")).because(cause(&e)))
}

/// Escapes bytes that are invalid in a header, in the same way as in a URL.
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
    fn metadata_is_escaped_to_ascii() {
        assert_eq!(in_ascii("compute-1.0 x"), "compute-1.0 x");
        assert_eq!(in_ascii("größe 100%\n"), "gr%C3%B6%C3%9Fe 100%25%0A");
    }

    #[test]
    fn store_in_a_file_url_with_a_host_is_refused() {
        for url in ["file://out", "file://", "file:out"] {
            let settings =
                crate::publish::settings::Settings::read(None, [("IMAGE_STORE".into(), url.into())]).unwrap();
            let refusal = Store::open(&settings.store, &settings.network).err().unwrap().to_string();
            assert!(refusal.contains("file:///ABSOLUTE/DIRECTORY, or the path of a directory"), "{url}: {refusal}");
        }
        assert_eq!(named_directory("file:///srv/out"), Some("/srv/out".into()));
        assert_eq!(named_directory("out"), Some("out".into()));
    }

    #[test]
    fn checks_of_a_directory_run_concurrently_and_leave_no_file() {
        use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
        let dir = tempfile::tempdir().unwrap();
        let names = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        names.add_watch(dir.path(), AddWatchFlags::IN_CREATE).unwrap();
        let variables = [("IMAGE_STORE".into(), dir.path().as_os_str().to_owned())];
        let settings = crate::publish::settings::Settings::read(None, variables).unwrap();
        let try_often = || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            (0..3000).try_for_each(|_| runtime.block_on(Store::check(&settings.store, &settings.network)).map(|_| ()))
        };
        std::thread::scope(|scope| {
            let jobs: Vec<_> = (0..4).map(|_| scope.spawn(try_often)).collect();
            for job in jobs {
                job.join().unwrap().unwrap();
            }
        });
        assert_eq!(names.read_events().unwrap_err(), nix::errno::Errno::EAGAIN, "a file had a name");
    }
}
