//! From a source to a published image, compared with the bare tools.

mod packing;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use testbed::s3_server::Sink;
use testbed::tls_server::{Tls, certificates, port_of};
use testbed::{IMS_SSHD, cache, free_port, ssh_options, succeed, wait_until};

use crate::measure::{in_turns, order, ratios, time};
use crate::peers;
use crate::{Bound, Report, Unit};

/// Size of the image for mounting and uploading.
const MEGABYTES: usize = 1024;

pub fn publishing(runs: usize, report: &mut Report) {
    let rounds = runs.div_ceil(3);
    let dir = directory();
    let squashfs = large(dir.path());
    opening(dir.path(), &squashfs, rounds, report);
    small(dir.path());
    uploading(dir.path(), &squashfs, rounds, report);
    customizing(dir.path(), rounds, report);
}

/// Packing of a large image, and what it is part of.
pub fn packing(runs: usize, report: &mut Report) {
    let rounds = runs.div_ceil(3);
    let dir = directory();
    let squashfs = packing::large_image(dir.path());
    packing::packing(dir.path(), &squashfs, rounds, report);
    packing::memory(dir.path(), report);
    publishing_after(dir.path(), &squashfs, rounds.div_ceil(2), report);
}

fn directory() -> tempfile::TempDir {
    let base = cache().join("tests");
    std::fs::create_dir_all(&base).unwrap();
    tempfile::tempdir_in(base).unwrap()
}

/// An incompressible squashfs of [`MEGABYTES`].
fn large(dir: &Path) -> std::path::PathBuf {
    let tree = dir.join("large");
    std::fs::create_dir_all(tree.join("files")).unwrap();
    let script = "cd $0 && for n in $(seq $1); do head -c 1M /dev/urandom > files/$n; done";
    succeed(Command::new("sh").args(["-c", script]).arg(&tree).arg(MEGABYTES.to_string()));
    let squashfs = dir.join("large.sqsh");
    succeed(Command::new("mksquashfs").args([&tree, &squashfs]).args(["-noI", "-noD", "-noF", "-noX", "-no-progress"]));
    std::fs::remove_dir_all(tree).unwrap();
    squashfs
}

/// Silences standard error too.
fn quiet(program: &str) -> Command {
    let mut command = peers::quiet(program);
    command.stderr(Stdio::null());
    command
}

fn opening(dir: &Path, squashfs: &Path, rounds: usize, report: &mut Report) {
    let [overlay, bare] = ["overlay", "bare"].map(|name| dir.join(name));
    let [mut ours, mut unpacked] = [const { Vec::new() }; 2];
    for round in 0..=rounds {
        // Flush the predecessor's writes to disk first.
        succeed(&mut Command::new("sync"));
        let took = (mounted(&overlay, squashfs), {
            let mut unsquashfs = quiet("unsquashfs");
            unsquashfs.args(["-no-progress", "-d"]).args([&bare, squashfs]);
            time(|| assert!(unsquashfs.status().unwrap().success()))
        });
        std::fs::remove_dir_all(&bare).unwrap();
        // The first round is a warm-up.
        if round > 0 {
            ours.push(took.0);
            unpacked.push(took.1);
        }
    }
    let limit = Bound::Limit(0.05);
    report.add("prepare by overlay, against unsquashfs", Unit::Times, ratios(&ours, &unpacked), limit);
    report.add("prepare by overlay", Unit::Milliseconds, ours, Bound::Information);
}

