//! OpenSSH's server: options, configuration, process.

pub(crate) mod accept_env;
mod audit;
pub mod config;
pub mod daemon;
pub mod effective;
pub(crate) mod login_shell;
pub mod options;
pub mod public_keys;
pub(crate) mod refusals;
pub mod sftp_server;

use std::time::Duration;

use caps::Capability;

use crate::error::{Advise, Error, Result};
use crate::jail::capabilities::lacks;

/// Paths of sshd in distributions. sshd insists on being started by an absolute path.
const SSHD_PLACES: [&str; 3] = ["/usr/sbin/sshd", "/usr/local/sbin/sshd", "/sbin/sshd"];

/// Timeout for sshd to answer or go into the background, which normally takes milliseconds. sshd may block for ever, on
/// a FIFO in its configuration or a name server that does not answer.
const TIME_LIMIT: Duration = Duration::from_secs(20);

fn late(attempted: String) -> Error {
    Error::new(attempted)
        .because(format!("it had not finished after {} s", TIME_LIMIT.as_secs()))
        .advise("see what it waits for: a name in ListenAddress, a file of its configuration that cannot be read")
}

/// Path of sshd.
pub fn program() -> Result<&'static str> {
    SSHD_PLACES.into_iter().find(|p| std::path::Path::new(p).exists()).ok_or_else(|| {
        Error::new("find sshd")
            .because(format!("it is at none of {}", SSHD_PLACES.join(", ")))
            .advise("install the distribution's OpenSSH server")
    })
}

/// Refuses a container in which sshd would listen but reject every login: before authentication, sshd changes to its
/// own unprivileged user and chroots to an empty directory.
pub(crate) fn check_rights() -> Result<()> {
    let needed = [Capability::CAP_SETUID, Capability::CAP_SETGID, Capability::CAP_SYS_CHROOT];
    match needed.into_iter().find(|needed| lacks(*needed)) {
        None => Ok(()),
        Some(missing) => Err(Error::new("accept logins").because(format!("sshd lacks {missing}")))
            .advise("the container needs CAP_SETUID, CAP_SETGID and CAP_SYS_CHROOT"),
    }
}
