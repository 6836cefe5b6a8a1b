//! The function `opened` of docs/KUBERNETES.md, in a bash whose `kubectl` plays a cluster and whose `sleep` takes no
//! time.

use std::process::{Command, Output};

/// The functions of the page's block that waits for a job, without the commands that call them.
fn functions() -> &'static str {
    let block = include_str!("../../docs/KUBERNETES.md").split("```sh\n").find(|block| block.starts_with("start() {"));
    block.unwrap().split("\nJOB=").next().unwrap()
}

/// Calls `opened`; `get` is what the cluster answers to the question number `$asked` about the job's state.
fn opened(get: &str) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let script = format!(
        "{}\nsleep() {{ :; }}
        kubectl() {{
            case $1/$2 in
                get/pods) echo \"couldn't find key S3_BUCKET\" ;;
                get/*) asked=$(($(cat asked 2> /dev/null) + 1)); echo $asked > asked; {get} ;;
                logs/*) echo 'cannot fetch it' ;;
            esac
        }}
        opened job.batch/x",
        functions()
    );
    Command::new("timeout").args(["120", "bash", "-c", &script]).current_dir(&dir).output().unwrap()
}

fn complaint(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_job_is_waited_for_as_long_as_it_lasts_and_what_it_waits_for_is_told_once() {
    let output = opened("((asked > 600)) && echo '1 ' || echo '0 '");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(complaint(&output), "job.batch/x waits: couldn't find key S3_BUCKET\n");
}

#[test]
fn a_job_that_fails_before_it_is_open_ends_the_wait_with_its_log() {
    for condition in ["FailureTarget", "FailureTarget Failed", "SuccessCriteriaMet Complete"] {
        let output = opened(&format!("((asked > 3)) && echo ' {condition}' || echo '0 '"));
        let complaint = complaint(&output);
        assert_eq!(output.status.code(), Some(1), "{complaint}");
        assert!(complaint.ends_with("cannot fetch it\n") || complaint.contains("is not open"), "{complaint}");
        assert!(String::from_utf8_lossy(&output.stdout).is_empty());
    }
}

#[test]
fn an_api_server_that_does_not_answer_for_a_moment_does_not_end_the_wait() {
    let output = opened("((asked < 20)) && return 1; echo '1 '");
    assert!(output.status.success(), "{output:?}");
    let output = opened("return 1");
    assert!(output.status.code() == Some(1) && complaint(&output).contains("cannot ask for its state"), "{output:?}");
}
