//! Unattended runs that are ended, and what is said of runs that are open.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::job::*;
use testbed::*;

use crate::customize::nothing_stays;

const SOURCE: &str = "tree.sqsh";

/// An unattended run whose command has begun, and ignores SIGTERM.
fn deaf(dir: &Path, source: &str, grace: &str) -> Ended {
    let lines = "trap '' TERM INT HUP; echo changed > /etc/new; echo begun; while :; do sleep 0.1; done";
    let mut run = ims_sshd(&["customize", source, "--output", "out", "--work", "work"], &[]);
    run.env("IMS_CLOSE_GRACE", grace).args(["--", "sh", "-c", lines]).current_dir(dir);
    let mut run = Ended::killed(run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    run.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
    run
}

fn signal(run: &Child, signal: Signal) {
    kill(Pid::from_raw(run.id().cast_signed()), signal).unwrap();
}

fn end(mut run: Ended) -> (Option<i32>, String) {
    let mut said = String::new();
    run.stderr.as_mut().unwrap().read_to_string(&mut said).unwrap();
    (run.wait().unwrap().code(), said)
}

fn kept_is(dir: &Path, source: &str, is_kept: bool) {
    let mut next = ims_sshd(&["enter", source, "--output", "out", "--work", "work", "--discard"], &[]);
    let output = next.args(["--", "test", "-e", "/etc/new"]).current_dir(dir).output().unwrap();
    assert_eq!(output.status.success(), is_kept, "{output:?}");
    nothing_stays(dir);
}

#[test]
fn command_that_ignores_a_signal_is_killed_after_the_grace_and_changes_are_kept() {
    let (dir, _, _) = packed_image();
    let run = deaf(dir.path(), SOURCE, "1");
    let began = Instant::now();
    signal(&run, Signal::SIGTERM);
    let (code, said) = end(run);
    assert_eq!(code, Some(143), "{said}");
    assert!(began.elapsed() > Duration::from_secs(1));
    let told = [
        "received SIGTERM: the command has 1 s to end (IMS_CLOSE_GRACE); a second signal kills it",
        "the command was still running when the grace period ended; killing it",
        "received SIGTERM: the image is not published",
        "to resume: ",
    ];
    assert!(told.iter().all(|told| said.contains(told)), "{said}");
    kept_is(dir.path(), SOURCE, true);
}

#[test]
fn second_signal_kills_the_command_at_once_and_changes_are_kept() {
    let (dir, _, _) = packed_image();
    let run = deaf(dir.path(), SOURCE, "600");
    signal(&run, Signal::SIGTERM);
    // Not the same one.
    std::thread::sleep(Duration::from_secs(1));
    signal(&run, Signal::SIGTERM);
    let (code, said) = end(run);
    assert_eq!(code, Some(143), "{said}");
    assert!(said.contains("received SIGTERM again: killing the command"), "{said}");
    kept_is(dir.path(), SOURCE, true);
}

#[test]
fn fail_ends_an_unattended_run_and_drops_its_changes() {
    let (dir, _, _) = packed_image();
    // No other test has this name open.
    let source = "fail ends it.sqsh";
    std::fs::rename(dir.path().join(SOURCE), dir.path().join(source)).unwrap();
    let run = deaf(dir.path(), source, "1");
    // A second run says how it is ended.
    let second = ims_sshd(&["customize", source, "--output", "out", "--work", "work"], &[])
        .args(["--", "true"])
        .current_dir(dir.path())
        .output()
        .unwrap();
    let said = text(&second.stderr);
    let wanted =
        "it.sqsh: it is open as fail-ends-it; wait for its command, or 'ims-sshd fail fail-ends-it' ends it and drops";
    assert!(!second.status.success() && said.contains(wanted), "{said}");
    let complete = ims_sshd(&["complete", "fail-ends-it"], &[]).output().unwrap();
    let said = text(&complete.stderr);
    assert!(said.contains("'ims-sshd fail fail-ends-it' ends it, and drops the changes"), "{said}");
    // In another PID namespace that number is no process's, or another one's: nothing is marked, and nothing ended.
    let mut elsewhere = Command::new("unshare");
    elsewhere.args(["--pid", "--fork", "--mount-proc", &*IMS_SSHD, "fail", "fail-ends-it"]);
    let refused = elsewhere.output().unwrap();
    let said = text(&refused.stderr);
    assert!(!refused.status.success() && said.contains("its process is not in this PID namespace"), "{said}");
    let told = succeed(&mut ims_sshd(&["fail", "fail-ends-it"], &[]));
    assert!(told.starts_with("marked fail-ends-it (") && told.ends_with("failed\n"), "{told}");
    let (code, said) = end(run);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("the changes were discarded"), "{said}");
    kept_is(dir.path(), source, false);
}

