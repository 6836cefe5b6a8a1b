//! What a site puts the programs into service with. None of it needs a container image, an image root or the user root.

mod makefile;
mod manifests;
mod rendered;
