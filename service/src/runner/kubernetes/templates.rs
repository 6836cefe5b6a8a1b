//! The site's template files, from which the objects of a job are created. A file is parsed as YAML before variables
//! are replaced in its strings, so that no value can add a field, whatever characters it contains.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ims_sshd::error::{Attempt, Error, Result};
use serde_json::{Map, Value};

use super::objects::Kind;

/// Values of a template's variables, by name.
pub(super) type Variables = BTreeMap<&'static str, Filled>;

/// Value of a variable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Filled {
    /// A text, which stays a text even if it looks like a number.
    Text(String),
    /// A text. If the text is empty, a field that consists of this variable alone becomes null, and such a list item is
    /// omitted.
    Optional(String),
    /// A boolean where a field consists of this variable alone; elsewhere the text `true` or `false`.
    Truth(bool),
}

/// Fields of a container in which Kubernetes itself replaces `$(NAME)` by the value of another variable.
const EXPANDED: [&str; 3] = ["args", "command", "env"];

/// Maximum size of a template file in bytes.
const LARGEST: u64 = 1 << 20;

/// Maximum length of the reason why a template is refused, in characters.
const LONGEST_REASON: usize = 1000;

/// Returns the directory of the templates for jobs of this kind, relative to the directory of all templates.
pub(super) fn directory(recipe_type: Option<&str>) -> PathBuf {
    recipe_type.map_or_else(|| "customize".into(), |kind| Path::new("create").join(kind))
}

/// Reads the template of an object from `directory` and fills it in. `is_create` selects the file for create jobs.
pub(super) fn render(directory: &Path, kind: Kind, is_create: bool, variables: &Variables) -> Result<Value> {
    let object = match kind {
        Kind::ConfigMap => "configmap",
        Kind::Service => "service",
        Kind::Claim => "pvc",
        Kind::Job => "job",
        Kind::Rule | Kind::Secret => unreachable!("made without a template"),
    };
    let action = if is_create { "create" } else { "customize" };
    let path = directory.join(format!("image_{object}_{action}.yaml.template"));
    let attempted = || format!("use the template {}", path.display());
    let length = std::fs::metadata(&path).attempt(attempted)?.len();
    if length > LARGEST {
        return Err(Error::new(attempted()).because(format!("it has {length} bytes: expected at most {LARGEST}")));
    }
    let text = std::fs::read_to_string(&path).attempt(attempted)?;
    // A refusal quotes the template, in which a line may be as long as the file.
    let shortened = |why: String| why.chars().take(LONGEST_REASON).collect::<String>();
    parse(&text, kind, variables).map_err(|why| Error::new(attempted()).because(shortened(why)))
}

/// Parses the template `text` of an object and fills it in.
fn parse(text: &str, kind: Kind, variables: &Variables) -> std::result::Result<Value, String> {
    // Put the parser's message on one line: it quotes lines of the file, with a mark below the error.
    let value: Value =
        serde_saphyr::from_str(text).map_err(|e| format!("it is no YAML: {}", one_line(&e.to_string())))?;
    let filled = fill(value, variables, false)?;
    let (version, name) = kind.api();
    if filled["apiVersion"] != version || filled["kind"] != name {
        return Err(format!(
            "its kind is {} and its apiVersion is {}: expected {name} and {version}",
            filled["kind"].as_str().unwrap_or("missing"),
            filled["apiVersion"].as_str().unwrap_or("missing")
        ));
    }
    if filled["metadata"]["name"].as_str().is_none_or(str::is_empty) {
        return Err("metadata.name is missing".into());
    }
    Ok(filled)
}

fn one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(", ")
}

/// Replaces the variables in all strings of `value`. `is_expanded` is true inside fields in which Kubernetes replaces
/// `$(NAME)`.
fn fill(value: Value, variables: &Variables, is_expanded: bool) -> std::result::Result<Value, String> {
    Ok(match value {
        Value::String(text) => fill_text(&text, variables, is_expanded)?,
        Value::Array(items) => {
            let filled = items.into_iter().map(|item| {
                let is_text = item.is_string();
                fill(item, variables, is_expanded).map(|filled| (!is_text || !filled.is_null()).then_some(filled))
            });
            filled.filter_map(std::result::Result::transpose).collect::<std::result::Result<_, _>>()?
        }
        Value::Object(fields) => {
            let mut filled = Map::new();
            for (name, value) in fields {
                let value = fill(value, variables, is_expanded || EXPANDED.contains(&name.as_str()))?;
                filled.insert(replaced(&name, variables, false)?, value);
            }
            filled.into()
        }
        other => other,
    })
}

