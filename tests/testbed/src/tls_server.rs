//! A TLS proxy in front of a server without TLS, and its certificates.

use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::{Ended, free_port, succeed, wait_until};

/// A running TLS proxy.
pub struct Tls {
    pub process: Ended,
    pub port: u16,
}

const PROXY: &str = "
import socket, ssl, sys, threading
port, to, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(directory + '/server.crt', directory + '/server.key')
def copy(a, b):
    try:
        while data := a.recv(65536): b.sendall(data)
    except OSError: pass
    for one in (a, b):
        try: one.shutdown(socket.SHUT_RDWR)
        except OSError: pass
def serve(plain):
    try: client = context.wrap_socket(plain, server_side=True)
    except OSError: return
    server = socket.create_connection(('127.0.0.1', to))
    threading.Thread(target=copy, args=(server, client), daemon=True).start()
    copy(client, server)
listener = socket.create_server(('127.0.0.1', port))
while True: threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
";

impl Tls {
    /// Starts a proxy in front of the server on port `to`, with the certificate in `dir`.
    pub fn start(dir: &Path, to: u16) -> Self {
        let port = free_port();
        let mut python = Command::new("/usr/bin/python3");
        python.args(["-c", PROXY, &port.to_string(), &to.to_string()]).arg(dir).stdin(Stdio::null());
        let process = Ended::killed(python.spawn().unwrap());
        wait_until("the TLS server", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        Self { process, port }
    }
}

/// Creates a certificate authority, and a server's certificate that it has signed.
pub fn certificates(dir: &Path) {
    let script = "cd $0 && exec 2>&1 && set -e
        openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -subj /CN=authority -days 2
        openssl req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=server
        printf 'subjectAltName=IP:127.0.0.1\\nbasicConstraints=CA:FALSE\\n' > extensions
        openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile extensions -out server.crt";
    succeed(Command::new("sh").args(["-c", script]).arg(dir));
}

pub fn port_of(url: &str) -> u16 {
    url.trim_start_matches("http://127.0.0.1:").split('/').next().unwrap().parse().unwrap()
}
