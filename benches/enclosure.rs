//! Namespaces for the benchmarks: whatever they start ends with them, however they end.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;
use testbed::{cache, succeed};

/// Set for the program inside.
const INSIDE: &str = "IMS_SSHD_BENCH_INSIDE";

/// /run is private too: runc and nspawn keep their state there.
const ENTER: &str = "mount --bind \"$1\" \"$2\"; mount -t tmpfs -o mode=0755 tmpfs /run; shift 2; exec \"$@\"";

/// Parent of the containers' control groups in each hierarchy.
pub const CONTROL_GROUP: &str = "/ims-sshd-benchmarks";

pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs this program again as PID 1 of a new PID namespace, with a mount namespace and a directory that is removed
/// afterwards.
pub fn run() -> ExitCode {
    let (tests, own) = (cache().join("tests"), tempfile::tempdir_in(cache()).unwrap());
    std::fs::create_dir_all(&tests).unwrap();
    let mut unshare = Command::new("setpriv");
    unshare.args(["--pdeathsig=KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    unshare
        .args(["sh", "-ec", ENTER, "sh"])
        .args([own.path(), &tests])
        .arg(std::env::current_exe().unwrap())
        .args(std::env::args_os().skip(1));
    // Outside the terminal's process group: Ctrl-C reaches this process but not the clients.
    let mut child = unshare.env(INSIDE, "1").env("TMPDIR", &tests).process_group(0).spawn().expect("start unshare");
    // After the start, because children inherit the mask.
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD]);
    signals.thread_block().unwrap();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if signals.wait().unwrap() != Signal::SIGCHLD {
            kill_inside(&child);
        }
    };
    let groups = format!("*{CONTROL_GROUP}*");
    let mut remove = Command::new("find");
    succeed(remove.args(["/sys/fs/cgroup", "-depth", "-type", "d", "-path", &groups, "-delete"]));
    own.close().expect("remove the directory of the benchmarks");
    ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

/// Kills PID 1 of the namespace, and with it all others. `unshare` returns when none is left.
fn kill_inside(unshare: &Child) {
    let pid = unshare.id();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    for child in children.split_ascii_whitespace() {
        let _ = kill(Pid::from_raw(child.parse().unwrap()), Signal::SIGKILL);
    }
}
