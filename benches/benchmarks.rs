//! The project's benchmarks on whole processes: the real programs, a real sshd, a real image root, and the
//! alternatives.
//!
//! Alternatives take turns within one run, and ratios and differences are computed within each turn, so that load on
//! the machine affects all sides alike. Arguments are names of groups; without any, all groups run and
//! docs/BENCHMARKS.md is written. `IMS_SSHD_BENCH_RUNS` (default 10) is the number of environments opened; processes
//! are started twenty times as often, and steps of several seconds run a third as often. `IMS_SSHD_BENCH_PAGE` names
//! another file for the page, whichever groups run.
//!
//! Exits with 1 if a limit is exceeded by more than half.

#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]

mod ansible;
mod connections;
mod creating;
mod crowd;
mod enclosure;
mod entering;
mod environments;
mod life;
mod making;
mod measure;
mod memory;
mod parsing;
mod peers;
mod publishing;
mod reading;
mod remote;
mod report;
mod service;
mod sizes;
mod transfers;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use measure::{in_turns, ratios};
use report::{Bound, Report, Unit};

/// A group: name, heading on the page, function.
type Group = (&'static str, &'static str, fn(usize, &mut Report));

const GROUPS: [Group; 15] = [
    ("entering", "Entering a jail and running /bin/true", entering::entering),
    ("making", "Making a jail", making::making),
    ("connections", "ssh host true", connections::connections),
    ("crowd", "Many at once", crowd::crowd),
    ("transfers", "Transfers", transfers::transfers),
    ("ansible", "Ansible", ansible::ansible),
    ("life", "An environment's life", life::life),
    ("memory", "Memory", memory::memory),
    ("publishing", "From a source to a published image", publishing::publishing),
    ("packing", "Packing in proportion to the change", publishing::packing),
    ("creating", "From a recipe to a published image", creating::creating),
    ("remote", "On a build node", remote::remote),
    ("sizes", "Sizes", sizes::sizes),
    ("reading", "Reading and planning", reading::reading),
    ("service", "The image management service", service::service),
];

fn main() -> ExitCode {
    // cargo passes arguments with dashes.
    let names: Vec<_> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    if let Some(unknown) = names.iter().find(|name| !GROUPS.iter().any(|(known, ..)| known == name)) {
        eprintln!("there is no group '{unknown}', only {}", GROUPS.map(|(name, ..)| name).join(", "));
        return ExitCode::from(2);
    }
    if !enclosure::is_inside() {
        return enclosure::run();
    }
    let runs = std::env::var("IMS_SSHD_BENCH_RUNS").map_or(10, |n| n.parse().expect("IMS_SSHD_BENCH_RUNS: a number"));
    let mut report = Report::begin(runs);
    for (name, heading, take) in GROUPS {
        if names.is_empty() || names.iter().any(|wanted| wanted == name) {
            report.section(heading);
            // A thread of its own: mounts made by the group end with it.
            let group = std::thread::scope(|scope| scope.spawn(|| take(runs, &mut report)).join());
            if group.is_err() {
                return ExitCode::FAILURE;
            }
        }
    }
    if let Some(page) = page(names.is_empty()) {
        report.write(&page);
    }
    report.exit_code()
}

/// File to write the page to, if any.
fn page(all: bool) -> Option<PathBuf> {
    let own = all.then(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/BENCHMARKS.md"));
    std::env::var_os("IMS_SSHD_BENCH_PAGE").map(PathBuf::from).or(own)
}
