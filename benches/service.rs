//! The image management service beside upstream's stack: Flask with marshmallow under gunicorn with one worker.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use testbed::{Ended, IMS_SSHD, cache, free_port, listen, repository};

use crate::measure::{milliseconds, order, ratios};
use crate::{Bound, Report, Unit};

/// Clients at the same time, for the limits of p99.
const CLIENTS: usize = 50;

/// Time of each measurement of a rate or of a p99.
const SPAN: Duration = Duration::from_secs(2);

/// Pause of a client between its requests where the processors must not be the limit.
const PAUSE: Duration = Duration::from_millis(50);

/// Artifacts of the image that is deleted, each of 1 GiB.
const ARTIFACTS: usize = 10;

/// Time for which the store copies such an object.
const COPY: Duration = Duration::from_millis(1500);

pub fn service(runs: usize, report: &mut Report) {
    let rounds = (runs / 2).max(1);
    lists(rounds, report);
    reads(rounds, report);
    deletion(rounds, report);
    ten_thousand(rounds, report);
    report.note(
        "The peer is the stack of upstream's service with the same records in memory: Flask under gunicorn with one \
         worker, which answers one request at a time and closes each connection. Upstream passes each record through \
         marshmallow, so that is the peer of the limit. The clients are threads of the benchmark on the same \
         processors; each sends its next request when the answer has arrived.",
    );
    report.note(&format!(
        "A pause is one of {} ms. While the image is deleted, clients pause, and the store takes {} s for each copy of an \
         artifact of 1 GiB.",
        PAUSE.as_millis(),
        COPY.as_secs_f64()
    ));
}

/// Lists of 1,000 images, in turns.
fn lists(rounds: usize, report: &mut Report) {
    const NAMES: [&str; 3] = ["ims", "Flask with marshmallow", "Flask alone"];
    let ims = Ims::with_images(1000);
    let peers = ["app", "plain"].map(|name| Peer::start(name, 1000));
    let ports = [ims.port, peers[0].port, peers[1].port];
    let mut times = [const { Vec::new() }; 3];
    for round in 0..rounds {
        for at in order(round, ports.len()) {
            times[at].push(SPAN.as_secs_f64() * 1000.0 / count(load(ports[at], "/v3/images", 4, Duration::ZERO, SPAN)));
        }
    }
    let [ours, upstreams, plain] = &times;
    let against = [ratios(ours, upstreams), ratios(ours, plain)];
    for (name, times) in NAMES.iter().zip(times) {
        report.add(
            &format!("{name}: time of a list of 1,000 images, 4 clients"),
            Unit::Milliseconds,
            times,
            Bound::Information,
        );
    }
    let [upstreams, plain] = against;
    report.add(
        "a list of 1,000 images: ims / Flask with marshmallow",
        Unit::Times,
        upstreams,
        Bound::Limit(1.0 / 20.0),
    );
    report.add("a list of 1,000 images: ims / Flask alone", Unit::Times, plain, Bound::Information);
}

/// Reads by many clients at once.
fn reads(rounds: usize, report: &mut Report) {
    let ims = Ims::with_images(1000);
    let one = ims.first_image();
    let (image, list) = (format!("/v3/images/{one}"), "/v3/images".to_owned());
    for (name, path, pause, bound) in [
        ("an image", &image, Duration::ZERO, Bound::Limit(20.0)),
        ("a list of 1,000 images, with pauses", &list, PAUSE, Bound::Limit(20.0)),
        // The network's copies of 350 KB in both processes are the limit then.
        ("a list of 1,000 images, without a pause", &list, Duration::ZERO, Bound::Information),
    ] {
        let longest = (0..rounds).map(|_| p99(load(ims.port, path, CLIENTS, pause, SPAN))).collect();
        report.add(&format!("{name}, {CLIENTS} clients: p99"), Unit::Milliseconds, longest, bound);
    }
}

