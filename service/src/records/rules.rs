//! Rules for the fields of requests, as tables. Requests are checked and converted by these tables, and the OpenAPI
//! document is generated from them.

use std::collections::BTreeMap;

use serde_json::{Map, Number, Value, json};

use super::STATUSES;

/// Complaints about a request: a list of texts for each field, or for a nested object again a map of its fields.
pub type Errors = BTreeMap<String, Value>;

/// Type of a field.
#[derive(Debug, Clone, Copy)]
pub enum Rule {
    /// A text.
    Text {
        /// True if `""` is accepted.
        empty: bool,
    },
    /// A boolean, or one of the words and numbers that Python's marshmallow accepts as a boolean.
    Flag,
    /// A whole number of at least 1. A number in a text is parsed, and a fraction is truncated.
    Count,
    /// Any spelling of a UUID.
    Uuid,
    /// One of these texts.
    Word(&'static [&'static str]),
    /// An object with these fields.
    Object(&'static [Field]),
    /// A list of objects with these fields.
    List(&'static [Field]),
    /// An object of texts.
    Texts,
    /// An object of texts, or a single pair written as `{"key": …, "value": …}`.
    TextsOrPair,
}

/// A field of a request.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// Name.
    pub name: &'static str,
    /// Type.
    pub rule: Rule,
    /// True if the field must be present.
    pub required: bool,
    /// True if `null` is accepted.
    pub null: bool,
}

const fn required(name: &'static str, rule: Rule) -> Field {
    Field { name, rule, required: true, null: false }
}

const fn optional(name: &'static str, rule: Rule) -> Field {
    Field { name, rule, required: false, null: false }
}

const fn nullable(name: &'static str, rule: Rule) -> Field {
    Field { name, rule, required: false, null: true }
}

/// A text that may be empty.
const ANY_TEXT: Rule = Rule::Text { empty: true };

/// A text of at least one character.
const TEXT: Rule = Rule::Text { empty: false };

const ARCHES: Rule = Rule::Word(&["x86_64", "aarch64"]);

/// A link.
pub const LINK: &[Field] = &[required("path", TEXT), optional("etag", ANY_TEXT), required("type", Rule::Word(&["s3"]))];

/// An entry of a template dictionary.
pub const PAIR: &[Field] = &[required("key", ANY_TEXT), required("value", ANY_TEXT)];

/// A container of a job.
pub const CONTAINER: &[Field] = &[optional("name", ANY_TEXT), optional("jail", Rule::Flag)];

/// Fields of a POST of a public key.
pub const NEW_PUBLIC_KEY: &[Field] = &[required("name", TEXT), required("public_key", TEXT)];

/// Fields of a POST of a recipe.
pub const NEW_RECIPE: &[Field] = &[
    required("name", TEXT),
    nullable("link", Rule::Object(LINK)),
    required("recipe_type", Rule::Word(&["kiwi-ng", "packer"])),
    required("linux_distribution", Rule::Word(&["sles12", "sles15", "centos7"])),
    nullable("template_dictionary", Rule::List(PAIR)),
    optional("require_dkms", Rule::Flag),
    optional("arch", ARCHES),
];

/// Fields of a POST of an image.
pub const NEW_IMAGE: &[Field] = &[
    required("name", TEXT),
    nullable("link", Rule::Object(LINK)),
    optional("arch", ARCHES),
    optional("metadata", Rule::TextsOrPair),
];

/// Fields of a POST of a remote build node.
pub const NEW_NODE: &[Field] = &[required("xname", TEXT)];

/// Fields of a POST of a job.
pub const NEW_JOB: &[Field] = &[
    required("artifact_id", Rule::Uuid),
    required("public_key_id", Rule::Uuid),
    required("job_type", Rule::Word(&["create", "customize"])),
    required("image_root_archive_name", TEXT),
    optional("enable_debug", Rule::Flag),
    optional("build_env_size", Rule::Count),
    optional("kernel_file_name", ANY_TEXT),
    optional("initrd_file_name", TEXT),
    optional("kernel_parameters_file_name", TEXT),
    nullable("ssh_containers", Rule::List(CONTAINER)),
    optional("require_dkms", Rule::Flag),
    optional("job_mem_size", Rule::Count),
];

/// Fields of a PATCH of a recipe.
pub const PATCH_RECIPE: &[Field] = &[
    optional("link", Rule::Object(LINK)),
    optional("arch", ARCHES),
    optional("require_dkms", Rule::Flag),
    optional("template_dictionary", Rule::List(PAIR)),
];

/// One change of an image's metadata.
pub const METADATA_CHANGE: &[Field] =
    &[required("operation", Rule::Word(&["set", "remove"])), required("key", ANY_TEXT), optional("value", ANY_TEXT)];

/// Fields of a PATCH of an image.
pub const PATCH_IMAGE: &[Field] = &[
    optional("link", Rule::Object(LINK)),
    optional("arch", ARCHES),
    optional("metadata", Rule::Object(METADATA_CHANGE)),
];

