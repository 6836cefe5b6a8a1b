//! JSON in the format of upstream's answers: clients compare some of them byte by byte.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, Serializer};

/// Formats a 201 answer: fields in the order of the struct, a blank after each comma and colon, a newline at the end.
pub fn in_order(value: &impl Serialize) -> String {
    written(value, true) + "\n"
}

/// Formats a 200 answer: keys sorted, no blanks, a newline at the end.
pub fn sorted(value: &impl Serialize) -> String {
    compact(value) + "\n"
}

/// Formats like [`sorted`], but without the newline, as the database stores records.
pub fn compact(value: &impl Serialize) -> String {
    // Objects of a `Value` are sorted by key.
    let value: Value = serde_json::to_value(value).expect("records have text keys");
    written(&value, false)
}

/// Formats like [`in_order`], but without the newline.
pub fn spaced(value: &impl Serialize) -> String {
    written(value, true)
}

/// Formats a list of records that [`compact`] has formatted, with a newline at the end.
pub fn list<'a>(records: impl IntoIterator<Item = &'a str>) -> String {
    let mut text = String::from("[");
    for (index, record) in records.into_iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        text.push_str(record);
    }
    text + "]\n"
}

fn written(value: &impl Serialize, blanks: bool) -> String {
    let mut bytes = Vec::with_capacity(512);
    let mut serializer = Serializer::with_formatter(&mut bytes, Ascii { blanks });
    value.serialize(&mut serializer).expect("records have text keys");
    String::from_utf8(bytes).expect("only ASCII is written")
}

/// Formatter that escapes everything outside ASCII, as Python's `json.dumps` does.
struct Ascii {
    blanks: bool,
}

impl Formatter for Ascii {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        match (first, self.blanks) {
            (true, _) => Ok(()),
            (false, true) => writer.write_all(b", "),
            (false, false) => writer.write_all(b","),
        }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.begin_array_value(writer, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(if self.blanks { b": " } else { b":" })
    }

    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let mut rest = fragment;
        while let Some(at) = rest.find(|c: char| !c.is_ascii() || c == '\u{7f}') {
            writer.write_all(&rest.as_bytes()[..at])?;
            let c = rest[at..].chars().next().expect("found above");
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
            rest = &rest[at + c.len_utf8()..];
        }
        writer.write_all(rest.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[derive(Serialize)]
    struct Two {
        z: &'static str,
        a: Option<Vec<u8>>,
    }

    #[test]
    fn answers_are_written_as_by_python() {
        let two = Two { z: "ä\u{1f600}\u{7f}\n\"\\", a: Some(vec![1, 2]) };
        let text = r#""\u00e4\ud83d\ude00\u007f\n\"\\""#;
        assert_eq!(in_order(&two), format!("{{\"z\": {text}, \"a\": [1, 2]}}\n"));
        assert_eq!(sorted(&two), format!("{{\"a\":[1,2],\"z\":{text}}}\n"));
        assert_eq!(in_order(&json!({})), "{}\n");
    }
}
