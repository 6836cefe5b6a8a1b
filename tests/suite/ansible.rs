//! Ansible, configured as the Configuration Framework Service configures it, and that service's own sequence over paramiko.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use tempfile::TempDir;

use crate::clients::Place;
use crate::support::*;

crate::clients::shown! {
    "Ansible (Debian's)",
        "setup, command, shell, copy, template, synchronize, unarchive, apt, user, service_facts, become",
        "`async` with `poll: 0`, and `async_status`",
        "a failing task's own exit code",
        "/etc/resolv.conf is replaced, where the sidecar has left the container's text in it",
        "the task that marks the image complete reports ok" => debians_ansible_manages_a_node;
    "Ansible (Debian's)",
        "`transfer_method` sftp, scp, scp -O and piped without pipelining; smart with it",
        "20 names of one node with 20 forks" => debians_ansible_takes_every_way_to_a_node_of_many_names;
    "Ansible (newest for Python 3.11)",
        "setup, command, shell, copy, template, unarchive, apt, user, service_facts, become",
        "`async` with `poll: 0`, and `async_status`",
        "a failing task's own exit code",
        "/etc/resolv.conf is replaced, where the sidecar has left the container's text in it",
        "the task that marks the image complete reports ok" => the_newest_ansible_manages_a_node;
    "Ansible (newest for Python 3.11)",
        "`transfer_method` sftp, scp, scp -O and piped without pipelining; smart with it",
        "20 names of one node with 20 forks" => the_newest_ansible_takes_every_way_to_a_node_of_many_names;
    "paramiko",
        "the probe `echo ~root && sleep 0`",
        "50 commands whose connection is closed at once, none of them lost",
        "`touch /tmp/complete` in the same way ends the environment" => the_configuration_services_own_commands_are_never_lost;
}

fn debians_ansible_manages_a_node(place: Place) {
    manages_a_node(place, debians());
}

fn the_newest_ansible_manages_a_node(place: Place) {
    manages_a_node(place, newest());
}

fn debians_ansible_takes_every_way_to_a_node_of_many_names(place: Place) {
    takes_every_way(place, debians());
}

fn the_newest_ansible_takes_every_way_to_a_node_of_many_names(place: Place) {
    takes_every_way(place, newest());
}

struct Ansible {
    program: PathBuf,
    interpreter: &'static str,
    /// Whether it has a collection with the module of that name.
    synchronizes: bool,
}

fn debians() -> Ansible {
    // As the Configuration Framework Service has it.
    Ansible { program: "/usr/bin/ansible-playbook".into(), interpreter: "/usr/bin/env python3", synchronizes: true }
}

fn newest() -> Ansible {
    // It takes the interpreter for one word, and so finds no '/usr/bin/env python3' on any node. It comes without collections, and
    // Debian's is too old for it.
    Ansible {
        program: cache().join("ansible-core/bin/ansible-playbook"),
        interpreter: "/usr/bin/python3",
        synchronizes: false,
    }
}

fn manages_a_node(place: Place, ansible: Ansible) {
    let volume = Volume::new(Image::Managed);
    std::fs::copy("/etc/resolv.conf", volume.image_root.join("etc/resolv.conf")).unwrap();
    let mut environment = volume.start_in_container(place.mode(), place.variables()).ready();
    let controller = Controller::new(&environment, ansible);
    let recap = controller.play("node.yml", &marker(place, &environment));
    assert!(recap.contains(" unreachable=0    failed=0 ") && recap.contains(" ignored=2 "), "{recap}");
    assert_eq!(environment.end(), 0, "{}", environment.log_text());
    assert!(environment.signal("complete").exists());
    if place.mode() == Mode::Jailed {
        let own = std::fs::read_to_string(environment.image_root.join("etc/resolv.conf")).unwrap();
        assert_eq!(own, "# of 5ec3b0a1-job\nnameserver 192.0.2.53\n");
    }
}

#[test]
fn ansible_names_a_jail_and_is_told_what_belongs_to_the_node() {
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
    assert_eq!(recap.matches(" unreachable=0    failed=0 ").count(), 25, "{recap}");
    assert_eq!(
        environment.says("ls /srv | grep -c ^name; cat /srv/by_*"),
        format!("20{}", "\ncopied as it is".repeat(5))
    );
}

