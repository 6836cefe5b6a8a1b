//! The machine and the program versions measured.

use std::fmt::Write;
use std::process::{Command, Stdio};
use std::time::SystemTime;

/// Programs, with the command that prints their version.
const VERSIONS: [(&str, &str, &str); 12] = [
    ("Linux", "uname", "-r"),
    ("OpenSSH", "ssh", "-V"),
    ("nsenter, unshare", "nsenter", "--version"),
    ("chroot", "chroot", "--version"),
    ("bubblewrap", "bwrap", "--version"),
    ("systemd-nspawn", "systemd-nspawn", "--version"),
    ("podman", "podman", "--version"),
    ("runc", "runc", "--version"),
    ("rsync", "rsync", "--version"),
    ("Ansible", "ansible", "--version"),
    ("mksquashfs", "mksquashfs", "-version"),
    ("C compiler", "cc", "-dumpfullversion"),
];

pub struct Machine {
    rows: Vec<(&'static str, String)>,
}

impl Machine {
    pub fn now() -> Self {
        let date = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        let mut rows = vec![
            ("Date", date[..10].to_owned()),
            ("ims-sshd", env!("CARGO_PKG_VERSION").to_owned()),
            ("Processor", field("/proc/cpuinfo", "model name")),
            ("Cores", std::thread::available_parallelism().unwrap().to_string()),
            ("Memory", format!("{} GiB", kibibytes(&field("/proc/meminfo", "MemTotal")) >> 20)),
            ("Load at the start", load()),
        ];
        rows.extend(VERSIONS.map(|(name, program, option)| (name, version(program, option))));
        Self { rows }
    }

    pub fn table(&self) -> String {
        let mut table = String::from("| | |\n|---|---|\n");
        for (name, value) in &self.rows {
            let _ = writeln!(table, "| {name} | {value} |");
        }
        table
    }
}

/// The value on the first line with this name.
fn field(file: &str, name: &str) -> String {
    let text = std::fs::read_to_string(file).unwrap();
    let line = text.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.split_once(':'))
        .map_or_else(|| "unknown".to_owned(), |(_, value)| value.trim().to_owned())
}

fn kibibytes(value: &str) -> u64 {
    value.trim_end_matches(" kB").parse().unwrap()
}

/// Load average of the last one, five and fifteen minutes.
fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap();
    text.split(' ').take(3).collect::<Vec<_>>().join(", ")
}

/// First line of the program's output, from the first digit on.
fn version(program: &str, option: &str) -> String {
    let output = Command::new(program).arg(option).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|e| panic!("{program}: {e}: run the benchmarks with 'make bench'"));
    let text = String::from_utf8_lossy(if output.stdout.is_empty() { &output.stderr } else { &output.stdout });
    let line = text.lines().next().unwrap_or_default();
    line.trim_start_matches(|c: char| !c.is_ascii_digit()).trim_end_matches(']').to_owned()
}
