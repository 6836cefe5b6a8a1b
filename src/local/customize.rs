//! `ims-sshd customize`: a build environment on this machine, without a pod.

use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use rustix::mount::MountAttrFlags;

use crate::environment::own_sshd::{self, HOST_KEY, HeldPort, make_key};
use crate::environment::settings::{Marked, Settings};
use crate::environment::stage::Stage;
use crate::environment::supervisor;
use crate::error::{Attempt, Error, Result};
use crate::jail::binds::Bind;
use crate::jailer::open;
use crate::local::claim::remove_directory;
use crate::local::directory::refuse_while_used;
use crate::local::left_over::{SSHD_LOG, clear_left_over};
use crate::local::mounts::{own_mounts, own_terminals};
use crate::local::register::Entry;
use crate::local::run::{End, Fate, Run};
use crate::local::run_directory::RunDirectory;
use crate::local::source;
use crate::local::unattended::Unattended;
use crate::log::output::{say, say_aside};
use crate::sshd::options::Options;
use crate::sshd::public_keys::check_public_keys;
use crate::sys::mounts::{self, Detached};
use crate::sys::named;
use crate::sys::tree::Tree;
use crate::verdict::Verdict;
use crate::volume::image_root;
use crate::volume::layout::{IMAGE_ROOT, READY};
use crate::volume::open_tree;
use crate::volume::state_directory::RUN;

/// File in the run's directory that holds the source, for `status` after the run was killed.
pub(crate) const SOURCE: &str = "source";

/// Options for opening the environment.
#[derive(Debug)]
pub struct Customization {
    /// The port that sshd listens on; a free one by default.
    pub port: Option<u16>,
    /// The address that sshd listens on.
    pub listen: IpAddr,
    /// File of public keys that may log in; a key pair is created by default.
    pub authorized_key: Option<PathBuf>,
    /// True if sessions start in the image root.
    pub jailed: bool,
    /// Files and directories of this machine to show in the jail.
    pub binds: Vec<Bind>,
    /// Variables to set in sessions.
    pub variables: Vec<(String, String)>,
    /// A script to run on this machine once the environment is open.
    pub host_script: Option<PathBuf>,
}

/// Opens the environment, waits until it closes, and publishes or applies the changes. Returns 0 if the image was
/// marked complete, 1 if it was marked failed.
pub fn run(mut run: Run, wanted: &Customization) -> Result<u8> {
    if wanted.jailed {
        open::program()?;
    }
    if let Some(file) = &wanted.host_script {
        let refuse = |why: String| Error::bad_input(format!("--host-script is '{}': {why}", file.display()));
        // Check the type first: opening a fifo would wait for a writer.
        let real = named::resolve(file).map_err(|e| refuse(e.to_string()))?;
        if !std::fs::metadata(&real).map_err(|e| refuse(e.to_string()))?.is_file() {
            return Err(refuse("expected a regular file".into()));
        }
        let mut content = Vec::new();
        let opened = named::open_file(&real).and_then(|mut script| script.read_to_end(&mut content));
        opened.map_err(|e| refuse(e.to_string()))?;
        run.unattended = Some(Unattended::of("script", &[], &content, &wanted.variables, &wanted.binds));
    }
    refuse_unusable_key(wanted)?;
    let mut settings = read_variables(wanted)?;
    // Must precede opening anything: a descriptor opened earlier belongs to the machine's mount namespace.
    own_mounts()?;
    let entry = run.register()?;
    let label = entry.name();
    let (in_place, prints_result) = (run.in_place, run.reports.result);
    settings.in_place = in_place;
    settings.marked = match run.end {
        End::Published => Marked::PACKED,
        _ if in_place => Marked::IN_PLACE,
        End::Applied | End::Discarded => Marked::APPLIED,
    };
    let (source, shown) = (run.shown(), source::directory_of(&run.source));
    run.carry_out(&entry, 0, |image_root, markers| {
        settings.markers = markers;
        let shown = shown.as_deref().unwrap_or(image_root);
        let opened = Opened { source: &source, image_root, shown, in_place, prints_result };
        open(wanted, settings, &opened, &entry, label)
    })
}

pub(super) fn refuse_unusable_key(wanted: &Customization) -> Result<()> {
    wanted.authorized_key.as_ref().map_or(Ok(()), |file| check_public_keys("--authorized-key", file))
}

