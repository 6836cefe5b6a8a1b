//! The service and its command line.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use ims_service::http::openapi;
use ims_service::runner::pod;
use ims_service::settings::{Records, Settings};
use ims_service::{client, serve};
use ims_sshd::error::{Attempt, Result};
use ims_sshd::log::format;
use ims_sshd::manual::naming_commands;
use ims_sshd::printable::Printable;

/// Keeps records of images, recipes, public keys and jobs, and starts the jobs that change images.
#[derive(Parser)]
#[command(name = "ims", version, max_term_width = 120)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the service
    Serve(Box<Settings>),
    /// Write the records as the files of upstream's service
    Export {
        #[command(flatten)]
        records: Records,
        /// Directory of the files, which are replaced
        directory: PathBuf,
    },
    /// Print the OpenAPI document
    Openapi,
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the man pages into a directory
    Man {
        /// The directory, created if it does not exist
        directory: PathBuf,
    },
    /// Run the programs of a job; started by the service
    #[command(hide = true)]
    Pod {
        /// Directory of the job
        directory: PathBuf,
    },
    #[command(flatten)]
    Client(client::Command),
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            if tracing::dispatcher::has_been_set() {
                tracing::error!("{error}");
            } else {
                eprintln!("ims: {}", Printable(error.to_string()));
            }
            ExitCode::from(error.exit_code())
        }
    }
}

/// Writes to standard output. An output that was closed, as by `head`, is an error and no panic.
fn print(text: &[u8]) -> Result<ExitCode> {
    std::io::stdout().write_all(text).attempt(|| "write to standard output")?;
    Ok(ExitCode::SUCCESS)
}

fn run(arguments: Arguments) -> Result<ExitCode> {
    match arguments.command {
        Command::Serve(settings) => {
            format::start(None)?;
            serve::serve(*settings)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Export { records, directory } => {
            serve::export(&records, &directory)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Openapi => print(openapi::document().as_bytes()),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "ims", &mut script);
            print(&script)
        }
        Command::Man { directory } => {
            let attempted = || format!("write the man pages into {}", directory.display());
            std::fs::create_dir_all(&directory).attempt(attempted)?;
            let program = naming_commands(Arguments::command()).disable_help_subcommand(true);
            clap_mangen::generate_to(program, &directory).attempt(attempted)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Pod { directory } => pod::run(&directory),
        Command::Client(command) => client::run(command),
    }
}
