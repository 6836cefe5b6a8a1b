//! Links, and what becomes of objects when records are deleted and undeleted, on a real S3 server.

use serde_json::{Value, json};
use tempfile::TempDir;
use testbed::s3_server::{Bucket, Closed, Gate};

use crate::server::Server;

const ROOTFS: &str = "application/vnd.cray.image.rootfs.squashfs";

struct Stored {
    server: Server,
    bucket: Bucket,
    _data: TempDir,
}

impl Stored {
    fn start() -> Self {
        Self::behind(|bucket| bucket.endpoint.clone())
    }

    /// A service whose requests to the store go through a proxy.
    fn behind(endpoint: impl FnOnce(&Bucket) -> String) -> Self {
        let data = tempfile::tempdir().unwrap();
        let bucket = Bucket::new();
        let endpoint = endpoint(&bucket);
        let server = Server::with(
            data.path(),
            &[
                ("S3_ENDPOINT", &endpoint),
                ("S3_ACCESS_KEY", "access"),
                ("S3_SECRET_KEY", "secret"),
                ("S3_BOOT_IMAGES_BUCKET", &bucket.name),
                ("MAX_IMAGE_MANIFEST_SIZE_BYTES", "4096"),
            ],
        );
        Self { server, bucket, _data: data }
    }

    fn link(&self, key: &str) -> Value {
        json!({ "path": format!("s3://{}/{key}", self.bucket.name), "etag": "", "type": "s3" })
    }

    /// Puts an image of two artifacts; returns the link of its manifest.
    fn image(&self, id: &str) -> Value {
        self.bucket.put(&format!("{id}/rootfs"), b"rootfs");
        self.bucket.put(&format!("{id}/kernel"), b"kernel");
        let entry =
            |name: &str, kind: &str| json!({ "link": self.link(&format!("{id}/{name}")), "md5": name, "type": kind });
        let kernel = entry("kernel", "application/vnd.cray.image.kernel");
        // One object is listed twice.
        let artifacts = [entry("rootfs", ROOTFS), kernel.clone(), kernel];
        let manifest = json!({ "version": "1.0", "created": "x", "artifacts": artifacts });
        self.bucket.put(&format!("{id}/manifest.json"), manifest.to_string().as_bytes());
        self.link(&format!("{id}/manifest.json"))
    }

    fn keys(&self) -> Vec<String> {
        let mut keys = self.bucket.keys();
        keys.sort();
        keys
    }
}

#[test]
fn an_image_is_moved_with_its_objects_and_back() {
    let stored = Stored::start();
    let (server, bucket) = (&stored.server, &stored.bucket);
    let link = stored.image("a");
    let before = stored.keys();
    let id = server.post("/v3/images", &json!({"name": "i", "link": link})).id();
    assert_eq!(server.delete(&format!("/v3/images/{id}")).status, 204);
    let own = format!("deleted/{id}/deleted_manifest.json");
    let mut moved: Vec<_> = before.iter().map(|key| format!("deleted/{key}")).chain([own.clone()]).collect();
    moved.sort();
    assert_eq!(stored.keys(), moved);
    let deleted = server.get(&format!("/v3/deleted/images/{id}")).good();
    assert_eq!(deleted["link"], stored.link(&own));
    let manifest: Value = serde_json::from_slice(&bucket.get(&own).body).unwrap();
    assert_eq!(manifest["artifacts"].as_array().unwrap().len(), 4);
    assert_eq!(manifest["artifacts"][3]["type"], "application/vnd.cray.image.manifest");

    assert_eq!(server.undelete(&format!("/v3/deleted/images/{id}")).status, 204);
    assert_eq!(stored.keys(), before);
    let back = server.get(&format!("/v3/images/{id}")).good();
    assert_eq!(back["link"]["path"], link["path"]);

    // All or nothing: one artifact is missing.
    assert_eq!(server.delete("/v3/images").status, 204);
    bucket.ask("DELETE", "deleted/a/kernel", b"");
    let refused = server.undelete(&format!("/v3/deleted/images/{id}"));
    assert_eq!(refused.status, 422, "{refused:?}");
    assert!(stored.keys().iter().all(|key| key.starts_with("deleted/")), "{:?}", stored.keys());
    assert_eq!(server.get(&format!("/v3/deleted/images/{id}")).status, 200);
    bucket.put("deleted/a/kernel", b"kernel");
    assert_eq!(server.undelete("/v3/deleted/images").status, 204);
    assert_eq!(stored.keys(), before);

    assert_eq!(server.delete(&format!("/v3/images/{id}")).status, 204);
    assert_eq!(server.delete(&format!("/v3/deleted/images/{id}")).status, 204);
    assert_eq!(stored.keys(), [""; 0]);
}

