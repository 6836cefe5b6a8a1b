//! Objects that belong to records: which objects of a manifest are moved and removed with it, and which objects no
//! cleanup removes.

use std::collections::BTreeSet;

use futures_util::future::join_all;

use super::Service;
use super::delete::LARGEST_MANIFEST;
use super::links::AT_ONCE;
use super::problem::Problem;
use crate::records::{Kind, Location, manifest};
use crate::store::Failure;

/// Tables of the records that have objects.
const KINDS: [Kind; 4] = [Kind::Images, Kind::DeletedImages, Kind::Recipes, Kind::DeletedRecipes];

impl Service {
    /// Returns those of `objects` that are the record's own, so that they are moved and removed with it. A manifest can
    /// name any object, so the others stay where they are. The record's own manifests, `homes`, are always its own. An
    /// object that is in a bucket without any of `homes`, or to which another record links, never is. Any other object
    /// is, unless it is in the directory of another image's manifest, or the record is live and a soft delete moved the
    /// object. Even then, an object in the directory of one of `homes` is the record's own.
    pub async fn own(
        &self,
        kind: Kind,
        id: &str,
        homes: &[Location],
        objects: Vec<Location>,
    ) -> Result<Vec<Location>, Problem> {
        let is_live = matches!(kind, Kind::Images | Kind::Recipes);
        let (mut linked, mut directories) = (BTreeSet::new(), BTreeSet::new());
        for kind in KINDS {
            for (_, path) in self.database.links(kind).await?.into_iter().filter(|(other, _)| other != id) {
                let Some(at) = Location::parse(&path) else { continue };
                if matches!(kind, Kind::Images | Kind::DeletedImages) {
                    directories.extend(directory(&at));
                }
                linked.insert(at);
            }
        }
        let is_foreign = |at: &Location| {
            (is_live && at.when_undeleted().is_some()) || ancestors(at).any(|above| directories.contains(&above))
        };
        let is_own = |at: &Location| {
            let is_at_home = || homes.iter().any(|home| is_beside(at, home));
            let is_near = homes.is_empty() || homes.iter().any(|home| home.bucket == at.bucket);
            homes.contains(at) || (is_near && !linked.contains(at) && (is_at_home() || !is_foreign(at)))
        };
        let (own, others): (Vec<_>, Vec<_>) = objects.into_iter().partition(is_own);
        for at in others {
            tracing::warn!("{at} is no object of the record {id}, which names it: it stays where it is");
        }
        Ok(own)
    }

    /// Returns those of `objects` that a live or deleted record names, by its link or in its manifest. If a manifest is
    /// missing, too large or malformed, everything in its directory counts as named. Fails if the store refuses to give
    /// a manifest or does not answer.
    pub async fn named(&self, objects: &BTreeSet<Location>) -> Result<BTreeSet<Location>, Problem> {
        let mut named = BTreeSet::new();
        for kind in KINDS {
            let links = self.database.links(kind).await?;
            let links: Vec<_> = links.iter().filter_map(|(_, path)| Location::parse(path)).collect();
            named.extend(links.iter().filter(|at| objects.contains(at)).cloned());
            if !matches!(kind, Kind::Images | Kind::DeletedImages) {
                continue;
            }
            for group in links.chunks(AT_ONCE) {
                let texts = join_all(group.iter().map(|at| self.store.get(at, LARGEST_MANIFEST))).await;
                for (at, text) in group.iter().zip(texts) {
                    let artifacts = match text {
                        Ok(text) => manifest::artifacts(&text),
                        Err(Failure::Missing | Failure::TooLarge) => None,
                        Err(failure) => return Err(self.told(super::links::problem(at, &failure))),
                    };
                    match artifacts {
                        Some(artifacts) => {
                            let locations = artifacts.into_iter().map(|artifact| artifact.location);
                            named.extend(locations.filter(|at| objects.contains(at)));
                        }
                        None => named.extend(objects.iter().filter(|object| is_beside(object, at)).cloned()),
                    }
                }
            }
        }
        Ok(named)
    }
}

/// Returns whether an object is in the directory of `home`, or below it. The whole bucket is no such directory.
fn is_beside(at: &Location, home: &Location) -> bool {
    directory(home).is_some_and(|directory| ancestors(at).any(|above| above == directory))
}

/// Returns the directory of an object; `None` if its key has none.
fn directory(at: &Location) -> Option<Location> {
    ancestors(at).next()
}

/// Returns the directories in which an object is, the innermost first.
fn ancestors(at: &Location) -> impl Iterator<Item = Location> {
    let slashes = at.key.char_indices().rev().filter(|(_, letter)| *letter == '/');
    slashes.map(|(end, _)| Location { bucket: at.bucket.clone(), key: at.key[..end].to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_in_the_directories_above_them() {
        let at = |key: &str| Location { bucket: "b".into(), key: key.into() };
        assert!(is_beside(&at("k/rootfs"), &at("k/manifest.json")));
        assert!(is_beside(&at("k/a/rootfs"), &at("k/manifest.json")));
        assert!(!is_beside(&at("k2/rootfs"), &at("k/manifest.json")));
        assert!(!is_beside(&at("k/rootfs"), &at("k/a/manifest.json")));
        assert!(!is_beside(&at("k/rootfs"), &at("manifest.json")));
    }
}
