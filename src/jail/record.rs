//! The record of a jail: the file from which `ims-jail-shell` learns how to enter the jail.
//!
//! Each line has a name and a value. The supervisor writes the file below /run, where only the build environment's root
//! can write:
//!
//! ```text
//! tier NAME          the jail's tier
//! init PID START     process ID of the init, and its start in clock ticks after boot
//! keeper PID START   the process that keeps the descriptors for entering the jail
//! descriptor FD      one of these descriptors, by its number in the keeper; repeated in this order: the tier's
//!                    namespaces, or in the chroot tier the image root
//! helper FD          the jail's copy of ims-jail-shell, by its number in the keeper
//! dkms BOOL          true if sessions keep the container's capabilities
//! in-place BOOL      true if changes stay however the environment ends
//! job ID             the IMS job, for the greeting; optional
//! image NAME         the image's name, for greeting and prompt; optional
//! keep PATTERN       name (with * and ?) of a variable that sessions keep; repeated
//! ```

use std::path::Path;

use crate::error::{Attempt, Error, Result};
use crate::jail::tier::Tier;
use crate::sys::process::Identity;

/// Facts about the jail that a session needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Tier of the jail.
    pub(crate) tier: Tier,
    /// Init of the jail, with its process ID in the container.
    pub init: Identity,
    /// Process that keeps the descriptors open.
    pub keeper: Identity,
    /// Numbers of the keeper's descriptors for the namespaces, or for the image root in the chroot tier.
    pub(crate) descriptors: Vec<i32>,
    /// Number of the keeper's descriptor for the jail's copy of `ims-jail-shell`, the only program of ours that runs
    /// inside.
    pub(crate) helper: i32,
    /// True if sessions keep the container's capabilities.
    pub(crate) dkms: bool,
    /// True if changes stay in the image however the environment ends.
    pub(crate) in_place: bool,
    /// IMS job.
    pub(crate) job: Option<String>,
    /// Name of the image.
    pub(crate) image: Option<String>,
    /// Names of variables that the server's configuration gives to sessions (`SetEnv`, `AcceptEnv`).
    pub(crate) keep: Vec<String>,
}

impl Record {
    /// Formats the file.
    pub(crate) fn to_text(&self) -> String {
        use std::fmt::Write;
        let mut text =
            format!("tier {}\ninit {}\nkeeper {}\ndkms {}\n", self.tier.name(), self.init, self.keeper, self.dkms);
        let _ = writeln!(text, "helper {}\nin-place {}", self.helper, self.in_place);
        for descriptor in &self.descriptors {
            let _ = writeln!(text, "descriptor {descriptor}");
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

    /// Parses the file; `None` if it is invalid.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (mut tier, mut init, mut keeper, mut helper) = (None, None, None, None);
        let (mut dkms, mut in_place) = (None, None);
        let (mut job, mut image, mut descriptors, mut keep) = (None, None, Vec::new(), Vec::new());
        for line in text.lines() {
            let (name, value) = line.split_once(' ')?;
            match name {
                "tier" => tier = Tier::from_name(value),
                "init" => init = Identity::parse(value),
                "keeper" => keeper = Identity::parse(value),
                "descriptor" => descriptors.push(value.parse().ok()?),
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
            descriptors,
            helper: helper?,
            dkms: dkms?,
            in_place: in_place?,
            job,
            image,
            keep,
        };
        // Refuse a record without all descriptors: a session would stay in a namespace of the container.
        (record.descriptors.len() == record.tier.namespaces().len().max(1)).then_some(record)
    }

    /// Reads the file at `path`.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .attempt(|| format!("read the record of the jail, {}", path.display()))
            .map_err(|e| e.advise("the build environment is closing or was never opened"))?;
        Self::parse(&text).ok_or_else(|| {
            Error::new(format!("parse the record of the jail, {}", path.display()))
                .because("it was written by another version")
                .advise("install ims-sshd and ims-jail-shell of the same version")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_round_trips_through_its_text() {
        let record = Record {
            tier: Tier::User,
            init: Identity { pid: 7, start: 99 },
            keeper: Identity { pid: 1, start: 3 },
            descriptors: vec![9, 4, 5, 6, 7],
            helper: 8,
            dkms: true,
            in_place: true,
            job: Some("a b".into()),
            image: Some("compute".into()),
            keep: vec!["LC_*".into(), "X".into()],
        };
        let text = record.to_text();
        assert_eq!(Record::parse(&text), Some(record));
        assert_eq!(Record::parse(&text.replace("descriptor 9\n", "")), None, "a descriptor is missing");
        assert_eq!(Record::parse(""), None);
        assert_eq!(Record::parse("tier user\ninit x 1\n"), None);
    }
}
