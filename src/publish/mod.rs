//! What stands before `ready` and after `exiting`: an image is fetched and opened, packed, uploaded and registered.

pub mod authentication;
pub mod download;
pub mod identity;
pub mod journal;
pub mod manifest;
pub mod multipart;
pub mod packed;
pub mod prepare;
pub mod publication;
pub mod settings;
pub mod source;
