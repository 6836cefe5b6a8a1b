//! Where a store is, and by which keys it is reached, as variables say.

use crate::job::variables::{Checked, Reader};
use crate::log::redaction;
use crate::transfer::network::{Validate, is_header_word, url};
use std::time::Duration;

/// Store of images.
#[derive(Debug, Clone)]
pub struct Place {
    /// `IMAGE_STORE`, else the bucket `S3_BUCKET`, as URL.
    pub url: Option<String>,
    /// `S3_ENDPOINT`, else `AWS_ENDPOINT_URL_S3`, else `AWS_ENDPOINT_URL`.
    pub(crate) endpoint: Option<String>,
    /// `S3_ACCESS_KEY` and `S3_SECRET_KEY`, else `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`.
    pub(crate) keys: Option<(String, String)>,
    /// `AWS_SESSION_TOKEN`: what belongs to keys that are good for a while.
    pub(crate) token: Option<String>,
    /// `AWS_REGION`, else `AWS_DEFAULT_REGION`: what requests are signed for. Where no endpoint is set, it names Amazon's server.
    pub(crate) region: Option<String>,
    /// `S3_SSL_VALIDATE`: whether the server's certificate is checked, and by which authorities if a file is named, there or by
    /// `AWS_CA_BUNDLE`.
    pub(crate) validate: Validate,
}

const DEFAULT_BUCKET: &str = "boot-images";

/// Access keys that a store makes are as long, in characters.
const LENGTH_OF_KEYS: usize = 16;

pub(crate) fn read(reader: &mut Reader) -> Place {
    let store = reader.text("IMAGE_STORE");
    let endpoint = url(reader, "S3_ENDPOINT");
    let bucket = reader.text("S3_BUCKET").or_else(|| endpoint.is_some().then(|| DEFAULT_BUCKET.into()));
    let endpoint = endpoint.or_else(|| ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"].iter().find_map(|n| url(reader, n)));
    let [ours, aws] = [("S3_ACCESS_KEY", "S3_SECRET_KEY"), ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
        .map(|names| pair(reader, names));
    for (access, secret) in ours.iter().chain(&aws) {
        // Names of people as some stores give them are in paths, too.
        if access.len() >= LENGTH_OF_KEYS {
            redaction::keep(access);
        }
        redaction::keep(secret);
    }
    // A token belongs to the keys that it came with.
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

/// Two variables of which neither is of use alone.
fn pair(reader: &mut Reader, (first, second): (&str, &str)) -> Option<(String, String)> {
    match (credential(reader, first), credential(reader, second)) {
        (Some(a), Some(b)) => Some((a, b)),
        (None, None) => None,
        // One of them was refused.
        _ if reader.text(first).is_some() == reader.text(second).is_some() => None,
        _ => {
            reader.complain(format!("of {first} and {second} one is not set: expected both"));
            None
        }
    }
}

/// A key or token, which goes into headers. A newline at its end is of the file that it was read from.
fn credential(reader: &mut Reader, variable: &str) -> Option<String> {
    let text = reader.text(variable)?;
    let text = text.strip_suffix('\n').map_or(&*text, |line| line.strip_suffix('\r').unwrap_or(line));
    if !is_header_word(text) {
        // It is a secret, and is not quoted.
        let complaint =
            format!("{variable} holds spaces, newlines or other bytes that no key or token has: set it without them");
        reader.complain(complaint);
        return None;
    }
    Some(text.to_owned())
}

/// A region: a part of what signs a request, and of a host's name.
fn region_name(name: &str) -> Checked {
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) {
        return Err("expected the name of a region, as in us-east-1".into());
    }
    Ok(name.to_owned())
}

/// How long a URL that was signed here is good for.
pub(crate) const SIGNED_FOR: Duration = Duration::from_hours(6);
