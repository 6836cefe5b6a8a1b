//! The variables of a job: the table of all, and the reader that takes their values.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::time::Duration;

use crate::error::{Error, Result};

/// A variable, as docs/REFERENCE.md and the man pages describe it.
#[derive(Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// Values that it takes, in Markdown.
    pub(crate) format: &'static str,
    /// Value that counts where it is not set, in Markdown.
    pub(crate) default: &'static str,
    /// Programs that read it.
    pub readers: &'static [Program],
}

/// A part of the program that reads variables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// The build environment in a pod.
    Environment,
    /// The same on one machine, where options take the place of other variables.
    Local,
    /// Each command of a job.
    Job,
    /// Commands that fetch, pack or publish.
    Publishing,
    /// The sidecar.
    Sidecar,
    /// Commands that mark an environment or tell of it.
    Status,
    /// The log, of every command.
    Log,
}
use Program::{Environment, Job, Local, Log, Publishing, Sidecar, Status};

/// All variables.
pub const VARIABLES: &[Variable] = &[
    Variable {
        name: "IMS_ACTION",
        format: "`customize` or `create`",
        default: "none: it has to be set",
        readers: &[Environment, Job],
    },
    Variable {
        name: "IMAGE_ROOT_PARENT",
        format: "absolute path; an argument comes before it",
        default: "`/mnt/image`",
        readers: &[Environment, Job, Status],
    },
    Variable {
        name: "SSH_JAIL",
        format: "`True` or `False`, in this spelling",
        default: "`False`",
        readers: &[Environment, Job],
    },
    Variable {
        name: "JOB_ENABLE_DKMS",
        format: "`true` or `false`, in any case; `true` gives the jail all that the container has",
        default: "`false`",
        readers: &[Environment, Local],
    },
    Variable {
        name: "ENABLE_DEBUG",
        format: "`true` or `false`, in any case",
        default: "`false`",
        readers: &[Environment, Job],
    },
    Variable {
        name: "BUILD_ARCH",
        format: "`x86_64` or `aarch64`; if the image's programs are for another one, a warning says so, and they count",
        default: "none",
        readers: &[Environment, Job],
    },
    Variable {
        name: "IMS_JOB_ID",
        format: "one line of text; for the commands below, where there is an IMS, a UUID",
        default: "none",
        readers: &[Environment, Job],
    },
    Variable { name: "REMOTE_BUILD_NODE", format: "one line of text", default: "none", readers: &[Environment, Job] },
    Variable {
        name: "SSHD_OPTIONS",
        format: "sshd's options, quoted as for a shell; none is added. `-E` and `-f` take absolute paths; `-D`, \
            `-d`, `-i`, `-t`, `-T`, `-G`, `-V` are refused",
        default: "none",
        readers: &[Environment],
    },
    Variable {
        name: "SSHD_CONFIG_FILE",
        format: "the file that `-f` names, else `/etc/ssh/sshd_config`; another one is refused",
        default: "that file",
        readers: &[Environment],
    },
    Variable {
        name: "CUSTOMIZATION_SCRIPT",
        format: "path of a program or shell script that runs in the build environment after sshd listens; passed \
            over if it does not exist",
        default: "none",
        readers: &[Environment],
    },
    Variable {
        name: "IMS_CLOSE_GRACE",
        format: "whole seconds that running commands get after a verdict",
        default: "`10`",
        readers: &[Environment, Local],
    },
    Variable {
        name: "IMS_IDLE_LIMIT",
        format: "whole seconds without a session, and without the customization script running, after which the \
            environment closes as failed",
        default: "none: it stays open",
        readers: &[Environment],
    },
    Variable {
        name: "IMS_SESSION_LIMIT",
        format: "whole seconds that the environment stays open at the most; then it closes as failed. People at an \
            interactive shell are warned five minutes before, or after half of it",
        default: "none: it stays open",
        readers: &[Environment],
    },
    Variable {
        name: "IMS_JAIL_TIER",
        format: "how strong the jail is: `namespace`, `user` or `chroot`, or several with commas between them; the \
            first of those that can be had, in this order, and not opened if none can. `auto` is any of them",
        default: "`auto`",
        readers: &[Environment, Local],
    },
    Variable {
        name: "IMS_JAIL_HOSTNAME",
        format: "the jail's host name; not in the tier `chroot`. One that the image's /etc/hosts knows keeps sudo \
            from complaining",
        default: "none: the container's; of `customize` and `enter`, the image's name",
        readers: &[Environment, Local],
    },
    Variable {
        name: "IMS_JAIL_BINDS",
        format: "directories and files of the container that the jail shows, each as `SOURCE[:TARGET[:ro]]`, \
            separated by blanks or newlines and quoted as for a shell; see [bind mounts](#bind-mounts)",
        default: "none",
        readers: &[Environment],
    },
    Variable {
        name: "IMS_AGENT_FORWARDING",
        format: "`true` or `false`, in any case; `false` keeps ssh-agents of clients (`ssh -A`) out, in both modes; \
            with `true` it is as sshd's `AllowAgentForwarding` says",
        default: "`true`",
        readers: &[Environment, Local],
    },
    Variable {
        name: "LOG_FORMAT",
        format: "`text` or `json`, in any case; the option `--log-format` comes before it",
        default: "`text`",
        readers: &[Log],
    },
    Variable {
        name: "LOG_LEVEL",
        format: "`DEBUG`, `INFO`, `WARNING` (`WARN`) or `ERROR` (`CRITICAL`), in any case",
        default: "`INFO`",
        readers: &[Log],
    },
    Variable {
        name: "IMAGE_ROOT_ARCHIVE_NAME",
        format: "the new image's name",
        default: "`image`; of `customize` and `enter`, the source's",
        readers: &[Publishing],
    },
    Variable {
        name: "KERNEL_FILENAME",
        format: "a name in the image's /boot, or `auto`; on aarch64 `vmlinuz` means `Image`",
        default: "`auto`; of `sidecar`, `vmlinuz`",
        readers: &[Publishing],
    },
    Variable {
        name: "INITRD_FILENAME",
        format: "the same; `auto` is the one that belongs to the kernel, and `none` publishes no initrd",
        default: "`auto`; of `sidecar`, `initrd`, but `auto` where `KERNEL_FILENAME` is",
        readers: &[Publishing],
    },
    Variable {
        name: "KERNEL_PARAMETERS_FILENAME",
        format: "the same, of a file that may be missing",
        default: "`kernel-parameters`",
        readers: &[Publishing],
    },
    Variable {
        name: "DOWNLOAD_MD5SUM",
        format: "32 hexadecimal digits that the source has to come to",
        default: "none: the server's ETag, where that is an MD5",
        readers: &[Publishing],
    },
    Variable {
        name: "DOWNLOAD_SHA256SUM",
        format: "64 hexadecimal digits, its SHA-256; both are checked where both are given",
        default: "none",
        readers: &[Publishing],
    },
    Variable {
        name: "IMAGE_COMPRESSION",
        format: "`gzip`, `zstd`, `xz` or `none`",
        default: "`gzip`; of `customize` and `enter`, that of a squashfs that is the source",
        readers: &[Publishing],
    },
    Variable {
        name: "IMAGE_PACKER",
        format: "`ims-sshd`, which takes over the compressed blocks of unchanged files, or `mksquashfs`, which compresses \
            everything",
        default: "`mksquashfs`",
        readers: &[Publishing],
    },
    Variable {
        name: "IMAGE_FROM_SCRATCH",
        format: "`true` or `false`, in any case: whether nothing is taken over from the source",
        default: "`false`",
        readers: &[Publishing],
    },
    Variable {
        name: "IMAGE_KEEP_SOURCE",
        format: "`true` or `false`, in any case: whether `prepare` keeps a fetched squashfs for the packer `ims-sshd`",
        default: "`true` if three times its size is free",
        readers: &[Publishing],
    },
    Variable {
        name: "SOURCE_DATE_EPOCH",
        format: "seconds since 1970: the time of everything in the packed image",
        default: "none: the files' own",
        readers: &[Publishing],
    },
    Variable {
        name: "IMAGE_STORE",
        format: "`s3://BUCKET`, `s3://BUCKET/PREFIX`, `file:///FOLDER` or a folder",
        default: "`s3://` and `S3_BUCKET`",
        readers: &[Publishing],
    },
    Variable {
        name: "S3_BUCKET",
        format: "name of a bucket",
        default: "`boot-images`, where `S3_ENDPOINT` is set",
        readers: &[Publishing],
    },
    Variable {
        name: "S3_ENDPOINT",
        format: "URL of the S3 server",
        default: "`AWS_ENDPOINT_URL_S3`, else `AWS_ENDPOINT_URL`",
        readers: &[Publishing],
    },
    Variable {
        name: "S3_ACCESS_KEY",
        format: "the store's key",
        default: "`AWS_ACCESS_KEY_ID`",
        readers: &[Publishing],
    },
    Variable {
        name: "S3_SECRET_KEY",
        format: "its secret",
        default: "`AWS_SECRET_ACCESS_KEY`",
        readers: &[Publishing],
    },
    Variable {
        name: "S3_SSL_VALIDATE",
        format: "`true` or `false`, in any case, or a file of certificates: whether the store's certificate is checked",
        default: "`true`, with the certificates in `AWS_CA_BUNDLE`, where that is set",
        readers: &[Publishing],
    },
    Variable {
        name: "AWS_ACCESS_KEY_ID",
        format: "the store's key, where `S3_ACCESS_KEY` is not set",
        default: "none",
        readers: &[Publishing],
    },
    Variable { name: "AWS_SECRET_ACCESS_KEY", format: "its secret", default: "none", readers: &[Publishing] },
    Variable {
        name: "AWS_SESSION_TOKEN",
        format: "what belongs to keys that are good for a while; not sent where the keys above and those of \
            `S3_ACCESS_KEY` are both set",
        default: "none",
        readers: &[Publishing],
    },
    Variable {
        name: "AWS_REGION",
        format: "the region that requests are signed for; where no endpoint is set, that of Amazon's server",
        default: "`us-east-1`, where an endpoint is set",
        readers: &[Publishing],
    },
    Variable {
        name: "AWS_DEFAULT_REGION",
        format: "the same, where `AWS_REGION` is not set",
        default: "none",
        readers: &[Publishing],
    },
    Variable {
        name: "AWS_ENDPOINT_URL_S3",
        format: "URL of the S3 server, where `S3_ENDPOINT` is not set",
        default: "none",
        readers: &[Publishing],
    },
    Variable {
        name: "AWS_ENDPOINT_URL",
        format: "the same, where that is not set either",
        default: "none",
        readers: &[Publishing],
    },
    Variable {
        name: "AWS_CA_BUNDLE",
        format: "a file of certificates by which the store's is checked, where `S3_SSL_VALIDATE` names none",
        default: "none",
        readers: &[Publishing],
    },
    Variable {
        name: "CA_CERT",
        format: "a file of further authorities' certificates, in PEM; passed over if it does not exist",
        default: "none",
        readers: &[Publishing],
    },
    Variable {
        name: "IMS_URL",
        format: "URL of IMS; with `IMS_JOB_ID` the sidecar needs a store besides, since the volume goes with the job",
        default: "`https://api-gw-service-nmn.local/apis/ims` with credentials, else none: nothing is registered",
        readers: &[Publishing],
    },
    Variable {
        name: "OAUTH_CONFIG_DIR",
        format: "a folder with `endpoint`, `client-id` and `client-secret`; passed over if it holds no `endpoint`",
        default: "none",
        readers: &[Publishing],
    },
    Variable {
        name: "IMS_STALL_LIMIT",
        format: "whole seconds; a connection that brings less than 64 KiB in them is given up and made again",
        default: "`30`",
        readers: &[Publishing],
    },
    Variable {
        name: "IMS_RETRY_LIMIT",
        format: "whole seconds for which a request that fails is tried again, and within which an answer of a store \
            ends; a download that comes forward begins them anew",
        default: "`200`",
        readers: &[Publishing],
    },
    Variable {
        name: "IMS_START_LIMIT",
        format: "whole seconds that the sidecar waits for the build environment to start",
        default: "`120`",
        readers: &[Sidecar],
    },
];

