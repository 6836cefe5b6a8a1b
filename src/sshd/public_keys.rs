//! Files of authorized keys.

use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};
use crate::sys::named;

/// Refuses a file without a valid key. `option` is named in the error.
pub(crate) fn check_public_keys(option: &str, file: &Path) -> Result<()> {
    let refuse = |why: &str| Error::bad_input(format!("{option} is '{}': {why}", file.display()));
    let real = named::resolve(file).map_err(|e| refuse(&e.to_string()))?;
    let found = std::fs::metadata(&real).map_err(|e| refuse(&e.to_string()))?;
    if !found.is_file() {
        return Err(refuse("expected a regular file"));
    }
    let mut text = Vec::new();
    named::open_file(&real).and_then(|mut file| file.read_to_end(&mut text)).map_err(|e| refuse(&e.to_string()))?;
    let text = String::from_utf8_lossy(&text);
    if text.contains("PRIVATE KEY-----") {
        return Err(refuse("it is a private key; expected the public one, usually beside it as .pub"));
    }
    if text.contains("---- BEGIN SSH2 PUBLIC KEY ----") {
        return Err(refuse("it is a key in the format of RFC 4716; 'ssh-keygen -i -f FILE' converts it"));
    }
    // A key follows its type name, which may follow options, and begins with the encoded length of that name.
    let is_key = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let is_type = |word: &str| ["ssh-", "ecdsa-", "sk-"].iter().any(|begin| word.starts_with(begin));
        !line.trim_start().starts_with('#') && words.windows(2).any(|w| is_type(w[0]) && w[1].starts_with("AAAA"))
    };
    if text.lines().any(is_key) { Ok(()) } else { Err(refuse("it holds no public key in OpenSSH's format")) }
}
