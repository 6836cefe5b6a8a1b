//! The container image and the pods of the manifests, on a real builder and runtime. 'make test' builds the image.
//!
//! Every test runs a container or a pod of its own, and removes it.

mod capabilities;
mod containers;
mod image;
mod podman;
mod pods;
mod recipes;
mod walk;
mod way_in;
