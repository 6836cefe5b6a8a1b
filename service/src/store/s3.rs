//! An S3 server, used with path-style URLs and with requests that are signed in their headers (SigV4).

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use ims_sshd::error::{Attempt, Error, Result as Started};
use object_store::aws::{AmazonS3Builder, AwsAuthorizer, AwsCredential};
use object_store::client::{HttpRequest, HttpRequestBody};
use object_store::path::Path;
use object_store::signer::Signer;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Certificate, Client, Method, Response, StatusCode};

use super::{Failure, Object, Result};
use crate::records::Location;
use crate::settings::Settings;

/// An S3 server.
pub struct S3 {
    client: Client,
    endpoint: String,
    own: AwsCredential,
    /// Credentials for copying objects whose owner is [`STS`].
    sts: Option<AwsCredential>,
}

/// Region named in signatures; the S3 servers in use ignore it.
const REGION: &str = "us-east-1";

/// Owner, according to the ACL, of objects that only the STS credentials may copy.
const STS: &str = "STS";

/// Pauses before repeating a request that the server did not answer or answered with 5xx.
const PAUSES: [Duration; 3] = [Duration::from_millis(100), Duration::from_millis(500), Duration::from_secs(2)];

/// Maximum size in bytes of an object that S3 copies in one request; larger objects are copied in parts.
const LARGEST_COPY: u64 = 5 << 30;

/// Size of a part of a larger copy, in bytes.
const PART: u64 = 1 << 30;

/// Timeout for copying one object or part, during which a server may send nothing.
const COPY_TIMEOUT: Duration = Duration::from_hours(1);

/// Prefix of the headers that carry user metadata.
const METADATA: &str = "x-amz-meta-";

