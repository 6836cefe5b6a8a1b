//! A stand-in for Kubernetes' API. It keeps objects and serves lists, watches and logs of them over HTTP, as an API
//! server does; on request, it is slow, refuses, or cuts connections off. A Job gets one pod, whose state the test
//! sets.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};

use crate::listen;

/// Fault that occurs instead of an answer to a request.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The request is refused with this status.
    Status(u16),
    /// The request is carried out, and the connection ends without an answer.
    LostAnswer,
    /// The request gets no answer as long as the server runs.
    Silence,
    /// The request is answered after this time.
    Delay(Duration),
}

/// Key of an object: the plural of its kind, its namespace and its name.
type Key = (String, String, String);

#[derive(Default)]
pub struct State {
    pub objects: BTreeMap<Key, Value>,
    /// All requests: method and path with its query.
    pub requests: Vec<String>,
    /// Objects in the form in which clients sent them.
    pub sent: Vec<Value>,
    /// Logs of containers, by `POD/CONTAINER`.
    pub logs: BTreeMap<String, String>,
    /// Faults, each with the beginning of the requests that meet it, and the number of times.
    faults: Vec<(String, Fault, usize)>,
    version: u64,
    /// Changes: version, plural of the object's kind, type of the change, object.
    changes: Vec<(u64, String, &'static str, Value)>,
    /// Changes up to this version are forgotten: a watch that begins there gets 410.
    forgotten: u64,
    /// Counter that is increased to end all watches.
    cut: u64,
}

/// A running API.
#[derive(Clone)]
pub struct Kubernetes {
    pub url: String,
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl State {
    fn store(&mut self, key: &Key, kind: &'static str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        if kind == "DELETED" {
            self.objects.remove(key);
        } else {
            self.objects.insert(key.clone(), object.clone());
        }
        self.changes.push((self.version, key.0.clone(), kind, object.clone()));
        object
    }

    fn create(&mut self, key: &Key, mut object: Value) -> Value {
        object["metadata"]["uid"] = format!("00000000-0000-4000-8000-{:012}", self.version).into();
        object["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z".into();
        let created = self.store(key, "ADDED", object);
        if key.0 == "jobs" {
            let mut pod = json!({
                "apiVersion": "v1", "kind": "Pod", "metadata": created["spec"]["template"]["metadata"],
                "spec": created["spec"]["template"]["spec"], "status": {"phase": "Pending"},
            });
            let name = format!("{}-pod", key.2);
            pod["metadata"]["name"] = name.clone().into();
            pod["metadata"]["namespace"] = key.1.clone().into();
            pod["metadata"]["labels"]["job-name"] = key.2.clone().into();
            self.create(&("pods".into(), key.1.clone(), name), pod);
        }
        created
    }

    fn delete(&mut self, key: &Key) -> Option<Value> {
        let object = self.objects.get(key)?.clone();
        if key.0 == "jobs" {
            self.delete(&("pods".into(), key.1.clone(), format!("{}-pod", key.2)));
        }
        Some(self.store(key, "DELETED", object))
    }

    fn fault(&mut self, request: &str) -> Option<Fault> {
        let at = self.faults.iter().position(|(begin, ..)| request.starts_with(begin.as_str()))?;
        let (_, fault, times) = &mut self.faults[at];
        let fault = fault.clone();
        *times -= 1;
        if *times == 0 {
            self.faults.remove(at);
        }
        Some(fault)
    }
}

impl Kubernetes {
    pub fn start() -> Self {
        let shared = Arc::<(Mutex<State>, Condvar)>::default();
        let served = shared.clone();
        let address = listen(move |connection| while serve(&connection, &served).is_some() {});
        Self { url: format!("http://{address}"), shared }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap()
    }

    /// Content of a file for `KUBECONFIG` by which a client finds this server.
    pub fn configuration(&self) -> String {
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "x", "users": [{"name": "x", "user": {}}],
            "clusters": [{"name": "x", "cluster": {"server": self.url}}],
            "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
        })
        .to_string()
    }

