//! The project's figures, measured on whole processes: the real programs, a real sshd, a real image root.
//!
//! What is compared is measured in turns (A B A B …) within one run, and a ratio or a difference is taken within each
//! turn, so that a busy machine disturbs both sides alike. A limit has to hold on any machine; an aim is what a quiet
//! one shows. `IMS_SSHD_BENCH_RUNS` (default 10) is how many environments are opened; processes are started twenty times
//! as often, and what takes seconds half as often.
//!
//! Exits with 1 if a limit is missed by more than half of it.

mod making;
#[allow(dead_code)]
#[path = "../tests/suite/support.rs"]
mod support;
mod throughput;

#[allow(dead_code)]
#[path = "../tests/publish/file_server.rs"]
mod file_server;
mod publishing;
#[allow(dead_code)]
#[path = "../tests/publish/s3_server.rs"]
mod s3_server;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use ims_sshd::jail::record::Record;
use ims_sshd::lifecycle::state::StateFolder;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, Timespec};

use support::{Environment, IMS_JAIL_SHELL, IMS_SSHD, Image, LIMIT, Mode, Volume, processes_with, succeed, wait_until};

fn main() -> ExitCode {
    let runs = std::env::var("IMS_SSHD_BENCH_RUNS").map_or(10, |n| n.parse().expect("IMS_SSHD_BENCH_RUNS: a number"));
    // sshd goes into the background: it is to be this program's child, so that its end can be waited for.
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    println!("{:<58}{:>8}   {:<16}  limit", "", "median", "least … most");
    let mut report = Report::default();
    life(runs, &mut report);
    making::making(runs * 10, &mut report);
    entering(runs * 20, &mut report);
    memory(&mut report);
    publishing::publishing((runs / 3).max(1), &mut report);
    let key = connection(runs * 5, &mut report);
    throughput::throughput(runs.div_ceil(2), &mut report);
    // All environments of a run share it, so none removes it.
    std::fs::remove_dir_all(key.parent().unwrap()).unwrap();
    report.exit_code()
}

/// From `ready` to `sshd_listening`, and from `complete` to `exiting`.
fn life(runs: usize, report: &mut Report) {
    title(&format!("An environment's life ({runs} environments, nobody logged in)"));
    let [mut opened_jailed, mut opened_plain, mut closed_jailed, mut closed_plain] = [const { Vec::new() }; 4];
    let mut bare = Vec::new();
    for _ in 0..runs {
        for (mode, opened, closed) in [
            (Mode::Jailed, &mut opened_jailed, &mut closed_jailed),
            (Mode::Plain, &mut opened_plain, &mut closed_plain),
        ] {
            let volume = Volume::new(Image::Debian);
            let sshd = bare_sshd(&volume);
            let environment = waiting(volume, mode);
            let signals = Creations::in_folder(&environment.parent);
            let took = time(|| {
                environment.touch("ready");
                signals.wait_for("sshd_listening");
            });
            opened.push(took - sshd);
            bare.push(sshd);
            closed.push(time(|| {
                environment.touch("complete");
                signals.wait_for("exiting");
            }));
            close(environment);
        }
    }
    report.add("bare sshd, from its start until it listens", Unit::Milliseconds, bare, Bound::Information);
    let limit = Bound::Limit { limit: 60.0, aim: None };
    report.add("'ready' to 'sshd_listening' without bare sshd's, jailed", Unit::Milliseconds, opened_jailed, limit);
    report.add("the same, plain", Unit::Milliseconds, opened_plain, limit);
    let limit = Bound::Limit { limit: 50.0, aim: Some(15.0) };
    report.add("'complete' to 'exiting', jailed", Unit::Milliseconds, closed_jailed, limit);
    report.add("the same, plain", Unit::Milliseconds, closed_plain, limit);
}

