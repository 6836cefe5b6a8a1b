//! Settings of the service: options of `ims serve`, each with the variable that upstream reads for it.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

/// Where the records are kept.
#[derive(Debug, Clone, Args)]
pub struct Records {
    /// Directory of the database, and of upstream's JSON files, which are imported
    #[arg(long, env = "IMS_DATA_DIR", default_value = "/var/ims/data", value_name = "DIRECTORY")]
    pub data: PathBuf,
    /// PostgreSQL to keep the records in (`postgres://…`), for several replicas; without it a file in the data directory
    #[arg(long, env = "IMS_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database: Option<String>,
}

/// Settings of `ims serve`.
#[derive(Debug, Clone, Args)]
pub struct Settings {
    /// Address to listen on
    #[arg(long, env = "IMS_LISTEN", default_value = "127.0.0.1:9000", value_name = "ADDRESS:PORT")]
    pub listen: SocketAddr,
    #[command(flatten)]
    #[allow(missing_docs)] // clap would take it for the description of the command
    pub records: Records,
    /// S3 server; `file:///DIRECTORY` for a directory with a directory for each bucket
    #[arg(long, env = "S3_ENDPOINT", value_name = "URL", default_value = STORE)]
    pub s3_endpoint: String,
    /// Access key of the S3 server
    #[arg(long, env = "S3_ACCESS_KEY", hide_env_values = true, value_name = "KEY", default_value = "")]
    pub s3_access_key: String,
    /// Secret key of the S3 server
    #[arg(long, env = "S3_SECRET_KEY", hide_env_values = true, value_name = "KEY", default_value = "")]
    pub s3_secret_key: String,
    /// Access key for copies of objects that the owner `STS` has
    #[arg(long, env = "S3_STS_ACCESS_KEY", hide_env_values = true, value_name = "KEY")]
    pub s3_sts_access_key: Option<String>,
    /// Secret key for copies of objects that the owner `STS` has
    #[arg(long, env = "S3_STS_SECRET_KEY", hide_env_values = true, value_name = "KEY")]
    pub s3_sts_secret_key: Option<String>,
    /// `False` accepts any certificate of the S3 server; otherwise a file of authorities
    #[arg(long, env = "S3_SSL_VALIDATE", default_value = "False", value_name = "FILE")]
    pub s3_ssl_validate: String,
    /// Bucket of images
    #[arg(long, env = "S3_BOOT_IMAGES_BUCKET", default_value = "boot-images", value_name = "BUCKET")]
    pub boot_images_bucket: String,
    /// Seconds for which a job's download URL is valid
    #[arg(long, env = "S3_URL_EXPIRATION", default_value_t = 432_000, value_name = "SECONDS")]
    pub s3_url_expiration: u64,
    /// Seconds for a connection to the S3 server
    #[arg(long, env = "S3_CONNECT_TIMEOUT", default_value_t = 60, value_name = "SECONDS")]
    pub s3_connect_timeout: u64,
    /// Seconds without data from the S3 server
    #[arg(long, env = "S3_READ_TIMEOUT", default_value_t = 60, value_name = "SECONDS")]
    pub s3_read_timeout: u64,
    /// Size from which on a manifest is refused
    #[arg(long, env = "MAX_IMAGE_MANIFEST_SIZE_BYTES", default_value_t = 1_048_576, value_name = "BYTES")]
    pub max_manifest_size: u64,
    /// Default of `build_env_size`
    #[arg(long, env = "DEFAULT_IMS_IMAGE_SIZE", default_value_t = 60, value_name = "GIBIBYTES")]
    pub image_size: u32,
    /// Default of `job_mem_size`
    #[arg(long, env = "DEFAULT_IMS_JOB_MEM_SIZE", default_value_t = 8, value_name = "GIBIBYTES")]
    pub job_memory: u32,
    /// Whether customize jobs may build kernel modules unless they say so: `true`, `1` and `t` are yes
    #[arg(long, env = "JOB_ENABLE_DKMS", default_value = "True", value_name = "BOOL")]
    pub enable_dkms: String,
    /// What jobs run on [default: machine, if root starts the service outside of Kubernetes; otherwise none]
    #[arg(long, env = "IMS_RUNNER", value_enum)]
    pub runner: Option<On>,
    #[command(flatten)]
    #[allow(missing_docs)] // clap would take it for the description of the command
    pub machine: MachineSettings,
}

/// Runner of jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum On {
    /// Nothing: the service keeps records only
    None,
    /// This machine
    Machine,
}

/// Settings of jobs on this machine.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Jobs on this machine")]
pub struct MachineSettings {
    /// Directory of the jobs: their image roots, with space for several images, and their logs
    #[arg(long, env = "IMS_JOBS_DIR", default_value = "/var/lib/ims/jobs", value_name = "DIRECTORY")]
    pub jobs: PathBuf,
    /// Ports on which jobs accept users, one for each job
    #[arg(long, env = "IMS_JOB_PORTS", default_value = "2200-2299", value_name = "FIRST-LAST", value_parser = ports)]
    pub job_ports: RangeInclusive<u16>,
    /// Address on which jobs accept users
    #[arg(long, env = "IMS_JOB_ADDRESS", default_value = "127.0.0.1", value_name = "ADDRESS")]
    pub job_address: IpAddr,
}

fn ports(text: &str) -> std::result::Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let range = first.parse().ok().zip(last.parse().ok()).map(|(first, last)| first..=last);
    range.filter(|range| !range.is_empty() && *range.start() > 0).ok_or_else(|| "expected FIRST-LAST".into())
}

/// Where the objects are on one machine.
pub const STORE: &str = "file:///var/lib/ims/store";

impl Settings {
    /// Directory of the objects, unless an S3 server has them.
    pub fn directory(&self) -> Option<&Path> {
        self.s3_endpoint.strip_prefix("file://").map(Path::new).filter(|directory| directory.is_absolute())
    }

    /// Runner of jobs.
    pub fn runs_on(&self) -> On {
        let is_machine =
            || rustix::process::geteuid().is_root() && std::env::var_os("KUBERNETES_SERVICE_HOST").is_none();
        self.runner.unwrap_or_else(|| if is_machine() { On::Machine } else { On::None })
    }

    /// Returns whether customize jobs get DKMS unless they say so.
    pub fn dkms_by_default(&self) -> bool {
        matches!(self.enable_dkms.trim().to_ascii_lowercase().as_str(), "true" | "1" | "t")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_ports_is_read() {
        assert_eq!(ports("2200-2299"), Ok(2200..=2299));
        assert_eq!(ports("22"), Ok(22..=22));
        for wrong in ["", "a", "2299-2200", "0-1", "1-70000", "1-2-3"] {
            assert!(ports(wrong).is_err(), "{wrong}");
        }
    }
}
