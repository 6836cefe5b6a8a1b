//! Configuration of sshd for environments that get none from a pod: on one machine, and on a remote build node.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::error::{Attempt, Error, Result};
use crate::transfer;
use crate::transfer::confinement::clear_environment;

/// File name of this sshd's host key.
pub const HOST_KEY: &str = "ssh_host_ed25519_key";

/// sshd's options for sessions if the site's configuration has none.
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

/// A free port, which the kernel gives to nobody else as long as this value lives: sshd binds it later.
#[derive(Debug)]
pub(crate) struct HeldPort {
    /// The port.
    pub(crate) port: u16,
    _held: OwnedFd,
}

/// Returns the `wanted` port. If `None` is wanted, finds a port that is free on `listen`, and holds it for sshd or ssh.
pub(crate) fn port(wanted: Option<u16>, listen: IpAddr) -> Result<(u16, Option<HeldPort>)> {
    let held = wanted.map_or_else(|| free_port(listen).map(Some), |_| Ok(None))?;
    Ok((wanted.or(held.as_ref().map(|held| held.port)).unwrap_or_default(), held))
}

/// Finds a port that is free on `listen`, and holds it for sshd or ssh, which set SO_REUSEADDR.
pub(crate) fn free_port(listen: IpAddr) -> Result<HeldPort> {
    let attempted = || format!("find a free port on {listen}");
    let family = if listen.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    // Two sockets may be bound to one port while neither listens, if both set SO_REUSEADDR as sshd does. The kernel
    // then gives the port neither to a bind(2) to port 0 nor to programs without SO_REUSEADDR (inet_csk_get_port).
    let held = || -> io::Result<HeldPort> {
        let held = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        rustix::net::sockopt::set_socket_reuseaddr(&held, true)?;
        rustix::net::bind(&held, &SocketAddr::new(listen, 0))?;
        let address = SocketAddr::try_from(rustix::net::getsockname(&held)?)?;
        Ok(HeldPort { port: address.port(), _held: held })
    };
    held().attempt(attempted)
}

/// Writes a host key and sshd's configuration into the directory `run`, for logins by one of `keys`. `sessions` becomes
/// the end of the configuration. Returns the path of the configuration.
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

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;
    use std::net::TcpListener;

    #[test]
    fn chosen_port_is_kept_for_sshd() {
        let address: IpAddr = "127.0.0.1".parse().unwrap();
        let held = free_port(address).unwrap();
        let socket = || rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        let other = rustix::net::bind(socket(), &SocketAddr::new(address, held.port));
        assert_eq!(other, Err(Errno::ADDRINUSE));
        // `TcpListener` sets SO_REUSEADDR, as sshd does.
        let sshd = TcpListener::bind((address, held.port)).unwrap();
        assert_eq!(sshd.local_addr().unwrap().port(), held.port);
    }
}
