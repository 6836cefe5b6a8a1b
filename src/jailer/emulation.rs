//! An image of another architecture than this machine's: seen by its programs, and made to run before sshd listens.

use std::path::PathBuf;

use crate::error::{Attempt, Result};
use crate::jail::binfmt::{self, Interpreter, Registration};
use crate::jail::tier::Tier;
use crate::session::account::Account;
use crate::sys::architecture::{Architecture, HEADER};
use crate::sys::tree::Tree;

/// Files that are there in most images, and are programs of its own architecture.
const TELLTALES: [&str; 6] = [
    "bin/sh",
    "usr/bin/env",
    "lib/ld-linux-aarch64.so.1",
    "lib64/ld-linux-x86-64.so.2",
    "lib/ld-musl-aarch64.so.1",
    "lib/ld-musl-x86_64.so.1",
];

/// The first file of the image that says what machine it is for: what a session starts, else any that is known.
pub(crate) fn telltale(image_root: &Tree) -> Option<(PathBuf, Architecture)> {
    let shell = Account::root_of(image_root).shell;
    let paths = std::iter::once(shell).chain(TELLTALES.into_iter().map(PathBuf::from));
    paths.into_iter().find_map(|path| {
        let header = image_root.read_beginning(&path, HEADER).ok()?;
        Some((path, Architecture::of_elf(&header)?))
    })
}

/// By whom the image's programs are made to run; as long as this is kept.
#[derive(Debug, Default)]
pub(crate) struct Emulation {
    /// What they are for, if the jail has to see to it itself.
    pub(crate) in_jail: Option<Architecture>,
    /// Ours.
    registration: Option<Registration>,
}

/// Has the image's programs run on this machine, if they are for another one. `told` is what `BUILD_ARCH` says; where the image says
/// something else, it is the image that counts. `parent` is the image root's parent, whose environment owns what is registered. A jail
/// of tier `tier` that is a user namespace has a table of its own, where it troubles nobody and needs no privilege.
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
            "BUILD_ARCH is {}, but /{} of the image is for {}: the image is taken as the latter",
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
    // One volume, one environment: unique among all that share the kernel's table, and found again after a restart.
    let owner = format!("{:x}x{:x}", place.st_dev, place.st_ino);
    // In a thread of its own, which it leaves with other mounts. Plain sessions and the chroot tier are root of the container anyway.
    let own = tier == Some(Tier::Namespace);
    let provided = std::thread::scope(|scope| scope.spawn(|| binfmt::provide(architecture, &owner, own)).join());
    match provided.unwrap_or_else(|panic| std::panic::resume_unwind(panic))? {
        Interpreter::Registered(entry) => {
            tracing::info!(
                "{name} programs are emulated by {}, which was registered before",
                entry.interpreter.display()
            );
        }
        Interpreter::Unseen => tracing::info!("{name} programs are emulated by what the node has registered"),
        Interpreter::Own(registration) => {
            let interpreter = binfmt::interpreter(architecture);
            tracing::info!("{name} programs are emulated by {}, registered until the end", interpreter.display());
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
    fn an_images_architecture_is_that_of_its_login_shell_else_of_what_else_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::open(dir.path()).unwrap();
        let seen = || telltale(&tree).map(|(path, architecture)| (path.display().to_string(), architecture));
        assert_eq!(seen(), None);
        for folder in ["bin", "etc", "lib", "usr/bin"] {
            std::fs::create_dir_all(dir.path().join(folder)).unwrap();
        }
        let [x86, arm] = [Architecture::X86_64, Architecture::Aarch64].map(|a| a.headers()[1]);
        std::fs::write(dir.path().join("lib/ld-linux-aarch64.so.1"), arm).unwrap();
        assert_eq!(seen(), Some(("lib/ld-linux-aarch64.so.1".into(), Architecture::Aarch64)));
        // The host's own busybox, by a link out of the image, is not the image's.
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
