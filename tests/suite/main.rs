//! The behaviour of the programs, on a real sshd and real image roots.
//!
//! Every test opens a build environment of its own, as a pod would, and talks to it with the clients that people use.

// A test is read from top to bottom, once; what helps those who call a function is not for it.
#![allow(clippy::pedantic)]

mod agent;
mod ansible;
mod as_on_a_node;
mod audit;
mod binds;
mod bounds;
mod clients;
mod close;
mod commands;
mod distributions;
mod entering;
mod escape;
mod escape_clients;
mod faults;
mod files;
mod files_held_outside;
mod foreign;
mod forgotten;
mod full_volume;
mod grace;
mod hostile;
mod image_untouched;
mod lifecycle;
mod limits;
mod local;
mod look;
mod manual;
mod names;
mod network_files;
mod people;
mod racing;
mod readers;
mod readme;
mod refusals;
mod refused_logins;
mod sessions;
mod signal_files;
mod special_files;
mod status_and_log;
mod streams;
mod tasks;
mod terminal;
mod tiers;
mod transfers;
