//! The commands beside a server that nobody should trust: what it answers is limited and shown without control.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use testbed::{Ended, Terminal, directory, free_port, listen, succeed, text, wait_until};

const ID: &str = "46a2731e-a1d0-4f98-ba92-4f78c756bb12";

/// Reads the head of a request; returns its path.
fn asked(connection: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if connection.read_exact(&mut byte).is_err() {
            break;
        }
        head.push(byte[0]);
    }
    String::from_utf8_lossy(&head).split(' ').nth(1).unwrap_or_default().to_owned()
}

/// URL of a server that answers each request with `status` and `body`.
fn answering(status: &'static str, body: &'static [u8]) -> String {
    let address = listen(move |mut connection| {
        asked(&mut connection);
        let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
        let _ = connection.write_all(&[head.as_bytes(), body].concat());
    });
    format!("http://{address}")
}

fn ims(url: &str, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ims"));
    command.args(words).env("IMS_URL", url).env_remove("CRAY_CREDENTIALS").env_remove("CRAY_FORMAT");
    command
}

#[test]
fn endless_answers_are_refused() {
    for status in ["200 OK", "500 Internal Server Error"] {
        let sent = Arc::new(AtomicUsize::new(0));
        let counted = sent.clone();
        let address = listen(move |mut connection| {
            asked(&mut connection);
            let _ = connection.write_all(format!("HTTP/1.1 {status}\r\n\r\n[").as_bytes());
            let part = vec![b' '; 1 << 16];
            while connection.write_all(&part).is_ok() {
                counted.fetch_add(part.len(), Ordering::Relaxed);
            }
        });
        let mut command = Command::new("prlimit");
        command.arg("--as=2000000000").arg(env!("CARGO_BIN_EXE_ims"));
        command.args(["images", "list", "--url", &format!("http://{address}")]);
        let output = command.output().unwrap();
        let said = text(&output.stderr);
        assert_eq!((output.status.code(), said.lines().count()), (Some(1), 1), "{said}");
        assert!(said.contains("the answer is longer than 64 MiB"), "{said}");
        assert!(sent.load(Ordering::Relaxed) < 200 << 20, "{sent:?}");
    }
}

/// Texts that would take over a terminal.
const HOSTILE: &[u8] = b"one\ttwo\n\x1b]0;title\x07\x1b[2J\xc2\x9b1m\xff\xe2\x80\xae\rcaf\xc3\xa9\n";

#[test]
fn logs_are_escaped_on_a_terminal_and_written_as_they_are_to_a_file() {
    let url = answering("200 OK", HOSTILE);
    let words = ["jobs", "logs", ID];
    assert_eq!(ims(&url, &words).output().unwrap().stdout, HOSTILE);
    let (code, screen) = Terminal::with(&ims(&url, &words)).end();
    let shown = "one\ttwo\n\\u{1b}]0;title\\u{7}\\u{1b}[2J\\u{9b}1m\u{fffd}\\u{202e}\\rcafé\n";
    // The terminal takes each byte for a character.
    let screen: Vec<_> = screen.replace("\r\n", "\n").chars().map(|c| c as u8).collect();
    assert_eq!((code, text(screen).as_str()), (0, shown));
}

#[test]
fn names_and_errors_are_escaped() {
    let record = br#"{"id":"1","na\u001b[2Jme":"a\u001b[2J","list":["\u009b1m"],"x":{"\u202ey":{"z\u0007":1}}}"#;
    let url = answering("200 OK", record);
    for format in ["toml", "json", "yaml", "table"] {
        let output = ims(&url, &["images", "describe", ID, "--format", format]).output().unwrap();
        let shown = text(&output.stdout);
        assert!(output.status.success() && shown.contains("2J") && shown.contains('z'), "{format}: {output:?}");
        let is_hostile = |c: char| c != '\n' && (c.is_control() || c == '\u{202e}');
        assert!(!shown.contains(is_hostile), "{format}: {shown:?}");
    }
    let problem = br#"{"title":"a\u001b[2J","detail":"b\u001b[2J"}"#;
    let output = ims(&answering("404 Not Found", problem), &["images", "describe", ID]).output().unwrap();
    assert!(!output.stderr.contains(&0x1b) && text(&output.stderr).contains("2J"), "{output:?}");
    let waiting = br#"{"status":"a\u001b[2J"}"#;
    let mut child = ims(&answering("200 OK", waiting), &["jobs", "ssh", ID]);
    let mut child = child.stderr(Stdio::piped()).spawn().unwrap();
    let mut said = [0; 64];
    let length = child.stderr.as_mut().unwrap().read(&mut said).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!said[..length].contains(&0x1b), "{:?}", String::from_utf8_lossy(&said));
}

/// A machine with an sshd and keys.
struct Impostor {
    dir: tempfile::TempDir,
    port: u16,
    _sshd: Ended,
}

impl Impostor {
    fn start() -> Self {
        let dir = directory();
        let path = |name: &str| dir.path().join(name).display().to_string();
        for name in ["host", "own"] {
            succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f", &path(name)]));
        }
        let port = free_port();
        let config = format!(
            "Port {port}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nPermitRootLogin yes\n\
             StrictModes no\nPidFile none\n",
            path("host"),
            path("own.pub")
        );
        std::fs::write(path("config"), config).unwrap();
        let sshd = Command::new("/usr/sbin/sshd").args(["-D", "-E", &path("log"), "-f", &path("config")]).spawn();
        wait_until("sshd to listen", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        Self { _sshd: Ended::killed(sshd.unwrap()), port, dir }
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.path().join(name)).unwrap()
    }

    /// Logs in to a job that has this host key, and whose port this sshd has.
    fn log_in(&self, host_key: &str) -> Output {
        let place = json!({"host": "127.0.0.1", "port": self.port, "host_key": host_key});
        let containers = json!([{"name": "customize", "connection_info": {"customer_access": place}}]);
        let job = json!({"id": ID, "status": "waiting_on_user", "ssh_containers": containers}).to_string();
        let url = answering("200 OK", Box::leak(job.into_bytes().into_boxed_slice()));
        let identity = self.dir.path().join("own").display().to_string();
        let mut ssh = ims(&url, &["jobs", "ssh", "-i", &identity, ID, "echo", "logged-in"]);
        ssh.env("XDG_CACHE_HOME", self.dir.path());
        ssh.stdin(Stdio::null()).output().unwrap()
    }
}

#[test]
fn sessions_go_to_the_jobs_own_sshd_alone() {
    let impostor = Impostor::start();
    let refused = impostor.log_in(&impostor.read("own.pub"));
    assert_eq!((refused.status.code(), text(&refused.stdout).as_str()), (Some(255), ""), "{refused:?}");
    assert!(text(&refused.stderr).contains("Host key verification failed"), "{refused:?}");
    assert!(!impostor.read("log").contains("Accepted"), "{}", impostor.read("log"));
    let output = impostor.log_in(&impostor.read("host.pub"));
    assert_eq!(text(&output.stdout), "logged-in\n", "{output:?}");
}
