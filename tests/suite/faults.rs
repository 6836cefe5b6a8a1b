//! Faults: any part of an environment is killed in any phase. The environment ends with a clear log line, and nothing
//! is left running or mounted.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ims_sshd::sys::mounts::mount_points;
use ims_sshd::sys::process::Entry;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// sshd's listener. Before that listens, the sshd that is asked for its configuration (plain mode) or is starting
    /// (jailed mode); during the close, when the listener has ended, the sshd of a connection.
    Sshd,
    JailInit,
    Helper,
    Shell,
    Script,
    Entrypoint,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
enum Phase {
    BeforeReady,
    Preparing,
    Idle,
    Busy,
    Closing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Kill,
    StopThenKill,
    Term,
}

#[derive(Clone, Copy, Debug)]
struct Cell {
    part: Part,
    phase: Phase,
    fault: Fault,
    mode: Mode,
}

const PARTS: [Part; 6] = [Part::Sshd, Part::JailInit, Part::Helper, Part::Shell, Part::Script, Part::Entrypoint];
const PHASES: [Phase; 5] = [Phase::BeforeReady, Phase::Preparing, Phase::Idle, Phase::Busy, Phase::Closing];
const FAULTS: [Fault; 3] = [Fault::Kill, Fault::StopThenKill, Fault::Term];

/// Timeout of one cell.
const CELL_LIMIT: Duration = Duration::from_secs(25);

impl Cell {
    fn all() -> Vec<Self> {
        let mut cells = Vec::new();
        for mode in MODES {
            for part in PARTS {
                for phase in PHASES {
                    cells.extend(FAULTS.map(|fault| Self { part, phase, fault, mode }));
                }
            }
        }
        cells.retain(|cell| cell.exists());
        cells
    }

    /// Returns whether the part exists in that phase.
    fn exists(&self) -> bool {
        match (self.part, self.phase) {
            (Part::Entrypoint, _) => true,
            (_, Phase::BeforeReady) => false,
            // The script and sessions start once sshd listens; helper and shell need a session.
            (Part::Script | Part::Helper | Part::Shell, Phase::Preparing) => false,
            (Part::Helper | Part::Shell, Phase::Idle) => false,
            (Part::JailInit | Part::Helper, _) => self.mode == Mode::Jailed,
            (Part::Sshd | Part::Shell | Part::Script, _) => true,
        }
    }

    /// Expected verdict and exit code of the entrypoint; of its second start if it was killed.
    fn outcome(&self) -> (&'static str, i32) {
        match (self.part, self.phase, self.fault) {
            (Part::Entrypoint, _, Fault::Term) => ("failed", 143),
            (Part::Sshd, Phase::Preparing, _) => ("failed", 1),
            (Part::Script, ..) => ("failed", 0),
            _ => ("complete", 0),
        }
    }

    /// Returns whether the signal has no effect: from outside, only SIGKILL and SIGSTOP reach a PID namespace's init.
    fn is_without_effect(&self) -> bool {
        self.part == Part::JailInit && self.fault == Fault::Term
    }

    fn inject(&self, pid: Pid) {
        let signal = |signal| kill(pid, signal).unwrap();
        match self.fault {
            Fault::Kill => signal(Signal::SIGKILL),
            Fault::Term => signal(Signal::SIGTERM),
            Fault::StopThenKill => {
                signal(Signal::SIGSTOP);
                wait_until("the stop", || Entry::read(pid).is_none_or(|e| e.state == 'T'));
                signal(Signal::SIGKILL);
            }
        }
    }
}

/// A gate in sshd's start: a fifo as host key, which sshd blocks on reading.
struct Gate {
    path: PathBuf,
}

impl Gate {
    fn put_before(volume: &Volume) -> Self {
        let path = volume.dir.path().join("gate");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        let config = std::fs::read_to_string(&volume.config).unwrap();
        // Name a usable host key too: with any HostKey line, sshd does not load the default ones.
        let keys = format!("HostKey {}\nHostKey /etc/ssh/ssh_host_ed25519_key\n", path.display());
        std::fs::write(&volume.config, format!("{keys}{config}")).unwrap();
        Self { path }
    }

