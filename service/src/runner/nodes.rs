//! Asks remote build nodes over SSH whether they can run jobs. The commands are upstream's, since the administrator of
//! a node may have restricted the key to these commands.

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use ims_sshd::error::{Attempt, Result};
use tempfile::TempDir;
use tokio::process::Command;

use super::NodeStatus;

/// Time limit for all answers of a node together: a node may drop packets silently.
const LIMIT: Duration = Duration::from_secs(6);

/// Commands that ask for the architecture, for podman, and for the number of jobs.
const QUESTIONS: [&str; 3] = ["uname -i", "which podman", "ls -d1 /tmp/* | grep /tmp/ims_ | wc -l"];

/// Status of a node to which a connection was established, in upstream's words.
pub(super) const CONNECTED: &str = "SSH connection established.";

/// Exit code of ssh when it could not connect.
const NO_CONNECTION: i32 = 255;

/// Access to the remote build nodes.
#[derive(Debug, Clone)]
pub struct Nodes {
    /// Private key for logging in as root on the nodes. If there is a file `known_hosts` next to the key, only the host
    /// keys in that file are accepted.
    key: PathBuf,
}

impl Nodes {
    /// Creates access to the nodes: logs in as root with the private key in the file `key`.
    pub fn new(key: &Path) -> Self {
        Self { key: key.to_owned() }
    }

    /// Returns whether the key exists; without a key no node can run jobs.
    pub fn has_key(&self) -> bool {
        self.key.exists()
    }

    /// Asks a node for its status.
    pub async fn probe(&self, xname: &str) -> NodeStatus {
        let unknown = NodeStatus::unknown(xname);
        if !is_host(xname) {
            return NodeStatus { ssh: "Unable to connect to node: its name is no host name.".into(), ..unknown };
        }
        let keys = match self.copy_key() {
            Ok(keys) => keys,
            Err(error) => return NodeStatus { ssh: format!("Unable to connect to node: {error}."), ..unknown },
        };
        let [arch, podman, jobs] = QUESTIONS.map(|question| self.ask(keys.path(), xname, question));
        match tokio::time::timeout(LIMIT, async { tokio::join!(arch, podman, jobs) }).await {
            Ok((arch, podman, jobs)) => read(xname, [&arch, &podman, &jobs]),
            Err(_) => NodeStatus {
                ssh: format!("Unable to connect to node: it has not answered for {} s.", LIMIT.as_secs()),
                ..unknown
            },
        }
    }

    /// Copies the key to a file that only this user can read: ssh refuses a key that others can read.
    fn copy_key(&self) -> Result<TempDir> {
        let attempted = || format!("read the key {}", self.key.display());
        let text = std::fs::read(&self.key).attempt(attempted)?;
        let directory = tempfile::tempdir().attempt(attempted)?;
        let mut file = std::fs::File::options();
        let file = file.write(true).create_new(true).mode(0o600).open(directory.path().join("key"));
        std::io::Write::write_all(&mut file.attempt(attempted)?, &text).attempt(attempted)?;
        Ok(directory)
    }

    async fn ask(&self, keys: &Path, xname: &str, question: &str) -> std::io::Result<Output> {
        let known = self.key.with_file_name("known_hosts");
        let (checking, known) = if known.exists() { ("yes", known) } else { ("no", "/dev/null".into()) };
        let options = [
            ("BatchMode", "yes"),
            ("ConnectTimeout", "5"),
            ("IdentitiesOnly", "yes"),
            ("StrictHostKeyChecking", checking),
            ("UserKnownHostsFile", &known.display().to_string()),
            ("GlobalKnownHostsFile", "/dev/null"),
            ("ClearAllForwardings", "yes"),
            ("LogLevel", "ERROR"),
        ];
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "none", "-T", "-i"]).arg(keys.join("key"));
        ssh.args(options.iter().flat_map(|(name, value)| ["-o".to_owned(), format!("{name}={value}")]));
        ssh.args(["--", &format!("root@{xname}"), question]).stdin(Stdio::null()).kill_on_drop(true);
        ssh.output().await
    }
}

/// Returns whether ssh would take the text for a host and for nothing else, such as an option.
fn is_host(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with('-')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || ['-', '_', '.', ':'].contains(&c))
}

