//! From a source image to a published one: the real program, real archives, a real S3 server (moto), and an IMS that
//! takes only what its published schema allows; all over real HTTP, on the loopback address.

mod answers;
mod archives;
mod confined;
mod customize;
mod directory;
mod ended;
mod enter;
mod fresh;
mod identity;
mod interrupted;
mod kept;
mod linked;
mod package;
mod packer;
mod prepare;
mod redirects;
mod replaced;
mod sidecar;
mod slips;
mod sources;
mod store;
mod tls;
mod trust;
mod umask;
mod unattended;
mod upload;
