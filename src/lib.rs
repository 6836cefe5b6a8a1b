//! Opens an image root to people and to Ansible over SSH, jailed inside it, with an orderly end.
//!
//! The directories are floors, and a file imports from floors below its own only; `tests/architecture.rs` holds the order:
//!
//! - [`manual`]: man pages and completions, made of the command line's description.
//! - [`pod`]: what runs in a pod beside the build environment.
//! - [`local`]: the same on one machine, without a pod.
//! - [`publish`]: an image is fetched and opened; what a job has made is uploaded and registered.
//! - [`environment`]: the life of a build environment, from `ready` to `exiting`.
//! - [`jailer`]: the supervisor's side of a jail.
//! - [`sshd`]: OpenSSH's options, its configuration, its process.
//! - [`session`]: what a client asked for, and the image's root whom it becomes.
//! - [`image`]: an image is recognized, unpacked, searched and packed.
//! - [`store`]: a store of images; [`ims`]: the Image Management Service.
//! - [`volume`]: the image root's parent, which the containers of a pod share.
//! - [`jail`]: what the jail is (tables), how it is made, its init, how one enters it.
//! - [`transfer`]: means of long work: subprocesses, HTTP, retries, progress.
//! - [`log`]: the log's format, and what is masked in it.
//! - [`sys`]: system calls as types; the only `unsafe`.
//!
//! The words (image root, build environment, jail, session, signal file) are those of README.md.

pub mod environment;
pub mod error;
pub mod image;
pub mod ims;
pub mod jail;
pub mod jailer;
pub mod job;
pub mod local;
pub mod log;
pub mod manual;
pub mod panic;
pub mod pod;
pub mod printable;
pub mod publish;
pub mod session;
pub mod sshd;
pub mod store;
pub mod sys;
pub mod transfer;
pub mod verdict;
pub mod volume;
