//! The cache that `make test` keeps between runs, and the directories of tests.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

/// The top of the repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap()
}

/// The directory for image roots, and for everything else that takes long to make.
pub fn cache_directory() -> PathBuf {
    std::env::var_os("IMS_SSHD_CACHE")
        .map_or_else(|| PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".cache/ims-sshd"), PathBuf::from)
}

/// A command for podman, on the container images of the cache. Fails if the cache has none yet.
pub fn podman(arguments: &[&str]) -> Command {
    let path = cache_directory().join("containers");
    let storage = std::fs::canonicalize(&path).unwrap_or(path);
    assert!(
        storage.join("busybox.sqsh").exists(),
        "no container images in {}: run the tests with 'make test'",
        storage.display()
    );
    let mut command = Command::new("podman");
    for (option, directory) in [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp")] {
        command.arg(option).arg(storage.join(directory));
    }
    command.env("CONTAINERS_CONF", repository().join("tests/containers.conf"));
    // Run in the storage's directory: conmon writes a file to its working directory when the OOM killer strikes.
    command.args(arguments).current_dir(storage).stdin(Stdio::null());
    command
}

/// Returns [`cache_directory`]; fails if it has no image roots yet.
pub fn cache() -> PathBuf {
    let path = cache_directory();
    assert!(
        path.join("debian/etc/passwd").exists(),
        "no image roots in {}: run the tests with 'make test'",
        path.display()
    );
    path
}

/// A directory that is removed when the value is dropped. It is not below /tmp, because sshd refuses keys in a
/// directory that everybody can write to.
pub fn directory() -> TempDir {
    let base = cache().join("tests");
    std::fs::create_dir_all(&base).unwrap();
    tempfile::tempdir_in(base).unwrap()
}

/// The image root that an environment gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Image {
    /// Debian, as an overlay over the cached one, so that `upper` holds exactly the changes.
    Debian,
    /// A static busybox and a passwd file, copied.
    Busybox,
    /// Debian for aarch64. This and the following are overlays too.
    DebianArm64,
    /// An image of rpm packages.
    Rpm,
    /// Busybox and musl, in the manner of Alpine's.
    Musl,
    /// One static program, and nothing else.
    Distroless,
    /// Debian with programs that people use at a terminal and tools use over SSH.
    Node,
    /// Debian as Ansible manages it.
    Managed,
}

impl Image {
    /// The cached image root, named after its recipe in tests/image-roots.d.
    pub fn root(self) -> PathBuf {
        cache().join(match self {
            Self::Debian => "debian",
            Self::Busybox => "busybox",
            Self::DebianArm64 => "debian-arm64",
            Self::Rpm => "rpm",
            Self::Musl => "musl",
            Self::Distroless => "distroless",
            Self::Node => "node",
            Self::Managed => "managed",
        })
    }
}
