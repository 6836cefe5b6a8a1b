//! The Makefile, for people who build, install and test.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

const TOP: &str = env!("CARGO_MANIFEST_DIR");

#[test]
fn make_alone_lists_what_can_be_made() {
    let help = succeed(&mut make(&[]));
    for target in ["run", "build", "install", "uninstall", "check", "test", "bench", "image", "clean"] {
        assert!(help.contains(&format!("make {target}")), "{target}: {help}");
    }
    assert_eq!(help, succeed(&mut make(&["help"])));
}

#[test]
fn an_install_is_readable_by_all_and_can_be_undone() {
    let dir = tempfile::tempdir().unwrap();
    let (stage, root) = (dir.path().join("stage"), dir.path().join("it's a root"));
    succeed(tools().arg(Path::new(TOP).join("deploy/stage")).arg(programs()).arg(&stage));
    let own = [("STAGE", &stage), ("DESTDIR", &root)].map(|(name, path)| format!("{name}={}", path.display()));
    let make = |target| {
        let mut shell = tools();
        shell.args(["-c", "umask 077 && exec make --silent \"$@\"", "sh", target, "PREFIX=/usr"]).args(&own);
        succeed(&mut shell)
    };
    make("install");
    let installed = files(&root);
    for file in [
        "bin/ims-sshd",
        "bin/ims-jail-shell",
        "share/man/man1/ims-sshd.1",
        "share/man/man1/ims-sshd-customize.1",
        "share/bash-completion/completions/ims-sshd",
        "share/fish/vendor_completions.d/ims-sshd.fish",
        "share/zsh/site-functions/_ims-sshd",
        "share/doc/ims-sshd/LICENSE",
        "share/doc/ims-sshd/third-party-licenses.txt",
    ] {
        assert!(installed.contains(&root.join("usr").join(file)), "{file}: {installed:?}");
    }
    for file in &installed {
        let program = file.parent().unwrap().ends_with("bin");
        let mode = file.metadata().unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode, if program { 0o755 } else { 0o644 }, "{}", file.display());
    }
    make("uninstall");
    assert_eq!(files(&root), <[PathBuf; 0]>::default());
}

#[test]
fn paths_with_blanks_and_quotes_are_one_argument() {
    let words = |arguments: &[&str]| {
        let dry = succeed(make(&["--dry-run", "SUDO="]).args(arguments));
        let line = dry.lines().find(|line| line.contains(" customize ")).unwrap().to_owned();
        let line = line.split_once(" customize ").unwrap().1.to_owned();
        succeed(Command::new("sh").args(["-c", &format!("printf '%s\\n' {line}")]))
    };
    let (file, tree) = ("/tmp/my image's.sqsh", "/tmp/a  tree");
    assert_eq!(words(&["run", &format!("FROM={file}"), "OUT=my out"]), format!("{file}\n--output\nmy out\n"));
    assert_eq!(words(&["run", &format!("IMAGE_ROOT={tree}")]), format!("{tree}\n"));
}

#[test]
fn every_crate_that_is_linked_is_named_with_a_text_of_its_licence() {
    let dir = tempfile::tempdir().unwrap();
    succeed(tools().arg(Path::new(TOP).join("deploy/stage")).arg(programs()).arg(dir.path()));
    let text = std::fs::read_to_string(dir.path().join("share/doc/ims-sshd/third-party-licenses.txt")).unwrap();
    let (list, texts) = text.split_once("\n===").unwrap();
    let crates: Vec<_> = list.lines().skip(2).filter(|line| !line.contains("://")).collect();
    assert!(crates.len() > 100, "{list}");
    for line in crates {
        let (name, license) = line.split_once(": ").unwrap();
        assert!(!license.is_empty() && texts.contains(&format!("\n{name}: ")), "{line} has no text");
    }
    assert!(list.contains("GNU C library: LGPL") && texts.contains("Permission is hereby granted"));
}

#[test]
fn an_image_is_built_by_the_first_builder_that_works() {
    let fakes = Fakes::new();
    fakes.add("docker", "echo 'Cannot connect to the Docker daemon' >&2; exit 1");
    fakes.add("podman", "[ $1 = info ] || echo podman \"$@\"");
    fakes.add("buildah", "[ $1 = info ] || echo buildah \"$@\"");
    let output = fakes.make(&["image"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("passing over docker: Cannot connect to the Docker daemon"), "{said}");
    assert!(said.contains("building with podman"), "{said}");
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("podman build"), "{output:?}");
    let named = succeed(&mut fakes.make(&["image", "BUILDER=buildah --root /x"]));
    assert!(named.starts_with("buildah --root /x build"), "{named}");
}

#[test]
fn where_no_builder_works_packages_that_have_one_are_named() {
    let fakes = Fakes::new();
    for builder in ["docker", "podman", "buildah"] {
        fakes.add(builder, "exit 1");
    }
    let said = fail(&mut fakes.make(&["image"]));
    assert!(said.contains("apt-get install podman") && said.contains("dnf install podman"), "{said}");
}

