//! The close, and what must not keep it from coming to a clear end: its order, odd signal files, vanished image roots, full volumes,
//! forgotten environments; and what is told of all that.

use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ims_sshd::sys::process::{Entry, descendants};
use ims_sshd::sys::seqpacket::Packets;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::fs::{AtFlags, Mode as FileMode, OFlags};
use rustix::io::Errno;
use serde_json::Value;
use testbed::*;

/// A process of the test's own, outside the environment; ended with the test.
struct Outsider(Child);

impl Outsider {
    fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).spawn().unwrap())
    }

    /// The signal it died of.
    fn died_of(&mut self) -> Option<i32> {
        let mut status = None;
        wait_until("a process outside to end", || {
            status = self.0.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap().signal()
    }
}

impl Drop for Outsider {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A session that runs until its input is closed, and then says so.
struct Held {
    client: Child,
    input: ChildStdin,
}

impl Held {
    fn open(environment: &Environment) -> Self {
        let mut command = environment.ssh(&[]);
        command.arg("echo begun; cat; echo finished").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut client = command.spawn().unwrap();
        let mut first = [0; 6];
        std::io::Read::read_exact(client.stdout.as_mut().unwrap(), &mut first).unwrap();
        Self { input: client.stdin.take().unwrap(), client }
    }

    fn finish(self) -> Output {
        drop(self.input);
        self.client.wait_with_output().unwrap()
    }
}

fn signal(environment: &Environment, signal: Signal) {
    kill(Pid::from_raw(environment.entrypoint.id().cast_signed()), signal).unwrap();
}

/// Waits until the log holds `text`.
fn logged(environment: &Environment, text: &str) {
    wait_until(&format!("'{text}' in the log:\n{}", environment.log_text()), || environment.log_text().contains(text));
}

/// That the environment ended as failed, whoever looks, and said `words`.
fn failed_visibly(environment: &mut Environment, code: i32, words: &[&str]) {
    assert_eq!(environment.end(), code, "{}", environment.log_text());
    let log = environment.log_text();
    for word in words {
        assert!(log.contains(word), "no '{word}' in the log:\n{log}");
    }
    for name in ["failed", "exiting"] {
        assert!(is_file(&environment.signal(name)), "no '{name}'; the log:\n{log}");
    }
    assert!(!environment.signal("complete").exists(), "a false success; the log:\n{log}");
}

fn is_file(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|m| m.is_file())
}

/// Mounts below `path` that this test and its environments see.
fn mounts_below(path: &Path) -> Vec<String> {
    let below = format!(" {}/", path.display());
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    mounts.lines().filter(|l| l.contains(&below)).map(ToOwned::to_owned).collect()
}

fn mount(arguments: &[&str], at: &Path) {
    succeed(Command::new("mount").args(arguments).arg(at));
}

#[test]
fn the_close_takes_its_steps_in_order_and_logs_each_with_its_time() {
    for mode in MODES {
        let environment = Volume::new(Image::Debian).start_with(mode, &[("IMS_CLOSE_GRACE", "1")]);
        let mut environment = environment.ready();
        let root = environment.image_root.clone();
        // An administrator's own mounts, nested and stacked.
        for (source, below) in [("/proc", "proc"), ("/sys", "sys"), ("/dev", "dev"), ("/dev/pts", "dev/pts")] {
            mount(&["--bind", source], &root.join(below));
        }
        mount(&["-t", "tmpfs", "tmpfs"], &root.join("dev/pts"));
        assert_eq!(mounts_below(&root).len(), 5);
        // Processes that are not the job's, as from `kubectl exec`.
        let mut in_directory = Outsider::start(Command::new("sleep").arg("97001").current_dir(root.join("etc")));
        let mut with_root = Outsider::start(Command::new("chroot").arg(&root).args(["sleep", "97003"]));
        wait_until("the root to be changed", || comm(with_root.0.id()) == "sleep");
        let mut in_jail = (mode == Mode::Jailed).then(|| {
            let init = environment.jails_init().to_string();
            let started = Outsider::start(Command::new("nsenter").args(["-t", &init, "-m", "sleep", "97004"]));
            wait_until("it to have entered", || comm(started.0.id()) == "sleep");
            started
        });
        environment.says("trap '' TERM; setsid nohup sleep 97005 >/dev/null 2>&1 & exit 0");
        let mut at_terminal = environment.ssh(&["-tt"]);
        let at_terminal = at_terminal.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        wait_until("somebody at a terminal", || {
            sessions(&environment).iter().any(|session| session["terminal"] == true)
        });

        let names = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_DELETE;
        let parent = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        parent.add_watch(&environment.parent, names).unwrap();
        assert_eq!(environment.complete(), 0, "{}", environment.log_text());

        let told = text(at_terminal.wait_with_output().unwrap().stdout);
        assert!(told.contains("ims-sshd: the image was marked complete and will be packed"), "{mode:?}: {told}");
        for outsider in [&mut in_directory, &mut with_root] {
            assert!(outsider.0.try_wait().unwrap().is_none(), "{mode:?}: a process that is not the job's was ended");
        }
        if let Some(started) = &mut in_jail {
            assert_eq!(started.died_of(), Some(15), "it is in the jail");
        }
        assert_eq!(processes_with("sleep 97005"), [0_u32; 0]);
        assert_eq!(mounts_below(&root), [""; 0], "{mode:?}");

        let log = environment.log_text();
        let steps = [
            "closing: sshd takes no new connections",
            "closing: people at a terminal were told, and hung up",
            "closing: no process of the job is left",
            "closing: nothing is mounted in the image root",
            "closing: all is on its disk",
            "closing: the image root is released, and marked",
            "closed: 'exiting' created, nothing writes to the image root any more",
        ];
        let mut at = 0;
        for step in steps {
            let found =
                log[at..].find(step).unwrap_or_else(|| panic!("{mode:?}: '{step}' not after the others:\n{log}"));
            at += found + step.len();
            let line = log[at..].lines().next().unwrap();
            assert!(
                !step.starts_with("closing") || line.contains("milliseconds="),
                "{mode:?}: '{step}' without its time"
            );
        }
        let killed = log.lines().find(|l| l.contains("sleep 97005") && l.contains("killed, since it did not end"));
        assert!(killed.is_some_and(|l| l.contains("pid=")), "{mode:?}: who was killed is not named:\n{log}");
        for below in ["proc", "sys", "dev", "dev/pts"] {
            let line = format!("unmounted {}, which somebody had mounted there", root.join(below).display());
            assert_eq!(log.matches(&line).count(), if below == "dev/pts" { 2 } else { 1 }, "{mode:?}: {log}");
        }

        let events = parent.read_events().unwrap();
        let names: Vec<_> = events.iter().map(|e| (e.mask, e.name.clone().unwrap().into_string().unwrap())).collect();
        let exiting = names.iter().position(|(_, name)| name == "exiting").unwrap();
        let before = &names[..exiting];
        assert!(before.iter().any(|(_, name)| name == "complete"), "{names:?}");
        let after: Vec<_> = names[exiting + 1..].iter().filter(|(_, name)| !name.starts_with(".ims-sshd.")).collect();
        assert!(after.is_empty(), "{mode:?}: something happened after 'exiting': {after:?}");
        let left: Vec<_> = std::fs::read_dir(&environment.parent).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(left.iter().all(|n| !n.to_string_lossy().starts_with('.')), "{left:?}");
        assert!(!environment.state_directory().exists());
    }
}

fn comm(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

#[test]
fn what_was_written_is_on_its_disk_before_exiting() {
    let volume = Volume::new(Image::Busybox);
    let trace = volume.dir.path().join("trace");
    let mut command = Command::new("strace");
    command.args(["-f", "-e", "trace=syncfs,openat2,openat", "-o"]).arg(&trace).args([&*IMS_SSHD, "entrypoint"]);
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").envs(volume.variables(Mode::Plain));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(std::fs::File::create(volume.log()).unwrap());
    let mut environment = Environment { entrypoint: command.spawn().unwrap(), volume, status: None }.ready();
    assert_eq!(environment.complete(), 0);
    let trace = std::fs::read_to_string(trace).unwrap();
    let synced = trace.find("syncfs(").unwrap_or_else(|| panic!("no syncfs: {trace}"));
    assert!(trace[synced..].lines().next().unwrap().ends_with("= 0"), "{trace}");
    let exiting = trace.find("\"exiting\", {flags=O_WRONLY|O_CREAT|O_EXCL").unwrap_or_else(|| panic!("{trace}"));
    assert!(synced < exiting);
}

/// Listens outside by an abstract socket, which belongs to the network that sessions share with the container.
struct Collector {
    name: String,
    listener: UnixListener,
}

impl Collector {
    fn listen(name: &str) -> Self {
        let name = format!("{name}-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        Self { listener: UnixListener::bind_addr(&address).unwrap(), name }
    }

    /// Has a session send what `opened` opens.
    fn receive(&self, environment: &Environment, opened: &str) -> OwnedFd {
        have_sent(environment, &self.name, opened);
        let (stream, _) = self.listener.accept().unwrap();
        let (_, mut descriptors) = Packets::from_fd(stream.into()).receive_with().unwrap().unwrap();
        descriptors.pop().unwrap()
    }
}

/// Has a session send what `opened` opens to whoever listens at the abstract socket `name`.
fn have_sent(environment: &Environment, name: &str, opened: &str) {
    let send = format!(
        "import os, socket\n\
             s = socket.socket(socket.AF_UNIX); s.connect('\\0{}')\n\
             socket.send_fds(s, [b'x'], [{opened}])\n",
        name
    );
    let output = feed(environment.ssh(&[]).arg("python3"), send.as_bytes());
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn an_image_that_somebody_outside_can_still_write_to_is_failed() {
    for tier in ["namespace", "user"] {
        let variables = [("IMS_JAIL_TIER", tier), ("IMS_CLOSE_GRACE", "1")];
        let mut environment = Volume::new(Image::Debian).start_with(Mode::Jailed, &variables).ready();
        let collector = Collector::listen(&format!("kept-{tier}"));
        let kept = collector.receive(&environment, "os.open('/root/kept', os.O_WRONLY | os.O_CREAT)");
        let code = environment.complete();
        rustix::io::write(&kept, b"late").unwrap();
        let holder = format!("process {} (", std::process::id());
        assert_eq!(code, 1, "{tier}: {}", environment.log_text());
        assert!(environment.signal("failed").exists() && environment.signal("exiting").exists(), "{tier}");
        assert!(!environment.signal("complete").exists(), "{tier}");
        let log = environment.log_text();
        for words in [&holder, "outside the jail has a file of it open for writing", "end that process"] {
            assert!(log.contains(words), "{tier}: {words}: {log}");
        }
    }
}

/// Receives a file by an abstract socket and has nothing left of it but a mapping.
const MAPS: &str = "import ctypes, os, socket, sys\n\
    s = socket.socket(socket.AF_UNIX); s.bind('\\0' + sys.argv[1]); s.listen(); print('listens', flush=True)\n\
    _, (file,), _, _ = socket.recv_fds(s.accept()[0], 1, 1)\n\
    mmap = ctypes.CDLL(None).mmap; mmap.restype = ctypes.c_void_p\n\
    assert mmap(None, ctypes.c_size_t(4096), 3, 1, file, ctypes.c_long(0)) != ctypes.c_void_p(-1).value\n\
    os.close(file); print('maps', flush=True); sys.stdin.read()\n";

#[test]
fn an_image_with_a_file_that_is_mapped_outside_or_in_a_sockets_queue_is_failed_and_the_log_tells_why() {
    let open = "os.open('/root/kept', os.O_RDWR | os.O_CREAT)";
    let mut environment = Volume::new(Image::Debian).start_with(Mode::Jailed, &[("IMS_CLOSE_GRACE", "1")]).ready();
    let collector = Collector::listen("queued");
    have_sent(&environment, &collector.name, open);
    assert_eq!(environment.complete(), 1, "{}", environment.log_text());
    let log = environment.log_text();
    assert!(log.contains("somebody outside the jail has a file of it open for writing"), "{log}");
    assert!(log.contains("the queue of a socket"), "{log}");

    let mut environment = Volume::new(Image::Debian).start_with(Mode::Jailed, &[("IMS_CLOSE_GRACE", "1")]).ready();
    let name = format!("mapped-{}", std::process::id());
    let mut python = Command::new("python3");
    python.args(["-c", MAPS, &name]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut maps = Ended(python.spawn().unwrap());
    let mut said = std::io::BufRead::lines(std::io::BufReader::new(maps.stdout.take().unwrap()));
    assert_eq!(said.next().unwrap().unwrap(), "listens");
    have_sent(&environment, &name, open);
    assert_eq!(said.next().unwrap().unwrap(), "maps");
    assert_eq!(environment.complete(), 1, "{}", environment.log_text());
    let log = environment.log_text();
    let holder = format!("process {} (", maps.id());
    assert!(log.contains(&holder) && log.contains("outside the jail has a file of it mapped"), "{log}");
}

#[test]
fn what_a_session_has_sent_outside_may_be_closed_during_the_grace_and_opens_nothing_for_writing_after_it() {
    for tier in ["namespace", "user"] {
        let variables = [("IMS_JAIL_TIER", tier), ("IMS_CLOSE_GRACE", "25")];
        let mut environment = Volume::new(Image::Debian).start_with(Mode::Jailed, &variables).ready();
        let collector = Collector::listen(&format!("closed-{tier}"));
        let file = collector.receive(&environment, "os.open('/root/file', os.O_RDWR | os.O_CREAT)");
        let directory = collector.receive(&environment, "os.open('/root', os.O_RDONLY)");
        let root = collector.receive(&environment, "os.open('/', os.O_PATH)");
        let read = collector.receive(&environment, "os.open('/root/file', os.O_RDONLY)");
        environment.touch("complete");
        logged(&environment, "waiting for it to close the file");
        rustix::io::write(&file, b"in time").unwrap();
        drop(file);
        assert_eq!(environment.end(), 0, "{tier}: {}", environment.log_text());
        assert!(environment.signal("complete").exists(), "{tier}");
        assert_eq!(std::fs::read_to_string(environment.image_root.join("root/file")).unwrap(), "in time");
        let flags = OFlags::WRONLY | OFlags::CREATE;
        let refused = |result: rustix::io::Result<OwnedFd>| assert_eq!(result.unwrap_err(), Errno::ROFS, "{tier}");
        refused(rustix::fs::openat(&directory, "file", flags, FileMode::RUSR));
        refused(rustix::fs::openat(&directory, "new", flags, FileMode::RUSR));
        refused(rustix::fs::openat(&root, "root/new", flags, FileMode::RUSR));
        let again = format!("/proc/self/fd/{}", read.as_raw_fd());
        refused(rustix::fs::open(again, OFlags::WRONLY, FileMode::empty()));
        assert_eq!(rustix::fs::fchmod(&read, FileMode::RWXU), Err(Errno::ROFS), "{tier}");
        assert_eq!(rustix::fs::unlinkat(&directory, "file", AtFlags::empty()), Err(Errno::ROFS), "{tier}");
    }
}

#[test]
fn a_jail_is_not_made_anew_while_somebody_outside_can_write_through_the_old_one() {
    let mut environment = Environment::open(Image::Debian, Mode::Jailed);
    let collector = Collector::listen("renewed");
    let kept = collector.receive(&environment, "os.open('/root/kept', os.O_WRONLY | os.O_CREAT)");
    kill(environment.jails_init(), Signal::SIGKILL).unwrap();
    logged(&environment, "waiting for it to close the file");
    drop(kept);
    wait_until("the next jail", || environment.run("true").status.success());
    assert_eq!(environment.complete(), 0, "{}", environment.log_text());
}

#[test]
fn a_session_without_a_terminal_gets_the_grace_which_ends_with_it() {
    for mode in MODES {
        let mut environment = Volume::new(Image::Busybox).start_with(mode, &[("IMS_CLOSE_GRACE", "25")]).ready();
        let held = Held::open(&environment);
        environment.touch("complete");
        logged(&environment, "closing: sshd takes no new connections");
        assert!(environment.entrypoint.try_wait().unwrap().is_none(), "{mode:?}");
        let began = Instant::now();
        let output = held.finish();
        assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("finished\n", Some(0)), "{mode:?}");
        assert_eq!(environment.end(), 0);
        assert!(began.elapsed() < Duration::from_secs(10), "{mode:?}: {:?} after the last session", began.elapsed());
        eprintln!("{mode:?}: {:?} from the end of the last session to the end", began.elapsed());
        assert!(!environment.log_text().contains("still running when the grace period ended"));
    }
}

#[test]
fn when_the_grace_is_over_who_still_runs_is_named_without_secrets() {
    for mode in MODES {
        let mut environment = Volume::new(Image::Busybox).start_with(mode, &[("IMS_CLOSE_GRACE", "1")]).ready();
        let mut command = environment.ssh(&[]);
        let script = "echo begun; trap '' TERM; PASSWORD=hidden1 sh -c 'while :; do sleep 1; done' --token hidden2 x";
        let mut client = command.arg(script).stdout(Stdio::piped()).spawn().unwrap();
        std::io::Read::read_exact(client.stdout.as_mut().unwrap(), &mut [0; 6]).unwrap();
        assert_eq!(environment.complete(), 0, "{mode:?}");
        client.wait().unwrap();
        let log = environment.log_text();
        let named = log.lines().find(|line| line.contains("still running when the grace period ended")).expect(&log);
        assert!(named.contains("while :"), "{mode:?}: {named}");
        assert!(!named.contains("ims-jail-shell"), "{mode:?}: that is no program of the user: {named}");
        assert!(log.contains("killed, since it did not end after SIGTERM"), "{mode:?}: {log}");
        assert!(!log.contains("hidden"), "{mode:?}: a secret in the log:\n{log}");
    }
}

#[test]
fn a_connection_without_a_session_holds_the_close_for_a_moment_only() {
    for mode in MODES {
        let mut environment = Volume::new(Image::Busybox).start_with(mode, &[("IMS_CLOSE_GRACE", "25")]).ready();
        let master = environment.master();
        assert!(master.ssh().arg("true").status().unwrap().success());
        // The master's socket, and not the connection, is what its end would take away.
        std::mem::forget(master);
        let began = Instant::now();
        assert_eq!(environment.complete(), 0, "{mode:?}");
        assert!(began.elapsed() < Duration::from_secs(10), "{mode:?}: {:?}", began.elapsed());
        eprintln!("{mode:?}: {:?} for a close with a kept connection", began.elapsed());
    }
}

#[test]
fn command_on_a_terminal_may_finish_while_an_interactive_shell_is_hung_up() {
    for (mode, tier) in [(Mode::Jailed, "namespace"), (Mode::Jailed, "chroot"), (Mode::Plain, "")] {
        let further = [("IMS_CLOSE_GRACE", "25"), ("IMS_JAIL_TIER", tier)];
        let mut environment = Volume::new(Image::Busybox).start_with(mode, &further).ready();
        let mark = match mode {
            Mode::Jailed => "/tmp/complete".to_owned(),
            Mode::Plain => environment.signal("complete").display().to_string(),
        };
        let at_terminal = |command: Option<&str>| {
            let mut session = environment.ssh(&["-tt"]);
            session.args(command).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
        };
        // The name of a shell is a command too.
        let (shell, command) = (at_terminal(None), at_terminal(Some("exec sh")));
        wait_until("both to be there", || sessions(&environment).len() == 2);
        let output = environment.ssh(&["-tt"]).arg(format!("touch {mark}; sleep 1; echo done; exit 7")).output();
        let output = output.unwrap();
        assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("done\r\n", Some(7)), "{mode:?} {tier}");
        let told = text(shell.wait_with_output().unwrap().stdout);
        assert!(told.contains("this session ends now, running commands have 25 s"), "{mode:?} {tier}: {told}");
        assert!(environment.entrypoint.try_wait().unwrap().is_none(), "{mode:?} {tier}: a command still runs");
        let output = feed_running(command, b"echo $((6*7)); exit\n");
        assert!(output.contains("42\r\n") && !output.contains("ims-sshd:"), "{mode:?} {tier}: {output}");
        assert_eq!(environment.end(), 0, "{}", environment.log_text());
        assert!(environment.signal("complete").exists());
    }
}

/// Output of a client that is given `input`.
fn feed_running(mut client: Child, input: &[u8]) -> String {
    client.stdin.as_mut().unwrap().write_all(input).unwrap();
    text(client.wait_with_output().unwrap().stdout)
}

#[test]
fn client_between_two_sessions_of_a_task_may_open_the_next_and_an_idle_connection_holds_nothing_up() {
    for mode in MODES {
        let mut environment = Volume::new(Image::Busybox).start_with(mode, &[("IMS_CLOSE_GRACE", "60")]).ready();
        let idle = environment.master();
        assert!(idle.ssh().arg("true").status().unwrap().success());
        // The master's socket, and not the connection, is what its end would take away.
        std::mem::forget(idle);
        let master = environment.master();
        let mark = match mode {
            Mode::Jailed => "/tmp/complete".to_owned(),
            Mode::Plain => environment.signal("complete").display().to_string(),
        };
        let say = |line: &str| text(master.ssh().arg(line).output().unwrap().stdout);
        assert_eq!(say(&format!("touch {mark}; echo marked")), "marked\n", "{mode:?}");
        logged(&environment, "closing: sshd takes no new connections");
        // A second and more from one session to the next, twice: as a client does that is busy or far away.
        for _ in 0..2 {
            std::thread::sleep(Duration::from_millis(1500));
            assert_eq!(say("echo still here"), "still here\n", "{mode:?}");
        }
        drop(master);
        let began = Instant::now();
        assert_eq!(environment.end(), 0, "{mode:?}");
        // The environment waits only for the time that the idle connection's own session gives it, not for the whole
        // minute of grace.
        assert!(began.elapsed() < Duration::from_secs(15), "{mode:?}: {:?}", began.elapsed());
    }
}

#[test]
fn long_idle_connection_does_not_hold_the_close_at_all() {
    for mode in MODES {
        let mut environment = Volume::new(Image::Busybox).start_with(mode, &[("IMS_CLOSE_GRACE", "60")]).ready();
        let master = environment.master();
        assert!(master.ssh().arg("true").status().unwrap().success());
        std::mem::forget(master);
        // Longer than a client may take from one session to the next.
        std::thread::sleep(Duration::from_millis(7500));
        assert_eq!(environment.complete(), 0, "{mode:?}");
        let log = environment.log_text();
        let line = log.lines().find(|line| line.contains("no process of the job is left")).unwrap();
        let took: u64 = line.rsplit_once("milliseconds=").unwrap().1.parse().unwrap();
        eprintln!("{mode:?}: {took} ms for a close with an idle connection");
        assert!(took < 1000, "{mode:?}: {took} ms");
    }
}

#[test]
fn a_client_hears_how_its_command_ended_however_late_its_sshd_does() {
    for mode in MODES {
        let mut environment = Volume::new(Image::Busybox).start_with(mode, &[("IMS_CLOSE_GRACE", "25")]).ready();
        let go = environment.image_root.join("go");
        let seen = if mode == Mode::Jailed { "/go".into() } else { go.display().to_string() };
        let command = format!("echo begun; until [ -e {seen} ]; do sleep 0.02; done; echo finished; exit 7");
        let mut client = environment.ssh(&[]).arg(command).stdout(Stdio::piped()).spawn().unwrap();
        let mut first = [0; 6];
        std::io::Read::read_exact(client.stdout.as_mut().unwrap(), &mut first).unwrap();
        environment.touch("complete");
        logged(&environment, "closing: sshd takes no new connections");
        let entrypoint = Pid::from_raw(environment.entrypoint.id().cast_signed());
        let of_sshd = || descendants(&Entry::all(), entrypoint).into_iter().filter(|e| e.name.starts_with("sshd"));
        wait_until("the listener to end", || of_sshd().count() == 1);
        let sshd = of_sshd().next().unwrap().pid;
        kill(sshd, Signal::SIGSTOP).unwrap();
        std::fs::write(&go, "").unwrap();
        wait_until("the command to end", || Entry::all().iter().any(|e| e.parent == sshd && e.state == 'Z'));
        // Not to wait for something: longer than a connection without a session holds the close.
        std::thread::sleep(Duration::from_millis(500));
        kill(sshd, Signal::SIGCONT).unwrap();
        let output = client.wait_with_output().unwrap();
        assert_eq!((text(output.stdout).as_str(), output.status.code()), ("finished\n", Some(7)), "{mode:?}");
        assert_eq!(environment.end(), 0);
    }
}

#[test]
fn a_signal_during_the_grace_shortens_it() {
    for first in ["complete", "SIGTERM"] {
        let mut environment =
            Volume::new(Image::Busybox).start_with(Mode::Jailed, &[("IMS_CLOSE_GRACE", "25")]).ready();
        let held = Held::open(&environment);
        if first == "complete" {
            environment.touch("complete");
        } else {
            signal(&environment, Signal::SIGTERM);
        }
        logged(&environment, "closing: sshd takes no new connections");
        let began = Instant::now();
        signal(&environment, Signal::SIGTERM);
        assert_eq!(environment.end(), 143, "{first}");
        assert!(began.elapsed() < Duration::from_secs(10), "{first}: {:?}", began.elapsed());
        assert!(!held.finish().status.success());
        failed_visibly(&mut environment, 143, &["received SIGTERM: closing as failed"]);
    }
}

#[test]
fn an_image_root_that_vanishes_or_is_replaced_or_becomes_read_only_fails_the_environment() {
    type Case<'a> = (&'a dyn Fn(&Environment), &'a str);
    let vanish = |environment: &Environment| {
        std::fs::rename(&environment.image_root, environment.parent.join("elsewhere")).unwrap();
    };
    let replace = |environment: &Environment| {
        std::fs::rename(&environment.image_root, environment.parent.join("elsewhere")).unwrap();
        std::fs::create_dir(&environment.image_root).unwrap();
    };
    let read_only = |environment: &Environment| mount(&["-o", "remount,bind,ro"], &environment.image_root);
    let cases: [Case; 3] = [
        (&vanish, "has vanished, or another folder stands in its place: closing as failed"),
        (&replace, "has vanished, or another folder stands in its place: closing as failed"),
        (&read_only, "has become read-only: closing as failed"),
    ];
    for (fault, word) in cases {
        for mode in MODES {
            let volume = Volume::new(Image::Busybox);
            if word.contains("read-only") {
                let root = volume.image_root.display().to_string();
                mount(&["--bind", &root], &volume.image_root);
            }
            let mut environment = volume.start(mode).ready();
            fault(&environment);
            let began = Instant::now();
            failed_visibly(&mut environment, 1, &[word]);
            assert!(began.elapsed() < Duration::from_secs(10), "{mode:?} {word}: {:?}", began.elapsed());
        }
    }
}

/// A volume of its own for the image root parent, as an emptyDir with a limit.
fn limited(options: &str) -> Volume {
    let volume = Volume::new(Image::Busybox);
    mount(&["-t", "tmpfs", "-o", options, "tmpfs"], &volume.parent);
    std::fs::create_dir(&volume.image_root).unwrap();
    succeed(Command::new("cp").arg("-aT").arg(cache().join("busybox")).arg(&volume.image_root));
    volume
}

/// Takes what the file system at `folder` has left: files until no more can be made, and bytes until no more can be written.
fn fill(folder: &Path) {
    let mut files: Vec<std::fs::File> = Vec::new();
    while let Ok(file) = std::fs::File::create(folder.join(format!("fill.{}", files.len()))) {
        files.push(file);
    }
    if let Some(last) = files.last_mut() {
        while last.write_all(&[1; 4096]).is_ok() {}
    }
    assert!(std::fs::File::create(folder.join("one more")).is_err());
}

#[test]
fn a_verdict_that_cannot_be_written_in_the_jail_is_never_a_success() {
    let mut environment = limited("size=8m,nr_inodes=120").start(Mode::Jailed).ready();
    fill(&environment.image_root.join("root"));
    let mark = environment.run("touch /tmp/complete");
    assert_eq!(mark.status.code(), Some(1), "{mark:?}");
    assert!(text(&mark.stderr).contains("No space left on device"), "{mark:?}");
    failed_visibly(
        &mut environment,
        1,
        &["is full and no session is open: make space, or it is given up", "is still full: closing as failed"],
    );
    assert!(environment.image_root.join("tmp/failed").exists());
}

#[test]
fn space_that_was_made_in_time_saves_the_environment() {
    let mut environment = limited("size=8m,nr_inodes=120").start(Mode::Jailed).ready();
    fill(&environment.image_root.join("root"));
    logged(&environment, "is full and no session is open");
    environment.says("rm -f /root/fill*; touch /tmp/complete");
    assert_eq!(environment.end(), 0, "{}", environment.log_text());
    assert!(environment.signal("complete").exists());
}

#[test]
fn a_full_volume_takes_failed_and_exiting_all_the_same() {
    for mode in MODES {
        let mut environment = limited("size=8m,nr_inodes=120").start(mode).ready();
        fill(&environment.image_root.join("root"));
        signal(&environment, Signal::SIGTERM);
        failed_visibly(&mut environment, 143, &["received SIGTERM"]);
        assert_eq!(environment.image_root.join("tmp/failed").exists(), mode == Mode::Jailed);
        let left: Vec<_> = std::fs::read_dir(&environment.parent).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(left.iter().all(|n| !n.to_string_lossy().starts_with('.')), "{left:?}");
    }
}

#[test]
fn a_mark_from_the_jail_is_told_on_a_full_volume() {
    let mut environment = limited("size=8m,nr_inodes=120").start(Mode::Jailed).ready();
    let root = environment.image_root.join("root");
    fill(&root);
    std::fs::remove_file(root.join("fill.0")).unwrap();
    environment.says("touch /tmp/complete");
    assert_eq!(environment.end(), 0, "{}", environment.log_text());
    assert!(environment.signal("complete").exists() && environment.signal("exiting").exists());
}

/// A disk of its own, with as few inodes as ext4 lets it have; gone when it is unmounted.
fn disk() -> Volume {
    let volume = Volume::new(Image::Busybox);
    let disk = volume.dir.path().join("disk");
    std::fs::File::create(&disk).unwrap().set_len(8 << 20).unwrap();
    succeed(Command::new("mkfs.ext4").args(["-q", "-N", "128", "-O", "^has_journal", "-m", "0"]).arg(&disk));
    mount(&["-o", "loop", &disk.display().to_string()], &volume.parent);
    std::fs::create_dir(&volume.image_root).unwrap();
    succeed(Command::new("cp").arg("-aT").arg(cache().join("busybox")).arg(&volume.image_root));
    volume
}

#[test]
fn a_disk_that_is_full_before_the_environment_opens_is_told_too() {
    for mode in MODES {
        let volume = disk();
        volume.touch("ready");
        fill(&volume.image_root.join("root"));
        let mut environment = volume.start(mode);
        failed_visibly(
            &mut environment,
            1,
            &["/.ims-sshd.reserve-1: No space left on device", "the volume has to be writable and to have space"],
        );
        assert_eq!(environment.image_root.join("tmp/failed").exists(), mode == Mode::Jailed);
    }
}

#[test]
fn a_volume_that_becomes_read_only_ends_the_environment_with_a_word_in_the_log() {
    let mut environment = limited("size=8m").start(Mode::Jailed).ready();
    mount(&["-o", "remount,ro"], &environment.parent);
    assert_eq!(environment.end(), 1);
    let log = environment.log_text();
    assert!(log.contains("has become read-only") && log.contains("/failed: Read-only file system"), "{log}");
    assert!(!environment.signal("exiting").exists() && !environment.signal("complete").exists());
}

#[test]
fn a_full_run_or_a_full_folder_of_sshds_configuration_fails_the_environment() {
    type Case<'a> = (&'a str, &'a str, &'a dyn Fn(&mut Volume));
    let run = |volume: &mut Volume| {
        std::fs::create_dir_all("/run/ims-sshd").unwrap();
        mount(&["-t", "tmpfs", "-o", "nr_inodes=2", "tmpfs"], Path::new("/run/ims-sshd"));
        let _ = volume;
    };
    let config = |volume: &mut Volume| {
        let folder = volume.dir.path().join("etc");
        std::fs::create_dir(&folder).unwrap();
        mount(&["-t", "tmpfs", "-o", "size=64k,mode=755", "tmpfs"], &folder);
        std::fs::copy(&volume.config, folder.join("sshd_config")).unwrap();
        volume.config = folder.join("sshd_config");
        fill(&folder);
    };
    let cases: [Case; 2] = [
        ("cannot make the folder", "trial: No space left on device", &run),
        ("cannot write", "sshd_config: No space left on device", &config),
    ];
    for (attempted, reason, full) in cases {
        let mut volume = Volume::new(Image::Busybox);
        full(&mut volume);
        volume.touch("ready");
        let before = std::fs::read(&volume.config).unwrap();
        let mut environment = volume.start(Mode::Jailed);
        failed_visibly(&mut environment, 1, &[attempted, reason]);
        assert_eq!(std::fs::read(&environment.config).unwrap(), before, "half a configuration");
        assert!(environment.image_root.join("tmp/failed").exists());
        for place in [Path::new("/run/ims-sshd"), &environment.dir.path().join("etc")] {
            let _ = Command::new("umount").arg("--lazy").arg(place).stderr(Stdio::null()).status();
        }
    }
}

#[test]
fn marks_that_stand_beside_ready_close_at_once() {
    for (marks, verdict) in
        [(&["complete"][..], "complete"), (&["failed"], "failed"), (&["complete", "failed"], "failed")]
    {
        for mode in MODES {
            let volume = Volume::new(Image::Busybox);
            volume.touch("ready");
            for mark in marks {
                volume.touch(mark);
            }
            let mut environment = volume.start(mode);
            assert_eq!(environment.end(), 0, "{}", environment.log_text());
            for name in ["complete", "failed"] {
                assert_eq!(environment.signal(name).exists(), name == verdict, "{marks:?}");
            }
            assert!(is_file(&environment.signal("exiting")));
        }
    }
}

/// An upstream sidecar removes such marks before `ready`; a person may not.
#[test]
fn marks_older_than_ready_are_an_earlier_jobs_and_are_removed_with_a_word() {
    for mode in MODES {
        let volume = Volume::new(Image::Busybox);
        volume.touch("complete");
        volume.touch("failed");
        // Longer than a tick of the clock that files have their times of.
        std::thread::sleep(Duration::from_millis(50));
        volume.touch("ready");
        let environment = volume.start(mode).ready();
        for name in ["complete", "failed"] {
            logged(&environment, &format!("removed '{name}', which is older than 'ready'"));
            assert!(!environment.signal(name).exists());
        }
    }
}

#[test]
fn a_sidecar_of_an_earlier_pod_closes_no_new_environment() {
    let hour_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
    let here = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    for (host, made, counts) in [
        ("another", hour_ago, false),
        ("another", hour_ago + Duration::from_secs(3500), true),
        (here.trim(), hour_ago, true),
    ] {
        let volume = Volume::new(Image::Busybox);
        let mark = volume.parent.join("failed");
        std::fs::write(&mark, format!("by the sidecar on {host}, instead of 'ready'\n")).unwrap();
        std::fs::File::open(&mark).unwrap().set_modified(made).unwrap();
        let mut environment = volume.start(Mode::Plain);
        if counts {
            assert_eq!(environment.end(), 0, "{}", environment.log_text());
            continue;
        }
        logged(&environment, "removed 'failed' of an earlier pod: the sidecar on another made it at ");
        drop(environment.ready());
    }
}

#[test]
fn an_environment_that_waits_beside_an_earlier_runs_files_is_shown_as_waiting_and_can_be_given_up() {
    let volume = Volume::new(Image::Busybox);
    for name in ["complete", "exiting"] {
        volume.touch(name);
    }
    let mut environment = volume.start(Mode::Jailed);
    logged(&environment, "waiting for 'ready'");
    let said = status(&environment, &[]);
    assert!(said.contains(": waiting") && !said.contains("marked"), "{said}");
    let mark = |verdict: &str| Command::new(&IMS_SSHD).arg(verdict).arg(&environment.parent).output().unwrap();
    let refused = text(&mark("complete").stderr).to_owned();
    assert!(refused.contains("it waits for 'ready'"), "{refused}");
    assert!(mark("fail").status.success());
    assert_eq!(environment.end(), 0, "{}", environment.log_text());
    assert!(environment.signal("failed").exists() && environment.signal("exiting").exists());
}

#[test]
fn a_parent_that_does_not_come_is_refused_with_its_name() {
    let volume = Volume::new(Image::Busybox);
    std::fs::rename(&volume.parent, volume.dir.path().join("elsewhere")).unwrap();
    let mut environment = volume.start(Mode::Jailed);
    logged(&environment, "does not exist: it is waited for 30 s");
    std::thread::sleep(Duration::from_secs(29));
    assert_eq!(environment.end(), 1);
    let place = environment.parent.display();
    logged(
        &environment,
        &format!("cannot open the image root parent {place}: it does not exist after 30 s; mount the volume"),
    );
}

/// What can have a signal file's name and is none.
const ODD: [&str; 6] = ["a folder", "a full folder", "a link", "a dangling link", "a fifo", "a socket"];

fn make_odd(kind: &str, at: &Path, outside: &Path) {
    match kind {
        "a folder" => std::fs::create_dir(at).unwrap(),
        "a full folder" => {
            std::fs::create_dir(at).unwrap();
            std::fs::write(at.join("content"), "").unwrap();
        }
        "a link" => symlink(outside.join("target"), at).unwrap(),
        "a dangling link" => symlink(outside.join("nothing"), at).unwrap(),
        "a fifo" => nix::unistd::mkfifo(at, nix::sys::stat::Mode::S_IRUSR).unwrap(),
        _ => drop(UnixListener::bind(at).unwrap()),
    }
}

#[test]
fn what_is_no_signal_file_hangs_nothing_and_is_no_success() {
    let one_after_another = |mode: Mode| {
        for (at, kind) in ODD.into_iter().enumerate() {
            for name in ["ready", "complete", "failed", "exiting"] {
                // Before the environment opens, and for the marks also while it is open.
                let late = matches!(name, "complete" | "failed") && at % 2 == usize::from(mode == Mode::Plain);
                let volume = Volume::new(Image::Busybox);
                let outside = volume.dir.path().join("outside");
                std::fs::create_dir(&outside).unwrap();
                std::fs::write(outside.join("target"), "text").unwrap();
                let odd = volume.signal(name);
                let mut environment = if late {
                    let environment = volume.start(mode).ready();
                    make_odd(kind, &odd, &outside);
                    environment
                } else {
                    make_odd(kind, &odd, &outside);
                    if name != "ready" {
                        volume.touch("ready");
                    }
                    volume.start(mode)
                };
                let code = i32::from(matches!(name, "ready" | "exiting"));
                let word = format!("cannot take {} as a signal file: it is ", odd.display());
                failed_visibly(&mut environment, code, &[&word]);
                assert_eq!(std::fs::read(outside.join("target")).unwrap(), b"text", "{kind} {name}");
                assert!(!outside.join("nothing").exists(), "{kind} {name}: something was made behind a link");
                assert_eq!(environment.image_root.join("tmp/failed").exists(), mode == Mode::Jailed);
            }
        }
    };
    std::thread::scope(|scope| {
        for thread in MODES.map(|mode| scope.spawn(move || one_after_another(mode))) {
            thread.join().unwrap();
        }
    });
}

#[test]
fn what_is_no_regular_file_is_no_mark_in_the_jail_and_stays_there_unless_it_is_an_empty_directory() {
    let odd = [
        ("mkdir /tmp/complete /tmp/failed", 0, false),
        ("mkdir /tmp/failed", 0, false),
        // Nothing could open it again.
        ("mkdir -p /tmp/complete/full", 1, true),
        ("touch /tmp/other; ln -s other /tmp/complete; ln -s nothing /tmp/failed", 0, true),
    ];
    for (number, (make, code, stays)) in odd.into_iter().enumerate() {
        let volume = Volume::new(Image::Busybox);
        let made = |text: &str| {
            succeed(Command::new("sh").args(["-c", &text.replace("/tmp", "tmp")]).current_dir(&volume.image_root))
        };
        made("mkdir -p /tmp");
        if number == 0 {
            // This one came with the image.
            made(make);
        }
        let mut environment = volume.start(Mode::Jailed).ready();
        if number > 0 {
            environment.says(make);
        }
        // The init has looked, and looks again for what is one.
        environment.says("touch /tmp/other2");
        assert!(environment.entrypoint.try_wait().unwrap().is_none());
        assert_eq!(environment.complete(), code, "{make}: {}", environment.log_text());
        assert_eq!(environment.signal("complete").exists(), code == 0, "{make}");
        assert_eq!(environment.signal("failed").exists(), code != 0, "{make}");
        let stayed = environment.image_root.join("tmp/complete").symlink_metadata().is_ok();
        assert_eq!(stayed, stays, "{make}: {}", environment.log_text());
    }
}

#[test]
fn a_tmp_that_cannot_be_looked_into_fails_the_image_with_one_clear_word() {
    let mut environment = Environment::open(Image::Busybox, Mode::Jailed);
    environment.says("rm -rf /tmp; ln -s tmp /tmp");
    let code = environment.complete();
    let log = environment.log_text();
    assert!(environment.signal("failed").exists() && environment.signal("exiting").exists(), "{code}: {log}");
    let word = "look for /tmp/failed in the image: Too many levels of symbolic links";
    assert_eq!(log.matches(word).count(), 1, "{log}");
    assert!(!log.contains("marked failed while closing"), "{log}");
}

#[test]
fn what_was_put_aside_before_does_not_keep_exiting_from_being_told() {
    let volume = Volume::new(Image::Busybox);
    for name in ["complete", "complete.folder"] {
        std::fs::create_dir_all(volume.signal(name).join("content")).unwrap();
    }
    volume.touch("ready");
    failed_visibly(&mut volume.start(Mode::Plain), 0, &["as a signal file: it is a directory"]);
}

#[test]
fn what_a_killed_entrypoint_left_is_found_told_and_cleared() {
    for mode in MODES {
        let volume = Volume::new(Image::Busybox);
        let clean = std::fs::read_to_string(&volume.config).unwrap();
        let stale = format!("Include /run/ims-sshd/gone/sshd.conf # ims-sshd\n{clean}");
        std::fs::write(&volume.config, stale).unwrap();
        for name in ["sshd_listening", ".ims-sshd.reserve-1", ".ims-sshd.reserve-3"] {
            volume.touch(name);
        }
        std::fs::write(volume.signal(".ims-sshd.additions"), "folder proc\nfolder dev\n").unwrap();
        std::fs::create_dir(volume.image_root.join("proc")).unwrap();
        // The record of a jail whose init is no more: this number belongs to somebody else now.
        let mut somebody = Outsider::start(Command::new("sleep").arg("97010"));
        let folder = ims_sshd::volume::state_directory::StateFolder::place(&volume.parent);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("jail"), format!("tier namespace\ninit {} 1\n", somebody.0.id())).unwrap();
        std::fs::write(folder.join("sshd"), format!("{} 1\n", somebody.0.id())).unwrap();
        std::fs::write(folder.join("control"), "").unwrap();

        let mut environment = volume.start(mode).ready();
        logged(&environment, "the environment is open");
        assert_eq!(environment.says("echo open"), "open");
        let log = environment.log_text();
        let found = log.lines().find(|l| l.contains("cleaned up after an environment that was killed here:"));
        let found = found.unwrap_or_else(|| panic!("{mode:?}: {log}"));
        for word in [
            "the record of its jail",
            "what it had added to the image",
            "'sshd_listening'",
            "its line in sshd's configuration",
        ] {
            assert!(found.contains(word), "{mode:?}: no '{word}' in '{found}'");
        }
        assert!(somebody.0.try_wait().unwrap().is_none(), "a process that has nothing to do with it was ended");
        assert_eq!(environment.complete(), 0);
        assert_eq!(std::fs::read_to_string(&environment.config).unwrap(), clean);
        assert!(!environment.image_root.join("proc").exists() && !folder.exists());
        let left: Vec<_> = std::fs::read_dir(&environment.parent).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(left.iter().all(|n| !n.to_string_lossy().starts_with('.')), "{left:?}");
        drop(somebody);
    }
}

#[test]
fn nobody_for_too_long_closes_as_failed_but_who_comes_now_and_then_is_somebody() {
    let limit = [("IMS_IDLE_LIMIT", "4"), ("IMS_CLOSE_GRACE", "0")];
    let reason = "no session for 4 s (IMS_IDLE_LIMIT): closing as failed";
    let in_mode = |mode: Mode| {
        let mut environment = Volume::new(Image::Busybox).start_with(mode, &limit).ready();
        assert_eq!(environment.says("sleep 5; echo still here"), "still here", "{mode:?}");
        if mode == Mode::Jailed {
            // Each over before anybody looks.
            let coming = Instant::now();
            while coming.elapsed() < Duration::from_millis(5500) {
                environment.says("sleep 0.01");
            }
        }
        assert!(!environment.log_text().contains(reason));
        let quiet = Instant::now();
        failed_visibly(&mut environment, 0, &[reason]);
        assert!(quiet.elapsed() < Duration::from_secs(20), "{:?}", quiet.elapsed());
    };
    let with_script = || {
        let volume = Volume::new(Image::Busybox);
        let script = volume.dir.path().join("script");
        std::fs::write(&script, "sleep 5; echo still here\n").unwrap();
        let script = script.display().to_string();
        let variables = [limit[0], limit[1], ("CUSTOMIZATION_SCRIPT", script.as_str())];
        let mut environment = volume.start_with(Mode::Plain, &variables).ready();
        failed_visibly(&mut environment, 0, &["customization script: still here", reason]);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| in_mode(Mode::Jailed));
        scope.spawn(|| in_mode(Mode::Plain));
        scope.spawn(with_script);
    });
}

