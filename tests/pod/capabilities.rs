//! Capabilities of each container of the manifests, and the failures without each of them: tested in real containers,
//! and recorded in docs/CAPABILITIES.md.

use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use ims_sshd::pod::pod_files::SSHD_CONFIG;
use serde_json::{Value, json};
use tempfile::TempDir;
use testbed::rendered::manifests;
use testbed::{repository, ssh_options, text};

use crate::podman::*;

/// Container of a manifest, and a check that returns the error, if any.
struct Kind {
    name: &'static str,
    manifest: &'static str,
    container: &'static str,
    trial: fn(&Trial) -> Result<(), String>,
}

const KINDS: [Kind; 4] = [
    Kind { name: "prepare", manifest: "base", container: "prepare", trial: prepare },
    Kind { name: "sshd, jailed (tier `user`)", manifest: "base", container: "sshd", trial: jailed },
    Kind { name: "sshd, plain (debug shell)", manifest: "create-debug", container: "sshd", trial: plain },
    Kind { name: "sidecar", manifest: "base", container: "sidecar", trial: sidecar },
];

/// System calls that a jail needs and containerd's profile refuses without CAP_SYS_ADMIN. podman's own profile allows
/// them.
fn runtime_default() -> Value {
    let refused =
        ["unshare", "mount", "umount2", "setns", "pivot_root", "open_tree", "move_mount", "mount_setattr", "fsopen"];
    let mut calls = vec![
        json!({"names": refused, "action": "SCMP_ACT_ERRNO", "errnoRet": 1}),
        json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}),
    ];
    for flag in [0x0002_0000_u32, 0x0200_0000, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000] {
        let masked = json!([{"index": 0, "value": flag, "valueTwo": flag, "op": "SCMP_CMP_MASKED_EQ"}]);
        calls.push(json!({"names": ["clone"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "args": masked}));
    }
    json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": calls})
}

/// Creates an image with files of other users, and with files that cannot be read without a capability.
const ODD: &str = "cd \"$1\"; mkdir -p srv/private tmp dev; mknod dev/console c 5 1
    echo secret > srv/private/file; chmod 0 srv/private/file
    cp bin/busybox srv/setgid; echo x > srv/capable; echo 'nameserver 192.0.2.1' > etc/resolv.conf
    chown -R 1000:1000 srv/private srv/setgid etc/resolv.conf . -h; chown 0:0 etc/passwd; chmod 6755 srv/setgid
    setcap cap_net_raw+ep srv/capable; chmod 0700 . srv/private; chmod 1770 tmp";

/// A session runs in its own user namespace, in which it has all capabilities.
const SESSION: &str = "cat /srv/private/file && chown 33:33 /srv/setgid && chmod 6755 /srv/setgid && chroot / true";

/// A container with these capabilities, on a volume of its own.
struct Trial {
    container: Value,
    capabilities: Vec<String>,
    dir: TempDir,
    name: String,
    /// A port that needs a capability to bind, like 22.
    port: u16,
}

/// The kernel's default, which CRI-O and containerd before 2.0 do not change.
const UNPRIVILEGED_PORT_START: u16 = 1024;

/// An unused port of the loopback address that needs a capability to bind.
fn low_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap();
    assert!(
        start.trim().parse::<u16>().unwrap() >= UNPRIVILEGED_PORT_START,
        "everybody may bind ports here: set net.ipv4.ip_unprivileged_port_start to {UNPRIVILEGED_PORT_START}"
    );
    let begin = u16::try_from(std::process::id() % 400).unwrap();
    (0..400)
        .map(|_| 600 + (begin + NEXT.fetch_add(1, Ordering::Relaxed)) % 400)
        .find(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .expect("a free port")
}

/// A message without process IDs, and without the file that unsquashfs happened to reach first.
fn without_numbers(message: &str) -> String {
    let inner = |word: &str| word.strip_prefix('(').and_then(|word| word.strip_suffix(')')).map(str::to_owned);
    let is_number = |word: &str| inner(word).as_deref().unwrap_or(word).parse::<u32>().is_ok();
    let words = message.split(" ./").next().unwrap().split(' ').map(|word| if is_number(word) { "…" } else { word });
    words.collect::<Vec<_>>().join(" ")
}

