//! Over TLS: who signed the server's certificate is checked, unless that is switched off.

use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::file_server::FileServer;
use crate::job::*;
use crate::s3_server::Bucket;
use crate::support::*;

/// Speaks TLS and passes on what it hears.
pub struct Tls {
    process: Child,
    pub port: u16,
}

const PROXY: &str = "
import socket, ssl, sys, threading
port, to, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(folder + '/server.crt', folder + '/server.key')
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
    /// In front of what listens on port `to`, with the certificate in `dir`.
    pub fn start(dir: &Path, to: u16) -> Self {
        let port = free_port();
        let mut python = Command::new("/usr/bin/python3");
        python.args(["-c", PROXY, &port.to_string(), &to.to_string()]).arg(dir).stdin(Stdio::null());
        let process = python.spawn().unwrap();
        wait_until("the TLS server", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        Self { process, port }
    }
}

impl Drop for Tls {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An authority, and a server's certificate that it has signed.
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

#[test]
fn an_image_is_fetched_from_a_server_that_an_authority_has_signed_and_from_no_other() {
    let dir = folder();
    certificates(dir.path());
    let server = FileServer::start(std::fs::read(squashfs_of(&image(dir.path()))).unwrap(), &[]);
    let tls = Tls::start(dir.path(), port_of(&server.url));
    let url = format!("https://127.0.0.1:{}/rootfs", tls.port);
    let parent = dir.path().join("parent");
    let mut command = ims_sshd(&["prepare", parent.to_str().unwrap(), &url], &[("IMS_RETRY_LIMIT", "1".into())]);
    let refused = command.output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("certificate"), "{}", text(&refused.stderr));
    let output = command.env("CA_CERT", dir.path().join("ca.crt")).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(parent.join("image-root/etc/passwd").exists());
}

#[test]
fn a_stores_certificate_is_checked_unless_s3_ssl_validate_is_false() {
    let dir = folder();
    certificates(dir.path());
    let tree = image(dir.path());
    let squashfs = squashfs_of(&tree);
    let bucket = Bucket::new();
    let tls = Tls::start(dir.path(), port_of(&bucket.endpoint));
    let authority = dir.path().join("ca.crt").display().to_string();
    let nowhere = "/nowhere".to_owned();
    for (validate, ca, bundle, goes) in [
        ("true", &nowhere, "", false),
        ("true", &authority, "", true),
        (authority.as_str(), &nowhere, "", true),
        ("", &nowhere, authority.as_str(), true),
        ("False", &nowhere, "", true),
    ] {
        let mut variables = bucket.variables();
        variables.push(("S3_ENDPOINT", format!("https://127.0.0.1:{}", tls.port)));
        variables.push(("S3_SSL_VALIDATE", validate.into()));
        variables.push(("CA_CERT", ca.clone()));
        variables.push(("AWS_CA_BUNDLE", bundle.into()));
        variables.push(("IMS_RETRY_LIMIT", "2".into()));
        let mut command = ims_sshd(&["upload", "--archive"], &variables);
        let output = command.args([&squashfs, &tree]).current_dir(dir.path()).output().unwrap();
        assert_eq!(output.status.success(), goes, "{validate} {ca} {bundle}: {}", text(&output.stderr));
        assert!(goes || text(&output.stderr).contains("certificate"), "{}", text(&output.stderr));
    }
    assert_eq!(bucket.keys().len(), 4 * 5);
}
