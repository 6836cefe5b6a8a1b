//! From a recipe to an image root: the real program, real archives, real servers on the loopback address, the real rpm.

mod build;
mod ca_rpm;
mod create;
mod fetch;
mod hostile;
mod killed;
mod recipes;
mod repositories;
