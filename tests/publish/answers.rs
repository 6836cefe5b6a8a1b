//! Hostile answers of servers: endless ones, and ones that echo secrets.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::Output;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ims_sshd::sys::process::output_within;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use testbed::ims_server::JOB;
use testbed::job::*;
use testbed::*;

/// Answers each request by `answer_to`, which gets "METHOD /path" and the request's head; `None` is an endless answer.
pub fn serve(answer_to: impl Fn(&str, &str) -> (u16, Option<String>) + Send + Sync + 'static) -> String {
    let address = listen(move |mut connection| {
        let mut reader = BufReader::new(connection.try_clone().unwrap());
        let mut head = String::new();
        while reader.read_line(&mut head).is_ok_and(|n| n > 2) {}
        let length = head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
        let _ = reader.read_exact(&mut vec![0; length.unwrap_or(0)]);
        let asked = head.split(" HTTP/").next().unwrap_or_default().to_owned();
        let (status, body) = answer_to(&asked, &head);
        let begin = format!("HTTP/1.1 {status} x\r\nconnection: close\r\n");
        let Some(body) = body else {
            let _ = write!(connection, "{begin}transfer-encoding: chunked\r\n\r\n");
            let piece = format!("10000\r\n{}\r\n", "[[1,".repeat(0x4000));
            while connection.write_all(piece.as_bytes()).is_ok() {}
            return;
        };
        let _ = write!(connection, "{begin}content-length: {}\r\n\r\n{body}", body.len());
    });
    format!("http://{address}")
}

fn credentials(dir: &std::path::Path, server: &str) -> Vec<(&'static str, String)> {
    for (name, text) in
        [("endpoint", format!("{server}/token").as_str()), ("client-id", "admin"), ("client-secret", SECRET)]
    {
        std::fs::write(dir.join(name), text).unwrap();
    }
    vec![
        ("IMS_URL", server.to_owned()),
        ("OAUTH_CONFIG_DIR", dir.display().to_string()),
        ("IMS_JOB_ID", JOB.into()),
        ("IMS_ACTION", "customize".into()),
        ("S3_ENDPOINT", server.to_owned()),
        ("S3_ACCESS_KEY", "access".into()),
        ("S3_SECRET_KEY", KEY.into()),
    ]
}

const SECRET: &str = "secret-of-\"client\"";
const KEY: &str = "secret-of-store";
const TOKEN: &str = "token-of-ims";

fn token() -> (u16, Option<String>) {
    (200, Some(json!({"access_token": TOKEN, "expires_in": u64::MAX}).to_string()))
}

fn sidecar(dir: &std::path::Path, variables: &[(&'static str, String)]) -> Output {
    let mut command = ims_sshd(&["sidecar"], variables);
    command.arg(dir).env("IMS_RETRY_LIMIT", "1").stdout(std::process::Stdio::piped());
    let child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    output_within(child, Duration::from_secs(50)).unwrap().expect("the sidecar does not end")
}

#[test]
fn endless_answers_are_cut_off() {
    for (endless, status, reason) in [
        ("POST /token", 200, "longer than 1 MiB"),
        ("POST /token", 403, "the server answers 403"),
        ("GET /jobs", 200, "longer than 4 MiB"),
        ("GET /jobs", 403, "the server answers 403"),
    ] {
        let dir = directory();
        let server = serve(move |asked, _| match asked {
            asked if asked.starts_with(endless) => (status, None),
            "POST /token" => token(),
            _ => (200, Some("{}".into())),
        });
        let began = Instant::now();
        let output = sidecar(dir.path(), &credentials(dir.path(), &server));
        let said = text(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains(reason), "{endless} {status}: {said}");
        assert!(said.len() < 10_000 && began.elapsed() < Duration::from_secs(20), "{endless}: {}", said.len());
    }
}

#[test]
fn token_that_is_invalid_in_a_header_is_refused() {
    let dir = directory();
    let server = serve(|asked, _| match asked {
        "POST /token" => (200, Some(json!({"access_token": "a\r\nx: b", "expires_in": 60}).to_string())),
        _ => (200, Some("{}".into())),
    });
    let mut command = ims_sshd(&["sidecar"], &credentials(dir.path(), &server));
    let began = Instant::now();
    let output = command.arg(dir.path()).env("IMS_RETRY_LIMIT", "30").output().unwrap();
    let said = text(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("no header may hold"), "{said}");
    assert!(began.elapsed() < Duration::from_secs(5), "{said}");
}

#[test]
fn signal_ends_an_endless_download() {
    let dir = directory();
    let (reading, read) = std::sync::mpsc::channel();
    let reading = std::sync::Mutex::new(reading);
    let server = serve(move |_, _| {
        let _ = reading.lock().unwrap().send(());
        (200, None)
    });
    let mut command = ims_sshd(&["prepare"], &[]);
    let mut child = command.arg(dir.path().join("parent")).arg(format!("{server}/image")).spawn().unwrap();
    read.recv().unwrap();
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
}

#[test]
fn credentials_echoed_by_a_server_are_masked_in_messages() {
    for format in ["text", "json"] {
        for wrong in ["POST /token", "GET /jobs", "PATCH /jobs", "PUT", ""] {
            let dir = directory();
            let server = serve(move |asked, head| {
                let known = if asked == "POST /token" { "" } else { TOKEN };
                let all = format!("{head} {SECRET} {KEY} {} {known}", STANDARD.encode(format!("admin:{SECRET}")));
                let answer = match asked {
                    asked if !wrong.is_empty() && asked.starts_with(wrong) => (403, json!({ "detail": all })),
                    "POST /token" => return token(),
                    _ if asked.starts_with("GET /jobs") => (200, json!({"status": "error", "detail": all})),
                    _ => (403, Value::String(all)),
                };
                (answer.0, Some(answer.1.to_string()))
            });
            let mut variables = credentials(dir.path(), &server);
            variables.push(("LOG_FORMAT", format.into()));
            let mut said = sidecar(dir.path(), &variables);
            if wrong == "PUT" {
                let (tree, bucket) = (image(dir.path()), [("S3_BUCKET", "bucket".to_owned())]);
                let squashfs = squashfs_of(&tree);
                variables.retain(|(name, _)| !name.starts_with("IMS"));
                let mut upload = ims_sshd(&["upload", "--archive"], &[&variables[..], &bucket].concat());
                said = upload.args([&squashfs, &tree]).current_dir(dir.path()).output().unwrap();
            }
            let said = format!("{}{}", text(&said.stdout), text(&said.stderr));
            assert!(said.contains("cannot "), "{said}");
            let encoded = STANDARD.encode(format!("admin:{SECRET}"));
            let escaped = SECRET.replace('"', "\\\"");
            for secret in [SECRET, &escaped, KEY, TOKEN, encoded.trim_end_matches('=')] {
                assert!(!said.contains(secret), "{format} {wrong}: {secret}: {said}");
            }
        }
    }
}
