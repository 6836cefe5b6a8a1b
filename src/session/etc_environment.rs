//! Variables from the image's /etc/environment, which `pam_env` reads on the booted node.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use crate::sys::tree::Tree;

/// Maximum size of the file, in bytes; a larger one counts as missing.
const LIMIT: u64 = 64 << 10;

/// Variables that the file of `image_root` sets; empty if there is no file.
pub(crate) fn read(image_root: &Tree) -> Vec<(OsString, OsString)> {
    parse(&image_root.read("etc/environment", LIMIT).unwrap_or_default())
}

/// Parses the text as Linux-PAM does (`_parse_env_file` and `_assemble_line` in its modules/pam_env/pam_env.c): a `#`
/// begins a comment anywhere, a backslash at the end of a line joins the next one, `export ` is skipped, quotes are
/// removed, and nothing is expanded. A name alone unsets a variable of an earlier line.
pub(crate) fn parse(text: &[u8]) -> Vec<(OsString, OsString)> {
    let mut variables: Vec<(OsString, OsString)> = Vec::new();
    for line in joined_lines(text) {
        let blanks = line.iter().take_while(|b| BLANKS.contains(b)).count();
        let line = line[blanks..].strip_prefix(b"export ").unwrap_or(&line[blanks..]);
        let is_of_name = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_';
        let end = line.iter().position(|b| !is_of_name(b)).unwrap_or(line.len());
        let (name, rest) = line.split_at(end);
        if name.is_empty() || !matches!(rest, [] | [b'=', ..]) || rest.contains(&0) {
            continue;
        }
        variables.retain(|(known, _)| known.as_bytes() != name);
        if let [_, value @ ..] = rest {
            let value = unquoted(value);
            variables.push((OsStr::from_bytes(name).to_owned(), OsStr::from_bytes(&value).to_owned()));
        }
    }
    variables
}

/// Characters allowed before a name and after a trailing backslash.
const BLANKS: [u8; 2] = *b" \t";

/// Lines without comments, each joined with those that follow a trailing backslash.
fn joined_lines(text: &[u8]) -> Vec<Vec<u8>> {
    let mut lines = Vec::new();
    let mut begun: Option<Vec<u8>> = None;
    for piece in text.split(|&b| b == b'\n') {
        let commented = piece.iter().position(|&b| b == b'#');
        let piece = &piece[..commented.unwrap_or(piece.len())];
        let Some(last) = piece.iter().rposition(|b| !BLANKS.contains(b)) else { continue };
        let mut line = begun.take().unwrap_or_default();
        match &piece[..=last] {
            [joined @ .., b'\\'] if commented.is_none() => {
                line.extend_from_slice(joined);
                begun = Some(line);
            }
            _ => {
                line.extend_from_slice(piece);
                lines.push(line);
            }
        }
    }
    // A last line that ends with a backslash is dropped.
    lines
}

/// The value, without its quotes if it begins with a quote.
fn unquoted(value: &[u8]) -> Vec<u8> {
    match value {
        [b'"' | b'\'', rest @ ..] => {
            let last = rest.len().saturating_sub(1);
            rest.iter()
                .enumerate()
                .filter(|(at, b)| !matches!(b, b'"' | b'\'') || *at != last)
                .map(|(_, b)| *b)
                .collect()
        }
        _ => value.to_vec(),
    }
}
