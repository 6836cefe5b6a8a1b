//! Other tools that run a program in an image root, with the options closest to a jail.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use testbed::succeed;

use crate::enclosure::CONTROL_GROUP;

pub fn bwrap(root: &Path) -> Command {
    let mut command = quiet("bwrap");
    command.arg("--bind").arg(root).args(["/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/run"]);
    command.args(["--unshare-pid", "--unshare-ipc", "--unshare-uts", "/bin/true"]);
    command
}

/// unshare(1) with the jail's namespaces, a fresh /proc, and chroot.
pub fn unshare(root: &Path) -> Command {
    let mut command = quiet("unshare");
    command.args(["--mount", "--pid", "--ipc", "--uts", "--fork", "--mount-proc"]);
    command.arg(format!("--root={}", root.display())).arg("/bin/true");
    command
}

/// systemd-nspawn without systemd, and without the setup for a booting machine.
pub fn nspawn(root: &Path) -> Command {
    let mut command = quiet("systemd-nspawn");
    command.args(["--quiet", "--register=no", "--keep-unit", "--settings=no", "--link-journal=no", "--pipe"]);
    command.args(["--resolv-conf=off", "--timezone=off"]).arg("--directory").arg(root).arg("/bin/true");
    command
}

pub fn quiet(program: &str) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// podman with all its state in `storage`.
pub fn podman(storage: &Path) -> Command {
    let mut command = quiet("podman");
    for (option, directory) in [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp")] {
        command.arg(option).arg(storage.join(directory));
    }
    command.env("CONTAINERS_CONF", Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/containers.conf"));
    command
}

/// podman's container of an image root, with its own storage; removed on drop.
pub struct Container {
    storage: PathBuf,
}

const NAME: &str = "benchmarks";

impl Container {
    pub fn run(root: &Path, directory: &Path) -> Self {
        let container = Self { storage: directory.join("podman") };
        let mut run = container.podman();
        run.args(["run", "--detach", "--name", NAME, "--network=host"]);
        run.args(["--cgroup-parent", CONTROL_GROUP, "--rootfs"]).arg(root);
        succeed(run.args(["sleep", "infinity"]));
        container
    }

    pub fn exec(&self, program: &str) -> Command {
        let mut command = self.podman();
        command.args(["exec", NAME, program]);
        command
    }

    fn podman(&self) -> Command {
        podman(&self.storage)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.podman().args(["rm", "--force", "--time=0", NAME]).output();
        // podman bind-mounts its storage on itself.
        let _ = Command::new("umount").arg("--recursive").arg(self.storage.join("root/overlay")).output();
    }
}
