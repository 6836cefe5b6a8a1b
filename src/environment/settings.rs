//! Settings of a build environment, read from the environment variables before anything starts. An error names each
//! wrong variable and what was expected.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use crate::error::Result;
use crate::jail::binds::Bind;
use crate::jail::tier::Tier;
use crate::job::Job;
use crate::job::variables::{Case, Reader, TRUTH};
use crate::sshd::options::Options;
use crate::verdict::{Markers, Verdict};

/// Settings of a build environment.
#[derive(Debug, Clone)]
// Each bool is a variable of its own, not a state.
#[allow(clippy::struct_excessive_bools)]
pub struct Settings {
    /// The job; its action is set.
    pub(crate) job: Job,
    /// `SSHD_OPTIONS`, parsed.
    pub(crate) sshd: Options,
    /// Path of the configuration that sshd reads, into which settings are written.
    pub(crate) sshd_config: PathBuf,
    /// `CUSTOMIZATION_SCRIPT`.
    pub(crate) script: Option<PathBuf>,
    /// `IMS_JAIL_TIER`: the acceptable tiers; if empty, the best one that is possible.
    pub(crate) tiers: Vec<Tier>,
    /// `JOB_ENABLE_DKMS`.
    pub(crate) dkms: bool,
    /// `IMS_JAIL_HOSTNAME`: host name of the jail; `None` for the container's.
    pub(crate) hostname: Option<String>,
    /// Name of the image, shown in a shell's greeting and prompt; unknown in a pod.
    pub(crate) image: Option<String>,
    /// Path of the image root on the disk that sessions fill, where its path in the parent only shows it.
    pub(crate) on_disk: Option<PathBuf>,
    /// True if sessions change a directory itself, without an overlay, so that changes stay whatever the verdict.
    pub(crate) in_place: bool,
    /// Users whose marks in the image count.
    pub(crate) markers: Markers,
    /// Messages to people at a terminal when the environment closes.
    pub(crate) marked: Marked,
    /// `IMS_JAIL_BINDS`: bind mounts from the container into the jail.
    pub(crate) binds: Vec<Bind>,
    /// `IMS_AGENT_FORWARDING`: whether clients may forward their ssh-agent, if sshd allows it too.
    pub(crate) agent: bool,
    /// `IMS_CLOSE_GRACE`: grace period of running commands after a verdict.
    pub(crate) close_grace: Duration,
    /// `IMS_IDLE_LIMIT`: how long an environment without a session stays open; no limit if unset.
    pub(crate) idle_limit: Option<Duration>,
    /// `IMS_SESSION_LIMIT`: maximum time that an environment stays open; no limit if unset.
    pub(crate) session_limit: Option<Duration>,
    /// `REMOTE_HEARTBEAT_TIMEOUT_COUNT` times 5 s: a remote build node that is silent for so long counts as lost.
    pub(crate) node_silence: Duration,
    /// `IMS_REMOTE_KEY`: the private key for remote build nodes.
    pub(crate) node_key: PathBuf,
    /// Variables that sessions get, with the names that sessions see.
    pub(crate) session_variables: Vec<(String, String)>,
}

/// Messages about the image to people at a terminal when the environment closes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Marked {
    complete: &'static str,
    failed: &'static str,
}

impl Marked {
    /// Messages if the image will be packed: in a pod, and in every run that publishes.
    pub(crate) const PACKED: Self =
        Self { complete: "marked complete and will be packed", failed: "marked failed and will not be packed" };
    /// Messages if the changes were made in an overlay and are applied to its directory.
    pub(crate) const APPLIED: Self = Self {
        complete: "marked complete, and its changes will be applied",
        failed: "marked failed, and its changes will not be applied",
    };
    /// Messages if sessions changed a directory itself, without an overlay.
    pub(crate) const IN_PLACE: Self = Self { complete: "marked complete", failed: "marked failed" };

    pub(super) fn for_verdict(self, verdict: Verdict) -> &'static str {
        match verdict {
            Verdict::Complete => self.complete,
            Verdict::Failed => self.failed,
        }
    }
}