    /// Releases every sshd that waits now.
    fn release(path: &Path) {
        // Open for reading and writing, which does not block; on close, a waiting reader gets the end of the file.
        std::fs::File::options().read(true).write(true).open(path).unwrap();
    }

    /// Opens the gate for good.
    fn open(&self) {
        let old = self.path.with_extension("old");
        std::fs::rename(&self.path, &old).unwrap();
        std::fs::write(&self.path, "").unwrap();
        Self::release(&old);
    }

    /// Waits for an sshd at the gate and returns its PID: the one that is asked for its configuration, or the one that
    /// is going to listen.
    fn waiting_sshd(&self, entrypoint: Pid, asked: bool) -> Pid {
        let mut found = None;
        wait_until("an sshd at the gate", || {
            for entry in Entry::all().into_iter().filter(|e| e.parent == entrypoint && e.name == "sshd") {
                let line = entry.command_line();
                // Skip an sshd that has ended, which has no command line.
                if !line.contains("sshd_config") {
                    continue;
                }
                if line.contains(" -T") == asked {
                    found = Some(entry.pid);
                } else {
                    Self::release(&self.path);
                }
            }
            found.is_some()
        });
        found.unwrap()
    }
}

#[test]
fn device_of_a_removed_image_root_is_given_to_no_other_file_system_while_its_processes_are_looked_for() {
    let volume = Volume::in_memory(Image::Busybox);
    let processes = Processes::of(&volume);
    drop(volume);
    let others = directory();
    let mounted = (0..20).map(|number| {
        let point = others.path().join(number.to_string());
        std::fs::create_dir(&point).unwrap();
        mount(&["-t", "tmpfs", "tmpfs"], &point);
        Mounted(point)
    });
    let mounted: Vec<_> = mounted.collect();
    let device = |mounted: &Mounted| std::fs::metadata(&mounted.0).unwrap().dev();
    // Processes of another test, whose image root it could be, would be killed.
    assert!(mounted.iter().all(|mounted| device(mounted) != processes.image_device));
}

/// Finds every process that a test's thread has started. The thread has a UTS namespace of its own, which processes
/// leave only for the jail, where their root is the image root.
struct Processes {
    uts: PathBuf,
    image_device: u64,
    /// Held open, so that no file system of another test, whose processes would be killed, gets the device's number.
    _image: std::fs::File,
    image_root: PathBuf,
}

impl Processes {
    fn of(volume: &Volume) -> Self {
        // Hide the .bashrc of this machine's root: it may take a lock and must not be killed half-way.
        let profile = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(0)).unwrap().unwrap().dir.join(".bashrc");
        if profile.exists() {
            mount(&["--bind", "/dev/null"], &profile);
        }
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUTS).unwrap();
        let image = std::fs::File::open(&volume.image_root).unwrap();
        Self {
            uts: std::fs::read_link("/proc/thread-self/ns/uts").unwrap(),
            image_device: image.metadata().unwrap().dev(),
            _image: image,
            image_root: volume.image_root.clone(),
        }
    }

    fn running(&self) -> Vec<Entry> {
        let device = |entry: &Entry, name: &str| {
            std::fs::metadata(format!("/proc/{}/{name}", entry.pid)).ok().map(|found| found.dev())
        };
        let mut all = Entry::all();
        all.retain(|e| {
            let within = |name| device(e, name) == Some(self.image_device);
            let uts = std::fs::read_link(format!("/proc/{}/ns/uts", e.pid)).ok();
            e.state != 'Z' && (uts.as_ref() == Some(&self.uts) || within("root") || within("cwd"))
        });
        all
    }

    fn assert_none_left(&self) {
        let left: Vec<_> = self.running().iter().map(|e| format!("{} {}", e.pid, e.command_line())).collect();
        assert!(left.is_empty(), "left running: {left:#?}");
        let mut mounts = mount_points(&std::fs::read("/proc/thread-self/mountinfo").unwrap());
        mounts.retain(|mount| mount.starts_with(self.image_root.parent().unwrap()));
        assert_eq!(mounts, [self.image_root.as_path()], "mounts are left");
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for entry in self.running() {
            entry.signal(Signal::SIGKILL);
        }
    }
}

