//! `ims-sshd enter`: the jail without SSH.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use crate::error::{Attempt, Error, Result};
use crate::lifecycle::foreign;
use crate::lifecycle::open_jail::{self, OpenJail, Wanted};
use crate::lifecycle::processes;
use crate::lifecycle::settings::jail_tier;
use crate::lifecycle::state::StateFolder;
use crate::lifecycle::tier;
use crate::local;
use crate::sys::process::end_like;
use crate::sys::signals::{Signals, hold_none};
use crate::sys::tree::Tree;

/// Makes a jail around `image_root`, runs `command` (or a shell) in it, and ends everything inside when that has ended.
/// Returns its exit code, or dies of the signal it died of.
pub fn run(image_root: &Path, command: &[OsString]) -> Result<u8> {
    let tier = jail_tier(std::env::var_os("IMS_JAIL_TIER"))?;
    let image_root = local::image_root(image_root)?;
    let run = local::RunFolder::claim("enter", &image_root)?;
    // The command is in the foreground; what it does about these is its own business.
    let held = [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD];
    let _signals = Signals::hold(&held).attempt(|| "hold back signals")?;
    nix::sys::prctl::set_child_subreaper(true).attempt(|| "become the parent of orphaned processes")?;

    let state = StateFolder::of(run.path())?;
    let tree = Tree::open(&image_root).attempt(|| format!("open the image root {}", image_root.display()))?;
    let notes = Tree::open(run.path()).attempt(|| format!("open {}", run.path().display()))?;
    open_jail::clear_image_root(&tree, &notes)?;
    let cleared = |e: Error| {
        let _ = state.remove();
        // Stays if it holds the note of an addition that could not be removed.
        let _ = std::fs::remove_dir(run.path());
        e
    };
    let kind = tier::choose(tier, false, &state).map_err(cleared)?;
    let emulation = foreign::prepare(&tree, None, &notes, Some(kind.tier)).map_err(cleared)?;
    let wanted = Wanted {
        tier: kind.tier,
        proc: kind.proc,
        path: &image_root,
        image_root: &tree,
        note_folder: &notes,
        dkms: false,
        emulated: emulation.in_jail,
        job: None,
        hostname: None,
        keep: Vec::new(),
        sftp: &[],
        bare: kind.bare.as_ref().map(AsFd::as_fd),
    };
    let jail = OpenJail::open(&wanted, &state).map_err(cleared)?;
    let mut helper = Command::new(open_jail::program()?);
    helper.arg("enter").arg(state.jail()).arg("--").args(command);
    let ended = hold_none(&mut helper).status().attempt(|| "start ims-jail-shell");

    let all_ended = processes::end_all(Some(&jail));
    drop(emulation);
    jail.clear(&tree, &notes, &state)?;
    state.remove()?;
    local::remove_folder(run.path())?;
    all_ended?;
    let status = ended?;
    Ok(match WaitStatus::from_raw(Pid::from_raw(1), status.into_raw()) {
        Ok(status) => end_like(status),
        Err(_) => 1,
    })
}
