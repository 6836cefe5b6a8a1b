//! The image root's parent, which the containers of a pod share: its signal files, and what lies in it.

pub mod authentication;
pub mod image_root;
pub mod signal_files;
pub mod state_directory;