#[test]
fn the_label_of_the_source_has_no_login() {
    let fakes = Fakes::new();
    fakes.add("podman", "echo podman \"$@\"");
    for (url, label) in [
        ("https://user:p@ss@host.example/x.git?private_token=1", "https://host.example/x.git"),
        ("https://host.example/x@y.git", "https://host.example/x@y.git"),
        ("git@host.example:x.git", "git@host.example:x.git"),
        ("/srv/it's $(false)", "/srv/it's $(false)"),
    ] {
        let mut make = fakes.make(&["image", "BUILDER=podman"]);
        make.envs([("GIT_CONFIG_COUNT", "1"), ("GIT_CONFIG_KEY_0", "remote.origin.url"), ("GIT_CONFIG_VALUE_0", url)]);
        let built = succeed(&mut make);
        assert!(built.contains(&format!("SOURCE={label} ")), "{url}: {built}");
    }
}

#[test]
fn a_base_is_named_by_its_digest() {
    let fakes = Fakes::new();
    fakes.add("podman", "echo podman \"$@\"");
    let built = succeed(&mut fakes.make(&["image", "BUILDER=podman", "BASE_IMAGE=debian@sha256:00"]));
    assert!(built.contains("--build-arg BASE_IMAGE=debian@sha256:00"), "{built}");
}

#[test]
fn a_missing_tool_is_named_with_its_package() {
    let fakes = Fakes::new();
    fakes.add("cargo", "");
    fakes.add("cc", "echo libc.a");
    let said = fail(&mut fakes.make(&["tools"]));
    assert!(said.contains("apt-get install gcc libc6-dev") && said.contains("dnf install gcc glibc-static"), "{said}");
    let alone = Fakes::new();
    let said = fail(alone.make(&["tools"]).env("PATH", alone.dir.path()));
    assert!(said.contains("https://rustup.rs"), "{said}");
    // A system of rpm packages.
    alone.add("rpm", "[ $2 = squashfs-tools ]");
    let packages = ["openssh-server", "openssh-client", "squashfs-tools"];
    let install = |packages: &[&str]| {
        let mut install = Command::new(Path::new(TOP).join("tests/install-packages"));
        fail(install.args(packages).env("PATH", alone.dir.path()))
    };
    assert!(install(&packages).contains("'dnf install openssh-server openssh-clients'"), "{}", install(&packages));
    alone.add("zypper", "");
    let said = install(&packages);
    assert!(said.contains("'zypper install openssh-server openssh-clients squashfs'"), "{said}");
    assert!(install(&["bindfs"]).contains("run this on Debian"), "{}", install(&["bindfs"]));
}

#[test]
fn one_test_is_found_by_its_name_and_asks_for_what_it_needs() {
    let planned = |name: &str| succeed(&mut make(&["--dry-run", "test", &format!("TEST={name}")]));
    let unit = planned("text_with_newlines_or_control_characters_forges_no_log_line");
    assert!(unit.contains("--lib") && !unit.contains("tests/install-packages"), "{unit}");
    let manifests = planned("every_job_is_what_kubernetes_expects");
    assert!(manifests.contains("--test deploy") && manifests.contains("kubernetes-validate"), "{manifests}");
    assert!(!manifests.contains("container-images") && !manifests.contains("image-roots"), "{manifests}");
    let session = planned("exit_status_is_passed_on_from_0_to_255");
    assert!(session.contains("--test suite") && session.contains("image-roots"), "{session}");
    assert!(!session.contains("container-images"), "{session}");
    assert!(planned("it_is_small").contains("container-images"));
    let said = fail(&mut make(&["test", "TEST=nothing_is_called_so", "NEEDED="]));
    assert!(said.contains("no test's name contains nothing_is_called_so"), "{said}");
}

/// Programs that stand before the machine's own.
struct Fakes {
    dir: TempDir,
}

impl Fakes {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn add(&self, name: &str, script: &str) {
        let file = self.dir.path().join(name);
        std::fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn make(&self, arguments: &[&str]) -> Command {
        let mut make = make(arguments);
        make.env("PATH", format!("{}:{}", self.dir.path().display(), std::env::var("PATH").unwrap()));
        make
    }
}

/// Runs make as from a shell, without variables of the `make test` that may run this.
fn make(arguments: &[&str]) -> Command {
    let mut make = Command::new("/usr/bin/make");
    make.args(["--silent", "--directory", TOP]).args(arguments);
    for name in ["MAKEFLAGS", "MFLAGS", "MAKELEVEL", "TEST"] {
        make.env_remove(name);
    }
    make
}

/// A shell in the repository that finds the Rust which has built this.
fn tools() -> Command {
    let rust = Path::new(env!("CARGO")).parent().unwrap();
    let mut shell = Command::new("sh");
    shell.current_dir(TOP).env("PATH", format!("{}:{}", rust.display(), std::env::var("PATH").unwrap()));
    for name in ["MAKEFLAGS", "MFLAGS", "MAKELEVEL", "TEST"] {
        shell.env_remove(name);
    }
    shell
}

fn programs() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_ims-sshd")).parent().unwrap()
}

fn succeed(command: &mut Command) -> String {
    let output: Output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Returns its standard error.
fn fail(command: &mut Command) -> String {
    let output: Output = command.output().unwrap();
    assert!(!output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let output = succeed(Command::new("find").arg(directory).args(["-type", "f"]));
    output.lines().map(PathBuf::from).collect()
}
