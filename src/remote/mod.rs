//! Remote build nodes: jobs whose image is changed on another host. A job lives as long as its one ssh connection.
//! [`relay`] is the near side: it runs in the pod, or where `customize --node` was called. [`node`] is the far side,
//! part of the same program.

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
