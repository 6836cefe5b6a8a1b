//! An S3 server (moto), one for all tests of a run, in which each test has a bucket of its own; and proxies in front of
//! it that break connections or refuse requests.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use crate::file_server::reset;
use crate::job::sha256;
use crate::{cache, free_port, listen, text, wait_until};

/// A bucket, and the URL of its store.
pub struct Bucket {
    pub name: String,
    pub endpoint: String,
}

/// An answer of a server.
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

/// Starts the server on the first call. It is killed by PDEATHSIG, which is tied to the thread that started it, so that
/// thread lives as long as this process.
fn server() -> u16 {
    static PORT: OnceLock<u16> = OnceLock::new();
    *PORT.get_or_init(|| {
        let port = free_port();
        let program = cache().join("moto/bin/moto_server");
        assert!(program.exists(), "no S3 server in {}: run the tests with 'make test'", program.display());
        std::thread::spawn(move || {
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig", "KILL"]).arg(program).args(["-H", "127.0.0.1", "-p", &port.to_string()]);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            let _ = command.spawn().unwrap().wait();
        });
        wait_until("the S3 server to listen", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        port
    })
}

impl Bucket {
    pub fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let port = server();
        let name = format!("bucket-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let bucket = Self { name, endpoint: format!("http://127.0.0.1:{port}") };
        assert_eq!(bucket.ask("PUT", "", b"").status, 200);
        bucket
    }

    /// A second handle for the same bucket.
    pub fn share(&self) -> Self {
        Self { name: self.name.clone(), endpoint: self.endpoint.clone() }
    }

    /// Variables that name the bucket.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        vec![
            ("S3_ENDPOINT", self.endpoint.clone()),
            ("S3_BUCKET", self.name.clone()),
            ("S3_ACCESS_KEY", "access".into()),
            ("S3_SECRET_KEY", "secret".into()),
            ("S3_SSL_VALIDATE", "False".into()),
        ]
    }

    /// Sends a request, without using the program under test.
    pub fn ask(&self, method: &str, key: &str, body: &[u8]) -> Answer {
        ask(server(), method, &format!("/{}/{key}", self.name), body)
    }

    pub fn put(&self, key: &str, body: &[u8]) {
        assert_eq!(self.ask("PUT", key, body).status, 200);
    }

    /// Creates an object that belongs to the job `job`.
    pub fn put_of_job(&self, key: &str, body: &[u8], job: &str) {
        let header = format!("x-amz-meta-x-shasta-ims-job-id: {job}\r\n");
        let answer = ask_with(server(), "PUT", &format!("/{}/{key}", self.name), &header, body);
        assert_eq!(answer.status, 200);
    }

    pub fn get(&self, key: &str) -> Answer {
        let answer = self.ask("GET", key, b"");
        assert_eq!(answer.status, 200, "{key}");
        answer
    }

    /// All keys in the bucket.
    pub fn keys(&self) -> Vec<String> {
        let listing = text(self.ask("GET", "?list-type=2", b"").body);
        let keys = listing.split("<Key>").skip(1).map(|rest| rest.split('<').next().unwrap().to_owned());
        keys.collect()
    }

    /// Multipart uploads that were neither completed nor aborted.
    pub fn unfinished_uploads(&self) -> usize {
        text(self.ask("GET", "?uploads", b"").body).matches("<UploadId>").count()
    }
}

pub fn ask(port: u16, method: &str, path: &str, body: &[u8]) -> Answer {
    ask_with(port, method, path, "", body)
}

