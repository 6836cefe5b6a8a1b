//! The protocol between the two sides of a remote job, and the protocol between a node's parent process and the process
//! inside. Both ends of each protocol use these types. A message is a line of JSON on a
//! [`Channel`](crate::remote::channel::Channel).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::transfer::checksum::hex;
use crate::verdict::Verdict;

/// A message. Each side refuses messages that only the other side may receive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub(crate) enum Message {
    /// To the node, as the first message: the work that it must do.
    Order(Box<Order>),
    /// From the node, before the near side sends anything else: facts about the node.
    Hello(Hello),
    /// From either side: a file follows as data, and then its [`Message::Sum`].
    File {
        /// Which file.
        part: Part,
        /// Length in bytes.
        size: u64,
    },
    /// From either side: the digest of the file that was just sent.
    Sum {
        /// SHA-256, in hexadecimal digits.
        sha256: String,
    },
    /// From the node: sshd accepts connections on this port of the node's loopback address.
    Listening {
        /// The port.
        port: u16,
        /// Public host key of that sshd, in OpenSSH's format.
        host_key: String,
    },
    /// To the node: report the environment.
    Ask,
    /// From the node: the report that `ims-sshd status` prints there; null if the environment is not open.
    Report {
        /// The environment's report.
        report: Value,
    },
    /// To the node: a user has marked the image with this verdict.
    Mark(Judged),
    /// From the node: the environment has closed.
    Closed {
        /// The environment's verdict.
        verdict: Judged,
        /// The environment's exit code.
        exit_code: u8,
    },
    /// From the node: the build has ended; its files follow.
    Built {
        /// Reason of the failure; `None` if the build succeeded.
        failure: Option<String>,
    },
    /// From the process inside to its parent: these files are complete, in the directory of results.
    Packed {
        /// The files.
        parts: Vec<Part>,
    },
    /// From the node: all files have been sent.
    Sent,
    /// From the node: the job cannot continue.
    Failed {
        /// The error's text.
        why: String,
    },
    /// To the node: end the job and remove everything of it.
    End,
    /// From the node, as the last message: nothing of the job is left on the node.
    Gone,
}

impl Message {
    /// Returns the message's kind, as its line names it.
    pub(crate) fn kind(&self) -> String {
        let line = serde_json::to_value(self).unwrap_or_default();
        line["is"].as_str().unwrap_or_default().to_owned()
    }
}

/// A verdict, as messages contain it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Judged {
    /// [`Verdict::Complete`].
    Complete,
    /// [`Verdict::Failed`].
    Failed,
}

impl From<Verdict> for Judged {
    fn from(verdict: Verdict) -> Self {
        if verdict == Verdict::Complete { Self::Complete } else { Self::Failed }
    }
}

impl From<Judged> for Verdict {
    fn from(judged: Judged) -> Self {
        if judged == Judged::Complete { Self::Complete } else { Self::Failed }
    }
}

/// A file that one side sends to the other. The receiver chooses the file's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Part {
    /// For a customize job the image that it begins with, a squashfs; for a build the recipe, a tar archive.
    Source,
    /// The packed image.
    Image,
    /// Kernel of the image.
    Kernel,
    /// Initrd of the image.
    Initrd,
    /// Kernel parameters of the image.
    Parameters,
    /// Report of the files that were changed, as JSON.
    Changes,
    /// Log of kiwi-ng.
    Log,
    /// The image root that a failed build has left behind, as a squashfs.
    Tree,
}

impl Part {
    /// Returns the name of the file on the node.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Image => "image",
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
            Self::Parameters => "parameters",
            Self::Changes => "changes",
            Self::Log => "log",
            Self::Tree => "tree",
        }
    }
}

/// An order to a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Order {
    /// The job's ID, which [`is_job_id`] accepts.
    pub(crate) job: String,
    /// Number of bytes that the job needs at least: the length of the image that will be sent; for a build, the length
    /// of the recipe plus the minimum free space for a build.
    pub(crate) size: u64,
    /// Number of seconds of silence after which each side considers the connection lost.
    pub(crate) patience: u64,
    /// The work to be done.
    pub(crate) task: Task,
}

/// The work that a job does on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Task {
    /// Opens the image for logins over SSH, and packs it.
    Customize(Customize),
    /// Builds an image root from the recipe and packs it.
    Build(Build),
}

impl Task {
    /// Returns the environment variables of the job, as a container of a pod gets them.
    pub(crate) fn variables(&self) -> &[(String, String)] {
        match self {
            Self::Customize(Customize { variables, .. }) | Self::Build(Build { variables, .. }) => variables,
        }
    }
}

/// Order to build an image root with the node's own kiwi-ng.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Build {
    /// Variables of the job, as a container of a pod gets them.
    pub(crate) variables: Vec<(String, String)>,
    /// Programs that the node must have.
    pub(crate) programs: Vec<String>,
    /// Profiles to build.
    pub(crate) profiles: Vec<String>,
    /// Certificate of the site's certificate authority, in PEM.
    pub(crate) authority: Option<String>,
    /// Package with that certificate.
    pub(crate) ca_rpm: Option<Blob>,
    /// Keys of repositories: file name and content.
    pub(crate) signing_keys: Vec<(String, Blob)>,
    /// Additional CA certificates for the image: file name and content.
    pub(crate) authorities: Vec<(String, String)>,
    /// Number of seconds for which the node waits for the repositories; `None` if it does not wait.
    pub(crate) wait: Option<u64>,
    /// Patterns of the paths that are left out of the packed image.
    pub(crate) exclude: Vec<String>,
    /// True if the node sends back the image root even if the build fails.
    pub(crate) returns_tree: bool,
}

/// Bytes that may be no text; messages contain them in base64.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub(crate) struct Blob(pub(crate) Vec<u8>);