#[test]
fn deletions_for_good_take_objects_by_cascade() {
    let stored = Stored::start();
    let server = &stored.server;
    let image = |id: &str| server.post("/images", &json!({"name": "i", "link": stored.image(id)})).id();
    let id = image("a");
    let all = stored.keys();
    assert_eq!(server.delete(&format!("/images/{id}?cascade=False")).status, 204);
    assert_eq!(stored.keys(), all);
    let id = image("a");
    assert_eq!(server.delete(&format!("/v2/images/{id}?cascade=True")).status, 204);
    assert_eq!(stored.keys(), [""; 0]);
    // Without the manifest nothing says where the objects are: the record stays.
    let id = image("b");
    stored.bucket.ask("DELETE", "b/manifest.json", b"");
    assert_eq!(server.delete(&format!("/images/{id}")).status, 500);
    assert_eq!(server.delete("/images").status, 500);
    assert_eq!(server.get(&format!("/images/{id}")).status, 200);
    assert_eq!(server.delete("/images?cascade=no").status, 204);
    assert_eq!(server.get("/images").body, "[]\n");

    stored.bucket.put("r", b"recipe");
    let recipe =
        json!({"name": "r", "recipe_type": "kiwi-ng", "linux_distribution": "sles15", "link": stored.link("r")});
    let id = server.post("/recipes", &recipe).id();
    assert_eq!(server.delete(&format!("/v3/recipes/{id}")).status, 204);
    let deleted = server.get(&format!("/v3/deleted/recipes/{id}")).good();
    assert_eq!(deleted["link"]["path"], stored.link("deleted/r")["path"]);
    assert!(!deleted["link"]["etag"].as_str().unwrap().is_empty());
    assert_eq!(server.undelete("/v3/deleted/recipes").status, 204);
    assert_eq!(server.get(&format!("/recipes/{id}")).good()["link"]["path"], stored.link("r")["path"]);
    assert_eq!(server.delete(&format!("/recipes/{id}")).status, 204);
    assert!(!stored.keys().contains(&"r".to_owned()));
}

