//! A recipe that wants out: root of a build reaches nothing but its own build.

use std::io::{BufRead, BufReader};
use std::os::linux::fs::MetadataExt;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use testbed::*;

use crate::build::{Volume, succeeded, without_privileges};

/// Runs tests/recipe/escapes.py in a build, and returns its output: the ways that led out, and the errors of others.
fn escapes(command: impl FnOnce(Command) -> Command) -> (String, String) {
    let script = repository().join("tests/recipe/escapes.py");
    // It runs in the root directory of the first process, since the image has no Python.
    let run = "busybox chroot /proc/1/root python3 - inside \"$(cat /given)\" < /escapes.py > /ways 2> /refused
        for p in /proc/[0-9]*; do read comm < $p/comm; [ $comm = ims-sshd ] && kill -9 ${p#/proc/}; done; true";
    let volume = Volume::new("zypper").with_script(run);
    let other = Volume::new("zypper");
    std::fs::set_permissions(other.dir.path(), PermissionsExt::from_mode(0o700)).unwrap();
    std::fs::write(other.at("image/secret"), "of another job").unwrap();
    let secrets = volume.at("oauth");
    std::fs::create_dir(&secrets).unwrap();
    std::fs::write(secrets.join("client-secret"), "hidden-7").unwrap();

    let mut outside = Command::new("python3");
    outside.arg(&script).arg("outside").arg(other.at("image/secret"));
    let mut outside = Ended::killed(outside.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
    let mut line = String::new();
    BufReader::new(outside.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let mut given: Value = serde_json::from_str(&line).unwrap();
    let program = std::fs::metadata(&*IMS_SSHD).unwrap();
    given["program"] = json!([program.st_dev(), program.st_ino()]);
    given["credentials"] = json!(secrets);
    given["volume"] = json!(volume.at("image"));
    let place = volume.at("image/recipe/root");
    std::fs::create_dir(&place).unwrap();
    std::fs::write(place.join("given"), given.to_string()).unwrap();
    std::fs::copy(&script, place.join("escapes.py")).unwrap();

    let build = volume.build(&[("OAUTH_CONFIG_DIR", secrets.display().to_string())]);
    succeeded(&command(build).output().unwrap());
    volume.is_built();
    (volume.file("ways"), volume.file("refused"))
}

#[test]
fn hostile_recipe_finds_no_way_out_of_its_build() {
    let (ways, refused) = escapes(|build| build);
    assert_eq!(ways, "", "{refused}");
    assert_eq!(refused.lines().count(), 30, "each way was tried: {refused}");
}

#[test]
fn hostile_recipe_finds_no_way_out_of_a_build_without_privileges() {
    let (ways, refused) = escapes(|build| without_privileges(&build));
    assert_eq!(ways, "", "{refused}");
    assert_eq!(refused.lines().count(), 30, "each way was tried: {refused}");
}
