//! `ims-sshd complete`, `fail` and `status`: the signal files, from a person's side.

use std::path::Path;

use serde_json::json;

use crate::error::{Error, Result};
use crate::lifecycle::machine::State;
use crate::lifecycle::signal_files::{EXITING, READY, SSHD_LISTENING, SignalFiles};
use crate::local::say;
use crate::verdict::Verdict;

/// Marks the image; whoever runs its environment closes it.
pub fn mark(parent: &Path, verdict: Verdict) -> Result<u8> {
    let files = open(parent)?;
    if files.stands(EXITING)? {
        return Err(Error::new(format!("mark the image in {} {}", parent.display(), verdict.signal_file()))
            .because("its environment has ended already"));
    }
    files.touch(verdict.signal_file()).map(|()| 0)
}

/// Prints where the environment is in its life.
pub fn print(parent: &Path, as_json: bool) -> Result<u8> {
    let files = open(parent)?;
    let verdict = files.verdict()?.map(Verdict::signal_file);
    let state = state(&files)?.map(State::name);
    if as_json {
        let report = json!({ "image_root_parent": parent, "state": state, "verdict": verdict });
        say(&format!("{report}\n"));
    } else {
        let verdict = verdict.map_or(String::new(), |v| format!(", {v}"));
        say(&format!("{}: {}{verdict}\n", parent.display(), state.unwrap_or("not open")));
    }
    Ok(0)
}

fn state(files: &SignalFiles) -> Result<Option<State>> {
    Ok(if files.stands(EXITING)? {
        Some(State::Done)
    } else if !files.is_claimed() {
        None
    } else if files.verdict()?.is_some() {
        Some(State::Grace)
    } else if files.stands(SSHD_LISTENING)? {
        Some(State::Serving)
    } else if files.stands(READY)? {
        Some(State::Preparing)
    } else {
        Some(State::Waiting)
    })
}

fn open(parent: &Path) -> Result<SignalFiles> {
    SignalFiles::open(parent)?.ok_or_else(|| {
        Error::new(format!("open the image root parent {}", parent.display()))
            .because("it does not exist")
            .advise("name the folder that holds image-root and the signal files; 'ims-sshd customize' prints it")
    })
}