#[test]
fn an_environment_that_is_open_for_too_long_warns_and_closes_as_failed() {
    for mode in MODES {
        let mut environment = Volume::new(Image::Busybox).start_with(mode, &[("IMS_SESSION_LIMIT", "4")]).ready();
        let mut terminal = environment.ssh(&["-tt"]);
        let terminal = terminal.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        failed_visibly(&mut environment, 0, &["open for 4 s (IMS_SESSION_LIMIT): closing as failed"]);
        let told = text(terminal.wait_with_output().unwrap().stdout);
        let warned = told.find("ims-sshd: this environment closes as failed in ").unwrap_or_else(|| panic!("{told}"));
        let closed = told.find("was marked failed and will not be packed").unwrap_or_else(|| panic!("{told}"));
        assert!(warned < closed, "{told}");
    }
}

/// A FUSE file system over `backing`, served by a process of this test: what is written into `backing` raises no event in it.
struct Mirrored {
    place: PathBuf,
    daemon: Outsider,
}

impl Mirrored {
    fn over(volume: &Volume) -> (Self, PathBuf) {
        let backing = volume.dir.path().join("backing");
        std::fs::rename(&volume.parent, &backing).unwrap();
        std::fs::create_dir(&volume.parent).unwrap();
        let mut command = Command::new("bindfs");
        command.args(["-f", "-o", "dev,suid"]).arg(&backing).arg(&volume.parent);
        let daemon = Outsider::start(&mut command);
        wait_until("bindfs", || volume.image_root.exists());
        (Self { place: volume.parent.clone(), daemon }, backing)
    }
}

