//! The Image Management Service, as its clients see it.

pub(crate) mod client;
pub(crate) mod id;
pub(crate) mod place;