impl Trial {
    fn new(container: &Value, capabilities: Vec<String>) -> Self {
        let dir = tempfile::tempdir_in(cache().join("tests")).unwrap();
        for directory in ["volume", "config", "keys"] {
            std::fs::create_dir(dir.path().join(directory)).unwrap();
        }
        let port = low_port();
        let name = format!("ims-sshd-test-{}-{port}", std::process::id());
        let trial = Self { container: container.clone(), capabilities, dir, name, port };
        succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(trial.key()));
        let config = SSHD_CONFIG.replace("Port 22\n", &format!("Port {port}\nListenAddress 127.0.0.1\n"));
        for directory in ["config", "keys"] {
            let directory = trial.dir.path().join(directory);
            std::fs::copy(trial.key().with_extension("pub"), directory.join("authorized_keys")).unwrap();
            std::fs::write(directory.join("sshd_config"), &config).unwrap();
        }
        std::fs::write(trial.dir.path().join("seccomp.json"), runtime_default().to_string()).unwrap();
        trial
    }

    fn key(&self) -> PathBuf {
        self.dir.path().join("id_ed25519")
    }

    fn volume(&self) -> PathBuf {
        self.dir.path().join("volume")
    }

    /// `podman run` that starts the container as Kubernetes would, with these capabilities instead of the manifest's.
    fn run(&self, options: &[&str], further: &[&str]) -> Command {
        let mut command = podman(&["run", "--network=host", "--name", &self.name]);
        let security = &self.container["securityContext"];
        assert_eq!(
            (&security["readOnlyRootFilesystem"], &security["allowPrivilegeEscalation"]),
            (&true.into(), &false.into())
        );
        command.args(["--read-only", "--read-only-tmpfs=false", "--security-opt=no-new-privileges", "--cap-drop=ALL"]);
        command.args(self.capabilities.iter().map(|capability| format!("--cap-add={capability}")));
        // podman's own profile hides the kernel's audit log from a container without CAP_AUDIT_WRITE.
        let profile = match security["seccompProfile"]["type"].as_str() {
            Some("RuntimeDefault") => self.dir.path().join("seccomp.json").display().to_string(),
            _ => "unconfined".to_owned(),
        };
        command.arg(format!("--security-opt=seccomp={profile}"));
        for mount in self.container["volumeMounts"].as_array().unwrap() {
            let at = mount["mountPath"].as_str().unwrap();
            let directory = match mount["name"].as_str().unwrap() {
                "image" => "volume",
                name @ ("config" | "keys") => name,
                _ => {
                    command.arg(format!("--tmpfs={at}"));
                    continue;
                }
            };
            command.arg(format!("--volume={}:{at}", self.dir.path().join(directory).display()));
        }
        // Variables from a Secret name the store, which is tested elsewhere.
        for variable in self.container["env"].as_array().unwrap() {
            if let (Some(name), Some(value)) = (variable["name"].as_str(), variable["value"].as_str()) {
                command.arg(format!("--env={name}={value}"));
            }
        }
        command.args(options).arg(IMAGE).args(further);
        command
    }

    fn log(&self) -> String {
        let output = output(&mut podman(&["logs", &self.name]));
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    }

    /// First error, without the parts that vary between runs.
    fn complaint(log: &str) -> String {
        let line = log.lines().find_map(|line| line.split_once(" ERROR ")).unwrap_or_else(|| panic!("{log}")).1;
        without_numbers(line.split("; ").next().unwrap())
    }

    /// Podman may fail to look at a container that is just ending.
    fn has_ended(&self) -> bool {
        output(&mut podman(&["inspect", "--format", "{{.State.Running}}", &self.name])).stdout == b"false\n"
    }

    fn ends(&self) -> i32 {
        wait_until("the container to end", || self.has_ended());
        succeed(&mut podman(&["inspect", "--format", "{{.State.ExitCode}}", &self.name])).parse().unwrap()
    }

    fn ssh(&self, line: &str) -> std::process::Output {
        let mut ssh = Command::new("ssh");
        ssh.args(ssh_options(&self.key())).args(["-p", &self.port.to_string(), "root@127.0.0.1", line]);
        output(ssh.stdin(Stdio::null()))
    }

    /// Starts the container of sshd, and waits until logins succeed.
    fn open(&self) -> Result<(), String> {
        std::fs::write(self.volume().join("ready"), "").unwrap();
        succeed(&mut self.run(&["--detach"], &[]));
        let stands = |signal: &str| self.volume().join(signal).exists();
        wait_until("the environment to open or to fail", || stands("sshd_listening") || stands("exiting"));
        if stands("exiting") {
            return Err(format!("not opened: {}", Self::complaint(&self.log())));
        }
        let login = self.ssh("true");
        assert!(login.status.success(), "{login:?}");
        let mut terminal = Command::new("ssh");
        terminal.args(ssh_options(&self.key())).args(["-tt", "-p", &self.port.to_string(), "root@127.0.0.1", "true"]);
        let terminal = output(terminal.stdin(Stdio::null()));
        assert!(terminal.status.success(), "a login on a terminal: {terminal:?}");
        Ok(())
    }

    /// Marks the image while a client has not logged in yet, and waits for success.
    fn close(&self, mark: &str) -> Result<(), String> {
        let mut client = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        client.write_all(b"SSH-2.0-nobody\r\n").unwrap();
        // After the banner and the key exchange offer, sshd's unprivileged process exists.
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut said: Vec<u8> = Vec::new();
        while said.len() < 200 {
            let mut piece = [0; 100];
            let length = client.read(&mut piece).unwrap();
            assert!(length > 0);
            said.extend(&piece[..length]);
        }
        self.ssh(mark);
        match self.ends() {
            0 => Ok(()),
            _ => Err(format!("it does not end well: {}", Self::complaint(&self.log()))),
        }
    }
}