/// Like [`ask`], with additional headers, each with its line end.
fn ask_with(port: u16, method: &str, path: &str, headers: &str, body: &[u8]) -> Answer {
    let mut connection = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let length = body.len();
    write!(connection, "{method} {path} HTTP/1.0\r\nhost: 127.0.0.1:{port}\r\nauthorization: AWS4-HMAC-SHA256 Credential=access/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0\r\ncontent-length: {length}\r\n{headers}\r\n").unwrap();
    connection.write_all(body).unwrap();
    let mut answer = Vec::new();
    // The server may reset the connection once it has answered.
    let read = connection.read_to_end(&mut answer);
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or_else(|| panic!("no headers: {read:?}"));
    let head = text(&answer[..end]);
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers = lines.filter_map(|l| l.split_once(": ")).map(|(n, v)| (n.to_lowercase(), v.to_owned()));
    let answer = Answer { status, headers: headers.collect(), body: answer.split_off(end + 4) };
    if let Err(error) = read {
        let length = answer.headers.iter().find(|(name, _)| name == "content-length");
        let length = length.and_then(|(_, length)| length.parse().ok());
        assert_eq!(length, Some(answer.body.len()), "the answer is cut off: {error}");
    }
    answer
}

/// A proxy that resets connections after given numbers of bytes.
pub struct Breaker {
    pub endpoint: String,
    pub broken: Arc<AtomicUsize>,
}

impl Breaker {
    /// Resets every `every`th connection, each after the next number of bytes in `points`, until these are used up.
    pub fn start(points: &[usize], every: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let broken = Arc::new(AtomicUsize::new(0));
        let (points, count) = (Mutex::new(points.to_vec()), broken.clone());
        let to = server();
        std::thread::spawn(move || {
            for (number, connection) in listener.incoming().map_while(Result::ok).enumerate() {
                let mut points = points.lock().unwrap();
                let point = (number % every == 0 && !points.is_empty()).then(|| points.remove(0));
                let count = count.clone();
                std::thread::spawn(move || {
                    pass(connection, TcpStream::connect(("127.0.0.1", to)).unwrap(), point, &count);
                });
            }
        });
        Self { endpoint, broken }
    }
}

fn pass(mut client: TcpStream, mut server: TcpStream, point: Option<usize>, broken: &AtomicUsize) {
    let (mut back_from, mut back_to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
    let back = std::thread::spawn(move || {
        // After a reset, the client must get neither further data nor a regular end.
        if std::io::copy(&mut back_from, &mut back_to).is_ok() {
            let _ = back_to.shutdown(std::net::Shutdown::Write);
        }
    });
    let (mut buffer, mut passed) = ([0; 4096], 0);
    while let Ok(length @ 1..) = client.read(&mut buffer) {
        let length = point.map_or(length, |point| length.min(point - passed));
        if server.write_all(&buffer[..length]).is_err() {
            break;
        }
        passed += length;
        if Some(passed) == point {
            broken.fetch_add(1, Ordering::Relaxed);
            reset(&client);
            break;
        }
    }
    let _ = server.shutdown(std::net::Shutdown::Both);
    let _ = back.join();
}

/// A proxy that lets a number of parts through, and then behaves as [`Closed`] says. It compares the SHA-256 of parts
/// with the one they are signed with, as Amazon's server, MinIO and Ceph do, and the server behind it does not.
pub struct Gate {
    pub endpoint: String,
    asked: Arc<Mutex<Vec<String>>>,
}

/// Treatment of further parts, or of other requests.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    /// Parts are never answered.
    Silent,
    /// Parts are refused with 403, and so is ListMultipartUploads.
    Refusing,
    /// Uploads are created, but the answers with their IDs are lost.
    Unheard,
    /// Parts pass. The upload is completed, but the answer is lost; a second attempt to complete the upload gets 404.
    EndsUnheard,
    /// Everything passes but deletions: they are not carried out, and get the status 200 with an error in the body.
    Undeleted,
    /// Parts pass, but the first byte of the first one is changed, as often as it is sent up to this number.
    Altering(usize),
}

impl Gate {
    pub fn start(parts: usize, closed: Closed) -> Self {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (heard, to) = (asked.clone(), server());
        let address = listen(move |connection| {
            let server = TcpStream::connect(("127.0.0.1", to)).unwrap();
            let _ = pass_one(&connection, server, &heard, parts, closed);
            let _ = connection.shutdown(std::net::Shutdown::Both);
        });
        Self { endpoint: format!("http://{address}"), asked }
    }

    /// Request line and headers of all requests.
    pub fn heads(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }

