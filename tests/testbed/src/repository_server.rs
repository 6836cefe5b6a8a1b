//! A server of a directory, such as a package repository, that records its requests.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::listen;

/// Restrictions of a server, compared to one that answers everybody.
#[derive(Clone, Debug, Default)]
pub struct Manners {
    /// True if the server answers GET only.
    pub without_head: bool,
    /// A header, name and value, without which the server refuses requests.
    pub wants: Option<(&'static str, String)>,
}

pub struct RepositoryServer {
    pub url: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    /// Headers by name, in lower case.
    pub headers: BTreeMap<String, String>,
}

impl RepositoryServer {
    pub fn start(directory: &Path) -> Self {
        Self::with(directory, Manners::default())
    }

    pub fn with(directory: &Path, manners: Manners) -> Self {
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (heard, directory) = (requests.clone(), directory.to_owned());
        let address = listen(move |connection| {
            let mut reader = BufReader::new(connection.try_clone().unwrap());
            while answer(&mut reader, &connection, &directory, &manners, &heard).is_some() {}
        });
        Self { url: format!("http://{address}"), requests }
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

fn answer(
    reader: &mut impl BufRead,
    mut out: &TcpStream,
    directory: &Path,
    manners: &Manners,
    requests: &Mutex<Vec<Request>>,
) -> Option<()> {
    let mut lines = reader.lines().map_while(Result::ok).take_while(|line| !line.is_empty());
    let first = lines.next()?;
    let mut words = first.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let headers: BTreeMap<_, _> =
        lines.filter_map(|l| l.split_once(": ").map(|(n, v)| (n.to_lowercase(), v.to_owned()))).collect();
    // apt escapes some characters in the names of files, and some of these names contain escapes themselves.
    let path = target.split('?').next()?.replace("%2b", "+").replace("%7e", "~").replace("%25", "%");
    requests.lock().unwrap().push(Request { method: method.clone(), path: path.clone(), headers: headers.clone() });
    let file: PathBuf = directory.join(path.trim_start_matches('/'));
    let is_let_in = manners.wants.as_ref().is_none_or(|(name, value)| headers.get(*name) == Some(value));
    let (status, body) = if manners.without_head && method == "HEAD" {
        ("405 Method Not Allowed", Vec::new())
    } else if !is_let_in {
        ("401 Unauthorized", Vec::new())
    } else {
        std::fs::read(file).map_or(("404 Not Found", Vec::new()), |content| ("200 OK", content))
    };
    write!(out, "HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n", body.len()).ok()?;
    if method == "HEAD" { Some(()) } else { out.write_all(&body).ok() }
}
