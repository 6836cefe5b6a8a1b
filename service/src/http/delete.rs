//! Permanent deletions, soft deletions, and undeletes.

use std::collections::BTreeSet;

use axum::body::Body;
use axum::http::Response;
use chrono::Local;

use super::claims::Claim;
use super::moves::Copy;
use super::problem::Problem;
use super::routes::Version;
use super::{Service, no_content};
use crate::database::Change;
use crate::records::manifest::{self, Artifact, MANIFEST};
use crate::records::{Deleted, Image, Kind, Link, Location, PublicKey, Recipe, Record, now};
use crate::store::Failure;

/// Name of the manifest of a deleted image, whose key is `deleted/ID/deleted_manifest.json`.
const DELETED_MANIFEST: &str = "deleted_manifest.json";

/// Size in bytes from which a manifest is not read.
pub const LARGEST_MANIFEST: u64 = 64 << 20;

impl Service {
    /// DELETE of one record.
    pub async fn delete(&self, kind: Kind, version: Version, id: &str, query: &str) -> Result<Response<Body>, Problem> {
        self.delete_record(kind, version, id, cascades(query)).await?;
        Ok(no_content())
    }

    /// DELETE of all records of a table, one after another. Records that cannot be deleted stay, and the answer lists
    /// them.
    pub async fn delete_all(&self, kind: Kind, version: Version, query: &str) -> Result<Response<Body>, Problem> {
        only(query, &["cascade"])?;
        let cascade = cascades(query);
        let ids = self.ids(kind).await?;
        let mut failures = Vec::new();
        for id in ids {
            match self.delete_record(kind, version, &id, cascade).await {
                Ok(()) => {}
                // Another request has deleted the record in the meantime.
                Err(problem) if problem.status == axum::http::StatusCode::NOT_FOUND => {}
                Err(problem) => failures.push(format!("{} {id}: {problem}", kind.noun())),
            }
        }
        if failures.is_empty() { Ok(no_content()) } else { Err(Problem::steps("cannot delete all records", &failures)) }
    }

    async fn delete_record(&self, kind: Kind, version: Version, id: &str, cascade: bool) -> Result<(), Problem> {
        match (self.claim_record(kind, id).await?, kind) {
            (Some(claim), _) => self.holding(&claim, self.delete_claimed(&claim, kind, version, id, cascade)).await,
            (None, Kind::PublicKeys) if version == Version::V3 => self.move_record::<PublicKey>(id).await,
            (None, _) => self.remove_plain(kind, id).await,
        }
    }

    /// Deletes a record that this request has claimed.
    async fn delete_claimed(
        &self,
        claim: &Claim,
        kind: Kind,
        version: Version,
        id: &str,
        cascade: bool,
    ) -> Result<(), Problem> {
        match (kind, version) {
            (Kind::Recipes, Version::V3) => self.soft_delete_recipe(claim, id).await,
            (Kind::Images, Version::V3) => self.soft_delete_image(claim, id).await,
            (Kind::Recipes, Version::V2) => {
                let recipe = self.found::<Recipe>(id).await?;
                let object = recipe.link.as_ref().filter(|_| cascade).and_then(Link::location);
                self.remove_record::<Recipe>(claim, &recipe, &[], object.into_iter().collect()).await
            }
            (Kind::Images, Version::V2) => {
                let image = self.found::<Image>(id).await?;
                let (homes, objects) = match &image.link {
                    Some(link) if cascade => self.objects(link).await?,
                    _ => Default::default(),
                };
                self.remove_record::<Image>(claim, &image, &homes, objects).await
            }
            (Kind::DeletedRecipes, _) => {
                let deleted = self.found::<Deleted<Recipe>>(id).await?;
                let objects = match deleted.record.link.as_ref() {
                    Some(link) if !self.is_in_use(Kind::Recipes, &link.path).await? => link.location(),
                    _ => None,
                };
                self.remove_record(claim, &deleted, &[], objects.into_iter().collect()).await
            }
            (Kind::DeletedImages, _) => {
                let deleted = self.found::<Deleted<Image>>(id).await?;
                let (homes, objects) = match deleted.record.link.as_ref() {
                    Some(link) if !self.is_in_use(Kind::Images, &link.path).await? => {
                        match self.objects(link).await {
                            Ok(objects) => objects,
                            // The manifest does not say where the objects are, so remove the record and leave the
                            // objects in the store.
                            Err(problem) if !problem.is_outage => Default::default(),
                            Err(problem) => return Err(problem),
                        }
                    }
                    _ => Default::default(),
                };
                self.remove_record(claim, &deleted, &homes, objects).await
            }
            (kind, _) => self.remove_plain(kind, id).await,
        }
    }

