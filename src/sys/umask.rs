//! The file mode creation mask (umask(2)): 022 in our programs, whatever their caller has, so that modes of our files
//! are as the code says. Commands, sessions and scripts that the caller starts through us get the caller's mask.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::OnceLock;

use rustix::fs::Mode;

/// Denies writing to group and others.
const OWN: Mode = Mode::from_raw_mode(0o022);

/// The umask that this process was started with.
static CALLERS: OnceLock<Mode> = OnceLock::new();

/// Sets the umask of this process. Must be called before a second thread starts: all threads share the umask.
pub fn set_own() {
    let _ = CALLERS.set(rustix::process::umask(OWN));
}

/// Restores the caller's umask in this process, for the program that it is about to exec.
pub(crate) fn restore_callers() {
    if let Some(callers) = CALLERS.get() {
        rustix::process::umask(*callers);
    }
}

/// Starts `command` with the caller's umask.
pub(crate) fn with_callers(command: &mut Command) -> &mut Command {
    match CALLERS.get() {
        Some(callers) => with(command, *callers),
        None => command,
    }
}

/// Starts `command` with 022: an unpacker uses this mask for directories that its archive does not list.
pub(crate) fn with_own(command: &mut Command) -> &mut Command {
    with(command, OWN)
}

fn with(command: &mut Command, mask: Mode) -> &mut Command {
    // SAFETY: between fork and exec only umask runs, which cannot fail, allocates nothing and takes no lock.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(move || {
            rustix::process::umask(mask);
            Ok(())
        })
    }
}