impl Drop for Mirrored {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.place).stderr(Stdio::null()).status();
        let _ = self.daemon.0.kill();
    }
}

#[test]
fn signal_files_are_seen_in_time_where_no_event_tells_of_them() {
    for (mode, mark) in [(Mode::Jailed, "complete"), (Mode::Plain, "complete"), (Mode::Plain, "failed")] {
        let volume = Volume::new(Image::Busybox);
        let (mirrored, backing) = Mirrored::over(&volume);
        let mut environment = volume.start_with(mode, &[("LOG_LEVEL", "debug")]);
        logged(&environment, "waiting for 'ready'");
        let seen = |what: &str, word: &str, environment: &Environment| {
            // Away from the moment at which the environment looks anyway.
            std::thread::sleep(Duration::from_millis(300));
            let began = Instant::now();
            std::fs::write(backing.join(what), "").unwrap();
            logged(environment, word);
            let took = began.elapsed();
            assert!(took < Duration::from_secs(3), "{mode:?}: '{what}' was seen after {took:?}");
            eprintln!("{mode:?}: '{what}' seen after {took:?} without an event");
        };
        seen("ready", "state=Preparing", &environment);
        environment.wait_for("sshd_listening");
        assert_eq!(environment.says("echo open"), "open");
        seen(mark, "marked in the image root parent", &environment);
        assert_eq!(environment.end(), 0, "{}", environment.log_text());
        assert!(backing.join(mark).exists() && backing.join("exiting").exists());
        drop(environment);
        drop(mirrored);
    }
}

