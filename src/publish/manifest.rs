//! manifest.json: what an image consists of, byte for byte as boot services expect it.

use crate::log::output::say;
use crate::log::redaction;
use crate::printable;
use std::time::SystemTime;

use serde::Serialize;
use serde_json::ser::{PrettyFormatter, Serializer};
use serde_json::{Value, json};

/// One published file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Artifact {
    /// Where it is, as URL.
    pub(crate) path: String,
    /// The store's own mark of its content, without quotes.
    pub(crate) etag: String,
    /// Its MD5, in hexadecimal digits.
    pub(crate) md5: String,
    /// Its media type.
    pub(crate) media_type: &'static str,
}

impl Artifact {
    /// A link as IMS and the manifest have it.
    pub(crate) fn link(&self) -> Value {
        let kind = if self.path.starts_with("file:") { "file" } else { "s3" };
        json!({ "etag": self.etag, "path": self.path, "type": kind })
    }

    /// An entry of the manifest.
    pub(crate) fn entry(&self) -> Value {
        json!({ "link": self.link(), "md5": self.md5, "type": self.media_type })
    }
}

/// Id and name of an image, in the manifest of one whose place says neither.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity<'a> {
    /// The id.
    pub(crate) id: &'a str,
    /// The name, as it was given.
    pub(crate) name: &'a str,
}

/// The manifest's text: keys sorted, indented by four, as Python's `json.dumps(…, indent=4, sort_keys=True)` writes it.
pub(crate) fn text(artifacts: &[Artifact], created: SystemTime, identity: Option<Identity>) -> Vec<u8> {
    // "2018-02-16T00:31:37.123456Z" with a space, and no zone.
    let created = humantime::format_rfc3339_micros(created).to_string().replace('T', " ").replace('Z', "");
    let entries: Vec<_> = artifacts.iter().map(Artifact::entry).collect();
    let mut manifest = json!({ "artifacts": entries, "created": created, "version": "1.0" });
    if let Some(Identity { id, name }) = identity {
        (manifest["id"], manifest["name"]) = (json!(id), json!(name));
    }
    indented(&manifest)
}

/// JSON as Python's `json.dumps(…, indent=4, sort_keys=True)` writes it.
pub(crate) fn indented(value: &Value) -> Vec<u8> {
    let mut text = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut text, PrettyFormatter::with_indent(b"    "));
    // Nothing in it that JSON has no form for, and a vector takes all.
    let _ = value.serialize(&mut serializer);
    text
}

/// Prints what became of a publication, as upstream prints it: people and scripts search pod logs for it.
pub(crate) fn say_result(value: &serde_json::Value) {
    let text = String::from_utf8_lossy(&indented(value)).into_owned();
    // Records of IMS, and what servers have said, are in it.
    say(&format!("{}\n", printable::json(&redaction::without_known(&text))));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn it_is_upstreams_byte_for_byte() {
        let artifact = |name: &str, media_type| Artifact {
            path: format!("s3://boot-images/1fb58f4e/{name}"),
            etag: "f04af5f34635ae7c507322985e60c00c-131".into(),
            md5: "d41d8cd98f00b204e9800998ecf8427e".into(),
            media_type,
        };
        let artifacts = [
            artifact("rootfs", "application/vnd.cray.image.rootfs.squashfs"),
            artifact("kernel", "application/vnd.cray.image.kernel"),
        ];
        let at = SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_000_042);
        let expected = r#"{
    "artifacts": [
        {
            "link": {
                "etag": "f04af5f34635ae7c507322985e60c00c-131",
                "path": "s3://boot-images/1fb58f4e/rootfs",
                "type": "s3"
            },
            "md5": "d41d8cd98f00b204e9800998ecf8427e",
            "type": "application/vnd.cray.image.rootfs.squashfs"
        },
        {
            "link": {
                "etag": "f04af5f34635ae7c507322985e60c00c-131",
                "path": "s3://boot-images/1fb58f4e/kernel",
                "type": "s3"
            },
            "md5": "d41d8cd98f00b204e9800998ecf8427e",
            "type": "application/vnd.cray.image.kernel"
        }
    ],
    "created": "2023-11-14 22:13:20.000042",
    "version": "1.0"
}"#;
        assert_eq!(String::from_utf8(text(&artifacts, at, None)).unwrap(), expected);
    }
}
