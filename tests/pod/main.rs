//! The container image and its manifests, on a real builder and a real runtime. 'make test' has built the image.
//!
//! Every test runs a container or a pod of its own, which is gone with it.

mod containers;
mod image;
mod manifests;
mod podman;
mod pods;