/// A session that waits for a line.
struct Waiting {
    ssh: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    stderr: ChildStderr,
    mark: String,
}

impl Waiting {
    fn begin(environment: &Environment, name: &str) -> Self {
        let mark = format!("{name}-{}", environment.port);
        let mut ssh = environment.ssh(&[]);
        ssh.arg(format!("echo in {mark}; read line && echo $line")).stdin(Stdio::piped());
        let mut ssh = ssh.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (stdin, stderr) = (ssh.stdin.take().unwrap(), ssh.stderr.take().unwrap());
        let mut session = Self { stdin, stdout: BufReader::new(ssh.stdout.take().unwrap()), stderr, ssh, mark };
        assert_eq!(session.line(), format!("in {}\n", session.mark));
        session
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line
    }

    /// PID of the shell that reads the line.
    fn shell(&self) -> Pid {
        let found: Vec<_> = processes_with(&format!("echo in {}", self.mark))
            .into_iter()
            .map(|pid| Pid::from_raw(pid.cast_signed()))
            .filter(|pid| Entry::read(*pid).is_some_and(|e| e.name != "ssh"))
            .collect();
        assert_eq!(found.len(), 1, "{found:?}");
        found[0]
    }

    /// Writes the line and asserts that the session answers and ends.
    fn assert_answers(mut self) {
        self.stdin.write_all(b"still there\n").unwrap();
        assert_eq!(self.line(), "still there\n", "{}", self.mark);
        assert!(self.ssh.wait().unwrap().success());
    }

    /// Asserts that the session is ended from outside, and returns its standard error.
    fn assert_cut_off(mut self) -> String {
        assert_eq!(self.line(), "", "{}", self.mark);
        let mut said = String::new();
        self.stderr.read_to_string(&mut said).unwrap();
        assert!(!self.ssh.wait().unwrap().success());
        said
    }
}

fn parent_of(pid: Pid) -> Pid {
    Entry::read(pid).unwrap().parent
}

fn listener(environment: &Environment) -> Pid {
    let text = std::fs::read_to_string(environment.state_directory().join("sshd")).unwrap();
    Pid::from_raw(ims_sshd::sys::process::Identity::parse(&text).unwrap().pid)
}

const OPEN: &str = "the environment is open";

