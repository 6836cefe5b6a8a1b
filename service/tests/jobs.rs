//! Jobs: checks, records, filters, and what a runner is told.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use clap::Parser;
use ims_service::connections::{self, Connections};
use ims_service::database::{Database, Place};
use ims_service::http::access::Access;
use ims_service::http::{Service, router};
use ims_service::records::{Address, Job};
use ims_service::runner::{Death, Failures, NewJob, Runner, Started};
use ims_service::settings::Settings;
use ims_service::store::Store;
use serde_json::{Value, json};
use testbed::s3_server::Bucket;
use tokio::sync::mpsc;

use crate::server::{Answer, Server, ask};

/// A runner that keeps what it was told, and fails when a job's name says so.
#[derive(Default)]
struct Recorder {
    started: Mutex<Vec<NewJob>>,
    told: Mutex<Vec<String>>,
    failing: Mutex<Option<String>>,
    deaths: Mutex<Option<mpsc::Sender<Death>>>,
}

impl Recorder {
    fn tell(&self, what: &str, job: &Job) -> Result<(), Failures> {
        self.told.lock().unwrap().push(format!("{what} {}", job.id));
        match &*self.failing.lock().unwrap() {
            Some(failing) if failing == what => Err(vec![format!("cannot {what} the job: refused")]),
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl Runner for Recorder {
    async fn start(&self, new: &NewJob) -> Result<Started, Failures> {
        self.started.lock().unwrap().push(new.clone());
        self.tell("start", &new.job)?;
        let mut job = new.job.clone();
        job.kubernetes_service = Some(format!("cray-ims-{}-service", job.id));
        if let Some(container) = job.ssh_containers.as_mut().and_then(|list| list.first_mut()) {
            let address = Address { host: "h".into(), port: 22, host_key: None };
            container.connection_info = Some(BTreeMap::from([("cluster.local".into(), address)]));
        }
        Ok(job)
    }

    async fn release(&self, job: &Job) -> Result<(), Failures> {
        self.tell("release", job)
    }

    async fn remove(&self, job: &Job) -> Result<(), Failures> {
        self.tell("remove", job)
    }

    async fn watch(&self, _running: Vec<Job>, deaths: mpsc::Sender<Death>) {
        *self.deaths.lock().unwrap() = Some(deaths);
    }
}

/// A service of this process, with a runner of the test's own.
struct Running {
    address: SocketAddr,
    runner: Arc<Recorder>,
    service: Arc<Service>,
    bucket: Bucket,
    runtime: tokio::runtime::Runtime,
    _data: tempfile::TempDir,
}

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    settings: Settings,
}

impl Running {
    fn start() -> Self {
        let (data, bucket, runner) = (tempfile::tempdir().unwrap(), Bucket::new(), Arc::new(Recorder::default()));
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let arguments = ["x", "--s3-endpoint", &bucket.endpoint, "--s3-access-key", "a", "--s3-secret-key", "secret"];
        let settings = Arguments::parse_from(arguments.iter().chain(&["--listen", "127.0.0.1:0"])).settings;
        let store = Store::open(&settings).unwrap();
        let (address, service) = runtime.block_on(async {
            let database = Database::open(Place::File(&data.path().join("db"))).await.unwrap();
            let service = Arc::new(Service::new(settings, database, store, runner.clone(), Access::All));
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let app = router(service.clone());
            tokio::spawn(async move {
                let (_stop, stopping) = tokio::sync::watch::channel(false);
                Connections::new(app, stopping).accept(listener, None, connections::remote).await;
            });
            (address, service)
        });
        Self { address, runner, service, bucket, runtime, _data: data }
    }

    fn send(&self, method: &str, path: &str, body: &Value) -> Answer {
        ask(self.address, method, path, "content-type: application/json\r\n", body.to_string())
    }

    fn key(&self) -> String {
        self.send("POST", "/public-keys", &json!({"name": "n", "public_key": "ssh-ed25519 A\n"})).id()
    }

    fn link(&self, key: &str) -> Value {
        json!({ "path": format!("s3://{}/{key}", self.bucket.name), "etag": "", "type": "s3" })
    }

    fn recipe(&self, fields: Value) -> String {
        let key = ims_service::records::new_id();
        self.bucket.put(&key, b"recipe");
        let mut recipe = json!({
            "name": "r", "recipe_type": "kiwi-ng", "linux_distribution": "sles15", "link": self.link(&key),
        });
        recipe.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        self.send("POST", "/recipes", &recipe).id()
    }

    fn image(&self, arch: &str) -> String {
        let name = ims_service::records::new_id();
        self.bucket.put(&format!("{name}/rootfs"), b"rootfs");
        let kind = "application/vnd.cray.image.rootfs.squashfs";
        let artifact = json!({"link": self.link(&format!("{name}/rootfs")), "type": kind, "md5": "d41d8cd9"});
        let manifest = json!({"version": "1.0", "artifacts": [artifact]}).to_string();
        self.bucket.put(&format!("{name}/manifest.json"), manifest.as_bytes());
        let image = json!({"name": "i", "arch": arch, "link": self.link(&format!("{name}/manifest.json"))});
        self.send("POST", "/images", &image).id()
    }

    fn job(&self, kind: &str, artifact: &str, key: &str, fields: Value) -> Answer {
        let mut job = json!({
            "artifact_id": artifact, "public_key_id": key, "job_type": kind, "image_root_archive_name": "new",
        });
        job.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        self.send("POST", "/v3/jobs", &job)
    }

    fn last(&self) -> NewJob {
        self.runner.started.lock().unwrap().last().unwrap().clone()
    }
}

#[test]
fn a_customize_job_is_started_as_cfs_asks() {
    let running = Running::start();
    let (key, image) = (running.key(), running.image("x86_64"));
    let containers = json!([{"name": "cfs-1", "jail": true}]);
    let answer = running.job("customize", &image, &key, json!({"ssh_containers": containers, "build_env_size": "15"}));
    assert_eq!(answer.status, 201, "{answer:?}");
    let record = answer.good();
    let (id, created) = (record["id"].as_str().unwrap(), record["created"].as_str().unwrap());
    assert_eq!(
        answer.body.replace(id, "ID").replace(created, "TIME").replace(&image, "IMAGE").replace(&key, "KEY"),
        "{\"artifact_id\": \"IMAGE\", \"public_key_id\": \"KEY\", \"job_type\": \"customize\", \
         \"image_root_archive_name\": \"new\", \"enable_debug\": false, \"build_env_size\": 15, \
         \"kernel_file_name\": \"vmlinuz\", \"initrd_file_name\": \"initrd\", \
         \"kernel_parameters_file_name\": \"kernel-parameters\", \"ssh_containers\": [{\"name\": \"cfs-1\", \
         \"jail\": true, \"status\": \"pending\", \"connection_info\": {\"cluster.local\": {\"host\": \"h\", \
         \"port\": 22}}}], \"require_dkms\": true, \"job_mem_size\": 8, \"id\": \"ID\", \"created\": \"TIME\", \
         \"kubernetes_job\": null, \"kubernetes_service\": \"cray-ims-ID-service\", \"kubernetes_configmap\": null, \
         \"kubernetes_namespace\": null, \"status\": \"creating\", \"resultant_image_id\": null, \
         \"arch\": \"x86_64\", \"kubernetes_pvc\": null, \"remote_build_node\": \"\", \"kubernetes_secret\": null}\n"
    );
    let new = running.last();
    assert_eq!((new.public_key.as_str(), new.download_md5sum.as_str()), ("ssh-ed25519 A\n", "d41d8cd9"));
    // The URL reads the rootfs without credentials.
    let url = new.download_url.strip_prefix(&format!("{}/", running.bucket.endpoint)).unwrap();
    let port = running.bucket.endpoint.rsplit(':').next().unwrap().parse().unwrap();
    assert_eq!(testbed::s3_server::ask(port, "GET", &format!("/{url}"), b"").body, b"rootfs");

    // A key that is deleted as soon as the container answers does not stop the job; the job's end releases.
    assert_eq!(running.send("DELETE", &format!("/public-keys/{key}"), &Value::Null).status, 204);
    let one = format!("/v3/jobs/{id}");
    *running.runner.failing.lock().unwrap() = Some("release".into());
    let refused = running.send("PATCH", &one, &json!({"status": "success"}));
    assert_eq!((refused.status, refused.json()["errors"][0].is_string()), (500, true));
    assert_eq!(running.send("GET", &one, &Value::Null).json()["status"], "creating", "may be tried again");
    *running.runner.failing.lock().unwrap() = None;
    assert_eq!(running.send("PATCH", &one, &json!({"status": "success"})).good()["status"], "success");
    *running.runner.failing.lock().unwrap() = Some("remove".into());
    assert_eq!(running.send("DELETE", &one, &Value::Null).status, 500);
    assert_eq!(running.send("DELETE", "/v3/jobs", &Value::Null).status, 500);
    *running.runner.failing.lock().unwrap() = None;
    assert_eq!(running.send("DELETE", &one, &Value::Null).status, 204);
    let told = running
        .runner
        .told
        .lock()
        .unwrap()
        .iter()
        .map(|told| told.split(' ').next().unwrap().to_owned())
        .collect::<Vec<_>>();
    assert_eq!(told, ["start", "release", "release", "remove", "remove", "remove"]);
}

#[test]
fn dkms_kernel_and_containers_follow_the_artifact() {
    let running = Running::start();
    let key = running.key();
    let plain = running.recipe(json!({"require_dkms": false, "template_dictionary": [
        {"key": "a", "value": "1"}, {"key": "b", "value": "x"}, {"key": "a", "value": "2"},
    ]}));
    let arm = running.recipe(json!({"arch": "aarch64", "require_dkms": false, "template_dictionary": null}));
    let image = running.image("x86_64");
    for (kind, artifact, fields, dkms, kernel, container) in [
        ("create", &plain, json!({}), false, "vmlinuz", None),
        ("create", &plain, json!({"require_dkms": "yes", "kernel_file_name": ""}), true, "vmlinuz", None),
        ("create", &plain, json!({"enable_debug": 1, "ssh_containers": null}), false, "vmlinuz", Some("debug")),
        ("create", &arm, json!({"require_dkms": false}), true, "Image", None),
        ("customize", &image, json!({"kernel_file_name": "k"}), true, "k", Some("customize")),
        ("customize", &image, json!({"require_dkms": false}), false, "vmlinuz", Some("customize")),
    ] {
        let job = running.job(kind, artifact, &key, fields.clone()).good();
        assert_eq!((&job["require_dkms"], &job["kernel_file_name"]), (&json!(dkms), &json!(kernel)), "{fields}");
        assert_eq!(job["ssh_containers"][0]["name"].as_str(), container, "{fields}");
    }
    running.job("create", &plain, &key, json!({}));
    let dictionary = [("a", "2"), ("b", "x")].map(|(key, value)| (key.to_owned(), value.to_owned()));
    assert_eq!(running.last().template_dictionary, BTreeMap::from(dictionary));
    assert_eq!(running.last().recipe_type.as_deref(), Some("kiwi-ng"));
}

#[test]
fn a_start_that_fails_or_is_cut_off_leaves_nothing() {
    let running = Running::start();
    let (key, recipe) = (running.key(), running.recipe(json!({})));
    *running.runner.failing.lock().unwrap() = Some("start".into());
    let refused = running.job("create", &recipe, &key, json!({}));
    assert_eq!((refused.status, refused.json()["errors"][0].as_str()), (500, Some("cannot start the job: refused")));
    assert_eq!(running.send("GET", "/jobs", &Value::Null).body, "[]\n");
    *running.runner.failing.lock().unwrap() = None;
    // As after a kill: the ID is recorded, and the record of the job is not.
    let job = running.last().job;
    running.runtime.block_on(async {
        let kind = ims_service::records::Kind::Starting;
        let mut change = running.service.database.change(&[kind]).await.unwrap();
        change.insert_into(kind, &job).await.unwrap();
        change.commit().await.unwrap();
        let starts = running.service.starts(chrono::TimeDelta::zero()).await;
        running.service.clear_starts(starts).await;
        assert_eq!(running.service.database.ids(kind).await.unwrap(), [""; 0]);
    });
    assert_eq!(running.runner.told.lock().unwrap().last(), Some(&format!("remove {}", job.id)));
}

#[test]
fn a_job_whose_pod_dies_is_an_error() {
    let running = Running::start();
    let (key, recipe) = (running.key(), running.recipe(json!({})));
    let ids = [0, 1].map(|_| running.job("create", &recipe, &key, json!({})).id());
    let path = |id: &String| format!("/jobs/{id}");
    running.send("PATCH", &path(&ids[1]), &json!({"status": "success"}));
    running.runtime.block_on(async {
        for id in ids.clone() {
            running.service.job_died(&Death { id, reason: "OOMKilled".into() }).await.unwrap();
        }
    });
    let status = |id: &String| running.send("GET", &path(id), &Value::Null).json()["status"].clone();
    assert_eq!((status(&ids[0]), status(&ids[1])), (json!("error"), json!("success")));
    let metrics = ask(running.address, "GET", "/metrics", "", "").body;
    assert!(metrics.contains("ims_jobs{status=\"error\"} 1"), "{metrics}");
}
const NO_ID: &str = "46a2731e-a1d0-4f98-ba92-4f78c756bb12";

#[test]
fn a_job_that_cannot_be_started_leaves_no_record() {
    let server = Server::start();
    let key = server.post("/public-keys", &json!({"name": "n", "public_key": "k"})).id();
    let image = server.post("/images", &json!({"name": "n"})).id();
    let post = |fields: Value| {
        let mut job = json!({
            "artifact_id": image, "public_key_id": key, "job_type": "customize", "image_root_archive_name": "n",
        });
        job.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        server.post("/v3/jobs", &job)
    };
    assert_eq!(post(json!({})).status, 400, "an image without a link");
    assert_eq!(post(json!({"artifact_id": NO_ID})).status, 400);
    assert_eq!(post(json!({"job_type": "create", "ssh_containers": [{"name": "x", "jail": true}]})).status, 400);
    assert_eq!(post(json!({"ssh_containers": [{}, {}]})).status, 400);
    for wrong in [
        json!({"artifact_id": "x"}),
        json!({"job_type": "x"}),
        json!({"build_env_size": 0}),
        json!({"status": "success"}),
        json!({"ssh_containers": [{"nam": "x"}]}),
        json!({"initrd_file_name": ""}),
    ] {
        assert_eq!(post(wrong.clone()).status, 422, "{wrong}");
    }
    assert_eq!(server.get("/jobs").body, "[]\n");
    assert_eq!(server.get(&format!("/jobs/{NO_ID}")).status, 404);
    assert_eq!(server.patch(&format!("/jobs/{NO_ID}"), &json!({"status": "error"})).status, 404);
    assert_eq!(server.delete(&format!("/jobs/{NO_ID}")).status, 404);
}

#[test]
fn jobs_are_changed_and_deleted_by_filters() {
    let data = tempfile::tempdir().unwrap();
    let job = |id: u32, status: &str, created: &str| {
        json!({
            "artifact_id": NO_ID, "public_key_id": NO_ID, "job_type": "create", "image_root_archive_name": "n",
            "id": format!("46a2731e-a1d0-4f98-ba92-{id:012}"), "created": created, "status": status,
        })
    };
    let jobs = json!([
        job(1, "success", "2026-01-01T00:00:00+00:00"),
        job(2, "error", "2026-01-02T00:00:00"),
        job(3, "creating", "2999-01-02T00:00:00"),
    ]);
    std::fs::write(data.path().join("v2.4_jobs.json"), jobs.to_string()).unwrap();
    let store = format!("file://{}", data.path().display());
    let server = Server::with(data.path(), &[("S3_ENDPOINT", &store)]);
    let left = || server.get("/v3/jobs").json().as_array().unwrap().len();
    assert_eq!(left(), 3);
    let third = "/jobs/46a2731e-a1d0-4f98-ba92-000000000003";
    let patched = server.patch(third, &json!({"status": "success", "resultant_image_id": NO_ID.to_uppercase()})).good();
    assert_eq!((&patched["status"], &patched["resultant_image_id"]), (&json!("success"), &json!(NO_ID)));
    assert_eq!(server.patch(third, &json!({"status": "creating"})).status, 200, "no order is enforced");
    assert_eq!(server.patch(third, &json!({"status": "sleeping"})).status, 422);
    for wrong in ["age=foo", "age=90", "age=", "status=", "AGE=1d"] {
        assert_eq!(server.delete(&format!("/v3/jobs?{wrong}")).status, 400, "{wrong}");
    }
    assert_eq!(left(), 3);
    assert_eq!(server.delete("/v3/jobs?age=1d&status=SUCCESS").status, 204);
    assert_eq!(left(), 2);
    assert_eq!(server.delete("/v2/jobs?job_type=customize").status, 204);
    assert_eq!(left(), 2);
    assert_eq!(server.delete(third).status, 204);
    assert_eq!(server.delete("/jobs").status, 204);
    assert_eq!(left(), 0);
}
