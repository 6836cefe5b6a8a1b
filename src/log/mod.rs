//! The log: its format, and what is masked in it.

pub mod format;
pub mod output;
pub mod redaction;
