//! The Image Management Service (IMS), as its clients see it.

pub(crate) mod client;
pub mod id;
pub(crate) mod place;
pub(crate) mod problem;
pub mod records;
