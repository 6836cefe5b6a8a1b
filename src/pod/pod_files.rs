//! Files that the pod provides for sshd: keys and a configuration.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::error::{Attempt, Result};
use crate::sys::tree::Tree;

/// Default configuration of sshd.
pub const SSHD_CONFIG: &str = "Port 22\nLogLevel INFO\nPermitRootLogin yes\nPubkeyAuthentication yes\n\
    AuthorizedKeysFile /etc/cray/ims/authorized_keys\nPasswordAuthentication no\nChallengeResponseAuthentication no\n\
    Subsystem sftp internal-sftp\n";

/// Writes keys and configuration to the directory from which sshd in the other container reads them.
pub(crate) fn configure_sshd(directory: &Path, keys: &str, config: Option<&Path>) -> Result<()> {
    let attempted = || format!("write sshd's configuration into {}", directory.display());
    std::fs::create_dir_all(directory).attempt(attempted)?;
    // A new volume is writable for everybody, and sshd refuses keys in such a directory (StrictModes).
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755)).attempt(attempted)?;
    let config = match config {
        Some(file) => std::fs::read_to_string(file).attempt(|| format!("read {}", file.display()))?,
        None => SSHD_CONFIG.to_owned(),
    };
    // The other container writes there, too: its links must not lead to files of this container.
    let tree = Tree::open(&std::fs::canonicalize(directory).attempt(attempted)?).attempt(attempted)?;
    for (name, text) in [("authorized_keys", keys), ("sshd_config", &config)] {
        tree.create_file(name).and_then(|mut file| file.write_all(text.as_bytes())).attempt(attempted)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn sshd_files_are_not_written_through_links() {
        let (shared, own) = (tempfile::tempdir().unwrap(), tempfile::NamedTempFile::new().unwrap());
        for name in ["authorized_keys", "sshd_config"] {
            symlink(own.path(), shared.path().join(name)).unwrap();
        }
        configure_sshd(shared.path(), "ssh-ed25519 AAAA", None).unwrap();
        assert_eq!(std::fs::read(own.path()).unwrap(), b"");
        for (name, text) in [("authorized_keys", "ssh-ed25519 AAAA"), ("sshd_config", SSHD_CONFIG)] {
            assert!(std::fs::read_to_string(shared.path().join(name)).unwrap().starts_with(text));
            assert_eq!(shared.path().join(name).symlink_metadata().unwrap().permissions().mode() & 0o777, 0o600);
        }
    }
}
