//! The only program that touches the jail: `init` builds it, sshd's forced command enters it, and a copy of the program
//! starts each session inside.

#![no_main]

use std::os::fd::{AsFd, OwnedFd};

use ims_sshd::error::{Attempt, Result};
use ims_sshd::jail::arguments::{Arguments, TRANSIENT};
use ims_sshd::jail::link::{Link, Message};
use ims_sshd::jail::record::Record;
use ims_sshd::jail::{enter, init, seal};
use ims_sshd::panic;
use ims_sshd::printable::Printable;
use ims_sshd::session::inside::{self, Errand};
use ims_sshd::session::login;
use ims_sshd::session::request::Request;
use ims_sshd::sys::process::exit_now;
use ims_sshd::sys::umask;

ims_sshd::start_at!(start);

/// Main function of `ims-jail-shell`. Returns the exit code.
fn start() -> u8 {
    umask::set_own();
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    let arguments = Arguments::from_words(&words);
    let of_init = match arguments {
        Some(Arguments::Init(_)) => Some("make"),
        Some(Arguments::Serve(_)) => Some("keep"),
        _ => None,
    };
    let is_trial = matches!(arguments, Some(Arguments::Try(_)));
    panic::tell_by(move |sentence| {
        // Report to the supervisor, which alone writes to the log: the init's own streams may be closed.
        let tell = |attempted| {
            let why = format!("cannot {attempted} the jail: {sentence}");
            // A bug says nothing about the container's rights.
            let failed = Message::Failed { why, is_transient: true };
            socket().is_ok_and(|socket| Link::from_fd(socket).send(&failed).is_ok())
        };
        if !of_init.is_some_and(tell) {
            eprintln!("ims-jail-shell: {}", Printable(sentence));
        }
        // Exit here: unwinding out of a function that C called would be a second panic.
        exit_now(if is_trial { TRANSIENT } else { 255 })
    });
    let result = match arguments {
        Some(Arguments::Init(plan)) => socket().and_then(|socket| init::run(&plan, socket)),
        Some(Arguments::Serve(tier)) => match socket() {
            Ok(socket) => return init::serve(tier, socket),
            Err(error) => Err(error),
        },
        Some(Arguments::Session(jail)) => {
            let request = Request::from_original_command(std::env::var_os("SSH_ORIGINAL_COMMAND").as_deref());
            login::run(&jail, request).map(|never| match never {})
        }
        Some(Arguments::Enter(jail, program)) => {
            login::run(&jail, Request::Program(program)).map(|never| match never {})
        }
        Some(Arguments::Inside(words)) => match Errand::from_words(&words).map(|errand| inside::run(&errand)) {
            Some(Ok(code)) => return code,
            Some(Err(error)) => Err(error),
            None => return misused(),
        },
        Some(Arguments::Try(jail)) => Record::read(&jail).and_then(|record| enter::join(&record).map(|_| ())),
        Some(Arguments::Seal(jail)) => {
            Record::read(&jail).and_then(|record| seal::seal(&record)).map(|seal| println!("{}", seal.to_text()))
        }
        None => return misused(),
    };
    match result {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("ims-jail-shell: {error}");
            if is_trial && error.is_transient() {
                return TRANSIENT;
            }
            // Exit as ssh does if it cannot reach the host: Ansible then reports the host as unreachable.
            255
        }
    }
}

fn misused() -> u8 {
    eprintln!("ims-jail-shell: started by ims-sshd and by sshd, not by hand; see ims-sshd --help");
    2
}

/// Standard input of the jail's init: its socket to the supervisor.
fn socket() -> Result<OwnedFd> {
    std::io::stdin().as_fd().try_clone_to_owned().attempt(|| "take over the socket to the supervisor")
}
