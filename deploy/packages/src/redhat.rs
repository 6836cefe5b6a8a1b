//! The format of Fedora, RHEL and SUSE.

use std::collections::BTreeSet;
use std::path::Path;

use rpm::{BuildConfig, CompressionWithLevel, Dependency, FileOptions, PackageBuilder, Scriptlet};

use crate::{Build, File, Package, Result, scripts};

const RELEASE: &str = "1";

/// Name of the package's file.
pub(crate) fn name(package: &Package, build: &Build<'_>) -> String {
    format!("{}-{}-{RELEASE}.{}.rpm", package.name, build.version, std::env::consts::ARCH)
}

/// The package as bytes.
pub(crate) fn write(package: &Package, files: &[File], build: &Build<'_>) -> Result<Vec<u8>> {
    let Package { name, summary, description, .. } = *package;
    let config = BuildConfig::v4().source_date(build.epoch).compression(CompressionWithLevel::Xz(build.level));
    let mut builder = PackageBuilder::new(name, build.version, "MIT", std::env::consts::ARCH, summary);
    builder.using_config(config).release(RELEASE).build_host("localhost").cookie("ims-sshd").description(description);
    for directory in own_directories(name, files) {
        builder.with_dir_entry(FileOptions::dir(directory).permissions(0o755))?;
    }
    for file in files {
        let options = FileOptions::new(file.to.as_str()).permissions(file.mode);
        let options = if file.is_configuration() { options.config().noreplace() } else { options };
        builder.with_file_contents(file.content.clone(), options)?;
    }
    for required in package.requires {
        if required.starts_with('(') {
            builder.requires(Dependency::rpmlib("RichDependencies", "4.12.0-1"));
        }
        builder.requires(Dependency::any(*required));
    }
    package.recommends.map(|name| builder.recommends(Dependency::any(name)));
    if let Some([(_, after), (_, before_removal), (_, after_removal)]) = package.unit.map(scripts) {
        builder.requires(Dependency::script_post("/bin/sh"));
        builder.post_install_script(Scriptlet::new(after));
        builder.pre_uninstall_script(Scriptlet::new(before_removal));
        builder.post_uninstall_script(Scriptlet::new(after_removal));
    }
    let mut bytes = Vec::new();
    builder.build()?.write(&mut bytes)?;
    Ok(bytes)
}

/// Directories of shells' completions: packages have them in common, and the last one takes them away.
const SHARED: [&str; 3] = ["bash-completion", "fish", "zsh"];

/// Directories that are named after the package or shared, and those below: rpm removes those alone that a package has.
fn own_directories(package: &str, files: &[File]) -> BTreeSet<String> {
    let above = files.iter().flat_map(|file| Path::new(&file.to).ancestors().skip(1));
    let is_own =
        |directory: &&Path| directory.iter().any(|name| name == package || SHARED.iter().any(|own| name == *own));
    above.filter(is_own).filter_map(|directory| Some(directory.to_str()?.to_owned())).collect()
}
