//! Sessions in the status and in the log, and secrets, which appear in neither.

use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;
use testbed::*;

#[test]
fn status_lists_sessions_and_the_debug_log_has_their_beginnings_and_ends() {
    for mode in MODES {
        let before = std::time::SystemTime::now() - Duration::from_secs(1);
        let mut environment = Volume::new(Image::Debian).start_with(mode, &[("LOG_LEVEL", "debug")]).ready();
        let held = Held::open(&environment);
        let mut terminal = environment.ssh(&["-tt"]);
        let terminal = terminal.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        wait_until("both sessions in the status", || environment.sessions().len() == 2);

        let report: Value = serde_json::from_str(&environment.status(&["--json"])).unwrap();
        let time = |value: &Value| {
            let time = humantime::parse_rfc3339(value.as_str().unwrap()).unwrap();
            assert!(time >= before && time <= std::time::SystemTime::now(), "{value}");
        };
        assert_eq!(report["state"], "serving");
        time(&report["since"]);
        assert_eq!(report["tier"], if mode == Mode::Jailed { "namespace" } else { "plain" });
        assert_eq!(report["image_root_parent"], environment.parent.display().to_string());
        assert_eq!((&report["job"], &report["verdict"]), (&"5ec3b0a1-job".into(), &Value::Null));
        let printed = succeed(Command::new("ssh-keygen").arg("-lf").arg(environment.key.with_extension("pub")));
        let fingerprint = printed.split_whitespace().nth(1).unwrap();
        for session in environment.sessions() {
            assert_eq!(session["client"], "127.0.0.1", "{mode:?}: {session}");
            assert_eq!(session["key"], fingerprint, "{mode:?}: {session}");
            time(&session["since"]);
            let request = session["request"].as_str().unwrap();
            let wanted = match (session["terminal"].as_bool().unwrap(), mode) {
                (true, Mode::Jailed) => "shell",
                (true, Mode::Plain) => "-bash",
                (false, _) => "echo begun; cat; echo finished",
            };
            assert!(request.trim_end_matches('\'').ends_with(wanted), "{mode:?}: {session}");
        }
        let words = environment.status(&[]);
        assert!(words.starts_with(&format!("{}: serving since ", environment.parent.display())), "{words}");
        assert_eq!(words.lines().filter(|l| l.starts_with("  127.0.0.1  since ")).count(), 2, "{words}");

        assert!(held.finish().status.success());
        if mode == Mode::Jailed {
            environment.run("exit 7");
            environment.run("kill -KILL $$");
        }
        assert_eq!(environment.complete(), 0);
        terminal.wait_with_output().unwrap();
        let log = environment.log_text();
        let begun = |request: &str| {
            let line = log.lines().find(|l| l.contains("session begins") && l.contains(request));
            let line = line.unwrap_or_else(|| panic!("{mode:?}: no line 'session begins' of '{request}':\n{log}"));
            assert!(line.contains(r#"client="127.0.0.1""#) && line.contains(fingerprint), "{line}");
        };
        begun("echo begun; cat; echo finished");
        begun("terminal=true");
        let ends: Vec<_> = log.lines().filter(|l| l.contains("session ended")).collect();
        assert!(ends.iter().all(|l| l.contains("seconds=") && l.contains("pid=")), "{ends:?}");
        let how: &[&str] = if mode == Mode::Jailed {
            &["exit=0 ", "exit=7 ", "signal=\"SIGKILL\"", "signal=\"SIGHUP\""]
        } else {
            &["client=\"127.0.0.1\" port="; 2]
        };
        assert!(mode == Mode::Jailed || !ends.iter().any(|l| l.contains("exit=") || l.contains("signal=")), "{ends:?}");
        assert_eq!(ends.len(), how.len(), "not every session that began has ended; {mode:?}:\n{log}");
        for how in how {
            assert!(ends.iter().any(|l| l.contains(how)), "{mode:?}: no {how} in {ends:?}");
        }
    }
}

#[test]
fn connection_is_logged_once_whatever_the_number_of_its_sessions() {
    let mut environment = Environment::open(Image::Busybox, Mode::Jailed);
    let master = environment.master();
    for number in 1..=5 {
        assert!(succeed(master.ssh().arg(format!("echo {number}"))).starts_with(&number.to_string()));
    }
    drop(master);
    environment.run("echo other");
    assert_eq!(environment.complete(), 0);
    let log = environment.log_text();
    let begun: Vec<_> = log.lines().filter(|line| line.contains("session begins")).collect();
    assert_eq!(begun.len(), 2, "{log}");
    assert!(begun[0].contains("port=") && begun[0].contains("echo 1") && begun[1].contains("echo other"), "{begun:?}");
    assert!(!log.contains("session ended"), "{log}");
}

#[test]
fn status_of_an_environment_in_another_container_comes_from_its_signal_files() {
    let mut environment = Environment::open(Image::Busybox, Mode::Plain);
    let elsewhere = || {
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", "mount -t tmpfs tmpfs /run/ims-sshd && exec \"$@\"", "sh", &*IMS_SSHD]);
        let printed = succeed(command.args(["status", "--json"]).arg(&environment.parent));
        serde_json::from_str::<Value>(&printed).unwrap()
    };
    let parent = environment.parent.display().to_string();
    assert_eq!(elsewhere(), serde_json::json!({"image_root_parent": parent, "state": "serving", "verdict": null}));
    environment.complete();
    let ended = || {
        let printed = environment.status(&["--json"]);
        serde_json::from_str::<Value>(&printed).unwrap()
    };
    assert_eq!(ended(), serde_json::json!({"image_root_parent": parent, "state": "done", "verdict": "complete"}));
}

