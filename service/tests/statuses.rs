//! Statuses that the OpenAPI document names, answered by the running service for each URL and method.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::{Value, json};
use testbed::{cache_directory, repository, succeed};

use crate::postgres::Postgres;
use crate::server::{Answer, Server, ask};

const NO_ID: &str = "46a2731e-a1d0-4f98-ba92-4f78c756bb12";

const JSON: &str = "content-type: application/json\r\n";

/// Statuses by path and method.
type Statuses = BTreeMap<(String, String), BTreeSet<u16>>;

/// Statuses that the document names.
fn documented() -> Statuses {
    let mut python = Command::new(cache_directory().join("kubernetes-validate/bin/python"));
    let script = "import json, sys, yaml; print(json.dumps(yaml.safe_load(open(sys.argv[1]))))";
    let yaml = succeed(python.args(["-c", script]).arg(repository().join("docs/openapi.yaml")));
    let document: Value = serde_json::from_str(&yaml).unwrap();
    let mut statuses = Statuses::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            if let Some(responses) = operation["responses"].as_object() {
                let named = responses.keys().map(|status| status.parse().unwrap());
                statuses.insert((path.clone(), method.to_uppercase()), named.collect());
            }
        }
    }
    statuses
}

/// Returns whether the document names a status for a whole method that this URL cannot answer, or that takes a fault
/// which a test of its own makes.
fn is_elsewhere(path: &str, method: &str, status: u16) -> bool {
    let is_list = !path.ends_with('}') && !path.contains("/status") && !path.contains("/logs");
    match (method, status) {
        // 500: images.rs, kubernetes.rs and slow_store.rs; for the others it is what a bug would be answered with.
        // 409: images.rs, links that differ and objects that another request works on.
        (_, 409 | 500) => true,
        // Health needs neither a token nor the database.
        _ if path.starts_with("/healthz") || path == "/version" => {
            status != 200 && (path != "/version" || status != 401)
        }
        // Pages alone have parameters that can be wrong.
        ("GET", 400) => !is_list || path.contains("/deleted/"),
        ("DELETE", 400) => !path.ends_with("/jobs"),
        // A table is always there.
        (_, 404) => is_list,
        _ => false,
    }
}

/// A server, and the statuses that it has answered.
struct Asker<'a> {
    server: &'a Server,
    seen: &'a mut Statuses,
}

impl Asker<'_> {
    /// Sends a request to a path of the document, with this ID in it and a query.
    fn ask(
        &mut self,
        expected: u16,
        method: &str,
        path: &str,
        (id, query): (&str, &str),
        headers: &str,
        body: &str,
    ) -> Answer {
        let url = format!("{}{query}", path.replace("{id}", id).replace("{xname}", id));
        let answer = ask(self.server.address, method, &url, headers, body);
        assert_eq!(answer.status, expected, "{method} {url} {body}: {answer:?}");
        self.seen.entry((path.into(), method.into())).or_default().insert(expected);
        answer
    }

    fn send(&mut self, expected: u16, method: &str, path: &str, id: &str, body: &Value) -> Answer {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.ask(expected, method, path, (id, ""), JSON, &body)
    }

    /// Bodies that are no JSON, of another type, or have fields that are unknown.
    fn refuse(&mut self, method: &str, path: &str, id: &str) {
        for (status, headers, body) in
            [(400, JSON, "{"), (415, "content-type: text/plain\r\n", "{}"), (422, JSON, "{\"x\": 1}")]
        {
            self.ask(status, method, path, (id, ""), headers, body);
        }
    }

    /// All methods of a table, from an empty one to an empty one.
    fn table(&mut self, prefix: &str, table: &str, new: &Value, patch: Option<&Value>) {
        let (all, key) = (format!("{prefix}/{table}"), if table == "remote-build-nodes" { "xname" } else { "id" });
        let one = format!("{all}/{{{key}}}");
        self.refuse("POST", &all, "");
        let record = self.send(201, "POST", &all, "", new).json();
        let id = record[key].as_str().unwrap().to_owned();
        let list = self.send(200, "GET", &all, "", &Value::Null);
        let etag = format!("if-none-match: {}\r\n", list.header("etag").unwrap());
        self.ask(304, "GET", &all, ("", ""), &etag, "");
        self.ask(400, "GET", &all, ("", "?limit=x"), "", "");
        self.send(200, "GET", &one, &id, &Value::Null);
        self.send(404, "GET", &one, NO_ID, &Value::Null);
        if let Some(patch) = patch {
            self.refuse("PATCH", &one, &id);
            self.send(200, "PATCH", &one, &id, patch);
            self.send(404, "PATCH", &one, NO_ID, patch);
        }
        self.send(404, "DELETE", &one, NO_ID, &Value::Null);
        self.send(204, "DELETE", &one, &id, &Value::Null);
        self.send(204, "DELETE", &all, "", &Value::Null);
    }

    /// All methods of a table of deleted records.
    fn deleted(&mut self, table: &str, new: &Value) {
        let (live, all) = (format!("/v3/{table}"), format!("/v3/deleted/{table}"));
        let (one, undelete) = (format!("{all}/{{id}}"), json!({"operation": "undelete"}));
        let id = self.send(201, "POST", &live, "", new).id();
        let delete = |asker: &mut Self| asker.send(204, "DELETE", &format!("{live}/{{id}}"), &id, &Value::Null);
        delete(self);
        self.send(200, "GET", &all, "", &Value::Null);
        self.send(200, "GET", &one, &id, &Value::Null);
        for path in [&one, &all] {
            self.refuse("PATCH", path, &id);
            self.send(204, "PATCH", path, &id, &undelete);
            delete(self);
        }
        for (method, body) in [("GET", &Value::Null), ("PATCH", &undelete), ("DELETE", &Value::Null)] {
            self.send(404, method, &one, NO_ID, body);
        }
        self.send(204, "DELETE", &one, &id, &Value::Null);
        self.send(204, "DELETE", &all, "", &Value::Null);
    }
}

