//! Create jobs on this machine: from a recipe to an image, by the programs of a pod.

use std::path::Path;
use std::process::Command;

use testbed::{directory, repository, succeed};

use crate::commands::Place;
use crate::recipes::{REPOSITORY, write};

/// Imports the recipe in `tree`, and starts a job that builds it.
fn start(place: &Place, tree: &Path, name: &str, is_opened: bool) {
    let values = format!("zypper,dir://{}", REPOSITORY.display());
    let tree = tree.display().to_string();
    let recipe = ["recipes", "import", &tree, "--name", name, "--linux-distribution", "sles15"];
    let dictionary =
        ["--template-dictionary-key", "PACKAGE_MANAGER,REPOSITORY", "--template-dictionary-value", &values];
    place.succeed(&[recipe.as_slice(), &dictionary].concat());
    let debug = if is_opened { "true" } else { "false" };
    let job = ["jobs", "create", "--job-type", "create", "--artifact-id", name, "--public-key-id", "me"];
    let built = ["--image-root-archive-name", name, "--enable-debug", debug];
    let job = place.json(&[job.as_slice(), &built].concat());
    assert_eq!((&job["status"], &job["job_type"]), (&"creating".into(), &"create".into()), "{job}");
}

/// A recipe whose `config.sh` fails.
fn broken(dir: &Path) {
    succeed(Command::new("cp").arg("-aT").arg(repository().join("tests/recipe/rpm-local")).arg(dir));
    write(dir, "config.sh", "echo broken > /etc/hostname; echo 'the licence server is away'; false\n");
}

#[test]
fn recipe_becomes_an_image() {
    let place = Place::new();
    start(&place, &repository().join("tests/recipe/rpm-local"), "tiny", false);
    place.wait_for("tiny", "success");
    let (image, published) = place.published("tiny");
    assert_eq!(place.json(&["jobs", "describe", "tiny"])["resultant_image_id"], image["id"]);
    let mut unsquashfs = Command::new("unsquashfs");
    let hostname = succeed(unsquashfs.arg("-cat").arg(published.join("rootfs")).arg("etc/hostname"));
    assert_eq!(hostname, "rpm-local\n");
    assert!(["kernel", "initrd"].iter().all(|name| published.join(name).is_file()));
}

#[test]
fn failed_build_ends_its_job_with_the_cause() {
    let (place, dir) = (Place::new(), directory());
    broken(dir.path());
    start(&place, dir.path(), "broken", false);
    place.wait_for("broken", "error");
    let log = place.succeed(&["jobs", "logs", "broken"]);
    assert!(log.contains("config.sh failed with") && log.contains("the licence server is away"), "{log}");
    assert!(!place.succeed(&["images", "list"]).contains("broken"));
}

#[test]
fn failed_build_is_opened_for_its_user() {
    let (place, dir) = (Place::new(), directory());
    broken(dir.path());
    start(&place, dir.path(), "broken", true);
    place.wait_for("broken", "waiting_on_user");
    assert_eq!(place.says("broken", "cat /etc/hostname; touch /tmp/failed"), "broken\n");
    place.wait_for("broken", "error");
    assert!(!place.succeed(&["images", "list"]).contains("broken"));
}