#[test]
fn killed_run_asks_nobody_to_log_in() {
    let (dir, _, _) = packed_image();
    let run = deaf(dir.path(), SOURCE, "1");
    signal(&run, Signal::SIGKILL);
    let (_, said) = end(run);
    assert!(said.contains("ims-sshd was killed, and everything in the image ended with it"), "{said}");
    assert!(!said.contains("log in"), "{said}");
    kept_is(dir.path(), SOURCE, true);
}

#[test]
fn source_of_which_nothing_is_kept_is_no_image_root_parent() {
    let (dir, _, squashfs) = packed_image();
    let squashfs = squashfs.to_str().unwrap();
    for named in ["./tree.sqsh", squashfs, "https://images.example/tree.sqsh?X-Amz-Signature=secret"] {
        for command in ["status", "fail", "complete"] {
            let refused = ims_sshd(&[command, named], &[]).current_dir(dir.path()).output().unwrap();
            let said = text(&refused.stderr);
            assert!(
                !refused.status.success() && said.contains("': no run has it open, and no changes to it are kept; "),
                "{said}"
            );
            assert!(!said.contains("secret"), "{said}");
        }
    }
}

/// What `status --json` prints of `named`, with `_` in place of values that no two runs share.
fn report(dir: &Path, named: &str) -> String {
    let mut command = ims_sshd(&["status", "--json"], &[]);
    // By path: runs of other tests have the same name.
    let printed = succeed(command.arg(dir.join(named)).current_dir(dir));
    let values: serde_json::Value = serde_json::from_str(&printed).unwrap();
    ["command_line", "name", "pid", "run", "since"].iter().fold(printed, |printed, field| {
        printed.replace(&format!("\"{field}\":{}", values[field]), &format!("\"{field}\":_"))
    })
}

#[test]
fn json_status_of_open_runs_and_of_left_overs_keeps_every_byte() {
    let (dir, _, _) = packed_image();
    let shown = dir.path().display();
    let mut run = deaf(dir.path(), SOURCE, "1");
    let work = std::fs::read_dir(dir.path().join("work/ims-sshd")).unwrap().next().unwrap().unwrap().path();
    let (begin, work) = (format!(r#"{{"command":"customize","command_line":_,"directory":"{shown}","#), work.display());
    let end = format!(r#""name":_,"pid":_,"run":_,"since":_,"source":"{shown}/{SOURCE}","state":"#);
    assert_eq!(report(dir.path(), SOURCE), format!("{begin}{end}\"serving\",\"work\":\"{work}\"}}\n"));
    run.kill().unwrap();
    run.wait().unwrap();
    let killed = format!("{begin}\"kept\":true,{end}\"killed\",\"was\":\"serving\",\"work\":\"{work}\"}}\n");
    assert_eq!(report(dir.path(), SOURCE), killed);

    let run = deaf(dir.path(), SOURCE, "1");
    signal(&run, Signal::SIGTERM);
    assert_eq!(self::end(run).0, Some(143));
    let kept = format!("{begin}\"kept\":true,{end}\"kept\",\"work\":\"{work}\"}}\n");
    assert_eq!(report(dir.path(), SOURCE), kept);
    succeed(ims_sshd(&["fail"], &[]).arg(dir.path().join(SOURCE)).current_dir(dir.path()));

    image(dir.path());
    let mut run = ims_sshd(&["enter", "tree", "--in-place", "--", "sh", "-c", "echo begun; read end"], &[]);
    run.current_dir(dir.path()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut run = Ended::killed(run.spawn().unwrap());
    run.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
    let in_place = format!(
        "{{\"command\":\"enter\",\"command_line\":_,\"directory\":\"{shown}\",\"name\":_,\"pid\":_,\"run\":_,\
         \"since\":_,\"source\":\"{shown}/tree\",\"state\":\"serving\",\"work\":null}}\n"
    );
    assert_eq!(report(dir.path(), "tree"), in_place);
    drop(run.stdin.take());
    run.wait().unwrap();
}
