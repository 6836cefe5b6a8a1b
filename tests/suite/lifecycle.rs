//! The life of an environment from `ready` to `exiting`, as the other containers of the pod see it.

use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use testbed::*;

fn listens(port: u16) -> bool {
    TcpStream::connect(("127.0.0.1", port)).is_ok()
}

#[test]
fn sshd_does_not_listen_before_ready_and_the_parent_may_be_mounted_late() {
    let volume = Volume::new(Image::Busybox);
    let later = volume.dir.path().join("not yet");
    std::fs::rename(&volume.parent, &later).unwrap();
    let environment = volume.start(Mode::Jailed);
    wait_until("the entrypoint to wait", || environment.log_text().contains("waiting for 'ready'"));
    assert!(!listens(environment.port));
    std::fs::rename(&later, &environment.parent).unwrap();
    environment.touch("unrelated");
    assert!(!listens(environment.port));
    let environment = environment.ready();
    assert!(listens(environment.port), "'sshd_listening' exists, so sshd has to accept connections");
    assert!(environment.log_text().contains("sshd is listening"), "{}", environment.log_text());
}

#[test]
fn complete_from_the_jail_creates_complete_in_the_parent_and_then_exiting() {
    let mut environment = Environment::open(Image::Debian, Mode::Jailed);
    environment.says("echo changed > /root/file; touch /tmp/complete");
    assert_eq!(environment.end(), 0);
    let time = |name: &str| std::fs::metadata(environment.signal(name)).unwrap().modified().unwrap();
    assert!(time("complete") <= time("exiting"));
    assert!(!environment.signal("failed").exists());
    assert!(!listens(environment.port));
    let left: Vec<_> = environment.changes().into_iter().filter(|p| p.components().count() > 1).collect();
    assert_eq!(left, [Path::new("root/file")], "ims-sshd left files in the image");
}

#[test]
fn failed_from_the_jail_is_recorded_in_the_image_and_in_the_parent() {
    let mut environment = Environment::open(Image::Debian, Mode::Jailed);
    environment.says("touch /tmp/failed");
    assert_eq!(environment.end(), 0);
    assert!(environment.signal("failed").exists() && environment.signal("exiting").exists());
    assert!(environment.image_root.join("tmp/failed").exists());
    assert!(!environment.signal("complete").exists());
}

#[test]
fn mark_in_the_parent_closes_jailed_and_plain_environments() {
    for mode in MODES {
        for verdict in ["complete", "failed"] {
            let mut environment = Environment::open(Image::Busybox, mode);
            environment.touch(verdict);
            assert_eq!(environment.end(), 0);
            assert!(environment.signal("exiting").exists());
            assert_eq!(environment.signal("failed").exists(), verdict == "failed");
            let in_image = environment.image_root.join("tmp/failed").exists();
            assert_eq!(in_image, verdict == "failed" && mode == Mode::Jailed, "{mode:?} {verdict}");
        }
    }
}

#[test]
fn failed_wins_over_complete() {
    let mut environment = Environment::open(Image::Debian, Mode::Jailed);
    environment.says("touch /tmp/complete /tmp/failed");
    assert_eq!(environment.end(), 0);
    assert!(environment.signal("failed").exists() && !environment.signal("complete").exists());

    let mut environment = Environment::open(Image::Busybox, Mode::Plain);
    environment.says(&format!("cd {} && touch complete failed", environment.parent.display()));
    assert_eq!(environment.end(), 0);
    assert!(environment.signal("failed").exists() && !environment.signal("complete").exists());
}

