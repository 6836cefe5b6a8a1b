//! `ims-sshd entrypoint` in a pod whose job runs on a build node.

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::environment::groundwork;
use crate::environment::settings::Settings;
use crate::error::{Attempt, Error, Result};
use crate::image::boot::{Names, left_names};
use crate::job::action::Action;
use crate::publish::settings as publishing;
use crate::remote::connection::Destination;
use crate::remote::far::Wanted;
use crate::remote::message::{Customize, Script, Task, job_of_ims};
use crate::remote::{relay, site};
use crate::sshd::effective::Effective;
use crate::sys::tree::Tree;
use crate::volume::layout::{BOOT_NAMES, REMOTE_HOST_KEY};

/// Variables of the job that its environment on the node also gets.
const PASSED_ON: [&str; 22] = [
    "BUILD_ARCH",
    "ENABLE_DEBUG",
    "IMAGE_COMPRESSION",
    "IMAGE_FROM_SCRATCH",
    "IMAGE_PACKER",
    "IMAGE_ROOT_ARCHIVE_NAME",
    "IMS_AGENT_FORWARDING",
    "IMS_CLOSE_GRACE",
    "IMS_IDLE_LIMIT",
    "IMS_JAIL_HOSTNAME",
    "IMS_JAIL_TIER",
    "IMS_JOB_ID",
    "IMS_REMOTE_DKMS",
    "IMS_SESSION_LIMIT",
    "INITRD_FILENAME",
    "JOB_ENABLE_DKMS",
    "KERNEL_FILENAME",
    "KERNEL_PARAMETERS_FILENAME",
    "LOG_LEVEL",
    "REMOTE_BUILD_NODE",
    "SOURCE_DATE_EPOCH",
    "SSH_JAIL",
];

/// Directory, in a pod, of the site's CA certificates, unless `CA_CERT` names a file elsewhere.
pub(super) const AUTHORITIES: &str = "/etc/cray/ca";

/// Maximum size of a customization script, in bytes: encoded as JSON, it must fit into a message.
const LARGEST_SCRIPT: u64 = 512 << 10;

/// Maximum size of a certificate, in bytes.
const LARGEST: u64 = 1 << 20;

/// Returns whether the job's environment runs on a build node.
pub(crate) fn is_remote(settings: &Settings) -> bool {
    settings.job.node.is_some() && settings.job.action == Some(Action::Customize)
}

/// Runs the job's environment on its node.
pub(crate) fn run(settings: &Settings, variables: Vec<(OsString, OsString)>) -> Result<u8> {
    if settings.job.jailed && !settings.binds.is_empty() {
        return Err(Error::bad_input(
            "IMS_JAIL_BINDS names files of this container, which a jail on a build node cannot show: leave it out for jobs \
             with REMOTE_BUILD_NODE",
        ));
    }
    if !settings.binds.is_empty() {
        tracing::warn!("IMS_JAIL_BINDS has no effect in plain mode on a build node");
    }
    let wanted = || wanted(settings, variables);
    let parent = &settings.job.parent;
    let listening = |host_key: &str| {
        let kept = Tree::open(parent).and_then(|volume| volume.replace(REMOTE_HOST_KEY, host_key.as_bytes()));
        if let Err(error) = kept {
            tracing::warn!("cannot record the host key of sshd on the node: {error}");
        }
    };
    relay::run(parent, None, wanted, listening).map(|outcome| outcome.exit_code)
}

fn wanted(settings: &Settings, variables: Vec<(OsString, OsString)>) -> Result<Wanted> {
    let to = Destination::of_job(settings.job.node.as_deref().unwrap_or_default(), settings.node_key.clone())?;
    let job = job_of_ims(settings.job.id.as_deref().unwrap_or_default())?;
    groundwork::prepare_sshd()?;
    let sshd = Effective::ask(&settings.sshd.asking, "root")?;
    let keys = keys(&sshd)?;
    let carried = site::carried(&sshd, settings, &keys)?;
    let is_jobs = |name: &String| settings.session_variables.iter().any(|(own, _)| own == name);
    let session_variables = sshd.set_env().into_iter().filter(|(name, _)| !is_jobs(name)).collect();
    let authorities = variables.iter().find(|(name, value)| name == "CA_CERT" && !value.is_empty());
    let authorities = authorities.and_then(|(_, file)| Path::new(file).parent()).unwrap_or(Path::new(AUTHORITIES));
    let authorities = certificates(authorities)?;
    let mut boot_names = recorded_names(&settings.job.parent);
    boot_names.extend(variables.iter().filter(|(name, value)| is_boot_name(name) && !value.is_empty()).cloned());
    let boot = left_names(&publishing::Settings::read(None, boot_names.clone())?.boot, settings.job.arch());
    let variables = variables.into_iter().filter(|(name, _)| !is_boot_name(name)).chain(boot_names);
    let variables = variables.filter_map(|(name, value)| {
        let name = name.into_string().ok().filter(|name| PASSED_ON.contains(&name.as_str()))?;
        Some((name, value.into_string().ok()?))
    });
    Ok(Wanted {
        to,
        job,
        task: Task::Customize(Customize {
            variables: variables.collect(),
            keys,
            authorities,
            session_variables,
            exclude: Vec::new(),
            reports_changes: false,
            sshd: Some(carried),
            script: settings.script.as_deref().map(script).transpose()?.flatten(),
            image: None,
        }),
        image: None,
        listen: site::listen(&sshd)?,
        boot,
        silence: settings.node_silence,
    })
}

