//! Which tier this container can have: found out once, by making a jail of each around an empty folder and entering it.

use std::process::{Command, Stdio};

use crate::error::{Attempt, Error, Result};
use crate::jail::mount_table::Proc;
use crate::jail::tier::Tier;
use crate::lifecycle::open_jail::{OpenJail, Wanted, program};
use crate::lifecycle::state::StateFolder;
use crate::sys::tree::Tree;

/// A kind of jail that can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// How strong it is.
    pub tier: Tier,
    /// Where its /proc comes from.
    pub proc: Proc,
}

/// What is tried, best first. In a user namespace the kernel may refuse a procfs of its own.
const CHOICES: [Choice; 4] = [
    Choice { tier: Tier::Namespace, proc: Proc::New },
    Choice { tier: Tier::User, proc: Proc::New },
    Choice { tier: Tier::User, proc: Proc::Container },
    Choice { tier: Tier::Chroot, proc: Proc::Container },
];

/// The best kind that can be had, of tier `wanted` if one is named. Logs what it is, why it is no better one, and what is lost by that.
/// This process has to be a subreaper (or PID 1).
pub fn choose(wanted: Option<Tier>, dkms: bool, state: &StateFolder) -> Result<Choice> {
    let mut refused: Vec<(Choice, Error)> = Vec::new();
    for choice in CHOICES.into_iter().filter(|choice| wanted.is_none_or(|tier| tier == choice.tier)) {
        match attempt(choice, dkms, state) {
            Ok(()) => {
                log(choice, wanted.is_some(), dkms, &refused);
                return Ok(choice);
            }
            Err(e) => refused.push((choice, e)),
        }
    }
    let reasons: Vec<_> = refused.iter().map(|(choice, e)| format!("{}: {e}", choice.tier.name())).collect();
    let tier =
        wanted.map_or("any tier".into(), |tier| format!("the tier '{}', which IMS_JAIL_TIER asks for", tier.name()));
    Err(Error::new(format!("have a jail of {tier}")).because(reasons.join("; ")))
}

/// Makes a jail around an empty folder and enters it, with all that a real one has; nothing of it remains.
fn attempt(choice: Choice, dkms: bool, state: &StateFolder) -> Result<()> {
    let trial = state.trial()?;
    let path = trial.path().join("image-root");
    let attempted = || format!("make a jail on trial in {}", trial.path().display());
    std::fs::create_dir_all(&path).attempt(attempted)?;
    let image_root = Tree::open(&path).attempt(attempted)?;
    let note_folder = Tree::open(trial.path()).attempt(attempted)?;
    let wanted = Wanted {
        tier: choice.tier,
        proc: choice.proc,
        path: &path,
        image_root: &image_root,
        note_folder: &note_folder,
        dkms,
        job: None,
        keep: Vec::new(),
        sftp: &[],
    };
    let made = OpenJail::open(&wanted, &trial).and_then(|jail| {
        let entered = enter(&trial);
        jail.end();
        jail.clear(&image_root, &note_folder, &trial).and(entered)
    });
    made.and(trial.remove()).inspect_err(|_| {
        let _ = trial.remove();
    })
}

fn enter(trial: &StateFolder) -> Result<()> {
    let helper = program()?;
    let attempted = || "enter a jail that was made on trial";
    let mut command = Command::new(helper);
    command.arg("try").arg(trial.jail()).env_clear().current_dir("/").stdin(Stdio::null());
    let output = command.output().attempt(attempted)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::new(attempted()).because(said.trim().trim_start_matches("ims-jail-shell: ")))
}

fn log(choice: Choice, forced: bool, dkms: bool, refused: &[(Choice, Error)]) {
    let mut lacks: Vec<_> = choice.tier.lacks().into_iter().collect();
    if choice.tier == Tier::User && choice.proc == Proc::Container {
        lacks.push("/proc is the container's, so that its processes can be seen");
    }
    let tier = choice.tier.name();
    let name = |choice: &Choice| match choice.proc {
        Proc::New => format!("{} with a /proc of its own", choice.tier.name()),
        Proc::Container => choice.tier.name().to_owned(),
    };
    let mut line = format!("the jail's tier is {tier}");
    if forced {
        line += ", as IMS_JAIL_TIER says";
    }
    for (better, why) in refused {
        line += &format!("; not {}: {why}", name(better));
    }
    if !lacks.is_empty() {
        line += &format!("; missing: {}", lacks.join(", "));
    }
    if dkms {
        line += "; with JOB_ENABLE_DKMS a session has the container's devices and can leave the image root";
    }
    match choice.tier {
        Tier::Chroot => tracing::warn!(tier, "{line}"),
        // As it should be; the jail's own line names it.
        Tier::Namespace if !forced && !dkms => tracing::debug!(tier, "{line}"),
        _ => tracing::info!(tier, "{line}"),
    }
}
