//! System calls as types: the bottom floor, and the only one with `unsafe`.

pub mod architecture;
pub mod attributes;
pub mod file_kind;
pub mod landlock;
pub mod loops;
pub mod mounts;
pub mod named;
pub mod poll;
pub mod process;
pub mod seccomp;
pub mod seqpacket;
pub mod signals;
pub mod start;
pub mod terminal;
pub mod tree;
