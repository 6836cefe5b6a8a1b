//! Ansible with the settings of the Configuration Framework Service (CFS), and that service's own sequence over
//! paramiko.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use testbed::*;

use crate::clients::Place;

crate::clients::shown! {
    "Ansible (Debian's)",
        "setup, command, shell, copy, template, synchronize, unarchive, apt, user, service_facts, become",
        "`async` with `poll: 0`, and `async_status`",
        "a failing task's own exit code",
        "/etc/resolv.conf is replaced",
        "the task that marks the image complete reports ok" => debians_ansible_manages_a_node;
    "Ansible (Debian's)",
        "`transfer_method` sftp, scp, scp -O and piped without pipelining; smart with it",
        "50 names of one node with 20 forks" => debians_ansible_uses_every_transfer_method_with_many_host_names;
    "Ansible (Debian's)",
        "with its default configuration: the manual's sample, whose last task (copy, command, file) marks the image; `become`, `async`",
        "the same with 100 ms of latency, and as the Configuration Framework Service configures it",
        "a last task that marks the image and fails: its own exit code" => debians_ansible_can_mark_the_image_in_its_last_task;
    "Ansible (Debian's)",
        "50 names of one node with 50 forks and the default configuration, each of which marks the image" => debians_ansible_can_mark_the_image_from_fifty_host_names;
    "Ansible (newest for Python 3.11)",
        "setup, command, shell, copy, template, unarchive, apt, user, service_facts, become",
        "`async` with `poll: 0`, and `async_status`",
        "a failing task's own exit code",
        "/etc/resolv.conf is replaced",
        "the task that marks the image complete reports ok" => newest_ansible_manages_a_node;
    "Ansible (newest for Python 3.11)",
        "`transfer_method` sftp, scp, scp -O and piped without pipelining; smart with it",
        "50 names of one node with 20 forks" => newest_ansible_uses_every_transfer_method_with_many_host_names;
    "Ansible (newest for Python 3.11)",
        "with its default configuration: the manual's sample, whose last task (copy, command, file) marks the image; `become`, `async`",
        "the same with 100 ms of latency, and as the Configuration Framework Service configures it",
        "a last task that marks the image and fails: its own exit code" => newest_ansible_can_mark_the_image_in_its_last_task;
    "Ansible (newest for Python 3.11)",
        "50 names of one node with 50 forks and the default configuration, each of which marks the image" => newest_ansible_can_mark_the_image_from_fifty_host_names;
    "paramiko",
        "the probe `echo ~root && sleep 0`",
        "50 commands whose connection is closed at once, none of them lost",
        "`touch /tmp/complete` in the same way ends the environment" => cfs_commands_are_never_lost;
}

fn debians_ansible_manages_a_node(place: Place) {
    manages_a_node(place, debians());
}

fn newest_ansible_manages_a_node(place: Place) {
    manages_a_node(place, newest());
}

fn debians_ansible_uses_every_transfer_method_with_many_host_names(place: Place) {
    takes_every_way(place, debians());
}

fn newest_ansible_uses_every_transfer_method_with_many_host_names(place: Place) {
    takes_every_way(place, newest());
}

fn debians_ansible_can_mark_the_image_in_its_last_task(place: Place) {
    ends_with_the_image(place, debians);
}

fn newest_ansible_can_mark_the_image_in_its_last_task(place: Place) {
    ends_with_the_image(place, newest);
}

fn debians_ansible_can_mark_the_image_from_fifty_host_names(place: Place) {
    ends_fifty_names(place, debians());
}

fn newest_ansible_can_mark_the_image_from_fifty_host_names(place: Place) {
    ends_fifty_names(place, newest());
}

struct Ansible {
    program: PathBuf,
    interpreter: &'static str,
    /// True if it has a collection with the synchronize module.
    synchronizes: bool,
}

fn debians() -> Ansible {
    // The interpreter is the one that the Configuration Framework Service sets.
    Ansible { program: "/usr/bin/ansible-playbook".into(), interpreter: "/usr/bin/env python3", synchronizes: true }
}

fn newest() -> Ansible {
    // It expects the interpreter as one word, and so finds no '/usr/bin/env python3'. It comes without collections, and
    // Debian's is too old for it.
    Ansible {
        program: cache().join("ansible-core/bin/ansible-playbook"),
        interpreter: "/usr/bin/python3",
        synchronizes: false,
    }
}

