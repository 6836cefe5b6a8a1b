//! Records as the API returns them, with their fields in the order of the answers to POST (status 201), and the rules
//! for requests.

use std::collections::BTreeMap;

use chrono::{Local, NaiveDateTime, Timelike};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

mod kind;
mod link;
pub mod manifest;
pub mod rules;
pub mod wire;

pub use kind::Kind;
pub use link::{Link, Location};

/// A record of a table: its ID and the link to its object.
pub trait Record: Serialize + DeserializeOwned + Clone + Send + Sync {
    /// Table of the records.
    const KIND: Kind;

    /// ID, which is unique in the table.
    fn id(&self) -> &str;

    /// Link to the record's object.
    fn link(&self) -> Option<&Link> {
        None
    }
}

/// A public key that may log in to a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublicKey {
    /// Name, not unique.
    pub name: String,
    /// Lines of an `authorized_keys` file, as the client sent them.
    pub public_key: String,
    /// ID.
    pub id: String,
    /// Local time of creation.
    pub created: String,
}

/// A key and its value, for a recipe's templates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// Key.
    pub key: String,
    /// Value.
    pub value: String,
}

/// A recipe, from which an image is built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recipe {
    /// Name, not unique.
    pub name: String,
    /// Link to the recipe's archive.
    #[serde(default)]
    pub link: Option<Link>,
    /// `kiwi-ng` or `packer`.
    pub recipe_type: String,
    /// `sles12`, `sles15` or `centos7`.
    pub linux_distribution: String,
    /// Values for the recipe's templates.
    #[serde(default = "no_pairs")]
    pub template_dictionary: Option<Vec<Pair>>,
    /// True if kernel modules are built.
    #[serde(default = "yes")]
    pub require_dkms: bool,
    /// `x86_64` or `aarch64`.
    #[serde(default = "x86_64")]
    pub arch: String,
    /// ID.
    pub id: String,
    /// Local time of creation.
    pub created: String,
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Name, not unique.
    pub name: String,
    /// Link to the image's manifest.
    #[serde(default)]
    pub link: Option<Link>,
    /// `x86_64` or `aarch64`.
    #[serde(default = "x86_64")]
    pub arch: String,
    /// Free-form keys and values.
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    /// ID.
    pub id: String,
    /// Local time of creation.
    pub created: String,
}

/// A deleted record, which can be undeleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deleted<R> {
    /// The record; its link points to where its object was moved.
    #[serde(flatten)]
    pub record: R,
    /// Local time of the deletion.
    pub deleted: String,
}

/// A host that jobs can run on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Name of the host.
    pub xname: String,
}

/// A build environment that users log in to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Name by which CFS recognizes the container that it requested.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// True if logins enter the image root directly.
    #[serde(default)]
    pub jail: bool,
    /// Always `pending`: nothing updates it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// Addresses, each under the name of the network from which it is reached: `customer_access` or `cluster.local`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection_info: Option<BTreeMap<String, Address>>,
}

/// Address of a build environment's sshd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// Host name.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Public host key, once users can log in, where the runner knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_key: Option<String>,
}

/// A job, which makes an image from a recipe or from another image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// ID of the recipe or image.
    pub artifact_id: String,
    /// ID of the key that may log in.
    pub public_key_id: String,
    /// `create` or `customize`.
    pub job_type: String,
    /// Name of the new image.
    pub image_root_archive_name: String,
    /// True if the environment of a failed build stays open for logins.
    #[serde(default)]
    pub enable_debug: bool,
    /// Size of the volume in GiB.
    #[serde(default = "image_size")]
    pub build_env_size: u32,
    /// Name of the kernel in /boot.
    #[serde(default = "vmlinuz")]
    pub kernel_file_name: String,
    /// Name of the initrd in /boot.
    #[serde(default = "initrd")]
    pub initrd_file_name: String,
    /// Name of the file in /boot with the kernel's parameters.
    #[serde(default = "kernel_parameters")]
    pub kernel_parameters_file_name: String,
    /// The environments that users log in to; at most one.
    #[serde(default)]
    pub ssh_containers: Option<Vec<Container>>,
    /// True if kernel modules are built.
    #[serde(default = "yes")]
    pub require_dkms: bool,
    /// Memory of each container in GiB.
    #[serde(default = "job_memory")]
    pub job_mem_size: u32,
    /// ID.
    pub id: String,
    /// Local time of creation.
    pub created: String,
    /// Name of the job's Kubernetes Job.
    #[serde(default)]
    pub kubernetes_job: Option<String>,
    /// Name of the job's Kubernetes Service.
    #[serde(default)]
    pub kubernetes_service: Option<String>,
    /// Name of the job's Kubernetes ConfigMap.
    #[serde(default)]
    pub kubernetes_configmap: Option<String>,
    /// Kubernetes namespace of the Service and of the ConfigMap.
    #[serde(default)]
    pub kubernetes_namespace: Option<String>,
    /// One of [`STATUSES`].
    #[serde(default = "creating")]
    pub status: String,
    /// ID of the published image.
    #[serde(default)]
    pub resultant_image_id: Option<String>,
    /// `x86_64` or `aarch64`: the architecture of the recipe or image.
    #[serde(default = "x86_64")]
    pub arch: String,
    /// Name of the PersistentVolumeClaim of the job's volume.
    #[serde(default)]
    pub kubernetes_pvc: Option<String>,
    /// Remote build node that the job runs on; empty if it runs on none.
    #[serde(default)]
    pub remote_build_node: String,
    /// Name of the Kubernetes Secret with the keys that sign packages.
    #[serde(default)]
    pub kubernetes_secret: Option<String>,
}