/// An image with directories of other users, and with files that root cannot read without a capability.
fn lay_out(place: &Path) {
    std::fs::create_dir_all(place.parent().unwrap()).unwrap();
    succeed(Command::new("cp").arg("-aT").arg(cache().join("busybox")).arg(place));
    succeed(Command::new("sh").args(["-ec", ODD, "sh"]).arg(place));
}

impl Drop for Trial {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {:?}\n{}", self.capabilities, self.log());
        }
        let _ = output(&mut podman(&["rm", "--force", "--time=0", &self.name]));
    }
}

fn prepare(trial: &Trial) -> Result<(), String> {
    let image = trial.dir.path().join("image");
    lay_out(&image);
    let archive = trial.volume().join("image.sqsh");
    succeed(Command::new("mksquashfs").arg(&image).arg(&archive).args(["-quiet", "-no-progress"]));
    let output =
        output(&mut trial.run(&["--entrypoint=ims-sshd"], &["prepare", "/mnt/image", "/mnt/image/image.sqsh"]));
    if !output.status.success() {
        return Err(format!("not unpacked: {}", Trial::complaint(&text(&output.stderr))));
    }
    let list = |root: &Path| {
        let script = "cd \"$1\"; find . -exec stat -c '%n %u:%g %a' {} + | sort; getcap -r . | sort";
        succeed(Command::new("sh").args(["-ec", script, "sh"]).arg(root))
    };
    let (before, after) = (list(&image), list(&trial.volume().join("image-root")));
    let differs = before.lines().zip(after.lines()).find(|(one, other)| one != other);
    differs.map_or(Ok(()), |(was, is)| Err(format!("attributes are lost: `{was}` becomes `{is}`")))
}

fn jailed(trial: &Trial) -> Result<(), String> {
    lay_out(&trial.volume().join("image-root"));
    trial.open()?;
    let done = trial.ssh(SESSION);
    assert!(done.status.success(), "{done:?}");
    trial.close("touch /tmp/complete")
}

