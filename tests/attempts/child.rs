//! Second half of an attempt, in a process of its own.

use std::process::Command;

use crate::outcome::{Outcome, Step};

const VARIABLE: &str = "ATTEMPT_GOES_ON";

/// True if this process is the second half.
pub fn is_this() -> bool {
    std::env::var_os(VARIABLE).is_some()
}

/// Starts the second half of the same attempt, and returns its outcome.
pub fn goes_on() -> Outcome {
    let this = std::env::current_exe().step("find this program")?;
    let attempt = std::env::args().next_back().expect("an attempt's name");
    let output = Command::new(this).arg(attempt).env(VARIABLE, "1").output().step("start a process")?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    match output.status.code() {
        Some(0) => Ok(said),
        Some(1) => Err(std::io::Error::other(said)).step("in another process"),
        _ => panic!("the attempt's second half broke: {}", String::from_utf8_lossy(&output.stderr)),
    }
}