/// What it takes to run a program in a jail that stands, against others who do so.
fn entering(rounds: usize, report: &mut Report) {
    title(&format!("Running a program in an open jail ({rounds} rounds)"));
    let environment = Environment::open(Image::Debian, Mode::Jailed);
    let record = StateFolder::of(&environment.parent).unwrap().jail();
    let init = Record::read(&record).unwrap().init.pid.to_string();
    let image_root = &environment.image_root;
    // A program that was copied, as by an installation, starts a tenth sooner than the linker's own file: its pages lie together.
    let installed = environment.dir.path().join("ims-jail-shell");
    std::fs::copy(IMS_JAIL_SHELL, &installed).unwrap();
    let installed = installed.to_str().unwrap();
    let linked = environment.dir.path().join("enter.linked");
    let least = environment.dir.path().join("enter");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/enter.c");
    succeed(Command::new("cc").args(["-O2", "-static", "-o"]).arg(&linked).arg(source));
    std::fs::copy(&linked, &least).unwrap();

    let quiet = |program: &str| {
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    };
    let mut enter = quiet(installed);
    enter.arg("enter").arg(&record).args(["--", "/bin/true"]);
    let mut c = quiet(least.to_str().unwrap());
    c.args([&init, "/bin/true"]);
    let mut nsenter = quiet("nsenter");
    nsenter.args(["-t", &init, "-m", "-p", "/bin/true"]);
    let mut chroot = quiet("chroot");
    chroot.arg(image_root).arg("/bin/true");
    let mut session = quiet(installed);
    session.arg("session").arg(&record).env("SSH_ORIGINAL_COMMAND", "true");
    let mut nsenter_shell = quiet("nsenter");
    nsenter_shell.args(["-t", &init, "-m", "-p", "/bin/bash", "-c", "true"]);
    let mut whole = quiet(IMS_SSHD);
    whole.arg("enter").arg(image_root).args(["--", "/bin/true"]);
    let mut bwrap = quiet("bwrap");
    bwrap.arg("--bind").arg(image_root).args(["/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/run"]);
    bwrap.args(["--unshare-pid", "--unshare-ipc", "--unshare-uts", "/bin/true"]);

    let samples =
        in_turns(rounds, [&mut enter, &mut c, &mut nsenter, &mut chroot, &mut session, &mut nsenter_shell, &mut bwrap]);
    let [enter, c, nsenter, chroot, session, nsenter_shell, bwrap] = &samples;
    for (name, samples) in [
        ("ims-jail-shell enter -- /bin/true", enter),
        ("a C program that does no more than it must", c),
        ("nsenter -m -p /bin/true", nsenter),
        ("chroot /bin/true", chroot),
        ("bwrap /bin/true (makes a jail each time)", bwrap),
        ("ims-jail-shell session, 'true' in the image's bash", session),
        ("nsenter -m -p /bin/bash -c true", nsenter_shell),
    ] {
        report.add(name, Unit::Milliseconds, samples.clone(), Bound::Information);
    }
    let limit = Bound::Limit { limit: 0.8, aim: Some(0.5) };
    report.add("enter / nsenter", Unit::Times, ratios(enter, nsenter), limit);
    report.add("the C program / nsenter", Unit::Times, ratios(c, nsenter), Bound::Information);
    let limit = Bound::Limit { limit: 1.5, aim: Some(1.25) };
    report.add("enter / the C program", Unit::Times, ratios(enter, c), limit);
    // Most of it is the shell's own start.
    let limit = Bound::Limit { limit: 0.8, aim: None };
    report.add("session / nsenter of the same shell", Unit::Times, ratios(session, nsenter_shell), limit);
    report.add("enter / chroot", Unit::Times, ratios(enter, chroot), Bound::Information);
    let [whole] = in_turns(rounds / 10, [&mut whole]);
    report.add("ims-sshd enter: a jail made, used and ended", Unit::Milliseconds, whole, Bound::Information);
    close(environment);
}

/// What stands in memory while nothing happens.
fn memory(report: &mut Report) {
    title("Memory while nothing happens");
    let environment = Environment::open(Image::Debian, Mode::Jailed);
    let record = StateFolder::of(&environment.parent).unwrap().jail();
    let init = Record::read(&record).unwrap().init.pid.cast_unsigned();
    let mut client =
        environment.ssh(&[]).arg("echo in; exec sleep 1000").stdout(Stdio::piped()).spawn().expect("start ssh");
    // When this arrives, the program in the jail is another one than the helper that waits for it.
    client.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
    let helpers = processes_with(&format!("session {}", record.display()));
    assert_eq!(helpers.len(), 1, "{helpers:?}");
    let mib = |pid, fields: &[&str]| vec![memory_of(pid, fields)];
    let private = ["Private_Clean:", "Private_Dirty:"];
    let limit = Bound::Limit { limit: 1.0, aim: None };
    report.add("a session's waiting ims-jail-shell, private", Unit::Mebibytes, mib(helpers[0], &private), limit);
    let limit = Bound::Limit { limit: 8.0, aim: None };
    report.add("ims-sshd entrypoint, resident", Unit::Mebibytes, mib(environment.entrypoint.id(), &["Rss:"]), limit);
    report.add("the jail's init, private", Unit::Mebibytes, mib(init, &private), Bound::Information);
    report.add("the jail's init, resident", Unit::Mebibytes, mib(init, &["Rss:"]), Bound::Information);
    client.kill().unwrap();
    client.wait().unwrap();
    close(environment);
}