fn plain(trial: &Trial) -> Result<(), String> {
    let image = trial.volume().join("build/image-root");
    lay_out(&image);
    succeed(
        Command::new("mksquashfs").arg(&image).arg(trial.volume().join("one.sqsh")).args(["-quiet", "-no-progress"]),
    );
    std::fs::write(trial.volume().join("build_failed"), "").unwrap();
    trial.open()?;
    for line in [
        "cd /mnt/image/build/image-root && cat srv/private/file",
        "chown 33:33 /mnt/image/build/image-root/srv/capable",
        "chmod 0640 /mnt/image/build/image-root/srv/private/file",
        "cd /mnt/image/build/image-root && cp -p srv/setgid srv/copy && test -g srv/copy",
        "chroot /mnt/image/build/image-root /bin/true",
        "setpriv --reuid=1000 --clear-groups sleep 100 & until grep -q '^Uid:.1000' /proc/$!/status; do :; done; kill $!",
        "unsquashfs -quiet -no-progress -d /mnt/image/unpacked /mnt/image/one.sqsh",
    ] {
        let done = trial.ssh(line);
        if !done.status.success() {
            let said = format!("{}{}", text(&done.stdout), text(&done.stderr));
            let said = said.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("the bit is lost");
            return Err(format!("a session cannot `{line}`: {}", without_numbers(said)));
        }
    }
    trial.close("touch /mnt/image/complete")
}

fn sidecar(trial: &Trial) -> Result<(), String> {
    lay_out(&trial.volume().join("image-root"));
    let command = ["sidecar", "--authorized-keys", "/keys/authorized_keys"];
    succeed(&mut trial.run(&["--detach", "--entrypoint=ims-sshd"], &command));
    let stands = |signal: &str| trial.volume().join(signal).exists();
    wait_until("'ready', or the end", || stands("ready") || trial.has_ended());
    // The environment that would have been open.
    for signal in ["sshd_listening", "complete", "exiting"] {
        std::fs::write(trial.volume().join(signal), "").unwrap();
    }
    match trial.ends() {
        0 => Ok(()),
        _ => Err(Trial::complaint(&trial.log())),
    }
}

const HEAD: &str = "\
# Capabilities of the pod's containers

What the manifests in deploy/kubernetes give each container, with all others dropped and no_new_privs
(`allowPrivilegeEscalation: false`), and what breaks without each of them. Tried in real containers, on an image whose
directories belong to other users too, and written by `make test` (tests/pod/capabilities.rs), which fails where this
page says something else, or where something could be left out. `prepare`, `sidecar` and the debug shell run under a
seccomp profile that refuses what containerd's RuntimeDefault refuses, the jailed sshd under none: neither hides the
kernel's audit log, which Debian's sshd writes to where it may, and which ims-sshd hides from it otherwise. sshd binds a
port below `net.ipv4.ip_unprivileged_port_start`, which is 1024, the kernel's default: CRI-O and containerd before 2.0
leave it so, later ones set 0.

A jailed session of the tier `user` has the capabilities of SECURITY.md in a user namespace of its own, whatever the
container has.

| container | capability | without it |
|---|---|---|
";

#[test]
fn docs_say_what_breaks_without_each_capability_and_the_manifests_have_no_other() {
    let rows: Vec<Vec<String>> = std::thread::scope(|scope| {
        let running: Vec<_> = KINDS.iter().map(|kind| scope.spawn(|| rows(kind))).collect();
        running.into_iter().map(|rows| rows.join().unwrap()).collect()
    });
    let mut page = HEAD.to_owned();
    for row in rows.into_iter().flatten() {
        writeln!(page, "{row}").unwrap();
    }
    let file = repository().join("docs/CAPABILITIES.md");
    if std::fs::read_to_string(&file).unwrap_or_default() != page {
        std::fs::write(&file, &page).unwrap();
        panic!(
            "docs/CAPABILITIES.md said something else; it has been written anew, to be looked at and committed:\n{page}"
        );
    }
}

fn rows(kind: &Kind) -> Vec<String> {
    let mut job = manifests(kind.manifest).remove(0);
    let container = container(&mut job["spec"]["template"]["spec"], kind.container).clone();
    let given: Vec<String> =
        serde_json::from_value(container["securityContext"]["capabilities"]["add"].clone()).unwrap();
    assert_eq!((kind.trial)(&Trial::new(&container, given.clone())), Ok(()), "{}", kind.name);
    let row = |without: &String| {
        let others = given.iter().filter(|capability| *capability != without).cloned().collect();
        let broken = (kind.trial)(&Trial::new(&container, others));
        let broken = broken.expect_err(&format!("{} needs no {without}", kind.name));
        format!("| {} | `{without}` | {} |", kind.name, broken.replace('|', "\\|"))
    };
    given.iter().map(row).collect()
}
