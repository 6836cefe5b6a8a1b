//! Untrusted text (file and process names, output of programs and servers) made safe to show: one line, without
//! characters that control a terminal or hide text.

use std::fmt::{self, Write};

/// Writes unprintable characters of `text` (control characters, line separators, bidirectional overrides, invisible
/// characters) as Rust's escapes: newline as `\n`, ESC as `\u{1b}`. Backslashes stay single, so that escaping twice
/// changes nothing.
pub struct Printable<T>(pub T);

impl<T: AsRef<str>> fmt::Display for Printable<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().chars().try_for_each(|c| {
            if is_printable(c) { f.write_char(c) } else { c.escape_debug().try_for_each(|c| f.write_char(c)) }
        })
    }
}

/// Maximum number of entries of a list that a message shows.
const MOST_LISTED: usize = 20;

/// Joins a list for a message, truncated: an image may have any number of names.
pub(crate) fn listed(entries: &[impl AsRef<str>]) -> String {
    let shown: Vec<_> = entries.iter().take(MOST_LISTED).map(AsRef::as_ref).collect();
    match entries.len() - shown.len() {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// [`Printable`] for JSON text, preserving its meaning: unprintable characters occur only in strings, where an escape
/// means the same, and newlines only between values.
pub fn json(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut shown, c| {
        if c == '\n' || is_printable(c) {
            shown.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(shown, "\\u{unit:04x}");
            }
        }
        shown
    })
}

fn is_printable(c: char) -> bool {
    matches!(c, ' '..='~') || c.escape_debug().len() == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_long_list_is_truncated() {
        let names: Vec<_> = (0..3000).map(|n| n.to_string()).collect();
        assert_eq!(listed(&names[..2]), "0, 1");
        assert_eq!(listed(&names[..20]).matches(", ").count(), 19);
        assert!(listed(&names).ends_with(", 18, 19 and 2980 more"));
    }

    #[test]
    fn unprintable_characters_are_escaped_and_others_kept() {
        for (text, shown) in [
            ("cannot open 'a\\b' \"größe\" 漢字 🦀", "cannot open 'a\\b' \"größe\" 漢字 🦀"),
            ("a\nb\r\tc\0", r"a\nb\r\tc\0"),
            ("\x1b]0;x\x07\x7f\u{9b}1m", r"\u{1b}]0;x\u{7}\u{7f}\u{9b}1m"),
            ("\u{2028}\u{2029}\u{85}\u{b}\u{c}", r"\u{2028}\u{2029}\u{85}\u{b}\u{c}"),
            ("\u{202e}gpj\u{2066}\u{200f}", r"\u{202e}gpj\u{2066}\u{200f}"),
            ("\u{200b}\u{feff}\u{ad}\u{a0}", r"\u{200b}\u{feff}\u{ad}\u{a0}"),
        ] {
            assert_eq!(Printable(text).to_string(), shown);
        }
    }

    proptest! {
        #[test]
        fn escaping_twice_changes_nothing(text: String) {
            let once = Printable(text).to_string();
            prop_assert_eq!(Printable(&once).to_string(), once.clone());
            prop_assert!(!once.chars().any(char::is_control));
        }

        #[test]
        fn escaped_json_means_the_same(text: String) {
            let value = serde_json::Value::String(text);
            let shown = json(&value.to_string());
            prop_assert!(!shown.chars().any(char::is_control), "{shown:?}");
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
        }
    }
}
