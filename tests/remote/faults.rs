//! Jobs that end badly: each within its limit, with the right verdict and word, and without a trace on the node.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use testbed::job::report;
use testbed::node::{Lab, NodeOptions, signal};
use testbed::*;

use crate::hostile::in_place_of_ssh;
use crate::remote::Remote;

/// Silence after which each side gives up here (`REMOTE_HEARTBEAT_TIMEOUT_COUNT=1`), and what may be added to it.
const SILENCE: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_secs(2);

/// Marks an image whose packing takes a while.
const COMPLETE: &str = "head -c 100000000 /dev/urandom > /more; touch /tmp/complete";

#[test]
fn both_sides_end_alone_when_the_network_between_them_fails() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let before = node.state();
    for moment in ["connecting", "providing", "sending", "open", "packing", "receiving"] {
        let mut remote = if ["sending", "packing", "receiving"].contains(&moment) {
            Remote::large(&lab, node)
        } else {
            Remote::new(&lab, node, Mode::Jailed)
        };
        let place = node.path(&format!("/tmp/{}", remote.directory()));
        let size = |path: &Path| std::fs::metadata(path).map_or(0, |found| found.len());
        match moment {
            "connecting" => {
                lab.cut(node);
                remote.start(&[]);
                remote.job.volume.touch("ready");
            }
            "providing" => {
                let place = node.path("/var/lib/ims-sshd");
                let is_begun = |entry: std::fs::DirEntry| entry.file_name().to_string_lossy().starts_with(".new.");
                remote.start(&[]);
                remote.job.volume.touch("ready");
                wait_until("the program on the node", || {
                    std::fs::read_dir(&place).is_ok_and(|mut entries| entries.any(|entry| entry.is_ok_and(is_begun)))
                });
                lab.cut(node);
            }
            "sending" => {
                remote.start(&[]);
                remote.job.volume.touch("ready");
                wait_until("the image on the node", || size(&place.join("image/image.sqsh")) > 10 << 20);
                lab.cut(node);
            }
            "open" => {
                remote.open();
                lab.cut(node);
            }
            "packing" => {
                remote.open();
                remote.run(COMPLETE);
                remote.wait_for_log("being packed there");
                lab.cut(node);
            }
            _ => {
                remote.open();
                remote.run("touch /tmp/complete");
                let arriving = remote.job.volume.signal(".ims-sshd.remote.image");
                wait_until(&format!("the packed image:\n{}", remote.log()), || size(&arriving) > 10 << 20);
                lab.cut(node);
            }
        }
        let began = Instant::now();
        let (words, limit) = match moment {
            "connecting" => ("cannot connect to the build node", 2 * SILENCE),
            // ssh's own signs of life begin when it has been silent for as long.
            "providing" => ("the build node", 2 * SILENCE),
            _ => ("cannot go on with the job", SILENCE),
        };
        remote.fails(1, words);
        assert!(began.elapsed() < limit + SOON, "{moment}: {:?}\n{}", began.elapsed(), remote.log());
        wait_within(SILENCE + SOON, "the node's part to end", || node.jobs().is_empty());
        assert!(began.elapsed() < limit + 2 * SOON, "{moment}: {:?}", began.elapsed());
        lab.mend(node);
        node.is_as_before(&before);
    }
}

