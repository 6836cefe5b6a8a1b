//! Preparations made while the environment waits for `ready`: host keys, sshd's parts, the kind of jail that can be had.

use std::process::{Command, Stdio};
use std::time::Instant;

use crate::environment::settings::Settings;
use crate::error::{Advise, Attempt, Error, Result};
use crate::jail::programs::Program;
use crate::jailer::trial::{self, Choice};
use crate::sshd::sftp_server;
use crate::volume::state_directory::StateDirectory;

/// Preparations that do not depend on the image, made while the environment waits for it.
pub(crate) struct Groundwork {
    /// sftp-server with all it needs.
    pub(crate) sftp: Vec<Program>,
    /// Kind of jail that is made; `None` in plain mode.
    pub(crate) jail: Option<Choice>,
}

impl Groundwork {
    /// Makes host keys where they are missing (an RSA key takes its time), finds sshd's parts, and finds out which jail can be had.
    pub(crate) fn lay(settings: &Settings, state: &StateDirectory) -> Result<Self> {
        crate::sshd::program()?;
        crate::sshd::check_rights()?;
        let sftp = if settings.job.jailed { sftp_server::files()? } else { Vec::new() };
        make_host_keys()?;
        // sshd does not start without it, and in a container nobody else makes it.
        std::fs::create_dir_all("/run/sshd").attempt(|| "make the folder /run/sshd")?;
        if !settings.job.jailed && !settings.binds.is_empty() {
            tracing::warn!("IMS_JAIL_BINDS is of no use in plain mode: sessions see what the container sees");
        }
        let choose = || trial::choose(&settings.tiers, settings.dkms, state);
        Ok(Self { sftp, jail: settings.job.jailed.then(choose).transpose()? })
    }
}

fn make_host_keys() -> Result<()> {
    let attempted = || "make sshd's host keys with ssh-keygen -A";
    let began = Instant::now();
    let output = Command::new("ssh-keygen").arg("-A").stdin(Stdio::null()).output().attempt(attempted)?;
    if output.status.success() {
        // Its line names those that were missing.
        let said = String::from_utf8_lossy(&output.stdout);
        if let Some((_, kinds)) = said.trim().split_once("generating new host keys: ") {
            let milliseconds = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
            tracing::info!(milliseconds, "made sshd's host keys: {}", kinds.trim());
        }
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', ", ");
    Err(Error::new(attempted()).because(said))
        .advise("/etc/ssh has to be writable; give a read-only container a tmpfs there")
}
