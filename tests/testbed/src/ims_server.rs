//! An IMS that accepts exactly its published schema: it answers 400 to an unknown field, and 409 to a wrong state.
//! Errors have the form of RFC 7807.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::{Value, json};

use crate::listen;

pub const JOB: &str = "46a2731e-a1d0-4f98-ba92-4f78c756bb12";

/// Values of a job's status in the schema.
const STATUSES: [&str; 9] = [
    "creating",
    "fetching_image",
    "fetching_recipe",
    "waiting_for_repos",
    "building_image",
    "packaging_artifacts",
    "waiting_on_user",
    "error",
    "success",
];

/// A fault for a request.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The request gets a server error with this status, and nothing is done.
    Status(u16),
    /// The request is carried out, and the answer is lost.
    LostAnswer,
    /// The request is carried out, and never answered.
    SilentlyDone,
    /// The request is carried out, and answered with this status and record; `null` is a record that is cut off.
    Done(u16, Value),
    /// The request is answered, and at the same time somebody else registers an image of this name, with this link.
    Rival(&'static str, Value),
    /// The request is answered with this record, and nothing is done.
    Record(Value),
    /// The token is refused.
    ExpiredToken,
    /// The request is never answered.
    Silence,
}

#[derive(Default)]
pub struct State {
    pub images: BTreeMap<String, Value>,
    pub job: Value,
    /// Every request that changed something: method, path, body.
    pub changes: Vec<(String, String, Value)>,
    /// Every request, whatever its result: method and path.
    pub requests: Vec<String>,
    pub tokens: usize,
    /// Behaves as an older IMS, whose images have no metadata.
    pub without_metadata: bool,
    /// Behaves as the service of one machine, which needs no token.
    pub needs_no_token: bool,
    /// Lifetime of a token, in seconds.
    pub token_lives: u64,
    /// Requests that were refused as wrong.
    pub refused: Vec<String>,
    faults: Vec<(String, Fault)>,
    made: usize,
}

impl State {
    /// Adds an image; its ID sorts after those of earlier images.
    pub fn register(&mut self, name: &str, arch: &str, link: &Value) -> Value {
        self.made += 1;
        let id = format!("00000000-0000-4000-8000-{:012}", self.made);
        let record = json!({"id": id, "created": "2026-01-01T00:00:00", "name": name, "arch": arch, "link": link});
        self.images.insert(id, record.clone());
        record
    }
}

pub struct ImsServer {
    pub url: String,
    pub oauth: Arc<tempfile::TempDir>,
    state: Arc<Mutex<State>>,
}

impl ImsServer {
    pub fn start() -> Self {
        let job = json!({
            "id": JOB, "status": "creating", "job_type": "customize", "artifact_id": JOB, "public_key_id": JOB,
            "image_root_archive_name": "compute", "resultant_image_id": null,
        });
        let state = Arc::new(Mutex::new(State { job, token_lives: 300, ..State::default() }));
        let shared = state.clone();
        let address = listen(move |connection| while answer(&connection, &shared).is_some() {});
        let oauth = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("endpoint", format!("http://{address}/token\n")),
            ("client-id", "admin".into()),
            ("client-secret", "s:cret".into()),
        ] {
            std::fs::write(oauth.path().join(name), text).unwrap();
        }
        Self { url: format!("http://{address}/apis/ims"), oauth: Arc::new(oauth), state }
    }

    /// A second handle for the same server.
    pub fn share(&self) -> Self {
        Self { url: self.url.clone(), oauth: self.oauth.clone(), state: self.state.clone() }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Applies the fault to the next request that begins with `request`, in the form "METHOD /path body".
    pub fn fail(&self, request: &str, fault: Fault) {
        self.state().faults.push((request.to_owned(), fault));
    }

    /// Forgets all faults that have not occurred.
    pub fn forget_faults(&self) {
        self.state().faults.clear();
    }

    /// True if all faults have occurred.
    pub fn is_well(&self) -> bool {
        self.state().faults.is_empty()
    }

    pub fn status(&self) -> String {
        self.state().job["status"].as_str().unwrap().to_owned()
    }

    /// All statuses of the job, in order.
    pub fn statuses(&self) -> Vec<String> {
        let of_job = |(_, path, body): &(String, String, Value)| {
            path.starts_with("/jobs").then(|| body["status"].as_str().map(str::to_owned)).flatten()
        };
        self.state().changes.iter().filter_map(of_job).collect()
    }

    pub fn variables(&self) -> Vec<(&'static str, String)> {
        vec![
            ("IMS_URL", self.url.clone()),
            ("OAUTH_CONFIG_DIR", self.oauth.path().display().to_string()),
            ("IMS_JOB_ID", JOB.into()),
        ]
    }
}