/// `ssh host true` over a connection that stands. Returns the client's key.
fn connection(rounds: usize, report: &mut Report) -> PathBuf {
    title(&format!("ssh host true, over a connection that stands ({rounds} rounds)"));
    let environments = [Mode::Jailed, Mode::Plain].map(|mode| {
        let volume = Volume::new(Image::Debian);
        // Debian's bash reads ~/.bashrc of the one whom sshd starts it for, but not below another shell: whatever root's
        // does on this machine is not to be measured.
        let mut config = std::fs::File::options().append(true).open(&volume.config).unwrap();
        config.write_all(b"SetEnv SHLVL=1\n").unwrap();
        let environment = volume.start(mode).ready();
        let socket = environment.dir.path().join("m");
        let created = Creations::in_folder(environment.dir.path());
        let mut master = environment.ssh(&["-M", "-S", socket.to_str().unwrap(), "-N"]);
        let master = master.stdout(Stdio::null()).spawn().expect("start ssh");
        created.wait_for("m");
        (environment, master, socket)
    });
    let [mut jailed, mut plain] = environments.each_ref().map(|(environment, _, socket)| {
        let mut command = environment.ssh(&["-S", socket.to_str().unwrap()]);
        command.arg("true");
        command
    });
    let [jailed, plain] = in_turns(rounds, [&mut jailed, &mut plain]);
    let more = jailed.iter().zip(&plain).map(|(j, p)| j - p).collect();
    report.add("plain", Unit::Milliseconds, plain, Bound::Information);
    report.add("jailed", Unit::Milliseconds, jailed, Bound::Information);
    report.add("jailed without plain's", Unit::Milliseconds, more, Bound::Information);
    let key = environments[0].0.key.clone();
    for (environment, mut master, _) in environments {
        master.kill().unwrap();
        master.wait().unwrap();
        close(environment);
    }
    key
}

/// An entrypoint that waits for `ready`, all it does beforehand done.
fn waiting(volume: Volume, mode: Mode) -> Environment {
    let environment = volume.start(mode);
    // It claims the folder when it begins to wait; proc(5) tells of the lock.
    let lock = format!(" FLOCK  ADVISORY  WRITE {} ", environment.entrypoint.id());
    wait_until("the entrypoint to wait for 'ready'", || {
        std::fs::read_to_string("/proc/locks").unwrap().contains(&lock)
    });
    environment
}

/// How long sshd takes until it listens, by itself; it writes its number when it does.
fn bare_sshd(volume: &Volume) -> f64 {
    std::fs::create_dir_all("/run/sshd").unwrap();
    let folder = volume.dir.path().join("bare");
    std::fs::create_dir(&folder).unwrap();
    let created = Creations::in_folder(&folder);
    let pid_file = folder.join("pid");
    let mut sshd = Command::new(ims_sshd::sshd::program().unwrap());
    sshd.arg("-f").arg(&volume.config).arg("-E").arg(volume.dir.path().join("bare.log"));
    sshd.arg("-o").arg(format!("PidFile={}", pid_file.display()));
    let took = time(|| {
        assert!(sshd.status().unwrap().success());
        created.wait_for("pid");
    });
    let number = || std::fs::read_to_string(&pid_file).ok()?.strip_suffix('\n')?.parse().ok();
    let mut pid = None;
    wait_until("sshd's number", || {
        pid = number().map(Pid::from_raw);
        pid.is_some()
    });
    kill(pid.unwrap(), Signal::SIGTERM).unwrap();
    waitpid(pid.unwrap(), None).unwrap();
    took
}

