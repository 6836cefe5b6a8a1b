//! A store of images, by URL: `s3://bucket[/prefix]` or a directory.

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
use crate::store::requests::{Outage, Requests};
use crate::sys::named;
use crate::sys::tree::Tree;
use crate::transfer::network::{Network, Validate};
use crate::transfer::{Redirects, client};

/// Store of images.
pub(crate) struct Store {
    objects: Objects,
    /// Before every key.
    prefix: Path,
    /// What a published object's URL begins with.
    url: String,
}

enum Objects {
    /// With what it is made of: one that describes an upload is made for that alone.
    S3 {
        bucket: Arc<AmazonS3>,
        builder: Box<AmazonS3Builder>,
        client: HttpClient,
        region: String,
    },
    Directory(Arc<Directory>),
}

/// Of the further names that of an object's checksum.
pub(crate) const MD5: &str = "md5sum";

/// What is told of an object beside its content. Files have neither.
pub(crate) struct Description {
    /// Its media type.
    pub(crate) media_type: &'static str,
    /// Further names and values.
    pub(crate) metadata: Vec<(&'static str, String)>,
}

/// Whose an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// There is none.
    Nobody,
    /// This job's.
    Ours,
    /// Nothing is told: a file, a manifest, or what others have put there.
    Untold,
    /// Another image's or job's.
    Another,
}

/// Name of an object that is begun to see whether one can be; a random part follows, since several jobs may try one store at a time.
const PROBE: &str = ".ims-sshd.probe";

/// Longest time until people hear that a store does not answer; twice that if it is silent.
const SOON: Duration = Duration::from_secs(10);

/// What requests are signed for where no region is set: stores of one's own do not care.
const DEFAULT_REGION: &str = "us-east-1";

/// Number of tries to find a probe that may be left.
const TRIES_TO_SWEEP: usize = 3;

