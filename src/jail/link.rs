//! Messages of the jail's init to the supervisor. When one end of the socket closes, the process at the other end knows
//! that its peer has died.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::error::Error;
use crate::sys::seqpacket::Packets;
use crate::verdict::Verdict;

/// A message, sent as one packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The init's process ID in the container, sent by the process that started it.
    Started(i32),
    /// The jail is built. The message carries the descriptors for entering it: the tier's namespaces, then the jail's
    /// copy of `ims-jail-shell`.
    Made,
    /// The init serves, and the jail can be entered. The message carries the init's inotify: closing an inotify takes
    /// about 10 ms, so the supervisor keeps a duplicate, and the init's exit does not wait for it.
    Ready,
    /// The image's /tmp has a mark. Its owner is the user with this ID in the image.
    Marked(Verdict, u32),
    /// The jail could not be built, or its init failed.
    Failed {
        /// The whole sentence.
        why: String,
        /// True for a [transient](crate::error::Error::is_transient) error.
        is_transient: bool,
    },
}

impl Message {
    /// Tells an error.
    pub(crate) fn failed(error: &Error) -> Self {
        Self::Failed { why: error.to_string(), is_transient: error.is_transient() }
    }

    fn to_text(&self) -> String {
        match self {
            Self::Started(pid) => format!("started {pid}"),
            Self::Made => "made".into(),
            Self::Ready => "ready".into(),
            Self::Marked(verdict, owner) => format!("marked {} {owner}", verdict.signal_file()),
            Self::Failed { why, is_transient: false } => format!("failed {why}"),
            Self::Failed { why, is_transient: true } => format!("failed-for-now {why}"),
        }
    }

    /// The verdict and the mark's owner, if this is a mark.
    pub(crate) fn mark(self) -> Option<(Verdict, u32)> {
        match self {
            Self::Marked(verdict, owner) => Some((verdict, owner)),
            _ => None,
        }
    }

    fn parse(text: &str) -> Option<Self> {
        Some(match text.split_once(' ') {
            None if text == "made" => Self::Made,
            None if text == "ready" => Self::Ready,
            Some(("started", pid)) => Self::Started(pid.parse().ok()?),
            Some(("marked", mark)) => {
                let (name, owner) = mark.split_once(' ')?;
                Self::Marked(Verdict::from_signal_file(name)?, owner.parse().ok()?)
            }
            Some(("failed", why)) => Self::Failed { why: why.to_owned(), is_transient: false },
            Some(("failed-for-now", why)) => Self::Failed { why: why.to_owned(), is_transient: true },
            _ => return None,
        })
    }
}

/// One end of the socket.
#[derive(Debug)]
pub struct Link {
    packets: Packets,
}

impl Link {
    /// Both ends of a new socket, close-on-exec.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = Packets::pair()?;
        Ok((Self { packets: a }, Self { packets: b }))
    }

    /// Takes over an inherited end.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { packets: Packets::from_fd(fd) }
    }

    /// Releases the end, to be a child's standard input.
    pub fn into_fd(self) -> OwnedFd {
        self.packets.into_fd()
    }

    /// Sends `message`; EPIPE if the other end is closed.
    pub fn send(&self, message: &Message) -> io::Result<()> {
        self.send_with(message, &[])
    }

    /// Sends `message` with duplicates of `descriptors`.
    pub(crate) fn send_with(&self, message: &Message, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.packets.send_with(message.to_text().as_bytes(), descriptors)
    }

    /// Tells the other end that nothing more will be sent; the other end can still send.
    pub(crate) fn finish(&self) -> io::Result<()> {
        self.packets.finish()
    }

    /// Waits for the next message and its descriptors; `None` if the other end is closed.
    pub fn receive(&self) -> io::Result<Option<(Message, Vec<OwnedFd>)>> {
        let Some((packet, descriptors)) = self.packets.receive_with()? else { return Ok(None) };
        let foreign = || io::Error::other("the message is of another version of ims-jail-shell");
        let message = Message::parse(&String::from_utf8_lossy(&packet)).ok_or_else(foreign)?;
        Ok(Some((message, descriptors)))
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.packets.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_unchanged_and_the_end_is_detected() {
        let (a, b) = Link::pair().unwrap();
        let messages = [
            Message::Started(5),
            Message::Made,
            Message::Ready,
            Message::Marked(Verdict::Complete, 0),
            Message::Marked(Verdict::Failed, u32::MAX),
            Message::Failed { why: "cannot mount: no".into(), is_transient: false },
            Message::Failed { why: "cannot open: all are in use".into(), is_transient: true },
        ];
        for message in &messages {
            a.send(message).unwrap();
        }
        for message in messages {
            assert_eq!(b.receive().unwrap().unwrap().0, message);
        }
        a.send_with(&Message::Ready, &[a.as_fd(), b.as_fd()]).unwrap();
        assert_eq!(b.receive().unwrap().unwrap().1.len(), 2);
        drop(a);
        assert!(b.receive().unwrap().is_none());
    }
}
