//! Listeners outside, and what is shared without a path: memory, queues, keys.

use std::ffi::CString;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::Path;

use ims_sshd::session::report::Packet;
use ims_sshd::sys::seqpacket::Packets;
use rustix::process::PidfdGetfdFlags;

use crate::outcome::{Held, Outcome, Step, any};
use crate::outside::{secret, told};
use crate::sys;

fn hear(mut stream: UnixStream) -> Outcome {
    let mut said = Vec::new();
    stream.read_to_end(&mut said).step("hear what it says")?;
    secret(&said)
}

/// A socket at a path.
pub fn path() -> Outcome {
    hear(UnixStream::connect(told("SOCKET")).step("connect to the socket outside")?)
}

fn connect(abstract_name: String) -> Result<UnixStream, Held> {
    let address = SocketAddr::from_abstract_name(abstract_name).expect("a name");
    UnixStream::connect_addr(&address).step("connect to the abstract socket outside")
}

/// A socket with an abstract name, which belongs to the network namespace.
pub fn abstract_name() -> Outcome {
    hear(connect(told("ABSTRACT_SOCKET"))?)
}

/// A file that the neighbour with this pidfd has open.
fn file_of(neighbour: OwnedFd) -> Outcome {
    any(3..64, |number| {
        let taken = rustix::process::pidfd_getfd(&neighbour, number, PidfdGetfdFlags::empty()).step("pidfd_getfd")?;
        let mut text = [0; 128];
        let length = rustix::io::pread(taken, &mut text[..], 0).step("read what it has open")?;
        secret(&text[..length])
    })
}

/// A file of a listener outside, by its pidfd.
pub fn peer() -> Outcome {
    let stream = connect(told("NEIGHBOUR"))?;
    file_of(sys::peer(stream.as_fd()).step("ask for a handle on the peer")?)
}

/// The same by 32-bit system calls.
pub fn peer_by_32_bits() -> Outcome {
    let stream = connect(told("NEIGHBOUR"))?;
    any([false, true], |multiplexed| {
        file_of(sys::peer_by_32_bits(stream.as_fd(), multiplexed).step("ask for a handle on the peer")?)
    })
}

/// A file of a sender outside, by the pidfd that comes with its message.
pub fn sender() -> Outcome {
    let stream = connect(told("NEIGHBOUR"))?;
    sys::ask_for_senders(stream.as_fd()).step("ask for handles on senders")?;
    // The first message was sent before and has none.
    rustix::io::write(&stream, b"again").step("have the neighbour send a message")?;
    any(0..2, |_| file_of(sys::sender(stream.as_fd()).step("receive a handle on the sender")?))
}

fn opened(family: i32, kind: i32, protocol: i32) -> Outcome {
    let what = format!("open a socket of family {family}, type {kind}, protocol {protocol}");
    sys::socket(family, kind, protocol).step(&what)?;
    Ok(what)
}

/// All packets of the network; /proc/net/packet lists the socket.
pub fn packets() -> Outcome {
    opened(libc::AF_PACKET, libc::SOCK_RAW, i32::from(3_u16.to_be()))
}

/// All packets of the network, through the old socket type.
#[allow(deprecated)]
pub fn packets_by_their_old_name() -> Outcome {
    any([libc::AF_INET, libc::AF_INET6], |family| opened(family, libc::SOCK_PACKET, i32::from(3_u16.to_be())))
}

/// Packets that others in the network namespace receive by TCP and UDP.
pub fn raw() -> Outcome {
    any([libc::AF_INET, libc::AF_INET6], |family| {
        any([libc::IPPROTO_TCP, libc::IPPROTO_UDP, libc::IPPROTO_RAW], |protocol| {
            opened(family, libc::SOCK_RAW, protocol)
        })
    })
}

/// Socket families that no image needs; three-quarters of the numbers are unused.
fn other_families() -> impl Iterator<Item = i32> {
    let needed = [libc::AF_UNSPEC, libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
    (0..128).filter(move |family| !needed.contains(family))
}

/// Sockets of any other family: virtual machines, kernel crypto, and so on.
pub fn other_families_of_any_type() -> Outcome {
    any(other_families(), |family| any(1..=6, |kind| opened(family, kind, 0)))
}

/// The same by 32-bit system calls.
pub fn other_families_by_32_bits() -> Outcome {
    any([false, true], |multiplexed| {
        any(other_families(), |family| {
            any(1..=6, |kind| {
                let socket = sys::socket_by_32_bits(family.cast_unsigned(), kind, 0, multiplexed);
                socket.step(format!("open a socket of family {family}, type {kind}"))?;
                Ok(format!("has a socket of family {family}"))
            })
        })
    })
}

/// Netlink protocols by which no program of an image reaches the kernel.
fn other_netlink_protocols() -> impl Iterator<Item = i32> {
    let needed = [
        libc::NETLINK_ROUTE,
        libc::NETLINK_SOCK_DIAG,
        libc::NETLINK_SELINUX,
        libc::NETLINK_AUDIT,
        libc::NETLINK_KOBJECT_UEVENT,
    ];
    (0..32).filter(move |protocol| !needed.contains(protocol))
}

/// The kernel's messages by any other netlink protocol: processes that start and end, quotas, devices.
pub fn other_netlink() -> Outcome {
    any(other_netlink_protocols(), |protocol| {
        any([libc::SOCK_RAW, libc::SOCK_DGRAM], |kind| opened(libc::AF_NETLINK, kind, protocol))
    })
}

/// The same by 32-bit system calls.
pub fn other_netlink_by_32_bits() -> Outcome {
    any([false, true], |multiplexed| {
        any(other_netlink_protocols(), |protocol| {
            let (family, kind) = (libc::AF_NETLINK.cast_unsigned(), libc::SOCK_RAW.cast_unsigned());
            let socket = sys::socket_by_32_bits(family, kind, protocol.cast_unsigned(), multiplexed);
            socket.step(format!("open a netlink socket of protocol {protocol}"))?;
            Ok(format!("has a netlink socket of protocol {protocol}"))
        })
    })
}

/// The supervisor's socket.
pub fn supervisor() -> Outcome {
    let packets = Packets::connect(Path::new(&told("CONTROL"))).step("connect to the supervisor")?;
    packets.send(&Packet::Status.to_bytes()).step("ask the supervisor")?;
    let answer = packets.receive().step("hear the supervisor")?.unwrap_or_default();
    Ok(format!("the supervisor answers: {}", String::from_utf8_lossy(&answer)))
}

/// System V shared memory.
pub fn shared_memory() -> Outcome {
    let key = told("SHARED_MEMORY").parse().expect("a key");
    secret(&sys::SharedMemory::of(key).step("find the shared memory")?.read())
}

/// A POSIX message queue.
pub fn message_queue() -> Outcome {
    let name = CString::new(told("QUEUE")).expect("a name");
    secret(&sys::take_from_queue(&name).step("find the message queue")?)
}

fn key(ring: i32) -> Outcome {
    let name = CString::new(told("KEY")).expect("a name");
    secret(&sys::read_key(&name, ring).step("read the key")?)
}

/// A key in root's user keyring.
pub fn user_key() -> Outcome {
    key(sys::USER_KEYRING)
}

/// A key in the inherited session keyring.
pub fn session_key() -> Outcome {
    key(sys::SESSION_KEYRING)
}