impl Store {
    /// Opens the store that the variables name. A folder is made if it is not there.
    pub(crate) fn open(settings: &Place, network: &Network) -> Result<Self> {
        let Some(url) = &settings.url else {
            return Err(Error::bad_input("no store is named: expected S3_BUCKET, IMAGE_STORE or --store"));
        };
        let refuse = || {
            Error::bad_input(format!(
                "the store is '{}': expected s3://BUCKET, file:///FOLDER or a folder",
                without_secrets(url)
            ))
        };
        if let Some(rest) = url.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            // The crate panics on what has no place in a URL.
            if bucket.is_empty() || !bucket.chars().all(|c| c.is_ascii_alphanumeric() || ".-_".contains(c)) {
                return Err(refuse());
            }
            let (builder, connector) = s3(bucket, settings, network)?;
            let objects = Objects::S3 {
                bucket: Arc::new(build(bucket, builder.clone())?),
                builder: Box::new(builder),
                client: connector.connect(&ClientOptions::new()).attempt(|| format!("open the store s3://{bucket}"))?,
                region: settings.region.clone().unwrap_or_else(|| DEFAULT_REGION.into()),
            };
            let prefix = Path::parse(prefix.trim_matches('/')).map_err(|_| refuse())?;
            return Ok(Self { objects, prefix, url: format!("s3://{bucket}") });
        }
        let folder = folder(url).ok_or_else(refuse)?;
        let directory = Directory::open(&folder).attempt(|| format!("open the store {}", folder.display()))?;
        let url = format!("file://{}", directory.path().display());
        Ok(Self { objects: Objects::Directory(Arc::new(directory)), prefix: Path::default(), url })
    }

    /// Makes sure that the store that the variables name takes an object, and leaves nothing of one, nor a directory that was not there.
    /// Returns how many bytes fit, where that can be told.
    pub(crate) async fn check(settings: &Place, network: &Network) -> Result<Option<u64>> {
        let url = settings.url.as_deref().unwrap_or_default();
        let attempted = || format!("write to the store {}", without_secrets(url));
        if let Some(folder) = folder(url) {
            let folder = named::resolve_beginning(&folder).attempt(attempted)?;
            let place = folder.ancestors().find(|place| place.exists()).unwrap_or(&folder);
            // Without a name, nothing is left of it after a kill.
            let tried = match Tree::open(place).and_then(|tree| tree.create_nameless()) {
                // Where there are no such files, one has a name for a moment, and another job has just made it.
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

    /// The same where people wait for the answer: what may be otherwise when the image is there is only warned of.
    pub(crate) async fn check_soon(settings: &Place, network: &Network) -> Result<()> {
        let url = settings.url.as_deref().unwrap_or_default();
        if folder(url).is_some() {
            return Self::check(settings, network).await.map(|_| ());
        }
        let network = Network { retry_limit: network.retry_limit.min(SOON), ..network.clone() };
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
            "cannot write to the store {shown} yet: {why}; the image is published only if that is over by then"
        );
        Ok(())
    }

    /// Begins an object of a bucket below `probe`, and takes it back; also where the answer to an earlier try was lost.
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
        // Keys that may put objects need not be ones that may list what was begun.
        bucket.abort_multipart(&path, &begun?).await
    }

    /// Returns whether people look into it, and know an image by its directory's name.
    pub(crate) fn is_directory(&self) -> bool {
        matches!(self.objects, Objects::Directory(_))
    }

    /// Returns the place of an image for people: a path, or a URL.
    pub(crate) fn shown(&self, image: &str) -> String {
        match &self.objects {
            Objects::S3 { .. } => self.url_of(image),
            Objects::Directory(directory) => directory.path().join(image).display().to_string(),
        }
    }

    /// The first of `name`, and that with a number, that no image of a directory has.
    pub(crate) fn free_name(&self, name: &str) -> String {
        match &self.objects {
            Objects::S3 { .. } => name.to_owned(),
            Objects::Directory(directory) => directory.free_name(name),
        }
    }

    /// Puts an image that is whole in its place `name`, unless something of a directory has that name. Returns whether it has been done.
    pub(crate) fn place(&self, image: &str, name: &str) -> std::io::Result<bool> {
        match &self.objects {
            Objects::S3 { .. } => Ok(true),
            Objects::Directory(directory) => directory.place(image, name),
        }
    }

    /// The URL of a key.
    pub(crate) fn url_of(&self, key: &str) -> String {
        format!("{}/{}", self.url, self.path(key))
    }

    fn path(&self, key: &str) -> Path {
        key.split('/').fold(self.prefix.clone(), Path::join)
    }

    /// Begins an object that is put together of parts, and returns what the store calls it.
    pub(crate) async fn begin(&self, key: &str, description: &Description) -> object_store::Result<MultipartId> {
        match &self.objects {
            Objects::S3 { builder, .. } => {
                // The crate gives no description to an upload whose name one gets to know, but such headers to every request.
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

    /// Puts part `number`, which begins at byte `at`, and returns the store's mark of it. One that is there already is replaced.
    pub(crate) fn put_part(
        &self,
        key: &str,
        id: &MultipartId,
        (number, at): (usize, u64),
        content: Vec<u8>,
    ) -> impl Future<Output = object_store::Result<String>> + Send + 'static {
        let (path, key, id) = (self.path(key), key.to_owned(), id.clone());
        let place = match &self.objects {
            Objects::S3 { bucket, .. } => Ok(bucket.clone()),
            Objects::Directory(directory) => Err(directory.clone()),
        };
        async move {
            match place {
                Ok(bucket) => Ok(bucket.put_part(&path, &id, number, content.into()).await?.content_id),
                Err(directory) => {
                    let (image, name) = parts(&key)?;
                    let written = directory.go_on(image, name).and_then(|file| file.write_all_at(&content, at));
                    written.map(|()| String::new()).map_err(|e| failure(&key, e))
                }
            }
        }
    }

    /// Makes one object of all parts, whose marks are `marks`.
    pub(crate) async fn complete(&self, key: &str, id: &MultipartId, marks: Vec<String>) -> object_store::Result<()> {
        match &self.objects {
            Objects::S3 { bucket, .. } => {
                let parts = marks.into_iter().map(|content_id| PartId { content_id }).collect();
                bucket.complete_multipart(&self.path(key), id, parts).await.map(|_| ())
            }
            Objects::Directory(directory) => {
                let (image, name) = parts(key)?;
                directory.complete(image, name).map_err(|e| failure(key, e))
            }
        }
    }

    /// Leaves nothing of an object that was begun; one that is not there is no error.
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

    /// Puts a small object in one piece.
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

    /// The store's own mark of an object's content, without quotes, and the object's size.
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

    /// Whether this object is there, as it was described. Files have no description.
    pub(crate) async fn holds(&self, key: &str, size: u64, md5: &str) -> bool {
        let Objects::S3 { bucket, .. } = &self.objects else { return false };
        let head = GetOptions { head: true, ..GetOptions::default() };
        let sum = Attribute::Metadata(MD5.into());
        let found = bucket.get_opts(&self.path(key), head).await;
        found
            .is_ok_and(|found| found.meta.size == size && found.attributes.get(&sum).is_some_and(|s| s.as_ref() == md5))
    }

    /// Whether an object is there.
    pub(crate) async fn is_there(&self, key: &str) -> object_store::Result<bool> {
        match self.head(key).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Whose an object is, by what is told of it: an object of ours has `marks`. Of a file its directory tells.
    pub(crate) async fn owner(&self, key: &str, marks: &[(&'static str, String)]) -> object_store::Result<Owner> {
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
        let is_as_marked = |(name, value): &(&'static str, String)| {
            let told = found.attributes.get(&Attribute::Metadata((*name).into()))?;
            Some(told.as_ref() == in_ascii(value))
        };
        let told: Vec<_> = marks.iter().filter_map(is_as_marked).collect();
        Ok(match told.iter().all(|is_same| *is_same) {
            _ if told.is_empty() => Owner::Untold,
            true => Owner::Ours,
            false => Owner::Another,
        })
    }

    /// Deletes an object, and makes sure that it is gone; one that is not there is no error.
    pub(crate) async fn delete(&self, key: &str) -> object_store::Result<()> {
        let asked = match &self.objects {
            Objects::S3 { bucket, client, region, .. } => Asked { bucket, client, region },
            Objects::Directory(directory) => {
                let (image, name) = parts(key)?;
                return directory.remove(image, name, true).map_err(|e| failure(key, e));
            }
        };
        asked.delete(&self.path(key)).await?;
        if self.is_there(key).await? {
            return Err(failure(
                key,
                std::io::Error::other("the store says that it is deleted, and it is still there"),
            ));
        }
        Ok(())
    }

    /// Takes back what of an image is no object: uploads that were begun in a bucket; in a directory beginnings of files, and the image's
    /// own one if it is empty.
    pub(crate) async fn sweep(&self, image: &str) -> object_store::Result<()> {
        let asked = match &self.objects {
            Objects::S3 { bucket, client, region, .. } => Asked { bucket, client, region },
            Objects::Directory(directory) => return directory.sweep(image).map_err(|e| failure(image, e)),
        };
        for (name, id) in asked.below(&self.path(image)).await? {
            self.abort(&format!("{image}/{name}"), &id).await?;
        }
        Ok(())
    }
}

/// The image and the name of an object of a directory.
fn parts(key: &str) -> object_store::Result<(&str, &str)> {
    let is_name = |name: &str| !matches!(name, "" | "." | "..") && !name.contains('/');
    key.split_once('/')
        .filter(|(image, name)| is_name(image) && is_name(name))
        .ok_or_else(|| failure(key, std::io::Error::from(std::io::ErrorKind::InvalidInput)))
}

/// The directory that a URL, or a path, names as store.
pub(crate) fn folder(url: &str) -> Option<PathBuf> {
    match url.split_once("://") {
        Some(("file", path)) => Some(path.into()),
        Some(_) => None,
        // A URL with too few slashes, and no directory that anybody has.
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

/// A URL that leads to an object without further keys.
pub(crate) async fn sign(bucket: &str, key: &str, settings: &Place, network: &Network) -> Result<String> {
    let attempted = || format!("sign a URL of s3://{bucket}/{key}");
    let path = Path::parse(key).attempt(attempted)?;
    let (builder, _) = s3(bucket, settings, network)?;
    let url = build(bucket, builder)?.signed_url(reqwest::Method::GET, &path, SIGNED_FOR).await;
    url.map(|url| url.to_string()).map_err(|e| Error::new(attempted()).because(cause(&e)))
}

/// What a bucket is opened with.
fn s3(bucket: &str, settings: &Place, network: &Network) -> Result<(AmazonS3Builder, Connector)> {
    let Some((access, secret)) = &settings.keys else {
        return Err(Error::bad_input(
            "S3_ACCESS_KEY and S3_SECRET_KEY, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, are not set: expected the store's keys",
        ));
    };
    // The crate would send the keys, and the image, to Amazon.
    if settings.endpoint.is_none() && settings.region.is_none() {
        return Err(Error::bad_input(format!(
            "no server is named for the store s3://{bucket}: expected its URL in S3_ENDPOINT or AWS_ENDPOINT_URL, or AWS_REGION if it is Amazon's"
        )));
    }
    // The crate would name the store for an error of the variables.
    let connector = Connector { network: network.clone(), validate: settings.validate.clone(), outage: Arc::default() };
    connector.client(&HeaderMap::new())?;
    // What fails is tried again by the connector's client, within the limits that people set.
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
        // Over TLS nothing is lost by it, and the content is not read once more for its checksum.
        builder = builder.with_endpoint(endpoint).with_unsigned_payload(endpoint.starts_with("https:"));
    }
    Ok((builder, connector))
}

/// Makes a store's client as those of other servers are made.
#[derive(Debug, Clone)]
pub(crate) struct Connector {
    network: Network,
    validate: Validate,
    outage: Arc<Outage>,
}

impl Connector {
    fn client(&self, headers: &HeaderMap) -> Result<reqwest::Client> {
        let builder = client(&self.network, &self.validate, Redirects::SameServer)?.default_headers(headers.clone());
        // The limit is for one request: a part of an object at the most.
        let builder = builder.timeout(self.network.stall_limit.saturating_mul(10)).http1_only();
        builder.build().attempt(|| "set up TLS")
    }
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let headers = options.get_default_headers().cloned().unwrap_or_default();
        let client = self.client(&headers).map_err(|e| failure("", e))?;
        Ok(HttpClient::new(Requests::new(client, self.network.clone(), self.outage.clone())))
    }
}

fn build(bucket: &str, builder: AmazonS3Builder) -> Result<AmazonS3> {
    let built = builder.build();
    built.map_err(|e| Error::new(format!("open the store s3://{bucket}")).because(cause(&e)))
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

    #[test]
    fn several_jobs_may_try_one_store_at_a_time_and_a_kill_leaves_nothing() {
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
