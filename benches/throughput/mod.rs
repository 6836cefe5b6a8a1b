//! What a jail costs those who bring much: a gigabyte by sftp, rsync and ssh, and a play of Ansible's.
//!
//! Both environments are in containers of one image, so that sshd and the programs at the other end are the same.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::{Environment, Image, Mode, Volume, succeed};
use crate::{Bound, Report, Unit, close, in_turns, ratios, title};

/// The least share of a plain login's throughput that is meant to be left, as the most time that a jailed one may take.
const SFTP: Bound = Bound::Limit { limit: 1.0 / 0.95, aim: None };
const STREAMS: Bound = Bound::Limit { limit: 1.0 / 0.97, aim: None };
const PLAY: Bound = Bound::Limit { limit: 1.03, aim: None };

pub fn throughput(rounds: usize, report: &mut Report) {
    title(&format!("1 GiB, and 30 tasks of Ansible: the jailed one's time / the plain one's ({rounds} rounds)"));
    let environments = [Mode::Jailed, Mode::Plain].map(|mode| {
        Volume::in_memory(Image::Managed).start_in_container(mode, &[("IMS_JAIL_TIER", "namespace")]).ready()
    });
    // No disk has part in it.
    let local = environments[0].dir.path().join("local");
    std::fs::create_dir(&local).unwrap();
    let megabytes = ["if=/dev/urandom", "bs=1M", "count=1024", "status=none"];
    succeed(Command::new("dd").args(megabytes).arg(format!("of={}", local.join("sent").display())));
    for (name, bound, command) in [
        ("sftp put", SFTP, (|e, local| sftp(e, local, "put sent /srv/sent")) as fn(&Environment, &Path) -> Command),
        ("sftp get", SFTP, |e, local| sftp(e, local, "get /srv/sent got")),
        ("rsync there", STREAMS, |e, local| rsync(e, local, "sent", "root@127.0.0.1:/srv/sent")),
        ("rsync back", STREAMS, |e, local| rsync(e, local, "root@127.0.0.1:/srv/sent", "got")),
        ("ssh cat, in", STREAMS, |e, local| shell(e, local, "cat > /srv/sent", "< sent")),
        ("ssh cat, out", STREAMS, |e, local| shell(e, local, "cat /srv/sent", "> got")),
        ("a play of 30 tasks", PLAY, play),
    ] {
        let [mut jailed, mut plain] = environments.each_ref().map(|environment| command(environment, &local));
        let [jailed, plain] = in_turns(rounds, [&mut jailed, &mut plain]);
        report.add(&format!("{name}, plain"), Unit::Milliseconds, plain.clone(), Bound::Information);
        report.add(&format!("{name}, jailed"), Unit::Milliseconds, jailed.clone(), Bound::Information);
        report.add(&format!("{name}, jailed / plain"), Unit::Times, ratios(&jailed, &plain), bound);
    }
    environments.into_iter().for_each(close);
}

/// `command` in the client's folder, by a shell that redirects.
fn redirected(command: &Command, local: &Path, redirection: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("exec \"$@\" {redirection}"), "sh"]).arg(command.get_program()).args(command.get_args());
    shell.current_dir(local).stdin(Stdio::null()).stdout(Stdio::null());
    shell
}

fn sftp(environment: &Environment, local: &Path, line: &str) -> Command {
    redirected(&environment.sftp_client(&[]), local, &format!("<<END\n{line}\nEND"))
}

fn shell(environment: &Environment, local: &Path, line: &str, redirection: &str) -> Command {
    redirected(environment.ssh(&[]).arg(line), local, redirection)
}

fn rsync(environment: &Environment, local: &Path, from: &str, to: &str) -> Command {
    let shell = format!("ssh {} -p {}", environment.ssh_options().join(" "), environment.port);
    redirected(Command::new("rsync").args(["-IW", "--inplace", "-e", &shell, from, to]), local, "")
}

/// With the settings of the Configuration Framework Service.
fn play(environment: &Environment, local: &Path) -> Command {
    let tasks = "    - ansible.builtin.command: 'true'\n".repeat(30);
    std::fs::write(local.join("play.yml"), format!("- hosts: all\n  gather_facts: false\n  tasks:\n{tasks}")).unwrap();
    let inventory = local.join(environment.port.to_string());
    let text = format!(
        "node ansible_host=127.0.0.1 ansible_user=root ansible_port={} ansible_ssh_common_args='{}' \
         ansible_python_interpreter='/usr/bin/env python3'\n",
        environment.port,
        environment.ssh_options().join(" ")
    );
    std::fs::write(&inventory, text).unwrap();
    let mut ansible = Command::new("ansible-playbook");
    let mut command = redirected(ansible.arg("-i").arg(inventory).arg("play.yml"), local, "");
    command.env("ANSIBLE_CONFIG", Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/suite/ansible/ansible.cfg"));
    command.env("HOME", local);
    command
}
