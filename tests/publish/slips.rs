//! Slips of the pen, and what commands say of image roots and changes that lie elsewhere.

use std::path::Path;
use std::process::{Command, Output};

use testbed::file_server::FileServer;
use testbed::job::*;
use testbed::*;

fn run(dir: &Path, arguments: &[&str]) -> Output {
    ims_sshd(arguments, &[]).current_dir(dir).output().unwrap()
}

fn refused(dir: &Path, arguments: &[&str], why: &str) {
    let output = run(dir, arguments);
    let said = text(&output.stderr);
    assert!(!output.status.success() && said.contains(why), "{arguments:?}: {said}");
}

#[test]
fn prepare_recognizes_a_source_that_comes_first() {
    let (dir, tree, content) = served_image();
    let server = FileServer::start(content, &[]);
    for (number, source) in ["./tree.sqsh", &server.url].into_iter().enumerate() {
        let parent = format!("work{number}");
        let output = run(dir.path(), &["prepare", source, &parent]);
        assert!(output.status.success(), "{output:?}");
        crate::prepare::same_tree(&tree, &dir.path().join(parent).join("image-root"));
    }
    refused(dir.path(), &["prepare", "tree", "new"], "SOURCE comes last: ims-sshd prepare new tree");
    assert!(!dir.path().join("new").exists());
}

#[test]
fn directory_that_is_no_image_root_or_inside_one_is_refused() {
    let (dir, tree, _) = packed_image();
    std::fs::create_dir_all(tree.join("usr/bin")).unwrap();
    std::fs::write(tree.join("usr/bin/sh"), "").unwrap();
    let dir = dir.path();
    let why = format!("it is the usr of {}; name the directory that holds", tree.display());
    for arguments in [&["enter", "tree/usr"][..], &["customize", "./tree/usr"], &["package", "tree/usr"]] {
        refused(dir, arguments, &why);
    }
    for source in ["tree.sqsh", "tree"] {
        refused(dir, &["prepare", "tree", source], "tree', an image root itself; name another");
    }
    assert!(!tree.join("image-root").exists());
    refused(dir, &["package", "nope"], "the image root is 'nope': No such file or directory");
    refused(dir, &["package", "tree.sqsh"], "the image root is 'tree.sqsh': expected an unpacked image");
    let mut package = ims_sshd(&["package"], &[("IMAGE_ROOT_PARENT", "/nowhere".to_owned())]);
    let said = text(&package.current_dir(dir).output().unwrap().stderr);
    let wanted = "cannot open /nowhere: No such file or directory (os error 2); name the image root: without an argument \
        it is the one in IMAGE_ROOT_PARENT, by default /mnt/image";
    assert!(said.contains(wanted), "{said}");
}

#[test]
fn missing_parents_of_a_directory_are_named_at_the_start_and_not_created() {
    let (dir, _, _) = packed_image();
    let dir = dir.path();
    let missing = dir.join("nowhere").display().to_string();
    for (arguments, why) in [
        (&["--output", "nowhere/a/b"][..], format!("nowhere/a/b: {missing} does not exist; create it first")),
        (&["--output", "nowhere/a"], format!("{missing} does not exist; create it first")),
        (&["--output", "~/out"], "~ does not exist (a shell does not expand a quoted ~); create it first".into()),
        (&["--output", "out", "--work", "nowhere/work"], format!("--work is 'nowhere/work': {missing} does not exist")),
    ] {
        let line = ["customize", "tree.sqsh", "--work", "work"];
        let line = if arguments.contains(&"--work") { &line[..2] } else { &line };
        let output = run(dir, &[line, arguments, &["--", "echo", "ran"]].concat());
        let said = text(&output.stderr);
        assert!(!output.status.success() && said.contains(&why), "{arguments:?}: {said}");
        assert_eq!(text(&output.stdout), "", "the command ran");
    }
    refused(dir, &["prepare", "nowhere/w", "tree.sqsh"], &format!("{missing} does not exist; create it first"));
    let output = run(dir, &["prepare", "w", "tree.sqsh"]);
    assert!(output.status.success(), "{output:?}");
    assert!(run(dir, &["package", "w"]).status.success());
    refused(dir, &["upload", "--store", "nowhere/a", "w"], &format!("{missing} does not exist; create it first"));
    assert!(!dir.join("nowhere").exists() && !dir.join("~").exists() && !dir.join("work").exists());
}

#[test]
fn changes_that_are_kept_below_another_work_directory_are_told() {
    let (dir, _, _) = packed_image();
    let dir = dir.path();
    let customize = |work: &str, command: &str| {
        let line = ["customize", "tree.sqsh", "--output", "out", "--work", work, "--", "sh", "-c", command];
        run(dir, &line)
    };
    assert_eq!(customize("w1", "touch /etc/new; exit 3").status.code(), Some(3));
    let second = customize("w2", "test ! -e /etc/new");
    let said = text(&second.stderr);
    assert!(second.status.success(), "{said}");
    let wanted = format!("{}/w1/ims-sshd/", dir.display());
    assert!(said.contains(&wanted) && said.contains("this run does not use the changes to "), "{said}");
    assert!(said.contains("; to drop them: ims-sshd fail tree"), "{said}");
    assert!(said.contains("--work w1 -- sh -c"), "{said}");
    let first = customize("w1", "test -e /etc/new");
    assert!(first.status.success() && !text(&first.stderr).contains("does not use"), "{first:?}");
}

#[test]
fn status_says_how_to_open_and_remove_what_was_prepared() {
    let (dir, _, _) = packed_image();
    let dir = dir.path();
    let said = |command: &str| {
        let mut shell = Command::new("unshare");
        shell.args(["-m", "sh", "-c", command, &*IMS_SSHD]).current_dir(dir);
        succeed(&mut shell)
    };
    let parent = dir.join("a w").display().to_string();
    let shown = format!(
        "{parent}: not open\n  source: {}/tree.sqsh\n  prepared: {parent}/image-root\n  open: ims-sshd enter '{parent}/image-root'\n  \
         remove: rm -r '{parent}'\n",
        dir.display()
    );
    assert_eq!(said("set -e; $0 prepare 'a w' tree.sqsh; $0 status 'a w'"), shown);
    let removing = said("set -e; $0 prepare --open overlay w tree.sqsh; $0 status w");
    let line = removing.lines().find_map(|line| line.strip_prefix("  remove: ")).unwrap();
    let place = dir.join("w").display().to_string();
    assert_eq!(line, format!("umount {place}/image-root {place}/overlay/lower && rm -r {place}"));
    // Nothing else is open in a container of its own.
    let complete = "mount -t tmpfs t /run; mkdir -p t; mount --bind t /mnt; mkdir /mnt/image; $0 prepare tree.sqsh; \
        $0 complete 2>&1; $0 status";
    let said = said(complete);
    assert!(said.contains("nothing is open on this machine"), "{said}");
    assert!(said.contains("/mnt/image: not open\n") && said.contains("  remove: rm -r /mnt/image\n"), "{said}");
}
