//! Remote build nodes: the service in a network with nodes, which are namespaces. One of them swallows packets.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use testbed::job::{image, squashfs_of};
use testbed::node::{Lab, Node, NodeOptions};
use testbed::{Ended, directory, ssh_options, succeed, text, wait_until, wait_within};

use crate::server::exchange;
use crate::times;

/// The service of one machine, in the network of the nodes.
struct Site<'a> {
    lab: &'a Lab,
    dir: TempDir,
    _service: Ended,
}

/// Makes a node answer IMS's questions, as an administrator does.
pub fn prepare(node: &Node, arch: &str) {
    for (path, script) in
        [("/usr/bin/podman", "#!/bin/sh\n".into()), ("/usr/bin/uname", format!("#!/bin/sh\necho {arch}\n"))]
    {
        let path = node.path(path);
        let _ = std::fs::remove_file(&path);
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    }
}

impl<'a> Site<'a> {
    fn start(lab: &'a Lab) -> Self {
        let dir = directory();
        let path = |name: &str| dir.path().join(name);
        succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path("key")));
        let log = std::fs::File::create(path("log")).unwrap();
        let mut service = lab.command(env!("CARGO_BIN_EXE_ims"));
        service
            .args(["serve", "--auth", "gateway", "--runner", "machine", "--listen", "127.0.0.1:9000", "--data"])
            .arg(path("data"));
        service.arg("--socket").arg(path("ims.sock"));
        service.arg("--jobs").arg(path("jobs")).arg("--remote-key").arg(&lab.key);
        service.arg("--s3-endpoint").arg(format!("file://{}", path("store").display()));
        service.env_remove("IMS_DATABASE_URL").env_remove("IMS_RUNNER").env("IMAGE_COMPRESSION", "none");
        let service = service.stdin(Stdio::null()).stderr(log).spawn().unwrap();
        let site = Self { lab, _service: Ended::killed(service), dir };
        wait_until("the service to listen", || site.try_ims(&["jobs", "list"]).status.success());
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn try_ims(&self, words: &[&str]) -> Output {
        let mut command = self.lab.command(env!("CARGO_BIN_EXE_ims"));
        command.args(words).args(["--url", "http://127.0.0.1:9000", "--format", "json"]).env("HOME", self.dir.path());
        command.env("S3_ENDPOINT", format!("file://{}", self.path("store").display()));
        command.stdin(Stdio::null()).output().unwrap()
    }

    fn ims(&self, words: &[&str]) -> Value {
        let output = self.try_ims(words);
        assert!(output.status.success(), "{words:?}: {output:?}\n{}", self.log());
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap()
    }

    fn job(&self, id: &str) -> Value {
        self.ims(&["jobs", "describe", id])
    }
}

