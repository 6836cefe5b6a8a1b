//! Settings of the service: options of `ims serve`, each with the variable that upstream reads for it.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

/// Where the records are kept.
#[derive(Debug, Clone, Args)]
pub struct Records {
    /// Directory of the database, and of upstream's JSON files, which are imported
    #[arg(long, env = "IMS_DATA_DIR", default_value = DATA, value_name = "DIRECTORY")]
    pub data: PathBuf,
    /// PostgreSQL to keep the records in (`postgres://…`), for several replicas; without it a file in the data directory
    #[arg(long, env = "IMS_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub database: Option<String>,
}

/// Settings of `ims serve`.
#[derive(Debug, Clone, Args)]
pub struct Settings {
    #[command(flatten)]
    #[allow(missing_docs)] // clap would take it for the description of the command
    pub listen: Listen,
    #[command(flatten)]
    #[allow(missing_docs)] // clap would take it for the description of the command
    pub records: Records,
    /// S3 server; `file:///DIRECTORY` for a directory with a subdirectory for each bucket
    #[arg(long, env = "S3_ENDPOINT", value_name = "URL", default_value = STORE)]
    pub s3_endpoint: String,
    /// Access key of the S3 server
    #[arg(long, env = "S3_ACCESS_KEY", hide_env_values = true, value_name = "KEY", default_value = "")]
    pub s3_access_key: String,
    /// Secret key of the S3 server
    #[arg(long, env = "S3_SECRET_KEY", hide_env_values = true, value_name = "KEY", default_value = "")]
    pub s3_secret_key: String,
    /// Access key for copying objects whose owner is `STS`
    #[arg(long, env = "S3_STS_ACCESS_KEY", hide_env_values = true, value_name = "KEY")]
    pub s3_sts_access_key: Option<String>,
    /// Secret key for copying objects whose owner is `STS`
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
    /// Seconds to wait for a connection to the S3 server
    #[arg(long, env = "S3_CONNECT_TIMEOUT", default_value_t = 60, value_name = "SECONDS")]
    pub s3_connect_timeout: u64,
    /// Seconds to wait for data from the S3 server
    #[arg(long, env = "S3_READ_TIMEOUT", default_value_t = 60, value_name = "SECONDS")]
    pub s3_read_timeout: u64,
    /// Size from which a manifest is refused
    #[arg(long, env = "MAX_IMAGE_MANIFEST_SIZE_BYTES", default_value_t = 1_048_576, value_name = "BYTES")]
    pub max_manifest_size: u64,
    /// Default of `build_env_size`
    #[arg(long, env = "DEFAULT_IMS_IMAGE_SIZE", default_value_t = 60, value_name = "GIBIBYTES")]
    pub image_size: u32,
    /// Default of `job_mem_size`
    #[arg(long, env = "DEFAULT_IMS_JOB_MEM_SIZE", default_value_t = 8, value_name = "GIBIBYTES")]
    pub job_memory: u32,
    /// `true`, `1` or `t` if customize jobs may build kernel modules unless they say otherwise
    #[arg(long, env = "JOB_ENABLE_DKMS", default_value = "True", value_name = "BOOL")]
    pub enable_dkms: String,
    /// Runner of jobs [default: kubernetes in a pod with a service account token and templates; outside of
    /// Kubernetes machine, if root starts the service; otherwise none]
    #[arg(long, env = "IMS_RUNNER", value_enum)]
    pub runner: Option<On>,
    /// Private key that logs in as root on the remote build nodes; without it, jobs do not run there
    #[arg(long, env = "IMS_REMOTE_KEY", default_value = "/etc/cray/remote-keys/id_ecdsa", value_name = "FILE")]
    pub remote_key: PathBuf,
    #[command(flatten)]
    #[allow(missing_docs)] // clap would take it for the description of the command
    pub machine: MachineSettings,
    #[command(flatten)]
    #[allow(missing_docs)] // clap would take it for the description of the command
    pub kubernetes: KubernetesSettings,
}

/// Places where the service listens, and the access to them.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Access")]
pub struct Listen {
    /// Socket for programs of the user who starts the service [default: /run/ims/ims.sock if that user is root,
    /// otherwise ims.sock in the data directory]
    #[arg(long, env = "IMS_SOCKET", value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Address to listen on too; without jobs on this machine it takes the place of the default socket
    #[arg(long = "listen", env = "IMS_LISTEN", value_name = "ADDRESS:PORT")]
    pub address: Option<SocketAddr>,
    /// Requests that are answered on that address
    #[arg(long, env = "IMS_AUTH", value_enum, default_value = "token", value_name = "WORD")]
    pub auth: Auth,
    /// PEM file of the certificates that the service shows on that address, its own first
    #[arg(long, env = "IMS_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file of the certificate's private key
    #[arg(long, env = "IMS_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
}

/// Requests that are answered on an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Auth {
    /// Those with the token in the file `token` of the data directory, which is created if it is missing
    Token,
    /// All: only a gateway, which authenticates the senders, can reach the address
    Gateway,
}

/// Socket of a service that this user starts, with this data directory.
pub fn default_socket(data: &Path) -> PathBuf {
    if rustix::process::geteuid().is_root() { "/run/ims/ims.sock".into() } else { data.join("ims.sock") }
}

