//! A job on a build node beside a local one, and its connection beside bare ssh and scp. Node and pod are network
//! namespaces of this machine, so both sides share its processors.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use testbed::job::bootable_image;
use testbed::node::Lab;
use testbed::{Environment, IMS_SSHD, Image, Mode, Volume, ssh_options, succeed, wait_until};

use crate::environments::{Creations, until_it_waits, waiting};
use crate::measure::{differences, in_turns, order, time};
use crate::{Bound, Report, Unit, peers};

/// Size of an image that takes a while to be sent.
const MEBIBYTES: f64 = 200.0;

/// Limit of silence in seconds (`REMOTE_HEARTBEAT_TIMEOUT_COUNT=1`).
const SILENCE: f64 = 5.0;

/// Additional time within which a loss has to be noticed, in seconds.
const SOON: f64 = 2.0;

pub fn remote(runs: usize, report: &mut Report) {
    // sshd wants it to check the pod's configuration.
    std::fs::create_dir_all("/run/sshd").unwrap();
    let lab = Lab::new();
    assert!(lab.ssh(&lab.nodes[0], "true").status.success());
    let (dir, tree) = bootable_image();
    let [small, large] = ["small.sqsh", "large.sqsh"].map(|name| dir.path().join(name));
    std::fs::rename(squashfs(&tree), &small).unwrap();
    let file = format!("of={}", tree.join("large").display());
    succeed(Command::new("dd").args(["if=/dev/urandom", "bs=1M", "status=none", &format!("count={MEBIBYTES}"), &file]));
    std::fs::rename(squashfs(&tree), &large).unwrap();
    succeed(Command::new("sync").arg("-f").arg(&large));
    let bench = Bench { lab, dir: dir.path().to_owned(), small, large };
    bench.opening(runs, report);
    bench.sessions(runs * 3, report);
    bench.whole_jobs(runs.div_ceil(3), report);
    bench.loss(runs.div_ceil(3), report);
    report.note(
        "Node and pod are network namespaces on one machine, so its two processors encrypt, decrypt, read and write \
         for both sides.",
    );
}

/// Packs a tree without compression.
fn squashfs(tree: &Path) -> PathBuf {
    let packed = tree.with_extension("sqsh");
    let mut pack = Command::new("mksquashfs");
    pack.args([tree, &packed]).args(["-noI", "-noD", "-noF", "-noX", "-noappend", "-quiet", "-no-progress"]);
    succeed(&mut pack);
    packed
}

struct Bench {
    lab: Lab,
    dir: PathBuf,
    small: PathBuf,
    large: PathBuf,
}

impl Bench {
    /// The pod of a job on the node, whose entrypoint waits for `ready`.
    fn pod(&self, image: &Path) -> Environment {
        let volume = Volume::in_memory(Image::Busybox);
        std::fs::remove_dir_all(&volume.image_root).unwrap();
        std::fs::copy(image, volume.signal("image.sqsh")).unwrap();
        let key = self.lab.key.display().to_string();
        let job = format!("job-{}", volume.port);
        let variables = [
            ("REMOTE_BUILD_NODE", self.lab.nodes[0].address.as_str()),
            ("REMOTE_HEARTBEAT_TIMEOUT_COUNT", "1"),
            ("IMS_REMOTE_KEY", &key),
            ("IMS_JOB_ID", &job),
            ("IMAGE_COMPRESSION", "none"),
        ];
        let mut entrypoint = self.lab.moved(&volume.entrypoint(Mode::Jailed, &variables));
        let log = std::fs::File::create(volume.log()).unwrap();
        let entrypoint = entrypoint.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let environment = Environment { entrypoint, volume, status: None };
        until_it_waits(&environment);
        environment
    }

    fn open(&self, image: &Path) -> Environment {
        self.pod(image).ready()
    }

    /// `ssh root@ADDRESS` from the pod's network.
    fn ssh(&self, environment: &Environment, port: u16, address: &str) -> Command {
        let mut ssh = self.lab.command("ssh");
        ssh.args(environment.ssh_options()).args(["-p", &port.to_string(), &format!("root@{address}"), "true"]);
        ssh
    }

