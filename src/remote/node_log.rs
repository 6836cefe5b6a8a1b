//! Logs the standard error of a command on a node: this program's log there, and messages of ssh. Each line becomes the
//! text of an event in the log on this side, since a node may write anything.

use std::io::{BufRead, BufReader, Read};

use crate::printable::Printable;

/// Maximum length of a logged line, in bytes.
const LONGEST: u64 = 1000;

/// Maximum number of lines that are logged of one command.
const MOST: u64 = 10_000;

/// Logs the lines that `host` writes to `stderr`, until its end. After the maximum number of lines, continues to read
/// without logging, so that the command does not block.
pub(super) fn log_all(host: &str, stderr: impl Read) {
    let mut stderr = BufReader::new(stderr);
    let mut count = 0_u64;
    while let Some(line) = next_line(&mut stderr) {
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        count += 1;
        if count <= MOST {
            log(host, line);
        }
        if count == MOST {
            tracing::warn!("{host} has written {MOST} lines to the log; further ones are left out");
        }
    }
    if count > MOST {
        tracing::warn!("{} lines of {host} were left out of the log", count - MOST);
    }
}

/// Returns the next line, truncated to [`LONGEST`] bytes.
fn next_line(input: &mut impl BufRead) -> Option<String> {
    let mut line = Vec::new();
    input.by_ref().take(LONGEST).read_until(b'\n', &mut line).ok().filter(|length| *length > 0)?;
    let is_cut = line.last() != Some(&b'\n') && input.skip_until(b'\n').is_ok_and(|rest| rest > 1);
    let line = String::from_utf8_lossy(&line);
    Some(if is_cut { format!("{line}…") } else { line.into_owned() })
}

/// Logs a line. A line of this program's log on the node keeps its level.
fn log(host: &str, line: &str) {
    let (level, said) = level_of(line);
    let said = Printable(said);
    match level {
        "ERROR" => tracing::error!("{host} says: {said}"),
        "WARN" => tracing::warn!("{host} says: {said}"),
        "DEBUG" => tracing::debug!("{host} says: {said}"),
        _ => tracing::info!("{host} says: {said}"),
    }
}

/// Splits a line in the format of [the log](crate::log::format) into its level and text, which follow the time.
fn level_of(line: &str) -> (&str, &str) {
    let after_time = line.split_once(' ').filter(|(time, _)| time.starts_with("20") && time.ends_with('Z'));
    let parts = after_time.and_then(|(_, rest)| rest.trim_start().split_once(' '));
    parts.filter(|(level, _)| ["ERROR", "WARN", "INFO", "DEBUG"].contains(level)).unwrap_or(("", line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_and_none_runs_into_the_next() {
        let long = "x".repeat(5000);
        let whole = "y".repeat(999);
        let text = format!("{long}\nshort\n\n{whole}\n{}\n{long}", "z".repeat(1000));
        let mut input = BufReader::new(text.as_bytes());
        let lines: Vec<_> = std::iter::from_fn(|| next_line(&mut input)).collect();
        let cut = format!("{}…", "x".repeat(1000));
        assert_eq!(lines, [cut.clone(), "short\n".into(), "\n".into(), format!("{whole}\n"), "z".repeat(1000), cut]);
    }

    #[test]
    fn line_of_the_log_keeps_its_level_and_another_has_none() {
        let line = "2026-11-26T16:08:05.000001Z  WARN the disk is full";
        assert_eq!(level_of(line), ("WARN", "the disk is full"));
        for line in ["WARN x", "2026-11-26T16:08:05Z", "2026-11-26T16:08:05Z  ALERT x", "{\"level\":\"ERROR\"}", ""] {
            assert_eq!(level_of(line), ("", line), "{line}");
        }
    }
}
