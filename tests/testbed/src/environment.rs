//! A build environment that was started: waiting for it, and ending it.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::{IMS_SSHD, Image, LIMIT, Mode, Volume, is_regular, succeed, wait_until};

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
    /// An environment that is ready for logins.
    pub fn open(image: Image, mode: Mode) -> Self {
        Volume::new(image).start(mode).ready()
    }

    /// Creates `ready` and waits until sshd listens.
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

    /// Maximum time to open or to close. On a loaded machine it takes long to send a whole image, and to pack it.
    pub(crate) fn limit(&self) -> Duration {
        if self.lab.is_some() { 4 * LIMIT } else { LIMIT }
    }

    /// Waits for the end of the entrypoint, and returns its exit code.
    pub fn end(&mut self) -> i32 {
        let began = Instant::now();
        while self.status.is_none() {
            self.status = self.entrypoint.try_wait().unwrap();
            assert!(began.elapsed() < self.limit(), "the entrypoint does not end; its log:\n{}", self.log_text());
            std::thread::sleep(Duration::from_millis(2));
        }
        let status = self.status.unwrap();
        status.code().unwrap_or_else(|| 128 + status.signal().unwrap())
    }

    /// Marks the image complete from outside, and waits for the end of the entrypoint.
    pub fn complete(&mut self) -> i32 {
        self.touch("complete");
        self.end()
    }

    /// Process ID of the entrypoint.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.entrypoint.id().cast_signed())
    }

    pub fn send(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Waits until the log contains `text`.
    pub fn wait_for_log(&self, text: &str) {
        self.wait_for_log_times(text, 1);
    }

    /// Waits until the log contains `text` at least `times` times.
    pub fn wait_for_log_times(&self, text: &str, times: usize) {
        let what = format!("'{text}' in the log ({times}):\n{}", self.log_text());
        wait_until(&what, || self.log_text().matches(text).count() >= times);
    }

    /// Waits for the end, and asserts that it is a failure in every place: in the exit code, in the signal files, and
    /// in the log, which has to contain all of `words`.
    pub fn fails_visibly(&mut self, code: i32, words: &[&str]) {
        assert_eq!(self.end(), code, "{}", self.log_text());
        let log = self.log_text();
        for word in words {
            assert!(log.contains(word), "no '{word}' in the log:\n{log}");
        }
        for name in ["failed", "exiting"] {
            assert!(is_regular(&self.signal(name)), "no '{name}'; the log:\n{log}");
        }
        assert!(!self.signal("complete").exists(), "a false success; the log:\n{log}");
    }

    /// Output of `ims-sshd status`.
    pub fn status(&self, arguments: &[&str]) -> String {
        succeed(Command::new(&IMS_SSHD).arg("status").args(arguments).arg(&self.parent))
    }

    /// Sessions that `ims-sshd status` reports.
    pub fn sessions(&self) -> Vec<Value> {
        let report: Value = serde_json::from_str(&self.status(&["--json"])).unwrap();
        report["sessions"].as_array().cloned().unwrap_or_default()
    }

    /// PID of the jail's first process.
    pub fn jails_init(&self) -> Pid {
        let record = ims_sshd::jail::record::Record::read(&self.state_directory().join("jail")).unwrap();
        Pid::from_raw(record.init.pid)
    }

    /// The directory for the environment's own files.
    pub fn state_directory(&self) -> PathBuf {
        ims_sshd::volume::state_directory::StateDirectory::place(&self.parent)
    }
}

impl Drop for Environment {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = kill(self.pid(), Signal::SIGTERM);
            let _ = self.entrypoint.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- the end of the entrypoint's log\n{}", last_lines(&self.log_text()));
            let sshd = std::fs::read_to_string(self.sshd_log()).unwrap_or_default();
            eprintln!("--- the end of sshd's log\n{}", last_lines(&sshd));
        }
    }
}

/// The last 15 lines; more would hide the test's own message, which is printed above them.
fn last_lines(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}
