//! Runs of `customize` and `enter` on one machine, without a pod.

pub(crate) mod apply;
pub(crate) mod apply_checks;
pub(crate) mod apply_progress;
pub(crate) mod claim;
pub mod command_line;
pub mod create;
pub mod customize;
pub mod directory;
pub(crate) mod drop;
pub mod enter;
pub mod left_over;
pub mod mounts;
pub mod names;
pub(crate) mod register;
pub mod remote;
pub mod run;
pub(crate) mod run_directory;
pub mod script;
pub(crate) mod source;
pub(crate) mod space;
pub mod status;
pub mod steps;
mod unattended;
pub mod work_directory;