#[test]
fn failed_mark_of_a_process_that_is_being_ended_wins() {
    for mode in MODES {
        let mut environment = Volume::new(Image::Debian).start_with(mode, &[("IMS_CLOSE_GRACE", "1")]).ready();
        let mark = |name: &str| match mode {
            Mode::Jailed => format!("/tmp/{name}"),
            Mode::Plain => environment.signal(name).display().to_string(),
        };
        let late = format!("trap 'touch {}; exit' TERM; echo trapped; while :; do sleep 0.1; done", mark("failed"));
        // Wait for the line that the process prints once the trap is set.
        let fifo = "/dev/shm/late.$$";
        environment.says(&format!(
            "mkfifo {fifo} && (setsid nohup sh -c \"{late}\" >{fifo} 2>/dev/null &) && head -n 1 {fifo}; rm {fifo}"
        ));
        environment.says(&format!("touch {}", mark("complete")));
        assert_eq!(environment.end(), 0, "{mode:?}");
        assert!(environment.signal("failed").exists() && !environment.signal("complete").exists(), "{mode:?}");
    }
}

#[test]
fn command_that_marks_the_image_still_sends_its_output() {
    for mode in MODES {
        let mut environment = Environment::open(Image::Debian, mode);
        let mark = if mode == Mode::Jailed {
            "/tmp/complete".into()
        } else {
            environment.signal("complete").display().to_string()
        };
        assert_eq!(environment.says(&format!("touch {mark}; sleep 1; echo the result")), "the result", "{mode:?}");
        assert_eq!(environment.end(), 0);
    }
}

#[test]
fn client_that_disconnects_right_after_marking_is_served() {
    let script = "\
import paramiko, sys
client = paramiko.SSHClient()
client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
client.connect('127.0.0.1', port=int(sys.argv[1]), username='root', key_filename=sys.argv[2], timeout=5, allow_agent=False, look_for_keys=False)
_, out, _ = client.exec_command('echo ~root && sleep 0')
assert out.read() == b'/root\\n' and out.channel.recv_exit_status() == 0
client.exec_command('touch /tmp/complete')
client.close()
";
    let mut environment = Environment::open(Image::Debian, Mode::Jailed);
    // Use Debian's own Python, for which python3-paramiko is installed.
    let mut python = Command::new("/usr/bin/python3");
    python.args(["-c", script, &environment.port.to_string()]).arg(&environment.key);
    succeed(&mut python);
    assert_eq!(environment.end(), 0);
    assert!(environment.signal("complete").exists());
}

#[test]
fn mark_is_found_after_tmp_was_renamed_linked_or_mounted_over() {
    for trick in [
        "mv /tmp /old && mkdir -m 1777 /tmp",
        "mv /tmp /elsewhere && ln -s elsewhere /tmp",
        "rm -rf /tmp && ln -s /dev/shm /tmp",
        "chmod 700 /tmp && chown daemon /tmp",
    ] {
        let mut environment = Environment::open(Image::Debian, Mode::Jailed);
        environment.says(&format!("{trick} && touch /tmp/complete"));
        assert_eq!(environment.end(), 0, "{trick}");
        assert!(environment.signal("complete").exists());
    }
    // A job that builds kernel modules may mount over /tmp.
    let environment = Volume::new(Image::Debian).start_with(Mode::Jailed, &[("JOB_ENABLE_DKMS", "True")]);
    let mut environment = environment.ready();
    assert!(environment.sftp("ls /\n").status.success());
    environment.says("mount -t tmpfs none /tmp && touch /tmp/complete");
    assert_eq!(environment.end(), 0);
    assert!(environment.signal("complete").exists());
}

#[test]
fn marks_that_came_with_the_image_are_removed_and_are_no_verdict() {
    let volume = Volume::new(Image::Busybox);
    std::fs::write(volume.image_root.join("tmp/complete"), "").unwrap();
    let mut environment = volume.start(Mode::Jailed).ready();
    assert_eq!(environment.says("echo open"), "open");
    assert!(environment.log_text().contains("removed /tmp/complete, which came with the image"));
    environment.says("touch /tmp/failed");
    environment.end();
}

