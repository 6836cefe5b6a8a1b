//! What the near side of a remote job needs of the far one: this program on a node, or a container of upstream's.

use std::fs::File;
use std::net::IpAddr;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

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
    /// The work done there.
    pub(crate) task: Task,
    /// The image, a squashfs; `None` for the one in the image root's parent.
    pub(crate) image: Option<File>,
    /// The ports here that lead to the environment, each on an address or on all; at least one.
    pub(crate) listen: Vec<(Option<IpAddr>, u16)>,
    /// Names for the boot files that come back, where a sidecar looks for them.
    pub(crate) boot: Names,
    /// Limit of silence.
    pub(crate) silence: Duration,
}

/// The far side of a remote job.
pub(super) trait Far {
    /// Descriptors to wait for.
    fn sources(&self) -> Vec<PollFd<'_>>;

    /// Passes a mark on.
    fn mark(&mut self, verdict: Verdict);

    /// Returns whether it was marked, and closes by itself.
    fn is_closing(&self) -> bool;

    /// Returns whether it has closed, and sends its results.
    fn has_closed(&self) -> bool;

    /// Has it end everything.
    fn end(&mut self);

    /// Reads and writes what is possible now.
    fn turn(&mut self, files: Option<&SignalFiles>, signals: &Signals) -> Result<Option<Told>>;
}

/// News that change the job's state.
#[derive(Debug, Clone)]
pub(super) enum Told {
    /// The environment can be reached; its public host key, if it was told.
    Listening(String),
    /// The environment has closed, with this exit code.
    Closed(Verdict, u8),
    /// Nothing is left there.
    Gone,
}

/// Fails if a signal has arrived, which is left to be read.
pub(super) fn unless_signalled(signals: &Signals) -> Result<()> {
    let mut arrived = [PollFd::new(signals, PollFlags::IN)];
    match poll::wait(&mut arrived, Duration::ZERO) {
        Ok(0) | Err(_) => Ok(()),
        Ok(_) => Err(Error::new("go on").because("a signal has arrived")),
    }
}

/// Name of a file until it is whole.
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

/// Name of a file that is whole. Boot files have those of the image's /boot.
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

/// Gives the files that have come their names, the image last.
pub(super) fn give_names(volume: &Tree, received: &[Part], boot: &Names) -> Result<()> {
    let mut parts = received.to_vec();
    parts.sort_by_key(|part| *part == Part::Image);
    for part in parts {
        let (from, name) = (part_name(part), name_of(part, boot));
        volume.rename(from, name).attempt(|| format!("rename {from} to {name}"))?;
    }
    Ok(())
}