    /// Returns the manifests of an image and the objects that they name: the artifacts, then the manifest. If the
    /// manifest is too large to be read, returns none, so that the objects stay in the store.
    async fn objects(&self, link: &Link) -> Result<(Vec<Location>, Vec<Location>), Problem> {
        let at = super::links::location(link).map_err(|problem| Problem::failed(problem.detail))?;
        let text = match self.store.get(&at, self.settings.max_manifest_size).await {
            Ok(text) => text,
            Err(Failure::TooLarge) => return Ok(Default::default()),
            Err(failure) => {
                let why =
                    format!("cannot read the manifest {at}: {failure}; delete with cascade=false to leave objects");
                return Err(self.told(Problem::failed(why).outage(failure != Failure::Missing)));
            }
        };
        let artifacts = manifest::artifacts(&text).ok_or_else(|| {
            Problem::failed(format!("cannot use the manifest {at}: it lists no artifacts; see cascade=false"))
        })?;
        // If the image is deleted, its manifest lists the original manifest as an artifact, so the result includes both
        // manifests.
        let is_deleted = |at: &Location| at.when_undeleted().is_some();
        let originals = artifacts.iter().filter(|artifact| artifact.kind == MANIFEST && is_deleted(&at));
        let manifests = originals.map(|artifact| artifact.location.clone()).filter(is_deleted);
        let manifests = manifests.chain([at.clone()]).collect();
        Ok((manifests, artifacts.into_iter().map(|artifact| artifact.location).chain([at]).collect()))
    }

    /// Removes a record permanently, then its objects. `homes` are its manifests.
    async fn remove_record<R: Record>(
        &self,
        claim: &Claim,
        record: &R,
        homes: &[Location],
        objects: Vec<Location>,
    ) -> Result<(), Problem> {
        // Claim first: until then, another request could give another record a link to one of the objects.
        self.claim_more(claim, names(&objects)).await?;
        let objects = self.own(R::KIND, record.id(), homes, objects).await?;
        let mut change = self.database.change(&[R::KIND]).await?;
        self.confirm(&mut change, claim).await?;
        if !change.remove(R::KIND, record.id()).await? {
            return Err(Problem::not_found(R::KIND.noun()));
        }
        self.plan(&mut change, &objects).await?;
        change.commit().await?;
        self.remove_planned(&objects).await;
        Ok(())
    }

    async fn remove_plain(&self, kind: Kind, id: &str) -> Result<(), Problem> {
        let mut change = self.database.change(&[kind]).await?;
        if !change.remove(kind, id).await? {
            return Err(Problem::not_found(kind.noun()));
        }
        Ok(change.commit().await?)
    }

    /// Moves a record that has no objects to the table of deleted records.
    async fn move_record<R: Record>(&self, id: &str) -> Result<(), Problem>
    where
        Deleted<R>: Record,
    {
        let mut change = self.database.change(&[R::KIND, Deleted::<R>::KIND]).await?;
        let record = change.record::<R>(id).await?.ok_or_else(|| Problem::not_found(R::KIND.noun()))?;
        change.remove(R::KIND, id).await?;
        change.insert(&Deleted { record, deleted: now() }).await?;
        Ok(change.commit().await?)
    }

    async fn soft_delete_recipe(&self, claim: &Claim, id: &str) -> Result<(), Problem> {
        let recipe = self.found::<Recipe>(id).await?;
        let Some(from) = recipe.link.as_ref().and_then(Link::location) else {
            return self.move_record::<Recipe>(id).await;
        };
        let to = from.when_deleted();
        self.claim_more(claim, names([&from, &to])).await?;
        if self.own(Kind::Recipes, id, &[], vec![from.clone()]).await?.is_empty() {
            return self.move_record::<Recipe>(id).await;
        }
        let copies = self.copy(&[Copy { from: from.clone(), to: to.clone() }], true).await?;
        let moved = copies.etags[0].clone();
        let link = moved.as_ref().map_or_else(|| recipe.link.clone(), |etag| Some(Link::new(&to, etag)));
        let gone: Vec<_> = moved.iter().map(|_| from.clone()).collect();
        let turn = |recipe| Deleted { record: Recipe { link, ..recipe }, deleted: now() };
        self.exchange(claim, &recipe, copies, &gone, turn).await
    }

