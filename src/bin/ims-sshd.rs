//! Main function of `ims-sshd`: parses the command line, runs the command, and reports its error.

use std::process::ExitCode;

use ims_sshd::cli::{arguments, run};
use ims_sshd::environment::supervisor;
use ims_sshd::image::{overlay_files, packer};
use ims_sshd::panic;
use ims_sshd::printable::Printable;
use ims_sshd::recipe::{sandbox, template};
use ims_sshd::sys::{inherited, umask};

fn main() -> ExitCode {
    inherited::set_own();
    umask::set_own();
    panic::tell_by(report);
    let as_child = packer::run_as_child().or_else(overlay_files::run_as_child);
    if let Some(code) = as_child.or_else(sandbox::run_as_child).or_else(template::run_as_child) {
        return ExitCode::from(code);
    }
    inherited::survive_file_limit();
    let arguments = arguments::parse();
    let awaited = run::awaited_parent(&arguments);
    match run::run(arguments) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            report(&error.to_string());
            if let Some(parent) = awaited {
                supervisor::tell_refusal(&parent);
            }
            ExitCode::from(error.exit_code())
        }
    }
}

/// Reports an error in the log, or on standard error before the log is open.
fn report(sentence: &str) {
    if tracing::dispatcher::has_been_set() {
        tracing::error!("{sentence}");
    } else {
        eprintln!("ims-sshd: {}", Printable(sentence));
    }
}
