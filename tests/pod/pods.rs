//! Pods of deploy/kubernetes, from `ready` to a packed image.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use testbed::file_server::{Fault, FileServer};
use testbed::ims_server::ImsServer;
use testbed::s3_server::Bucket;
use testbed::{job, repository};

use crate::podman::*;

/// Ends a session as CFS does: marks the image and disconnects at once.
const GOODBYE: &str = "
import paramiko, sys
client = paramiko.SSHClient()
client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
client.connect('127.0.0.1', int(sys.argv[1]), 'root', key_filename=sys.argv[2], timeout=5, allow_agent=False, look_for_keys=False)
client.exec_command(sys.argv[3])
client.close()
";

fn goodbye(pod: &Pod, command: &str) {
    let key = pod.key.display().to_string();
    succeed(Command::new("/usr/bin/python3").args(["-c", GOODBYE, &pod.port.to_string(), &key, command]));
}

fn sftp(pod: &Pod, batch: &str) {
    let mut command = Command::new("sftp");
    command.args(pod.ssh_options()).args(["-b", "-", "-P", &pod.port.to_string(), "root@127.0.0.1"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(batch.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "sftp: {batch}");
}

#[test]
fn customized_image_is_packed_with_the_change_and_without_traces() {
    let pod = Pod::open("ims-sshd-customize", "debian.sqsh", |_| {}).listening();
    assert!(pod.probe("readinessProbe") && pod.probe("livenessProbe"));
    let inspected = succeed(&mut podman(&["inspect", &pod.container("sshd")]));
    assert!(inspected.contains("\"ReadonlyRootfs\": true"), "{inspected}");

    let home = tempfile::tempdir().unwrap();
    let mut ansible = Command::new("ansible");
    ansible.args([
        "all",
        "-i",
        "127.0.0.1,",
        "-u",
        "root",
        "-m",
        "ping",
        "-e",
        "ansible_python_interpreter=/usr/bin/python3",
    ]);
    ansible.args(["-e", &format!("ansible_port={}", pod.port), "--private-key"]).arg(&pod.key);
    ansible.args(["--ssh-common-args", "-F none -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"]);
    ansible.env("HOME", home.path()).env("ANSIBLE_HOST_KEY_CHECKING", "False").env("ANSIBLE_PIPELINING", "True");
    ansible.env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
    let pong = succeed(&mut ansible);
    assert!(pong.contains("pong"), "{pong}");

    sftp(&pod, &format!("put {}/Cargo.toml /srv/by-sftp\n", repository().display()));
    let shell = succeed(pod.ssh(&["-tt"]).arg("tty && grep -c '' /proc/1/comm && echo by hand > /srv/by-shell"));
    assert!(shell.contains("/dev/pts/"), "{shell}");
    goodbye(&pod, "touch /tmp/complete");
    pod.ends_well();

    let (before, after) = (packed(&pod.volume.join("image.sqsh")), packed(&pod.volume.join("customized.sqsh")));
    let new: Vec<_> = after.difference(&before).filter(|path| !path.contains(" /root/.ansible")).collect();
    assert_eq!(new, ["- /srv/by-sftp", "- /srv/by-shell"]);
    let lost: Vec<_> = before.difference(&after).collect();
    assert!(lost.is_empty(), "{lost:?}");
}

#[test]
fn an_image_marked_failed_is_not_packed() {
    let pod = Pod::open("ims-sshd-customize", "busybox.sqsh", |_| {}).listening();
    goodbye(&pod, "touch /tmp/failed");
    pod.ends_well();
    assert!(pod.volume.join("failed").exists());
    assert!(!pod.volume.join("customized.sqsh").exists());
    assert!(pod.logs("sidecar").contains("it is not published"), "{}", pod.logs("sidecar"));
}

#[test]
fn a_plain_session_changes_the_image_from_beside_it() {
    let plain = |sshd: &mut serde_json::Value| {
        let variables = sshd["env"].as_array_mut().unwrap();
        variables.iter_mut().find(|v| v["name"] == "SSH_JAIL").unwrap()["value"] = "False".into();
    };
    let pod = Pod::open("ims-sshd-customize", "busybox.sqsh", plain).listening();
    assert!(pod.probe("readinessProbe"));
    sftp(&pod, &format!("put {}/Cargo.toml /mnt/image/image-root/by-sftp\n", repository().display()));
    goodbye(&pod, "touch /mnt/image/complete");
    pod.ends_well();
    let (before, after) = (packed(&pod.volume.join("image.sqsh")), packed(&pod.volume.join("customized.sqsh")));
    assert_eq!(after.difference(&before).collect::<Vec<_>>(), ["- /by-sftp"]);
    assert!(before.is_subset(&after));
}

#[test]
fn failed_build_is_inspected_and_repaired() {
    let pod = Pod::open("ims-sshd-create-debug", "busybox.sqsh", |_| {}).listening();
    assert!(pod.volume.join("build_failed").exists());
    pod.says("echo repaired > /mnt/image/build/image-root/repaired");
    goodbye(&pod, "touch /mnt/image/complete");
    pod.ends_well();
    assert!(packed(&pod.volume.join("repaired.sqsh")).contains("- /repaired"));
}

#[test]
fn a_stopped_container_ends_in_order_and_in_time() {
    let pod = Pod::open("ims-sshd-customize", "busybox.sqsh", |_| {}).listening();
    let mut session = pod.ssh(&[]).arg("sleep 600").stderr(Stdio::null()).spawn().unwrap();
    wait_until("the session", || pod.says("ps").contains("sleep 600"));
    let began = Instant::now();
    succeed(&mut podman(&["stop", "--time=20", &pod.container("sshd")]));
    let took = began.elapsed();
    assert!(took < Duration::from_secs(10), "it took {took:?}");
    assert_eq!(pod.end("sshd"), 143);
    assert_eq!(pod.end("sidecar"), 0);
    assert!(!session.wait().unwrap().success());
    assert!(pod.volume.join("failed").exists() && pod.volume.join("exiting").exists());
    assert!(!pod.volume.join("customized.sqsh").exists());
}

#[test]
fn out_of_memory_ends_the_session_and_a_killed_container_is_not_packed() {
    let limited = |sshd: &mut serde_json::Value| sshd["resources"] = json!({"limits": {"memory": "96Mi"}});
    let pod = Pod::open("ims-sshd-customize", "busybox.sqsh", limited).listening();
    let _ = output(pod.ssh(&[]).arg("x=0123456789abcdef; while :; do x=$x$x; done"));
    // The OOM killer ends sessions before the supervisor.
    assert_eq!(pod.says("echo there").trim_end(), "there");
    assert!(pod.logs("sshd").contains("signal=\"SIGKILL\""), "{}", pod.logs("sshd"));
    // The OOM killer ends the supervisor once nothing else is left; with PID 1 all processes of the container end.
    let pid = i32::try_from(pod.state("sshd")["Pid"].as_u64().unwrap()).unwrap();
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    assert_eq!(pod.end("sshd"), 137);
    assert_eq!(pod.end("sidecar"), 1);
    assert!(pod.volume.join("failed").exists());
    assert!(!pod.volume.join("customized.sqsh").exists());
    assert!(pod.logs("sidecar").contains("without a verdict"), "{}", pod.logs("sidecar"));
}

#[test]
fn a_job_of_ims_fetches_customizes_and_publishes_an_image() {
    let dir = tempfile::tempdir_in(cache()).unwrap();
    let squashfs = std::fs::read(job::squashfs_of(&job::image(dir.path()))).unwrap();
    let server = FileServer::start(squashfs.clone(), &[Fault::ResetAfter(squashfs.len() / 2)]);
    let (bucket, ims) = (Bucket::new(), ImsServer::start());
    // Found by name: a static program resolves names itself.
    let url = server.url.replace("127.0.0.1", "localhost");
    let mut variables = bucket.variables();
    variables.extend(ims.variables());
    variables.push(("IMAGE_ROOT_ARCHIVE_NAME", "compute-ö".into()));
    variables.push(("DOWNLOAD_MD5SUM", job::md5(&squashfs)));
    for (_, value) in &mut variables {
        *value = value.replace("http://127.0.0.1", "http://localhost");
    }
    let endpoint = ims.url.replace("127.0.0.1", "localhost").replace("/apis/ims", "/token");
    std::fs::write(ims.oauth.path().join("endpoint"), endpoint).unwrap();
    let change = |spec: &mut serde_json::Value| {
        let prepare = container(spec, "prepare");
        prepare["command"] = json!(["ims-sshd", "prepare", "/mnt/image", url]);
        let variables: Vec<_> = variables.iter().map(|(name, value)| json!({"name": name, "value": value})).collect();
        prepare["env"] = variables.clone().into();
        let sidecar = container(spec, "sidecar")["env"].as_array_mut().unwrap();
        sidecar.retain(|variable| !variables.iter().any(|other| other["name"] == variable["name"]));
        sidecar.extend(variables);
        let oauth = ims.oauth.path();
        spec["volumes"]
            .as_array_mut()
            .unwrap()
            .push(json!({"name": "oauth", "hostPath": {"path": oauth, "type": "Directory"}}));
        for name in ["prepare", "sidecar"] {
            let mounts = container(spec, name)["volumeMounts"].as_array_mut().unwrap();
            mounts.push(json!({"name": "oauth", "mountPath": oauth, "readOnly": true}));
        }
    };
    let pod = Pod::of("ims-sshd-customize", "busybox.sqsh", change);
    wait_until("'waiting_on_user'", || ims.status() == "waiting_on_user");
    pod.says("echo new > /etc/motd");
    goodbye(&pod, "touch /tmp/complete");
    pod.ends_well();
    assert_eq!(ims.statuses(), ["fetching_image", "waiting_on_user", "packaging_artifacts", "success"]);
    let job = job::Published { bucket: &bucket, ims: &ims };
    job.is_whole(&pod.logs("sidecar"));
    assert_eq!(std::fs::read_to_string(job.unpacked(dir.path()).join("etc/motd")).unwrap(), "new\n");
}
