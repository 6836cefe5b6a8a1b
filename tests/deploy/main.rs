//! Files by which a site puts the programs into service. No test here needs a container image, an image root or the
//! user root.

mod container_files;
mod crates;
mod documents;
mod makefile;
mod manifests;
mod opened;
mod reproducible;
