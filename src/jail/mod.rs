//! The jail: the namespaces around the image root. Made once a job, entered by every session.

pub mod arguments;
pub mod binds;
pub mod binfmt;
pub mod build;
pub mod capabilities;
pub mod enter;
pub mod hostname;
pub mod init;
pub mod link;
pub mod mount_table;
pub mod plan;
pub mod programs;
pub mod record;
pub mod refused_calls;
pub mod resolv_conf;
pub mod run;
pub mod seal;
pub mod streams;
pub mod tier;