fn run(cell: Cell) {
    let volume = Volume::new(Image::Debian);
    let processes = Processes::of(&volume);
    let gate = (cell.phase == Phase::Preparing).then(|| Gate::put_before(&volume));
    let config = std::fs::read_to_string(&volume.config).unwrap();
    let events = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
    events.add_watch(&volume.parent, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO).unwrap();
    let script = volume.dir.path().join("script");
    let script_path = script.display().to_string();
    if cell.part == Part::Script {
        std::fs::write(&script, "sleep 1000; exit 0\n").unwrap();
    }
    let variables = [("CUSTOMIZATION_SCRIPT", script_path.as_str())];

    // Bring the environment into its phase.
    let mut environment = volume.start_with(cell.mode, &variables);
    let mut sessions = Vec::new();
    environment.wait_for_log_times("waiting for 'ready'", 1);
    match cell.phase {
        Phase::BeforeReady => {}
        Phase::Preparing => environment.touch("ready"),
        Phase::Idle | Phase::Busy | Phase::Closing => environment = environment.ready(),
    }
    if matches!(cell.phase, Phase::Busy | Phase::Closing) {
        sessions = ["victim", "other"].map(|name| Waiting::begin(&environment, name)).into();
    }
    let victim = sessions.first().map(Waiting::shell);
    let waiting_sshd = gate.as_ref().map(|gate| gate.waiting_sshd(environment.pid(), cell.mode == Mode::Plain));
    let target = match cell.part {
        Part::Entrypoint => environment.pid(),
        Part::Sshd => match (waiting_sshd, victim, cell.phase) {
            (Some(sshd), ..) => sshd,
            (_, Some(shell), Phase::Closing) if cell.mode == Mode::Plain => parent_of(shell),
            (_, Some(shell), Phase::Closing) => parent_of(parent_of(shell)),
            _ => listener(&environment),
        },
        Part::JailInit => environment.jails_init(),
        Part::Helper => parent_of(victim.unwrap()),
        Part::Shell => victim.unwrap(),
        Part::Script => {
            environment.wait_for_log_times("customization script", 1);
            let of_script = |pid: &Pid| Entry::read(*pid).is_some_and(|e| e.parent == environment.pid());
            let running = || processes_with(&script_path).into_iter().map(|pid| Pid::from_raw(pid.cast_signed()));
            wait_until("the script", || running().any(|pid| of_script(&pid)));
            running().find(of_script).unwrap()
        }
    };
    if cell.phase == Phase::Closing {
        environment.touch("complete");
        environment.wait_for_log_times("closing: sshd accepts no new connections", 1);
    }

    // Inject the fault.
    let began = Instant::now();
    cell.inject(target);
    let dies = cell.part == Part::Entrypoint && cell.fault != Fault::Term;
    if dies {
        environment.entrypoint.wait().unwrap();
    }
    if let Some(gate) = &gate {
        gate.open();
    }
    if dies {
        if cell.mode == Mode::Jailed && cell.phase == Phase::Preparing {
            // The worst case: an sshd that the killed supervisor could not record gets as far as to listen.
            let sshd = || processes.running().iter().any(|e| e.name == "sshd");
            wait_until("the orphan to listen, or to end", || {
                std::net::TcpStream::connect(("127.0.0.1", environment.port)).is_ok() || !sshd()
            });
        }
        environment.entrypoint = environment.volume.entrypoint(cell.mode, &variables).spawn().unwrap();
        if cell.phase == Phase::BeforeReady {
            environment.touch("ready");
        }
    }

    // Check the sessions.
    let serves = matches!(cell.outcome(), ("complete", _)) && cell.phase != Phase::Closing;
    if serves {
        match cell.part {
            _ if dies => environment.wait_for_log_times(OPEN, if cell.phase >= Phase::Idle { 2 } else { 1 }),
            Part::Sshd => environment.wait_for_log_times("sshd is listening", 2),
            Part::JailInit if !cell.is_without_effect() => environment.wait_for_log_times("the jail is made", 2),
            _ => environment.wait_for_log_times(OPEN, 1),
        }
        assert_eq!(environment.says("echo served"), "served");
    }
    let mut sessions = sessions.into_iter();
    match (cell.part, sessions.next(), sessions.next()) {
        (Part::Entrypoint, Some(victim), Some(other)) => {
            victim.assert_cut_off();
            other.assert_cut_off();
        }
        (Part::JailInit, Some(victim), Some(other)) if !cell.is_without_effect() => {
            for session in [victim, other] {
                let said = session.assert_cut_off();
                assert!(said.contains("ims-jail-shell: the jail has ended"), "{said}");
            }
        }
        (Part::Helper | Part::Shell, Some(victim), Some(other)) => {
            victim.assert_cut_off();
            other.assert_answers();
        }
        (Part::Sshd, Some(victim), Some(other)) if cell.phase == Phase::Closing => {
            victim.assert_cut_off();
            other.assert_answers();
        }
        (_, Some(victim), Some(other)) => {
            victim.assert_answers();
            other.assert_answers();
        }
        _ => {}
    }

    // Check the end.
    let (verdict, code) = cell.outcome();
    if serves {
        environment.touch("complete");
    }
    assert_eq!(environment.end(), code);
    let took = began.elapsed();
    assert!(took < CELL_LIMIT, "it took {took:?}");
    processes.assert_none_left();
    assert!(!environment.state_directory().exists());
    let log = environment.log_text();
    if dies && (cell.phase >= Phase::Idle || cell.mode == Mode::Jailed && cell.phase == Phase::Preparing) {
        assert!(
            log.contains("cleaned up after an environment that was killed here: "),
            "the log does not name what was cleaned up"
        );
    }
    let mut stands: Vec<_> = std::fs::read_dir(&environment.parent).unwrap().map(|e| e.unwrap().file_name()).collect();
    stands.retain(|name| !["image-root", "ready", "sshd_listening"].iter().any(|usual| name == usual));
    stands.sort();
    let mut wanted = [verdict, "exiting"];
    wanted.sort_unstable();
    assert_eq!(stands, wanted);
    let made: Vec<_> = events.read_events().unwrap().into_iter().filter_map(|e| e.name).collect();
    assert_eq!(made.last().unwrap(), "exiting", "{made:?}");
    assert_eq!(made.iter().filter(|name| *name == "exiting").count(), 1);
    if verdict == "failed" && cell.phase != Phase::Closing {
        assert!(!made.iter().any(|name| name == "complete"), "{made:?}");
    }
    assert_eq!(std::fs::read_to_string(&environment.config).unwrap(), config);
    let mut changes = environment.changes();
    changes.retain(|path| path.components().count() > 1);
    let marked = (verdict == "failed" && cell.mode == Mode::Jailed).then(|| PathBuf::from("tmp/failed"));
    assert_eq!(changes, Vec::from_iter(marked));
}

