//! From a source to a published image, compared with the bare tools.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use testbed::s3_server::Sink;
use testbed::{IMS_SSHD, cache, free_port, ssh_options, succeed, wait_until};

use crate::measure::{in_turns, ratios, time};
use crate::peers;
use crate::{Bound, Report, Unit};

/// Size of the image for mounting and uploading.
const MEGABYTES: usize = 1024;

pub fn publishing(runs: usize, report: &mut Report) {
    let rounds = runs.div_ceil(3);
    let base = cache().join("tests");
    std::fs::create_dir_all(&base).unwrap();
    let dir = tempfile::tempdir_in(base).unwrap();
    let squashfs = large(dir.path());
    opening(dir.path(), &squashfs, rounds, report);
    packing(dir.path(), rounds, report);
    uploading(dir.path(), &squashfs, rounds, report);
    customizing(dir.path(), rounds, report);
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

fn packing(dir: &Path, rounds: usize, report: &mut Report) {
    let tree = dir.join("debian");
    succeed(Command::new("cp").arg("-aT").arg(cache().join("debian")).arg(&tree));
    for file in ["boot/vmlinuz", "boot/initrd"] {
        std::fs::write(tree.join(file), "").unwrap();
    }
    let archive = dir.join("packed.sqsh");
    let mut ours = quiet(&IMS_SSHD);
    ours.args(["package", "--archive"]).args([&archive, &tree]);
    let mut bare = quiet("sh");
    let processors = std::thread::available_parallelism().unwrap().to_string();
    let script = "rm -f $0 && exec mksquashfs $1 $0 -noappend -quiet -no-progress -xattrs -comp gzip -processors $2";
    bare.args(["-c", script]).args([&archive, &tree]).arg(processors);
    let [ours, bare] = in_turns(rounds, [&mut ours, &mut bare]);
    let limit = Bound::Limit(1.03);
    report.add("package, against mksquashfs", Unit::Times, ratios(&ours, &bare), limit);
}

fn uploading(dir: &Path, squashfs: &Path, rounds: usize, report: &mut Report) {
    let sink = Sink::start();
    let mut ours = quiet(&IMS_SSHD);
    ours.args(["upload", "--archive"]).arg(squashfs).arg(dir.join("debian")).current_dir(dir).envs(sink.variables());
    let endpoint = &sink.variables()[0].1;
    let mut curl = quiet("curl");
    curl.args(["--silent", "--fail", "-H", "Expect:", "-T"]).arg(squashfs).arg(format!("{endpoint}/bucket/curl"));
    let mut checksum = quiet("md5sum");
    checksum.arg(squashfs);
    let [ours, curl, checksum] = in_turns(rounds, [&mut ours, &mut curl, &mut checksum]);
    let raw: Vec<_> = curl.iter().zip(&checksum).map(|(put, sum)| put + sum).collect();
    // ims-sshd has to reach nine tenths of that speed.
    let limit = Bound::Limit(1.0 / 0.9);
    report.add("upload, against md5sum and curl one after the other", Unit::Times, ratios(&ours, &raw), limit);
    report.add("upload, against curl alone", Unit::Times, ratios(&ours, &curl), Bound::Information);
}

/// Time from the command to the end of a first session in the image that [`packing`] has packed.
fn customizing(dir: &Path, rounds: usize, report: &mut Report) {
    let key = dir.join("id_ed25519");
    succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key));
    let mut took = Vec::new();
    for _ in 0..rounds {
        let port = free_port();
        let ssh = |command: &str| {
            let mut ssh = quiet("ssh");
            assert!(
                ssh.args(ssh_options(&key))
                    .args(["-p", &port.to_string(), "root@127.0.0.1", command])
                    .status()
                    .unwrap()
                    .success()
            );
        };
        let mut customize = quiet(&IMS_SSHD);
        customize.arg("customize").arg(dir.join("packed.sqsh")).arg("--output").arg(dir.join("store"));
        customize.arg("--work").arg(dir.join("work")).arg("--authorized-key").arg(key.with_extension("pub"));
        customize.args(["--port", &port.to_string()]);
        let mut child = None;
        took.push(time(|| {
            child = Some(customize.spawn().unwrap());
            wait_until("sshd to listen", || TcpStream::connect(("127.0.0.1", port)).is_ok());
            ssh("true");
        }));
        // Mark the image failed, since packing and storing are measured separately.
        ssh("touch /tmp/failed");
        assert_eq!(child.unwrap().wait().unwrap().code(), Some(1));
    }
    let limit = Bound::Limit(1000.0);
    report.add("customize a squashfs, until the first ssh has ended", Unit::Milliseconds, took, limit);
}
