//! Removes what the caller of `ims-sshd` must not decide: where programs are looked up, and whether the kernel keeps
//! the status of a child that has ended.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use nix::sys::signal::Signal;

use crate::sys::signals::default_disposition;

/// Search path of programs if the caller's has no absolute element.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Sets what this process and all that it starts inherit. To be called first, before there is a second thread: another
/// thread could read the environment meanwhile.
pub fn set_own() {
    if let Some(path) = std::env::var_os("PATH") {
        // SAFETY: this process has one thread, so nothing reads the environment while it changes.
        #[allow(unsafe_code)]
        unsafe {
            std::env::set_var("PATH", absolute(&path));
        }
    }
    // The kernel reaps the children of a process that ignores SIGCHLD, and waitpid(2) fails. exec keeps it ignored.
    let _ = default_disposition(Signal::SIGCHLD);
}

/// The absolute elements of a search path. The others are searched from the working directory, which for programs that
/// pack and unpack is the image root: the kernel would run a program of the image.
fn absolute(path: &OsStr) -> OsString {
    let elements = path.as_bytes().split(|&b| b == b':');
    let kept: Vec<&[u8]> = elements.filter(|element| element.starts_with(b"/")).collect();
    // execvp(3) takes an empty path for the working directory.
    if kept.is_empty() { DEFAULT_PATH.into() } else { OsString::from_vec(kept.join(&b':')) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_absolute_elements_of_the_search_path_are_kept() {
        for (given, kept) in [
            ("/usr/bin:/bin", "/usr/bin:/bin"),
            (":/usr/bin", "/usr/bin"),
            ("/usr/bin:", "/usr/bin"),
            ("/usr/bin::/bin", "/usr/bin:/bin"),
            (".:/usr/bin:..:bin:./bin:~/bin", "/usr/bin"),
            ("", DEFAULT_PATH),
            (".:", DEFAULT_PATH),
        ] {
            assert_eq!(absolute(given.as_ref()), kept, "{given}");
        }
    }
}
