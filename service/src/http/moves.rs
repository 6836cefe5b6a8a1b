//! Moves and removes the objects of records. A kill at any moment leaves neither an object without a record nor a
//! record without its objects.
//!
//! The database has a list of objects to remove. Copies are put on the list before they are created. The change that
//! lets a record point to the copies also takes them off the list, and puts the originals on it. Objects that a kill
//! leaves on the list are removed at the next start, or by another replica once their entries are due and nobody claims
//! the objects.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::join_all;

use super::Service;
use super::claims::lease;
use super::jobs::LONGEST_START;
use super::links::AT_ONCE;
use super::problem::Problem;
use crate::database::Change;
use crate::records::{Kind, Location};
use crate::store::Failure;

/// Pause between two searches for due removals.
const SWEEP: Duration = Duration::from_secs(20);

/// A copy to be created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy {
    /// Original.
    pub from: Location,
    /// Copy.
    pub to: Location,
}

/// State of the original and of the destination before a copy is made.
enum Found {
    /// Nothing to copy.
    NoOriginal,
    /// An original without a copy.
    Original,
    /// The original, and a copy that equals it; contains the ETag of the copy.
    Copy(String),
}

/// Copies of objects, planned for removal until [`Service::keep`] takes them off the list.
pub struct Copies {
    /// Objects that this request creates, or that an interrupted move has left.
    new: Vec<Location>,
    /// ETags of all copies, in the order of the request; `None` for an original that is missing.
    pub etags: Vec<Option<String>>,
}

impl Service {
    /// Copies objects, all of which are claimed. An existing object is never overwritten: it is an error (409), unless
    /// it equals the original and was left by an interrupted move or is restored by an undelete. A missing original
    /// is an error unless this is a soft delete.
    pub async fn copy(&self, copies: &[Copy], is_delete: bool) -> Result<Copies, Problem> {
        let mut new = Vec::new();
        let mut found = Vec::new();
        for group in copies.chunks(AT_ONCE) {
            let heads =
                group.iter().map(async |copy| (self.store.head(&copy.from).await, self.store.head(&copy.to).await));
            for (copy, (original, there)) in group.iter().zip(join_all(heads).await) {
                let original = match original {
                    Ok(original) => original,
                    Err(Failure::Missing) if is_delete => {
                        found.push(Found::NoOriginal);
                        continue;
                    }
                    Err(Failure::Missing) => return Err(missing(&copy.from)),
                    Err(failure) => return Err(self.told(failed(&copy.from, &failure))),
                };
                match there {
                    Ok(there) => {
                        let is_left = self.database.is_planned(&copy.to).await?;
                        let is_same = there.size == original.size && there.etag == original.etag;
                        if !is_same || (is_delete && !is_left) {
                            let detail = format!("cannot move {}: another object is at {}", copy.from, copy.to);
                            return Err(Problem::conflict(detail));
                        }
                        if is_left {
                            new.push(copy.to.clone());
                        }
                        found.push(Found::Copy(there.etag));
                    }
                    Err(Failure::Missing) => {
                        new.push(copy.to.clone());
                        found.push(Found::Original);
                    }
                    Err(failure) => return Err(self.told(failed(&copy.to, &failure))),
                }
            }
        }
        // A manifest may list an object twice.
        new.sort();
        new.dedup();
        let mut change = self.database.change(&[]).await?;
        self.plan(&mut change, &new).await?;
        change.commit().await?;
        let mut made = Copies { new, etags: Vec::new() };
        for (group, found) in copies.chunks(AT_ONCE).zip(found.chunks(AT_ONCE)) {
            let etags = group.iter().zip(found).map(async |(copy, found)| match found {
                Found::NoOriginal => Ok(None),
                Found::Copy(etag) => Ok(Some(etag.clone())),
                Found::Original => self.store.copy(&copy.from, &copy.to).await.map(Some),
            });
            for (copy, etag) in group.iter().zip(join_all(etags).await) {
                let problem = match etag {
                    Ok(etag) => {
                        made.etags.push(etag);
                        continue;
                    }
                    Err(Failure::Missing) => missing(&copy.from),
                    Err(failure) => self.told(failed(&copy.from, &failure)),
                };
                self.undo(made).await;
                return Err(problem);
            }
        }
        Ok(made)
    }

    /// Writes one more object and adds it to the copies, so that it is kept or removed with them.
    pub async fn put_beside(&self, copies: &mut Copies, at: &Location, content: Vec<u8>) -> Result<String, Problem> {
        let mut change = self.database.change(&[]).await?;
        self.plan(&mut change, std::slice::from_ref(at)).await?;
        change.commit().await?;
        copies.new.push(at.clone());
        self.store.put(at, content).await.map_err(|failure| self.told(failed(at, &failure)))
    }

