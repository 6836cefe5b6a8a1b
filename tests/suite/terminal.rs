//! Sessions at a terminal, through a real pty around the real `ssh`. A jailed session must behave like a plain one on
//! the same sshd.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use ims_sshd::sys::process::{Entry, descendants};
use testbed::*;

/// Complaints of shells and programs about their terminal.
pub const COMPLAINTS: [&str; 5] =
    ["job control", "not a tty", "cannot set terminal", "nappropriate ioctl", "can't access tty"];

/// Shows the signals that a program started in a shell inherits as blocked.
const BLOCKED_SIGNALS: &str = "grep SigBlk /proc/self/status";

/// All processes of the environment.
fn everything(environment: &Environment) -> Vec<Pid> {
    let entrypoint = environment.pid();
    let mut pids: Vec<Pid> =
        descendants(&Entry::all(), entrypoint).iter().filter(|e| e.state != 'Z').map(|e| e.pid).collect();
    pids.sort();
    pids
}

fn open_both() -> [Environment; 2] {
    MODES.map(|mode| Environment::open(Image::Debian, mode))
}

fn set_root_shell(volume: &Volume, shell: &str) {
    std::fs::write(volume.image_root.join("etc/passwd"), format!("root:x:0:0:root:/root:{shell}\n")).unwrap();
}

#[track_caller]
pub fn assert_no_complaint(screen: &str) {
    for complaint in COMPLAINTS {
        assert!(!screen.contains(complaint), "'{complaint}' in:\n{screen}");
    }
}

#[test]
fn jailed_terminal_works_in_every_respect() {
    for environment in open_both() {
        let mut terminal = Terminal::at_a_shell(&environment);
        let tty = terminal.ask("tty");
        assert!(tty.strip_prefix("/dev/pts/").is_some_and(|n| n.parse::<u32>().is_ok()), "{tty}");
        let all = "test -c $(tty) && test -t 0 && test -t 1 && test -t 2 && : >/dev/tty && : <$(tty)";
        assert_eq!(terminal.ask(&format!("{all} && echo all")), "all");
        assert_eq!(terminal.ask("ps -o tty= -p $$"), tty.trim_start_matches("/dev/"));
        assert_eq!(terminal.ask("(echo to the terminal >/dev/tty) >/dev/null 2>&1"), "to the terminal");
        let python = "import os; m, s = os.openpty(); print(os.path.exists(os.ttyname(s)), os.isatty(s))";
        assert_eq!(terminal.ask(&format!("python3 -c '{python}'")), "True True");
        let inner = terminal.ask("script -qec tty /dev/null");
        assert!(inner.starts_with("/dev/pts/") && inner != tty, "{inner} in {tty}");
        assert_eq!(terminal.ask("echo $TERM"), "xterm");
        assert_eq!(terminal.ask("stty size"), "31 200");

        assert_eq!(terminal.ask(BLOCKED_SIGNALS), "SigBlk:\t0000000000000000");
        terminal
            .line(&format!("trap 'echo \"now \"$(stty size)' WINCH; sleep {} & wait; kill $!", long(&environment, 0)));
        wait_until("the shell to wait", || !sleeping(&long(&environment, 0)).is_empty());
        terminal.resize(45, 123);
        terminal.see("now 45 123\r\n");
        terminal.see(PROMPT);
        terminal.ask("wait");
        assert_eq!(terminal.ask("stty size"), "45 123");
        terminal.line("exit");
        let (code, screen) = terminal.end();
        assert_eq!(code, 0);
        assert_no_complaint(&screen);
    }
}