#[test]
fn nodes_are_probed_at_once_and_jobs_run_on_the_best() {
    let lab = Lab::with(&[NodeOptions::default(); 3]);
    for (node, arch) in lab.nodes.iter().zip(["x86_64", "x86_64", "aarch64"]) {
        prepare(node, arch);
    }
    let before = lab.nodes[1].state();
    let site = Site::start(&lab);
    for node in &lab.nodes {
        site.ims(&["remote-build-nodes", "create", "--xname", &node.address]);
    }
    // Somebody's job is on the first one; the last one is gone without a word.
    std::fs::create_dir(lab.nodes[0].path("/tmp/ims_other")).unwrap();
    lab.cut(&lab.nodes[2]);
    let began = Instant::now();
    let (statuses, slowest) = std::thread::scope(|scope| {
        let statuses = scope.spawn(|| site.ims(&["remote-build-nodes", "status", "list"]));
        let mut slowest = Duration::ZERO;
        while !statuses.is_finished() {
            let asked = Instant::now();
            site.ims(&["public-keys", "list"]);
            slowest = slowest.max(asked.elapsed());
        }
        (statuses.join().unwrap(), slowest)
    });
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");
    let expected = |node: &Node, jobs: u32| {
        json!({
            "xname": node.address, "nodeArch": "x86_64", "podmanStatus": "Podman present at /usr/bin/podman",
            "sshStatus": "SSH connection established.", "ableToRunJobs": true, "numCurrentJobs": jobs,
        })
    };
    assert_eq!(statuses[0], expected(&lab.nodes[0], 1));
    assert_eq!(statuses[1], expected(&lab.nodes[1], 0));
    assert_eq!((&statuses[2]["ableToRunJobs"], &statuses[2]["numCurrentJobs"]), (&json!(false), &json!(-1)));
    assert!(statuses[2]["sshStatus"].as_str().unwrap().starts_with("Unable to connect to node"), "{statuses}");

    let source = squashfs_of(&image(site.dir.path()));
    site.ims(&["images", "import", source.to_str().unwrap(), "--name", "compute"]);
    let public = site.path("key.pub").display().to_string();
    site.ims(&["public-keys", "create", "--name", "me", "--public-key", &public]);
    let create = |name: &str| {
        let words = ["jobs", "create", "--job-type", "customize", "--artifact-id", "compute", "--public-key-id", "me"];
        site.ims(&[words.as_slice(), &["--image-root-archive-name", name]].concat())
    };
    let job = create("changed");
    let id = job["id"].as_str().unwrap();
    assert_eq!(job["remote_build_node"], lab.nodes[1].address.as_str(), "{}", site.log());
    let second = create("second");
    assert_eq!(
        second["remote_build_node"],
        lab.nodes[0].address.as_str(),
        "both have one job, and the first is the first"
    );
    site.ims(&["jobs", "delete", second["id"].as_str().unwrap()]);
    wait_within(Duration::from_mins(2), "users to be let in", || {
        let status = site.job(id)["status"].clone();
        assert!(status != "error", "{}\n{}", site.log(), text(site.try_ims(&["jobs", "logs", id]).stdout));
        status == "waiting_on_user"
    });
    assert_eq!(lab.nodes[1].jobs(), [format!("ims_{id}")]);
    let port = job["ssh_containers"][0]["connection_info"]["customer_access"]["port"].to_string();
    let ssh = |command: &str| {
        let mut ssh = lab.command("ssh");
        let output =
            ssh.args(ssh_options(&site.path("key"))).args(["-p", &port, "root@127.0.0.1", command]).output().unwrap();
        assert!(output.status.success(), "{command}: {output:?}");
        text(output.stdout)
    };
    let shown = succeed(lab.command("ssh-keyscan").args(["-t", "ed25519", "-p", &port, "127.0.0.1"]));
    let host_key = site.job(id)["ssh_containers"][0]["connection_info"]["customer_access"]["host_key"].clone();
    assert!(shown.trim_end().ends_with(host_key.as_str().unwrap()), "{host_key}: {shown}");
    assert_eq!(ssh("echo changed > /etc/motd; echo $REMOTE_BUILD_NODE").trim(), lab.nodes[1].address);
    ssh("touch /tmp/complete");
    wait_within(Duration::from_mins(2), "the image", || site.job(id)["status"] == "success");
    let published = site.job(id)["resultant_image_id"].as_str().unwrap().to_owned();
    let rootfs = site.path("store/boot-images").join(published).join("rootfs");
    assert_eq!(succeed(Command::new("unsquashfs").arg("-cat").arg(rootfs).arg("etc/motd")), "changed\n");
    lab.nodes[1].is_as_before(&before);
    site.ims(&["jobs", "delete", id]);
}

#[test]
fn node_that_swallows_packets_delays_only_requests_that_ask_it() {
    let lab = Lab::new();
    prepare(&lab.nodes[0], "x86_64");
    let site = Site::start(&lab);
    site.ims(&["remote-build-nodes", "create", "--xname", &lab.nodes[0].address]);
    let source = squashfs_of(&image(site.dir.path()));
    let image = site.ims(&["images", "import", source.to_str().unwrap(), "--name", "compute"]);
    let public = site.path("key.pub").display().to_string();
    let key = site.ims(&["public-keys", "create", "--name", "me", "--public-key", &public]);
    lab.cut(&lab.nodes[0]);
    let ask = |method: &str, path: &str, body: &Value| {
        let connection = UnixStream::connect(site.path("ims.sock")).unwrap();
        let headers = "content-type: application/json\r\n";
        exchange(connection, method, path, headers, body.to_string().as_bytes()).unwrap()
    };
    let job = json!({
        "artifact_id": image["id"], "public_key_id": key["id"], "job_type": "customize", "image_root_archive_name": "n",
    });
    let answers = times::others_are_answered("a node swallows packets", Duration::from_secs(10), 6, ask, |number| {
        let began = Instant::now();
        // One of them is a job, which runs here then.
        let answer = if number == 0 {
            let answer = ask("POST", "/v3/jobs", &job);
            assert_eq!(answer.good()["remote_build_node"], "");
            answer
        } else {
            let answer = ask("GET", "/v3/remote-build-nodes/status", &Value::Null);
            assert_eq!(answer.good()[0]["ableToRunJobs"], false);
            answer
        };
        (answer.status, began.elapsed())
    });
    // A node is given up after six seconds.
    assert!(answers.iter().all(|(_, took)| (5..30).contains(&took.as_secs())), "{answers:?}");
    assert_eq!(ask("DELETE", "/v3/jobs", &Value::Null).status, 204);
    wait_within(Duration::from_mins(2), "the job to be removed", || {
        std::fs::read_dir(site.path("jobs")).is_ok_and(|jobs| jobs.count() == 0)
    });
}
