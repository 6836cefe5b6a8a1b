//! An image: recognized, unpacked, searched, packed.

pub mod boot;
pub mod cpio;
pub mod identity;
pub mod installed_packages;
pub mod inventory;
pub mod layers;
pub mod packing;
pub mod unpack;
