//! The one program that touches the jail: `init` makes it, as sshd's forced command it enters it, and a copy of it is the first program
//! of every session inside.

#![no_main]

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use ims_sshd::error::{Attempt, Result};
use ims_sshd::jail::binds::Bind;
use ims_sshd::jail::build::Plan;
use ims_sshd::jail::link::{Link, Message};
use ims_sshd::jail::mount_table::Proc;
use ims_sshd::jail::record::Record;
use ims_sshd::jail::tier::Tier;
use ims_sshd::jail::{enter, init, seal};
use ims_sshd::panic;
use ims_sshd::printable::Printable;
use ims_sshd::session::inside::{self, Errand};
use ims_sshd::session::login;
use ims_sshd::session::request::Request;
use ims_sshd::sys::architecture::Architecture;
use ims_sshd::sys::process::exit_now;

const USAGE: &str = "\
Makes a jail around an image root, or enters it. Started by ims-sshd and by sshd, not by hand.

  ims-jail-shell init --tier TIER --root FOLDER [--dkms] [--emulate ARCHITECTURE] [--proc-of-container] [--hostname NAME | --label NAME]
                      [--bind SOURCE TARGET rw|ro]... [--program NAME=FILE]... [--bare NAMESPACE]
      make the jail around the working folder, which messages call FOLDER, and be its first process; standard input is the socket to
      the supervisor. Its mount namespace begins as a copy of NAMESPACE, else of the container's
  ims-jail-shell serve TIER
      in the jail: be its first process
  ims-jail-shell session JAIL
      enter the jail and carry out SSH_ORIGINAL_COMMAND, or start a login shell
  ims-jail-shell -c LINE
      as the shell that sshd starts: the forced command 'exec ims-jail-shell session JAIL'
  ims-jail-shell enter JAIL [-- PROGRAM [ARGUMENT]...]
      enter the jail and run a program of the image, or a login shell
  ims-jail-shell inside [--beside] [--job ID] [--image NAME] REQUEST [WORD]...
      in the jail: carry out what session or enter was asked for
  ims-jail-shell try JAIL
      enter the jail and leave it
  ims-jail-shell seal JAIL
      once the jail's processes have ended: make its mount of the image root read-only, and print 'sealed' or, if a file on that mount is
      open for writing, 'busy' and the mount's number

JAIL is the file in which ims-sshd wrote down where the jail is.";

/// What this program is told to do.
enum Command {
    Init(Plan),
    Serve(Tier),
    Session(PathBuf),
    Enter(PathBuf, Vec<OsString>),
    Inside(Errand),
    Try(PathBuf),
    Seal(PathBuf),
}

/// Reads the command line, which is always one of ims-sshd's own. Without a parser made for people: to build one would be a tenth
/// of the time that a session takes to start.
fn command(words: &[OsString]) -> Option<Command> {
    let (name, words) = words.split_first()?;
    match (name.to_str()?, words) {
        ("init", options) => init_plan(options).map(Command::Init),
        ("serve", [tier]) => Tier::from_name(tier.to_str()?).map(Command::Serve),
        ("session", [jail]) => Some(Command::Session(jail.into())),
        ("-c", [line]) => match shell_words::split(line.to_str()?).ok()?.as_slice() {
            [exec, _, session, jail] if exec == "exec" && session == "session" => Some(Command::Session(jail.into())),
            _ => None,
        },
        ("enter", [jail]) => Some(Command::Enter(jail.into(), Vec::new())),
        ("enter", [jail, dashes, program @ ..]) if dashes == "--" => {
            Some(Command::Enter(jail.into(), program.to_vec()))
        }
        ("inside", words) => Errand::from_words(words).map(Command::Inside),
        ("try", [jail]) => Some(Command::Try(jail.into())),
        ("seal", [jail]) => Some(Command::Seal(jail.into())),
        _ => None,
    }
}

fn init_plan(words: &[OsString]) -> Option<Plan> {
    let mut plan = Plan::default();
    let mut words = words.iter();
    while let Some(option) = words.next() {
        match option.to_str()? {
            "--tier" => plan.tier = Tier::from_name(words.next()?.to_str()?)?,
            "--root" => plan.image_root = words.next()?.into(),
            "--dkms" => plan.dkms = true,
            "--emulate" => plan.emulated = Some(Architecture::from_name(words.next()?.to_str()?)?),
            "--proc-of-container" => plan.proc = Proc::Container,
            "--hostname" => plan.hostname = Some(words.next()?.into()),
            "--label" => plan.label = Some(words.next()?.into()),
            "--bare" => plan.bare = Some(words.next()?.into()),
            "--bind" => {
                let (source, target) = (words.next()?.into(), words.next()?.into());
                plan.binds.push(Bind { source, target, read_only: words.next()? == "ro" });
            }
            "--program" => {
                let (name, file) = words.next()?.to_str()?.split_once('=')?;
                plan.programs.push((name.to_owned(), file.into()));
            }
            _ => return None,
        }
    }
    (!plan.image_root.as_os_str().is_empty()).then_some(plan)
}

ims_sshd::start_at!(start);

/// Returns the exit code.
fn start() -> u8 {
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    let command = command(&words);
    let of_init = match command {
        Some(Command::Init(_)) => Some("make"),
        Some(Command::Serve(_)) => Some("keep"),
        _ => None,
    };
    panic::tell_by(move |sentence| {
        // The init's streams may be closed, and a line of the log is the supervisor's to write.
        let tell = |attempted| {
            let failed = Message::Failed(format!("cannot {attempted} the jail: {sentence}"));
            socket().is_ok_and(|socket| Link::from_fd(socket).send(&failed).is_ok())
        };
        if !of_init.is_some_and(tell) {
            eprintln!("ims-jail-shell: {}", Printable(sentence));
        }
        // Nothing unwinds out of a function that C has called: that would be a second panic.
        exit_now(255)
    });
    let result = match command {
        Some(Command::Init(plan)) => socket().and_then(|socket| init::run(&plan, socket)),
        Some(Command::Serve(tier)) => match socket() {
            Ok(socket) => return init::serve(tier, socket),
            Err(error) => Err(error),
        },
        Some(Command::Session(jail)) => {
            let request = Request::from_original_command(std::env::var_os("SSH_ORIGINAL_COMMAND").as_deref());
            login::run(&jail, request).map(|never| match never {})
        }
        Some(Command::Enter(jail, program)) => login::run(&jail, Request::Program(program)).map(|never| match never {}),
        Some(Command::Inside(errand)) => match inside::run(&errand) {
            Ok(code) => return code,
            Err(error) => Err(error),
        },
        Some(Command::Try(jail)) => Record::read(&jail).and_then(|record| enter::join(&record).map(|_| ())),
        Some(Command::Seal(jail)) => {
            Record::read(&jail).and_then(|record| seal::seal(&record)).map(|seal| println!("{}", seal.to_text()))
        }
        None => {
            eprintln!("{USAGE}");
            return 2;
        }
    };
    match result {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("ims-jail-shell: {error}");
            // What ssh itself answers when it cannot get to the host, and what Ansible takes as unreachable.
            255
        }
    }
}

/// Standard input of the jail's init.
fn socket() -> Result<OwnedFd> {
    std::io::stdin().as_fd().try_clone_to_owned().attempt(|| "take over the socket to the supervisor")
}
