//! `ims-sshd complete`, `fail` and `status`: the signal files, from a person's side.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::lifecycle::signal_files::{EXITING, READY, SSHD_LISTENING, SignalFiles};
use crate::lifecycle::stage::{self, Stage};
use crate::lifecycle::state::StateFolder;
use crate::local::{say, say_json};
use crate::printable::Printable;
use crate::session::report::{Packet, SOCKET};
use crate::sys::packet::Packets;
use crate::sys::poll;
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

/// Prints where the environment is in its life, and who is in it. Of one in another container it tells what the signal files do.
pub fn print(parent: &Path, as_json: bool) -> Result<u8> {
    let files = open(parent)?;
    let report = match ask(parent) {
        Some(report) => report,
        None => {
            let (stage, since) = match stage::shown(files.parent()) {
                Some((stage, since)) => (Some(stage), Some(humantime::format_rfc3339_seconds(since).to_string())),
                None => (stage(&files)?, None),
            };
            let verdict = files.verdict()?.map(Verdict::signal_file);
            let mut report =
                json!({ "image_root_parent": parent, "state": stage.map(Stage::name), "verdict": verdict });
            if let Some(since) = since {
                report["since"] = since.into();
            }
            report
        }
    };
    if as_json {
        say_json(&report);
    } else {
        say(&in_words(&report));
    }
    Ok(0)
}

/// What the supervisor itself says, if it is here and answers in time.
fn ask(parent: &Path) -> Option<Value> {
    let packets = Packets::connect(&StateFolder::place(parent).join(SOCKET)).ok()?;
    packets.send(&Packet::Status.to_bytes()).ok()?;
    let limit = Duration::from_secs(2);
    poll::wait(&mut [PollFd::new(&packets, PollFlags::IN)], limit).ok().filter(|ready| *ready > 0)?;
    serde_json::from_slice(&packets.receive().ok()??).ok()
}

fn in_words(report: &Value) -> String {
    let word = |value: &Value| value.as_str().map(|text| Printable(text).to_string());
    let mut text = word(&report["image_root_parent"]).unwrap_or_default();
    text += ": ";
    text += &word(&report["state"]).unwrap_or_else(|| "not open".into());
    for (before, field) in [(" since ", "since"), (", tier ", "tier"), (", marked ", "verdict")] {
        if let Some(value) = word(&report[field]) {
            text += before;
            text += &value;
        }
    }
    text += "\n";
    for session in report["sessions"].as_array().into_iter().flatten() {
        let column = |name| word(&session[name]).unwrap_or_default();
        let _ = writeln!(text, "  {}  since {}  {}", column("client"), column("since"), column("request"));
    }
    text
}

fn stage(files: &SignalFiles) -> Result<Option<Stage>> {
    Ok(if files.stands(EXITING)? {
        Some(Stage::Done)
    } else if !files.is_claimed() {
        None
    } else if files.verdict()?.is_some() {
        Some(Stage::Closing)
    } else if files.stands(SSHD_LISTENING)? {
        Some(Stage::Serving)
    } else if files.stands(READY)? {
        Some(Stage::Preparing)
    } else {
        Some(Stage::Waiting)
    })
}

fn open(parent: &Path) -> Result<SignalFiles> {
    SignalFiles::open(parent)?.ok_or_else(|| {
        Error::new(format!("open the image root parent {}", parent.display()))
            .because("it does not exist")
            .advise("name the folder that holds image-root and the signal files; 'ims-sshd customize' prints it")
    })
}