/// Fields of a PATCH of a job.
pub const PATCH_JOB: &[Field] = &[optional("status", Rule::Word(STATUSES)), optional("resultant_image_id", Rule::Uuid)];

/// Fields of a PATCH of deleted records.
pub const UNDELETE: &[Field] = &[required("operation", Rule::Word(&["undelete"]))];

/// Checks the fields of `body` and returns them converted. Absent fields stay absent.
pub fn check(body: &Value, fields: &[Field]) -> Result<Map<String, Value>, Errors> {
    let Value::Object(body) = body else {
        return Err(Errors::from([("_schema".into(), json!(["expected an object"]))]));
    };
    let mut errors = Errors::new();
    let mut checked = Map::new();
    for field in fields {
        match body.get(field.name) {
            None if field.required => {
                errors.insert(field.name.into(), json!(["missing: this field is required"]));
            }
            None => {}
            Some(Value::Null) if field.null => {
                checked.insert(field.name.into(), Value::Null);
            }
            Some(Value::Null) => {
                errors.insert(field.name.into(), json!(["null is not a value of this field"]));
            }
            Some(value) => match convert(value, field.rule) {
                Ok(value) => {
                    checked.insert(field.name.into(), value);
                }
                Err(complaint) => {
                    errors.insert(field.name.into(), complaint);
                }
            },
        }
    }
    for name in body.keys().filter(|name| !fields.iter().any(|field| field.name == **name)) {
        errors.insert(name.clone(), json!(["unknown field"]));
    }
    if errors.is_empty() { Ok(checked) } else { Err(errors) }
}

/// Checks and converts one value. An error is the entry of [`Errors`] for the value's field.
fn convert(value: &Value, rule: Rule) -> Result<Value, Value> {
    let nested = |errors: Errors| json!(errors);
    match rule {
        Rule::Text { empty } => match value {
            Value::String(text) if empty || !text.is_empty() => Ok(value.clone()),
            Value::String(_) => Err(json!(["empty: expected at least one character"])),
            _ => Err(json!(["expected a string"])),
        },
        Rule::Flag => flag(value).map(Value::Bool).ok_or_else(|| json!(["expected true or false"])),
        Rule::Count => match count(value) {
            Some(1..) => Ok(json!(count(value))),
            Some(0) => Err(json!(["expected 1 or more"])),
            None => Err(json!(["expected a whole number from 1 to 4294967295"])),
        },
        Rule::Uuid => {
            let uuid = value.as_str().and_then(uuid);
            uuid.map(Value::String).ok_or_else(|| json!(["expected a UUID"]))
        }
        Rule::Word(words) => match value.as_str() {
            Some(text) if words.contains(&text) => Ok(value.clone()),
            _ => Err(json!([format!("expected one of: {}", words.join(", "))])),
        },
        Rule::Object(fields) => check(value, fields).map(Value::Object).map_err(nested),
        Rule::List(fields) => {
            let Value::Array(items) = value else { return Err(json!(["expected a list"])) };
            let mut errors = Errors::new();
            let mut checked = Vec::new();
            for (index, item) in items.iter().enumerate() {
                match check(item, fields) {
                    Ok(item) => checked.push(Value::Object(item)),
                    Err(complaint) => drop(errors.insert(index.to_string(), json!(complaint))),
                }
            }
            if errors.is_empty() { Ok(Value::Array(checked)) } else { Err(nested(errors)) }
        }
        Rule::Texts => texts(value),
        Rule::TextsOrPair => match value.get("key") {
            Some(key) => {
                let text = |value: Option<&Value>| value.map_or(Some(""), Value::as_str).map(str::to_owned);
                let (key, value) = (text(Some(key)), text(value.get("value")));
                match (key, value) {
                    (Some(key), Some(value)) => Ok(json!({ key: value })),
                    (key, _) => {
                        let field = if key.is_none() { "key" } else { "value" };
                        Err(json!({ field: { field: ["expected a string"] } }))
                    }
                }
            }
            None => texts(value),
        },
    }
}

fn texts(value: &Value) -> Result<Value, Value> {
    let Value::Object(pairs) = value else { return Err(json!(["expected an object"])) };
    let wrong = pairs.iter().filter(|(_, value)| !value.is_string());
    let errors: Errors = wrong.map(|(key, _)| (key.clone(), json!({ "value": ["expected a string"] }))).collect();
    if errors.is_empty() { Ok(value.clone()) } else { Err(json!(errors)) }
}

/// Converts the values that marshmallow's Boolean field accepts.
fn flag(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(flag) => Some(*flag),
        Value::Number(number) => match number.as_f64() {
            Some(1.0) => Some(true),
            Some(0.0) => Some(false),
            _ => None,
        },
        Value::String(text) => match text.as_str() {
            "t" | "T" | "true" | "True" | "TRUE" | "y" | "Y" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" | "1" => {
                Some(true)
            }
            "f" | "F" | "false" | "False" | "FALSE" | "n" | "N" | "no" | "No" | "NO" | "off" | "Off" | "OFF" | "0" => {
                Some(false)
            }
            _ => None,
        },
        _ => None,
    }
}

