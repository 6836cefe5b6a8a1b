//! Kind of a job: customize or create. Any other value of `IMS_ACTION` is refused, and the error names the known
//! values.

use crate::job::variables::{Case, Reader};

/// Kind of a job (`IMS_ACTION`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// An image is changed.
    Customize,
    /// An image was built from a recipe; a shell is wanted only to inspect a failed build.
    Create,
}

impl Action {
    /// Reads `IMS_ACTION`.
    pub(super) fn read(reader: &mut Reader) -> Option<Self> {
        reader.choice("IMS_ACTION", &[("customize", Self::Customize), ("create", Self::Create)], Case::Exact)
    }
}
