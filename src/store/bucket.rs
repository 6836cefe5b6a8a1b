//! Requests to a bucket that the crate does not make. Unfinished multipart uploads whose id was never received, by a crash or a lost
//! connection: only ListMultipartUploads finds them. And objects are deleted one by one: of DeleteObjects it believes an answer that tells of
//! no object at all.

use object_store::MultipartId;
use object_store::aws::{AmazonS3, AwsAuthorizer};
use object_store::client::{HttpClient, HttpRequest, HttpRequestBody, HttpResponse};
use object_store::path::Path;
use object_store::signer::Signer;
use reqwest::{Method, StatusCode};

use crate::store::error::failure;
use crate::store::place::SIGNED_FOR;

/// A bucket, and what requests to it are made with.
pub(crate) struct Asked<'a> {
    /// The bucket.
    pub(crate) bucket: &'a AmazonS3,
    /// Sends them.
    pub(crate) client: &'a HttpClient,
    /// What they are signed for.
    pub(crate) region: &'a str,
}

impl Asked<'_> {
    /// All unfinished uploads whose keys lie below `folder`: the last name of each key, with what the store calls the upload.
    pub(crate) async fn below(&self, folder: &Path) -> object_store::Result<Vec<(String, MultipartId)>> {
        let query = [("uploads", ""), ("prefix", &format!("{folder}/"))];
        let answer = self.ask(Method::GET, &Path::default(), &query).await?;
        // No such bucket.
        if answer.status() == StatusCode::NOT_FOUND {
            return Ok(Vec::new());
        }
        refuse(folder, &answer)?;
        // A thousand at the most, and an image has six keys.
        let text = answer.into_body().bytes().await.map_err(|e| failure(folder.as_ref(), e))?;
        Ok(parse(&String::from_utf8_lossy(&text)))
    }

    /// Deletes an object. Whether it is gone is not told by the answer.
    pub(crate) async fn delete(&self, key: &Path) -> object_store::Result<()> {
        let answer = self.ask(Method::DELETE, key, &[]).await?;
        if answer.status() == StatusCode::NOT_FOUND { Ok(()) } else { refuse(key, &answer) }
    }

    async fn ask(&self, method: Method, key: &Path, query: &[(&str, &str)]) -> object_store::Result<HttpResponse> {
        let failed = |e| failure(key.as_ref(), e);
        // Tells where the bucket is; the request is signed in its headers.
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

/// Of an image's keys none has a character that XML writes otherwise.
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
    fn a_listing_names_keys_and_uploads() {
        let upload = |key, id| {
            format!("<Upload>\n<Key>{key}</Key><Initiator><ID>i</ID></Initiator><UploadId>{id}</UploadId></Upload>")
        };
        let two = format!("<R><Prefix>p/</Prefix>{}{}</R>", upload("a&amp;b/p/rootfs", "2~x"), upload("p/kernel", "3"));
        assert_eq!(parse(&two), [("rootfs".to_owned(), "2~x".to_owned()), ("kernel".to_owned(), "3".to_owned())]);
        assert_eq!(parse("<R></R>"), []);
        assert_eq!(parse("<Upload><Key>cut off"), []);
    }
}