    async fn soft_delete_image(&self, claim: &Claim, id: &str) -> Result<(), Problem> {
        let image = self.found::<Image>(id).await?;
        let Some(from) = image.link.as_ref().and_then(Link::location) else {
            return self.move_record::<Image>(id).await;
        };
        let text = match self.store.get(&from, LARGEST_MANIFEST).await {
            Ok(text) => Some(text),
            Err(Failure::Missing) => None,
            Err(failure) => {
                return Err(self.told(Problem::failed(format!("cannot read the manifest {from}: {failure}"))));
            }
        };
        let Some(artifacts) = text.as_deref().and_then(manifest::artifacts) else {
            tracing::warn!("image {id} has no readable manifest at {from}: its objects stay where they are");
            return self.move_record::<Image>(id).await;
        };
        let at = Location {
            bucket: self.settings.boot_images_bucket.clone(),
            key: format!("deleted/{id}/{DELETED_MANIFEST}"),
        };
        let named: Vec<_> = artifacts.iter().map(|artifact| artifact.location.clone()).collect();
        let places = named.iter().chain([&from]).flat_map(|object| [object.clone(), object.when_deleted()]);
        self.claim_more(claim, names(&places.chain([at.clone()]).collect::<Vec<_>>())).await?;
        let moved = self.own(Kind::Images, id, std::slice::from_ref(&from), named).await?;
        let artifacts: Vec<_> = artifacts.into_iter().filter(|artifact| moved.contains(&artifact.location)).collect();
        let own = Artifact { location: from.clone(), kind: MANIFEST.into(), md5: None };
        let all: Vec<_> = artifacts.iter().chain([&own]).collect();
        let copies: Vec<_> = all
            .iter()
            .map(|artifact| Copy { from: artifact.location.clone(), to: artifact.location.when_deleted() })
            .collect();
        if copies.iter().any(|copy| copy.from == at || copy.to == at) {
            return Err(Problem::conflict(format!(
                "cannot delete the image: its manifest names {at}, which the deletion writes"
            )));
        }
        let mut made = self.copy(&copies, true).await?;
        if made.etags.last().is_none_or(Option::is_none) {
            self.undo(made).await;
            return Err(Problem::conflict(format!("cannot move {from}: it was removed meanwhile")));
        }
        let moved: Vec<_> = all.iter().zip(&copies).zip(&made.etags).collect();
        let gone: Vec<_> =
            moved.iter().filter(|(_, etag)| etag.is_some()).map(|((_, copy), _)| copy.from.clone()).collect();
        let listed = moved.iter().filter(|((artifact, _), _)| artifact.kind != MANIFEST);
        let listed: Vec<_> = listed
            .filter_map(|((artifact, copy), etag)| {
                let location = copy.to.clone();
                Some((Artifact { location, ..(**artifact).clone() }, etag.as_ref()?.clone()))
            })
            .collect();
        let manifest_link = Link::new(&from.when_deleted(), made.etags.last().cloned().flatten().unwrap_or_default());
        let created = Local::now().format("%Y-%m-%d %H:%M:%S").to_string();
        let text = manifest::of_deleted(&listed, &manifest_link, &created);
        if let Err(problem) = self.put_beside(&mut made, &at, text).await {
            self.undo(made).await;
            return Err(problem);
        }
        let link = Some(Link::new(&at, ""));
        let turn = |image| Deleted { record: Image { link, ..image }, deleted: now() };
        self.exchange(claim, &image, made, &gone, turn).await
    }