#[test]
fn signal_records_failed_and_creates_exiting_as_a_failed_mark_does() {
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
        for open in [false, true] {
            let environment = Volume::new(Image::Busybox).start(Mode::Jailed);
            let mut environment = if open { environment.ready() } else { environment };
            wait_until("the entrypoint to wait", || environment.log_text().contains("waiting for"));
            let mut session = open.then(|| environment.ssh(&[]).arg("sleep 1000").spawn().unwrap());
            kill(environment.pid(), signal).unwrap();
            assert_eq!(environment.end(), code);
            assert!(environment.signal("failed").exists() && environment.signal("exiting").exists());
            assert!(!environment.signal("complete").exists());
            if let Some(session) = &mut session {
                assert!(!session.wait().unwrap().success());
            }
        }
    }
}

#[test]
fn close_ends_running_sessions_and_background_processes() {
    for mode in MODES {
        let mut environment = Volume::new(Image::Debian).start_with(mode, &[("IMS_CLOSE_GRACE", "1")]).ready();
        environment.says("setsid nohup sleep 76543 >/dev/null 2>&1 & exit 0");
        let mut session = environment.ssh(&[]).arg("trap '' HUP TERM; sleep 76543; sleep 76543").spawn().unwrap();
        wait_until("both processes to run", || processes_with("sleep 76543").len() >= 3);
        assert_eq!(environment.complete(), 0, "{mode:?}");
        session.wait().unwrap();
        let left: Vec<_> = processes_with("sleep 76543").into_iter().filter(|pid| !is_ssh_client(*pid)).collect();
        assert_eq!(left, [0_u32; 0], "{mode:?}");
    }
}

fn is_ssh_client(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c.trim() == "ssh")
}