impl Variable {
    /// Its row of the table in docs/REFERENCE.md.
    pub fn row(&self) -> String {
        format!("| `{}` | {} | {} |", self.name, self.format, self.default)
    }
}

/// A checked value of the command line or of a variable, or the format that was expected.
pub(crate) type Checked = std::result::Result<String, String>;

/// Whether a value's letters have to be in the case that is expected.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Case {
    Exact,
    Any,
}

/// Values of a variable that is true or false.
pub(crate) const TRUTH: [(&str, bool); 2] = [("true", true), ("false", false)];

/// Takes values out of the variables and collects what is wrong with them. An empty variable counts as not set.
pub(crate) struct Reader {
    variables: HashMap<OsString, OsString>,
    complaints: Vec<String>,
}

impl Reader {
    /// Where a variable comes twice, the later one counts.
    pub(crate) fn of(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        Self { variables: variables.into_iter().collect(), complaints: Vec::new() }
    }

    /// Adds a complaint, once: several parts of a program may read the same variable.
    pub(crate) fn complain(&mut self, complaint: String) {
        if !self.complaints.contains(&complaint) {
            self.complaints.push(complaint);
        }
    }

    /// Returns what was read, or all complaints as one error. A value that is missing has its complaint.
    pub(crate) fn finish<T>(self, read: Option<T>) -> Result<T> {
        let refusal = || Error::bad_input(self.complaints.join("; also, "));
        read.filter(|_| self.complaints.is_empty()).ok_or_else(refusal)
    }