impl S3 {
    /// A client for the server at `endpoint`.
    pub fn new(endpoint: &str, settings: &Settings) -> Started<Self> {
        let credential = |key: &str, secret: &str| AwsCredential {
            key_id: key.to_owned(),
            secret_key: secret.to_owned(),
            token: None,
        };
        let client = Client::builder()
            .connect_timeout(Duration::from_secs(settings.s3_connect_timeout))
            .read_timeout(Duration::from_secs(settings.s3_read_timeout))
            .redirect(reqwest::redirect::Policy::none());
        let client = match settings.s3_ssl_validate.to_ascii_lowercase().as_str() {
            "" | "false" | "off" | "no" | "f" | "0" => client.danger_accept_invalid_certs(true),
            _ => {
                let attempted = || format!("read the authorities in {}", settings.s3_ssl_validate);
                let text = std::fs::read(&settings.s3_ssl_validate).attempt(attempted)?;
                let authorities = Certificate::from_pem_bundle(&text).attempt(attempted)?;
                authorities.into_iter().fold(client, reqwest::ClientBuilder::add_root_certificate)
            }
        };
        let sts = settings.s3_sts_access_key.as_deref().zip(settings.s3_sts_secret_key.as_deref());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            return Err(Error::bad_input(format!(
                "S3_ENDPOINT is '{endpoint}': expected http://…, https://… or file:///DIRECTORY"
            )));
        }
        Ok(Self {
            client: client.build().attempt(|| "set up TLS")?,
            endpoint,
            own: credential(&settings.s3_access_key, &settings.s3_secret_key),
            sts: sts.map(|(key, secret)| credential(key, secret)),
        })
    }

    pub(super) async fn head(&self, at: &Location) -> Result<Object> {
        self.head_as(&self.own, at).await
    }

    async fn head_as(&self, credential: &AwsCredential, at: &Location) -> Result<Object> {
        let answer = self.ask(credential, &Call::new(Method::HEAD, at)).await?;
        let header = |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok());
        let metadata = answer.headers().iter().filter_map(|(name, value)| {
            let name = name.as_str().strip_prefix(METADATA)?;
            Some((name.to_owned(), value.to_str().ok()?.to_owned()))
        });
        Ok(Object {
            size: header("content-length").and_then(|size| size.parse().ok()).unwrap_or(0),
            etag: header("etag").map(|etag| etag.trim_matches('"').to_owned()).unwrap_or_default(),
            metadata: metadata.collect(),
        })
    }

    pub(super) async fn get(&self, at: &Location, limit: u64) -> Result<Vec<u8>> {
        let mut answer = self.ask(&self.own, &Call::new(Method::GET, at)).await?;
        let mut content = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(|e| unreachable(&e))? {
            if (content.len() + chunk.len()) as u64 >= limit {
                return Err(Failure::TooLarge);
            }
            content.extend_from_slice(&chunk);
        }
        Ok(content)
    }

    pub(super) async fn put(&self, at: &Location, content: Vec<u8>) -> Result<String> {
        let answer = self.ask(&self.own, &Call { body: content, ..Call::new(Method::PUT, at) }).await?;
        let etag = answer.headers().get("etag").and_then(|value| value.to_str().ok());
        Ok(etag.unwrap_or_default().trim_matches('"').to_owned())
    }

    pub(super) async fn copy(&self, from: &Location, to: &Location) -> Result<String> {
        let credential = self.copier(from).await?;
        let object = self.head_as(credential, from).await?;
        if object.size > LARGEST_COPY {
            self.copy_in_parts(credential, from, to, &object).await?;
        } else {
            // Without the header `x-amz-metadata-directive`, S3 copies the metadata.
            let call = Call { timeout: COPY_TIMEOUT, ..Call::new(Method::PUT, to).copying(from) };
            self.text(credential, &call, "CopyObjectResult").await?;
        }
        let copy = self.head_as(credential, to).await?;
        if copy.size != object.size {
            return Err(Failure::Refused(format!("the copy has {} bytes in place of {}", copy.size, object.size)));
        }
        Ok(copy.etag)
    }

    /// Copies an object in parts. In this case S3 does not copy the metadata, so the request that creates the upload
    /// contains them.
    async fn copy_in_parts(
        &self,
        credential: &AwsCredential,
        from: &Location,
        to: &Location,
        object: &Object,
    ) -> Result<()> {
        let headers = object.metadata.iter().map(|(name, value)| (format!("{METADATA}{name}"), value.clone()));
        let create = Call { headers: headers.collect(), ..Call::new(Method::POST, to).with(&[("uploads", "")]) };
        let text = self.text(credential, &create, "InitiateMultipartUploadResult").await?;
        let upload = element(&text, "UploadId").ok_or_else(|| Failure::Refused("no upload ID in the answer".into()))?;
        let copied = self.parts(credential, from, to, object.size, upload).await;
        if copied.is_err() {
            let abort = Call::new(Method::DELETE, to).with(&[("uploadId", upload)]);
            if let Err(why) = self.ask(credential, &abort).await {
                tracing::warn!("cannot abort the upload {upload} of {to}: {why}; abort it by hand");
            }
        }
        copied
    }

    async fn parts(
        &self,
        credential: &AwsCredential,
        from: &Location,
        to: &Location,
        size: u64,
        upload: &str,
    ) -> Result<()> {
        let mut parts = String::new();
        let mut number = 0;
        while number * PART < size {
            let range = format!("bytes={}-{}", number * PART, ((number + 1) * PART).min(size) - 1);
            number += 1;
            let call = Call::new(Method::PUT, to).copying(from);
            let mut call = call.with(&[("partNumber", &number.to_string()), ("uploadId", upload)]);
            call.headers.insert("x-amz-copy-source-range".into(), range);
            call.timeout = COPY_TIMEOUT;
            let text = self.text(credential, &call, "CopyPartResult").await?;
            let etag = element(&text, "ETag").unwrap_or_default();
            let _ = write!(parts, "<Part><PartNumber>{number}</PartNumber><ETag>{etag}</ETag></Part>");
        }
        let body = format!("<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>").into_bytes();
        let complete = Call { body, ..Call::new(Method::POST, to).with(&[("uploadId", upload)]) };
        self.text(credential, &complete, "CompleteMultipartUploadResult").await.map(drop)
    }

    pub(super) async fn remove(&self, at: &Location) -> Result<()> {
        match self.ask(&self.own, &Call::new(Method::DELETE, at)).await {
            // A server may answer 200 and report an error in the body.
            Ok(answer) => match answer.text().await.map_err(|e| unreachable(&e))? {
                text if text.contains("<Error>") => Err(Failure::Refused(format!("the store has not removed {at}"))),
                _ => Ok(()),
            },
            Err(Failure::Missing) => Ok(()),
            Err(failure) => Err(failure),
        }
    }

    pub(super) async fn signed_url(&self, at: &Location, valid: Duration) -> Result<String> {
        let refused = |e: &dyn std::fmt::Display| Failure::Refused(format!("cannot sign a URL of {at}: {e}"));
        let bucket = AmazonS3Builder::new()
            .with_endpoint(&self.endpoint)
            .with_allow_http(true)
            .with_bucket_name(&at.bucket)
            .with_region(REGION)
            .with_access_key_id(&self.own.key_id)
            .with_secret_access_key(&self.own.secret_key);
        let bucket = bucket.build().map_err(|e| refused(&e))?;
        let key = Path::parse(&at.key).map_err(|e| refused(&e))?;
        bucket.signed_url(Method::GET, &key, valid).await.map(Into::into).map_err(|e| refused(&e))
    }

    /// Returns the credentials that may copy the object.
    async fn copier(&self, at: &Location) -> Result<&AwsCredential> {
        let Some(sts) = &self.sts else { return Ok(&self.own) };
        let answer = self.ask(&self.own, &Call::new(Method::GET, at).with(&[("acl", "")])).await?;
        let text = answer.text().await.map_err(|e| unreachable(&e))?;
        let owner = element(&text, "Owner").and_then(|owner| element(owner, "ID"));
        Ok(if owner == Some(STS) { sts } else { &self.own })
    }

    /// Sends a request, and returns its XML answer. Fails if the answer lacks the element `root`: S3 may answer 200 and
    /// report an error in the body.
    async fn text(&self, credential: &AwsCredential, call: &Call<'_>, root: &str) -> Result<String> {
        let text = self.ask(credential, call).await?.text().await.map_err(|e| unreachable(&e))?;
        if element(&text, root).is_some() || text.contains(&format!("<{root} ")) {
            return Ok(text);
        }
        let code = element(&text, "Code").unwrap_or("an answer without a result");
        Err(Failure::Refused(format!("the store answers {code} to the copy of {}", call.at)))
    }

    async fn ask(&self, credential: &AwsCredential, call: &Call<'_>) -> Result<Response> {
        let mut pauses = PAUSES.iter();
        loop {
            let failure = match self.send(credential, call).await {
                Ok(answer) if answer.status().is_success() => return Ok(answer),
                Ok(answer) if answer.status() == StatusCode::NOT_FOUND => return Err(Failure::Missing),
                Ok(answer) => {
                    let status = answer.status();
                    let why = format!("the store answers {status} to {} {}", call.method, call.at);
                    if !status.is_server_error() {
                        return Err(Failure::Refused(why));
                    }
                    Failure::Refused(why)
                }
                Err(failure) => failure,
            };
            let Some(pause) = pauses.next() else { return Err(failure) };
            tokio::time::sleep(*pause).await;
        }
    }

    async fn send(&self, credential: &AwsCredential, call: &Call<'_>) -> Result<Response> {
        let refused = |e: &dyn std::fmt::Display| Failure::Refused(format!("cannot ask for {}: {e}", call.at));
        let mut request = HttpRequest::new(HttpRequestBody::from(call.body.clone()));
        *request.method_mut() = call.method.clone();
        *request.uri_mut() = call.url(&self.endpoint).parse().map_err(|e| refused(&e))?;
        for (name, value) in &call.headers {
            let name = HeaderName::try_from(name).map_err(|e| refused(&e))?;
            request.headers_mut().insert(name, HeaderValue::try_from(value).map_err(|e| refused(&e))?);
        }
        AwsAuthorizer::new(credential, "s3", REGION).authorize(&mut request, None);
        let (url, headers): (_, HeaderMap) = (request.uri().to_string(), std::mem::take(request.headers_mut()));
        let mut send = self.client.request(call.method.clone(), url).headers(headers).timeout(call.timeout);
        if !call.body.is_empty() || matches!(call.method, Method::PUT | Method::POST) {
            send = send.body(call.body.clone());
        }
        send.send().await.map_err(|e| unreachable(&e))
    }
}

