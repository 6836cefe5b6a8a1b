//! Preparations that do not depend on the image, carried out while the environment waits for `ready`: the end of a
//! killed environment's processes, host keys, sshd's programs and the choice of the tier.

use std::process::{Command, Stdio};
use std::time::Instant;

use crate::environment::recovery::end_left_over;
use crate::environment::settings::Settings;
use crate::error::{Advise, Attempt, Error, Result};
use crate::jail::programs::Program;
use crate::jailer::trial::{self, Choice};
use crate::sshd::sftp_server;
use crate::volume::state_directory::StateDirectory;

/// Results of [`Groundwork::lay`].
pub(crate) struct Groundwork {
    /// Processes of a killed environment that were ended, in words for the log.
    pub(crate) left_over: Vec<&'static str>,
    /// sftp-server and the files it needs.
    pub(crate) sftp: Vec<Program>,
    /// Kind of jail to make; `None` in plain mode.
    pub(crate) jail: Option<Choice>,
}

impl Groundwork {
    /// Ends what a killed environment has left running, creates missing host keys (an RSA key takes seconds), finds
    /// sshd's programs, and tries which jail this container can make.
    pub(crate) fn lay(settings: &Settings, state: &StateDirectory) -> Result<Self> {
        let left_over = end_left_over(state, settings.sshd.log.as_deref())?;
        crate::sshd::program()?;
        crate::sshd::check_rights()?;
        let sftp = if settings.job.jailed { sftp_server::files()? } else { Vec::new() };
        prepare_sshd()?;
        if !settings.job.jailed && !settings.binds.is_empty() {
            tracing::warn!("IMS_JAIL_BINDS has no effect in plain mode: sessions see the container's own files");
        }
        let choose = || trial::choose(&settings.tiers, settings.dkms, state);
        Ok(Self { left_over, sftp, jail: settings.job.jailed.then(choose).transpose()? })
    }
}

/// Creates the files without which sshd does not even print its configuration: missing host keys, and the privilege
/// separation directory, which no init script creates in a container.
pub(crate) fn prepare_sshd() -> Result<()> {
    std::fs::create_dir_all("/run/sshd").attempt(|| "create the directory /run/sshd")?;
    make_host_keys()
}

fn make_host_keys() -> Result<()> {
    let attempted = || "create sshd's host keys with ssh-keygen -A";
    let began = Instant::now();
    let output = Command::new("ssh-keygen").arg("-A").stdin(Stdio::null()).output().attempt(attempted)?;
    if output.status.success() {
        // ssh-keygen prints the types of the keys that were missing.
        let said = String::from_utf8_lossy(&output.stdout);
        if let Some((_, kinds)) = said.trim().split_once("generating new host keys: ") {
            let milliseconds = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
            tracing::info!(milliseconds, "created sshd's host keys: {}", kinds.trim());
        }
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', ", ");
    Err(Error::new(attempted()).because(said))
        .advise("/etc/ssh has to be writable; mount a tmpfs there in a read-only container")
}
