//! Settings of the service: options of `ims serve`, each with the variable that upstream reads for it.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

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
    #[arg(long, env = "S3_ENDPOINT", value_name = "URL")]
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
}

impl Settings {
    /// Returns whether customize jobs get DKMS unless they say so.
    pub fn dkms_by_default(&self) -> bool {
        matches!(self.enable_dkms.trim().to_ascii_lowercase().as_str(), "true" | "1" | "t")
    }
}