#[test]
fn a_command_has_a_terminal_only_if_the_client_asks_for_one() {
    let ttys = "tty; for fd in 0 1 2; do test -t $fd && echo $fd; done; true";
    for environment in open_both() {
        let (code, screen) = Terminal::running(&environment, ttys).end();
        assert_eq!(code, 0, "{screen}");
        assert!(screen.starts_with("/dev/pts/") && screen.ends_with("\r\n0\r\n1\r\n2\r\n"), "{screen:?}");
        let without = environment.ssh(&["-T"]).arg(ttys).output().unwrap();
        assert_eq!((text(without.stdout), text(without.stderr)), ("not a tty\n".to_owned(), String::new()));
        // In a shell without a terminal, a person sees its output and nothing else.
        let shell = feed(&mut environment.ssh(&["-T"]), b"tty\nexit 4\n");
        assert_eq!(shell.status.code(), Some(4));
        assert_eq!(text(shell.stderr), "");
        assert_eq!(text(shell.stdout).lines().last(), Some("not a tty"));

        let mut command = environment.ssh(&["-tt", "-o", "SendEnv=LANG"]);
        command.env("LANG", "C.UTF-8").arg("echo $TERM $LANG $(stty size)");
        assert_eq!(Terminal::with(&command).end().1, "xterm C.UTF-8 31 200\r\n");
    }
}

#[test]
fn greeting_is_shown_to_interactive_shells_only() {
    for (image, name) in [(Image::Debian, "-bash"), (Image::Busybox, "-sh")] {
        let environment = Environment::open(image, Mode::Jailed);
        if image == Image::Busybox {
            std::fs::write(environment.image_root.join("etc/motd"), "image of the tests\n").unwrap();
        }
        let mut terminal = Terminal::at_a_shell(&environment);
        let greeting = terminal.screen.clone();
        let lines: Vec<&str> = greeting.lines().map(str::trim_end).take(3).collect();
        assert_eq!(lines[0], "image of the tests");
        assert!(lines[1].contains("image root of IMS job 5ec3b0a1-job"), "{greeting}");
        assert!(lines[1].ends_with("touch /tmp/complete") && lines[2].ends_with("touch /tmp/failed"), "{greeting}");
        assert_eq!(greeting.matches("image of the tests").count(), 1);
        assert_eq!(terminal.ask("echo $0"), name);
        if image == Image::Debian {
            assert_eq!(terminal.ask("shopt -q login_shell && echo login"), "login");
        }
        assert_eq!(terminal.ask("pwd; echo $HOME $USER $LOGNAME"), "/root\n/root root root");
        // The shell leads its session, so a program that replaces it ends as it should.
        terminal.line("exec sh -c 'exit 3'");
        assert_eq!(terminal.end().0, 3);

        assert_eq!(Terminal::running(&environment, "echo only").end().1, "only\r\n");
        assert_eq!(text(feed(&mut environment.ssh(&["-T"]), b"echo only\n").stdout), "only\n");

        std::fs::write(environment.image_root.join("root/.hushlogin"), "").unwrap();
        let hushed = Terminal::at_a_shell(&environment);
        assert!(!hushed.is_shown("image of the tests") && !hushed.is_shown("/tmp/complete"), "{}", hushed.screen);
    }
}

#[test]
fn shells_have_job_control_and_no_complaint() {
    let [jailed, plain] = open_both();
    let busybox = Environment::open(Image::Busybox, Mode::Jailed);
    controls_jobs(&jailed, "bash");
    controls_jobs(&plain, "bash");
    set_root_shell(&jailed, "/bin/dash");
    controls_jobs(&jailed, "dash");
    controls_jobs(&busybox, "busybox");
    controls_jobs(&Environment::open(Image::DebianArm64, Mode::Jailed), "bash");
}

