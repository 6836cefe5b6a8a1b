//! The Image Management Service (IMS), as its clients see it.

pub(crate) mod client;
pub mod id;
pub(crate) mod place;
pub mod problem;
pub mod records;
