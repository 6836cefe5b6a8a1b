//! Sessions: a client's request and the account in the image that carries it out.

pub mod account;
pub(crate) mod agent;
pub(crate) mod etc_environment;
pub(crate) mod front;
pub mod inside;
pub mod login;
pub mod report;
pub mod request;
pub(crate) mod terminfo;
pub(crate) mod typed;
pub mod variables;
