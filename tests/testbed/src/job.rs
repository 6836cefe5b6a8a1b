//! The parts of an IMS job: a volume, the programs of the two containers with their variables, and the servers.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::ims_server::ImsServer;
use crate::s3_server::Bucket;
use crate::{IMS_SSHD, Image, Mode, Volume, cache, directory, feed, processes_with, succeed, text};

/// A command for `ims-sshd` with these variables and no others from this process.
pub fn ims_sshd(arguments: &[&str], variables: &[(&str, String)]) -> Command {
    let mut command = Command::new(&IMS_SSHD);
    command.args(arguments).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").stdin(Stdio::null());
    // No request here takes longer unless it hangs.
    command.env("IMS_RETRY_LIMIT", "20").env("IMS_STALL_LIMIT", "2");
    // The cache may lie in the home of the user who has called sudo.
    command.envs(std::env::var("SUDO_UID").map(|user| ("SUDO_UID", user)));
    // The same tests run with either packer.
    command.envs(std::env::var("IMAGE_PACKER").map(|packer| ("IMAGE_PACKER", packer)));
    command.envs(variables.iter().map(|(n, v)| (*n, v.as_str())));
    command
}

/// Adds the boot files, without which an image is not published.
pub fn make_bootable(image_root: &Path) {
    std::fs::create_dir_all(image_root.join("boot")).unwrap();
    for (name, content) in [("vmlinuz", "a kernel"), ("initrd", "an initrd"), ("kernel-parameters", "quiet\n")] {
        std::fs::write(image_root.join("boot").join(name), content).unwrap();
    }
}

/// Makes a busybox tree that boots, in `dir`.
pub fn image(dir: &Path) -> PathBuf {
    let tree = dir.join("tree");
    succeed(Command::new("cp").arg("-aT").arg(cache().join("busybox")).arg(&tree));
    make_bootable(&tree);
    tree
}

pub fn squashfs_of(tree: &Path) -> PathBuf {
    let file = tree.with_extension("sqsh");
    succeed(Command::new("mksquashfs").args([tree, &file]).args(["-noappend", "-quiet", "-no-progress"]));
    file
}

/// Makes an [`image`] in a directory of its own.
pub fn bootable_image() -> (TempDir, PathBuf) {
    let dir = directory();
    let tree = image(dir.path());
    (dir, tree)
}

/// Makes an [`image`] in a directory of its own, and a squashfs of it.
pub fn packed_image() -> (TempDir, PathBuf, PathBuf) {
    let (dir, tree) = bootable_image();
    let squashfs = squashfs_of(&tree);
    (dir, tree, squashfs)
}

/// Makes a [`packed_image`], and returns the content of its squashfs, for a server.
pub fn served_image() -> (TempDir, PathBuf, Vec<u8>) {
    let (dir, tree, squashfs) = packed_image();
    (dir, tree, std::fs::read(squashfs).unwrap())
}

/// Processes of programs named `name` whose working directory is `tree`.
pub fn at_work_in(tree: &Path, name: &str) -> Vec<u32> {
    let in_tree = |pid: &u32| std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == tree);
    processes_with(name).into_iter().filter(in_tree).collect()
}

pub fn md5(bytes: &[u8]) -> String {
    sum("md5sum", bytes)
}

pub fn sha256(bytes: &[u8]) -> String {
    sum("sha256sum", bytes)
}

fn sum(program: &str, bytes: &[u8]) -> String {
    let output = feed(&mut Command::new(program), bytes);
    text(output.stdout).split(' ').next().unwrap().to_owned()
}

/// The report of a publication on standard output.
pub fn report(output: &Output) -> Value {
    report_in(&text(&output.stdout))
}

/// Last part of the location of a published image in its store: its ID or name.
pub fn place_of(report: &Value) -> String {
    let manifest = report["ims_image_record"]["link"]["path"].as_str().unwrap();
    manifest.rsplit('/').nth(1).unwrap().to_owned()
}

/// The report in a program's output: a JSON object indented by four, as upstream prints it.
pub fn report_in(said: &str) -> Value {
    let begin = said.find("{\n    \"").unwrap_or_else(|| panic!("no report: {said}"));
    let end = begin + said[begin..].find("\n}\n").unwrap_or_else(|| panic!("no end of the report: {said}")) + 3;
    assert!(said[begin..end].contains("\n    \"result\": \""), "{said}");
    serde_json::from_str(&said[begin..end]).unwrap_or_else(|e| panic!("{e}: {said}"))
}

/// A job on a volume with an image root that boots.
pub struct Job {
    pub volume: Volume,
    pub bucket: Bucket,
    pub ims: ImsServer,
}

impl Job {
    pub fn new() -> Self {
        Self::laid_out("image-root")
    }

    pub fn laid_out(below: &str) -> Self {
        let volume = Volume::laid_out(Image::Busybox, below);
        make_bootable(&volume.image_root);
        Self { volume, bucket: Bucket::new(), ims: ImsServer::start() }
    }

    pub fn variables(&self, mode: Mode) -> Vec<(&'static str, String)> {
        let jailed = if mode == Mode::Jailed { "True" } else { "False" };
        let mut variables = vec![
            ("IMS_ACTION", "customize".to_owned()),
            ("IMAGE_ROOT_PARENT", self.volume.parent.display().to_string()),
            ("IMAGE_ROOT_ARCHIVE_NAME", "compute-ö".to_owned()),
            ("ENABLE_DEBUG", "False".to_owned()),
            // Compression would only take time.
            ("IMAGE_COMPRESSION", "none".to_owned()),
            ("SSH_JAIL", jailed.to_owned()),
            ("BUILD_ARCH", "x86_64".to_owned()),
        ];
        variables.extend(self.bucket.variables());
        variables.extend(self.ims.variables());
        variables
    }

