//! Requests to a bucket that the object_store crate does not send. Only ListMultipartUploads finds an unfinished
//! multipart upload whose ID was lost with a connection or a crash. And objects are deleted one by one: the crate
//! deletes by DeleteObjects, and takes an answer that names no object for a success.

use object_store::MultipartId;
use object_store::aws::{AmazonS3, AwsAuthorizer};
use object_store::client::{HttpClient, HttpRequest, HttpRequestBody, HttpResponse};
use object_store::path::Path;
use object_store::signer::Signer;
use reqwest::{Method, StatusCode};

use crate::store::error::failure;
use crate::store::place::SIGNED_FOR;
use crate::transfer::checksum::etag_is_md5;

/// Sends requests to a bucket.
pub(crate) struct Asked<'a> {
    /// The bucket; knows its URL and credentials.
    pub(crate) bucket: &'a AmazonS3,
    /// HTTP client.
    pub(crate) client: &'a HttpClient,
    /// Region for which requests are signed.
    pub(crate) region: &'a str,
}

impl Asked<'_> {
    /// Lists unfinished uploads with keys below `prefix`: the last segment of each key, and the upload's ID.
    pub(crate) async fn below(&self, prefix: &Path) -> object_store::Result<Vec<(String, MultipartId)>> {
        let query = [("uploads", ""), ("prefix", &format!("{prefix}/"))];
        let answer = self.ask(Method::GET, &Path::default(), &query).await?;
        // The bucket does not exist.
        if answer.status() == StatusCode::NOT_FOUND {
            return Ok(Vec::new());
        }
        refuse(prefix, &answer)?;
        // One answer lists up to 1000 uploads; an image has six keys.
        let text = answer.into_body().bytes().await.map_err(|e| failure(prefix.as_ref(), e))?;
        Ok(parse(&String::from_utf8_lossy(&text)))
    }

    /// Deletes an object. The answer does not say whether it is gone.
    pub(crate) async fn delete(&self, key: &Path) -> object_store::Result<()> {
        let answer = self.ask(Method::DELETE, key, &[]).await?;
        if answer.status() == StatusCode::NOT_FOUND { Ok(()) } else { refuse(key, &answer) }
    }

    /// Returns whether the ETag of an object is the MD5 of its content, by its headers, which the crate does not show.
    pub(crate) async fn has_md5(&self, key: &Path) -> object_store::Result<bool> {
        let answer = self.ask(Method::HEAD, key, &[]).await?;
        refuse(key, &answer)?;
        Ok(etag_is_md5(answer.headers()))
    }

    async fn ask(&self, method: Method, key: &Path, query: &[(&str, &str)]) -> object_store::Result<HttpResponse> {
        let failed = |e| failure(key.as_ref(), e);
        // Only the address is taken from this URL: the request is signed in its headers.
        let mut url = self.bucket.signed_url(method.clone(), key, SIGNED_FOR).await?;
        url.set_query(None);
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let mut request = HttpRequest::new(HttpRequestBody::empty());
        *request.method_mut() = method;
        *request.uri_mut() = url.as_str().parse().map_err(|e| failure(key.as_ref(), e))?;
        let credential = self.bucket.credentials().get_credential().await?;
        AwsAuthorizer::new(&credential, "s3", self.region).authorize(&mut request, None);
        self.client.execute(request).await.map_err(failed)
    }
}

fn refuse(key: &Path, answer: &HttpResponse) -> object_store::Result<()> {
    let status = answer.status();
    if status.is_success() {
        return Ok(());
    }
    Err(failure(key.as_ref(), std::io::Error::other(format!("the server answers {status}"))))
}

/// Parses a listing. The last segment of an image's key contains nothing that XML would escape.
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
