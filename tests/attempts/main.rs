//! Attempts to escape from a jail, each by name. Statically linked, to run in any image root and any container.
//!
//! ```text
//! attempts decoys DIRECTORY   create the targets outside, print their variables, stay until standard input closes
//! attempts list               list all attempts: name, where it works, source
//! attempts NAME               run one attempt, with those variables
//! attempts all                run all attempts, a line each
//! attempts ambush             inspect the helpers of sessions that enter the jail meanwhile
//! attempts type TEXT          push TEXT into the terminal on standard input, for whoever reads it next
//! ```
//!
//! Exit codes: 0, escaped, with evidence on standard output; 1, held, with the reason; 3, not supported by this kernel;
//! any other, the attempt itself is broken. `all` exits with 0 if all were held, 1 if one escaped, 2 if one is broken.

#![allow(clippy::pedantic)]

mod ambush;
mod child;
mod decoys;
mod devices;
mod kernel_files;
mod mounts;
mod namespaces;
mod outcome;
mod outside;
mod privileges;
mod processes;
mod roots;
mod sockets;
mod sys;
mod table;
mod terminals;

use std::path::Path;
use std::process::{Command, ExitCode};

use outcome::Outcome;
use table::ATTEMPTS;

const OUT: u8 = 0;
const HELD: u8 = 1;
const ABSENT: u8 = 3;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["list"] => list(),
        ["all"] => return all(),
        ["decoys", directory] => decoys::stay(Path::new(directory)).expect("decoys can be made"),
        ["neighbour", socket, file] => decoys::neighbour(socket, Path::new(file)).expect("a neighbour can listen"),
        ["victim", _] => decoys::victim().expect("a victim can sit at its terminal"),
        ["with-session-key", rest @ ..] => decoys::with_session_key(rest).expect("the program can be started"),
        ["type", text] => return terminals::type_text(text),
        ["ambush"] => return report(ambush::ambush()),
        [name] => return one(name),
        _ => panic!("usage: attempts list | all | decoys DIRECTORY | NAME"),
    }
    ExitCode::SUCCESS
}

fn list() {
    for attempt in ATTEMPTS {
        println!("{}\t{:?}\t{}", attempt.name, attempt.bites, attempt.source);
    }
}

fn one(name: &str) -> ExitCode {
    let attempt = ATTEMPTS.iter().find(|a| a.name == name).unwrap_or_else(|| panic!("there is no attempt {name}"));
    report((attempt.run)())
}

fn report(outcome: Outcome) -> ExitCode {
    match outcome {
        Ok(evidence) => {
            println!("{evidence}");
            ExitCode::from(OUT)
        }
        Err(held) => {
            println!("{held}");
            ExitCode::from(if held.is_absent() { ABSENT } else { HELD })
        }
    }
}

/// Each in a process of its own, since an attempt may leave it in a state from which no other can start.
fn all() -> ExitCode {
    // By argv[0]: there may be no /proc.
    let this = std::env::args_os().next().expect("this program's name");
    let (mut out, mut broken) = (false, false);
    for attempt in ATTEMPTS {
        let output = Command::new(&this).arg(attempt.name).output().expect("this program can be started");
        let said = String::from_utf8_lossy(&output.stdout);
        let how = match output.status.code().and_then(|code| u8::try_from(code).ok()) {
            Some(OUT) => {
                out = true;
                "OUT"
            }
            Some(HELD | ABSENT) => "held",
            _ => {
                broken = true;
                "BROKEN"
            }
        };
        println!("{how}\t{}\t{}{}", attempt.name, said.trim(), String::from_utf8_lossy(&output.stderr).trim());
    }
    ExitCode::from(if broken { 2 } else { u8::from(out) })
}
