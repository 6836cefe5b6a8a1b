//! Images of another architecture than this machine's: aarch64 on x86_64.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use testbed::*;

/// Log messages, by whose registration is used.
const OURS: &str = "aarch64 programs are emulated by /usr/bin/qemu-aarch64-static, registered until the close";
const OTHERS: &str = "aarch64 programs are emulated by /usr/bin/qemu-aarch64-static, which was registered before";
const THE_JAILS: &str = "aarch64 programs are emulated by QEMU, registered inside the jail only";
const UNSEEN: &str = "aarch64 programs are emulated by an interpreter that the node has registered";

fn open(tier: &str) -> Environment {
    let variables = [("BUILD_ARCH", "aarch64"), ("IMS_JAIL_TIER", tier)];
    Volume::new(Image::DebianArm64).start_with(Mode::Jailed, &variables).ready()
}

/// The kernel's table of interpreters (binfmt_misc) of this test's user namespace. Its mount keeps the table, as on a
/// node.
struct KernelsTable {
    _mounted: Mounted,
    dir: tempfile::TempDir,
}

impl KernelsTable {
    /// Mounts the table; the calling thread needs a mount namespace of its own.
    fn open() -> Self {
        let dir = tempfile::tempdir().unwrap();
        mount(&["-t", "binfmt_misc", "binfmt_misc"], dir.path());
        Self { _mounted: Mounted(dir.path().to_owned()), dir }
    }

    /// Path of the entry that the environment on `volume` registers.
    fn entry_of(&self, volume: &Volume) -> PathBuf {
        let parent = std::fs::metadata(&volume.parent).unwrap();
        self.dir.path().join(format!("ims-sshd-aarch64-{:x}x{:x}", parent.dev(), parent.ino()))
    }
}

#[test]
fn aarch64_image_behaves_as_on_an_aarch64_machine() {
    for tier in NAMESPACE_TIERS {
        let mut environment = open(tier);
        let table = KernelsTable::open();
        assert_eq!(environment.says("uname -m; dpkg --print-architecture; echo $IMS_ARCH"), "aarch64\narm64\naarch64");
        assert_eq!(environment.says("python3 -c 'import platform; print(platform.machine())'"), "aarch64");
        // Check streams and argv[0] of emulated programs.
        assert_eq!(
            environment
                .says("head -c 3000000 /dev/urandom | tee /root/file | sha256sum; sha256sum < /root/file")
                .lines()
                .collect::<std::collections::BTreeSet<_>>()
                .len(),
            1
        );
        assert_eq!(environment.says("exec -a some-name bash -c 'echo $0; ps -o comm= -p 1'"), "some-name\ninit");
        assert_eq!(environment.says("bash -c 'echo $0' some-name; sh -c 'echo err >&2' 2>&1"), "some-name\nerr");
        assert_eq!(text(feed(&mut environment.ssh(&[]), b"echo $0; exit 3\n").stdout), "-bash\n");
        // The kernel consults binfmt_misc again for the interpreter of a `#!` line.
        assert_eq!(
            environment.says("printf '#!/usr/bin/env python3\\nprint(1 + 1)\\n' > /root/s; chmod 755 /root/s; /root/s"),
            "2"
        );
        for code in [0, 1, 7, 126, 127, 255] {
            assert_eq!(environment.run(&format!("exit {code}")).status.code(), Some(code));
        }
        let killed = environment.run("kill -TERM $$");
        assert!(killed.status.code() == Some(255) || killed.status.signal().is_some(), "{killed:?}");
        environment.says("nohup sleep 1000 > /dev/null 2>&1 &");
        assert!(
            environment.says("ps -e -o args").contains("sleep 1000"),
            "a session does not see another session's processes"
        );
        let entry = table.entry_of(&environment);
        assert_eq!(entry.exists(), environment.log_text().contains(OURS));
        assert_eq!(environment.log_text().contains(THE_JAILS), tier == "user", "{}", environment.log_text());
        environment.says("touch /tmp/complete");
        assert_eq!(environment.end(), 0);
        assert!(!entry.exists(), "the entry was not removed");
    }
}

