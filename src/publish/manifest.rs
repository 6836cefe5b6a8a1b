//! manifest.json, which lists the files of an image, byte for byte as boot services expect it; and reports in JSON.

use std::time::SystemTime;

use serde::Serialize;
use serde_json::json;
use serde_json::ser::{PrettyFormatter, Serializer};

use crate::ims::id::Id;
use crate::ims::records::Artifact;
use crate::log::output::say;
use crate::log::redaction;
use crate::printable;

/// ID and name of an image, for a manifest in a directory whose name is neither of them.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Identity<'a> {
    /// ID of the image.
    pub(crate) id: &'a Id,
    /// Name of the image, as it was given.
    pub(crate) name: &'a str,
}

#[derive(Serialize)]
struct Manifest<'a> {
    artifacts: &'a [Artifact],
    created: String,
    #[serde(flatten)]
    identity: Option<Identity<'a>>,
    version: &'static str,
}

/// Text of a manifest.
pub(crate) fn text(artifacts: &[Artifact], created: SystemTime, identity: Option<Identity>) -> Vec<u8> {
    // The form is that of `2018-02-16 00:31:37.123456`, with a space and without a zone.
    let created = humantime::format_rfc3339_micros(created).to_string().replace('T', " ").replace('Z', "");
    indented(&Manifest { artifacts, created, identity, version: "1.0" })
}

/// JSON as Python's `json.dumps(…, indent=4, sort_keys=True)` writes it.
fn indented(value: &impl Serialize) -> Vec<u8> {
    let mut text = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut text, PrettyFormatter::with_indent(b"    "));
    // Converting to `Value` sorts the keys. Neither step fails: every value has a form in JSON, and a vector takes any
    // length.
    let _ = json!(value).serialize(&mut serializer);
    text
}

/// Prints the report of a publication in upstream's format, since people and scripts search pod logs for it.
pub(crate) fn say_result(report: &serde_json::Value) {
    let text = String::from_utf8_lossy(&indented(report)).into_owned();
    // The report quotes responses of servers, which may contain control characters.
    say(&format!("{}\n", printable::json(&redaction::without_known(&text))));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ims::records::Link;
    use std::time::Duration;

    #[test]
    fn manifest_is_upstreams_byte_for_byte() {
        let artifact = |name: &str, media_type: &str| Artifact {
            link: Link::new(format!("s3://boot-images/1fb58f4e/{name}"), "f04af5f34635ae7c507322985e60c00c-131".into()),
            md5: "d41d8cd98f00b204e9800998ecf8427e".into(),
            media_type: media_type.into(),
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