/// Reads a node's answers to [`QUESTIONS`].
fn read(xname: &str, answers: [&std::io::Result<Output>; 3]) -> NodeStatus {
    let mut status = NodeStatus::unknown(xname);
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    let mut texts = [const { String::new() }; 3];
    for (text, answer) in texts.iter_mut().zip(answers) {
        match answer {
            Ok(output) if output.status.code() == Some(NO_CONNECTION) => {
                status.ssh = format!("Unable to connect to node: {}", said(&output.stderr));
                return status;
            }
            Ok(output) => *text = said(&output.stdout),
            Err(error) => {
                status.ssh = format!("Unable to connect to node: cannot run ssh: {error}");
                return status;
            }
        }
    }
    status.ssh = CONNECTED.into();
    let [arch, podman, jobs] = texts;
    status.arch = match () {
        () if arch.contains("aarch64") => "aarch64".into(),
        () if arch.contains("x86") => "x86_64".into(),
        () => format!("Undefined architecture type for node, 'uname -i' says: {arch}"),
    };
    let has_arch = ["aarch64", "x86_64"].contains(&status.arch.as_str());
    let has_podman = podman.contains("/usr/bin/podman");
    status.podman =
        if has_podman { "Podman present at /usr/bin/podman" } else { "Podman not installed on node." }.into();
    status.is_able = has_arch && has_podman;
    status.jobs = jobs.parse().unwrap_or(-1);
    status
}

/// Chooses the node for a job of this architecture: the first of the able nodes with the fewest jobs. `known` returns
/// the number of jobs that this service has on a node, which may be higher than the number that the node reports.
pub fn choose<'a>(statuses: &'a [NodeStatus], arch: &str, known: impl Fn(&str) -> i64) -> Option<&'a str> {
    let able = statuses.iter().filter(|status| status.is_able && status.arch == arch);
    // Prefer nodes whose number of jobs is known.
    let load = |status: &&NodeStatus| (status.jobs < 0, status.jobs.max(known(&status.xname)));
    able.min_by_key(load).map(|status| status.xname.as_str())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;

    fn answer(code: i32, stdout: &str, stderr: &str) -> Output {
        Output { status: ExitStatus::from_raw(code << 8), stdout: stdout.into(), stderr: stderr.into() }
    }

    fn status(arch: &str, podman: &str, jobs: &str) -> NodeStatus {
        let [arch, podman, jobs] = [arch, podman, jobs].map(|text| Ok(answer(0, text, "")));
        read("x", [&arch, &podman, &jobs])
    }

    #[test]
    fn answers_are_read_as_upstream_reads_them() {
        let able = status("aarch64\n", "/usr/bin/podman\n", "3\n");
        assert!(able.is_able);
        assert_eq!((able.arch.as_str(), able.jobs), ("aarch64", 3));
        assert_eq!(able.podman, "Podman present at /usr/bin/podman");
        assert_eq!(able.ssh, "SSH connection established.");
        assert_eq!(status("x86_64", "/usr/bin/podman", "?").jobs, -1);
        assert!(status("x86_64", "/usr/bin/podman", "?").is_able);
        assert!(!status("unknown", "/usr/bin/podman", "0").is_able);
        assert!(!status("x86_64", "/usr/local/bin/podman", "0").is_able);
        let refused = Ok(answer(255, "", "Permission denied (publickey).\n"));
        let refused = read("x", [&refused, &refused, &refused]);
        assert_eq!(refused.ssh, "Unable to connect to node: Permission denied (publickey).");
        assert_eq!((refused.arch.as_str(), refused.jobs, refused.is_able), ("Unknown", -1, false));
    }

    #[test]
    fn host_is_never_an_option() {
        assert!(is_host("x3000c0s17b1n0") && is_host("fd00::1"));
        assert!(!["", "-oProxyCommand=x", "root@x", "a b", "$(id)"].into_iter().any(is_host));
    }

    #[test]
    fn node_with_the_fewest_jobs_is_chosen() {
        let node = |xname: &str, arch: &str, jobs, is_able| NodeStatus {
            arch: arch.into(),
            jobs,
            is_able,
            ..NodeStatus::unknown(xname)
        };
        let statuses = [
            node("unknown", "x86_64", -1, true),
            node("two", "x86_64", 2, true),
            node("one", "x86_64", 1, true),
            node("also one", "x86_64", 1, true),
            node("dead", "x86_64", 0, false),
            node("arm", "aarch64", 0, true),
        ];
        assert_eq!(choose(&statuses, "x86_64", |_| 0), Some("one"));
        assert_eq!(choose(&statuses, "x86_64", |xname| if xname == "one" { 2 } else { 0 }), Some("also one"));
        assert_eq!(choose(&statuses, "aarch64", |_| 9), Some("arm"));
        assert_eq!(choose(&statuses[..1], "x86_64", |_| 0), Some("unknown"));
        assert_eq!(choose(&statuses, "riscv64", |_| 0), None);
    }
}