/// Ends an environment and leaves nothing of it.
fn close(mut environment: Environment) {
    if !environment.signal("complete").exists() {
        environment.touch("complete");
    }
    assert_eq!(environment.end(), 0, "{}", environment.log_text());
    succeed(Command::new("umount").arg(&environment.image_root));
    let folder = environment.dir.path().to_owned();
    drop(environment);
    assert!(!folder.exists(), "{} is left", folder.display());
}

/// Names that appear in a folder, as the kernel tells of them.
struct Creations(Inotify);

impl Creations {
    fn in_folder(folder: &Path) -> Self {
        let events = Inotify::init(InitFlags::IN_CLOEXEC).unwrap();
        events.add_watch(folder, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO).unwrap();
        Self(events)
    }

    fn wait_for(&self, name: &str) {
        loop {
            let limit = Timespec { tv_sec: LIMIT.as_secs().cast_signed(), tv_nsec: 0 };
            let ready =
                rustix::event::poll(&mut [PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN)], Some(&limit));
            assert_ne!(ready, Ok(0), "waited {} s in vain for '{name}'", LIMIT.as_secs());
            if self.0.read_events().unwrap().iter().any(|event| event.name.as_deref() == Some(name.as_ref())) {
                return;
            }
        }
    }
}

/// Milliseconds.
fn time(action: impl FnOnce()) -> f64 {
    let began = Instant::now();
    action();
    milliseconds(began.elapsed())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// How long each of `commands` takes, in rounds of one after the other; the first round warms up and does not count.
fn in_turns<const N: usize>(rounds: usize, mut commands: [&mut Command; N]) -> [Vec<f64>; N] {
    let mut samples = [const { Vec::new() }; N];
    for round in 0..=rounds {
        for (command, samples) in commands.iter_mut().zip(&mut samples) {
            let mut status = None;
            let took = time(|| status = Some(command.status()));
            let status = status.unwrap().unwrap_or_else(|e| panic!("{command:?}: {e}"));
            assert!(status.success(), "{command:?}: {status}");
            if round > 0 {
                samples.push(took);
            }
        }
    }
    samples
}

fn ratios(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a / b).collect()
}

/// The sum of `fields` of proc(5)'s `smaps_rollup`, which are in KiB, in MiB.
fn memory_of(pid: u32, fields: &[&str]) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let lines = text.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    lines.filter(|words| fields.contains(&words[0])).map(|words| words[1].parse::<f64>().unwrap()).sum::<f64>() / 1024.0
}

#[derive(Clone, Copy)]
enum Unit {
    Milliseconds,
    Times,
    Mebibytes,
}

#[derive(Clone, Copy)]
enum Bound {
    /// What the median must not exceed, and what it is meant to stay below.
    Limit {
        limit: f64,
        aim: Option<f64>,
    },
    Information,
}

fn title(title: &str) {
    println!("\n{title}");
}

/// Prints the figures and remembers whether one is missed by far.
#[derive(Default)]
struct Report {
    missed_by_far: bool,
}

impl Report {
    fn add(&mut self, name: &str, unit: Unit, mut samples: Vec<f64>, bound: Bound) {
        samples.sort_by(f64::total_cmp);
        let median = f64::midpoint(samples[(samples.len() - 1) / 2], samples[samples.len() / 2]);
        let unit = match unit {
            Unit::Milliseconds => "ms",
            Unit::Times => "x",
            Unit::Mebibytes => "MiB",
        };
        let spread = match samples.as_slice() {
            [_] => String::new(),
            samples => format!("{:.2} … {:.2}", samples[0], samples[samples.len() - 1]),
        };
        let judgement = match bound {
            Bound::Information => String::new(),
            Bound::Limit { limit, aim } => {
                self.missed_by_far |= median > limit * 1.5;
                let reached = if median <= limit { "reached" } else { "MISSED" };
                let aim = aim.map(|aim| format!(", aim {aim}: {}", if median <= aim { "reached" } else { "not yet" }));
                format!("{limit:.2} {unit}: {reached}{}", aim.unwrap_or_default())
            }
        };
        println!("  {name:<54}{median:>8.2} {unit:<3} {spread:<16} {judgement}");
    }

    fn exit_code(&self) -> ExitCode {
        ExitCode::from(u8::from(self.missed_by_far))
    }
}
