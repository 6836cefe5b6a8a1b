//! The command line: its definition, and what each command starts.

pub mod arguments;
mod options;
mod recipe;
pub mod run;
