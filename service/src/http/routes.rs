//! URLs of the API and their methods.

use crate::records::Kind;

/// Version of the API: a deletion is permanent in v2 and soft in v3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// At the root and at `/v2`.
    V2,
    /// At `/v3`.
    V3,
}

/// Resource that a URL names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target<'a> {
    /// All records of a table.
    All(Kind, Version),
    /// One record.
    One(Kind, Version, &'a str),
    /// Output of the programs of a job.
    Log(&'a str),
    /// All deleted records of a table.
    AllDeleted(Kind),
    /// One deleted record.
    OneDeleted(Kind, &'a str),
    /// Status of all remote build nodes.
    NodeStatuses,
    /// Status of one remote build node.
    NodeStatus(&'a str),
    /// Health of the service.
    Health,
    /// Version of the API.
    Release,
    /// Metrics for Prometheus.
    Metrics,
    /// The OpenAPI document.
    OpenApi,
    /// An object of a store that is a directory.
    Download,
}

/// Reads the path of a URL.
pub fn target(path: &str) -> Option<Target<'_>> {
    // Accept one extra slash at the beginning, and none at the end.
    let path = path.strip_prefix("//").or_else(|| path.strip_prefix('/'))?;
    let segments: Vec<_> = path.split('/').collect();
    match *segments {
        ["healthz", "ready" | "live"] => return Some(Target::Health),
        ["version"] => return Some(Target::Release),
        ["metrics"] => return Some(Target::Metrics),
        ["openapi.yaml"] => return Some(Target::OpenApi),
        ["downloads", _, _, ..] => return Some(Target::Download),
        _ => {}
    }
    let (version, segments) = match segments.split_first()? {
        (&"v2", rest) => (Version::V2, rest),
        (&"v3", rest) => (Version::V3, rest),
        _ => (Version::V2, &*segments),
    };
    if segments.iter().any(|segment| segment.is_empty()) {
        return None;
    }
    let is_v3 = version == Version::V3;
    Some(match *segments {
        ["public-keys"] => Target::All(Kind::PublicKeys, version),
        ["public-keys", id] => Target::One(Kind::PublicKeys, version, id),
        ["recipes"] => Target::All(Kind::Recipes, version),
        ["recipes", id] => Target::One(Kind::Recipes, version, id),
        ["images"] => Target::All(Kind::Images, version),
        ["images", id] => Target::One(Kind::Images, version, id),
        ["jobs"] => Target::All(Kind::Jobs, version),
        ["jobs", id] => Target::One(Kind::Jobs, version, id),
        ["jobs", id, "logs"] if is_v3 => Target::Log(id),
        ["remote-build-nodes"] if is_v3 => Target::All(Kind::Nodes, version),
        ["remote-build-nodes", "status"] if is_v3 => Target::NodeStatuses,
        ["remote-build-nodes", "status", xname] if is_v3 => Target::NodeStatus(xname),
        ["remote-build-nodes", xname] if is_v3 => Target::One(Kind::Nodes, version, xname),
        ["deleted", table] if is_v3 => Target::AllDeleted(deleted(table)?),
        ["deleted", table, id] if is_v3 => Target::OneDeleted(deleted(table)?, id),
        _ => return None,
    })
}

fn deleted(table: &str) -> Option<Kind> {
    match table {
        "public-keys" => Some(Kind::DeletedPublicKeys),
        "recipes" => Some(Kind::DeletedRecipes),
        "images" => Some(Kind::DeletedImages),
        _ => None,
    }
}

impl Target<'_> {
    /// Methods, as the header `Allow` lists them.
    pub fn allowed(&self) -> &'static str {
        match self {
            Self::All(..) => "GET, HEAD, OPTIONS, POST, DELETE",
            Self::One(Kind::PublicKeys | Kind::Nodes, ..) => "GET, HEAD, OPTIONS, DELETE",
            Self::One(..) | Self::AllDeleted(_) | Self::OneDeleted(..) => "GET, HEAD, OPTIONS, PATCH, DELETE",
            _ => "GET, HEAD, OPTIONS",
        }
    }

    /// Name in metrics: the same for all records of a table.
    pub fn name(&self) -> &'static str {
        match self {
            Self::All(kind, _) | Self::One(kind, ..) | Self::AllDeleted(kind) | Self::OneDeleted(kind, _) => {
                kind.name()
            }
            Self::Log(_) => "logs",
            Self::NodeStatuses | Self::NodeStatus(_) => "remote_build_nodes_status",
            Self::Health => "healthz",
            Self::Release => "version",
            Self::Metrics => "metrics",
            Self::OpenApi => "openapi",
            Self::Download => "downloads",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_those_of_upstream() {
        use Version::{V2, V3};
        for (path, expected) in [
            ("/images", Some(Target::All(Kind::Images, V2))),
            ("/v2/images/x", Some(Target::One(Kind::Images, V2, "x"))),
            ("//v3/images", Some(Target::All(Kind::Images, V3))),
            ("/v3/jobs/x", Some(Target::One(Kind::Jobs, V3, "x"))),
            ("/v3/jobs/x/logs", Some(Target::Log("x"))),
            ("/v2/jobs/x/logs", None),
            ("/v3/remote-build-nodes/status", Some(Target::NodeStatuses)),
            ("/v3/remote-build-nodes/status/x", Some(Target::NodeStatus("x"))),
            ("/v3/remote-build-nodes/x", Some(Target::One(Kind::Nodes, V3, "x"))),
            ("/v3/deleted/recipes", Some(Target::AllDeleted(Kind::DeletedRecipes))),
            ("/v3/deleted/recipes/x", Some(Target::OneDeleted(Kind::DeletedRecipes, "x"))),
            ("/healthz/live", Some(Target::Health)),
            ("/images/", None),
            ("/v3/images/x/", None),
            ("///images", None),
            ("/v3//images", None),
            ("/deleted/images", None),
            ("/v2/deleted/images", None),
            ("/remote-build-nodes", None),
            ("/v2/remote-build-nodes", None),
            ("/v3/deleted/jobs", None),
            ("/v1/images", None),
            ("/v3", None),
            ("/", None),
            ("/v3/healthz/live", None),
        ] {
            assert_eq!(target(path), expected, "{path}");
        }
    }
}
