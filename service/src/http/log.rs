//! Returns the output of a job's programs. Upstream has no such request.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, Response, header};
use tokio::fs::File;
use tokio::io::AsyncReadExt;

use super::problem::Problem;
use super::{Service, pairs};
use crate::records::Job;
use crate::runner;

/// Maximum number of bytes of a log that are in memory at once.
const CHUNK: usize = 64 << 10;

/// Poll interval for new lines in the log file, which other programs write.
const LOOK_EVERY: Duration = Duration::from_millis(300);

impl Service {
    /// GET of a job's log. With `follow=true` the answer continues until the job ends.
    pub async fn log(self: &Arc<Self>, id: &str, query: &str) -> Result<Response<Body>, Problem> {
        let job = self.found::<Job>(id).await?;
        let is_followed = pairs(query).iter().any(|(name, value)| name == "follow" && value == "true");
        let log = self.runner.log(&job, is_followed).await;
        let log = log.map_err(|failures| Problem::steps("cannot read the log", &failures))?;
        let body = match log.ok_or_else(|| Problem::not_found("log"))? {
            runner::Log::Stream(parts) => Body::from_stream(parts),
            runner::Log::File(path) => {
                // If the file does not exist, the job's programs have not started and have written nothing.
                let file = File::open(&path).await.ok();
                let log = Log { service: self.clone(), id: id.to_owned(), path, file, is_followed };
                Body::from_stream(futures_util::stream::try_unfold(log, |mut log| async move {
                    Ok::<_, std::io::Error>(log.next().await?.map(|chunk| (chunk, log)))
                }))
            }
        };
        let mut answer = Response::new(body);
        answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        Ok(answer)
    }
}

/// A log file that is being read.
struct Log {
    service: Arc<Service>,
    id: String,
    path: PathBuf,
    file: Option<File>,
    is_followed: bool,
}

impl Log {
    /// Waits for the next part of the log; returns `None` at the end.
    async fn next(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        loop {
            // Check the status before reading: if the job has ended, the read that follows misses nothing.
            let goes_on =
                self.is_followed && self.service.found::<Job>(&self.id).await.is_ok_and(|job| !job.has_ended());
            if self.file.is_none() {
                self.file = File::open(&self.path).await.ok();
            }
            if let Some(file) = &mut self.file {
                let mut chunk = vec![0; CHUNK];
                let length = file.read(&mut chunk).await?;
                if length > 0 {
                    chunk.truncate(length);
                    return Ok(Some(chunk));
                }
            }
            if !goes_on {
                return Ok(None);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}