fn manages_a_node(place: Place, ansible: Ansible) {
    let volume = Volume::new(Image::Managed);
    std::fs::write(volume.image_root.join("etc/resolv.conf"), "nameserver 192.0.2.1\n").unwrap();
    let mut environment = place.open_in_container_on(volume, &[]);
    let controller = Controller::new(&environment, ansible);
    let recap = controller.play("node.yml", &marker(place, &environment));
    assert!(recap.contains(" unreachable=0    failed=0 ") && recap.contains(" ignored=2 "), "{recap}");
    assert_eq!(environment.end(), 0, "{}", environment.log_text());
    assert!(environment.signal("complete").exists());
    if place.mode() == Mode::Jailed {
        assert_eq!(place.left(&environment, "etc/resolv.conf"), "# of 5ec3b0a1-job\nnameserver 192.0.2.53\n");
    }
}

#[test]
fn ansible_sets_the_jails_hostname_and_is_refused_node_settings() {
    for place in [Place::Namespace, Place::User] {
        let environment = place.open_in_container();
        let recap = Controller::new(&environment, debians()).play("limits.yml", "");
        assert!(recap.contains(" unreachable=0    failed=0 ") && recap.contains(" ignored=2 "), "{place:?}: {recap}");
    }
}

fn takes_every_way(place: Place, ansible: Ansible) {
    let environment = place.open_in_container();
    let controller = Controller::new(&environment, ansible);
    let recap = controller.play("ways.yml", &marker(place, &environment));
    assert_eq!(recap.matches(" unreachable=0    failed=0 ").count(), 55, "{recap}");
    assert_eq!(
        environment.says("ls /srv | grep -c ^name; cat /srv/by_*"),
        format!("50{}", "\ncopied as it is".repeat(5))
    );
}

/// Variant of the manual's sample playbook.
struct End {
    /// Module that marks the image.
    last: &'static str,
    /// Transfer method for modules that are not piped to the node; `None` for Ansible's default.
    way: Option<&'static str>,
    configuration: Configuration,
    latency: Duration,
}

fn ends_with_the_image(place: Place, ansible: fn() -> Ansible) {
    const AT_ONCE: Duration = Duration::ZERO;
    let ends = [
        ("copy", None, Configuration::Default, AT_ONCE),
        ("command", Some("scp"), Configuration::Default, AT_ONCE),
        ("file", Some("piped"), Configuration::Default, AT_ONCE),
        ("failing", Some("sftp"), Configuration::Default, AT_ONCE),
        ("copy", None, Configuration::Default, Duration::from_millis(100)),
        ("copy", None, Configuration::OfTheService, AT_ONCE),
    ];
    for (last, way, configuration, latency) in ends {
        let end = End { last, way, configuration, latency };
        let case = format!("{place:?}, {last} by {way:?}, {configuration:?}, {latency:?}");
        let mut environment = place.open_in_container();
        let proxy = Proxy::start(environment.port, end.latency);
        let controller = Controller::reaching(&environment, ansible(), proxy.port);
        let output = controller.output(
            "ends.yml",
            end.configuration,
            &marker(place, &environment),
            &json!({
                "nodes": "node", "last": end.last, "ansible_ssh_transfer_method": end.way.unwrap_or("smart"),
            }),
        );
        let shown = text([output.stdout, output.stderr].concat());
        let code = if end.last == "failing" { 2 } else { 0 };
        assert_eq!(output.status.code(), Some(code), "{case}: {shown}\n{}", environment.log_text());
        assert!(shown.contains(" unreachable=0 "), "{case}: {shown}");
        assert_eq!(environment.end(), 0, "{case}: {}", environment.log_text());
        assert!(environment.signal("complete").exists(), "{case}");
    }
}