#[test]
fn a_volume_that_cannot_rename_without_replacing_takes_all_signal_files() {
    let volume = Volume::new(Image::Busybox);
    let (mirrored, backing) = Mirrored::over(&volume);
    std::fs::create_dir(backing.join("complete")).unwrap();
    symlink("nowhere", backing.join("failed")).unwrap();
    std::fs::write(backing.join("ready"), "").unwrap();
    let mut environment = volume.start(Mode::Jailed);
    failed_visibly(&mut environment, 0, &["as a signal file: it is a symbolic link"]);
    drop(environment);
    drop(mirrored);
}

fn status(environment: &Environment, arguments: &[&str]) -> String {
    succeed(Command::new(&IMS_SSHD).arg("status").args(arguments).arg(&environment.parent))
}

fn sessions(environment: &Environment) -> Vec<Value> {
    let report: Value = serde_json::from_str(&status(environment, &["--json"])).unwrap();
    report["sessions"].as_array().cloned().unwrap_or_default()
}

#[test]
fn the_status_tells_who_is_there_and_the_log_who_came_and_went() {
    for mode in MODES {
        let before = std::time::SystemTime::now() - Duration::from_secs(1);
        let mut environment = Environment::open(Image::Debian, mode);
        let held = Held::open(&environment);
        let mut terminal = environment.ssh(&["-tt"]);
        let terminal = terminal.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        wait_until("both to be seen", || sessions(&environment).len() == 2);

        let report: Value = serde_json::from_str(&status(&environment, &["--json"])).unwrap();
        let time = |value: &Value| {
            let time = humantime::parse_rfc3339(value.as_str().unwrap()).unwrap();
            assert!(time >= before && time <= std::time::SystemTime::now(), "{value}");
        };
        assert_eq!(report["state"], "serving");
        time(&report["since"]);
        assert_eq!(report["tier"], if mode == Mode::Jailed { "namespace" } else { "plain" });
        assert_eq!(report["image_root_parent"], environment.parent.display().to_string());
        assert_eq!((&report["job"], &report["verdict"]), (&"5ec3b0a1-job".into(), &Value::Null));
        let printed = succeed(Command::new("ssh-keygen").arg("-lf").arg(environment.key.with_extension("pub")));
        let fingerprint = printed.split_whitespace().nth(1).unwrap();
        for session in sessions(&environment) {
            assert_eq!(session["client"], "127.0.0.1", "{mode:?}: {session}");
            assert_eq!(session["key"], fingerprint, "{mode:?}: {session}");
            time(&session["since"]);
            let request = session["request"].as_str().unwrap();
            let wanted = match (session["terminal"].as_bool().unwrap(), mode) {
                (true, Mode::Jailed) => "shell",
                (true, Mode::Plain) => "-bash",
                (false, _) => "echo begun; cat; echo finished",
            };
            assert!(request.trim_end_matches('\'').ends_with(wanted), "{mode:?}: {session}");
        }
        let words = status(&environment, &[]);
        assert!(words.starts_with(&format!("{}: serving since ", environment.parent.display())), "{words}");
        assert_eq!(words.lines().filter(|l| l.starts_with("  127.0.0.1  since ")).count(), 2, "{words}");

        assert!(held.finish().status.success());
        if mode == Mode::Jailed {
            environment.run("exit 7");
            environment.run("kill -KILL $$");
        }
        assert_eq!(environment.complete(), 0);
        terminal.wait_with_output().unwrap();
        let log = environment.log_text();
        let begun = |request: &str| {
            let line = log.lines().find(|l| l.contains("session begins") && l.contains(request));
            let line = line.unwrap_or_else(|| panic!("{mode:?}: no beginning of '{request}':\n{log}"));
            assert!(line.contains(r#"client="127.0.0.1""#) && line.contains(fingerprint), "{line}");
        };
        begun("echo begun; cat; echo finished");
        begun("terminal=true");
        let ends: Vec<_> = log.lines().filter(|l| l.contains("session ended")).collect();
        assert!(ends.iter().all(|l| l.contains("seconds=") && l.contains("pid=")), "{ends:?}");
        let how: &[&str] = if mode == Mode::Jailed {
            &["exit=0 ", "exit=7 ", "signal=\"SIGKILL\"", "signal=\"SIGHUP\""]
        } else {
            &["client=\"127.0.0.1\" seconds="; 2]
        };
        assert_eq!(ends.len(), how.len(), "each session that began has ended; {mode:?}:\n{log}");
        for how in how {
            assert!(ends.iter().any(|l| l.contains(how)), "{mode:?}: no {how} in {ends:?}");
        }
    }
}

#[test]
fn the_status_of_an_environment_in_another_container_is_what_its_signal_files_tell() {
    let mut environment = Environment::open(Image::Busybox, Mode::Plain);
    let elsewhere = || {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", "mount -t tmpfs tmpfs /run/ims-sshd && exec \"$@\"", "sh", &*IMS_SSHD]);
        let printed = succeed(command.args(["status", "--json"]).arg(&environment.parent));
        serde_json::from_str::<Value>(&printed).unwrap()
    };
    let parent = environment.parent.display().to_string();
    assert_eq!(elsewhere(), serde_json::json!({"image_root_parent": parent, "state": "serving", "verdict": null}));
    environment.complete();
    let ended = || {
        let printed = status(&environment, &["--json"]);
        serde_json::from_str::<Value>(&printed).unwrap()
    };
    assert_eq!(ended(), serde_json::json!({"image_root_parent": parent, "state": "done", "verdict": "complete"}));
}