/// Default grace period: enough for a task of a typical Ansible play.
const DEFAULT_GRACE: Duration = Duration::from_secs(10);

/// Unit of `REMOTE_HEARTBEAT_TIMEOUT_COUNT`.
const BEAT: Duration = Duration::from_secs(5);
/// Silence timeout of a remote build node without `REMOTE_HEARTBEAT_TIMEOUT_COUNT`.
const DEFAULT_SILENCE: Duration = Duration::from_mins(1);

/// Path at which IMS mounts the private key for remote build nodes.
const DEFAULT_KEY: &str = "/etc/cray/remote-keys/id_ecdsa";

/// Variables that sessions get: (name in the session, name in this process's environment).
const SESSION_VARIABLES: [(&str, &str); 4] = [
    ("IMS_JOB_ID", "IMS_JOB_ID"),
    ("IMS_ARCH", "BUILD_ARCH"),
    ("IMS_DKMS_ENABLED", "JOB_ENABLE_DKMS"),
    ("REMOTE_BUILD_NODE", "REMOTE_BUILD_NODE"),
];

impl Settings {
    /// Reads `variables`; `argument` is the image root parent of the command line. The error names all wrong values.
    pub fn read(argument: Option<PathBuf>, variables: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Self> {
        let mut reader = Reader::of(variables);
        let job = Job::read(&mut reader, argument);
        if reader.text("IMS_ACTION").is_none() {
            reader.accept(job.required_action());
        }
        let sshd_options = reader.text("SSHD_OPTIONS").unwrap_or_default();
        let sshd = reader.accept(Options::parse(&sshd_options));
        let written = reader.text("SSHD_CONFIG_FILE").map(PathBuf::from);
        let sshd_config = sshd.as_ref().and_then(|o| reader.accept(o.config_file(written.as_ref())));

        // On a remote build node, IMS_REMOTE_DKMS=closed keeps the jail closed, even for a job that builds kernel
        // modules.
        let is_closed = reader.choice("IMS_REMOTE_DKMS", &[("open", false), ("closed", true)], Case::Any);
        let dkms = reader.dkms() && !(is_closed == Some(true) && job.node.is_some());
        let tiers = reader.tiers();
        let hostname = reader.host_name("IMS_JAIL_HOSTNAME");
        let binds = reader.binds("IMS_JAIL_BINDS");
        let agent = reader.choice("IMS_AGENT_FORWARDING", &TRUTH, Case::Any).unwrap_or(true);
        let close_grace = reader.close_grace();
        let idle_limit = reader.limit("IMS_IDLE_LIMIT");
        let session_limit = reader.limit("IMS_SESSION_LIMIT");
        let node_silence = reader.node_silence();
        let node_key = reader.node_key();
        let script = reader.text("CUSTOMIZATION_SCRIPT").map(Into::into);
        let session_variables = SESSION_VARIABLES
            .iter()
            .filter_map(|(name, from)| Some(((*name).to_owned(), reader.line(from)?)))
            .collect();

        reader.finish(sshd.zip(sshd_config)).map(|(sshd, sshd_config)| Self {
            job,
            sshd,
            sshd_config,
            script,
            tiers,
            dkms,
            hostname,
            image: None,
            on_disk: None,
            in_place: false,
            markers: Markers::Everyone,
            marked: Marked::PACKED,
            binds,
            agent,
            close_grace,
            idle_limit,
            session_limit,
            node_silence,
            node_key,
            session_variables,
        })
    }
}

/// Reads only `IMS_JAIL_TIER`, `IMS_JAIL_HOSTNAME`, `JOB_ENABLE_DKMS` and `IMS_CLOSE_GRACE`, for a jail without sshd.
pub(crate) fn of_jail(
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<(Vec<Tier>, Option<String>, bool, Duration)> {
    let mut reader = Reader::of(variables);
    let found = (reader.tiers(), reader.host_name("IMS_JAIL_HOSTNAME"), reader.dkms(), reader.close_grace());
    reader.finish(Some(found))
}

/// Reads only the silence timeout of a remote build node, and the path of the private key for it.
pub(crate) fn of_node(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Result<(Duration, PathBuf)> {
    let mut reader = Reader::of(variables);
    let found = (reader.node_silence(), reader.node_key());
    reader.finish(Some(found))
}

/// Methods that read variables which only a build environment has.
impl Reader {
    fn dkms(&mut self) -> bool {
        self.choice("JOB_ENABLE_DKMS", &TRUTH, Case::Any).unwrap_or(false)
    }

    fn node_silence(&mut self) -> Duration {
        const NAME: &str = "REMOTE_HEARTBEAT_TIMEOUT_COUNT";
        let Some(value) = self.text(NAME) else { return DEFAULT_SILENCE };
        let count = |value: &str| match value.parse::<u32>() {
            Ok(count) if count > 0 => Ok(BEAT.saturating_mul(count)),
            _ => Err("expected a whole number, at least 1".into()),
        };
        self.check(NAME, &value, count).unwrap_or(DEFAULT_SILENCE)
    }

    fn node_key(&mut self) -> PathBuf {
        self.text("IMS_REMOTE_KEY").map_or_else(|| DEFAULT_KEY.into(), PathBuf::from)
    }

    fn close_grace(&mut self) -> Duration {
        self.seconds("IMS_CLOSE_GRACE").unwrap_or(DEFAULT_GRACE)
    }

    fn tiers(&mut self) -> Vec<Tier> {
        let value = self.text("IMS_JAIL_TIER").filter(|value| value != "auto").unwrap_or_default();
        let named: Option<Vec<_>> = value.split(',').map(Tier::from_name).collect();
        if named.is_none() && !value.is_empty() {
            let known = Tier::ALL.map(Tier::name).join("' or '");
            self.complain(format!(
                "IMS_JAIL_TIER is '{value}': expected 'auto' or '{known}', or several tiers separated by commas"
            ));
        }
        named.unwrap_or_default()
    }

    fn host_name(&mut self, name: &str) -> Option<String> {
        let value = self.text(name)?;
        let is_label = |label: &str| {
            !label.is_empty()
                && !label.starts_with('-')
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        };
        // Limit of sethostname(2).
        if value.len() <= 64 && value.split('.').all(is_label) {
            return Some(value);
        }
        self.complain(format!(
            "{name} is '{}': expected at most 64 letters, digits, dots and dashes, as in host names",
            value.escape_debug()
        ));
        None
    }

    fn binds(&mut self, name: &str) -> Vec<Bind> {
        let value = self.text(name).unwrap_or_default();
        let words = match shell_words::split(&value) {
            Ok(words) => words,
            Err(e) => {
                self.complain(format!("{name} is '{value}': {e}"));
                return Vec::new();
            }
        };
        let mut bind = |word: &String| Bind::parse(word).map_err(|why| self.complain(format!("{name}: {why}")));
        words.iter().filter_map(|word| bind(word).ok()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::DEFAULT_PARENT;

    fn read(variables: &[(&str, &str)]) -> Result<Settings> {
        Settings::read(None, variables.iter().map(|(n, v)| ((*n).into(), (*v).into())))
    }

    #[test]
    fn variables_of_a_customize_pod_are_read() {
        let settings = read(&[
            ("IMS_ACTION", "customize"),
            ("IMAGE_ROOT_PARENT", "/mnt/image"),
            ("ENABLE_DEBUG", "False"),
            ("SSHD_OPTIONS", "-E /etc/cray/ims/sshd.log -f /etc/cray/ims/sshd_config"),
            ("SSHD_CONFIG_FILE", "/etc/cray/ims/sshd_config"),
            ("IMS_JOB_ID", "7"),
            ("SSH_JAIL", "True"),
            ("JOB_ENABLE_DKMS", "TRUE"),
            ("BUILD_ARCH", "x86_64"),
            ("REMOTE_BUILD_NODE", ""),
        ])
        .unwrap();
        assert!(settings.job.jailed && settings.dkms && !settings.job.debug);
        assert_eq!(settings.job.image_root(), "image-root");
        let variables: Vec<_> = settings.session_variables.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        let wanted =
            [("IMS_JOB_ID", "7"), ("IMS_ARCH", "x86_64"), ("IMS_DKMS_ENABLED", "TRUE"), ("REMOTE_BUILD_NODE", "")];
        assert_eq!(variables, wanted);
    }

    #[test]
    fn argument_overrides_variable_and_variable_overrides_default() {
        let action = ("IMS_ACTION", "create");
        assert_eq!(read(&[action]).unwrap().job.parent, PathBuf::from(DEFAULT_PARENT));
        assert_eq!(read(&[action, ("IMAGE_ROOT_PARENT", "/v")]).unwrap().job.parent, PathBuf::from("/v"));
        let given = Settings::read(Some("/a".into()), [("IMS_ACTION".into(), "create".into())]).unwrap();
        assert_eq!(given.job.parent, PathBuf::from("/a"));
        assert_eq!(given.job.image_root(), "build/image-root");
    }

    #[test]
    fn jail_tier_takes_several_tiers_and_auto_means_any() {
        for (value, tiers) in
            [("auto", &[][..]), ("user", &[Tier::User]), ("namespace,user", &[Tier::Namespace, Tier::User])]
        {
            assert_eq!(read(&[("IMS_ACTION", "customize"), ("IMS_JAIL_TIER", value)]).unwrap().tiers, tiers, "{value}");
        }
        for value in ["user,", "auto,user", "user, chroot"] {
            let error = read(&[("IMS_ACTION", "customize"), ("IMS_JAIL_TIER", value)]).unwrap_err().to_string();
            assert!(error.contains("or several tiers separated by commas"), "{error}");
        }
    }

    #[test]
    fn one_error_names_every_wrong_value_with_what_was_expected() {
        let wrong = [
            ("IMS_ACTION", "destroy", "'customize' or 'create'"),
            ("SSH_JAIL", "true", "'True' or 'False', in this spelling"),
            ("JOB_ENABLE_DKMS", "yes", "'true' or 'false'"),
            ("ENABLE_DEBUG", "1", "'true' or 'false'"),
            ("BUILD_ARCH", "arm64", "'x86_64' or 'aarch64'"),
            ("IMAGE_ROOT_PARENT", "image", "absolute"),
            ("IMS_CLOSE_GRACE", "soon", "whole seconds"),
            ("IMS_IDLE_LIMIT", "1h", "whole seconds"),
            ("IMS_SESSION_LIMIT", "1.5", "whole seconds"),
            ("IMS_SESSION_LIMIT", "0", "at least 1"),
            ("REMOTE_HEARTBEAT_TIMEOUT_COUNT", "0", "a whole number, at least 1"),
            ("IMS_IDLE_LIMIT", "0", "at least 1"),
            ("IMS_JAIL_HOSTNAME", "node_1", "as in host names"),
            ("IMS_JAIL_BINDS", "/nowhere:/opt", "SOURCE is '/nowhere'"),
            ("IMS_AGENT_FORWARDING", "no", "'true' or 'false'"),
            ("IMS_JAIL_TIER", "strong", "'auto' or 'namespace' or 'user' or 'chroot'"),
            ("SSHD_OPTIONS", "-D", "background"),
            ("IMS_JOB_ID", "a\nSetEnv X=1", "one line"),
        ];
        let error = read(&wrong.map(|(name, value, _)| (name, value))).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let message = error.to_string();
        for (name, _, expected) in wrong {
            assert!(message.contains(expected), "{name}: {message}");
            assert!(message.contains(name) || name == "IMAGE_ROOT_PARENT", "{name}: {message}");
        }
        assert!(read(&[]).unwrap_err().to_string().contains("IMS_ACTION is not set"));
    }
}
