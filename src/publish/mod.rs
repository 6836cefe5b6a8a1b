//! What stands before `ready` and after `exiting`: an image is fetched and opened, packed, uploaded and registered.

pub mod boot;
pub mod manifest;
pub mod progress;
pub mod settings;