#[test]
fn signal_ends_the_job_on_both_sides_at_any_moment() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let before = node.state();
    for (kind, code) in [(Signal::SIGTERM, 143), (Signal::SIGKILL, 137)] {
        for moment in ["waiting", "connecting", "sending", "opening", "open", "packing", "receiving"] {
            let mut remote =
                if moment == "open" { Remote::new(&lab, node, Mode::Jailed) } else { Remote::large(&lab, node) };
            remote.start(&[]);
            remote.wait_for_log("waiting for 'ready'");
            let node_variable = [("REMOTE_BUILD_NODE", node.address.as_str())];
            let mut sidecar = remote.job.sidecar(remote.mode, &node_variable);
            // It creates 'ready' itself.
            let sidecar = (kind == Signal::SIGTERM && moment == "receiving").then(|| sidecar.spawn().unwrap());
            if moment != "waiting" && sidecar.is_none() {
                remote.job.volume.touch("ready");
            }
            match moment {
                "connecting" => remote.wait_for_log("has the host key"),
                "sending" => remote.wait_for_log("is able"),
                "opening" => remote.wait_for_log("the image is on the node"),
                "open" => remote.wait_for("sshd_listening"),
                "packing" | "receiving" => {
                    remote.wait_for("sshd_listening");
                    remote.run(COMPLETE);
                    if moment == "packing" {
                        remote.wait_for_log("being packed there");
                    } else {
                        remote.wait_for(".ims-sshd.remote.image");
                    }
                }
                _ => {}
            }
            signal(remote.entrypoint.as_ref().unwrap(), kind);
            if kind == Signal::SIGTERM {
                remote.fails(code, "received SIGTERM");
                if let Some(sidecar) = sidecar {
                    // The sidecar does not say that somebody has marked the image.
                    let error = report(&sidecar.wait_with_output().unwrap())["error"].to_string();
                    assert!(error.contains("received SIGTERM") && !error.contains("marked"), "{error}");
                }
            } else {
                assert_eq!(remote.end(), code);
                assert!(!remote.job.volume.signal("complete").exists());
            }
            node.is_as_before(&before);
        }
    }
}

#[test]
fn node_program_that_is_ended_fails_the_job_and_the_next_one_removes_what_is_left() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let before = node.state();
    let (outer, inner) = ("ims-sshd node", "ims-sshd node --inside task");
    for (kind, line, moment) in [
        ("KILL", outer, "sending"),
        ("TERM", outer, "sending"),
        ("KILL", outer, "opening"),
        ("TERM", outer, "opening"),
        ("KILL", outer, "open"),
        ("TERM", outer, "open"),
        ("KILL", inner, "open"),
        ("KILL", outer, "packing"),
        ("TERM", outer, "packing"),
        ("KILL", inner, "packing"),
        ("KILL", outer, "receiving"),
        ("TERM", outer, "receiving"),
    ] {
        let mut remote =
            if moment == "open" { Remote::new(&lab, node, Mode::Jailed) } else { Remote::large(&lab, node) };
        remote.start(&[]);
        remote.job.volume.touch("ready");
        match moment {
            "sending" => remote.wait_for_log("is able"),
            "opening" => remote.wait_for_log("the image is on the node"),
            _ => remote.wait_for("sshd_listening"),
        }
        if ["packing", "receiving"].contains(&moment) {
            remote.run(COMPLETE);
        }
        match moment {
            "packing" => remote.wait_for_log("being packed there"),
            "receiving" => remote.wait_for(".ims-sshd.remote.image"),
            _ => {}
        }
        let (number, _) = node.processes().into_iter().find(|(_, found)| found.ends_with(line)).unwrap();
        let began = Instant::now();
        node.send(number, kind);
        remote.fails(1, "cannot go on with the job");
        // A loaded disk takes its time to remove what has come.
        assert!(began.elapsed() < SILENCE, "{kind} {line} {moment}: {:?}", began.elapsed());
        let is_left = line == outer && kind == "KILL";
        wait_until("the node to clean up", || node.jobs().len() == usize::from(is_left));
        let mut next = Remote::new(&lab, node, Mode::Jailed);
        next.open();
        assert_eq!(node.jobs(), [next.directory()]);
        next.run("touch /tmp/failed");
        assert_eq!(next.end(), 0);
        node.is_as_before(&before);
    }
}

#[test]
fn node_that_goes_down_is_noticed_within_the_limit_and_usable_again() {
    let mut lab = Lab::new();
    {
        let mut remote = Remote::new(&lab, &lab.nodes[0], Mode::Jailed);
        remote.open();
        let began = Instant::now();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(lab.nodes[0].pid), Signal::SIGKILL).unwrap();
        remote.fails(1, "cannot go on with the job");
        assert!(began.elapsed() < SILENCE + SOON, "{:?}", began.elapsed());
    }
    lab.reboot(0);
    let mut remote = Remote::new(&lab, &lab.nodes[0], Mode::Jailed);
    remote.open();
    remote.run("touch /tmp/complete");
    assert_eq!(remote.end(), 0, "{}", remote.log());
}

/// In place of ssh: alters or cuts off, at byte $AT, what the program on the node says or hears.
const ON_THE_WAY: &str = r"#!/usr/bin/python3
import os, subprocess, sys, threading
if not sys.argv[-1].endswith(' node'):
    os.execv('/usr/bin/ssh', ['ssh'] + sys.argv[1:])
