//! An environment's life: from `ready` to `sshd_listening`, and from a verdict file or signal to its end.

use std::path::Path;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use testbed::{Environment, Image, Mode, Volume, wait_until};

use crate::environments::{Creations, close, waiting};
use crate::measure::time;
use crate::{Bound, Report, Unit};

/// Number of processes that write into the image root while the environment is closed.
const WRITERS: usize = 200;

const ORIGINAL: &str = "The bash entrypoint that this replaces polls for `ready`, `complete` and `failed` every 5 s \
    (`sleep 5` in `wait_for_ready` and `wait_for_local_complete`, Cray-HPE/ims-sshd, `entrypoint.sh`), so it reacts after 0 \
    to 5000 ms, 2500 ms on average. It ends none of the writers, and ignores SIGTERM.";

#[derive(Default)]
struct Samples {
    opened: Vec<f64>,
    completed: Vec<f64>,
    terminated: Vec<f64>,
}

pub fn life(runs: usize, report: &mut Report) {
    let [mut jailed, mut plain] = [Samples::default(), Samples::default()];
    let (mut bare, mut with_writers) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        for (mode, samples) in [(Mode::Jailed, &mut jailed), (Mode::Plain, &mut plain)] {
            let volume = Volume::new(Image::Debian);
            let sshd = bare_sshd(&volume);
            bare.push(sshd);
            let environment = waiting(volume, mode);
            samples.opened.push(until(&environment, "sshd_listening", || environment.touch("ready")) - sshd);
            samples.completed.push(until(&environment, "exiting", || environment.touch("complete")));
            close(environment);
            samples.terminated.push(terminate(Environment::open(Image::Debian, mode)));
        }
        let environment = Environment::open(Image::Debian, Mode::Jailed);
        write(&environment);
        with_writers.push(until(&environment, "exiting", || environment.touch("complete")));
        close(environment);
    }
    let ms = Unit::Milliseconds;
    report.add("bare sshd, from its start until it listens", ms, bare, Bound::Information);
    report.add("`ready` to `sshd_listening` minus bare sshd's start, jailed", ms, jailed.opened, Bound::Limit(25.0));
    report.add("the same, plain", ms, plain.opened, Bound::Limit(25.0));
    report.add("`complete` to `exiting`, idle, jailed", ms, jailed.completed, Bound::Limit(15.0));
    report.add("the same, plain", ms, plain.completed, Bound::Limit(15.0));
    let name = format!("`complete` to `exiting`, {WRITERS} processes writing, jailed");
    report.add(&name, ms, with_writers, Bound::Information);
    report.add("SIGTERM to the end of the entrypoint, jailed", ms, jailed.terminated, Bound::Information);
    report.add("the same, plain", ms, plain.terminated, Bound::Information);
    report.note(ORIGINAL);
}

/// Time from `action` until the signal file appears.
fn until(environment: &Environment, name: &str, action: impl FnOnce()) -> f64 {
    let signals = Creations::in_directory(&environment.parent);
    time(|| {
        action();
        signals.wait_for(name);
    })
}

fn terminate(mut environment: Environment) -> f64 {
    let pid = environment.pid();
    let mut status = None;
    let took = time(|| {
        kill(pid, Signal::SIGTERM).unwrap();
        status = Some(environment.entrypoint.wait().unwrap());
    });
    environment.status = status;
    assert_eq!(environment.end(), 143, "{}", environment.log_text());
    drop(environment);
    took
}

/// Starts processes that outlive their session and write as fast as they can.
fn write(environment: &Environment) {
    let line = format!(
        "for n in $(seq {WRITERS}); do (while echo $n > /srv/$n; do :; done) < /dev/null > /dev/null 2>&1 & done"
    );
    environment.says(&line);
    let last = environment.image_root.join(format!("srv/{WRITERS}"));
    wait_until("the last writer to write", || last.exists());
}

/// Time that sshd alone takes to listen; it writes its PID file then.
fn bare_sshd(volume: &Volume) -> f64 {
    std::fs::create_dir_all("/run/sshd").unwrap();
    let directory = volume.dir.path().join("bare");
    std::fs::create_dir(&directory).unwrap();
    let created = Creations::in_directory(&directory);
    let pid_file = directory.join("pid");
    let mut sshd = Command::new(ims_sshd::sshd::program().unwrap());
    sshd.arg("-f").arg(&volume.config).arg("-E").arg(volume.dir.path().join("bare.log"));
    sshd.arg("-o").arg(format!("PidFile={}", pid_file.display()));
    let took = time(|| {
        assert!(sshd.status().unwrap().success());
        created.wait_for("pid");
    });
    // sshd has daemonized, so this process, PID 1, is its parent now.
    let pid = number_in(&pid_file);
    kill(pid, Signal::SIGTERM).unwrap();
    waitpid(pid, None).unwrap();
    took
}

fn number_in(file: &Path) -> Pid {
    let number = || std::fs::read_to_string(file).ok()?.strip_suffix('\n')?.parse().ok();
    let mut pid = None;
    wait_until("sshd's number", || {
        pid = number().map(Pid::from_raw);
        pid.is_some()
    });
    pid.unwrap()
}
