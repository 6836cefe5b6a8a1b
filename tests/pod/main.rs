//! The container image and pods of the manifests, on a real builder and runtime. 'make test' has built the image.
//!
//! Every test runs a container or a pod of its own, which is gone with it.

#[allow(dead_code)]
#[path = "../publish/file_server.rs"]
mod file_server;
#[allow(dead_code)]
#[path = "../publish/ims_server.rs"]
mod ims_server;
#[allow(dead_code)]
#[path = "../publish/job.rs"]
mod job;
#[allow(dead_code)]
#[path = "../deploy/rendered.rs"]
mod rendered;
#[allow(dead_code)]
#[path = "../publish/s3_server.rs"]
mod s3_server;
#[allow(dead_code)]
#[path = "../suite/support.rs"]
mod support;
#[path = "../publish/tls_server.rs"]
mod tls_server;

mod capabilities;
mod containers;
mod image;
mod podman;
mod pods;
mod walk;
mod way_in;
