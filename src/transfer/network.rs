//! How servers are talked to, as variables say.

use std::path::PathBuf;
use std::time::Duration;

use crate::job::variables::{Checked, Reader};

/// What `S3_SSL_VALIDATE` asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Validate {
    /// Against the authorities known here.
    Yes,
    /// Not at all.
    No,
    /// Against those in a file.
    By(PathBuf),
}

/// How servers are talked to.
#[derive(Debug, Clone)]
pub struct Network {
    /// `CA_CERT`: further authorities, in PEM.
    pub ca: Option<PathBuf>,
    /// `IMS_STALL_LIMIT`: a connection that brings next to nothing for so long is given up.
    pub stall_limit: Duration,
    /// `IMS_RETRY_LIMIT`: what fails is tried again for so long.
    pub retry_limit: Duration,
}

/// URL of a server, as every client parses it. The crate of stores panics on one that it cannot parse.
pub fn http_url(url: &str) -> Checked {
    let parsed = reqwest::Url::parse(url).ok();
    let parsed = parsed.filter(|url| ["http", "https"].contains(&url.scheme()) && url.has_host());
    let parsed = parsed.ok_or("expected a URL of http or https, as in https://HOST:PORT")?;
    Ok(parsed.as_str().trim_end_matches('/').to_owned())
}

/// Returns whether a key or token can be put into a header.
pub fn is_header_word(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// The URL in a variable.
pub(crate) fn url(reader: &mut Reader, variable: &str) -> Option<String> {
    let url = reader.text(variable)?;
    reader.check(variable, &url, http_url)
}
