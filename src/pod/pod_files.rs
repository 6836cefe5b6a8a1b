//! Files that the pod provides for sshd: keys and a configuration.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::error::{Attempt, Result};
use crate::sshd::effective::Effective;
use crate::sys::tree::Tree;

/// Path of the public keys in the default configuration.
const DEFAULT_KEYS: &str = "/etc/cray/ims/authorized_keys";

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
        None => SSHD_CONFIG.replace(DEFAULT_KEYS, &quoted(&keys_in(directory)?)),
    };
    // The other container can write to this directory too: links that it creates must not lead to files of this
    // container.
    let tree = Tree::open(&std::fs::canonicalize(directory).attempt(attempted)?).attempt(attempted)?;
    for (name, text) in [("authorized_keys", keys), ("sshd_config", &config)] {
        tree.create_file(name).and_then(|mut file| file.write_all(text.as_bytes())).attempt(attempted)?;
    }
    Ok(())
}

/// Warns if root's sessions do not use the keys that were written to `directory`. Called for a configuration that the
/// user has given. This is no error, since the keys may have another path in the container that runs sshd.
pub(crate) fn warn_of_unused_keys(directory: &Path) -> Result<()> {
    let config = std::path::absolute(directory.join("sshd_config")).attempt(|| "find sshd's configuration")?;
    let options = ["-f".to_owned(), config.display().to_string()];
    match Effective::ask(&options, "root") {
        Ok(effective) if !uses(&effective, &keys_in(directory)?) => tracing::warn!(
            "sshd may ignore the keys of --authorized-keys: AuthorizedKeysFile of --sshd-config is '{}', expected {}",
            effective.first("authorizedkeysfile").unwrap_or_default(),
            keys_in(directory)?
        ),
        Ok(_) => {}
        // Only log that: the container in which this program runs need not have sshd, or a host key.
        Err(e) => tracing::debug!("{e}; not checked whether it uses the keys"),
    }
    Ok(())
}

/// The keys in `directory`, as sshd's configuration names them.
fn keys_in(directory: &Path) -> Result<String> {
    let directory = std::path::absolute(directory).attempt(|| format!("find {}", directory.display()))?;
    Ok(directory.join("authorized_keys").display().to_string().replace('%', "%%"))
}

/// Quotes a path for sshd's configuration.
fn quoted(path: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "/._-%".contains(c);
    if path.chars().all(is_plain) {
        return path.to_owned();
    }
    format!("\"{}\"", path.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Returns whether sshd takes root's keys from the file `keys`, or accepts keys by a command or a certificate
/// authority.
fn uses(effective: &Effective, keys: &str) -> bool {
    let files = effective.all("authorizedkeysfile").any(|files| format!(" {files} ").contains(&format!(" {keys} ")));
    let elsewhere = ["authorizedkeyscommand", "trustedusercakeys"];
    files || elsewhere.iter().any(|keyword| effective.first(keyword).is_some_and(|value| value != "none"))
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
        for (name, text) in [("authorized_keys", "ssh-ed25519 AAAA"), ("sshd_config", "Port 22\n")] {
            assert!(std::fs::read_to_string(shared.path().join(name)).unwrap().starts_with(text));
            assert_eq!(shared.path().join(name).symlink_metadata().unwrap().permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn default_configuration_names_the_keys_in_its_own_directory() {
        assert_eq!(format!("{}/authorized_keys", "/etc/cray/ims"), keys_in(Path::new("/etc/cray/ims")).unwrap());
        let dir = tempfile::tempdir().unwrap();
        for name in ["ims", "a b%h\"c"] {
            let shared = dir.path().join(name);
            configure_sshd(&shared, "ssh-ed25519 AAAA", None).unwrap();
            let config = shared.join("sshd_config");
            // Create a host key for the test: this machine may have none.
            let key = dir.path().join("key");
            if !key.exists() {
                let mut make = std::process::Command::new("ssh-keygen");
                assert!(make.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status().unwrap().success());
            }
            let options = ["-f", config.to_str().unwrap(), "-h", key.to_str().unwrap()].map(str::to_owned);
            let effective = Effective::ask(&options, "root").unwrap();
            assert!(uses(&effective, &keys_in(&shared).unwrap()), "{effective:?}");
            assert!(!uses(&effective, &keys_in(dir.path()).unwrap()), "{effective:?}");
        }
    }

    #[test]
    fn keys_are_unused_if_the_configuration_names_other_ones() {
        for (text, expected) in [
            ("authorizedkeysfile .ssh/authorized_keys .ssh/authorized_keys2\n", false),
            ("authorizedkeysfile /etc/cray/ims/authorized_keys\n", false),
            ("authorizedkeysfile .ssh/authorized_keys /run/ims/authorized_keys\n", true),
            ("authorizedkeysfile none\nauthorizedkeyscommand /usr/bin/keys\n", true),
            ("authorizedkeysfile none\nauthorizedkeyscommand none\ntrustedusercakeys none\n", false),
        ] {
            assert_eq!(uses(&Effective::parse(text.as_bytes()), "/run/ims/authorized_keys"), expected, "{text}");
        }
    }
}
