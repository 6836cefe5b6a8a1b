//! The log: one line per event on standard error.

use std::fmt;
use std::io::IsTerminal;

use tracing::field::Field;
use tracing::{Event, Subscriber};
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::{Writer, debug_fn};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use crate::error::{Error, Result};
use crate::log::redaction;
use crate::printable::{self, Printable};

/// Format of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object per line, for collectors.
    Json,
}

/// Starts the log in `format`, by default that of `LOG_FORMAT` or else `text`, at level `LOG_LEVEL`, by default `info`.
/// An unknown level is an error; a log in JSON is started nevertheless, so that it can take this error.
pub fn start(format: Option<Format>) -> Result<()> {
    let named = std::env::var("LOG_FORMAT").unwrap_or_default();
    let format = match (format, named.to_ascii_lowercase().as_str()) {
        (Some(format), _) => format,
        (None, "" | "text") => Format::Text,
        (None, "json") => Format::Json,
        _ => return Err(Error::bad_input(format!("LOG_FORMAT is '{named}': expected text or json"))),
    };
    let level = std::env::var("LOG_LEVEL").unwrap_or_default();
    let filter = match level.to_ascii_lowercase().as_str() {
        "" | "info" => Ok(LevelFilter::INFO),
        "debug" => Ok(LevelFilter::DEBUG),
        "warning" | "warn" => Ok(LevelFilter::WARN),
        "error" | "critical" => Ok(LevelFilter::ERROR),
        _ => Err(Error::bad_input(format!("LOG_LEVEL is '{level}': expected DEBUG, INFO, WARNING or ERROR"))),
    };
    // If the level is refused, start the log only for JSON: a collector expects the error in JSON, too.
    if filter.is_ok() || format == Format::Json {
        let level = *filter.as_ref().unwrap_or(&LevelFilter::INFO);
        let subscriber = subscriber(format, level, std::io::stderr().is_terminal(), std::io::stderr);
        tracing::subscriber::set_global_default(subscriber).map_err(|e| Error::new("start the log").because(e))?;
    }
    filter.map(drop)
}

/// A log on `writer`, with colours if `ansi`.
fn subscriber<W>(format: Format, filter: LevelFilter, ansi: bool, writer: W) -> Box<dyn Subscriber + Send + Sync>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    // A closed standard error is no reason to exit, so ignore errors of the log: tracing would report them on standard
    // error, and panic.
    let log = tracing_subscriber::fmt().log_internal_errors(false);
    let log = log.with_max_level(filter).with_target(false).with_ansi(ansi).with_writer(writer);
    match format {
        Format::Text => Box::new(log.fmt_fields(debug_fn(write_field).delimited(" ")).finish()),
        Format::Json => Box::new(log.json().flatten_event(true).map_event_format(PrintableJson).finish()),
    }
}

/// Escapes messages and fields: quoted text can neither start another line nor control the terminal.
fn write_field(writer: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug) -> fmt::Result {
    let value = format!("{value:?}");
    let value = redaction::without_known(&value);
    match field.name() {
        "message" => write!(writer, "{}", Printable(value)),
        name => write!(writer, "{name}={}", Printable(value)),
    }
}

/// Formats events as JSON and also escapes what JSON permits unescaped: Unicode separators, bidirectional overrides.
struct PrintableJson<E>(E);

impl<S, N, E> FormatEvent<S, N> for PrintableJson<E>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    E: FormatEvent<S, N>,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut line = String::new();
        self.0.format_event(context, Writer::new(&mut line), event)?;
        writer.write_str(&printable::json(&redaction::without_known(&line)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Seek;
    use std::sync::Arc;

    /// Log output for `text` as the message, as an error, and as a field of each kind.
    fn logged(format: Format, ansi: bool, text: &str) -> String {
        let log = Arc::new(tempfile::tempfile().unwrap());
        let subscriber = subscriber(format, LevelFilter::INFO, ansi, Arc::clone(&log));
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!("{text}");
            tracing::warn!(field = text, path = %text, list = ?[text], "a message");
            tracing::error!("{}", Error::new(text).because(text).advise(text));
        });
        let mut log = &*log;
        log.rewind().unwrap();
        std::io::read_to_string(log).unwrap()
    }

    /// Splits like every kind of reader: a collector, a terminal, Python's splitlines().
    fn lines(log: &str) -> usize {
        let ends = ['\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}', '\u{2029}'];
        log.split_terminator(ends).count()
    }

    const HOSTILE: &str =
        "vmlinuz\n2026-01-01T00:00:00Z  INFO forged\r\u{2028}x\u{85}\x1b[2K\u{9b}\u{202e}\0\"}\n{\"level\":\"INFO\"}";

    #[test]
    fn text_with_newlines_or_control_characters_forges_no_log_line() {
        for format in [Format::Text, Format::Json] {
            let log = logged(format, false, HOSTILE);
            assert_eq!(lines(&log), 3, "{log}");
            assert!(!log.contains(['\x1b', '\u{9b}', '\u{202e}', '\0', '\r']), "{log:?}");
            assert!(log.contains("INFO forged") && log.contains("a message"), "it is still logged: {log}");
        }
        // On a terminal, only the log's own colour codes remain.
        let log = logged(Format::Text, true, HOSTILE);
        assert!(log.contains("\x1b[") && !log.contains("\x1b[2K"), "{log:?}");
        let plain = logged(Format::Text, false, "größe='a\\b' \"c\"");
        assert!(plain.contains("INFO größe='a\\b' \"c\"\n") && plain.contains("field=\"größe"), "{plain}");
    }

    #[test]
    fn json_log_preserves_the_text() {
        let log = logged(Format::Json, false, HOSTILE);
        let line: serde_json::Value = serde_json::from_str(log.lines().nth(1).unwrap()).unwrap();
        assert_eq!((line["field"].as_str(), line["message"].as_str()), (Some(HOSTILE), Some("a message")));
    }

    proptest! {
        #[test]
        fn every_event_is_exactly_one_line(text: String, classes in "[\\p{C}\\p{Z}a]{0,20}") {
            for text in [text, classes] {
                for (format, ansi) in [(Format::Text, false), (Format::Text, true), (Format::Json, false)] {
                    let log = logged(format, ansi, &text);
                    prop_assert_eq!(lines(&log), 3, "{:?}", log);
                    if format == Format::Json {
                        let parsed: Vec<serde_json::Value> =
                            log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
                        prop_assert_eq!(parsed[1]["path"].as_str(), Some(text.as_str()));
                    }
                }
            }
        }
    }
}
