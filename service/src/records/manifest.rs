//! Manifests of images: which manifests a record may link to, and which objects are moved and removed with a record.

use serde_json::{Map, Value, json};

use super::{Link, Location};

/// Prefix of the media type of an image's rootfs.
const ROOTFS: &str = "application/vnd.cray.image.rootfs.squashfs";

/// Media type of the original manifest, which the manifest of a deleted image lists as an artifact.
pub const MANIFEST: &str = "application/vnd.cray.image.manifest";

/// Reason why a record cannot link to a manifest, or why no job can start from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The manifest is malformed.
    Malformed(String),
    /// The manifest lists no rootfs, or several.
    Rootfs(String),
}

/// A file of an image, as the manifest lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// Location of the file.
    pub location: Location,
    /// Media type; may be empty.
    pub kind: String,
    /// MD5, if the manifest has it.
    pub md5: Option<String>,
}

/// Result of checking a manifest that a record is to link to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// Objects that must exist for the link to be accepted.
    pub artifacts: Vec<Location>,
    /// Reason to refuse the manifest even if these objects exist.
    pub refusal: Option<Refusal>,
}

/// Checks a manifest by the rules for a new link. Accepts a manifest that is empty JSON.
pub fn check(text: &[u8]) -> Result<Checked, Refusal> {
    let malformed = |why: &str| Refusal::Malformed(format!("the manifest {why}"));
    let manifest: Value = serde_json::from_slice(text).map_err(|e| malformed(&format!("is no JSON: {e}")))?;
    if is_empty(&manifest) {
        return Ok(Checked { artifacts: Vec::new(), refusal: None });
    }
    let artifacts = versioned(&manifest)?;
    let mut locations = Vec::new();
    let mut kinds = Vec::new();
    for (number, artifact) in (1..).zip(artifacts) {
        let wrong = |why: &str| malformed(&format!("is wrong in artifact {number}: {why}"));
        let link = artifact.get("link").and_then(Value::as_object).ok_or_else(|| wrong("it has no link"))?;
        if link.get("type").and_then(Value::as_str) != Some("s3") {
            return Err(wrong("the type of its link is not s3"));
        }
        let path = link.get("path").and_then(Value::as_str).ok_or_else(|| wrong("its link has no path"))?;
        locations.push(
            Location::parse(path).ok_or_else(|| wrong("the path of its link is not of the form s3://BUCKET/KEY"))?,
        );
        kinds.push(artifact.get("type").and_then(Value::as_str));
    }
    let refusal = if kinds.iter().any(Option::is_none) {
        Some(malformed("has an artifact without a type"))
    } else {
        let count = kinds.iter().flatten().filter(|kind| kind.starts_with(ROOTFS)).count();
        (count != 1)
            .then(|| Refusal::Rootfs(format!("the manifest lists {count} artifacts of type {ROOTFS}: expected 1")))
    };
    Ok(Checked { artifacts: locations, refusal })
}

/// Returns the rootfs in the manifest of an image, from which a customize job begins.
pub fn rootfs(text: &[u8]) -> Result<Artifact, Refusal> {
    let manifest: Value = serde_json::from_slice(text)
        .map_err(|e| Refusal::Malformed(format!("the manifest of the image is no JSON: {e}")))?;
    let listed = versioned(&manifest)?;
    let is_rootfs =
        |artifact: &&Value| artifact.get("type").and_then(Value::as_str).is_some_and(|kind| kind.starts_with(ROOTFS));
    let found: Vec<_> = listed.iter().filter(is_rootfs).collect();
    match *found {
        [one] => artifact(one).ok_or_else(|| Refusal::Rootfs("the rootfs in the manifest has no link".into())),
        _ => Err(Refusal::Rootfs(format!("the manifest lists {} artifacts of type {ROOTFS}: expected 1", found.len()))),
    }
}

/// Returns all artifacts that have a location; `None` if the text is no manifest at all.
pub fn artifacts(text: &[u8]) -> Option<Vec<Artifact>> {
    let manifest: Value = serde_json::from_slice(text).ok()?;
    if is_empty(&manifest) {
        return Some(Vec::new());
    }
    let listed = manifest.as_object()?.get("artifacts")?.as_array()?;
    Some(listed.iter().filter_map(artifact).collect())
}

