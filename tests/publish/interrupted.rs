//! A signal at any moment of a command ends it with 128 + n, in words, unless it was about to finish.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::job::*;
use testbed::*;

/// Returns whether the process blocks SIGTERM, and so reads it by itself from then on. The default action before ends
/// it with the same code in a shell.
fn blocks_signals(child: &Child) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).map_or("0", str::trim);
    u64::from_str_radix(mask, 16).unwrap() & (1 << (Signal::SIGTERM as u32 - 1)) != 0
}

/// Runs `command` in a directory of its own for each of `moments`, spread over the time that one run takes, and sends a
/// signal then. `check` looks at the directory after a run that did not finish.
fn interrupted(name: &str, moments: u32, command: impl Fn(&Path) -> Command, check: impl Fn(&Path)) {
    let run = |moment: Option<(Signal, Duration)>| {
        let dir = directory();
        let mut command = command(dir.path());
        command
            .current_dir(dir.path())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(dir.path().join("log")).unwrap());
        let mut child = Ended::new(command.spawn().unwrap());
        wait_until("signals to be blocked", || blocks_signals(&child));
        let began = Instant::now();
        if let Some((signal, delay)) = moment {
            std::thread::sleep(delay);
            kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        }
        let status = child.wait().unwrap();
        let took = began.elapsed();
        let said = std::fs::read_to_string(dir.path().join("log")).unwrap();
        let Some((signal, delay)) = moment.filter(|_| !status.success()) else {
            assert!(status.success(), "{name}: {said}");
            return (took, false);
        };
        assert_eq!(status.code(), Some(128 + signal as i32), "{name}, {signal} after {delay:?}: {said}");
        // A command in the image gets some time to end.
        let words = [format!("interrupted by {signal}"), format!("received {signal}: ")];
        assert!(words.iter().any(|words| said.contains(words)), "{name}, {signal} after {delay:?}: {said}");
        check(dir.path());
        (took, true)
    };
    let (whole, _) = run(None);
    let signals = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().cycle();
    let ended = signals.zip(0..moments).filter(|(signal, moment)| run(Some((*signal, whole * *moment / moments))).1);
    let ended = ended.count();
    assert!(ended * 6 > moments as usize, "{name}: only {ended} of {moments} runs were interrupted");
}

/// Asserts that nothing in `dir` is named like this.
fn has_no(dir: &Path, name: &str) {
    let left = walk(dir).into_iter().find(|path| path.to_string_lossy().contains(name));
    assert_eq!(left, None);
}

#[test]
fn signal_at_any_moment_of_packing_sets_the_exit_code() {
    let (_dir, tree) = bootable_image();
    for packer in ["ims-sshd", "mksquashfs"] {
        let package = |_: &Path| {
            let mut command = ims_sshd(&["package", "--archive", "image.sqsh"], &[("IMAGE_PACKER", packer.to_owned())]);
            command.arg(&tree);
            command
        };
        interrupted(packer, 12, package, |dir| has_no(dir, "image.sqsh"));
    }
}

#[test]
fn signal_at_any_moment_of_preparing_and_uploading_sets_the_exit_code() {
    let (_dir, tree, squashfs) = packed_image();
    let prepare = |_: &Path| {
        let mut command = ims_sshd(&["prepare", "parent"], &[]);
        command.arg(&squashfs);
        command
    };
    interrupted("prepare", 16, prepare, |dir| has_no(dir, "image-root"));
    let upload = |_: &Path| {
        let mut command = ims_sshd(&["upload", "--name", "compute", "--store", "store", "--archive"], &[]);
        command.args([&squashfs, &tree]);
        command
    };
    interrupted("upload", 8, upload, |dir| has_no(dir, "manifest.json"));
}

#[test]
fn signal_at_any_moment_of_a_sidecar_sets_the_exit_code() {
    let (_dir, tree) = bootable_image();
    let sidecar = |dir: &Path| {
        let root = dir.join("parent/build/image-root");
        std::fs::create_dir_all(root.parent().unwrap()).unwrap();
        succeed(Command::new("cp").arg("-aT").arg(&tree).arg(&root));
        let variables = [
            ("IMS_ACTION", "create".to_owned()),
            ("IMAGE_ROOT_PARENT", dir.join("parent").display().to_string()),
            ("IMAGE_STORE", dir.join("store").display().to_string()),
        ];
        ims_sshd(&["sidecar"], &variables)
    };
    interrupted("sidecar", 12, sidecar, |dir| has_no(dir, "manifest.json"));
}

#[test]
fn signal_at_any_moment_of_an_unattended_run_sets_the_exit_code() {
    let (_dir, tree, squashfs) = packed_image();
    let customize = |dir: &Path| {
        let mut command = ims_sshd(&["customize", "--output", "out", "--work", "work"], &[]);
        std::fs::create_dir(dir.join("work")).unwrap();
        command.arg(&squashfs).args(["--kernel", "vmlinuz", "--initrd", "initrd", "--", "touch", "/etc/new"]);
        command
    };
    interrupted("customize", 8, customize, |dir| has_no(dir, "manifest.json"));
    for in_place in [&[][..], &["--in-place"]] {
        let customize = |dir: &Path| {
            let own = dir.join("tree");
            succeed(Command::new("cp").arg("-aT").arg(&tree).arg(&own));
            let mut command = ims_sshd(&["customize", "--work", "work"], &[]);
            std::fs::create_dir(dir.join("work")).unwrap();
            command.args(in_place).arg(own).args(["--", "touch", "/etc/new"]);
            command
        };
        interrupted("customize DIRECTORY", 6, customize, |_| {});
    }
}
