//! Commands, exit codes, data, streams, variables, and other sessions, as a client gets them.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use testbed::*;

#[test]
fn command_runs_in_the_image_when_jailed_and_in_the_container_when_plain() {
    let jailed = Environment::open(Image::Debian, Mode::Jailed);
    assert_eq!(jailed.says("cat /etc/motd"), "image of the tests");
    let plain = Environment::open(Image::Debian, Mode::Plain);
    assert_eq!(plain.says(&format!("cat {}/etc/motd", plain.image_root.display())), "image of the tests");
}

#[test]
fn exit_status_is_passed_on_from_0_to_255() {
    for (image, mode) in [(Image::Debian, Mode::Jailed), (Image::Busybox, Mode::Jailed), (Image::Busybox, Mode::Plain)]
    {
        let environment = Environment::open(image, mode);
        let master = environment.master();
        // All of them once; elsewhere only those that shells treat specially.
        let all: Vec<i32> =
            if image == Image::Debian { (0..=255).collect() } else { vec![0, 1, 2, 126, 127, 128, 130, 143, 254, 255] };
        // One connection carries all sessions that it allows, because the login shell starts slowly.
        for codes in all.chunks(8) {
            let start =
                |code| master.ssh().arg(format!("exit {code}")).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
            let running: Vec<_> = codes.iter().map(|code| start(code).unwrap()).collect();
            for (code, child) in codes.iter().zip(running) {
                let output = child.wait_with_output().unwrap();
                assert_eq!(output.status.code(), Some(*code), "{image:?} {mode:?}");
                assert!(output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
            }
        }
    }
}

#[test]
fn jailed_command_ends_with_the_same_status_and_errors_as_a_plain_one() {
    let jailed = Environment::open(Image::Debian, Mode::Jailed);
    let plain = Environment::open(Image::Debian, Mode::Plain);
    let (jailed, plain) = (jailed.master(), plain.master());
    let commands = [
        "true",
        "false",
        "exit 77",
        "kill -TERM $$",
        "kill -KILL $$",
        "kill -HUP $$",
        "kill -SEGV $$",
        "kill -PIPE $$",
        "sh -c 'kill -TERM $$'; echo $?",
        "no-such-program",
        "/etc/passwd",
        "/nowhere/at/all",
        "echo out; echo err >&2; exit 3",
        "yes | head -n 1",
        "exec >&-; echo x",
        "echo \"a  b\" 'c\nd' $((1+1))",
        "cat; echo end",
        "umask",
        "pwd",
        "echo ~root && sleep 0",
        "ulimit -c >/dev/null; echo $-",
        "true & wait $!; echo $?",
        "trap 'echo bye' EXIT; exit 9",
        "printf '%s' \"$0\"",
        "cat /proc/self/stat >/dev/null && echo proc",
        "[ -t 0 ]; echo $?",
        "kill 0",
        "exec sh -c 'exit 5'",
        "python3 -c 'import os; os.kill(os.getpid(), 6)'",
        "(exit 4)",
        "echo $SHELL $USER $LOGNAME $HOME",
    ];
    for command in commands {
        let result = |master: &Master<'_>| {
            let output = master.ssh().arg(command).output().unwrap();
            (output.status.into_raw(), text(output.stdout), text(output.stderr))
        };
        assert_eq!(result(&jailed), result(&plain), "{command}");
    }
}

#[test]
fn ten_megabytes_pass_unchanged_and_stderr_stays_separate() {
    let mut bytes = vec![0; 10 << 20];
    let mut state = 1_u64;
    for chunk in bytes.chunks_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        chunk.copy_from_slice(&state.to_be_bytes()[..chunk.len()]);
    }
    for mode in MODES {
        let environment = Environment::open(Image::Busybox, mode);
        let output = feed(environment.ssh(&[]).arg("cat; echo apart >&2"), &bytes);
        assert!(output.status.success());
        assert!(output.stdout == bytes, "{mode:?}: the bytes differ");
        assert_eq!(text(output.stderr), "apart\n");
    }
}

#[test]
fn one_connection_carries_many_sessions() {
    for mode in MODES {
        let environment = Environment::open(Image::Debian, mode);
        let master = environment.master();
        // More than sshd's default limit of 10.
        let mut running: Vec<_> = (0..30)
            .map(|i| {
                let mut ssh = master.ssh();
                ssh.arg(format!("read x; echo {i} $x; exit {i}"))
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .spawn()
                    .unwrap()
            })
            .collect();
        for child in running.iter_mut().rev() {
            use std::io::Write;
            child.stdin.take().unwrap().write_all(b"go\n").unwrap();
        }
        for (i, child) in running.into_iter().enumerate() {
            let output = child.wait_with_output().unwrap();
            assert_eq!(
                (text(output.stdout), output.status.code()),
                (format!("{i} go\n"), Some(i32::try_from(i).unwrap()))
            );
        }
    }
}