#[test]
fn apt_installs_a_package_in_an_aarch64_image() {
    for tier in NAMESPACE_TIERS {
        let environment = open(tier);
        share_apts_settings(&environment);
        let installed = environment
            .says("apt-get -q update >&2 && apt-get -q install -y --no-install-recommends hello >&2 && hello");
        assert_eq!(installed, "Hello, world!");
        assert_eq!(environment.says("dpkg-query -W -f '${Architecture} ${db:Status-Abbrev}' hello"), "arm64 ii");
    }
}

#[test]
fn ansible_manages_an_aarch64_image() {
    for tier in NAMESPACE_TIERS {
        let environment = open(tier);
        let (home, address) = (tempfile::tempdir().unwrap(), "127.0.0.1,");
        let ansible = |arguments: &[&str]| {
            let mut ansible = Command::new("ansible");
            ansible.args([
                "-i",
                address,
                "all",
                "-u",
                "root",
                "-e",
                "ansible_python_interpreter='/usr/bin/env python3'",
            ]);
            ansible.args(["-e", &format!("ansible_port={}", environment.port), "--private-key"]).arg(&environment.key);
            ansible
                .args(["--ssh-common-args", "-F none -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"])
                .args(arguments);
            ansible
                .env("HOME", home.path())
                .env("ANSIBLE_HOST_KEY_CHECKING", "False")
                .env("ANSIBLE_PIPELINING", "True");
            succeed(ansible.env("LC_ALL", "C.UTF-8").stdin(Stdio::null()))
        };
        assert!(ansible(&["-m", "ping"]).contains("\"pong\""));
        let facts = ansible(&["-m", "setup", "-a", "filter=ansible_architecture,ansible_machine,ansible_distribution"]);
        for fact in [
            "\"ansible_architecture\": \"aarch64\"",
            "\"ansible_machine\": \"aarch64\"",
            "\"ansible_distribution\": \"Debian\"",
        ] {
            assert!(facts.contains(fact), "{facts}");
        }
    }
}

#[test]
fn sftp_server_in_an_aarch64_image_is_not_emulated() {
    for tier in NAMESPACE_TIERS {
        let environment = open(tier);
        let mut sftp = Command::new("sftp");
        sftp.args(environment.ssh_options()).args(["-q", "-P", &environment.port.to_string(), "root@127.0.0.1"]);
        let mut sftp = Ended::new(sftp.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap());
        let mut batch = sftp.stdin.take().unwrap();
        batch.write_all(b"mkdir /root/there\n").unwrap();
        wait_until("the directory", || environment.image_root.join("root/there").exists());
        let program = environment.says("sleep 1000 & tr '\\0' ' ' < /proc/$!/cmdline; kill $!");
        assert!(
            program.starts_with("/usr/bin/qemu-aarch64-static "),
            "programs of the image have to be emulated: {program}"
        );
        let server = environment.says("ps -e -o args= | grep '[/]run/.ims-sshd/sftp-server'");
        assert!(server.starts_with("/run/.ims-sshd/ld.so "), "{server}");
        drop(batch);
        assert!(sftp.wait().unwrap().success());
    }
}

#[test]
fn enter_emulates_an_aarch64_image() {
    for tier in NAMESPACE_TIERS {
        let volume = Volume::new(Image::DebianArm64);
        let mut enter = Command::new(&IMS_SSHD);
        enter.arg("enter").arg(&volume.image_root).args(["--", "sh", "-c", "uname -m; exit 7"]);
        let output = enter.env("IMS_JAIL_TIER", tier).output().unwrap();
        assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(7), "aarch64\n"), "{output:?}");
    }
}

