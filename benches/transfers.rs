//! Cost of a jail for transfers: one large file, and a directory of small ones, by sftp, scp, rsync and ssh.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::environments::{close_all, three_ways};
use crate::{Bound, Report, Unit, in_turns, ratios};

const MEBIBYTES: f64 = 512.0;
const FILES: usize = 2000;

/// Kind of a transfer, which decides the unit.
#[derive(Clone, Copy)]
enum Load {
    Large,
    Small,
}
use Load::{Large, Small};
use testbed::{Environment, succeed};

type Client = fn(&Environment, &Path) -> Command;

/// Name, kind of load, minimum share of a plain login's throughput, and client.
const TRANSFERS: [(&str, Load, f64, Client); 11] = [
    ("sftp put", Large, 0.95, |e, local| sftp(e, local, "put sent /srv/sent")),
    ("sftp get", Large, 0.95, |e, local| sftp(e, local, "get /srv/sent got")),
    ("scp upload", Large, 0.95, |e, local| scp(e, local, &["sent", "root@127.0.0.1:/srv/sent"])),
    ("scp download", Large, 0.95, |e, local| scp(e, local, &["root@127.0.0.1:/srv/sent", "got"])),
    ("rsync upload", Large, 0.97, |e, local| rsync(e, local, &["-W", "--inplace", "sent", "root@127.0.0.1:/srv/sent"])),
    ("rsync download", Large, 0.97, |e, local| {
        rsync(e, local, &["-W", "--inplace", "root@127.0.0.1:/srv/sent", "got"])
    }),
    ("ssh cat, in", Large, 0.97, |e, local| shell(e, local, "cat > /srv/sent", "< sent")),
    ("ssh cat, out", Large, 0.97, |e, local| shell(e, local, "cat /srv/sent", "> got")),
    ("sftp put -r", Small, 0.95, |e, local| sftp(e, local, "put -r small /srv/sftp")),
    ("scp -r upload", Small, 0.95, |e, local| scp(e, local, &["-r", "small", "root@127.0.0.1:/srv/scp"])),
    ("rsync -r upload", Small, 0.97, |e, local| rsync(e, local, &["-r", "small", "root@127.0.0.1:/srv/rsync"])),
];

pub fn transfers(runs: usize, report: &mut Report) {
    let environments = three_ways();
    // Use a file system in memory, so that no disk affects the result.
    let local = environments[0].1.dir.path().join("local");
    let make = format!(
        "mkdir -p $0/small && head -c {MEBIBYTES}M /dev/urandom > $0/sent\n\
         for n in $(seq {FILES}); do head -c 1024 /dev/urandom > $0/small/$n; done"
    );
    succeed(Command::new("sh").args(["-ec", &make]).arg(&local));
    for (name, load, share, client) in TRANSFERS {
        let [jailed, plain, _] = &environments;
        let [mut jailed, mut plain] = [jailed, plain].map(|(_, environment)| client(environment, &local));
        let [jailed, plain] = in_turns(runs.div_ceil(3), [&mut jailed, &mut plain]);
        for (way, samples) in [("jailed", &jailed), ("plain", &plain)] {
            let (what, unit, amount) = match load {
                Large => (format!("{name}, {way}"), Unit::MebibytesPerSecond, MEBIBYTES),
                Small => (format!("{name}, {FILES} files of 1 KiB, {way}"), Unit::FilesPerSecond, FILES as f64),
            };
            let per_second = samples.iter().map(|milliseconds| amount / milliseconds * 1000.0).collect();
            report.add(&what, unit, per_second, Bound::Information);
        }
        report.add(
            &format!("{name}: time, jailed / plain"),
            Unit::Times,
            ratios(&jailed, &plain),
            Bound::Limit(1.0 / share),
        );
    }
    close_all(environments);
}

/// `command` in the client's directory, run by a shell with a redirection.
fn redirected(command: &Command, local: &Path, redirection: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("exec \"$@\" {redirection}"), "sh"]).arg(command.get_program()).args(command.get_args());
    shell.current_dir(local).stdin(Stdio::null()).stdout(Stdio::null());
    shell
}

fn sftp(environment: &Environment, local: &Path, line: &str) -> Command {
    redirected(&environment.sftp_client(&[]), local, &format!("<<END\n{line}\nEND"))
}

fn shell(environment: &Environment, local: &Path, line: &str, redirection: &str) -> Command {
    redirected(environment.ssh(&[]).arg(line), local, redirection)
}

fn scp(environment: &Environment, local: &Path, words: &[&str]) -> Command {
    let port = environment.port.to_string();
    redirected(Command::new("scp").args(environment.ssh_options()).args(["-q", "-P", &port]).args(words), local, "")
}

fn rsync(environment: &Environment, local: &Path, words: &[&str]) -> Command {
    let shell = format!("ssh {} -p {}", environment.ssh_options().join(" "), environment.port);
    redirected(Command::new("rsync").args(["-I", "-e", &shell]).args(words), local, "")
}
