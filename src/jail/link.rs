//! What the jail's init tells the supervisor, over a socket that is also their bond: when either end closes, the other has died.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::sys::seqpacket::Packets;
use crate::verdict::Verdict;

/// One message, one packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The init's number in the container; sent by the process that started it.
    Started(i32),
    /// The jail is made, and entered by the descriptors that come with this: the tier's namespaces, then the jail's copy of
    /// `ims-jail-shell`.
    Made,
    /// The init serves; the jail can be entered. The descriptor that comes with this is the init's inotify: closing an inotify takes some
    /// ten milliseconds, and the supervisor keeps a duplicate so that the init's exit does not wait for it.
    Ready,
    /// A user marked the image, from inside.
    Marked(Verdict),
    /// The jail could not be made, or its init has met a bug of its own; a whole sentence.
    Failed(String),
}

impl Message {
    fn to_text(&self) -> String {
        match self {
            Self::Started(pid) => format!("started {pid}"),
            Self::Made => "made".into(),
            Self::Ready => "ready".into(),
            Self::Marked(verdict) => format!("marked {}", verdict.signal_file()),
            Self::Failed(why) => format!("failed {why}"),
        }
    }

    /// The mark that it tells of, if it does.
    pub(crate) fn mark(self) -> Option<Verdict> {
        match self {
            Self::Marked(verdict) => Some(verdict),
            _ => None,
        }
    }

    fn parse(text: &str) -> Option<Self> {
        Some(match text.split_once(' ') {
            None if text == "made" => Self::Made,
            None if text == "ready" => Self::Ready,
            Some(("started", pid)) => Self::Started(pid.parse().ok()?),
            Some(("marked", name)) => Self::Marked(Verdict::from_signal_file(name)?),
            Some(("failed", why)) => Self::Failed(why.to_owned()),
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
    /// Both ends, close-on-exec.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = Packets::pair()?;
        Ok((Self { packets: a }, Self { packets: b }))
    }

    /// Takes an end that was inherited.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { packets: Packets::from_fd(fd) }
    }

    /// Gives the end away, to be a child's standard input.
    pub fn into_fd(self) -> OwnedFd {
        self.packets.into_fd()
    }

    /// Sends `message`; EPIPE if the other end is gone.
    pub fn send(&self, message: &Message) -> io::Result<()> {
        self.send_with(message, &[])
    }

    /// Sends `message` and, with it, a copy of each of `descriptors`.
    pub(crate) fn send_with(&self, message: &Message, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.packets.send_with(message.to_text().as_bytes(), descriptors)
    }

    /// Tells the other end that nothing more is sent; it can still send.
    pub(crate) fn finish(&self) -> io::Result<()> {
        self.packets.finish()
    }

    /// The next message and the descriptors that came with it, waiting for it; `None` if the other end is gone.
    pub fn receive(&self) -> io::Result<Option<(Message, Vec<OwnedFd>)>> {
        let Some((packet, descriptors)) = self.packets.receive_with()? else { return Ok(None) };
        let foreign = || io::Error::other("a message of another version");
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
    fn messages_arrive_as_they_were_sent_and_the_end_is_seen() {
        let (a, b) = Link::pair().unwrap();
        let messages = [
            Message::Started(5),
            Message::Made,
            Message::Ready,
            Message::Marked(Verdict::Complete),
            Message::Marked(Verdict::Failed),
            Message::Failed("cannot mount: no".into()),
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
