//! Work on one source is not continued with another one.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use testbed::file_server::FileServer;
use testbed::job::*;
use testbed::*;

use crate::customize::nothing_stays;

/// A squashfs of a tree that has the file /etc/NAME.
fn squashfs_with(dir: &Path, name: &str) -> PathBuf {
    let place = dir.join(name);
    std::fs::create_dir(&place).unwrap();
    let tree = image(&place);
    std::fs::create_dir_all(tree.join("etc")).unwrap();
    std::fs::write(tree.join("etc").join(name), name).unwrap();
    squashfs_of(&tree)
}

fn customize(dir: &Path, source: &str, options: &[&str], command: &str) -> Output {
    let mut customize = ims_sshd(&["customize", source, "--output", "out", "--work", "work"], &[]);
    customize.args(options).args(["--kernel", "vmlinuz", "--initrd", "initrd", "--", "sh", "-c", command]);
    customize.current_dir(dir).output().unwrap()
}

fn prepare(dir: &Path, arguments: &[&str], variables: &[(&str, String)]) -> Output {
    let mut prepare = ims_sshd(&["prepare"], variables);
    prepare.args(arguments).current_dir(dir).output().unwrap()
}

fn refused(output: &Output, why: &str) {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = text(&output.stderr);
    assert!(said.contains(why) && said.contains("--fresh drops it with all changes"), "{said}");
}

#[test]
fn prepare_on_a_used_volume_names_the_source_and_time_and_fresh() {
    let dir = directory();
    let [one, two] = ["one", "two"].map(|name| squashfs_with(dir.path(), name));
    let [one, two] = [&one, &two].map(|path| path.to_str().unwrap());
    let prepare = |source: &str| prepare(dir.path(), &["parent", source], &[]);
    assert!(prepare(one).status.success());
    let made = format!("made of {one} ({} bytes), 20", std::fs::metadata(one).unwrap().len());
    let again = prepare(one);
    let said = text(&again.stderr);
    assert!(again.status.success() && said.contains("image-root is there already"), "{said}");
    assert!(said.contains(&made) && said.contains("--fresh drops it and begins anew"), "{said}");
    let other = prepare(two);
    refused(&other, &made);
}

#[test]
fn changes_are_not_applied_to_another_image_at_the_same_path() {
    let dir = directory();
    let [one, two] = ["one", "two"].map(|name| squashfs_with(dir.path(), name));
    std::fs::copy(&one, dir.path().join("image.sqsh")).unwrap();
    let kept = customize(dir.path(), "image.sqsh", &[], "touch /etc/kept; exit 3");
    assert_eq!(kept.status.code(), Some(3), "{kept:?}");
    std::fs::rename(dir.path().join("image.sqsh"), dir.path().join("aside")).unwrap();
    std::fs::rename(&two, dir.path().join("image.sqsh")).unwrap();
    refused(&customize(dir.path(), "image.sqsh", &[], "true"), "it was made of an earlier version of");
    // With the image that they belong to, the changes are continued.
    std::fs::rename(dir.path().join("image.sqsh"), &two).unwrap();
    std::fs::rename(dir.path().join("aside"), dir.path().join("image.sqsh")).unwrap();
    let again = customize(dir.path(), "image.sqsh", &[], "test -e /etc/kept && exit 3");
    assert_eq!(again.status.code(), Some(3), "{again:?}");
    std::fs::rename(&two, dir.path().join("image.sqsh")).unwrap();
    let fresh = customize(dir.path(), "image.sqsh", &["--fresh"], "test ! -e /etc/kept && test -e /etc/two");
    assert!(fresh.status.success(), "{fresh:?}");
    assert!(text(&fresh.stderr).contains("dropped the earlier changes"), "{fresh:?}");
    nothing_stays(dir.path());
}

#[test]
fn changed_time_alone_is_the_same_image_and_differences_are_named() {
    let dir = directory();
    let [one, two] = ["one", "two"].map(|name| squashfs_with(dir.path(), name));
    let image = dir.path().join("image.sqsh");
    std::fs::copy(&one, &image).unwrap();
    let kept = customize(dir.path(), "image.sqsh", &[], "touch /etc/kept; exit 3");
    assert_eq!(kept.status.code(), Some(3), "{kept:?}");
    std::fs::File::options().write(true).open(&image).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    let again = customize(dir.path(), "image.sqsh", &[], "test -e /etc/kept && exit 3");
    assert_eq!(again.status.code(), Some(3), "{again:?}");
    let said = text(&again.stderr);
    assert_eq!(
        said.matches("has another time than before, but the same size and the same content").count(),
        1,
        "{said}"
    );
    // `resize` adds zeros.
    let mut longer = std::fs::read(&two).unwrap();
    longer.resize(longer.len() + 4096, 0);
    std::fs::write(&image, longer).unwrap();
    let other = customize(dir.path(), "image.sqsh", &[], "true");
    refused(&other, " bytes, and is now ");
    assert!(text(&other.stderr).contains("--fresh drops it"), "{other:?}");
    let mut enter = ims_sshd(&["enter", "image.sqsh", "--output", "out", "--work", "work", "--discard", "--"], &[]);
    let dropped = enter.args(["test", "!", "-e", "/etc/kept"]).current_dir(dir.path()).output().unwrap();
    assert!(dropped.status.success(), "{dropped:?}");
    nothing_stays(dir.path());
}

