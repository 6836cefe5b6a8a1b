//! `ims jobs ssh`: waits until users can log in to a job, then replaces itself with ssh.

use std::convert::Infallible;
use std::io::Write;
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

/// Directory of known hosts of single jobs, below [`place`].
const PINNED: &str = "known_hosts.d";

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
                forget(id);
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
    let (host, port, key) = address(&job)
        .ok_or_else(|| Error::new(attempted()).because("its record names no host and port to connect to"))?;
    let mut ssh = Command::new("ssh");
    // Store host keys by job, not by address: each job has its own host key, and addresses are reused.
    ssh.args(["-l", "root", "-p", &port.to_string(), "-o", &format!("HostKeyAlias=ims-job-{id}")]);
    // Another user of the job's machine could listen on its port before its sshd, or after it.
    let (checking, known) = match &key {
        Some(key) => ("yes", pinned(cache()?, id, key)?),
        None => ("accept-new", cache()?.map_or_else(|| "/dev/null".into(), |cache| cache.join("known_hosts"))),
    };
    ssh.args(["-o", &format!("StrictHostKeyChecking={checking}")]);
    ssh.args(["-o", &format!("UserKnownHostsFile={}", known.display())]);
    ssh.args(identity.into_iter().flat_map(|file| [Path::new("-i"), file]));
    ssh.args(["--", &host]);
    let error = ssh.args(command).exec();
    Err(Error::new("start ssh").because(error))
}

/// Returns the host and port at which the first container of a job accepts logins, and its host key if it is known.
fn address(job: &Value) -> Option<(String, u64, Option<String>)> {
    let container = job.get("ssh_containers")?.rows().first()?;
    let place = container.get("connection_info")?.get("customer_access")?;
    let Value::Number(port) = place.get("port")? else { return None };
    // Ignore a host that begins with a hyphen: ssh would take it for an option.
    let host = place.text("host").filter(|host| !host.is_empty() && !host.starts_with('-'))?;
    Some((host.to_owned(), port.as_u64()?, place.text("host_key").map(str::to_owned)))
}

/// Writes a file of known hosts for the job `id` alone, whose host key is `key`. Returns its path.
fn pinned(cache: Option<PathBuf>, id: &str, key: &str) -> Result<PathBuf> {
    let attempted = || format!("keep the host key of the job {id}");
    let job = Uuid::try_parse(id).attempt(attempted)?;
    let cache = cache.ok_or_else(|| {
        Error::new(attempted()).because("there is no directory for it").advise("set HOME or XDG_CACHE_HOME")
    })?;
    let directory = cache.join(PINNED);
    std::fs::create_dir_all(&directory).attempt(attempted)?;
    let mut file = tempfile::NamedTempFile::new_in(&directory).attempt(attempted)?;
    let key: Vec<_> = key.split_whitespace().take(2).collect();
    writeln!(file, "ims-job-{id} {}", key.join(" ")).attempt(attempted)?;
    let path = directory.join(job.to_string());
    file.persist(&path).map_err(|e| Error::new(attempted()).because(e.error))?;
    Ok(path)
}

/// Removes the host key of the job `id`, which has ended. A file that cannot be removed does no harm: no other job has
/// this ID.
pub(super) fn forget(id: &str) {
    if let (Ok(job), Some(cache)) = (Uuid::try_parse(id), place()) {
        let _ = std::fs::remove_file(cache.join(PINNED).join(job.to_string()));
    }
}

/// Directory for the host keys of jobs; `None` for a user without a home directory.
fn place() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()).map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    cache.or_else(home).map(|cache| cache.join("ims"))
}

/// Makes [`place`].
fn cache() -> Result<Option<PathBuf>> {
    let cache = place();
    if let Some(cache) = &cache {
        std::fs::create_dir_all(cache).attempt(|| format!("create {}", cache.display()))?;
    }
    Ok(cache)
}
