//! Configuration of an sshd of our own, where no pod gives one: on one machine, and on a remote build node.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Attempt, Error, Result};
use crate::transfer;
use crate::transfer::confinement::clear_environment;

/// Host key of this sshd.
pub(crate) const HOST_KEY: &str = "ssh_host_ed25519_key";

/// Configuration of sessions where no site has one.
pub const SESSIONS: &str = "PermitRootLogin yes\nAcceptEnv LANG LC_*\nSubsystem sftp internal-sftp\n";

/// Creates the key pair `name` in the directory `run`.
pub(crate) fn make_key(run: &Path, name: &str, comment: &str) -> Result<PathBuf> {
    let file = run.join(name);
    let attempted = || format!("create the key {}", file.display());
    for old in [file.clone(), file.with_extension("pub")] {
        let _ = std::fs::remove_file(old);
    }
    transfer::installed("ssh-keygen")?;
    let output = clear_environment(&mut Command::new("ssh-keygen"))
        .args(["-q", "-t", "ed25519", "-N", "", "-C", comment, "-f"])
        .arg(&file)
        .stdin(Stdio::null())
        .output()
        .attempt(attempted)?;
    if output.status.success() {
        Ok(file)
    } else {
        Err(Error::new(attempted()).because(String::from_utf8_lossy(&output.stderr).trim()))
    }
}

/// A port that is free on `listen` right now.
pub(crate) fn free_port(listen: IpAddr) -> Result<u16> {
    let attempted = || format!("find a free port on {listen}");
    Ok(TcpListener::bind((listen, 0)).and_then(|l| l.local_addr()).attempt(attempted)?.port())
}

/// Writes a host key and sshd's configuration into the directory `run`, for logins by one of `keys`. `sessions` are its
/// last lines. Returns the path of the configuration.
pub fn configure(run: &Path, address: SocketAddr, keys: &Path, comment: &str, sessions: &str) -> Result<PathBuf> {
    let host_key = make_key(run, HOST_KEY, comment)?;
    let config = run.join("sshd_config");
    let text = format!(
        "Port {}\nListenAddress {}\nHostKey {}\nPidFile {}\nAuthorizedKeysFile {}\n\
         PubkeyAuthentication yes\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n{sessions}",
        address.port(),
        address.ip(),
        host_key.display(),
        run.join("sshd.pid").display(),
        keys.display(),
    );
    std::fs::write(&config, text).attempt(|| format!("write {}", config.display()))?;
    Ok(config)
}