    fn opening(&self, rounds: usize, report: &mut Report) {
        let key = self.dir.join("own-key");
        std::fs::copy(&self.lab.key, &key).unwrap();
        std::fs::set_permissions(&key, PermissionsExt::from_mode(0o600)).unwrap();
        let node = &self.lab.nodes[0];
        let mut scp = self.lab.command("scp");
        scp.args(ssh_options(&key)).arg("-q").arg(&self.large).arg(format!("root@{}:/tmp/image", node.address));
        let [mut local, mut first, mut small, mut large, mut copied, mut back] = [const { Vec::new() }; 6];
        // The first round is a warm-up.
        for round in 0..=rounds {
            for step in order(round, 5) {
                let (took, samples) = match step {
                    0 => {
                        let environment = waiting(Volume::in_memory(Image::Busybox), Mode::Jailed);
                        (opened(&environment), &mut local)
                    }
                    1 => {
                        let took = time(|| drop(succeed(&mut scp)));
                        std::fs::remove_file(node.path("/tmp/image")).unwrap();
                        (took, &mut copied)
                    }
                    2 => {
                        let _ = std::fs::remove_dir_all(node.path("/var/lib/ims-sshd"));
                        (self.opened_on_node(&self.small), &mut first)
                    }
                    3 => (self.opened_on_node(&self.small), &mut small),
                    _ => {
                        let mut environment = self.pod(&self.large);
                        let took = opened(&environment);
                        let came = time(|| {
                            environment.touch("complete");
                            assert_eq!(environment.end(), 0, "{}", environment.log_text());
                        });
                        assert!(environment.signal("transfer.sqsh").exists());
                        if round > 0 {
                            back.push(came);
                        }
                        (took, &mut large)
                    }
                };
                if round > 0 {
                    samples.push(took);
                }
            }
        }
        let ms = Unit::Milliseconds;
        report.add("`ready` to `sshd_listening`, local", ms, local.clone(), Bound::Information);
        report.add("the same on a node, an image of 1 MB", ms, small, Bound::Information);
        report.add("the same, and the programs are sent", ms, first, Bound::Information);
        report.add("the same, an image of 200 MB", ms, large.clone(), Bound::Information);
        report.add("scp of that image to the node", ms, copied.clone(), Bound::Information);
        let rest: Vec<_> = large.iter().zip(&copied).map(|(open, copy)| open - copy / 0.9).collect();
        let name = "an image of 200 MB: on the node − local − scp at 0.9 of its rate";
        report.add(name, ms, differences(&rest, &local), Bound::Limit(500.0));
        report.add("`complete` until its packed image has come back", ms, back, Bound::Information);
    }

    fn opened_on_node(&self, image: &Path) -> f64 {
        let mut environment = self.pod(image);
        let took = opened(&environment);
        environment.touch("failed");
        assert_eq!(environment.end(), 0, "{}", environment.log_text());
        took
    }

    /// `ssh true` through the pod's port; to the same sshd on the node itself; and to the node's own sshd.
    fn sessions(&self, rounds: usize, report: &mut Report) {
        let mut environment = self.open(&self.small);
        let node = &self.lab.nodes[0];
        let log = environment.log_text();
        let port = forwarded_port(node.pid).unwrap_or_else(|| panic!("no port on the node: {log}"));
        let mut through = self.ssh(&environment, environment.port, "127.0.0.1");
        let there = self.ssh(&environment, port, "127.0.0.1");
        let mut direct = Command::new("nsenter");
        direct.arg(format!("--net=/proc/{}/ns/net", node.pid)).args(there.get_args().skip(1));
        let mut own = self.lab.command("ssh");
        own.args(ssh_options(&self.dir.join("own-key"))).args(["-o", "KexAlgorithms=curve25519-sha256"]);
        own.arg(format!("root@{}", node.address)).arg("true");
        for command in [&mut through, &mut direct, &mut own] {
            command.stdin(Stdio::null()).stdout(Stdio::null());
        }
        let [through, direct, own] = in_turns(rounds, [&mut through, &mut direct, &mut own]);
        let ms = Unit::Milliseconds;
        report.add("`ssh true` through the pod's port", ms, through.clone(), Bound::Information);
        report.add("`ssh true` to the same sshd, on the node itself", ms, direct.clone(), Bound::Information);
        report.add("`ssh true` to the node's own sshd, without a jail", ms, own.clone(), Bound::Information);
        let name = "through the pod's port − on the node itself";
        report.add(name, ms, differences(&through, &direct), Bound::Limit(5.0));
        let name = "through the pod's port − to the node's own sshd";
        report.add(name, ms, differences(&through, &own), Bound::Information);
        environment.touch("failed");
        assert_eq!(environment.end(), 0, "{}", environment.log_text());
    }

