//! Creates, finds and removes the objects of a job in the cluster. Each call has a time limit.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::{ApiResource, DeleteParams, DynamicObject, ListParams, PostParams, PropagationPolicy};
use kube::core::GroupVersionKind;
use kube::{Api, Client};
use serde_json::Value;

/// Kind of object that a job has in the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    ConfigMap,
    Claim,
    Service,
    /// Lets CFS, which is in Istio's mesh, reach port 22 of the job's sshd.
    Rule,
    /// Keys that sign packages.
    Secret,
    Job,
}

impl Kind {
    /// All kinds, in the order of creation: no object needs another one that is created later.
    pub(super) const ALL: [Self; 6] =
        [Self::ConfigMap, Self::Claim, Self::Service, Self::Rule, Self::Secret, Self::Job];

    /// Kinds that a job needs only while it runs.
    pub(super) const WHILE_RUNNING: [Self; 3] = [Self::Service, Self::Rule, Self::Claim];

    /// `apiVersion` and `kind`.
    pub(super) fn api(self) -> (&'static str, &'static str) {
        match self {
            Self::ConfigMap => ("v1", "ConfigMap"),
            Self::Claim => ("v1", "PersistentVolumeClaim"),
            Self::Service => ("v1", "Service"),
            Self::Rule => ("networking.istio.io/v1beta1", "DestinationRule"),
            Self::Secret => ("v1", "Secret"),
            Self::Job => ("batch/v1", "Job"),
        }
    }

    fn resource(self) -> ApiResource {
        let (version, kind) = self.api();
        let (group, version) = version.split_once('/').unwrap_or(("", version));
        ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind))
    }
}

/// Label with the job's ID, on all objects of a job and on its pods.
pub(super) const JOB_LABEL: &str = "cray-ims/job-id";

/// Label with the name of the database that has the job's record. Services with another database leave objects with
/// this label alone.
pub(super) const RECORDS_LABEL: &str = "cray-ims/records";

/// Time limit of a call, including its retries. An API that takes ten seconds for each answer is still usable.
const LIMIT: Duration = Duration::from_secs(20);

/// Pause before retrying a call whose connection failed.
const PAUSE: Duration = Duration::from_millis(300);

/// Reason why a call failed.
#[derive(Debug)]
pub(super) struct Refusal {
    /// HTTP status that the API answered; `None` if it did not answer.
    pub(super) status: Option<u16>,
    /// The reason, for people.
    pub(super) reason: String,
}

impl Refusal {
    pub(super) fn is_absence(&self) -> bool {
        self.status == Some(404)
    }
}

/// Access to the cluster's objects of jobs.
#[derive(Clone)]
pub(super) struct Cluster {
    pub(super) client: Client,
    /// Namespace of the jobs.
    pub(super) namespace: String,
    /// Name of the database that has the records of these jobs.
    pub(super) records: String,
}

/// Adds the labels of a job to an object, and to the template of the pods that the object creates.
pub(super) fn label(object: &mut Value, job: &str, records: &str) {
    let labels = [(JOB_LABEL, job), (RECORDS_LABEL, records)];
    let add = |metadata: &mut Value| {
        let mut all = metadata["labels"].as_object().cloned().unwrap_or_default();
        all.extend(labels.map(|(name, value)| (name.to_owned(), value.into())));
        metadata["labels"] = all.into();
    };
    add(&mut object["metadata"]);
    if object["kind"] == "Job" {
        add(&mut object["spec"]["template"]["metadata"]);
    }
}

