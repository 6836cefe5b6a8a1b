//! Where the jail is: the file by which `ims-jail-shell` finds the jail that it has to enter.
//!
//! Lines of a name and its value; written by the supervisor below /run, where only the build environment's root writes:
//!
//! ```text
//! init PID START     its number, and its start in clock ticks after boot
//! dkms BOOL          whether sessions keep the container's capabilities
//! job ID             the IMS job, for the greeting; may be missing
//! keep PATTERN       a name (with * and ?) of a variable that sessions keep; any number
//! ```

use std::path::Path;

use nix::unistd::Pid;

use crate::error::{Attempt, Error, Result};

/// What a session needs to know of the jail.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Record {
    /// The init's number in the container.
    pub init: i32,
    /// When it started, as [`crate::sys::process::Entry::start`].
    pub start: u64,
    /// Whether sessions keep the container's capabilities.
    pub dkms: bool,
    /// The IMS job.
    pub job: Option<String>,
    /// Names of variables that the server's configuration gives to sessions (`SetEnv`, `AcceptEnv`).
    pub keep: Vec<String>,
}

impl Record {
    /// The init's number.
    pub fn init(&self) -> Pid {
        Pid::from_raw(self.init)
    }

    /// The file's text.
    pub fn to_text(&self) -> String {
        use std::fmt::Write;
        let mut text = format!("init {} {}\ndkms {}\n", self.init, self.start, self.dkms);
        if let Some(job) = &self.job {
            let _ = writeln!(text, "job {job}");
        }
        for pattern in &self.keep {
            let _ = writeln!(text, "keep {pattern}");
        }
        text
    }

    /// Reads the file's text; `None` if it is not one.
    pub fn parse(text: &str) -> Option<Self> {
        let mut record = Self::default();
        for line in text.lines() {
            let (name, value) = line.split_once(' ')?;
            match name {
                "init" => {
                    let (pid, start) = value.split_once(' ')?;
                    record.init = pid.parse().ok()?;
                    record.start = start.parse().ok()?;
                }
                "dkms" => record.dkms = value.parse().ok()?,
                "job" => record.job = Some(value.to_owned()),
                "keep" => record.keep.push(value.to_owned()),
                _ => return None,
            }
        }
        (record.init > 0).then_some(record)
    }

    /// Reads the file at `path`.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .attempt(|| format!("read where the jail is from {}", path.display()))
            .map_err(|e| e.advise("the build environment is closing or was never opened"))?;
        Self::parse(&text).ok_or_else(|| Error::new(format!("understand {}", path.display())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let record =
            Record { init: 7, start: 99, dkms: true, job: Some("a b".into()), keep: vec!["LC_*".into(), "X".into()] };
        assert_eq!(Record::parse(&record.to_text()), Some(record));
        assert_eq!(Record::parse(""), None);
        assert_eq!(Record::parse("init x 1\n"), None);
    }
}