fn answer(connection: &TcpStream, state: &Mutex<State>) -> Option<()> {
    let mut reader = BufReader::new(connection);
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|&n| n > 0)?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next()?, words.next()?);
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        match line.trim_end().split_once(": ") {
            Some((name, value)) => drop(headers.insert(name.to_lowercase(), value.to_owned())),
            None => break,
        }
    }
    let length = headers.get("content-length").map_or(0, |n| n.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let fault = {
        let mut state = state.lock().unwrap();
        state.requests.push(format!("{method} {path}"));
        let request = format!("{method} {path} {}", String::from_utf8_lossy(&body)).replace("/apis/ims", "");
        let at = state.faults.iter().position(|(begin, _)| request.starts_with(begin.as_str()));
        at.map(|at| state.faults.remove(at).1)
    };
    let (status, answer) = match fault {
        Some(Fault::Status(status)) => (status, json!({"title": "Out of order", "status": status})),
        Some(Fault::Record(record)) => (201, record),
        Some(Fault::ExpiredToken) => {
            // Requests with the old token are refused from now on.
            state.lock().unwrap().tokens += 1;
            (401, json!({"error": "invalid_token", "error_description": "The token has expired"}))
        }
        Some(Fault::Silence) => {
            std::thread::park();
            return None;
        }
        Some(Fault::SilentlyDone) => {
            handle(state, &method, &path, &headers, &body);
            std::thread::park();
            return None;
        }
        Some(Fault::Done(status, record)) => {
            handle(state, &method, &path, &headers, &body);
            (status, if record.is_null() { json!("{\"id\": ") } else { record })
        }
        Some(Fault::Rival(name, content)) => {
            let answer = handle(state, &method, &path, &headers, &body);
            state.lock().unwrap().register(name, "x86_64", &content);
            answer
        }
        Some(Fault::LostAnswer) => {
            handle(state, &method, &path, &headers, &body);
            crate::file_server::reset(connection);
            return None;
        }
        None => handle(state, &method, &path, &headers, &body),
    };
    let text = if status == 204 { String::new() } else { answer.to_string() };
    let mut out = connection;
    write!(out, "HTTP/1.1 {status} x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{text}", text.len())
        .ok()
}

fn handle(
    state: &Mutex<State>,
    method: &str,
    path: &str,
    headers: &BTreeMap<String, String>,
    body: &[u8],
) -> (u16, Value) {
    let state = &mut *state.lock().unwrap();
    let result = if path == "/token" { token(state, headers, body) } else { api(state, method, path, headers, body) };
    result.unwrap_or_else(|(status, detail)| {
        if status != 404 {
            state.refused.push(format!("{method} {path}: {detail}"));
        }
        (status, json!({"title": "Refused", "detail": detail, "status": status}))
    })
}

type Handled = Result<(u16, Value), (u16, String)>;

fn token(state: &mut State, headers: &BTreeMap<String, String>, body: &[u8]) -> Handled {
    // The expected credentials are `admin:s:cret` in base64.
    if headers.get("authorization").map(String::as_str) != Some("Basic YWRtaW46czpjcmV0") {
        return Err((401, "who are you".into()));
    }
    if body != b"grant_type=client_credentials" {
        return Err((400, format!("grant: {}", String::from_utf8_lossy(body))));
    }
    state.tokens += 1;
    Ok((
        200,
        json!({"access_token": format!("token-{}", state.tokens), "expires_in": state.token_lives, "token_type": "Bearer"}),
    ))
}

