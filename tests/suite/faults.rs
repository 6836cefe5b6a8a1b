//! Whatever dies, and whenever: the environment ends with a clear word, with nothing left running or mounted.

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
    /// Its listener; before that listens, the sshd that is asked (plain) or is starting (jailed); in the close, when the listener has
    /// ended, that of a connection.
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
enum Blow {
    Kill,
    StopThenKill,
    Term,
}

#[derive(Clone, Copy, Debug)]
struct Cell {
    part: Part,
    phase: Phase,
    blow: Blow,
    mode: Mode,
}

const PARTS: [Part; 6] = [Part::Sshd, Part::JailInit, Part::Helper, Part::Shell, Part::Script, Part::Entrypoint];
const PHASES: [Phase; 5] = [Phase::BeforeReady, Phase::Preparing, Phase::Idle, Phase::Busy, Phase::Closing];
const BLOWS: [Blow; 3] = [Blow::Kill, Blow::StopThenKill, Blow::Term];

/// No cell takes longer.
const CELL_LIMIT: Duration = Duration::from_secs(25);

impl Cell {
    fn all() -> Vec<Self> {
        let mut cells = Vec::new();
        for mode in MODES {
            for part in PARTS {
                for phase in PHASES {
                    cells.extend(BLOWS.map(|blow| Self { part, phase, blow, mode }));
                }
            }
        }
        cells.retain(|cell| cell.exists());
        cells
    }

    /// Whether there is such a part at that time.
    fn exists(&self) -> bool {
        match (self.part, self.phase) {
            (Part::Entrypoint, _) => true,
            (_, Phase::BeforeReady) => false,
            // Both come once sshd listens, and a session has to be there for the latter.
            (Part::Script | Part::Helper | Part::Shell, Phase::Preparing) => false,
            (Part::Helper | Part::Shell, Phase::Idle) => false,
            (Part::JailInit | Part::Helper, _) => self.mode == Mode::Jailed,
            (Part::Sshd | Part::Shell | Part::Script, _) => true,
        }
    }

    /// The verdict and the entrypoint's exit code; of its second start where it was killed.
    fn outcome(&self) -> (&'static str, i32) {
        match (self.part, self.phase, self.blow) {
            (Part::Entrypoint, _, Blow::Term) => ("failed", 143),
            (Part::Sshd, Phase::Preparing, _) => ("failed", 1),
            (Part::Script, ..) => ("failed", 0),
            _ => ("complete", 0),
        }
    }

    /// A PID namespace's first process hears of outside signals only those that it cannot refuse.
    fn is_without_effect(&self) -> bool {
        self.part == Part::JailInit && self.blow == Blow::Term
    }

    fn strike(&self, pid: Pid) {
        let signal = |signal| kill(pid, signal).unwrap();
        match self.blow {
            Blow::Kill => signal(Signal::SIGKILL),
            Blow::Term => signal(Signal::SIGTERM),
            Blow::StopThenKill => {
                signal(Signal::SIGSTOP);
                wait_until("the stop", || Entry::read(pid).is_none_or(|e| e.state == 'T'));
                signal(Signal::SIGKILL);
            }
        }
    }
}

/// A host key of sshd's configuration at which each sshd waits: a fifo that nobody writes to.
struct Gate {
    path: PathBuf,
}

impl Gate {
    fn put_before(volume: &Volume) -> Self {
        let path = volume.dir.path().join("gate");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        let config = std::fs::read_to_string(&volume.config).unwrap();
        // Once one host key is named, sshd takes no other that is not.
        let keys = format!("HostKey {}\nHostKey /etc/ssh/ssh_host_ed25519_key\n", path.display());
        std::fs::write(&volume.config, format!("{keys}{config}")).unwrap();
        Self { path }
    }

    /// Lets those pass that wait now.
    fn let_pass(path: &Path) {
        // For both directions: this open waits for nobody, and a waiting reader then finds the end of the file.
        std::fs::File::options().read(true).write(true).open(path).unwrap();
    }

    /// Lets everybody pass from now on.
    fn open(&self) {
        let old = self.path.with_extension("old");
        std::fs::rename(&self.path, &old).unwrap();
        std::fs::write(&self.path, "").unwrap();
        Self::let_pass(&old);
    }