    pub(crate) fn text(&mut self, name: &str) -> Option<String> {
        let value = self.variables.get(OsStr::new(name)).filter(|v| !v.is_empty())?;
        match value.to_str() {
            Some(text) => Some(text.to_owned()),
            None => {
                let complaint = format!("{name} is '{}': expected UTF-8", value.to_string_lossy());
                self.complain(complaint);
                None
            }
        }
    }

    /// A value that ends up as one word of a configuration line; it may be empty.
    pub(crate) fn line(&mut self, name: &str) -> Option<String> {
        self.variables.get(OsStr::new(name))?;
        let value = self.text(name).unwrap_or_default();
        if value.contains(|c: char| c.is_control()) {
            self.complain(format!(
                "{name} is '{}': expected one line without control characters",
                value.escape_debug()
            ));
            return None;
        }
        Some(value)
    }

    pub(crate) fn choice<T: Copy>(&mut self, name: &str, choices: &[(&str, T)], case: Case) -> Option<T> {
        let value = self.text(name)?;
        let found = choices.iter().find(|(word, _)| match case {
            Case::Exact => value == *word,
            Case::Any => value.eq_ignore_ascii_case(word),
        });
        if found.is_none() {
            let known: Vec<_> = choices.iter().map(|(word, _)| format!("'{word}'")).collect();
            let exactly = if case == Case::Exact { ", in this spelling" } else { "" };
            self.complain(format!("{name} is '{value}': expected {}{exactly}", known.join(" or ")));
        }
        found.map(|(_, choice)| *choice)
    }

    pub(crate) fn seconds(&mut self, name: &str) -> Option<Duration> {
        let value = self.text(name)?;
        let seconds = value.parse().ok().map(Duration::from_secs);
        if seconds.is_none() {
            self.complain(format!("{name} is '{value}': expected whole seconds"));
        }
        seconds
    }

    /// The value of `name`, if `check` accepts it; it says what it expected else.
    pub(crate) fn check<T>(
        &mut self,
        name: &str,
        value: &str,
        check: impl FnOnce(&str) -> std::result::Result<T, String>,
    ) -> Option<T> {
        let refused = |expected| self.complain(format!("{name} is '{value}': {expected}"));
        check(value).map_err(refused).ok()
    }

    pub(crate) fn accept<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|e| self.complain(e.to_string())).ok()
    }
}
