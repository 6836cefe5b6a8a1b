//! Opens an image root to people and to Ansible over SSH, jailed inside it, and closes it cleanly.
//!
//! The directories are layers. A file imports only from layers below its own; `tests/architecture.rs` checks the order:
//!
//! - [`cli`]: the command line: its definition, and what each command starts.
//! - [`manual`]: man pages and completions, generated from the command line's definition.
//! - [`pod`]: the pod's programs other than the build environment.
//! - [`local`]: build environments on one machine, without a pod.
//! - [`recipe`]: building an image root from a recipe with kiwi-ng.
//! - [`remote`]: jobs whose image is changed on another host: both sides.
//! - [`publish`]: fetching and preparing an image; uploading and registering a job's result.
//! - [`environment`]: the life of a build environment, from `ready` to `exiting`.
//! - [`jailer`]: the supervisor's side of a jail.
//! - [`sshd`]: OpenSSH's server: options, configuration, process.
//! - [`session`]: a client's request, and how its session gets into the image root.
//! - [`image`]: recognizing, unpacking, inspecting and packing images.
//! - [`store`]: image stores; [`ims`]: the Image Management Service.
//! - [`volume`]: the image root's parent directory, which the containers of a pod share.
//! - [`squashfs`]: reading and writing of SquashFS 4.0.
//! - [`jail`]: the jail's tables, its setup, its init, and entering it.
//! - [`transfer`]: long-running work: subprocesses, HTTP, retries, progress.
//! - [`log`]: the log's format, and masking of secrets.
//! - [`sys`]: system calls as types; the only `unsafe`.
//!
//! README.md defines the terms (image root, build environment, jail, session, signal file).

pub mod cli;
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
pub mod recipe;
pub mod remote;
pub mod session;
pub mod squashfs;
pub mod sshd;
pub mod store;
pub mod sys;
pub mod transfer;
pub mod verdict;
pub mod volume;
