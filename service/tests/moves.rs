//! Moves of objects by soft deletes and undeletes: several clients at once, and records that share keys.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::{Value, json};
use testbed::wait_until;

use crate::server::Server;

const ROOTFS: &str = "application/vnd.cray.image.rootfs.squashfs";

fn link(at: &str) -> Value {
    json!({"path": format!("s3://{at}"), "type": "s3", "etag": ""})
}

/// Writes an object of the store below `store`.
fn put(store: &Path, at: &str, content: &str) {
    let file = store.join(at);
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(file, content).unwrap();
}

fn content(store: &Path, at: &str) -> Option<String> {
    std::fs::read_to_string(store.join(at)).ok()
}

/// Writes the manifest `KEY/manifest.json` of the bucket `b`, which lists `artifacts`.
fn manifest(store: &Path, key: &str, artifacts: &[&str]) {
    let kinds = [ROOTFS].into_iter().chain(std::iter::repeat("application/vnd.cray.image.kernel"));
    let artifacts: Vec<_> =
        artifacts.iter().zip(kinds).map(|(at, kind)| json!({"link": link(at), "type": kind, "md5": "m"})).collect();
    let manifest = json!({"version": "1.0", "artifacts": artifacts});
    put(store, &format!("b/{key}/manifest.json"), &manifest.to_string());
}

fn register(server: &Server, key: &str) -> String {
    let image = json!({"name": key, "link": link(&format!("b/{key}/manifest.json"))});
    server.post("/v3/images", &image).id()
}

/// Registers an image whose rootfs has the content `rootfs`.
fn image(server: &Server, key: &str, rootfs: &str) -> String {
    put(&server.store(), &format!("b/{key}/rootfs"), rootfs);
    manifest(&server.store(), key, &[&format!("b/{key}/rootfs")]);
    register(server, key)
}

fn recipe(server: &Server, at: &str, content: &str) -> String {
    put(&server.store(), at, content);
    let recipe = json!({"name": "r", "recipe_type": "kiwi-ng", "linux_distribution": "sles15", "link": link(at)});
    server.post("/v3/recipes", &recipe).id()
}

/// Returns the files below `directory` with their modes' permissions.
fn files(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(&entry.path()));
        } else {
            found.push(entry.path().display().to_string());
        }
    }
    found.sort();
    found
}

#[test]
fn parallel_deletes_and_undeletes_lose_no_object() {
    let server = Server::start();
    let images: Vec<_> = (0..30)
        .map(|number| {
            let key = format!("i{number}");
            (image(&server, &key, &key), key)
        })
        .collect();
    std::thread::scope(|scope| {
        for client in 0..6 {
            let (server, images) = (&server, &images);
            scope.spawn(move || {
                for round in 0..4 {
                    for (id, _) in images {
                        let known = |status: u16| assert!([204, 404, 409].contains(&status), "{status}");
                        known(server.delete(&format!("/v3/images/{id}")).status);
                        known(server.undelete(&format!("/v3/deleted/images/{id}")).status);
                    }
                    if client == round {
                        // Records on which others work are left out, and the answer says so.
                        let status = server.undelete("/v3/deleted/images").status;
                        assert!([204, 500].contains(&status), "{status}");
                    }
                }
            });
        }
    });
    assert_eq!(server.undelete("/v3/deleted/images").status, 204);
    let store = server.store();
    for (id, key) in &images {
        let record = server.get(&format!("/v3/images/{id}")).good();
        assert_eq!(record["link"]["path"], format!("s3://b/{key}/manifest.json"));
        assert_eq!(content(&store, &format!("b/{key}/rootfs")).as_ref(), Some(key), "{key}");
    }
    assert_eq!(files(&store.join("b/deleted")), [""; 0]);
    assert_eq!(files(&store).len(), 60);
}