/// Converts a number as Python's `int()` does; returns 0 for every number below 1.
fn count(value: &Value) -> Option<u32> {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // within the bounds that are checked
    fn whole(number: &Number) -> Option<u32> {
        let number = number.as_f64()?.trunc();
        (number <= f64::from(u32::MAX)).then_some(if number < 1.0 { 0 } else { number as u32 })
    }
    match value {
        Value::Number(number) => whole(number),
        Value::String(text) => {
            let number: i64 = text.trim().parse().ok()?;
            whole(&number.into())
        }
        _ => None,
    }
}

/// Converts a UUID from any spelling that Python accepts to the usual spelling.
pub fn uuid(text: &str) -> Option<String> {
    let digits = text.replace("urn:", "").replace("uuid:", "");
    let digits = digits.trim_matches(['{', '}']).replace('-', "");
    let fits = digits.len() == 32 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    fits.then(|| uuid::Uuid::try_parse(&digits).ok())?.map(|uuid| uuid.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_what_marshmallow_takes_for_them() {
        for value in [json!(true), json!(1), json!(1.0), json!("t"), json!("TRUE"), json!("On"), json!("1")] {
            assert_eq!(flag(&value), Some(true), "{value}");
        }
        for value in [json!(false), json!(0), json!("f"), json!("no"), json!("OFF"), json!("0")] {
            assert_eq!(flag(&value), Some(false), "{value}");
        }
        for value in [json!("tRUE"), json!("1.0"), json!(2), json!(null), json!(""), json!([])] {
            assert_eq!(flag(&value), None, "{value}");
        }
    }

    #[test]
    fn counts_are_whole_numbers_from_one_on() {
        for (value, expected) in [
            (json!(1), Some(1)),
            (json!("10"), Some(10)),
            (json!(" +7 "), Some(7)),
            (json!(1.9), Some(1)),
            (json!(0.9), Some(0)),
            (json!(-3), Some(0)),
            (json!("1.5"), None),
            (json!(true), None),
            (json!("x"), None),
            (json!(1e30), None),
            (json!(4_294_967_295_u32), Some(4_294_967_295)),
        ] {
            assert_eq!(count(&value), expected, "{value}");
        }
    }

    #[test]
    fn uuids_are_given_back_canonical() {
        const ID: &str = "46a2731e-a1d0-4f98-ba92-4f78c756bb12";
        for text in [
            ID,
            &ID.to_uppercase(),
            &ID.replace('-', ""),
            &format!("{{{ID}}}"),
            &format!("urn:uuid:{ID}"),
            "46a2731ea1d04f98ba924f78c756bb1-2",
        ] {
            assert_eq!(uuid(text).as_deref(), Some(ID), "{text}");
        }
        for text in ["", "x", &ID[1..], &format!("{ID}0"), "46a2731e_a1d04f98ba924f78c756bb12"] {
            assert_eq!(uuid(text), None, "{text}");
        }
    }

    #[test]
    fn errors_stand_below_their_fields() {
        let errors = check(
            &json!({
                "name": "", "link": {"path": 7, "type": "S3", "x": 1}, "recipe_type": null, "id": "x",
                "template_dictionary": [{"key": "k", "value": "v"}, {"key": 1}, 7],
            }),
            NEW_RECIPE,
        )
        .unwrap_err();
        let shape = |value: &Value| value.as_array().is_some_and(|list| list.iter().all(Value::is_string));
        assert_eq!(
            errors.keys().collect::<Vec<_>>(),
            ["id", "link", "linux_distribution", "name", "recipe_type", "template_dictionary"]
        );
        assert!(["id", "linux_distribution", "name", "recipe_type"].iter().all(|name| shape(&errors[*name])));
        assert!(["path", "type", "x"].iter().all(|name| shape(&errors["link"][name])), "{errors:?}");
        let pairs = &errors["template_dictionary"];
        assert_eq!(pairs.as_object().unwrap().keys().collect::<Vec<_>>(), ["1", "2"]);
        assert!(shape(&pairs["1"]["key"]) && shape(&pairs["1"]["value"]) && shape(&pairs["2"]["_schema"]));
        assert!(shape(&check(&json!([1]), NEW_NODE).unwrap_err()["_schema"]));
    }

    #[test]
    fn metadata_is_a_mapping_or_one_pair() {
        let checked = |metadata: Value| check(&json!({"name": "n", "metadata": metadata}), NEW_IMAGE);
        let metadata = |value| checked(value).unwrap()["metadata"].clone();
        assert_eq!(metadata(json!({"a": "b", "c": ""})), json!({"a": "b", "c": ""}));
        assert_eq!(metadata(json!({"key": "a", "value": "b", "x": 1})), json!({"a": "b"}));
        assert_eq!(metadata(json!({"key": "a"})), json!({"a": ""}));
        assert!(checked(json!(null)).is_err());
        let errors = checked(json!({"a": 7})).unwrap_err();
        assert!(errors["metadata"]["a"]["value"].is_array(), "{errors:?}");
    }
}
