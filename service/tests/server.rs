//! A running service, and requests to it byte by byte.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use testbed::{Ended, free_port, wait_until};

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The record of an answer that has to be a success.
    pub fn good(&self) -> Value {
        assert!((200..300).contains(&self.status), "{self:?}");
        self.json()
    }

    pub fn id(&self) -> String {
        self.good()["id"].as_str().unwrap().to_owned()
    }
}

/// Sends a request; the answer's end is the end of the connection.
pub fn ask(to: SocketAddr, method: &str, path: &str, headers: &str, body: impl AsRef<[u8]>) -> Answer {
    try_ask(to, method, path, headers, body).unwrap_or_else(|e| panic!("{method} {path}: {e}"))
}

/// As [`ask`], of a service that may end meanwhile.
pub fn try_ask(
    to: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: impl AsRef<[u8]>,
) -> std::io::Result<Answer> {
    exchange(TcpStream::connect(to)?, method, path, headers, body.as_ref())
}

/// Like [`try_ask`], over a connection that is already open.
pub fn exchange(
    mut connection: impl Read + Write,
    method: &str,
    path: &str,
    headers: &str,
    body: &[u8],
) -> std::io::Result<Answer> {
    let length = if body.is_empty() { String::new() } else { format!("content-length: {}\r\n", body.len()) };
    let head = format!("{method} {path} HTTP/1.1\r\nhost: ims\r\nconnection: close\r\n{length}{headers}\r\n");
    connection.write_all(&[head.as_bytes(), body].concat())?;
    let mut answer = Vec::new();
    connection.read_to_end(&mut answer)?;
    let answer = String::from_utf8(answer).expect("answers are ASCII");
    let Some((head, body)) = answer.split_once("\r\n\r\n") else {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    };
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers = lines.filter_map(|line| line.split_once(": "));
    let headers: Vec<_> = headers.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
    let answer = Answer { status, headers, body: body.to_owned() };
    let length: Option<usize> = answer.header("content-length").map(|length| length.parse().unwrap());
    if length.is_some_and(|length| length != answer.body.len() && method != "HEAD") {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(answer)
}

/// A running service.
pub struct Server {
    pub address: SocketAddr,
    pub program: Ended,
    /// Its data directory, if it is its own: removed with it.
    data: Option<TempDir>,
}

impl Server {
    /// A service with a store in a directory.
    pub fn start() -> Self {
        Self::start_by(&mut Command::new(env!("CARGO_BIN_EXE_ims")))
    }

    /// Like [`Self::start`], with so many descriptors.
    pub fn with_descriptors(most: u32) -> Self {
        let mut command = Command::new("prlimit");
        Self::start_by(command.arg(format!("--nofile={most}")).arg(env!("CARGO_BIN_EXE_ims")))
    }

    fn start_by(program: &mut Command) -> Self {
        let data = tempfile::tempdir().unwrap();
        let store = format!("file://{}", data.path().join("store").display());
        let mut server = Self::by(program, data.path(), &[("S3_ENDPOINT", &store)]);
        server.data = Some(data);
        server
    }

    /// A service on `data`, with these variables.
    pub fn with(data: &Path, variables: &[(&str, &str)]) -> Self {
        Self::by(&mut Command::new(env!("CARGO_BIN_EXE_ims")), data, variables)
    }

    fn by(command: &mut Command, data: &Path, variables: &[(&str, &str)]) -> Self {
        let address: SocketAddr = ([127, 0, 0, 1], free_port()).into();
        let log = std::fs::File::options().create(true).append(true).open(data.join("log")).unwrap();
        command.arg("serve").env("IMS_LISTEN", address.to_string()).env("IMS_DATA_DIR", data);
        command.env("IMS_AUTH", "gateway").env_remove("IMS_DATABASE_URL");
        command.env("IMS_RUNNER", "none").envs(variables.iter().copied());
        let program = Ended::killed(command.stdin(Stdio::null()).stderr(log).spawn().unwrap());
        let mut server = Self { address, program, data: None };
        wait_until("the service to listen", || {
            let ended = server.program.try_wait().unwrap();
            assert!(ended.is_none(), "{}", std::fs::read_to_string(data.join("log")).unwrap());
            TcpStream::connect(address).is_ok()
        });
        server
    }

    fn own(&self) -> &Path {
        self.data.as_ref().expect("a data directory of its own").path()
    }

    /// Its store.
    pub fn store(&self) -> PathBuf {
        self.own().join("store")
    }

    /// The log that it has written.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.own().join("log")).unwrap()).into_owned()
    }

    pub fn get(&self, path: &str) -> Answer {
        ask(self.address, "GET", path, "", "")
    }

    pub fn delete(&self, path: &str) -> Answer {
        ask(self.address, "DELETE", path, "", "")
    }

    pub fn send(&self, method: &str, path: &str, body: &Value) -> Answer {
        ask(self.address, method, path, "content-type: application/json\r\n", body.to_string())
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, body)
    }

    pub fn patch(&self, path: &str, body: &Value) -> Answer {
        self.send("PATCH", path, body)
    }

    pub fn undelete(&self, path: &str) -> Answer {
        self.patch(path, &serde_json::json!({ "operation": "undelete" }))
    }
}
