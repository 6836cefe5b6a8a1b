//! Shells and full-screen programs that people run, each through a real pty.

use std::path::PathBuf;

use testbed::*;

use crate::clients::Place;
use crate::terminal::COMPLAINTS;

crate::clients::shown! {
    "OpenSSH ssh", "a terminal with `-t` and none with `-T`, in the client's locale" => terminal_is_allocated_on_request;
    "bash", "as root's shell: job control, window size, a line of 10,000 characters, exit code" => bash_is_roots_shell;
    "dash", "as root's shell: job control, window size, exit code" => dash_is_roots_shell;
    "zsh", "as root's shell: job control, window size, a line of 10,000 characters, exit code" => zsh_is_roots_shell;
    "fish", "as root's shell: job control, window size, a line of 10,000 characters, exit code" => fish_is_roots_shell;
    "busybox sh", "as root's shell: job control, window size, exit code" => busybox_is_roots_shell;
    "vim", "writes a file, in a window that is resized" => vim_writes_a_file;
    "less", "pages to the end" => less_pages_to_the_end;
    "top", "shows processes until `q`" => top_shows_processes;
    "tmux", "can be attached again by a second session" => tmux_is_attached_to_again;
    "screen", "can be attached again by a second session" => screen_is_attached_to_again;
    "su, sudo, script", "keep the terminal" => su_sudo_and_script_keep_the_terminal;
}

/// Root's home and host, with what people have on a node.
struct Desk {
    environment: Environment,
    /// Path for sessions.
    home: PathBuf,
    /// Path for this test.
    notes: PathBuf,
}

impl Desk {
    fn new(place: Place, shell: &str) -> Self {
        let volume = Volume::new(Image::Node);
        let own = volume.dir.path().join("home");
        let (home, notes) = match place {
            Place::Plain => (own.clone(), own.clone()),
            _ => ("/root".into(), volume.image_root.join("root")),
        };
        // The machine may lack utmp, in which screen records logins.
        let login = if place == Place::Plain { "deflogin off\n" } else { "" };
        for (file, text) in [
            (".profile", format!("PS1='{PROMPT}'; unset HISTFILE\n")),
            (".zshrc", format!("PROMPT='{PROMPT}'\n")),
            (".screenrc", format!("startup_message off\n{login}")),
            (
                ".config/fish/config.fish",
                format!("function fish_prompt; echo -n '{PROMPT}'; end; set -g fish_greeting\n"),
            ),
        ] {
            std::fs::create_dir_all(notes.join(file).parent().unwrap()).unwrap();
            std::fs::write(notes.join(file), text).unwrap();
        }
        std::os::unix::fs::symlink("/bin/busybox", notes.join("ash")).unwrap();
        let shell = home.join(shell).display().to_string();
        if place == Place::Plain {
            replace_root(&volume, &home, &shell);
        } else {
            let passwd = volume.image_root.join("etc/passwd");
            let text = std::fs::read_to_string(&passwd).unwrap();
            std::fs::write(passwd, text.replacen("root:/root:/bin/bash", &format!("root:/root:{shell}"), 1)).unwrap();
        }
        std::fs::write(volume.image_root.join("etc/hosts"), "127.0.0.1 localhost\n127.0.1.1 nid000001\n").unwrap();
        let environment = place.open_on(volume, &[("IMS_JAIL_HOSTNAME", "nid000001")]);
        let notes = if place == Place::Plain { own } else { environment.image_root.join("root") };
        Self { environment, home, notes }
    }

    fn bash(place: Place) -> (Self, Terminal) {
        let desk = Self::new(place, "/bin/bash");
        let terminal = desk.sit_down();
        (desk, terminal)
    }

    fn sit_down(&self) -> Terminal {
        let mut terminal = Terminal::with(&self.environment.ssh(&["-tt", "-e", "none"]));
        terminal.see(PROMPT);
        terminal
    }
}

/// Exits with a code, and asserts that no complaint was shown.
fn leave(mut terminal: Terminal) {
    terminal.line("exit 7");
    let (code, screen) = terminal.end();
    assert_eq!(code, 7, "{screen}");
    for complaint in COMPLAINTS.into_iter().chain(["arning", "annot", "ould not", "unable"]) {
        assert!(!screen.contains(complaint), "'{complaint}' in:\n{screen}");
    }
}

fn terminal_is_allocated_on_request(place: Place) {
    let desk = Desk::new(place, "/bin/bash");
    let ask = |option: &str| {
        let mut ssh = desk.environment.ssh(&[option, "-o", "SendEnv=LC_ALL"]);
        ssh.env("LC_ALL", "C.UTF-8").arg("tty; echo $TERM $LC_ALL; locale charmap; echo 'a line' >&2; exit 7");
        ssh
    };
    let (code, screen) = Terminal::with(&ask("-t")).end();
    assert!(code == 7 && screen.starts_with("/dev/pts/"), "{screen}");
    assert!(screen.ends_with("\r\nxterm C.UTF-8\r\nUTF-8\r\na line\r\n"), "{screen}");
    let without = ask("-T").output().unwrap();
    // bash itself reports this where there is no terminal.
    let said = "not a tty\ndumb C.UTF-8\nUTF-8\n".to_owned();
    assert_eq!(
        (without.status.code(), text(without.stdout), text(without.stderr)),
        (Some(7), said, "a line\n".to_owned())
    );
}

