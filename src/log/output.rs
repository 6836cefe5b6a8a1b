//! Output of commands on standard output.

use std::io::Write;

use crate::printable;

/// Prints `text`. Ignores errors: a closed pipe must not end an environment.
pub(crate) fn say(text: &str) {
    let mut out = std::io::stdout();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Prints `text` on standard error, where standard output is for JSON alone.
pub(crate) fn say_aside(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Prints `value` as one line of JSON.
pub(crate) fn say_json(value: &serde_json::Value) {
    say(&format!("{}\n", printable::json(&value.to_string())));
}
