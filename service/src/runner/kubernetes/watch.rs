//! Watches the Jobs and pods of the namespace, and reports jobs that have died.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::select;
use k8s_openapi::api::batch::v1 as batch;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::WatchStreamExt;
use kube::runtime::events::{Event as Told, EventType, Recorder, Reporter};
use kube::runtime::watcher::{Config, Event, watcher};
use kube::{Api, Resource};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::life::{self, Patience, Trouble};
use super::objects::{Cluster, JOB_LABEL, RECORDS_LABEL, call, reason};
use crate::records::Job;
use crate::runner::Death;

/// Labels by which a pod names its Job, the newer label first.
const JOB_NAMES: [&str; 2] = ["batch.kubernetes.io/job-name", "job-name"];

/// Duration of a watch request in seconds. The API then ends it and the next one begins, so that a silently cut
/// connection is noticed.
const WATCH_TIME: u32 = 60;

/// Interval at which lasting troubles are checked.
const TICK: Duration = Duration::from_secs(1);

/// Time for which a death is held back, so that a reason that reaches the job's record in that time takes precedence.
const BRIEF: Duration = Duration::from_secs(5);

/// Maximum length of an event's note in characters: Kubernetes accepts 1024 bytes, and a character has up to four.
const LONGEST_NOTE: usize = 250;

/// Watches until `deaths` is closed. A trouble that may pass by itself counts as a death after it has lasted for
/// `limit`.
pub(super) async fn run(cluster: &Cluster, limit: Duration, running: &[Job], deaths: mpsc::Sender<Death>) {
    let config = Config::default().timeout(WATCH_TIME);
    let jobs: Api<batch::Job> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
    let jobs = watcher(jobs, config.clone()).default_backoff();
    let pods = watcher(pods, config).default_backoff();
    let mut events = select(
        jobs.map(|event| event.map(|event| Seen::of(event, Source::Job, life::of_job))).boxed(),
        pods.map(|event| event.map(|event| Seen::of(event, Source::Pod, life::of_pod))).boxed(),
    );
    let mut sight = Sight::new(cluster, running);
    let mut tick = tokio::time::interval(TICK);
    loop {
        tokio::select! {
            () = deaths.closed() => return,
            Some(event) = events.next() => match event {
                Ok(event) => sight.see(event, Instant::now()),
                Err(error) => tracing::warn!(
                    "cannot watch jobs in the namespace {}: {}; will try again", cluster.namespace, reason(&error)
                ),
            },
            _ = tick.tick() => {}
        }
        for death in sight.due(Instant::now(), limit) {
            if deaths.send(death).await.is_err() {
                return;
            }
        }
    }
}

/// Records the death of a job as an event of its Kubernetes Job, which `kubectl describe` shows.
pub(super) async fn record_event(cluster: &Cluster, job: &Job, why: &str) -> Result<(), String> {
    let Some(name) = &job.kubernetes_job else { return Ok(()) };
    let jobs: Api<batch::Job> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
    let found = match call(|| jobs.get(name)).await {
        Err(refusal) if refusal.is_absence() => return Ok(()),
        found => found.map_err(|refusal| refusal.reason)?,
    };
    let reporter = Reporter { controller: "ims".into(), instance: None };
    let events = Recorder::new(cluster.client.clone(), reporter);
    let event = Told {
        type_: EventType::Warning,
        reason: "JobDied".into(),
        note: Some(why.chars().take(LONGEST_NOTE).collect()),
        action: "SetStatus".into(),
        secondary: None,
    };
    let regarding = found.object_ref(&());
    let recorded = call(|| events.publish(&event, &regarding)).await;
    recorded.map_err(|refusal| refusal.reason)
}

/// Kind of an object whose state shows how a job is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    Job,
    Pod,
}

/// Kind and name of an object whose state shows how a job is doing.
type Teller = (Source, String);

/// An event of the watch, reduced to what concerns jobs.
enum Seen {
    /// A listing of all objects of a kind begins.
    Begin(Source),
    /// An object exists, possibly in trouble.
    There { teller: Teller, labels: BTreeMap<String, String>, is_listed: bool, trouble: Option<Trouble> },
    /// An object is gone.
    Gone(Teller),
    /// The listing of all objects of a kind is complete.
    End(Source),
}

