//! The container image of the service, run with the rights that its manifest gives it, beside a stand-in for Kubernetes.

use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::chown;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;
use testbed::kubernetes::Kubernetes;
use testbed::s3_server::Bucket;
use testbed::{free_port, podman, repository, succeed, text, wait_until};

use crate::deployment::{pod_of_the_service, settings_of_the_service};
use crate::server::ask;

const IMAGE: &str = "localhost/ims-sshd-test/service:latest";

/// The user of the manifest.
const NOBODY: u32 = 65534;

/// A script as one of the manual's: it finds the names of the files in app.py, and replaces the files that are there.
const REPLACE: &str = r##"
import json, os, re
own = os.path.dirname(os.path.abspath(__file__))
names = "\n".join(line for line in open("/app/src/server/app.py") if not line.strip().startswith("#"))
for kind, records in json.load(open(os.path.join(own, "data.json"))).items():
    found = set(re.findall(r"""['"](v[1-9][0-9]*(?:[.][1-9][0-9]*)?_%s[.]json)['"]""" % kind, names))
    assert len(found) == 1, (kind, found)
    path = os.path.join("/var/ims/data", found.pop())
    assert os.path.isfile(path), path
    with open(path, "wt") as file:
        json.dump(records, file)
"##;

/// A container of the image on a data directory.
struct Container {
    name: String,
    address: SocketAddr,
}

/// The parts that outlive a container: its volume, its store and its cluster.
struct Site {
    data: TempDir,
    bucket: Bucket,
    cluster: Kubernetes,
}

impl Site {
    fn new() -> Self {
        let data = testbed::directory();
        chown(data.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        Self { data, bucket: Bucket::new(), cluster: Kubernetes::start() }
    }

    /// Starts the service as the manifest says, on this machine's network.
    fn start(&self) -> Container {
        let address: SocketAddr = ([127, 0, 0, 1], free_port()).into();
        let name = format!("ims-service-test-{}-{}", std::process::id(), address.port());
        let pod = pod_of_the_service();
        let own = &pod["containers"][0]["securityContext"];
        let mut run = podman(&["run", "--detach", "--network=host", "--name", &name]);
        let user = &pod["securityContext"];
        run.arg(format!("--user={}:{}", user["runAsUser"], user["runAsGroup"]));
        assert_eq!(
            own,
            &json!({
                "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]},
            })
        );
        run.args(["--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges"]);
        run.args(["--tmpfs=/tmp", "--volume", &format!("{}:/var/ims/data", self.data.path().display())]);
        let templates = repository().join("deploy/service/job-templates");
        run.arg("--volume").arg(format!("{}:/mnt/ims/v2/job_templates:ro", templates.display()));
        let mut variables = settings_of_the_service();
        variables.extend(self.bucket.variables().into_iter().map(|(name, value)| (name.to_owned(), value)));
        variables.insert("IMS_LISTEN".into(), address.to_string());
        // In a cluster, the service account's token says where the API is.
        std::fs::write(self.data.path().join("kubeconfig"), self.cluster.configuration()).unwrap();
        variables.insert("KUBECONFIG".into(), "/var/ims/data/kubeconfig".into());
        variables.insert("IMS_RUNNER".into(), "kubernetes".into());
        run.args(variables.iter().map(|(name, value)| format!("--env={name}={value}")));
        succeed(run.arg(IMAGE));
        let container = Container { name, address };
        wait_until("the service to listen", || {
            assert_eq!(container.inspect("{{.State.Running}}"), "true", "{}", container.log());
            TcpStream::connect(address).is_ok()
        });
        container
    }
}

impl Container {
    fn inspect(&self, format: &str) -> String {
        succeed(&mut podman(&["container", "inspect", "--format", format, &self.name])).trim().to_owned()
    }

    fn log(&self) -> String {
        let output = podman(&["logs", &self.name]).output().unwrap();
        text([output.stdout, output.stderr].concat())
    }

    fn exec(&self, words: &[&str]) -> Command {
        podman(&[&["exec", "--interactive", &self.name], words].concat())
    }

    fn get(&self, path: &str) -> Value {
        ask(self.address, "GET", path, "", "").good()
    }

    fn post(&self, path: &str, body: &Value) -> Value {
        ask(self.address, "POST", path, "content-type: application/json\r\n", body.to_string()).good()
    }

    fn names(&self, path: &str) -> Vec<String> {
        let list = self.get(path);
        list.as_array().unwrap().iter().map(|record| record["name"].as_str().unwrap().to_owned()).collect()
    }

