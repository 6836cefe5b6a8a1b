//! Repositories that a recipe names are waited for.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Instant;

use base64::Engine;
use testbed::ims_server::ImsServer;
use testbed::job::*;
use testbed::repository_server::{Manners, RepositoryServer};
use testbed::tls_server::{Tls, certificates, port_of};
use testbed::*;

use crate::recipes::*;

fn described(dir: &Path, repositories: &str) -> std::path::PathBuf {
    let tree = dir.join("recipe");
    let text = format!(
        "<image name='a'><profiles><profile name='used' import='true'/><profile name='other'/></profiles>\
         <preferences><packagemanager>zypper</packagemanager></preferences>{repositories}</image>"
    );
    write(&tree, "config.xml", &text);
    tree
}

fn source(attributes: &str, path: &str) -> String {
    format!("<repository {attributes}><source path='{path}'/></repository>")
}

fn wait(recipe: &Path, options: &[&str], variables: &[(&str, String)]) -> Output {
    let mut arguments = vec!["wait-for-repos", recipe.to_str().unwrap()];
    arguments.extend(options);
    ims_sshd(&arguments, variables).output().unwrap()
}

/// A directory that is a repository of both kinds.
fn repository_in(dir: &Path) -> std::path::PathBuf {
    let tree = dir.join("served");
    write(&tree, "repodata/repomd.xml", "<repomd/>");
    write(&tree, "dists/bookworm/Release", "Suite: bookworm\n");
    write(&tree, "flat/Release", "");
    write(&tree, "mirrors", "http://h\n");
    tree
}

#[test]
fn repositories_of_every_kind_are_there() {
    let dir = directory();
    let tree = repository_in(dir.path());
    let plain = RepositoryServer::start(&tree);
    let without_head = RepositoryServer::with(&tree, Manners { without_head: true, ..Manners::default() });
    let login = base64::engine::general_purpose::STANDARD.encode("me:pass-word-7");
    let own = Manners { wants: Some(("authorization", format!("Basic {login}"))), ..Manners::default() };
    let own = RepositoryServer::with(&tree, own);
    certificates(dir.path());
    let tls = Tls::start(dir.path(), port_of(&plain.url));
    let [url, get, secret] = [&plain, &without_head, &own].map(|server| server.url.as_str());
    let recipe = described(
        dir.path(),
        &[
            source("type='rpm-md'", url),
            source("type='rpm-md'", &format!("https://127.0.0.1:{}", tls.port)),
            source("", get),
            source("type='apt-deb' distribution='bookworm'", url),
            source("type='apt-deb'", &format!("{url}/flat")),
            source("sourcetype='mirrorlist'", &format!("{url}/mirrors")),
            source("username='me' password='pass-word-7'", secret),
            source("", &secret.replace("://", "://me:pass-word-7@")),
            source("", &format!("dir://{}", tree.display())),
            source("", &format!("iso://{}/mirrors", tree.display())),
            source("profiles='other'", "http://127.0.0.1:9/never"),
            source("arch='ppc64le'", "http://127.0.0.1:9/never"),
            source("imageonly='true'", "http://127.0.0.1:9/never"),
            source("", "obs://openSUSE:Leap/standard"),
        ]
        .concat(),
    );
    let ims = ImsServer::start();
    let mut variables = ims.variables();
    variables.push(("CA_CERT", dir.path().join("ca.crt").display().to_string()));
    let output = wait(&recipe, &["--timeout", "10"], &variables);
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(ims.statuses(), ["waiting_for_repos"]);
    assert!(!said.contains("pass-word-7") && said.contains("only kiwi-ng knows where obs: leads"), "{said}");
    // IMS gets a token, and a repository gets none.
    assert!(ims.state().tokens > 0);
    for request in [plain.requests(), without_head.requests()].concat() {
        assert!(!request.headers.contains_key("authorization"), "{request:?}");
    }
    assert!(own.requests().iter().all(|request| request.headers["authorization"].starts_with("Basic ")));
    // A profile that is asked for counts too.
    let output = wait(&recipe, &["--timeout", "1", "--profile", "other"], &variables);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(ims.statuses().last().unwrap(), "error");
    let said = text(&output.stderr);
    let missing = "the recipe: the repository http://127.0.0.1:9/never is missing after 1 s: ";
    assert!(said.contains(missing), "{said}");
    // At the beginning of the wait and at its end.
    assert_eq!(said.matches("Connection refused").count(), 2, "{said}");
}

#[test]
fn repository_that_comes_later_is_waited_for_and_missing_ones_are_named_once_each() {
    let dir = directory();
    let tree = dir.path().join("served");
    std::fs::create_dir(&tree).unwrap();
    let server = RepositoryServer::start(&tree);
    let local = dir.path().join("local");
    let recipe = described(
        dir.path(),
        &[source("alias='first'", &server.url), source("alias='second'", &format!("dir://{}", local.display()))]
            .concat(),
    );
    let began = Instant::now();
    let output = wait(&recipe, &["--timeout", "2"], &[]);
    assert!(began.elapsed().as_secs() < 10, "both are waited for at once");
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    for line in [
        "the repository first is missing after 2 s: http://127.0.0.1:",
        "the repository second is missing after 2 s: ",
        "answers 404 Not Found",
        "2 of them are missing: first, second",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
    assert_eq!(said.matches("waiting for the repository first").count(), 1, "{said}");
    let asked = server.requests().len();
    let waiting = Command::new(&IMS_SSHD).arg("wait-for-repos").arg(&recipe).spawn().unwrap();
    wait_until("a request", || server.requests().len() > asked);
    std::fs::create_dir(&local).unwrap();
    write(&tree, "repodata/repomd.xml", "");
    assert!(waiting.wait_with_output().unwrap().status.success());
}

#[test]
fn server_that_never_answers_is_waited_for_no_longer_than_the_limit() {
    let dir = directory();
    // The kernel accepts the connections.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    // One repository has one URL, the other one two.
    let recipe = described(dir.path(), &[source("", &url), source("type='apt-deb'", &url)].concat());
    let began = Instant::now();
    let output = wait(&recipe, &["--timeout", "2"], &[("IMS_STALL_LIMIT", "60".into())]);
    assert!(began.elapsed().as_secs() < 8, "{:?}", began.elapsed());
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert_eq!(said.matches("is missing after 2 s: it has not answered yet").count(), 2, "{said}");
}

#[test]
fn nothing_to_wait_for_is_a_success() {
    let dir = directory();
    let recipe = described(dir.path(), "");
    let output = wait(&recipe, &[], &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let output = wait(&recipe, &["--profile", "unknown"], &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("the recipe has no such profile; it has used, other"));
    let output = wait(&recipe, &["--timeout", "0"], &[]);
    assert!(text(&output.stderr).contains("TIMEOUT is '0'"), "{}", text(&output.stderr));
}
