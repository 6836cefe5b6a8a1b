//! `ims jobs ssh`: waits until users can log in to a job, then replaces itself with ssh.

use std::convert::Infallible;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ims_sshd::error::{Attempt, Error, Result};
use ims_sshd::printable::Printable;

use uuid::Uuid;

use super::connection::Service;
use super::requests::JOBS;
use super::value::Value;

/// Poll interval for the job's status.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Replaces this process with ssh, which logs in to the job `id` and runs `command` unless it is empty. Returns only on
/// failure.
pub(super) async fn log_in(
    service: &Service,
    id: &str,
    identity: Option<&Path>,
    command: &[String],
) -> Result<Infallible> {
    let attempted = || format!("log in to the job {id}");
    let mut told = None;
    let job = loop {
        let job = service.ask(&JOBS.describe(id)).await?;
        match job.text("status") {
            Some("waiting_on_user") => break job,
            Some(ended @ ("error" | "success" | "packaging_artifacts")) => {
                return Err(Error::new(attempted())
                    .because(format!("its status is {ended}"))
                    .advise(format!("see 'ims jobs logs {id}'")));
            }
            status => {
                let status = status.unwrap_or_default().to_owned();
                if told.as_ref() != Some(&status) {
                    eprintln!("ims: waiting for the job: its status is {}", Printable(&status));
                    told = Some(status);
                }
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    };
    let (host, port) = address(&job)
        .ok_or_else(|| Error::new(attempted()).because("its record names no host and port to connect to"))?;
    let mut ssh = Command::new("ssh");
    // Store host keys by job, not by address: each job has its own host key, and addresses are reused.
    ssh.args(["-l", "root", "-p", &port.to_string(), "-o", &format!("HostKeyAlias=ims-job-{id}")]);
    ssh.args(["-o", "StrictHostKeyChecking=accept-new"]);
    ssh.args(["-o", &format!("UserKnownHostsFile={}", known_hosts()?.display())]);
    ssh.args(identity.into_iter().flat_map(|file| [Path::new("-i"), file]));
    ssh.args(["--", &host]);
    let error = ssh.args(command).exec();
    Err(Error::new("start ssh").because(error))
}

/// Returns the host and port at which the first container of a job accepts logins.
fn address(job: &Value) -> Option<(String, u64)> {
    let container = job.get("ssh_containers")?.rows().first()?;
    let place = container.get("connection_info")?.get("customer_access")?;
    let Value::Number(port) = place.get("port")? else { return None };
    // Ignore a host that begins with a hyphen: ssh would take it for an option.
    let host = place.text("host").filter(|host| !host.is_empty() && !host.starts_with('-'))?;
    Some((host.to_owned(), port.as_u64()?))
}

/// Returns the file for the host keys of jobs; `/dev/null` for a user without a home directory.
fn known_hosts() -> Result<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()).map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let Some(cache) = cache.or_else(home).map(|cache| cache.join("ims")) else { return Ok("/dev/null".into()) };
    std::fs::create_dir_all(&cache).attempt(|| format!("create {}", cache.display()))?;
    Ok(cache.join("known_hosts"))
}
