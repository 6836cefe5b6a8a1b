//! Decides whether a job has died, from nothing but the state of its pods and of its Kubernetes Job.

use k8s_openapi::api::batch::v1 as batch;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

/// A condition that has ended a job, or will end it if it lasts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trouble {
    /// Reason, for people.
    pub(super) reason: String,
    /// Time that the trouble may take to pass by itself, or the job to report its end.
    pub(super) patience: Patience,
}

/// Time that a trouble may last before it counts as the job's death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    /// No time: the job is dead.
    None,
    /// Some seconds: the job may have ended or been removed, and its record may soon say so.
    Brief,
    /// Some minutes: a registry may come back, or a node become free.
    Long,
}

/// Reasons why a container waits that do not pass by themselves.
const FINAL: [&str; 2] = ["ErrImageNeverPull", "InvalidImageName"];

/// Reasons why a container waits that may pass by themselves.
const PASSING: [&str; 9] = [
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
    "ErrImagePull",
    "ImageInspectError",
    "ImagePullBackOff",
    "RegistryUnavailable",
    "RunContainerError",
    "SignatureValidationFailed",
];

fn trouble(reason: String, patience: Patience) -> Trouble {
    Trouble { reason, patience }
}

/// Returns the trouble that the state of a pod shows, if any.
pub(super) fn of_pod(pod: &Pod) -> Option<Trouble> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let status = pod.status.as_ref()?;
    let containers = || status.init_container_statuses.iter().chain(&status.container_statuses).flatten();
    let is_run_once = pod.spec.as_ref().and_then(|spec| spec.restart_policy.as_deref()) == Some("Never");
    let why = |reason: Option<&str>, message: Option<&str>| {
        let words: Vec<_> = [reason, message].into_iter().flatten().filter(|word| !word.is_empty()).collect();
        words.join(": ")
    };
    let ended = containers().find_map(|container| failure(container).map(|why| format!("pod {name}: {why}")));
    if status.phase.as_deref() == Some("Failed") {
        let why = why(status.reason.as_deref(), status.message.as_deref());
        let reason = match (why.is_empty(), ended) {
            (true, Some(ended)) => ended,
            (true, None) => format!("pod {name} has failed"),
            (false, ended) => {
                format!("pod {name} has failed: {why}{}", ended.map(|e| format!("; {e}")).unwrap_or_default())
            }
        };
        return Some(trouble(reason, Patience::None));
    }
    if is_run_once && let Some(ended) = ended {
        return Some(trouble(ended, Patience::None));
    }
    let condition = |kind: &str| status.conditions.iter().flatten().find(|condition| condition.type_ == kind);
    if pod.metadata.deletion_timestamp.is_some() {
        let disruption = condition("DisruptionTarget").filter(|condition| condition.status == "True");
        let why = disruption.map(|c| why(c.reason.as_deref(), c.message.as_deref())).filter(|why| !why.is_empty());
        let why = why.unwrap_or_else(|| "it was deleted".into());
        return Some(trouble(format!("pod {name} is being removed: {why}"), Patience::Brief));
    }
    if let Some(trouble) = containers().find_map(|container| waiting(name, container)) {
        return Some(trouble);
    }
    if status.phase.as_deref() != Some("Pending") {
        return None;
    }
    if let Some(scheduled) = condition("PodScheduled").filter(|condition| condition.status == "False") {
        let why = why(scheduled.reason.as_deref(), scheduled.message.as_deref());
        return Some(trouble(format!("no node takes pod {name}: {why}"), Patience::Long));
    }
    let has_begun = |container: &ContainerStatus| {
        container.state.as_ref().is_some_and(|state| state.running.is_some() || state.terminated.is_some())
    };
    if containers().any(has_begun) {
        return None;
    }
    let reason = format!(
        "no container of pod {name} has started: it waits for its volumes or its container images; 'kubectl describe' \
         shows more"
    );
    Some(trouble(reason, Patience::Long))
}

/// Returns the trouble that the state of a Kubernetes Job shows, if any.
pub(super) fn of_job(job: &batch::Job) -> Option<Trouble> {
    let name = job.metadata.name.as_deref().unwrap_or_default();
    let conditions = job.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.filter(|condition| condition.status == "True").find_map(|condition| match condition.type_.as_str() {
        // Wait briefly: the pod itself gives a better reason, at about the same time.
        "Failed" => {
            let words: Vec<_> = [&condition.reason, &condition.message].into_iter().flatten().cloned().collect();
            Some(trouble(format!("Job {name} has failed: {}", words.join(": ")), Patience::Brief))
        }
        "Complete" => {
            let why = format!("Job {name} is complete, but its programs have not reported a result");
            Some(trouble(why, Patience::Brief))
        }
        _ => None,
    })
}

/// Describes the failure of a container that has ended.
fn failure(container: &ContainerStatus) -> Option<String> {
    let ended = container.state.as_ref()?.terminated.as_ref().filter(|ended| ended.exit_code != 0)?;
    let reason = ended.reason.as_deref().filter(|reason| !matches!(*reason, "" | "Error"));
    let message = ended.message.as_deref().map(str::trim).filter(|message| !message.is_empty());
    let why: Vec<_> = [reason, message].into_iter().flatten().collect();
    let why = if why.is_empty() { String::new() } else { format!(": {}", why.join(": ")) };
    Some(format!("container {} ended with exit code {}{why}", container.name, ended.exit_code))
}

