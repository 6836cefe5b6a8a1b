//! System calls as types: the bottom floor, and the only place of `unsafe`.

pub mod attributes;
pub mod calls;
pub mod landlock;
pub mod loops;
pub mod mounts;
pub mod named;
pub mod packet;
pub mod poll;
pub mod process;
pub mod signals;
pub mod start;
pub mod terminal;
pub mod tree;