    /// Applies the fault to the next `times` requests that begin with `request`, in the form "METHOD /path".
    pub fn fail(&self, request: &str, fault: Fault, times: usize) {
        self.state().faults.push((request.to_owned(), fault, times));
    }

    pub fn forget_faults(&self) {
        self.state().faults.clear();
    }

    /// Plural and name of each object, sorted.
    pub fn names(&self) -> Vec<String> {
        self.state().objects.keys().map(|(plural, _, name)| format!("{plural}/{name}")).collect()
    }

    /// Objects of one kind, named by its plural.
    pub fn all(&self, plural: &str) -> Vec<Value> {
        self.state().objects.iter().filter(|(key, _)| key.0 == plural).map(|(_, object)| object.clone()).collect()
    }

    /// Adds an object that no client has sent.
    pub fn put(&self, plural: &str, namespace: &str, object: Value) {
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        self.state().create(&(plural.into(), namespace.into(), name), object);
        self.shared.1.notify_all();
    }

    /// Sets the status of an object as a controller or kubelet does.
    pub fn set_status(&self, plural: &str, name: &str, status: Value) {
        let mut state = self.state();
        let key = state.objects.keys().find(|key| key.0 == plural && key.2 == name).cloned();
        let key = key.unwrap_or_else(|| panic!("no {plural}/{name}"));
        let mut object = state.objects[&key].clone();
        object["status"] = status;
        state.store(&key, "MODIFIED", object);
        self.shared.1.notify_all();
    }

    /// Removes an object, as somebody else would.
    pub fn remove(&self, plural: &str, name: &str) {
        let mut state = self.state();
        let key = state.objects.keys().find(|key| key.0 == plural && key.2 == name).cloned();
        state.delete(&key.unwrap_or_else(|| panic!("no {plural}/{name}")));
        self.shared.1.notify_all();
    }

    /// Ends all watches. If `is_forgotten`, they cannot continue from where they were.
    pub fn cut_watches(&self, is_forgotten: bool) {
        let mut state = self.state();
        state.cut += 1;
        if is_forgotten {
            state.version += 1;
            state.forgotten = state.version;
        }
        self.shared.1.notify_all();
    }
}

/// Answers one request.
fn serve(connection: &TcpStream, shared: &(Mutex<State>, Condvar)) -> Option<()> {
    let mut reader = BufReader::new(connection);
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|&n| n > 0)?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, target) = (words.next()?, words.next()?);
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        match line.trim_end().split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => length = value.parse().ok()?,
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let request = format!("{method} {target}");
    let fault = {
        let mut state = shared.0.lock().unwrap();
        state.requests.push(request.clone());
        state.fault(&request)
    };
    match fault {
        Some(Fault::Status(code)) => return reply(connection, code, &status(code, "the test refuses")),
        Some(Fault::Silence) => loop {
            std::thread::park();
        },
        Some(Fault::Delay(time)) => std::thread::sleep(time),
        Some(Fault::LostAnswer) | None => {}
    }
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let query: BTreeMap<_, _> = query.split('&').filter_map(|pair| pair.split_once('=')).map(decoded).collect();
    let segments: Vec<_> = path.trim_start_matches('/').split('/').collect();
    let rest = if segments[0] == "api" { &segments[2..] } else { &segments[3..] };
    let ["namespaces", namespace, plural, rest @ ..] = rest else {
        return reply(connection, 404, &status(404, "no such resource"));
    };
    let key = |name: &str| ((*plural).to_owned(), (*namespace).to_owned(), name.to_owned());
    if rest.is_empty() && query.get("watch").is_some_and(|watch| watch == "true" || watch == "1") {
        return watch(connection, shared, plural, namespace, &query);
    }
    let (code, answer) = {
        let mut state = shared.0.lock().unwrap();
        match (method.as_str(), rest) {
            ("POST", []) => {
                let name = body["metadata"]["name"].as_str().unwrap_or_default().to_owned();
                state.sent.push(body.clone());
                if state.objects.contains_key(&key(&name)) {
                    (409, status(409, &format!("{plural} \"{name}\" already exists")))
                } else {
                    (201, state.create(&key(&name), body))
                }
            }
            ("GET", []) => {
                let selector = query.get("labelSelector").map_or("", String::as_str);
                let found = state
                    .objects
                    .iter()
                    .filter(|((p, n, _), object)| p == plural && n == namespace && selected(object, selector));
                let items: Vec<_> = found.map(|(_, object)| object.clone()).collect();
                let list = json!({
                    "kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": state.version.to_string()},
                    "items": items,
                });
                (200, list)
            }
            ("GET", [pod, "log"]) => {
                let container = query.get("container").cloned().unwrap_or_default();
                match state.logs.get(&format!("{pod}/{container}")) {
                    Some(log) => (200, log.clone().into()),
                    None => (400, status(400, &format!("container \"{container}\" is waiting to start"))),
                }
            }
            ("GET", [name]) => match state.objects.get(&key(name)) {
                Some(object) => (200, object.clone()),
                None => (404, status(404, &format!("{plural} \"{name}\" not found"))),
            },
            ("DELETE", [name]) => match state.delete(&key(name)) {
                Some(object) => (200, object),
                None => (404, status(404, &format!("{plural} \"{name}\" not found"))),
            },
            _ => (405, status(405, "not done here")),
        }
    };
    shared.1.notify_all();
    if matches!(fault, Some(Fault::LostAnswer)) {
        let _ = connection.shutdown(Shutdown::Both);
        return None;
    }
    reply(connection, code, &answer)
}