#[test]
fn the_log_has_the_format_and_the_level_that_were_asked_for() {
    for (level, has, lacks) in [
        ("debug", &["DEBUG", "INFO"][..], &[][..]),
        ("", &["INFO"], &["DEBUG"]),
        ("warning", &["WARN"], &["DEBUG", "INFO"]),
        ("ERROR", &[], &["DEBUG", "INFO", "WARN"]),
    ] {
        let volume = Volume::new(Image::Busybox);
        let mut command = volume.entrypoint(Mode::Plain, &[("LOG_LEVEL", level)]);
        volume.touch(".ims-sshd.additions");
        // The option comes before the variable.
        let entrypoint = match level {
            "debug" => command.env("LOG_FORMAT", "text").args(["--log-format", "json"]).spawn().unwrap(),
            _ => command.env("LOG_FORMAT", "JSON").spawn().unwrap(),
        };
        let mut environment = Environment { entrypoint, volume, status: None }.ready();
        environment.says("true");
        assert_eq!(environment.complete(), 0);
        let lines: Vec<Value> = environment
            .log_text()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}")))
            .collect();
        for line in &lines {
            let object = line.as_object().unwrap();
            assert!(["timestamp", "level", "message"].iter().all(|key| object.contains_key(*key)), "{line}");
            humantime::parse_rfc3339(line["timestamp"].as_str().unwrap()).unwrap();
        }
        let numbers = ["pid", "milliseconds", "seconds", "exit", "port", "count", "bytes"];
        let numbers = lines.iter().flat_map(|line| numbers.iter().filter_map(|name| line.get(*name)));
        assert!(numbers.clone().all(Value::is_number), "{lines:?}");
        assert!(level != "debug" || numbers.count() > 5, "{lines:?}");
        let at = |level: &str| lines.iter().any(|line| line["level"] == level);
        assert!(has.iter().all(|level| at(level)) && !lacks.iter().any(|level| at(level)), "{level}: {lines:?}");
    }
}

