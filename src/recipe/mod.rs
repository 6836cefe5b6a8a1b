//! Builds an image root from a recipe (a description for kiwi-ng). Each step replaces one container of a create job,
//! and is a command of its own.

pub mod ca_rpm;
pub(crate) mod description;
pub mod fetch;
pub mod kiwi;
pub mod outcome;
pub mod repositories;
pub mod sandbox;
pub mod template;

/// Directory, in a pod, of the recipe.
pub const DEFAULT_RECIPE: &str = "/mnt/image/recipe";