/// Sends the changes of one kind of object, beginning after the version in the query.
fn watch(
    mut connection: &TcpStream,
    shared: &(Mutex<State>, Condvar),
    plural: &str,
    namespace: &str,
    query: &BTreeMap<String, String>,
) -> Option<()> {
    let mut from: u64 = query.get("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or_default();
    let selector = query.get("labelSelector").cloned().unwrap_or_default();
    connection
        .write_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
        .ok()?;
    let mut state = shared.0.lock().unwrap();
    let cut = state.cut;
    loop {
        let mut text = String::new();
        let begin = from;
        if from < state.forgotten {
            text = json!({"type": "ERROR", "object": status(410, "too old resource version")}).to_string() + "\n";
        } else {
            for (version, of, kind, object) in state.changes.iter().filter(|change| change.0 > begin) {
                from = *version;
                if of == plural && object["metadata"]["namespace"] == namespace && selected(object, &selector) {
                    text += &(json!({"type": kind, "object": object}).to_string() + "\n");
                }
            }
        }
        let is_over = state.cut != cut || from < state.forgotten;
        drop(state);
        if !text.is_empty() {
            connection.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes()).ok()?;
        }
        if is_over {
            let _ = connection.shutdown(Shutdown::Both);
            return None;
        }
        state = shared.1.wait_timeout(shared.0.lock().unwrap(), Duration::from_millis(200)).unwrap().0;
    }
}

fn selected(object: &Value, selector: &str) -> bool {
    selector.split(',').filter(|term| !term.is_empty()).all(|term| {
        let labels = &object["metadata"]["labels"];
        match term.split_once('=') {
            Some((name, value)) => labels[name] == value,
            None => labels.get(term).is_some(),
        }
    })
}

fn decoded((name, value): (&str, &str)) -> (String, String) {
    let value = ["%2F/", "%3D=", "%2C,", "%21!"].iter().fold(value.to_owned(), |value, code| {
        let (code, plain) = code.split_at(3);
        value.replace(code, plain).replace(&code.to_lowercase(), plain)
    });
    (name.to_owned(), value)
}

fn status(code: u16, message: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "code": code})
}

fn reply(mut connection: &TcpStream, code: u16, answer: &Value) -> Option<()> {
    let (kind, text) = match answer.as_str() {
        Some(text) => ("text/plain", text.to_owned()),
        None => ("application/json", answer.to_string()),
    };
    let head = format!("HTTP/1.1 {code} X\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n", text.len());
    connection.write_all((head + &text).as_bytes()).ok()
}
