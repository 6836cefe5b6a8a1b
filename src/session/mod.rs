//! A session: what a client asked for, and whom it becomes in the image.

pub mod account;
pub mod agent;
pub mod etc_environment;
pub mod front;
pub mod inside;
pub mod login;
pub mod report;
pub mod request;
pub mod terminfo;
pub mod variables;
