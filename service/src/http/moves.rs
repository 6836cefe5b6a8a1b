//! Moves and removes the objects of records. A kill at any moment leaves neither an object without a record nor a
//! record without its objects.
//!
//! The database has a list of objects to remove. Copies are put on the list before they are created. The change that
//! lets a record point to the copies also takes them off the list, and puts the originals on it. Objects that a kill
//! leaves on the list are removed at the next start, or by another replica once their entries are due.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::join_all;

use super::Service;
use super::jobs::LONGEST_START;
use super::links::AT_ONCE;
use super::problem::Problem;
use crate::database::Change;
use crate::records::{Kind, Location};
use crate::store::Failure;

/// Time for which an object that a replica is working on is protected from removal by other replicas.
const LEASE: Duration = Duration::from_mins(2);

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

/// Copies of objects, planned for removal until [`Service::keep`] takes them off the list.
pub struct Copies {
    /// Objects that this request creates and that did not exist before.
    new: Vec<Location>,
    /// ETags of all copies, in the order of the request; `None` for an original that is missing.
    pub etags: Vec<Option<String>>,
}

impl Service {
    /// Copies objects. A missing original is an error unless `may_miss` is true. If the destination of a copy exists,
    /// it is overwritten if `replace` is true. Otherwise it is used as the copy if the sizes are equal, and is an error
    /// if not.
    pub async fn copy(&self, copies: &[Copy], may_miss: bool, replace: bool) -> Result<Copies, Problem> {
        let mut new = Vec::new();
        let mut there = Vec::new();
        for group in copies.chunks(AT_ONCE) {
            let heads = join_all(group.iter().map(|copy| self.store.head(&copy.to))).await;
            for (copy, head) in group.iter().zip(heads) {
                match head {
                    Ok(object) => there.push(Some(object)),
                    Err(Failure::Missing) => {
                        new.push(copy.to.clone());
                        there.push(None);
                    }
                    Err(failure) => return Err(self.told(failed(&copy.to, &failure))),
                }
            }
        }
        // A manifest may list an object twice, and claiming an object twice would fail.
        new.sort();
        new.dedup();
        self.claim(&new).await?;
        let work = async {
            let mut etags = Vec::new();
            for (group, there) in copies.chunks(AT_ONCE).zip(there.chunks(AT_ONCE)) {
                let made = group.iter().zip(there).map(async |(copy, there)| {
                    if let Some(object) = there.as_ref().filter(|_| !replace) {
                        let original = self.store.head(&copy.from).await?;
                        if original.size == object.size {
                            return Ok(object.etag.clone());
                        }
                        return Err(Failure::Refused(format!("another object is at {}", copy.to)));
                    }
                    self.store.copy(&copy.from, &copy.to).await
                });
                for (copy, made) in group.iter().zip(join_all(made).await) {
                    match made {
                        Ok(etag) => etags.push(Some(etag)),
                        Err(Failure::Missing) if may_miss => etags.push(None),
                        Err(Failure::Missing) => {
                            let detail = format!("cannot move {}: there is no such object", copy.from);
                            return Err(Problem::unprocessable(detail));
                        }
                        Err(failure) => return Err(self.told(failed(&copy.from, &failure))),
                    }
                }
            }
            Ok(etags)
        };
        let done = self.renewing(&new, work).await;
        let mut copies = Copies { new, etags: Vec::new() };
        match done {
            Ok(etags) => {
                copies.etags = etags;
                Ok(copies)
            }
            Err(problem) => {
                self.undo(copies).await;
                Err(problem)
            }
        }
    }

    /// Writes one more object and adds it to the copies, so that it is kept or removed with them.
    pub async fn put_beside(&self, copies: &mut Copies, at: &Location, content: Vec<u8>) -> Result<String, Problem> {
        self.claim(std::slice::from_ref(at)).await?;
        copies.new.push(at.clone());
        self.store.put(at, content).await.map_err(|failure| self.told(failed(at, &failure)))
    }

    /// Takes copies off the list of removals, as part of the change that lets a record point to them.
    pub async fn keep(&self, change: &mut Change, copies: &Copies) -> Result<(), Problem> {
        Ok(change.forget_removal(&copies.new).await?)
    }

    /// Removes copies that no record points to, after a failure.
    pub async fn undo(&self, copies: Copies) {
        self.remove_planned(&copies.new).await;
    }

    /// Puts objects on the list of removals, as part of the change after which no record points to them.
    pub async fn plan(&self, change: &mut Change, objects: &[Location]) -> Result<(), Problem> {
        Ok(change.plan_removal(objects, now() + lease()).await?)
    }

    /// Removes objects that are on the list. Objects that cannot be removed now stay on the list.
    pub async fn remove_planned(&self, objects: &[Location]) {
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

    /// Removes the objects whose removal is due now.
    pub async fn sweep_once(&self) -> crate::database::Result<()> {
        for at in self.database.removals(now()).await? {
            // Keep the lock during the removal, so that no request can claim and rewrite the object at the same time.
            let _one = self.sweeping.lock().await;
            let (is_due, locked) = self.database.lock_removal(&at, now()).await?;
            if !is_due {
                continue;
            }
            let removed = self.store.remove(&at).await;
            let mut change = match locked {
                Some(change) => change,
                None => self.database.change(&[]).await?,
            };
            match removed {
                Ok(()) => {
                    change.forget_removal(std::slice::from_ref(&at)).await?;
                    tracing::info!("removed an object that no record points to: {at}");
                }
                Err(failure) => {
                    self.metrics.store_failed();
                    tracing::warn!("cannot remove {at}: {failure}; will try again");
                    change.plan_removal(std::slice::from_ref(&at), now() + lease()).await?;
                }
            }
            change.commit().await?;
        }
        Ok(())
    }

    /// Puts objects that are about to be created on the list of removals. Fails if another request is working on one of
    /// them.
    async fn claim(&self, objects: &[Location]) -> Result<(), Problem> {
        let _one = self.sweeping.lock().await;
        let mut change = self.database.change(&[]).await?;
        for at in objects {
            if !change.claim(at, now(), now() + lease()).await? {
                let detail = format!("cannot write {at}: another request is working on it; try again later");
                return Err(Problem::conflict(detail));
            }
        }
        change.commit().await?;
        Ok(())
    }

    /// Runs `work`, and renews the claim of `objects` until `work` has finished.
    async fn renewing<T>(&self, objects: &[Location], work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                () = tokio::time::sleep(LEASE / 4) => {
                    let renewed = async {
                        let mut change = self.database.change(&[]).await?;
                        change.plan_removal(objects, now() + lease()).await?;
                        change.commit().await
                    };
                    if let Err(error) = renewed.await {
                        tracing::warn!("cannot renew the claim of {} objects: {error}", objects.len());
                    }
                }
            }
        }
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

fn lease() -> i64 {
    i64::try_from(LEASE.as_secs()).expect("two minutes")
}

/// Seconds since 1970.
fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}
