//! Runs docs/KUBERNETES.md, command by command, in one shell. tests/pod/kubectl.py replaces the cluster, and says what
//! it leaves out; ssh, curl, the store, IMS and the pods' containers are real. The test has its own values for the two
//! blocks of a site.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use ims_sshd::pod::pod_files::SSHD_CONFIG;
use testbed::ims_server::ImsServer;
use testbed::s3_server::Bucket;
use testbed::tls_server::{Tls, certificates, port_of};
use testbed::{free_port, job, repository};

use crate::podman::*;

/// Commands of the page, block by block.
fn blocks(page: &str) -> Vec<&str> {
    page.split("```sh\n").skip(1).map(|rest| rest.split_once("```").unwrap().0).collect()
}

/// `block` with other values of the same variables.
fn with_values(block: &str, values: &[(&str, String)]) -> String {
    let names: Vec<_> = block.lines().map(|line| line.split_once('=').unwrap().0).collect();
    assert_eq!(names, values.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    let lines: Vec<_> = values.iter().map(|(name, value)| format!("{name}='{value}'\n")).collect();
    lines.concat()
}

/// A job whose store becomes unreachable during the session; the page then rescues the image.
fn store_down(secret: &Path, gone: &Tls) -> String {
    let (secret, port, pid) = (secret.display(), gone.port, gone.process.id());
    format!(
        "cp -a {secret} store.kept; echo -n https://127.0.0.1:{port} > {secret}/S3_ENDPOINT
        echo -n 1 > {secret}/IMS_RETRY_LIMIT
        configure ordinary \"$IMAGE/rootfs\" compute-late
        JOB=$(start); opened \"$JOB\"; reach \"$JOB\" 2226; kill {pid}
        login 2226 'echo late > /etc/motd; touch /tmp/complete'
        if published \"$JOB\" 2> store-was-down; then exit 7; fi
        rm -r {secret}; mv store.kept {secret}\n"
    )
}

/// Further steps: the page's functions on an abandoned job, and on an image without a digest.
const GIVEN_UP: &str = "configure ordinary \"$IMAGE/rootfs\" compute-failed
    JOB=$(start); opened \"$JOB\"; reach \"$JOB\" 2227; login 2227 touch /tmp/failed
    if published \"$JOB\" > given-up 2> marked-failed; then exit 7; fi
    IMS_SSHD_IMAGE=registry.example/ims-sshd:0.1.0
    if configure ordinary none none 2> no-digest; then exit 7; fi\n";

/// Replaces the page's ports by free ones, so that two runs of this test can share a machine.
fn with_own_ports(script: &str) -> String {
    let mut parts = script.split(" 222");
    let mut changed = parts.next().unwrap_or_default().to_owned();
    let mut own = BTreeMap::new();
    for part in parts {
        let (digit, rest) = part.split_at(1);
        let port = own.entry(digit.to_owned()).or_insert_with(free_port);
        changed.extend([" ", &port.to_string(), rest]);
    }
    assert_eq!(own.len(), 6, "{script}");
    changed
}

/// Removes pods that a run has left, and their volumes in podman.
struct Cluster<'a>(&'a Path);

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        let volumes = succeed(&mut podman(&["volume", "ls", "--quiet"]));
        for job in std::fs::read_dir(self.0.join("jobs")).into_iter().flatten() {
            let name = job.unwrap().file_name().into_string().unwrap();
            if std::thread::panicking() {
                for container in ["prepare", "sshd", "sidecar"] {
                    let output = output(&mut podman(&["logs", &format!("{name}-{container}")]));
                    let said = [output.stdout, output.stderr].concat();
                    eprintln!("--- log of {name}-{container}\n{}", String::from_utf8_lossy(&said));
                }
            }
            let _ = output(&mut podman(&["pod", "rm", "--force", "--time=0", &name]));
            for volume in volumes.lines().filter(|volume| volume.starts_with(&name)) {
                let _ = output(&mut podman(&["volume", "rm", "--force", volume]));
            }
        }
    }
}