#[test]
fn build_arch_that_contradicts_the_image_is_logged_and_the_image_decides() {
    let contradiction = |image, told: &str| {
        let environment = Volume::new(image).start_with(Mode::Jailed, &[("BUILD_ARCH", told)]).ready();
        assert_eq!(environment.says("echo works"), "works");
        environment.log_text()
    };
    let log = contradiction(Image::Busybox, "aarch64");
    assert!(log.contains("WARN BUILD_ARCH is aarch64, but /bin/sh of the image is for x86_64"), "{log}");
    assert!(!log.contains("programs for"), "{log}");
    let log = contradiction(Image::DebianArm64, "x86_64");
    assert!(log.contains("WARN BUILD_ARCH is x86_64, but /bin/bash of the image is for aarch64"), "{log}");
    assert!(!contradiction(Image::Busybox, "x86_64").contains("BUILD_ARCH"));
    assert!(!contradiction(Image::Busybox, "").contains("BUILD_ARCH"));
}

#[test]
fn registration_of_a_killed_environment_is_removed_by_the_next_one() {
    let mut killed = open("namespace");
    let table = KernelsTable::open();
    let entry = table.entry_of(&killed);
    let ours = killed.log_text().contains(OURS);
    assert_eq!(entry.exists(), ours);
    kill(killed.pid(), Signal::SIGKILL).unwrap();
    killed.entrypoint.wait().unwrap();
    assert_eq!(entry.exists(), ours, "a killed environment cannot remove its entry");
    killed.entrypoint = killed.volume.entrypoint(Mode::Jailed, &[]).spawn().unwrap();
    wait_until("a session", || killed.run("uname -m").stdout == b"aarch64\n");
    assert_eq!(killed.complete(), 0);
    assert!(!entry.exists(), "the entry was not removed");
}

const PLAIN: (Mode, &str) = (Mode::Plain, "auto");

/// Shell command that registers aarch64 with these flags, as a node may have it.
fn registered(flags: &str) -> String {
    let magic = r"\\x7fELF\\x02\\x01\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x02\\x00\\xb7\\x00";
    let mask = r"\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\x00\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xfe\\xff\\xff\\xff";
    format!("printf %s :node:M:0:{magic}:{mask}:/usr/bin/qemu-aarch64-static:{flags} > $TABLE/register\n")
}

/// Starts an environment on a stand-in for a node: a user namespace with a table of its own. `setup` fills the table
/// first; `wrapper` is a command that runs the entrypoint. Returns whether the environment opened, and its log. Asserts
/// that the table is the same at the end.
fn on_a_node(volume: Volume, (mode, tier): (Mode, &str), setup: &str, wrapper: &str) -> (bool, String) {
    let program = volume.entrypoint(mode, &[("BUILD_ARCH", "aarch64"), ("IMS_JAIL_TIER", tier)]);
    let table = volume.dir.path().join("table");
    std::fs::create_dir(&table).unwrap();
    let mut node = Command::new("unshare");
    node.args(["--user", "--mount", "--", "sh", "-euc"]);
    // Wait until the user namespace is mapped, then mount the table, which keeps it, as a node's systemd does.
    node.arg(format!(
        "read mapped\nmount -t binfmt_misc binfmt_misc $TABLE\n{setup}\n\
         show() {{ cd $TABLE && tail $(ls | grep -v register); }}\nbefore=$(show)\nset +e\n{wrapper} {IMS_SSHD} entrypoint\n\
         [ \"$before\" = \"$(show)\" ] && echo untouched"
    ));
    let log = || std::fs::read_to_string(volume.log()).unwrap();
    let stderr = std::fs::File::options().append(true).open(volume.log()).unwrap();
    node.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("TABLE", &table);
    node.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mut node = Ended::new(node.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(stderr).spawn().unwrap());
    let own = std::fs::read_link("/proc/thread-self/ns/user").unwrap();
    let process = PathBuf::from(format!("/proc/{}", node.id()));
    wait_until("a user namespace", || std::fs::read_link(process.join("ns/user")).is_ok_and(|ns| ns != own));
    for map in ["uid_map", "gid_map"] {
        std::fs::write(process.join(map), "0 0 4294967295").unwrap();
    }
    writeln!(node.stdin.take().unwrap(), "mapped").unwrap();
    volume.touch("ready");
    let open = volume.signal("sshd_listening");
    wait_until("the environment to open or to fail", || {
        assert!(node.try_wait().unwrap().is_none_or(|_| volume.signal("exiting").exists()), "{}", log());
        open.exists() || volume.signal("exiting").exists()
    });
    let was_open = open.exists();
    volume.touch("complete");
    let said = std::io::read_to_string(node.stdout.take().unwrap()).unwrap();
    node.wait().unwrap();
    assert_eq!(said, "untouched\n", "{}", log());
    (was_open, log())
}

