//! The jail looks like a booted compute node.

use std::path::Path;
use std::process::Command;

use testbed::*;

use crate::clients::Place;

/// Lines of /etc/environment, sane and odd.
const ETC_ENVIRONMENT: &str = "# a comment\n\
    PLAIN=one\n\
    export EXPORTED=two words\n\
    \x20 INDENTED=three\n\
    \x20\t export INDENTED_EXPORTED=three\n\
    DOUBLE=\"in quotes\"\n\
    SINGLE='in quotes'\n\
    INNER=\"a\"b'c\"\n\
    HALF=\"half\n\
    ONE_QUOTE=\"\n\
    LATER=a\"b\"\n\
    COMMENTED=four # not this\n\
    QUOTED_HASH=\"a#b\"\n\
    TRAILING=five   \n\
    TABBED=six\t\n\
    QUOTED_TRAILING=\"six\"  \n\
    EMPTY=\n\
    ONLY_QUOTES=\"\"\n\
    NOT EXPANDED=x\n\
    DOLLAR=$PLAIN/${PLAIN}\n\
    EQUALS=a=b=c\n\
    =nameless\n\
    da-sh=x\n\
    \x20 \n\
    TWICE=first\n\
    TWICE=second\n\
    GONE=x\n\
    GONE\n\
    NEVER_THERE\n\
    JOINED=seven\\\n\
    eight\n\
    JOINED_MORE=a \\\n\
    \x20  b \\  \n\
    # between\n\
    \n\
    c\n\
    BACKSLASH=a\\b\n\
    NOT_JOINED=a\\ # b\n\
    LD_LIBRARY_PATH=/of/the/image\n\
    LANG=of_the_image\n\
    LC_TIME=of_the_image\n\
    PATH=/of/the/image:/usr/bin:/bin\n\
    export\n\
    export \n\
    LAST=without a newline";

/// Variables of a session, without those of its client and its account.
fn variables(environment: &Environment) -> Vec<String> {
    let mut ssh = environment.ssh(&["-o", "SendEnv=LANG LC_ALL"]);
    let output = ssh.env("LANG", "of_the_client").env("LC_ALL", "C").arg("env -0").output().unwrap();
    let mut found: Vec<_> = text(&output.stdout).split_terminator('\0').map(str::to_owned).collect();
    // sshd sets the first, PAM the next when it has shown the message of the day; the last are ours, one in the chroot
    // tier only.
    let elsewhere = ["SSH_", "MOTD_SHOWN=", "MAIL=", "SYSTEMD_OFFLINE="];
    found.retain(|variable| !elsewhere.iter().any(|name| variable.starts_with(name)));
    found.sort();
    found
}

#[test]
fn etc_environment_is_read_as_pam_env_reads_it() {
    let plain = Volume::new(Image::Busybox);
    let config = std::fs::read_to_string(&plain.config).unwrap();
    std::fs::write(&plain.config, config + "UsePAM yes\n").unwrap();
    // In this thread's own mounts.
    for (over, content) in [("/etc/environment", ETC_ENVIRONMENT), ("/etc/default/locale", "")] {
        let file = plain.dir.path().join("file-of-pam");
        std::fs::write(&file, content).unwrap();
        if Path::new(over).exists() {
            succeed(Command::new("mount").arg("--bind").arg(&file).arg(over));
        }
        std::fs::remove_file(file).unwrap();
    }
    let of_pam = variables(&plain.start(Mode::Plain).ready());
    assert!(of_pam.contains(&"PLAIN=one".to_owned()), "sshd has not asked PAM: {of_pam:?}");

    for tier in TIERS {
        let volume = Volume::new(Image::Debian);
        std::fs::write(volume.image_root.join("etc/environment"), ETC_ENVIRONMENT).unwrap();
        let environment = volume.start_with(Mode::Jailed, &[("IMS_JAIL_TIER", tier)]).ready();
        assert_eq!(variables(&environment), of_pam, "{tier}");
    }
}

#[test]
fn etc_environment_takes_nothing_from_the_job_and_holds_nobody_up() {
    let environment = Environment::open(Image::Busybox, Mode::Jailed);
    let file = environment.image_root.join("etc/environment");
    let names =
        ["IMS_JOB_ID", "IMS_ARCH", "REMOTE_BUILD_NODE", "SSH_CONNECTION", "SSH_AUTH_SOCK", "HOME", "USER", "SHELL"];
    let session =
        || environment.says(&names.map(|name| format!("echo {name}=${name}")).join("; ")).replace(char::is_numeric, "");
    let before = session();
    std::fs::write(&file, names.map(|name| format!("{name}=/evil\n")).concat()).unwrap();
    assert_eq!(session(), before);

    let evil = |text: &[u8]| {
        std::fs::write(&file, text).unwrap();
        assert_eq!(environment.says("echo here $X"), "here");
        // Nor does a library that the image wants loaded keep files from coming: the server is the container's.
        assert!(environment.sftp("pwd\n").status.success());
    };
    evil(b"LD_PRELOAD=/nowhere.so\nLD_LIBRARY_PATH=/nowhere\n");
    evil(&b"X=\0\nX\0=1\n\xff=1\n".repeat(1000));
    evil(&[b"X=".to_vec(), vec![b'a'; 1 << 20]].concat());
    evil(&b"\\\n".repeat(30_000));
    std::fs::remove_file(&file).unwrap();
    succeed(Command::new("mkfifo").arg(&file));
    assert_eq!(environment.says("echo here $X"), "here");
    std::fs::remove_file(&file).unwrap();
    let secret = environment.dir.path().join("secret");
    std::fs::write(&secret, "X=secret\n").unwrap();
    std::os::unix::fs::symlink(&secret, &file).unwrap();
    assert_eq!(environment.says("echo here $X"), "here", "a link out of the image");
    // The file may hold this many.
    std::fs::remove_file(&file).unwrap();
    let many: String = (0..6000).map(|n| format!("V{n}={n}\n")).collect();
    std::fs::write(&file, &many).unwrap();
    assert_eq!(environment.says("echo $V0 $V5999"), "0 5999");
}

