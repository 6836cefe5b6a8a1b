//! Memory of idle programs: proportional set size, which divides shared pages among the processes that map them.

use std::io::Read;
use std::process::{Child, Stdio};

use testbed::{Image, Master, Mode, Volume, processes_with, wait_until};

use crate::environments::close;
use crate::report::LineChart;
use crate::report::statistics::median;
use crate::{Bound, Report, Unit};

const SESSIONS: [usize; 6] = [0, 1, 10, 50, 100, 200];

const ENTRYPOINT: &str = "ims-sshd entrypoint";
const INIT: &str = "the jail's init";
const HELPER: &str = "ims-jail-shell of a session";
const ADDED: &str = "all that a session adds";

pub fn memory(_: usize, report: &mut Report) {
    let volume = Volume::new(Image::Debian);
    let config = std::fs::read_to_string(&volume.config).unwrap();
    // Open all sessions over one connection, so that each adds only the cost of a session.
    std::fs::write(&volume.config, config + "MaxSessions 200\n").unwrap();
    let environment = volume.start(Mode::Jailed).ready();
    let master = environment.master();
    let init = environment.jails_init().as_raw().cast_unsigned();
    let helper = format!("session {}", environment.state_directory().join("jail").display());
    let mut clients = Vec::new();
    let mut lines = [ENTRYPOINT, INIT, HELPER, ADDED].map(|name| (name.to_owned(), Vec::new()));
    let mut without_sessions = 0.0;
    for count in SESSIONS {
        while clients.len() < count {
            clients.push(session(&master));
        }
        let helpers: Vec<_> = processes_with(&helper).into_iter().map(pss).collect();
        assert_eq!(helpers.len(), count, "{helpers:?}");
        let (entrypoint, init) = (pss(environment.entrypoint.id()), pss(init));
        let all = entrypoint + init + helpers.iter().sum::<f64>();
        let mut values = vec![(ENTRYPOINT, vec![entrypoint]), (INIT, vec![init])];
        if count == 0 {
            without_sessions = all;
        } else {
            values.extend([(HELPER, helpers), (ADDED, vec![(all - without_sessions) / count as f64])]);
        }
        for ((name, values), (_, points)) in values.into_iter().zip(&mut lines) {
            points.push((count as f64, median(&values)));
            let bound = if name == ADDED { Bound::Limit(400.0) } else { Bound::Information };
            report.add(&format!("{name}, {count} sessions: PSS"), Unit::Kibibytes, values, bound);
        }
    }
    for mut client in clients {
        client.kill().unwrap();
        client.wait().unwrap();
    }
    wait_until("the sessions to end", || processes_with(&helper).is_empty());
    drop(master);
    report.note(
        "PSS divides a shared page among the processes that map it, so the share of each process falls as \
         sessions are added. The cost of a session is the increase of all three kinds of processes, divided by \
         the number of sessions. The first session also pays for pages of the helper that the init does not \
         use. sshd's processes and the image's programs are not included.",
    );
    report.lines(LineChart {
        file: "memory",
        title: "Memory while sessions wait",
        x: "sessions",
        y: "PSS in KiB, median of sessions (logarithmic)",
        of_a_colour: 1,
        lines: lines.into(),
    });
    close(environment);
}

/// A session that waits in the jail until its client disconnects.
fn session(master: &Master<'_>) -> Child {
    let mut client =
        master.ssh().arg("echo in; exec cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("start ssh");
    // Once this arrives, the helper has executed the program in the jail.
    client.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
    client
}

/// PSS of a process in KiB, from /proc/PID/smaps_rollup.
fn pss(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix("Pss:")).unwrap();
    value.trim().trim_end_matches(" kB").parse().unwrap()
}
