//! Waiting for descriptors: poll(2), and epoll(7) for event loops.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{PollFd, Timespec};

/// Waits until one of `sources` is ready or `limit` has passed. Returns how many are ready.
pub fn wait(sources: &mut [PollFd<'_>], limit: Duration) -> rustix::io::Result<usize> {
    rustix::event::poll(sources, Some(&timespec(limit)))
}

fn timespec(limit: Duration) -> Timespec {
    Timespec { tv_sec: limit.as_secs().cast_signed(), tv_nsec: limit.subsec_nanos().into() }
}

/// Sources of an event loop, each registered once with its event. The set itself is readable while a source in it is
/// ready: a part of the program can have its own set, and register that as one source of the main loop.
#[derive(Debug)]
pub(crate) struct Sources<E> {
    epoll: OwnedFd,
    events: HashMap<RawFd, E>,
}

impl<E: Copy + Ord> Sources<E> {
    /// Starts without sources.
    pub(crate) fn new() -> rustix::io::Result<Self> {
        Ok(Self { epoll: epoll::create(CreateFlags::CLOEXEC)?, events: HashMap::new() })
    }

    /// Registers `source` until it is closed: while it is readable, `wait` returns `event`.
    pub(crate) fn add(&mut self, source: impl AsFd, event: E) -> rustix::io::Result<()> {
        let number = source.as_fd().as_raw_fd();
        self.events.insert(number, event);
        epoll::add(&self.epoll, source, EventData::new_u64(number.cast_unsigned().into()), EventFlags::IN)
    }

    /// Unregisters `source`. A socket whose other end is gone, for example, would stay ready.
    pub(crate) fn remove(&self, source: impl AsFd) {
        let _ = epoll::delete(&self.epoll, source);
    }

    /// Waits until a source is ready or `limit` has passed. Returns the events of the ready ones.
    pub(crate) fn wait(&self, limit: Duration) -> BTreeSet<E> {
        // The next call returns what exceeds this capacity.
        let mut ready = Vec::with_capacity(64);
        let _ = epoll::wait(&self.epoll, spare_capacity(&mut ready), Some(&timespec(limit)));
        let number = |event: &epoll::Event| RawFd::try_from(event.data.u64()).ok();
        ready.iter().filter_map(number).filter_map(|number| self.events.get(&number).copied()).collect()
    }
}

impl<E> AsFd for Sources<E> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn source_returns_its_event_until_it_is_read_or_removed() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let (mut inner, mut whole) = (Sources::new().unwrap(), Sources::new().unwrap());
        inner.add(&ours, 'a').unwrap();
        whole.add(&inner, 'b').unwrap();
        let ready = || [&inner, &whole].map(|sources| sources.wait(Duration::ZERO).into_iter().collect::<String>());
        assert_eq!(ready(), ["", ""]);
        theirs.write_all(b"x").unwrap();
        assert_eq!(ready(), ["a", "b"]);
        assert_eq!(ready(), ["a", "b"]);
        ours.read_exact(&mut [0]).unwrap();
        assert_eq!(ready(), ["", ""]);
        drop(theirs);
        assert_eq!(ready(), ["a", "b"]);
        inner.remove(&ours);
        assert_eq!(ready(), ["", ""]);
    }
}
