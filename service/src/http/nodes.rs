//! Whether remote build nodes can run jobs.

use axum::body::Body;
use axum::http::{Response, StatusCode};
use futures_util::future::join_all;

use super::problem::Problem;
use super::{Service, json};
use crate::records::{Node, wire};

impl Service {
    /// GET of the status of all nodes, which are asked at the same time.
    pub async fn node_statuses(&self) -> Result<Response<Body>, Problem> {
        let nodes = self.database.records::<Node>().await?;
        let statuses = join_all(nodes.iter().map(|node| self.runner.probe(&node.xname))).await;
        Ok(json(StatusCode::OK, wire::sorted(&statuses)))
    }

    /// GET of the status of a node.
    pub async fn node_status(&self, xname: &str) -> Result<Response<Body>, Problem> {
        let node = self.found::<Node>(xname).await?;
        Ok(json(StatusCode::OK, wire::sorted(&self.runner.probe(&node.xname).await)))
    }
}