#[test]
fn parallel_recipes_and_deletes_leave_no_link_without_its_object() {
    let server = Server::start();
    let store = server.store();
    let mut kept = 0;
    for round in 0..15 {
        let shared = format!("b/i{round}/shared");
        put(&store, &format!("b/i{round}/rootfs"), "rootfs");
        put(&store, &shared, "shared");
        manifest(&store, &format!("i{round}"), &[&format!("b/i{round}/rootfs"), &shared]);
        let image = register(&server, &format!("i{round}"));
        let recipe =
            json!({"name": "r", "recipe_type": "kiwi-ng", "linux_distribution": "sles15", "link": link(&shared)});
        let posted = std::thread::scope(|scope| {
            let deleted = scope.spawn(|| server.delete(&format!("/v3/images/{image}")).status);
            let posted = server.post("/v3/recipes", &recipe).status;
            let deleted = deleted.join().unwrap();
            assert!([204, 409].contains(&deleted), "{deleted}");
            posted
        });
        assert!([201, 422].contains(&posted), "{posted}");
        let is_there = content(&store, &shared).is_some();
        assert!(posted == 422 || is_there, "round {round}: the recipe links to an object that was moved");
        kept += usize::from(posted == 201);
    }
    // One after the other, the first that comes has the object.
    assert_eq!(server.get("/v3/recipes").json().as_array().unwrap().len(), kept);
}

#[test]
fn requests_on_a_whole_table_refuse_unknown_parameters() {
    let server = Server::start();
    let key = json!({"name": "n", "public_key": "ssh-ed25519 A"});
    let first = server.post("/v3/public-keys", &key).id();
    server.post("/v3/public-keys", &key);
    assert_eq!(server.delete(&format!("/v3/public-keys/{first}")).status, 204);
    for refused in [
        server.delete("/v3/public-keys?name=n"),
        server.delete("/public-keys?limit=1"),
        server.delete("/v3/deleted/public-keys?name=n"),
        server.undelete("/v3/deleted/public-keys?name=n"),
        server.delete("/v3/jobs?agee=1d"),
    ] {
        assert_eq!(refused.status, 400, "{refused:?}");
        assert!(refused.body.contains("unknown parameter"), "{refused:?}");
    }
    let count = |path: &str| server.get(path).json().as_array().unwrap().len();
    assert_eq!((count("/v3/public-keys"), count("/v3/deleted/public-keys")), (1, 1));
}

#[test]
fn moves_overwrite_no_object_of_another_record() {
    let server = Server::start();
    let store = server.store();
    let state = || {
        let read = |file: &String| (file.clone(), std::fs::read_to_string(file).unwrap());
        (
            files(&store).iter().map(read).collect::<Vec<_>>(),
            server.get("/v3/images").body,
            server.get("/v3/deleted/images").body,
        )
    };
    let first = image(&server, "k", "ONE");
    assert_eq!(server.delete(&format!("/v3/images/{first}")).status, 204);
    let second = image(&server, "k", "TWO");
    let before = state();
    for refused in
        [server.undelete(&format!("/v3/deleted/images/{first}")), server.delete(&format!("/v3/images/{second}"))]
    {
        assert_eq!(refused.status, 409, "{refused:?}");
        assert!(refused.body.contains("s3://b/") && refused.body.contains("k/rootfs"), "{refused:?}");
        assert_eq!(state(), before);
    }
    // The first one can come back as soon as the keys are free.
    assert_eq!(server.delete(&format!("/images/{second}")).status, 204);
    assert_eq!(server.undelete(&format!("/v3/deleted/images/{first}")).status, 204);
    assert_eq!(content(&store, "b/k/rootfs").as_deref(), Some("ONE"));

    let first = recipe(&server, "ims/r", "ONE");
    assert_eq!(server.delete(&format!("/v3/recipes/{first}")).status, 204);
    let second = recipe(&server, "ims/r", "TWO");
    for refused in
        [server.undelete(&format!("/v3/deleted/recipes/{first}")), server.delete(&format!("/v3/recipes/{second}"))]
    {
        assert_eq!(refused.status, 409, "{refused:?}");
        assert!(refused.body.contains("s3://ims/"), "{refused:?}");
        assert_eq!(content(&store, "ims/r").as_deref(), Some("TWO"));
        assert_eq!(content(&store, "ims/deleted/r").as_deref(), Some("ONE"));
    }
}

