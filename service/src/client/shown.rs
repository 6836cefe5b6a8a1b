//! Answers of the service as text: TOML as `cray` prints it by default, JSON, or a table for people.

use std::fmt::Write;

use clap::ValueEnum;
use ims_sshd::printable::{self, Printable};
use serde_json::ser::{PrettyFormatter, Serializer};

use super::value::{Table, Value};
use crate::http::openapi;

/// Format of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// The default of cray
    Toml,
    /// Indented by two blanks
    Json,
    /// Names in alphabetical order
    Yaml,
    /// A line for each record
    Table,
}

/// `answer` as text, which ends with a newline unless there is nothing to print.
pub(super) fn text(answer: &Value, format: Format) -> String {
    let text = match (answer, format) {
        (Value::Null, _) => return String::new(),
        (_, Format::Json) => json(answer),
        (_, Format::Yaml) => yaml(answer),
        (Value::Table(record), Format::Table) => members(record),
        (_, Format::Table) => lines(answer.rows()),
        (Value::Table(record), Format::Toml) => toml(record),
        (_, Format::Toml) => toml(&vec![("results".into(), answer.clone())]),
    };
    // A table without records has no column names either, so print nothing for it.
    if text.trim_end().is_empty() { String::new() } else { format!("{}\n", text.trim_end()) }
}

fn json(value: &Value) -> String {
    use serde::Serialize;
    let mut text = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut text, PrettyFormatter::with_indent(b"  "));
    // This cannot fail: JSON can express every value, and a vector takes any length.
    let _ = value.serialize(&mut serializer);
    printable::json(&String::from_utf8_lossy(&text))
}

/// YAML, whose texts are those of JSON.
fn yaml(value: &Value) -> String {
    // This cannot fail: JSON can express every value.
    let value = serde_json::to_value(value).unwrap_or_default();
    printable::json(&openapi::yaml(&value))
}

/// Parts of a text for a terminal. Characters that control a terminal are escaped; a part may end within a character.
#[derive(Default)]
pub(super) struct Parts(Vec<u8>);

impl Parts {
    /// Returns the next part, with what the last one has left.
    pub(super) fn shown(&mut self, part: &[u8]) -> Vec<u8> {
        self.0.extend_from_slice(part);
        let end = match std::str::from_utf8(&self.0) {
            Err(error) => {
                let last = self.0.len().saturating_sub(3).max(error.valid_up_to());
                let is_cut = |at: &usize| {
                    std::str::from_utf8(&self.0[*at..]).is_err_and(|e| e.valid_up_to() == 0 && e.error_len().is_none())
                };
                (last..self.0.len()).find(is_cut).unwrap_or(self.0.len())
            }
            Ok(_) => self.0.len(),
        };
        let rest = self.0.split_off(end);
        let text = String::from_utf8_lossy(&self.0).into_owned();
        self.0 = rest;
        let lines = text.split('\n').map(|line| {
            let fields: Vec<_> = line.split('\t').map(|field| Printable(field).to_string()).collect();
            fields.join("\t")
        });
        lines.collect::<Vec<_>>().join("\n").into_bytes()
    }
}

/// TOML in the layout of Python's `toml` 0.10: fields first, then lists of tables, then tables, level by level.
fn toml(record: &Table) -> String {
    let mut text = String::new();
    let (own, mut tables) = level(record, "");
    text += &own;
    while !tables.is_empty() {
        let mut below = Vec::new();
        for (path, table) in tables {
            let (own, further) = level(table, &path);
            if !own.is_empty() || further.is_empty() {
                if !text.is_empty() && !text.ends_with("\n\n") {
                    text.push('\n');
                }
                let _ = write!(text, "[{path}]\n{own}");
            }
            below.extend(further);
        }
        tables = below;
    }
    text
}

