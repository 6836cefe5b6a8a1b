//! Sizes of what is installed, and time to build the container image.

use std::path::Path;
use std::process::{Command, Stdio};

use testbed::{IMS_JAIL_SHELL, IMS_SSHD, cache, succeed};

use crate::measure::time;
use crate::peers::{podman, quiet};
use crate::{Bound, Report, Unit};

/// Images built by `make test` and `make bench` (tests/container-images).
const IMAGE: &str = "localhost/ims-sshd-test/ims-sshd:latest";
const BASE: &str = "localhost/ims-sshd-test/debian:bookworm-slim";
const RUST: &str = "localhost/ims-sshd-test/rust:bookworm";

pub fn sizes(runs: usize, report: &mut Report) {
    for program in [&*IMS_SSHD, &*IMS_JAIL_SHELL].map(Path::new) {
        let size = program.metadata().unwrap().len() as f64 / f64::from(1 << 20);
        let name = format!("`{}`, linked statically", program.file_name().unwrap().display());
        report.add(&name, Unit::Mebibytes, vec![size], Bound::Information);
    }
    let [image, base] = [IMAGE, BASE].map(size);
    report.add("the container image", Unit::Mebibytes, vec![image], Bound::Information);
    report.add("its Debian base image", Unit::Mebibytes, vec![base], Bound::Information);
    // Building takes minutes, too long for a short run.
    if runs >= 10 {
        let what = "building the container image with only the crates' sources cached";
        report.add(what, Unit::Seconds, vec![build()], Bound::Information);
    }
}

/// Size in MiB.
fn size(image: &str) -> f64 {
    let mut inspect = podman(&cache().join("containers"));
    inspect.args(["image", "inspect", "--format", "{{.Size}}", image]).stdout(Stdio::piped());
    succeed(&mut inspect).trim().parse::<f64>().unwrap() / f64::from(1 << 20)
}

/// Time in seconds of `make image` with this machine's Rust, and packages from the distribution's mirrors. Builds in a
/// temporary storage on top of the images in the other one.
fn build() -> f64 {
    let storage = tempfile::tempdir().unwrap();
    let toolchain =
        succeed(Command::new(Path::new(env!("CARGO")).with_file_name("rustc")).args(["--print", "sysroot"]));
    let home = std::env::var_os("CARGO_HOME")
        .map_or_else(|| Path::new(&std::env::var_os("HOME").unwrap()).join(".cargo"), Into::into);
    let flags = format!(
        "--quiet --no-cache --isolation chroot --network host --volume {}:/usr/local/rust:ro \
         --volume {}:/usr/local/cargo/registry:ro --build-arg RUST_IMAGE={RUST} --build-arg BASE_IMAGE={BASE}",
        toolchain.trim(),
        home.join("registry").display(),
    );
    let mut podman = podman(storage.path());
    podman.arg("--storage-opt").arg(format!("additionalimagestore={}", cache().join("containers/root").display()));
    let words: Vec<_> = podman.get_args().map(|word| word.to_str().unwrap()).collect();
    let mut make = quiet("make");
    make.arg("--directory").arg(env!("CARGO_MANIFEST_DIR")).args(["--silent", "image"]);
    make.arg(format!("BUILDER=podman {}", words.join(" "))).arg(format!("BUILD_FLAGS={flags}"));
    make.envs(podman.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let milliseconds = time(|| drop(succeed(&mut make)));
    // podman bind-mounts its storage on itself.
    let _ = Command::new("umount").arg(storage.path().join("root/overlay")).output();
    milliseconds / 1000.0
}