fn controls_jobs(environment: &Environment, shell: &str) {
    let mut terminal = Terminal::at_a_shell(environment);
    let seconds = long(environment, if shell == "dash" { 1 } else { 2 });
    let sleep = format!("sleep {seconds}");

    terminal.line(&sleep);
    wait_in_front(&seconds);
    terminal.key('z');
    terminal.see("Stopped");
    terminal.see(PROMPT);
    let jobs = terminal.ask("jobs");
    assert!(jobs.contains("Stopped") && jobs.contains(&sleep), "{shell}: {jobs}");
    terminal.ask("bg");
    let jobs = terminal.ask("jobs");
    assert!(jobs.contains("Running") && jobs.contains(&sleep), "{shell}: {jobs}");
    terminal.line("fg");
    wait_in_front(&seconds);
    terminal.key('c');
    terminal.see(PROMPT);
    assert_eq!(terminal.status(), "130", "{shell}");
    assert!(sleeping(&seconds).is_empty());

    terminal.line(&sleep);
    wait_in_front(&seconds);
    terminal.key('\\');
    terminal.see(PROMPT);
    assert_eq!(terminal.status(), "131", "{shell}");

    terminal.keys("half a command");
    terminal.key('c');
    terminal.see(PROMPT);
    assert_eq!(terminal.ask("echo still here"), "still here");

    terminal.line("echo \"ready \"now; cat");
    terminal.see("ready now\r\n");
    terminal.line("a line");
    // Once as typed, once as printed.
    terminal.see("a line\r\n");
    terminal.see("a line\r\n");
    terminal.key('d');
    terminal.see(PROMPT);

    // A pipeline is one job: its processes share a group, which gets the terminal.
    terminal.line(&format!("{sleep} | cat"));
    wait_in_front(&seconds);
    terminal.key('c');
    terminal.see(PROMPT);
    assert_eq!(terminal.ask("kill 0; echo survived it"), "survived it", "{shell}");

    terminal.key('d');
    let (_, screen) = terminal.end();
    assert_no_complaint(&screen);
}

#[test]
fn control_keys_act_on_a_command_as_in_plain_mode() {
    let by = |key: char| {
        open_both().map(|environment| {
            let seconds = long(&environment, 3);
            let mut terminal = Terminal::running(&environment, &format!("sleep {seconds}"));
            wait_in_front(&seconds);
            terminal.key(key);
            let end = terminal.end();
            wait_until("the command to be gone", || sleeping(&seconds).is_empty());
            end
        })
    };
    for key in ['c', '\\'] {
        let [jailed, plain] = by(key);
        assert_eq!(jailed, plain, "{key}");
        assert_ne!(plain.0, 0);
    }
}

const ONE_TO_BE_STOPPED: &str = "echo \"here \"we are; cat; exit 6";

fn goes_on_after_the_stop_key(mut terminal: Terminal) {
    terminal.see("here we are\r\n");
    terminal.key('z');
    terminal.see("^Z");
    terminal.line("a line");
    terminal.see("a line\r\n");
    terminal.see("a line\r\n");
    terminal.key('d');
    assert_eq!(terminal.end().0, 6);
}

#[test]
fn a_command_that_nobody_could_continue_is_not_stopped() {
    for environment in open_both() {
        let seconds = long(&environment, 4);
        goes_on_after_the_stop_key(Terminal::running(&environment, ONE_TO_BE_STOPPED));

        // The same for a command that stops itself with a terminal's signal.
        let stops = format!("kill -TSTP $$; kill -TTIN $$; kill -TTOU $$; echo goes on; exit 7; sleep {seconds}");
        let (code, screen) = Terminal::running(&environment, &stops).end();
        assert_eq!((code, screen.as_str()), (7, "goes on\r\n"));
    }
}

#[test]
fn shell_exit_is_reported_as_after_a_plain_login() {
    let ends =
        ["exit 0", "exit 3", "exit 255", "kill -9 $$", "kill -HUP $$", "trap - TERM; kill -USR1 $$", "kill -ABRT $$"];
    let codes = open_both().map(|environment| {
        let codes = ends.map(|end| {
            let mut terminal = Terminal::at_a_shell(&environment);
            terminal.line(end);
            let (code, screen) = terminal.end();
            assert_no_complaint(&screen);
            code
        });
        let commands = ends.map(|end| Terminal::running(&environment, end).end());
        (codes, commands)
    });
    let [jailed, plain] = codes;
    assert_eq!(jailed, plain);
    assert_eq!(plain.0[..3], [0, 3, 255]);
}

