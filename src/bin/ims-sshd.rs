//! The build environment's entrypoint, and the same on one machine.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use ims_sshd::error::Result;
use ims_sshd::lifecycle::settings::{DEFAULT_PARENT, Settings};
use ims_sshd::lifecycle::{log, supervisor};
use ims_sshd::local::customize::{self, Customization};
use ims_sshd::local::{enter, status};
use ims_sshd::verdict::Verdict;

/// Opens an image root over SSH, jailed inside it, and ends in an order that lets it be packed.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Arguments {
    /// How the log on standard error looks; its level is $LOG_LEVEL (debug, info, warning, error)
    #[arg(long, global = true, value_enum, default_value = "text")]
    log_format: log::Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Be a pod's build environment, as its variables say (see README.md)
    Entrypoint {
        /// The folder that holds image-root and the signal files [default: $IMAGE_ROOT_PARENT, else /mnt/image]
        image_root_parent: Option<PathBuf>,
    },
    /// Open an image root on this machine over SSH, until it is marked complete or failed
    Customize(CustomizeArguments),
    /// Enter the jail of an image root without SSH and run a command, or a shell
    Enter {
        /// The unpacked image
        image_root: PathBuf,
        /// The command and its arguments
        #[arg(last = true)]
        command: Vec<std::ffi::OsString>,
    },
    /// Mark the image complete: its environment closes and it may be packed
    Complete(Parent),
    /// Mark the image failed: its environment closes and it is not packed
    Fail(Parent),
    /// Tell where an environment is in its life
    Status {
        #[command(flatten)]
        parent: Parent,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
struct Parent {
    /// The folder that holds image-root and the signal files [default: $IMAGE_ROOT_PARENT, else /mnt/image]
    image_root_parent: Option<PathBuf>,
}

impl Parent {
    fn path(self) -> PathBuf {
        parent_or_default(self.image_root_parent)
    }
}

fn parent_or_default(given: Option<PathBuf>) -> PathBuf {
    let named = || std::env::var_os("IMAGE_ROOT_PARENT").filter(|p| !p.is_empty()).map(PathBuf::from);
    given.or_else(named).unwrap_or_else(|| DEFAULT_PARENT.into())
}

#[derive(Args)]
struct CustomizeArguments {
    /// The unpacked image
    image_root: PathBuf,
    /// Port to listen on [default: a free one]
    #[arg(long)]
    port: Option<u16>,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    listen: std::net::IpAddr,
    /// Public keys that may log in [default: a key pair made for this run]
    #[arg(long, value_name = "FILE")]
    authorized_key: Option<PathBuf>,
    /// Sessions land on this machine, beside the image root, and not in it
    #[arg(long)]
    plain: bool,
    /// A script to run once the environment is open
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
}

fn main() -> ExitCode {
    // A pod's manifest may still call the name of the script that this program replaces.
    let called_as = std::env::args_os().next().unwrap_or_default();
    let arguments = if Path::new(&called_as).file_name() == Some("entrypoint.sh".as_ref()) {
        Arguments::parse_from(["ims-sshd".into(), "entrypoint".into()].into_iter().chain(std::env::args_os().skip(1)))
    } else {
        Arguments::parse()
    };
    let awaited = match &arguments.command {
        Command::Entrypoint { image_root_parent } => Some(parent_or_default(image_root_parent.clone())),
        _ => None,
    };
    match log::start(arguments.log_format).and_then(|()| run(arguments.command)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            tracing::error!("{error}");
            // Before the log has started, which is refused input too.
            if !tracing::dispatcher::has_been_set() {
                eprintln!("ims-sshd: {error}");
            }
            if let Some(parent) = awaited {
                supervisor::tell_refusal(&parent);
            }
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(command: Command) -> Result<u8> {
    match command {
        Command::Entrypoint { image_root_parent } => entrypoint(image_root_parent),
        Command::Customize(arguments) => customize::run(Customization {
            image_root: arguments.image_root,
            port: arguments.port,
            listen: arguments.listen,
            authorized_key: arguments.authorized_key,
            jailed: !arguments.plain,
            script: arguments.script,
        }),
        Command::Enter { image_root, command } => enter::run(&image_root, &command),
        Command::Complete(parent) => status::mark(&parent.path(), Verdict::Complete),
        Command::Fail(parent) => status::mark(&parent.path(), Verdict::Failed),
        Command::Status { parent, json } => status::print(&parent.path(), json),
    }
}

fn entrypoint(image_root_parent: Option<PathBuf>) -> Result<u8> {
    let parent = parent_or_default(image_root_parent.clone());
    let settings = Settings::read(image_root_parent, std::env::vars_os()).map_err(|refusal| {
        // Who starts the image with nothing is told everything at once.
        let missing = || format!("{} does not exist: it has to be the job's volume", parent.display());
        if parent.exists() { refusal } else { refusal.advise(missing()) }
    })?;
    supervisor::run(settings, None, || {}).map(|outcome| outcome.exit_code)
}
