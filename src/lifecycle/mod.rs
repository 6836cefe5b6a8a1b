//! The life of a build environment: decide, wait, prepare, serve, close, done.

pub mod environment;
pub mod foreign;
pub mod image_root;
pub mod log;
pub mod machine;
pub mod open_jail;
pub mod presence;
pub mod processes;
pub mod restarts;
pub mod script;
pub mod secrets;
pub mod sessions;
pub mod settings;
pub mod signal_files;
pub mod stage;
pub mod state;
pub mod supervisor;
pub mod tier;
pub mod watchfulness;
