//! The life of a build environment: decide, wait, prepare, serve, close, done.

pub(crate) mod grace_period;
pub(crate) mod groundwork;
pub(crate) mod hang_up;
pub(crate) mod open;
pub mod own_sshd;
pub(crate) mod processes;
pub(crate) mod recovery;
pub(crate) mod restarts;
pub(crate) mod script;
pub(crate) mod session_list;
pub mod settings;
pub(crate) mod shell_wanted;
pub(crate) mod sshd_setup;
pub mod stage;
pub(crate) mod state_machine;
pub mod supervisor;
pub(crate) mod watchdog;