#[test]
fn commands_of_the_kubernetes_page_publish_images() {
    let dir = tempfile::tempdir_in(cache().join("tests")).unwrap();
    let (state, bin, here) = (dir.path().join("state"), dir.path().join("bin"), dir.path().join("here"));
    for directory in [&state, &bin, &here] {
        std::fs::create_dir(directory).unwrap();
    }
    std::os::unix::fs::symlink(repository().join("deploy"), here.join("deploy")).unwrap();
    let python = cache().join("kubernetes-validate/bin/python");
    let stand_in = repository().join("tests/pod/kubectl.py");
    let kubectl = format!("#!/bin/sh\nexec {} -B {} \"$@\"\n", python.display(), stand_in.display());
    std::fs::write(bin.join("kubectl"), kubectl).unwrap();
    succeed(Command::new("chmod").arg("755").arg(bin.join("kubectl")));

    let tree = job::image(dir.path());
    std::fs::create_dir_all(tree.join("lib/modules/6.1.0")).unwrap();
    let (bucket, ims) = (Bucket::new(), ImsServer::start());
    // Certificates are signed by an unknown CA. One server disappears.
    certificates(dir.path());
    let front_of = |url: &str| Tls::start(dir.path(), port_of(url));
    let (store, gone, gateway) = (front_of(&bucket.endpoint), front_of(&bucket.endpoint), front_of(&ims.url));
    let https = |tls: &Tls| format!("https://127.0.0.1:{}", tls.port);
    let site = with_values(
        blocks(include_str!("../../docs/KUBERNETES.md"))[0],
        &[
            ("IMS_SSHD_IMAGE", format!("registry.example/ims-sshd@sha256:{}", "0".repeat(64))),
            ("S3_ENDPOINT", https(&store)),
            ("S3_REGION", "us-east-1".into()),
            ("S3_BUCKET", bucket.name.clone()),
            ("S3_ACCESS_KEY", "access".into()),
            ("S3_SECRET_KEY", "secret".into()),
            ("COMPONENTS", String::new()),
            ("CA", dir.path().join("ca.crt").display().to_string()),
            ("SOURCE", job::squashfs_of(&tree).display().to_string()),
        ],
    );
    let mut script = String::from("set -eu -o pipefail\ntrap 'kill $(jobs -p) 2> /dev/null || true' EXIT\n");
    let mut replaced = 0;
    for block in blocks(include_str!("../../docs/KUBERNETES.md")) {
        if block.starts_with("IMS_SSHD_IMAGE=") {
            script += &site;
            replaced += 1;
        } else if block.starts_with("IMS_URL=") {
            let oauth = ims.oauth.path().display().to_string();
            script += &with_values(block, &[("IMS_URL", format!("{}/apis/ims", https(&gateway))), ("OAUTH", oauth)]);
            replaced += 1;
        } else if block.starts_with("kubectl patch ") {
            script += &store_down(&state.join("secret/ims-sshd-store"), &gone);
            script += block;
            replaced += 1;
        } else {
            script += block;
        }
    }
    assert_eq!(replaced, 3);
    script += GIVEN_UP;
    let script = with_own_ports(&script);

    let cluster = Cluster(&state);
    let words: Vec<_> = {
        let command = podman(&[]);
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        words.map(|word| word.to_str().unwrap().to_owned()).collect()
    };
    let mut shell = Command::new("timeout");
    shell.args(["600", "bash", "-c", &script]).current_dir(&here).stdin(Stdio::null());
    shell.env("PATH", format!("{}:{}", bin.display(), std::env::var("PATH").unwrap()));
    shell.env("CONTAINERS_CONF", repository().join("tests/containers.conf"));
    shell.env("KUBECTL_STATE", &state).env("KUBECTL_RENDERER", repository().join("tests/deploy"));
    shell.env("KUBECTL_PODMAN", serde_json::to_string(&words).unwrap());
    shell.env("KUBECTL_IMAGE", IMAGE).env("KUBECTL_SSHD_CONFIG", SSHD_CONFIG);
    let said = succeed(&mut shell);

    // Images that the jobs published, as they were fetched.
    let motd = |rootfs: &Path| succeed(Command::new("unsquashfs").args(["-cat"]).arg(rootfs).arg("etc/motd"));
    assert_eq!(motd(&here.join("rootfs")), "customized");
    assert_eq!(std::fs::read_to_string(here.join("kernel")).unwrap(), "a kernel");
    let manifest = std::fs::read_to_string(here.join("manifest.json")).unwrap();
    assert!(manifest.contains("application/vnd.cray.image.rootfs.squashfs"), "{manifest}");
    let mut next: Vec<_> = std::fs::read_dir(&here)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("rootfs-of-ims-sshd-customize-"))
        .map(|path| motd(&path))
        .collect();
    next.sort();
    assert_eq!(next, ["one", "other"]);
    assert_eq!(said.lines().filter(|line| *line == "customized").count(), 2, "both begin with the first: {said}");
    // Asked at once, `status` may answer before the mark is noticed.
    assert!(
        [": serving", ": closing", ": packing", ": uploading", ": done"].iter().any(|stage| said.contains(stage)),
        "{said}"
    );
    assert_eq!(motd(&here.join("rootfs-late")), "late");
    let complaint = |file: &str| std::fs::read_to_string(here.join(file)).unwrap();
    assert!(complaint("store-was-down").contains("has published nothing"), "{}", complaint("store-was-down"));
    assert!(complaint("marked-failed").contains("has published nothing"), "{}", complaint("marked-failed"));
    assert_eq!(complaint("given-up"), "");
    assert!(complaint("no-digest").contains("expected NAME@sha256:DIGEST"), "{}", complaint("no-digest"));
    // Registered without a job in IMS.
    assert!(said.contains("\"ims_image_record\"") && said.contains("compute-registered"), "{said}");
    let images = ims.state().images.values().cloned().collect::<Vec<_>>();
    assert_eq!(images.len(), 1);
    assert_eq!((&images[0]["name"], images[0]["link"].is_object()), (&"compute-registered".into(), true));
    drop(cluster);
}
