//! Tables of records.

/// A table of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Public keys.
    PublicKeys,
    /// Recipes.
    Recipes,
    /// Images.
    Images,
    /// Jobs.
    Jobs,
    /// Remote build nodes.
    Nodes,
    /// Deleted public keys, which can be undeleted.
    DeletedPublicKeys,
    /// Deleted recipes, which can be undeleted.
    DeletedRecipes,
    /// Deleted images, which can be undeleted.
    DeletedImages,
    /// Jobs that are being started and have no record yet.
    Starting,
}

impl Kind {
    /// All tables that clients see.
    pub const ALL: [Self; 8] = [
        Self::PublicKeys,
        Self::Recipes,
        Self::Images,
        Self::Jobs,
        Self::Nodes,
        Self::DeletedPublicKeys,
        Self::DeletedRecipes,
        Self::DeletedImages,
    ];

    /// Name in the database and in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::PublicKeys => "public_keys",
            Self::Recipes => "recipes",
            Self::Images => "images",
            Self::Jobs => "jobs",
            Self::Nodes => "remote_build_nodes",
            Self::DeletedPublicKeys => "deleted_public_keys",
            Self::DeletedRecipes => "deleted_recipes",
            Self::DeletedImages => "deleted_images",
            Self::Starting => "starting",
        }
    }

    /// Name of a single record of the table, for messages.
    pub fn noun(self) -> &'static str {
        match self {
            Self::PublicKeys => "public key",
            Self::Recipes => "recipe",
            Self::Images => "image",
            Self::Jobs | Self::Starting => "job",
            Self::Nodes => "remote build node",
            Self::DeletedPublicKeys => "deleted public key",
            Self::DeletedRecipes => "deleted recipe",
            Self::DeletedImages => "deleted image",
        }
    }

    /// Name of the file in which upstream keeps this table; `None` if upstream has no such table.
    pub fn file(self) -> Option<&'static str> {
        Some(match self {
            Self::PublicKeys => "v2_public_keys.json",
            Self::Recipes => "v2.2_recipes.json",
            Self::Images => "v2.1_images.json",
            Self::Jobs => "v2.4_jobs.json",
            Self::Nodes => "v2.0_remote_build_nodes.json",
            Self::DeletedPublicKeys => "v3_deleted_public_keys.json",
            Self::DeletedRecipes => "v3.2_deleted_recipes.json",
            Self::DeletedImages => "v3.1_deleted_images.json",
            Self::Starting => return None,
        })
    }
}
