//! A build environment that was started: waiting for it, and ending it.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use crate::{Image, LIMIT, Mode, Volume, wait_until};

/// An environment that was started.
pub struct Environment {
    pub entrypoint: Child,
    pub volume: Volume,
    pub status: Option<ExitStatus>,
}

impl std::ops::Deref for Environment {
    type Target = Volume;
    fn deref(&self) -> &Volume {
        &self.volume
    }
}

impl Environment {
    /// A ready environment in which one can log in.
    pub fn open(image: Image, mode: Mode) -> Self {
        Volume::new(image).start(mode).ready()
    }

    /// Says `ready` and waits until sshd listens.
    pub fn ready(self) -> Self {
        self.touch("ready");
        self.wait_for("sshd_listening");
        self
    }

    /// Waits for a signal file.
    pub fn wait_for(&self, name: &str) {
        let path = self.signal(name);
        wait_until(&format!("'{name}' to appear; the log:\n{}", self.log_text()), || path.exists());
    }

    pub fn log_text(&self) -> String {
        std::fs::read_to_string(self.volume.log()).unwrap_or_default()
    }

    /// The end of the entrypoint, as its exit code.
    pub fn end(&mut self) -> i32 {
        let began = Instant::now();
        while self.status.is_none() {
            self.status = self.entrypoint.try_wait().unwrap();
            assert!(began.elapsed() < LIMIT, "the entrypoint does not end; its log:\n{}", self.log_text());
            std::thread::sleep(Duration::from_millis(2));
        }
        let status = self.status.unwrap();
        status.code().unwrap_or_else(|| 128 + status.signal().unwrap())
    }

    /// Marks the image from outside and waits for the end.
    pub fn complete(&mut self) -> i32 {
        self.touch("complete");
        self.end()
    }

    /// The jail's first process.
    pub fn jails_init(&self) -> nix::unistd::Pid {
        let record = ims_sshd::jail::record::Record::read(&self.state_directory().join("jail")).unwrap();
        nix::unistd::Pid::from_raw(record.init.pid)
    }

    /// Where the environment has its own files.
    pub fn state_directory(&self) -> PathBuf {
        ims_sshd::volume::state_directory::StateFolder::place(&self.parent)
    }
}

impl Drop for Environment {
    fn drop(&mut self) {
        if self.status.is_none() {
            let pid = nix::unistd::Pid::from_raw(self.entrypoint.id().cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let _ = self.entrypoint.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- the end of the entrypoint's log\n{}", last_lines(&self.log_text()));
            let sshd = std::fs::read_to_string(self.sshd_log()).unwrap_or_default();
            eprintln!("--- the end of sshd's log\n{}", last_lines(&sshd));
        }
    }
}

/// So few that what a test itself says above them is still seen where the end of its output is shown.
fn last_lines(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}
