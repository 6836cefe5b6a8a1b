//! Variables that say where IMS is.

use std::path::PathBuf;

use crate::job::variables::Reader;
use crate::transfer::network::http_url;
use crate::transfer::without_query;

/// Address of IMS, and credentials for it.
#[derive(Debug, Clone)]
pub struct Place {
    /// `IMS_URL`.
    pub url: String,
    /// `OAUTH_CONFIG_DIR`, if it contains credentials.
    pub(crate) oauth: Option<PathBuf>,
}

impl Place {
    /// Warnings about credentials that are sent without encryption.
    pub(crate) fn in_clear(&self) -> Vec<String> {
        let Some(directory) = &self.oauth else { return Vec::new() };
        let endpoint = std::fs::read_to_string(directory.join("endpoint")).unwrap_or_default();
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

const DEFAULT_IMS: &str = "https://api-gw-service-nmn.local/apis/ims";

pub(crate) fn read(reader: &mut Reader) -> Option<Place> {
    let url = reader.text("IMS_URL");
    // The directory is mounted into every container of a pod, and is empty without an IMS.
    let oauth = reader.text("OAUTH_CONFIG_DIR").map(PathBuf::from).filter(|dir| dir.join("endpoint").exists());
    if url.is_none() && oauth.is_none() {
        return None;
    }
    // A file that cannot be read is reported when a token is requested.
    if let Some(endpoint) = oauth.as_ref().and_then(|dir| std::fs::read_to_string(dir.join("endpoint")).ok()) {
        reader.check("OAUTH_CONFIG_DIR/endpoint", endpoint.trim(), http_url);
    }
    let url = url.unwrap_or_else(|| DEFAULT_IMS.into());
    Some(Place { url: reader.check("IMS_URL", &url, http_url)?, oauth })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_sent_without_encryption_cause_warnings() {
        let dir = tempfile::tempdir().unwrap();
        let warned = |url: &str, endpoint: &str, has_oauth: bool| {
            std::fs::write(dir.path().join("endpoint"), endpoint).unwrap();
            Place { url: url.into(), oauth: has_oauth.then(|| dir.path().to_owned()) }.in_clear().join("|")
        };
        assert_eq!(warned("https://ims", "https://keycloak/token\n", true), "");
        assert_eq!(warned("http://ims", "http://keycloak/token", false), "", "nothing secret is sent");
        let both = warned("http://ims/apis/ims", "HTTP://keycloak/token\n", true);
        assert!(both.contains("IMS_URL is http://ims/apis/ims: the token"), "{both}");
        assert!(both.contains("endpoint is HTTP://keycloak/token: the client secret"), "{both}");
    }
}