    /// Waits until there is a sshd at the gate, and returns it: the one that is asked first, or the one that is to listen.
    fn visitor(&self, entrypoint: Pid, asked: bool) -> Pid {
        let mut found = None;
        wait_until("a sshd at the gate", || {
            for entry in Entry::all().into_iter().filter(|e| e.parent == entrypoint && e.name == "sshd") {
                let line = entry.command_line();
                // One that has ended has no command line.
                if !line.contains("sshd_config") {
                    continue;
                }
                if line.contains(" -T") == asked {
                    found = Some(entry.pid);
                } else {
                    Self::let_pass(&self.path);
                }
            }
            found.is_some()
        });
        found.unwrap()
    }
}

/// Everything that a test's thread has started: its UTS namespace is nobody else's, and no process leaves it but into the jail,
/// where its root is the image root.
struct Household {
    uts: PathBuf,
    image_device: u64,
    image_root: PathBuf,
}

impl Household {
    fn of(volume: &Volume) -> Self {
        // What root's shell runs on this machine at each login is not to be killed half-way: it may hold a lock.
        let profile = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(0)).unwrap().unwrap().dir.join(".bashrc");
        if profile.exists() {
            mount(&["--bind", "/dev/null"], &profile);
        }
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUTS).unwrap();
        Self {
            uts: std::fs::read_link("/proc/thread-self/ns/uts").unwrap(),
            image_device: std::fs::metadata(&volume.image_root).unwrap().dev(),
            image_root: volume.image_root.clone(),
        }
    }

    fn members(&self) -> Vec<Entry> {
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

    fn assert_empty(&self) {
        let left: Vec<_> = self.members().iter().map(|e| format!("{} {}", e.pid, e.command_line())).collect();
        assert!(left.is_empty(), "left running: {left:#?}");
        let mut mounts = mount_points(&std::fs::read("/proc/thread-self/mountinfo").unwrap());
        mounts.retain(|mount| mount.starts_with(self.image_root.parent().unwrap()));
        assert_eq!(mounts, [self.image_root.as_path()], "mounts are left");
    }
}

