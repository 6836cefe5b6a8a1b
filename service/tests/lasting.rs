//! Records outlive kills; upstream's files are imported and written.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use crate::kubernetes::Site;
use crate::server::{Server, try_ask};

/// Kills in the short form; `IMS_TEST_KILLS` says otherwise.
const KILLS: usize = 5;

fn kills() -> usize {
    std::env::var("IMS_TEST_KILLS").map_or(KILLS, |kills| kills.parse().unwrap())
}

#[test]
fn what_was_answered_outlives_kills() {
    let data = tempfile::tempdir().unwrap();
    let store = data.path().join("store");
    let endpoint = format!("file://{}", store.display());
    let variables = [("S3_ENDPOINT", endpoint.as_str())];
    let created = Mutex::new(BTreeSet::new());
    let (deleted, asked) = (Mutex::new(BTreeSet::new()), Mutex::new(BTreeSet::new()));
    for _ in 0..kills() {
        let mut server = Server::with(data.path(), &variables);
        let address = server.address;
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for worker in 0..4 {
                let (ended, created, deleted, asked, store) = (&ended, &created, &deleted, &asked, &store);
                scope.spawn(move || {
                    let send = |method: &str, path: &str, body: &Value| {
                        let body = if body.is_null() { String::new() } else { body.to_string() };
                        try_ask(address, method, path, "content-type: application/json\r\n", &body)
                    };
                    while !ended.load(Ordering::Relaxed) {
                        let name = ims_service::records::new_id();
                        let directory = store.join("b").join(&name);
                        std::fs::create_dir_all(&directory).unwrap();
                        std::fs::write(directory.join("rootfs"), "r").unwrap();
                        let at =
                            |file: &str| json!({"path": format!("s3://b/{name}/{file}"), "type": "s3", "etag": ""});
                        let kind = "application/vnd.cray.image.rootfs.squashfs";
                        let artifact = json!({"link": at("rootfs"), "type": kind, "md5": "m"});
                        let manifest = json!({"version": "1.0", "artifacts": [artifact]});
                        std::fs::write(directory.join("manifest.json"), manifest.to_string()).unwrap();
                        let new = json!({"name": name, "link": at("manifest.json")});
                        let Ok(answer) = send("POST", "/v3/images", &new) else { break };
                        let id = answer.id();
                        created.lock().unwrap().insert(id.clone());
                        if worker % 2 == 0 {
                            asked.lock().unwrap().insert(id.clone());
                            let Ok(answer) = send("DELETE", &format!("/v3/images/{id}"), &Value::Null) else { break };
                            assert_eq!(answer.status, 204, "{answer:?}");
                            deleted.lock().unwrap().insert(id);
                        }
                    }
                });
            }
            // The traffic has to be under way; the kill then comes at any point of it.
            let before = created.lock().unwrap().len();
            testbed::wait_until("some records", || created.lock().unwrap().len() > before + 12);
            server.program.kill().unwrap();
            server.program.wait().unwrap();
            ended.store(true, Ordering::Relaxed);
        });
    }
    let server = Server::with(data.path(), &variables);
    let ids = |path: &str| -> BTreeSet<String> {
        let list = server.get(path).json();
        list.as_array().unwrap().iter().map(|record| record["id"].as_str().unwrap().to_owned()).collect()
    };
    let (created, deleted, asked) =
        (created.into_inner().unwrap(), deleted.into_inner().unwrap(), asked.into_inner().unwrap());
    let (live, gone) = (ids("/v3/images"), ids("/v3/deleted/images"));
    assert!(live.is_disjoint(&gone));
    let lost: Vec<_> = created.iter().filter(|id| !live.contains(*id) && !gone.contains(*id)).collect();
    assert!(lost.is_empty(), "{lost:?}");
    assert!(deleted.is_subset(&gone), "an answered deletion is lost");
    assert!(gone.is_subset(&asked), "a deletion that nobody asked for");
    // Each record that was not deleted still has its objects, and each deleted one those that were moved.
    for (path, ids) in [("/v3/images", &live), ("/v3/deleted/images", &gone)] {
        for record in server.get(path).json().as_array().unwrap() {
            let link = record["link"]["path"].as_str().unwrap().strip_prefix("s3://").unwrap();
            let file = store.join(link);
            let manifest: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
            for artifact in manifest["artifacts"].as_array().unwrap() {
                let path = artifact["link"]["path"].as_str().unwrap().strip_prefix("s3://").unwrap();
                assert!(store.join(path).exists(), "{path} of {record}");
            }
        }
        assert!(!ids.is_empty(), "{path}");
    }
    // No copy is left without a record.
    let names: BTreeSet<_> = server
        .get("/v3/deleted/images")
        .json()
        .as_array()
        .unwrap()
        .iter()
        .map(|record| record["name"].as_str().unwrap().to_owned())
        .collect();
    let copies = || -> Vec<String> {
        let entries = std::fs::read_dir(store.join("b/deleted")).unwrap();
        let names_there = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names_there.filter(|name| !names.contains(name)).collect()
    };
    let limit = Duration::from_mins(4);
    testbed::wait_within(limit, "copies without a record to be removed", || copies().is_empty());
}

