//! A play of thirty tasks, with the settings of the Configuration Framework Service.

use std::path::Path;
use std::process::{Command, Stdio};

use testbed::{Environment, succeed};

use crate::environments::{close_all, three_ways};
use crate::measure::in_turns;
use crate::{Bound, Report, Unit, ratios};

const TASKS: usize = 30;

pub fn ansible(runs: usize, report: &mut Report) {
    let environments = three_ways();
    let [_, _, (_, chroot)] = &environments;
    // No Ansible module runs there without /dev/null.
    succeed(Command::new("mount").args(["--bind", "/dev"]).arg(chroot.image_root.join("dev")));
    let mut plays = environments.each_ref().map(|(_, environment)| play(environment));
    let samples = in_turns(runs.div_ceil(3), plays.each_mut());
    succeed(Command::new("umount").arg(chroot.image_root.join("dev")));
    for ((name, _), samples) in environments.iter().zip(&samples) {
        let seconds = samples.iter().map(|milliseconds| milliseconds / 1000.0).collect();
        report.add(&format!("{TASKS} tasks, {name}"), Unit::Seconds, seconds, Bound::Information);
    }
    let [jailed, plain, chroot] = &samples;
    report.add("jailed / plain", Unit::Times, ratios(jailed, plain), Bound::Limit(1.03));
    report.add("jailed / ChrootDirectory", Unit::Times, ratios(jailed, chroot), Bound::Information);
    close_all(environments);
}

fn play(environment: &Environment) -> Command {
    let directory = environment.dir.path();
    let tasks = "    - ansible.builtin.command: 'true'\n".repeat(TASKS);
    let text = format!("- hosts: all\n  gather_facts: false\n  tasks:\n{tasks}");
    std::fs::write(directory.join("play.yml"), text).unwrap();
    let inventory = format!(
        "node ansible_host=127.0.0.1 ansible_user=root ansible_port={} ansible_ssh_common_args='{}' \
         ansible_python_interpreter='/usr/bin/env python3'\n",
        environment.port,
        environment.ssh_options().join(" ")
    );
    std::fs::write(directory.join("inventory"), inventory).unwrap();
    let mut ansible = Command::new("ansible-playbook");
    ansible.args(["-i", "inventory", "play.yml"]).current_dir(directory).stdin(Stdio::null()).stdout(Stdio::null());
    ansible.env("ANSIBLE_CONFIG", Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/suite/ansible/ansible.cfg"));
    ansible.env("HOME", directory);
    ansible
}
