//! Repositories of tiny rpms for the recipe `rpm-local`, and the location of kiwi-ng.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use crate::job::md5;
use crate::{cache, directory, repository, succeed};

/// The repository for x86_64, made once for all tests.
pub static REPOSITORY: LazyLock<PathBuf> = LazyLock::new(|| repository_for("x86_64"));

/// The repository for aarch64, whose shell is Debian's.
pub static REPOSITORY_FOR_ARM: LazyLock<PathBuf> = LazyLock::new(|| repository_for("aarch64"));

/// Makes a repository, or finds it in the cache. Its name there is derived from its content, because other runs may use
/// it at the same time, or make one from other specs.
fn repository_for(architecture: &str) -> PathBuf {
    let recipe = repository().join("tests/recipe/rpm-local");
    let specs = std::fs::read_dir(recipe.join("specs")).unwrap().map(|spec| spec.unwrap().path());
    let is_for_arm = architecture == "aarch64";
    let mut specs: Vec<_> = specs
        .map(|spec| match spec.file_name() {
            Some(name) if is_for_arm && name == "tiny-busybox.spec" => recipe.join("tiny-arm.spec"),
            _ => spec,
        })
        .collect();
    specs.sort();
    let content: Vec<u8> = specs.iter().flat_map(|spec| std::fs::read(spec).unwrap()).collect();
    let place = cache().join("tests").join(format!("rpms-{architecture}-{}", md5(&content)));
    if place.exists() {
        return place;
    }
    let made = place.with_extension(std::process::id().to_string());
    let top = directory();
    for spec in specs {
        let define = |name: &str, path: &Path| format!("{name} {}", path.display());
        let mut build = Command::new("rpmbuild");
        build.args(["-bb", "--quiet", "--nodeps", "--define", &define("_topdir", top.path())]);
        build.args(["--define", &define("_rpmdir", &made), "--define", &define("_dbpath", &top.path().join("db"))]);
        build.args(["--define", "busybox /bin/busybox", "--define", &define("arm", &cache().join("debian-arm64"))]);
        succeed(build.args(["--target", architecture]).arg(spec));
    }
    succeed(Command::new("createrepo_c").arg("--quiet").arg(&made));
    // Another run may have made the same repository first.
    if std::fs::rename(&made, &place).is_err() {
        std::fs::remove_dir_all(&made).unwrap();
    }
    place
}

/// Value of `$PATH` with kiwi-ng.
pub fn path() -> String {
    format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", cache().join("kiwi/bin").display())
}
