//! Debian's format: an ar archive of two tar archives (deb(5)).

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use liblzma::read::XzEncoder;

use crate::{Build, File, Package, Result, scripts};

const ARCHITECTURE: &str = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };

/// Name of the package's file.
pub(crate) fn name(package: &Package, build: &Build<'_>) -> String {
    format!("{}_{}_{ARCHITECTURE}.deb", package.name, build.version)
}

/// The package as bytes.
pub(crate) fn write(package: &Package, files: &[File], build: &Build<'_>) -> Result<Vec<u8>> {
    let mut control = vec![member("control", 0o644, description(package, files, build))];
    let configuration: String =
        files.iter().filter(|file| file.is_configuration()).map(|f| f.to.clone() + "\n").collect();
    if !configuration.is_empty() {
        control.push(member("conffiles", 0o644, configuration));
    }
    for (name, script) in package.unit.map(scripts).into_iter().flatten() {
        control.push(member(name, 0o755, format!("#!/bin/sh\n{script}")));
    }
    let mut archive = b"!<arch>\n".to_vec();
    add(&mut archive, "debian-binary", build.epoch, b"2.0\n");
    add(&mut archive, "control.tar.xz", build.epoch, &tar(&control, build)?);
    add(&mut archive, "data.tar.xz", build.epoch, &tar(files, build)?);
    Ok(archive)
}

fn member(name: &str, mode: u16, content: String) -> File {
    File { to: format!("/{name}"), content: content.into_bytes(), mode }
}

/// Text of the file `control` (deb-control(5)).
fn description(package: &Package, files: &[File], build: &Build<'_>) -> String {
    let kibibytes = files.iter().map(|file| file.content.len().div_ceil(1024)).sum::<usize>();
    let line = |field: &str, value: String| if value.is_empty() { value } else { format!("{field}: {value}\n") };
    format!(
        "Package: {}\nVersion: {}\nArchitecture: {ARCHITECTURE}\nMaintainer: ims-sshd <root@localhost>\n\
         Installed-Size: {kibibytes}\n{}{}Section: admin\nPriority: optional\nDescription: {}\n {}\n",
        package.name,
        build.version,
        line("Depends", package.depends.join(", ")),
        line("Recommends", package.recommends.unwrap_or_default().to_owned()),
        package.summary,
        package.description,
    )
}

/// Files as a compressed tar archive. GNU tar writes it, from a tree.
fn tar(files: &[File], build: &Build<'_>) -> Result<Vec<u8>> {
    let tree = tempfile::tempdir()?;
    for file in files {
        let path = tree.path().join(&file.to[1..]);
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::write(&path, &file.content)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(file.mode.into()))?;
    }
    let mut compressed = Vec::new();
    XzEncoder::new(archived(tree.path(), build.epoch)?.as_slice(), build.level).read_to_end(&mut compressed)?;
    Ok(compressed)
}

fn archived(tree: &Path, epoch: u32) -> Result<Vec<u8>> {
    let mut tar = Command::new("tar");
    tar.args(["--format=gnu", "--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mode=u=rwX,go=rX"]);
    let output = tar.arg(format!("--mtime=@{epoch}")).arg("-C").arg(tree).args(["-c", "."]).output()?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(format!("tar failed: {}", String::from_utf8_lossy(&output.stderr).trim()).into())
    }
}

/// Adds a member to an ar archive.
fn add(archive: &mut Vec<u8>, name: &str, epoch: u32, content: &[u8]) {
    archive.extend(format!("{name:<16}{epoch:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 100_644, content.len()).bytes());
    archive.extend(content);
    if content.len() % 2 == 1 {
        archive.push(b'\n');
    }
}