ssh = subprocess.Popen(['/usr/bin/ssh'] + sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
def copy(source, to, is_bad):
    at, bad = 0, int(os.environ['AT'])
    while True:
        data = bytearray(os.read(source, 65536))
        if is_bad and at <= bad < at + len(data):
            if os.environ['HOW'] == 'cut':
                ssh.kill()
                os._exit(1)
            data[bad - at] ^= 1
        at += len(data)
        if not data:
            break
        view = memoryview(data)
        while view:
            view = view[os.write(to, view):]
    os.close(to)
back = os.environ['WAY'] == 'back'
threading.Thread(target=copy, args=(0, ssh.stdin.fileno(), not back), daemon=True).start()
copy(ssh.stdout.fileno(), 1, back)
sys.exit(ssh.wait())
";

#[test]
fn image_that_is_altered_or_cut_off_on_the_way_is_neither_opened_nor_published() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let before = node.state();
    let (_, path) = in_place_of_ssh(&lab, ON_THE_WAY);
    // The image has about one MB.
    let cut_back = (0..14).map(|part| ("back", "cut", 2_000 + part * 69_000));
    let cut_there = (0..6).map(|part| ("there", "cut", 2_000 + part * 160_000));
    let cut_at = cut_back.chain(cut_there);
    let altered = [("there", "alter", 500_000), ("back", "alter", 500_000), ("back", "alter", 900_000)];
    for (way, how, at) in cut_at.chain(altered) {
        let mut remote = Remote::new(&lab, node, Mode::Jailed);
        remote.start(&[("PATH", &path), ("WAY", way), ("HOW", how), ("AT", &at.to_string())]);
        remote.job.volume.touch("ready");
        if way == "back" {
            remote.wait_for("sshd_listening");
            remote.run("touch /tmp/complete");
        }
        let log = if how == "cut" { "cannot go on with the job" } else { "it was altered on the way" };
        remote.fails(1, log);
        node.is_as_before(&before);
    }
}

/// In place of ssh: nothing passes in either direction from the moment on that the node is told to end.
const SILENT_END: &str = r#"#!/usr/bin/python3
import os, subprocess, sys, threading
if not sys.argv[-1].endswith(' node'):
    os.execv('/usr/bin/ssh', ['ssh'] + sys.argv[1:])
ssh = subprocess.Popen(['/usr/bin/ssh'] + sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
is_cut = threading.Event()
def copy(source, to):
    while data := os.read(source, 65536):
        if b'"is":"end"' in data:
            is_cut.set()
        if is_cut.is_set():
            threading.Event().wait()
        view = memoryview(data)
        while view:
            view = view[os.write(to, view):]
    os.close(to)
threading.Thread(target=copy, args=(0, ssh.stdin.fileno()), daemon=True).start()
copy(ssh.stdout.fileno(), 1)
sys.exit(ssh.wait())
"#;

#[test]
fn node_that_is_lost_after_the_results_have_come_changes_nothing_about_them() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let before = node.state();
    let (_, path) = in_place_of_ssh(&lab, SILENT_END);
    let mut remote = Remote::new(&lab, node, Mode::Jailed);
    remote.start(&[("PATH", &path)]);
    remote.job.volume.touch("ready");
    remote.wait_for("sshd_listening");
    remote.run("touch /tmp/complete");
    remote.wait_for("transfer.sqsh");
    wait_until("the node's part to end", || node.jobs().is_empty());
    assert_eq!(remote.end(), 0, "{}", remote.log());
    assert!(remote.log().contains("has not said that it removed everything"), "{}", remote.log());
    assert!(remote.job.volume.signal("complete").exists() && !remote.job.volume.signal("pod_error").exists());
    node.is_as_before(&before);
}

