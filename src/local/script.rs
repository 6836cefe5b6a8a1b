//! A script of this machine that runs in the image.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::path::Path;

use crate::error::{Attempt, Error, Result};
use crate::jail::arguments;
use crate::jail::mount_table::PROGRAMS;
use crate::jail::programs::Program;
use crate::jail::tier::Tier;
use crate::sys::named;
use crate::sys::tree::Tree;

/// Maximum size of a script in bytes; without a limit, reading a device would never end.
const LARGEST: u64 = 64 << 20;

/// Name of the copy in the jail if the script's own name cannot be used.
const NAME: &str = "script";

/// A script, read before the image is opened, so that later changes to the file have no effect, and a pipe can be used.
#[derive(Debug)]
pub struct Script {
    name: String,
    content: Vec<u8>,
}

impl Script {
    /// Reads the script at `path`, the value of `--script`.
    pub fn read(path: &Path) -> Result<Self> {
        let refuse = |why: String| Error::bad_input(format!("--script is '{}': {why}", path.display()));
        let mut content = Vec::new();
        let file = named::open_file(path).map_err(|e| refuse(e.to_string()))?;
        file.take(LARGEST + 1).read_to_end(&mut content).map_err(|e| refuse(e.to_string()))?;
        if content.len() as u64 > LARGEST {
            return Err(refuse(format!("expected a script of at most {} MiB", LARGEST >> 20)));
        }
        if content.is_empty() {
            return Err(refuse("it is empty".into()));
        }
        // Keep the file's name for messages and $0, unless the jail's own program has it.
        let is_plain =
            |name: &&str| name.bytes().all(is_portable) && !name.starts_with(['.', '-']) && *name != arguments::NAME;
        let name = path.file_name().and_then(|name| name.to_str()).filter(is_plain).unwrap_or(NAME);
        Ok(Self { name: name.to_owned(), content })
    }

    /// Content of the file when it was read.
    pub(crate) fn content(&self) -> &[u8] {
        &self.content
    }

    /// Writes the script to `directory`, which belongs to root, so that a jail of tier `tier` can copy it.
    pub(crate) fn put(&self, directory: &Path, tier: Tier) -> Result<Program> {
        if tier == Tier::Chroot {
            return Err(Error::new("run --script in the image")
                .because("the tier 'chroot' cannot mount anything, so the script cannot be shown in the image")
                .advise("copy it into the image and give it as the command"));
        }
        let file = directory.join(NAME);
        // The file is for root alone: the script may hold secrets, and others can enter this directory.
        let write = || Tree::open(directory)?.create_file(NAME)?.write_all(&self.content);
        write().attempt(|| format!("write {}", file.display()))?;
        Ok(Program { name: self.name.clone(), file })
    }

    /// The command that runs the script in the jail: the script's path there or, if the script has no interpreter line,
    /// the image's sh with that path.
    pub(crate) fn command(&self) -> Vec<OsString> {
        let path = Path::new("/").join(PROGRAMS).join(&self.name).into_os_string();
        let is_program = [&b"#!"[..], b"\x7fELF"].iter().any(|begin| self.content.starts_with(begin));
        if is_program { vec![path] } else { vec!["sh".into(), path] }
    }
}

impl Script {
    /// The command that runs the script in a session over SSH, and the standard input for that command. The script is
    /// moved to descriptor 3, so that programs which the script starts cannot read parts of the script from their
    /// input.
    pub(crate) fn piped(&self) -> Result<(Vec<String>, Vec<u8>)> {
        let first = self.content.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let line = String::from_utf8_lossy(first).into_owned();
        if self.content.starts_with(b"\x7fELF") {
            return Err(Error::new("run --script on a node")
                .because("it is a program, not a script")
                .advise("copy the program into the image and give it as the command"));
        }
        // Pass everything after the interpreter as one word, as the kernel does.
        let line = line.strip_prefix("#!").unwrap_or("sh").trim();
        let interpreter = line.split_once([' ', '\t']).map_or(vec![line], |(path, word)| vec![path, word.trim()]);
        let run = r#"exec 3<&0 </dev/null; exec "$@" /dev/fd/3"#;
        let words = ["sh", "-c", run, &self.name].into_iter().chain(interpreter).map(str::to_owned).collect();
        Ok((words, self.content.clone()))
    }
}

fn is_portable(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"._-".contains(&byte)
}