#[test]
fn json_status_of_a_serving_environment_keeps_every_byte() {
    let environment = Volume::new(Image::Busybox).start(Mode::Jailed);
    wait_until("the entrypoint to wait", || environment.log_text().contains("waiting for"));
    let parent = environment.parent.display();
    let waiting = format!("{{\"image_root_parent\":\"{parent}\",\"state\":\"waiting\",\"verdict\":null}}\n");
    assert_eq!(environment.status(&["--json"]), waiting);
    environment.touch("ready");
    environment.wait_for("sshd_listening");
    // Replaces values that no two environments share.
    let printed = || {
        let printed = environment.status(&["--json"]);
        let report: Value = serde_json::from_str(&printed).unwrap();
        let of_session = ["key", "pid", "request", "since"].map(|field| (field, &report["sessions"][0][field]));
        of_session.into_iter().chain([("since", &report["since"])]).fold(printed, |printed, (field, value)| {
            printed.replace(&format!("\"{field}\":{value}"), &format!("\"{field}\":_"))
        })
    };
    let with = |sessions: &str| {
        format!(
            "{{\"image_root_parent\":\"{parent}\",\"job\":\"5ec3b0a1-job\",\"sessions\":[{sessions}],\"since\":_,\
             \"state\":\"serving\",\"tier\":\"namespace\",\"verdict\":null}}\n"
        )
    };
    assert_eq!(printed(), with(""));
    let _held = Held::open(&environment);
    wait_until("the session in the status", || environment.sessions().len() == 1);
    let session = r#"{"client":"127.0.0.1","key":_,"pid":_,"request":_,"since":_,"terminal":false}"#;
    assert_eq!(printed(), with(session));
}

#[test]
fn log_format_and_log_level_are_obeyed() {
    for (level, has, lacks) in [
        ("debug", &["DEBUG", "INFO"][..], &[][..]),
        ("", &["INFO"], &["DEBUG"]),
        ("warning", &["WARN"], &["DEBUG", "INFO"]),
        ("ERROR", &[], &["DEBUG", "INFO", "WARN"]),
    ] {
        let volume = Volume::new(Image::Busybox);
        let mut command = volume.entrypoint(Mode::Plain, &[("LOG_LEVEL", level)]);
        volume.touch(".ims-sshd.additions");
        // The command-line option overrides the variable.
        let entrypoint = match level {
            "debug" => command.env("LOG_FORMAT", "text").args(["--log-format", "json"]).spawn().unwrap(),
            _ => command.env("LOG_FORMAT", "JSON").spawn().unwrap(),
        };
        let mut environment = Environment { entrypoint, volume, status: None }.ready();
        environment.says("true");
        assert_eq!(environment.complete(), 0);
        let lines: Vec<Value> = environment
            .log_text()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}")))
            .collect();
        for line in &lines {
            let object = line.as_object().unwrap();
            assert!(["timestamp", "level", "message"].iter().all(|key| object.contains_key(*key)), "{line}");
            humantime::parse_rfc3339(line["timestamp"].as_str().unwrap()).unwrap();
        }
        let numbers = ["pid", "milliseconds", "seconds", "exit", "port", "count", "bytes"];
        let numbers = lines.iter().flat_map(|line| numbers.iter().filter_map(|name| line.get(*name)));
        assert!(numbers.clone().all(Value::is_number), "{lines:?}");
        assert!(level != "debug" || numbers.count() > 5, "{lines:?}");
        let at = |level: &str| lines.iter().any(|line| line["level"] == level);
        assert!(has.iter().all(|level| at(level)) && !lacks.iter().any(|level| at(level)), "{level}: {lines:?}");
    }
}

