//! Bytes of answers, as recorded from upstream.

use serde_json::json;

use crate::server::{Server, ask};

/// Replaces what differs between two runs: IDs and times.
fn steady(text: &str, id: &str, created: &str) -> String {
    text.replace(id, "ID").replace(created, "TIME")
}

#[test]
fn records_are_written_as_by_upstream() {
    let server = Server::start();
    let answer = server.post("/public-keys", &json!({"name": "ä\u{1f600}", "public_key": "ssh-ed25519 A\n"}));
    let record = answer.good();
    let (id, created) = (record["id"].as_str().unwrap(), record["created"].as_str().unwrap());
    assert_eq!(
        steady(&answer.body, id, created),
        "{\"name\": \"\\u00e4\\ud83d\\ude00\", \"public_key\": \"ssh-ed25519 A\\n\", \"id\": \"ID\", \"created\": \"TIME\"}\n"
    );
    assert!(!created.contains(['Z', '+']) && created.len() >= 19, "{created}");
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!(
        steady(&server.get(&format!("/public-keys/{id}")).body, id, created),
        "{\"created\":\"TIME\",\"id\":\"ID\",\"name\":\"\\u00e4\\ud83d\\ude00\",\"public_key\":\"ssh-ed25519 A\\n\"}\n"
    );

    let answer = server.post(
        "/v3/recipes",
        &json!({
            "name": "r", "recipe_type": "kiwi-ng", "linux_distribution": "sles15", "require_dkms": "no",
            "template_dictionary": [{"key": "k", "value": ""}],
        }),
    );
    let record = answer.good();
    let (id, created) = (record["id"].as_str().unwrap(), record["created"].as_str().unwrap());
    assert_eq!(
        steady(&answer.body, id, created),
        "{\"name\": \"r\", \"link\": null, \"recipe_type\": \"kiwi-ng\", \"linux_distribution\": \"sles15\", \
         \"template_dictionary\": [{\"key\": \"k\", \"value\": \"\"}], \"require_dkms\": false, \"arch\": \"x86_64\", \
         \"id\": \"ID\", \"created\": \"TIME\"}\n"
    );

    let answer = server.post("/v2/images", &json!({"name": "i", "metadata": {"key": "a", "value": "b"}}));
    let record = answer.good();
    let (id, created) = (record["id"].as_str().unwrap(), record["created"].as_str().unwrap());
    assert_eq!(
        steady(&answer.body, id, created),
        "{\"name\": \"i\", \"link\": null, \"arch\": \"x86_64\", \"metadata\": {\"a\": \"b\"}, \"id\": \"ID\", \
         \"created\": \"TIME\"}\n"
    );
    assert_eq!(
        steady(&server.get("/images").body, id, created),
        "[{\"arch\":\"x86_64\",\"created\":\"TIME\",\"id\":\"ID\",\"link\":null,\"metadata\":{\"a\":\"b\"},\"name\":\"i\"}]\n"
    );
    let patched = server.patch(&format!("/images/{id}"), &json!({"metadata": {"operation": "remove", "key": "a"}}));
    assert_eq!(
        steady(&patched.body, id, created),
        "{\"arch\":\"x86_64\",\"created\":\"TIME\",\"id\":\"ID\",\"link\":null,\"metadata\":{},\"name\":\"i\"}\n"
    );
}

#[test]
fn answers_without_a_record_are_written_as_by_upstream() {
    let server = Server::start();
    assert_eq!(server.get("/healthz/live").body, "{}\n");
    assert_eq!(server.get("/version").body, "{\"version\": \"3.33.0\"}\n");
    let gone = server.delete("/v3/images");
    assert_eq!((gone.status, gone.body.as_str()), (204, ""));
    assert_eq!(gone.header("content-type"), Some("application/json"));
    assert_eq!(gone.header("content-length"), None);
    let filter = server.delete("/v3/jobs?status=x");
    assert!(filter.body.starts_with("{\"status\": 400, \"title\": \"the status is"), "{filter:?}");
    assert!(filter.json().get("detail").is_none());
    let missing = server.get("/v3/images/x");
    assert!(missing.body.starts_with("{\"status\": 404, \"title\": \"Not Found\", \"detail\": \""), "{missing:?}");
}

#[test]
fn lists_have_pages_filters_and_etags() {
    let server = Server::start();
    let ids: Vec<_> = (0..5).map(|n| server.post("/images", &json!({"name": format!("{}", n % 2)})).id()).collect();
    let whole = server.get("/images");
    let etag = whole.header("etag").unwrap().to_owned();
    let again = |etag: &str| ask(server.address, "GET", "/images", &format!("if-none-match: {etag}\r\n"), "");
    assert_eq!((again(&etag).status, again(&etag).body.as_str()), (304, ""));
    let mut seen = Vec::new();
    let mut path = "/images?limit=2&other=ignored".to_owned();
    loop {
        let page = server.get(&path);
        seen.extend(page.json().as_array().unwrap().iter().map(|image| image["id"].as_str().unwrap().to_owned()));
        let Some(link) = page.header("link") else { break };
        path = link.split(['<', '>']).nth(1).unwrap().to_owned();
    }
    assert_eq!(seen, ids);
    assert_eq!(server.get("/images?name=1").json().as_array().unwrap().len(), 2);
    server.post("/images", &json!({"name": "new"}));
    assert_eq!(again(&etag).status, 200);
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("ims_requests_total{target=\"images\",method=\"POST\",status=\"201\"} 6"), "{metrics}");
}

#[test]
fn requests_are_logged_in_one_line_each() {
    let data = tempfile::tempdir().unwrap();
    let store = format!("file://{}", data.path().join("store").display());
    let server = Server::with(data.path(), &[("S3_ENDPOINT", &store)]);
    server.post("/v3/images", &json!({"name": "n"}));
    server.get("/v3/images/x%0ax?a=b");
    let log = || std::fs::read_to_string(data.path().join("log")).unwrap();
    testbed::wait_until("the second line", || log().contains("a=b HTTP/1.1"));
    for line in ["\"POST /v3/images HTTP/1.1\" 201", "\"GET /v3/images/x%0ax?a=b HTTP/1.1\" 404"] {
        assert!(log().lines().any(|logged| logged.contains(line)), "{line}: {}", log());
    }
}

#[test]
fn hostile_bodies_and_paths_are_refused() {
    let server = Server::start();
    let deep = |open: &str, close: &str| open.repeat(100_000) + &close.repeat(100_000);
    let post =
        |body: &str| ask(server.address, "POST", "/v3/images", "content-type: application/json\r\n", body).status;
    assert_eq!(post(&deep("[", "]")), 400);
    assert_eq!(post(&deep("{\"a\":", "}")), 400);
    assert_eq!(post(&format!("{{\"name\":\"{}\"}}", "x".repeat(10 << 20))), 201);
    assert_eq!(post(&"x".repeat(17 << 20)), 413);
    assert_eq!(post("{\"name\":\"\\ud800\"}"), 400);
    assert_eq!(post("{\"name\":\"a\",\"name\":\"b\"}"), 201);
    for path in ["/v3/images/%", "/v3/images/%ff", "/v3/images/..", "/v3/images/%00", "/downloads/../../etc/passwd"] {
        assert!([403, 404].contains(&server.get(path).status), "{path}");
    }
    assert_eq!(server.get("/v3/images?%ff=%ff&limit=%31").status, 200);
}
