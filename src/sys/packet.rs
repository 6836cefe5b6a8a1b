//! Local sockets that carry whole packets (`SOCK_SEQPACKET`): what one program of ours tells another, and that it is still there.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr};

/// No packet is longer; what is, is cut.
pub const LONGEST: usize = 16 << 10;

/// One end of a connection.
#[derive(Debug)]
pub struct Packets {
    fd: OwnedFd,
}

impl Packets {
    /// Both ends, close-on-exec.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self { fd: a }, Self { fd: b }))
    }

    /// Connects to the [`Listener`] at `path`. Does not wait for it to accept.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let fd = socket::socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        socket::connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(Self { fd })
    }

    /// Takes an end that was inherited.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Gives the end away, to be a child's standard input.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Sends one packet; EPIPE if the other end is gone.
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        socket::send(self.fd.as_raw_fd(), &packet[..packet.len().min(LONGEST)], MsgFlags::MSG_NOSIGNAL)?;
        Ok(())
    }

    /// The next packet, waiting for it; `None` if the other end is gone.
    pub fn receive(&self) -> io::Result<Option<Vec<u8>>> {
        let mut packet = vec![0; LONGEST];
        loop {
            match socket::recv(self.fd.as_raw_fd(), &mut packet, MsgFlags::empty()) {
                Ok(0) | Err(Errno::ECONNRESET) => return Ok(None),
                Ok(length) => {
                    packet.truncate(length);
                    return Ok(Some(packet));
                }
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// The process at the other end.
    pub fn peer(&self) -> io::Result<nix::unistd::Pid> {
        let credentials = socket::getsockopt(&self.fd, socket::sockopt::PeerCredentials)?;
        Ok(nix::unistd::Pid::from_raw(credentials.pid()))
    }
}

impl AsFd for Packets {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A place to connect to.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
}

impl Listener {
    /// Listens at `path`, where a socket of an earlier process may lie. Only root can connect.
    pub fn bind(path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket::socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        socket::bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        socket::listen(&fd, Backlog::MAXCONN)?;
        Ok(Self { fd })
    }

    /// The next connection that is waiting, if any.
    pub fn accept(&self) -> Option<Packets> {
        let fd = socket::accept4(self.fd.as_raw_fd(), SockFlag::SOCK_CLOEXEC).ok()?;
        // SAFETY: accept4 has just opened this descriptor, so nobody else owns it.
        #[allow(unsafe_code)]
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Some(Packets { fd })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
