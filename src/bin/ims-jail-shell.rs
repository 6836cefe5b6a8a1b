//! The one program that touches the jail: `init` makes it, and as sshd's forced command it enters it.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use ims_sshd::error::{Attempt, Result};
use ims_sshd::jail::build::Plan;
use ims_sshd::jail::init;
use ims_sshd::jail::record::Record;
use ims_sshd::session::login;
use ims_sshd::session::request::Request;

/// Makes a jail around an image root, or enters it. Started by ims-sshd and by sshd, not by hand.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make the jail and be its first process; standard input is the socket to the supervisor.
    Init {
        /// The image root.
        #[arg(long)]
        root: PathBuf,
        /// Give the jail all that the container has, as a build of kernel modules needs it.
        #[arg(long)]
        dkms: bool,
        /// The file to show as /etc/resolv.conf.
        #[arg(long)]
        resolv_conf: Option<PathBuf>,
        /// A file that sftp needs, as NAME=FILE; can be repeated.
        #[arg(long, value_parser = name_and_file)]
        sftp: Vec<(String, PathBuf)>,
    },
    /// Enter the jail and carry out `SSH_ORIGINAL_COMMAND`, or start a login shell.
    Session {
        /// Where the jail is, as the supervisor wrote it down.
        jail: PathBuf,
    },
    /// Enter the jail and run a program of the image; a login shell without one.
    Enter {
        /// Where the jail is, as the supervisor wrote it down.
        jail: PathBuf,
        /// The program and its arguments.
        #[arg(last = true)]
        command: Vec<OsString>,
    },
}

fn name_and_file(text: &str) -> std::result::Result<(String, PathBuf), String> {
    let (name, file) = text.split_once('=').ok_or("expected NAME=FILE")?;
    Ok((name.to_owned(), file.into()))
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Init { root, dkms, resolv_conf, sftp } => {
            make(&Plan { image_root: root, dkms, resolv_conf, sftp }).map(|()| 0)
        }
        Command::Session { jail } => {
            let request = Request::from_original_command(std::env::var_os("SSH_ORIGINAL_COMMAND").as_deref());
            Record::read(&jail).and_then(|record| login::run(&record, &request))
        }
        Command::Enter { jail, command } => {
            Record::read(&jail).and_then(|record| login::run(&record, &Request::Program(command)))
        }
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("ims-jail-shell: {error}");
            // What ssh itself answers when it cannot get to the host, and what Ansible takes as unreachable.
            ExitCode::from(255)
        }
    }
}

fn make(plan: &Plan) -> Result<()> {
    let link = std::io::stdin().as_fd().try_clone_to_owned().attempt(|| "take over the socket to the supervisor")?;
    init::run(plan, link)
}