#[test]
fn node_that_is_not_able_is_refused_before_the_image_is_sent() {
    let small = NodeOptions { tmp: "size=1M", ..NodeOptions::default() };
    let closed = NodeOptions { sshd: "AllowTcpForwarding no", ..NodeOptions::default() };
    let lab = Lab::with(&[NodeOptions::default(), small, closed]);
    let other_key = lab.dir.path().join("other/id");
    let strict = lab.dir.path().join("strict/id");
    for directory in [&other_key, &strict] {
        std::fs::create_dir(directory.parent().unwrap()).unwrap();
    }
    succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&other_key));
    std::fs::copy(&lab.key, &strict).unwrap();
    let public = std::fs::read_to_string(lab.key.with_extension("pub")).unwrap();
    std::fs::write(strict.with_file_name("known_hosts"), format!("{} {public}", lab.nodes[0].address)).unwrap();
    let before: Vec<_> = lab.nodes.iter().map(node::Node::state).collect();
    for (number, key, words) in [
        (0, &other_key, "Permission denied"),
        (0, &strict, "its host key has changed: the key that it shows now is SHA256:"),
        (1, &lab.key, "/tmp has "),
        (2, &lab.key, "AllowTcpForwarding"),
    ] {
        let mut remote = Remote::new(&lab, &lab.nodes[number], Mode::Jailed);
        remote.start(&[("IMS_REMOTE_KEY", &key.display().to_string())]);
        remote.job.volume.touch("ready");
        remote.fails(1, words);
        lab.nodes[number].is_as_before(&before[number]);
    }
    for program in ["/usr/lib/openssh/sftp-server", "/usr/bin/ssh-keygen"] {
        let program = lab.nodes[0].path(program);
        std::fs::rename(&program, program.with_extension("own")).unwrap();
        let mut remote = Remote::new(&lab, &lab.nodes[0], Mode::Jailed);
        remote.start(&[]);
        remote.job.volume.touch("ready");
        let name = program.file_name().unwrap().to_str().unwrap();
        remote.fails(1, name);
        assert!(remote.log().contains("cannot use the build node"), "{}", remote.log());
        std::fs::rename(program.with_extension("own"), &program).unwrap();
    }
    // sshd's commands are run by a shell that reads this file first.
    let bashrc = lab.nodes[0].path("/root/.bashrc");
    let own = std::fs::read(&bashrc).ok();
    for (line, words) in [
        (
            "echo Welcome to builder",
            "the user's shell there prints text of its own before a command: 'Welcome to builder'",
        ),
        ("exit 0", "the user's shell there runs no command"),
    ] {
        std::fs::write(&bashrc, line).unwrap();
        let mut remote = Remote::new(&lab, &lab.nodes[0], Mode::Jailed);
        remote.start(&[]);
        remote.job.volume.touch("ready");
        remote.fails(1, words);
    }
    match own {
        Some(text) => std::fs::write(&bashrc, text).unwrap(),
        None => std::fs::remove_file(&bashrc).unwrap(),
    }
    let uname = lab.nodes[0].path("/usr/bin/uname");
    std::fs::rename(&uname, uname.with_extension("own")).unwrap();
    std::fs::write(&uname, "#!/bin/sh\necho aarch64\n").unwrap();
    std::fs::set_permissions(&uname, PermissionsExt::from_mode(0o755)).unwrap();
    let mut remote = Remote::new(&lab, &lab.nodes[0], Mode::Jailed);
    remote.start(&[]);
    remote.job.volume.touch("ready");
    remote.fails(1, "it is aarch64, and this program is for x86_64");
}

#[test]
fn directory_of_somebody_else_is_refused_and_left_as_it_is() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    for kind in ["directory", "link"] {
        let mut remote = Remote::new(&lab, node, Mode::Jailed);
        let place = node.path(&format!("/tmp/{}", remote.directory()));
        match kind {
            "link" => symlink("/root", &place).unwrap(),
            _ => {
                std::fs::create_dir(&place).unwrap();
                std::fs::write(place.join("file"), "").unwrap();
                std::os::unix::fs::chown(&place, Some(1000), Some(1000)).unwrap();
            }
        }
        let before = node.state();
        remote.start(&[]);
        remote.job.volume.touch("ready");
        remote.fails(1, "no job of this program made it");
        node.is_as_before(&before);
    }
}

