//! Unfinished multipart uploads whose id was never received, by a crash or a lost connection: only ListMultipartUploads finds them, which the
//! crate does not call.

use object_store::aws::{AmazonS3, AwsAuthorizer};
use object_store::client::{HttpConnector, HttpRequest, HttpRequestBody};
use object_store::path::Path;
use object_store::signer::Signer;
use object_store::{ClientOptions, MultipartId};
use reqwest::{Method, StatusCode};

use crate::publish::store::{Connector, SIGNED_FOR, failure};

/// All of them whose keys lie below `folder`: the last name of each key, with what the store calls the upload.
pub async fn below(
    bucket: &AmazonS3,
    connector: &Connector,
    region: &str,
    folder: &Path,
) -> object_store::Result<Vec<(String, MultipartId)>> {
    Ok(parse(&listing(bucket, connector, region, folder).await?))
}

/// The answer to ListMultipartUploads: a thousand at the most, and an image has six keys.
async fn listing(
    bucket: &AmazonS3,
    connector: &Connector,
    region: &str,
    folder: &Path,
) -> object_store::Result<String> {
    // Where the bucket is; the request is signed in its headers.
    let mut url = bucket.signed_url(Method::GET, &Path::default(), SIGNED_FOR).await?;
    url.query_pairs_mut().clear().append_pair("uploads", "").append_pair("prefix", &format!("{folder}/"));
    let failed = |cause| failure(folder.as_ref(), std::io::Error::other(cause));
    let mut request = HttpRequest::new(HttpRequestBody::empty());
    *request.uri_mut() = url.as_str().parse().map_err(|e| failure(folder.as_ref(), e))?;
    let credential = bucket.credentials().get_credential().await?;
    AwsAuthorizer::new(&credential, "s3", region).authorize(&mut request, None);
    let client = connector.connect(&ClientOptions::new())?;
    let answer = client.execute(request).await.map_err(|e| failure(folder.as_ref(), e))?;
    let status = answer.status();
    // No such bucket.
    if status == StatusCode::NOT_FOUND {
        return Ok(String::new());
    }
    if !status.is_success() {
        return Err(failed(format!("the server answers {status}")));
    }
    let text = answer.into_body().bytes().await.map_err(|e| failure(folder.as_ref(), e))?;
    Ok(String::from_utf8_lossy(&text).into_owned())
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
