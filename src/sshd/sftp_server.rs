//! The container's sftp-server with everything it needs to run in an empty image.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::error::{Attempt, Error, Result};
use crate::jail::programs::Program;

/// Paths of sftp-server: in Debian, in SUSE and Alpine, in Fedora, and in upstream OpenSSH.
const PLACES: [&str; 4] = [
    "/usr/lib/openssh/sftp-server",
    "/usr/lib/ssh/sftp-server",
    "/usr/libexec/openssh/sftp-server",
    "/usr/libexec/sftp-server",
];

/// Files to show in the jail: the server, its loader as `ld.so`, its libraries.
pub fn files() -> Result<Vec<Program>> {
    let server = PLACES.into_iter().find(|p| Path::new(p).exists()).ok_or_else(|| {
        Error::new("find sftp-server").because(format!("it is at none of {}", PLACES.join(", "))).advise(
            "install the distribution's OpenSSH sftp server; without it neither sftp nor Ansible can transfer a file",
        )
    })?;
    // Have the loader list the libraries that it would load, as ldd does.
    let output = Command::new(server)
        .env_clear()
        .env("LD_TRACE_LOADED_OBJECTS", "1")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .attempt(|| format!("list the libraries of {server}"))?;
    let mut files = vec![Program { name: "sftp-server".into(), file: server.into() }];
    files.extend(parse(&String::from_utf8_lossy(&output.stdout)));
    for Program { file, .. } in &mut files {
        *file = file.canonicalize().attempt(|| format!("resolve {}", file.display()))?;
    }
    Ok(files)
}

/// Parses lines like `libc.so.6 => /lib/libc.so.6 (0x…)` for a library and `/lib64/ld-linux.so.2 (0x…)` for the loader.
fn parse(listing: &str) -> Vec<Program> {
    let program = |name: &str, file: &str| Program { name: name.into(), file: file.into() };
    listing
        .lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                [name, "=>", file, ..] if file.starts_with('/') => Some(program(name, file)),
                [file, ..] if file.starts_with('/') => Some(program("ld.so", file)),
                _ => None,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaders_listing_is_parsed() {
        let listing = "\tlinux-vdso.so.1 (0x00007ffe)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                       \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let files = parse(listing);
        let program = |name: &str, file: &str| Program { name: name.into(), file: file.into() };
        let known = [("libc.so.6", "/lib/x86_64-linux-gnu/libc.so.6"), ("ld.so", "/lib64/ld-linux-x86-64.so.2")];
        assert_eq!(files, known.map(|(name, file)| program(name, file)));
    }
}
