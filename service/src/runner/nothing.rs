//! A runner for a service that only keeps records: it runs nothing.

use async_trait::async_trait;
use tokio::sync::mpsc;

use super::{Death, Failures, NewJob, Runner, Started};
use crate::records::Job;

/// Refuses every job.
pub struct Nothing;

#[async_trait]
impl Runner for Nothing {
    async fn start(&self, _job: &NewJob) -> Result<Started, Failures> {
        Err(vec!["cannot start the job: this service runs no jobs; start 'ims serve' with another --runner".into()])
    }

    async fn release(&self, _job: &Job) -> Result<(), Failures> {
        Ok(())
    }

    async fn remove(&self, _job: &Job) -> Result<(), Failures> {
        Ok(())
    }

    async fn watch(&self, _running: Vec<Job>, _deaths: mpsc::Sender<Death>) {}
}
