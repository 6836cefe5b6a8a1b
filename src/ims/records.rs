//! Records of IMS as JSON, in its responses and in requests to it. A newer IMS may respond with fields that are not
//! named here; these are kept and printed again. A field of a wrong type is an error.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::ims::id::Id;

/// Key in an image's metadata whose value is the ID of the request that created the record.
pub(crate) const REQUEST: &str = "ims-sshd-request";

/// A record that has an ID.
pub(crate) trait Record: DeserializeOwned {
    /// ID of the record.
    fn id(&self) -> &Id;
}

/// Location of an object: a manifest, or an artifact that the manifest lists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// ETag of the object, without quotes.
    #[serde(default)]
    pub etag: String,
    /// URL of the object.
    pub path: String,
    /// `s3`; `file` in a store that is a directory.
    #[serde(rename = "type")]
    pub kind: String,
}

impl Link {
    /// Link to the object at the URL `path`.
    pub(crate) fn new(path: String, etag: String) -> Self {
        let kind = if path.starts_with("file:") { "file" } else { "s3" };
        Self { etag, path, kind: kind.to_owned() }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (ETag {}, type {})", self.path, self.etag, self.kind)
    }
}

/// Entry of a manifest: one file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// Location of the file.
    pub link: Link,
    /// MD5 of the file, in hexadecimal digits.
    pub md5: String,
    /// Media type of the file.
    #[serde(rename = "type")]
    pub media_type: String,
}

/// Record of an image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Image {
    /// ID of the image, and first part of its objects' keys.
    pub id: Id,
    /// Name of the image; several images may share one.
    #[serde(default)]
    pub name: String,
    /// Link to the manifest, once the image is uploaded.
    pub link: Option<Link>,
    /// `x86_64` or `aarch64`; absent in an older IMS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arch: Option<String>,
    /// Free-form keys and values; absent in an older IMS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<BTreeMap<String, String>>,
    /// Other fields, which are only printed again.
    #[serde(flatten)]
    pub further: Map<String, Value>,
}

/// Request for the record of a new image.
#[derive(Debug, Serialize)]
pub(crate) struct NewImage<'a> {
    pub(crate) name: &'a str,
    pub(crate) arch: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) metadata: Option<BTreeMap<&'static str, &'a Id>>,
}

impl Image {
    /// Returns whether `request` created this record.
    pub(crate) fn was_made_by(&self, request: &Id) -> bool {
        self.metadata.as_ref().and_then(|metadata| metadata.get(REQUEST)).is_some_and(|id| id == request.as_str())
    }

    /// Reason why this cannot be the record of the image `id` that `request` (if known) created and that was given
    /// `link`; `None` if it can be that record.
    pub(crate) fn difference(&self, id: &Id, request: Option<&Id>, link: Option<&Link>) -> Option<String> {
        if self.id != *id {
            return Some(format!("its id is {}", self.id));
        }
        if request.is_some_and(|request| !self.was_made_by(request)) {
            return Some(format!("its metadata does not say that it was made by this job's request ({REQUEST})"));
        }
        self.link.as_ref().filter(|told| Some(*told) != link).map(|told| format!("its link is {told}"))
    }
}

impl Record for Image {
    fn id(&self) -> &Id {
        &self.id
    }
}

/// Status of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// The job has been created.
    Creating,
    /// The recipe is being fetched.
    FetchingRecipe,
    /// The image is being fetched and unpacked.
    FetchingImage,
    /// The package repositories do not answer yet.
    WaitingForRepos,
    /// The image is being built from its recipe.
    BuildingImage,
    /// sshd accepts connections.
    WaitingOnUser,
    /// The image is being packed and uploaded.
    PackagingArtifacts,
    /// The job has ended without a new image.
    Error,
    /// The job has ended, and its image is published.
    Success,
    /// A status that only a newer IMS has.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// Record of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// ID of the job.
    pub id: Id,
    /// Progress of the job.
    pub status: Status,
    /// ID of the published image. IMS takes any spelling of a UUID.
    pub resultant_image_id: Option<String>,
    /// Other fields, which are only printed again.
    #[serde(flatten)]
    pub further: Map<String, Value>,
}

