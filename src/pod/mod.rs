//! Programs in a pod beside the build environment.

pub mod pod_files;
pub mod sidecar;
