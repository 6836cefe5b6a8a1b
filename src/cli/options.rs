//! Options that several commands have, and the variables that options stand for.

use std::ffi::OsString;

use clap::Args;

use crate::ims::place;
use crate::transfer::{checksum, network};

/// Variables that options set, under their names in a pod.
pub(super) type Variables = Vec<(&'static str, Option<String>)>;

#[derive(Args)]
pub(super) struct ChecksumOptions {
    /// Expected SHA-256 of the source [variable: DOWNLOAD_SHA256SUM]
    #[arg(long, value_name = "SUM", value_parser = checksum::sha256)]
    pub(super) sha256: Option<String>,
}

impl ChecksumOptions {
    pub(super) fn variables(self) -> Variables {
        vec![("DOWNLOAD_SHA256SUM", self.sha256)]
    }
}

#[derive(Args)]
#[command(next_help_heading = "Servers")]
pub(super) struct ServerOptions {
    /// URL of the S3 server; its keys are $S3_ACCESS_KEY and $S3_SECRET_KEY [variable: S3_ENDPOINT]
    #[arg(long, value_name = "URL", value_parser = network::http_url)]
    pub(super) s3_endpoint: Option<String>,
    /// URL of the IMS that registers jobs and images, or unix:/PATH [variable: IMS_URL] [default:
    /// https://api-gw-service-nmn.local/apis/ims if $OAUTH_CONFIG_DIR has an endpoint, otherwise none]
    #[arg(long, value_name = "URL", value_parser = place::ims_url)]
    pub(super) ims_url: Option<String>,
}

impl ServerOptions {
    pub(super) fn variables(self) -> Variables {
        vec![("S3_ENDPOINT", self.s3_endpoint), ("IMS_URL", self.ims_url)]
    }
}

/// This process's variables, overridden by options.
pub(super) fn variables(
    options: impl IntoIterator<Item = (&'static str, Option<String>)>,
) -> Vec<(OsString, OsString)> {
    let given = options.into_iter().filter_map(|(name, value)| Some((name.into(), value?.into())));
    std::env::vars_os().chain(given).collect()
}
