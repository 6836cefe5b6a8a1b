//! Every URL with every method, and the statuses that upstream's clients know.

use serde_json::{Value, json};

use crate::server::{Answer, Server, ask};

const NO_ID: &str = "46a2731e-a1d0-4f98-ba92-4f78c756bb12";

/// Keys of a problem, and its media type.
fn is_problem(answer: &Answer, status: u16, with_errors: bool) {
    assert_eq!(answer.status, status, "{answer:?}");
    assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{answer:?}");
    let problem = answer.json();
    assert_eq!(problem["status"], status);
    assert!(problem["title"].is_string() && problem["detail"].is_string(), "{answer:?}");
    assert_eq!(problem.get("errors").is_some(), with_errors, "{answer:?}");
    let order: Vec<_> = ["\"status\"", "\"title\"", "\"detail\""].iter().map(|key| answer.body.find(key)).collect();
    assert!(order.is_sorted() && !answer.body.ends_with('\n'), "{}", answer.body);
}

fn is_message(answer: &Answer, status: u16) {
    assert_eq!(answer.status, status, "{answer:?}");
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!(answer.json().as_object().unwrap().keys().collect::<Vec<_>>(), ["message"]);
}

/// Tables with a valid POST, and a body that each PATCH takes.
fn tables() -> Vec<(&'static str, Value, Option<Value>)> {
    vec![
        ("public-keys", json!({"name": "n", "public_key": "ssh-ed25519 A\n"}), None),
        (
            "recipes",
            json!({"name": "n", "recipe_type": "kiwi-ng", "linux_distribution": "sles15"}),
            Some(json!({"arch": "aarch64"})),
        ),
        ("images", json!({"name": "n"}), Some(json!({"arch": "aarch64"}))),
    ]
}

#[test]
fn private_key_is_refused_and_any_other_text_is_taken() {
    let server = Server::start();
    let private = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\n-----END OPENSSH PRIVATE KEY-----\n";
    for (key, status) in [(private, 422), ("k", 201), ("\n", 201), ("ssh-ed25519 A\nssh-ed25519 B\n", 201)] {
        let answer = server.post("/v3/public-keys", &json!({"name": "n", "public_key": key}));
        assert_eq!(answer.status, status, "{answer:?}");
        assert!(status == 201 || answer.body.contains("it is a private key; expected the public one"), "{answer:?}");
    }
    assert_eq!(server.get("/v3/public-keys").json().as_array().unwrap().len(), 3);
}

#[test]
fn each_url_has_its_methods_and_no_others() {
    let server = Server::start();
    let deleted = ["/v3/deleted/public-keys", "/v3/deleted/recipes", "/v3/deleted/images"];
    let mut urls = vec![
        ("/v3/remote-build-nodes".to_owned(), "GET POST DELETE"),
        ("/v3/remote-build-nodes/x".into(), "GET DELETE"),
        ("/v3/remote-build-nodes/status".into(), "GET"),
        ("/v3/remote-build-nodes/status/x".into(), "GET"),
    ];
    for prefix in ["", "/v2", "/v3"] {
        for table in ["public-keys", "recipes", "images", "jobs"] {
            urls.push((format!("{prefix}/{table}"), "GET POST DELETE"));
            let one = if table == "public-keys" { "GET DELETE" } else { "GET PATCH DELETE" };
            urls.push((format!("{prefix}/{table}/{NO_ID}"), one));
        }
    }
    for url in deleted {
        urls.push((url.into(), "GET PATCH DELETE"));
        urls.push((format!("{url}/{NO_ID}"), "GET PATCH DELETE"));
    }
    for (url, methods) in &urls {
        let allow = ask(server.address, "OPTIONS", url, "", "");
        assert_eq!(allow.status, 200, "{url}");
        let allowed = allow.header("allow").unwrap();
        for method in ["GET", "POST", "PATCH", "DELETE", "PUT"] {
            let expected = methods.split(' ').any(|name| name == method);
            assert_eq!(allowed.split(", ").any(|name| name == method), expected, "{method} {url}: {allowed}");
            if !expected {
                let answer = ask(server.address, method, url, "", "");
                assert_eq!((answer.status, answer.header("allow")), (405, Some(allowed)), "{method} {url}");
                assert_eq!(answer.header("content-type"), Some("application/json"));
                assert_eq!(answer.json()["status"], 405);
            }
        }
    }
    for url in ["/version", "/healthz/live", "/healthz/ready"] {
        assert_eq!(server.get(url).status, 200);
        is_message(&ask(server.address, "POST", url, "", ""), 405);
    }
    for url in ["/", "/v3", "/v3/images/", "/v4/images", "/deleted/images", "/v2/deleted/images", "/remote-build-nodes"]
    {
        is_problem(&server.get(url), 404, false);
    }
    assert_eq!(server.get("//v3/images").body, "[]\n");
}

