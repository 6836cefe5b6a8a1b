//! The life of a build environment: decide, wait, prepare, serve, close, done.

pub mod groundwork;
pub mod hang_up;
pub mod machine;
pub mod open;
pub mod presence;
pub mod processes;
pub mod recovery;
pub mod restarts;
pub mod script;
pub mod settings;
pub mod sshd_setup;
pub mod stage;
pub mod supervisor;
pub mod watchdog;