fn api(state: &mut State, method: &str, path: &str, headers: &BTreeMap<String, String>, body: &[u8]) -> Handled {
    let token = format!("Bearer token-{}", state.tokens);
    if !state.needs_no_token && headers.get("authorization") != Some(&token) {
        return Err((401, "no token".into()));
    }
    let path = path.strip_prefix("/apis/ims").ok_or((404, "elsewhere".to_owned()))?;
    let body: Value =
        if body.is_empty() { Value::Null } else { serde_json::from_slice(body).map_err(|e| (400, e.to_string()))? };
    let (_, rest) = path.split_at(1);
    let (collection, id) = rest.split_once('/').map_or((rest, None), |(c, id)| (c, Some(id)));
    let missing = || (404, format!("no {path}"));
    let result = match (method, collection, id) {
        ("GET", "images", None) => Ok((200, state.images.values().cloned().collect::<Vec<_>>().into())),
        ("POST", "images", None) => {
            let known = ["name", "link", "arch", "metadata"];
            only(&body, &known[..if state.without_metadata { 3 } else { 4 }])?;
            let name = body["name"].as_str().filter(|n| !n.is_empty()).ok_or((400, "name: a string".to_owned()))?;
            if !["x86_64", "aarch64", ""].contains(&body["arch"].as_str().unwrap_or_default()) {
                return Err((400, "arch: x86_64 or aarch64".into()));
            }
            let record = state.register(name, body["arch"].as_str().unwrap_or_default(), &body["link"]);
            let stored = state.images.get_mut(record["id"].as_str().unwrap()).unwrap();
            stored["metadata"] = body.get("metadata").cloned().unwrap_or(json!({}));
            Ok((201, stored.clone()))
        }
        ("GET", "images", Some(id)) => Ok((200, state.images.get(id).ok_or_else(missing)?.clone())),
        ("DELETE", "images", Some(id)) => state.images.remove(id).map(|_| (204, Value::Null)).ok_or_else(missing),
        ("PATCH", "images", Some(id)) => {
            only(&body, &["link", "arch"])?;
            only(&body["link"], &["path", "etag", "type"])?;
            if ["path", "etag", "type"].iter().any(|name| !body["link"][name].is_string()) {
                return Err((400, "link: path, etag and type".into()));
            }
            let image = state.images.get_mut(id).ok_or_else(missing)?;
            if !image["link"].is_null() && image["link"] != body["link"] {
                return Err((409, "the image has a link".into()));
            }
            image["link"] = body["link"].clone();
            Ok((200, image.clone()))
        }
        ("GET", "jobs", Some(id)) if state.job["id"] == id => Ok((200, state.job.clone())),
        ("PATCH", "jobs", Some(id)) if state.job["id"] == id => patch_job(state, &body),
        _ => Err(missing()),
    }?;
    if method != "GET" {
        state.changes.push((method.to_owned(), path.to_owned(), body));
    }
    Ok(result)
}

fn patch_job(state: &mut State, body: &Value) -> Handled {
    only(body, &["status", "resultant_image_id"])?;
    if ["success", "error"].contains(&state.job["status"].as_str().unwrap()) {
        return Err((409, format!("the job has ended with {}", state.job["status"])));
    }
    if let Some(status) = body.get("status") {
        if !STATUSES.iter().any(|known| status == known) {
            return Err((400, format!("status: {status}")));
        }
        if status == "success" && state.job["resultant_image_id"].is_null() {
            return Err((409, "a success without an image".into()));
        }
        state.job["status"] = status.clone();
    }
    if let Some(image) = body.get("resultant_image_id") {
        let linked = state.images.get(image.as_str().unwrap_or_default()).is_some_and(|image| !image["link"].is_null());
        if !linked {
            return Err((409, "no image with a link".into()));
        }
        state.job["resultant_image_id"] = image.clone();
    }
    Ok((200, state.job.clone()))
}

fn only(body: &Value, known: &[&str]) -> Result<(), (u16, String)> {
    let fields = body.as_object().ok_or((400, "an object is expected".to_owned()))?;
    match fields.keys().find(|name| !known.contains(&name.as_str())) {
        Some(unknown) => Err((422, format!("{unknown}: unknown field"))),
        None => Ok(()),
    }
}
