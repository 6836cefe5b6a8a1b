//! Commands that ask a running service, in the words of `cray ims`.

use std::process::ExitCode;

use clap::Subcommand;
use ims_sshd::error::Result;

/// A command of the client.
#[derive(Debug, Subcommand)]
pub enum Command {}

/// Carries out `command`; returns the program's exit code.
pub fn run(command: &Command) -> Result<ExitCode> {
    match *command {}
}
