//! An image: recognized, unpacked, searched, packed.

pub mod boot;
pub mod cpio;
pub mod exclude;
pub mod installed_packages;
pub mod inventory;
pub mod kind;
pub mod layers;
pub mod packing;
pub mod unpack;
