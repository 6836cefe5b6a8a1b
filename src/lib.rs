//! Opens an image root to people and to Ansible over SSH, jailed inside it, with an orderly end.
//!
//! The folders are floors, and a floor only calls those below it:
//!
//! - [`sys`]: system calls as types; the only `unsafe`.
//! - [`jail`]: what the jail is (tables), how it is made, its init, how one enters it.
//! - [`session`]: what a client asked for, and the image's root whom it becomes.
//! - [`sshd`]: OpenSSH's options, its configuration, its process.
//! - [`lifecycle`]: the life of a build environment, from `ready` to `exiting`.
//! - [`publish`]: what stands before `ready` and after `exiting`: fetching, packing, uploading, registering.
//! - [`local`]: the same on one machine, without a pod.
//! - [`manual`]: man pages and completions, of the command line's description.
//!
//! The words (image root, build environment, jail, session, signal file) are those of README.md.

pub mod error;
pub mod jail;
pub mod lifecycle;
pub mod local;
pub mod manual;
pub mod panic;
pub mod printable;
pub mod publish;
pub mod session;
pub mod sshd;
pub mod sys;
pub mod verdict;