#[test]
fn the_jail_has_the_name_that_it_is_given_and_the_container_keeps_its_own() {
    let own = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    for tier in TIERS {
        let variables = [("IMS_JAIL_TIER", tier), ("IMS_JAIL_HOSTNAME", "nid000001.example")];
        let mut environment = Volume::new(Image::Debian).start_with(Mode::Jailed, &variables).ready();
        let name = if tier == "chroot" { own.trim() } else { "nid000001.example" };
        assert_eq!(environment.says("uname -n; hostname"), format!("{name}\n{name}"), "{tier}");
        // A jail that is made anew has it again.
        if tier == "namespace" {
            nix::sys::signal::kill(environment.jails_init(), nix::sys::signal::Signal::SIGKILL).unwrap();
            wait_until("another jail", || text(environment.run("uname -n").stdout) == "nid000001.example\n");
        }
        assert_eq!(environment.complete(), 0);
    }
    assert_eq!(std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), own);
    let environment = Environment::open(Image::Busybox, Mode::Jailed);
    assert_eq!(environment.says("cat /proc/sys/kernel/hostname"), own.trim());
}

/// Without a capability that would open the jail; and a name that is given to an image is none of the machine's.
#[test]
fn root_in_the_jail_changes_its_host_name_and_no_others() {
    let own = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    for tier in NAMESPACE_TIERS {
        let variables = [("IMS_JAIL_TIER", tier), ("IMS_JAIL_HOSTNAME", "nid000001")];
        let mut environment = Volume::new(Image::Debian).start_with(Mode::Jailed, &variables).ready();
        assert_eq!(environment.says("hostname; hostname nid000002 && uname -n"), "nid000001\nnid000002", "{tier}");
        assert_eq!(environment.says("hostname; cat /proc/sys/kernel/hostname"), "nid000002\nnid000002", "{tier}");
        let python = "import socket; socket.sethostname('nid000003'); print(socket.gethostname())";
        assert_eq!(environment.says(&format!("python3 -c \"{python}\"")), "nid000003", "{tier}");
        assert_eq!(environment.says("domainname example && domainname"), "example", "{tier}");
        // A user of the image may not, as on a node.
        let users = environment.run("setpriv --reuid=65534 --clear-groups hostname nid000004");
        assert!(text(&users.stderr).contains("you must be root"), "{tier}: {users:?}");
        assert_eq!(environment.complete(), 0);
        assert_eq!(std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), own);
    }
}

#[test]
fn limits_and_umask_are_those_of_a_plain_session() {
    let here = [Place::Namespace, Place::User, Place::Plain];
    let [jailed, user, plain] = here.map(|place| place.open(Image::Debian).says("umask; ulimit -a; ulimit -Ha"));
    assert_eq!(jailed, plain);
    assert_eq!(user, plain);
}

/// A command line, its exit code, and a part of what it says; all at once, and none waits for anything.
const NODE_COMMANDS: [(&str, i32, &str); 14] = [
    ("who", 0, ""),
    ("w", 0, "USER"),
    ("uptime", 0, "load average"),
    ("systemctl start ssh", 0, "Running in chroot, ignoring command 'start'"),
    ("systemctl daemon-reload", 0, "Running in chroot, ignoring command 'daemon-reload'"),
    ("systemctl status", 0, "Running in chroot, ignoring command 'status'"),
    ("systemctl enable systemd-networkd", 0, "Created symlink /etc/systemd/system/"),
    ("systemctl is-enabled systemd-networkd", 0, "enabled"),
    ("udevadm settle --timeout=20", 0, ""),
    ("udevadm info --query=name --path=/devices/virtual/mem/null", 0, "null"),
    ("dmesg", 1, "Operation not permitted"),
    ("journalctl --no-pager", 0, "No journal files were found"),
    ("systemd-tmpfiles --create", 0, ""),
    ("timedatectl", 1, "not been booted with systemd"),
];

#[test]
fn programs_of_a_booted_node_say_that_it_is_none_and_do_not_wait() {
    for place in [Place::Namespace, Place::User] {
        let environment = place.open(Image::Node);
        let master = environment.master();
        for (command, code, part) in NODE_COMMANDS {
            let output = master.ssh().arg(format!("timeout 10 {command} 2>&1")).output().unwrap();
            let said = text(&output.stdout);
            assert!(output.status.code() == Some(code) && said.contains(part), "{place:?}: {command}: {output:?}");
        }
    }
}

#[test]
fn a_terminal_that_the_image_does_not_know_is_told_of_once() {
    for (image, terminal, told) in [
        (Image::Node, "xterm-kitty", true),
        (Image::Node, "xterm-256color", false),
        (Image::Node, "../../etc/passwd", false),
        // Nothing in it looks for a description.
        (Image::Busybox, "xterm-kitty", false),
    ] {
        let environment = Environment::open(image, Mode::Jailed);
        let mut shell = Terminal::at_a_shell_of(&environment, terminal);
        shell.line("exec sh -c 'echo $TERM; exit 0'");
        let (_, screen) = shell.end();
        let times = screen.matches(&format!("The image has no terminfo entry for '{terminal}'")).count();
        assert_eq!(times, usize::from(told), "{screen}");
        assert!(screen.contains(terminal), "it is kept: {screen}");
        let (_, screen) = Terminal::running(&environment, "echo only").end();
        assert_eq!(screen, "only\r\n");
    }
}
