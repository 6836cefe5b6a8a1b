//! Checks docs/TASKS.md: no task takes more commands or terminals with ims-sshd than with the best other tool, and each
//! of its commands does what the task asks for.

use std::collections::BTreeMap;
use std::process::Command;

use testbed::*;

use crate::readme::Desk;

const TASKS: &str = include_str!("../../docs/TASKS.md");
const OURS: &str = "ims-sshd";

/// Task that needs kiwi-ng: tests/recipe/create.rs runs its command.
const BUILT: &str = "Build an image from a recipe";

/// Commands of each program for the task of one section.
fn commands(section: &str) -> BTreeMap<&str, Vec<&str>> {
    let rows = section.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |")?.split_once(" | "));
    rows.map(|(program, cell)| (program, cell.split("<br>").filter(|line| line.contains('`')).collect())).collect()
}

fn sections() -> Vec<(&'static str, BTreeMap<&'static str, Vec<&'static str>>)> {
    let sections = TASKS.split("\n## ").skip(1).map(|section| section.split_once('\n').unwrap());
    sections.map(|(task, text)| (task, commands(text))).collect()
}

/// Number of commands and number of terminals.
fn count(lines: &[&str]) -> (usize, usize) {
    (lines.len(), 1 + lines.iter().filter(|line| line.starts_with("in a second terminal")).count())
}

#[test]
fn no_task_takes_more_commands_or_terminals_than_with_the_best_other_tool() {
    let table: Vec<Vec<_>> =
        TASKS.lines().filter(|line| line.starts_with("| ")).map(|line| line.split(" | ").collect()).collect();
    let header: Vec<_> = table[0].iter().skip(1).map(|cell| cell.trim_matches(['|', ' '])).collect();
    let sections = sections();
    assert_eq!(sections.len(), 11);
    for (row, (task, commands)) in table[1..].iter().zip(&sections) {
        assert_eq!(row[0].trim_start_matches("| "), *task);
        for (program, cell) in header.iter().zip(&row[1..]) {
            let counted = match count(&commands[program]) {
                (0, _) => "–".to_owned(),
                (lines, terminals) => format!("{lines} / {terminals}"),
            };
            assert_eq!(cell.trim_matches(['|', ' ']), counted, "{task}: {program}");
        }
        let ours = count(&commands[OURS]);
        assert!(ours.0 > 0, "{task}");
        for (other, lines) in commands.iter().filter(|(_, lines)| !lines.is_empty()) {
            assert!(ours.0 <= lines.len() && ours.1 <= count(lines).1, "{task}: {other} takes less");
        }
    }
}

#[test]
fn every_ims_sshd_command_of_the_page_does_what_the_task_asks_for() {
    for (task, commands) in sections().into_iter().filter(|(task, _)| *task != BUILT) {
        let lines: Vec<_> = commands[OURS].iter().map(|line| line.split('`').nth(1).unwrap()).collect();
        let desk = Desk::new();
        let place = &desk.volume.parent;
        let (image, changed) = (place.join("image-root"), place.join("image-root/etc/changed"));
        match (task, lines.as_slice()) {
            ("Change an image in a shell", [line]) => {
                type_at(&desk, line);
                assert!(changed.exists(), "{line}");
            }
            ("Run one command in an image, unattended", [line]) => {
                succeed(&mut desk.shell(line));
                assert!(changed.exists(), "{line}");
            }
            ("Run a script of the machine in an image", [line]) => {
                std::fs::write(place.join("install.sh"), "#!/bin/sh\necho changed > /etc/changed\n").unwrap();
                succeed(&mut desk.shell(line));
                assert!(changed.exists(), "{line}");
            }
            ("Add a package to a directory", [line]) => {
                let apt = "#!/bin/sh\necho \"$@\" > /etc/changed\n";
                put(&image.join("usr/local/bin/apt-get"), apt, 0o755);
                succeed(&mut desk.shell(line));
                assert_eq!(std::fs::read_to_string(changed).unwrap(), "-y install less\n", "{line}");
            }
            ("Change an image and publish the result", [line]) => {
                succeed(&mut desk.shell(line));
                let rootfs = walk(&place.join("out")).into_iter().find(|path| path.ends_with("rootfs")).unwrap();
                assert!(succeed(Command::new("unsquashfs").arg("-l").arg(rootfs)).contains("/etc/changed"), "{line}");
            }
            ("Try something in an image and throw the changes away", [line]) => {
                let before = std::fs::read(place.join("image.sqsh")).unwrap();
                type_at(&desk, line);
                assert!(before == std::fs::read(place.join("image.sqsh")).unwrap(), "{line}");
                succeed(&mut desk.shell("ims-sshd enter ./image.sqsh test ! -e /etc/changed"));
            }
            ("Try a script in an image and throw the changes away", [line]) => {
                put(&place.join("try.sh"), "#!/bin/sh\ntouch /etc/changed && ls /etc/changed\n", 0o755);
                assert_eq!(succeed(&mut desk.shell(line)), "/etc/changed\n", "{line}");
                assert!(!changed.exists(), "{line}");
            }
            ("Change two images at once", [one, other]) => {
                let second = place.join("other-root");
                succeed(Command::new("cp").arg("-aT").arg(cache().join("busybox")).arg(&second));
                let [mut first, mut then] = [one, other].map(|line| open(&desk, line));
                for terminal in [&mut first, &mut then] {
                    terminal.line("touch /etc/changed");
                    terminal.line("exit");
                }
                assert_eq!([first.end().0, then.end().0], [0, 0], "{one}");
                assert!(changed.exists() && second.join("etc/changed").exists(), "{one}");
            }
            ("See which images are open", [line]) => {
                let mut terminal = open(&desk, "ims-sshd enter ./image-root");
                let listed = succeed(&mut desk.shell(line));
                assert!(listed.contains(image.to_str().unwrap()), "{line}: {listed}");
                terminal.line("exit");
                assert_eq!(terminal.end().0, 0);
            }
            ("Apply an Ansible playbook to an image", [line]) => {
                let (_, script) = TASKS.split_once("\n```text\n").unwrap();
                put(&place.join("site.sh"), script.split("\n```").next().unwrap(), 0o755);
                let play = "- hosts: all\n  gather_facts: false\n  tasks: [{raw: touch /etc/changed}]\n";
                std::fs::write(place.join("site.yml"), play).unwrap();
                succeed(&mut desk.shell(line));
                assert!(changed.exists(), "{line}");
            }
            _ => panic!("docs/TASKS.md has '{task}' by {lines:?}, and this test does not know how to run it"),
        }
    }
}

/// Opens a shell in the image and creates a file.
fn type_at(desk: &Desk, command: &str) {
    let mut terminal = open(desk, command);
    terminal.line("touch /etc/changed");
    terminal.line("exit");
    let (code, screen) = terminal.end();
    assert_eq!(code, 0, "{command}: {screen}");
}

fn open(desk: &Desk, command: &str) -> Terminal {
    let mut terminal = desk.terminal(command);
    terminal.see("# ");
    terminal
}

fn put(file: &std::path::Path, text: &str, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(file, text).unwrap();
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(mode)).unwrap();
}
