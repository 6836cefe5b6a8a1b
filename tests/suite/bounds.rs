//! Resource exhaustion by a session: processes, memory, descriptors, inotify watches. The environment closes
//! nevertheless.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use testbed::*;

/// Script that starts 9000 processes and three that fork without end: one whose children stay, one whose children exit
/// at once, and one that replaces itself all the time. All of them ignore SIGTERM and SIGHUP.
const CROWD: &str = "trap '' TERM HUP\n\
    echo 'trap \"\" TERM HUP; sh $0 & exit' > RUNNER\n\
    i=0; while [ $i -lt 9000 ]; do sleep 7654321 & i=$((i+1)); done >/dev/null 2>&1\n\
    (while :; do sleep 5 & done) >/dev/null 2>&1 &\n\
    (while :; do (:); done) >/dev/null 2>&1 &\n\
    sh RUNNER >/dev/null 2>&1 &\n\
    echo crowded";

#[test]
fn nine_thousand_processes_are_ended_in_time_with_few_log_lines() {
    for mode in MODES {
        // In a control group, as in a pod, the kernel does not share the processors between sessions (sched(7), autogroup).
        let group = ControlGroup::new("cpu", &[]);
        let mut environment = group.start(Volume::new(Image::Busybox), mode, &[("IMS_CLOSE_GRACE", "2")]);
        let runner = match mode {
            Mode::Jailed => "/root/runner".to_owned(),
            Mode::Plain => environment.dir.path().join("runner").display().to_string(),
        };
        assert_eq!(environment.says(&CROWD.replace("RUNNER", &runner)), "crowded");
        assert_eq!(environment.complete(), 0, "{mode:?}: {}", environment.log_text());
        let took = close_took(&environment);
        eprintln!("{mode:?}: {took:?} for the close");
        assert!(took < Duration::from_secs(2 + 5), "{mode:?}: {took:?}");
        assert!(environment.signal("complete").exists());
        assert_eq!(processes_with("sleep 7654321"), [0_u32; 0], "{mode:?}");
        let log = environment.log_text();
        assert!(log.lines().count() < 60, "{mode:?}: {} lines", log.lines().count());
        let told = log.contains("more processes, which did not end after SIGTERM");
        // In plain mode one signal ends the whole process group before its processes are counted.
        assert!(told || mode == Mode::Plain, "{mode:?}: {log}");
    }
}

/// Time from the verdict to the end of the close, as logged.
fn close_took(environment: &Environment) -> Duration {
    let log = environment.log_text();
    let line =
        log.lines().find(|line| line.contains("closing: the image root is released and the verdict recorded")).unwrap();
    Duration::from_millis(line.rsplit_once("milliseconds=").unwrap().1.parse().unwrap())
}

