//! Files that the pod provides: CA certificates for the image; keys and a configuration for sshd.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::error::{Attempt, Result};
use crate::sys::tree::Tree;

/// Directory of CA certificates in the image.
const AUTHORITIES: &str = "etc/cray/ca";

/// Name under which programs of the image expect the pod's CA certificate.
const AUTHORITY: &str = "certificate_authority.crt";

/// Default configuration of sshd.
pub const SSHD_CONFIG: &str = "Port 22\nLogLevel INFO\nPermitRootLogin yes\nPubkeyAuthentication yes\n\
    AuthorizedKeysFile /etc/cray/ims/authorized_keys\nPasswordAuthentication no\nChallengeResponseAuthentication no\n\
    Subsystem sftp internal-sftp\n";

/// Copies the CA certificates in `directory` into the image, without the links through which Kubernetes mounts them.
pub(crate) fn put_authorities(image_root: &Tree, directory: &Path) -> Result<()> {
    let attempted = || format!("copy {} into the image", directory.display());
    let Ok(entries) = std::fs::read_dir(directory) else { return Ok(()) };
    image_root.make_directories(AUTHORITIES).attempt(attempted)?;
    for entry in entries {
        let file = entry.attempt(attempted)?.path();
        let name = file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with("..") || !file.is_file() {
            continue;
        }
        let text = std::fs::read(&file).attempt(|| format!("read {}", file.display()))?;
        image_root.replace(format!("{AUTHORITIES}/{name}"), &text).attempt(attempted)?;
        if name != AUTHORITY && image_root.look(format!("{AUTHORITIES}/{AUTHORITY}")).attempt(attempted)?.is_none() {
            image_root.replace(format!("{AUTHORITIES}/{AUTHORITY}"), &text).attempt(attempted)?;
        }
    }
    Ok(())
}

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

    fn image() -> (tempfile::TempDir, Tree) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        let tree = Tree::open(dir.path()).unwrap();
        (dir, tree)
    }

    #[test]
    fn certificates_are_not_copied_through_links_out_of_the_image() {
        let outside = tempfile::tempdir().unwrap();
        let authorities = tempfile::tempdir().unwrap();
        std::fs::write(authorities.path().join("certificate_authority.crt"), "authority").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::open(dir.path()).unwrap();
        symlink(outside.path(), dir.path().join("etc")).unwrap();
        assert!(put_authorities(&tree, authorities.path()).is_err());
        std::fs::remove_file(dir.path().join("etc")).unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        symlink(outside.path(), dir.path().join("etc/cray")).unwrap();
        assert!(put_authorities(&tree, authorities.path()).is_err());
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    }

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

    #[test]
    fn certificates_are_copied_repeatedly_without_links_of_kubernetes() {
        let pod = tempfile::tempdir().unwrap();
        std::fs::create_dir(pod.path().join("..2026")).unwrap();
        std::fs::write(pod.path().join("..2026/certificate_authority.crt"), "authority").unwrap();
        symlink("..2026", pod.path().join("..data")).unwrap();
        symlink("..data/certificate_authority.crt", pod.path().join("certificate_authority.crt")).unwrap();
        let (dir, tree) = image();
        // Left by upstream's sidecar.
        let there = dir.path().join("etc/cray/ca");
        std::fs::create_dir_all(&there).unwrap();
        symlink("..data/certificate_authority.crt", there.join("certificate_authority.crt")).unwrap();
        for _ in 0..2 {
            put_authorities(&tree, pod.path()).unwrap();
            let names: Vec<_> = std::fs::read_dir(&there).unwrap().map(|e| e.unwrap().file_name()).collect();
            assert_eq!(names, ["certificate_authority.crt"]);
            assert_eq!(std::fs::read_to_string(there.join("certificate_authority.crt")).unwrap(), "authority");
        }
        put_authorities(&tree, Path::new("/nowhere")).unwrap();
    }
}
