//! Where the jail is: the file by which `ims-jail-shell` finds the jail that it has to enter.
//!
//! Lines of a name and its value; written by the supervisor below /run, where only the build environment's root writes:
//!
//! ```text
//! tier NAME          how strong the jail is
//! init PID START     its number, and its start in clock ticks after boot
//! keeper PID START   the process that holds the descriptors by which the jail is entered
//! door FD            one of them, by its number there; any number, in this order: the tier's namespaces, or
//!                    in the chroot tier the image root
//! helper FD          the jail's copy of ims-jail-shell, by its number there
//! dkms BOOL          whether sessions keep the container's capabilities
//! in-place BOOL      whether what is changed stays, however the environment ends
//! job ID             the IMS job, for the greeting; may be missing
//! image NAME         the image's name, for greeting and prompt; may be missing
//! keep PATTERN       a name (with * and ?) of a variable that sessions keep; any number
//! ```

use std::path::Path;

use crate::error::{Attempt, Error, Result};
use crate::jail::tier::Tier;
use crate::sys::process::Identity;

/// What a session needs to know of the jail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// How strong the jail is.
    pub(crate) tier: Tier,
    /// The jail's init, as the container numbers it.
    pub init: Identity,
    /// The process that holds the doors.
    pub keeper: Identity,
    /// Numbers of the keeper's descriptors.
    pub(crate) doors: Vec<i32>,
    /// Number of the keeper's descriptor of the jail's copy of `ims-jail-shell`, which is all that runs inside of our own.
    pub(crate) helper: i32,
    /// Whether sessions keep the container's capabilities.
    pub(crate) dkms: bool,
    /// True if changes stay in the image, however the environment ends.
    pub(crate) in_place: bool,
    /// The IMS job.
    pub(crate) job: Option<String>,
    /// The image's name.
    pub(crate) image: Option<String>,
    /// Names of variables that the server's configuration gives to sessions (`SetEnv`, `AcceptEnv`).
    pub(crate) keep: Vec<String>,
}

impl Record {
    /// The file's text.
    pub(crate) fn to_text(&self) -> String {
        use std::fmt::Write;
        let mut text =
            format!("tier {}\ninit {}\nkeeper {}\ndkms {}\n", self.tier.name(), self.init, self.keeper, self.dkms);
        let _ = writeln!(text, "helper {}\nin-place {}", self.helper, self.in_place);
        for door in &self.doors {
            let _ = writeln!(text, "door {door}");
        }
        if let Some(job) = &self.job {
            let _ = writeln!(text, "job {job}");
        }
        if let Some(image) = &self.image {
            let _ = writeln!(text, "image {image}");
        }
        for pattern in &self.keep {
            let _ = writeln!(text, "keep {pattern}");
        }
        text
    }

    /// Reads the file's text; `None` if it is not one.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (mut tier, mut init, mut keeper, mut helper) = (None, None, None, None);
        let (mut dkms, mut in_place) = (None, None);
        let (mut job, mut image, mut doors, mut keep) = (None, None, Vec::new(), Vec::new());
        for line in text.lines() {
            let (name, value) = line.split_once(' ')?;
            match name {
                "tier" => tier = Tier::from_name(value),
                "init" => init = Identity::parse(value),
                "keeper" => keeper = Identity::parse(value),
                "door" => doors.push(value.parse().ok()?),
                "helper" => helper = value.parse().ok(),
                "dkms" => dkms = value.parse().ok(),
                "in-place" => in_place = value.parse().ok(),
                "job" => job = Some(value.to_owned()),
                "image" => image = Some(value.to_owned()),
                "keep" => keep.push(value.to_owned()),
                _ => return None,
            }
        }
        let record = Self {
            tier: tier?,
            init: init?,
            keeper: keeper?,
            doors,
            helper: helper?,
            dkms: dkms?,
            in_place: in_place?,
            job,
            image,
            keep,
        };
        // With one less, a session would come to stand outside.
        (record.doors.len() == record.tier.namespaces().len().max(1)).then_some(record)
    }

    /// Reads the file at `path`.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .attempt(|| format!("read where the jail is from {}", path.display()))
            .map_err(|e| e.advise("the build environment is closing or was never opened"))?;
        Self::parse(&text).ok_or_else(|| {
            Error::new(format!("understand {}", path.display()))
                .because("it is no record of a jail of this version")
                .advise("install ims-sshd and ims-jail-shell of one version")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let record = Record {
            tier: Tier::User,
            init: Identity { pid: 7, start: 99 },
            keeper: Identity { pid: 1, start: 3 },
            doors: vec![9, 4, 5, 6, 7],
            helper: 8,
            dkms: true,
            in_place: true,
            job: Some("a b".into()),
            image: Some("compute".into()),
            keep: vec!["LC_*".into(), "X".into()],
        };
        let text = record.to_text();
        assert_eq!(Record::parse(&text), Some(record));
        assert_eq!(Record::parse(&text.replace("door 9\n", "")), None, "a door is missing");
        assert_eq!(Record::parse(""), None);
        assert_eq!(Record::parse("tier user\ninit x 1\n"), None);
    }
}
