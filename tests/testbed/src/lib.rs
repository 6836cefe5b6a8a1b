//! Build environments for tests and benchmarks: the real programs, a real sshd, real image roots, clients and servers,
//! in directories and mounts of their own.

// Only tests use this crate: most names say enough, an unused result of a builder shows in a failing test, and a
// `Default` would start servers.
#![allow(missing_docs, clippy::new_without_default, clippy::return_self_not_must_use)]

mod cache;
mod clients;
mod digest;
mod environment;
pub mod file_server;
mod guards;
pub mod ims_server;
pub mod job;
pub mod kubernetes;
pub mod name_server;
pub mod node;
mod programs;
pub mod rendered;
pub mod repository_server;
pub mod rpms;
pub mod s3_server;
mod terminal;
pub mod tls_server;
mod volume;
mod waiting;

pub use cache::*;
pub use clients::*;
pub use digest::*;
pub use environment::*;
pub use guards::*;
pub use programs::*;
pub use terminal::*;
pub use volume::*;
pub use waiting::*;
