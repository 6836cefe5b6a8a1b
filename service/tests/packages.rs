//! Packages of distributions: installed, used and removed in a Debian and in a system of rpm packages.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use ims_packages::{Build, PACKAGES, write};
use tempfile::TempDir;
use testbed::*;

/// The packages of the programs under test in the directory `in`, with an image to open. They are removed with the last
/// test that has them.
fn made() -> Arc<TempDir> {
    static SHARED: Mutex<Weak<TempDir>> = Mutex::new(Weak::new());
    // A test that failed while making them has not changed it.
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    let made = shared.upgrade().unwrap_or_else(|| Arc::new(make()));
    *shared = Arc::downgrade(&made);
    made
}

fn make() -> TempDir {
    let dir = tempfile::tempdir_in(cache()).unwrap();
    let programs = dir.path().join("programs");
    std::fs::create_dir(&programs).unwrap();
    for program in [Path::new(&*IMS_SSHD), Path::new(&*IMS_JAIL_SHELL), Path::new(env!("CARGO_BIN_EXE_ims"))] {
        // Symbols are most of an unoptimized program, and take long to compress.
        succeed(Command::new("strip").arg("-o").arg(programs.join(program.file_name().unwrap())).arg(program));
    }
    for package in PACKAGES {
        let stage = dir.path().join(package.name);
        let mut layout = Command::new(repository().join("deploy/stage"));
        let rust = Path::new(env!("CARGO")).parent().unwrap();
        layout.env("PATH", format!("{}:{}", rust.display(), std::env::var("PATH").unwrap()));
        succeed(layout.arg(&programs).arg(&stage).arg(package.name));
        write(&package, &build(&stage, &dir.path().join("in"))).unwrap();
    }
    let image = [cache().join("busybox"), dir.path().join("in/image.sqsh")];
    succeed(Command::new("mksquashfs").args(image).args(["-quiet", "-no-progress"]));
    dir
}

fn build<'a>(stage: &'a Path, output: &'a Path) -> Build<'a> {
    Build { version: env!("CARGO_PKG_VERSION"), epoch: 1_577_836_800, level: 0, stage, output }
}

