//! Tells people at interactive shells that the environment closes, and hangs up their shells. `session_list` knows
//! which sessions are interactive shells. A command, even on a terminal, gets the grace period instead.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::sys::process::Entry;

/// Writes one line to the terminal of each of `shells`, which are interactive. A command on a terminal gets no line,
/// since a program may read the command's output.
pub(crate) fn tell_terminals(shells: &[Entry], what: &str) {
    for path in shells.iter().filter_map(Entry::terminal_path) {
        // Do not block on a terminal whose output is stopped (Ctrl-S).
        let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
        let terminal = std::fs::OpenOptions::new().write(true).custom_flags(flags).open(path);
        let _ = terminal.and_then(|mut t| t.write_all(format!("\r\nims-sshd: {what}\r\n").as_bytes()));
    }
}

/// Notifies people at interactive shells that the environment closes, and ends the shells as a lost connection would.
/// Returns the shells that were hung up.
pub(crate) fn hang_up(shells: &[Entry], marked: &str, grace: Duration) -> Vec<Pid> {
    let grace = grace.as_secs();
    tell_terminals(shells, &format!("the image was {marked}; this session ends now, running commands have {grace} s"));
    for shell in shells {
        shell.signal(Signal::SIGHUP);
        shell.signal(Signal::SIGCONT);
    }
    shells.iter().map(|e| e.pid).collect()
}