/// Fields and lists of `table`, which is at `path`, and the tables in it with their paths.
fn level<'a>(table: &'a Table, path: &str) -> (String, Vec<(String, &'a Table)>) {
    let (mut fields, mut lists, mut below) = (String::new(), String::new(), Vec::new());
    for (name, value) in table {
        let is_bare = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        let name = if !name.is_empty() && name.chars().all(is_bare) { name.clone() } else { quoted(name) };
        let place = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        match value {
            // TOML has no null, so leave such a field out.
            Value::Null => {}
            Value::Table(table) => below.push((place, table)),
            Value::List(rows) if rows.iter().any(|row| matches!(row, Value::Table(_))) => lists += &list(rows, &place),
            value => {
                let _ = writeln!(fields, "{name} = {}", scalar(value));
            }
        }
    }
    (fields + &lists, below)
}

/// A list of tables.
fn list(rows: &[Value], path: &str) -> String {
    let mut text = String::new();
    for row in rows {
        let Value::Table(table) = row else { continue };
        let _ = writeln!(text, "[[{path}]]");
        let (own, mut tables) = level(table, path);
        let mut rest = "\n".to_owned();
        // If the table has no fields of its own, print an empty line before its first list.
        if own.starts_with('[') { &mut rest } else { &mut text }.push_str(&own);
        while !tables.is_empty() {
            let mut below = Vec::new();
            for (path, table) in tables {
                let (own, further) = level(table, &path);
                if !own.is_empty() {
                    let _ = write!(rest, "[{path}]\n{own}");
                }
                below.extend(further);
            }
            tables = below;
        }
        text += &rest;
    }
    text
}

fn scalar(value: &Value) -> String {
    match value {
        Value::Text(text) => quoted(text),
        Value::List(list) if list.is_empty() => "[]".into(),
        Value::List(list) => {
            let elements: Vec<_> = list.iter().map(|element| format!(" {},", scalar(element))).collect();
            format!("[{}]", elements.concat())
        }
        value => serde_json::to_string(value).unwrap_or_default(),
    }
}

/// A string of TOML. Escapes what would control a terminal, too.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted += "\\n",
            '\t' => quoted += "\\t",
            '\r' => quoted += "\\r",
            c if c == '\'' || c.escape_debug().len() == 1 => quoted.push(c),
            c if u32::from(c) > 0xffff => {
                let _ = write!(quoted, "\\U{:08x}", u32::from(c));
            }
            c => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(c));
            }
        }
    }
    quoted + "\""
}

/// Fields that are columns of a table, if the records have them.
const COLUMNS: [&str; 15] = [
    "id",
    "xname",
    "name",
    "image_root_archive_name",
    "job_type",
    "status",
    "recipe_type",
    "arch",
    "created",
    "deleted",
    "ableToRunJobs",
    "nodeArch",
    "numCurrentJobs",
    "podmanStatus",
    "sshStatus",
];

/// A line for each record, below the names of its columns.
fn lines(records: &[Value]) -> String {
    let is_used = |column: &&&str| records.iter().any(|record| record.get(column).is_some());
    let columns: Vec<_> = COLUMNS.iter().filter(is_used).collect();
    let cell = |record: &Value, column: &str| record.get(column).map_or_else(String::new, plain);
    let head = columns.iter().map(|column| column.to_uppercase()).collect();
    let rows = records.iter().map(|record| columns.iter().map(|column| cell(record, column)).collect());
    aligned(&std::iter::once(head).chain(rows).collect::<Vec<_>>())
}

/// A line for each field of a record.
fn members(record: &Table) -> String {
    fn gather(record: &Table, path: &str, rows: &mut Vec<Vec<String>>) {
        for (name, value) in record {
            let place = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            match value {
                Value::Table(table) => gather(table, &place, rows),
                Value::List(list) if list.iter().any(|element| matches!(element, Value::Table(_))) => {
                    for (at, element) in list.iter().enumerate() {
                        if let Value::Table(table) = element {
                            gather(table, &format!("{place}.{at}"), rows);
                        }
                    }
                }
                value => rows.push(vec![Printable(place).to_string(), plain(value)]),
            }
        }
    }
    let mut rows = Vec::new();
    gather(record, "", &mut rows);
    aligned(&rows)
}

fn plain(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::Text(text) => Printable(text).to_string(),
        value => scalar(value),
    }
}

fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        text.extend([line.trim_end(), "\n"]);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn toml_of(json: &str) -> String {
        text(&serde_json::from_str(json).unwrap(), Format::Toml)
    }

    #[test]
    fn yaml_has_one_member_a_line() {
        let list = r#"[{"name":"yes\u001b","a":{"b":[1,null]},"c":{}}]"#;
        let shown = text(&serde_json::from_str(list).unwrap(), Format::Yaml);
        assert_eq!(shown, "-\n  a:\n    b:\n      - 1\n      - null\n  c: {}\n  name: \"yes\\u001b\"\n");
        assert_eq!(text(&serde_json::from_str("[]").unwrap(), Format::Yaml), "[]\n");
    }

    /// Layouts that `toml.dumps` of Python's toml 0.10.2 wrote, less blank lines at the end.
    #[test]
    fn toml_is_laid_out_as_cray_does() {
        let job = r#"{"status":"creating","enable_debug":false,"ssh_containers":[{"status":"pending","jail":false,
            "name":"customize","connection_info":{"customer_access":{"host":"h","port":22},
            "cluster.local":{"host":"x","port":22}}}],"kubernetes_secret":null,"build_env_size":60,"empty":{},
            "emptylist":[],"list":["a","b"],"nums":[1,2]}"#;
        let shown = "status = \"creating\"\nenable_debug = false\nbuild_env_size = 60\nemptylist = []\n\
            list = [ \"a\", \"b\",]\nnums = [ 1, 2,]\n[[ssh_containers]]\nstatus = \"pending\"\njail = false\n\
            name = \"customize\"\n\n[ssh_containers.connection_info.customer_access]\nhost = \"h\"\nport = 22\n\
            [ssh_containers.connection_info.\"cluster.local\"]\nhost = \"x\"\nport = 22\n\n[empty]\n";
        assert_eq!(toml_of(job), shown);

        let list = r#"[{"id":"1","link":{"path":"p","etag":""},"metadata":{}},{"id":"2","link":null,
            "metadata":{"a b":"c","k":"v"},"template_dictionary":[{"key":"a","value":"b"}]}]"#;
        let shown = "[[results]]\nid = \"1\"\n\n[results.link]\npath = \"p\"\netag = \"\"\n[[results]]\nid = \"2\"\n\
            [[results.template_dictionary]]\nkey = \"a\"\nvalue = \"b\"\n\n\n[results.metadata]\n\"a b\" = \"c\"\n\
            k = \"v\"\n";
        assert_eq!(toml_of(list), shown);

        let image = r#"{"id":"1","link":{"path":"p","etag":""},"metadata":{},"name":"x",
            "template_dictionary":[{"key":"a","value":"b"},{"key":"c","value":"d"}]}"#;
        let shown = "id = \"1\"\nname = \"x\"\n[[template_dictionary]]\nkey = \"a\"\nvalue = \"b\"\n\n\
            [[template_dictionary]]\nkey = \"c\"\nvalue = \"d\"\n\n[link]\npath = \"p\"\netag = \"\"\n\n[metadata]\n";
        assert_eq!(toml_of(image), shown);

        assert_eq!(toml_of("[]"), "results = []\n");
        assert_eq!(toml_of(r#"{"link":{"a":{"b":1}},"x":"y"}"#), "x = \"y\"\n\n[link.a]\nb = 1\n");
        assert_eq!(toml_of(r#"[{"a":[{"b":1}]}]"#), "[[results]]\n\n[[results.a]]\nb = 1\n");
    }

    #[test]
    fn strings_are_escaped() {
        let key = r#"{"public_key":"ssh-ed25519 A\n","s":"it's \"ä\" \\ \t","t":"\u001b[2J\u202e"}"#;
        let shown = "public_key = \"ssh-ed25519 A\\n\"\ns = \"it's \\\"ä\\\" \\\\ \\t\"\nt = \"\\u001b[2J\\u202e\"\n";
        assert_eq!(toml_of(key), shown);
    }

    #[test]
    fn a_table_has_a_line_for_each_record() {
        let list = r#"[{"id":"1","name":"a long name","created":"2026"},{"id":"22","name":"b\u001b","created":null}]"#;
        let shown = "ID  NAME         CREATED\n1   a long name  2026\n22  b\\u{1b}\n";
        assert_eq!(text(&serde_json::from_str(list).unwrap(), Format::Table), shown);
        let record = r#"{"id":"1","link":{"path":"p"},"ssh_containers":[{"jail":true}]}"#;
        let shown = "id                     1\nlink.path              p\nssh_containers.0.jail  true\n";
        assert_eq!(text(&serde_json::from_str(record).unwrap(), Format::Table), shown);
    }

    #[test]
    fn parts_of_a_text_are_escaped_wherever_they_are_cut() {
        let text = "one\ttwo\r\né\u{1f980}\u{1b}[2J\u{202e}漢\n".as_bytes();
        let text = [text, b"\xff\xf0\x9f", text].concat();
        let whole = Parts::default().shown(&text);
        for length in 1..text.len() {
            let mut parts = Parts::default();
            let shown: Vec<_> = text.chunks(length).flat_map(|part| parts.shown(part)).collect();
            assert_eq!(String::from_utf8(shown), String::from_utf8(whole.clone()), "{length}");
        }
        let shown = String::from_utf8(whole).unwrap();
        assert!(shown.starts_with("one\ttwo\\r\né🦀\\u{1b}[2J\\u{202e}漢\n\u{fffd}\u{fffd}one"), "{shown}");
    }

    #[test]
    fn nothing_is_printed_of_an_answer_without_content() {
        for format in [Format::Toml, Format::Json, Format::Table] {
            assert_eq!(text(&Value::Null, format), "");
        }
        assert_eq!(text(&Value::List(Vec::new()), Format::Json), "[]\n");
    }
}
