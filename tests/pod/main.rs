//! The container image and pods of the manifests, on a real builder and runtime. 'make test' has built the image.
//!
//! Every test runs a container or a pod of its own, which is gone with it.

mod capabilities;
mod containers;
mod image;
mod podman;
mod pods;
mod walk;
mod way_in;