#[test]
fn links_are_checked_against_the_store() {
    let stored = Stored::start();
    let (server, bucket) = (&stored.server, &stored.bucket);
    let post = |link: &Value| server.post("/images", &json!({"name": "i", "link": link})).status;
    let manifest = |name: &str, text: &str| {
        bucket.put(name, text.as_bytes());
        stored.link(name)
    };
    bucket.put("x", b"x");
    let entry = json!({ "link": stored.link("x"), "type": ROOTFS, "md5": "" });
    let of = |artifacts: Value| json!({ "version": "1.0", "artifacts": artifacts }).to_string();
    for (name, text, expected) in [
        ("empty", "{}".to_owned(), 201),
        ("good", of(json!([entry])), 201),
        ("no-version", json!({"artifacts": [entry]}).to_string(), 422),
        ("no-list", json!({"version": "1.0"}).to_string(), 422),
        ("no-rootfs", of(json!([{"link": stored.link("x"), "type": "t"}])), 400),
        ("two", of(json!([entry, entry])), 400),
        ("missing", of(json!([{"link": stored.link("y"), "type": ROOTFS}])), 422),
        ("no-type", of(json!([{"link": stored.link("x")}])), 422),
        ("null", of(json!([{"link": null, "type": ROOTFS}])), 422),
        ("not-json", "{".into(), 422),
        ("large", " ".repeat(4096), 400),
    ] {
        assert_eq!(post(&manifest(name, &text)), expected, "{name}");
    }
    assert_eq!(post(&stored.link("nothing")), 422);
    assert_eq!(post(&stored.link("good")), 422, "taken");
    assert_eq!(post(&json!({"path": "s3://no-such-bucket/k", "type": "s3"})), 422);
    assert_eq!(post(&json!({"path": "k", "type": "s3"})), 422);
    assert_eq!(post(&json!({"path": "s3://b/k", "type": "S3"})), 422);

    let id = server.post("/images", &json!({"name": "i"})).id();
    let patch = |link: &Value| server.patch(&format!("/v3/images/{id}"), &json!({ "link": link })).status;
    assert_eq!(patch(&stored.link("not-json")), 422);
    assert_eq!(server.get(&format!("/images/{id}")).json()["link"], Value::Null, "a refused link is not set");
    let link = manifest("further", &of(json!([entry])));
    assert_eq!(patch(&link), 200);
    assert_eq!(patch(&link), 200, "the same again");
    assert_eq!(patch(&json!({"path": link["path"], "type": "s3"})), 200, "without the empty etag");
    assert_eq!(patch(&stored.link("good")), 409);
    // Nothing of a patch is applied when one field is refused.
    let both = server.patch(&format!("/images/{id}"), &json!({"arch": "aarch64", "link": stored.link("good")}));
    assert_eq!(both.status, 409);
    assert_eq!(server.get(&format!("/images/{id}")).json()["arch"], "x86_64");
}

#[test]
fn user_metadata_survives_the_moves() {
    let stored = Stored::start();
    let server = &stored.server;
    let link = stored.image("a");
    let large = vec![7; 9 << 20];
    stored.bucket.put_of_job("a/rootfs", &large, "job");
    let id = server.post("/images", &json!({"name": "i", "link": link})).id();
    assert_eq!(server.delete(&format!("/v3/images/{id}")).status, 204);
    assert_eq!(server.undelete(&format!("/v3/deleted/images/{id}")).status, 204);
    let back = stored.bucket.get("a/rootfs");
    assert_eq!(back.header("x-amz-meta-x-shasta-ims-job-id"), Some("job"));
    assert!(back.body == large);
}

#[test]
fn a_store_that_does_not_answer_stops_no_other_request() {
    let stored = Stored::behind(|_| {
        let silent = testbed::listen(|connection| {
            let _ = std::io::Read::read_to_end(&mut &connection, &mut Vec::new());
        });
        format!("http://{silent}")
    });
    let address = stored.server.address;
    let link = stored.link("x");
    let body = json!({"name": "i", "link": link}).to_string();
    let waiting: Vec<_> = (0..20)
        .map(|_| {
            let body = body.clone();
            std::thread::spawn(move || {
                let mut connection = std::net::TcpStream::connect(address).unwrap();
                let head = "POST /images HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
                let request = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
                std::io::Write::write_all(&mut connection, request.as_bytes()).unwrap();
                connection
            })
        })
        .collect();
    let _open: Vec<_> = waiting.into_iter().map(|thread| thread.join().unwrap()).collect();
    let began = std::time::Instant::now();
    for _ in 0..20 {
        assert_eq!(stored.server.get("/healthz/live").status, 200);
        assert_eq!(stored.server.get("/images").status, 200);
        assert_eq!(stored.server.post("/images", &json!({"name": "n"})).status, 201);
    }
    assert!(began.elapsed() < std::time::Duration::from_secs(20), "{:?}", began.elapsed());
}

#[test]
fn a_refused_move_leaves_the_record_and_its_objects() {
    // The proxy answers each deletion with an error in the body, and lets everything else pass.
    let stored = Stored::behind(|_| Gate::start(usize::MAX, Closed::Undeleted).endpoint);
    let link = stored.image("a");
    let id = stored.server.post("/images", &json!({"name": "i", "link": link})).id();
    assert_eq!(stored.server.delete(&format!("/v3/images/{id}")).status, 204);
    let keys = stored.keys();
    assert!(keys.contains(&format!("deleted/{id}/deleted_manifest.json")), "{keys:?}");
    assert!(
        ["deleted/a/rootfs", "deleted/a/kernel", "deleted/a/manifest.json"]
            .iter()
            .all(|key| keys.contains(&(*key).into()))
    );
}

