//! Runs a job's programs on this machine like the containers of a pod: some one after another, then the build
//! environment and the sidecar concurrently. Their parent is a separate process, `ims pod`, so that the job survives a
//! restart of the service. Files in the job's directory, which only root can enter, describe the pod and record how it
//! ended.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use ims_sshd::error::{Attempt, Error, Result};
use ims_sshd::local::mounts;
use ims_sshd::sys::process::{Entry, Handle, Identity, descendants};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::fs::{CWD, FlockOperation, RenameFlags};
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep_until};

use super::programs;
use crate::signals::{INTERRUPTS, Signals};

/// Programs of a job.
#[derive(Debug, Serialize, Deserialize)]
pub struct Pod {
    /// Port of the build environment's sshd.
    pub port: u16,
    /// Programs that run one after another, until one fails.
    pub before: Vec<Program>,
    /// Opens the image root for logins, and ends once users have given their verdict.
    pub environment: Program,
    /// Publishes the image; the pod ends when this program ends.
    pub sidecar: Program,
}

/// A command of `ims-sshd`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Program {
    /// Command and arguments.
    pub arguments: Vec<String>,
    /// All environment variables of the command.
    pub variables: BTreeMap<String, String>,
}

/// How a pod ended.
#[derive(Debug, Serialize, Deserialize)]
struct End {
    /// Reason of the failure, for people; `None` if the pod did not fail.
    failure: Option<String>,
}

/// Name of the file, in the job's directory, that describes the pod.
pub(super) const POD: &str = "pod.json";
/// Name of the file, in the job's directory, that all programs of the pod write their log to.
pub(super) const LOG: &str = "log";
/// Name of the file, in the job's directory, that lists the pod's processes; locked while the pod runs.
const PROCESSES: &str = "processes";
/// Name of the file, in the job's directory, that records how the pod ended.
const END: &str = "end.json";

/// Time that programs get to end cleanly after SIGTERM: the build environment lets running commands finish.
const CLOSE_TIME: Duration = Duration::from_mins(1);

/// Number of bytes at the end of the log that are searched for an error.
const LOG_END: u64 = 16 << 10;

impl Pod {
    /// Writes the pod's description into the job's directory.
    pub(super) fn write(&self, directory: &Path) -> Result<()> {
        let path = directory.join(POD);
        let text = serde_json::to_vec(self).attempt(|| format!("describe the job in {}", path.display()))?;
        std::fs::write(&path, text).attempt(|| format!("write {}", path.display()))
    }

    /// Reads the pod's description from the job's directory.
    pub(super) fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(POD);
        let attempted = || format!("read {}", path.display());
        serde_json::from_slice(&std::fs::read(&path).attempt(attempted)?).attempt(attempted)
    }
}

/// State of the pod of a job.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Not started yet.
    New,
    /// The pod's parent process is running.
    Running,
    /// The pod has ended; contains the reason if it failed.
    Ended(Option<String>),
    /// The pod's parent process was killed.
    Killed,
}

/// Starts the pod in `directory`: a process that runs `program` and outlives this process.
pub(super) fn start(program: &Path, directory: &Path) -> Result<()> {
    let attempted = || format!("start the programs of the job in {}", directory.display());
    let log = log(directory).attempt(attempted)?;
    let mut command = Command::new(program);
    command.arg("pod").arg(directory).current_dir("/").stdin(Stdio::null());
    command.stdout(log.try_clone().attempt(attempted)?).stderr(log);
    // The pod's own process group keeps the terminal's signals, which are for the service, from the pod. The child
    // handle may be dropped: tokio reaps the process when it ends.
    command.process_group(0).spawn().attempt(attempted).map(drop)
}

fn log(directory: &Path) -> std::io::Result<File> {
    File::options().create(true).append(true).open(directory.join(LOG))
}

/// State of the pod in `directory`.
pub(super) fn state(directory: &Path) -> Result<State> {
    let attempted = || format!("see whether the job in {} runs", directory.display());
    let file = match File::open(directory.join(PROCESSES)) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(State::New),
        other => other.attempt(attempted)?,
    };
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(State::Running),
        other => other.attempt(attempted)?,
    }
    let Ok(text) = std::fs::read(directory.join(END)) else { return Ok(State::Killed) };
    let end: End = serde_json::from_slice(&text).attempt(attempted)?;
    Ok(State::Ended(end.failure))
}

