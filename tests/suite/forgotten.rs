//! Time limits of environments that nobody closes.

use std::process::Stdio;
use std::time::{Duration, Instant};

use testbed::*;

#[test]
fn idle_limit_closes_as_failed_but_short_sessions_and_the_script_reset_it() {
    let limit = [("IMS_IDLE_LIMIT", "4"), ("IMS_CLOSE_GRACE", "0")];
    let reason = "no session for 4 s (IMS_IDLE_LIMIT): closing as failed";
    let in_mode = |mode: Mode| {
        let mut environment = Volume::new(Image::Busybox).start_with(mode, &limit).ready();
        assert_eq!(environment.says("sleep 5; echo still here"), "still here", "{mode:?}");
        if mode == Mode::Jailed {
            // Each session is shorter than the poll interval.
            let coming = Instant::now();
            while coming.elapsed() < Duration::from_millis(5500) {
                environment.says("sleep 0.01");
            }
        }
        assert!(!environment.log_text().contains(reason));
        let quiet = Instant::now();
        environment.fails_visibly(0, &[reason]);
        assert!(quiet.elapsed() < Duration::from_secs(20), "{:?}", quiet.elapsed());
    };
    let with_script = || {
        let volume = Volume::new(Image::Busybox);
        let script = volume.dir.path().join("script");
        std::fs::write(&script, "sleep 5; echo still here\n").unwrap();
        let script = script.display().to_string();
        let variables = [limit[0], limit[1], ("CUSTOMIZATION_SCRIPT", script.as_str())];
        let mut environment = volume.start_with(Mode::Plain, &variables).ready();
        environment.fails_visibly(0, &["customization script: still here", reason]);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| in_mode(Mode::Jailed));
        scope.spawn(|| in_mode(Mode::Plain));
        scope.spawn(with_script);
    });
}

#[test]
fn session_limit_warns_shells_and_closes_as_failed() {
    for mode in MODES {
        let mut environment = Volume::new(Image::Busybox).start_with(mode, &[("IMS_SESSION_LIMIT", "4")]).ready();
        let mut terminal = environment.ssh(&["-tt"]);
        let terminal = terminal.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        environment.fails_visibly(0, &["open for 4 s (IMS_SESSION_LIMIT): closing as failed"]);
        let told = text(terminal.wait_with_output().unwrap().stdout);
        let warned = told.find("ims-sshd: this environment closes as failed in ").unwrap_or_else(|| panic!("{told}"));
        let closed = told.find("was marked failed and will not be packed").unwrap_or_else(|| panic!("{told}"));
        assert!(warned < closed, "{told}");
    }
}
