//! The jail's tier in each kind of container, determined in real ones and recorded in docs/CONTAINERS.md.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;
use testbed::{free_port, repository, ssh_options};

use crate::podman::*;

/// A kind of container: its name, podman's options, and the machine's user ID that is root in it.
struct Kind {
    name: &'static str,
    options: &'static [&'static str],
    root: u32,
}

const KINDS: [Kind; 8] = [
    Kind { name: "default capabilities", options: &[], root: 0 },
    Kind { name: "default, seccomp unconfined", options: &["--security-opt=seccomp=unconfined"], root: 0 },
    Kind { name: "all dropped but CAP_SYS_CHROOT", options: &["--cap-drop=ALL", "--cap-add=SYS_CHROOT"], root: 0 },
    Kind {
        name: "all dropped but CAP_SYS_CHROOT, CAP_SETUID and CAP_SETGID",
        options: &["--cap-drop=ALL", "--cap-add=SYS_CHROOT", "--cap-add=SETUID", "--cap-add=SETGID"],
        root: 0,
    },
    Kind { name: "default and CAP_SYS_ADMIN", options: &["--cap-add=SYS_ADMIN"], root: 0 },
    Kind { name: "privileged", options: &["--privileged"], root: 0 },
    Kind {
        name: "a user namespace of its own",
        options: &["--uidmap=0:100000:65536", "--gidmap=0:100000:65536"],
        root: 100_000,
    },
    Kind {
        name: "read-only, with a tmpfs on /run, /etc/ssh and /tmp",
        options: &["--read-only", "--tmpfs=/run", "--tmpfs=/etc/ssh", "--tmpfs=/tmp"],
        root: 0,
    },
];

/// Attempts that SECURITY.md does not defend against.
const NOT_DEFENDED: [&str; 1] = ["abstract-socket"];

/// A container in which a jailed environment was opened.
struct Container {
    name: String,
    port: u16,
    key: PathBuf,
    dir: TempDir,
}

fn attempts() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_ims-sshd")).with_file_name("examples").join("attempts")
}

impl Container {
    /// The message of the log, if no environment was opened.
    fn start(kind: &Kind) -> Result<Self, String> {
        let dir = tempfile::tempdir_in(cache().join("tests")).unwrap();
        let (volume, config) = (dir.path().join("volume"), dir.path().join("config"));
        std::fs::create_dir(&volume).unwrap();
        std::fs::create_dir(&config).unwrap();
        let image_root = volume.join("image-root");
        succeed(Command::new("cp").arg("-aT").arg(cache().join("busybox")).arg(&image_root));
        std::fs::copy(attempts(), image_root.join("attempts")).unwrap();
        std::fs::copy(attempts(), dir.path().join("attempts")).unwrap();
        let key = dir.path().join("id_ed25519");
        succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key));
        std::fs::copy(key.with_extension("pub"), config.join("authorized_keys")).unwrap();
        let port = free_port();
        let text = format!(
            "Port {port}\nListenAddress 127.0.0.1\nPermitRootLogin yes\nAuthorizedKeysFile /etc/cray/ims/authorized_keys\n\
             PasswordAuthentication no\nSubsystem sftp internal-sftp\n"
        );
        std::fs::write(config.join("sshd_config"), text).unwrap();
        succeed(Command::new("chown").args(["-R", &format!("{0}:{0}", kind.root)]).arg(&volume).arg(&config));
        // Otherwise root of a user namespace has no access to it.
        succeed(Command::new("chmod").arg("755").arg(dir.path()));
        std::fs::write(volume.join("ready"), "").unwrap();

        let name = format!("ims-sshd-test-{}-{port}", std::process::id());
        let mut command = podman(&["run", "--detach", "--network=host", "--name", &name]);
        command.args(kind.options);
        for (from, to) in [("volume", "/mnt/image"), ("config", "/etc/cray/ims"), ("attempts", "/attempts")] {
            command.arg(format!("--volume={}:{to}", dir.path().join(from).display()));
        }
        for variable in [
            "IMS_ACTION=customize",
            "SSH_JAIL=True",
            "SSHD_OPTIONS=-E /etc/cray/ims/sshd.log -f /etc/cray/ims/sshd_config",
            "SSHD_CONFIG_FILE=/etc/cray/ims/sshd_config",
        ] {
            command.args(["--env", variable]);
        }
        succeed(command.arg(IMAGE));
        let container = Self { name, port, key, dir };
        let signal = |signal: &str| container.dir.path().join("volume").join(signal).exists();
        wait_until("the environment to open or to fail", || signal("sshd_listening") || signal("exiting"));
        if signal("sshd_listening") {
            return Ok(container);
        }
        let log = container.log();
        Err(log
            .lines()
            .find_map(|line| line.split_once(" ERROR "))
            .unwrap_or_else(|| panic!("{}: {log}", kind.name))
            .1
            .to_owned())
    }

    fn log(&self) -> String {
        let output = output(&mut podman(&["logs", &self.name]));
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    }

    fn ssh(&self, options: &[&str]) -> Command {
        let mut command = Command::new("ssh");
        command.args(ssh_options(&self.key)).args(options).args(["-p", &self.port.to_string(), "root@127.0.0.1"]);
        command.stdin(Stdio::null());
        command
    }

    /// Output of a command line; `None` if the login fails.
    fn says(&self, options: &[&str], line: &str) -> String {
        let said = output(self.ssh(options).arg(line)).stdout;
        String::from_utf8_lossy(&said).trim_end().replace('\r', "")
    }

    fn can_transfer(&self) -> bool {
        let mut command = Command::new("sftp");
        command.args(ssh_options(&self.key)).args(["-b", "-", "-P", &self.port.to_string(), "root@127.0.0.1"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let batch = format!(
            "put {} /root/sent\nget /root/sent {}\n",
            self.key.display(),
            self.dir.path().join("back").display()
        );
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), batch.as_bytes()).unwrap();
        child.wait().unwrap().success()
    }

    /// Number of attempts, and those that got out.
    fn attempts(&self) -> (usize, Vec<String>) {
        let decoys = Decoys::lay_out(self);
        let variables = decoys.variables.iter().map(|line| format!("export {line}")).collect::<Vec<_>>().join("\n");
        std::fs::write(self.dir.path().join("volume/image-root/variables"), variables).unwrap();
        let said = self.says(&[], ". /variables; /attempts all");
        let lines: Vec<Vec<&str>> =
            said.lines().map(|line| line.split('\t').collect()).filter(|l: &Vec<_>| l.len() == 3).collect();
        let broken: Vec<_> = lines.iter().filter(|line| line[0] == "BROKEN").collect();
        assert!(broken.is_empty(), "{broken:?}");
        let out = lines.iter().filter(|line| line[0] == "OUT" && !NOT_DEFENDED.contains(&line[1]));
        (lines.len(), out.map(|line| format!("{}: {}", line[1], line[2])).collect())
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- its log\n{}", self.log());
        }
        let _ = output(&mut podman(&["rm", "--force", "--time=0", &self.name]));
    }
}