#[test]
fn nohup_process_survives_logout_until_the_close() {
    for mut environment in open_both() {
        let seconds = long(&environment, 5);
        let mut terminal = Terminal::at_a_shell(&environment);
        terminal.line(&format!("nohup sleep {seconds} </dev/null >/dev/null 2>&1 &"));
        terminal.see(PROMPT);
        wait_until("the job to run", || !sleeping(&seconds).is_empty());
        terminal.line("exit 3");
        assert_eq!(terminal.end().0, 3);
        assert_eq!(sleeping(&seconds).len(), 1);
        assert_eq!(environment.says("echo somebody else"), "somebody else");
        assert_eq!(sleeping(&seconds).len(), 1);
        assert_eq!(environment.complete(), 0);
        assert!(sleeping(&seconds).is_empty());
    }
}

#[test]
fn session_ends_completely_when_its_client_vanishes() {
    for environment in open_both() {
        let before = everything(&environment);
        for commands in [&["sleep"][..], &["bash --norc", "sleep"], &[]] {
            let seconds = long(&environment, 6);
            let mut terminal = Terminal::at_a_shell(&environment);
            for command in commands {
                if *command == "sleep" {
                    terminal.line(&format!("sleep {seconds}"));
                    wait_in_front(&seconds);
                } else {
                    terminal.line(command);
                    terminal.see("# ");
                }
            }
            assert!(everything(&environment).len() > before.len());
            terminal.vanish();
            wait_until("the session to end", || everything(&environment) == before);
            assert!(sleeping(&seconds).is_empty());
        }
    }
}

#[test]
fn a_command_without_a_terminal_outlives_its_client_but_not_the_close() {
    for mut environment in open_both() {
        let seconds = long(&environment, 7);
        let mut client = environment.ssh(&[]).arg(format!("sleep {seconds}")).stderr(Stdio::null()).spawn().unwrap();
        wait_until("the command to run", || !sleeping(&seconds).is_empty());
        client.kill().unwrap();
        client.wait().unwrap();
        wait_until("sshd to notice", || {
            let sshd = |pid: &&Pid| Entry::read(**pid).is_some_and(|e| e.name.starts_with("sshd"));
            everything(&environment).iter().filter(sshd).count() == 1
        });
        assert_eq!(sleeping(&seconds).len(), 1);
        let began = Instant::now();
        assert_eq!(environment.complete(), 0);
        // The close does not wait for it, because it has no client.
        assert!(began.elapsed() < Duration::from_secs(9), "{:?}", began.elapsed());
        assert!(sleeping(&seconds).is_empty());
    }
}