#[test]
fn a_newline_in_a_name_forges_no_line_and_steers_no_terminal() {
    const HOSTILE: &str = "x\n2026-01-01T00:00:00Z  INFO forged\r\x1b[2K\u{2028}\u{202e}";
    let escaped = |shown: &str, what: &str| {
        assert!(shown.contains(r"x\n2026") && shown.contains("INFO forged"), "{what}: {shown}");
        assert!(!shown.contains(['\r', '\x1b', '\u{2028}', '\u{202e}']), "{what}: {shown:?}");
        assert!(!shown.lines().any(|line| line.starts_with("2026-01-01T")), "{what}: {shown}");
    };
    for mode in MODES {
        let mut environment = Environment::open(Image::Busybox, mode);
        let mut session = environment.ssh(&[]);
        session.arg(format!("cat; : '{HOSTILE}'")).stdin(Stdio::piped()).stdout(Stdio::null());
        let session = session.spawn().unwrap();
        wait_until("the session to be seen", || sessions(&environment).len() == 1);
        let shown = status(&environment, &[]);
        escaped(&shown, "status");
        assert_eq!(shown.lines().count(), 2, "{shown}");
        assert!(!status(&environment, &["--json"]).contains(['\x1b', '\u{2028}', '\u{202e}']));
        assert!(sessions(&environment)[0]["request"].as_str().unwrap().contains(HOSTILE));
        session.wait_with_output().unwrap();
        assert_eq!(environment.complete(), 0);
        escaped(&environment.log_text(), "log");
    }
    let volume = Volume::new(Image::Busybox);
    std::fs::create_dir_all(volume.image_root.join("boot")).unwrap();
    std::fs::write(volume.image_root.join("boot").join(HOSTILE), "").unwrap();
    for arguments in [&["enter", "--", HOSTILE][..], &["package", "--kernel", "nonesuch"]] {
        let (command, options) = arguments.split_first().unwrap();
        let output = Command::new(&IMS_SSHD).arg(command).arg(&volume.image_root).args(options).output().unwrap();
        assert!(!output.status.success());
        escaped(&text(output.stderr), command);
    }
}