#[test]
fn undelete_never_makes_two_records_share_a_link() {
    let server = Server::start();
    // Nothing is moved, since the object is missing.
    let first = recipe(&server, "ims/r", "ONE");
    std::fs::remove_file(server.store().join("ims/r")).unwrap();
    assert_eq!(server.delete(&format!("/v3/recipes/{first}")).status, 204);
    recipe(&server, "ims/r", "TWO");
    let refused = server.undelete(&format!("/v3/deleted/recipes/{first}"));
    assert_eq!(refused.status, 409, "{refused:?}");
    assert!(refused.body.contains("s3://ims/r"), "{refused:?}");
}

#[test]
fn moved_images_stay_in_directories_that_others_cannot_read() {
    let server = Server::start();
    let store = server.store();
    let id = image(&server, "k", "r");
    for directory in ["b", "b/k"] {
        std::fs::set_permissions(store.join(directory), PermissionsExt::from_mode(0o700)).unwrap();
    }
    let mode = |at: &str| std::fs::metadata(store.join(at)).unwrap().permissions().mode() & 0o777;
    assert_eq!(server.delete(&format!("/v3/images/{id}")).status, 204);
    assert_eq!((mode("b/deleted"), mode("b/deleted/k")), (0o700, 0o700));
    assert_eq!(server.undelete(&format!("/v3/deleted/images/{id}")).status, 204);
    assert_eq!(mode("b/k"), 0o700);
}

#[test]
fn deletion_leaves_objects_of_other_records_alone() {
    let server = Server::start();
    let store = server.store();
    image(&server, "victim", "rootfs");
    let gone = image(&server, "gone", "rootfs");
    assert_eq!(server.delete(&format!("/v3/images/{gone}")).status, 204);
    recipe(&server, "b/recipe", "recipe");
    put(&store, "b/evil/own", "own");
    let others = ["b/victim/rootfs", "b/victim/manifest.json", "b/recipe"];
    let listed = [others.as_slice(), &["b/evil/own"]].concat();
    let before = files(&store.join("b"));
    let register = |server: &Server| {
        put(&store, "b/evil/own", "own");
        manifest(&store, "evil", &listed);
        register(server, "evil")
    };
    let id = register(&server);
    assert_eq!(server.delete(&format!("/v3/images/{id}")).status, 204);
    for at in others {
        assert!(content(&store, at).is_some(), "{at}");
    }
    assert_eq!(content(&store, "b/evil/own"), None);
    // An undelete brings back what was moved.
    assert_eq!(server.undelete(&format!("/v3/deleted/images/{id}")).status, 204);
    assert_eq!(content(&store, "b/evil/own").as_deref(), Some("own"));
    assert_eq!(server.delete(&format!("/v3/images/{id}")).status, 204);
    assert_eq!(server.delete(&format!("/v3/deleted/images/{id}")).status, 204);
    let id = register(&server);
    assert_eq!(server.delete(&format!("/images/{id}?cascade=true")).status, 204);
    let left: Vec<_> = before.into_iter().filter(|file| !file.ends_with("evil/own")).collect();
    assert_eq!(files(&store.join("b")), left);
    assert!(server.log().contains("s3://b/victim/rootfs"), "{}", server.log());
}

