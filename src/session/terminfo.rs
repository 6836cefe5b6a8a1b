//! Lookup of the client's terminal in the image's terminfo databases.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use crate::sys::tree::Tree;

/// Directories of terminfo databases in the distributions' builds of ncurses (terminfo(5)).
const DATABASES: [&str; 4] = ["etc/terminfo", "lib/terminfo", "usr/lib/terminfo", "usr/share/terminfo"];

/// True if the image has terminfo databases but no entry for this terminal. An image without any database has no
/// program that needs an entry.
pub(crate) fn is_unknown(terminal: &OsStr, image_root: &Tree) -> bool {
    let name = terminal.as_bytes();
    let [first, ..] = name else { return false };
    // No terminfo entry has such a name.
    if !name.iter().all(|b| b.is_ascii_alphanumeric() || b"-+._".contains(b)) {
        return false;
    }
    let name = terminal.to_string_lossy();
    let exists = |path: &str| image_root.look(path).is_ok_and(|found| found.is_some());
    let databases: Vec<_> = DATABASES.into_iter().filter(|directory| exists(directory)).collect();
    // The subdirectory is the name's first letter or, on case-insensitive file systems, its code in hexadecimal.
    let describes = |directory: &&str| {
        exists(&format!("{directory}/{}/{name}", char::from(*first)))
            || exists(&format!("{directory}/{first:x}/{name}"))
    };
    !databases.is_empty() && !databases.iter().any(describes)
}
