//! Packages of distributions, .deb and .rpm, of what deploy/stage lays out.
//!
//! One table describes both formats. Neither dpkg nor rpmbuild is needed, so that a package can be made on any system
//! that can build the programs. The same programs give the same bytes.

mod deb;
mod redhat;

use std::error::Error;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Result of a step, with the error as its message.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Package of a distribution.
#[derive(Debug)]
pub struct Package {
    /// Name, in both formats.
    pub name: &'static str,
    summary: &'static str,
    description: &'static str,
    /// Packages that its programs call, by Debian's names.
    depends: &'static [&'static str],
    /// The same by the names of rpm systems; names in parentheses are alternatives.
    requires: &'static [&'static str],
    /// A package that belongs to it, in both formats, and that it works without.
    recommends: Option<&'static str>,
    /// Its unit of systemd.
    unit: Option<&'static str>,
}

/// The packages. tests/install-packages and the Makefile have the same dependencies.
pub const PACKAGES: [Package; 2] = [
    Package {
        name: "ims-sshd",
        summary: "Opens an image root to people and to Ansible over SSH",
        description: "Opens an image root over OpenSSH, jailed inside it, and ends in an order that lets the result be \
                      packed and published safely.",
        depends: &["openssh-server", "openssh-client", "openssh-sftp-server", "squashfs-tools"],
        requires: &["openssh-server", "openssh-clients", "(squashfs-tools or squashfs)"],
        recommends: None,
        unit: None,
    },
    Package {
        name: "ims",
        summary: "Image management service, and its client",
        description: "Keeps the records of images, recipes, public keys and jobs, and starts the jobs that change \
                      images. The program is its own client.",
        depends: &[],
        requires: &[],
        recommends: Some("ims-sshd"),
        unit: Some("ims.service"),
    },
];

/// Version and time of packages, and where they come from and go to.
#[derive(Debug)]
pub struct Build<'a> {
    /// Version of the programs.
    pub version: &'a str,
    /// Time of all files, in seconds since 1970.
    pub epoch: u32,
    /// Level of xz, 0 to 9.
    pub level: u32,
    /// Directory that deploy/stage has filled.
    pub stage: &'a Path,
    /// Directory of the packages.
    pub output: &'a Path,
}

/// Writes both formats of `package`. Returns their paths.
pub fn write(package: &Package, build: &Build<'_>) -> Result<[PathBuf; 2]> {
    let files = files(build.stage).map_err(|e| format!("cannot read {}: {e}", build.stage.display()))?;
    fs::create_dir_all(build.output)?;
    let put = |name: String, content: Result<Vec<u8>>| -> Result<PathBuf> {
        let path = build.output.join(name);
        let written = content.and_then(|content| Ok(fs::write(&path, content)?));
        written.map_err(|e| format!("cannot write {}: {e}", path.display()))?;
        Ok(path)
    };
    let (deb, rpm) = (deb::name(package, build), redhat::name(package, build));
    Ok([put(deb, deb::write(package, &files, build))?, put(rpm, redhat::write(package, &files, build))?])
}

/// A file of a package.
struct File {
    /// Path in the file system.
    to: String,
    content: Vec<u8>,
    mode: u16,
}

impl File {
    fn is_configuration(&self) -> bool {
        self.to.starts_with("/etc/")
    }
}

/// The files of a stage, in order. A stage is laid out as below /usr; its directory `etc` is /etc.
fn files(stage: &Path) -> Result<Vec<File>> {
    let (mut files, mut unread) = (Vec::new(), vec![stage.to_owned()]);
    while let Some(directory) = unread.pop() {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.is_dir() {
                unread.push(path);
                continue;
            }
            let below = path.strip_prefix(stage)?.to_str().ok_or("a name is not UTF-8")?;
            let to = if below.starts_with("etc/") { format!("/{below}") } else { format!("/usr/{below}") };
            let is_program = path.metadata()?.permissions().mode() & 0o100 != 0;
            files.push(File { to, content: fs::read(&path)?, mode: if is_program { 0o755 } else { 0o644 } });
        }
    }
    files.sort_by(|a, b| a.to.cmp(&b.to));
    Ok(files)
}

/// Scripts of a package with a unit, for both formats: after an installation, before a removal, after it. The unit is
/// not enabled: whoever reaches the service's port needs no password.
fn scripts(unit: &str) -> [(&'static str, String); 3] {
    let running = "[ -d /run/systemd/system ]";
    [
        // With the unit's KillMode, a restart lets jobs run on.
        ("postinst", format!("if {running}; then systemctl daemon-reload; systemctl try-restart {unit}; fi\nexit 0\n")),
        // dpkg calls it with 'remove', rpm with the number of versions that stay.
        (
            "prerm",
            format!(
                "case $1 in\nremove | 0)\n    if {running}; then systemctl stop {unit}; fi\n    \
                 if command -v systemctl > /dev/null; then systemctl --quiet disable {unit}; fi ;;\nesac\nexit 0\n"
            ),
        ),
        ("postrm", format!("if {running}; then systemctl daemon-reload; fi\nexit 0\n")),
    ]
}
