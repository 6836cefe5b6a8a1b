//! From a recipe to a published image, compared with the steps of the original containers.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use testbed::repository_server::RepositoryServer;
use testbed::rpms::path;
use testbed::tls_server::certificates;
use testbed::{IMS_SSHD, cache, repository, succeed};

use crate::measure::{milliseconds, succeeding};
use crate::{Bound, Report, Unit};

/// The recipe, below tests/recipe.
const RECIPE: &str = "debian";

/// The containers' steps: the package of the site's authority, kiwi-ng, the squashfs. kiwi-ng works in copies of the
/// machine's caches and of its dpkg, so that the machine stays as it is.
const ORIGINAL: &str = r#"
mount -t tmpfs none /var/cache
mkdir /var/cache/upper /var/cache/work
mount -t overlay -o lowerdir=/var/lib/dpkg,upperdir=/var/cache/upper,workdir=/var/cache/work none /var/lib/dpkg
rpmbuild -bb --quiet --define "_topdir $0/rpm" --define "_dbpath $0/rpm/db" --define "authority $0/ca.crt" "$0/ca.spec"
kiwi-ng --logfile="$0/kiwi.log" --type tbz system build --description "$0/recipe" --target-dir "$0/original" \
    --signing-key /usr/share/keyrings/debian-archive-keyring.gpg
mksquashfs "$0/original/build/image-root" "$0/original.sqsh" -no-progress
"#;

/// Its scriptlet runs nowhere.
const SPECIFICATION: &str = "Name: cray_ca_cert
Version: 1.0.1
Release: 1
Summary: authority
License: MIT
BuildArch: noarch
%description
authority
%install
install -D -m 644 %{authority} %{buildroot}/usr/share/pki/trust/anchors/cray_certificate_authority.crt
%post
update-ca-certificates
%files
/usr/share/pki/trust/anchors/cray_certificate_authority.crt
";

/// Runs each side once: it takes minutes.
pub fn creating(_: usize, report: &mut Report) {
    let dir = tempfile::tempdir_in(cache().join("tests")).unwrap();
    let server = RepositoryServer::start(&cache().join("debian-archive"));
    certificates(dir.path());
    let (whole, of_kiwi) = create(dir.path(), &server.url);
    let original = original(dir.path(), &server.url);
    report.add(
        "`create`, against the original containers' steps",
        Unit::Times,
        vec![whole / original],
        Bound::Limit(0.5),
    );
    report.add(
        "`create` without kiwi-ng's own time",
        Unit::Seconds,
        vec![(whole - of_kiwi) / 1000.0],
        Bound::Limit(3.0),
    );
    report.add("`create`", Unit::Seconds, vec![whole / 1000.0], Bound::Information);
    report.add("the original containers' steps", Unit::Seconds, vec![original / 1000.0], Bound::Information);
    report.note(
        "Both build tests/recipe/debian, 177 MB, from a repository on the same machine. The original containers' steps \
         are rpmbuild for the package of the site's authority, kiwi-ng with its archive, and mksquashfs; `create` also \
         fetches the recipe, waits for its repository and publishes in a directory.",
    );
}

/// Times of the whole command, and of kiwi-ng in it, in milliseconds.
fn create(dir: &Path, mirror: &str) -> (f64, f64) {
    // The command's own directory: kiwi-ng's log appears there.
    let place = dir.join("work/ims-sshd.create").join(RECIPE);
    std::fs::create_dir_all(&place).unwrap();
    let watched = Inotify::init(InitFlags::IN_CLOEXEC).unwrap();
    watched.add_watch(&cache().join("kiwi/bin/kiwi-ng"), AddWatchFlags::IN_OPEN).unwrap();
    watched.add_watch(&place, AddWatchFlags::IN_CLOSE_WRITE).unwrap();
    let mut command = Command::new(&IMS_SSHD);
    command.arg("create").arg(repository().join("tests/recipe").join(RECIPE)).env("PATH", path());
    command.args(["--set", &format!("MIRROR={mirror}"), "--set", "SUITE=bookworm"]);
    command.arg("--work").arg(dir.join("work")).arg("--authority").arg(dir.join("ca.crt"));
    command.arg("--output").arg(dir.join("store")).current_dir(dir);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    std::thread::scope(|scope| {
        let of_kiwi = scope.spawn(|| {
            let mut opened = Vec::new();
            loop {
                for event in watched.read_events().unwrap() {
                    match event.name {
                        None => opened.push(Instant::now()),
                        // Its first run prints its version, and opens the file as often.
                        Some(name) if name == "kiwi.log" => return milliseconds(opened[opened.len() / 2].elapsed()),
                        Some(_) => {}
                    }
                }
            }
        });
        let whole = succeeding(&mut command);
        (whole, of_kiwi.join().unwrap())
    })
}

/// Time of the original containers' steps, in milliseconds.
fn original(dir: &Path, mirror: &str) -> f64 {
    std::fs::write(dir.join("ca.spec"), SPECIFICATION).unwrap();
    let mut fetch = Command::new(&IMS_SSHD);
    fetch.arg("fetch-recipe").arg(dir.join("recipe")).arg(repository().join("tests/recipe").join(RECIPE));
    succeed(fetch.args(["--set", &format!("MIRROR={mirror}"), "--set", "SUITE=bookworm"]));
    let mut steps = Command::new("unshare");
    steps.args(["--mount", "sh", "-ec", ORIGINAL]).arg(dir).env("PATH", path());
    // kiwi-ng passes it on to the image's own programs, and the directory is not in the image.
    steps.env_remove("TMPDIR");
    steps.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    succeeding(&mut steps)
}
