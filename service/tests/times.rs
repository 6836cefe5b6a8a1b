//! Requests that wait for something slow, and all others meanwhile.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::server::Answer;

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

/// Sets a flag at its end, also when an assertion fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Answers of `count` requests at the same time, whose own need takes `slow`. All others that are made by `ask` are
/// answered meanwhile: health within 50 ms, the others within 200 ms.
pub fn others_are_answered(
    what: &str,
    slow: Duration,
    count: usize,
    ask: impl Fn(&str, &str, &Value) -> Answer + Sync,
    needing: impl Fn(usize) -> (u16, Duration) + Sync,
) -> Vec<(u16, Duration)> {
    // A machine under load takes its time for the least of connections, too.
    let control = testbed::listen(|mut connection| {
        let _ = connection.read(&mut [0; 1024]);
        let _ = connection.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
    });
    let (mut health, mut others, mut least) = (Times::default(), Times::default(), Times::default());
    let done = AtomicBool::new(false);
    let answers = std::thread::scope(|scope| {
        let (ask, needing) = (&ask, &needing);
        let waiting: Vec<_> = (0..count).map(|number| scope.spawn(move || needing(number))).collect();
        let asking = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                assert_eq!(health.of(|| ask("GET", "/healthz/live", &Value::Null)).status, 200);
                assert_eq!(health.of(|| ask("GET", "/healthz/ready", &Value::Null)).status, 200);
                let id = others.of(|| ask("POST", "/v3/images", &json!({ "name": "i" }))).id();
                let one = format!("/v3/images/{id}");
                let pair: Value = json!({ "metadata": { "operation": "set", "key": "k", "value": "v" } });
                assert_eq!(others.of(|| ask("PATCH", &one, &pair)).status, 200);
                assert_eq!(others.of(|| ask("GET", "/v3/images", &Value::Null)).status, 200);
                assert_eq!(others.of(|| ask("DELETE", &one, &Value::Null)).status, 204);
                assert_eq!(others.of(|| ask("GET", "/v3/jobs", &Value::Null)).status, 200);
                assert_eq!(others.of(|| ask("GET", "/metrics", &Value::Null)).status, 200);
                least.of(|| {
                    let mut connection = TcpStream::connect(control).unwrap();
                    let _ = connection.write_all(b"GET / HTTP/1.1\r\n\r\n");
                    let _ = connection.read_to_end(&mut Vec::new());
                });
            }
        });
        let over = Over(&done);
        let answers: Vec<_> = waiting.into_iter().map(|thread| thread.join().unwrap()).collect();
        drop(over);
        asking.join().unwrap();
        answers
    });
    println!(
        "{what}: health median {:?}, longest {:?}; others median {:?}, longest {:?}; a bare connection median {:?}, \
         longest {:?}; {} rounds; waiting, longest {:?}",
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
    // No single one has waited for it.
    assert!(health.longest().max(others.longest()) < slow / 2, "{what}: {:?}", others.longest());
    answers
}
