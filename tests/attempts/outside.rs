//! Targets outside the jail, announced in `OUTSIDE_*` variables, and recognizing their secrets.

use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::outcome::{Held, Outcome, Step};

/// Prefix of every secret outside; the rest is known only outside.
pub const MARK: &str = "decoy-of-ims-sshd-";

/// Value of `OUTSIDE_<name>`. Without it the attempt is broken.
pub fn told(name: &str) -> String {
    let name = format!("OUTSIDE_{name}");
    std::env::var(&name).unwrap_or_else(|_| panic!("{name} is not set: see `attempts decoys`"))
}

/// Path of the decoy file outside.
pub fn file() -> PathBuf {
    told("FILE").into()
}

/// Path of the decoy file below `directory`.
pub fn file_below(directory: &Path) -> PathBuf {
    directory.join(file().strip_prefix("/").expect("an absolute path"))
}

/// PID of the process outside, in its own namespace; in another PID namespace it may be a different process.
pub fn process() -> Result<i32, Held> {
    let number: i32 = told("PROCESS").parse().expect("a process number");
    let line = std::fs::read_to_string(format!("/proc/{number}/cmdline")).unwrap_or_default();
    if line.is_empty() || line.contains("victim") {
        return Ok(number);
    }
    Err(Held::by(format!("find process {number}"), "the number is another's"))
}

/// PIDs of all visible processes.
pub fn visible_processes() -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The secret in `bytes`, as evidence.
pub fn secret_in(bytes: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(bytes);
    let secret = &text[text.find(MARK)?..];
    let end = secret[MARK.len()..].find(|c: char| !c.is_ascii_hexdigit()).map_or(secret.len(), |at| MARK.len() + at);
    (end > MARK.len()).then(|| secret[..end].to_owned())
}

/// The secret in `bytes`, or that there was none.
pub fn secret(bytes: &[u8]) -> Outcome {
    secret_in(bytes).ok_or_else(|| Held::by("look for the secret", "it is not there"))
}

/// Reads `path` if it is a regular file: opening anything else may have effects.
pub fn read_secret(path: &Path) -> Outcome {
    read_secret_at(rustix::fs::CWD, path)
}

/// The same, relative to an open directory.
pub fn read_secret_at(directory: impl AsFd, path: &Path) -> Outcome {
    let found = rustix::fs::statat(&directory, path, rustix::fs::AtFlags::empty());
    let found = found.step(format!("find {}", path.display()))?;
    if !rustix::fs::FileType::from_raw_mode(found.st_mode).is_file() {
        return Err(Held::by(format!("read {}", path.display()), "it is no regular file"));
    }
    let open = rustix::fs::openat(directory, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let mut bytes = Vec::new();
    let file = std::fs::File::from(open.step(format!("open {}", path.display()))?);
    file.take(4096).read_to_end(&mut bytes).step(format!("read {}", path.display()))?;
    secret(&bytes)
}