/// Returns the trouble of a container that waits for an unusual reason.
fn waiting(pod: &str, container: &ContainerStatus) -> Option<Trouble> {
    let waiting = container.state.as_ref()?.waiting.as_ref()?;
    let reason = waiting.reason.as_deref()?;
    let patience = match () {
        () if FINAL.contains(&reason) => Patience::None,
        () if PASSING.contains(&reason) => Patience::Long,
        () => return None,
    };
    let message = waiting.message.as_deref().map(|message| format!(": {message}")).unwrap_or_default();
    Some(trouble(format!("pod {pod}: container {} does not start: {reason}{message}", container.name), patience))
}

// `json!(…)` as an argument reads better without a reference.
#[allow(clippy::needless_pass_by_value)]
#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(status: Value) -> Option<(String, Patience)> {
        let pod = json!({
            "metadata": {"name": "p"}, "spec": {"containers": [], "restartPolicy": "Never"}, "status": status,
        });
        of_pod(&serde_json::from_value(pod).unwrap()).map(|trouble| (trouble.reason, trouble.patience))
    }

    fn container(name: &str, state: Value) -> Value {
        json!({"name": name, "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state})
    }

    #[test]
    fn pods_that_wait_run_or_end_well_are_no_trouble() {
        let running = container("sshd", json!({"running": {}}));
        let done = container("prepare", json!({"terminated": {"exitCode": 0, "reason": "Completed"}}));
        let initializing = container("sshd", json!({"waiting": {"reason": "PodInitializing"}}));
        for status in [
            json!({}),
            json!({"phase": "Running", "initContainerStatuses": [done], "containerStatuses": [running]}),
            json!({"phase": "Pending", "initContainerStatuses": [running], "containerStatuses": [initializing]}),
            json!({"phase": "Succeeded", "containerStatuses": [done]}),
        ] {
            assert_eq!(pod(status.clone()), None, "{status}");
        }
    }

    #[test]
    fn dead_pods_are_told_with_their_reason() {
        let killed = json!({"terminated": {"exitCode": 137, "reason": "OOMKilled"}});
        let failed = json!({"terminated": {"exitCode": 1, "reason": "Error", "message": "cannot x\n"}});
        let running = container("sshd", json!({"running": {}}));
        for (status, reason) in [
            (
                json!({"phase": "Running", "containerStatuses": [running, container("sidecar", killed.clone())]}),
                "pod p: container sidecar ended with exit code 137: OOMKilled",
            ),
            (
                json!({"phase": "Failed", "initContainerStatuses": [container("prepare", failed)]}),
                "pod p: container prepare ended with exit code 1: cannot x",
            ),
            (
                json!({"phase": "Failed", "reason": "Evicted", "message": "The node was low on memory.",
                    "containerStatuses": [container("sshd", killed)]}),
                "pod p has failed: Evicted: The node was low on memory.; pod p: container sshd ended with exit code 137: \
                 OOMKilled",
            ),
            (json!({"phase": "Failed"}), "pod p has failed"),
            (
                json!({"phase": "Pending", "containerStatuses":
                    [container("sshd", json!({"waiting": {"reason": "InvalidImageName", "message": "a b"}}))]}),
                "pod p: container sshd does not start: InvalidImageName: a b",
            ),
        ] {
            assert_eq!(pod(status.clone()), Some((reason.into(), Patience::None)), "{status}");
        }
    }

    #[test]
    fn pods_that_may_recover_are_waited_for() {
        let pulling = json!({"waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}});
        let unscheduled =
            json!([{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3"}]);
        let creating = container("sshd", json!({"waiting": {"reason": "ContainerCreating"}}));
        for (status, reason) in [
            (
                json!({"phase": "Pending", "containerStatuses": [container("sshd", pulling)]}),
                "pod p: container sshd does not start: ImagePullBackOff: no such tag",
            ),
            (json!({"phase": "Pending", "conditions": unscheduled}), "no node takes pod p: Unschedulable: 0/3"),
            (json!({"phase": "Pending", "containerStatuses": [creating]}), "no container of pod p has started"),
        ] {
            let (found, patience) = pod(status.clone()).unwrap();
            assert!(found.starts_with(reason) && patience == Patience::Long, "{status}: {found}");
        }
        let deleted = json!({
            "metadata": {"name": "p", "deletionTimestamp": "2026-01-01T00:00:00Z"},
            "status": {"phase": "Running", "conditions":
                [{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "drained"}]},
        });
        let found = of_pod(&serde_json::from_value(deleted).unwrap()).unwrap();
        assert_eq!(found.reason, "pod p is being removed: EvictionByEvictionAPI: drained");
        assert_eq!(found.patience, Patience::Brief);
    }

    #[test]
    fn jobs_that_end_without_a_report_are_told() {
        let job = |conditions: Value| {
            let job = json!({"metadata": {"name": "j"}, "status": {"conditions": conditions}});
            of_job(&serde_json::from_value(job).unwrap()).map(|trouble| trouble.reason)
        };
        assert_eq!(job(json!([])), None);
        assert_eq!(job(json!([{"type": "Suspended", "status": "True"}, {"type": "Failed", "status": "False"}])), None);
        let failed = json!([{"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "too long"}]);
        assert_eq!(job(failed).unwrap(), "Job j has failed: DeadlineExceeded: too long");
        let complete = json!([{"type": "Complete", "status": "True"}]);
        assert!(job(complete).unwrap().starts_with("Job j is complete"));
    }
}