/// Number of concurrent cells. A cell spends most of its time waiting.
const AT_ONCE: usize = 8;

#[test]
fn environment_ends_cleanly_whichever_part_is_killed_in_whichever_phase() {
    let only = std::env::var("IMS_SSHD_FAULTS").unwrap_or_default();
    let mut cells = Cell::all();
    println!("{} cells", cells.len());
    assert!(cells.len() >= 60);
    cells.retain(|cell| format!("{cell:?}").contains(&only));
    let began = Instant::now();
    let failed = run_each(&cells, AT_ONCE, |cell| format!("{cell:?}"), |cell| run(*cell));
    println!("{:.1} s", began.elapsed().as_secs_f64());
    assert!(failed.is_empty(), "{} of {} cells failed: {failed:#?}", failed.len(), cells.len());
}

/// Files of a directory with their lengths and mtimes.
fn files(directory: &Path) -> Vec<(PathBuf, u64, i64, i64)> {
    let mut found: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let data = entry.metadata().unwrap();
            (entry.path(), data.len(), data.mtime(), data.mtime_nsec())
        })
        .collect();
    found.sort();
    found
}

#[test]
fn nothing_is_written_after_exiting_and_writers_do_not_delay_the_close() {
    for (mode, writers) in [(Mode::Jailed, 200), (Mode::Plain, 50)] {
        // One mode after the other: both mount over the same paths of this thread's mount namespace.
        let volume = Volume::new(Image::Debian);
        let processes = Processes::of(&volume);
        let mut environment = volume.start_with(mode, &[("IMS_CLOSE_GRACE", "10")]).ready();
        let written = environment.image_root.join("root/written");
        std::fs::create_dir(&written).unwrap();
        let seen = if mode == Mode::Jailed { "/root/written".into() } else { written.display().to_string() };
        // `read -t` on a fifo is a pause without a process of its own.
        let writer = "exec 3<>fifo; while :; do echo a line of $$ >> $1; read -t 0.02 -u 3; done";
        let start = format!(
            "cd {seen} && mkfifo fifo && for i in $(seq {writers}); do \
             setsid nohup bash -c '{writer}' writer $i </dev/null >/dev/null 2>&1 & done"
        );
        environment.says(&start);
        let lines = || files(&written).iter().map(|file| file.1).sum::<u64>();
        wait_until("all writers", || files(&written).iter().filter(|file| file.1 > 0).count() == writers);
        wait_until("the session's connection to end", || {
            processes.running().iter().filter(|e| e.name == "sshd").count() == 1
        });
        let before = lines();
        wait_until("the writers to go on", || lines() > before);

        let events = Inotify::init(InitFlags::empty()).unwrap();
        events.add_watch(&environment.parent, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO).unwrap();
        let began = Instant::now();
        environment.touch("complete");
        while !events.read_events().unwrap().iter().any(|e| e.name.as_ref().is_some_and(|n| n == "exiting")) {}
        let took = began.elapsed();
        let at_once = files(&written);
        // Give a remaining writer time to write.
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(files(&written), at_once);
        assert_eq!(environment.end(), 0);
        processes.assert_none_left();
        println!("{writers} writers, {mode:?}: closed in {} ms", took.as_millis());
        // There is no session, so there is no grace period to wait for.
        assert!(took < CLOSE_LIMIT, "{took:?}");
    }
}

