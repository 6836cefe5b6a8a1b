//! Finds out, once, which tier this container can have, by making a jail around an empty directory and entering it.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::unistd::getpid;

use crate::error::{Attempt, Error, Result};
use crate::jail::arguments::Arguments;
use crate::jail::capabilities::lacks;
use crate::jail::mount_table::Proc;
use crate::jail::plan::Plan;
use crate::jail::tier::Tier;
use crate::jailer::open::{OpenJail, Wanted, helper_output, program};
use crate::sys::tree::Tree;
use crate::volume::state_directory::StateDirectory;

/// A kind of jail that this container can make.
#[derive(Debug)]
pub(crate) struct Choice {
    /// Tier of the jail.
    pub(crate) tier: Tier,
    /// Kind of the jail's /proc: a new procfs or the container's.
    pub(crate) proc: Proc,
    /// Mount namespace of the trial jail, which contains nothing but the empty directory. A jail cloned from this
    /// namespace does not copy the container's mounts. Only the tier `namespace` uses it: in a user namespace the
    /// kernel refuses to copy the image root's mount from the container's mount namespace.
    bare: Option<OwnedFd>,
}

impl Choice {
    /// Plan of a jail of this kind around `image_root`, with no binds or programs.
    pub(crate) fn plan(&self, image_root: &Path) -> Plan {
        let bare = self.bare.as_ref().map(|bare| format!("/proc/{}/fd/{}", getpid(), bare.as_raw_fd()).into());
        Plan { tier: self.tier, proc: self.proc, image_root: image_root.to_owned(), bare, ..Plan::default() }
    }
}

/// Kinds of jail to try, best first. In a user namespace the kernel may refuse to mount a new procfs; then the
/// container's procfs is used.
const KINDS: [(Tier, Proc); 4] = [
    (Tier::Namespace, Proc::New),
    (Tier::User, Proc::New),
    (Tier::User, Proc::Container),
    (Tier::Chroot, Proc::Container),
];

/// Chooses the best kind that this container can make, among the tiers `wanted` unless that is empty. Logs the choice,
/// why no better one is possible, and what sessions lack because of that. This process has to be a subreaper (or PID
/// 1).
pub(crate) fn choose(wanted: &[Tier], dkms: bool, state: &StateDirectory) -> Result<Choice> {
    // Without it no tier is possible, whatever this container may do.
    program()?;
    let ground = Ground::new(state)?;
    let mut refused: Vec<(Tier, Error)> = Vec::new();
    for (tier, proc) in KINDS.into_iter().filter(|(tier, _)| wanted.is_empty() || wanted.contains(tier)) {
        match ground.attempt(tier, proc, dkms) {
            Ok(shown) => {
                let choice = Choice { tier, proc, bare: shown.bare };
                // The trial's directory is the root of a bare namespace, on which each jail mounts its image root. The
                // kernel mounts nothing on a removed directory, so the directory stays as long as the state directory.
                if choice.bare.is_none() {
                    ground.state.remove()?;
                }
                log(&choice, shown.without_devices, wanted.len() == 1, dkms, &refused);
                return Ok(choice);
            }
            Err(e) if e.is_transient() => {
                ground.state.remove()?;
                let advice = "so the tier is still unknown; raise the limit that was reached, or try again later";
                return Err(e.advise(advice));
            }
            Err(e) => refused.push((tier, e)),
        }
    }
    ground.state.remove()?;
    let names: Vec<_> = wanted.iter().map(|tier| format!("'{}'", tier.name())).collect();
    let tier = match names.join(" or ") {
        names if names.is_empty() => "any tier".into(),
        names => format!("tier {names}, which IMS_JAIL_TIER asks for"),
    };
    Err(Error::new(format!("make a jail of {tier}")).because(reasons(refused.iter()).join("; ")).advise(
        "give the container what it lacks (docs/KUBERNETES.md, \"What a pod may do\"), or set another tier in \
         IMS_JAIL_TIER",
    ))
}

