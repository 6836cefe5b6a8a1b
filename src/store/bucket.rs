//! Requests to a bucket that the object_store crate does not send. ListMultipartUploads is the only way to find an
//! unfinished multipart upload whose ID was lost with a connection or in a crash. DeleteObject deletes a single object;
//! the crate uses DeleteObjects instead, and takes a response that names no object for a success. Parts are sent from
//! their file and signed with a known checksum; the crate holds each part in memory, and reads it once more to sign it.

use object_store::MultipartId;
use object_store::aws::{AmazonS3, AwsAuthorizer};
use object_store::client::{HttpRequest, HttpRequestBody, HttpResponse};
use object_store::path::Path;
use object_store::signer::Signer;
use reqwest::header::{CONTENT_LENGTH, ETAG};
use reqwest::{Method, StatusCode, Url};

use crate::store::error::{answered, failure, unanswered};
use crate::store::place::SIGNED_FOR;
use crate::store::requests::{Requests, Slice};
use crate::transfer::checksum::{Sha256, etag_can_be_md5, text_of};

/// Sends requests to a bucket.
pub(crate) struct Asked<'a> {
    /// The bucket, which knows its URL and credentials.
    pub(crate) bucket: &'a AmazonS3,
    /// Sends the requests.
    pub(crate) requests: &'a Requests,
    /// Region for which requests are signed.
    pub(crate) region: &'a str,
}

impl Asked<'_> {
    /// Lists unfinished uploads with keys below `prefix`: the last segment of each key, and the upload's ID.
    pub(crate) async fn below(&self, prefix: &Path) -> object_store::Result<Vec<(String, MultipartId)>> {
        let query = [("uploads", ""), ("prefix", &format!("{prefix}/"))];
        let answer = self.ask(Method::GET, &Path::default(), &query).await?;
        // A missing bucket has no uploads.
        if answer.status() == StatusCode::NOT_FOUND {
            return Ok(Vec::new());
        }
        refuse(prefix, &answer)?;
        // One response lists up to 1000 uploads, which suffices: an image has six keys.
        let text = answer.into_body().bytes().await.map_err(|e| failure(prefix.as_ref(), e))?;
        Ok(parse(&String::from_utf8_lossy(&text)))
    }

    /// Deletes an object. Success does not prove that it is gone: some stores report errors with the status 200.
    pub(crate) async fn delete(&self, key: &Path) -> object_store::Result<()> {
        let answer = self.ask(Method::DELETE, key, &[]).await?;
        if answer.status() == StatusCode::NOT_FOUND { Ok(()) } else { refuse(key, &answer) }
    }

    /// Returns whether the ETag of an object can be its MD5, according to its headers, which the crate does not show.
    pub(crate) async fn can_have_md5(&self, key: &Path) -> object_store::Result<bool> {
        let answer = self.ask(Method::HEAD, key, &[]).await?;
        refuse(key, &answer)?;
        Ok(etag_can_be_md5(answer.headers()))
    }

    /// Uploads part `number`, and returns its ETag. The request is signed with the SHA-256 of the content: a server
    /// refuses a part that has another one.
    pub(crate) async fn put_part(
        &self,
        key: &Path,
        id: &MultipartId,
        number: usize,
        content: &Slice,
        sha256: Option<&Sha256>,
    ) -> object_store::Result<String> {
        let query = [("partNumber", &*(number + 1).to_string()), ("uploadId", id)];
        let mut request = self.request(Method::PUT, key, &query).await?;
        request.headers_mut().insert(CONTENT_LENGTH, content.length.into());
        let credential = self.bucket.credentials().get_credential().await?;
        AwsAuthorizer::new(&credential, "s3", self.region).authorize(&mut request, sha256.map(|sum| &sum[..]));
        let server = origin(&request);
        let answer = self.requests.send(request, Some(content)).await;
        let answer = answer.map_err(|e| unanswered(key.as_ref(), &server, &e))?;
        let (status, etag) = (answer.status(), text_of(answer.headers(), ETAG.as_str()).map(str::to_owned));
        if !status.is_success() {
            let page = answer.into_body().bytes().await.unwrap_or_default();
            return Err(answered(key.as_ref(), &server, status, &page));
        }
        etag.ok_or_else(|| failure(key.as_ref(), std::io::Error::other(format!("{server} tells no ETag of a part"))))
    }

    async fn ask(&self, method: Method, key: &Path, query: &[(&str, &str)]) -> object_store::Result<HttpResponse> {
        let mut request = self.request(method, key, query).await?;
        let credential = self.bucket.credentials().get_credential().await?;
        AwsAuthorizer::new(&credential, "s3", self.region).authorize(&mut request, None);
        self.requests.send(request, None).await.map_err(|e| failure(key.as_ref(), e))
    }

    /// A request that is not signed yet.
    async fn request(&self, method: Method, key: &Path, query: &[(&str, &str)]) -> object_store::Result<HttpRequest> {
        // Use only the address of this presigned URL: requests are signed in their headers.
        let mut url = self.bucket.signed_url(method.clone(), key, SIGNED_FOR).await?;
        url.set_query(None);
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let mut request = HttpRequest::new(HttpRequestBody::empty());
        *request.method_mut() = method;
        *request.uri_mut() = url.as_str().parse().map_err(|e| failure(key.as_ref(), e))?;
        Ok(request)
    }
}

/// The server that a request goes to, for messages.
fn origin(request: &HttpRequest) -> String {
    Url::parse(&request.uri().to_string())
        .map_or_else(|_| "the server".into(), |url| url.origin().ascii_serialization())
}

fn refuse(key: &Path, answer: &HttpResponse) -> object_store::Result<()> {
    let status = answer.status();
    if status.is_success() {
        return Ok(());
    }
    Err(failure(key.as_ref(), std::io::Error::other(format!("the server answers {status}"))))
}

/// Parses a listing. Escapes of XML are ignored, because the last segment of an image's key needs none.
fn parse(listing: &str) -> Vec<(String, MultipartId)> {
    let field = |text: &str, name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        rest.split_once("</").map(|(value, _)| value.to_owned())
    };
    let uploads = listing.split("<Upload>").skip(1);
    uploads
        .filter_map(|upload| Some((field(upload, "Key")?.rsplit('/').next()?.to_owned(), field(upload, "UploadId")?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listing_is_parsed_into_keys_and_upload_ids() {
        let upload = |key, id| {
            format!("<Upload>\n<Key>{key}</Key><Initiator><ID>i</ID></Initiator><UploadId>{id}</UploadId></Upload>")
        };
        let two = format!("<R><Prefix>p/</Prefix>{}{}</R>", upload("a&amp;b/p/rootfs", "2~x"), upload("p/kernel", "3"));
        assert_eq!(parse(&two), [("rootfs".to_owned(), "2~x".to_owned()), ("kernel".to_owned(), "3".to_owned())]);
        assert_eq!(parse("<R></R>"), []);
        assert_eq!(parse("<Upload><Key>truncated"), []);
    }
}