#[test]
fn close_is_announced_and_shells_can_save_their_state() {
    for mode in MODES {
        let mut environment = Environment::open(Image::Debian, mode);
        let (notes, image) = match mode {
            Mode::Jailed => (PathBuf::from("/root"), environment.image_root.join("root")),
            Mode::Plain => (environment.dir.path().to_owned(), environment.dir.path().to_owned()),
        };
        let notes = notes.display();
        let seconds = long(&environment, 8);

        let mut idle = Terminal::at_a_shell(&environment);
        idle.ask(&format!("HISTFILE={notes}/history; trap 'echo hung up > {notes}/hup' HUP"));
        // bash runs its HUP trap only if it has an EXIT trap too, jailed or not.
        idle.ask(&format!("trap 'echo left > {notes}/exit' EXIT"));
        idle.ask("true something to remember");
        let mut busy = Terminal::at_a_shell(&environment);
        busy.line(&format!("sleep {seconds}"));
        wait_in_front(&seconds);

        let began = Instant::now();
        let mark = match mode {
            Mode::Jailed => "/tmp/complete".to_owned(),
            Mode::Plain => environment.signal("complete").display().to_string(),
        };
        environment.says(&format!("touch {mark}"));
        for terminal in [idle, busy] {
            let (_, screen) = terminal.end();
            let told = "ims-sshd: the image was marked complete and will be packed; this session ends now";
            assert_eq!(screen.lines().filter(|line| line.starts_with(told)).count(), 1, "{screen}");
            assert_no_complaint(&screen);
        }
        assert_eq!(environment.end(), 0);
        assert!(began.elapsed() < Duration::from_secs(9), "{:?}", began.elapsed());
        let read = |name: &str| std::fs::read_to_string(image.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!((read("exit").as_str(), read("hup").as_str()), ("left\n", "hung up\n"), "{mode:?}");
        assert!(read("history").contains("something to remember"), "{mode:?}");
        assert!(sleeping(&seconds).is_empty());
    }
}

#[test]
fn close_is_announced_to_the_person_who_marked_the_image() {
    let mut environment = Environment::open(Image::Debian, Mode::Jailed);
    let mut terminal = Terminal::at_a_shell(&environment);
    terminal.line("touch /tmp/failed");
    let (_, screen) = terminal.end();
    assert!(screen.contains("ims-sshd: the image was marked failed and will not be packed"), "{screen}");
    assert_eq!(environment.end(), 0);
}

#[test]
fn paste_of_ten_thousand_characters_arrives_complete() {
    let pasted = (0..200).map(|n| format!("{n:049}")).collect::<Vec<_>>().join("\n") + "\n";
    assert_eq!(pasted.len(), 10_000);
    for mode in MODES {
        let environment = Environment::open(Image::Debian, mode);
        let (notes, image) = match mode {
            Mode::Jailed => (PathBuf::from("/root"), environment.image_root.join("root")),
            Mode::Plain => (environment.dir.path().to_owned(), environment.dir.path().to_owned()),
        };
        let notes = notes.display();
        let mut terminal = Terminal::at_a_shell(&environment);
        terminal.line(&format!("echo \"go \"now; cat > {notes}/lines"));
        terminal.see("go now\r\n");
        terminal.paste(&pasted);
        // After the last line has been echoed, no input is in transit.
        terminal.see(&format!("{:049}\r\n", 199));
        terminal.key('d');
        terminal.see(PROMPT);
        assert_eq!(std::fs::read_to_string(image.join("lines")).unwrap(), pasted, "{mode:?}");

        let one_line = pasted.replace('\n', ".");
        terminal.line(&format!("stty -icanon -echo; echo \"go \"now; head -c 10000 > {notes}/characters; stty sane"));
        terminal.see("go now\r\n");
        terminal.paste(&one_line);
        terminal.see(PROMPT);
        assert_eq!(std::fs::read_to_string(image.join("characters")).unwrap(), one_line, "{mode:?}");
    }
}

#[test]
fn terminal_falls_back_to_sh_or_reports_a_missing_shell() {
    let volume = Volume::new(Image::Busybox);
    set_root_shell(&volume, "/bin/bash");
    let environment = volume.start(Mode::Jailed).ready();
    let mut terminal = Terminal::at_a_shell(&environment);
    assert_eq!(terminal.ask("echo $0 $SHELL"), "-sh /bin/sh");
    terminal.line("exit 5");
    assert_eq!(terminal.end().0, 5);

    let volume = Volume::new(Image::Busybox);
    std::fs::remove_file(volume.image_root.join("bin/sh")).unwrap();
    let environment = volume.start(Mode::Jailed).ready();
    let why = "ims-jail-shell: cannot start /bin/sh in this image: No such file or directory";
    let (code, screen) = Terminal::with(&environment.ssh(&["-tt"])).end();
    assert_eq!(code, 127, "{screen}");
    assert!(screen.contains(why), "{screen}");
    let command = environment.run("id");
    assert_eq!(command.status.code(), Some(127));
    assert!(text(command.stderr).starts_with(why));
}

#[test]
fn enter_from_a_shell_returns_to_it() {
    let volume = Volume::new(Image::Debian);
    let enter = format!("{IMS_SSHD} enter {}", volume.image_root.display());
    let seconds = format!("9{}", volume.port);
    let mut terminal = own_shell();

    terminal.line(&enter);
    terminal.see("# ");
    terminal.line("PS1='[pro'\"mpt]# \"; unset HISTFILE");
    terminal.see(PROMPT);
    assert_eq!(terminal.ask("cat /etc/motd; shopt -q login_shell && echo $0"), "image of the tests\n-bash");
    assert!(terminal.ask("tty").starts_with("/dev/pts/"));
    assert_eq!(terminal.ask(BLOCKED_SIGNALS), "SigBlk:\t0000000000000000");
    terminal.line(&format!("sleep {seconds}"));
    wait_in_front(&seconds);
    terminal.key('z');
    terminal.see("Stopped");
    terminal.see(PROMPT);
    terminal.line("fg");
    wait_in_front(&seconds);
    terminal.key('c');
    terminal.see(PROMPT);
    assert_eq!(terminal.status(), "130");
    terminal.line("exit 9");
    terminal.see(PROMPT);
    assert_eq!(terminal.status(), "9");

    // The outer shell has its terminal back, with job control.
    terminal.line(&format!("sleep {seconds}"));
    wait_in_front(&seconds);
    terminal.key('c');
    terminal.see(PROMPT);
    assert_eq!(terminal.status(), "130");
    terminal.line("exit");
    let (_, screen) = terminal.end();
    assert_no_complaint(&screen);
}

#[test]
fn program_started_by_enter_is_a_job_of_the_callers_shell() {
    let volume = Volume::new(Image::Debian);
    let enter = format!("{IMS_SSHD} enter {} --", volume.image_root.display());
    let seconds = format!("8{}", volume.port);
    // A directory that other users reach is warned of.
    std::fs::set_permissions(volume.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let mut terminal = own_shell();

    assert_eq!(terminal.ask(&format!("{enter} cat /etc/motd")), "image of the tests");
    terminal.line(&format!("{enter} sleep {seconds}"));
    wait_in_front(&seconds);
    terminal.key('z');
    terminal.see("Stopped");
    terminal.see(PROMPT);
    terminal.ask("bg");
    // In the background it leaves the terminal alone.
    assert_eq!(terminal.ask("jobs | grep -c Running; tty >/dev/null && echo mine"), "1\nmine");
    terminal.line("fg");
    terminal.see("sleep");
    terminal.key('z');
    terminal.see("Stopped");
    terminal.see(PROMPT);
    terminal.line("fg");
    wait_in_front(&seconds);
    terminal.key('c');
    terminal.see(PROMPT);
    assert_eq!(terminal.status(), "130");
    assert!(sleeping(&seconds).is_empty());

    // A program in the background that reads waits until it is in the foreground again.
    terminal.line(&format!("{enter} sh -c 'echo \"type \"something; read a; echo \"read \"$a; exit 11'"));
    terminal.see("type something\r\n");
    terminal.key('z');
    terminal.see("Stopped");
    terminal.see(PROMPT);
    terminal.line("bg");
    terminal.see(PROMPT);
    assert_eq!(terminal.ask("echo the shell reads on"), "the shell reads on");
    terminal.line("fg");
    terminal.see("exit 11'\r\n");
    terminal.line("an answer");
    terminal.see("read an answer\r\n");
    terminal.see(PROMPT);
    assert_eq!(terminal.status(), "11");

    // A program that ends in the background does not take the terminal either.
    let sleeps_a_moment = format!("{enter} sh -c 'sleep 1; exit 12'");
    terminal.line(&format!("{sleeps_a_moment} & wait $!"));
    terminal.see(PROMPT);
    assert_eq!(terminal.status(), "12");
    assert_eq!(terminal.ask("stty size"), "31 200");
    terminal.line("exit");
    assert_no_complaint(&terminal.end().1);

    // A program without a shell to continue it is not stopped.
    let mut alone = Command::new(&IMS_SSHD);
    alone.arg("enter").arg(&volume.image_root).args(["--", "sh", "-c", ONE_TO_BE_STOPPED]);
    goes_on_after_the_stop_key(Terminal::with(&alone));
}
