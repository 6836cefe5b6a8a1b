//! Which tier this container can have: found out once, by making a jail of each around an empty folder and entering it.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::getpid;

use crate::error::{Attempt, Error, Result};
use crate::jail::arguments::Arguments;
use crate::jail::capabilities::lacks;
use crate::jail::mount_table::Proc;
use crate::jail::plan::Plan;
use crate::jail::tier::Tier;
use crate::jailer::open::{OpenJail, Wanted, helper_output};
use crate::sys::tree::Tree;
use crate::volume::state_directory::StateDirectory;

/// A kind of jail that can be had.
#[derive(Debug)]
pub(crate) struct Choice {
    /// How strong it is.
    pub(crate) tier: Tier,
    /// Where its /proc comes from.
    pub(crate) proc: Proc,
    /// The mount namespace that the one on trial has left, which holds the empty folder alone: what begins with a copy of it is made
    /// without one of all that is mounted in the container. None but in the tier `namespace`: in a user namespace nobody may copy the
    /// image root's mount as long as it is the container's, nor see it from here.
    bare: Option<OwnedFd>,
}

impl Choice {
    /// What a jail of this kind around `image_root` is made of; nothing but the image root is shown in it.
    pub(crate) fn plan(&self, image_root: &Path) -> Plan {
        let bare = self.bare.as_ref().map(|bare| format!("/proc/{}/fd/{}", getpid(), bare.as_raw_fd()).into());
        Plan { tier: self.tier, proc: self.proc, image_root: image_root.to_owned(), bare, ..Plan::default() }
    }
}

/// What is tried, best first. In a user namespace the kernel may refuse a procfs of its own.
const KINDS: [(Tier, Proc); 4] = [
    (Tier::Namespace, Proc::New),
    (Tier::User, Proc::New),
    (Tier::User, Proc::Container),
    (Tier::Chroot, Proc::Container),
];

/// The best kind that can be had, of the tiers `wanted` if any is named. Logs what it is, why it is no better one, and what is lost by that.
/// This process has to be a subreaper (or PID 1).
pub(crate) fn choose(wanted: &[Tier], dkms: bool, state: &StateDirectory) -> Result<Choice> {
    let ground = Ground::new(state)?;
    let mut refused: Vec<(Tier, Error)> = Vec::new();
    for (tier, proc) in KINDS.into_iter().filter(|(tier, _)| wanted.is_empty() || wanted.contains(tier)) {
        match ground.attempt(tier, proc, dkms) {
            Ok(shown) => {
                let choice = Choice { tier, proc, bare: shown.bare };
                // Nothing can be mounted on a folder that was removed: with a bare namespace it goes with the state folder.
                if choice.bare.is_none() {
                    ground.state.remove()?;
                }
                log(&choice, shown.without_devices, wanted.len() == 1, dkms, &refused);
                return Ok(choice);
            }
            Err(e) if is_shortage(&e) => {
                ground.state.remove()?;
                let advice = "this is a shortage and says nothing about the tier; raise the limit, or try again later";
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
    Err(Error::new(format!("have a jail of {tier}")).because(reasons(refused.iter()).join("; ")).advise(
        "allow the container what is missing (docs/KUBERNETES.md, \"What a pod may do\"), or name another tier in IMS_JAIL_TIER",
    ))
}

/// Errors that tell of a shortage or a limit, and not of a missing right: a weaker tier is not chosen for them.
const SHORTAGES: [Errno; 6] = [Errno::EMFILE, Errno::ENFILE, Errno::EFBIG, Errno::ENOMEM, Errno::EAGAIN, Errno::EIO];

fn is_shortage(error: &Error) -> bool {
    let text = error.to_string();
    // The standard library and nix print them in different ways.
    let is_told = |errno: &Errno| {
        text.contains(&format!("(os error {})", *errno as i32)) || text.contains(&format!("{errno:?}: "))
    };
    SHORTAGES.iter().any(is_told)
}

/// One for each tier: the last, since it is why the tier was given up.
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

/// What a trial has shown beside that it can be done.
struct Trial {
    without_devices: bool,
    bare: Option<OwnedFd>,
}

/// Where jails are made on trial: an empty image root, and a folder for what belongs to them.
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
        let attempted = || format!("make the folder {}, for a jail on trial", path.display());
        std::fs::create_dir_all(&path).attempt(attempted)?;
        let image_root = Tree::open(&path).attempt(attempted)?;
        let record_directory = Tree::open(state.path()).attempt(attempted)?;
        Ok(Self { state, path, image_root, record_directory })
    }

    /// Makes a jail and enters it, with all that a real one has.
    fn attempt(&self, tier: Tier, proc: Proc, dkms: bool) -> Result<Trial> {
        let wanted = Wanted {
            plan: Plan { tier, proc, dkms, image_root: self.path.clone(), ..Plan::default() },
            image_root: &self.image_root,
            record_directory: &self.record_directory,
            job: None,
            in_place: false,
            keep: Vec::new(),
        };
        let jail = OpenJail::open(wanted, &self.state)?;
        let entered =
            helper_output(&Arguments::Try(self.state.jail())).attempt(|| "enter a jail that was made on trial");
        let bare = jail.namespace_fd("mnt").filter(|_| tier == Tier::Namespace).map(OwnedFd::try_clone).transpose();
        let bare = bare.attempt(|| "keep the mount namespace of a jail that was made on trial");
        let without_devices = jail.without_devices;
        jail.end()?;
        // With the mount points go the mounts: the kernel takes them down in all namespaces.
        jail.clear(&self.image_root, &self.record_directory)?;
        entered?;
        Ok(Trial { without_devices, bare: bare? })
    }
}

fn log(choice: &Choice, without_devices: bool, forced: bool, dkms: bool, refused: &[(Tier, Error)]) {
    let mut lacks: Vec<_> = choice.tier.lacks().into_iter().collect();
    if choice.tier == Tier::User && choice.proc == Proc::Container {
        lacks.push("/proc is the container's, read-only, so that its processes can be seen");
    }
    if without_devices {
        lacks.push("device nodes (CAP_MKNOD), so that /dev/null is a file, which is removed at the end");
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
        // A session can leave the image root.
        _ if dkms => tracing::warn!(tier, "{line}"),
        Tier::Chroot => tracing::warn!(tier, "{line}"),
        // As it should be; the jail's own line names it.
        Tier::Namespace if !forced => tracing::debug!(tier, "{line}"),
        _ => tracing::info!(tier, "{line}"),
    }
}
