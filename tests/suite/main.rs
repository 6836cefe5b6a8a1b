//! The behaviour of the programs, on a real sshd and real image roots.
//!
//! Every test opens a build environment of its own, as a pod would, and talks to it with the clients that people use.

mod close;
mod faults;
mod files;
mod image_untouched;
mod lifecycle;
mod local;
mod readme;
mod refusals;
mod sessions;
mod support;
mod terminal;
