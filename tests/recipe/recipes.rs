//! Recipes for tests.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use testbed::*;

/// A tar archive of `tree` in `dir`, made with these options.
pub fn archive(tree: &Path, name: &str, options: &[&str]) -> PathBuf {
    let file = tree.with_file_name(name);
    succeed(Command::new("tar").args(options).arg("-cf").arg(&file).arg("-C").arg(tree).arg("."));
    file
}

pub fn write(tree: &Path, name: &str, content: &str) {
    let file = tree.join(name);
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(file, content).unwrap();
}

/// A small recipe with a template, in `dir`.
pub fn small(dir: &Path) -> PathBuf {
    let tree = dir.join("small");
    write(&tree, ".ims_recipe_template.yaml", "template_files:\n- config.xml\n- root/etc/motd\n");
    write(
        &tree,
        "config.xml",
        "<image name='small'>\n<repository><source path='{{ MIRROR }}'/></repository>\n</image>\n",
    );
    write(&tree, "root/etc/motd", "{% if NAME %}{{ NAME }}{% else %}nobody{% endif %}\n");
    tree
}

/// Paths below `tree`, with what they are.
pub fn listed(tree: &Path) -> String {
    succeed(Command::new("sh").args(["-c", "cd \"$0\" && find . -printf '%P %y %m %l\\n' | sort"]).arg(tree))
}

/// The repository, made once for all tests.
pub static REPOSITORY: LazyLock<PathBuf> = LazyLock::new(|| repository_for("x86_64"));

/// The same for aarch64, whose shell is Debian's.
pub static REPOSITORY_FOR_ARM: LazyLock<PathBuf> = LazyLock::new(|| repository_for("aarch64"));

/// Kept in the cache under a name that its content decides: other runs may read it, and make one of other specs.
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
    let place = cache().join("tests").join(format!("rpms-{architecture}-{}", testbed::job::md5(&content)));
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
    // Another run may have been first.
    if std::fs::rename(&made, &place).is_err() {
        std::fs::remove_dir_all(&made).unwrap();
    }
    place
}

/// A search path with kiwi-ng.
pub fn path() -> String {
    format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", cache().join("kiwi/bin").display())
}