/// Returns the manifest of a deleted image. It lists all objects that an undelete moves back.
pub fn of_deleted(artifacts: &[(Artifact, String)], manifest: &Link, created: &str) -> Vec<u8> {
    let link = |link: &Link| json!({ "etag": link.etag, "path": link.path, "type": link.kind });
    let listed = artifacts.iter().map(|(artifact, etag)| {
        let mut entry = Map::new();
        entry.insert("type".into(), json!(artifact.kind));
        if let Some(md5) = &artifact.md5 {
            entry.insert("md5".into(), json!(md5));
        }
        entry.insert("link".into(), link(&Link::new(&artifact.location, etag)));
        Value::Object(entry)
    });
    let own = json!({ "type": MANIFEST, "link": link(manifest) });
    let listed: Vec<_> = listed.chain([own]).collect();
    json!({ "version": "1.0", "created": created, "artifacts": listed }).to_string().into_bytes()
}

fn artifact(entry: &Value) -> Option<Artifact> {
    let text = |name: &str| entry.get(name).and_then(Value::as_str);
    Some(Artifact {
        location: Location::parse(entry.get("link")?.get("path")?.as_str()?)?,
        kind: text("type").unwrap_or_default().to_owned(),
        md5: text("md5").map(str::to_owned),
    })
}

/// Returns the artifacts of a manifest; fails if its version is not 1.0.
fn versioned(manifest: &Value) -> Result<&Vec<Value>, Refusal> {
    if manifest.get("version").and_then(Value::as_str) != Some("1.0") {
        return Err(Refusal::Malformed("the version of the manifest is not 1.0".into()));
    }
    let artifacts = manifest.get("artifacts").and_then(Value::as_array);
    artifacts.ok_or_else(|| Refusal::Malformed("the manifest has no list of artifacts".into()))
}

/// Returns whether Python takes the value for false.
pub fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: &str) -> Value {
        json!({ "link": { "path": "s3://b/k", "type": "s3", "etag": "" }, "type": kind, "md5": "m" })
    }

    fn checked(manifest: &Value) -> Result<Checked, Refusal> {
        check(manifest.to_string().as_bytes())
    }

    #[test]
    fn a_manifest_is_checked_in_upstreams_order() {
        let good =
            json!({ "version": "1.0", "artifacts": [entry(ROOTFS), entry("application/vnd.cray.image.kernel")] });
        assert_eq!(checked(&good).unwrap().refusal, None);
        assert_eq!(checked(&good).unwrap().artifacts.len(), 2);
        for empty in [json!(null), json!([]), json!({})] {
            assert_eq!(checked(&empty).unwrap(), Checked { artifacts: Vec::new(), refusal: None });
        }
        for wrong in [
            json!({"artifacts": []}),
            json!({"version": 1.0, "artifacts": []}),
            json!({"version": "1.0"}),
            json!({"version": "1.0", "artifacts": {}}),
            json!({"version": "1.0", "artifacts": [7]}),
            json!({"version": "1.0", "artifacts": [{"link": null}]}),
            json!({"version": "1.0", "artifacts": [{"link": {"type": "S3", "path": "s3://b/k"}}]}),
            json!({"version": "1.0", "artifacts": [{"link": {"type": "s3"}}]}),
            json!([1]),
            json!("x"),
        ] {
            assert!(matches!(checked(&wrong), Err(Refusal::Malformed(_))), "{wrong}");
        }
        assert!(matches!(check(b"{"), Err(Refusal::Malformed(_))));
        assert!(matches!(check(b"\xff"), Err(Refusal::Malformed(_))));
        let mut without_type = good.clone();
        without_type["artifacts"][1].as_object_mut().unwrap().remove("type");
        assert!(matches!(checked(&without_type).unwrap().refusal, Some(Refusal::Malformed(_))));
        let two = json!({ "version": "1.0", "artifacts": [entry(ROOTFS), entry(&format!("{ROOTFS}; x"))] });
        assert!(matches!(checked(&two).unwrap().refusal, Some(Refusal::Rootfs(_))));
    }

    #[test]
    fn a_deleted_manifest_lists_every_artifact_and_the_manifest() {
        let manifest = json!({ "version": "1.0", "artifacts": [entry(ROOTFS), {"link": {"path": "s3://b/x"}}, 7] });
        let found = artifacts(manifest.to_string().as_bytes()).unwrap();
        assert_eq!(found.len(), 2);
        let pairs: Vec<_> = found.into_iter().map(|artifact| (artifact, "e".to_owned())).collect();
        let own = Link { path: "s3://b/deleted/m".into(), etag: "f".into(), kind: "s3".into() };
        let text = of_deleted(&pairs, &own, "2026-01-31 09:15:03");
        let read = artifacts(&text).unwrap();
        assert_eq!(read.len(), 3);
        assert_eq!((read[2].kind.as_str(), read[2].location.key.as_str()), (MANIFEST, "deleted/m"));
        assert_eq!(artifacts(b"[1]"), None);
        assert_eq!(artifacts(b"{\"artifacts\":null}"), None);
    }
}