/// Targets of the attempts, in the container beside the jail.
struct Decoys {
    program: Child,
    variables: Vec<String>,
}

impl Decoys {
    fn lay_out(container: &Container) -> Self {
        let mut command = podman(&["exec", "--interactive", &container.name, "/bin/sh", "-c"]);
        command.arg("mkdir -p /run/decoys && exec /attempts decoys /run/decoys");
        let mut program = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(program.stdout.take().unwrap()).lines().map(Result::unwrap);
        let mut variables: Vec<_> = lines.take_while(|line| !line.is_empty()).collect();
        assert!(variables.len() > 5, "no decoys: {variables:?}");
        variables.push("OUTSIDE_CONTROL=/run/ims-sshd/mnt-image/control".into());
        Self { program, variables }
    }
}

impl Drop for Decoys {
    fn drop(&mut self) {
        drop(self.program.stdin.take());
        let _ = self.program.wait();
    }
}

/// Line of the table.
fn line(kind: &Kind) -> String {
    let container = match Container::start(kind) {
        Ok(container) => container,
        Err(refusal) => return format!("| {} | not opened: `{refusal}` | | | | | |", kind.name),
    };
    let log = container.log();
    let tier = log.split_once("the jail is made tier=\"").and_then(|(_, rest)| rest.split_once('"')).unwrap().0;
    let tty = if container.says(&["-tt"], "tty").starts_with("/dev/pts/") { "by name" } else { "without a name" };
    let containers = succeed(&mut podman(&["exec", &container.name, "cat", "/etc/resolv.conf"]));
    let dns = if container.says(&[], "cat /etc/resolv.conf") == containers { "the container's" } else { "none" };
    // A shell that executes readlink keeps its PID.
    let proc = match container.says(&[], "echo $$; exec readlink /proc/self").lines().collect::<Vec<_>>().as_slice() {
        [own, shown] if own == shown => "its own",
        [_, _] => "the container's",
        _ => "none",
    };
    let sftp = if container.can_transfer() { "yes" } else { "no" };
    let (made, out) = container.attempts();
    assert!(made > 60, "{}: only {made} attempts", kind.name);
    let escape = if tier == "chroot" {
        format!("{} of {made} get out", if out.is_empty() { "none" } else { "some" })
    } else {
        assert!(out.is_empty(), "{} ({tier}): {out:#?}", kind.name);
        format!("none of {made} gets out")
    };
    format!("| {} | `{tier}` | {tty} | {dns} | {proc} | {sftp} | {escape} |", kind.name)
}

const HEAD: &str = "\
# Jails in containers

What a jailed session has in each kind of container. Found out in real ones (podman and runc, the project's own image)
and written by `make test` (tests/pod/containers.rs), which fails where this page says something else. The tier is the
one that `IMS_JAIL_TIER=auto` comes to; the last column is the escape suite (tests/attempts), run as root inside.

| container | tier | terminal | DNS | /proc | sftp | escape suite |
|---|---|---|---|---|---|---|
";

#[test]
fn docs_say_what_a_jail_is_in_each_kind_of_container() {
    let mut page = HEAD.to_owned();
    for kind in &KINDS {
        writeln!(page, "{}", line(kind)).unwrap();
    }
    let file = repository().join("docs/CONTAINERS.md");
    if std::fs::read_to_string(&file).unwrap_or_default() != page {
        std::fs::write(&file, &page).unwrap();
        panic!(
            "docs/CONTAINERS.md said something else; it has been written anew, to be looked at and committed:\n{page}"
        );
    }
}