/// Starts the entrypoint by a line of shell.
fn started_through(line: &str, volume: Volume, mode: Mode, further: &[(&str, &str)]) -> Environment {
    let entrypoint = volume.entrypoint(mode, further);
    let mut command = Command::new("sh");
    command.args(["-c", line, "sh"]).arg(entrypoint.get_program()).args(entrypoint.get_args()).env_clear();
    command.envs(entrypoint.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let log = std::fs::File::options().create(true).append(true).open(volume.log()).unwrap();
    let entrypoint = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
    Environment { entrypoint, volume, status: None }.ready()
}

/// A control group (version 1 or 2) whose processes end when it is dropped.
struct ControlGroup(PathBuf);

impl ControlGroup {
    fn new(controller: &str, limits: &[(&str, &str, &str)]) -> Self {
        let first = Path::new("/sys/fs/cgroup").join(controller);
        let (base, is_first) = if first.is_dir() { (first, true) } else { ("/sys/fs/cgroup".into(), false) };
        if !is_first {
            std::fs::write(base.join("cgroup.subtree_control"), format!("+{controller}")).unwrap();
        }
        let group = Self(base.join(format!("ims-sshd-test-{}-{controller}", std::process::id())));
        std::fs::create_dir(&group.0).unwrap();
        for (name_in_first, name, limit) in limits {
            std::fs::write(group.0.join(if is_first { name_in_first } else { name }), limit).unwrap();
        }
        group
    }

    /// Starts the entrypoint in the group.
    fn start(&self, volume: Volume, mode: Mode, further: &[(&str, &str)]) -> Environment {
        let line = format!("echo $$ > '{}' && exec \"$@\"", self.0.join("cgroup.procs").display());
        started_through(&line, volume, mode, further)
    }

    /// Returns whether the group has run out of memory or the kernel has killed a process for that.
    fn has_run_out_of_memory(&self) -> bool {
        ["memory.failcnt", "memory.events"]
            .iter()
            .filter_map(|file| std::fs::read_to_string(self.0.join(file)).ok())
            .any(|text| {
                let count = |line: &str| line.trim_start_matches("oom ").trim().parse::<u64>().is_ok_and(|n| n > 10);
                text.lines().any(count)
            })
    }

    fn processes(&self) -> usize {
        std::fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default().lines().count()
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        wait_until("the processes of a control group to end", || {
            let left = std::fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
            for pid in left.lines().filter_map(|pid| pid.parse().ok()) {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
            }
            std::fs::remove_dir(&self.0).is_ok()
        });
    }
}

#[test]
fn fork_bomb_at_the_limit_of_processes_does_not_keep_the_environment_from_closing() {
    for mode in MODES {
        let group = ControlGroup::new("pids", &[("pids.max", "pids.max", "500")]);
        let mut environment = group.start(Volume::new(Image::Debian), mode, &[("IMS_CLOSE_GRACE", "2")]);
        let mut session = environment.ssh(&[]);
        session.arg("trap '' TERM HUP; b() { b | b & }; b; while :; do b; done").stderr(Stdio::null());
        let mut session = session.spawn().unwrap();
        wait_until("the limit", || group.processes() >= 490);
        environment.touch("complete");
        assert_eq!(environment.end(), 0, "{mode:?}: {}", environment.log_text());
        let took = close_took(&environment);
        eprintln!("{mode:?}: {took:?} for the close, {} processes are left", group.processes());
        assert!(took < Duration::from_secs(2 + 5), "{mode:?}: {took:?}");
        assert!(environment.signal("complete").exists() && environment.signal("exiting").exists());
        assert_eq!(group.processes(), 0, "{mode:?}");
        let _ = session.wait();
    }
}

#[test]
fn memory_exhaustion_does_not_keep_the_environment_from_closing() {
    // Use up memory by large processes, by files in memory, and by many small processes.
    let hogs = [
        "while :; do tail /dev/zero & wait; done",
        // Outside the jail, /dev/shm has the size that the runtime gave it.
        "dd if=/dev/zero of=/dev/shm/full bs=1M COUNT; tail /dev/zero; sleep 1000",
        "i=0; while [ $i -lt 300 ]; do perl -e '$x = \"x\" x 3000000; sleep 1000' & i=$((i+1)); done; wait",
    ];
    for mode in MODES {
        for hog in hogs {
            let limits = [("memory.limit_in_bytes", "memory.max", "200M")];
            let group = ControlGroup::new("memory", &limits);
            let mut environment = group.start(Volume::new(Image::Debian), mode, &[("IMS_CLOSE_GRACE", "2")]);
            if mode == Mode::Jailed {
                let kilobytes = environment.says("df --output=size /dev/shm /run | tail -n 2 | tr -s '\\n ' ' '");
                assert_eq!(kilobytes.trim(), format!("{} {}", 200 * 1024 / 10 * 4, 200 * 1024 / 10));
            }
            let mut session = environment.ssh(&[]);
            let hog = hog.replace("COUNT", if mode == Mode::Plain { "count=64" } else { "" });
            session.arg(format!("trap '' TERM HUP; {hog}")).stderr(Stdio::null());
            let mut session = session.spawn().unwrap();
            wait_until("the memory to be used up", || group.has_run_out_of_memory());
            environment.touch("complete");
            assert_eq!(environment.end(), 0, "{mode:?} {hog}: {}", environment.log_text());
            let took = close_took(&environment);
            eprintln!("{mode:?}: {took:?} for the close");
            assert!(took < Duration::from_secs(2 + 5), "{mode:?} {hog}: {took:?}");
            assert!(environment.signal("complete").exists() && environment.signal("exiting").exists());
            let _ = session.wait();
            // A plain session writes to the test's own /dev/shm.
            let _ = std::fs::remove_file("/dev/shm/full");
        }
    }
}

#[test]
fn descriptor_exhaustion_is_no_verdict() {
    for mode in MODES {
        let volume = Volume::new(Image::Busybox);
        let mark = match mode {
            Mode::Jailed => "/tmp/complete".to_owned(),
            Mode::Plain => volume.signal("complete").display().to_string(),
        };
        let further = [("IMS_CLOSE_GRACE", "20"), ("IMS_IDLE_LIMIT", "60")];
        let mut environment = started_through("ulimit -n 64 && exec \"$@\"", volume, mode, &further);
        let mut sessions: Vec<_> = (0..50)
            .map(|_| {
                let mut session = environment.ssh(&[]);
                session.arg("echo begun; cat; echo finished").stdin(Stdio::piped()).stdout(Stdio::piped());
                session.spawn().unwrap()
            })
            .collect();
        for session in &mut sessions {
            std::io::Read::read_exact(session.stdout.as_mut().unwrap(), &mut [0; 6]).unwrap();
        }
        environment.says(&format!("touch {mark}"));
        wait_until("the close to begin", || {
            environment.log_text().contains("closing: sshd accepts no new connections")
        });
        for session in sessions {
            let output = session.wait_with_output().unwrap();
            assert_eq!((text(output.stdout).as_str(), output.status.code()), ("finished\n", Some(0)), "{mode:?}");
        }
        assert_eq!(environment.end(), 0, "{mode:?}: {}", environment.log_text());
        assert!(environment.signal("complete").exists() && !environment.signal("failed").exists(), "{mode:?}");
        let told = environment.log_text().matches("as many as descriptors allow (ulimit -n)").count();
        assert_eq!(told, usize::from(mode == Mode::Jailed), "{mode:?}: {}", environment.log_text());
    }
}

#[test]
fn environment_without_inotify_instances_polls_marks() {
    // Limit inotify in a user namespace, so that other programs of this machine keep theirs.
    const LINE: &str = "own() { readlink /proc/$1/ns/user; }\n\
        (until [ \"$(own $$)\" != \"$(own self)\" ]; do sleep 0.05; done\n\
        for map in uid_map gid_map; do echo 0 0 4294967295 > /proc/$$/$map; done) &\n\
        exec unshare --user --keep-caps --mount sh -c 'until [ $(id -u) = 0 ]; do sleep 0.05; done\n\
        exec sh -c \"echo 0 > /proc/sys/user/max_inotify_instances && exec \\\"\\$@\\\"\" sh \"$@\"' sh \"$@\"";
    for mode in MODES {
        let mut environment = started_through(LINE, Volume::new(Image::Busybox), mode, &[]);
        let mark = match mode {
            Mode::Jailed => "/tmp/complete".to_owned(),
            Mode::Plain => environment.signal("complete").display().to_string(),
        };
        environment.says(&format!("touch {mark}"));
        assert_eq!(environment.end(), 0, "{mode:?}: {}", environment.log_text());
        assert!(environment.signal("complete").exists());
        let told = environment.log_text().matches("no inotify instance is left for root").count();
        assert_eq!(told, 1, "{mode:?}: {}", environment.log_text());
    }
}