#[test]
fn tmp_that_is_mounted_noexec_nosuid_and_nodev_serves() {
    let lab = Lab::with(&[NodeOptions { tmp: "noexec,nosuid,nodev", ..NodeOptions::default() }]);
    let node = &lab.nodes[0];
    let before = node.state();
    for mode in [Mode::Jailed, Mode::Plain] {
        let mut remote = Remote::new(&lab, node, mode);
        remote.open();
        let (root, mark) = if mode == Mode::Jailed { ("", "/tmp") } else { ("/mnt/image/image-root", "/mnt/image") };
        remote.says(&format!("echo changed > {root}/etc/changed; touch {mark}/complete"));
        assert_eq!(remote.end(), 0, "{}", remote.log());
        node.is_as_before(&before);
    }
}

#[test]
fn eight_jobs_at_once_neither_meet_nor_leave_anything() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let before = node.state();
    let mut jobs: Vec<_> = (0..8)
        .map(|number| Remote::new(&lab, node, if number % 2 == 0 { Mode::Jailed } else { Mode::Plain }))
        .collect();
    for job in &mut jobs {
        job.start(&[]);
        job.job.volume.touch("ready");
    }
    for job in &jobs {
        job.wait_for("sshd_listening");
    }
    assert_eq!(node.jobs().len(), 8);
    let ids: std::collections::BTreeSet<_> = jobs.iter().map(|job| job.says("echo $IMS_JOB_ID")).collect();
    assert_eq!(ids.len(), 8);
    for (number, job) in jobs.iter().enumerate() {
        let root = if job.mode == Mode::Jailed { "" } else { "/mnt/image/image-root" };
        job.says(&format!("echo {number} > {root}/etc/number"));
        job.job.volume.touch(if number < 6 { "complete" } else { "failed" });
    }
    for (number, job) in jobs.iter_mut().enumerate() {
        assert_eq!(job.end(), 0, "{}", job.log());
        let packed = job.job.volume.signal("transfer.sqsh");
        assert_eq!(packed.exists(), number < 6);
        if number < 6 {
            let said = succeed(Command::new("unsquashfs").arg("-cat").arg(packed).arg("etc/number"));
            assert_eq!(said, format!("{number}\n"));
        }
    }
    node.is_as_before(&before);
}

#[test]
fn full_disk_of_either_side_fails_the_job() {
    let lab = Lab::with(&[NodeOptions { tmp: "size=64M", ..NodeOptions::default() }]);
    let node = &lab.nodes[0];
    let before = node.state();
    let mut remote = Remote::new(&lab, node, Mode::Jailed);
    remote.open();
    assert!(!remote.run("cat /dev/urandom > /large").status.success());
    remote.run("touch /tmp/complete");
    remote.fails(1, "no space left");
    node.is_as_before(&before);
    let mut remote = Remote::new(&lab, node, Mode::Jailed);
    let image = std::fs::read(remote.job.volume.signal("image.sqsh")).unwrap();
    mount(&["-t", "tmpfs", "-o", "mode=0755,size=2M", "tmpfs"], &remote.job.volume.parent);
    std::fs::write(remote.job.volume.signal("image.sqsh"), image).unwrap();
    remote.open();
    remote.run("head -c 1500000 /dev/urandom > /large; touch /tmp/complete");
    remote.fails(1, "are free");
    node.is_as_before(&before);
}

/// In place of ssh: opens the port to the environment once a file `go` is there.
const LATE_FORWARD: &str = r#"#!/bin/sh
case "$*" in *' -O forward '*) touch "$0.asked"; until [ -e "$0.go" ]; do sleep 0.1; done ;; esac
exec /usr/bin/ssh "$@"
"#;

#[test]
fn job_survives_a_port_that_opens_later_than_the_limit_of_silence() {
    let lab = Lab::new();
    let node = &lab.nodes[0];
    let before = node.state();
    let (ssh, path) = in_place_of_ssh(&lab, LATE_FORWARD);
    let mut remote = Remote::new(&lab, node, Mode::Jailed);
    remote.start(&[("PATH", &path)]);
    remote.job.volume.touch("ready");
    wait_until("the port to be asked for", || ssh.with_extension("asked").exists());
    let asked = Instant::now();
    while asked.elapsed() < SILENCE + SOON {
        assert_eq!(node.jobs().len(), 1, "{}", remote.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    std::fs::write(ssh.with_extension("go"), "").unwrap();
    remote.wait_for("sshd_listening");
    remote.run("touch /tmp/failed");
    assert_eq!(remote.end(), 0, "{}", remote.log());
    node.is_as_before(&before);
}