impl From<Blob> for String {
    fn from(Blob(bytes): Blob) -> Self {
        STANDARD.encode(bytes)
    }
}

impl TryFrom<String> for Blob {
    type Error = base64::DecodeError;

    fn try_from(text: String) -> std::result::Result<Self, Self::Error> {
        STANDARD.decode(text).map(Self)
    }
}

/// Order to open an environment on the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Customize {
    /// Variables of the job, as a container of a pod gets them.
    pub(crate) variables: Vec<(String, String)>,
    /// Public keys that may log in, in OpenSSH's format.
    pub(crate) keys: String,
    /// Additional CA certificates for the image: file name and content.
    pub(crate) authorities: Vec<(String, String)>,
    /// Additional variables that sessions get.
    pub(crate) session_variables: Vec<(String, String)>,
    /// Patterns of the paths that are left out of the packed image.
    pub(crate) exclude: Vec<String>,
    /// True if the node sends back a report of the changed files.
    pub(crate) reports_changes: bool,
    /// Lines of the site's sshd configuration. They replace this program's own lines for sessions.
    pub(crate) sshd: Option<Vec<(String, String)>>,
    /// The customization script.
    pub(crate) script: Option<Script>,
    /// Name of the image, which is the host name of the jail and stands in prompt and greeting; `None` for a job's.
    pub(crate) image: Option<String>,
}

/// A script that the environment runs once sshd listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Script {
    /// Text of the script.
    pub(crate) text: String,
    /// True if the script is executed directly, false if a shell runs its text.
    pub(crate) is_executable: bool,
}

/// Facts that a node reports about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hello {
    /// Architecture, as `uname -m` prints it.
    pub(crate) arch: String,
    /// Release of the kernel.
    pub(crate) kernel: String,
    /// Free space for the job, in bytes.
    pub(crate) free: u64,
    /// Reasons why the job cannot run on the node, one sentence each.
    pub(crate) refusals: Vec<String>,
}

/// Returns whether the variable `name` configures a node's log. Only the level counts: the lines of the node's log
/// become events of this side's log, which has its own format.
pub(crate) fn is_of_log(name: &str) -> bool {
    name == "LOG_LEVEL"
}

/// Returns whether `id` can be a job's ID, which becomes part of a path on the node.
pub(crate) fn is_job_id(id: &str) -> bool {
    (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// Returns `id`, the ID of a job of IMS. Fails if a job on a node cannot have this ID.
pub(crate) fn job_of_ims(id: &str) -> Result<String> {
    if is_job_id(id) {
        return Ok(id.to_owned());
    }
    Err(Error::bad_input(format!("IMS_JOB_ID is '{id}': expected letters, digits and dashes")))
}

/// Returns a new random ID for a job without IMS.
pub(crate) fn job_without_ims() -> Result<String> {
    let mut number = [0; 8];
    SystemRandom::new().fill(&mut number).map_err(|e| Error::new("choose a number for the job").because(e))?;
    Ok(format!("local-{}", hex(&number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_line_they_are_written_as() {
        let task = Task::Customize(Customize {
            variables: vec![("SSH_JAIL".into(), "True\n".into())],
            keys: "ssh-ed25519 AAAA ö\n".into(),
            authorities: vec![("ca.crt".into(), "-----BEGIN".into())],
            session_variables: vec![("HOME".into(), "/".into())],
            exclude: vec!["boot/*".into()],
            reports_changes: true,
            sshd: Some(vec![("permittty".into(), "no".into())]),
            script: Some(Script { text: "exit\n".into(), is_executable: true }),
            image: None,
        });
        let build = Task::Build(Build {
            variables: Vec::new(),
            programs: vec!["kiwi-ng".into()],
            profiles: vec!["kernel".into()],
            authority: Some("-----BEGIN".into()),
            ca_rpm: Some(Blob(vec![0xed, 0xab, 0])),
            signing_keys: vec![("key.gpg".into(), Blob(vec![0x99]))],
            authorities: Vec::new(),
            wait: Some(500),
            exclude: Vec::new(),
            returns_tree: true,
        });
        let messages = [
            Message::Order(Box::new(Order { job: "5ec3".into(), size: u64::MAX, patience: 60, task })),
            Message::Order(Box::new(Order { job: "5ec4".into(), size: 1, patience: 60, task: build })),
            Message::Built { failure: Some("no".into()) },
            Message::Hello(Hello { arch: "x86_64".into(), kernel: "6".into(), free: 1, refusals: vec!["no".into()] }),
            Message::File { part: Part::Source, size: 0 },
            Message::Report { report: serde_json::json!({ "sessions": [{ "client": "127.0.0.1" }] }) },
            Message::Report { report: Value::Null },
            Message::Mark(Judged::Failed),
            Message::Closed { verdict: Judged::Complete, exit_code: 0 },
            Message::Packed { parts: vec![Part::Image, Part::Kernel] },
            Message::End,
        ];
        for message in messages {
            let line = serde_json::to_string(&message).unwrap();
            assert!(!line.contains('\n'), "{line}");
            assert_eq!(serde_json::from_str::<Message>(&line).unwrap(), message);
        }
        assert!(serde_json::from_str::<Message>(r#"{"is":"listening","port":70000,"host_key":""}"#).is_err());
    }

    #[test]
    fn job_id_is_one_name_without_dots_or_slashes() {
        assert!(is_job_id("0b51c2ea-9ee6-4b6c-a0d5-8f6e3a1cbd0c"));
        for wrong in ["", ".", "..", "a/b", "a b", "a;b", "$(id)", "ä", &"a".repeat(65)] {
            assert!(!is_job_id(wrong), "{wrong}");
        }
    }
}