fn is_roots_shell(place: Place, shell: &str, edits_long_lines: bool) {
    let desk = Desk::new(place, shell);
    let seconds = long(&desk.environment, 20);
    let mut terminal = desk.sit_down();
    // fish prints colours too.
    assert!(terminal.ask("tty").contains("/dev/pts/"));
    terminal.line(&format!("sleep {seconds}"));
    wait_in_front(&seconds);
    terminal.key('z');
    terminal.see(PROMPT);
    assert!(terminal.ask("jobs").contains(&seconds));
    terminal.line("fg");
    wait_in_front(&seconds);
    terminal.key('c');
    terminal.see(PROMPT);
    assert!(!terminal.ask("jobs").contains(&seconds), "{shell}");
    if edits_long_lines {
        assert!(terminal.ask(&format!("echo {} | wc -c", "x".repeat(10_000))).ends_with("10001"), "{shell}");
    }
    terminal.resize(45, 123);
    terminal.line("");
    terminal.see(PROMPT);
    assert!(terminal.ask("stty size").contains("45 123"));
    leave(terminal);
}

fn bash_is_roots_shell(place: Place) {
    is_roots_shell(place, "/bin/bash", true);
}

fn dash_is_roots_shell(place: Place) {
    is_roots_shell(place, "/bin/dash", false);
}

fn zsh_is_roots_shell(place: Place) {
    is_roots_shell(place, "/bin/zsh", true);
}

fn fish_is_roots_shell(place: Place) {
    is_roots_shell(place, "/usr/bin/fish", true);
}

fn busybox_is_roots_shell(place: Place) {
    is_roots_shell(place, "ash", false);
}

fn vim_writes_a_file(place: Place) {
    let (desk, mut terminal) = Desk::bash(place);
    terminal.line("vim -u NONE file; echo \"vim \"ended");
    terminal.see("~");
    terminal.keys("ihello\r");
    terminal.keys("\u{1b}:autocmd VimResized * echo 'now' &columns\r:echo 'before' &columns\r");
    // vim has read all input before the window changes.
    terminal.see("before 200");
    terminal.resize(40, 90);
    terminal.see("now 90");
    terminal.keys(":wq\r");
    terminal.see("vim ended\r\n");
    terminal.see(PROMPT);
    assert_eq!(std::fs::read_to_string(desk.notes.join("file")).unwrap(), "hello\n\n");
    leave(terminal);
}

fn less_pages_to_the_end(place: Place) {
    let (_desk, mut terminal) = Desk::bash(place);
    terminal.line("seq 1000 | less; echo \"less \"ended");
    terminal.see("30\r\n");
    terminal.keys("G");
    terminal.see("1000");
    terminal.see("(END)");
    terminal.keys("q");
    terminal.see("less ended\r\n");
    terminal.see(PROMPT);
    leave(terminal);
}

fn top_shows_processes(place: Place) {
    let (_desk, mut terminal) = Desk::bash(place);
    terminal.line("top; echo \"top \"ended");
    terminal.see("load average");
    terminal.see("COMMAND");
    terminal.keys("q");
    terminal.see("top ended\r\n");
    terminal.see(PROMPT);
    leave(terminal);
}

fn tmux_is_attached_to_again(place: Place) {
    let (desk, terminal) = Desk::bash(place);
    let tmux = format!("tmux -S {}/socket", desk.home.display());
    is_attached_to_again(&desk, terminal, &format!("{tmux} new"), "\u{2}d", &format!("{tmux} attach"));
}

fn screen_is_attached_to_again(place: Place) {
    let (desk, mut terminal) = Desk::bash(place);
    // In plain mode, a socket directory of the test's own instead of the machine's.
    let directory = format!("export SCREENDIR={}/screens; mkdir -pm 700 $SCREENDIR", desk.home.display());
    let directory = if place == Place::Plain { &directory } else { "true" };
    terminal.ask(directory);
    is_attached_to_again(&desk, terminal, "screen", "\u{1}d", &format!("{directory}; screen -r"));
}

fn is_attached_to_again(desk: &Desk, mut terminal: Terminal, begin: &str, detach: &str, again: &str) {
    let outer = terminal.ask("tty");
    terminal.line(begin);
    // The inner shell is no login shell; every prompt ends like this.
    terminal.see("# ");
    terminal.line("kept=$((6*7)); echo \"in \"$(tty)");
    let inner = terminal.see("in /dev/pts/");
    assert!(!inner.contains("not a tty"));
    assert!(outer.starts_with("/dev/pts/"));
    terminal.keys(detach);
    terminal.see("detached");
    terminal.see(PROMPT);
    leave(terminal);

    let mut terminal = desk.sit_down();
    terminal.line(again);
    terminal.see("in /dev/pts/");
    terminal.line("echo \"kept \"$kept; exit");
    terminal.see("kept 42");
    terminal.see(PROMPT);
    leave(terminal);
}

fn su_sudo_and_script_keep_the_terminal(place: Place) {
    let (desk, mut terminal) = Desk::bash(place);
    let seconds = long(&desk.environment, 21);
    let tty = terminal.ask("tty");
    // Debian's sudo gives its programs a terminal of their own.
    assert!(terminal.ask("sudo -n tty").starts_with("/dev/pts/"));
    assert_eq!(terminal.ask("su - -c tty"), tty);
    assert_eq!(terminal.ask("su -s /bin/sh nobody -c 'id -un; tty'"), format!("nobody\n{tty}"));
    for begin in ["su -", "sudo -n -i", "script -q /dev/null"] {
        terminal.line(begin);
        terminal.see(if begin.starts_with("script") { "# " } else { PROMPT });
        terminal.line(&format!("sleep {seconds}"));
        wait_in_front(&seconds);
        terminal.key('c');
        terminal.line("test -t 0 && echo \"still \"here; exit");
        terminal.see("still here\r\n");
        terminal.see(PROMPT);
    }
    leave(terminal);
}