/// A soft delete of a large image: other requests must not notice it.
fn deletion(rounds: usize, report: &mut Report) {
    let store = listen(|connection| while store(&connection).is_some() {});
    let ims = Ims::start(100, &format!("http://{store}"));
    let (mut before, mut during, mut deletions) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        let link = json!({"path": format!("s3://b/{round}/manifest.json"), "type": "s3", "etag": "e"});
        let (status, body) = ask(ims.port, "POST", "/v3/images", &json!({"name": "large", "link": link}).to_string());
        assert_eq!(status, 201, "{body}");
        let id = serde_json::from_str::<Value>(&body).unwrap()["id"].as_str().unwrap().to_owned();
        before.push(p99(load(ims.port, "/v3/images", CLIENTS, PAUSE, SPAN)));
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let began = Instant::now();
                assert_eq!(ask(ims.port, "DELETE", &format!("/v3/images/{id}"), "").0, 204);
                deletions.push(began.elapsed().as_secs_f64());
                is_over.store(true, Ordering::Relaxed);
            });
            during.push(p99(load_until(ims.port, "/v3/images", CLIENTS, PAUSE, || is_over.load(Ordering::Relaxed))));
        });
    }
    let ratios = ratios(&during, &before);
    let clients = format!("a list of 100 images, {CLIENTS} clients: p99");
    report.add(&clients, Unit::Milliseconds, before, Bound::Information);
    report.add(&format!("{clients}, while an image is deleted"), Unit::Milliseconds, during, Bound::Information);
    report.add(
        &format!("soft delete of an image with {ARTIFACTS} artifacts of 1 GiB"),
        Unit::Seconds,
        deletions,
        Bound::Information,
    );
    report.add("p99 while an image is deleted / before", Unit::Times, ratios, Bound::Limit(2.0));
}

/// Memory and starts with 10,000 records.
fn ten_thousand(rounds: usize, report: &mut Report) {
    let (mut first, mut next, mut idle, mut busy) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let imported = Ims::with_images(10_000);
        first.push(imported.start.as_secs_f64());
        let ims = imported.again();
        next.push(ims.start.as_secs_f64());
        idle.push(ims.memory());
        load(ims.port, "/v3/images", 4, Duration::ZERO, SPAN);
        busy.push(ims.memory());
    }
    report.add("first start, with an import of 10,000 images", Unit::Seconds, first, Bound::Limit(0.5));
    report.add("start with 10,000 images", Unit::Seconds, next, Bound::Limit(0.5));
    report.add("RSS with 10,000 images, after the start", Unit::Mebibytes, idle, Bound::Information);
    report.add("RSS with 10,000 images, after lists by 4 clients", Unit::Mebibytes, busy, Bound::Limit(60.0));
}

/// A running service.
struct Ims {
    port: u16,
    /// Time until it listened.
    start: Duration,
    endpoint: String,
    program: Ended,
    data: TempDir,
}

impl Ims {
    fn with_images(count: usize) -> Self {
        Self::start(count, "file:///nonexistent")
    }

    /// A service with so many images, which it imports, and a store.
    fn start(count: usize, endpoint: &str) -> Self {
        let data = tempfile::tempdir().unwrap();
        let images: Vec<_> = (0..count).map(image).collect();
        std::fs::write(data.path().join("v2.1_images.json"), Value::from(images).to_string()).unwrap();
        Self::run(data, endpoint.to_owned())
    }

    fn run(data: TempDir, endpoint: String) -> Self {
        let port = free_port();
        let program = Path::new(&*IMS_SSHD).with_file_name("ims");
        assert!(program.exists(), "no {}: run 'deploy/cargo-release build --package ims-service'", program.display());
        let mut serve = Command::new(program);
        serve.arg("serve").env("IMS_LISTEN", format!("127.0.0.1:{port}")).env("IMS_AUTH", "gateway");
        serve.env("IMS_RUNNER", "none").env("IMS_DATA_DIR", data.path()).env_remove("IMS_DATABASE_URL");
        serve.env("S3_ENDPOINT", &endpoint).env("S3_ACCESS_KEY", "a").env("S3_SECRET_KEY", "s");
        serve.stdin(Stdio::null()).stderr(std::fs::File::create(data.path().join("log")).unwrap());
        let began = Instant::now();
        let program = Ended::killed(serve.spawn().unwrap());
        listens(port);
        Self { port, start: began.elapsed(), endpoint, program, data }
    }

