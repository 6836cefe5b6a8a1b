//! The supervisor's side of a jail: tried, made, watched, ended.

pub mod binds;
pub mod emulation;
pub mod mount_points;
pub mod open;
pub mod resolv_conf;
pub mod trial;