    /// Moves a record to another table. The moved record uses the objects `copies`, and the objects `gone` are removed.
    async fn exchange<R: Record + PartialEq, S: Record>(
        &self,
        claim: &Claim,
        record: &R,
        copies: super::moves::Copies,
        gone: &[Location],
        turn: impl FnOnce(R) -> S + Send,
    ) -> Result<(), Problem> {
        let changed = async {
            let mut change = self.database.change(&[R::KIND, S::KIND]).await?;
            self.confirm(&mut change, claim).await?;
            let now = change.record::<R>(record.id()).await?.ok_or_else(|| Problem::not_found(R::KIND.noun()))?;
            if now.link() != record.link() {
                let detail = format!("cannot move the {}: its link was changed meanwhile", R::KIND.noun());
                return Err(Problem::conflict(detail));
            }
            change.remove(R::KIND, record.id()).await?;
            let turned = turn(now);
            check_link(&mut change, &turned).await?;
            change.insert(&turned).await?;
            self.keep(&mut change, &copies).await?;
            self.plan(&mut change, gone).await?;
            change.commit().await?;
            Ok(())
        };
        if let Err(problem) = changed.await {
            // The commit may have succeeded although its answer was lost. Then the moved record uses the copies, so
            // undo them only if the record has not moved.
            // If the claim is lost, another request may use them: then they stay on the list of removals.
            let still_claimed = async {
                let mut change = self.database.change(&[]).await?;
                self.confirm(&mut change, claim).await?;
                change.commit().await?;
                Ok::<_, Problem>(())
            };
            if self.database.record::<S>(record.id()).await.is_ok_and(|moved| moved.is_none())
                && still_claimed.await.is_ok()
            {
                self.undo(copies).await;
            }
            return Err(problem);
        }
        self.remove_planned(gone).await;
        Ok(())
    }

    /// PATCH of one deleted record: `undelete`.
    pub async fn undelete(&self, kind: Kind, id: &str) -> Result<Response<Body>, Problem> {
        self.undelete_record(kind, id).await?;
        Ok(no_content())
    }

    /// PATCH of all deleted records of a table, one after another. Records that cannot be undeleted stay, and the
    /// answer lists them.
    pub async fn undelete_all(&self, kind: Kind, query: &str) -> Result<Response<Body>, Problem> {
        only(query, &[])?;
        let mut failures = Vec::new();
        for id in self.ids(kind).await? {
            match self.undelete_record(kind, &id).await {
                Ok(()) => {}
                Err(problem) if problem.status == axum::http::StatusCode::NOT_FOUND => {}
                Err(problem) => failures.push(format!("{} {id}: {problem}", kind.noun())),
            }
        }
        if failures.is_empty() {
            Ok(no_content())
        } else {
            Err(Problem::steps("cannot undelete all records", &failures))
        }
    }

    async fn undelete_record(&self, kind: Kind, id: &str) -> Result<(), Problem> {
        match (self.claim_record(kind, id).await?, kind) {
            (Some(claim), Kind::DeletedRecipes) => self.holding(&claim, self.undelete_recipe(&claim, id)).await,
            (Some(claim), Kind::DeletedImages) => self.holding(&claim, self.undelete_image(&claim, id)).await,
            (None, Kind::DeletedPublicKeys) => self.move_back::<PublicKey>(id).await,
            _ => Err(Problem::not_found(kind.noun())),
        }
    }

    /// Moves a record that has no objects back from the table of deleted records.
    async fn move_back<R: Record>(&self, id: &str) -> Result<(), Problem>
    where
        Deleted<R>: Record,
    {
        let kinds = [R::KIND, Deleted::<R>::KIND];
        let mut change = self.database.change(&kinds).await?;
        let deleted = change.record::<Deleted<R>>(id).await?;
        let deleted = deleted.ok_or_else(|| Problem::not_found(kinds[1].noun()))?;
        change.remove(kinds[1], id).await?;
        check_link(&mut change, &deleted.record).await?;
        change.insert(&deleted.record).await?;
        Ok(change.commit().await?)
    }

    async fn undelete_recipe(&self, claim: &Claim, id: &str) -> Result<(), Problem> {
        let deleted = self.found::<Deleted<Recipe>>(id).await?;
        let from = deleted.record.link.as_ref().and_then(Link::location);
        let Some((from, to)) = from.and_then(|from| Some((from.clone(), from.when_undeleted()?))) else {
            return self.move_back::<Recipe>(id).await;
        };
        self.claim_more(claim, names([&from, &to])).await?;
        let copies = self.copy(&[Copy { from: from.clone(), to: to.clone() }], false).await?;
        let link = Some(Link::new(&to, copies.etags[0].clone().unwrap_or_default()));
        self.exchange(claim, &deleted, copies, &[from], |deleted| Recipe { link, ..deleted.record }).await
    }