    /// Ends it as a kubelet does.
    fn stop(self) {
        succeed(&mut podman(&["stop", "--time=60", &self.name]));
        assert_eq!(self.inspect("{{.State.ExitCode}}"), "0", "{}", self.log());
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        let _ = podman(&["rm", "--force", "--time=0", &self.name]).output();
    }
}

#[test]
fn service_serves_from_its_image_with_the_rights_of_its_manifest() {
    let site = Site::new();
    let id = |number: u32| format!("46a2731e-a1d0-4f98-ba92-{number:012}");
    let key = json!([{"id": id(1), "name": "me", "public_key": "ssh-ed25519 A", "created": "2025-01-01T00:00:00"}]);
    let nodes = json!([{"xname": "x3000c0s1b0n0"}]);
    for (file, records) in [("v2_public_keys.json", &key), ("v2.0_remote_build_nodes.json", &nodes)] {
        std::fs::write(site.data.path().join(file), records.to_string()).unwrap();
    }
    let container = site.start();
    for path in ["/healthz/live", "/healthz/ready"] {
        assert_eq!(container.get(path), json!({}));
    }
    // Upstream's files were imported.
    assert_eq!(container.names("/v3/public-keys"), ["me"]);
    assert_eq!(container.get("/v3/remote-build-nodes"), nodes);
    let status = succeed(&mut container.exec(&["cat", "/proc/1/status"]));
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
    assert_eq!(field("Uid:").split_whitespace().next(), Some("65534"));
    assert_eq!((field("CapEff:").as_str(), field("NoNewPrivs:").as_str()), ("0000000000000000", "1"));
    assert!(!container.exec(&["touch", "/written"]).stderr(Stdio::null()).status().unwrap().success());
    assert_eq!(succeed(&mut container.exec(&["ims", "--version"])), concat!("ims ", env!("CARGO_PKG_VERSION"), "\n"));
    // It has what its work needs: templates, and ssh for remote build nodes.
    let link = |key: &str| json!({"path": format!("s3://{}/{key}", site.bucket.name), "etag": "", "type": "s3"});
    site.bucket.put("rootfs", b"rootfs");
    let artifact = json!({"link": link("rootfs"), "type": "application/vnd.cray.image.rootfs.squashfs", "md5": "m"});
    let manifest = json!({"version": "1.0", "artifacts": [artifact]}).to_string();
    site.bucket.put("manifest.json", manifest.as_bytes());
    let image = container.post("/v3/images", &json!({"name": "i", "link": link("manifest.json")}));
    let job = json!({
        "artifact_id": image["id"], "public_key_id": id(1), "job_type": "customize", "image_root_archive_name": "new",
    });
    let job = container.post("/v3/jobs", &job);
    assert_eq!(site.cluster.all("jobs")[0]["metadata"]["name"], job["kubernetes_job"]);
    assert!(text(container.exec(&["ssh", "-V"]).output().unwrap().stderr).starts_with("OpenSSH"));
    container.stop();
}

#[test]
fn records_are_replaced_in_the_pod_as_by_the_manual() {
    let site = Site::new();
    let container = site.start();
    for name in ["kept", "dropped"] {
        container.post("/images", &json!({"name": name}));
    }
    let images = container.get("/images");
    let mut kept = images[0].clone();
    kept["metadata"] = json!({"a": "b"});
    let new =
        json!({"id": "46a2731e-a1d0-4f98-ba92-000000000001", "name": "exported", "created": "2025-01-01T00:00:00"});
    let data = json!({"images": [kept, new], "public_keys": [], "recipes": []});
    let directory = succeed(&mut container.exec(&["mktemp", "-d"])).trim().to_owned();
    // 'kubectl cp' sends an archive to tar.
    let files = tempfile::tempdir().unwrap();
    std::fs::write(files.path().join("data.json"), data.to_string()).unwrap();
    std::fs::write(files.path().join("import.py"), REPLACE).unwrap();
    let archive = files.path().join("archive.tar");
    let pack = ["data.json", "import.py"];
    succeed(Command::new("tar").arg("-C").arg(files.path()).arg("-cf").arg(&archive).args(pack));
    let mut unpack = container.exec(&["tar", "-xmf", "-", "-C", &directory]);
    succeed(unpack.stdin(std::fs::File::open(&archive).unwrap()));
    succeed(&mut container.exec(&["python3", &format!("{directory}/import.py")]));
    assert_eq!(container.names("/images"), ["kept", "dropped"], "nothing is read before the restart");
    container.stop();

    let container = site.start();
    assert_eq!(container.names("/images"), ["kept", "exported"]);
    assert_eq!(container.get("/images")[0]["metadata"], json!({"a": "b"}));
    assert!(container.log().contains("was replaced by a file without this record"), "{}", container.log());
    container.post("/images", &json!({"name": "later"}));
    container.stop();

    // Back to upstream: it reads the files.
    let volume = format!("{}:/var/ims/data", site.data.path().display());
    let export = ["run", "--rm", "--network=none", "--user=65534", "--entrypoint=ims", "--volume", &volume, IMAGE];
    succeed(&mut podman(&[&export, ["export", "/var/ims/data"].as_slice()].concat()));
    let written = std::fs::read(site.data.path().join("v2.1_images.json")).unwrap();
    let written: Value = serde_json::from_slice(&written).unwrap();
    assert_eq!(written.as_array().unwrap().len(), 3);
    let container = site.start();
    assert_eq!(container.names("/images"), ["kept", "exported", "later"]);
    container.stop();
}
