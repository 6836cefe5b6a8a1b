//! The grace period at the close: which commands and clients may finish, and which sessions are hung up at once.

use std::io::Write;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use ims_sshd::sys::process::{Entry, descendants};
use nix::sys::signal::{Signal, kill};
use testbed::*;

#[test]
fn command_without_a_terminal_may_finish_and_its_end_ends_the_grace_period() {
    for mode in MODES {
        let mut environment = Volume::new(Image::Busybox).start_with(mode, &[("IMS_CLOSE_GRACE", "25")]).ready();
        let held = Held::open(&environment);
        environment.touch("complete");
        environment.wait_for_log("closing: sshd accepts no new connections");
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
fn commands_running_after_the_grace_period_are_logged_without_secrets() {
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
        assert!(
            !named.contains("ims-jail-shell"),
            "{mode:?}: the log names the helper instead of the command: {named}"
        );
        assert!(log.contains("killed, since it did not end after SIGTERM"), "{mode:?}: {log}");
        assert!(!log.contains("hidden"), "{mode:?}: a secret in the log:\n{log}");
    }
}

#[test]
fn connection_without_a_session_delays_the_close_for_seconds_only() {
    for mode in MODES {
        let mut environment = Volume::new(Image::Busybox).start_with(mode, &[("IMS_CLOSE_GRACE", "25")]).ready();
        let master = environment.master();
        assert!(master.ssh().arg("true").status().unwrap().success());
        // Dropping the master would end the connection.
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
        // A shell that is named on the command line is a command.
        let (shell, command) = (at_terminal(None), at_terminal(Some("exec sh")));
        wait_until("both to be there", || environment.sessions().len() == 2);
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

/// Writes `input` to a running client and returns its output.
fn feed_running(mut client: Child, input: &[u8]) -> String {
    client.stdin.as_mut().unwrap().write_all(input).unwrap();
    text(client.wait_with_output().unwrap().stdout)
}

#[test]
fn client_between_two_sessions_of_a_task_may_open_the_next_and_an_idle_connection_delays_nothing() {
    for mode in MODES {
        let mut environment = Volume::new(Image::Busybox).start_with(mode, &[("IMS_CLOSE_GRACE", "60")]).ready();
        let idle = environment.master();
        assert!(idle.ssh().arg("true").status().unwrap().success());
        // Dropping the master would end the connection.
        std::mem::forget(idle);
        let master = environment.master();
        let mark = match mode {
            Mode::Jailed => "/tmp/complete".to_owned(),
            Mode::Plain => environment.signal("complete").display().to_string(),
        };
        let say = |line: &str| text(master.ssh().arg(line).output().unwrap().stdout);
        assert_eq!(say(&format!("touch {mark}; echo marked")), "marked\n", "{mode:?}");
        environment.wait_for_log("closing: sshd accepts no new connections");
        // Stand in for a busy or distant client, which takes more than a second from one session to the next.
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
fn long_idle_connection_does_not_delay_the_close() {
    for mode in MODES {
        let mut environment = Volume::new(Image::Busybox).start_with(mode, &[("IMS_CLOSE_GRACE", "60")]).ready();
        let master = environment.master();
        assert!(master.ssh().arg("true").status().unwrap().success());
        std::mem::forget(master);
        // Sleep longer than a client may take from one session to the next.
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
fn client_gets_the_exit_code_even_if_its_sshd_reaps_the_command_late() {
    for mode in MODES {
        let mut environment = Volume::new(Image::Busybox).start_with(mode, &[("IMS_CLOSE_GRACE", "25")]).ready();
        let go = environment.image_root.join("go");
        let seen = if mode == Mode::Jailed { "/go".into() } else { go.display().to_string() };
        let command = format!("echo begun; until [ -e {seen} ]; do sleep 0.02; done; echo finished; exit 7");
        let mut client = environment.ssh(&[]).arg(command).stdout(Stdio::piped()).spawn().unwrap();
        let mut first = [0; 6];
        std::io::Read::read_exact(client.stdout.as_mut().unwrap(), &mut first).unwrap();
        environment.touch("complete");
        environment.wait_for_log("closing: sshd accepts no new connections");
        let entrypoint = environment.pid();
        let of_sshd = || descendants(&Entry::all(), entrypoint).into_iter().filter(|e| e.name.starts_with("sshd"));
        wait_until("the listener to end", || of_sshd().count() == 1);
        let sshd = of_sshd().next().unwrap().pid;
        kill(sshd, Signal::SIGSTOP).unwrap();
        std::fs::write(&go, "").unwrap();
        wait_until("the command to end", || Entry::all().iter().any(|e| e.parent == sshd && e.state == 'Z'));
        // Sleep longer than a connection without a session delays the close.
        std::thread::sleep(Duration::from_millis(500));
        kill(sshd, Signal::SIGCONT).unwrap();
        let output = client.wait_with_output().unwrap();
        assert_eq!((text(output.stdout).as_str(), output.status.code()), ("finished\n", Some(7)), "{mode:?}");
        assert_eq!(environment.end(), 0);
    }
}

#[test]
fn signal_during_the_grace_period_shortens_it() {
    for first in ["complete", "SIGTERM"] {
        let mut environment =
            Volume::new(Image::Busybox).start_with(Mode::Jailed, &[("IMS_CLOSE_GRACE", "25")]).ready();
        let held = Held::open(&environment);
        if first == "complete" {
            environment.touch("complete");
        } else {
            environment.send(Signal::SIGTERM);
        }
        environment.wait_for_log("closing: sshd accepts no new connections");
        let began = Instant::now();
        environment.send(Signal::SIGTERM);
        assert_eq!(environment.end(), 143, "{first}");
        assert!(began.elapsed() < Duration::from_secs(10), "{first}: {:?}", began.elapsed());
        assert!(!held.finish().status.success());
        environment.fails_visibly(143, &["received SIGTERM: closing as failed"]);
    }
}