    /// Command for the sidecar.
    pub fn sidecar(&self, mode: Mode, further: &[(&'static str, &str)]) -> Command {
        let mut variables = self.variables(mode);
        variables.extend(further.iter().map(|(n, v)| (*n, (*v).to_owned())));
        let dir = self.volume.dir.path();
        let [keys, config, directory] =
            ["authorized_keys", "sshd_config", "ims"].map(|n| dir.join(n).display().to_string());
        let mut command = ims_sshd(&["sidecar", "--authorized-keys", &keys, "--sshd-config", &config], &variables);
        command.args(["--sshd-directory", &directory, "--authorities", &dir.join("ca").display().to_string()]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Path of the configuration of the job's sshd.
    pub fn sshd_config(&self) -> String {
        self.volume.dir.path().join("ims/sshd_config").display().to_string()
    }

    /// Asserts that store and IMS are empty: no object, no unfinished upload, no record.
    pub fn nothing_is_left(&self) {
        assert_eq!(self.bucket.keys(), [""; 0]);
        assert_eq!(self.bucket.unfinished_uploads(), 0);
        assert!(self.ims.state().images.is_empty(), "{:?}", self.ims.state().images);
    }

    /// Asserts that the job has succeeded and that [`Published::is_whole`].
    pub fn is_published(&self, output: &Output) {
        assert_eq!(self.ims.status(), "success", "{}", text(&output.stderr));
        Published { bucket: &self.bucket, ims: &self.ims }.is_whole(&text(&output.stdout));
    }

    /// Unpacks the published root.
    pub fn unpacked(&self) -> PathBuf {
        Published { bucket: &self.bucket, ims: &self.ims }.unpacked(self.volume.dir.path())
    }
}

/// The published image of a job.
pub struct Published<'a> {
    pub bucket: &'a Bucket,
    pub ims: &'a ImsServer,
}

impl Published<'_> {
    /// Asserts that all parts exist and agree. The expected values are not computed by the program under test.
    pub fn is_whole(&self, said: &str) {
        let report = report_in(said);
        assert_eq!(report["result"], "success");
        let state = self.ims.state();
        assert_eq!(state.refused, [""; 0]);
        assert_eq!(state.images.len(), 1, "{:?}", state.images);
        let (id, record) = state.images.first_key_value().unwrap();
        assert_eq!(state.job["resultant_image_id"], **id);
        assert_eq!(record["name"], "compute-ö");
        let keys: std::collections::BTreeSet<_> = self.bucket.keys().into_iter().collect();
        let wanted =
            ["boot_parameters", "initrd", "kernel", "manifest.json", "rootfs"].map(|key| format!("{id}/{key}"));
        assert_eq!(keys, wanted.into());

        let manifest = self.bucket.get(&format!("{id}/manifest.json"));
        assert_eq!(record["link"]["path"], format!("s3://{}/{id}/manifest.json", self.bucket.name));
        assert_eq!(record["link"]["etag"], manifest.header("etag").unwrap().trim_matches('"'));
        assert_eq!(manifest.header("content-type"), Some("application/json"));
        assert_eq!(manifest.header("x-amz-meta-md5sum"), Some(md5(&manifest.body).as_str()));
        let canonical =
            "import json, sys; sys.stdout.write(json.dumps(json.load(sys.stdin), indent=4, sort_keys=True))";
        let python = feed(Command::new("/usr/bin/python3").args(["-c", canonical]), &manifest.body);
        assert_eq!(text(&python.stdout), text(&manifest.body));
        let manifest: Value = serde_json::from_slice(&manifest.body).unwrap();
        assert_eq!(manifest["version"], "1.0");
        let types = [
            ("rootfs", "application/vnd.cray.image.rootfs.squashfs"),
            ("kernel", "application/vnd.cray.image.kernel"),
            ("initrd", "application/vnd.cray.image.initrd"),
            ("boot_parameters", "application/vnd.cray.image.parameters.boot"),
        ];
        let artifacts = manifest["artifacts"].as_array().unwrap();
        assert_eq!(artifacts.len(), types.len());
        for (artifact, (name, media_type)) in artifacts.iter().zip(types) {
            let object = self.bucket.get(&format!("{id}/{name}"));
            let header = |name: &str| object.header(name).unwrap_or_default().to_owned();
            assert_eq!(artifact["md5"], md5(&object.body), "{name}");
            assert_eq!(artifact["type"], media_type);
            assert_eq!(artifact["link"]["etag"], header("etag").trim_matches('"'));
            assert_eq!(artifact["link"]["path"], format!("s3://{}/{id}/{name}", self.bucket.name));
            assert_eq!(artifact["link"]["type"], "s3");
            assert_eq!(header("content-type"), media_type);
            assert_eq!(header("x-amz-meta-md5sum"), md5(&object.body));
            assert_eq!(header("x-amz-meta-sha256sum"), sha256(&object.body));
            assert_eq!(header("x-amz-meta-x-shasta-ims-image-id"), **id);
            assert_eq!(header("x-amz-meta-x-shasta-ims-job-id"), crate::ims_server::JOB);
            assert_eq!(header("x-amz-meta-x-shasta-ims-image-name"), "compute-%C3%B6");
        }
    }

    /// Unpacks the published root in `dir`.
    pub fn unpacked(&self, dir: &Path) -> PathBuf {
        let key = self.bucket.keys().into_iter().find(|key| key.ends_with("/rootfs")).unwrap();
        let (file, tree) = (dir.join("rootfs"), dir.join("published"));
        std::fs::write(&file, self.bucket.get(&key).body).unwrap();
        succeed(Command::new("unsquashfs").args(["-quiet", "-no-progress", "-dest"]).args([&tree, &file]));
        tree
    }
}
