//! The log: one line an event on standard error, for a pod's log.

use std::io::IsTerminal;

use tracing_subscriber::filter::LevelFilter;

use crate::error::{Error, Result};

/// How a line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object a line, for collectors.
    Json,
}

/// Starts the log at the level `LOG_LEVEL` names (default `info`).
pub fn start(format: Format) -> Result<()> {
    let level = std::env::var("LOG_LEVEL").unwrap_or_default();
    let filter = match level.to_ascii_lowercase().as_str() {
        "" | "info" => LevelFilter::INFO,
        "debug" => LevelFilter::DEBUG,
        "warning" | "warn" => LevelFilter::WARN,
        "error" | "critical" => LevelFilter::ERROR,
        _ => {
            return Err(Error::bad_input(format!("LOG_LEVEL is '{level}': expected DEBUG, INFO, WARNING or ERROR")));
        }
    };
    let log = tracing_subscriber::fmt()
        .with_max_level(filter)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        Format::Text => log.init(),
        Format::Json => log.json().flatten_event(true).init(),
    }
    Ok(())
}
