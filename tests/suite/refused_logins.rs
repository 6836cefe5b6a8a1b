//! Logins that sshd refuses appear in the environment's log; connections without a login attempt do not.

use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use testbed::*;

/// Tries to log in as `user` with a new key of this name.
fn try_key(environment: &Environment, user: &str, key: &str) {
    let key = environment.dir.path().join(key);
    if !key.exists() {
        succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key));
    }
    let mut command = Command::new("ssh");
    command.args(ssh_options(&key)).args(["-o", "BatchMode=yes", "-p", &environment.port.to_string()]);
    command.args(["-l", user, "127.0.0.1", "true"]).stdin(Stdio::null());
    assert_eq!(command.output().unwrap().status.code(), Some(255));
}

fn refusals(environment: &Environment) -> Vec<String> {
    environment.log_text().lines().filter(|line| line.contains("refused")).map(str::to_owned).collect()
}

/// Waits until sshd has logged so many refusals. Its child may write its last line after the client is gone, and closing
/// the environment before would end the child first.
fn wait_for_refusals_of_root(environment: &Environment, count: usize) {
    wait_until("the refusals of root to be in sshd's log", || {
        let log = std::fs::read_to_string(environment.sshd_log()).unwrap();
        log.matches("closed by authenticating user").count() == count
    });
}

#[test]
fn refused_login_is_logged_once_with_client_user_and_reason() {
    for mode in MODES {
        let mut environment = Environment::open(Image::Busybox, mode);
        // A probe, and a client that takes it for a web server.
        for said in ["", "GET / HTTP/1.0\r\n\r\n"] {
            let mut probe = TcpStream::connect(("127.0.0.1", environment.port)).unwrap();
            probe.write_all(said.as_bytes()).unwrap();
        }
        try_key(&environment, "root", "another");
        let unknown = "nobody from 198.51.100.9 port 1";
        try_key(&environment, unknown, "another");
        let config = std::fs::read_to_string(&environment.config).unwrap();
        let keys = config.lines().find_map(|line| line.strip_prefix("AuthorizedKeysFile ")).unwrap();
        let log = || std::fs::read_to_string(environment.sshd_log()).unwrap();
        assert!(log().contains("kex_exchange_identification") && log().contains("invalid format"), "{}", log());
        wait_until("both to be in the log", || refusals(&environment).len() >= 2);
        std::fs::set_permissions(keys, std::fs::Permissions::from_mode(0o777)).unwrap();
        try_key(&environment, "root", "another");
        wait_for_refusals_of_root(&environment, 2);
        // Refusals of the last second are logged at the end.
        assert_eq!(environment.complete(), 0);
        let told = refusals(&environment);
        assert_eq!(told.len(), 3, "{told:#?}");
        let has = |line: &str, parts: &[&str]| parts.iter().all(|part| line.contains(part));
        for (line, parts) in told.iter().zip([
            &["user=\"root\"", "reason=\"no key that the client has is authorized\""],
            &["user=\"nobody from 198.51.100.9 port 1\"", "reason=\"there is no such user\""],
            &["user=\"root\"", "reason=\"bad ownership or modes for file "],
        ]) {
            assert!(has(line, parts) && has(line, &[" WARN ", "client=\"127.0.0.1\" port="]), "{line}");
        }
    }
}

#[test]
fn many_refused_logins_are_counted_instead_of_logged() {
    let mut environment = Environment::open(Image::Busybox, Mode::Jailed);
    for _ in 0..14 {
        try_key(&environment, "root", "another");
    }
    wait_for_refusals_of_root(&environment, 14);
    assert_eq!(environment.complete(), 0);
    let told = refusals(&environment);
    assert_eq!(told.iter().filter(|line| line.contains("refused a login")).count(), 10, "{told:#?}");
    assert!(told.last().unwrap().contains("refused further logins count=4 "), "{told:#?}");
}

#[test]
fn sshd_log_that_is_the_environments_own_is_not_logged_twice() {
    let volume = Volume::new(Image::Busybox);
    let log = volume.log();
    let config = volume.config.display().to_string();
    let options = format!("-E {} -f {config}", log.display());
    let mut environment = volume.start_with(Mode::Plain, &[("SSHD_OPTIONS", &options)]).ready();
    try_key(&environment, "root", "another");
    wait_until("sshd to log", || environment.log_text().contains("closed by authenticating user"));
    assert_eq!(environment.complete(), 0);
    assert!(refusals(&environment).is_empty(), "{}", environment.log_text());
}