/// Runs `script` on a system, a copy of the image root of that name, with the packages in /tmp/in. `list` is there to
/// print all paths but those of the system's own records, `as_before` to compare them with /tmp/before.
fn on_system(name: &str, script: &str) {
    const SYSTEM: &str = "mount --make-rprivate /\n\
        mount -t tmpfs tmpfs /mnt; mkdir /mnt/upper /mnt/work /mnt/root\n\
        mount -t overlay -o \"lowerdir=$1,upperdir=/mnt/upper,workdir=/mnt/work\" overlay /mnt/root; cd /mnt/root\n\
        mkdir -p proc .outside; mount -t proc proc proc\n\
        for place in dev sys; do mkdir -p $place; mount --rbind /$place $place; done\n\
        for place in run tmp; do mkdir -p $place; mount -t tmpfs -o mode=1777 tmpfs $place; done\n\
        cp -r \"$2\" tmp/in; mkdir -p run/sshd\n\
        pivot_root . .outside; cd /\n\
        exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C HOME=/root sh -euxc \"$3\"";
    const LIST: &str = "list() {\n\
            find / -xdev ! -path '/var/lib/dpkg*' ! -path '/var/lib/rpm*' ! -path '/var/log*' ! -path '/var/cache*' \\\n\
                | sort\n\
        }\n\
        as_before() { list | comm -3 /tmp/before - > /tmp/left; cat /tmp/left >&2; test ! -s /tmp/left; }\n";
    let made = made();
    let mut system = Command::new("unshare");
    system.args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", SYSTEM, "sh"]);
    system.arg(cache().join(name)).arg(made.path().join("in")).arg(format!("{LIST}{script}"));
    let output = system.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Runs the installed programs: what README.md begins with, and the service.
const USE: &str = "ims-sshd --version; ims --version\n\
    ims-sshd customize --work /tmp/work --output /tmp/out /tmp/in/image.sqsh touch /etc/changed\n\
    unsquashfs -lls /tmp/out/image/rootfs | grep -q etc/changed; test -s /tmp/out/image/manifest.json\n\
    ims openapi > /tmp/openapi; grep -q '^openapi:' /tmp/openapi\n\
    grep -q '^ExecStart=/usr/bin/ims serve' /usr/lib/systemd/system/ims.service\n\
    for file in man/man1/ims-sshd-customize.1 man/man1/ims-serve.1 doc/ims-sshd/third-party-licenses.txt \\\n\
        doc/ims/sbom.cdx.json bash-completion/completions/ims zsh/site-functions/_ims-sshd; do\n\
        test -s /usr/share/$file\n\
    done\n";

#[test]
fn packages_are_installed_used_and_removed_on_debian() {
    let script = "list > /tmp/before\n\
        dpkg -i /tmp/in/*.deb; dpkg --verify ims-sshd ims > /tmp/verified; test ! -s /tmp/verified\n@USE@\
        echo IMS_LISTEN=127.0.0.1:9001 >> /etc/ims/service.env\n\
        dpkg -i /tmp/in/*.deb; grep -q 9001 /etc/ims/service.env\n\
        dpkg -r ims-sshd ims; grep -q 9001 /etc/ims/service.env\n\
        dpkg -P ims-sshd ims; as_before";
    on_system("debian-host", &script.replace("@USE@", USE));
}

#[test]
fn packages_are_installed_used_and_removed_on_a_system_of_rpm_packages() {
    let script = "mkdir -p /usr/share/man/man1; list > /tmp/before\n\
        rpm -i /tmp/in/*.rpm; rpm -V ims-sshd ims\n@USE@\
        echo IMS_LISTEN=127.0.0.1:9001 >> /etc/ims/service.env\n\
        rpm -U --force /tmp/in/*.rpm; grep -q 9001 /etc/ims/service.env\n\
        rpm -e ims-sshd ims; grep -q 9001 /etc/ims/service.env.rpmsave\n\
        rm -r /etc/ims; as_before";
    on_system("rpm-host", &script.replace("@USE@", USE));
}

#[test]
fn packages_ask_for_what_the_programs_call_by_each_distributions_names() {
    let made = made();
    let package = |name, format| package(&made.path().join("in"), name, format);
    let makefile = std::fs::read_to_string(repository().join("Makefile")).unwrap();
    let called = makefile.lines().find_map(|line| line.strip_prefix("RUN_PACKAGES := ")).unwrap();
    let depends = succeed(Command::new("dpkg-deb").arg("-f").arg(package("ims-sshd", "deb")).arg("Depends"));
    assert_eq!(depends.trim(), called.replace(' ', ", "));
    let requires = succeed(Command::new("rpm").args(["-qp", "--requires"]).arg(package("ims-sshd", "rpm")));
    for name in ["openssh-server", "openssh-clients", "(squashfs-tools or squashfs)"] {
        assert!(requires.lines().any(|line| line == name), "{name}: {requires}");
    }
    assert_eq!(succeed(Command::new("dpkg-deb").arg("-f").arg(package("ims", "deb")).arg("Depends")).trim(), "");
}

#[test]
fn packages_of_the_same_programs_have_the_same_bytes() {
    let first = made();
    let again = tempfile::tempdir().unwrap();
    let package_of = PACKAGES.iter().find(|package| package.name == "ims").unwrap();
    for file in write(package_of, &build(&first.path().join("ims"), again.path())).unwrap() {
        let first = first.path().join("in").join(file.file_name().unwrap());
        assert!(std::fs::read(&first).unwrap() == std::fs::read(&file).unwrap(), "{}", first.display());
    }
}

fn package(directory: &Path, name: &str, format: &str) -> PathBuf {
    let mut files = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let is_meant = |file: &PathBuf| {
        let rest = file.file_name().and_then(|file| file.to_str()?.strip_prefix(name)).unwrap_or("s");
        rest.starts_with(['_', '-']) && !rest.starts_with("-sshd") && file.extension() == Some(format.as_ref())
    };
    files.find(is_meant).unwrap()
}