#[test]
fn customization_script_runs_executable_or_not_and_its_output_is_logged() {
    let script =
        "echo \"in $IMAGE_ROOT_PARENT for $IMS_JOB_ID\"\nprintf 'no newline' >&2\ntouch $IMAGE_ROOT_PARENT/complete\n";
    for (mode, head) in [(0o644, ""), (0o755, "#!/bin/sh\n"), (0o755, "")] {
        let volume = Volume::new(Image::Busybox);
        let path = volume.dir.path().join("run_script.sh");
        std::fs::write(&path, format!("{head}{script}")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        let mut environment = volume.start_with(Mode::Plain, &[("CUSTOMIZATION_SCRIPT", &path.display().to_string())]);
        environment.touch("ready");
        assert_eq!(environment.end(), 0);
        let log = environment.log_text();
        assert!(
            log.contains(&format!("customization script: in {} for 5ec3b0a1-job", environment.parent.display())),
            "{log}"
        );
        assert!(log.contains("customization script: no newline"), "{log}");
        assert!(environment.signal("complete").exists() && environment.signal("exiting").exists());
    }
}

#[test]
fn failing_script_marks_the_image_failed_unless_enable_debug_keeps_it_open() {
    let failing = |debug: &str| {
        let volume = Volume::new(Image::Busybox);
        let path = volume.dir.path().join("run_script.sh");
        std::fs::write(&path, "echo before; exit 3\n").unwrap();
        volume
            .start_with(Mode::Jailed, &[("CUSTOMIZATION_SCRIPT", &path.display().to_string()), ("ENABLE_DEBUG", debug)])
    };
    let mut environment = failing("False");
    environment.touch("ready");
    assert_eq!(environment.end(), 0);
    assert!(environment.signal("failed").exists());
    assert!(environment.log_text().contains("exit code 3: closing as failed"), "{}", environment.log_text());

    let mut environment = failing("true").ready();
    wait_until("the end of the script", || environment.log_text().contains("exit code 3; ENABLE_DEBUG is true"));
    assert_eq!(environment.says("echo open"), "open");
    assert_eq!(environment.complete(), 0);
    assert!(environment.signal("complete").exists());
}

#[test]
fn missing_customization_script_is_ignored() {
    let mut environment =
        Volume::new(Image::Busybox).start_with(Mode::Plain, &[("CUSTOMIZATION_SCRIPT", "/nowhere.sh")]).ready();
    assert_eq!(environment.complete(), 0);
    assert!(environment.signal("complete").exists());
}

#[test]
fn create_job_opens_a_shell_only_for_a_failed_build_with_enable_debug() {
    let create = |debug: &str, failed: bool| {
        let volume = Volume::laid_out(Image::Busybox, "build/image-root");
        if failed {
            volume.touch("build_failed");
        }
        let further =
            [("IMS_ACTION", "create"), ("ENABLE_DEBUG", debug), ("SSH_JAIL", "False"), ("SSHD_CONFIG_FILE", "")];
        volume.start_with(Mode::Plain, &further)
    };
    for (debug, failed) in [("true", false), ("false", false), ("false", true)] {
        let mut environment = create(debug, failed);
        assert_eq!(environment.end(), 0);
        assert!(environment.log_text().contains("no shell is wanted"), "{}", environment.log_text());
        assert!(!environment.signal("exiting").exists());
    }
    // A build may fail before there is anything in its image root.
    let volume = Volume::laid_out(Image::Busybox, "build/image-root");
    std::fs::remove_dir_all(&volume.image_root).and_then(|()| std::fs::create_dir(&volume.image_root)).unwrap();
    volume.touch("build_failed");
    let further = [("IMS_ACTION", "create"), ("ENABLE_DEBUG", "True"), ("SSH_JAIL", "False"), ("SSHD_CONFIG_FILE", "")];
    let mut environment = volume.start_with(Mode::Plain, &further).ready();
    assert_eq!(environment.says(&format!("ls {} | wc -l", environment.image_root.display())), "0");
    assert_eq!(environment.complete(), 0);
    let mut environment = create("TRUE", true).ready();
    assert_eq!(environment.says(&format!("ls {}", environment.image_root.join("etc").display())), "passwd");
    assert_eq!(environment.complete(), 0);
}

#[test]
fn entrypoint_as_pid_1_reaps_orphans() {
    let volume = Volume::new(Image::Debian);
    volume.touch("ready");
    let log = std::fs::File::create(volume.log()).unwrap();
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc", &*IMS_SSHD, "entrypoint"]);
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").envs(volume.variables(Mode::Plain));
    let entrypoint = command.stdin(Stdio::null()).stderr(log).spawn().unwrap();
    let mut environment = Environment { entrypoint, volume, status: None };
    environment.wait_for("sshd_listening");
    assert_eq!(environment.says("cat /proc/1/comm"), "ims-sshd");
    // Orphans are reaped as soon as they end.
    environment.says("for i in $(seq 30); do (sleep 0.01 &) ; done; exit 0");
    wait_until("no zombie to be left", || environment.says("ps -e -o stat= | grep -c Z || true") == "0");
    assert_eq!(environment.complete(), 0);
    assert!(environment.signal("exiting").exists());
}

#[test]
fn sshd_gets_its_options_and_nothing_else() {
    let mut environment = Environment::open(Image::Busybox, Mode::Jailed);
    let title = format!("-E {} -f {}", environment.sshd_log().display(), environment.config.display());
    let sshd: Vec<_> = processes_with(&title)
        .into_iter()
        .filter(|p| std::fs::read_to_string(format!("/proc/{p}/comm")).unwrap().trim() == "sshd")
        .collect();
    assert_eq!(sshd.len(), 1);
    let line = std::fs::read(format!("/proc/{}/cmdline", sshd[0])).unwrap();
    assert!(text(line).contains(&format!("/usr/sbin/sshd {title} [listener]")));
    assert_eq!(environment.complete(), 0);
}

#[test]
fn sshd_configuration_gets_one_include_and_is_restored() {
    let volume = Volume::new(Image::Busybox);
    let before = std::fs::read_to_string(&volume.config).unwrap();
    let mut environment = volume.start(Mode::Jailed).ready();
    let during = std::fs::read_to_string(&environment.config).unwrap();
    let fragment = environment.state_directory().join("sshd.conf");
    assert_eq!(during, format!("Include {} # ims-sshd\n{before}", fragment.display()));
    assert_eq!(environment.complete(), 0);
    assert_eq!(std::fs::read_to_string(&environment.config).unwrap(), before);
    assert!(!environment.state_directory().exists());
}