impl Record for Job {
    fn id(&self) -> &Id {
        &self.id
    }
}

/// Record of a recipe, from which an image is built.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// ID of the recipe.
    pub id: Id,
    /// Name of the recipe.
    pub name: String,
    /// Link to the recipe's archive, once that is uploaded.
    pub link: Option<Link>,
    /// `kiwi-ng` or `packer`.
    pub recipe_type: String,
    /// `x86_64` or `aarch64`.
    pub arch: Option<String>,
    /// Other fields, which are only printed again.
    #[serde(flatten)]
    pub further: Map<String, Value>,
}

/// Record of a public key that lets users log in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PublicKey {
    /// ID of the key.
    pub id: Id,
    /// Name of the key.
    pub name: String,
    /// Lines of an `authorized_keys` file.
    pub public_key: String,
    /// Other fields, which are only printed again.
    #[serde(flatten)]
    pub further: Map<String, Value>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const ID: &str = "46a2731e-a1d0-4f98-ba92-4f78c756bb12";

    /// Responses of IMS 3.33, some with an additional field that 3.33 does not have.
    #[test]
    fn records_are_read_and_printed_with_fields_that_are_not_known() {
        fn is_kept<R: DeserializeOwned + Serialize>(record: &Value) {
            let read: R = serde_json::from_value(record.clone()).unwrap();
            assert_eq!(serde_json::to_value(read).unwrap(), *record);
        }
        let link = json!({ "path": "s3://b/k", "etag": "e", "type": "s3" });
        let created = "2026-01-31T09:15:03.207576";
        for link in [&link, &Value::Null] {
            is_kept::<Image>(&json!({
                "id": ID, "name": "ä", "link": link, "arch": "x86_64", "metadata": { "k": "v" }, "created": created,
            }));
            is_kept::<Recipe>(&json!({
                "id": ID, "name": "n", "link": link, "recipe_type": "kiwi-ng", "linux_distribution": "sles15",
                "template_dictionary": [], "require_dkms": true, "arch": "aarch64", "created": created, "new": [1],
            }));
        }
        is_kept::<PublicKey>(&json!({ "id": ID, "name": "n", "public_key": "ssh-ed25519 A\n", "created": created }));
        is_kept::<Artifact>(&json!({ "link": link, "md5": "d41d8cd9", "type": "application/json" }));
        is_kept::<Job>(&json!({ "id": ID, "status": "success", "resultant_image_id": null, "ssh_containers": [{}] }));
        is_kept::<Image>(&json!({ "id": ID, "name": "of an older IMS", "link": null }));
    }

    #[test]
    fn fields_of_a_wrong_type_are_errors_that_name_them() {
        for (field, wrong, why) in [
            ("id", json!("../jobs"), "expected a UUID"),
            ("id", json!(7), "expected a string"),
            ("link", json!({ "path": 7, "type": "s3" }), "expected a string"),
            ("metadata", json!({ "k": 7 }), "expected a string"),
            ("arch", json!([]), "expected a string"),
        ] {
            let mut record = json!({ "id": ID, "name": "n", "link": null });
            record[field] = wrong;
            let refused = serde_json::from_value::<Image>(record).unwrap_err().to_string();
            assert!(refused.contains(why), "{field}: {refused}");
        }
        let list = json!([ID, "n", null, null, null]);
        assert!(serde_json::from_value::<Image>(list).is_err());
    }

    #[test]
    fn statuses_are_named_as_in_ims() {
        assert_eq!(Status::WaitingOnUser.to_string(), "waiting_on_user");
        assert_eq!(serde_json::from_value::<Status>(json!("waiting_for_repos")).unwrap(), Status::WaitingForRepos);
        assert_eq!(serde_json::from_value::<Status>(json!("sleeping")).unwrap(), Status::Unknown);
    }
}