#[test]
fn each_status_of_the_document_is_answered() {
    let documented = documented();
    let mut seen = Statuses::new();
    let mut postgres = Postgres::start();
    let data = tempfile::tempdir().unwrap();
    let job = json!({
        "artifact_id": NO_ID, "public_key_id": NO_ID, "job_type": "create", "image_root_archive_name": "n",
        "id": "46a2731e-a1d0-4f98-ba92-000000000001", "created": "2026-01-31T09:15:03", "status": "creating",
    });
    let file = data.path().join("v2.4_jobs.json");
    let bodies = [
        ("public-keys", json!({"name": "n", "public_key": "k"}), None),
        (
            "recipes",
            json!({"name": "n", "recipe_type": "kiwi-ng", "linux_distribution": "sles15"}),
            Some(json!({"arch": "aarch64"})),
        ),
        ("images", json!({"name": "n"}), Some(json!({"arch": "aarch64"}))),
    ];
    for prefix in ["", "/v2", "/v3"] {
        // Without a runner, jobs come from upstream's file; POST of one is in jobs.rs.
        std::fs::write(&file, json!([job, prefix.len()]).to_string()).unwrap();
        let server = postgres.replica(data.path());
        let mut asker = Asker { server: &server, seen: &mut seen };
        for (table, new, patch) in &bodies {
            asker.table(prefix, table, new, patch.as_ref());
            if prefix == "/v3" {
                asker.deleted(table, new);
            }
        }
        let (all, one, id) = (format!("{prefix}/jobs"), format!("{prefix}/jobs/{{id}}"), job["id"].as_str().unwrap());
        asker.refuse("POST", &all, "");
        let list = asker.send(200, "GET", &all, "", &Value::Null);
        assert_eq!(list.json().as_array().unwrap().len(), 1);
        asker.ask(304, "GET", &all, ("", ""), &format!("if-none-match: {}\r\n", list.header("etag").unwrap()), "");
        asker.ask(400, "GET", &all, ("", "?limit=0"), "", "");
        asker.send(200, "GET", &one, id, &Value::Null);
        asker.refuse("PATCH", &one, id);
        asker.send(200, "PATCH", &one, id, &json!({"status": "building_image"}));
        for (method, body) in [("GET", Value::Null), ("PATCH", json!({"status": "error"})), ("DELETE", Value::Null)] {
            asker.send(404, method, &one, NO_ID, &body);
        }
        if prefix == "/v3" {
            asker.send(404, "GET", "/v3/jobs/{id}/logs", NO_ID, &Value::Null);
            asker.table("/v3", "remote-build-nodes", &json!({"xname": "x1"}), None);
            asker.send(201, "POST", "/v3/remote-build-nodes", "", &json!({"xname": "x1"}));
            asker.send(200, "GET", "/v3/remote-build-nodes/status", "", &Value::Null);
            asker.send(200, "GET", "/v3/remote-build-nodes/status/{xname}", "x1", &Value::Null);
            asker.send(404, "GET", "/v3/remote-build-nodes/status/{xname}", "x2", &Value::Null);
        }
        asker.ask(400, "DELETE", &all, ("", "?age=x"), "", "");
        asker.send(204, "DELETE", &one, id, &Value::Null);
        asker.send(204, "DELETE", &all, "", &Value::Null);
    }
    for path in ["/healthz/live", "/healthz/ready", "/version"] {
        let server = postgres.replica(data.path());
        Asker { server: &server, seen: &mut seen }.send(200, "GET", path, "", &Value::Null);
    }

    // The database is gone.
    let server = postgres.replica(data.path());
    postgres.stop();
    let body = |path: &str, method: &str| match (method, path) {
        ("PATCH", path) if path.contains("/deleted/") => json!({"operation": "undelete"}),
        ("PATCH", path) if path.contains("/jobs/") => json!({"status": "error"}),
        ("PATCH", _) => json!({"arch": "aarch64"}),
        ("POST", path) if path.ends_with("/jobs") => json!({
            "artifact_id": NO_ID, "public_key_id": NO_ID, "job_type": "create", "image_root_archive_name": "n",
        }),
        ("POST", path) if path.ends_with("nodes") => json!({"xname": "x"}),
        ("POST", path) => bodies.iter().find(|(table, ..)| path.ends_with(table)).unwrap().1.clone(),
        _ => Value::Null,
    };
    for (path, method) in documented.keys().filter(|(path, _)| !path.starts_with("/healthz") && path != "/version") {
        Asker { server: &server, seen: &mut seen }.send(503, method, path, NO_ID, &body(path, method));
    }
    // The token is missing, whatever is asked.
    let data = tempfile::tempdir().unwrap();
    let server = Server::with(data.path(), &[("IMS_AUTH", "token"), ("S3_ENDPOINT", "file:///nonexistent")]);
    for (path, method) in documented.keys().filter(|(path, _)| !path.starts_with("/healthz")) {
        Asker { server: &server, seen: &mut seen }.send(401, method, path, NO_ID, &body(path, method));
    }

    let mut missing = Vec::new();
    for ((path, method), statuses) in &documented {
        let answered = seen.get(&(path.clone(), method.clone())).cloned().unwrap_or_default();
        let elsewhere = |status: &&u16| !answered.contains(*status) && !is_elsewhere(path, method, **status);
        missing.extend(statuses.iter().filter(elsewhere).map(|status| format!("{method} {path}: {status}")));
        let unnamed: Vec<_> = answered.difference(statuses).collect();
        assert!(unnamed.is_empty(), "the document does not name {unnamed:?} of {method} {path}");
    }
    // A job that is started, and its log: jobs.rs, kubernetes.rs.
    let started = ["POST /jobs: 201", "POST /v2/jobs: 201", "POST /v3/jobs: 201", "GET /v3/jobs/{id}/logs: 200"];
    missing.retain(|missing| !started.contains(&missing.as_str()));
    assert_eq!(missing, [""; 0]);
}