    /// From a source to a published image, with nothing changed, by one command.
    fn whole_jobs(&self, rounds: usize, report: &mut Report) {
        // A person's configuration of ssh.
        let ssh = self.dir.join("bin/ssh");
        std::fs::create_dir(ssh.parent().unwrap()).unwrap();
        let options = ssh_options(&self.dir.join("own-key")).join(" ");
        std::fs::write(&ssh, format!("#!/bin/sh\nexec /usr/bin/ssh {options} \"$@\"\n")).unwrap();
        std::fs::set_permissions(&ssh, PermissionsExt::from_mode(0o755)).unwrap();
        let command = |node: &[&str]| {
            let mut command = peers::quiet(&IMS_SSHD);
            command.arg("customize").args(node).arg("--work").arg(self.dir.join("work")).arg("--output");
            command.arg(self.dir.join("store")).arg(&self.large).args(["--", "true"]);
            let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", ssh.parent().unwrap().display());
            command.env("PATH", path);
            let mut command = self.lab.moved(&command);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            command
        };
        let node = format!("root@{}", self.lab.nodes[0].address);
        let (mut local, mut remote) = (command(&[]), command(&["--node", &node]));
        let [local, remote] = in_turns(rounds, [&mut local, &mut remote]);
        let ms = Unit::Milliseconds;
        report.add("`customize` of an image of 200 MB to the end, local", ms, local.clone(), Bound::Information);
        report.add("the same with `--node`", ms, remote.clone(), Bound::Information);
        report.add("with `--node` − local", ms, differences(&remote, &local), Bound::Information);
    }

    /// Time from the last packet until a side has ended, less the limit of silence.
    fn loss(&self, rounds: usize, report: &mut Report) {
        let node = &self.lab.nodes[0];
        let [mut pod, mut there] = [const { Vec::new() }; 2];
        for _ in 0..rounds {
            let mut environment = self.open(&self.small);
            self.lab.cut(node);
            let began = std::time::Instant::now();
            let late = || began.elapsed().as_secs_f64() - SILENCE;
            let [mut noticed, mut gone] = [None; 2];
            wait_until("both sides to end", || {
                if noticed.is_none() && environment.entrypoint.try_wait().unwrap().is_some() {
                    noticed = Some(late());
                }
                if gone.is_none() && node.jobs().is_empty() {
                    gone = Some(late());
                }
                noticed.is_some() && gone.is_some()
            });
            assert_eq!(environment.end(), 1, "{}", environment.log_text());
            pod.push(noticed.unwrap());
            there.push(gone.unwrap());
            self.lab.mend(node);
            wait_until("the network", || self.lab.ssh(node, "true").status.success());
        }
        let name = "the network fails: limit of silence until the pod has ended";
        report.add(name, Unit::Seconds, pod, Bound::Limit(SOON));
        let name = "the same until nothing is left on the node";
        report.add(name, Unit::Seconds, there, Bound::Limit(SOON));
    }
}

/// Time from `ready` until people can log in.
fn opened(environment: &Environment) -> f64 {
    let signals = Creations::in_directory(&environment.parent);
    time(|| {
        environment.touch("ready");
        signals.wait_for("sshd_listening");
    })
}

/// Port on the loopback address on which the environment's sshd listens in the network of this process.
fn forwarded_port(pid: i32) -> Option<u16> {
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap();
    let words = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let mut listening = words.filter(|words| words[3] == "0A").filter_map(|words| words[1].strip_prefix("0100007F:"));
    listening.find_map(|port| u16::from_str_radix(port, 16).ok())
}
