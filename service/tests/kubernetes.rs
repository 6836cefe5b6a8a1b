//! Jobs on Kubernetes: the service beside a stand-in for the API, which keeps objects and is told what happens to pods.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use testbed::kubernetes::{Fault, Kubernetes};
use testbed::{repository, wait_until, wait_within};

use crate::server::{Answer, Server};
use crate::times;

/// The service, its store and its cluster.
pub struct Site {
    data: TempDir,
    pub cluster: Kubernetes,
    server: Option<Server>,
}

const PODS: &str = "/api/v1/namespaces/ims/pods";
pub const JOBS: &str = "/apis/batch/v1/namespaces/ims/jobs";

impl Site {
    pub fn start() -> Self {
        Self::with(&[])
    }

    pub fn with(variables: &[(&str, &str)]) -> Self {
        let mut site = Self { data: tempfile::tempdir().unwrap(), cluster: Kubernetes::start(), server: None };
        std::fs::write(site.path("kubeconfig"), site.cluster.configuration()).unwrap();
        site.restart(variables);
        site
    }

    fn path(&self, name: &str) -> String {
        self.data.path().join(name).display().to_string()
    }

    /// Starts the service on the same data; a running one is killed.
    pub fn restart(&mut self, variables: &[(&str, &str)]) {
        self.server = None;
        self.server = Some(self.beside(self.data.path(), variables));
    }

    /// A service with a data directory of its own, beside the same store and cluster.
    pub fn beside(&self, data: &Path, variables: &[(&str, &str)]) -> Server {
        let templates = repository().join("deploy/service/job-templates").display().to_string();
        let (store, kubeconfig) = (format!("file://{}", self.path("store")), self.path("kubeconfig"));
        let mut all = vec![
            ("S3_ENDPOINT", store.as_str()),
            ("KUBECONFIG", &kubeconfig),
            ("IMS_RUNNER", "kubernetes"),
            ("IMS_JOB_TEMPLATE_PATH", &templates),
        ];
        all.extend(variables);
        Server::with(data, &all)
    }

    /// Kills the service.
    pub fn kill(&mut self) {
        self.server = None;
    }

    pub fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.data.path().join("log")).unwrap()
    }

    pub fn key(&self) -> String {
        self.server().post("/public-keys", &json!({"name": "n", "public_key": "ssh-ed25519 A\nssh-ed25519 B\n"})).id()
    }

    fn put(&self, key: &str, body: &[u8]) -> Value {
        let path = self.data.path().join("store/boot-images").join(key);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, body).unwrap();
        json!({"path": format!("s3://boot-images/{key}"), "etag": "", "type": "s3"})
    }

    pub fn image(&self, arch: &str) -> String {
        let id = ims_service::records::new_id();
        let rootfs = self.put(&format!("{id}/rootfs"), b"rootfs");
        let artifact = json!({"link": rootfs, "type": "application/vnd.cray.image.rootfs.squashfs", "md5": "d41d8cd9"});
        let manifest = json!({"version": "1.0", "artifacts": [artifact]}).to_string();
        let link = self.put(&format!("{id}/manifest.json"), manifest.as_bytes());
        self.server().post("/images", &json!({"name": "i", "arch": arch, "link": link})).id()
    }

    fn recipe(&self) -> String {
        let link = self.put(&ims_service::records::new_id(), b"recipe");
        let recipe = json!({
            "name": "r", "recipe_type": "kiwi-ng", "linux_distribution": "sles15", "link": link,
            "template_dictionary": [{"key": "A", "value": "$id: \"x\"\ny"}],
        });
        self.server().post("/recipes", &recipe).id()
    }

    fn post(&self, kind: &str, artifact: &str, fields: Value) -> Answer {
        let mut job = json!({
            "artifact_id": artifact, "public_key_id": self.key(), "job_type": kind, "image_root_archive_name": "new",
        });
        job.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        self.server().post("/v3/jobs", &job)
    }

    /// A customize job as CFS asks for it.
    pub fn job(&self) -> Value {
        let image = self.image("x86_64");
        self.post("customize", &image, json!({"ssh_containers": [{"name": "cfs-1", "jail": true}]})).good()
    }

    pub fn status(&self, job: &Value) -> String {
        let path = format!("/v3/jobs/{}", job["id"].as_str().unwrap());
        self.server().get(&path).good()["status"].as_str().unwrap().to_owned()
    }

    fn dies(&self, job: &Value, reason: &str) {
        wait_until(&format!("the job to be an error; {}", self.log()), || self.status(job) == "error");
        let line = format!("job {} died: {reason}", job["id"].as_str().unwrap());
        assert!(self.log().contains(&line), "{line}: {}", self.log());
    }

    /// Objects of the cluster, with ID for the job's ID.
    fn objects(&self, job: &Value) -> Vec<String> {
        let id = job["id"].as_str().unwrap();
        self.cluster.names().into_iter().map(|name| name.replace(id, "ID")).collect()
    }

    pub fn pod(&self, job: &Value, status: Value) {
        self.cluster.set_status("pods", &format!("{}-pod", job["kubernetes_job"].as_str().unwrap()), status);
    }
}

