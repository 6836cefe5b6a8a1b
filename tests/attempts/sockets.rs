//! At what listens outside, and at what is shared without a path: memory, queues, keys.

use std::ffi::CString;
use std::io::Read;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::Path;

use ims_sshd::session::report::Packet;
use ims_sshd::sys::packet::Packets;

use crate::outcome::{Outcome, Step};
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

/// A socket with an abstract name, which belongs to the network.
pub fn abstract_name() -> Outcome {
    let address = SocketAddr::from_abstract_name(told("ABSTRACT_SOCKET")).expect("a name");
    hear(UnixStream::connect_addr(&address).step("connect to the abstract socket outside")?)
}

/// The supervisor's own socket.
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

/// A key of root's own keyring.
pub fn user_key() -> Outcome {
    key(sys::USER_KEYRING)
}

/// A key of the keyring that processes inherit.
pub fn session_key() -> Outcome {
    key(sys::SESSION_KEYRING)
}
