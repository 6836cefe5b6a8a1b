//! Images: recognizing, unpacking, searching and packing them.

pub(crate) mod access_list;
pub(crate) mod authorities;
pub mod boot;
pub(crate) mod cpio;
pub mod exclude;
pub(crate) mod holes;
pub(crate) mod installed_packages;
pub(crate) mod inventory;
pub(crate) mod kind;
pub(crate) mod layers;
pub mod overlay_files;
pub mod packer;
pub mod packing;
pub(crate) mod state;
pub(crate) mod tar;
pub(crate) mod times;
pub(crate) mod unchanged;
pub(crate) mod unpack;
pub(crate) mod upper_layer;