/// Reads the environment's settings, except those that depend on the run's directory, which does not exist yet.
pub(super) fn read_variables(wanted: &Customization) -> Result<Settings> {
    let script = wanted.host_script.as_ref().map(std::path::absolute).transpose().attempt(|| "find the script")?;
    let variables = [
        ("IMS_ACTION", "customize".into()),
        ("SSH_JAIL", if wanted.jailed { "True".into() } else { "False".into() }),
        ("CUSTOMIZATION_SCRIPT", script.unwrap_or_default().into()),
    ];
    let passed_on = [
        "IMS_AGENT_FORWARDING",
        "IMS_CLOSE_GRACE",
        "IMS_JAIL_HOSTNAME",
        "IMS_JAIL_TIER",
        "JOB_ENABLE_DKMS",
        "REMOTE_HEARTBEAT_TIMEOUT_COUNT",
    ]
    .into_iter()
    .filter_map(|n| Some((n.into(), std::env::var_os(n)?)));
    let variables =
        variables.map(|(name, value): (&str, std::ffi::OsString)| (name.into(), value)).into_iter().chain(passed_on);
    let mut settings = Settings::read(Some(RUN.into()), variables)?;
    settings.binds.clone_from(&wanted.binds);
    settings.session_variables.extend(wanted.variables.iter().cloned());
    Ok(settings)
}

/// The image to open.
pub(super) struct Opened<'a> {
    /// Path or URL on the command line.
    pub(super) source: &'a str,
    pub(super) image_root: &'a Path,
    /// Path to show to people.
    pub(super) shown: &'a Path,
    /// True for a directory that is changed in place.
    pub(super) in_place: bool,
    /// True if standard output is for the result alone.
    pub(super) prints_result: bool,
}

/// Creates keys and configuration in the run's directory. Returns the command that logs in, and the port for sshd.
fn furnish(
    wanted: &Customization,
    settings: &mut Settings,
    opened: &Opened,
    run: &Path,
) -> Result<(String, Option<HeldPort>)> {
    own_terminals()?;
    show_image_root(opened.image_root, run)?;
    let source = run.join(SOURCE);
    std::fs::write(&source, opened.source).attempt(|| format!("write {}", source.display()))?;
    let keys = authorized_keys(wanted.authorized_key.as_deref(), run)?;
    let (port, held) = own_sshd::port(wanted.port, wanted.listen)?;
    let address = SocketAddr::new(wanted.listen, port);
    let config = own_sshd::configure(run, address, &keys.authorized, KEY_COMMENT, own_sshd::SESSIONS)?;
    let options = ["-E", &run.join(SSHD_LOG).to_string_lossy(), "-f", &config.to_string_lossy()].map(str::to_owned);
    settings.sshd = Options::parse(&shell_words::join(options))?;
    settings.sshd_config = config;
    run.clone_into(&mut settings.job.parent);
    settings.on_disk = Some(opened.image_root.to_owned());
    let public = run.join(HOST_KEY).with_extension("pub");
    let key = std::fs::read_to_string(&public).attempt(|| format!("read {}", public.display()))?;
    Ok((configure_client(run, address, keys.identity.as_deref(), &key)?, held))
}

/// Opens the environment on an image root, and returns when it has closed.
fn open(
    wanted: &Customization,
    mut settings: Settings,
    opened: &Opened,
    entry: &Entry,
    label: String,
) -> Result<(Fate, u8)> {
    clear_left_over(&["enter"], opened.image_root)?;
    let run = RunDirectory::claim("customize", opened.image_root)?;
    refuse_while_used(opened.image_root).inspect_err(|_| drop(remove_directory(run.path())))?;
    let shown = run.path().join(IMAGE_ROOT);
    let (login, _held) = furnish(wanted, &mut settings, opened, run.path()).inspect_err(|_| {
        let _ = mounts::unmount(&shown);
        let _ = remove_directory(run.path());
    })?;
    if wanted.jailed {
        settings.image = Some(label);
    }

    let parent = run.path().to_owned();
    // The claim lasts until the directory is removed; until then, no other run can start in it.
    let (files, _claim) = run.into_signal_files()?;
    files.touch(READY)?;
    entry.set(&[("image_root_parent", &parent.display().to_string()), ("login", &login)]);
    let listening = || {
        entry.reach(Stage::Serving);
        announce(opened, &parent, &login, &entry.name(), wanted.jailed);
    };
    let outcome = supervisor::run(settings, Some(files), listening)?;
    // Remove the marks: the supervisor may have left its own mark in the image, and a mark that is kept with the
    // changes would end the next run.
    let root = open_tree(opened.image_root)?;
    for verdict in Verdict::ALL {
        image_root::remove_mark(&root, verdict)?;
    }
    drop(root);
    mounts::unmount(&shown).attempt(|| format!("unmount {}", shown.display()))?;
    remove_directory(&parent)?;
    Ok(match (outcome.exit_code, outcome.verdict) {
        (0, Some(Verdict::Failed)) if outcome.given_up => (Fate::Discard, 1),
        (0, Some(Verdict::Complete) | None) => (Fate::Publish, 0),
        // Nobody discarded the changes: the script failed, a signal arrived, or the environment broke.
        (code, _) => (Fate::Keep, code.max(1)),
    })
}

