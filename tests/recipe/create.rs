//! From a recipe to a published image by one command.

use std::path::Path;
use std::process::{Command, Output};

use testbed::job::*;
use testbed::s3_server::Bucket;
use testbed::tls_server::certificates;
use testbed::*;

use crate::recipes::*;

fn create(dir: &Path, recipe: &Path, output: &str, options: &[&str], variables: &[(&str, String)]) -> Output {
    let mut command = ims_sshd(&["create", recipe.to_str().unwrap(), "--output", output], variables);
    command.args(["--work", &dir.join("work").display().to_string(), "--name", "compute"]);
    command
        .args(["--set", &format!("REPOSITORY=dir://{}", REPOSITORY.display()), "--authority"])
        .arg(dir.join("ca.crt"));
    command.args(options).env("PATH", path()).current_dir(dir).output().unwrap()
}

fn prepared() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = directory();
    certificates(dir.path());
    std::fs::create_dir(dir.path().join("work")).unwrap();
    (dir, repository().join("tests/recipe/rpm-local"))
}

#[test]
fn recipe_becomes_a_published_image_in_a_directory_and_in_a_bucket() {
    let (dir, recipe) = prepared();
    let archive = dir.path().join("recipe.tgz");
    succeed(Command::new("tar").arg("-czf").arg(&archive).arg("-C").arg(&recipe).arg("."));
    let set = ["--set", "PACKAGE_MANAGER=zypper"];
    let output = create(dir.path(), &recipe, "./out", &set, &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let image = dir.path().join("out/compute");
    for name in ["rootfs", "kernel", "initrd", "manifest.json"] {
        assert!(image.join(name).is_file(), "{name}");
    }
    let tree = dir.path().join("tree");
    succeed(Command::new("unsquashfs").args(["-quiet", "-no-progress", "-dest"]).args([&tree, &image.join("rootfs")]));
    assert_eq!(std::fs::read_to_string(tree.join("etc/hostname")).unwrap(), "rpm-local\n");
    let authority = std::fs::read(dir.path().join("ca.crt")).unwrap();
    assert!(std::fs::read(tree.join("var/lib/ca-certificates/ca-bundle.pem")).unwrap() == authority);
    let left: Vec<_> = std::fs::read_dir(dir.path().join("work/ims-sshd.create")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");

    let bucket = Bucket::new();
    let to = format!("s3://{}", bucket.name);
    let output = create(dir.path(), &archive, &to, &set, &bucket.variables());
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(bucket.keys().iter().any(|key| key.ends_with("/rootfs")), "{:?}", bucket.keys());
}

#[test]
fn failed_creation_keeps_what_was_built_and_the_next_one_begins_anew() {
    let (dir, recipe) = prepared();
    let output = create(dir.path(), &recipe, "./out", &["--set", "PACKAGE_MANAGER=emerge"], &[]);
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert_eq!(said.matches("its package manager is 'emerge'").count(), 1, "{said}");
    assert!(!dir.path().join("out").exists());
    assert!(dir.path().join("work/ims-sshd.create/rpm-local/recipe/config.xml").exists());
    let output = create(dir.path(), &recipe, "./out", &["--set", "PACKAGE_MANAGER=zypper"], &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    // Without a kernel in the image, none is published.
    assert!(dir.path().join("out/compute/manifest.json").exists());
}