/// Time until the image is mounted. The mounts end with a waiting shell, which is not measured.
fn mounted(parent: &Path, squashfs: &Path) -> f64 {
    let mut shell = Command::new("unshare");
    shell.args([
        "-m",
        "sh",
        "-c",
        "echo; read go; $0 prepare --open overlay $1 $2 2> /dev/null; echo; read end",
        &*IMS_SSHD,
    ]);
    shell.args([parent, squashfs]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut shell = shell.spawn().unwrap();
    let (mut to, mut from) = (shell.stdin.take().unwrap(), shell.stdout.take().unwrap());
    from.read_exact(&mut [0]).unwrap();
    let took = time(|| {
        to.write_all(b"\n").unwrap();
        from.read_exact(&mut [0]).unwrap();
    });
    assert!(parent.join("overlay/upper").exists());
    drop(to);
    shell.wait().unwrap();
    std::fs::remove_dir_all(parent).unwrap();
    took
}

/// A bootable Debian, packed, for [`customizing`].
fn small(dir: &Path) {
    let tree = dir.join("debian");
    succeed(Command::new("cp").arg("-aT").arg(cache().join("debian")).arg(&tree));
    for file in ["boot/vmlinuz", "boot/initrd"] {
        std::fs::write(tree.join(file), "").unwrap();
    }
    succeed(Command::new(&IMS_SSHD).args(["package", "--archive"]).arg(dir.join("packed.sqsh")).arg(&tree));
}

fn uploading(dir: &Path, squashfs: &Path, rounds: usize, report: &mut Report) {
    let sink = Sink::start();
    let mut checksum = quiet("md5sum");
    checksum.arg(squashfs);
    certificates(dir);
    let authority = dir.join("ca.crt");
    let plain = sink.variables()[0].1.clone();
    let tls = Tls::start(dir, port_of(&plain));
    for (name, endpoint) in [("http", plain), ("https", format!("https://127.0.0.1:{}", tls.port))] {
        let mut ours = quiet(&IMS_SSHD);
        ours.args(["upload", "--archive"]).arg(squashfs).arg(dir.join("debian")).current_dir(dir);
        ours.envs(sink.variables()).env("S3_ENDPOINT", &endpoint).env("S3_SSL_VALIDATE", &authority);
        let mut curl = quiet("curl");
        curl.args(["--silent", "--fail", "-H", "Expect:", "--cacert"]).arg(&authority);
        curl.arg("-T").arg(squashfs).arg(format!("{endpoint}/bucket/curl"));
        let [ours, curl, checksum] = in_turns(rounds, [&mut ours, &mut curl, &mut checksum]);
        let raw: Vec<_> = curl.iter().zip(&checksum).map(|(put, sum)| put + sum).collect();
        let what = format!("upload by {name}, against md5sum and curl one after the other");
        report.add(&what, Unit::Times, ratios(&ours, &raw), Bound::Limit(1.1));
        let what = format!("upload by {name}, against curl alone");
        report.add(&what, Unit::Times, ratios(&ours, &curl), Bound::Information);
    }
}

/// A customization of `squashfs`, and its users' key.
struct Customized {
    child: Child,
    port: u16,
    key: PathBuf,
}

impl Customized {
    /// Starts it, and waits until sshd listens.
    fn start(dir: &Path, squashfs: &Path, store: &str, variables: &[(&str, String)]) -> Self {
        let (key, port) = (dir.join("id_ed25519"), free_port());
        if !key.exists() {
            succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key));
        }
        let mut customize = quiet(&IMS_SSHD);
        customize.arg("customize").arg(squashfs).args(["--output", store]).arg("--work").arg(dir.join("work"));
        customize.arg("--authorized-key").arg(key.with_extension("pub")).args(["--port", &port.to_string()]);
        let child = customize.envs(variables.iter().map(|(name, value)| (name, value))).spawn().unwrap();
        wait_until("sshd to listen", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        Self { child, port, key }
    }

    fn ssh(&self, command: &str) {
        let mut ssh = quiet("ssh");
        ssh.args(ssh_options(&self.key)).args(["-p", &self.port.to_string(), "root@127.0.0.1", command]);
        assert!(ssh.status().unwrap().success(), "{command}");
    }

    fn end(mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

/// Time from the command to the end of a first session in the image of [`small`].
fn customizing(dir: &Path, rounds: usize, report: &mut Report) {
    let mut took = Vec::new();
    let store = dir.join("store").display().to_string();
    for _ in 0..rounds {
        let mut customized = None;
        took.push(time(|| {
            let started = Customized::start(dir, &dir.join("packed.sqsh"), &store, &[]);
            started.ssh("true");
            customized = Some(started);
        }));
        let customized = customized.unwrap();
        // Mark the image failed, since packing and storing are measured separately.
        customized.ssh("touch /tmp/failed");
        assert_eq!(customized.end(), Some(1));
    }
    let limit = Bound::Limit(1000.0);
    report.add("customize a squashfs, until the first ssh has ended", Unit::Milliseconds, took, limit);
}

/// Stands for a package that is installed.
const INSTALL: &str = "mkdir /opt/package && for n in $(seq 100); do head -c 20000 /dev/urandom > /opt/package/$n; done; \
    echo >> /var/lib/dpkg/status";

/// Time from `complete` until the image is published, with either packer.
fn publishing_after(dir: &Path, squashfs: &Path, rounds: usize, report: &mut Report) {
    let sink = Sink::start();
    let mut took = ["ims-sshd", "mksquashfs"].map(|packer| (packer, Vec::new()));
    for round in 0..rounds {
        for at in order(round, took.len()) {
            let (packer, samples) = &mut took[at];
            let mut variables = sink.variables();
            variables.push(("IMAGE_PACKER", (*packer).to_owned()));
            let customized = Customized::start(dir, squashfs, "s3://bucket", &variables);
            customized.ssh(INSTALL);
            samples.push(time(|| {
                customized.ssh("touch /tmp/complete");
                assert_eq!(customized.end(), Some(0));
            }));
        }
    }
    let [(_, ours), (_, theirs)] = took;
    let what = "`complete` until a large image is published, against IMAGE_PACKER=mksquashfs";
    report.add(what, Unit::Times, ratios(&ours, &theirs), Bound::Limit(0.15));
    report.add("the same", Unit::Milliseconds, ours, Bound::Information);
}
