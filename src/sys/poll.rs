//! poll(2) with a `Duration`.

use std::time::Duration;

use rustix::event::{PollFd, Timespec};

/// Waits until one of `sources` is ready or `limit` has passed. Returns how many are ready.
pub fn wait(sources: &mut [PollFd<'_>], limit: Duration) -> rustix::io::Result<usize> {
    let limit = Timespec { tv_sec: limit.as_secs().cast_signed(), tv_nsec: limit.subsec_nanos().into() };
    rustix::event::poll(sources, Some(&limit))
}
