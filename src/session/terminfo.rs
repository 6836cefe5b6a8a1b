//! Whether the image knows the client's terminal.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use crate::sys::tree::Tree;

/// Where ncurses looks for descriptions, in the distributions' builds of it (terminfo(5)).
const DATABASES: [&str; 4] = ["etc/terminfo", "lib/terminfo", "usr/lib/terminfo", "usr/share/terminfo"];

/// Whether the image describes terminals, and this one not. An image that describes none has no program that looks for it.
pub(crate) fn is_unknown(terminal: &OsStr, image_root: &Tree) -> bool {
    let name = terminal.as_bytes();
    let [first, ..] = name else { return false };
    // What no description is called by.
    if !name.iter().all(|b| b.is_ascii_alphanumeric() || b"-+._".contains(b)) {
        return false;
    }
    let name = terminal.to_string_lossy();
    let exists = |path: &str| image_root.look(path).is_ok_and(|found| found.is_some());
    let databases: Vec<_> = DATABASES.into_iter().filter(|folder| exists(folder)).collect();
    // Below the name's first letter or, where letters' cases are not told apart, its number.
    let describes = |folder: &&str| {
        exists(&format!("{folder}/{}/{name}", char::from(*first))) || exists(&format!("{folder}/{first:x}/{name}"))
    };
    !databases.is_empty() && !databases.iter().any(describes)
}
