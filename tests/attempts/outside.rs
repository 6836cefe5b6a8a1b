//! What lies outside, as an attempt is told of it by `OUTSIDE_*` variables, and how it is known again.

use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::outcome::{Held, Outcome, Step};

/// Every secret outside begins with this; what follows, only those outside know.
pub const MARK: &str = "decoy-of-ims-sshd-";

/// The value of `OUTSIDE_<name>`. An attempt that is not told where to go is broken.
pub fn told(name: &str) -> String {
    let name = format!("OUTSIDE_{name}");
    std::env::var(&name).unwrap_or_else(|_| panic!("{name} is not set: see `attempts decoys`"))
}

/// The decoy file's path, as it is outside.
pub fn file() -> PathBuf {
    told("FILE").into()
}

/// The same below `directory`.
pub fn file_below(directory: &Path) -> PathBuf {
    directory.join(file().strip_prefix("/").expect("an absolute path"))
}

/// The number that the process outside has there. In a PID namespace of one's own, another process may have it.
pub fn process() -> Result<i32, Held> {
    let number: i32 = told("PROCESS").parse().expect("a process number");
    let line = std::fs::read_to_string(format!("/proc/{number}/cmdline")).unwrap_or_default();
    if line.is_empty() || line.contains("victim") {
        return Ok(number);
    }
    Err(Held::by(format!("find process {number}"), "the number is another's"))
}

/// The numbers of all processes that are to be seen.
pub fn visible_processes() -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Evidence, if a secret is in `bytes`.
pub fn secret_in(bytes: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(bytes);
    let secret = &text[text.find(MARK)?..];
    let end = secret[MARK.len()..].find(|c: char| !c.is_ascii_hexdigit()).map_or(secret.len(), |at| MARK.len() + at);
    (end > MARK.len()).then(|| secret[..end].to_owned())
}

/// The evidence in what was got, or that there was none.
pub fn secret(bytes: &[u8]) -> Outcome {
    secret_in(bytes).ok_or_else(|| Held::by("look for the secret", "it is not there"))
}

/// Reads the file at `path`, if it is a regular one: nothing else is opened, lest that has effects of its own.
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