/// A request.
struct Call<'a> {
    method: Method,
    at: &'a Location,
    query: Vec<(String, String)>,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
    timeout: Duration,
}

impl<'a> Call<'a> {
    fn new(method: Method, at: &'a Location) -> Self {
        let timeout = Duration::from_mins(5);
        Self { method, at, query: Vec::new(), headers: BTreeMap::new(), body: Vec::new(), timeout }
    }

    fn with(mut self, query: &[(&str, &str)]) -> Self {
        self.query.extend(query.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        self
    }

    fn copying(mut self, from: &Location) -> Self {
        let source = format!("/{}/{}", from.bucket, escaped(&from.key, b"/"));
        self.headers.insert("x-amz-copy-source".into(), source);
        self
    }

    fn url(&self, endpoint: &str) -> String {
        let mut url = format!("{endpoint}/{}/{}", escaped(&self.at.bucket, b""), escaped(&self.at.key, b"/"));
        for (index, (name, value)) in self.query.iter().enumerate() {
            let start = if index == 0 { '?' } else { '&' };
            let _ = write!(url, "{start}{}={}", escaped(name, b""), escaped(value, b""));
        }
        url
    }
}

/// Percent-encodes a text as signatures require: everything but the unreserved characters and those in `kept`.
fn escaped(text: &str, kept: &[u8]) -> String {
    text.bytes().fold(String::new(), |mut escaped, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || kept.contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            write!(escaped, "%{byte:02X}").expect("a string takes all");
        }
        escaped
    })
}

