//! Networks for single tests, with a name server. They belong to the test's thread and its children, and end with them.

use std::net::UdpSocket;
use std::path::Path;

use nix::sched::{CloneFlags, unshare};

use crate::succeed;

/// Runs `test` in a network where only the name server knows `name`, and only /etc/hosts knows `in_file`. Both names
/// stand for 127.0.0.1.
pub fn with_names(dir: &Path, name: &'static str, in_file: &str, test: impl FnOnce() + Send) {
    std::fs::write(dir.join("resolv.conf"), "nameserver 127.0.0.1\n").unwrap();
    std::fs::write(dir.join("hosts"), format!("127.0.0.1 {in_file}\n")).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
            let script = "mount --make-rprivate / && for file in resolv.conf hosts; do mount --bind $0/$file /etc/$file; done && ip link set lo up";
            succeed(std::process::Command::new("sh").args(["-e", "-c", script]).arg(dir));
            let socket = UdpSocket::bind("127.0.0.1:53").unwrap();
            std::thread::spawn(move || serve(&socket, name));
            test();
        });
    });
}

/// Answers questions for addresses of `name` (RFC 1035), and NXDOMAIN for other names.
fn serve(socket: &UdpSocket, name: &str) {
    let mut packet = [0; 512];
    while let Ok((length, client)) = socket.recv_from(&mut packet) {
        let question = &packet[12..length];
        let end = question.iter().position(|&b| b == 0).unwrap() + 5;
        let labels: Vec<u8> = name
            .split('.')
            .flat_map(|label| [&[u8::try_from(label.len()).unwrap()], label.as_bytes()].concat())
            .collect();
        let (known, is_a) = (question.starts_with(&labels), question[end - 4..end - 2] == [0, 1]);
        let count = u8::from(known && is_a);
        let mut answer =
            [&packet[..2], &[0x81, if known { 0x80 } else { 0x83 }, 0, 1, 0, count, 0, 0, 0, 0], &question[..end]]
                .concat();
        if count == 1 {
            // A pointer to the question's name; type A, class IN, 60 s, four bytes of address.
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1]);
        }
        socket.send_to(&answer, client).unwrap();
    }
}
