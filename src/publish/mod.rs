//! What stands before `ready` and after `exiting`: an image is fetched and opened, packed, uploaded and registered.

pub mod begun;
pub mod boot;
pub mod changes;
pub mod checksum;
pub mod command;
pub mod cpio;
pub mod download;
pub mod id;
pub mod ims;
pub mod journal;
pub mod layers;
pub mod manifest;
pub mod package;
pub mod packages;
pub mod parts;
pub mod pod_files;
pub mod prepare;
pub mod progress;
pub mod seal;
pub mod settings;
pub mod sidecar;
pub mod source;
pub mod store;
pub mod unpack;
pub mod upload;
pub mod work;
