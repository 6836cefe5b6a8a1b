//! The behaviour of the programs, on a real sshd and real image roots.
//!
//! Every test opens a build environment of its own, as a pod would, and talks to it with the clients that people use.

// A test is read from top to bottom, once; what helps those who call a function is not for it.
#![allow(clippy::pedantic)]

mod ansible;
mod clients;
mod close;
mod commands;
mod escape;
mod escape_clients;
mod faults;
mod files;
mod hostile;
mod image_untouched;
mod lifecycle;
mod local;
mod racing;
mod readers;
mod readme;
mod refusals;
mod sessions;
mod support;
mod terminal;
mod tiers;