#[test]
fn control_characters_in_names_are_escaped_in_log_and_status() {
    const HOSTILE: &str = "x\n2026-01-01T00:00:00Z  INFO forged\r\x1b[2K\u{2028}\u{202e}";
    let escaped = |shown: &str, what: &str| {
        assert!(shown.contains(r"x\n2026") && shown.contains("INFO forged"), "{what}: {shown}");
        assert!(!shown.contains(['\r', '\x1b', '\u{2028}', '\u{202e}']), "{what}: {shown:?}");
        assert!(!shown.lines().any(|line| line.starts_with("2026-01-01T")), "{what}: {shown}");
    };
    for mode in MODES {
        let mut environment = Environment::open(Image::Busybox, mode);
        let mut session = environment.ssh(&[]);
        session.arg(format!("cat; : '{HOSTILE}'")).stdin(Stdio::piped()).stdout(Stdio::null());
        let session = session.spawn().unwrap();
        wait_until("the session to be seen", || environment.sessions().len() == 1);
        let shown = environment.status(&[]);
        escaped(&shown, "status");
        assert_eq!(shown.lines().count(), 2, "{shown}");
        assert!(!environment.status(&["--json"]).contains(['\x1b', '\u{2028}', '\u{202e}']));
        assert!(environment.sessions()[0]["request"].as_str().unwrap().contains(HOSTILE));
        session.wait_with_output().unwrap();
        assert_eq!(environment.complete(), 0);
        escaped(&environment.log_text(), "log");
    }
    let volume = Volume::new(Image::Busybox);
    std::fs::create_dir_all(volume.image_root.join("boot")).unwrap();
    std::fs::write(volume.image_root.join("boot").join(HOSTILE), "").unwrap();
    for arguments in [&["enter", "--", HOSTILE][..], &["package", "--kernel", "nonesuch"]] {
        let (command, options) = arguments.split_first().unwrap();
        let output = Command::new(&IMS_SSHD).arg(command).arg(&volume.image_root).args(options).output().unwrap();
        assert!(!output.status.success());
        escaped(&text(output.stderr), command);
    }
}

#[test]
fn secrets_of_commands_and_scripts_are_masked_in_log_and_status() {
    let commands = [
        "PASSWORD=hidden01 true",
        "true --token hidden02 --user me",
        "true --token\thidden03",
        "PASSWORD='hidden04 and hidden05' true",
        "true \"--api-key=hidden06 hidden07\"",
        "true -H 'Authorization: Bearer hidden08' x",
        "export AWS_SECRET_ACCESS_KEY=hidden09\nS3_ACCESS_KEY=hidden10",
        "true https://me:hidden11@example.org/",
        "echo root:hidden12 | true chpasswd",
        "DB_PASS=hidden13 true --pass hidden14 --password=hidden15",
        "true; : mysql -phidden16; : curl -u me:hidden17 'https://s3/b?X-Amz-Credential=hidden18&X-Amz-Signature=hidden19'",
    ];
    for mode in MODES {
        let volume = Volume::new(Image::Busybox);
        let script = volume.dir.path().join("script");
        std::fs::write(
            &script,
            "set -x\nPASSWORD=hidden20\ntrue --token hidden21\n\
             printf -- '-----BEGIN RSA PRIVATE KEY-----\\nhidden22\\n-----END RSA PRIVATE KEY-----\\n'\n",
        )
        .unwrap();
        let script = script.display().to_string();
        let variables = [
            ("S3_ACCESS_KEY", "hidden30"),
            ("S3_SECRET_KEY", "hidden31"),
            ("LOG_LEVEL", "debug"),
            ("CUSTOMIZATION_SCRIPT", script.as_str()),
        ];
        let mut environment = volume.start_with(mode, &variables).ready();
        let session = |command| {
            let mut session = environment.ssh(&[]);
            session.arg(format!("{command}; cat; :")).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
            session.spawn().unwrap()
        };
        let clients = commands.map(session);
        wait_until("all sessions in the status", || environment.sessions().len() == commands.len());
        let seen = environment.status(&["--json"]);
        assert!(!seen.contains("hidden"), "{mode:?}: {seen}");
        for client in clients {
            client.wait_with_output().unwrap();
        }
        environment.wait_for_log(" has ended");
        assert_eq!(environment.complete(), 0);
        let log = environment.log_text();
        assert_eq!(log.matches("session begins").count(), commands.len(), "{mode:?}: {log}");
        assert!(log.contains("--user me") && log.contains("***"), "{log}");
        let shown: Vec<_> = log.lines().filter(|l| l.contains("hidden") || l.contains("PRIVATE KEY")).collect();
        assert!(shown.is_empty(), "{mode:?}: {shown:#?}");
    }
}
