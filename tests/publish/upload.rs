//! From a packed image to a store.

use std::process::{Command, Stdio};

use crate::ims_server::ImsServer;
use crate::job::*;
use crate::s3_server::{Bucket, Sink};
use crate::support::*;

#[test]
fn a_folder_is_a_store_like_any_other() {
    let dir = folder();
    let tree = image(dir.path());
    let squashfs = squashfs_of(&tree);
    let store = dir.path().join("store");
    let output = ims_sshd(&["upload", "--name", "compute", "--store"], &[])
        .arg(&store)
        .arg("--archive")
        .args([&squashfs, &tree])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(text(&output.stderr).contains("registered nowhere"), "{output:?}");
    let report = report(&output);
    let id = report["ims_image_record"]["id"].as_str().unwrap();
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(store.join(id).join("manifest.json")).unwrap()).unwrap();
    for artifact in manifest["artifacts"].as_array().unwrap() {
        let path = artifact["link"]["path"].as_str().unwrap();
        let content = std::fs::read(path.strip_prefix("file://").unwrap()).unwrap();
        assert_eq!(artifact["md5"], md5(&content), "{path}");
    }
    assert_eq!(std::fs::read(store.join(id).join("rootfs")).unwrap(), std::fs::read(squashfs).unwrap());
    assert_eq!(manifest["artifacts"].as_array().unwrap().len(), 4);
}

#[test]
fn a_packed_image_is_registered_without_a_job() {
    let dir = folder();
    let tree = image(dir.path());
    let squashfs = squashfs_of(&tree);
    let (bucket, ims) = (Bucket::new(), ImsServer::start());
    let mut variables = bucket.variables();
    variables.extend(ims.variables().into_iter().filter(|(name, _)| *name != "IMS_JOB_ID"));
    let debug = tree.join("etc/passwd");
    let mut command = ims_sshd(&["upload", "--name", "compute"], &variables);
    command.arg("--debug-kernel").arg(&debug).arg("--archive").args([&squashfs, &tree]).current_dir(dir.path());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let state = ims.state();
    let (id, record) = state.images.first_key_value().unwrap();
    assert_eq!(record["name"], "compute");
    let object = bucket.get(&format!("{id}/debug_kernel"));
    assert_eq!(object.header("content-type"), Some("application/vnd.cray.image.debug.kernel"));
    assert_eq!(state.changes.len(), 2, "the job is nobody's: {:?}", state.changes);
}

#[test]
fn a_large_image_is_uploaded_without_being_read_into_memory() {
    let dir = folder();
    let tree = image(dir.path());
    let file = dir.path().join("sparse.sqsh");
    succeed(Command::new("truncate").args(["-s", "1G"]).arg(&file));
    let sink = Sink::start();
    let mut command = ims_sshd(&["upload", "--archive"], &sink.variables());
    command.args([&file, &tree]).current_dir(dir.path());
    let most = memory_of(command.stdout(Stdio::null()).spawn().unwrap());
    println!("1 GiB uploaded with {} MiB of memory at the most", most >> 10);
    assert!(most <= 128 << 10, "{most} KiB");
    let sizes = sink.sizes.lock().unwrap();
    assert!(sizes.iter().any(|(path, size)| path.ends_with("/rootfs") && *size == 1 << 30), "{sizes:?}");
}

/// Waits for its end, and returns the most memory that it had, in KiB.
fn memory_of(mut child: std::process::Child) -> u64 {
    let mut most = 0;
    loop {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse().ok());
        most = most.max(peak.unwrap_or(0));
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success());
            return most;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