impl Seen {
    fn of<K: Resource>(event: Event<K>, source: Source, read: fn(&K) -> Option<Trouble>) -> Self {
        let teller = |object: &K| (source, object.meta().name.clone().unwrap_or_default());
        let there = |object: K, is_listed| Self::There {
            teller: teller(&object),
            labels: object.meta().labels.clone().unwrap_or_default(),
            is_listed,
            trouble: read(&object),
        };
        match event {
            Event::Init => Self::Begin(source),
            Event::InitApply(object) => there(object, true),
            Event::InitDone => Self::End(source),
            Event::Apply(object) => there(object, false),
            Event::Delete(object) => Self::Gone(teller(&object)),
        }
    }
}

/// State of the jobs as far as events have shown it.
struct Sight {
    records: String,
    /// Objects known to exist, each with the ID of its job.
    known: BTreeMap<Teller, String>,
    /// Objects named by the current listing; known objects that the listing does not name are gone.
    listed: BTreeSet<Teller>,
    /// Troubles that have not been reported yet, each with the ID of its job and the time of its beginning.
    troubles: BTreeMap<Teller, (String, Trouble, Instant)>,
    /// Jobs whose deaths were reported.
    reported: BTreeSet<String>,
}

impl Sight {
    fn new(cluster: &Cluster, running: &[Job]) -> Self {
        let is_here = |job: &&Job| job.kubernetes_namespace.as_ref() == Some(&cluster.namespace);
        let known = running.iter().filter(is_here).filter_map(|job| {
            let name = job.kubernetes_job.clone()?;
            Some(((Source::Job, name), job.id.clone()))
        });
        Self {
            records: cluster.records.clone(),
            known: known.collect(),
            listed: BTreeSet::new(),
            troubles: BTreeMap::new(),
            reported: BTreeSet::new(),
        }
    }

    /// Returns the ID of the job to which an object belongs: by our labels or, for objects that upstream's service
    /// created, by the name of the Kubernetes Job.
    fn job(&self, teller: &Teller, labels: &BTreeMap<String, String>) -> Option<String> {
        if let Some(job) = labels.get(JOB_LABEL) {
            return (labels.get(RECORDS_LABEL) == Some(&self.records)).then(|| job.clone());
        }
        let name = match teller.0 {
            Source::Job => Some(&teller.1),
            Source::Pod => JOB_NAMES.iter().find_map(|name| labels.get(*name)),
        };
        self.known.get(&(Source::Job, name?.clone())).cloned()
    }

    fn see(&mut self, event: Seen, now: Instant) {
        match event {
            Seen::Begin(source) => self.listed.retain(|teller| teller.0 != source),
            Seen::There { teller, labels, is_listed, trouble } => {
                let Some(job) = self.job(&teller, &labels) else { return };
                if is_listed {
                    self.listed.insert(teller.clone());
                }
                self.known.insert(teller.clone(), job.clone());
                self.set(teller, job, trouble, now);
            }
            Seen::Gone(teller) => self.gone(&teller, now),
            Seen::End(source) => {
                let lost = self.known.keys().filter(|teller| teller.0 == source && !self.listed.contains(teller));
                for teller in lost.cloned().collect::<Vec<_>>() {
                    self.gone(&teller, now);
                }
            }
        }
    }

    fn set(&mut self, teller: Teller, job: String, trouble: Option<Trouble>, now: Instant) {
        let Some(trouble) = trouble else {
            self.troubles.remove(&teller);
            return;
        };
        let before = self.troubles.get(&teller).filter(|(_, before, _)| before.patience == trouble.patience);
        let since = before.map_or(now, |(.., since)| *since);
        self.troubles.insert(teller, (job, trouble, since));
    }

    fn gone(&mut self, teller: &Teller, now: Instant) {
        let Some(job) = self.known.remove(teller) else { return };
        match teller.0 {
            // The wait is long enough if the service itself deleted the job: the record is then gone, and the report
            // has no effect.
            Source::Job => {
                let reason = format!("its Job {} was deleted", teller.1);
                self.set(teller.clone(), job, Some(Trouble { reason, patience: Patience::Brief }), now);
            }
            // Drop only long troubles, which end with the pod. Another trouble may be the reason why the pod was
            // removed.
            Source::Pod => {
                self.troubles.retain(|other, (_, trouble, _)| other != teller || trouble.patience != Patience::Long);
            }
        }
    }