    /// Takes copies off the list of removals, as part of the change that lets a record point to them.
    pub async fn keep(&self, change: &mut Change, copies: &Copies) -> Result<(), Problem> {
        Ok(change.forget_removal(&copies.new).await?)
    }

    /// Removes copies that no record points to, after a failure. Call it only while they are claimed.
    pub async fn undo(&self, copies: Copies) {
        self.remove_planned(&copies.new).await;
    }

    /// Puts objects on the list of removals, as part of the change after which no record points to them.
    pub async fn plan(&self, change: &mut Change, objects: &[Location]) -> Result<(), Problem> {
        Ok(change.plan_removal(objects, now() + lease()).await?)
    }

    /// Removes objects that are on the list, and returns whether all are removed. Objects that cannot be removed now
    /// stay on the list.
    pub async fn remove_planned(&self, objects: &[Location]) -> bool {
        let mut are_all_removed = true;
        for group in objects.chunks(AT_ONCE) {
            let removed = join_all(group.iter().map(|at| self.store.remove(at))).await;
            let mut gone = Vec::new();
            let mut left = Vec::new();
            for (at, removed) in group.iter().zip(removed) {
                match removed {
                    Ok(()) => gone.push(at.clone()),
                    Err(failure) => {
                        self.metrics.store_failed();
                        tracing::warn!("cannot remove {at}: {failure}; will try again");
                        left.push(at.clone());
                        are_all_removed = false;
                    }
                }
            }
            let noted = async {
                let mut change = self.database.change(&[]).await?;
                change.forget_removal(&gone).await?;
                change.plan_removal(&left, now() + lease()).await?;
                change.commit().await
            };
            if let Err(error) = noted.await {
                tracing::warn!("cannot record the removal of objects: {error}; they are removed again later");
            }
        }
        are_all_removed
    }

    /// Removes due objects and the leftovers of interrupted job starts, repeatedly until the service stops.
    pub async fn sweep(&self) {
        loop {
            if let Err(error) = self.sweep_once().await {
                tracing::warn!("cannot look for objects to remove: {error}");
            }
            tokio::time::sleep(SWEEP).await;
            self.clear_starts(self.starts(LONGEST_START).await).await;
        }
    }

    /// Removes the objects whose removal is due now, except those that a record names.
    pub async fn sweep_once(&self) -> Result<(), Problem> {
        let due = self.database.removals(now()).await?;
        if due.is_empty() {
            return Ok(());
        }
        let named = self.named(&due.iter().flat_map(|at| [at.clone(), other(at)]).collect()).await?;
        for at in due {
            // A request that has claimed the object in the meantime decides about it.
            let Ok(claim) = self.claim(BTreeSet::from([at.to_string()])).await else { continue };
            self.holding(&claim, self.sweep_one(&at, &named)).await?;
        }
        Ok(())
    }

    async fn sweep_one(&self, at: &Location, named: &BTreeSet<Location>) -> Result<(), Problem> {
        if !self.database.is_planned(at).await? {
            return Ok(());
        }
        // The object may be the only copy of one that a record names.
        let other = other(at);
        let is_only = named.contains(&other)
            && match self.store.head(&other).await {
                Ok(_) => false,
                Err(Failure::Missing) => true,
                Err(failure) => return Err(self.told(failed(&other, &failure))),
            };
        if named.contains(at) || is_only {
            let mut change = self.database.change(&[]).await?;
            change.forget_removal(std::slice::from_ref(at)).await?;
            change.commit().await?;
            tracing::warn!("did not remove {at}: a record needs it");
        } else if self.remove_planned(std::slice::from_ref(at)).await {
            tracing::info!("removed an object that no record points to: {at}");
        }
        Ok(())
    }

    /// Returns whether a record of the table links to `path`.
    pub async fn is_in_use(&self, kind: Kind, path: &str) -> Result<bool, Problem> {
        let mut change = self.database.change(&[]).await?;
        Ok(change.is_linked(kind, path, "").await?)
    }
}

fn failed(at: &Location, failure: &Failure) -> Problem {
    Problem::failed(format!("cannot move {at}: {failure}"))
}

fn missing(at: &Location) -> Problem {
    Problem::unprocessable(format!("cannot move {at}: there is no such object"))
}

/// Returns the location of an object before or after its soft delete.
fn other(at: &Location) -> Location {
    at.when_undeleted().unwrap_or_else(|| at.when_deleted())
}

/// Seconds since 1970.
pub fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}