/// Percent-encodes the path of a URL.
pub(super) fn escaped_path(path: &str) -> String {
    escaped(path, b"/")
}

fn unreachable(error: &reqwest::Error) -> Failure {
    let mut why = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        why = cause.to_string();
        source = cause.source();
    }
    Failure::Unreachable(format!("the store does not answer: {why}"))
}

/// Returns the content of the first XML element `name`.
fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("<{name}"))?;
    let (attributes, rest) = rest.split_once('>')?;
    (attributes.is_empty() || attributes.starts_with(' '))
        .then(|| rest.split_once(&format!("</{name}>")))?
        .map(|(e, _)| e)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_escaped_as_signatures_want_them() {
        let at = Location { bucket: "b".into(), key: "a b/ä+c?v=1".into() };
        let call = Call::new(Method::PUT, &at).with(&[("uploads", ""), ("uploadId", "1/2")]);
        assert_eq!(call.url("http://s3"), "http://s3/b/a%20b/%C3%A4%2Bc%3Fv%3D1?uploads=&uploadId=1%2F2");
        assert_eq!(call.copying(&at).headers["x-amz-copy-source"], "/b/a%20b/%C3%A4%2Bc%3Fv%3D1");
    }

    #[test]
    fn elements_are_found_with_and_without_attributes() {
        let text = r#"<?xml version="1.0"?><A xmlns="x"><Owner><ID>STS</ID></Owner><ETagX>1</ETagX></A>"#;
        assert_eq!(element(text, "Owner").and_then(|owner| element(owner, "ID")), Some("STS"));
        assert!(element(text, "A").is_some());
        assert_eq!(element(text, "ETag"), None);
    }
}
