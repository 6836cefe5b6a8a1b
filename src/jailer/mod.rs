//! The supervisor's side of a jail: `trial` tries the tiers; `open` makes the jail, watches it and ends it.

pub(crate) mod binds;
pub(crate) mod emulation;
pub mod mount_points;
pub(crate) mod open;
pub(crate) mod resolv_conf;
pub(crate) mod trial;
pub(crate) mod unsealed;