/// Mounts the image root at the path where a build environment expects it, in this run's mount namespace only.
fn show_image_root(image_root: &Path, parent: &Path) -> Result<()> {
    let place = parent.join(IMAGE_ROOT);
    let attempted = || format!("mount {} on {}", image_root.display(), place.display());
    std::fs::create_dir_all(&place).attempt(attempted)?;
    let target = Tree::open(&place).attempt(attempted)?;
    // The overlay itself is `nosuid`, but sudo and su must work on this mount, which only this run sees.
    Detached::copy_of(image_root, true, MountAttrFlags::empty())
        .and_then(Detached::honouring_setuid)
        .and_then(|mount| mount.attach(target))
        .attempt(attempted)
        .map(|_| ())
}

/// File in the run's directory with the public keys that may log in.
const AUTHORIZED_KEYS: &str = "authorized_keys";

/// Comment in a created key pair.
const KEY_COMMENT: &str = "ims-sshd customize";

/// Keys for logging in.
pub(super) struct Keys {
    /// File of the public keys that may log in.
    pub(super) authorized: PathBuf,
    /// The private key that belongs to one of the public keys, if this machine has it.
    pub(super) identity: Option<PathBuf>,
}

/// Copies the public keys `given`, or creates a key pair.
pub(super) fn authorized_keys(given: Option<&Path>, run: &Path) -> Result<Keys> {
    let authorized = run.join(AUTHORIZED_KEYS);
    if let Some(given) = given {
        let attempted = || format!("copy {}", given.display());
        let real = named::resolve(given).attempt(attempted)?;
        // Copy the content but not the mode: a user who can write to the copy could log in.
        let mut text = Vec::new();
        let copied = named::open_file(&real).and_then(|mut file| file.read_to_end(&mut text));
        copied.and_then(|_| Tree::open(run)?.replace(AUTHORIZED_KEYS, &text)).attempt(attempted)?;
        // ssh-keygen puts the private key beside the public one.
        let private = real.with_extension("");
        let is_there = real.extension().is_some_and(|extension| extension == "pub") && private.is_file();
        return Ok(Keys { authorized, identity: is_there.then_some(private) });
    }
    let private = make_key(run, "id_ed25519", KEY_COMMENT)?;
    std::fs::copy(private.with_extension("pub"), &authorized).attempt(|| format!("write {}", authorized.display()))?;
    Ok(Keys { authorized, identity: Some(private) })
}

/// Host name of the environment in ssh's configuration.
const HOST_ALIAS: &str = "image";

/// Writes a configuration for ssh, scp, sftp and Ansible, which keeps the command line short and pins sshd's public
/// host key. Returns the command that logs in.
pub(super) fn configure_client(run: &Path, address: SocketAddr, identity: Option<&Path>, key: &str) -> Result<String> {
    let known_hosts = run.join("known_hosts");
    std::fs::write(&known_hosts, format!("{HOST_ALIAS} {}\n", key.trim_end()))
        .attempt(|| format!("write {}", known_hosts.display()))?;
    // In ssh_config(5), % begins a token, and ${ a variable.
    let identity = identity.map(|key| key.display().to_string()).filter(|key| !key.contains(['"', '\\', '$', '\n']));
    let key_option = if identity.is_none() { " -i YOUR_KEY" } else { "" };
    let identity = identity.map_or(String::new(), |key| {
        format!("    IdentityFile \"{}\"\n    IdentitiesOnly yes\n", key.replace('%', "%%"))
    });
    let text = format!(
        "Host {HOST_ALIAS}\n    HostName {}\n    Port {}\n    User root\n{identity}    HostKeyAlias {HOST_ALIAS}\n    \
         UserKnownHostsFile {}\n    GlobalKnownHostsFile /dev/null\n    StrictHostKeyChecking yes\n    \
         SendEnv LANG LC_*\n",
        address.ip(),
        address.port(),
        known_hosts.display(),
    );
    let config = run.join("ssh_config");
    std::fs::write(&config, text).attempt(|| format!("write {}", config.display()))?;
    Ok(format!("ssh -F {}{key_option} {HOST_ALIAS}", config.display()))
}

/// Tells the person how to log in, and how to end the environment.
pub(super) fn announce(opened: &Opened, parent: &Path, login: &str, name: &str, jailed: bool) {
    let shown = opened.shown.display();
    let open = if jailed {
        format!("{shown} is open")
    } else {
        format!("{shown} is open; sessions see it as {}/image-root", parent.display())
    };
    let inside = if opened.in_place {
        "When done, in that session: touch /tmp/complete\n"
    } else {
        "When done, in that session: touch /tmp/complete    or, to discard the changes: touch /tmp/failed\n"
    };
    let tell = if opened.prints_result { say_aside } else { say };
    tell(&format!(
        "\n{open}. Log in from another terminal:\n\n    {login}\n\n\
         {}From here:        ims-sshd complete {name}    or: ims-sshd fail {name}\n\n",
        if jailed { inside } else { "" },
    ));
}