#[test]
fn no_secret_is_ever_in_the_log() {
    let commands = [
        "PASSWORD=hidden01 true",
        "true --token hidden02 --user me",
        "true --token\thidden03",
        "PASSWORD='hidden04 and hidden05' true",
        "true \"--api-key=hidden06 hidden07\"",
        "true -H 'Authorization: Bearer hidden08' x",
        "export AWS_SECRET_ACCESS_KEY=hidden09\nS3_ACCESS_KEY=hidden10",
        "true https://me:hidden11@example.org/",
        "echo root:hidden12 | true chpasswd",
        "DB_PASS=hidden13 true --pass hidden14 --password=hidden15",
        "true; : mysql -phidden16; : curl -u me:hidden17 'https://s3/b?X-Amz-Credential=hidden18&X-Amz-Signature=hidden19'",
    ];
    for mode in MODES {
        let volume = Volume::new(Image::Busybox);
        let script = volume.dir.path().join("script");
        std::fs::write(
            &script,
            "set -x\nPASSWORD=hidden20\ntrue --token hidden21\n\
             printf -- '-----BEGIN RSA PRIVATE KEY-----\\nhidden22\\n-----END RSA PRIVATE KEY-----\\n'\n",
        )
        .unwrap();
        let script = script.display().to_string();
        let variables = [
            ("S3_ACCESS_KEY", "hidden30"),
            ("S3_SECRET_KEY", "hidden31"),
            ("LOG_LEVEL", "debug"),
            ("CUSTOMIZATION_SCRIPT", script.as_str()),
        ];
        let mut environment = volume.start_with(mode, &variables).ready();
        let session = |command| {
            let mut session = environment.ssh(&[]);
            session.arg(format!("{command}; cat; :")).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
            session.spawn().unwrap()
        };
        let clients = commands.map(session);
        wait_until("all to be seen", || sessions(&environment).len() == commands.len());
        let seen = status(&environment, &["--json"]);
        assert!(!seen.contains("hidden"), "{mode:?}: {seen}");
        for client in clients {
            client.wait_with_output().unwrap();
        }
        logged(&environment, " has ended");
        assert_eq!(environment.complete(), 0);
        let log = environment.log_text();
        assert_eq!(log.matches("session begins").count(), commands.len(), "{mode:?}: {log}");
        assert!(log.contains("--user me") && log.contains("***"), "{log}");
        let shown: Vec<_> = log.lines().filter(|l| l.contains("hidden") || l.contains("PRIVATE KEY")).collect();
        assert!(shown.is_empty(), "{mode:?}: {shown:#?}");
    }
}
