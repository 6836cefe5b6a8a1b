//! root's login shell, as seen by sshd alone.
//!
//! sshd runs every command, even a forced one, with the account's login shell (sshd_config(5), ForceCommand), and no
//! setting changes that. For a jailed session, the container's shell would be one more program; it would read the
//! container root's startup files, and variables that the client may have set. So sshd is started in a mount namespace
//! whose /etc/passwd names the jail's helper. If no mount namespace can be created, or accounts come from another
//! source, the container's shell starts the helper: the forced command is valid for either.

use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountAttrFlags;

use crate::error::{Attempt, Result};
use crate::sys::mounts::{self, Detached};

const PASSWD: &str = "/etc/passwd";

/// The login shell that sshd finds for root.
#[derive(Debug)]
pub(crate) struct LoginShell {
    /// Path of the program.
    pub(crate) program: PathBuf,
    /// Path of the changed copy of /etc/passwd.
    pub(crate) passwd: PathBuf,
}

impl LoginShell {
    /// Mounts the copy over /etc/passwd for this thread and its future children only. Their namespace still receives
    /// mounts and unmounts from the container.
    pub(crate) fn put_in_place(&self) -> Result<()> {
        let attempted = || format!("make {} the shell that sshd starts for root", self.program.display());
        let before = std::fs::read(PASSWD).attempt(attempted)?;
        let Some(text) = with_shell(&before, &self.program) else { return Ok(()) };
        // Make the copy world-readable, since other accounts read it too, such as the one that runs
        // AuthorizedKeysCommand. They see it at /etc/passwd; the copy's own directory is closed to them.
        std::fs::write(&self.passwd, text).attempt(attempted)?;
        rustix::fs::chmod(&self.passwd, Mode::from_raw_mode(0o644)).attempt(attempted)?;
        nix::sched::unshare(CloneFlags::CLONE_NEWNS).attempt(attempted)?;
        mounts::make_all_followers().attempt(attempted)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let place = rustix::fs::open(PASSWD, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        let place = place.attempt(attempted)?;
        let own = Detached::copy_of(&self.passwd, false, attributes);
        own.and_then(|own| own.attach(place)).map(drop).attempt(attempted)
    }
}

/// passwd(5) with another shell for root; `None` if root has no entry.
fn with_shell(passwd: &[u8], shell: &Path) -> Option<Vec<u8>> {
    use std::os::unix::ffi::OsStrExt;
    let begins_with_root = passwd.starts_with(b"root:");
    let start = if begins_with_root { 0 } else { passwd.windows(6).position(|w| w == b"\nroot:")? + 1 };
    let length = passwd[start..].iter().position(|&b| b == b'\n').unwrap_or(passwd.len() - start);
    let (line, rest) = passwd[start..].split_at(length);
    let mut fields: Vec<&[u8]> = line.split(|&b| b == b':').collect();
    *fields.get_mut(6)? = shell.as_os_str().as_bytes();
    Some([&passwd[..start], &fields.join(&b':'), rest].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_roots_shell_is_replaced() {
        let shell =
            |passwd: &str| with_shell(passwd.as_bytes(), Path::new("/x")).map(|t| String::from_utf8(t).unwrap());
        let roots = |passwd: &str| shell(passwd).unwrap();
        assert_eq!(
            roots("root:x:0:0:root:/root:/bin/bash\nb:x:1:1::/:/bin/sh\n"),
            "root:x:0:0:root:/root:/x\nb:x:1:1::/:/bin/sh\n"
        );
        assert_eq!(roots("aroot:x:1:1::/:/bin/sh\nroot:x:0:0::/root:"), "aroot:x:1:1::/:/bin/sh\nroot:x:0:0::/root:/x");
        for without in ["", "aroot:x:0:0::/root:/bin/sh\n", "root:x:0\n", "+::::::\n"] {
            assert_eq!(shell(without), None, "{without:?}");
        }
    }
}
