//! Network settings from variables.

use std::path::PathBuf;
use std::time::Duration;

use crate::job::variables::{Checked, Reader};

/// Value of `S3_SSL_VALIDATE`: how certificates are verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Validate {
    /// Certificates are verified against the system's CA certificates and `CA_CERT`.
    Yes,
    /// Certificates are not verified.
    No,
    /// Certificates are verified against those CA certificates and the ones in a file.
    By(PathBuf),
}

/// TLS settings and timeouts.
#[derive(Debug, Clone)]
pub struct Network {
    /// `CA_CERT`: additional CA certificates, in PEM.
    pub ca: Option<PathBuf>,
    /// `IMS_STALL_LIMIT`: timeout of a connection that makes hardly any progress.
    pub(crate) stall_limit: Duration,
    /// `IMS_RETRY_LIMIT`: time for which failed requests are retried.
    pub(crate) retry_limit: Duration,
    /// True if `retry_limit` is a fixed time that is shorter than `IMS_RETRY_LIMIT`, so messages must not name the
    /// variable.
    pub(crate) is_shortened: bool,
}

/// Checks a server's URL with the clients' own parser. The store crate panics on a URL it cannot parse.
pub fn http_url(url: &str) -> Checked {
    let parsed = reqwest::Url::parse(url).ok();
    let parsed = parsed.filter(|url| ["http", "https"].contains(&url.scheme()) && url.has_host());
    let parsed = parsed.ok_or("expected a URL of http or https, as in https://HOST:PORT")?;
    Ok(parsed.as_str().trim_end_matches('/').to_owned())
}

/// True if a key or token is a valid header value.
pub(crate) fn is_header_word(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// URL in a variable.
pub(crate) fn url(reader: &mut Reader, variable: &str) -> Option<String> {
    let url = reader.text(variable)?;
    reader.check(variable, &url, http_url)
}
