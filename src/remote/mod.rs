//! Remote build nodes: jobs whose image is changed on another host. A job lives as long as its one ssh connection.
//! [`relay`] is the side of the pod, or of the machine on which `customize --node` runs; [`node`] is the far side, in
//! the same program.

pub mod build;
pub(crate) mod channel;
pub(crate) mod connection;
mod container;
pub(crate) mod entrypoint;
pub(crate) mod far;
pub(crate) mod hello;
pub mod inside;
pub(crate) mod job_directory;
pub(crate) mod message;
pub mod node;
mod node_log;
pub(crate) mod node_root;
mod program;
pub(crate) mod provision;
pub(crate) mod relay;
mod shell;
mod site;
pub(crate) mod transfer;
