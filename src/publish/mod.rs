//! Steps before `ready` and after `exiting`: fetching and opening an image; uploading and registering the packed one.

pub(crate) mod anew;
pub(crate) mod authentication;
pub(crate) mod basis;
pub(crate) mod download;
pub(crate) mod identity;
pub(crate) mod journal;
pub(crate) mod manifest;
pub(crate) mod multipart;
pub(crate) mod packed;
pub mod prepare;
pub mod publication;
pub mod settings;
pub mod source;
