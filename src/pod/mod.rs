//! Programs of a pod other than the build environment.

pub mod pod_files;
pub mod sidecar;