    /// Method and path of each request.
    pub fn requests(&self) -> Vec<String> {
        let words = |line: &String| line.split(' ').take(2).collect::<Vec<_>>().join(" ");
        self.asked.lock().unwrap().iter().map(words).collect()
    }

    /// Number of parts that were sent.
    pub fn parts(&self) -> usize {
        self.asked.lock().unwrap().iter().filter(|request| is_part(request)).count()
    }

    /// Number of uploads that were created.
    pub fn begun(&self) -> usize {
        self.asked.lock().unwrap().iter().filter(|request| begins(request)).count()
    }
}

fn begins(request: &str) -> bool {
    request.starts_with("POST ") && request.contains("?uploads")
}

fn ends(request: &str) -> bool {
    request.starts_with("POST ") && request.contains("?uploadId=")
}

fn is_part(request: &str) -> bool {
    request.contains("partNumber=")
}

fn is_first_part(request: &str) -> bool {
    request.contains("partNumber=1&")
}

/// Passes on one request and its answer.
fn pass_one(
    client: &TcpStream,
    mut server: TcpStream,
    heard: &Mutex<Vec<String>>,
    parts: usize,
    closed: Closed,
) -> std::io::Result<()> {
    use std::io::{BufRead, BufReader};
    let mut reader = BufReader::new(client);
    let lines: Vec<_> = reader.by_ref().lines().map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
    let Some(request) = lines.first() else { return Ok(()) };
    let length = lines.iter().find_map(|l| l.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
    let (number, firsts, ended) = {
        let mut heard = heard.lock().unwrap();
        heard.push(lines.join("\n"));
        let count = |is: fn(&str) -> bool| heard.iter().filter(|request| is(request)).count();
        (count(is_part), count(is_first_part), count(ends))
    };
    let mut body = Vec::new();
    reader.take(length.unwrap_or(0)).read_to_end(&mut body)?;
    if is_part(request) && number > parts {
        let mut out = client;
        return match closed {
            Closed::Silent => out.read_to_end(&mut Vec::new()).map(|_| ()),
            Closed::Refusing => {
                write!(out, "HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            }
            _ => unreachable!("{request}"),
        };
    }
    let deletes = request.contains("?delete") || request.starts_with("DELETE ") && !request.contains('?');
    if deletes && closed == Closed::Undeleted {
        let page = "<Error><Code>AccessDenied</Code></Error>";
        let mut out = client;
        return write!(out, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{page}", page.len());
    }
    if is_first_part(request)
        && let Closed::Altering(times) = closed
        && firsts <= times
    {
        body[0] = !body[0];
    }
    if is_part(request) {
        let signed = lines.iter().find_map(|line| line.strip_prefix("x-amz-content-sha256: "));
        if signed.is_some_and(|sum| sum != "UNSIGNED-PAYLOAD" && sum != sha256(&body)) {
            let page = "<Error><Code>XAmzContentSHA256Mismatch</Code><Message>The provided 'x-amz-content-sha256' \
                        header does not match what was computed.</Message></Error>";
            let (mut out, start) = (client, "HTTP/1.1 400 Bad Request\r\nconnection: close");
            return write!(out, "{start}\r\ncontent-length: {}\r\n\r\n{page}", page.len());
        }
    }
    write!(server, "{}\r\nconnection: close\r\n\r\n", lines.join("\r\n"))?;
    server.write_all(&body)?;
    if request.starts_with("GET ") && request.contains("?uploads") && closed == Closed::Refusing {
        let mut out = client;
        return write!(out, "HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
    }
    if begins(request) && closed == Closed::Unheard {
        std::io::copy(&mut server, &mut std::io::sink())?;
        let mut out = client;
        return out.read_to_end(&mut Vec::new()).map(|_| ());
    }
    if ends(request) && closed == Closed::EndsUnheard {
        std::io::copy(&mut server, &mut std::io::sink())?;
        let mut out = client;
        return match ended {
            1 => Ok(()),
            _ => write!(out, "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"),
        };
    }
    std::io::copy(&mut server, &mut &*client).map(|_| ())
}

/// A server that accepts objects of any size as S3 does, and keeps only their sizes.
pub struct Sink {
    endpoint: String,
    pub sizes: Arc<Mutex<std::collections::BTreeMap<String, u64>>>,
}

impl Sink {
    pub fn start() -> Self {
        Self::losing(0)
    }

    /// Starts a server that reports each object as smaller by this many bytes.
    pub fn losing(bytes: u64) -> Self {
        Self::telling(bytes, ETAG)
    }

    /// Starts a server that gives the object `rootfs` these headers; `headers` lacks the last line end.
    pub fn describing(headers: &str) -> Self {
        Self::telling(0, headers)
    }

    fn telling(lost: u64, headers: &str) -> Self {
        let sizes = Arc::new(Mutex::new(std::collections::BTreeMap::new()));
        let (shared, headers) = (sizes.clone(), headers.to_owned());
        let address = listen(move |connection| while swallow(&connection, &shared, lost, &headers).is_some() {});
        Self { endpoint: format!("http://{address}"), sizes }
    }

    pub fn variables(&self) -> Vec<(&'static str, String)> {
        let values = [("S3_ENDPOINT", &*self.endpoint), ("S3_ACCESS_KEY", "access"), ("S3_SECRET_KEY", "secret")];
        values.map(|(name, value)| (name, value.to_owned())).into()
    }
}

/// Header of an object whose ETag is no MD5.
const ETAG: &str = "etag: \"e\"";

fn swallow(
    connection: &TcpStream,
    sizes: &Mutex<std::collections::BTreeMap<String, u64>>,
    lost: u64,
    headers: &str,
) -> Option<()> {
    use std::io::{BufRead, BufReader};
    let mut reader = BufReader::with_capacity(1 << 20, connection);
    let mut lines = reader.by_ref().lines().map_while(Result::ok).take_while(|line| !line.is_empty());
    let request = lines.next()?;
    let length =
        lines.filter_map(|l| l.to_lowercase().strip_prefix("content-length: ")?.parse().ok()).last().unwrap_or(0);
    std::io::copy(&mut reader.take(length), &mut std::io::sink()).ok()?;
    let mut words = request.split(' ');
    let (method, url) = (words.next()?, words.next()?);
    let (path, query) = url.split_once('?').unwrap_or((url, ""));
    let mut sizes = sizes.lock().unwrap();
    let is_missing = method == "HEAD" && !sizes.contains_key(path);
    let size = sizes.entry(path.to_owned()).or_default();
    let mut body = "";
    match method {
        "PUT" => *size += length,
        "POST" if query.starts_with("uploads") => {
            body = "<InitiateMultipartUploadResult><Bucket>b</Bucket><Key>k</Key><UploadId>u</UploadId></InitiateMultipartUploadResult>";
        }
        "POST" => body = "<CompleteMultipartUploadResult><ETag>\"e-1\"</ETag></CompleteMultipartUploadResult>",
        _ => {}
    }
    let length = if method == "HEAD" { size.saturating_sub(lost) } else { body.len() as u64 };
    let headers = if path.ends_with("/rootfs") { headers } else { ETAG };
    let date = "Thu, 01 Jan 2026 00:00:00 GMT";
    let mut out = connection;
    if is_missing {
        sizes.remove(path);
        return write!(out, "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").ok();
    }
    // In one piece: the client's kernel would delay the acknowledgement of the first of several, and ours wait for it.
    let answer =
        format!("HTTP/1.1 200 OK\r\n{headers}\r\nlast-modified: {date}\r\ncontent-length: {length}\r\n\r\n{body}");
    out.write_all(answer.as_bytes()).ok()
}

/// A server that gives every request the same answer. Returns its URL.
pub fn always(status: &str, page: &str) -> String {
    use std::io::{BufRead, BufReader};
    let length = page.len();
    let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{page}");
    let address = listen(move |mut connection| {
        let lines = BufReader::new(&connection).lines().map_while(Result::ok);
        let _ = lines.take_while(|line| !line.is_empty()).count();
        let _ = connection.write_all(answer.as_bytes());
    });
    format!("http://{address}")
}
