//! The customization script: runs in the build environment, and its output is logged line by line.

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

/// A started script.
pub(crate) struct Script {
    /// PID of the script; `None` once it has ended.
    pid: Option<Pid>,
    /// Output pipe. A program that the script has started may write to it after the script's end.
    output: Option<OwnedFd>,
    /// Beginning of a line that is not complete yet.
    line: Vec<u8>,
    lines: Lines,
}

/// Maximum length of a logged line in bytes; a longer one is logged in pieces.
const LONGEST_LINE: usize = 16 << 10;

impl Script {
    /// Starts the script at `path` with these variables in addition to this process's own. A file that is not
    /// executable is run by a shell, since it may have been written to be sourced.
    pub(crate) fn start(path: &Path, variables: &[(String, String)]) -> Result<Self> {
        let attempted = || format!("start the customization script {}", path.display());
        let executable = std::fs::metadata(path).attempt(attempted)?.permissions().mode() & 0o111 != 0;
        let spawn = |mut command: Command| -> std::io::Result<Self> {
            let (output, theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            rustix::fs::fcntl_setfl(&output, OFlags::NONBLOCK)?;
            command.stdin(Stdio::null()).stdout(theirs.try_clone()?).stderr(theirs);
            // Make a process group, so that the script and its children can be signalled together.
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
                // The file is executable but has no `#!` line.
                Err(e) if e.raw_os_error() == Some(libc::ENOEXEC) => in_shell(),
                other => other,
            }
        } else {
            in_shell()
        };
        started.attempt(attempted)
    }

    /// PID of the script while it is running.
    pub(crate) fn pid(&self) -> Option<Pid> {
        self.pid
    }

    /// Records the end of the script, and logs its remaining output.
    pub(crate) fn end(&mut self) {
        self.pid = None;
        self.log_output();
    }

    /// Readable when there is output to log; `None` after the end of the output.
    pub(crate) fn output(&self) -> Option<BorrowedFd<'_>> {
        self.output.as_ref().map(AsFd::as_fd)
    }

    /// Logs new output.
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
            // Mask secrets, which `set -x` prints.
            tracing::info!("customization script: {}", self.lines.without_secrets(&line));
        }
        self.line.clear();
    }
}
