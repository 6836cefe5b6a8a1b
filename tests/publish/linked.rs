//! The answer to the request that links an image in IMS may be lost or wrong: the image is this job's all the same.

use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};
use testbed::ims_server::{Fault, ImsServer};
use testbed::job::*;
use testbed::s3_server::Bucket;
use testbed::*;

/// An `upload` to a bucket and an IMS, without a job.
struct Upload {
    dir: tempfile::TempDir,
    tree: PathBuf,
    archive: PathBuf,
    bucket: Bucket,
    ims: ImsServer,
}

impl Upload {
    fn new() -> Self {
        let (dir, tree) = bootable_image();
        let archive = squashfs_of(&tree);
        Self { dir, tree, archive, bucket: Bucket::new(), ims: ImsServer::start() }
    }

    fn command(&self) -> Command {
        let mut variables = self.bucket.variables();
        variables.extend(self.ims.variables().into_iter().filter(|(name, _)| *name != "IMS_JOB_ID"));
        let mut command = ims_sshd(&["upload", "--name", "compute", "--archive"], &variables);
        command.args([&self.archive, &self.tree]).current_dir(self.dir.path());
        command.env("IMS_RETRY_LIMIT", "2");
        command
    }

    fn is_linked(&self) -> bool {
        self.ims.state().images.values().any(|image| !image["link"].is_null())
    }

    /// Starts an upload, and waits until IMS has the link and does not answer.
    fn silently_linked(&self) -> std::process::Child {
        self.ims.fail("PATCH /images", Fault::SilentlyDone);
        let child = self.command().env("IMS_STALL_LIMIT", "100").env("IMS_RETRY_LIMIT", "100").spawn().unwrap();
        wait_until("the image to be linked", || self.is_linked());
        child
    }

    /// Asserts that these images are registered, linked and whole, and nothing else is anywhere.
    fn has_images(&self, number: usize) {
        let state = self.ims.state();
        assert_eq!(state.images.len(), number, "{:?}", state.images);
        for (id, image) in &state.images {
            assert!(image["link"]["path"].as_str().is_some_and(|path| path.contains(id.as_str())), "{image}");
        }
        assert_eq!(self.bucket.keys().len(), number * 5, "{:?}", self.bucket.keys());
        let left: Vec<_> = std::fs::read_dir(self.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 2, "{left:?}");
    }
}

#[test]
fn link_whose_answer_is_lost_or_wrong_is_looked_for_and_stands() {
    let id = "00000000-0000-4000-8000-000000000001";
    let another = "00000000-0000-4000-8000-000000000002";
    for (what, fault) in [
        ("lost", Fault::LostAnswer),
        ("500", Fault::Done(500, Value::Null)),
        ("400", Fault::Done(400, Value::Null)),
        ("cut", Fault::Done(200, Value::Null)),
        ("another id", Fault::Done(200, json!({"id": another, "link": null}))),
        ("link null", Fault::Done(200, json!({"id": id, "link": null}))),
    ] {
        let upload = Upload::new();
        // Every attempt.
        for _ in 0..20 {
            upload.ims.fail("PATCH /images", fault.clone());
        }
        let output = upload.command().output().unwrap();
        assert!(output.status.success(), "{what}: {}", text(&output.stderr));
        let record = &report(&output)["ims_image_record"];
        assert_eq!((&record["id"], record["link"].is_object()), (&json!(id), true), "{what}: {record}");
        upload.has_images(1);
    }
}

#[test]
fn link_that_was_not_set_is_rolled_back() {
    for (what, fault) in [("500", Fault::Status(500)), ("wrong", Fault::Record(json!({"id": "x"})))] {
        let upload = Upload::new();
        for _ in 0..20 {
            upload.ims.fail("PATCH /images", fault.clone());
        }
        let output = upload.command().output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{what}: {output:?}");
        upload.has_images(0);
    }
}

#[test]
fn signal_while_the_link_is_unknown_rolls_back_record_and_objects() {
    let upload = Upload::new();
    let mut child = upload.silently_linked();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id().cast_signed()), nix::sys::signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
    upload.has_images(0);
}

#[test]
fn next_run_goes_on_with_a_link_whose_answer_a_killed_one_did_not_hear() {
    let upload = Upload::new();
    let mut child = upload.silently_linked();
    child.kill().unwrap();
    child.wait().unwrap();
    let again = upload.command().output().unwrap();
    assert!(again.status.success(), "{again:?}");
    assert!(text(&again.stderr).contains("was published before"), "{again:?}");
    upload.has_images(1);
}

#[test]
fn next_run_with_another_image_leaves_the_linked_one_as_it_is() {
    let upload = Upload::new();
    let mut child = upload.silently_linked();
    child.kill().unwrap();
    child.wait().unwrap();
    std::fs::write(upload.tree.join("boot/vmlinuz"), "another kernel").unwrap();
    let output = upload.command().output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let id = report(&output)["ims_image_record"]["id"].as_str().unwrap().to_owned();
    assert_eq!(upload.bucket.get(&format!("{id}/kernel")).body, b"another kernel");
    upload.has_images(2);
}
