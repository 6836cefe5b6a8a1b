//! `attempts ambush`: waits for the helpers of sessions entering the jail. When they first become visible, they are
//! still programs of the environment (CVE-2016-9962, CVE-2024-21626).

use std::collections::HashSet;
use std::os::fd::AsRawFd;

use crate::outcome::{Outcome, Step, any};
use crate::outside::visible_processes;

/// The helper's `comm`.
const HELPER: &str = "ims-jail-shell";

/// Ends with the first helper that can be inspected, or after three that could not. Needs sessions to be started
/// meanwhile.
pub fn ambush() -> Outcome {
    let mut seen = HashSet::new();
    loop {
        for process in visible_processes() {
            let name = std::fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
            if name.trim() != HELPER {
                continue;
            }
            match look_into(process) {
                Ok(evidence) => return Ok(evidence),
                // It has executed a program of the image meanwhile, or has ended.
                Err(held) if held.is_absent() => {}
                Err(held) => {
                    seen.insert(process);
                    if seen.len() == 3 {
                        return Err(held);
                    }
                }
            }
        }
    }
}

/// Tries to read the container's helper. Reading its copy in the jail, or the program that it executes, is no escape: a
/// session can read those anyway.
fn look_into(process: i32) -> Outcome {
    any(["exe", "maps", "environ"], |name| {
        let path = format!("/proc/{process}/{name}");
        let mut file = std::fs::File::open(&path).step(format!("open {path}"))?;
        let (what, expected) = match name {
            "exe" => (
                std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).map(|p| p.display().to_string()),
                HELPER,
            ),
            "maps" => (std::io::read_to_string(&mut file), HELPER),
            _ => (std::io::read_to_string(&mut file), "SSH_ORIGINAL_COMMAND"),
        };
        let what = what.step(format!("read {path}"))?;
        if what.contains(expected) && !what.contains(COPY) {
            return Ok(format!("looked into {path} of a helper"));
        }
        Err(std::io::Error::from_raw_os_error(libc::ENOENT)).step(format!("find a helper at {path}"))
    })
}

/// The helper's copy in the jail.
const COPY: &str = "/run/.ims-sshd/ims-jail-shell";