#[test]
fn registration_of_the_node_is_used_if_it_works_in_a_jail_and_never_changed() {
    for (name, setup, said) in [
        ("nothing is registered", String::new(), OURS),
        ("an interpreter that the kernel has opened (F)", registered("F"), OTHERS),
        ("an interpreter that is looked up in the image", registered("OC"), OURS),
        ("an entry that is switched off", registered("F") + "echo 0 > $TABLE/node", OURS),
    ] {
        let (open, log) = on_a_node(Volume::new(Image::DebianArm64), PLAIN, &setup, "");
        assert!(open && log.contains(said), "{name}: {log}");
    }
    // In the tier `namespace` a copy is registered: the node's own interpreter would run in the jail, where a session
    // could change the file.
    let (open, log) = on_a_node(Volume::new(Image::DebianArm64), (Mode::Jailed, "namespace"), &registered("F"), "");
    assert!(open && log.contains(OURS), "{log}");
}

#[test]
fn jailed_environment_without_emulation_does_not_open_and_a_plain_one_warns() {
    const WITHOUT_PRIVILEGE: &str = "setpriv --bounding-set -sys_admin";
    for (setup, wrapper, complaint) in [
        ("echo 0 > $TABLE/status", "", "binfmt_misc is switched off"),
        ("", WITHOUT_PRIVILEGE, "binfmt_misc cannot be mounted: Operation not permitted"),
    ] {
        // Use the tier `chroot`, which has the container's table.
        for (mode, level) in [(PLAIN, "WARN"), ((Mode::Jailed, "chroot"), "ERROR")] {
            let (open, log) = on_a_node(Volume::new(Image::DebianArm64), mode, setup, wrapper);
            let line = format!("{level} cannot set up emulation of aarch64 programs: {complaint}");
            assert!(log.contains(&line), "{mode:?}: {log}");
            assert_eq!(open, mode == PLAIN, "{log}");
        }
        let (open, log) = on_a_node(Volume::new(Image::DebianArm64), (Mode::Jailed, "user"), setup, wrapper);
        assert!(open && log.contains(THE_JAILS), "{log}");
    }
    // The node's registration works even if its table cannot be read.
    let (open, log) = on_a_node(Volume::new(Image::DebianArm64), PLAIN, &registered("F"), WITHOUT_PRIVILEGE);
    assert!(open && log.contains(UNSEEN), "{log}");
}

#[test]
fn missing_qemu_is_an_error_that_names_the_package() {
    let volume = Volume::new(Image::DebianArm64);
    hide("/usr/bin/qemu-aarch64-static", volume.dir.path());
    let (open, log) = on_a_node(volume, (Mode::Jailed, "user"), "", "");
    assert!(!open && log.contains("/usr/bin/qemu-aarch64-static does not exist; install qemu-user-static"), "{log}");
}

/// Hides `file` in this test's mount namespace, as if it had not been installed.
fn hide(file: &str, work: &Path) {
    let (file, layers) = (Path::new(file), [work.join("hidden"), work.join("hiding")]);
    layers.iter().for_each(|layer| std::fs::create_dir(layer).unwrap());
    let whiteout = layers[0].join(file.file_name().unwrap());
    succeed(Command::new("mknod").arg(whiteout).args(["c", "0", "0"]));
    let parent = file.parent().unwrap().display();
    let options = format!("lowerdir={parent},upperdir={},workdir={}", layers[0].display(), layers[1].display());
    succeed(Command::new("mount").args(["-t", "overlay", "-o", &options, "overlay", &parent.to_string()]));
}