    async fn undelete_image(&self, claim: &Claim, id: &str) -> Result<(), Problem> {
        let deleted = self.found::<Deleted<Image>>(id).await?;
        let at = deleted.record.link.as_ref().and_then(Link::location);
        let Some(at) = at.filter(|at| at.when_undeleted().is_some()) else {
            return self.move_back::<Image>(id).await;
        };
        let text = self.store.get(&at, LARGEST_MANIFEST).await;
        let text = text.map_err(|failure| self.told(super::links::problem(&at, &failure)))?;
        let refused = |why: &str| Problem::unprocessable(format!("cannot undelete the image by {at}: {why}"));
        let artifacts = manifest::artifacts(&text).ok_or_else(|| refused("it lists no artifacts"))?;
        let copies = artifacts.iter().map(|artifact| {
            let to = artifact.location.when_undeleted();
            let to = to.ok_or_else(|| refused(&format!("{} is not below deleted/", artifact.location)))?;
            Ok(Copy { from: artifact.location.clone(), to })
        });
        let copies: Vec<_> = copies.collect::<Result<_, Problem>>()?;
        let own = artifacts.iter().position(|artifact| artifact.kind == MANIFEST);
        let own = own.ok_or_else(|| refused("it does not list the image's manifest"))?;
        self.claim_more(claim, names(copies.iter().flat_map(|copy| [&copy.from, &copy.to]).chain([&at]))).await?;
        let made = self.copy(&copies, false).await?;
        let link = Some(Link::new(&copies[own].to, made.etags[own].clone().unwrap_or_default()));
        let gone: Vec<_> = copies.iter().map(|copy| copy.from.clone()).chain([at]).collect();
        self.exchange(claim, &deleted, made, &gone, |deleted| Image { link, ..deleted.record }).await
    }

    async fn ids(&self, kind: Kind) -> Result<Vec<String>, Problem> {
        Ok(self.database.ids(kind).await?)
    }
}

/// Fails with 409 if another live record has the link of `record`, which is about to be live.
async fn check_link<R: Record>(change: &mut Change, record: &R) -> Result<(), Problem> {
    let Some(link) = record.link().filter(|_| matches!(R::KIND, Kind::Images | Kind::Recipes)) else { return Ok(()) };
    if change.is_linked(R::KIND, &link.path, record.id()).await? {
        let noun = R::KIND.noun();
        return Err(Problem::conflict(format!(
            "cannot undelete the {noun}: another {noun} has its link {}",
            link.path
        )));
    }
    Ok(())
}

/// Returns the names by which objects are claimed.
fn names<'a>(objects: impl IntoIterator<Item = &'a Location>) -> BTreeSet<String> {
    objects.into_iter().map(ToString::to_string).collect()
}

/// Returns whether a deletion also removes objects: by default, and for the values that upstream takes for true.
fn cascades(query: &str) -> bool {
    let cascade = super::pairs(query).into_iter().find(|(name, _)| name == "cascade");
    cascade.is_none_or(|(_, value)| matches!(value.to_ascii_lowercase().as_str(), "true" | "yes" | "t" | "1"))
}

/// Fails with 400 for a parameter that a request on a whole table does not know. It may be meant as a filter, and
/// without the filter the request would change all records.
pub fn only(query: &str, known: &[&str]) -> Result<(), Problem> {
    match super::pairs(query).into_iter().find(|(name, _)| !known.contains(&name.as_str())) {
        Some((name, _)) => Err(unknown(&name)),
        None => Ok(()),
    }
}

/// The problem of a parameter that could be meant as a filter.
pub fn unknown(name: &str) -> Problem {
    Problem::filter(format!(
        "unknown parameter '{name}': it may be meant as a filter, and without a filter all records would be changed"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_removed_on_upstreams_words() {
        for query in ["", "x=1", "cascade=true", "cascade=True", "cascade=YES", "cascade=t", "cascade=1"] {
            assert!(cascades(query), "{query}");
        }
        for query in ["cascade=", "cascade=false", "cascade=False", "cascade=on", "cascade=y"] {
            assert!(!cascades(query), "{query}");
        }
    }
}
