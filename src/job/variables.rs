//! The table of a job's variables, and the reader that takes their values.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::time::Duration;

use crate::error::{Error, Result};

/// A variable, as docs/REFERENCE.md and the man pages describe it.
#[derive(Debug)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// Accepted values, in Markdown.
    pub(crate) format: &'static str,
    /// Value if the variable is not set, in Markdown.
    pub(crate) default: &'static str,
    /// Programs that read it.
    pub readers: &'static [Program],
}

/// A part of the program that reads variables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// The build environment in a pod.
    Environment,
    /// The build environment on one machine, where options replace other variables.
    Local,
    /// Each command of a job.
    Job,
    /// Commands that fetch, pack or publish.
    Publishing,
    /// Steps from a recipe to an image root.
    Recipe,
    /// The sidecar.
    Sidecar,
    /// Commands that mark an environment or show its state.
    Status,
    /// The log, of every command.
    Log,
}
use Program::{Environment, Job, Local, Log, Publishing, Recipe, Sidecar, Status};

/// All variables.
pub const VARIABLES: &[Variable] = &[
    Variable {
        name: "IMS_ACTION",
        format: "`customize` or `create`",
        default: "none: required",
        readers: &[Environment, Job],
    },
    Variable {
        name: "IMAGE_ROOT_PARENT",
        format: "absolute path; an argument overrides it",
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
        format: "`true` or `false`, in upper or lower case; `true` gives the jail everything that the container has",
        default: "`false`",
        readers: &[Environment, Local],
    },
    Variable {
        name: "ENABLE_DEBUG",
        format: "`true` or `false`, in upper or lower case",
        default: "`false`",
        readers: &[Environment, Job],
    },
    Variable {
        name: "BUILD_ARCH",
        format: "`x86_64` or `aarch64`; if the image's programs are for another architecture, they decide, and a \
            warning is logged",
        default: "none",
        readers: &[Environment, Job, Recipe],
    },
    Variable {
        name: "IMS_JOB_ID",
        format: "one line of text; a UUID if the commands below use an IMS",
        default: "none",
        readers: &[Environment, Job, Recipe],
    },
    Variable {
        name: "REMOTE_BUILD_NODE",
        format: "name or address of the host on which the image is built or changed, and packed; see \
            [REMOTE_NODES.md](REMOTE_NODES.md)",
        default: "none",
        readers: &[Environment, Job, Recipe],
    },
    Variable {
        name: "REMOTE_HEARTBEAT_TIMEOUT_COUNT",
        format: "whole number; after this many times 5 s of silence a build node counts as lost, and the job fails",
        default: "`12`",
        readers: &[Environment, Recipe],
    },
    Variable {
        name: "IMS_REMOTE_DKMS",
        format: "`open` or `closed`, in upper or lower case; `closed` keeps the jail on a remote build node as it is \
            without `JOB_ENABLE_DKMS`",
        default: "`open`",
        readers: &[Environment],
    },
    Variable {
        name: "IMS_REMOTE_KEY",
        format: "absolute path of the private key for remote build nodes; if there is a file `known_hosts` beside it, \
            only host keys in that are accepted",
        default: "`/etc/cray/remote-keys/id_ecdsa`",
        readers: &[Environment, Recipe],
    },
    Variable {
        name: "SSHD_OPTIONS",
        format: "sshd's options, quoted as for a shell; no other option is added. `-E` and `-f` take absolute paths; \
            `-D`, `-d`, `-i`, `-t`, `-T`, `-G`, `-V` are refused",
        default: "none",
        readers: &[Environment],
    },
    Variable {
        name: "SSHD_CONFIG_FILE",
        format: "the file that `-f` names, otherwise `/etc/ssh/sshd_config`; any other is refused",
        default: "that file",
        readers: &[Environment],
    },
    Variable {
        name: "CUSTOMIZATION_SCRIPT",
        format: "path of a program or shell script that runs in the build environment once sshd listens; ignored \
            if it does not exist",
        default: "none",
        readers: &[Environment],
    },
    Variable {
        name: "IMS_CLOSE_GRACE",
        format: "whole seconds that running commands get to end after a verdict",
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
        format: "whole seconds after which the environment closes as failed. People at an interactive shell are warned \
            five minutes before, or halfway if the limit is below ten minutes",
        default: "none: it stays open",
        readers: &[Environment],
    },
    Variable {
        name: "IMS_JAIL_TIER",
        format: "how strong the jail is: `namespace`, `user` or `chroot`, or several of them separated by commas. The \
            strongest one that is available is used; the environment does not open if none is. `auto` allows all",
        default: "`auto`",
        readers: &[Environment, Local],
    },
    Variable {
        name: "IMS_JAIL_HOSTNAME",
        format: "the jail's host name; ignored in the tier `chroot`. sudo warns about a name that the image's \
            /etc/hosts lacks",
        default: "none: the container's; with `customize` and `enter`, the image's name",
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
        format: "`true` or `false`, in upper or lower case; `false` disables forwarding of clients' ssh-agents \
            (`ssh -A`) in both modes; with `true`, sshd's `AllowAgentForwarding` decides",
        default: "`true`",
        readers: &[Environment, Local],
    },
    Variable {
        name: "LOG_FORMAT",
        format: "`text` or `json`, in upper or lower case; the option `--log-format` overrides it",
        default: "`text`",
        readers: &[Log],
    },
    Variable {
        name: "LOG_LEVEL",
        format: "`DEBUG`, `INFO`, `WARNING` (`WARN`) or `ERROR` (`CRITICAL`), in upper or lower case",
        default: "`INFO`",
        readers: &[Log],
    },
    Variable {
        name: "IMAGE_ROOT_ARCHIVE_NAME",
        format: "name of the new image",
        default: "`image`; with `customize` and `enter`, the source's name, and with `create` the recipe's",
        readers: &[Publishing],
    },
    Variable {
        name: "KERNEL_FILENAME",
        format: "a name in the image's /boot, or `auto`; on aarch64 `vmlinuz` means `Image`",
        default: "`auto`; with `sidecar`, `vmlinuz`",
        readers: &[Publishing],
    },
    Variable {
        name: "INITRD_FILENAME",
        format: "a name in the image's /boot; `auto` finds the initrd of the kernel, and `none` publishes no initrd",
        default: "`auto`; with `sidecar`, `initrd`, or `auto` if `KERNEL_FILENAME` is `auto`",
        readers: &[Publishing],
    },
    Variable {
        name: "KERNEL_PARAMETERS_FILENAME",
        format: "a name in the image's /boot; the file may be missing",
        default: "`kernel-parameters`",
        readers: &[Publishing],
    },
    Variable {
        name: "DOWNLOAD_MD5SUM",
        format: "32 hexadecimal digits: the MD5 that the source must have",
        default: "none: the server's ETag, if that is an MD5",
        readers: &[Publishing, Recipe],
    },
    Variable {
        name: "DOWNLOAD_SHA256SUM",
        format: "64 hexadecimal digits: the SHA-256 that the source must have; if both are set, both are checked",
        default: "none",
        readers: &[Publishing, Recipe],
    },
    Variable {
        name: "IMAGE_COMPRESSION",
        format: "`gzip`, `zstd`, `xz` or `none`",
        default: "the source's, if the packer takes over blocks of a squashfs, or if `customize` or `enter` opened one; otherwise `gzip`",
        readers: &[Publishing],
    },
    Variable {
        name: "IMAGE_PACKER",
        format: "`ims-sshd`, which copies the compressed blocks of unchanged files from the source, or `mksquashfs`, \
            which compresses everything",
        default: "`ims-sshd`",
        readers: &[Publishing],
    },
    Variable {
        name: "IMAGE_FROM_SCRATCH",
        format: "`true` or `false`, in upper or lower case: whether all files are compressed anew, also those that did \
            not change",
        default: "`false`",
        readers: &[Publishing],
    },
    Variable {
        name: "IMAGE_KEEP_SOURCE",
        format: "`true` or `false`, in upper or lower case: whether `prepare` keeps a fetched squashfs for the packer \
            `ims-sshd`; with `true`, it also keeps a copy of a squashfs of this machine",
        default: "for a fetched squashfs, `true` if three times its size is free",
        readers: &[Publishing],
    },
    Variable {
        name: "SOURCE_DATE_EPOCH",
        format: "seconds since 1970: modification time of all files in the packed image",
        default: "none: the files' own",
        readers: &[Publishing, Recipe],
    },
    Variable {
        name: "IMAGE_STORE",
        format: "`s3://BUCKET`, `s3://BUCKET/PREFIX`, `file:///DIRECTORY` or a directory",
        default: "`s3://` followed by `S3_BUCKET`",
        readers: &[Publishing],
    },
    Variable {
        name: "S3_BUCKET",
        format: "name of a bucket",
        default: "`boot-images`, if `S3_ENDPOINT` is set",
        readers: &[Publishing],
    },
    Variable {
        name: "S3_ENDPOINT",
        format: "URL of the S3 server; `file:///DIRECTORY` for a directory with a subdirectory for each bucket",
        default: "`AWS_ENDPOINT_URL_S3`, otherwise `AWS_ENDPOINT_URL`",
        readers: &[Publishing, Recipe],
    },
    Variable {
        name: "S3_ACCESS_KEY",
        format: "access key ID of the store",
        default: "`AWS_ACCESS_KEY_ID`",
        readers: &[Publishing, Recipe],
    },
    Variable {
        name: "S3_SECRET_KEY",
        format: "secret access key of the store",
        default: "`AWS_SECRET_ACCESS_KEY`",
        readers: &[Publishing, Recipe],
    },
    Variable {
        name: "S3_SSL_VALIDATE",
        format: "`true` or `false`, in upper or lower case, or a file of trusted certificates: whether the store's \
            certificate is checked",
        default: "`true`, with the certificates in `AWS_CA_BUNDLE` if that is set",
        readers: &[Publishing, Recipe],
    },
    Variable {
        name: "AWS_ACCESS_KEY_ID",
        format: "access key ID of the store, if `S3_ACCESS_KEY` is not set",
        default: "none",
        readers: &[Publishing],
    },
    Variable {
        name: "AWS_SECRET_ACCESS_KEY",
        format: "secret access key of the store, if `S3_SECRET_KEY` is not set",
        default: "none",
        readers: &[Publishing],
    },
    Variable {
        name: "AWS_SESSION_TOKEN",
        format: "session token of temporary keys; not sent if the keys above and those of `S3_ACCESS_KEY` are both \
            set",
        default: "none",
        readers: &[Publishing],
    },
    Variable {
        name: "AWS_REGION",
        format: "region that requests are signed for; if no endpoint is set, the region of Amazon's server",
        default: "`us-east-1`, if an endpoint is set",
        readers: &[Publishing],
    },
    Variable {
        name: "AWS_DEFAULT_REGION",
        format: "region that requests are signed for, if `AWS_REGION` is not set",
        default: "none",
        readers: &[Publishing],
    },
    Variable {
        name: "AWS_ENDPOINT_URL_S3",
        format: "URL of the S3 server, if `S3_ENDPOINT` is not set",
        default: "none",
        readers: &[Publishing],
    },
    Variable {
        name: "AWS_ENDPOINT_URL",
        format: "URL of the S3 server, if neither `S3_ENDPOINT` nor `AWS_ENDPOINT_URL_S3` is set",
        default: "none",
        readers: &[Publishing],
    },
    Variable {
        name: "AWS_CA_BUNDLE",
        format: "a file of CA certificates that verify the store's certificate, if `S3_SSL_VALIDATE` names none",
        default: "none",
        readers: &[Publishing],
    },
    Variable {
        name: "CA_CERT",
        format: "a PEM file of additional CA certificates; ignored if it does not exist",
        default: "none",
        readers: &[Publishing, Recipe],
    },
    Variable {
        name: "IMS_URL",
        format: "URL of IMS, or `unix:/PATH` of its socket; with `IMS_JOB_ID` the sidecar also needs a store, because the volume is deleted with \
            the job",
        default: "`https://api-gw-service-nmn.local/apis/ims` with credentials, otherwise none: nothing is registered",
        readers: &[Publishing, Recipe],
    },
    Variable {
        name: "IMS_TOKEN_FILE",
        format: "a file with the token of an IMS that has no OAuth server; ignored with `OAUTH_CONFIG_DIR`",
        default: "none",
        readers: &[Publishing, Recipe],
    },
    Variable {
        name: "OAUTH_CONFIG_DIR",
        format: "a directory with `endpoint`, `client-id` and `client-secret`; ignored if it has no `endpoint`",
        default: "none",
        readers: &[Publishing, Recipe],
    },
    Variable {
        name: "IMS_STALL_LIMIT",
        format: "whole seconds; a connection that transfers less than 64 KiB in that time is closed and opened again",
        default: "`30`",
        readers: &[Publishing, Recipe],
    },
    Variable {
        name: "IMS_RETRY_LIMIT",
        format: "whole seconds during which a failed request is retried, and within which a response of a store must \
            end; progress of a download restarts them",
        default: "`200`",
        readers: &[Publishing, Recipe],
    },
    Variable {
        name: "RECIPE_ROOT_PARENT",
        format: "directory of the recipe; an argument overrides it",
        default: "`/mnt/image/recipe`",
        readers: &[Recipe],
    },
    Variable {
        name: "TIMEOUT",
        format: "whole seconds that `wait-for-repos` waits for repositories",
        default: "`500`",
        readers: &[Recipe],
    },
    Variable {
        name: "IMS_START_LIMIT",
        format: "whole seconds that the sidecar waits for the build environment to start",
        default: "`120`",
        readers: &[Sidecar],
    },
];

