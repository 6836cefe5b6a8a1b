//! The service over HTTP: the real program, a real S3 server, a real PostgreSQL.

// json!(…) as an argument reads better without a reference.
#![allow(clippy::needless_pass_by_value)]

mod access;
mod commands;
mod creation;
mod crowd;
mod deployment;
mod endpoints;
mod hostile;
mod image;
mod images;
mod jobs;
mod kubernetes;
mod lasting;
mod machine;
mod moves;
mod nodes;
mod packages;
mod pods;
mod postgres;
#[allow(dead_code)]
#[path = "../../tests/recipe/recipes.rs"]
mod recipes;
mod replicas;
mod schema;
mod server;
mod slow_store;
mod statuses;
mod times;
mod untrusted;
mod wire;
