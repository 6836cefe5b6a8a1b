//! Resets inherited settings that the caller of `ims-sshd` must not decide: where programs are looked up, whether the
//! kernel keeps the exit status of children, and whether exceeding the file size limit kills this program without a
//! message.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::sys::signals::default_disposition;

/// Search path of programs if the caller's has no usable element.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Sets the search path and the action of SIGCHLD, for this process and for all that it starts. Must be called before a
/// second thread starts, which could read the environment at the same time.
pub fn set_own() {
    if let Some(path) = std::env::var_os("PATH") {
        // SAFETY: this process has one thread, so nothing reads the environment while it changes.
        #[allow(unsafe_code)]
        unsafe {
            std::env::set_var("PATH", fixed(&path));
        }
    }
    // If a process ignores SIGCHLD, the kernel reaps its children and waitpid(2) fails. An ignored signal survives
    // exec.
    let _ = default_disposition(Signal::SIGCHLD);
}

/// Lets a write beyond the limit of file sizes (RLIMIT_FSIZE) fail with EFBIG instead of killing this process by
/// SIGXFSZ without a message. The signal has a handler and is not ignored, so that exec resets it to the default action
/// for other programs.
pub fn survive_file_limit() {
    extern "C" fn nothing(_: libc::c_int) {}
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler does nothing, so it is async-signal-safe.
    #[allow(unsafe_code)]
    let _ = unsafe { nix::sys::signal::sigaction(Signal::SIGXFSZ, &action) };
}

/// The elements of a search path that are the same directory in every process. Other elements depend on the working
/// directory. For programs that pack and unpack, that is the image root, so the kernel would run a program of the
/// image.
fn fixed(path: &OsStr) -> OsString {
    let elements = path.as_bytes().split(|&b| b == b':');
    let kept: Vec<&[u8]> = elements.filter(|element| is_fixed(Path::new(OsStr::from_bytes(element)))).collect();
    // execvp(3) treats an empty search path as the working directory.
    if kept.is_empty() { DEFAULT_PATH.into() } else { OsString::from_vec(kept.join(&b':')) }
}

/// Returns whether `element` is absolute and leads into neither /proc nor /dev. Links in these two lead to the working
/// directory and the descriptors of the process that follows them (proc_pid_cwd(5), proc_pid_fd(5)).
fn is_fixed(element: &Path) -> bool {
    let mut names = Vec::new();
    for component in element.components() {
        match component {
            Component::Normal(name) => names.push(name),
            Component::ParentDir => drop(names.pop()),
            _ => {}
        }
    }
    let is_outside = |path: &Path| !["/proc", "/dev"].iter().any(|place| path.starts_with(place));
    let real = element.ancestors().find_map(|above| above.canonicalize().ok());
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let opened = rustix::fs::openat2(CWD, element, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS);
    element.is_absolute()
        && is_outside(&Path::new("/").join(names.iter().collect::<PathBuf>()))
        && real.is_some_and(|real| is_outside(&real))
        && opened.err() != Some(Errno::LOOP)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_fixed_elements_of_the_search_path_are_kept() {
        for (given, kept) in [
            ("/usr/bin:/bin", "/usr/bin:/bin"),
            (":/usr/bin", "/usr/bin"),
            ("/usr/bin:", "/usr/bin"),
            ("/usr/bin::/bin", "/usr/bin:/bin"),
            (".:/usr/bin:..:bin:./bin:~/bin", "/usr/bin"),
            ("/proc/self/cwd:/usr/bin:/proc/self/fd/3/x", "/usr/bin"),
            ("/dev/fd/3:/usr/bin:/dev/shm", "/usr/bin"),
            (
                "//proc/self/cwd:/./dev/fd/3:/usr/../proc/self/cwd:/usr/bin:/process:/device",
                "/usr/bin:/process:/device",
            ),
            ("", DEFAULT_PATH),
            ("/proc/self/cwd", DEFAULT_PATH),
            (".:", DEFAULT_PATH),
        ] {
            assert_eq!(fixed(given.as_ref()), kept, "{given}");
        }
    }

    #[test]
    fn links_to_the_working_directory_are_dropped_from_the_search_path() {
        let dir = tempfile::tempdir().unwrap();
        for (name, target) in [("cwd", "/proc/self/cwd"), ("dev", "/dev/fd"), ("bin", "/usr/bin")] {
            std::os::unix::fs::symlink(target, dir.path().join(name)).unwrap();
        }
        let at = |name: &str| dir.path().join(name).display().to_string();
        let given = [at("cwd"), at("dev/3"), at("bin"), at("missing")].join(":");
        assert_eq!(fixed(given.as_ref()), *[at("bin"), at("missing")].join(":"));
    }
}
