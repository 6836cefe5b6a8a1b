//! The order of steps at the close, image roots that are removed under an open environment, and cleanup after a killed
//! one.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use testbed::*;

/// Starts a process of the test itself, outside the environment.
fn outsider(command: &mut Command) -> Ended {
    Ended::killed(command.stdin(Stdio::null()).spawn().unwrap())
}

/// Waits for a process outside to end, and returns the signal that ended it.
fn died_of(process: &mut Ended) -> Option<i32> {
    let mut status = None;
    wait_until("a process outside to end", || {
        status = process.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap().signal()
}

/// Mounts below `path` in the mount namespace of this test and its environments.
fn mounts_below(path: &Path) -> Vec<String> {
    let below = format!(" {}/", path.display());
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    mounts.lines().filter(|l| l.contains(&below)).map(ToOwned::to_owned).collect()
}

#[test]
fn close_takes_its_steps_in_order_and_logs_each_with_its_time() {
    for mode in MODES {
        let environment = Volume::new(Image::Debian).start_with(mode, &[("IMS_CLOSE_GRACE", "1")]);
        let mut environment = environment.ready();
        let root = environment.image_root.clone();
        // Stand in for an administrator's own mounts, nested and stacked.
        for (source, below) in [("/proc", "proc"), ("/sys", "sys"), ("/dev", "dev"), ("/dev/pts", "dev/pts")] {
            mount(&["--bind", source], &root.join(below));
        }
        mount(&["-t", "tmpfs", "tmpfs"], &root.join("dev/pts"));
        assert_eq!(mounts_below(&root).len(), 5);
        // Start processes that do not belong to the job, as `kubectl exec` does.
        let mut in_directory = outsider(Command::new("sleep").arg("97001").current_dir(root.join("etc")));
        let mut with_root = outsider(Command::new("chroot").arg(&root).args(["sleep", "97003"]));
        wait_until("the root to be changed", || comm(with_root.id()) == "sleep");
        let mut in_jail = (mode == Mode::Jailed).then(|| {
            let init = environment.jails_init().to_string();
            let started = outsider(Command::new("nsenter").args(["-t", &init, "-m", "sleep", "97004"]));
            wait_until("nsenter to enter the jail", || comm(started.id()) == "sleep");
            started
        });
        environment.says("trap '' TERM; setsid nohup sleep 97005 >/dev/null 2>&1 & exit 0");
        let mut at_terminal = environment.ssh(&["-tt"]);
        let at_terminal = at_terminal.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        wait_until("the session on a terminal", || {
            environment.sessions().iter().any(|session| session["terminal"] == true)
        });

        let names = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_DELETE;
        let parent = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        parent.add_watch(&environment.parent, names).unwrap();
        assert_eq!(environment.complete(), 0, "{}", environment.log_text());

        let told = text(at_terminal.wait_with_output().unwrap().stdout);
        assert!(told.contains("ims-sshd: the image was marked complete and will be packed"), "{mode:?}: {told}");
        for outsider in [&mut in_directory, &mut with_root] {
            assert!(
                outsider.try_wait().unwrap().is_none(),
                "{mode:?}: a process that does not belong to the job was ended"
            );
        }
        if let Some(started) = &mut in_jail {
            assert_eq!(died_of(started), Some(15), "a process in the jail was not ended");
        }
        assert_eq!(processes_with("sleep 97005"), [0_u32; 0]);
        assert_eq!(mounts_below(&root), [""; 0], "{mode:?}");

        let log = environment.log_text();
        let steps = [
            "closing: sshd accepts no new connections",
            "closing: interactive shells were notified and hung up",
            "closing: no process of the job is left",
            "closing: nothing is mounted in the image root",
            "closing: the image root is synced to disk",
            "closing: the image root is released and the verdict recorded",
            "closed: 'exiting' created, nothing writes to the image root any more",
        ];
        let mut at = 0;
        for step in steps {
            let found =
                log[at..].find(step).unwrap_or_else(|| panic!("{mode:?}: '{step}' is missing or too early:\n{log}"));
            at += found + step.len();
            let line = log[at..].lines().next().unwrap();
            assert!(
                !step.starts_with("closing") || line.contains("milliseconds="),
                "{mode:?}: '{step}' without its time"
            );
        }
        let killed = log.lines().find(|l| l.contains("sleep 97005") && l.contains("killed, since it did not end"));
        assert!(killed.is_some_and(|l| l.contains("pid=")), "{mode:?}: the killed process is not named:\n{log}");
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
fn image_root_is_synced_before_exiting_is_created() {
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

#[test]
fn image_root_that_is_removed_replaced_or_remounted_read_only_fails_the_environment() {
    type Case<'a> = (&'a dyn Fn(&Environment), &'a str);
    let remove = |environment: &Environment| {
        std::fs::rename(&environment.image_root, environment.parent.join("elsewhere")).unwrap();
    };
    let replace = |environment: &Environment| {
        std::fs::rename(&environment.image_root, environment.parent.join("elsewhere")).unwrap();
        std::fs::create_dir(&environment.image_root).unwrap();
    };
    let read_only = |environment: &Environment| mount(&["-o", "remount,bind,ro"], &environment.image_root);
    let cases: [Case; 3] = [
        (&remove, "was removed or replaced by another directory: closing as failed"),
        (&replace, "was removed or replaced by another directory: closing as failed"),
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
            environment.fails_visibly(1, &[word]);
            assert!(began.elapsed() < Duration::from_secs(10), "{mode:?} {word}: {:?}", began.elapsed());
        }
    }
}

#[test]
fn leftovers_of_a_killed_entrypoint_are_logged_and_removed() {
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
        // Leave records of a jail and an sshd that have ended and whose PID another process has now.
        let mut other = outsider(Command::new("sleep").arg("97010"));
        let state = ims_sshd::volume::state_directory::StateDirectory::place(&volume.parent);
        std::fs::create_dir_all(&state).unwrap();
        std::fs::write(state.join("jail"), format!("tier namespace\ninit {} 1\n", other.id())).unwrap();
        std::fs::write(state.join("sshd"), format!("{} 1\n", other.id())).unwrap();
        std::fs::write(state.join("control"), "").unwrap();

        let mut environment = volume.start(mode).ready();
        environment.wait_for_log("the environment is open");
        assert_eq!(environment.says("echo open"), "open");
        let log = environment.log_text();
        let found = log.lines().find(|l| l.contains("cleaned up after an environment that was killed here:"));
        let found = found.unwrap_or_else(|| panic!("{mode:?}: {log}"));
        for word in [
            "the record of its jail",
            "its additions to the image",
            "'sshd_listening'",
            "its line in sshd's configuration",
        ] {
            assert!(found.contains(word), "{mode:?}: no '{word}' in '{found}'");
        }
        assert!(other.try_wait().unwrap().is_none(), "an unrelated process was ended");
        assert_eq!(environment.complete(), 0);
        assert_eq!(std::fs::read_to_string(&environment.config).unwrap(), clean);
        assert!(!environment.image_root.join("proc").exists() && !state.exists());
        let left: Vec<_> = std::fs::read_dir(&environment.parent).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(left.iter().all(|n| !n.to_string_lossy().starts_with('.')), "{left:?}");
        drop(other);
    }
}