#[test]
fn twenty_sessions_at_once_see_each_others_processes() {
    let environment = Environment::open(Image::Debian, Mode::Jailed);
    let sessions: Vec<_> = (0..20)
        .map(|i| {
            let mut ssh = environment.ssh(&[]);
            ssh.arg(format!("exec -a company-{i} sleep 1000"))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    wait_until("all of them to be seen", || environment.says("pgrep -c -f '^company-' || true") == "20");
    assert_eq!(environment.says("pkill -f '^company-'; echo $?"), "0");
    for mut session in sessions {
        assert!(!session.wait().unwrap().success());
    }
}

#[test]
fn nohup_outlives_its_session() {
    for mode in MODES {
        let environment = Environment::open(Image::Debian, mode);
        let pid = environment.says("nohup sleep 4321 >/dev/null 2>&1 & echo $!");
        assert_eq!(environment.says(&format!("kill -0 {pid} && cat /proc/{pid}/comm")), "sleep", "{mode:?}");
    }
}

#[test]
fn jail_looks_like_a_node_of_its_own() {
    let environment = Environment::open(Image::Debian, Mode::Jailed);
    for (command, answer) in [
        ("cat /proc/1/comm", "init"),
        ("ls /proc | grep -c '^[0-9]' | awk '{ print ($1 < 9) }' ", "1"),
        ("echo x > /dev/null; stat -c %F /dev/null", "character special file"),
        ("stat -f -c %T /dev/shm /run /dev | sort -u", "tmpfs"),
        ("head -c 4 /dev/zero | od -An -tx1", " 00 00 00 00"),
        ("readlink /dev/ptmx /dev/fd /dev/stdin", "pts/ptmx\n/proc/self/fd\n/proc/self/fd/0"),
        ("touch /sys/x 2>/dev/null || echo read-only", "read-only"),
        ("echo 1 2>/dev/null >/proc/sys/kernel/sysrq || echo read-only", "read-only"),
        ("cat /proc/kcore 2>/dev/null | wc -c", "0"),
        ("mknod /dev/mine c 1 3 && cat /dev/mine 2>/dev/null || echo no device", "no device"),
        ("mknod /root/mine c 1 3 && cat /root/mine 2>/dev/null || echo no device", "no device"),
        ("umount /proc 2>/dev/null || echo stays", "stays"),
        ("cat /proc/1/environ /proc/1/exe 2>/dev/null | wc -c", "0"),
        ("grep -c : /etc/passwd | awk '{ print ($1 > 5) }'", "1"),
        ("cut -d: -f1 /etc/group | head -n 1; id -Gn", "root\nroot"),
    ] {
        assert_eq!(environment.says(command), answer.trim_start_matches('\n').trim_end(), "{command}");
    }
    // The container's text, which the image does not have.
    assert_eq!(
        environment.says("cat /etc/resolv.conf"),
        std::fs::read_to_string("/etc/resolv.conf").unwrap().trim_end()
    );
}

#[test]
fn root_in_the_jail_has_only_the_kept_capabilities() {
    let environment = Environment::open(Image::Debian, Mode::Jailed);
    let sets = environment.says("grep -h '^Cap' /proc/self/status | cut -f2 | sort -u");
    // CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW SYS_CHROOT MKNOD AUDIT_WRITE
    // SETFCAP
    assert_eq!(sets, "0000000000000000\n00000000a80425fb");
}

#[test]
fn sessions_get_the_jobs_variables_merged_with_the_configurations() {
    for mode in MODES {
        let volume = Volume::new(Image::Debian);
        let config = std::fs::read_to_string(&volume.config).unwrap();
        std::fs::write(&volume.config, format!("SetEnv SITE=\"a b\" IMS_ARCH=wrong\n{config}AcceptEnv SITE_*\n"))
            .unwrap();
        let environment = volume.start(mode).ready();
        let line = "echo $IMS_JOB_ID,$IMS_ARCH,$IMS_DKMS_ENABLED,${REMOTE_BUILD_NODE-unset},$SITE,$LC_ALL,$SITE_PROXY";
        let output = environment
            .ssh(&["-o", "SendEnv=LC_ALL SITE_PROXY"])
            .arg(line)
            .env("LC_ALL", "C.UTF-8")
            .env("SITE_PROXY", "p q")
            .output()
            .unwrap();
        assert_eq!(
            text(output.stdout),
            "5ec3b0a1-job,x86_64,False,,a b,C.UTF-8,p q\n",
            "{mode:?} {}",
            text(output.stderr)
        );
    }
}

#[test]
fn variables_of_the_container_do_not_enter_sessions() {
    let environment = Environment::open(Image::Debian, Mode::Jailed);
    let names = environment.says("env | cut -d= -f1 | sort | tr '\\n' ' '");
    let known = [
        "HOME",
        "IMS_ARCH",
        "IMS_DKMS_ENABLED",
        "IMS_JOB_ID",
        "LOGNAME",
        "MAIL",
        "PATH",
        "PWD",
        "REMOTE_BUILD_NODE",
        "SHELL",
        "SHLVL",
        "SSH_CLIENT",
        "SSH_CONNECTION",
        "USER",
        "_",
    ];
    assert_eq!(names.split_whitespace().collect::<Vec<_>>(), known);
}

#[test]
fn login_shell_of_the_container_does_not_run_in_a_jailed_session() {
    for (mode, tier, shell, code, heard) in [
        (Mode::Plain, "auto", "/bin/bash", 0, true),
        (Mode::Plain, "auto", "/usr/sbin/nologin", 1, false),
        // In this tier sshd gets no mount namespace of its own, and the container's shell execs the helper.
        (Mode::Jailed, "user", "/bin/bash", 0, true),
        (Mode::Jailed, "namespace", "/bin/bash", 0, false),
        (Mode::Jailed, "namespace", "/usr/sbin/nologin", 0, false),
    ] {
        let volume = Volume::new(Image::Busybox);
        let home = volume.dir.path().join("home");
        std::fs::create_dir(&home).unwrap();
        std::fs::write(home.join(".bashrc"), "echo noise").unwrap();
        replace_root(&volume, &home, shell);
        let environment = volume.start_with(mode, &[("IMS_JAIL_TIER", tier)]).ready();
        let output = environment.run("exit 0");
        let said = text(output.stdout);
        assert_eq!((output.status.code(), said == "noise\n"), (Some(code), heard), "{mode:?} {tier} {shell}: {said}");
        // Root's shell in the container is unchanged.
        assert!(succeed(Command::new("getent").args(["passwd", "root"])).trim_end().ends_with(shell));
        drop(environment);
        succeed(Command::new("umount").arg("/etc/passwd"));
    }
}

#[test]
fn missing_shell_falls_back_to_sh_or_is_reported() {
    let volume = Volume::new(Image::Busybox);
    std::fs::write(volume.image_root.join("etc/passwd"), "root:x:0:0::/nowhere:/bin/zsh\n").unwrap();
    let environment = volume.start(Mode::Jailed).ready();
    assert_eq!(environment.says("echo $0 $SHELL; pwd"), "sh /bin/sh\n/");
    drop(environment);

    let volume = Volume::new(Image::Busybox);
    std::fs::remove_file(volume.image_root.join("bin/sh")).unwrap();
    let environment = volume.start(Mode::Jailed).ready();
    let output = environment.run("true");
    assert_eq!(output.status.code(), Some(127));
    assert!(text(&output.stderr).contains("cannot start /bin/sh in this image: No such file"), "{output:?}");
    // Files can still be transferred, to repair the image.
    assert!(environment.sftp("ls /etc/passwd").status.success());
}

#[test]
fn only_root_can_log_in_to_a_jailed_environment() {
    let environment = Environment::open(Image::Busybox, Mode::Jailed);
    let login = |user: &str| {
        let mut ssh = Command::new("ssh");
        ssh.args(environment.ssh_options()).args([
            "-p",
            &environment.port.to_string(),
            "-l",
            user,
            "127.0.0.1",
            "-s",
            "sftp",
        ]);
        ssh.stdin(Stdio::null()).output().unwrap()
    };
    assert!(login("root").status.success());
    let refused = login("nobody");
    assert!(text(&refused.stderr).contains("Permission denied"), "{refused:?}");
}

#[test]
fn helper_program_of_the_container_is_invisible_in_the_jail() {
    // The helper is the container's program: from inside it can be neither found nor written.
    let environment = Environment::open(Image::Debian, Mode::Jailed);
    assert_eq!(environment.says(&format!("ls {IMS_JAIL_SHELL} /proc/1/exe 2>/dev/null || echo hidden")), "hidden");
}

#[test]
fn helper_is_static_and_single_threaded() {
    assert!(succeed(Command::new("ldd").arg(&IMS_JAIL_SHELL)).contains("statically linked"));
    let functions = succeed(Command::new("nm").args(["--defined-only", "--demangle", &*IMS_JAIL_SHELL]));
    assert!(functions.contains("ims_sshd::jail::enter::join"));
    for foreign in [" notify::", " tokio::", " tracing_subscriber::"] {
        assert!(!functions.contains(foreign), "{foreign}");
    }
    let environment = Environment::open(Image::Busybox, Mode::Jailed);
    let mut session = environment.ssh(&[]).arg("sleep 1000").spawn().unwrap();
    let state = format!("session {}", environment.state_directory().join("jail").display());
    wait_until("the helper", || !processes_with(&state).is_empty());
    for pid in processes_with(&state) {
        assert_eq!(std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().count(), 1);
    }
    session.kill().unwrap();
    session.wait().unwrap();
}