/// An S3 server of one object of 6 GiB that belongs to `STS`; keeps the heads of requests.
fn sts_server() -> (String, std::sync::Arc<std::sync::Mutex<Vec<String>>>) {
    use std::io::{BufRead, BufReader, Read, Write};
    let heads = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let kept = heads.clone();
    let is_end = |head: &String| head.starts_with("POST /b/deleted/k?uploadId=");
    let address = testbed::listen(move |mut connection| {
        let mut reader = BufReader::new(connection.try_clone().unwrap());
        let lines: Vec<_> = reader.by_ref().lines().map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
        let Some(request) = lines.first() else { return };
        let length = lines.iter().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
        std::io::copy(&mut reader.take(length.unwrap_or(0)), &mut std::io::sink()).unwrap();
        kept.lock().unwrap().push(lines.join("\n"));
        let body = match request.split(' ').next().unwrap() {
            "HEAD" if request.contains("/deleted/") && !kept.lock().unwrap().iter().any(is_end) => {
                let _ = write!(connection, "HTTP/1.1 404 Not Found\r\nconnection: close\r\n\r\n");
                return;
            }
            "HEAD" => {
                let headers = "content-length: 6442450944\r\netag: \"e\"\r\nx-amz-meta-md5sum: m";
                let _ = write!(connection, "HTTP/1.1 200 OK\r\n{headers}\r\nconnection: close\r\n\r\n");
                return;
            }
            "GET" => "<AccessControlPolicy><Owner><ID>STS</ID></Owner></AccessControlPolicy>",
            "PUT" => "<CopyPartResult><ETag>\"p\"</ETag></CopyPartResult>",
            "POST" if request.contains("uploads=") => {
                "<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>"
            }
            "POST" => "<CompleteMultipartUploadResult><ETag>\"e\"</ETag></CompleteMultipartUploadResult>",
            _ => "",
        };
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
        let _ = connection.write_all((head + body).as_bytes());
    });
    (format!("http://{address}"), heads)
}

#[test]
fn large_objects_are_copied_in_parts_with_metadata_and_the_keys_of_their_owner() {
    let data = tempfile::tempdir().unwrap();
    let (endpoint, heads) = sts_server();
    let keys = [
        ("S3_ENDPOINT", endpoint.as_str()),
        ("S3_ACCESS_KEY", "own"),
        ("S3_SECRET_KEY", "secret"),
        ("S3_STS_ACCESS_KEY", "other"),
        ("S3_STS_SECRET_KEY", "secret"),
    ];
    let server = Server::with(data.path(), &keys);
    let link = json!({"path": "s3://b/k", "type": "s3"});
    let recipe = json!({"name": "r", "recipe_type": "kiwi-ng", "linux_distribution": "sles15", "link": link});
    let id = server.post("/recipes", &recipe).id();
    assert_eq!(server.delete(&format!("/v3/recipes/{id}")).status, 204);
    let heads = heads.lock().unwrap();
    let with = |start: &str| heads.iter().filter(|head| head.starts_with(start)).collect::<Vec<_>>();
    let parts = with("PUT /b/deleted/k?partNumber=");
    assert_eq!(parts.len(), 6, "{heads:#?}");
    let ranges = ["bytes=0-1073741823", "bytes=5368709120-6442450943"];
    assert!(ranges.iter().all(|range| parts.iter().any(|part| part.contains(range))), "{parts:#?}");
    assert!(parts.iter().all(|part| part.contains("Credential=other/") && part.contains("x-amz-copy-source: /b/k")));
    let create = with("POST /b/deleted/k?uploads=");
    assert!(create.len() == 1 && create[0].contains("x-amz-meta-md5sum: m"), "{create:#?}");
    assert!(with("DELETE /b/k").iter().all(|head| head.contains("Credential=own/")));
    assert_eq!(with("DELETE /b/k").len(), 1);
}