/// What a session touches when the image is complete.
fn marker(place: Place, environment: &Environment) -> String {
    match place.mode() {
        Mode::Jailed => "/tmp/complete".to_owned(),
        Mode::Plain => environment.signal("complete").display().to_string(),
    }
}

/// Where Ansible runs: its home, what it brings to nodes, and the nodes that it knows.
struct Controller {
    folder: TempDir,
    ansible: Ansible,
}

impl Controller {
    fn new(environment: &Environment, ansible: Ansible) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path();
        for (name, text) in [
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
        std::fs::write(place.join("inventory"), inventory(environment, &ansible)).unwrap();
        Self { folder, ansible }
    }

    /// What a play reports at its end.
    fn play(&self, playbook: &str, complete: &str) -> String {
        let plays = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/suite/ansible");
        let mut command = Command::new(&self.ansible.program);
        command.arg("-i").arg(self.folder.path().join("inventory")).arg(plays.join(playbook));
        let folder = self.folder.path();
        let variables = json!({"files": folder, "complete": complete, "synchronizes": self.ansible.synchronizes});
        command.arg("-e").arg(variables.to_string());
        command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", folder).env("LC_ALL", "C.UTF-8");
        command.env("ANSIBLE_CONFIG", plays.join("ansible.cfg"));
        // Which would be looked for in the newest's own folders.
        command.env("ANSIBLE_COLLECTIONS_PATH", "/usr/lib/python3/dist-packages");
        let output = command.output().unwrap();
        let shown = text(&output.stdout);
        assert!(output.status.success(), "{shown}\n{}", text(&output.stderr));
        shown[shown.rfind("PLAY RECAP").unwrap()..].to_owned()
    }
}

fn inventory(environment: &Environment, ansible: &Ansible) -> String {
    // Not by an address of this machine, to which synchronize would copy without SSH.
    const WAYS: &str = "by_smart\nby_sftp ansible_ssh_transfer_method=sftp ansible_pipelining=false\n\
        by_scp ansible_ssh_transfer_method=scp ansible_pipelining=false\n\
        by_old_scp ansible_ssh_transfer_method=scp ansible_scp_extra_args=-O ansible_pipelining=false\n\
        by_pipe ansible_ssh_transfer_method=piped ansible_pipelining=false\n";
    let names: String = (1..=20).map(|number| format!("name{number:02}\n")).collect();
    format!(
        "[all:vars]\nansible_host=build-environment\nansible_port={}\nansible_user=root\nansible_ssh_common_args=-o HostName=127.0.0.1 {}\n\
         ansible_python_interpreter={}\n[nodes]\nnode\n[ways]\n{WAYS}[names]\n{names}",
        environment.port,
        environment.ssh_options().join(" "),
        ansible.interpreter
    )
}

fn the_configuration_services_own_commands_are_never_lost(place: Place) {
    const PROGRAM: &str = "import paramiko, sys\n\
        port, key, folder, mark = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]\n\
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
        \x20   client.exec_command('touch %s/%d' % (folder, number))\n\
        \x20   client.close()\n\
        client = connect()\n\
        while True:\n\
        \x20   _, out, _ = client.exec_command('ls %s | wc -l' % folder)\n\
        \x20   if out.read() == b'50\\n': break\n\
        client.exec_command('touch ' + mark)\n\
        client.close()\n";
    let mut environment = place.open(Image::Debian);
    let folder = match place.mode() {
        Mode::Jailed => "/srv".to_owned(),
        Mode::Plain => environment.image_root.join("srv").display().to_string(),
    };
    let mark = marker(place, &environment);
    let mut client = Command::new("/usr/bin/python3");
    client.args(["-W", "ignore", "-c", PROGRAM, &environment.port.to_string()]).arg(&environment.key);
    let client = client.args([&folder, &mark]).spawn().unwrap();
    let mut client = Ended(client);
    wait_until("the client to end", || client.try_wait().unwrap().is_some());
    assert!(client.wait().unwrap().success());
    assert_eq!(environment.end(), 0, "{}", environment.log_text());
    assert!(environment.signal("complete").exists());
}
