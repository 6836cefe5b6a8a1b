//! root's login shell, as sshd alone sees it.
//!
//! sshd runs every command, a forced one too, by the login shell of the account (sshd_config(5), ForceCommand), and no setting names
//! another. For a session in the jail, the container's shell would be one program more, which reads the start files of the container's
//! root and variables that the client may have sent. So sshd is started in a mount namespace where /etc/passwd names the jail's helper.
//! Where no mount namespace can be made, or accounts come from elsewhere, the container's shell starts the helper: the forced command is
//! a line for either.

use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountAttrFlags;

use crate::error::{Attempt, Result};
use crate::sys::mounts::{self, Detached};

const PASSWD: &str = "/etc/passwd";

/// The shell that sshd is to find for root.
#[derive(Debug)]
pub struct LoginShell {
    /// Its program.
    pub program: PathBuf,
    /// Where the copy of /etc/passwd is written that names it.
    pub passwd: PathBuf,
}

impl LoginShell {
    /// Puts the shell in place for the calling thread, and what it starts from here on, and for nobody else. What is mounted or unmounted
    /// in the container is so for them too.
    pub fn put_in_place(&self) -> Result<()> {
        let attempted = || format!("make {} the shell that sshd starts for root", self.program.display());
        let before = std::fs::read(PASSWD).attempt(attempted)?;
        let Some(text) = with_shell(&before, &self.program) else { return Ok(()) };
        // Read by other accounts too, such as that of an AuthorizedKeysCommand; the directory it is in lets nobody else in.
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

/// The text of passwd(5) with another shell for root; `None` if root has no line there.
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
    fn roots_shell_alone_is_another() {
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
