//! What the programs have in memory while nothing happens: proportional set size, in which a page that several have counts in parts.

use std::io::Read;
use std::process::{Child, Stdio};

use crate::environments::close;
use crate::report::statistics::median;
use crate::report::{LineChart, limit};
use crate::support::{Image, Master, Mode, Volume, processes_with, wait_until};
use crate::{Bound, Report, Unit};

const SESSIONS: [usize; 5] = [1, 10, 50, 100, 200];

const NAMES: [&str; 3] = ["ims-sshd entrypoint", "the jail's init", "ims-jail-shell of a session"];

pub fn memory(_: usize, report: &mut Report) {
    let volume = Volume::new(Image::Debian);
    let config = std::fs::read_to_string(&volume.config).unwrap();
    // All over one connection: what counts is what a session adds.
    std::fs::write(&volume.config, config + "MaxSessions 200\n").unwrap();
    let environment = volume.start(Mode::Jailed).ready();
    let master = environment.master();
    let init = environment.jails_init().as_raw().cast_unsigned();
    let helper = format!("session {}", environment.state_folder().join("jail").display());
    let mut clients = Vec::new();
    let mut seen = [const { Vec::new() }; NAMES.len()];
    for count in SESSIONS {
        while clients.len() < count {
            clients.push(session(&master));
        }
        let helpers = processes_with(&helper);
        assert_eq!(helpers.len(), count, "{helpers:?}");
        let samples = [vec![pss(environment.entrypoint.id())], vec![pss(init)], helpers.into_iter().map(pss).collect()];
        for ((name, samples), seen) in NAMES.iter().zip(samples).zip(&mut seen) {
            seen.push((count as f64, median(&samples)));
            let bound = if *name == NAMES[2] { limit(400.0) } else { Bound::Information };
            report.add(&format!("{name}, {count} sessions: PSS"), Unit::Kibibytes, samples, bound);
        }
    }
    for mut client in clients {
        client.kill().unwrap();
        client.wait().unwrap();
    }
    wait_until("the sessions to end", || processes_with(&helper).is_empty());
    drop(master);
    report.note("A session is a waiting `ims-jail-shell` beside what sshd has, and the image's own program, which count in no row.");
    report.lines(LineChart {
        file: "memory",
        title: "Memory while nothing happens",
        x: "sessions",
        y: "PSS of one process, KiB (of sessions: median)",
        lines: NAMES.map(str::to_owned).into_iter().zip(seen).collect(),
    });
    close(environment);
}

/// One that waits in the jail.
fn session(master: &Master<'_>) -> Child {
    let mut client = master.ssh().arg("echo in; exec sleep 1000").stdout(Stdio::piped()).spawn().expect("start ssh");
    // When this arrives, the program in the jail is another one than the helper that waits for it.
    client.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
    client
}

/// In KiB, as proc(5)'s `smaps_rollup` has it.
fn pss(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
    value.trim().trim_end_matches(" kB").parse().unwrap()
}
