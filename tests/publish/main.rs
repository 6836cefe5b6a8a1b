//! From a source image to a published one: the real program, real archives, a real S3 server (moto), and an IMS that takes nothing but what
//! its published schema knows. All of it over real HTTP, on the loopback address.

#[allow(dead_code)]
#[path = "../suite/support.rs"]
mod support;

mod answers;
mod archives;
mod confined;
mod customize;
mod directory;
mod enter;
mod file_server;
mod identity;
mod ims_server;
mod job;
mod name_server;
mod package;
mod prepare;
mod redirects;
mod s3_server;
mod sidecar;
mod sources;
mod store;
mod tls;
mod tls_server;
mod trust;
mod unattended;
mod upload;