fn fill_text(text: &str, variables: &Variables, is_expanded: bool) -> std::result::Result<Value, String> {
    let alone = text.strip_prefix('$').map(|name| {
        let inner = name.strip_prefix('{').and_then(|name| name.strip_suffix('}'));
        inner.unwrap_or(name)
    });
    Ok(match alone.and_then(|name| variables.get(name)) {
        Some(Filled::Truth(truth)) => Value::Bool(*truth),
        Some(Filled::Optional(text)) if text.is_empty() => Value::Null,
        _ => replaced(text, variables, is_expanded)?.into(),
    })
}

/// Replaces `$name` and `${name}` by their values and `$$` by `$`, as upstream does.
fn replaced(text: &str, variables: &Variables, is_expanded: bool) -> std::result::Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        if let Some(after) = after.strip_prefix('$') {
            out.push('$');
            rest = after;
            continue;
        }
        let (name, after) = match after.strip_prefix('{') {
            Some(inner) => inner.split_once('}').unwrap_or_default(),
            None => after.split_at(after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len())),
        };
        let is_name = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        if !is_name {
            return Err(format!("a '$' stands before no variable in '{}'; write '$$' for '$'", one_line(text)));
        }
        let value = variables.get(name).ok_or_else(|| {
            let known = variables.keys().copied().collect::<Vec<_>>().join(" ");
            format!("the variable '{name}' is unknown; these are known: {known}")
        })?;
        let value = match value {
            Filled::Text(text) | Filled::Optional(text) => text.as_str(),
            Filled::Truth(true) => "true",
            Filled::Truth(false) => "false",
        };
        // Escape `$`: otherwise Kubernetes would replace a user's text such as '$(S3_SECRET_KEY)' by the secret.
        out.push_str(&if is_expanded { value.replace('$', "$$") } else { value.to_owned() });
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn variables() -> Variables {
        let text = |text: &str| Filled::Text(text.into());
        Variables::from([
            ("id", text("1")),
            ("image_root_archive_name", text("a: b\n    name: evil # $id $(S3_SECRET_KEY)")),
            ("kernel_filename", text("123")),
            ("public_key", text("ssh-rsa A\nssh-rsa B\n")),
            ("runtime_class", Filled::Optional(String::new())),
            ("security_capabilities", Filled::Optional("SYS_ADMIN".into())),
            ("service_account", Filled::Optional(String::new())),
            ("security_privilege", Filled::Truth(false)),
        ])
    }

    fn filled(data: &str) -> std::result::Result<Value, String> {
        let text = format!("---\nkind: ConfigMap\napiVersion: v1\nmetadata:\n  name: x-$id\ndata:\n{data}");
        parse(&text, Kind::ConfigMap, &variables()).map(|mut value| value["data"].take())
    }

    #[test]
    fn value_stays_a_text_in_its_place() {
        let hostile = "a: b\n    name: evil # $id $(S3_SECRET_KEY)";
        assert_eq!(filled("  a: $image_root_archive_name\n").unwrap(), json!({ "a": hostile }));
        assert_eq!(
            filled("  a: \"$kernel_filename\"\n  b: $kernel_filename\n").unwrap(),
            json!({"a": "123", "b": "123"})
        );
        assert_eq!(filled("  a:\n    $public_key\n").unwrap(), json!({ "a": "ssh-rsa A\nssh-rsa B\n" }));
        assert_eq!(filled("  a-${id}b: $$id $id-$id\n  n: 1\n").unwrap(), json!({"a-1b": "$id 1-1", "n": 1}));
    }

    #[test]
    fn kubernetes_expands_no_text_of_a_user() {
        let text = "  env:\n  - name: A\n    value: $image_root_archive_name$$(B)\n";
        let expected = "a: b\n    name: evil # $$id $$(S3_SECRET_KEY)$(B)";
        assert_eq!(filled(text).unwrap()["env"][0]["value"], expected);
    }

    #[test]
    fn lone_variable_has_the_type_of_its_field() {
        let text = "  a: $security_privilege\n  b: x$security_privilege\n  c: $runtime_class\n  d: [$security_capabilities]\n  \
                    e: [$service_account]\n  f: '${service_account}'\n  g: \"\"\n";
        let expected = json!({"a": false, "b": "xfalse", "c": null, "d": ["SYS_ADMIN"], "e": [], "f": null, "g": ""});
        assert_eq!(filled(text).unwrap(), expected);
    }

    #[test]
    fn wrong_template_is_refused_with_the_reason() {
        for (text, reason) in [
            ("  a: $ids", "the variable 'ids' is unknown; these are known: id "),
            ("  a: $(id)", "a '$' stands before no variable in '$(id)'"),
            ("  a: ${id", "a '$' stands before no variable"),
            ("  a: 1$", "a '$' stands before no variable"),
            ("  a: [", "it is no YAML"),
        ] {
            let refused = filled(text).unwrap_err();
            assert!(refused.contains(reason), "{text}: {refused}");
        }
        let refused = parse("apiVersion: v1\nkind: Secret", Kind::ConfigMap, &variables()).unwrap_err();
        assert_eq!(refused, "its kind is Secret and its apiVersion is v1: expected ConfigMap and v1");
        assert!(parse("apiVersion: v1\nkind: ConfigMap", Kind::ConfigMap, &variables()).is_err());
    }

    /// Fills in a file with this content; a refusal has to name the file.
    fn from_file(content: &[u8]) -> Result<Value> {
        let directory = tempfile::tempdir().unwrap();
        let name = "image_configmap_customize.yaml.template";
        std::fs::write(directory.path().join(name), content).unwrap();
        let rendered = render(directory.path(), Kind::ConfigMap, false, &variables());
        if let Err(error) = &rendered {
            assert!(error.to_string().contains(name) && error.to_string().len() < 2000, "{error}");
        }
        rendered
    }

    #[test]
    fn hostile_template_is_refused_with_its_name() {
        let head = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\ndata:\n";
        let bomb: Vec<_> =
            (1..40).map(|n| format!("  a{n}: &a{n} [{}]\n", vec![format!("*a{}", n - 1); 10].join(", "))).collect();
        let deep: Vec<_> = (0..5000).map(|n| " ".repeat(n + 1) + "a:\n").collect();
        let hostile = [
            format!("{head}  a: {}", "[".repeat(500_000)),
            format!("{head}  a: {}1{}", "[".repeat(100_000), "]".repeat(100_000)),
            format!("{head}  a: {}", "{a: ".repeat(100_000)),
            format!("{head}{}", deep.concat()),
            format!("{head}  {}", "- ".repeat(300_000)),
            format!("{head}  {}", "? ".repeat(300_000)),
            format!("{head}  a0: &a0 lol\n{}", bomb.concat()),
            format!("{head}  a: &a [*a]"),
            format!("{head}  a: *a"),
            format!("{head}  a: 1\n  a: 2"),
            format!("{head}  a: {}", "$".repeat(999_999)),
            format!("{head}  ? [a, b]\n  : 1"),
            format!("{head}---\na: 1"),
            "\0".repeat(1000),
            String::new(),
            "null".into(),
            "[]".into(),
            format!("# {}", "x".repeat(2 << 20)),
        ];
        for text in hostile {
            assert!(from_file(text.as_bytes()).is_err(), "{}", text.chars().take(120).collect::<String>());
        }
        assert!(from_file(b"a: \xff").is_err());
    }

    proptest! {
        #[test]
        fn any_template_is_filled_in_or_refused(
            valid: bool,
            text in "([a-z0-9]{1,3}|: |- |\n {0,4}|[\\[\\]{},?|>&*!%@`'\"#~$\t\r]|<<: |&a |\\*a|!!binary |---\n|\\$id|\\$\\{|\u{0}|\u{feff}|é){0,40}",
            any: Vec<u8>,
        ) {
            let head = if valid { "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\ndata:\n " } else { "" };
            let _ = from_file(&[head.as_bytes(), text.as_bytes()].concat());
            let _ = from_file(&[head.as_bytes(), &any].concat());
        }
    }
}
