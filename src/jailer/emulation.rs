//! Emulation of an image of another architecture: recognized by the image's programs, and set up before sshd listens.

use std::path::PathBuf;

use crate::error::{Attempt, Result};
use crate::jail::binfmt::{self, Interpreter, Registration};
use crate::jail::tier::Tier;
use crate::session::account::Account;
use crate::sys::architecture::{Architecture, HEADER};
use crate::sys::tree::Tree;

/// Programs that are for the image's own architecture; most images have at least one of them.
const TELLTALES: [&str; 6] = [
    "bin/sh",
    "usr/bin/env",
    "lib/ld-linux-aarch64.so.1",
    "lib64/ld-linux-x86-64.so.2",
    "lib/ld-musl-aarch64.so.1",
    "lib/ld-musl-x86_64.so.1",
];

/// Finds a program of the image and its architecture: root's login shell, else the first of [`TELLTALES`].
pub(crate) fn telltale(image_root: &Tree) -> Option<(PathBuf, Architecture)> {
    let shell = Account::root_of(image_root).shell;
    let paths = std::iter::once(shell).chain(TELLTALES.into_iter().map(PathBuf::from));
    paths.into_iter().find_map(|path| {
        let header = image_root.read_beginning(&path, HEADER).ok()?;
        Some((path, Architecture::of_elf(&header)?))
    })
}

/// How the image's programs are emulated. Dropping it removes the registration.
#[derive(Debug, Default)]
pub(crate) struct Emulation {
    /// Architecture that the jail has to register in its own user namespace.
    pub(crate) in_jail: Option<Architecture>,
    /// This environment's own registration in the node's kernel.
    registration: Option<Registration>,
}

/// Sets up emulation if the image's architecture differs from this machine's. `told` is `BUILD_ARCH`, which counts only
/// if no program of the image shows its architecture. `parent` is the image root parent, whose identity names the
/// registration. A jail of tier `user` has a table of its own (binfmt_misc is per user namespace), where a registration
/// affects nobody else and needs no privilege.
pub(crate) fn prepare(
    image_root: &Tree,
    told: Option<Architecture>,
    parent: &Tree,
    tier: Option<Tier>,
) -> Result<Emulation> {
    let seen = telltale(image_root);
    if let (Some(told), Some((path, seen))) = (told, &seen)
        && told != *seen
    {
        tracing::warn!(
            "BUILD_ARCH is {}, but /{} of the image is for {}: the image's architecture is used",
            told.name(),
            path.strip_prefix("/").unwrap_or(path).display(),
            seen.name()
        );
    }
    let mut emulation = Emulation::default();
    let Some(architecture) = seen.map(|(_, seen)| seen).or(told).filter(|a| *a != Architecture::OWN) else {
        return Ok(emulation);
    };
    let name = architecture.name();
    if tier == Some(Tier::User) {
        tracing::info!("{name} programs are emulated by QEMU, registered inside the jail only");
        emulation.in_jail = Some(architecture);
        return Ok(emulation);
    }
    let place = rustix::fs::fstat(parent).attempt(|| "look at the image root's parent")?;
    // A volume has one environment at a time, so a name made from the volume's identity is unique in the kernel's
    // table, and the same after a restart.
    let owner = format!("{:x}x{:x}", place.st_dev, place.st_ino);
    // Run `provide` in a thread of its own, since it may leave the mount namespace. Only the tier `namespace` needs a
    // QEMU of its own: sessions in plain mode and in the chroot tier are root of the container anyway.
    let own = tier == Some(Tier::Namespace);
    let provided = std::thread::scope(|scope| scope.spawn(|| binfmt::provide(architecture, &owner, own)).join());
    match provided.unwrap_or_else(|panic| std::panic::resume_unwind(panic))? {
        Interpreter::Registered(entry) => {
            tracing::info!(
                "{name} programs are emulated by {}, which was registered before",
                entry.interpreter.display()
            );
        }
        Interpreter::Unseen => {
            tracing::info!("{name} programs are emulated by an interpreter that the node has registered");
        }
        Interpreter::Own(registration) => {
            let interpreter = binfmt::interpreter(architecture);
            tracing::info!("{name} programs are emulated by {}, registered until the close", interpreter.display());
            emulation.registration = Some(registration);
        }
    }
    Ok(emulation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn architecture_is_that_of_the_login_shell_or_else_of_another_known_program() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::open(dir.path()).unwrap();
        let seen = || telltale(&tree).map(|(path, architecture)| (path.display().to_string(), architecture));
        assert_eq!(seen(), None);
        for name in ["bin", "etc", "lib", "usr/bin"] {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        let [x86, arm] = [Architecture::X86_64, Architecture::Aarch64].map(|a| a.headers()[1]);
        std::fs::write(dir.path().join("lib/ld-linux-aarch64.so.1"), arm).unwrap();
        assert_eq!(seen(), Some(("lib/ld-linux-aarch64.so.1".into(), Architecture::Aarch64)));
        // A link out of the image does not lead to the host's own busybox.
        symlink("../../../../../../../../../bin/busybox", dir.path().join("bin/sh")).unwrap();
        assert_eq!(seen(), Some(("lib/ld-linux-aarch64.so.1".into(), Architecture::Aarch64)));
        std::fs::write(dir.path().join("bin/busybox"), x86).unwrap();
        assert_eq!(seen(), Some(("/bin/sh".into(), Architecture::X86_64)));
        std::fs::write(dir.path().join("etc/passwd"), "root:x:0:0::/root:/usr/bin/fish\n").unwrap();
        std::fs::write(dir.path().join("usr/bin/fish"), arm).unwrap();
        assert_eq!(seen(), Some(("/usr/bin/fish".into(), Architecture::Aarch64)));
        std::fs::write(dir.path().join("usr/bin/fish"), "#!/bin/sh\n").unwrap();
        assert_eq!(seen(), Some(("bin/sh".into(), Architecture::X86_64)));
    }
}