#[test]
fn jobs_on_kubernetes_outlive_kills_without_an_orphan() {
    let mut site = Site::start();
    let job = json!({
        "artifact_id": site.image("x86_64"), "public_key_id": site.key(), "job_type": "customize",
        "image_root_archive_name": "n",
    });
    let sets: [Mutex<BTreeSet<String>>; 5] = Default::default();
    let [created, kept, ended, asked, deleted] = &sets;
    for _ in 0..kills() {
        let address = site.server().address;
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for worker in 0..3 {
                let (job, is_over) = (&job, &is_over);
                scope.spawn(move || {
                    let send = |method: &str, path: &str, body: &Value| {
                        try_ask(address, method, path, "content-type: application/json\r\n", body.to_string())
                    };
                    while !is_over.load(Ordering::Relaxed) {
                        let Ok(answer) = send("POST", "/v3/jobs", job) else { break };
                        let (id, path) = (answer.id(), format!("/v3/jobs/{}", answer.id()));
                        created.lock().unwrap().insert(id.clone());
                        if worker == 0 {
                            let Ok(answer) = send("PATCH", &path, &json!({"status": "success"})) else { break };
                            assert_eq!(answer.status, 200, "{answer:?}");
                            ended.lock().unwrap().insert(id);
                        } else if worker == 1 {
                            asked.lock().unwrap().insert(id.clone());
                            let Ok(answer) = send("DELETE", &path, &json!({})) else { break };
                            assert_eq!(answer.status, 204, "{answer:?}");
                            deleted.lock().unwrap().insert(id);
                        } else {
                            kept.lock().unwrap().insert(id);
                        }
                    }
                });
            }
            let before = created.lock().unwrap().len();
            testbed::wait_until("some jobs", || created.lock().unwrap().len() > before + 6);
            site.kill();
            is_over.store(true, Ordering::Relaxed);
        });
        site.restart(&[]);
    }
    let [created, kept, ended, asked, deleted] = sets.map(|set| set.into_inner().unwrap());
    let jobs = site.server().get("/v3/jobs").good();
    let live: BTreeSet<String> =
        jobs.as_array().unwrap().iter().map(|job| job["id"].as_str().unwrap().to_owned()).collect();
    let lost: Vec<_> = created.difference(&live).filter(|id| !asked.contains(*id)).collect();
    assert!(lost.is_empty() && live.is_disjoint(&deleted), "{lost:?}");
    for id in &ended {
        assert_eq!(site.status(&json!({ "id": id })), "success");
    }
    // Remove the remains of starts and deletions, and everything that ended jobs still hold.
    testbed::wait_within(Duration::from_mins(4), "orphans to be removed", || {
        let names = site.cluster.names();
        let is_known = |name: &String| live.iter().any(|id| name.contains(id.as_str()));
        let is_held =
            |name: &String| name.starts_with("services/") && ended.iter().any(|id| name.contains(id.as_str()));
        names.iter().all(|name| is_known(name) && !is_held(name))
    });
    // A job that was only started has all that it was started with, and its pod.
    let names = site.cluster.names();
    for id in &kept {
        let own: Vec<_> = names.iter().filter(|name| name.contains(id.as_str())).collect();
        assert_eq!(own.len(), 6, "{id}: {own:?}");
    }
}

