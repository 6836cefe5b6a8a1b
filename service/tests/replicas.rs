//! Two services with one PostgreSQL and one cluster.

use std::collections::BTreeSet;
use std::time::Duration;

use ims_service::database::{Database, Place};
use ims_service::records::{Job, Kind};
use serde_json::{Value, json};
use testbed::kubernetes::Fault;
use testbed::{wait_until, wait_within};

use crate::kubernetes::{JOBS, Site};
use crate::postgres::Postgres;
use crate::server::{Answer, Server, try_ask};

/// Two replicas: the one of the site, and another one.
struct Replicas {
    site: Site,
    other: Server,
    _data: tempfile::TempDir,
    postgres: Postgres,
}

impl Replicas {
    fn start() -> Self {
        let (postgres, data) = (Postgres::start(), tempfile::tempdir().unwrap());
        let url = postgres.url();
        let variables = [("IMS_DATABASE_URL", url.as_str())];
        let site = Site::with(&variables);
        let other = site.beside(data.path(), &variables);
        Self { site, other, _data: data, postgres }
    }

    /// Body of a POST of a customize job.
    fn job(&self) -> Value {
        json!({
            "artifact_id": self.site.image("x86_64"), "public_key_id": self.site.key(), "job_type": "customize",
            "image_root_archive_name": "new",
        })
    }

    /// Number of objects of a plural.
    fn count(&self, plural: &str) -> usize {
        self.site.cluster.all(plural).len()
    }

    /// Requests of this method since the `first` one.
    fn since(&self, first: usize, method: &str) -> Vec<String> {
        let requests = self.site.cluster.state().requests[first..].to_vec();
        requests.into_iter().filter(|request| request.starts_with(method)).collect()
    }
}

#[test]
fn replicas_start_each_job_once_and_roll_a_failed_start_back_once() {
    let replicas = Replicas::start();
    let (site, job) = (&replicas.site, replicas.job());
    let body = &job;
    let both = [site.server(), &replicas.other];
    let answers: Vec<Answer> = std::thread::scope(|scope| {
        let posts =
            both.iter().flat_map(|server| [server; 4]).map(|server| scope.spawn(move || server.post("/v3/jobs", body)));
        posts.collect::<Vec<_>>().into_iter().map(|post| post.join().unwrap()).collect()
    });
    let ids: BTreeSet<_> = answers.iter().map(Answer::id).collect();
    for server in both {
        let listed = server.get("/v3/jobs").good();
        let listed: BTreeSet<_> =
            listed.as_array().unwrap().iter().map(|job| job["id"].as_str().unwrap().to_owned()).collect();
        assert_eq!(listed, ids);
    }
    assert_eq!((ids.len(), replicas.count("jobs"), replicas.count("configmaps")), (8, 8, 8));
    assert_eq!(replicas.since(0, &format!("POST {JOBS}")).len(), 8, "each Job was asked for once");

    // A start that fails is rolled back by the replica that has begun it.
    let first = site.cluster.state().requests.len();
    site.cluster.fail(&format!("POST {JOBS}"), Fault::Status(403), 1);
    assert_eq!(replicas.other.post("/v3/jobs", body).status, 500);
    let deleted = replicas.since(first, "DELETE");
    let distinct: BTreeSet<_> = deleted.iter().collect();
    assert_eq!((deleted.len(), distinct.len()), (4, 4), "{deleted:?}");
    assert_eq!((replicas.count("jobs"), replicas.count("services")), (8, 8));

    // An end that both are told of, and a deletion.
    let one = format!("/v3/jobs/{}", ids.first().unwrap());
    let told = |server: &Server, method: &str| server.send(method, &one, &json!({"status": "success"})).status;
    let at_once = |method: &str| -> Vec<u16> {
        std::thread::scope(|scope| {
            let asked = both.map(|server| scope.spawn(move || told(server, method)));
            asked.into_iter().map(|asked| asked.join().unwrap()).collect()
        })
    };
    assert_eq!(at_once("PATCH"), [200, 200]);
    assert!(at_once("DELETE").iter().all(|status| [204, 404].contains(status)));
    assert_eq!((replicas.count("jobs"), replicas.count("services"), replicas.count("configmaps")), (7, 7, 7));
}

#[test]
fn death_of_a_job_is_recorded_once_by_replicas() {
    let mut replicas = Replicas::start();
    let jobs: Vec<Value> = (0..3).map(|_| replicas.site.server().post("/v3/jobs", &replicas.job()).good()).collect();
    let events = |replicas: &Replicas, job: &Value| {
        let events = replicas.site.cluster.all("events");
        events.iter().filter(|event| event["regarding"]["name"] == job["kubernetes_job"]).count()
    };
    for job in &jobs[..2] {
        replicas.site.pod(job, json!({"phase": "Failed", "message": "lost"}));
        wait_until("an event", || events(&replicas, job) > 0);
        assert_eq!(replicas.site.status(job), "error");
    }
    // The other one, alone now, has seen the first deaths before this one.
    replicas.site.kill();
    replicas.site.pod(&jobs[2], json!({"phase": "Failed", "message": "lost"}));
    wait_until("the event of the last death", || events(&replicas, &jobs[2]) > 0);
    for job in &jobs {
        assert_eq!(events(&replicas, job), 1);
        let path = format!("/v3/jobs/{}", job["id"].as_str().unwrap());
        assert_eq!(replicas.other.get(&path).good()["status"], "error");
    }
}

#[test]
fn start_that_a_killed_replica_has_left_is_rolled_back_by_the_other() {
    let mut replicas = Replicas::start();
    let kept = replicas.site.job();
    let body = replicas.job();
    replicas.site.cluster.fail(&format!("POST {JOBS}"), Fault::Silence, 1);
    let address = replicas.site.server().address;
    let asked = std::thread::spawn(move || {
        try_ask(address, "POST", "/v3/jobs", "content-type: application/json\r\n", body.to_string()).is_err()
    });
    wait_until("its Job to be asked for", || replicas.since(0, &format!("POST {JOBS}")).len() == 2);
    replicas.site.kill();
    assert!(asked.join().unwrap());
    // Another replica might be at a start that is young.
    let aged = async {
        let database = Database::open(Place::Url(&replicas.postgres.url())).await.unwrap();
        let starting: Vec<Job> = database.all_in(Kind::Starting).await.unwrap();
        assert_eq!(starting.len(), 1);
        assert_eq!(replicas.count("configmaps"), 2, "it is left alone");
        let mut change = database.change(&[Kind::Starting]).await.unwrap();
        for mut job in starting {
            job.created = "2026-01-01T00:00:00".into();
            change.insert_into(Kind::Starting, &job).await.unwrap();
        }
        change.commit().await.unwrap();
        database
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let database = runtime.block_on(aged);
    wait_within(Duration::from_mins(4), "the start to be rolled back", || {
        let names = replicas.site.cluster.names();
        let id = kept["id"].as_str().unwrap();
        names.iter().all(|name| name.contains(id)) && runtime.block_on(database.ids(Kind::Starting)).unwrap().is_empty()
    });
    assert_eq!((replicas.count("jobs"), replicas.count("configmaps")), (1, 1), "the other job stays");
    runtime.block_on(database.close());
}