#[test]
fn records_are_created_read_changed_and_deleted() {
    let server = Server::start();
    for (table, new, patch) in tables() {
        for prefix in ["", "/v2", "/v3"] {
            let all = format!("{prefix}/{table}");
            let answer = server.post(&all, &new);
            assert_eq!(answer.status, 201, "{answer:?}");
            let one = format!("{all}/{}", answer.id());
            assert_eq!(server.get(&one).good()["id"], answer.json()["id"]);
            assert_eq!(server.get(&all).json().as_array().unwrap().len(), 1);
            let head = ask(server.address, "HEAD", &all, "", "");
            assert_eq!((head.status, head.body.as_str()), (200, ""));
            if let Some(patch) = &patch {
                assert_eq!(server.patch(&one, patch).good()["arch"], "aarch64");
                is_problem(&server.patch(&one, &json!({"name": "other"})), 422, true);
                is_problem(&server.patch(&one, &json!({})), 400, false);
            }
            assert_eq!(server.delete(&one).status, 204);
            is_problem(&server.get(&one), 404, false);
            is_problem(&server.delete(&one), 404, false);
            let deleted = format!("/v3/deleted/{table}");
            let kept = server.get(&deleted).json().as_array().unwrap().len();
            assert_eq!(kept, usize::from(prefix == "/v3"), "{all}");
        }
        let deleted = format!("/v3/deleted/{table}");
        let one = format!("{deleted}/{}", server.get(&deleted).json()[0]["id"].as_str().unwrap());
        assert!(server.get(&one).good()["deleted"].is_string());
        is_problem(&server.patch(&one, &json!({"operation": "x"})), 422, true);
        is_problem(&server.patch(&deleted, &json!({})), 400, false);
        let answer = server.undelete(&one);
        assert_eq!((answer.status, answer.body.as_str()), (204, ""));
        is_problem(&server.undelete(&one), 404, false);
        assert_eq!(server.get(&format!("/{table}")).json().as_array().unwrap().len(), 1);
        assert_eq!(server.delete(&format!("/v3/{table}")).status, 204);
        assert_eq!(server.undelete(&deleted).status, 204);
        assert_eq!(server.undelete(&deleted).status, 204, "nothing is there");
        assert_eq!(server.delete(&format!("/v3/{table}")).status, 204);
        assert_eq!(server.delete(&one).status, 204);
        assert_eq!(server.delete(&deleted).status, 204);
        assert_eq!(server.get(&deleted).body, "[]\n");
        assert_eq!(server.post(&format!("/{table}"), &new).status, 201);
        assert_eq!(server.delete(&format!("/v2/{table}")).status, 204);
        assert_eq!(server.get(&format!("/v3/{table}")).body, "[]\n");
    }
}

#[test]
fn bodies_are_checked_in_upstreams_order() {
    let server = Server::start();
    for (table, new, patch) in tables() {
        let all = format!("/v3/{table}");
        let post =
            |kind: &str, body: &str| ask(server.address, "POST", &all, &format!("content-type: {kind}\r\n"), body);
        is_message(&post("text/plain", &new.to_string()), 415);
        is_message(&post("application/json", "{"), 400);
        is_message(&post("application/json", ""), 400);
        assert_eq!(post("application/json; charset=utf-8", &new.to_string()).status, 201);
        assert_eq!(post("application/merge-patch+json", &new.to_string()).status, 201);
        for empty in ["{}", "[]", "null", "0", "false", "\"\""] {
            is_problem(&post("application/json", empty), 400, false);
        }
        for other in ["[1]", "7", "true", "\"x\""] {
            let answer = post("application/json", other);
            is_problem(&answer, 422, true);
            assert!(answer.json()["errors"]["_schema"][0].is_string(), "{answer:?}");
        }
        let mut unknown = new.clone();
        unknown["id"] = json!(NO_ID);
        assert!(server.post(&all, &unknown).json()["errors"]["id"][0].is_string());
        if patch.is_some() {
            let one = format!("{all}/{NO_ID}");
            is_problem(&ask(server.address, "PATCH", &one, "content-type: text/plain\r\n", "{"), 404, false);
        }
    }
    is_problem(&server.get(&format!("/v3/images/{}", NO_ID.to_uppercase())), 404, false);
}