#[test]
fn files_of_upstream_are_imported_and_written() {
    let data = tempfile::tempdir().unwrap();
    let store = format!("file://{}", data.path().join("store").display());
    let variables = [("S3_ENDPOINT", store.as_str())];
    let id = |n: u32| format!("46a2731e-a1d0-4f98-ba92-{n:012}");
    let images = json!([
        {"id": id(1), "name": "old", "created": "2025-01-01T00:00:00Z", "unknown": 1},
        {"id": id(2), "name": "torn", "arch": null},
        {"id": id(3), "name": "new", "created": "2026-01-31T09:15:03.207576", "metadata": {"a": "b"}},
        {"id": id(1), "name": "second", "created": "2026-01-31T09:15:03"},
    ]);
    let file = data.path().join("v2.1_images.json");
    std::fs::write(&file, images.to_string()).unwrap();
    std::fs::write(data.path().join("v2_public_keys.json"), "[{\"id\": \"x").unwrap();
    std::fs::write(data.path().join("v2.2_recipes.json"), "").unwrap();
    let server = Server::with(data.path(), &variables);
    let listed = server.get("/images").json();
    let names: Vec<_> = listed.as_array().unwrap().iter().map(|image| image["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["old", "new"]);
    assert_eq!((&listed[0]["created"], &listed[0]["arch"]), (&json!("2025-01-01T00:00:00+00:00"), &json!("x86_64")));
    let log = std::fs::read_to_string(data.path().join("log")).unwrap();
    for file in ["v2.1_images.json", "v2_public_keys.json", "v2.2_recipes.json"] {
        assert!(log.lines().any(|line| line.contains("set aside") && line.contains(file)), "{file}: {log}");
    }
    assert!(log.lines().any(|line| line.contains("set aside") && line.contains(&id(1))), "{log}");
    let third = server.post("/images", &json!({"name": "later"})).id();
    drop(server);

    // The same file is not imported again; one that has replaced it is.
    let server = Server::with(data.path(), &variables);
    assert_eq!(server.get(&format!("/images/{third}")).status, 200);
    drop(server);
    std::fs::write(&file, json!([{"id": id(4), "name": "restored", "created": "2026-01-31T09:15:03"}]).to_string())
        .unwrap();
    let server = Server::with(data.path(), &variables);
    assert_eq!(server.get("/images").json().as_array().unwrap().len(), 1);
    server.post("/images", &json!({"name": "ä"}));
    drop(server);

    let mut export = std::process::Command::new(env!("CARGO_BIN_EXE_ims"));
    testbed::succeed(export.arg("export").arg(data.path()).env("IMS_DATA_DIR", data.path()));
    let written = std::fs::read_to_string(&file).unwrap();
    // Without the right --data the export would write empty files.
    let (empty, other) = (data.path().join("empty"), data.path().join("other"));
    std::fs::create_dir(&other).unwrap();
    drop(Server::with(&other, &variables));
    for from in [&empty, &other] {
        let mut export = std::process::Command::new(env!("CARGO_BIN_EXE_ims"));
        let refused = export.arg("export").arg(data.path()).env("IMS_DATA_DIR", from).output().unwrap();
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        assert!(String::from_utf8_lossy(&refused.stderr).contains("--data"), "{refused:?}");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), written);
    }
    assert!(!empty.exists());
    assert!(
        written.starts_with(
            "[{\"name\": \"restored\", \"link\": null, \"arch\": \"x86_64\", \"metadata\": {}, \"id\": \"46a2731e-"
        ),
        "{written}"
    );
    assert!(written.contains("\"name\": \"\\u00e4\""), "{written}");
    let server = Server::with(data.path(), &variables);
    assert_eq!(server.get("/images").json().as_array().unwrap().len(), 2, "an export is not imported");
}

#[test]
fn a_term_signal_lets_requests_be_answered() {
    use std::io::{Read, Write};
    let mut server = Server::start();
    let mut connection = std::net::TcpStream::connect(server.address).unwrap();
    let body = json!({"name": "n"}).to_string();
    let head = format!(
        "POST /images HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    connection.write_all((head + &body[..3]).as_bytes()).unwrap();
    let pid = server.program.id().to_string();
    // The service has read the beginning once it answers another request.
    assert_eq!(server.get("/healthz/live").status, 200);
    testbed::succeed(std::process::Command::new("kill").args(["-TERM", &pid]));
    testbed::wait_until("the service to stop listening", || std::net::TcpStream::connect(server.address).is_err());
    connection.write_all(&body.as_bytes()[3..]).unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    assert!(server.program.wait().unwrap().success());
}