/// Statuses of a job.
pub const STATUSES: &[&str] = &[
    "creating",
    "fetching_image",
    "fetching_recipe",
    "waiting_for_repos",
    "building_image",
    "waiting_on_user",
    "packaging_artifacts",
    "error",
    "success",
];

impl Job {
    /// A job of which only the ID is known; all texts are empty.
    pub fn without_record(id: &str) -> Self {
        let known = serde_json::json!({
            "id": id, "artifact_id": "", "public_key_id": "", "job_type": "", "image_root_archive_name": "", "created": "",
        });
        serde_json::from_value(known).expect("the fields without a default")
    }

    /// Returns whether the job has ended.
    pub fn has_ended(&self) -> bool {
        matches!(self.status.as_str(), "error" | "success")
    }
}

macro_rules! record {
    ($record:ty, $kind:expr, $id:ident $(, $link:ident)?) => {
        impl Record for $record {
            const KIND: Kind = $kind;

            fn id(&self) -> &str {
                &self.$id
            }

            $(fn link(&self) -> Option<&Link> {
                self.$link.as_ref()
            })?
        }
    };
}

record!(PublicKey, Kind::PublicKeys, id);
record!(Recipe, Kind::Recipes, id, link);
record!(Image, Kind::Images, id, link);
record!(Job, Kind::Jobs, id);
record!(Node, Kind::Nodes, xname);

macro_rules! deleted {
    ($record:ty, $kind:expr) => {
        impl Record for Deleted<$record> {
            const KIND: Kind = $kind;

            fn id(&self) -> &str {
                &self.record.id
            }

            fn link(&self) -> Option<&Link> {
                self.record.link()
            }
        }
    };
}

deleted!(PublicKey, Kind::DeletedPublicKeys);
deleted!(Recipe, Kind::DeletedRecipes);
deleted!(Image, Kind::DeletedImages);

/// A new random ID.
pub fn new_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// The current time in upstream's format: local, without a zone, and without a fraction if the fraction is zero.
pub fn now() -> String {
    written(Local::now().naive_local())
}

/// Writes a time as Python's `isoformat` does.
pub fn written(time: NaiveDateTime) -> String {
    let format = if time.nanosecond() < 1000 { "%Y-%m-%dT%H:%M:%S" } else { "%Y-%m-%dT%H:%M:%S%.6f" };
    time.format(format).to_string()
}

#[allow(clippy::unnecessary_wraps)] // default of a field that may be null
fn no_pairs() -> Option<Vec<Pair>> {
    Some(Vec::new())
}

fn yes() -> bool {
    true
}

fn x86_64() -> String {
    "x86_64".into()
}

fn image_size() -> u32 {
    60
}

fn job_memory() -> u32 {
    8
}

fn vmlinuz() -> String {
    "vmlinuz".into()
}

fn initrd() -> String {
    "initrd".into()
}

fn kernel_parameters() -> String {
    "kernel-parameters".into()
}

fn creating() -> String {
    "creating".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_without_zone_and_without_an_empty_fraction() {
        let time = |text: &str| written(text.parse().unwrap());
        assert_eq!(time("2026-01-31T09:15:03.207576"), "2026-01-31T09:15:03.207576");
        assert_eq!(time("2026-01-31T09:15:03.2"), "2026-01-31T09:15:03.200000");
        assert_eq!(time("2026-01-31T09:15:03"), "2026-01-31T09:15:03");
        assert!(now().parse::<NaiveDateTime>().is_ok());
    }
}
