//! The Image Management Service, as its clients see it.

pub mod client;
pub mod id;
pub mod place;
