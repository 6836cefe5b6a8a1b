//! A store that is slow, refuses connections, or cuts them off: all other requests are answered as ever.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testbed::free_port;
use testbed::s3_server::Bucket;

use crate::server::Server;

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

/// Times of answers.
#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    fn of<T>(&mut self, ask: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let answer = ask();
        self.0.push(began.elapsed());
        answer
    }

    fn median(&mut self) -> Duration {
        self.0.sort();
        self.0[self.0.len() / 2]
    }

    fn longest(&self) -> Duration {
        self.0.iter().max().copied().unwrap_or_default()
    }
}

/// Answers of 20 requests that need the store, and whether all others are answered meanwhile.
fn others_are_answered(endpoint: &str, bucket: &Bucket, what: &str) -> Vec<(u16, Duration)> {
    let data = tempfile::tempdir().unwrap();
    let keys = [("S3_ACCESS_KEY", "access"), ("S3_SECRET_KEY", "secret")];
    let server = Server::with(data.path(), &[&[("S3_ENDPOINT", endpoint)], keys.as_slice()].concat());
    bucket.put("recipe", b"recipe");
    let link = json!({ "path": format!("s3://{}/recipe", bucket.name), "type": "s3", "etag": "" });
    // A machine under load takes its time for the least of connections, too.
    let control = testbed::listen(|mut connection| {
        let _ = connection.read(&mut [0; 1024]);
        let _ = connection.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
    });
    let (mut health, mut others, mut least) = (Times::default(), Times::default(), Times::default());
    let done = AtomicBool::new(false);
    let answers = std::thread::scope(|scope| {
        let waiting: Vec<_> = (0..WAITING)
            .map(|number| {
                let (server, link) = (&server, &link);
                scope.spawn(move || {
                    // Each recipe has an object of its own: links are unique.
                    let key = format!("recipe-{number}");
                    bucket.put(&key, b"recipe");
                    let mut link = link.clone();
                    link["path"] = format!("s3://{}/{key}", bucket.name).into();
                    let recipe = json!({
                        "name": "r", "recipe_type": "kiwi-ng", "linux_distribution": "sles15", "link": link,
                    });
                    let began = Instant::now();
                    let status = server.post("/v3/recipes", &recipe).status;
                    (status, began.elapsed())
                })
            })
            .collect();
        let asking = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                assert_eq!(health.of(|| server.get("/healthz/live")).status, 200);
                assert_eq!(health.of(|| server.get("/healthz/ready")).status, 200);
                let id = others.of(|| server.post("/v3/images", &json!({ "name": "i" }))).id();
                let one = format!("/v3/images/{id}");
                let pair: Value = json!({ "metadata": { "operation": "set", "key": "k", "value": "v" } });
                assert_eq!(others.of(|| server.patch(&one, &pair)).status, 200);
                assert_eq!(others.of(|| server.get("/v3/images")).status, 200);
                assert_eq!(others.of(|| server.delete(&one)).status, 204);
                assert_eq!(others.of(|| server.get("/metrics")).status, 200);
                least.of(|| {
                    let mut connection = TcpStream::connect(control).unwrap();
                    let _ = connection.write_all(b"GET / HTTP/1.1\r\n\r\n");
                    let _ = connection.read_to_end(&mut Vec::new());
                });
            }
        });
        let answers: Vec<_> = waiting.into_iter().map(|thread| thread.join().unwrap()).collect();
        done.store(true, Ordering::Relaxed);
        asking.join().unwrap();
        answers
    });
    println!(
        "{what}: health median {:?}, longest {:?}; others median {:?}, longest {:?}; a bare connection median {:?}, \
         longest {:?}; {} rounds; needing the store, longest {:?}",
        health.median(),
        health.longest(),
        others.median(),
        others.longest(),
        least.median(),
        least.longest(),
        least.0.len(),
        answers.iter().map(|(_, took)| took).max().unwrap(),
    );
    let load = least.median() * 20;
    assert!(health.median() <= Duration::from_millis(50).max(load), "{what}: {:?}", health.median());
    assert!(others.median() <= Duration::from_millis(200).max(load), "{what}: {:?}", others.median());
    // No single one has waited for the store.
    assert!(health.longest().max(others.longest()) < SLOW / 2, "{what}: {:?}", others.longest());
    answers
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
