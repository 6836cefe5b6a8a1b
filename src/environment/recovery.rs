//! Cleanup after an environment on this image root that was killed.

use std::path::Path;

use crate::environment::processes;
use crate::environment::settings::Settings;
use crate::environment::sshd_setup::unconfigure_sshd;
use crate::error::{Attempt, Result};
use crate::jailer::open;
use crate::sshd::daemon::Daemon;
use crate::sys::tree::Tree;
use crate::volume::layout::SSHD_LISTENING;
use crate::volume::signal_files::SignalFiles;
use crate::volume::state_directory::StateDirectory;

/// Ends the sshd of a killed environment, with its sessions. An sshd that was not recorded is recognized by its log
/// file. Returns what was found, for the log.
pub(crate) fn end_left_over(state: &StateDirectory, log: Option<&Path>) -> Result<Vec<&'static str>> {
    let mut found = Vec::new();
    if let Some(listener) = Daemon::recorded(&state.sshd()) {
        processes::end_tree(&listener)?;
        found.push("a listening sshd, with its sessions");
    }
    // Find a listener that was not recorded yet when the supervisor was killed, and connections whose listener has
    // ended.
    let others = log.map(Daemon::with_log).unwrap_or_default();
    for other in &others {
        processes::end_tree(other)?;
    }
    if !others.is_empty() {
        found.push("the sshd processes of its connections, with their sessions");
    }
    Ok(found)
}

/// Cleans up what a killed environment left on this image root. `found` is what [`end_left_over`] has found. Returns
/// whether that environment was open.
pub(crate) fn recover(
    settings: &Settings,
    files: &SignalFiles,
    image_root: &Tree,
    state: &StateDirectory,
    mut found: Vec<&'static str>,
) -> Result<bool> {
    // The jail itself is gone: its init ends when the supervisor's end of their socket closes.
    match std::fs::remove_file(state.jail()) {
        Ok(()) => found.push("the record of its jail"),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e).attempt(|| format!("remove {}", state.jail().display())),
    }
    if unconfigure_sshd(settings)? {
        found.push("its line in sshd's configuration");
    }
    if open::clear_image_root(image_root, files.parent())? {
        found.push("its additions to the image");
    }
    let was_open = files.stands(SSHD_LISTENING)?;
    if was_open {
        files.remove(SSHD_LISTENING)?;
        found.push("'sshd_listening'");
    }
    if !found.is_empty() {
        tracing::warn!(
            "cleaned up after an environment that was killed here: {}; changes to the image are kept",
            found.join("; ")
        );
    }
    Ok(was_open)
}
