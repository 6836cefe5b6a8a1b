//! Programs and mounts that end with the test that made them, however it ends.

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::succeed;

/// A program.
pub struct Ended {
    child: Child,
    by: Signal,
}

impl Ended {
    /// It gets a SIGTERM.
    pub fn new(child: Child) -> Self {
        Self { child, by: Signal::SIGTERM }
    }

    /// It gets a SIGKILL: for programs that ignore or miss the other one.
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

/// The mount at this place.
pub struct Mounted(pub PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(&self.0);
    }
}

/// `mount` with these options at a place.
pub fn mount(options: &[&str], at: &Path) {
    succeed(Command::new("mount").args(options).arg(at));
}

/// Unmounts lazily, so that processes which still use the mount do not prevent it. It is no error if nothing is mounted
/// there.
pub fn unmount(at: &Path) {
    let _ = Command::new("umount").arg("--lazy").arg(at).stderr(Stdio::null()).status();
}
