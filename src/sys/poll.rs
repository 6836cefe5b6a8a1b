//! Waiting for descriptors.

use std::time::Duration;

use rustix::event::{PollFd, Timespec};

/// Waits until one of `sources` is ready, for `limit` at the most. Returns how many are.
pub fn wait(sources: &mut [PollFd<'_>], limit: Duration) -> rustix::io::Result<usize> {
    let limit = Timespec { tv_sec: limit.as_secs().cast_signed(), tv_nsec: limit.subsec_nanos().into() };
    rustix::event::poll(sources, Some(&limit))
}