fn container(name: &str, state: Value) -> Value {
    json!({"name": name, "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state})
}

const ALL: [&str; 6] = [
    "configmaps/cray-ims-ID-configmap",
    "destinationrules/cray-ims-ID-service",
    "jobs/cray-ims-ID-customize",
    "persistentvolumeclaims/cray-ims-ID-job-claim",
    "pods/cray-ims-ID-customize-pod",
    "services/cray-ims-ID-service",
];

#[test]
fn customize_job_is_made_in_order_and_released_and_removed() {
    let site = Site::start();
    let keys = json!({"metadata": {"name": "hpe-signing-key"}, "type": "Opaque", "data": {"k": "QQ=="}});
    site.cluster.put("secrets", "services", keys);
    let job = site.job();
    let id = job["id"].as_str().unwrap();
    let customer = json!({"host": format!("{id}.ims.cmn.shasta.local"), "port": 22});
    let cluster = json!({"host": format!("cray-ims-{id}-service.ims.svc.cluster.local"), "port": 22});
    assert_eq!(
        job["ssh_containers"],
        json!([{"name": "cfs-1", "jail": true, "status": "pending",
            "connection_info": {"customer_access": customer, "cluster.local": cluster}}])
    );
    for (field, name) in [
        ("kubernetes_job", "customize"),
        ("kubernetes_service", "service"),
        ("kubernetes_configmap", "configmap"),
        ("kubernetes_pvc", "job-claim"),
        ("kubernetes_secret", "signing-keys"),
    ] {
        assert_eq!(job[field], format!("cray-ims-{id}-{name}"));
    }
    assert_eq!(job["kubernetes_namespace"], "ims");
    let made =
        site.cluster.state().sent.iter().map(|sent| sent["kind"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(made, ["ConfigMap", "PersistentVolumeClaim", "Service", "DestinationRule", "Secret", "Job"]);

    let one = format!("/jobs/{id}");
    assert_eq!(site.server().patch(&one, &json!({"status": "waiting_on_user"})).status, 200);
    // A failure may be tried again, and stores nothing.
    site.cluster.fail("DELETE /api/v1/namespaces/ims/services", Fault::Status(403), 1);
    let refused = site.server().patch(&one, &json!({"status": "success"}));
    let error = refused.json()["errors"][0].as_str().unwrap().to_owned();
    assert!(refused.status == 500 && error.contains("Kubernetes answered 403"), "{error}");
    assert_eq!(site.status(&job), "waiting_on_user");
    assert_eq!(site.server().patch(&one, &json!({"status": "success"})).status, 200);
    let logs = ["configmaps/cray-ims-ID-configmap", "jobs/cray-ims-ID-customize", "pods/cray-ims-ID-customize-pod"];
    let secrets = ["secrets/cray-ims-ID-signing-keys", "secrets/hpe-signing-key"];
    assert_eq!(site.objects(&job), [logs.as_slice(), secrets.as_slice()].concat());
    assert_eq!(site.server().delete(&one).status, 204);
    assert_eq!(site.objects(&job), ["secrets/hpe-signing-key"]);
    assert_eq!(site.server().get(&one).status, 404);
}

#[test]
fn names_of_users_stay_values() {
    let site = Site::start();
    let hostile = "a: b\n            - name: EVIL\n              value: $id $(S3_SECRET_KEY) # x";
    let image = site.image("x86_64");
    let fields = json!({"image_root_archive_name": hostile, "kernel_file_name": "123", "require_dkms": false});
    let job = site.post("customize", &image, fields).good();
    let spec = site.cluster.all("jobs")[0]["spec"]["template"]["spec"].clone();
    let sidecar = &spec["containers"][0];
    let variable = |name: &str| {
        let all = sidecar["env"].as_array().unwrap();
        all.iter().find(|variable| variable["name"] == name).map(|variable| variable["value"].clone())
    };
    let expected = hostile.replace('$', "$$");
    assert_eq!(variable("IMAGE_ROOT_ARCHIVE_NAME"), Some(expected.into()), "Kubernetes makes it the name again");
    assert_eq!((variable("KERNEL_FILENAME"), variable("EVIL")), (Some("123".into()), None));
    let context = &spec["containers"][1]["securityContext"];
    assert_eq!((&context["privileged"], &spec["runtimeClassName"]), (&json!(false), &Value::Null));
    assert!(!context["capabilities"]["add"].as_array().unwrap().iter().any(|name| name == "SYS_ADMIN" || name == ""));
    assert_eq!(site.cluster.all("configmaps")[0]["data"]["public_key"], "ssh-ed25519 A\nssh-ed25519 B\n");
    assert_eq!(job["image_root_archive_name"], hostile);
}

#[test]
fn what_is_sent_fits_the_schemas_of_kubernetes() {
    let site = Site::start();
    let (plain, arm, recipe) = (site.image("x86_64"), site.image("aarch64"), site.recipe());
    let keys = json!({"metadata": {"name": "hpe-signing-key"}, "type": "Opaque", "data": {"k": "QQ=="}});
    site.cluster.put("secrets", "services", keys);
    site.post("customize", &plain, json!({"require_dkms": false})).good();
    site.post("customize", &plain, json!({"require_dkms": true})).good();
    site.post("customize", &arm, json!({})).good();
    site.post("create", &recipe, json!({"enable_debug": true})).good();
    let dictionary = site.cluster.all("configmaps").into_iter().find_map(|map| {
        map["data"]["template_dictionary"].as_str().map(|text| serde_json::from_str::<Value>(text).unwrap())
    });
    assert_eq!(dictionary, Some(json!({"A": "$id: \"x\"\ny"})));
    let classes: BTreeSet<_> = site
        .cluster
        .all("jobs")
        .iter()
        .map(|job| job["spec"]["template"]["spec"]["runtimeClassName"].to_string())
        .collect();
    assert_eq!(classes, BTreeSet::from(["\"kata-qemu\"".into(), "null".into()]));
    let sent = site.cluster.state().sent.clone();
    // Istio's kinds are not Kubernetes'.
    let objects: Vec<_> =
        sent.iter().filter(|object| object["kind"] != "DestinationRule").map(Value::to_string).collect();
    assert_eq!(objects.len(), 4 * 5);
    let file = site.data.path().join("objects.yaml");
    std::fs::write(&file, objects.join("\n---\n")).unwrap();
    testbed::rendered::rendered_for(&file, &["1.31", "newest"]).unwrap_or_else(|complaint| panic!("{complaint}"));
    let rbac = repository().join("deploy/service/rbac.yaml");
    testbed::rendered::rendered_for(&rbac, &["1.31", "newest"]).unwrap_or_else(|complaint| panic!("{complaint}"));
}

#[test]
fn failed_start_leaves_no_object() {
    let site = Site::start();
    let image = site.image("x86_64");
    for (request, fault, reason) in [
        ("POST /api/v1/namespaces/ims/services", Fault::Status(422), "cannot create the Service"),
        ("POST /apis/networking.istio.io", Fault::Status(500), "cannot create the DestinationRule"),
        (&format!("POST {JOBS}"), Fault::Status(403), "cannot create the Job"),
    ] {
        site.cluster.fail(request, fault, 1);
        let refused = site.post("customize", &image, json!({}));
        let error = refused.json()["errors"][0].as_str().unwrap().to_owned();
        assert!(refused.status == 500 && error.contains(reason), "{error}");
        assert_eq!(site.cluster.names(), [""; 0], "{request}");
    }
    assert_eq!(site.server().get("/jobs").body, "[]\n");
    // A cluster without Istio needs no rule of it; a lost answer is no failure, nor is a moment without an API.
    site.cluster.fail("POST /apis/networking.istio.io", Fault::Status(404), 1);
    site.cluster.fail("POST /api/v1/namespaces/ims/persistentvolumeclaims", Fault::LostAnswer, 1);
    site.cluster.fail("POST /api/v1/namespaces/ims/services", Fault::Status(503), 2);
    let job = site.post("customize", &image, json!({})).good();
    assert_eq!(site.objects(&job), ALL.into_iter().filter(|name| !name.starts_with("dest")).collect::<Vec<_>>());
}

#[test]
fn dead_pods_become_errors_with_their_reason_and_an_event() {
    let site = Site::start();
    let killed = json!({"terminated": {"exitCode": 137, "reason": "OOMKilled"}});
    let running = container("sshd", json!({"running": {}}));
    let failed =
        json!({"conditions": [{"type": "Failed", "status": "True", "reason": "DeadlineExceeded", "message": "m"}]});
    for (status, reason) in [
        (
            json!({"phase": "Running", "containerStatuses": [running, container("buildenv-sidecar", killed)]}),
            "OOMKilled",
        ),
        (json!({"phase": "Failed", "reason": "Evicted", "message": "low on memory"}), "Evicted: low on memory"),
    ] {
        let job = site.job();
        site.pod(&job, status);
        wait_until("the job to be an error", || site.status(&job) == "error");
        wait_until("an event", || {
            site.cluster.all("events").iter().any(|event| {
                event["regarding"]["name"] == job["kubernetes_job"] && event["note"].as_str().unwrap().contains(reason)
            })
        });
        assert!(site.log().contains(reason), "{}", site.log());
        assert!(!site.objects(&job).iter().any(|name| name.starts_with("services/cray-ims-ID")), "it was released");
    }
    let job = site.job();
    site.cluster.set_status("jobs", job["kubernetes_job"].as_str().unwrap(), failed);
    site.dies(&job, &format!("Job {} has failed: DeadlineExceeded: m", job["kubernetes_job"].as_str().unwrap()));
    let job = site.job();
    site.cluster.remove("jobs", job["kubernetes_job"].as_str().unwrap());
    site.dies(&job, "its Job");
    // The end of a job that has reported it is none.
    let job = site.job();
    let path = format!("/jobs/{}", job["id"].as_str().unwrap());
    site.server().patch(&path, &json!({"status": "success"})).good();
    site.pod(&job, json!({"phase": "Failed"}));
    let other = site.job();
    site.pod(&other, json!({"phase": "Failed"}));
    wait_until("the other one", || site.status(&other) == "error");
    assert_eq!(site.status(&job), "success");
}

#[test]
fn pods_that_cannot_start_become_errors_after_a_while() {
    let site = Site::with(&[("IMS_JOB_PENDING_LIMIT", "2")]);
    let (pulling, pending) = (site.job(), site.job());
    let waiting = json!({"waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}});
    site.pod(&pulling, json!({"phase": "Pending", "containerStatuses": [container("sshd", waiting)]}));
    let unscheduled =
        json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"});
    site.pod(&pending, json!({"phase": "Pending", "conditions": [unscheduled]}));
    wait_until("both to be errors", || site.status(&pulling) == "error" && site.status(&pending) == "error");
    let log = site.log();
    assert!(log.contains("container sshd does not start: ImagePullBackOff: no such tag"), "{log}");
    assert!(log.contains("Unschedulable: 0/3 nodes"), "{log}");
}

#[test]
fn watch_goes_on_after_it_was_cut_forgotten_and_refused() {
    let site = Site::start();
    for (is_forgotten, refusals) in [(false, 0), (true, 0), (true, 2)] {
        let job = site.job();
        if refusals > 0 {
            site.cluster.fail(&format!("GET {PODS}"), Fault::Status(403), refusals);
        }
        site.cluster.cut_watches(is_forgotten);
        site.pod(&job, json!({"phase": "Failed", "message": "lost"}));
        wait_until(&format!("the death; {}", site.log()), || site.status(&job) == "error");
    }
    assert!(site.log().contains("cannot watch jobs in the namespace ims"), "{}", site.log());
}

#[test]
fn restarted_service_finds_its_jobs_and_clears_up() {
    let mut site = Site::start();
    let (died, lost) = (site.job(), site.job());
    let id = |job: &Value| job["id"].as_str().unwrap().to_owned();
    // A kill between the first object and the record.
    site.cluster.fail(&format!("POST {JOBS}"), Fault::Silence, 1);
    let body = json!({
        "artifact_id": site.image("x86_64"), "public_key_id": site.key(), "job_type": "customize",
        "image_root_archive_name": "cut off",
    });
    let address = site.server().address;
    let asked = std::thread::spawn(move || {
        let headers = "content-type: application/json\r\n";
        crate::server::try_ask(address, "POST", "/v3/jobs", headers, body.to_string()).is_err()
    });
    wait_until("the third ConfigMap", || site.cluster.all("configmaps").len() == 3);
    wait_until("its Job", || {
        site.cluster.state().requests.iter().filter(|r| r.starts_with(&format!("POST {JOBS}"))).count() == 3
    });
    site.server = None;
    assert!(asked.join().unwrap());
    // Both while nobody watches.
    site.pod(&died, json!({"phase": "Failed", "message": "unseen"}));
    site.cluster.remove("jobs", lost["kubernetes_job"].as_str().unwrap());
    // The objects of a service with another database are not ours.
    let labels = json!({"cray-ims/job-id": "other", "cray-ims/records": "other"});
    site.cluster.put("configmaps", "ims", json!({"metadata": {"name": "other", "labels": labels}}));
    let records = site.cluster.all("configmaps")[0]["metadata"]["labels"]["cray-ims/records"].clone();
    let labels = json!({"cray-ims/job-id": "orphan", "cray-ims/records": records});
    site.cluster.put(
        "configmaps",
        "ims",
        json!({"metadata": {"name": "orphan", "namespace": "ims", "labels": labels}}),
    );
    site.restart(&[]);
    site.dies(&died, &format!("pod {}-pod has failed: unseen", died["kubernetes_job"].as_str().unwrap()));
    site.dies(&lost, "its Job");
    wait_until(&format!("all that was cut off to be removed; {}", site.log()), || {
        let names = site.cluster.names();
        let known = [id(&died), id(&lost), "/other".into()];
        names.iter().all(|name| known.iter().any(|id| name.contains(id.as_str())))
    });
    assert!(site.cluster.names().contains(&"configmaps/other".to_owned()));
}

#[test]
fn slow_or_silent_api_holds_nothing_else_up() {
    let site = Site::start();
    let (image, key) = (site.image("x86_64"), site.key());
    let body =
        json!({"artifact_id": image, "public_key_id": key, "job_type": "customize", "image_root_archive_name": "n"});
    let post = |_| {
        let began = Instant::now();
        let status = site.server().post("/v3/jobs", &body).status;
        (status, began.elapsed())
    };
    for (what, fault, status) in [
        ("Kubernetes is slow", Fault::Delay(Duration::from_secs(2)), 201),
        ("Kubernetes is silent", Fault::Silence, 500),
    ] {
        site.cluster.fail("", fault, usize::MAX);
        let ask = |method: &str, path: &str, body: &Value| site.server().send(method, path, body);
        let answers = times::others_are_answered(what, Duration::from_secs(10), 10, ask, post);
        assert!(answers.iter().all(|(answered, _)| *answered == status), "{what}: {answers:?}");
        // Each call ends after 20 s with its retries; the start needs one that fails, and its roll-back another.
        assert!(answers.iter().all(|(_, took)| *took < Duration::from_mins(2)), "{what}: {answers:?}");
        site.cluster.forget_faults();
    }
    assert_eq!(site.server().delete("/v3/jobs").status, 204);
    wait_within(Duration::from_mins(4), "nothing to be left", || site.cluster.names().is_empty());
    site.job();
}

#[test]
fn refusing_api_and_one_that_cuts_answers_off_fail_only_starts_of_jobs() {
    let site = Site::start();
    let (image, count) = (site.image("x86_64"), |method: &str| {
        site.cluster.state().requests.iter().filter(|request| request.starts_with(method)).count()
    });
    for (begin, fault) in [("", Fault::Status(500)), ("POST ", Fault::LostAnswer)] {
        site.cluster.fail(begin, fault.clone(), usize::MAX);
        let refused = site.post("customize", &image, json!({}));
        assert_eq!((refused.status, refused.json()["errors"][0].is_string()), (500, true), "{fault:?}");
        assert_eq!(site.server().get("/healthz/ready").status, 200);
        assert_eq!(site.server().get("/v3/jobs").body, "[]\n");
        site.cluster.forget_faults();
        // Objects whose answers were lost are found by their labels.
        assert_eq!(site.cluster.names(), [""; 0], "{fault:?}: {} removals", count("DELETE"));
    }
    site.job();
}

#[test]
fn log_of_a_job_is_that_of_its_containers() {
    let site = Site::start();
    let job = site.job();
    let pod = format!("{}-pod", job["kubernetes_job"].as_str().unwrap());
    let path = format!("/v3/jobs/{}/logs", job["id"].as_str().unwrap());
    // Around the lines are the sizes of chunks.
    let lines = || {
        let answer = site.server().get(&path);
        assert_eq!(answer.status, 200);
        answer.body.lines().filter(|line| line.contains(" | ")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(lines(), [""; 0], "nothing has started");
    for (name, text) in [("prepare", "fetched\nunpacked\n"), ("sshd", "listening")] {
        site.cluster.state().logs.insert(format!("{pod}/{name}"), text.to_owned());
    }
    assert_eq!(lines(), ["prepare | fetched", "prepare | unpacked", "sshd | listening"]);
}

#[test]
fn service_without_cluster_or_templates_does_not_start() {
    let data = tempfile::tempdir().unwrap();
    let refused = |variables: &[(&str, &Path)]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ims"));
        command.args(["serve", "--runner", "kubernetes", "--listen", "127.0.0.1:0"]).env("IMS_DATA_DIR", data.path());
        command.env_remove("KUBECONFIG").env_remove("IMS_DATABASE_URL").env("HOME", data.path());
        let output = command.envs(variables.iter().copied()).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let said = refused(&[]);
    assert!(said.contains("cannot run jobs on Kubernetes") && said.contains("service account token"), "{said}");
    let kubeconfig = data.path().join("kubeconfig");
    std::fs::write(&kubeconfig, Kubernetes::start().configuration()).unwrap();
    let said = refused(&[("KUBECONFIG", &kubeconfig), ("IMS_JOB_TEMPLATE_PATH", data.path())]);
    assert!(
        said.contains("image_configmap_customize.yaml.template") && said.contains("IMS_JOB_TEMPLATE_PATH"),
        "{said}"
    );
    let customize = data.path().join("customize");
    std::fs::create_dir(&customize).unwrap();
    for kind in ["configmap", "pvc", "service", "job"] {
        let path =
            repository().join(format!("deploy/service/job-templates/customize/image_{kind}_customize.yaml.template"));
        let text = std::fs::read_to_string(path).unwrap().replace("$address_pool", "$adress_pool");
        std::fs::write(customize.join(format!("image_{kind}_customize.yaml.template")), text).unwrap();
    }
    let said = refused(&[("KUBECONFIG", &kubeconfig), ("IMS_JOB_TEMPLATE_PATH", data.path())]);
    assert!(said.contains("the variable 'adress_pool' is unknown"), "{said}");
}
