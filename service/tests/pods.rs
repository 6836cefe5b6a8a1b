//! Jobs on Kubernetes whose pods run for real: podman is their kubelet. From POST to the end of the job, driven by the
//! programs in the pod, which report to the service itself.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ims_sshd::pod::pod_files::SSHD_CONFIG;
use serde_json::{Value, json};
use tempfile::TempDir;
use testbed::job::{image, md5, squashfs_of};
use testbed::node::Lab;
use testbed::repository_server::RepositoryServer;
use testbed::s3_server::Bucket;
use testbed::{cache, podman, repository, ssh_options, succeed, wait_within};

use crate::kubernetes::Site;
use crate::nodes::prepare;
use crate::recipes::{REPOSITORY, write};

const IMAGE: &str = "localhost/ims-sshd-test/ims-sshd:latest";
const BUILDER: &str = "localhost/ims-sshd-test/builder:latest";

/// Limit of each step: podman shares two cores with the other tests.
const LIMIT: Duration = Duration::from_mins(8);

/// Runs the pods of a cluster, one at a time, as long as it lives.
struct Kubelet<'a> {
    site: &'a Site,
    bucket: &'a Bucket,
    dir: TempDir,
    port: u16,
    key: PathBuf,
    /// Build nodes, in whose network the pods run then.
    lab: Option<&'a Lab>,
}

impl<'a> Kubelet<'a> {
    fn new(site: &'a Site, bucket: &'a Bucket) -> Self {
        Self::beside(site, bucket, None)
    }

