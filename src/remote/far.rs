//! Interface between the near and the far side of a remote job. The far side is this program on a node, or a container
//! that upstream has started.

use std::fmt::Display;
use std::fs::File;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use serde_json::Value;

use crate::error::{Attempt, Error, Result};
use crate::image::boot::Names;
use crate::remote::connection::Destination;
use crate::remote::message::{Part, Task};
use crate::sys::poll;
use crate::sys::signals::Signals;
use crate::sys::tree::Tree;
use crate::verdict::Verdict;
use crate::volume::layout::{KIWI_LOG, REMOTE_CHANGES, REMOTE_PARTS, REMOTE_TREE, TRANSFER};
use crate::volume::signal_files::SignalFiles;

/// A remote job.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// The node.
    pub(crate) to: Destination,
    /// The job's ID.
    pub(crate) job: String,
    /// The work for the node.
    pub(crate) task: Task,
    /// The image, a squashfs; if `None`, the one in the image root parent is used.
    pub(crate) image: Option<File>,
    /// Local ports that lead to the environment, each with the address to listen on or `None` for all; at least one
    /// port.
    pub(crate) listen: Vec<(Option<IpAddr>, u16)>,
    /// Names that the received boot files get: a sidecar looks for them under these names.
    pub(crate) boot: Names,
    /// Time after which a silent node counts as lost.
    pub(crate) silence: Duration,
}

/// Error of a job on `host` that cannot continue.
pub(super) fn cannot_go_on(host: &str, why: impl Display) -> Error {
    Error::new(format!("go on with the job on {host}")).because(why)
}

/// The far side of a remote job.
pub(super) trait Far {
    /// Returns the descriptors to poll.
    fn sources(&self) -> Vec<PollFd<'_>>;

    /// Passes a user's mark to the far side.
    fn mark(&mut self, verdict: Verdict);

    /// Returns whether the image was marked, in which case the environment closes by itself.
    fn is_closing(&self) -> bool;

    /// Returns since when the far side has had the image, if it has not opened it yet.
    fn opening_since(&self) -> Option<Instant>;

    /// Returns whether the environment has closed, so that the far side is sending its results.
    fn has_closed(&self) -> bool;

    /// Asks the environment for its report. Returns whether it will answer.
    fn ask(&mut self) -> bool {
        false
    }

    /// Makes the far side end and remove everything of the job.
    fn end(&mut self);

    /// Reads and writes as much as is possible without blocking. Returns a report, if one has arrived.
    fn turn(&mut self, files: Option<&SignalFiles>, signals: &Signals) -> Result<Option<Told>>;
}

/// A report of the far side that changes the job's state.
#[derive(Debug, Clone)]
pub(super) enum Told {
    /// Users can log in. Contains the public host key, or is empty if the host key is not known.
    Listening(String),
    /// The environment has closed, with this verdict and exit code.
    Closed(Verdict, u8),
    /// The environment's report; null if it has none.
    Report(Value),
    /// Nothing of the job is left on the node.
    Gone,
}

/// Fails if a signal has arrived. The signal stays pending.
pub(super) fn unless_signalled(signals: &Signals) -> Result<()> {
    let mut arrived = [PollFd::new(signals, PollFlags::IN)];
    match poll::wait(&mut arrived, Duration::ZERO) {
        Ok(0) | Err(_) => Ok(()),
        Ok(_) => Err(Error::new("go on").because("a signal has arrived")),
    }
}

/// Returns the name that a file has until it is complete.
pub(super) fn part_name(part: Part) -> &'static str {
    let [image, kernel, initrd, parameters, changes, log] = REMOTE_PARTS;
    match part {
        Part::Source | Part::Image | Part::Tree => image,
        Part::Log => log,
        Part::Kernel => kernel,
        Part::Initrd => initrd,
        Part::Parameters => parameters,
        Part::Changes => changes,
    }
}

/// Returns the name of a complete file. A boot file is named as in the image's /boot.
pub(super) fn name_of(part: Part, boot: &Names) -> &str {
    match part {
        Part::Kernel => &boot.kernel,
        Part::Initrd => &boot.initrd,
        Part::Parameters => &boot.parameters,
        Part::Changes => REMOTE_CHANGES,
        Part::Log => KIWI_LOG,
        Part::Tree => REMOTE_TREE,
        Part::Source | Part::Image => TRANSFER,
    }
}

/// Renames received files to their final names, the image last.
pub(super) fn give_names(volume: &Tree, received: &[Part], boot: &Names) -> Result<()> {
    let mut parts = received.to_vec();
    parts.sort_by_key(|part| *part == Part::Image);
    for part in parts {
        let (from, name) = (part_name(part), name_of(part, boot));
        volume.rename(from, name).attempt(|| format!("rename {from} to {name}"))?;
    }
    Ok(())
}