impl Cluster {
    fn api(&self, kind: Kind, namespace: &str) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), namespace, &kind.resource())
    }

    /// Creates an object of the job `job`. An existing object with the job's label is no failure: an earlier attempt of
    /// the same call created it.
    pub(super) async fn create(&self, kind: Kind, job: &str, object: &Value) -> Result<(), Refusal> {
        let failed = |e| Refusal { status: None, reason: format!("it is no object: {e}") };
        let object: DynamicObject = serde_json::from_value(object.clone()).map_err(failed)?;
        let name = object.metadata.name.clone().unwrap_or_default();
        let api = self.api(kind, &self.namespace);
        let parameters = PostParams::default();
        match call(|| api.create(&parameters, &object)).await {
            Err(refusal) if refusal.status == Some(409) => {
                let found = call(|| api.get(&name)).await;
                let is_ours = |found: &DynamicObject| {
                    found.metadata.labels.as_ref().and_then(|labels| labels.get(JOB_LABEL)).is_some_and(|id| id == job)
                };
                if found.is_ok_and(|found| is_ours(&found)) { Ok(()) } else { Err(refusal) }
            }
            other => other.map(drop),
        }
    }

    /// Reads an object in any namespace.
    pub(super) async fn read(&self, kind: Kind, namespace: &str, name: &str) -> Result<Value, Refusal> {
        let api = self.api(kind, namespace);
        let object = call(|| api.get(name)).await?;
        serde_json::to_value(object).map_err(|e| Refusal { status: None, reason: e.to_string() })
    }

    /// Removes an object and its dependents. An absent object is no failure.
    pub(super) async fn delete(&self, kind: Kind, name: &str) -> Result<(), String> {
        let parameters =
            DeleteParams { propagation_policy: Some(PropagationPolicy::Background), ..DeleteParams::default() };
        let api = self.api(kind, &self.namespace);
        match call(|| api.delete(name, &parameters)).await {
            Err(refusal) if !refusal.is_absence() => {
                Err(format!("cannot delete the {} {name}: {}", kind.api().1, refusal.reason))
            }
            _ => Ok(()),
        }
    }

    /// Returns the names of the objects of a kind, each with the ID of its job: those of the given job or, for `None`,
    /// of all jobs recorded in this database.
    pub(super) async fn find(&self, kind: Kind, job: Option<&str>) -> Result<Vec<(String, String)>, String> {
        let selector = match job {
            Some(job) => format!("{JOB_LABEL}={job}"),
            None => format!("{JOB_LABEL},{RECORDS_LABEL}={}", self.records),
        };
        let api = self.api(kind, &self.namespace);
        let parameters = ListParams::default().labels(&selector);
        let found = match call(|| api.list_metadata(&parameters)).await {
            Ok(found) => found,
            // A cluster without Istio does not know this kind.
            Err(refusal) if kind == Kind::Rule && refusal.is_absence() => return Ok(Vec::new()),
            Err(refusal) => return Err(format!("cannot list the {}s of jobs: {}", kind.api().1, refusal.reason)),
        };
        let named = found.items.into_iter().filter_map(|object| {
            let job = object.metadata.labels?.remove(JOB_LABEL)?;
            Some((object.metadata.name?, job))
        });
        Ok(named.collect())
    }

    /// Returns the pods of the Kubernetes Job named `job`, the oldest first.
    pub(super) async fn pods(&self, job: &str) -> Result<Vec<Pod>, Refusal> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let parameters = ListParams::default().labels(&format!("job-name={job}"));
        let mut pods = call(|| api.list(&parameters)).await?.items;
        pods.sort_by_key(|pod| pod.metadata.creation_timestamp.clone());
        Ok(pods)
    }

    /// Returns whether a pod has ended or no longer exists.
    pub(super) async fn has_ended(&self, pod: &str) -> Result<bool, Refusal> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let found = call(|| api.get_opt(pod)).await?;
        let phase = found.and_then(|pod| pod.status?.phase);
        Ok(phase.is_none_or(|phase| matches!(phase.as_str(), "Failed" | "Succeeded")))
    }
}

/// Calls the API. Retries while the connection fails, until the time limit of the whole call.
pub(super) async fn call<T, F: Future<Output = kube::Result<T>>>(attempt: impl Fn() -> F) -> Result<T, Refusal> {
    let mut last = None;
    let tried = async {
        loop {
            match attempt().await {
                Err(error @ (kube::Error::HyperError(_) | kube::Error::Service(_))) => last = Some(reason(&error)),
                Err(kube::Error::Api(status)) => {
                    break Err(Refusal { status: Some(status.code), reason: answered(status.code, &status.message) });
                }
                Err(error) => break Err(Refusal { status: None, reason: reason(&error) }),
                Ok(value) => break Ok(value),
            }
            tokio::time::sleep(PAUSE).await;
        }
    };
    match tokio::time::timeout(LIMIT, tried).await {
        Ok(done) => done,
        Err(_) => {
            let silence = || format!("Kubernetes' API has not answered for {} s", LIMIT.as_secs());
            Err(Refusal { status: None, reason: last.unwrap_or_else(silence) })
        }
    }
}

fn answered(status: u16, message: &str) -> String {
    let advice = if status == 403 { "; give the service account the rights of deploy/service/rbac.yaml" } else { "" };
    let message = if message.is_empty() { "no reason given" } else { message };
    format!("Kubernetes answered {status}: {message}{advice}")
}

/// Returns the innermost cause of an error, since the outer causes only name layers of the client.
pub(super) fn reason(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}
