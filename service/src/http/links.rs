//! Checks the links of requests against the store.

use futures_util::future::join_all;

use super::Service;
use super::problem::Problem;
use crate::records::manifest::{self, Refusal};
use crate::records::{Link, Location};
use crate::store::{Failure, Object};

/// Maximum number of concurrent requests to the store for one image.
pub const AT_ONCE: usize = 8;

/// Returns the location to which a link points; fails with 422 if the link has none.
pub fn location(link: &Link) -> Result<Location, Problem> {
    let why = || format!("cannot use the link {}: its path names no bucket and key", link.path);
    link.location().ok_or_else(|| Problem::unprocessable(why()))
}

/// Converts a store's failure to read the object at `at` into a problem.
pub fn problem(at: &Location, failure: &Failure) -> Problem {
    let detail = format!("cannot read the object {at}: {failure}");
    match failure {
        Failure::Missing | Failure::Refused(_) => Problem::unprocessable(detail),
        Failure::TooLarge => Problem::bad_request(detail),
        Failure::Unreachable(_) => Problem::failed(detail),
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Malformed(why) => Self::unprocessable(format!("cannot use the image: {why}")),
            Refusal::Rootfs(why) => Self::bad_request(format!("cannot use the image: {why}")),
        }
    }
}

impl Service {
    /// Requests the properties of the object to which a link points.
    pub async fn object(&self, link: &Link) -> Result<(Location, Object), Problem> {
        let at = location(link)?;
        let object = self.store.head(&at).await.map_err(|failure| self.told(problem(&at, &failure)))?;
        if !link.etag.is_empty() && object.etag != link.etag {
            tracing::warn!("object {at} has the ETag {}, its link says {}", object.etag, link.etag);
        }
        Ok((at, object))
    }

    /// Reads the manifest of an image.
    pub async fn manifest(&self, link: &Link) -> Result<Vec<u8>, Problem> {
        let (at, _) = self.object(link).await?;
        let text = self.store.get(&at, self.settings.max_manifest_size).await;
        text.map_err(|failure| self.told(problem(&at, &failure)))
    }

    /// Checks the link of a new image, or a link that a patch adds to an image.
    pub async fn check_image(&self, link: &Link) -> Result<(), Problem> {
        let checked = manifest::check(&self.manifest(link).await?)?;
        for group in checked.artifacts.chunks(AT_ONCE) {
            let heads = join_all(group.iter().map(|at| self.store.head(at))).await;
            for (at, head) in group.iter().zip(heads) {
                head.map_err(|failure| self.told(problem(at, &failure)))?;
            }
        }
        checked.refusal.map_or(Ok(()), |refusal| Err(refusal.into()))
    }

    /// Counts `problem` in the metrics if it is a failure of the store, and returns it unchanged.
    pub fn told(&self, problem: Problem) -> Problem {
        if problem.status.is_server_error() {
            self.metrics.store_failed();
        }
        problem
    }
}