#[test]
fn deletion_leaves_objects_of_other_buckets_alone() {
    let server = Server::start();
    let store = server.store();
    let others = ["c/rootfs", "c/deleted/manifest", "c/k/x"];
    let listed = [others.as_slice(), &["b/k/own", "b/own"]].concat();
    let register = |server: &Server| {
        for at in &listed {
            put(&store, at, at);
        }
        manifest(&store, "k", &listed);
        // One of them calls itself a manifest.
        let file = store.join("b/k/manifest.json");
        let mut text: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
        text["artifacts"][1]["type"] = "application/vnd.cray.image.manifest".into();
        std::fs::write(file, text.to_string()).unwrap();
        register(server, "k")
    };
    let leaves_others = |gone: &str| {
        for at in others {
            assert_eq!(content(&store, at).as_deref(), Some(at), "{gone}");
        }
        assert_eq!(files(&store.join("c")).len(), others.len(), "{gone}");
        assert_eq!((content(&store, "b/k/own"), content(&store, "b/own")), (None, None), "{gone}");
    };
    let id = register(&server);
    assert_eq!(server.delete(&format!("/v3/images/{id}")).status, 204);
    leaves_others("softly deleted");
    assert_eq!(server.undelete(&format!("/v3/deleted/images/{id}")).status, 204);
    assert!(listed.iter().all(|at| content(&store, at).as_deref() == Some(at)));
    assert_eq!(server.delete(&format!("/v3/images/{id}")).status, 204);
    assert_eq!(server.delete(&format!("/v3/deleted/images/{id}")).status, 204);
    leaves_others("softly deleted, then for good");
    let id = register(&server);
    assert_eq!(server.delete(&format!("/images/{id}")).status, 204);
    leaves_others("deleted for good");
    assert_eq!(files(&store).len(), others.len());
    assert!(server.log().contains("s3://c/k/x"), "{}", server.log());
}

#[test]
fn start_removes_no_object_that_a_record_names() {
    use ims_service::database::{Database, Place};
    use ims_service::records::Location;
    let data = tempfile::tempdir().unwrap();
    let store = data.path().join("store");
    let endpoint = format!("file://{}", store.display());
    let server = Server::with(data.path(), &[("S3_ENDPOINT", &endpoint)]);
    for at in ["b/elsewhere", "b/unnamed", "b/deleted/only"] {
        put(&store, at, "x");
    }
    // The object `b/only` is missing: its copy is the only one.
    put(&store, "b/only", "x");
    manifest(&store, "k", &["b/elsewhere", "b/only"]);
    let live = register(&server, "k");
    std::fs::remove_file(store.join("b/only")).unwrap();
    put(&store, "b/d/rootfs", "x");
    manifest(&store, "d", &["b/d/rootfs"]);
    let deleted = register(&server, "d");
    assert_eq!(server.delete(&format!("/v3/images/{deleted}")).status, 204);
    drop(server);
    let keys = ["elsewhere", "k/manifest.json", "deleted/d/rootfs", "deleted/only", "unnamed"];
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let database = Database::open(Place::File(&data.path().join("ims.sqlite"))).await.unwrap();
        let mut change = database.change(&[]).await.unwrap();
        let objects = keys.map(|key| Location { bucket: "b".into(), key: key.into() });
        change.plan_removal(&objects, 0).await.unwrap();
        change.commit().await.unwrap();
        database.close().await;
    });
    let server = Server::with(data.path(), &[("S3_ENDPOINT", &endpoint)]);
    let log = || std::fs::read_to_string(data.path().join("log")).unwrap();
    wait_until("the list of removals to be empty", || {
        keys.iter().all(|key| log().contains(&format!("s3://b/{key}"))) && content(&store, "b/unnamed").is_none()
    });
    for key in keys.iter().filter(|key| **key != "unnamed") {
        assert!(content(&store, &format!("b/{key}")).is_some(), "{key}");
    }
    assert_eq!(server.undelete(&format!("/v3/deleted/images/{deleted}")).status, 204);
    assert_eq!(server.get(&format!("/v3/images/{live}")).status, 200);
}
