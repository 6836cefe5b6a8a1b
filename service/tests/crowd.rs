//! Connections that stay silent: they are closed, and shut nobody out.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;
use testbed::wait_within;

use crate::server::{Server, try_ask};

/// Descriptors of a service that takes 32 connections.
const DESCRIPTORS: u32 = 320;

/// Time in which a silent connection is closed; each waits for 30 s.
const SOON: Duration = Duration::from_mins(2);

fn connect(server: &Server, sent: &str) -> TcpStream {
    let mut connection = TcpStream::connect(server.address).unwrap();
    // The service may have closed it already for the next ones.
    let _ = connection.write_all(sent.as_bytes());
    connection.set_read_timeout(Some(SOON)).unwrap();
    connection
}

fn warnings(server: &Server) -> usize {
    server.log().matches("the most that this process takes").count()
}

#[test]
fn silent_connections_shut_nobody_out() {
    let server = Server::with_descriptors(DESCRIPTORS);
    let mut silent = Vec::new();
    for outage in 1..=2 {
        for number in 0..400 {
            silent.push(connect(&server, ["", "G", "GET /v3/images HTTP/1.1\r\nhost: x\r\n"][number % 3]));
            if number % 50 == 0 {
                let began = Instant::now();
                assert_eq!(server.get("/healthz/live").status, 200);
                server.post("/v3/images", &json!({"name": "n"})).good();
                assert_eq!(server.get("/v3/images").status, 200);
                assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
            }
        }
        // Answered after all of them were accepted: those still in the backlog would begin another outage.
        assert_eq!(server.get("/healthz/live").status, 200);
        assert_eq!(warnings(&server), outage, "{}", server.log());
        silent.clear();
        wait_within(SOON, "the end of the outage", || {
            server.get("/healthz/live");
            server.log().matches("new ones no longer close others").count() == outage
        });
    }
    assert!(!server.log().contains("ERROR"), "{}", server.log());
}

#[test]
fn connections_that_send_no_request_are_closed() {
    let server = Server::start();
    let answered = connect(&server, "GET /healthz/live HTTP/1.1\r\nhost: x\r\n\r\n");
    let mut silent: Vec<_> =
        ["", "GET /v3/images HT", "GET / HTTP/1.1\r\nhost: x\r\n"].iter().map(|sent| connect(&server, sent)).collect();
    silent.push(answered);
    std::thread::scope(|scope| {
        for mut connection in silent {
            scope.spawn(move || {
                let mut rest = Vec::new();
                // A byte now and then is no request either.
                let mut slow = connection.try_clone().unwrap();
                slow.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                let began = Instant::now();
                while slow.read(&mut [0; 1000]).is_err() && began.elapsed() < SOON {
                    let _ = slow.write_all(b"x");
                }
                let _ = connection.read_to_end(&mut rest);
                assert!(began.elapsed() < SOON, "a connection is still open");
            });
        }
    });
}

#[test]
fn clients_that_do_not_read_their_answer_are_cut_off() {
    let server = Server::start();
    let sockets = || {
        let all = std::fs::read_dir(format!("/proc/{}/fd", server.program.id())).unwrap().flatten();
        all.filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:")))
            .count()
    };
    // More than the buffers of both sockets take.
    server.post("/v3/images", &json!({"name": "x".repeat(15 << 20)})).good();
    assert_eq!(server.get("/v3/images").status, 200);
    let before = sockets();
    let unread: Vec<_> = (0..8).map(|_| connect(&server, "GET /v3/images HTTP/1.1\r\nhost: x\r\n\r\n")).collect();
    wait_within(SOON, "the requests to begin", || sockets() >= before + unread.len());
    wait_within(SOON, "the connections to be closed", || sockets() <= before);
}

#[test]
fn requests_beyond_the_most_are_refused_and_health_is_answered() {
    let server = Server::with_descriptors(DESCRIPTORS);
    let head = "POST /v3/images HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n";
    let mut unfinished: Vec<_> = (0..27).map(|_| connect(&server, head)).collect();
    wait_within(SOON, "a request to be refused", || {
        // A connection whose request the service has not read yet can be closed for a new one.
        unfinished.push(connect(&server, head));
        server.get("/v3/images").status == 503
    });
    assert_eq!(server.get("/healthz/ready").status, 200);
    assert_eq!(server.get("/version").status, 503);
    drop(unfinished);
    wait_within(SOON, "requests to be answered", || {
        try_ask(server.address, "GET", "/v3/images", "", "").is_ok_and(|answer| answer.status == 200)
    });
}

#[test]
fn body_that_does_not_come_is_refused() {
    let server = Server::start();
    let mut slow = connect(&server, "POST /v3/images HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{");
    let mut answer = String::new();
    slow.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
}

#[test]
fn body_of_a_get_request_is_not_waited_for() {
    let server = Server::start();
    for path in ["/healthz/live", "/downloads/x/y?z=1", "/v3/images"] {
        let mut slow = connect(&server, &format!("GET {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n{{"));
        // The minute that a body has is not over.
        slow.set_read_timeout(Some(Duration::from_secs(40))).unwrap();
        let mut status = [0; 12];
        slow.read_exact(&mut status).unwrap();
        assert!(["HTTP/1.1 200", "HTTP/1.1 403", "HTTP/1.1 401"].map(str::as_bytes).contains(&&status[..]), "{path}");
    }
}
