//! A job: what it is about, and the variables that tell.

pub mod variables;

/// What the job is about (`IMS_ACTION`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// An image is changed.
    Customize,
    /// An image was built from a recipe; a shell is wanted only to look at a failed build.
    Create,
}

/// The image root's parent where nobody says another one.
pub const DEFAULT_PARENT: &str = "/mnt/image";
