//! Create jobs whose recipe is built on a node, by kiwi-ng there.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use testbed::job::*;
use testbed::node::{Lab, Node, NodeOptions, signal};
use testbed::rpms::REPOSITORY;
use testbed::tls_server::certificates;
use testbed::*;

use crate::hostile::{NODE, in_place_of_ssh};

/// Builds take longer than anything else here.
const LIMIT: Duration = Duration::from_mins(5);

/// A lab whose node has kiwi-ng, zypper and the repository.
fn lab() -> Lab {
    let lab = Lab::with(&[NodeOptions { can_build: true, ..NodeOptions::default() }]);
    symlink(cache().join("kiwi/bin/kiwi-ng"), lab.nodes[0].path("/usr/local/bin/kiwi-ng")).unwrap();
    lab
}

/// The volume of a create job whose recipe has been fetched.
struct Volume<'a> {
    lab: &'a Lab,
    node: &'a Node,
    dir: tempfile::TempDir,
}

impl<'a> Volume<'a> {
    fn new(lab: &'a Lab) -> Self {
        let dir = directory();
        certificates(dir.path());
        std::fs::create_dir(dir.path().join("image")).unwrap();
        let mut fetch = ims_sshd(&["fetch-recipe"], &[]);
        fetch.arg(dir.path().join("image/recipe")).arg(repository().join("tests/recipe/rpm-local"));
        fetch.args(["--set", &format!("REPOSITORY=dir://{}", REPOSITORY.display()), "--set", "PACKAGE_MANAGER=zypper"]);
        succeed(&mut fetch);
        succeed(
            ims_sshd(&["ca-rpm"], &[]).arg(dir.path().join("ca.crt")).arg("--output").arg(dir.path().join("ca-rpm")),
        );
        Self { lab, node: &lab.nodes[0], dir }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn with_script(self, lines: &str) -> Self {
        let file = self.at("image/recipe/config.sh");
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(file, text + "\n" + lines + "\n").unwrap();
        self
    }

    fn id(&self) -> String {
        format!("build-{}", self.dir.path().file_name().unwrap().to_str().unwrap().replace('.', ""))
    }

    /// The container that builds.
    fn build(&self, further: &[(&'static str, &str)]) -> Command {
        let mut variables = vec![
            ("REMOTE_BUILD_NODE", self.node.address.clone()),
            ("REMOTE_HEARTBEAT_TIMEOUT_COUNT", "1".into()),
            ("IMS_REMOTE_KEY", self.lab.key.display().to_string()),
            ("IMS_JOB_ID", self.id()),
            ("IMAGE_COMPRESSION", "none".into()),
        ];
        variables.extend(further.iter().map(|(name, value)| (*name, (*value).to_owned())));
        let mut command = ims_sshd(&["build"], &variables);
        command.arg(self.at("image/recipe")).arg(self.at("image")).arg("--authority").arg(self.at("ca.crt"));
        command.arg("--ca-rpm").arg(self.at("ca-rpm/cray_ca_cert-1.0.1-1.noarch.rpm"));
        let mut command = self.lab.moved(&command);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// The container that publishes.
    fn sidecar(&self) -> Output {
        std::fs::write(self.at("keys"), "").unwrap();
        let variables = [
            ("IMS_ACTION", "create".to_owned()),
            ("IMAGE_ROOT_PARENT", self.at("image").display().to_string()),
            ("IMAGE_ROOT_ARCHIVE_NAME", "compute".to_owned()),
            ("IMAGE_STORE", self.at("store").display().to_string()),
            ("IMS_JOB_ID", self.id()),
        ];
        let mut sidecar = ims_sshd(&["sidecar"], &variables);
        sidecar.arg("--authorized-keys").arg(self.at("keys")).arg("--sshd-directory").arg(self.at("ims"));
        sidecar.arg("--authorities").arg(self.at("ca")).output().unwrap()
    }

    fn names(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.at("image")).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// The published image, unpacked, which is the recipe's with the site's authority.
fn is_built(store: &Path, authority: &Path) -> PathBuf {
    let image = store.join("compute");
    for name in ["rootfs", "kernel", "initrd", "manifest.json"] {
        assert!(image.join(name).is_file(), "{name}");
    }
    let tree = image.join("tree");
    succeed(Command::new("unsquashfs").args(["-quiet", "-no-progress", "-dest"]).args([&tree, &image.join("rootfs")]));
    assert_eq!(std::fs::read_to_string(tree.join("etc/hostname")).unwrap(), "rpm-local\n");
    let authority = std::fs::read(authority).unwrap();
    assert!(std::fs::read(tree.join("var/lib/ca-certificates/ca-bundle.pem")).unwrap() == authority);
    assert_eq!(std::fs::metadata(tree.join("image")).unwrap().permissions().mode() & 0o7777, 0o700);
    tree
}

#[test]
fn recipe_is_built_and_packed_on_the_node_and_published_from_the_pod() {
    let lab = lab();
    let volume = Volume::new(&lab).with_script("stat -c %u /usr/bin/busybox > /owner");
    let before = volume.node.state();
    let output = volume.build(&[]).output().unwrap();
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    for words in
        ["running config.sh", "Installing bootstrap packages", "whole and unaltered", "nothing of the job is left"]
    {
        assert!(said.contains(words), "no '{words}': {said}");
    }
    assert_eq!(volume.names(), ["initrd", "kernel-parameters", "kiwi.log", "recipe", "transfer.sqsh", "vmlinuz"]);
    volume.node.is_as_before(&before);
    let output = volume.sidecar();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let tree = is_built(&volume.at("store"), &volume.at("ca.crt"));
    assert_eq!(std::fs::read_to_string(tree.join("owner")).unwrap(), "0\n");
}

#[test]
fn build_that_fails_on_the_node_is_told_by_the_sidecar_and_leaves_a_tree_for_a_shell() {
    let lab = lab();
    for debug in ["False", "True"] {
        let volume = Volume::new(&lab).with_script("echo the licence server is away >&2; exit 7");
        let before = volume.node.state();
        let output = volume.build(&[("ENABLE_DEBUG", debug)]).output().unwrap();
        let said = text(&output.stderr);
        assert!(output.status.success(), "{said}");
        let reason = std::fs::read_to_string(volume.at("image/build_failed")).unwrap();
        assert!(
            reason.contains("config.sh failed") && reason.contains("the licence server is away"),
            "{reason}\n{said}"
        );
        assert!(volume.at("image/kiwi.log").exists());
        assert_eq!(volume.at("image/build/image-root/etc").is_dir(), debug == "True", "{said}");
        assert!(!volume.names().iter().any(|name| name.starts_with(".ims-sshd.remote") || name == "transfer.sqsh"));
        volume.node.is_as_before(&before);
        if debug == "False" {
            let output = volume.sidecar();
            assert_eq!(output.status.code(), Some(1));
            assert!(report(&output)["error"].as_str().unwrap().contains("the licence server is away"));
        }
    }
}

#[test]
fn node_without_kiwi_is_refused_before_the_recipe_is_sent() {
    let lab = lab();
    std::fs::remove_file(lab.nodes[0].path("/usr/local/bin/kiwi-ng")).unwrap();
    let volume = Volume::new(&lab);
    let before = volume.node.state();
    let output = volume.build(&[]).output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("cannot use the build node") && said.contains("cannot run kiwi-ng: it is not installed"),
        "{said}"
    );
    assert!(!said.contains("the recipe is on"), "{said}");
    assert!(!volume.at("image/build_failed").exists());
    volume.node.is_as_before(&before);
}

#[test]
fn node_that_builds_out_of_order_or_keeps_the_results_to_itself_fails_the_build_within_the_limit() {
    let lab = Lab::new();
    let (_, path) = in_place_of_ssh(&lab, NODE);
    let silent = "nothing but keepalives was heard from the other side for 5 s";
    for (says, words) in [
        ("hello(), source(), file(), beat()", "it has sent 'file' out of order"),
        ("hello(), source(), say('built'), beat()", silent),
        ("hello(), source(), say('built'), say('built'), beat()", "it has sent 'built' out of order"),
        ("hello(), source(), say('built'), file('log'), beat()", silent),
    ] {
        let volume = Volume::new(&lab);
        let output = volume.build(&[("PATH", &path), ("SAYS", says)]).output().unwrap();
        let said = text(&output.stderr);
        // An init container hands a failed build over to the next one.
        assert!(output.status.success(), "{says}: {said}");
        let reason = std::fs::read_to_string(volume.at("image/build_failed")).unwrap();
        assert!(reason.contains(words), "{says}: {reason}\n{said}");
        assert_eq!(volume.names(), ["build_failed", "recipe"]);
    }
}

#[test]
fn build_on_a_node_ends_on_both_sides_with_the_pod_the_network_and_the_node_program() {
    let lab = lab();
    for how in ["TERM", "KILL", "cut", "node"] {
        let volume = Volume::new(&lab).with_script("sleep 1000 & touch /waits; sleep 2000");
        let before = volume.node.state();
        let log = std::fs::File::create(volume.at("log")).unwrap();
        let mut build = Ended::killed(volume.build(&[]).stdout(Stdio::null()).stderr(log).spawn().unwrap());
        let waits = volume.node.path(&format!("/tmp/ims_{}/image/build/image-root/waits", volume.id()));
        let said = || std::fs::read_to_string(volume.at("log")).unwrap();
        let began = std::time::Instant::now();
        while !waits.exists() {
            assert!(build.try_wait().unwrap().is_none() && began.elapsed() < LIMIT, "{how}: {}", said());
            std::thread::sleep(Duration::from_millis(50));
        }
        match how {
            "TERM" => signal(&build, Signal::SIGTERM),
            "KILL" => signal(&build, Signal::SIGKILL),
            "cut" => lab.cut(volume.node),
            _ => {
                let program = |line: &str| line.ends_with("ims-sshd node");
                let (number, _) = volume.node.processes().into_iter().find(|(_, line)| program(line)).unwrap();
                volume.node.send(number, "TERM");
            }
        }
        let code = build.wait().unwrap().code();
        let wanted = match how {
            "TERM" => Some(143),
            "KILL" => None,
            // An init container hands a failed build over to the next one.
            _ => Some(0),
        };
        assert_eq!(code, wanted, "{how}: {}", said());
        assert_eq!(volume.at("image/build_failed").exists(), how != "KILL", "{how}: {}", said());
        if how == "cut" {
            wait_within(Duration::from_secs(10), "the node's part to end", || volume.node.jobs().is_empty());
            lab.mend(volume.node);
        }
        volume.node.is_as_before(&before);
    }
}

#[test]
fn recipe_becomes_a_published_image_by_one_command_and_a_node() {
    let lab = lab();
    let before = lab.nodes[0].state();
    let dir = directory();
    certificates(dir.path());
    std::fs::create_dir(dir.path().join("work")).unwrap();
    std::fs::create_dir(dir.path().join("bin")).unwrap();
    let key = dir.path().join("key");
    std::fs::copy(&lab.key, &key).unwrap();
    std::fs::set_permissions(&key, PermissionsExt::from_mode(0o600)).unwrap();
    let options = ssh_options(&key).join(" ");
    let ssh = dir.path().join("bin/ssh");
    // A person's configuration of ssh.
    std::fs::write(&ssh, format!("#!/bin/sh\nexec /usr/bin/ssh {options} \"$@\"\n")).unwrap();
    std::fs::set_permissions(&ssh, PermissionsExt::from_mode(0o755)).unwrap();
    // No kiwi-ng here.
    let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", dir.path().join("bin").display());
    let create = |package_manager: &str, packages: &Path| {
        let variables =
            [("PATH", path.clone()), ("REMOTE_HEARTBEAT_TIMEOUT_COUNT", "1".into()), ("TIMEOUT", "1".into())];
        let mut create = ims_sshd(&["create"], &variables);
        create.arg(repository().join("tests/recipe/rpm-local")).args(["--output", "./store", "--name", "compute"]);
        create.args(["--node", &format!("root@{}", lab.nodes[0].address), "--compression", "none"]);
        create.arg("--work").arg(dir.path().join("work")).arg("--authority").arg(dir.path().join("ca.crt"));
        create.args(["--set", &format!("REPOSITORY=dir://{}", packages.display())]);
        create.args(["--set", &format!("PACKAGE_MANAGER={package_manager}"), "--exclude", "etc/hostname"]);
        lab.moved(&create).current_dir(dir.path()).output().unwrap()
    };
    let output = create("emerge", &REPOSITORY);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains("its package manager is 'emerge'"), "{output:?}");
    // The node then has no log of kiwi-ng and no other file to send.
    let output = create("dnf4", Path::new("/no/repository"));
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot build the recipe on root@") && said.contains("/no/repository"), "{said}");
    let output = create("dnf4", &REPOSITORY);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(report(&output)["result"], "success");
    let list = Command::new("unsquashfs").arg("-l").arg(dir.path().join("store/compute/rootfs")).output().unwrap();
    let list = text(&list.stdout);
    assert!(list.contains("squashfs-root/etc/passwd") && !list.contains("squashfs-root/etc/hostname"), "{list}");
    assert_eq!(std::fs::read_dir(dir.path().join("work/ims-sshd.create")).unwrap().count(), 0);
    lab.nodes[0].is_as_before(&before);
}
