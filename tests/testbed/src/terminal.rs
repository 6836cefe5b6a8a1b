//! A person's terminal: a real pty around a program.

use std::io::Write;
use std::process::Command;

use nix::sys::signal::Signal;
use rexpect::ReadUntil;
use rexpect::process::WaitStatus;
use rexpect::session::{Options, PtySession, spawn_with_options};

use crate::{Environment, LIMIT, processes_with, wait_until};

/// The prompt that tests set in shells, whatever the profile sets.
pub const PROMPT: &str = "[prompt]# ";

/// A person's terminal: 31 rows, 200 columns (wide, so that no line editor wraps what is typed), with a program in it.
pub struct Terminal {
    session: PtySession,
    /// Everything shown so far.
    pub screen: String,
    questions: u32,
}

impl Terminal {
    /// Opens a terminal with the program, arguments and variables of `command`.
    pub fn with(command: &Command) -> Self {
        // The pty starts without echo, and ssh would pass that on; a person's terminal echoes.
        let mut started = Command::new("sh");
        started.args(["-c", "stty echo rows 31 cols 200; exec \"$@\"", "sh"]);
        started.arg(command.get_program()).args(command.get_args());
        started.env("TERM", "xterm").envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let limit = u64::try_from(LIMIT.as_millis()).unwrap();
        let session = spawn_with_options(started, Options::new().timeout_ms(Some(limit))).unwrap();
        Self { session, screen: String::new(), questions: 0 }
    }

    /// Runs `ssh -tt` with a command.
    pub fn running(environment: &Environment, command: &str) -> Self {
        Self::with(environment.ssh(&["-tt", "-e", "none"]).arg(command))
    }

    /// Runs `ssh` without a command, and waits until the shell prompts.
    pub fn at_a_shell(environment: &Environment) -> Self {
        Self::at_a_shell_of(environment, "xterm")
    }

    /// Like [`Self::at_a_shell`], from a terminal of the kind (`TERM`) `kind`.
    pub fn at_a_shell_of(environment: &Environment, kind: &str) -> Self {
        let mut terminal = Self::with(environment.ssh(&["-tt", "-e", "none"]).env("TERM", kind));
        terminal.wait_for_first_prompt();
        terminal
    }

    fn wait_for_first_prompt(&mut self) {
        self.see("# ");
        // A plain login would write to the history of the user who runs the tests. The quotes keep the echo of this
        // line from looking like the prompt.
        self.line("unset HISTFILE; PS1='[pro'\"mpt]# \"");
        self.see(PROMPT);
    }

    /// Waits for `wanted`; returns the text before it.
    pub fn see(&mut self, wanted: &str) -> String {
        self.see_any(ReadUntil::String(wanted.to_owned())).0
    }

    fn see_any(&mut self, wanted: ReadUntil) -> (String, String) {
        let what = wanted.to_string();
        match self.session.exp_any(vec![wanted]) {
            Ok((before, found)) => {
                self.screen += &before;
                self.screen += &found;
                (before, found)
            }
            Err(e) => panic!("waited for {what}: {e}\nseen before that:\n{}", self.screen),
        }
    }

    pub fn line(&mut self, text: &str) {
        self.session.send_line(text).unwrap();
    }

    pub fn key(&mut self, control: char) {
        self.session.send_control(control).unwrap();
    }

    /// Types keys as they are, without a return.
    pub fn keys(&mut self, keys: &str) {
        self.session.send(keys).unwrap();
        self.session.flush().unwrap();
    }

    /// The shell's output for a command line, trimmed; waits for the next prompt.
    pub fn ask(&mut self, command: &str) -> String {
        self.questions += 1;
        let n = self.questions;
        // The quotes keep the echo of the typed line from being taken for the answer.
        self.line(&format!("echo \"<\"{n}\">\"; {command}; echo \"</\"{n}\">\""));
        self.see(&format!("<{n}>\r\n"));
        let answer = self.see(&format!("</{n}>\r\n"));
        self.see(PROMPT);
        answer.replace('\r', "").trim_end().to_owned()
    }

    /// Value of `$?` in the shell.
    pub fn status(&mut self) -> String {
        self.line("echo \"<\"$?\">\"");
        let rest = self.see(">\r\n");
        self.see(PROMPT);
        rest.rsplit('<').next().unwrap().to_owned()
    }

    pub fn is_shown(&self, text: &str) -> bool {
        self.screen.contains(text)
    }

    pub fn resize(&self, rows: u16, columns: u16) {
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(self.session.process().get_file_handle().unwrap(), size).unwrap();
    }

    /// Types all of `text` at once, as a paste does.
    pub fn paste(&self, text: &str) {
        self.session.process().get_file_handle().unwrap().write_all(text.as_bytes()).unwrap();
    }

    /// Waits for the end of the program; returns its exit code and the whole screen.
    pub fn end(mut self) -> (i32, String) {
        self.see_any(ReadUntil::EOF);
        match self.session.process().wait().unwrap() {
            WaitStatus::Exited(_, code) => (code, self.screen),
            WaitStatus::Signaled(_, signal, _) => (128 + signal as i32, self.screen),
            other => panic!("{other:?}"),
        }
    }

    /// Kills the program in the terminal, as a crash would.
    pub fn vanish(mut self) {
        self.session.process_mut().signal(Signal::SIGKILL).unwrap();
        self.session.process().wait().unwrap();
    }
}

/// A number of seconds for which no other test sleeps, longer than any test takes.
pub fn long(environment: &Environment, which: u32) -> String {
    (u32::from(environment.port) * 10 + 1_000_000 + which).to_string()
}

/// Processes that are `sleep seconds` and nothing more, or an emulator that runs one.
pub fn sleeping(seconds: &str) -> Vec<u32> {
    let exactly = format!("\0sleep\0{seconds}\0");
    let line = |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    // The name of an emulator may precede the command. The helper that enters the jail to run the command does not
    // count.
    let is_it = |pid: &u32| format!("\0{}", line(pid)).ends_with(&exactly) && !line(pid).contains("\0enter\0");
    processes_with(&format!("sleep {seconds}")).into_iter().filter(is_it).collect()
}

/// Waits until `sleep seconds` runs in the foreground of its terminal, because keys do not reach it before.
pub fn wait_in_front(seconds: &str) {
    wait_until(&format!("sleep {seconds} in the foreground"), || {
        sleeping(seconds).first().is_some_and(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
            // proc(5): state, parent, group, session, terminal, the terminal's foreground group
            fields.len() > 5 && fields[0] != "T" && fields[2] == fields[5]
        })
    });
}

/// A person's own shell on this machine, from which they enter an image root.
pub fn own_shell() -> Terminal {
    // Tests that run in the background of a script have SIGINT and SIGQUIT ignored, which all children would inherit.
    let mut shell = Command::new("env");
    shell
        .args(["--default-signal=INT,QUIT,TSTP", "bash", "--norc", "--noprofile", "-i"])
        .env("PS1", "# ")
        .env("HISTFILE", "");
    let mut terminal = Terminal::with(&shell);
    terminal.wait_for_first_prompt();
    terminal
}