/// Asks the pod's parent process to end, which ends the programs. If the parent was killed, asks the programs
/// themselves. Kills processes that do not end in time.
pub(super) fn stop(directory: &Path) {
    let Ok(text) = std::fs::read_to_string(directory.join(PROCESSES)) else { return };
    let processes: Vec<_> = text.lines().filter_map(Identity::parse).collect();
    // The first process is the parent, which passes SIGTERM on.
    for process in processes {
        let Ok(process) = Handle::open(process) else { continue };
        let _ = process.signal(Signal::SIGTERM);
        if !process.ends_within(CLOSE_TIME + Duration::from_secs(5)) {
            let _ = process.signal(Signal::SIGKILL);
            process.ends_within(Duration::from_secs(5));
        }
    }
}

/// Kills the sshd that has the configuration `config`, and all its descendants. A killed build environment leaves its
/// sshd running, and the port would stay in use.
pub(super) fn end_sshd(config: &Path) {
    let config = config.display().to_string();
    let all = Entry::all();
    // sshd's process title contains its command line, which names the configuration.
    let is_ours = |entry: &&Entry| entry.name == "sshd" && entry.command_line().split(' ').any(|word| word == config);
    for sshd in all.iter().filter(is_ours) {
        for process in std::iter::once(sshd).chain(&descendants(&all, sshd.pid)) {
            process.signal(Signal::SIGKILL);
        }
    }
}

/// `ims pod`: runs the programs of the job in `directory`.
pub fn run(directory: &Path) -> Result<ExitCode> {
    let pod = Pod::read(directory)?;
    let attempted = || format!("run the job in {}", directory.display());
    // Lock the file before it gets its name. A reader that found it unlocked would take the pod for killed, and while
    // that reader held its own lock, this one would fail.
    let (new, path) = (directory.join("processes.new"), directory.join(PROCESSES));
    let mut processes = File::options().create(true).append(true).open(&new).attempt(attempted)?;
    rustix::fs::flock(&processes, FlockOperation::NonBlockingLockExclusive).attempt(attempted)?;
    processes.set_len(0).attempt(attempted)?;
    let us = Identity::of(Pid::this()).ok_or_else(|| Error::new(attempted()).because("/proc is missing"))?;
    writeln!(processes, "{us}").attempt(attempted)?;
    rustix::fs::renameat_with(CWD, &new, CWD, &path, RenameFlags::NOREPLACE).map_err(|e| {
        let reason = if e == rustix::io::Errno::EXIST { "it was run before".into() } else { e.to_string() };
        Error::new(attempted()).because(reason)
    })?;
    // Before the first thread starts, since a thread has its own mount namespace.
    let terminals = own_terminals();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().attempt(attempted)?;
    // Keep the lock until the end is recorded: a pod without lock and recorded end counts as killed.
    let _lock = processes.try_clone().attempt(attempted)?;
    let failure = match terminals {
        Ok(()) => runtime.block_on(Run { directory, processes }.live(&pod)).err(),
        Err(error) => Some(error.to_string()),
    };
    if let Some(config) = pod.environment.variables.get("SSHD_CONFIG_FILE") {
        end_sshd(Path::new(config));
    }
    if let Some(failure) = &failure {
        println!("ims: the job failed: {failure}");
    }
    let text = serde_json::to_vec(&End { failure }).attempt(attempted)?;
    // Rename the complete file, so that no reader finds a part of it.
    let (new, end) = (directory.join("end.new"), directory.join(END));
    std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &end)).attempt(attempted)?;
    Ok(ExitCode::SUCCESS)
}

/// Gives the job terminals of its own: root in the image would own the terminals of root on the machine and of other
/// jobs. A container that may not mount keeps its terminals.
fn own_terminals() -> Result<()> {
    if let Err(error) = mounts::own_mounts() {
        println!("ims: sessions see the terminals of this container: {error}");
        return Ok(());
    }
    mounts::own_terminals()
}

struct Run<'a> {
    directory: &'a Path,
    /// The locked file that lists the pod's processes.
    processes: File,
}

