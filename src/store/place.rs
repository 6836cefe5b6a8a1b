//! Variables that name the store and the keys for it.

use crate::job::variables::{Checked, Reader};
use crate::log::redaction;
use crate::transfer::network::{Validate, is_header_word, url};
use std::time::Duration;

/// Store of images.
#[derive(Debug, Clone)]
pub struct Place {
    /// `IMAGE_STORE`, else the bucket `S3_BUCKET`, as URL.
    pub url: Option<String>,
    /// `S3_ENDPOINT`, else `AWS_ENDPOINT_URL_S3`, else `AWS_ENDPOINT_URL`; only the first may be a directory.
    pub(crate) endpoint: Option<String>,
    /// `S3_ACCESS_KEY` and `S3_SECRET_KEY`, else `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`.
    pub(crate) keys: Option<(String, String)>,
    /// `AWS_SESSION_TOKEN`: belongs to temporary keys.
    pub(crate) token: Option<String>,
    /// `AWS_REGION`, else `AWS_DEFAULT_REGION`: region for which requests are signed. Without an endpoint, it selects
    /// Amazon's server.
    pub(crate) region: Option<String>,
    /// `S3_SSL_VALIDATE`: whether the server's certificate is verified, and against which CA certificates, if this
    /// variable or `AWS_CA_BUNDLE` names a file.
    pub(crate) validate: Validate,
}

const DEFAULT_BUCKET: &str = "boot-images";

/// Minimum length of an access key that is masked in the log, in characters. Keys that stores generate are at least
/// this long.
const SHORTEST_KEY: usize = 16;

pub(crate) fn read(reader: &mut Reader) -> Place {
    let store = reader.text("IMAGE_STORE");
    let endpoint = endpoint(reader, "S3_ENDPOINT");
    let bucket = reader.text("S3_BUCKET").or_else(|| endpoint.is_some().then(|| DEFAULT_BUCKET.into()));
    let endpoint = endpoint.or_else(|| ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"].iter().find_map(|n| url(reader, n)));
    let [ours, aws] = [("S3_ACCESS_KEY", "S3_SECRET_KEY"), ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
        .map(|names| pair(reader, names));
    for (access, secret) in ours.iter().chain(&aws) {
        // Shorter access keys may be names of people, which also occur in paths.
        if access.len() >= SHORTEST_KEY {
            redaction::keep(access);
        }
        redaction::keep(secret);
    }
    // The token belongs to the AWS keys, so ignore it if other keys are used.
    let token = credential(reader, "AWS_SESSION_TOKEN").filter(|_| ours.is_none() || aws.is_none());
    if let Some(token) = &token {
        redaction::keep(token);
    }
    let region = ["AWS_REGION", "AWS_DEFAULT_REGION"].iter().find_map(|n| {
        let region = reader.text(n)?;
        reader.check(n, &region, region_name)
    });
    let bundle = reader.text("AWS_CA_BUNDLE").map_or(Validate::Yes, |file| Validate::By(file.into()));
    let validate = match reader.text("S3_SSL_VALIDATE") {
        None => bundle,
        Some(word) if word.eq_ignore_ascii_case("true") => bundle,
        Some(word) if word.eq_ignore_ascii_case("false") => Validate::No,
        Some(file) if file.starts_with('/') => Validate::By(file.into()),
        Some(other) => {
            let complaint = format!("S3_SSL_VALIDATE is '{other}': expected 'true', 'false' or a file of certificates");
            reader.complain(complaint);
            Validate::Yes
        }
    };
    Place {
        url: store.or_else(|| bucket.map(|b| format!("s3://{b}"))),
        endpoint,
        keys: ours.or(aws),
        token,
        region,
        validate,
    }
}

/// Beginning of an endpoint that is not a server but a directory, with a subdirectory for each bucket.
pub(crate) const DIRECTORY: &str = "file://";

/// URL of a server, or of a directory.
fn endpoint(reader: &mut Reader, variable: &str) -> Option<String> {
    let is_directory = |url: &String| url.starts_with(DIRECTORY) && url[DIRECTORY.len()..].starts_with('/');
    reader.text(variable).filter(is_directory).or_else(|| url(reader, variable))
}

/// Reads two variables that are only useful together.
fn pair(reader: &mut Reader, (first, second): (&str, &str)) -> Option<(String, String)> {
    match (credential(reader, first), credential(reader, second)) {
        (Some(a), Some(b)) => Some((a, b)),
        (None, None) => None,
        // Both variables are set, and one was refused, which is reported already.
        _ if reader.text(first).is_some() == reader.text(second).is_some() => None,
        _ => {
            reader.complain(format!("only one of {first} and {second} is set: expected both"));
            None
        }
    }
}

/// Reads a key or token, which is sent in headers. Removes the newline at the end of the file that it was read from.
fn credential(reader: &mut Reader, variable: &str) -> Option<String> {
    let text = reader.text(variable)?;
    let text = text.strip_suffix('\n').map_or(&*text, |line| line.strip_suffix('\r').unwrap_or(line));
    if !is_header_word(text) {
        // Not quoted, since it is a secret.
        let complaint =
            format!("{variable} holds spaces, newlines or other bytes that no key or token has: set it without them");
        reader.complain(complaint);
        return None;
    }
    Some(text.to_owned())
}

/// Checks a region, which becomes part of signatures and of a host name.
fn region_name(name: &str) -> Checked {
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) {
        return Err("expected the name of a region, as in us-east-1".into());
    }
    Ok(name.to_owned())
}

/// Time for which a presigned URL is valid.
pub(crate) const SIGNED_FOR: Duration = Duration::from_hours(6);
