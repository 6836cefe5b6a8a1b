//! Claims: one request at a time works on a record and its objects.
//!
//! A request claims the record before it reads it, and the objects before it looks at them. Live and deleted records
//! of one ID are one name, so that a deletion and an undelete exclude each other. The database has the claims, so that
//! they hold among replicas too. They expire a while after the process that renews them was killed.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::Service;
use super::moves::now;
use super::problem::Problem;
use crate::database::Change;
use crate::records::{Kind, new_id};

/// Time for which a claim is valid unless it is renewed.
const LEASE: Duration = Duration::from_mins(2);

/// Records and objects on which only one request works.
pub struct Claim {
    owner: String,
    /// Number of names that are claimed.
    held: AtomicU64,
}

impl Service {
    /// Claims the record `id` of a table, live or deleted. Returns `None` for tables whose records have no objects.
    pub async fn claim_record(&self, kind: Kind, id: &str) -> Result<Option<Claim>, Problem> {
        let noun = match kind {
            Kind::Images | Kind::DeletedImages => Kind::Images.noun(),
            Kind::Recipes | Kind::DeletedRecipes => Kind::Recipes.noun(),
            _ => return Ok(None),
        };
        self.claim(BTreeSet::from([format!("{noun} {id}")])).await.map(Some)
    }

    /// Claims records or objects by their names. Fails with 409 if another request works on one of them.
    pub async fn claim(&self, names: BTreeSet<String>) -> Result<Claim, Problem> {
        let claim = Claim { owner: new_id(), held: AtomicU64::new(0) };
        self.claim_more(&claim, names).await?;
        Ok(claim)
    }

    /// Adds names that `claim` does not have yet.
    pub async fn claim_more(&self, claim: &Claim, names: BTreeSet<String>) -> Result<(), Problem> {
        let mut change = self.database.change(&[]).await?;
        // The names are sorted, so that two requests never wait for each other.
        for name in &names {
            if !change.claim(name, &claim.owner, now(), now() + lease()).await? {
                let detail = format!("cannot claim {name}: another request is working on it; try again later");
                return Err(Problem::conflict(detail));
            }
        }
        change.commit().await?;
        claim.held.fetch_add(names.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Fails with 409 unless all of `claim` is still valid; if the change is committed, the claim is valid for another
    /// lease.
    pub async fn confirm(&self, change: &mut Change, claim: &Claim) -> Result<(), Problem> {
        if change.renew_claims(&claim.owner, now() + lease()).await? == claim.held.load(Ordering::Relaxed) {
            return Ok(());
        }
        Err(Problem::conflict("another request has taken over the objects, since this one took too long; try again"))
    }

    /// Runs `work`, and renews the claim until it has finished. Then ends the claim.
    pub async fn holding<T>(&self, claim: &Claim, work: impl Future<Output = T>) -> T {
        // Both are polled together: a renewal may have to wait for a change that `work` has begun.
        let done = tokio::select! {
            done = work => done,
            never = self.renew(claim) => match never {},
        };
        let ended = async {
            let mut change = self.database.change(&[]).await?;
            change.end_claims(&claim.owner).await?;
            change.commit().await
        };
        if let Err(error) = ended.await {
            tracing::warn!("cannot end a claim: {error}; it expires");
        }
        done
    }

    async fn renew(&self, claim: &Claim) -> Infallible {
        loop {
            tokio::time::sleep(LEASE / 4).await;
            let renewed = async {
                let mut change = self.database.change(&[]).await?;
                change.renew_claims(&claim.owner, now() + lease()).await?;
                change.commit().await
            };
            if let Err(error) = renewed.await {
                tracing::warn!("cannot renew a claim: {error}");
            }
        }
    }
}

/// Time in seconds for which a claim is valid.
pub fn lease() -> i64 {
    i64::try_from(LEASE.as_secs()).expect("two minutes")
}
