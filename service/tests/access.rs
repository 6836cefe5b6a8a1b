//! Access: a socket for its owner, an address for clients with the token, in clear or with TLS.

use std::fs::Permissions;
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::json;
use tempfile::TempDir;
use testbed::{Ended, directory, free_port, succeed, text, wait_until};

use crate::server::{Answer, ask};

/// A service on an address and a socket.
struct Place {
    dir: TempDir,
    address: SocketAddr,
    service: Option<Ended>,
}

impl Place {
    fn new() -> Self {
        Self { dir: directory(), address: ([127, 0, 0, 1], free_port()).into(), service: None }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn serve_command(&self, words: &[&str]) -> Command {
        let log = std::fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        let mut serve = Command::new(env!("CARGO_BIN_EXE_ims"));
        serve.arg("serve").args(words).env("IMS_DATA_DIR", self.path("data")).env("IMS_RUNNER", "none");
        serve.env("S3_ENDPOINT", format!("file://{}", self.path("store").display()));
        for name in ["IMS_LISTEN", "IMS_AUTH", "IMS_DATABASE_URL", "IMS_TLS_CERT", "IMS_TLS_KEY"] {
            serve.env_remove(name);
        }
        serve.env("IMS_SOCKET", self.socket()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        serve
    }

    /// Starts the service, and waits until it listens on its socket, which it does after the address.
    fn serve(&mut self, words: &[&str]) {
        self.service = None;
        let listens = || self.log().matches("listening on unix:").count();
        let before = listens();
        let service = Ended::killed(self.serve_command(words).spawn().unwrap());
        wait_until(&format!("the service to listen: {}", self.log()), || listens() > before);
        self.service = Some(service);
        assert!(UnixStream::connect(self.socket()).is_ok());
    }

    fn with_token(words: &[&str]) -> Self {
        let mut place = Self::new();
        let address = place.address.to_string();
        place.serve(&[&["--listen", &address], words].concat());
        place
    }

    fn socket(&self) -> PathBuf {
        self.path("run/ims.sock")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn token(&self) -> String {
        std::fs::read_to_string(self.path("data/token")).unwrap().trim().to_owned()
    }

    fn ask(&self, method: &str, path: &str, headers: &str) -> Answer {
        ask(self.address, method, path, headers, "")
    }

    /// Status of a GET of all images with this token.
    fn status(&self, token: &str) -> u16 {
        self.ask("GET", "/v3/images", &format!("authorization: Bearer {token}\r\n")).status
    }

    /// The refusal of a start.
    fn refused(&self, words: &[&str]) -> String {
        let output = self.serve_command(words).stderr(Stdio::piped()).output().unwrap();
        assert!(!output.status.success(), "{words:?}");
        text(output.stderr)
    }

    fn ims(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ims"));
        command.args(words).stdin(Stdio::null()).env("IMS_SOCKET", self.socket());
        for name in ["IMS_URL", "CRAY_CREDENTIALS", "CA_CERT"] {
            command.env_remove(name);
        }
        command.env("S3_ENDPOINT", format!("file://{}", self.path("store").display()));
        command
    }
}

fn is_refused(answer: &Answer, method: &str) {
    assert_eq!((answer.status, answer.header("www-authenticate")), (401, Some("Bearer")), "{answer:?}");
    assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{answer:?}");
    if method != "HEAD" {
        assert_eq!((&answer.json()["status"], &answer.json()["title"]), (&json!(401), &json!("Unauthorized")));
    }
}

#[test]
fn nothing_but_health_is_answered_without_the_token() {
    let place = Place::with_token(&[]);
    let token = place.token();
    assert_eq!((token.len(), place.status(&token)), (64, 200));
    for path in ["/v3/images", "/images", "/v3/jobs", "/version", "/metrics", "/openapi.yaml", "/nothing", "/v3/x/../y"]
    {
        for method in ["GET", "HEAD", "POST", "PATCH", "DELETE", "OPTIONS", "PUT", "BREW"] {
            is_refused(&place.ask(method, path, ""), method);
            // A page in a browser, by a name of its own that leads here, or from another site.
            let browser = "origin: http://site.example\r\ncookie: token=x\r\n";
            is_refused(&place.ask(method, path, browser), method);
        }
    }
    let long = "x".repeat(4000);
    for wrong in ["", "x", &token[1..], &token.to_uppercase(), &format!("{token}0"), &long] {
        assert_eq!(place.status(wrong), 401, "{wrong}");
    }
    for header in [format!("Basic {token}"), token.clone(), format!("Bearer{token}")] {
        is_refused(&place.ask("GET", "/v3/images", &format!("authorization: {header}\r\n")), "GET");
    }
    assert_eq!(place.ask("GET", "/v3/images", &format!("Authorization: bearer  {token}\r\n")).status, 200);
    assert_eq!(place.ask("GET", "/healthz/ready", "").status, 200);
    assert_eq!(place.ask("GET", "/downloads/b/k?expires=9999999999&signature=00", "").status, 403);
    assert!(!place.log().contains(&token), "the token is in the log");
}

#[test]
fn token_is_the_owners_alone_and_stays_over_a_restart() {
    let mut place = Place::with_token(&[]);
    let (token, address, file) = (place.token(), place.address.to_string(), place.path("data/token"));
    assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o7777, 0o600);
    place.serve(&["--listen", &address]);
    assert_eq!((place.token(), place.status(&token)), (token, 200));
    place.service = None;
    std::fs::set_permissions(&file, Permissions::from_mode(0o640)).unwrap();
    let why = place.refused(&["--listen", &address]);
    assert!(why.contains("other users can read or replace it"), "{why}");
    std::fs::set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
    std::fs::write(&file, "short\n").unwrap();
    assert!(place.refused(&["--listen", &address]).contains("no word of 32 characters"));
    std::fs::remove_file(&file).unwrap();
    std::os::unix::fs::symlink("/etc/hostname", &file).unwrap();
    assert!(place.refused(&["--listen", &address]).contains("it is a symbolic link"));
}

#[test]
fn socket_lets_in_its_owner_alone() {
    let mut place = Place::new();
    place.serve(&[]);
    assert!(!place.path("data/token").exists(), "without an address there is nothing to guard");
    let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!((mode(&place.socket()), mode(&place.path("run"))), (0o600, 0o700));
    assert_eq!(succeed(&mut place.ims(&["images", "list", "--format", "json"])).trim(), "[]");
    assert!(place.log().contains("uid=0 \"GET /v3/images"), "{}", place.log());
    // Even where the directory is open to all.
    for path in [place.dir.path(), &place.path("run")] {
        std::fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    }
    let mut other = Command::new("setpriv");
    other.args(["--reuid=65534", "--regid=65534", "--clear-groups", "python3", "-c"]);
    other.arg("import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])").arg(place.socket());
    let output = other.output().unwrap();
    assert!(!output.status.success() && text(&output.stderr).contains("Permission denied"), "{output:?}");
    // A second service does not take its place; the next one does.
    let other = place.path("other").display().to_string();
    let why = place.refused(&["--data", &other]);
    assert!(why.contains("another service listens there"), "{why}");
    place.serve(&[]);
    succeed(&mut place.ims(&["images", "list"]));
}

#[test]
fn data_directory_is_created_in_a_directory_that_exists() {
    let place = Place::new();
    let why = place.refused(&["--data", &place.path("slip/of/data").display().to_string()]);
    let expected = format!(
        "cannot use the data directory {}: {} does not exist; create it, or name another directory with --data",
        place.path("slip/of/data").display(),
        place.path("slip/of").display()
    );
    assert!(why.contains(&expected), "{why}");
    assert!(!place.path("slip").exists());
}

#[test]
fn gateway_answers_for_its_clients() {
    let place = Place::with_token(&["--auth", "gateway"]);
    assert_eq!(place.ask("GET", "/v3/images", "").status, 200);
    assert!(!place.path("data/token").exists());
}

/// A certificate for `localhost`, as its own authority.
fn certificate(place: &Place) -> [String; 2] {
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| place.path(name).display().to_string());
    let words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"];
    let names =
        ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=CA:false"];
    succeed(Command::new("openssl").args(words).args(names).args(["-out", &cert, "-keyout", &key]));
    [cert, key]
}

#[test]
fn clients_come_by_tls_with_token_and_authority() {
    let mut place = Place::new();
    let [cert, key] = certificate(&place);
    let listen = place.address.to_string();
    place.serve(&["--listen", &listen, "--tls-cert", &cert, "--tls-key", &key]);
    let url = format!("https://localhost:{}", place.address.port());
    let token = place.path("data/token").display().to_string();
    let all = ["--url", &url, "--ca", &cert, "--token", &token];
    let said = |words: &[&str], access: &[&str]| -> Output { place.ims(&[words, access].concat()).output().unwrap() };
    let fails = |access: &[&str], why: &str| {
        let output = said(&["images", "list"], access);
        assert!(output.status.code() == Some(1) && text(&output.stderr).contains(why), "{access:?}: {output:?}");
    };
    assert!(said(&["images", "list"], &all).status.success());
    fails(&all[..4], "401 Unauthorized");
    fails(&["--url", &url, "--token", &token], "certificate");
    fails(&["--url", &url.replace("https", "http"), "--token", &token], "cannot");
    // A client that does not finish its handshake keeps nobody waiting.
    let _silent = std::net::TcpStream::connect(place.address).unwrap();
    assert!(said(&["images", "list"], &all).status.success());
    // The programs that import an image reach the service the same way.
    let (_image, _, squashfs) = testbed::job::packed_image();
    let work = place.path("work").display().to_string();
    let words = ["images", "import", squashfs.to_str().unwrap(), "--name", "compute", "--work", &work];
    let output = said(&words, &all);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let table = said(&["images", "list", "--format", "table"], &all);
    assert!(text(table.stdout).contains("  compute  "));
    let (no_key, wrong) = (place.path("no").display().to_string(), place.refused(&["--tls-cert", &cert]));
    assert!(wrong.contains("--tls-key"), "{wrong}");
    place.service = None;
    let wrong = place.refused(&["--socket", &no_key, "--listen", "127.0.0.1:0", "--tls-cert", &key, "--tls-key", &key]);
    assert!(wrong.contains("certificate"), "{wrong}");
}

#[test]
fn private_key_that_all_users_can_read_is_warned_about() {
    let mut place = Place::new();
    let [cert, key] = certificate(&place);
    let listen = place.address.to_string();
    let words = ["--listen", &listen, "--tls-cert", &cert, "--tls-key", &key];
    std::fs::set_permissions(&key, Permissions::from_mode(0o640)).unwrap();
    place.serve(&words);
    assert!(!place.log().contains("private key"), "{}", place.log());
    std::fs::set_permissions(&key, Permissions::from_mode(0o644)).unwrap();
    place.serve(&words);
    assert!(place.log().contains(&format!("all users can read the private key {key}")), "{}", place.log());
}

#[test]
fn failed_tls_handshake_is_logged_with_its_peer() {
    use std::io::Write;
    let mut place = Place::new();
    let [cert, key] = certificate(&place);
    place.serve(&["--listen", &place.address.to_string(), "--tls-cert", &cert, "--tls-key", &key]);
    std::net::TcpStream::connect(place.address).unwrap().write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    wait_until("the failure", || place.log().contains("127.0.0.1: TLS handshake failed: "));
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().mode() & 0o777
}

#[test]
fn records_are_closed_to_other_users() {
    let mut place = Place::new();
    place.serve(&[]);
    let files = ["data/ims.sqlite", "data/ims.sqlite-wal", "data/ims.sqlite-shm"].map(|name| place.path(name));
    assert_eq!(mode(&place.path("data")), 0o700);
    assert_eq!(files.each_ref().map(|file| mode(file)), [0o600; 3]);
    place.service = None;
    // An older version has left wider modes.
    std::fs::set_permissions(place.path("data"), Permissions::from_mode(0o777)).unwrap();
    std::fs::set_permissions(&files[0], Permissions::from_mode(0o644)).unwrap();
    place.serve(&[]);
    assert_eq!(mode(&place.path("data")), 0o755);
    assert_eq!(files.each_ref().map(|file| mode(file)), [0o600; 3]);
}

#[test]
fn data_of_another_user_and_a_linked_database_are_refused() {
    let place = Place::new();
    std::fs::create_dir(place.path("data")).unwrap();
    std::os::unix::fs::chown(place.path("data"), Some(1234), None).unwrap();
    let why = place.refused(&[]);
    assert!(why.contains("it belongs to the user 1234"), "{why}");
    std::os::unix::fs::chown(place.path("data"), Some(0), None).unwrap();
    std::os::unix::fs::symlink("/dev/null", place.path("data/ims.sqlite")).unwrap();
    let why = place.refused(&[]);
    assert!(why.contains("ims.sqlite: it is a symbolic link"), "{why}");
}

#[test]
fn files_that_others_can_replace_or_write_are_refused() {
    let place = Place::new();
    let file = place.path("data/v2.1_images.json");
    std::fs::create_dir(place.path("data")).unwrap();
    let refuses = |why: &str| {
        let log = place.refused(&[]);
        assert!(log.contains("data/v2.1_images.json: ") && log.contains(why), "{why}: {log}");
        std::fs::remove_file(&file).unwrap();
    };
    std::os::unix::fs::symlink("/etc/hostname", &file).unwrap();
    refuses("it is a symbolic link");
    std::os::unix::fs::symlink("/nonexistent", &file).unwrap();
    refuses("it is a symbolic link");
    succeed(Command::new("mkfifo").arg(&file));
    refuses("it is no regular file");
    std::fs::write(&file, "[]").unwrap();
    std::os::unix::fs::chown(&file, Some(1234), None).unwrap();
    refuses("it belongs to the user 1234");
    std::fs::write(&file, "[]").unwrap();
    std::fs::set_permissions(&file, Permissions::from_mode(0o666)).unwrap();
    refuses("all users can write to it");
    for name in ["ims.sqlite", "ims.sqlite-wal", "token"] {
        succeed(Command::new("mkfifo").arg(place.path("data").join(name)));
        let log = place.refused(&["--listen", "127.0.0.1:0"]);
        assert!(log.contains(&format!("data/{name}: it is no regular file")), "{log}");
        std::fs::remove_file(place.path("data").join(name)).unwrap();
    }
}

#[test]
fn damaged_database_is_told_at_once_with_its_name() {
    let place = Place::new();
    std::fs::create_dir(place.path("data")).unwrap();
    std::fs::write(place.path("data/ims.sqlite"), "no database ".repeat(1000)).unwrap();
    let log = place.refused(&[]);
    assert!(log.contains("data/ims.sqlite: ") && log.contains("file is not a database"), "{log}");
}

#[test]
fn second_service_on_the_same_data_or_jobs_is_refused() {
    let mut place = Place::new();
    let jobs = place.path("jobs").display().to_string();
    place.serve(&["--runner", "machine", "--jobs", &jobs]);
    let (socket, data) = (place.path("other.sock"), place.path("other"));
    let [socket, data] = [&socket, &data].map(|path| path.to_str().unwrap());
    let log = place.refused(&["--socket", socket]);
    assert!(log.contains("/data: another service is using it"), "{log}");
    let log = place.refused(&["--socket", socket, "--data", data, "--runner", "machine", "--jobs", &jobs]);
    assert!(log.contains("/jobs: another service is using it"), "{log}");
}
