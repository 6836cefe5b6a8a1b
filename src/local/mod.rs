//! The same on one machine, without a pod.

pub mod apply;
pub mod claim;
pub mod command_line;
pub mod customize;
pub mod directory;
pub mod enter;
pub mod job;
pub mod left_over;
pub mod mounts;
pub mod names;
pub mod register;
pub mod run_directory;
pub mod script;
pub mod source;
pub mod status;
pub mod steps;
pub mod work_directory;
