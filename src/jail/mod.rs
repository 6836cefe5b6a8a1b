//! The jail: namespaces around the image root, created once for each job and entered by every session.

pub mod arguments;
pub mod binds;
pub(crate) mod binfmt;
pub(crate) mod build;
pub mod capabilities;
pub mod enter;
pub(crate) mod hostname;
pub mod init;
pub mod link;
pub(crate) mod looks_like_chroot;
pub mod mount_table;
pub mod plan;
pub(crate) mod programs;
pub mod record;
pub mod refused_calls;
pub(crate) mod resolv_conf;
pub mod seal;
pub(crate) mod slash_run;
pub(crate) mod streams;
pub mod tier;