impl Variable {
    /// The variable's row of the table in docs/REFERENCE.md.
    pub fn row(&self) -> String {
        format!("| `{}` | {} | {} |", self.name, self.format, self.default)
    }
}

/// A checked value of the command line or a variable, or the format that was expected.
pub(crate) type Checked = std::result::Result<String, String>;

/// How a value must match upper and lower case.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Case {
    Exact,
    Any,
}

/// Values of a variable that is true or false.
pub(crate) const TRUTH: [(&str, bool); 2] = [("true", true), ("false", false)];

/// Reads values of variables and collects complaints about them. An empty variable counts as not set.
pub(crate) struct Reader {
    variables: HashMap<OsString, OsString>,
    complaints: Vec<String>,
}

impl Reader {
    /// Takes the variables; the last of duplicate ones counts.
    pub(crate) fn of(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        Self { variables: variables.into_iter().collect(), complaints: Vec::new() }
    }

    /// Adds a complaint, once: several parts of a program may read the same variable.
    pub(crate) fn complain(&mut self, complaint: String) {
        if !self.complaints.contains(&complaint) {
            self.complaints.push(complaint);
        }
    }

    /// Returns the values that were read, or all complaints as one error. `read` may be `None` only after a complaint.
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

    /// Reads a value that becomes one word of a configuration line; it may be empty.
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

    /// Reads a limit in seconds after which something ends. 0, which would end it at once, is refused.
    pub(crate) fn limit(&mut self, name: &str) -> Option<Duration> {
        let limit = self.seconds(name)?;
        if limit.is_zero() {
            self.complain(format!("{name} is '0': expected whole seconds, at least 1"));
        }
        Some(limit)
    }

    /// Returns `value` of `name` as `check` parses it; otherwise complains with the format that `check` expected.
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