#[test]
fn fetched_image_with_changes_is_not_fetched_again() {
    let dir = directory();
    let squashfs = squashfs_with(dir.path(), "one");
    let tar = dir.path().join("image.tar.gz");
    succeed(Command::new("tar").args(["-czf"]).arg(&tar).arg("-C").arg(squashfs.with_extension("")).arg("."));
    for file in [&squashfs, &tar] {
        let server = FileServer::start(std::fs::read(file).unwrap(), &[]);
        let kept = customize(dir.path(), &server.url, &[], "touch /etc/kept; exit 3");
        assert_eq!(kept.status.code(), Some(3), "{kept:?}");
        let again = customize(dir.path(), &server.url, &[], "test -e /etc/kept && test -e /etc/one");
        assert!(again.status.success(), "{again:?}");
        assert!(!text(&again.stderr).contains(" fetched "), "{again:?}");
        nothing_stays(dir.path());
        std::fs::remove_dir_all(dir.path().join("out")).unwrap();
    }
}

#[test]
fn prepare_continues_only_with_an_image_root_of_the_same_source() {
    let dir = directory();
    let [one, two] = ["one", "two"].map(|name| squashfs_with(dir.path(), name).display().to_string());
    for open in ["unpack", "overlay"] {
        let run = |source: &str, further: &[&str]| {
            let script = "\"$@\"; code=$?; umount w/image-root w/overlay/lower 2> /dev/null; exit $code";
            let mut command = Command::new("unshare");
            command.args(["-m", "sh", "-c", script, "sh", &*IMS_SSHD, "prepare", "--open", open]).args(further);
            command.args(["w", source]).current_dir(dir.path()).output().unwrap()
        };
        assert!(run(&one, &[]).status.success());
        let again = run(&one, &[]);
        assert!(again.status.success(), "{again:?}");
        if open == "overlay" {
            let undo = format!("'umount {0}/w/image-root {0}/w/overlay/lower' undoes that", dir.path().display());
            assert!(text(&again.stderr).contains(&undo), "{again:?}");
        }
        refused(&run(&two, &[]), &format!("it was made of {one}"));
        assert!(run(&two, &["--fresh"]).status.success());
        refused(&run(&one, &[]), &format!("it was made of {two}"));
        std::fs::remove_dir_all(dir.path().join("w")).unwrap();
    }
}

#[test]
fn package_reports_changes_in_an_overlay_of_prepare() {
    let dir = directory();
    let squashfs = squashfs_with(dir.path(), "one");
    let script = "set -e; ims=$0; for source in one/tree.sqsh one/tree; do $ims prepare --open overlay w $source; \
        echo new > w/image-root/etc/new; rm w/image-root/etc/one; $ims package --kernel vmlinuz --changes changes w > /dev/null; cat changes; \
        umount w/image-root w/overlay/lower 2> /dev/null || true; rm -r w; done";
    let output =
        Command::new("unshare").args(["-m", "sh", "-c", script, &*IMS_SSHD]).current_dir(dir.path()).output().unwrap();
    assert!(output.status.success(), "{} {output:?}", squashfs.display());
    let said = text(&output.stdout);
    let reports: Vec<serde_json::Value> =
        serde_json::Deserializer::from_str(&said).into_iter().map(Result::unwrap).collect();
    assert_eq!(reports.len(), 2, "{said}");
    for report in reports {
        let [added, removed] = ["added", "removed"].map(|name| report[name].clone());
        assert_eq!((added, removed), (serde_json::json!(["/etc/new"]), serde_json::json!(["/etc/one"])));
    }
}

#[test]
fn planted_image_root_is_refused() {
    let dir = directory();
    let squashfs = squashfs_with(dir.path(), "one");
    let server = FileServer::start(std::fs::read(&squashfs).unwrap(), &[]);
    let secret: Vec<(&str, String)> =
        ["S3_ACCESS_KEY", "S3_SECRET_KEY", "S3_BUCKET"].map(|name| (name, "secret".to_owned())).into();
    let volume = dir.path().join("volume");
    std::fs::create_dir_all(volume.join("image-root/etc")).unwrap();
    std::fs::set_permissions(&volume, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    refused(&prepare(dir.path(), &["volume", &server.url], &secret), "no reliable record says what it was made of");
    let fresh = prepare(dir.path(), &["--fresh", "volume", &server.url], &secret);
    assert!(fresh.status.success() && volume.join("image-root/etc/one").exists(), "{fresh:?}");
    // The pod starts over.
    let again = prepare(dir.path(), &["volume", &server.url], &secret);
    assert!(again.status.success() && !text(&again.stderr).contains(" fetched "), "{again:?}");
    let other: Vec<_> = [("DOWNLOAD_SHA256SUM", "0".repeat(64))].into_iter().chain(secret.clone()).collect();
    refused(&prepare(dir.path(), &["volume", &server.url], &other), "it was made of an earlier version of");
    // A record of another job, or without a seal, is ignored.
    let record = volume.join(".ims-sshd.source");
    let written = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, written.split_once(' ').unwrap().1).unwrap();
    refused(&prepare(dir.path(), &["volume", &server.url], &secret), "no reliable record says");
}