/// Variables that contain the names of boot files.
const BOOT_VARIABLES: [&str; 3] = ["KERNEL_FILENAME", "INITRD_FILENAME", "KERNEL_PARAMETERS_FILENAME"];

fn is_boot_name(name: &OsString) -> bool {
    BOOT_VARIABLES.iter().any(|boot| name == boot)
}

/// Returns the names of the boot files that `prepare` has recorded, as variables. Returns none if upstream's prepare
/// ran.
fn recorded_names(parent: &Path) -> Vec<(OsString, OsString)> {
    let text = Tree::open(parent).and_then(|volume| volume.read(BOOT_NAMES, LARGEST));
    let recorded = text.ok().and_then(|text| serde_json::from_slice::<Names>(&text).ok());
    let named = |names: Names| BOOT_VARIABLES.into_iter().zip([names.kernel, names.initrd, names.parameters]);
    recorded.into_iter().flat_map(named).map(|(name, value)| (name.into(), value.into())).collect()
}

/// Reads the customization script at `path`, if there is one.
fn script(path: &Path) -> Result<Option<Script>> {
    let found = match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        found => found.attempt(|| format!("read the customization script {}", path.display()))?,
    };
    let refused = |why: &str| Error::bad_input(format!("CUSTOMIZATION_SCRIPT is '{}': {why}", path.display()));
    if !found.is_file() || found.len() > LARGEST_SCRIPT {
        return Err(refused("a build node takes a regular file of at most 512 KiB"));
    }
    let text = std::fs::read(path).attempt(|| format!("read the customization script {}", path.display()))?;
    let text = String::from_utf8(text).map_err(|_| refused("a build node takes a script in UTF-8, and no program"))?;
    Ok(Some(Script { text, is_executable: found.permissions().mode() & 0o111 != 0 }))
}

/// Returns the public keys that sshd's configuration accepts for root.
fn keys(sshd: &Effective) -> Result<String> {
    let mut keys = String::new();
    for word in sshd.all("authorizedkeysfile").flat_map(str::split_whitespace).filter(|word| *word != "none") {
        let word = word.replace("%h", "/root").replace("%u", "root").replace("%%", "%");
        let path = Path::new("/root").join(word);
        match std::fs::read_to_string(&path) {
            Ok(text) => keys.extend([text.as_str(), "\n"]),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).attempt(|| format!("read the public keys in {}", path.display())),
        }
    }
    if keys.trim().is_empty() {
        return Err(Error::new("let anybody log in")
            .because("no file that AuthorizedKeysFile of sshd's configuration names contains a key"));
    }
    Ok(keys)
}

/// Reads the certificates in `directory`. Skips hidden names, since Kubernetes mounts files as links to hidden
/// directories.
pub(super) fn certificates(directory: &Path) -> Result<Vec<(String, String)>> {
    let attempted = || format!("read {}", directory.display());
    let Ok(entries) = std::fs::read_dir(directory) else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for entry in entries {
        let file: PathBuf = entry.attempt(attempted)?.path();
        let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let is_certificate = std::fs::metadata(&file).is_ok_and(|found| found.is_file() && found.len() <= LARGEST);
        if !name.starts_with('.') && is_certificate {
            found.push((name, std::fs::read_to_string(&file).attempt(|| format!("read {}", file.display()))?));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::variables::{Program, VARIABLES};

    /// Variables that the pod itself uses, so that the node does not get them; REMOTE_NODES.md describes how.
    const HERE: [&str; 9] = [
        "CUSTOMIZATION_SCRIPT",
        "IMAGE_ROOT_PARENT",
        "IMS_ACTION",
        "IMS_JAIL_BINDS",
        "IMS_REMOTE_KEY",
        "LOG_FORMAT",
        "REMOTE_HEARTBEAT_TIMEOUT_COUNT",
        "SSHD_CONFIG_FILE",
        "SSHD_OPTIONS",
    ];

    #[test]
    fn no_variable_of_an_environment_is_forgotten_on_a_node() {
        let readers = [Program::Environment, Program::Job, Program::Log];
        let manual = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/REMOTE_NODES.md")).unwrap();
        for variable in VARIABLES.iter().filter(|v| v.readers.iter().any(|reader| readers.contains(reader))) {
            assert!(PASSED_ON.contains(&variable.name) != HERE.contains(&variable.name), "{}", variable.name);
        }
        for name in PASSED_ON.iter().chain(&HERE) {
            assert!(manual.contains(&format!("`{name}`")), "{name}");
        }
    }
}
