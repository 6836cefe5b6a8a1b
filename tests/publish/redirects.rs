//! Misleading answers of servers: a part instead of the whole, and redirects to other servers.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};

use testbed::file_server::reset;
use testbed::job::*;
use testbed::tls_server::{Tls, certificates, port_of};
use testbed::*;

use crate::prepare::{refused, same_tree};

/// A server with an answer for each request, in order; repeats the last one. A connection is reset after an
/// answer whose head says so.
struct Answers {
    url: String,
    /// Heads of the received requests.
    heard: Arc<Mutex<Vec<String>>>,
}

impl Answers {
    fn start(answers: Vec<Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let heard = Arc::new(Mutex::new(Vec::new()));
        let shared = heard.clone();
        std::thread::spawn(move || {
            for mut connection in listener.incoming().map_while(Result::ok) {
                let lines = BufReader::new(&connection).lines().map_while(Result::ok);
                let request: Vec<_> = lines.take_while(|line| !line.is_empty()).collect();
                // A connection that only tests whether the server listens.
                if request.is_empty() {
                    continue;
                }
                let mut heard = shared.lock().unwrap();
                let answer = &answers[heard.len().min(answers.len() - 1)];
                heard.push(request.join("\n").to_lowercase());
                let _ = connection.write_all(answer);
                if text(answer).contains("x-reset") {
                    reset(&connection);
                }
            }
        });
        Self { url, heard }
    }

    fn heard(&self) -> Vec<String> {
        self.heard.lock().unwrap().clone()
    }
}

fn answer(head: &str, body: &[u8]) -> Vec<u8> {
    [format!("HTTP/1.1 {head}\r\nconnection: close\r\n\r\n").as_bytes(), body].concat()
}

fn redirect(to: &str) -> Vec<u8> {
    answer(&format!("307 Temporary Redirect\r\nlocation: {to}\r\ncontent-length: 0"), b"")
}

fn whole(content: &[u8]) -> Vec<u8> {
    answer(&format!("200 OK\r\ncontent-length: {}", content.len()), content)
}

/// Prepares the image that a server sends in `answers`, which must be `tree`. Returns the requests that it received.
fn fetched(answers: Vec<Vec<u8>>, parent: &Path, tree: &Path) -> Vec<String> {
    let server = Answers::start(answers);
    let output = ims_sshd(&["prepare", &parent.display().to_string(), &server.url], &[]).output().unwrap();
    let heard = server.heard();
    assert!(output.status.success(), "{}: {}, {heard:?}", parent.display(), text(&output.stderr));
    same_tree(tree, &parent.join("image-root"));
    heard
}

#[test]
fn partial_answer_is_not_taken_for_the_whole_file() {
    let (dir, tree, content) = served_image();
    let length = content.len();
    let part = |from: usize, to: usize, total: &str| {
        let head = format!(
            "206 Partial Content\r\netag: \"1\"\r\ncontent-length: {}\r\ncontent-range: bytes {from}-{}/{total}",
            to - from,
            to - 1
        );
        answer(&head, &content[from..to])
    };
    let of = length.to_string();
    // The answer has no length: a closed connection could be the end of the file.
    let head = b"HTTP/1.1 200 OK\r\nx-reset: 1\r\netag: \"1\"\r\ntransfer-encoding: chunked\r\n\r\n1000\r\n";
    let cut_off = [&head[..], &content[..4096], b"\r\n"].concat();
    for (number, (first, reason)) in
        [(part(0, 4096, &of), "206"), (part(0, length, &of), "206"), (part(100, length, &of), "206")]
            .into_iter()
            .enumerate()
    {
        let server = Answers::start(vec![first]);
        refused(&dir.path().join(format!("refused-{number}")), &server.url, reason);
        assert_eq!(server.heard().len(), 1, "tried again in vain");
    }
    for (number, answers) in [
        vec![cut_off.clone(), part(4096, 5000, &of), part(5000, length, &of)],
        vec![cut_off.clone(), part(4096, length, "*"), whole(&content)],
        vec![cut_off.clone(), part(0, length, &of), whole(&content)],
    ]
    .into_iter()
    .enumerate()
    {
        fetched(answers, &dir.path().join(format!("parent-{number}")), &tree);
    }
}