    /// Returns the deaths that are to be reported now.
    fn due(&mut self, now: Instant, limit: Duration) -> Vec<Death> {
        let is_due = |patience, since| match patience {
            Patience::None => true,
            Patience::Brief => now >= since + BRIEF,
            Patience::Long => now >= since + limit,
        };
        let due = self.troubles.extract_if(.., |_, (_, trouble, since)| is_due(trouble.patience, *since));
        let mut deaths = Vec::new();
        for (_, (id, trouble, _)) in due {
            if self.reported.insert(id.clone()) {
                deaths.push(Death { id, reason: trouble.reason });
            }
        }
        // Forget reported jobs of which no object exists any more: no further events concern them.
        self.reported
            .retain(|id| deaths.iter().any(|death| death.id == *id) || self.known.values().any(|job| job == id));
        deaths
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sight() -> Sight {
        let known = [((Source::Job, "old".to_owned()), "1".to_owned())];
        let (listed, troubles, reported) = Default::default();
        Sight { records: "db".into(), known: known.into(), listed, troubles, reported }
    }

    fn there(source: Source, name: &str, labels: &[(&str, &str)], patience: Option<Patience>) -> Seen {
        let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let trouble = patience.map(|patience| Trouble { reason: format!("{name} ails"), patience });
        Seen::There { teller: (source, name.into()), labels, is_listed: true, trouble }
    }

    /// Returns the ID and reason of each death that is reported `seconds` after `began`.
    fn told(sight: &mut Sight, began: Instant, seconds: u64) -> Vec<(String, String)> {
        let deaths = sight.due(began + Duration::from_secs(seconds), Duration::from_mins(1));
        deaths.into_iter().map(|death| (death.id, death.reason)).collect()
    }

    fn pair(id: &str, reason: &str) -> (String, String) {
        (id.into(), reason.into())
    }

    #[test]
    fn dead_pod_is_reported_once_and_at_once() {
        let (mut sight, began) = (sight(), Instant::now());
        let labels = [(JOB_LABEL, "2"), (RECORDS_LABEL, "db")];
        for _ in 0..2 {
            sight.see(there(Source::Pod, "p", &labels, Some(Patience::None)), began);
        }
        assert_eq!(told(&mut sight, began, 0), [pair("2", "p ails")]);
        sight.see(there(Source::Pod, "p", &labels, Some(Patience::None)), began);
        assert_eq!(told(&mut sight, began, 9), []);
        let others = [(JOB_LABEL, "3"), (RECORDS_LABEL, "another database")];
        sight.see(there(Source::Pod, "q", &others, Some(Patience::None)), began);
        assert_eq!(told(&mut sight, began, 99), [], "another service's");
    }

    #[test]
    fn pods_of_jobs_that_upstream_has_started_are_found_by_their_job() {
        let (mut sight, began) = (sight(), Instant::now());
        sight.see(there(Source::Pod, "p", &[("job-name", "old")], Some(Patience::None)), began);
        sight.see(there(Source::Pod, "q", &[("job-name", "unknown")], Some(Patience::None)), began);
        assert_eq!(told(&mut sight, began, 0), [pair("1", "p ails")]);
    }

    #[test]
    fn trouble_that_passes_is_not_reported() {
        let (mut sight, began) = (sight(), Instant::now());
        let labels = [(JOB_LABEL, "2"), (RECORDS_LABEL, "db")];
        sight.see(there(Source::Pod, "p", &labels, Some(Patience::Long)), began);
        assert_eq!(told(&mut sight, began, 59), []);
        sight.see(there(Source::Pod, "p", &labels, None), began);
        assert_eq!(told(&mut sight, began, 99), []);
        sight.see(there(Source::Pod, "p", &labels, Some(Patience::Long)), began + Duration::from_secs(100));
        sight.see(there(Source::Pod, "p", &labels, Some(Patience::Long)), began + Duration::from_secs(140));
        assert_eq!(told(&mut sight, began, 159), []);
        assert_eq!(told(&mut sight, began, 160), [pair("2", "p ails")], "counted from its beginning");
    }

    #[test]
    fn job_that_is_missing_from_a_new_list_was_deleted() {
        let (mut sight, began) = (sight(), Instant::now());
        let labels = [(JOB_LABEL, "2"), (RECORDS_LABEL, "db")];
        sight.see(Seen::Begin(Source::Job), began);
        sight.see(there(Source::Job, "new", &labels, None), began);
        sight.see(Seen::End(Source::Job), began);
        assert_eq!(told(&mut sight, began, 4), []);
        assert_eq!(told(&mut sight, began, 5), [pair("1", "its Job old was deleted")]);
        // The watch starts over, as it does after 410 Gone.
        sight.see(Seen::Begin(Source::Job), began);
        sight.see(Seen::End(Source::Job), began);
        assert_eq!(told(&mut sight, began, 9), [pair("2", "its Job new was deleted")]);
    }
}
