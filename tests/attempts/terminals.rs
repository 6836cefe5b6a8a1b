//! A terminal outside.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;

use crate::child;
use crate::outcome::{Held, Outcome, Step};
use crate::outside::told;
use crate::sys;

fn terminal() -> Result<File, Held> {
    let path = told("TERMINAL");
    File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(&path).step(format!("open {path}"))
}

/// Pushes input as if the user had typed it.
pub fn push_input() -> Outcome {
    sys::push_input(terminal()?, b'#').step("push a character into it")?;
    Ok("typed at another's terminal".into())
}

/// Steals it from its session, in order to type.
pub fn steal() -> Outcome {
    if !child::is_this() {
        // A process group leader cannot leave its session.
        return child::goes_on();
    }
    let terminal = terminal()?;
    nix::unistd::setsid().step("leave the session")?;
    sys::steal_terminal(&terminal).step("make it this session's own")?;
    sys::push_input(&terminal, b'#').step("push a character into it")?;
    Ok("took another's terminal away and typed there".into())
}

/// `attempts type TEXT`: pushes TEXT and Enter into this process's terminal, for whoever reads it next.
pub fn type_text(text: &str) -> std::process::ExitCode {
    match text.bytes().chain([b'\n']).try_for_each(|byte| sys::push_input(std::io::stdin(), byte)) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(why) => {
            println!("held: {why}");
            std::process::ExitCode::FAILURE
        }
    }
}