#[test]
fn download_resumes_only_with_a_strong_etag_or_last_modified() {
    let (dir, tree, content) = served_image();
    let length = content.len();
    let changed: Vec<_> = content.iter().map(|byte| !byte).collect();
    let cut_off = |described: &str| {
        let head = format!("HTTP/1.1 200 OK\r\nx-reset: 1\r\n{described}content-length: {length}\r\n\r\n");
        [head.as_bytes(), &changed[..4096]].concat()
    };
    let part = |described: &str| {
        let head = format!(
            "206 Partial Content\r\n{described}content-length: {}\r\ncontent-range: bytes 4096-{}/{length}",
            length - 4096,
            length - 1
        );
        answer(&head, &content[4096..])
    };
    let [old, new] = ["00", "01"].map(|second| {
        let modified = format!("last-modified: Wed, 01 Jan 2025 00:00:{second} GMT\r\n");
        format!("{modified}date: Wed, 01 Jan 2025 00:02:00 GMT\r\n")
    });
    let (old, new) = (old.as_str(), new.as_str());
    let undated = "last-modified: Wed, 01 Jan 2025 00:00:00 GMT\r\n";
    // The file may have changed again within the same second.
    let just_now = "last-modified: Wed, 01 Jan 2025 00:00:00 GMT\r\ndate: Wed, 01 Jan 2025 00:00:00 GMT\r\n";
    let [with_undated, with_old] = [undated, old].map(|modified| format!("etag: W/\"1\"\r\n{modified}"));
    let tag = "etag: \"1\"\r\n";
    for (number, (answers, second_is_of_a_part)) in [
        (vec![cut_off(""), whole(&content)], false),
        (vec![cut_off(old), part(new), whole(&content)], true),
        (vec![cut_off(old), part(""), whole(&content)], true),
        (vec![cut_off(tag), part(""), whole(&content)], true),
        (vec![cut_off("etag: W/\"1\"\r\n"), whole(&content)], false),
        (vec![cut_off(undated), whole(&content)], false),
        (vec![cut_off(just_now), whole(&content)], false),
        (vec![cut_off("last-modified: yesterday\r\ndate: today\r\n"), whole(&content)], false),
        (vec![cut_off(&with_undated), whole(&content)], false),
        (vec![cut_off(&with_old), part(new), whole(&content)], true),
        (vec![cut_off(&with_old), part(&new.replace("01 GMT", "00 GMT")), whole(&content)], true),
    ]
    .into_iter()
    .enumerate()
    {
        let heard = fetched(answers, &dir.path().join(format!("parent-{number}")), &tree);
        assert_eq!(heard[1].contains("range: bytes=4096-"), second_is_of_a_part, "{number}");
    }
    // Last-Modified alone is enough.
    let begun = [
        format!("HTTP/1.1 200 OK\r\nx-reset: 1\r\n{old}content-length: {length}\r\n\r\n").as_bytes(),
        &content[..4096],
    ]
    .concat();
    let heard = fetched(vec![begun, part(old)], &dir.path().join("parent"), &tree);
    assert_eq!(heard.len(), 2, "{heard:?}");
}

#[test]
fn requests_with_a_body_to_ims_and_oauth_follow_no_redirect() {
    let (dir, tree) = bootable_image();
    for status in ["301 x", "302 x", "303 x", "307 x", "308 x"] {
        let target = Answers::start(vec![whole(b"{\"access_token\": \"token\"}")]);
        let away = answer(&format!("{status}\r\nlocation: {}/ims\r\ncontent-length: 0", target.url), b"");
        let server = Answers::start(vec![away]);
        let oauth = tempfile::tempdir_in(dir.path()).unwrap();
        for (name, content) in [("endpoint", server.url.as_str()), ("client-id", "id"), ("client-secret", "hidden")] {
            std::fs::write(oauth.path().join(name), content).unwrap();
        }
        let ims = ("IMS_URL", server.url.clone());
        let job = ("IMS_JOB_ID", testbed::ims_server::JOB.to_owned());
        for variables in [
            vec![ims.clone(), job.clone()],
            vec![("IMS_URL", target.url.clone()), job, ("OAUTH_CONFIG_DIR", oauth.path().display().to_string())],
        ] {
            let parent = tempfile::tempdir_in(dir.path()).unwrap();
            let output = ims_sshd(&["prepare"], &variables).args([parent.path(), &tree]).output().unwrap();
            let said = text(&output.stderr);
            assert!(said.contains("it leads to ") && said.contains("meant only for the named server"), "{said}");
            assert_eq!((output.status.code(), target.heard()), (Some(1), vec![]), "{said}");
        }
    }
}

