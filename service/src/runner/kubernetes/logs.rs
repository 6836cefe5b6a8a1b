//! Output of a job's containers, from its pods. Each line is prefixed with the name of its container.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::io::{AsyncBufReadExt, AsyncReadExt};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::LogParams;
use tokio::sync::mpsc;

use super::objects::{Cluster, Refusal};
use crate::records::Job;
use crate::runner::Log;

/// Maximum number of bytes of a line that are in memory at once.
const LONGEST: u64 = 64 << 10;

/// Interval at which the log of a container that has not started yet is requested again.
const LOOK_EVERY: Duration = Duration::from_secs(1);

type Lines = mpsc::Sender<io::Result<Vec<u8>>>;

/// Reads the logs of a job's pods; with `is_followed`, until the pod has ended.
pub(super) async fn read(cluster: Arc<Cluster>, job: &Job, is_followed: bool) -> Result<Log, String> {
    let name = job.kubernetes_job.clone().unwrap_or_default();
    let pods = cluster.pods(&name).await;
    let pods = pods.map_err(|e| format!("cannot list the pods of job {}: {}", job.id, e.reason))?;
    let (sender, receiver) = mpsc::channel(16);
    tokio::spawn(async move {
        let gathered = gather(&cluster, &name, pods, is_followed, &sender).await;
        if let Err(refusal) = gathered {
            let _ = sender.send(Err(io::Error::other(refusal.reason))).await;
        }
    });
    let lines = futures_util::stream::unfold(receiver, |mut lines| async { Some((lines.recv().await?, lines)) });
    Ok(Log::Stream(lines.boxed()))
}

async fn gather(
    cluster: &Cluster,
    job: &str,
    mut pods: Vec<Pod>,
    is_followed: bool,
    lines: &Lines,
) -> Result<(), Refusal> {
    while is_followed && pods.is_empty() && !lines.is_closed() {
        tokio::time::sleep(LOOK_EVERY).await;
        pods = cluster.pods(job).await?;
    }
    for pod in pods {
        let name = pod.metadata.name.clone().unwrap_or_default();
        let spec = pod.spec.unwrap_or_default();
        let all = spec.init_containers.into_iter().flatten().chain(spec.containers);
        let copies = all.map(|container| copy(cluster, &name, container.name, is_followed, lines));
        if is_followed {
            join_all(copies).await.into_iter().collect::<Result<(), _>>()?;
        } else {
            for copy in copies.collect::<Vec<_>>() {
                copy.await?;
            }
        }
    }
    Ok(())
}

/// Copies the log of a container to `lines`.
async fn copy(
    cluster: &Cluster,
    pod: &str,
    container: String,
    is_followed: bool,
    lines: &Lines,
) -> Result<(), Refusal> {
    let api: Api<Pod> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
    let parameters = LogParams { container: Some(container.clone()), follow: is_followed, ..LogParams::default() };
    let refused = |e: kube::Error| Refusal {
        status: if let kube::Error::Api(status) = &e { Some(status.code) } else { None },
        reason: format!("cannot read the log of container {container} of pod {pod}: {}", super::objects::reason(&e)),
    };
    let mut reader = loop {
        match api.log_stream(pod, &parameters).await.map_err(refused) {
            Ok(reader) => break Box::pin(reader),
            // The container has not started yet, or will never start.
            Err(refusal) if refusal.status == Some(400) => {
                let is_over = cluster.has_ended(pod).await?;
                if !is_followed || is_over || lines.is_closed() {
                    return Ok(());
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
            Err(refusal) if refusal.is_absence() => return Ok(()),
            Err(refusal) => return Err(refusal),
        }
    };
    loop {
        let mut line = format!("{container} | ").into_bytes();
        let length = (&mut reader).take(LONGEST).read_until(b'\n', &mut line).await;
        match length {
            Ok(0) => return Ok(()),
            Ok(_) => {
                if line.last() != Some(&b'\n') {
                    line.push(b'\n');
                }
                if lines.send(Ok(line)).await.is_err() {
                    return Ok(());
                }
            }
            Err(error) => return Err(refused(kube::Error::ReadEvents(error))),
        }
    }
}