/// One sentence for each refused tier, with the last error of that tier.
fn reasons<'a>(refused: impl Iterator<Item = &'a (Tier, Error)>) -> Vec<String> {
    let refused: Vec<_> = refused.collect();
    let last = |tier| refused.iter().copied().rfind(|(refused, _)| *refused == tier);
    let sentence = |(tier, why): &(Tier, Error)| {
        let name = tier.name();
        match tier.capabilities().iter().find(|needed| lacks(**needed)) {
            Some(missing) => format!("the tier '{name}' needs {missing}, which this container lacks: {why}"),
            None => format!("the tier '{name}' needs {}: {why}", tier.needs()),
        }
    };
    Tier::ALL.into_iter().filter_map(last).map(sentence).collect()
}

/// Result of a successful trial.
struct Trial {
    without_devices: bool,
    bare: Option<OwnedFd>,
}

/// Directories of the trial jails: an empty image root, and a state directory for their records.
struct Ground {
    state: StateDirectory,
    path: PathBuf,
    image_root: Tree,
    record_directory: Tree,
}

impl Ground {
    fn new(state: &StateDirectory) -> Result<Self> {
        let state = state.trial()?;
        let path = state.path().join("image-root");
        let attempted = || format!("create the directory {} for a trial jail", path.display());
        std::fs::create_dir_all(&path).attempt(attempted)?;
        let image_root = Tree::open(&path).attempt(attempted)?;
        let record_directory = Tree::open(state.path()).attempt(attempted)?;
        Ok(Self { state, path, image_root, record_directory })
    }

    /// Makes a jail like a real one, and enters it.
    fn attempt(&self, tier: Tier, proc: Proc, dkms: bool) -> Result<Trial> {
        let wanted = Wanted {
            plan: Plan { tier, proc, dkms, image_root: self.path.clone(), ..Plan::default() },
            image_root: &self.image_root,
            record_directory: &self.record_directory,
            job: None,
            in_place: false,
        };
        let jail = OpenJail::open(wanted, &self.state, || Ok(Vec::new()))?;
        let entered = helper_output(&Arguments::Try(self.state.jail())).attempt(|| "enter a trial jail");
        let bare = jail.namespace_fd("mnt").filter(|_| tier == Tier::Namespace).map(OwnedFd::try_clone).transpose();
        let bare = bare.attempt(|| "keep the mount namespace of a trial jail");
        let without_devices = jail.without_devices;
        jail.end()?;
        // Removing a mount point also removes what is mounted on it: the kernel detaches the mounts in all namespaces.
        jail.clear(&self.image_root, &self.record_directory)?;
        entered?;
        Ok(Trial { without_devices, bare: bare? })
    }
}

fn log(choice: &Choice, without_devices: bool, forced: bool, dkms: bool, refused: &[(Tier, Error)]) {
    let mut lacks: Vec<_> = choice.tier.lacks().into_iter().collect();
    if choice.tier == Tier::User && choice.proc == Proc::Container {
        lacks.push("a /proc of its own (/proc is the container's, read-only, and shows the container's processes)");
    }
    if without_devices {
        lacks.push("device nodes (CAP_MKNOD; /dev/null is a regular file, removed at the close)");
    }
    let tier = choice.tier.name();
    let mut parts = vec![format!("the jail's tier is {tier}{}", if forced { ", as IMS_JAIL_TIER says" } else { "" })];
    parts.extend(reasons(refused.iter().filter(|(better, _)| *better != choice.tier)));
    if !lacks.is_empty() {
        parts.push(format!("missing: {}", lacks.join(", ")));
    }
    if dkms {
        parts.push("with JOB_ENABLE_DKMS a session has the container's devices and can leave the image root".into());
    }
    let line = parts.join("; ");
    match choice.tier {
        // Warn of a jail that sessions can leave.
        _ if dkms => tracing::warn!(tier, "{line}"),
        Tier::Chroot => tracing::warn!(tier, "{line}"),
        // The usual case: the log line about the jail names the tier already.
        Tier::Namespace if !forced => tracing::debug!(tier, "{line}"),
        _ => tracing::info!(tier, "{line}"),
    }
}
