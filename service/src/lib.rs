//! The image management service. It keeps the records of images, recipes and public keys, and starts the jobs that
//! change images. Its clients are those of Cray's IMS.
//!
//! The modules are layers, listed from top to bottom; `tests/architecture.rs` of the workspace checks the order:
//!
//! - [`client`]: the commands that ask a running service, with the syntax of `cray ims`.
//! - [`serve`]: starts the service and stops it cleanly.
//! - [`connections`]: accepts connections, and closes those that keep others out.
//! - [`listen`]: opens the socket and the address where requests arrive, and reads or creates the token.
//! - [`data`]: closes the data directory to other users and services.
//! - [`http`]: the API: routes, wire format, errors, and what each request does.
//! - [`runner`]: starts the steps of jobs, on Kubernetes or on this machine.
//! - [`database`]: the records, stored so that they survive a kill and a power failure.
//! - [`store`]: the objects to which links of records point.
//! - [`records`]: the types of the records, and the rules for the fields of requests.
//! - [`settings`]: variables and options.
//! - [`signals`]: the signals that ask a program to end.

pub mod client;
pub mod connections;
pub mod data;
pub mod database;
pub mod http;
pub mod listen;
pub mod records;
pub mod runner;
pub mod serve;
pub mod settings;
pub mod signals;
pub mod store;
