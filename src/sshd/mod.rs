//! OpenSSH's server: its options, its configuration, its process.

pub mod config;
pub mod daemon;
pub mod effective;
pub mod options;
pub mod sftp_server;

/// Where distributions install sshd, which wants to be started by an absolute path.
const SSHD_PLACES: [&str; 3] = ["/usr/sbin/sshd", "/usr/local/sbin/sshd", "/sbin/sshd"];

/// The server's program.
pub fn program() -> crate::error::Result<&'static str> {
    SSHD_PLACES.into_iter().find(|p| std::path::Path::new(p).exists()).ok_or_else(|| {
        crate::error::Error::new("find sshd")
            .because(format!("it is at none of {}", SSHD_PLACES.join(", ")))
            .advise("install the distribution's OpenSSH server")
    })
}
