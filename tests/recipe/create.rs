//! From a recipe to a published image by one command.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use testbed::job::*;
use testbed::s3_server::Bucket;
use testbed::tls_server::certificates;
use testbed::*;

use crate::recipes::*;

fn create(dir: &Path, recipe: &Path, output: &str, options: &[&str], variables: &[(&str, String)]) -> Output {
    creation(dir, recipe, output, options, variables).output().unwrap()
}

fn creation(dir: &Path, recipe: &Path, output: &str, options: &[&str], variables: &[(&str, String)]) -> Command {
    let mut command = ims_sshd(&["create", recipe.to_str().unwrap(), "--output", output], variables);
    command.args(["--work", &dir.join("work").display().to_string(), "--name", "compute"]);
    command
        .args(["--set", &format!("REPOSITORY=dir://{}", REPOSITORY.display()), "--authority"])
        .arg(dir.join("ca.crt"));
    command.args(options).env("PATH", path()).current_dir(dir);
    command
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
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON and nothing else");
    assert_eq!(result["result"], "success");
    assert!(text(&output.stderr).contains("Installing bootstrap packages"), "kiwi-ng's own lines");
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
    // A run whose publication failed has left an archive and the record of it, of an image root that is gone.
    let left = dir.path().join("work/ims-sshd.create/rpm-local");
    for name in ["compute.sqsh", ".ims-sshd.packed"] {
        std::fs::write(left.join(name), "left behind").unwrap();
    }
    let output = create(dir.path(), &recipe, "./out", &["--set", "PACKAGE_MANAGER=zypper"], &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    // Without a kernel in the image, none is published.
    assert!(dir.path().join("out/compute/manifest.json").exists());
}

#[test]
fn unusable_arguments_are_refused_before_anything_is_created() {
    let (dir, recipe) = prepared();
    let missing = dir.path().join("missing");
    let cases: [(&Path, &str, &[&str], &str); 4] = [
        (&recipe, "./no/such", &[], "cannot write to the store ./no/such: "),
        (&recipe, "./out", &["--signing-key", "./no.asc"], "cannot read the signing key ./no.asc: No such file"),
        (&recipe, "./out", &["--signing-key", "/dev/zero"], "cannot read the signing key /dev/zero: it is a character"),
        (&missing, "./out", &[], "missing': No such file"),
    ];
    for (recipe, output, options, reason) in cases {
        let output = creation(dir.path(), recipe, output, &[], &[]).args(options).output().unwrap();
        let said = text(&output.stderr);
        assert!(!output.status.success() && said.contains(reason), "{reason}: {said}");
        assert_eq!(std::fs::read_dir(dir.path().join("work")).unwrap().count(), 0, "{reason}: {said}");
    }
    let help = text(&ims_sshd(&["create", "--help"], &[]).output().unwrap().stdout);
    assert!(help.contains("[default: the recipe's name]"), "{help}");
    // These are refused once the directory has been created, and leave none.
    let no_recipe = dir.path().join("ca.crt");
    let cases = [(&no_recipe, "./out", "as a recipe"), (&recipe, "./work/ims-sshd.create/rpm-local", "outside")];
    for (recipe, output, reason) in cases {
        let said = text(&create(dir.path(), recipe, output, &[], &[]).stderr);
        assert!(said.contains(reason), "{reason}: {said}");
        assert_eq!(std::fs::read_dir(dir.path().join("work/ims-sshd.create")).unwrap().count(), 0, "{said}");
    }
    std::fs::write(dir.path().join("ca.crt"), "").unwrap();
    let said = text(&create(dir.path(), &recipe, "./out", &["--set", "PACKAGE_MANAGER=emerge"], &[]).stderr);
    assert!(said.contains("it holds no certificate"), "{said}");
}

#[test]
fn what_cannot_be_built_is_refused_before_its_repositories_are_waited_for() {
    let (dir, recipe) = prepared();
    let began = Instant::now();
    let missing = ["--set", "PACKAGE_MANAGER=emerge", "--set", "REPOSITORY=dir:///nowhere"];
    let said = text(&create(dir.path(), &recipe, "./out", &missing, &[]).stderr);
    assert!(said.contains("its package manager is 'emerge'"), "{said}");
    assert!(began.elapsed().as_secs() < 100, "repositories are waited for 500 s: {said}");
}

/// A creation whose build fails and has opened a shell; with its standard error, and the line that logs in.
fn with_shell(dir: &Path, recipe: &Path) -> (std::process::Child, std::thread::JoinHandle<String>, String) {
    let options = ["--set", "PACKAGE_MANAGER=zypper", "--debug-shell"];
    let mut command = creation(dir, recipe, "./out", &options, &[]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (mut errors, mut said) = (BufReader::new(child.stderr.take().unwrap()), String::new());
    let login = loop {
        let before = said.len();
        assert!(errors.read_line(&mut said).unwrap() > 0, "no line that logs in: {said}");
        let line = said[before..].trim();
        if line.starts_with("ssh -F ") {
            break line.to_owned();
        }
    };
    let errors = std::thread::spawn(move || {
        errors.read_to_string(&mut said).unwrap();
        said
    });
    (child, errors, login)
}

#[test]
fn failed_build_opens_a_shell_and_is_published_only_if_marked_complete() {
    let (dir, recipe) = prepared();
    let broken = dir.path().join("compute");
    succeed(Command::new("cp").arg("-aT").arg(recipe).arg(&broken));
    write(&broken, "config.sh", "echo 'the licence server is away'; false\n");
    let cause = "config.sh failed with: it wrote nothing to standard error, and last to standard output 'the licence \
                 server is away'";
    for is_mended in [false, true] {
        let (child, errors, login) = with_shell(dir.path(), &broken);
        let line = if is_mended { "echo mended > /etc/motd; touch /tmp/complete" } else { "touch /tmp/failed" };
        let session = Command::new("sh").args(["-c", &format!("{login} '{line}'")]).output().unwrap();
        let ended = child.wait_with_output().unwrap();
        let (code, errors) = (ended.status.code(), errors.join().unwrap());
        let result: Option<serde_json::Value> = serde_json::from_slice(&ended.stdout).ok();
        assert_eq!(result.is_some(), is_mended, "{}", text(&ended.stdout));
        assert_eq!(ended.stdout.is_empty(), !is_mended, "JSON and nothing else");
        assert!(session.status.success(), "{session:?}\n{errors}");
        assert_eq!(code, Some(i32::from(!is_mended)), "{errors}");
        assert_eq!(errors.matches(cause).count(), 1, "{errors}");
        assert_eq!(dir.path().join("out").exists(), is_mended);
        assert_eq!(dir.path().join("work/ims-sshd.create/compute/build/image-root").exists(), !is_mended);
    }
    let motd = ["-cat", "out/compute/rootfs", "etc/motd"];
    assert_eq!(succeed(Command::new("unsquashfs").args(motd).current_dir(dir.path())), "mended\n");
    let list = succeed(Command::new("unsquashfs").args(["-lls", "out/compute/rootfs"]).current_dir(dir.path()));
    let image = list.lines().find(|line| line.ends_with("squashfs-root/image")).unwrap();
    assert!(image.starts_with("drwx------ "), "{image}");
    for name in ["/.profile", "/.kconfig", "/tmp/complete"] {
        assert!(!list.contains(&format!("squashfs-root{name}")), "{name}");
    }
}

#[test]
fn build_that_fails_before_there_is_a_shell_opens_none() {
    let (dir, recipe) = prepared();
    let broken = dir.path().join("compute");
    succeed(Command::new("cp").arg("-aT").arg(recipe).arg(&broken));
    let description = std::fs::read_to_string(broken.join("config.xml")).unwrap();
    write(&broken, "config.xml", &description.replace("tiny-kernel", "tiny-kernl"));
    let output = create(dir.path(), &broken, "./out", &["--set", "PACKAGE_MANAGER=zypper", "--debug-shell"], &[]);
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(said.contains("No provider of 'tiny-kernl' found") && said.contains("no shell is opened"), "{said}");
}

#[test]
fn work_directory_that_another_user_owns_or_can_write_to_is_refused() {
    let (dir, recipe) = prepared();
    let work = dir.path().join("work");
    let cases = [(1234, 0o755, "belongs to user 1234"), (0, 0o777, "users other than its owner can write to")];
    for (owner, mode, reason) in cases {
        std::os::unix::fs::chown(&work, Some(owner), None).unwrap();
        std::fs::set_permissions(&work, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        let output = create(dir.path(), &recipe, "./out", &["--set", "PACKAGE_MANAGER=zypper"], &[]);
        assert_eq!(output.status.code(), Some(1));
        let said = text(&output.stderr);
        assert!(said.contains(reason) && said.contains("name with --work a directory"), "{said}");
        assert_eq!(std::fs::read_dir(&work).unwrap().count(), 0);
    }
}