    /// The same data, served by the next start.
    fn again(mut self) -> Self {
        self.program.kill().unwrap();
        self.program.wait().unwrap();
        Self::run(self.data, self.endpoint)
    }

    fn first_image(&self) -> String {
        let (_, list) = ask(self.port, "GET", "/v3/images?limit=1", "");
        serde_json::from_str::<Value>(&list).unwrap()[0]["id"].as_str().unwrap().to_owned()
    }

    /// Resident memory in MiB.
    fn memory(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.program.id())).unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        resident.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
    }
}

fn image(number: usize) -> Value {
    let id = format!("46a2731e-a1d0-4f98-ba92-{number:012}");
    json!({
        "name": format!("image-{number}"), "arch": "x86_64", "metadata": {}, "created": "2026-01-31T09:15:03.207576",
        "link": {"path": format!("s3://boot-images/{id}/manifest.json"), "etag": "0".repeat(32), "type": "s3"},
        "id": id,
    })
}

/// Upstream's stack.
struct Peer {
    port: u16,
    _program: Ended,
}

impl Peer {
    fn start(name: &str, images: usize) -> Self {
        let port = free_port();
        let packages = |name: &str| -> PathBuf {
            let library = cache().join(name).join("lib");
            let versions = std::fs::read_dir(&library);
            let versions = versions.unwrap_or_else(|e| panic!("{}: {e}: run 'make bench'", library.display()));
            versions.map(|entry| entry.unwrap().path()).next().unwrap().join("site-packages")
        };
        let mut gunicorn = Command::new(cache().join("gunicorn/bin/gunicorn"));
        gunicorn.args(["--workers=1", "--log-level=error", "--bind", &format!("127.0.0.1:{port}")]);
        gunicorn.arg("--chdir").arg(repository().join("benches/service")).arg(format!("upstreams_stack:{name}"));
        gunicorn.env("PYTHONPATH", packages("flask-marshmallow")).env("PYTHONDONTWRITEBYTECODE", "1");
        gunicorn.env("IMAGES", images.to_string()).stdin(Stdio::null());
        let program = Ended::new(gunicorn.spawn().expect("start gunicorn"));
        listens(port);
        // The worker answers once it has made the records.
        assert_eq!(ask(port, "GET", "/healthz/live", "").0, 200);
        Self { port, _program: program }
    }
}

fn listens(port: u16) {
    let began = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(began.elapsed() < Duration::from_mins(1), "nobody listens on port {port}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Times of answers in milliseconds.
type Times = Vec<f64>;

#[allow(clippy::needless_pass_by_value)]
fn count(times: Times) -> f64 {
    times.len() as f64
}

fn p99(mut times: Times) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() * 99 / 100]
}

fn load(port: u16, path: &str, clients: usize, pause: Duration, span: Duration) -> Times {
    let end = Instant::now() + span;
    load_until(port, path, clients, pause, || Instant::now() >= end)
}

/// Asks for `path` by `clients` at the same time, until the end.
fn load_until(port: u16, path: &str, clients: usize, pause: Duration, is_over: impl Fn() -> bool + Sync) -> Times {
    let is_over = &is_over;
    std::thread::scope(|scope| {
        let begun: Vec<_> = (0..clients)
            .map(|client| {
                scope.spawn(move || {
                    // Clients do not begin at the same moment.
                    std::thread::sleep(pause * u32::try_from(client).unwrap() / u32::try_from(clients).unwrap());
                    let (mut asking, mut times) = (Client::new(port), Times::new());
                    while !is_over() {
                        let began = Instant::now();
                        let (status, _) = asking.ask("GET", path, "");
                        times.push(milliseconds(began.elapsed()));
                        assert_eq!(status, 200, "{path}");
                        std::thread::sleep(pause);
                    }
                    times
                })
            })
            .collect();
        begun.into_iter().flat_map(|client| client.join().unwrap()).collect()
    })
}

fn ask(port: u16, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut client = Client::new(port);
    let (status, length) = client.ask(method, path, body);
    (status, String::from_utf8_lossy(&client.buffer[length]).into_owned())
}

/// A client that keeps its connection as long as the server does.
struct Client {
    port: u16,
    connection: Option<TcpStream>,
    buffer: Vec<u8>,
}