impl Run<'_> {
    /// Runs the programs; returns the reason, for people, if one fails.
    async fn live(mut self, pod: &Pod) -> std::result::Result<(), String> {
        let mut asked = Signals::receive(&INTERRUPTS).map_err(|error| error.to_string())?;
        for program in &pod.before {
            let mut running = self.start(program)?;
            let mut is_asked = false;
            while running.status.is_none() {
                tokio::select! {
                    () = running.end() => {}
                    _ = asked.next() => {
                        is_asked = true;
                        running.ask_to_end();
                    }
                }
            }
            if is_asked {
                return Err("it was asked to end".into());
            }
            running.outcome(self.directory)?;
        }
        let mut environment = self.start(&pod.environment)?;
        let mut sidecar = match self.start(&pod.sidecar) {
            Ok(sidecar) => sidecar,
            Err(failure) => {
                environment.ask_to_end();
                while environment.status.is_none() {
                    environment.end().await;
                }
                return Err(failure);
            }
        };
        while sidecar.status.is_none() || environment.status.is_none() {
            tokio::select! {
                () = sidecar.end(), if sidecar.status.is_none() => {
                    if environment.status.is_none() {
                        environment.ask_to_end();
                    }
                }
                () = environment.end(), if environment.status.is_none() => {}
                _ = asked.next() => {
                    environment.ask_to_end();
                    sidecar.ask_to_end();
                }
            }
        }
        sidecar.outcome(self.directory)
    }

    fn start(&mut self, program: &Program) -> std::result::Result<Running, String> {
        let name = format!("ims-sshd {}", program.arguments.first().map_or("", String::as_str));
        let failed = |e: &dyn std::fmt::Display| format!("cannot start '{name}': {e}");
        let log = log(self.directory).map_err(|e| failed(&e))?;
        let begins = log.metadata().map_or(0, |log| log.len());
        let mut command = Command::new(programs::ims_sshd());
        command.args(&program.arguments).env_clear().envs(&program.variables).current_dir("/").stdin(Stdio::null());
        command.stdout(log.try_clone().map_err(|e| failed(&e))?).stderr(log);
        let child = command.spawn().map_err(|e| failed(&e))?;
        let running = Running { child, name, begins, status: None, deadline: None };
        // Record the program's process, so that `stop` can end it if this process is killed.
        if let Some(child) = running.pid().and_then(Identity::of) {
            writeln!(self.processes, "{child}").map_err(|e| format!("cannot record a process: {e}"))?;
        }
        Ok(running)
    }
}

/// A program that was started.
struct Running {
    child: Child,
    name: String,
    /// Length of the log when the program started, in bytes.
    begins: u64,
    status: Option<ExitStatus>,
    /// Time at which the program is killed if it still runs; set once it was asked to end.
    deadline: Option<Instant>,
}

impl Running {
    fn pid(&self) -> Option<Pid> {
        self.child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw)
    }

    /// Waits for the program to end; kills it at its deadline.
    async fn end(&mut self) {
        let status = if let Some(deadline) = self.deadline {
            tokio::select! {
                status = self.child.wait() => status,
                () = sleep_until(deadline) => {
                    let _ = self.child.start_kill();
                    self.child.wait().await
                }
            }
        } else {
            self.child.wait().await
        };
        // Nothing else reaps this child, so `wait` does not fail.
        self.status = Some(status.unwrap_or_default());
    }

    fn ask_to_end(&mut self) {
        if self.status.is_none()
            && let Some(pid) = self.pid()
        {
            let _ = kill(pid, Signal::SIGTERM);
            self.deadline.get_or_insert_with(|| Instant::now() + CLOSE_TIME);
        }
    }

    /// Returns an error with the reason if the program failed.
    fn outcome(&self, directory: &Path) -> std::result::Result<(), String> {
        let status = self.status.unwrap_or_default();
        if status.success() {
            return Ok(());
        }
        let end = match (status.code(), status.signal().and_then(|signal| Signal::try_from(signal).ok())) {
            (Some(code), _) => format!("ended with exit code {code}"),
            (None, Some(signal)) => format!("was killed by {signal}"),
            (None, None) => "was killed".into(),
        };
        let why = last_error(&directory.join(LOG), self.begins).map_or_else(String::new, |error| format!(": {error}"));
        Err(format!("'{}' {end}{why}", self.name))
    }
}

/// Returns the last error in a log. Skips the first `begins` bytes, which earlier programs have written.
fn last_error(log: &PathBuf, begins: u64) -> Option<String> {
    let mut file = File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(begins.max(length.saturating_sub(LOG_END)))).ok()?;
    let mut text = Vec::new();
    file.read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text);
    let error = text.lines().rev().find_map(|line| line.split_once("ERROR ").map(|(_, error)| error.trim().to_owned()));
    error.filter(|error| !error.is_empty())
}
