//! Programs and mounts that end with the test that made them, however the test ends.

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::succeed;

/// A program that is ended when the value is dropped.
pub struct Ended {
    child: Child,
    by: Signal,
}

impl Ended {
    /// The program gets a SIGTERM.
    pub fn new(child: Child) -> Self {
        Self { child, by: Signal::SIGTERM }
    }

    /// The program gets a SIGKILL, for one that ignores or misses SIGTERM.
    pub fn killed(child: Child) -> Self {
        Self { child, by: Signal::SIGKILL }
    }
}

impl Deref for Ended {
    type Target = Child;
    fn deref(&self) -> &Child {
        &self.child
    }
}

impl DerefMut for Ended {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.child
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = kill(Pid::from_raw(self.child.id().cast_signed()), self.by);
            let _ = self.child.wait();
        }
    }
}

/// A mount point that is unmounted when the value is dropped.
pub struct Mounted(pub PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(&self.0);
    }
}

/// Runs `mount` with these options on a mount point.
pub fn mount(options: &[&str], at: &Path) {
    succeed(Command::new("mount").args(options).arg(at));
}

/// Unmounts lazily, so that processes that still use the mount do not prevent it. Does not fail if nothing is mounted
/// there.
pub fn unmount(at: &Path) {
    let _ = Command::new("umount").arg("--lazy").arg(at).stderr(Stdio::null()).status();
}