#[test]
fn nodes_are_kept_once() {
    let server = Server::start();
    let all = "/v3/remote-build-nodes";
    let node = json!({"xname": "x3000c0s1b0n0"});
    for _ in 0..2 {
        let answer = server.post(all, &node);
        assert_eq!((answer.status, answer.body.as_str()), (201, "{\"xname\": \"x3000c0s1b0n0\"}\n"));
    }
    assert_eq!(server.get(all).body, "[{\"xname\":\"x3000c0s1b0n0\"}]\n");
    assert_eq!(server.get(&format!("{all}/x3000c0s1b0n0")).status, 200);
    assert_eq!(server.get(&format!("{all}/status")).json()[0]["sshStatus"], "Unknown");
    let status = server.get(&format!("{all}/status/x3000c0s1b0n0"));
    assert_eq!(
        status.body,
        "{\"ableToRunJobs\":false,\"nodeArch\":\"Unknown\",\"numCurrentJobs\":-1,\"podmanStatus\":\"Unknown\",\
         \"sshStatus\":\"Unknown\",\"xname\":\"x3000c0s1b0n0\"}\n"
    );
    is_problem(&server.get(&format!("{all}/status/other")), 404, false);
    is_problem(&server.post(all, &json!({"xname": ""})), 422, true);
    assert_eq!(server.delete(&format!("{all}/x3000c0s1b0n0")).status, 204);
    is_problem(&server.delete(&format!("{all}/x3000c0s1b0n0")), 404, false);
    assert_eq!(server.delete(all).status, 204);
}

#[test]
fn every_setting_is_documented() {
    use clap::Args;
    let page = std::fs::read_to_string(testbed::repository().join("docs/SERVICE.md")).unwrap();
    let command = ims_service::settings::Settings::augment_args(clap::Command::new("serve"));
    for argument in command.get_arguments() {
        let variable = argument.get_env().unwrap_or_else(|| panic!("{} has no variable", argument.get_id()));
        assert!(page.contains(&format!("`{}`", variable.to_str().unwrap())), "{variable:?}");
    }
}

#[test]
fn the_openapi_document_in_docs_is_that_of_the_program() {
    let server = Server::start();
    let answer = server.get("/openapi.yaml");
    assert_eq!(answer.header("content-type"), Some("application/yaml"));
    let kept = std::fs::read_to_string(testbed::repository().join("docs/openapi.yaml")).unwrap();
    assert!(answer.body == kept, "docs/openapi.yaml is old: write it with 'ims openapi > docs/openapi.yaml'");
}

#[test]
fn secrets_of_urls_are_not_in_the_log() {
    let server = Server::start();
    for target in [
        "/v3/images?token=hidden&limit=7",
        "/v3/images?limit=7&X-Amz-Signature=hidden",
        "/v3/images?AWSAccessKeyId=hidden&Signature=hidden&limit=7",
        "/v3/images?%74oken=hidden&limit=7",
        "/v3/images?limit=7&url=https%3A%2F%2Fs3%2Fb%2Fk%3FX-Amz-Signature%3Dhidden",
        "/v3/images?limit=7&url=https%253A%252F%252Fs3%253FX-Amz-Signature%253Dhidden%25ff",
        "/v3/images?limit=7&url=https://me:hidden@s3/b",
        "/v3/images?limit=7&name=Bearer+hidden",
        "/v3/images?limit=7&password=%ffhidden",
        "/downloads/b/k?expires=7&signature=hidden",
        "/v3/images/x/password=hidden",
        "/v3/images/https:%2F%2Fme:hidden@s3?limit=7",
    ] {
        ask(server.address, "GET", target, "", "");
    }
    assert_eq!(ask(server.address, "GET", "http://me:hidden@host/v3/images?name=shown", "", "").status, 200);
    let log = server.log();
    assert!(!log.contains("hidden"), "{log}");
    assert_eq!(log.matches("=7").count(), 11, "{log}");
    assert!(log.contains("\"GET /v3/images?token=***&limit=7 HTTP/1.1\" 200"), "{log}");
    assert!(log.contains("?name=shown"), "{log}");
}