fn ends_fifty_names(place: Place, ansible: Ansible) {
    let mut environment = place.open_in_container_on(Volume::new(Image::Managed), &[("IMS_CLOSE_GRACE", "60")]);
    let controller = Controller::new(&environment, ansible);
    let complete = marker(place, &environment);
    let output = controller.output(
        "ends.yml",
        Configuration::Default,
        &complete,
        &json!({
            "nodes": "names", "last": "copy",
        }),
    );
    let shown = text([output.stdout, output.stderr].concat());
    assert_eq!(output.status.code(), Some(0), "{place:?}: {shown}\n{}", environment.log_text());
    assert_eq!(shown.matches(" unreachable=0    failed=0 ").count(), 50, "{shown}");
    assert_eq!(environment.end(), 0, "{}", environment.log_text());
    assert!(environment.signal("complete").exists());
}

/// A relay between clients and an environment that delays data by half of `latency` in each direction. It ends with the
/// test.
struct Proxy {
    port: u16,
}

impl Proxy {
    fn start(target: u16, latency: Duration) -> Self {
        let address = listen(move |client| {
            let Ok(server) = TcpStream::connect(("127.0.0.1", target)) else { return };
            let ends = [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)];
            for (from, to) in ends {
                std::thread::spawn(move || Self::carry(from, to, latency / 2));
            }
        });
        Self { port: address.port() }
    }

    fn carry(mut from: TcpStream, mut to: TcpStream, delay: Duration) {
        let (late, due) = std::sync::mpsc::channel::<(Instant, Vec<u8>)>();
        to.set_nodelay(true).unwrap();
        let mut buffer = vec![0; 64 << 10];
        let sender = std::thread::spawn(move || {
            for (moment, bytes) in due {
                std::thread::sleep(moment.saturating_duration_since(Instant::now()));
                if to.write_all(&bytes).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Write);
        });
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            if late.send((Instant::now() + delay, buffer[..length].to_vec())).is_err() {
                break;
            }
        }
        drop(late);
        let _ = sender.join();
    }
}

/// Ansible's configuration.
#[derive(Clone, Copy, Debug)]
enum Configuration {
    Default,
    OfTheService,
}

/// File that a session creates when the image is complete.
fn marker(place: Place, environment: &Environment) -> String {
    match place.mode() {
        Mode::Jailed => "/tmp/complete".to_owned(),
        Mode::Plain => environment.signal("complete").display().to_string(),
    }
}

/// The control node: Ansible's home, files for nodes, and inventory.
struct Controller {
    directory: TempDir,
    ansible: Ansible,
}

impl Controller {
    fn new(environment: &Environment, ansible: Ansible) -> Self {
        Self::reaching(environment, ansible, environment.port)
    }

    /// A control node that reaches the environment by this port.
    fn reaching(environment: &Environment, ansible: Ansible, port: u16) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path();
        for (name, text) in [
            ("nothing_file", ""),
            ("default.cfg", ""),
            ("copied", "copied as it is\n"),
            ("rendered.j2", "{{ greeting }}\n"),
            ("resolv.conf.j2", "# of {{ ansible_facts.env.IMS_JOB_ID }}\nnameserver 192.0.2.53\n"),
            ("tree/sub/leaf", "leaf\n"),
            ("pack/unpacked", "unpacked\n"),
            ("deb/srv/from-package", "packaged\n"),
            (
                "deb/DEBIAN/control",
                "Package: local\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\nDescription: a package\n",
            ),
        ] {
            std::fs::create_dir_all(place.join(name).parent().unwrap()).unwrap();
            std::fs::write(place.join(name), text).unwrap();
        }
        succeed(Command::new("tar").args(["-czf", "packed.tar.gz", "-C", "pack", "unpacked"]).current_dir(place));
        succeed(Command::new("dpkg-deb").args(["--build", "deb", "tree/local.deb"]).current_dir(place));
        std::fs::write(place.join("inventory"), inventory(environment, &ansible, port)).unwrap();
        Self { directory, ansible }
    }

    /// Report at the end of a play.
    fn play(&self, playbook: &str, complete: &str) -> String {
        let output = self.output(playbook, Configuration::OfTheService, complete, &json!({}));
        let shown = text(&output.stdout);
        assert!(output.status.success(), "{shown}\n{}", text(&output.stderr));
        shown[shown.rfind("PLAY RECAP").unwrap()..].to_owned()
    }

    /// Output of a whole play with further variables.
    fn output(&self, playbook: &str, configuration: Configuration, complete: &str, further: &Value) -> Output {
        let plays = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/suite/ansible");
        let mut command = Command::new(&self.ansible.program);
        command.arg("-i").arg(self.directory.path().join("inventory")).arg(plays.join(playbook));
        let directory = self.directory.path();
        let variables = json!({"files": directory, "complete": complete, "synchronizes": self.ansible.synchronizes});
        command.arg("-e").arg(variables.to_string()).arg("-e").arg(further.to_string());
        command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", directory).env("LC_ALL", "C.UTF-8");
        match configuration {
            Configuration::OfTheService => command.env("ANSIBLE_CONFIG", plays.join("ansible.cfg")),
            // Hosts wait for each other between two tasks. On a loaded machine that can take longer than the 60 s for
            // which the default keeps a connection, and a host that must reconnect after the first mark finds no sshd.
            Configuration::Default => command
                .env("ANSIBLE_CONFIG", directory.join("default.cfg"))
                .env("ANSIBLE_SSH_ARGS", "-C -o ControlMaster=auto -o ControlPersist=600s")
                .args(["--forks", "50"]),
        };
        // The newest Ansible would search its own directories for this.
        command.env("ANSIBLE_COLLECTIONS_PATH", "/usr/lib/python3/dist-packages");
        command.output().unwrap()
    }
}

