//! System calls as types: the lowest layer, and the only one with `unsafe`.

pub(crate) mod architecture;
pub(crate) mod attributes;
pub(crate) mod file_kind;
pub mod inherited;
pub(crate) mod landlock;
pub(crate) mod loops;
pub(crate) mod memory;
pub mod mounts;
pub(crate) mod named;
pub mod poll;
pub mod process;
pub(crate) mod seccomp;
pub mod seqpacket;
pub(crate) mod signals;
pub mod start;
pub(crate) mod terminal;
pub mod tree;
pub mod umask;
pub(crate) mod walk;
