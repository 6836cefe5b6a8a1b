//! The customization script: run in the build environment, its output in the log line by line.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::unistd::Pid;
use rustix::fs::OFlags;
use rustix::pipe::PipeFlags;

use crate::error::{Attempt, Result};
use crate::log::redaction::Lines;
use crate::sys::signals::unblock_signals;
use crate::sys::umask;

/// A script that was started.
pub(crate) struct Script {
    /// Its process; `None` once it has ended.
    pid: Option<Pid>,
    /// Its output; a program that the script has started may write to it after the script's end.
    output: Option<OwnedFd>,
    /// The beginning of a line whose end has not come yet.
    line: Vec<u8>,
    lines: Lines,
}

/// A longer line is logged in pieces.
const LONGEST_LINE: usize = 16 << 10;

impl Script {
    /// Starts the script at `path` with these variables beside our own. An executable one is started as it is; one that is not is a
    /// shell script, since it may have been written to be sourced.
    pub(crate) fn start(path: &Path, variables: &[(String, String)]) -> Result<Self> {
        let attempted = || format!("start the customization script {}", path.display());
        let executable = std::fs::metadata(path).attempt(attempted)?.permissions().mode() & 0o111 != 0;
        let spawn = |mut command: Command| -> std::io::Result<Self> {
            let (output, theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            rustix::fs::fcntl_setfl(&output, OFlags::NONBLOCK)?;
            command.stdin(Stdio::null()).stdout(theirs.try_clone()?).stderr(theirs);
            // A group of its own, so that it can be ended with what it started.
            umask::with_callers(unblock_signals(command.envs(variables.iter().cloned()))).process_group(0);
            let child = command.spawn()?;
            let pid = Some(Pid::from_raw(child.id().cast_signed()));
            Ok(Self { pid, output: Some(output), line: Vec::new(), lines: Lines::default() })
        };
        let in_shell = || {
            let shell = if Path::new("/bin/bash").exists() { "/bin/bash" } else { "/bin/sh" };
            let mut command = Command::new(shell);
            command.arg(path);
            spawn(command)
        };
        let started = if executable {
            match spawn(Command::new(path)) {
                // Executable but without a first line that names its interpreter.
                Err(e) if e.raw_os_error() == Some(libc::ENOEXEC) => in_shell(),
                other => other,
            }
        } else {
            in_shell()
        };
        started.attempt(attempted)
    }

    /// Its number, as long as it runs.
    pub(crate) fn pid(&self) -> Option<Pid> {
        self.pid
    }

    /// Takes note that it has ended, and logs what it has written.
    pub(crate) fn end(&mut self) {
        self.pid = None;
        self.log_output();
    }

    /// Readable when there is something to log; `None` if nothing will come any more.
    pub(crate) fn output(&self) -> Option<BorrowedFd<'_>> {
        self.output.as_ref().map(AsFd::as_fd)
    }

    /// Logs what has been written since.
    pub(crate) fn log_output(&mut self) {
        let mut buffer = [0; 8192];
        while let Some(output) = &self.output {
            match rustix::io::read(output, &mut buffer) {
                Ok(0) => {
                    self.log_line();
                    self.output = None;
                }
                Ok(length) => {
                    for &byte in &buffer[..length] {
                        if byte == b'\n' || self.line.len() >= LONGEST_LINE {
                            self.log_line();
                        }
                        if byte != b'\n' {
                            self.line.push(byte);
                        }
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    fn log_line(&mut self) {
        let line = String::from_utf8_lossy(&self.line).trim_end_matches('\r').to_owned();
        if !line.is_empty() {
            // `set -x` shows secrets.
            tracing::info!("customization script: {}", self.lines.without_secrets(&line));
        }
        self.line.clear();
    }
}