fn inventory(environment: &Environment, ansible: &Ansible, port: u16) -> String {
    // Not an address of this machine, to which synchronize would copy without SSH.
    const WAYS: &str = "by_smart\nby_sftp ansible_ssh_transfer_method=sftp ansible_pipelining=false\n\
        by_scp ansible_ssh_transfer_method=scp ansible_pipelining=false\n\
        by_old_scp ansible_ssh_transfer_method=scp ansible_scp_extra_args=-O ansible_pipelining=false\n\
        by_pipe ansible_ssh_transfer_method=piped ansible_pipelining=false\n";
    let names: String = (1..=50).map(|number| format!("name{number:02}\n")).collect();
    format!(
        "[all:vars]\nansible_host=build-environment\nansible_port={}\nansible_user=root\nansible_ssh_common_args=-o HostName=127.0.0.1 {}\n\
         ansible_python_interpreter={}\n[nodes]\nnode\n[ways]\n{WAYS}[names]\n{names}",
        port,
        environment.ssh_options().join(" "),
        ansible.interpreter
    )
}

fn cfs_commands_are_never_lost(place: Place) {
    const PROGRAM: &str = "import paramiko, sys\n\
        port, key, directory, mark = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]\n\
        def connect():\n\
        \x20   client = paramiko.SSHClient()\n\
        \x20   client.set_missing_host_key_policy(paramiko.AutoAddPolicy())\n\
        \x20   client.connect('127.0.0.1', port=port, username='root', key_filename=key, timeout=5, banner_timeout=30, auth_timeout=30)\n\
        \x20   return client\n\
        client = connect()\n\
        _, out, err = client.exec_command('echo ~root && sleep 0')\n\
        assert (out.read(), err.read(), out.channel.recv_exit_status()) == (b'/root\\n', b'', 0)\n\
        client.close()\n\
        for number in range(50):\n\
        \x20   client = connect()\n\
        \x20   client.exec_command('touch %s/%d' % (directory, number))\n\
        \x20   client.close()\n\
        client = connect()\n\
        while True:\n\
        \x20   _, out, _ = client.exec_command('ls %s | wc -l' % directory)\n\
        \x20   if out.read() == b'50\\n': break\n\
        client.exec_command('touch ' + mark)\n\
        client.close()\n";
    let mut environment = place.open(Image::Debian);
    let directory = match place.mode() {
        Mode::Jailed => "/srv".to_owned(),
        Mode::Plain => environment.image_root.join("srv").display().to_string(),
    };
    let mark = marker(place, &environment);
    let mut client = Command::new("/usr/bin/python3");
    client.args(["-W", "ignore", "-c", PROGRAM, &environment.port.to_string()]).arg(&environment.key);
    let client = client.args([&directory, &mark]).spawn().unwrap();
    let mut client = Ended::new(client);
    wait_until("the client to end", || client.try_wait().unwrap().is_some());
    assert!(client.wait().unwrap().success());
    assert_eq!(environment.end(), 0, "{}", environment.log_text());
    assert!(environment.signal("complete").exists());
}
