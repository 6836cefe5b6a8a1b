//! The image management service: keeps the records of images, recipes and public keys, and starts the jobs that change
//! images. Its clients are those of Cray's IMS.
//!
//! The modules are floors, top to bottom; `tests/architecture.rs` of the workspace checks the order:
//!
//! - [`client`]: the commands that ask a running service, in the words of `cray ims`.
//! - [`serve`]: starts the service and stops it in order.
//! - [`listen`]: opens the places where requests arrive, and knows the token.
//! - [`http`]: the API: routes, wire format, problems, what each request does.
//! - [`runner`]: starts the steps of jobs, on Kubernetes or on this machine.
//! - [`database`]: records that outlive a kill and a power failure.
//! - [`store`]: objects that links of records point to.
//! - [`records`]: the records, and the rules for what a request may say about them.
//! - [`settings`]: variables and options.

pub mod client;
pub mod database;
pub mod http;
pub mod listen;
pub mod records;
pub mod runner;
pub mod serve;
pub mod settings;
pub mod store;
