//! A server of one file, which supports ranges and If-Match, and shows the faults that a test requests.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::listen;

/// A fault for one request. Requests after the last fault are answered correctly.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// The connection is reset after this many bytes of the body.
    ResetAfter(usize),
    /// The connection ends after this many bytes, as if the body had ended.
    CloseAfter(usize),
    /// The answer has this status, and a body.
    Status(u16),
    /// The body comes one byte at a time, and never ends.
    Drip,
    /// There is no answer.
    Silence,
    /// The answer to a range begins at the file's start, and declares that.
    OtherRange,
    /// The answer is the whole file, whichever part the request asks for.
    Whole,
    /// The answer to a range ends after this many bytes, and declares that.
    ShortRange(usize),
    /// The answer to a range continues beyond the file's end.
    LongRange,
    /// Before the answer, the file is replaced by another one of the same length.
    Change,
    /// Before the answer, the file is truncated to this length.
    Shorten(usize),
    /// The answer has this additional header: name and value.
    Described(&'static str),
}

pub struct FileServer {
    pub url: String,
    pub requests: Arc<Mutex<Vec<Request>>>,
}

/// The range and the condition of a request.
#[derive(Clone, Debug)]
pub struct Request {
    pub range: Option<u64>,
    pub if_match: Option<String>,
}

struct Served {
    content: Vec<u8>,
    etag: String,
    faults: Vec<Fault>,
}

impl FileServer {
    pub fn start(content: Vec<u8>, faults: &[Fault]) -> Self {
        let etag = format!("{:x}-1", content.len());
        Self::with_etag(content, &etag, faults)
    }

    pub fn with_etag(content: Vec<u8>, etag: &str, faults: &[Fault]) -> Self {
        let requests = Arc::new(Mutex::new(Vec::new()));
        let served = Mutex::new(Served { content, etag: etag.to_owned(), faults: faults.to_vec() });
        let heard = requests.clone();
        let address = listen(move |connection| {
            answer(&connection, &served, &heard);
        });
        Self { url: format!("http://{address}/boot-images/rootfs?X-Amz-Signature=secret"), requests }
    }
}

fn answer(connection: &TcpStream, served: &Mutex<Served>, requests: &Mutex<Vec<Request>>) -> Option<()> {
    let mut lines = BufReader::new(connection).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
    lines.next()?;
    let headers: Vec<_> =
        lines.filter_map(|l| l.split_once(": ").map(|(n, v)| (n.to_lowercase(), v.to_owned()))).collect();
    let header = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone());
    let range: Option<u64> =
        header("range").map(|r| r.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap());
    requests.lock().unwrap().push(Request { range, if_match: header("if-match") });
    let (content, etag, fault) = {
        let mut served = served.lock().unwrap();
        let fault = (!served.faults.is_empty()).then(|| served.faults.remove(0));
        match fault {
            Some(Fault::Change) => served.content.iter_mut().for_each(|byte| *byte = !*byte),
            Some(Fault::Shorten(length)) => served.content.truncate(length),
            _ => {}
        }
        if matches!(fault, Some(Fault::Change | Fault::Shorten(_))) {
            let at = served.etag.trim_end_matches('"').len();
            served.etag.insert(at, '0');
        }
        (served.content.clone(), served.etag.clone(), fault)
    };
    let mut out = connection;
    if let Some(Fault::Status(status)) = fault {
        let body = "<Error>no</Error>";
        return write!(
            out,
            "HTTP/1.1 {status} no\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        )
        .ok();
    }
    if header("if-match").is_some_and(|wanted| wanted.trim_matches('"') != etag) {
        return write!(out, "HTTP/1.1 412 Precondition Failed\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").ok();
    }
    let range = range.filter(|_| !matches!(fault, Some(Fault::Whole)));
    let from = if matches!(fault, Some(Fault::OtherRange)) { 0 } else { usize::try_from(range.unwrap_or(0)).unwrap() };
    let length = content.len();
    let to = if let Some(Fault::ShortRange(bytes)) = fault { from + bytes } else { length };
    let head = match range {
        Some(_) => format!("206 Partial Content\r\ncontent-range: bytes {from}-{}/{length}", to - 1),
        None => match fault {
            Some(Fault::Described(header)) => format!("200 OK\r\n{header}"),
            _ => "200 OK".to_owned(),
        },
    };
    let further = if matches!(fault, Some(Fault::LongRange)) { &[0; 5000][..] } else { &[] };
    let body = &[&content[from..to], further].concat();
    if !matches!(fault, Some(Fault::Silence)) {
        let length = body.len();
        // A weak ETag has its quotes already.
        let etag = if etag.starts_with("W/") { etag } else { format!("\"{etag}\"") };
        write!(out, "HTTP/1.1 {head}\r\netag: {etag}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n").ok()?;
    }
    match fault {
        Some(Fault::ResetAfter(bytes)) => {
            out.write_all(&body[..bytes.min(body.len())]).ok()?;
            reset(connection);
            None
        }
        Some(Fault::CloseAfter(bytes)) => out.write_all(&body[..bytes.min(body.len())]).ok(),
        Some(Fault::Drip) => {
            for byte in body {
                out.write_all(&[*byte]).ok()?;
                std::thread::sleep(Duration::from_millis(50));
            }
            None
        }
        Some(Fault::Silence) => (&mut &*connection).read_to_end(&mut Vec::new()).ok().map(|_| ()),
        _ => out.write_all(body).ok(),
    }
}

/// Makes closing the connection send a reset instead of an end.
pub fn reset(connection: &TcpStream) {
    rustix::net::sockopt::set_socket_linger(connection, Some(Duration::ZERO)).unwrap();
}
