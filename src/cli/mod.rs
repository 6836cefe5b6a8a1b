//! The command line: its definition, and what each command starts.

pub mod arguments;
pub mod run;
