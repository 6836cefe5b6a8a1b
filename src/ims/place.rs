//! Where IMS is, as variables say.

use std::path::PathBuf;

use crate::job::variables::Reader;
use crate::transfer::network::http_url;

/// Where jobs and images are registered.
#[derive(Debug, Clone)]
pub struct Place {
    /// `IMS_URL`.
    pub url: String,
    /// `OAUTH_CONFIG_DIR`, where it holds credentials.
    pub oauth: Option<PathBuf>,
}

const DEFAULT_IMS: &str = "https://api-gw-service-nmn.local/apis/ims";

pub(crate) fn read(reader: &mut Reader) -> Option<Place> {
    let url = reader.text("IMS_URL");
    // Mounted into every container of a pod, and empty where there is no IMS.
    let oauth = reader.text("OAUTH_CONFIG_DIR").map(PathBuf::from).filter(|dir| dir.join("endpoint").exists());
    if url.is_none() && oauth.is_none() {
        return None;
    }
    // One that cannot be read is told of when a token is asked for.
    if let Some(endpoint) = oauth.as_ref().and_then(|dir| std::fs::read_to_string(dir.join("endpoint")).ok()) {
        reader.check("OAUTH_CONFIG_DIR/endpoint", endpoint.trim(), http_url);
    }
    let url = url.unwrap_or_else(|| DEFAULT_IMS.into());
    Some(Place { url: reader.check("IMS_URL", &url, http_url)?, oauth })
}