    fn beside(site: &'a Site, bucket: &'a Bucket, lab: Option<&'a Lab>) -> Self {
        let base = cache().join("tests");
        std::fs::create_dir_all(&base).unwrap();
        let dir = tempfile::tempdir_in(base).unwrap();
        for name in ["volume", "keys"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let key = dir.path().join("id_ed25519");
        succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key));
        if let Some(lab) = lab {
            lab.lend(site.server().address);
            lab.lend(bucket.endpoint.strip_prefix("http://").unwrap().parse().unwrap());
        }
        Self { site, bucket, dir, port: testbed::free_port(), key, lab }
    }

    /// The pod of a job as podman takes it: on this machine's network, with this machine's volumes and images.
    fn translated(&self, pod: &Value, name: &str) -> Vec<Value> {
        let mut spec = pod["spec"].clone();
        for field in ["runtimeClassName", "serviceAccountName", "enableServiceLinks"] {
            spec.as_object_mut().unwrap().remove(field);
        }
        spec["hostNetwork"] = true.into();
        let config = SSHD_CONFIG.replace("Port 22\n", &format!("Port {}\nListenAddress 127.0.0.1\n", self.port));
        std::fs::write(self.dir.path().join("keys/sshd_config"), config).unwrap();
        let directory = |name: &str| json!({"path": self.dir.path().join(name), "type": "Directory"});
        let mut objects = Vec::new();
        for volume in spec["volumes"].as_array_mut().unwrap() {
            let own = format!("{name}-{}", volume["name"].as_str().unwrap());
            if volume.get("persistentVolumeClaim").is_some() {
                *volume = json!({"name": own, "hostPath": directory("volume")});
            } else if let Some(mut map) = self.map(&volume["configMap"]["name"]) {
                // podman stores it as a volume of that name.
                map["metadata"] = json!({ "name": own });
                volume["configMap"]["name"] = own.clone().into();
                volume["name"] = own.into();
                objects.push(map);
            } else {
                *volume = json!({"name": own, "emptyDir": {}});
            }
        }
        spec["volumes"].as_array_mut().unwrap().push(json!({"name": "keys-of-test", "hostPath": directory("keys")}));
        for list in ["initContainers", "containers"] {
            for container in spec[list].as_array_mut().unwrap() {
                self.translate(container, name);
            }
        }
        // podman removes init containers of another type once they have ended.
        let metadata = json!({"name": name, "annotations": {"io.podman.annotations.init.container.type": "always"}});
        objects.push(json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}));
        objects
    }

    fn map(&self, name: &Value) -> Option<Value> {
        if let Some(lab) = self.lab.filter(|_| name == "cray-ims-remote-keys") {
            let data = json!({"private_key": std::fs::read_to_string(&lab.key).unwrap()});
            return Some(json!({"apiVersion": "v1", "kind": "ConfigMap", "data": data}));
        }
        self.site.cluster.all("configmaps").into_iter().find(|map| map["metadata"]["name"] == *name)
    }

    fn translate(&self, container: &mut Value, pod: &str) {
        let is_builder = container["image"].as_str().unwrap().contains("builder");
        container["image"] = if is_builder { BUILDER } else { IMAGE }.into();
        container["imagePullPolicy"] = "Never".into();
        for field in ["ports", "resources"] {
            container.as_object_mut().unwrap().remove(field);
        }
        if let Some(context) = container["securityContext"].as_object_mut() {
            context.remove("appArmorProfile");
        }
        let mut site: BTreeMap<_, _> = self.bucket.variables().into_iter().collect();
        site.insert("IMS_URL", format!("http://{}", self.site.server().address));
        site.insert("IMAGE_COMPRESSION", "none".into());
        for variable in container["env"].as_array_mut().unwrap() {
            let name = variable["name"].as_str().unwrap().to_owned();
            let value = site.remove(name.as_str()).unwrap_or_else(|| variable["value"].as_str().unwrap_or("").into());
            *variable = json!({"name": name, "value": value});
        }
        let rest = site.into_iter().map(|(name, value)| json!({"name": name, "value": value}));
        container["env"].as_array_mut().unwrap().extend(rest);
        for mount in container["volumeMounts"].as_array_mut().unwrap() {
            mount["name"] = format!("{pod}-{}", mount["name"].as_str().unwrap()).into();
        }
        if container["name"] == "buildenv-sidecar" {
            let words = ["--sshd-config", "/keys-of-test/sshd_config"].map(Value::from);
            container["command"].as_array_mut().unwrap().extend(words);
            let mounts = container["volumeMounts"].as_array_mut().unwrap();
            mounts.push(json!({"name": "keys-of-test", "mountPath": "/keys-of-test"}));
        }
    }

    /// Runs the pod of the job while `meanwhile` runs, and tells the cluster what becomes of its containers.
    fn run(&self, job: &Value, meanwhile: impl FnOnce(&str)) {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let object = format!("{}-pod", job["kubernetes_job"].as_str().unwrap());
        let name = format!("ims-service-test-{}", &job["id"].as_str().unwrap()[..13]);
        let pod = self.site.cluster.all("pods").into_iter().find(|pod| pod["metadata"]["name"] == object).unwrap();
        let file = self.dir.path().join("pod.yaml");
        let objects = self.translated(&pod, &name);
        std::fs::write(&file, objects.iter().map(Value::to_string).collect::<Vec<_>>().join("\n---\n")).unwrap();
        let running = Running { name: &name, volumes: volumes(&objects), is_over: AtomicBool::new(false) };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _one = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                // An init container that fails ends it.
                let play = podman(&["play", "kube", "--quiet"]);
                let _ = self.command(play).arg(&file).output().unwrap();
            });
            scope.spawn(|| {
                while !running.is_over.load(Ordering::Relaxed) {
                    if let Some(status) = status(&name, &pod["spec"])
                        && self.site.cluster.names().contains(&format!("pods/{object}"))
                    {
                        self.site.cluster.set_status("pods", &object, status);
                    }
                    std::thread::sleep(Duration::from_millis(500));
                }
            });
            let _over = Over(&running.is_over);
            meanwhile(&name);
        });
        drop(running);
    }

    /// A command in the network of the pods.
    fn command(&self, given: Command) -> Command {
        let Some(lab) = self.lab else { return given };
        let mut command = lab.command(given.get_program().to_str().unwrap());
        command.args(given.get_args()).envs(given.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.current_dir(given.get_current_dir().unwrap_or(Path::new("/"))).stdin(Stdio::null());
        command
    }

    fn ssh(&self, command: &str) -> Output {
        let mut ssh = self.command(Command::new("ssh"));
        ssh.args(ssh_options(&self.key)).args(["-p", &self.port.to_string(), "root@127.0.0.1", command]);
        ssh.stdin(Stdio::null()).output().unwrap()
    }

    fn wait_for(&self, job: &Value, pod: &str, status: &str) {
        let began = Instant::now();
        loop {
            let now = self.site.status(job);
            if now == status {
                return;
            }
            let is_over = ["error", "success"].contains(&now.as_str()) || began.elapsed() > LIMIT;
            assert!(!is_over, "{now} instead of {status}\n{}\n{}", self.site.log(), logs(pod));
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

fn volumes(objects: &[Value]) -> Vec<String> {
    let volumes = objects.last().unwrap()["spec"]["volumes"].as_array().unwrap();
    volumes.iter().map(|volume| volume["name"].as_str().unwrap().to_owned()).collect()
}

/// Status of the pod, as a kubelet tells it.
fn status(name: &str, spec: &Value) -> Option<Value> {
    let output = podman(&["ps", "--all", "--format", "json", "--filter", &format!("pod={name}")]).output().unwrap();
    let found: Vec<Value> = serde_json::from_slice(&output.stdout).ok()?;
    let told = |list: &str| -> Vec<Value> {
        let containers = spec[list].as_array().unwrap().iter();
        let state = |container: &Value| {
            let own = format!("{name}-{}", container["name"].as_str().unwrap());
            let found = found.iter().find(|found| found["Names"][0] == own)?;
            let state = match (found["State"].as_str()?, found["ExitCode"].as_i64()?) {
                ("running", _) => json!({"running": {}}),
                ("exited", code) => json!({"terminated": {"exitCode": code}}),
                _ => json!({"waiting": {"reason": "PodInitializing"}}),
            };
            Some(json!({
                "name": container["name"], "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state,
            }))
        };
        containers.filter_map(state).collect()
    };
    let (before, all) = (told("initContainers"), told("containers"));
    Some(json!({"phase": "Running", "initContainerStatuses": before, "containerStatuses": all}))
}

fn logs(pod: &str) -> String {
    let all = ["prepare", "fetch-recipe", "wait-for-repos", "build-image", "buildenv-sidecar", "sshd"];
    let log = |name: &str| podman(&["logs", &format!("{pod}-{name}")]).output().unwrap();
    all.map(|name| {
        let output = log(name);
        format!("--- {name}\n{}", String::from_utf8_lossy(&[output.stdout, output.stderr].concat()))
    })
    .concat()
}

/// A pod of podman, which is removed when the test ends.
struct Running<'a> {
    name: &'a str,
    volumes: Vec<String>,
    is_over: AtomicBool,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let _ = podman(&["pod", "rm", "--force", "--time=0", self.name]).output();
        for volume in &self.volumes {
            let _ = podman(&["volume", "rm", "--force", volume]).output();
        }
    }
}

/// Ends the kubelet's loop, also when the test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A site with a store, in which a bootable image is registered.
fn site(bucket: &Bucket) -> (Site, String) {
    site_with(bucket, &[])
}

fn site_with(bucket: &Bucket, further: &[(&str, &str)]) -> (Site, String) {
    let variables = bucket.variables();
    let mut variables: Vec<_> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
    variables.extend(further);
    variables.extend([("S3_BOOT_IMAGES_BUCKET", bucket.name.as_str()), ("JOB_ENABLE_DKMS", "false")]);
    let site = Site::with(&variables);
    let dir = tempfile::tempdir_in(cache()).unwrap();
    let rootfs = std::fs::read(squashfs_of(&image(dir.path()))).unwrap();
    bucket.put("source/rootfs", &rootfs);
    let link = |key: &str| json!({"path": format!("s3://{}/source/{key}", bucket.name), "etag": "", "type": "s3"});
    let artifact =
        json!({"link": link("rootfs"), "type": "application/vnd.cray.image.rootfs.squashfs", "md5": md5(&rootfs)});
    let manifest = json!({"version": "1.0", "artifacts": [artifact]}).to_string();
    bucket.put("source/manifest.json", manifest.as_bytes());
    let image = site.server().post("/images", &json!({"name": "source", "link": link("manifest.json")})).id();
    (site, image)
}

/// POST of a job that this key may log in to.
fn post(site: &Site, kubelet: &Kubelet, kind: &str, artifact: &str) -> Value {
    let text = std::fs::read_to_string(kubelet.key.with_extension("pub")).unwrap();
    let key = site.server().post("/public-keys", &json!({"name": "cfs", "public_key": text})).id();
    let mut job = json!({
        "artifact_id": artifact, "public_key_id": key, "job_type": kind, "image_root_archive_name": "compute-ö",
    });
    if kind == "customize" {
        job["ssh_containers"] = json!([{"name": "cfs-1", "jail": true}]);
    } else {
        job["enable_debug"] = true.into();
    }
    site.server().post("/v3/jobs", &job).good()
}

/// POST of a create job with the recipe in `tree`, whose packages this machine serves; a build that fails is opened.
fn create(site: &Site, kubelet: &Kubelet, tree: &Path) -> Value {
    let archive = kubelet.dir.path().join("recipe.tgz");
    succeed(Command::new("tar").arg("-czf").arg(&archive).arg("-C").arg(tree).arg("."));
    kubelet.bucket.put("recipe.tgz", &std::fs::read(archive).unwrap());
    let packages = RepositoryServer::start(&REPOSITORY);
    let values = [("PACKAGE_MANAGER", "zypper"), ("REPOSITORY", packages.url.as_str())];
    let recipe = json!({
        "name": "tiny", "recipe_type": "kiwi-ng", "linux_distribution": "sles15", "require_dkms": false,
        "link": {"path": format!("s3://{}/recipe.tgz", kubelet.bucket.name), "etag": "", "type": "s3"},
        "template_dictionary": values.map(|(key, value)| json!({"key": key, "value": value})),
    });
    let recipe = site.server().post("/v3/recipes", &recipe).id();
    post(site, kubelet, "create", &recipe)
}

/// The recipe of tiny packages, with a `config.sh` that fails.
fn broken(kubelet: &Kubelet) -> PathBuf {
    let tree = kubelet.dir.path().join("broken");
    succeed(Command::new("cp").arg("-aT").arg(repository().join("tests/recipe/rpm-local")).arg(&tree));
    write(&tree, "config.sh", "echo broken > /etc/hostname; echo 'the licence server is away'; false\n");
    tree
}

/// Asserts that nothing but the log is left of a job that has ended, and nothing at all once it is deleted.
fn goes(site: &Site, job: &Value) {
    let left = |names: &[String], kind: &str| names.iter().any(|name| name.starts_with(kind));
    let names = site.cluster.names();
    assert!(!left(&names, "services/") && !left(&names, "persistentvolumeclaims/"), "{names:?}");
    assert!(left(&names, "jobs/") && left(&names, "configmaps/"), "{names:?}");
    assert_eq!(site.server().delete(&format!("/v3/jobs/{}", job["id"].as_str().unwrap())).status, 204);
    assert_eq!(site.cluster.names().into_iter().filter(|name| !name.starts_with("events/")).count(), 0);
}

/// Content of a file of the image that the job has published.
fn published_file(site: &Site, bucket: &Bucket, kubelet: &Kubelet, job: &Value, file: &str) -> String {
    let now = site.server().get(&format!("/v3/jobs/{}", job["id"].as_str().unwrap())).good();
    let published = now["resultant_image_id"].as_str().unwrap();
    assert_eq!(site.server().get(&format!("/images/{published}")).good()["name"], "compute-ö");
    let rootfs = kubelet.dir.path().join("rootfs");
    std::fs::write(&rootfs, bucket.get(&format!("{published}/rootfs")).body).unwrap();
    succeed(Command::new("unsquashfs").arg("-cat").arg(&rootfs).arg(file))
}

#[test]
fn customize_job_of_cfs_is_published() {
    let bucket = Bucket::new();
    let (site, image) = site(&bucket);
    let kubelet = Kubelet::new(&site, &bucket);
    let job = post(&site, &kubelet, "customize", &image);
    kubelet.run(&job, |pod| {
        kubelet.wait_for(&job, pod, "waiting_on_user");
        // CFS finds its container by name, and takes a refused connection for the end.
        let now = site.server().get(&format!("/v3/jobs/{}", job["id"].as_str().unwrap())).good();
        let container = &now["ssh_containers"][0];
        assert_eq!(
            (&container["name"], &container["connection_info"]["cluster.local"]["port"]),
            (&json!("cfs-1"), &json!(22))
        );
        let login = kubelet.ssh("echo ~root && sleep 0");
        assert!(login.status.success(), "{login:?}\n{}", logs(pod));
        assert_eq!(String::from_utf8_lossy(&login.stdout), "/root\n");
        let changed = kubelet.ssh("echo changed > /etc/motd; echo $IMS_JOB_ID");
        assert_eq!(String::from_utf8_lossy(&changed.stdout).trim(), job["id"]);
        assert_eq!(
            site.server().delete(&format!("/public-keys/{}", job["public_key_id"].as_str().unwrap())).status,
            204
        );
        assert!(kubelet.ssh("touch /tmp/complete").status.success());
        kubelet.wait_for(&job, pod, "success");
    });
    assert_eq!(published_file(&site, &bucket, &kubelet, &job, "etc/motd"), "changed\n");
    goes(&site, &job);
}

#[test]
fn customize_job_on_a_remote_build_node_is_published() {
    let (lab, bucket) = (Lab::new(), Bucket::new());
    let node = &lab.nodes[0];
    prepare(node, "x86_64");
    let before = node.state();
    // The service stays in this machine's network; its ssh reaches the node.
    let programs = testbed::directory();
    let (ssh, enter) = (programs.path().join("ssh"), lab.command("/usr/bin/ssh"));
    let words: Vec<_> = enter.get_args().map(|word| word.to_str().unwrap()).collect();
    std::fs::write(&ssh, format!("#!/bin/sh\nexec nsenter {} \"$@\"\n", words.join(" "))).unwrap();
    std::fs::set_permissions(&ssh, PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", programs.path().display(), std::env::var("PATH").unwrap());
    let (site, image) = site_with(&bucket, &[("PATH", &path), ("IMS_REMOTE_KEY", lab.key.to_str().unwrap())]);
    site.server().post("/v3/remote-build-nodes", &json!({"xname": node.address})).good();
    let kubelet = Kubelet::beside(&site, &bucket, Some(&lab));
    // A node that answers too slowly is not chosen, as on a loaded machine.
    let mut job = Value::Null;
    wait_within(LIMIT, "the node to be chosen", || {
        job = post(&site, &kubelet, "customize", &image);
        let is_chosen = job["remote_build_node"] == node.address.as_str();
        if !is_chosen {
            assert_eq!(site.server().delete(&format!("/v3/jobs/{}", job["id"].as_str().unwrap())).status, 204);
        }
        is_chosen
    });
    kubelet.run(&job, |pod| {
        kubelet.wait_for(&job, pod, "waiting_on_user");
        assert_eq!(node.jobs(), [format!("ims_{}", job["id"].as_str().unwrap())]);
        let changed = kubelet.ssh("echo changed > /etc/motd; echo $REMOTE_BUILD_NODE");
        assert_eq!(String::from_utf8_lossy(&changed.stdout).trim(), node.address, "{changed:?}\n{}", logs(pod));
        assert!(kubelet.ssh("touch /tmp/complete").status.success());
        kubelet.wait_for(&job, pod, "success");
    });
    assert_eq!(published_file(&site, &bucket, &kubelet, &job, "etc/motd"), "changed\n");
    node.is_as_before(&before);
    goes(&site, &job);
}

#[test]
fn customize_job_that_is_given_up_is_an_error() {
    let bucket = Bucket::new();
    let (site, image) = site(&bucket);
    let kubelet = Kubelet::new(&site, &bucket);
    let job = post(&site, &kubelet, "customize", &image);
    kubelet.run(&job, |pod| {
        kubelet.wait_for(&job, pod, "waiting_on_user");
        assert!(kubelet.ssh("touch /tmp/failed").status.success());
        kubelet.wait_for(&job, pod, "error");
    });
    assert_eq!(site.server().get("/images").json().as_array().unwrap().len(), 1);
    assert!(!site.log().contains("died"), "{}", site.log());
    goes(&site, &job);
}

#[test]
fn customize_job_whose_container_is_killed_is_an_error_with_the_reason() {
    let bucket = Bucket::new();
    let (site, image) = site(&bucket);
    let kubelet = Kubelet::new(&site, &bucket);
    let job = post(&site, &kubelet, "customize", &image);
    kubelet.run(&job, |pod| {
        kubelet.wait_for(&job, pod, "waiting_on_user");
        succeed(&mut podman(&["kill", &format!("{pod}-buildenv-sidecar")]));
        kubelet.wait_for(&job, pod, "error");
    });
    assert!(site.log().contains("container buildenv-sidecar ended with exit code 137"), "{}", site.log());
    goes(&site, &job);
}

#[test]
fn create_job_is_built_and_published() {
    let bucket = Bucket::new();
    let (site, _) = site(&bucket);
    let kubelet = Kubelet::new(&site, &bucket);
    let job = create(&site, &kubelet, &repository().join("tests/recipe/rpm-local"));
    assert_eq!(job["ssh_containers"][0]["name"], "debug");
    kubelet.run(&job, |pod| kubelet.wait_for(&job, pod, "success"));
    assert_eq!(published_file(&site, &bucket, &kubelet, &job, "etc/hostname"), "rpm-local\n");
    goes(&site, &job);
}

#[test]
fn create_job_whose_build_fails_is_opened_and_given_up() {
    let bucket = Bucket::new();
    let (site, _) = site(&bucket);
    let kubelet = Kubelet::new(&site, &bucket);
    let job = create(&site, &kubelet, &broken(&kubelet));
    kubelet.run(&job, |pod| {
        kubelet.wait_for(&job, pod, "waiting_on_user");
        let build = "cat /mnt/image/build/image-root/etc/hostname; touch /mnt/image/failed";
        let login = kubelet.ssh(build);
        assert_eq!(String::from_utf8_lossy(&login.stdout), "broken\n", "{login:?}\n{}", logs(pod));
        kubelet.wait_for(&job, pod, "error");
        assert!(logs(pod).contains("the licence server is away"), "{}", logs(pod));
    });
    assert_eq!(site.server().get("/images").json().as_array().unwrap().len(), 1);
    goes(&site, &job);
}

#[test]
fn create_job_whose_build_is_killed_is_an_error_with_the_reason() {
    let bucket = Bucket::new();
    let (site, _) = site(&bucket);
    let kubelet = Kubelet::new(&site, &bucket);
    let tree = kubelet.dir.path().join("endless");
    succeed(Command::new("cp").arg("-aT").arg(repository().join("tests/recipe/rpm-local")).arg(&tree));
    write(&tree, "config.sh", "while :; do :; done\n");
    let job = create(&site, &kubelet, &tree);
    kubelet.run(&job, |pod| {
        kubelet.wait_for(&job, pod, "building_image");
        succeed(&mut podman(&["kill", &format!("{pod}-build-image")]));
        kubelet.wait_for(&job, pod, "error");
    });
    assert!(site.log().contains("container build-image ended with exit code 137"), "{}", site.log());
    goes(&site, &job);
}
