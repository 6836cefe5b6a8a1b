//! A store that is slow, refuses connections, or cuts them off: all other requests are answered as ever.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::json;
use testbed::free_port;
use testbed::s3_server::Bucket;

use crate::server::Server;
use crate::times;

/// Time for each answer of the slow store.
const SLOW: Duration = Duration::from_secs(10);

/// Requests that wait for the store.
const WAITING: usize = 20;

/// Lets requests pass to the store at `upstream`, each after `delay`, and `cut` the answers off in their middle.
fn proxy(upstream: SocketAddr, delay: Duration, cut: bool) -> String {
    let address = testbed::listen(move |client| {
        let Ok(server) = TcpStream::connect(upstream) else { return };
        let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        let sending = std::thread::spawn(move || {
            let mut chunk = [0; 8 << 10];
            while let Ok(length @ 1..) = from.read(&mut chunk) {
                // The store takes its time for each request; that is what is tested.
                std::thread::sleep(delay);
                if to.write_all(&chunk[..length]).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Both);
        });
        let (mut from, mut to, mut chunk) = (server, client, [0; 8 << 10]);
        while let Ok(length @ 1..) = from.read(&mut chunk) {
            let passed = if cut { length / 2 } else { length };
            if to.write_all(&chunk[..passed]).is_err() || cut {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
        let _ = from.shutdown(Shutdown::Both);
        let _ = sending.join();
    });
    format!("http://{address}")
}

/// Answers of 20 requests that need the store, and whether all others are answered meanwhile.
fn others_are_answered(endpoint: &str, bucket: &Bucket, what: &str) -> Vec<(u16, Duration)> {
    let data = tempfile::tempdir().unwrap();
    let keys = [("S3_ACCESS_KEY", "access"), ("S3_SECRET_KEY", "secret")];
    let server = Server::with(data.path(), &[&[("S3_ENDPOINT", endpoint)], keys.as_slice()].concat());
    let needing = |number| {
        // Each recipe has an object of its own: links are unique.
        let key = format!("recipe-{number}");
        bucket.put(&key, b"recipe");
        let link = json!({ "path": format!("s3://{}/{key}", bucket.name), "type": "s3", "etag": "" });
        let recipe = json!({ "name": "r", "recipe_type": "kiwi-ng", "linux_distribution": "sles15", "link": link });
        let began = Instant::now();
        let status = server.post("/v3/recipes", &recipe).status;
        (status, began.elapsed())
    };
    times::others_are_answered(what, SLOW, WAITING, |method, path, body| server.send(method, path, body), needing)
}

fn address_of(bucket: &Bucket) -> SocketAddr {
    bucket.endpoint.strip_prefix("http://").unwrap().parse().unwrap()
}

#[test]
fn slow_store_delays_only_requests_that_need_it_and_those_once() {
    let bucket = Bucket::new();
    let slow = proxy(address_of(&bucket), SLOW, false);
    for (status, took) in others_are_answered(&slow, &bucket, "slow") {
        assert_eq!(status, 201);
        assert!((SLOW..SLOW * 3 / 2).contains(&took), "{took:?}");
    }
}

#[test]
fn store_that_refuses_connections_fails_only_requests_that_need_it() {
    let (bucket, nobody) = (Bucket::new(), free_port());
    for (status, took) in others_are_answered(&format!("http://127.0.0.1:{nobody}"), &bucket, "refusing") {
        assert_eq!(status, 500);
        assert!(took < SLOW, "{took:?}");
    }
}

#[test]
fn store_that_cuts_answers_off_fails_only_requests_that_need_it() {
    let bucket = Bucket::new();
    let cutting = proxy(address_of(&bucket), Duration::ZERO, true);
    for (status, took) in others_are_answered(&cutting, &bucket, "cut off") {
        assert_eq!(status, 500);
        assert!(took < SLOW, "{took:?}");
    }
}