#[test]
fn redirect_to_another_server_carries_no_login_and_no_referer() {
    let (dir, tree, content) = served_image();
    let target = Answers::start(vec![whole(&content)]);
    let server = Answers::start(vec![redirect(&format!("{}/there", target.url))]);
    let url = format!("{}/image?X-Amz-Signature=key", server.url).replace("http://", "http://user:password@");
    let parent = dir.path().join("parent");
    let output = ims_sshd(&["prepare", &parent.display().to_string(), &url], &[]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    same_tree(&tree, &parent.join("image-root"));
    assert!(server.heard()[0].contains("authorization: basic"), "{:?}", server.heard());
    let heard = target.heard().concat();
    assert!(!heard.contains("authorization") && !heard.contains("referer") && !heard.contains("x-amz"), "{heard}");
    // Requests to IMS, with the token.
    let tokens = Answers::start(vec![whole(br#"{"access_token": "token-of-ims", "expires_in": 60}"#)]);
    let target = Answers::start(vec![whole(b"{}")]);
    let ims = Answers::start(vec![redirect(&target.url)]);
    for (name, text) in [("endpoint", tokens.url.as_str()), ("client-id", "id"), ("client-secret", "secret")] {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let variables = [
        ("IMS_URL", ims.url.clone()),
        ("OAUTH_CONFIG_DIR", dir.path().display().to_string()),
        ("IMS_JOB_ID", testbed::ims_server::JOB.into()),
        ("IMS_ACTION", "customize".into()),
    ];
    // The job's record is read first.
    ims_sshd(&["sidecar"], &variables).arg(dir.path()).output().unwrap();
    assert!(ims.heard()[0].contains("authorization: bearer token-of-ims"), "{:?}", ims.heard());
    let heard = target.heard().concat();
    assert!(heard.starts_with("get ") && !heard.contains("token") && !heard.contains("referer"), "{heard}");
}

#[test]
fn endless_redirects_and_redirects_from_https_to_http_are_refused() {
    let dir = directory();
    let target = Answers::start(vec![whole(b"hostile")]);
    let (parent, listener) = (dir.path().join("parent"), Answers::start(vec![redirect("/again?key=secret")]));
    refused(&parent, &listener.url, "after 10 redirects already");
    assert_eq!(listener.heard().len(), 11);
    certificates(dir.path());
    let server = Answers::start(vec![redirect(&format!("{}/?key=secret", target.url))]);
    let tls = Tls::start(dir.path(), port_of(&server.url));
    let url = format!("https://127.0.0.1:{}/image", tls.port);
    let authority = [("CA_CERT", dir.path().join("ca.crt").display().to_string())];
    let output = ims_sshd(&["prepare", &parent.display().to_string(), &url], &authority).output().unwrap();
    let said = text(&output.stderr);
    assert!(said.contains("it leads from https to http://127.0.0.1") && !said.contains("secret"), "{said}");
    assert_eq!((output.status.code(), target.heard().len(), server.heard().len()), (Some(1), 0, 1));
}

#[test]
fn redirect_of_a_store_to_another_server_is_not_followed() {
    let (dir, tree, squashfs) = packed_image();
    let target = Answers::start(vec![whole(b"")]);
    let server = Answers::start(vec![redirect(&format!("{}/bucket", target.url))]);
    let variables = [
        ("AWS_ACCESS_KEY_ID", "key".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "secret".to_owned()),
        ("AWS_SESSION_TOKEN", "token".to_owned()),
        ("AWS_ENDPOINT_URL", server.url.clone()),
    ];
    let mut command = ims_sshd(&["upload", "--store", "s3://bucket", "--archive"], &variables);
    let output = command.args([&squashfs, &tree]).current_dir(dir.path()).output().unwrap();
    let said = text(&output.stderr);
    assert!(said.contains("it leads to another server"), "{said}");
    assert!(server.heard()[0].contains("x-amz-security-token: token"), "{:?}", server.heard());
    assert_eq!((output.status.code(), target.heard()), (Some(1), vec![]));
}