/// Data directory, unless another one is named.
pub const DATA: &str = "/var/ims/data";

/// Runner of jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum On {
    /// Nothing: the service keeps records only
    None,
    /// This machine
    Machine,
    /// The cluster of this pod, or that of KUBECONFIG
    Kubernetes,
}

/// Settings of jobs on this machine.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Jobs on this machine")]
pub struct MachineSettings {
    /// Directory for the jobs' image roots and logs; needs enough free space for several images
    #[arg(long, env = "IMS_JOBS_DIR", default_value = "/var/lib/ims/jobs", value_name = "DIRECTORY")]
    pub jobs: PathBuf,
    /// Ports on which jobs accept users, one for each job
    #[arg(long, env = "IMS_JOB_PORTS", default_value = "2200-2299", value_name = "FIRST-LAST", value_parser = ports)]
    pub job_ports: RangeInclusive<u16>,
    /// Address on which jobs accept users
    #[arg(long, env = "IMS_JOB_ADDRESS", default_value = "127.0.0.1", value_name = "ADDRESS")]
    pub job_address: IpAddr,
}

/// Settings of jobs on Kubernetes.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Jobs on Kubernetes")]
pub struct KubernetesSettings {
    /// Directory of the templates: `customize`, `create/kiwi-ng`, `create/packer`
    #[arg(
        long = "job-templates",
        env = "IMS_JOB_TEMPLATE_PATH",
        default_value = "/mnt/ims/v2/job_templates",
        value_name = "DIRECTORY"
    )]
    pub templates: PathBuf,
    /// Namespace of jobs
    #[arg(long = "job-namespace", env = "DEFAULT_IMS_JOB_NAMESPACE", default_value = "ims", value_name = "NAMESPACE")]
    pub namespace: String,
    /// Runtime class of jobs that may build kernel modules; `kata-qemu` replaces a class without `kata` in its name
    #[arg(long, env = "JOB_KATA_RUNTIME", default_value = "kata-qemu", value_name = "CLASS")]
    pub kata_runtime: String,
    /// Runtime class of jobs for aarch64
    #[arg(long, env = "JOB_AARCH64_RUNTIME", default_value = "kata-qemu", value_name = "CLASS")]
    pub aarch64_runtime: String,
    /// Subnet in the host names of jobs, ID.ims.SUBNET.DOMAIN
    #[arg(long, env = "JOB_CUSTOMER_ACCESS_SUBNET_NAME", default_value = "cmn", value_name = "NAME")]
    pub subnet_name: String,
    /// Domain in the host names of jobs
    #[arg(long, env = "JOB_CUSTOMER_ACCESS_NETWORK_DOMAIN", default_value = "shasta.local", value_name = "DOMAIN")]
    pub network_domain: String,
    /// MetalLB address pool of the Services of jobs
    #[arg(
        long,
        env = "JOB_CUSTOMER_ACCESS_NETWORK_ACCESS_POOL",
        default_value = "customer-management",
        value_name = "POOL"
    )]
    pub address_pool: String,
    /// Heartbeats in a row, one every five seconds, that a job on a remote build node may miss
    #[arg(long, env = "DEFAULT_IMS_JOB_REMOTE_TIMEOUT_COUNT", default_value_t = 12, value_name = "NUMBER")]
    pub remote_timeout_count: u32,
    /// Seconds for which a pod may wait for a node, its volumes and its container images before its job fails with
    /// status error
    #[arg(long = "job-pending-limit", env = "IMS_JOB_PENDING_LIMIT", default_value_t = 900, value_name = "SECONDS")]
    pub pending_limit: u64,
}

fn ports(text: &str) -> std::result::Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let range = first.parse().ok().zip(last.parse().ok()).map(|(first, last)| first..=last);
    range.filter(|range| !range.is_empty() && *range.start() > 0).ok_or_else(|| "expected FIRST-LAST".into())
}

/// Token of a pod's service account.
const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// Where the objects are on one machine.
pub const STORE: &str = "file:///var/lib/ims/store";

impl Settings {
    /// Directory of the objects, unless an S3 server has them.
    pub fn directory(&self) -> Option<&Path> {
        self.s3_endpoint.strip_prefix("file://").map(Path::new).filter(|directory| directory.is_absolute())
    }

    /// URL of the service, for clients of this machine.
    pub fn url(&self) -> String {
        let scheme = if self.listen.tls_cert.is_some() { "https" } else { "http" };
        let place = self.listen.address.map_or_else(|| "localhost".into(), |address| address.to_string());
        format!("{scheme}://{place}")
    }

    /// Socket to listen on.
    pub fn socket(&self) -> Option<PathBuf> {
        let default = || {
            (self.listen.address.is_none() || self.runs_on() == On::Machine).then(|| default_socket(&self.records.data))
        };
        self.listen.socket.clone().or_else(default)
    }

    /// Runner of jobs.
    pub fn runs_on(&self) -> On {
        let is_in_pod = std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
        self.runner.unwrap_or_else(|| match () {
            () if is_in_pod && Path::new(TOKEN).exists() && self.kubernetes.templates.exists() => On::Kubernetes,
            () if !is_in_pod && rustix::process::geteuid().is_root() => On::Machine,
            () => On::None,
        })
    }

    /// Returns whether customize jobs get DKMS unless they say otherwise.
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
