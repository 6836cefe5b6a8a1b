//! Runners start, watch and end the steps of a job. A job is a record of the service; its runner carries it out, on
//! Kubernetes or on this machine.

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

/// A new job, for a runner. Its texts come from users: a runner treats them as data, whatever characters they contain.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// The job's record before it is stored. Its ID is final; the fields that the runner fills in are still empty.
    pub job: Job,
    /// Location of the recipe's archive or of the image's rootfs.
    pub object: Location,
    /// Presigned URL of the recipe's archive or of the image's rootfs. It is a secret and must not be logged.
    pub download_url: String,
    /// MD5 of the object in hexadecimal digits; empty if it is unknown.
    pub download_md5sum: String,
    /// Public key that may log in.
    pub public_key: String,
    /// `kiwi-ng` or `packer`; `None` for a customize job.
    pub recipe_type: Option<String>,
    /// Values for a recipe's templates; empty for a customize job.
    pub template_dictionary: BTreeMap<String, String>,
}

/// Result of [`Runner::start`]: the record, with the fields that the runner fills in.
pub type Started = Job;

/// Failed steps, one sentence each.
pub type Failures = Vec<String>;

/// A job that died: its processes or pods ended without reporting a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    /// ID of the job.
    pub id: String,
    /// Reason, for the log and for people.
    pub reason: String,
}

/// A job of which processes, files or objects of the cluster are still there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// ID of the job.
    pub job: String,
    /// True if these include objects that the job needs only while it runs.
    pub is_for_running: bool,
}

/// Output of the programs of a job.
pub enum Log {
    /// The file to which the programs write.
    File(PathBuf),
    /// Parts of the output, sent as they arrive.
    Stream(BoxStream<'static, std::io::Result<Vec<u8>>>),
}

/// Status of a remote build node: whether it can run jobs, and if not, why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NodeStatus {
    /// Host name.
    pub xname: String,
    /// `x86_64`, `aarch64`, or `Unknown`.
    #[serde(rename = "nodeArch")]
    pub arch: String,
    /// Result of the last check for Podman on the node.
    #[serde(rename = "podmanStatus")]
    pub podman: String,
    /// Result of the last SSH connection to the node.
    #[serde(rename = "sshStatus")]
    pub ssh: String,
    /// True if jobs can run on the node.
    #[serde(rename = "ableToRunJobs")]
    pub is_able: bool,
    /// Number of jobs on the node; -1 if unknown.
    #[serde(rename = "numCurrentJobs")]
    pub jobs: i64,
}

impl NodeStatus {
    /// Returns why the node cannot run jobs.
    pub fn complaint(&self) -> &str {
        match () {
            () if !self.ssh.starts_with(nodes::CONNECTED) => &self.ssh,
            () if !["aarch64", "x86_64"].contains(&self.arch.as_str()) => &self.arch,
            () => &self.podman,
        }
    }

    /// The status of a node of which nothing is known.
    pub fn unknown(xname: &str) -> Self {
        let unknown = || "Unknown".to_owned();
        Self { xname: xname.to_owned(), arch: unknown(), podman: unknown(), ssh: unknown(), is_able: false, jobs: -1 }
    }
}

/// Runner of jobs. All methods may be called concurrently, for one job or for several.
#[async_trait]
pub trait Runner: Send + Sync {
    /// Creates everything that the job needs.
    ///
    /// The service has recorded the job's ID before this call. It calls [`Runner::remove`] with that ID if this call
    /// fails or the service is killed before the job's record is stored.
    async fn start(&self, job: &NewJob) -> Result<Started, Failures>;

    /// Called once the job's record is stored. From then on, the job's programs can look up that record in the service.
    async fn stored(&self, _job: &Job) {}

    /// Returns the output of the job's programs, if this runner keeps it. With `is_followed`, a stream continues until
    /// the programs end.
    async fn log(&self, _job: &Job, _is_followed: bool) -> Result<Option<Log>, Failures> {
        Ok(None)
    }

    /// Returns the public host key of the sshd that users log in to, if this runner knows it. Called once they can log in.
    fn host_key(&self, _job: &Job) -> Option<String> {
        None
    }

    /// Releases what a job that has ended (`success`, `error`) holds, such as its address and volume, but keeps its
    /// log. Repeating the call is harmless.
    async fn release(&self, job: &Job) -> Result<(), Failures>;

    /// Removes everything of the job, whether it runs or not. Something that is already absent is no failure. The
    /// record may lack the fields that the runner fills in (if the start was interrupted), or all fields but the ID.
    async fn remove(&self, job: &Job) -> Result<(), Failures>;

    /// Returns the jobs of which something is still there, whether or not they have records.
    async fn held(&self) -> Result<Vec<Held>, Failures> {
        Ok(Vec::new())
    }

    /// Called after this runner has sent a death and the service has recorded the end of that job.
    async fn died(&self, _job: &Job, _reason: &str) {}

    /// Returns whether a job like this one can run on remote build nodes. The service then checks them with
    /// [`Runner::probe`].
    fn takes_nodes(&self, _job: &Job) -> bool {
        false
    }

    /// Asks a remote build node whether it can run jobs. Waits some seconds at most; the status says if the node did
    /// not answer.
    async fn probe(&self, xname: &str) -> NodeStatus {
        NodeStatus::unknown(xname)
    }

    /// Watches for deaths. Called once, when the service starts, with all jobs that have not ended. Sends each death,
    /// of these jobs or of later ones, to `deaths`. Returns when `deaths` is closed, or at once if this runner watches
    /// nothing.
    async fn watch(&self, running: Vec<Job>, deaths: mpsc::Sender<Death>);
}
