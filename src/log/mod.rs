//! The log: its format, and masking of secrets.

pub mod format;
pub mod output;
pub mod redaction;
