//! The OpenAPI document against the running service: schemathesis makes requests from it and compares the
//! answers.

use std::process::Command;

use testbed::{cache, text};

use crate::server::Server;

#[test]
fn answers_are_those_of_the_document() {
    let program = cache().join("schemathesis/bin/schemathesis");
    assert!(program.exists(), "no schemathesis in {}: run the tests with 'make test'", cache().display());
    let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
    let url = format!("http://{}", server.address);
    let mut run = Command::new(program);
    run.args(["run", &format!("{url}/openapi.yaml"), "--url", &url, "--phases", "coverage", "--seed", "1"]);
    // The root and v2 answer by the same code as v3. positive_data_acceptance: no schema says that a referenced record or
    // object exists. ignored_auth: behind a gateway the service asks for no token; the tests of access send one.
    run.args(["--include-path-regex", "^/(v3|version|healthz)", "--generation-database", "none", "--no-color"]);
    run.args(["--exclude-checks", "positive_data_acceptance,ignored_auth"]);
    let output = run.current_dir(dir.path()).env("HOME", dir.path()).output().unwrap();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
}
