//! Variables with the address of IMS and the credentials for it.

use std::path::{Path, PathBuf};

use crate::job::variables::{Checked, Reader};
use crate::transfer::network::http_url;
use crate::transfer::without_query;

/// Address of IMS, and credentials for it.
#[derive(Debug, Clone)]
pub struct Place {
    /// `IMS_URL`: an HTTP URL, or `unix:/PATH` for a socket.
    pub url: String,
    /// `OAUTH_CONFIG_DIR`, if it contains credentials.
    pub(crate) oauth: Option<PathBuf>,
    /// `IMS_TOKEN_FILE`, which contains the token of an IMS without an OAuth server.
    pub(crate) token: Option<PathBuf>,
}

impl Place {
    /// Path of the socket of an IMS on this machine; `None` for any other IMS.
    pub(crate) fn socket(&self) -> Option<&Path> {
        self.url.strip_prefix(SOCKET).map(Path::new)
    }

    /// Base URL of requests, to which their paths are appended.
    pub(crate) fn base(&self) -> &str {
        if self.socket().is_some() { "http://localhost" } else { &self.url }
    }

    /// Warnings about credentials that are sent without encryption.
    pub(crate) fn in_clear(&self) -> Vec<String> {
        if self.oauth.is_none() && self.token.is_none() {
            return Vec::new();
        }
        let endpoint = self.oauth.as_ref().and_then(|dir| std::fs::read_to_string(dir.join("endpoint")).ok());
        let endpoint = endpoint.unwrap_or_default();
        let urls = [
            ("OAUTH_CONFIG_DIR/endpoint", endpoint.trim(), "the client secret"),
            ("IMS_URL", &self.url, "the token of every request"),
        ];
        let in_clear = urls.into_iter().filter(|(_, url, _)| url.to_ascii_lowercase().starts_with("http://"));
        let warning = |(name, url, what): (&str, &str, &str)| {
            format!("{name} is {}: {what} is sent there without encryption; use https", without_query(url))
        };
        in_clear.map(warning).collect()
    }
}

/// Scheme of the URL of a socket.
const SOCKET: &str = "unix:";

/// Checks the URL of an IMS: an HTTP URL, or `unix:/PATH` for a socket.
pub(crate) fn ims_url(url: &str) -> Checked {
    match url.strip_prefix(SOCKET) {
        Some(path) if path.starts_with('/') => Ok(url.to_owned()),
        Some(_) => Err("expected unix:/PATH".into()),
        None => http_url(url),
    }
}

const DEFAULT_IMS: &str = "https://api-gw-service-nmn.local/apis/ims";

pub(crate) fn read(reader: &mut Reader) -> Option<Place> {
    let url = reader.text("IMS_URL");
    // The directory is mounted into every container of a pod, but has no endpoint if there is no OAuth server.
    let oauth = reader.text("OAUTH_CONFIG_DIR").map(PathBuf::from).filter(|dir| dir.join("endpoint").exists());
    if url.is_none() && oauth.is_none() {
        return None;
    }
    // A file that cannot be read is reported when a token is requested.
    if let Some(endpoint) = oauth.as_ref().and_then(|dir| std::fs::read_to_string(dir.join("endpoint")).ok()) {
        reader.check("OAUTH_CONFIG_DIR/endpoint", endpoint.trim(), http_url);
    }
    let url = url.unwrap_or_else(|| DEFAULT_IMS.into());
    let token = reader.text("IMS_TOKEN_FILE").map(PathBuf::from);
    Some(Place { url: reader.check("IMS_URL", &url, ims_url)?, oauth, token })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_is_named_by_its_absolute_path() {
        let place = |url: &str| Place { url: ims_url(url).unwrap(), oauth: None, token: None };
        let local = place("unix:/run/ims/ims.sock");
        assert_eq!((local.socket(), local.base()), (Some(Path::new("/run/ims/ims.sock")), "http://localhost"));
        let remote = place("http://ims/");
        assert_eq!((remote.socket(), remote.base()), (None, "http://ims"));
        assert!(ims_url("unix:ims.sock").is_err() && ims_url("ims").is_err());
    }

    #[test]
    fn credentials_sent_without_encryption_cause_warnings() {
        let dir = tempfile::tempdir().unwrap();
        let warned = |url: &str, endpoint: &str, has_oauth: bool| {
            std::fs::write(dir.path().join("endpoint"), endpoint).unwrap();
            let oauth = has_oauth.then(|| dir.path().to_owned());
            Place { url: url.into(), oauth, token: None }.in_clear().join("|")
        };
        assert_eq!(warned("https://ims", "https://keycloak/token\n", true), "");
        assert_eq!(warned("http://ims", "http://keycloak/token", false), "", "nothing secret is sent");
        let both = warned("http://ims/apis/ims", "HTTP://keycloak/token\n", true);
        assert!(both.contains("IMS_URL is http://ims/apis/ims: the token"), "{both}");
        assert!(both.contains("endpoint is HTTP://keycloak/token: the client secret"), "{both}");
        let token = Place { url: "http://ims".into(), oauth: None, token: Some("token".into()) };
        assert_eq!(token.in_clear().len(), 1);
    }
}
