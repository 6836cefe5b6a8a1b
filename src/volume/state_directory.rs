//! The environment's own directory below /run. The environment's helper and its sshd read it; only root of the
//! container can write there.

use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};

use ring::digest::{SHA256, digest};

use crate::error::{Attempt, Result};

/// Holds the state directories of all environments of this machine or container.
pub(crate) const RUN: &str = "/run/ims-sshd";

/// Turns `path` into the name of one file: `/mnt/image` becomes `mnt-image`, much as systemd-escape does. A long path
/// is cut to its end plus a digest of the whole path: the name must not exceed a file system's limit, and the path of a
/// socket in the directory must not exceed the kernel's 108 bytes.
pub fn name_for(path: &Path) -> String {
    let names = path.components().filter_map(|c| match c {
        Component::Normal(name) => Some(name.as_bytes()),
        _ => None,
    });
    let mut escaped = String::new();
    for &byte in &names.collect::<Vec<_>>().join(&b'/') {
        match byte {
            b'/' => escaped.push('-'),
            b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => escaped.push(char::from(byte)),
            b'.' if !escaped.is_empty() => escaped.push('.'),
            other => {
                let _ = write!(escaped, "_{other:02x}");
            }
        }
    }
    if escaped.len() > LONGEST_NAME {
        let digest = digest(&SHA256, escaped.as_bytes());
        escaped.drain(..escaped.len() - LONGEST_NAME / 2);
        for byte in &digest.as_ref()[..8] {
            let _ = write!(escaped, "_{byte:02x}");
        }
    }
    if escaped.is_empty() { "-".into() } else { escaped }
}

const LONGEST_NAME: usize = 64;

/// The state directory of one environment.
#[derive(Debug, Clone)]
pub struct StateDirectory {
    path: PathBuf,
}

impl StateDirectory {
    /// Path of the state directory of the environment on `parent`, whether it exists or not.
    pub fn place(parent: &Path) -> PathBuf {
        Path::new(RUN).join(name_for(parent))
    }

    /// The state directory of the environment on the image root parent `parent`, created if it is missing.
    pub fn of(parent: &Path) -> Result<Self> {
        Self::at(Self::place(parent))
    }

    fn at(path: PathBuf) -> Result<Self> {
        let state = Self { path };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&state.path)
            .attempt(|| format!("create the directory {}", state.path.display()))
            .map_err(|e| e.advise("/run has to be writable; mount a tmpfs there in a read-only container"))?;
        Ok(state)
    }

    /// Path of the directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Record of the jail.
    pub fn jail(&self) -> PathBuf {
        self.path.join("jail")
    }

    /// sshd's configuration fragment.
    pub(crate) fn fragment(&self) -> PathBuf {
        self.path.join("sshd.conf")
    }

    /// The copy of the container's /etc/passwd that sshd sees.
    pub(crate) fn passwd(&self) -> PathBuf {
        self.path.join("passwd")
    }

    /// File with the name of the remote build node that the environment is on.
    pub(crate) fn node(&self) -> PathBuf {
        self.path.join("node")
    }

    /// Record of sshd's listening process.
    pub(crate) fn sshd(&self) -> PathBuf {
        self.path.join("sshd")
    }

    /// Copies of sftp-server and the files it needs, for a jail in which nothing can be mounted.
    pub(crate) fn sftp(&self) -> PathBuf {
        self.path.join("sftp")
    }

    /// A state directory below this one, for a trial jail.
    pub(crate) fn trial(&self) -> Result<Self> {
        Self::at(self.path.join("trial"))
    }

    /// Removes the directory and its content.
    pub(crate) fn remove(&self) -> Result<()> {
        std::fs::remove_dir_all(&self.path).attempt(|| format!("remove {}", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn different_paths_have_different_names_that_fit() {
        assert_eq!(name_for(Path::new("/mnt/image")), "mnt-image");
        assert_eq!(name_for(Path::new("/mnt/im-age/")), "mnt-im_2dage");
        assert_eq!(name_for(Path::new("/.hidden/x.y")), "_2ehidden-x.y");
        assert_eq!(name_for(Path::new("/")), "-");
        let long = "/a-long-directory".repeat(20);
        let names = [name_for(Path::new(&long)), name_for(Path::new(&format!("/x{long}")))];
        assert!(names.iter().all(|n| n.len() <= LONGEST_NAME) && names[0] != names[1], "{names:?}");
    }
}