/// Maximum time of a close without sessions: less than the grace period. An idle machine takes a thirtieth of it, but
/// tests run side by side.
const CLOSE_LIMIT: Duration = Duration::from_secs(8);

/// Resources of an environment.
#[derive(Debug, PartialEq, Eq)]
struct Resources {
    /// Descriptors of the entrypoint and of the jail's init.
    descriptors: [usize; 2],
    /// Mounts that the two see.
    mounts: [usize; 2],
    /// Processes, as their command lines.
    processes: Vec<String>,
    files: Vec<PathBuf>,
}

impl Resources {
    fn of(environment: &Environment, running: &Processes) -> Self {
        let both = [environment.pid(), environment.jails_init()];
        let count = |text: String| text.lines().count();
        let mut processes: Vec<_> = running.running().iter().map(Entry::command_line).collect();
        processes.sort();
        let directories = [environment.state_directory(), environment.parent.clone()];
        let files =
            |directory: &PathBuf| std::fs::read_dir(directory).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>();
        let mut files: Vec<_> = directories.iter().flat_map(files).chain(environment.changes()).collect();
        files.sort();
        Self {
            descriptors: both.map(|pid| std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()),
            mounts: both.map(|pid| count(std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap())),
            processes,
            files,
        }
    }
}

/// Resident memory in KiB.
fn resident(process: Pid) -> i64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Runs one session; `number` selects its kind.
fn session(environment: &Environment, number: usize) {
    let said = |output: std::process::Output| text(output.stdout).replace('\r', "");
    match number % 5 {
        0 => assert_eq!(environment.says(&format!("echo {number}")), number.to_string()),
        1 => assert_eq!(environment.run("echo aside >&2; kill -TERM $$").status.code(), Some(255)),
        2 => {
            let output = feed(&mut environment.ssh(&[]), b"echo in a shell; exit 3\n");
            assert_eq!((output.status.code(), said(output)), (Some(3), "in a shell\n".into()));
        }
        3 => {
            let output =
                feed(&mut environment.ssh(&["-tt"]), format!("echo $((1000000 + {number})); exit\n").as_bytes());
            assert!(said(output).contains(&format!("{}", 1_000_000 + number)));
        }
        _ => {
            let put = format!("put /etc/hostname /root/{number}\nrm /root/{number}\n");
            assert!(environment.sftp(&put).status.success());
        }
    }
}

#[test]
fn many_sessions_leave_no_descriptor_mount_process_or_file() {
    let wanted = std::env::var("IMS_SSHD_SOAK").map_or(100, |n| n.parse().expect("IMS_SSHD_SOAK is a number"));
    let volume = Volume::new(Image::Debian);
    let processes = Processes::of(&volume);
    let mut environment = volume.start(Mode::Jailed).ready();
    for number in 0..5 {
        session(&environment, number);
    }
    let alone = || processes.running().iter().filter(|e| e.name == "sshd").count() == 1;
    wait_until("the connections to end", alone);
    let before = Resources::of(&environment, &processes);
    let (next, environment_now) = (AtomicUsize::new(0), &environment);
    let run_up_to = |last: usize| {
        std::thread::scope(|scope| {
            for _ in 0..20 {
                scope.spawn(|| {
                    while next
                        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < last).then_some(n + 1))
                        .is_ok_and(|number| {
                            session(environment_now, number);
                            true
                        })
                    {}
                });
            }
        });
    };
    let (entrypoint, init) = (environment.pid(), environment.jails_init());
    run_up_to(wanted / 5);
    let early = [entrypoint, init].map(resident);
    run_up_to(wanted);
    let late = [entrypoint, init].map(resident);
    println!(
        "{wanted} sessions: {early:?} KiB resident after a fifth of them, {late:?} after all (entrypoint, jail's init)"
    );
    wait_until("the connections to end", alone);
    wait_until(&format!("the same as before: {before:#?} {:#?}", Resources::of(&environment, &processes)), || {
        let now = Resources::of(&environment, &processes);
        // A session's last descriptor may have been open before, and closed since.
        let has_no_more = now.descriptors.iter().zip(&before.descriptors).all(|(now, before)| now <= before);
        has_no_more && Resources { descriptors: before.descriptors, ..now } == before
    });
    println!("before and after: {:?} descriptors, {:?} mounts", before.descriptors, before.mounts);
    for (early, late) in early.into_iter().zip(late) {
        assert!(late - early < 1024);
    }
    assert_eq!(environment.complete(), 0);
    processes.assert_none_left();
}

