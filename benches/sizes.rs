//! How large what is installed is, and how long the container image takes to build.

use std::path::Path;
use std::process::Stdio;

use crate::peers::podman;
use crate::support::{IMS_JAIL_SHELL, IMS_SSHD, cache, succeed};
use crate::{Bound, Report, Unit};

const IMAGE: &str = "localhost/ims-sshd-test/ims-sshd:latest";
const BASE: &str = "localhost/ims-sshd-test/debian:bookworm-slim";

pub fn sizes(_: usize, report: &mut Report) {
    for program in [IMS_SSHD, IMS_JAIL_SHELL].map(Path::new) {
        let size = program.metadata().unwrap().len() as f64 / f64::from(1 << 20);
        let name = format!("{}, linked statically", program.file_name().unwrap().display());
        report.add(&name, Unit::Mebibytes, vec![size], Bound::Information);
    }
    let [image, base] = [IMAGE, BASE].map(size);
    report.add("the container image", Unit::Mebibytes, vec![image], Bound::Information);
    report.add("of that, the Debian it is built on", Unit::Mebibytes, vec![base], Bound::Information);
}

/// Of an image in the storage that `make test` and `make bench` build in.
fn size(image: &str) -> f64 {
    let mut inspect = podman(&cache().join("containers"));
    inspect.args(["image", "inspect", "--format", "{{.Size}}", image]).stdout(Stdio::piped());
    succeed(&mut inspect).trim().parse::<f64>().unwrap() / f64::from(1 << 20)
}
