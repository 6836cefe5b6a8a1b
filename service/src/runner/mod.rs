//! Runners start, watch and end the steps of a job. A job is a record of the service; a runner is what it runs on.

use std::collections::BTreeMap;
use std::path::PathBuf;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use serde::Serialize;
use tokio::sync::mpsc;

use crate::records::{Job, Location};

pub mod kubernetes;
mod machine;
pub mod nodes;
mod nothing;
pub mod pod;
pub mod programs;

pub use kubernetes::Kubernetes;
pub use machine::Machine;
pub use nothing::Nothing;

/// A new job, for a runner. Texts come from users: they are data, whatever characters they hold.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// The record as it will be stored. Its ID is final; what the runner decides is empty.
    pub job: Job,
    /// Where the recipe's archive or the image's rootfs is.
    pub object: Location,
    /// Presigned URL of the recipe's archive or of the image's rootfs. A secret: it is not logged.
    pub download_url: String,
    /// MD5 of that object in hexadecimal digits, or nothing.
    pub download_md5sum: String,
    /// Public key that may log in.
    pub public_key: String,
    /// `kiwi-ng` or `packer`; `None` for a customize job.
    pub recipe_type: Option<String>,
    /// Values for a recipe's templates; empty for a customize job.
    pub template_dictionary: BTreeMap<String, String>,
}

/// A runner's answer to [`Runner::start`]: the record, with the fields that the runner decides filled in.
pub type Started = Job;

/// Failed steps, one sentence each.
pub type Failures = Vec<String>;

/// A job ended without saying so: its processes or pods died.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    /// ID of the job.
    pub id: String,
    /// Reason, for the log and for people.
    pub reason: String,
}

/// A job that a runner holds something of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// ID of the job.
    pub job: String,
    /// True if that includes the objects that a job needs only while it runs.
    pub is_for_running: bool,
}

/// Output of the programs of a job.
pub enum Log {
    /// A file, to which they write.
    File(PathBuf),
    /// Parts of it, as they come.
    Stream(BoxStream<'static, std::io::Result<Vec<u8>>>),
}

/// Whether a remote build node can run jobs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NodeStatus {
    /// Host name.
    pub xname: String,
    /// `x86_64`, `aarch64`, or `Unknown`.
    #[serde(rename = "nodeArch")]
    pub arch: String,
    /// Podman as last probed there.
    #[serde(rename = "podmanStatus")]
    pub podman: String,
    /// Connection as last probed.
    #[serde(rename = "sshStatus")]
    pub ssh: String,
    /// Whether jobs can run there.
    #[serde(rename = "ableToRunJobs")]
    pub is_able: bool,
    /// Number of jobs there; -1 if it is not known.
    #[serde(rename = "numCurrentJobs")]
    pub jobs: i64,
}

impl NodeStatus {
    /// Reason why a node can run no jobs.
    pub fn complaint(&self) -> &str {
        match () {
            () if !self.ssh.starts_with(nodes::CONNECTED) => &self.ssh,
            () if !["aarch64", "x86_64"].contains(&self.arch.as_str()) => &self.arch,
            () => &self.podman,
        }
    }

    /// The status of a node that nothing is known about.
    pub fn unknown(xname: &str) -> Self {
        let unknown = || "Unknown".to_owned();
        Self { xname: xname.to_owned(), arch: unknown(), podman: unknown(), ssh: unknown(), is_able: false, jobs: -1 }
    }
}

/// Runner of jobs. All methods may be called at the same time, for several jobs too.
#[async_trait]
pub trait Runner: Send + Sync {
    /// Creates everything that the job needs.
    ///
    /// The service has recorded the ID before, and calls [`Runner::remove`] with it if this fails, or if the service is
    /// killed before the record is stored.
    async fn start(&self, job: &NewJob) -> Result<Started, Failures>;

    /// Called when the job's record is stored: from now on its programs find it in the service.
    async fn stored(&self, _job: &Job) {}

    /// Output of the job's programs, if this runner has it; a stream goes on until they end if it `is_followed`.
    async fn log(&self, _job: &Job, _is_followed: bool) -> Result<Option<Log>, Failures> {
        Ok(None)
    }

    /// Releases what a job that has ended (`success`, `error`) holds: address, volume. Its log stays. Repeating it is
    /// harmless.
    async fn release(&self, job: &Job) -> Result<(), Failures>;

    /// Removes everything of the job, running or not. What is absent is no failure. The record may be that of a job
    /// whose start was cut off, with nothing but its ID and type.
    async fn remove(&self, job: &Job) -> Result<(), Failures>;

    /// Jobs that this runner holds something of, with records or without.
    async fn held(&self) -> Result<Vec<Held>, Failures> {
        Ok(Vec::new())
    }

    /// Called when a death has become the end of a job.
    async fn died(&self, _job: &Job, _reason: &str) {}

    /// Returns whether such jobs can run on remote build nodes, which [`Runner::probe`] asks.
    fn takes_nodes(&self, _job: &Job) -> bool {
        false
    }

    /// Asks whether a remote build node can run jobs. A node that does not answer is an answer, after some seconds.
    async fn probe(&self, xname: &str) -> NodeStatus {
        NodeStatus::unknown(xname)
    }

    /// Called once, at the start of the service, with all jobs that have not ended; sends each death that it sees of
    /// these and of later jobs. Returns when `deaths` is closed, or at once if it watches nothing.
    async fn watch(&self, running: Vec<Job>, deaths: mpsc::Sender<Death>);
}
