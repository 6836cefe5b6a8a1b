//! The log: its format, and masking of secrets.

pub mod format;
pub(crate) mod output;
pub mod redaction;
