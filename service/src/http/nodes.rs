//! Remote build nodes: whether they can run jobs, and which of them runs a job.

use axum::body::Body;
use axum::http::{Response, StatusCode};
use futures_util::future::join_all;

use super::problem::Problem;
use super::{Service, json};
use crate::records::{Job, Kind, Node, wire};
use crate::runner::NodeStatus;
use crate::runner::nodes::choose;

impl Service {
    /// GET of the status of all nodes, which are asked at the same time.
    pub async fn node_statuses(&self) -> Result<Response<Body>, Problem> {
        Ok(json(StatusCode::OK, wire::sorted(&self.probe_nodes().await?)))
    }

    /// Asks all nodes at the same time.
    pub(super) async fn probe_nodes(&self) -> Result<Vec<NodeStatus>, Problem> {
        let nodes = self.database.records::<Node>().await?;
        Ok(join_all(nodes.iter().map(|node| self.runner.probe(&node.xname))).await)
    }

    /// Chooses the node for a job of this architecture. Returns an empty name if no node can run the job.
    pub(super) async fn choose_node(&self, statuses: &[NodeStatus], arch: &str) -> Result<String, Problem> {
        let mut jobs = self.database.records::<Job>().await?;
        jobs.retain(|job| !job.has_ended());
        jobs.extend(self.database.all_in::<Job>(Kind::Starting).await?);
        let known = |xname: &str| i64::try_from(jobs.iter().filter(|job| job.remote_build_node == xname).count());
        let chosen = choose(statuses, arch, |xname| known(xname).unwrap_or(i64::MAX)).unwrap_or_default();
        for status in statuses.iter().filter(|status| !status.is_able) {
            tracing::warn!("the remote build node {} can run no jobs: {}", status.xname, status.complaint());
        }
        if !chosen.is_empty() {
            tracing::info!("Matching remote node: {chosen}");
        }
        Ok(chosen.to_owned())
    }

    /// GET of the status of a node.
    pub async fn node_status(&self, xname: &str) -> Result<Response<Body>, Problem> {
        let node = self.found::<Node>(xname).await?;
        Ok(json(StatusCode::OK, wire::sorted(&self.runner.probe(&node.xname).await)))
    }
}