impl Drop for Household {
    fn drop(&mut self) {
        for entry in self.members() {
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

    /// The process that reads the line.
    fn shell(&self) -> Pid {
        let found: Vec<_> = processes_with(&format!("echo in {}", self.mark))
            .into_iter()
            .map(|pid| Pid::from_raw(pid.cast_signed()))
            .filter(|pid| Entry::read(*pid).is_some_and(|e| e.name != "ssh"))
            .collect();
        assert_eq!(found.len(), 1, "{found:?}");
        found[0]
    }

    /// Gives it its line; it has to answer.
    fn answers(mut self) {
        self.stdin.write_all(b"still there\n").unwrap();
        assert_eq!(self.line(), "still there\n", "{}", self.mark);
        assert!(self.ssh.wait().unwrap().success());
    }

    /// Waits for an end that it did not choose, and returns what it was told.
    fn cut_off(mut self) -> String {
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
    let household = Household::of(&volume);
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

    // To where it is to happen.
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
    let visitor = gate.as_ref().map(|gate| gate.visitor(environment.pid(), cell.mode == Mode::Plain));
    let target = match cell.part {
        Part::Entrypoint => environment.pid(),
        Part::Sshd => match (visitor, victim, cell.phase) {
            (Some(visitor), ..) => visitor,
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

    // It happens.
    let began = Instant::now();
    cell.strike(target);
    let dies = cell.part == Part::Entrypoint && cell.blow != Blow::Term;
    if dies {
        environment.entrypoint.wait().unwrap();
    }
    if let Some(gate) = &gate {
        gate.open();
    }
    if dies {
        if cell.mode == Mode::Jailed && cell.phase == Phase::Preparing {
            // The worst: a sshd that nobody could note any more gets as far as to listen.
            let sshd = || household.members().iter().any(|e| e.name == "sshd");
            wait_until("the orphan to listen, or to end", || {
                std::net::TcpStream::connect(("127.0.0.1", environment.port)).is_ok() || !sshd()
            });
        }
        environment.entrypoint = environment.volume.entrypoint(cell.mode, &variables).spawn().unwrap();
        if cell.phase == Phase::BeforeReady {
            environment.touch("ready");
        }
    }

    // What is to come of it for those who are in the environment.
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
            victim.cut_off();
            other.cut_off();
        }
        (Part::JailInit, Some(victim), Some(other)) if !cell.is_without_effect() => {
            for session in [victim, other] {
                let said = session.cut_off();
                assert!(said.contains("ims-jail-shell: the jail has ended"), "{said}");
            }
        }
        (Part::Helper | Part::Shell, Some(victim), Some(other)) => {
            victim.cut_off();
            other.answers();
        }
        (Part::Sshd, Some(victim), Some(other)) if cell.phase == Phase::Closing => {
            victim.cut_off();
            other.answers();
        }
        (_, Some(victim), Some(other)) => {
            victim.answers();
            other.answers();
        }
        _ => {}
    }

    // The end.
    let (verdict, code) = cell.outcome();
    if serves {
        environment.touch("complete");
    }
    assert_eq!(environment.end(), code);
    let took = began.elapsed();
    assert!(took < CELL_LIMIT, "it took {took:?}");
    household.assert_empty();
    assert!(!environment.state_directory().exists());
    let log = environment.log_text();
    if dies && (cell.phase >= Phase::Idle || cell.mode == Mode::Jailed && cell.phase == Phase::Preparing) {
        assert!(
            log.contains("cleaned up after an environment that was killed here: "),
            "it does not say what it found"
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

/// How many cells run at once. Most of a cell's time is waiting.
const AT_ONCE: usize = 8;

#[test]
fn whatever_dies_and_whenever_the_environment_ends_with_a_clear_word() {
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

/// Files with their lengths and times.
fn look(folder: &Path) -> Vec<(PathBuf, u64, i64, i64)> {
    let mut found: Vec<_> = std::fs::read_dir(folder)
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
fn nobody_writes_once_exiting_stands_and_writers_do_not_hold_the_close_up() {
    for (mode, writers) in [(Mode::Jailed, 200), (Mode::Plain, 50)] {
        // In this test's thread: the second volume's mounts take the place of the first's.
        let volume = Volume::new(Image::Debian);
        let household = Household::of(&volume);
        let mut environment = volume.start_with(mode, &[("IMS_CLOSE_GRACE", "10")]).ready();
        let folder = environment.image_root.join("root/written");
        std::fs::create_dir(&folder).unwrap();
        let seen = if mode == Mode::Jailed { "/root/written".into() } else { folder.display().to_string() };
        // `read -t` on a fifo is a pause without a process of its own.
        let writer = "exec 3<>fifo; while :; do echo a line of $$ >> $1; read -t 0.02 -u 3; done";
        let start = format!(
            "cd {seen} && mkfifo fifo && for i in $(seq {writers}); do \
             setsid nohup bash -c '{writer}' writer $i </dev/null >/dev/null 2>&1 & done"
        );
        environment.says(&start);
        let lines = || look(&folder).iter().map(|file| file.1).sum::<u64>();
        wait_until("all writers", || look(&folder).iter().filter(|file| file.1 > 0).count() == writers);
        wait_until("the session's connection to end", || {
            household.members().iter().filter(|e| e.name == "sshd").count() == 1
        });
        let before = lines();
        wait_until("them to go on writing", || lines() > before);

        let events = Inotify::init(InitFlags::empty()).unwrap();
        events.add_watch(&environment.parent, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO).unwrap();
        let began = Instant::now();
        environment.touch("complete");
        while !events.read_events().unwrap().iter().any(|e| e.name.as_ref().is_some_and(|n| n == "exiting")) {}
        let took = began.elapsed();
        let at_once = look(&folder);
        // Not to wait for something: this is how long it is watched that nothing happens.
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(look(&folder), at_once);
        assert_eq!(environment.end(), 0);
        household.assert_empty();
        println!("{writers} writers, {mode:?}: closed in {} ms", took.as_millis());
        // Nobody has a session, so there is no grace to wait for.
        assert!(took < CLOSE_LIMIT, "{took:?}");
    }
}

/// Of an environment without sessions, whatever runs in it: less than the grace. A machine with nothing else to do takes a thirtieth of it;
/// tests run side by side.
const CLOSE_LIMIT: Duration = Duration::from_secs(8);

/// What an environment holds on to.
#[derive(Debug, PartialEq, Eq)]
struct Holdings {
    /// Descriptors of the entrypoint and of the jail's init.
    descriptors: [usize; 2],
    /// Mounts that they see.
    mounts: [usize; 2],
    /// Processes, as their command lines.
    processes: Vec<String>,
    files: Vec<PathBuf>,
}

impl Holdings {
    fn of(environment: &Environment, household: &Household) -> Self {
        let both = [environment.pid(), environment.jails_init()];
        let count = |text: String| text.lines().count();
        let mut processes: Vec<_> = household.members().iter().map(Entry::command_line).collect();
        processes.sort();
        let folders = [environment.state_directory(), environment.parent.clone()];
        let files =
            |folder: &PathBuf| std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>();
        let mut files: Vec<_> = folders.iter().flat_map(files).chain(environment.changes()).collect();
        files.sort();
        Self {
            descriptors: both.map(|pid| std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()),
            mounts: both.map(|pid| count(std::fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap())),
            processes,
            files,
        }
    }
}

/// In KiB.
fn resident(process: Pid) -> i64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// One session of the kind that is `number`'s turn.
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
fn nothing_is_left_of_many_sessions() {
    let wanted = std::env::var("IMS_SSHD_SOAK").map_or(100, |n| n.parse().expect("IMS_SSHD_SOAK is a number"));
    let volume = Volume::new(Image::Debian);
    let household = Household::of(&volume);
    let mut environment = volume.start(Mode::Jailed).ready();
    for number in 0..5 {
        session(&environment, number);
    }
    let alone = || household.members().iter().filter(|e| e.name == "sshd").count() == 1;
    wait_until("the connections to end", alone);
    let before = Holdings::of(&environment, &household);
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
    wait_until(&format!("the same as before: {before:#?} {:#?}", Holdings::of(&environment, &household)), || {
        Holdings::of(&environment, &household) == before
    });
    println!("before and after: {:?} descriptors, {:?} mounts", before.descriptors, before.mounts);
    for (early, late) in early.into_iter().zip(late) {
        assert!(late - early < 1024);
    }
    assert_eq!(environment.complete(), 0);
    household.assert_empty();
}

#[test]
fn an_sshd_that_dies_again_and_again_ends_the_environment_with_its_last_words() {
    let mut environment = Environment::open(Image::Busybox, Mode::Plain);
    let noted = environment.state_directory().join("sshd");
    let listener = || {
        let text = std::fs::read_to_string(&noted).unwrap_or_default();
        text.split_once(' ').and_then(|(pid, _)| pid.parse().ok()).map(Pid::from_raw)
    };
    let mut killed = None;
    // Started again five times; the sixth death within a minute is one too many.
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
fn the_supervisor_sleeps_until_it_may_make_the_jail_again() {
    let environment = Environment::open(Image::Busybox, Mode::Jailed);
    for times in 1..=3 {
        environment.wait_for_log_times("the jail is made", times);
        kill(environment.jails_init(), Signal::SIGKILL).unwrap();
        environment.wait_for_log_times("the jail's init was killed by SIGKILL", times);
    }
    // The third one is made after a second. Processor time is counted in hundredths of one.
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
fn a_connection_that_outlives_its_sshd_is_not_taken_for_the_next_one() {
    let environment = Environment::open(Image::Busybox, Mode::Plain);
    let master = environment.master();
    // The next sshd finds its port taken, which it notices in the background only.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let config = std::fs::read_to_string(&environment.config).unwrap();
    let port = |port: u16| format!("Port {port}\n");
    let other = config.replace(&port(environment.port), &port(taken.local_addr().unwrap().port()));
    std::fs::write(&environment.config, other).unwrap();
    let noted = std::fs::read_to_string(environment.state_directory().join("sshd")).unwrap();
    kill(Pid::from_raw(noted.split_once(' ').unwrap().0.parse().unwrap()), Signal::SIGKILL).unwrap();
    wait_until("the next sshd's complaint", || environment.log_text().contains("cannot start sshd"));
    assert!(environment.log_text().contains("Address already in use"), "{}", environment.log_text());
    assert_eq!(text(master.ssh().arg("echo open").output().unwrap().stdout), "open\n");
}
