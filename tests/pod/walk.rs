//! docs/KUBERNETES.md, command by command, in one shell. In the place of a cluster stands tests/pod/kubectl.py, which says what it leaves
//! out; ssh, curl, the store, IMS and the pods' containers are real. The two blocks of a site's own values are the test's.

use std::path::Path;
use std::process::{Command, Stdio};

use ims_sshd::publish::pod_files::SSHD_CONFIG;

use crate::ims_server::ImsServer;
use crate::job;
use crate::podman::*;
use crate::s3_server::Bucket;

/// The page's commands, block by block.
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

/// Ends the pods that a walk has left, and the volumes that podman keeps of each.
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
fn the_page_leads_from_nothing_to_published_images() {
    let dir = tempfile::tempdir_in(cache().join("tests")).unwrap();
    let (state, bin, here) = (dir.path().join("state"), dir.path().join("bin"), dir.path().join("here"));
    for folder in [&state, &bin, &here] {
        std::fs::create_dir(folder).unwrap();
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
    let site = with_values(
        blocks(include_str!("../../docs/KUBERNETES.md"))[0],
        &[
            ("IMS_SSHD_IMAGE", format!("registry.example/ims-sshd@sha256:{}", "0".repeat(64))),
            ("S3_ENDPOINT", bucket.endpoint.clone()),
            ("S3_BUCKET", bucket.name.clone()),
            ("S3_ACCESS_KEY", "access".into()),
            ("S3_SECRET_KEY", "secret".into()),
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
            script += &with_values(block, &[("IMS_URL", ims.url.clone()), ("OAUTH", oauth)]);
            replaced += 1;
        } else {
            script += block;
        }
    }
    assert_eq!(replaced, 2);
    // Whoever follows the page has these free; two runs of this test on one machine do not.
    for port in 2222..=2225 {
        let port: u16 = port;
        assert!(script.contains(&format!(" {port}")), "{port}");
        script = script.replace(&format!(" {port}"), &format!(" {}", free_port()));
    }
    assert!(!script.contains(" 222"), "a port that is not this test's own: {script}");

    let cluster = Cluster(&state);
    let words: Vec<_> = {
        let command = podman(&[]);
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        words.map(|word| word.to_str().unwrap().to_owned()).collect()
    };
    let mut shell = Command::new("bash");
    shell.args(["-c", &script]).current_dir(&here).stdin(Stdio::null());
    shell.env("PATH", format!("{}:{}", bin.display(), std::env::var("PATH").unwrap()));
    shell.env("CONTAINERS_CONF", repository().join("tests/containers.conf"));
    shell.env("KUBECTL_STATE", &state).env("KUBECTL_RENDERER", repository().join("tests/deploy"));
    shell.env("KUBECTL_PODMAN", serde_json::to_string(&words).unwrap());
    shell.env("KUBECTL_IMAGE", IMAGE).env("KUBECTL_SSHD_CONFIG", SSHD_CONFIG);
    let said = succeed(&mut shell);

    // What each job has published, as it was fetched.
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
    assert!([": closing", ": packing", ": uploading", ": done"].iter().any(|stage| said.contains(stage)), "{said}");
    // Registered, without a job of IMS.
    assert!(said.contains("\"ims_image_record\"") && said.contains("compute-registered"), "{said}");
    let images = ims.state().images.values().cloned().collect::<Vec<_>>();
    assert_eq!(images.len(), 1);
    assert_eq!((&images[0]["name"], images[0]["link"].is_object()), (&"compute-registered".into(), true));
    drop(cluster);
}