#[test]
fn sshd_that_dies_six_times_a_minute_ends_the_environment_with_its_last_log_lines() {
    let mut environment = Environment::open(Image::Busybox, Mode::Plain);
    let record = environment.state_directory().join("sshd");
    let listener = || {
        let text = std::fs::read_to_string(&record).unwrap_or_default();
        text.split_once(' ').and_then(|(pid, _)| pid.parse().ok()).map(Pid::from_raw)
    };
    let mut killed = None;
    // sshd is restarted five times a minute; the sixth death closes the environment.
    for _ in 0..6 {
        wait_until("another sshd", || listener().is_some() && listener() != killed);
        killed = listener();
        kill(killed.unwrap(), Signal::SIGKILL).unwrap();
    }
    assert_eq!(environment.end(), 1);
    let log = environment.log_text();
    assert_eq!(log.matches("sshd was killed by SIGKILL; its log ends with: ").count(), 6, "{log}");
    assert!(log.contains("Server listening on 127.0.0.1"), "{log}");
    assert!(environment.signal("failed").exists() && environment.signal("exiting").exists());
    assert!(!environment.signal("complete").exists());
}

#[test]
fn supervisor_sleeps_during_the_wait_before_a_restart() {
    let environment = Environment::open(Image::Busybox, Mode::Jailed);
    for times in 1..=3 {
        environment.wait_for_log_times("the jail is made", times);
        kill(environment.jails_init(), Signal::SIGKILL).unwrap();
        environment.wait_for_log_times("the jail's init was killed by SIGKILL", times);
    }
    // The third restart waits a second. /proc counts processor time in hundredths of a second.
    let spent = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", environment.pid())).unwrap();
        let fields = stat.rsplit_once(") ").unwrap().1.split(' ').skip(11).take(2);
        fields.map(|ticks| ticks.parse::<u64>().unwrap()).sum::<u64>()
    };
    let before = spent();
    std::thread::sleep(Duration::from_millis(800));
    assert!(spent() - before < 10, "{before}, then {}", spent());
}

#[test]
fn connection_that_outlives_its_sshd_is_not_mistaken_for_the_next_listener() {
    let environment = Environment::open(Image::Busybox, Mode::Plain);
    let master = environment.master();
    // The next sshd finds its port taken, an error that it reports only in its log.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let config = std::fs::read_to_string(&environment.config).unwrap();
    let port = |port: u16| format!("Port {port}\n");
    let other = config.replace(&port(environment.port), &port(taken.local_addr().unwrap().port()));
    std::fs::write(&environment.config, other).unwrap();
    let record = std::fs::read_to_string(environment.state_directory().join("sshd")).unwrap();
    kill(Pid::from_raw(record.split_once(' ').unwrap().0.parse().unwrap()), Signal::SIGKILL).unwrap();
    wait_until("the error of the next sshd", || environment.log_text().contains("cannot start sshd"));
    assert!(environment.log_text().contains("Address already in use"), "{}", environment.log_text());
    assert_eq!(text(master.ssh().arg("echo open").output().unwrap().stdout), "open\n");
}