impl Client {
    fn new(port: u16) -> Self {
        Self { port, connection: None, buffer: vec![0; 1 << 16] }
    }

    /// Returns the status, and where the body is in the buffer.
    fn ask(&mut self, method: &str, path: &str, body: &str) -> (u16, std::ops::Range<usize>) {
        let mut connection = self.connection.take().unwrap_or_else(|| {
            let connection = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
            connection.set_nodelay(true).unwrap();
            connection
        });
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
        );
        connection.write_all((head + body).as_bytes()).unwrap();
        let mut filled = 0;
        let (status, range, is_kept) = loop {
            if filled == self.buffer.len() {
                self.buffer.resize(2 * filled, 0);
            }
            match connection.read(&mut self.buffer[filled..]) {
                Ok(0) => panic!("{method} {path}: the connection ended"),
                Ok(read) => filled += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => panic!("{method} {path}: {error}"),
            }
            if let Some(answer) = answer(&self.buffer[..filled]) {
                break answer;
            }
        };
        if is_kept {
            self.connection = Some(connection);
        }
        (status, range)
    }
}

/// An answer that is complete: status, place of the body, and whether the connection is kept.
fn answer(bytes: &[u8]) -> Option<(u16, std::ops::Range<usize>, bool)> {
    // The head of an answer is short.
    let end = bytes[..bytes.len().min(2048)].windows(4).position(|four| four == b"\r\n\r\n")? + 4;
    let head = std::str::from_utf8(&bytes[..end]).unwrap().to_ascii_lowercase();
    let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name));
    let length: usize = field("content-length: ").map_or(0, |length| length.parse().unwrap());
    (bytes.len() >= end + length).then(|| {
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, end..end + length, field("connection: ") != Some("close"))
    })
}

/// Answers a request as a store in which every object is there but copies, and is copied slowly.
fn store(mut connection: &TcpStream) -> Option<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        connection.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
    let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name));
    let mut body = vec![0; field("content-length: ").map_or(0, |length| length.parse().unwrap())];
    connection.read_exact(&mut body).ok()?;
    let mut words = head.split([' ', '?']);
    let (method, path) = (words.next()?, words.next()?);
    let is_artifact = path.contains("/artifact-");
    let size = if is_artifact { 1 << 30 } else { manifest(path).len() };
    let (status, length, body) = match method {
        // The last answer to HEAD of a copy is the one after it was made.
        "head" if path.starts_with("/b/deleted/") && !COPIES.lock().unwrap().contains(path) => (404, 0, String::new()),
        "head" => (200, size, String::new()),
        "get" => (200, size, manifest(path)),
        "put" if head.contains("x-amz-copy-source:") => {
            if is_artifact {
                std::thread::sleep(COPY);
            }
            COPIES.lock().unwrap().insert(path.to_owned());
            let result = "<CopyObjectResult><ETag>\"e\"</ETag></CopyObjectResult>".to_owned();
            (200, result.len(), result)
        }
        "put" => (200, 0, String::new()),
        _ => (204, 0, String::new()),
    };
    let length = if status == 204 { String::new() } else { format!("content-length: {length}\r\n") };
    let answer = format!("HTTP/1.1 {status} X\r\netag: \"e\"\r\n{length}\r\n{body}");
    connection.write_all(answer.as_bytes()).ok()
}

/// Copies that the store has made.
static COPIES: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Manifest of the image in the directory of this path.
fn manifest(path: &str) -> String {
    // A copy has the content of its original.
    let path = path.replace("/deleted", "");
    let directory = path.rsplit_once('/').map_or(path.as_str(), |(directory, _)| directory);
    let artifacts: Vec<_> = (0..ARTIFACTS)
        .map(|number| {
            let kind = if number == 0 { "rootfs.squashfs" } else { "kernel" };
            json!({
                "link": {"path": format!("s3:/{directory}/artifact-{number}"), "type": "s3", "etag": "e"},
                "type": format!("application/vnd.cray.image.{kind}"), "md5": "m",
            })
        })
        .collect();
    json!({"version": "1.0", "artifacts": artifacts}).to_string()
}
