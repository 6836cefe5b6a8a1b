//! Unix sockets of type `SOCK_SEQPACKET`, which preserve message boundaries; one end sees when the other is gone.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::net::{
    self, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

/// Maximum length of a packet, in bytes; a longer one is truncated.
pub(crate) const LONGEST: usize = 16 << 10;

/// Maximum number of descriptors in one packet; the kernel closes all others.
const MOST_DESCRIPTORS: usize = 8;

/// One end of a connection.
#[derive(Debug)]
pub struct Packets {
    fd: OwnedFd,
}

impl Packets {
    /// Both ends of a new connection, close-on-exec.
    pub(crate) fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self { fd: a }, Self { fd: b }))
    }

    /// Connects to the [`Listener`] at `path`. Does not wait for accept.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let fd = net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        net::connect(&fd, &SocketAddrUnix::new(path)?)?;
        Ok(Self { fd })
    }

    /// Takes an inherited end.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Returns the descriptor, to become a child's standard input.
    pub(crate) fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Sends one packet; EPIPE if the other end is gone.
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        self.send_with(packet, &[])
    }

    /// Sends one packet with duplicates of `descriptors`.
    pub(crate) fn send_with(&self, packet: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(Errno::TOOBIG.into());
        }
        let packet = [IoSlice::new(&packet[..packet.len().min(LONGEST)])];
        net::sendmsg(&self.fd, &packet, &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Shuts down sending: the other end reads end-of-file and can still send.
    pub(crate) fn finish(&self) -> io::Result<()> {
        net::shutdown(&self.fd, net::Shutdown::Write).map_err(Into::into)
    }

    /// Waits for the next packet; `None` if the other end is gone. Descriptors sent with it are closed.
    pub fn receive(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(self.receive_with()?.map(|(packet, _)| packet))
    }

    /// Waits for the next packet and the descriptors sent with it, close-on-exec.
    pub fn receive_with(&self) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
        let mut packet = vec![0; LONGEST];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        loop {
            let mut into = [IoSliceMut::new(&mut packet)];
            match net::recvmsg(&self.fd, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) if received.bytes == 0 => return Ok(None),
                Err(Errno::CONNRESET) => return Ok(None),
                Ok(received) => {
                    packet.truncate(received.bytes);
                    let messages = ancillary.drain().filter_map(|message| match message {
                        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                        _ => None,
                    });
                    return Ok(Some((packet, messages.flatten().collect())));
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// PID of the process at the other end.
    pub(crate) fn peer(&self) -> io::Result<nix::unistd::Pid> {
        let credentials = net::sockopt::socket_peercred(&self.fd)?;
        Ok(nix::unistd::Pid::from_raw(credentials.pid.as_raw_nonzero().get()))
    }
}

impl AsFd for Packets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A listening socket.
#[derive(Debug)]
pub(crate) struct Listener {
    fd: OwnedFd,
}

impl Listener {
    /// Listens at `path`, replacing the socket of an earlier process. Only root can connect.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        net::bind(&fd, &SocketAddrUnix::new(path)?)?;
        net::listen(&fd, libc::SOMAXCONN)?;
        Ok(Self { fd })
    }

    /// Accepts the next pending connection, if any.
    pub(crate) fn accept(&self) -> Option<Packets> {
        net::accept_with(&self.fd, SocketFlags::CLOEXEC).ok().map(Packets::from_fd)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
