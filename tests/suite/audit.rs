//! Logins on a terminal where sshd may not write to the kernel's audit log, in containers that a profile does not keep
//! from it.

use std::os::unix::fs::PermissionsExt;

use testbed::*;

/// An environment in a container that was given no CAP_AUDIT_WRITE, in which setpriv(1) is given `options` besides.
fn open(mode: Mode, options: &str) -> Environment {
    let volume = Volume::new(Image::Busybox);
    let program = volume.dir.path().join("without-audit");
    let script = format!("#!/bin/sh\nexec setpriv {options} {} \"$@\"\n", &*IMS_SSHD);
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    volume.start_by(&program, mode, &[]).ready()
}

#[test]
fn a_terminal_needs_no_audit_records() {
    for mode in MODES {
        for options in ["--bounding-set=-audit_write", "--no-new-privs --bounding-set=-audit_write,-sys_admin"] {
            let mut environment = open(mode, options);
            let mut login = environment.ssh(&["-tt", "-e", "none"]);
            let output = login.arg("tty && echo here").output().unwrap();
            assert!(output.status.success() && text(&output.stdout).contains("here"), "{options}: {output:?}");
            assert_eq!(environment.complete(), 0);
            assert!(!environment.log_text().contains("AUDIT_WRITE"), "{}", environment.log_text());
        }
    }
}

/// Waits for the only warning of a login that ended before its session. Returns the log.
fn is_told(environment: &Environment, reason: &str) -> String {
    environment.wait_for_log("sshd accepted a login that ended before its session began");
    let log = environment.log_text();
    let told = log.lines().filter(|line| line.contains("ended before its session")).collect::<Vec<_>>();
    assert_eq!(told.len(), 1, "{log}");
    for part in [" WARN ", "client=\"127.0.0.1\" port=", "user=\"root\"", reason] {
        assert!(told[0].contains(part), "{log}");
    }
    log
}

#[test]
fn a_login_that_ends_before_its_session_is_in_the_log_with_the_reason_of_sshd() {
    let mut environment = open(Mode::Plain, "--bounding-set=-audit_write,-sys_admin");
    let without_terminal = environment.ssh(&[]).arg("true").output().unwrap();
    assert!(without_terminal.status.success(), "{without_terminal:?}");
    let output = environment.ssh(&["-tt", "-e", "none"]).arg("true").output().unwrap();
    assert_eq!(output.status.code(), Some(255), "{output:?}");
    let log = is_told(&environment, "linux_audit_write_entry failed: Operation not");
    assert!(log.contains("logins on a terminal will fail: sshd lacks CAP_AUDIT_WRITE"), "{log}");
    assert_eq!(environment.complete(), 0);
}

/// A terminal that sshd cannot give to the user: a devpts without `gid=5`, and no CAP_CHOWN.
#[test]
fn a_login_that_ends_with_its_terminal_is_in_the_log_too() {
    let volume = Volume::new(Image::Busybox);
    let program = volume.dir.path().join("without-chown");
    let inside = "mount -t devpts -o newinstance,mode=620,ptmxmode=666 devpts /dev/pts && exec setpriv \
                  --bounding-set=-chown,-audit_write \"$0\" \"$@\"";
    let script = format!("#!/bin/sh\nexec unshare -m sh -c '{inside}' {} \"$@\"\n", &*IMS_SSHD);
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut environment = volume.start_by(&program, Mode::Plain, &[]).ready();
    // Neither a session without a terminal nor a connection without a session is one that sshd ended.
    assert!(environment.ssh(&[]).arg("true").status().unwrap().success());
    let idle = environment.ssh(&["-N"]).spawn().unwrap();
    let output = environment.ssh(&["-tt", "-e", "none"]).arg("true").output().unwrap();
    assert_eq!(output.status.code(), Some(255), "{output:?}");
    is_told(&environment, "chown(/dev/pts/");
    drop(Ended::new(idle));
    assert_eq!(environment.complete(), 0);
}