#[test]
fn request_that_is_wrong_in_two_ways_gets_the_status_of_upstream() {
    let server = Server::start();
    let id = server.post("/v3/images", &json!({"name": "i"})).id();
    let recipe = json!({"name": "r", "recipe_type": "kiwi-ng", "linux_distribution": "sles15"});
    let recipe = server.post("/v3/recipes", &recipe).id();
    let text = "content-type: text/plain\r\n";
    let missing = json!({"path": "s3://b/missing", "type": "s3"});
    let (field, link) = (json!({"x": 1, "link": missing}).to_string(), json!({"link": missing}).to_string());
    for (status, path, headers, body) in [
        (404, format!("/v3/images/{NO_ID}"), text, "{"),
        (404, format!("/v3/images/{NO_ID}"), JSON, &*field),
        (404, format!("/v3/jobs/{NO_ID}"), JSON, "{"),
        (404, format!("/v3/deleted/images/{NO_ID}"), JSON, "{\"x\": 1}"),
        (415, format!("/v3/images/{id}"), text, "{"),
        (415, format!("/v3/recipes/{recipe}"), text, ""),
        (400, format!("/v3/images/{id}"), JSON, ""),
        (422, format!("/v3/images/{id}"), JSON, &field),
        (422, format!("/v3/recipes/{recipe}"), JSON, &link),
    ] {
        let answer = ask(server.address, "PATCH", &path, headers, body);
        assert_eq!(answer.status, status, "{path} {body}: {answer:?}");
    }
    // Both the unknown field and the containers of a create job are wrong: fields are checked first.
    let job = json!({
        "artifact_id": NO_ID, "public_key_id": NO_ID, "job_type": "create", "image_root_archive_name": "n",
        "ssh_containers": [{"name": "debug"}],
    });
    assert_eq!(server.post("/v3/jobs", &job).status, 400);
    let mut wrong = job;
    wrong["x"] = json!(1);
    assert_eq!(server.post("/v3/jobs", &wrong).status, 422);
}
