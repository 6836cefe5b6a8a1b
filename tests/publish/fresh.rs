//! `prepare --fresh`: the old image root is dropped only when the new one is complete.

use std::path::Path;
use std::process::{Command, Output};

use testbed::file_server::{Fault, FileServer};
use testbed::ims_server::ImsServer;
use testbed::job::*;
use testbed::*;

fn fresh(dir: &Path, arguments: &[&str]) -> Output {
    ims_sshd(&["prepare", "--fresh"], &[]).args(arguments).current_dir(dir).output().unwrap()
}

/// Everything below the image root's parent, with what files hold.
fn state(parent: &Path) -> String {
    let list = "cd \"$0\" && find . -exec stat -c '%n %f %s %i' {} + | sort && find . -type f -exec md5sum {} + | sort";
    succeed(Command::new("sh").args(["-c", list]).arg(parent))
}

fn names(parent: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(parent).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A parent whose image root was changed and packed.
fn prepared(dir: &Path, squashfs: &str) -> std::path::PathBuf {
    let parent = dir.join("w");
    succeed(ims_sshd(&["prepare", "w", squashfs], &[]).current_dir(dir));
    std::fs::write(parent.join("image-root/etc/mine"), "hours of work").unwrap();
    succeed(ims_sshd(&["package", "--name", "packed", "w"], &[]).current_dir(dir));
    parent
}

#[test]
fn refused_source_drops_nothing() {
    let (dir, tree, squashfs) = packed_image();
    let squashfs = squashfs.to_str().unwrap();
    let parent = prepared(dir.path(), squashfs);
    let before = state(&parent);
    let content = std::fs::read(squashfs).unwrap();
    for (name, bytes) in [("cut.sqsh", &content[..content.len() / 2]), ("junk", b"<html>404</html>")] {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    let tar = |archive: &str, from: &Path, what: &str| {
        succeed(Command::new("tar").arg("-caf").arg(dir.path().join(archive)).arg("-C").arg(from).arg(what));
    };
    tar("whole.tar", &tree, ".");
    tar("other.tar", &tree, "boot");
    tar("whole.tar.gz", &tree, ".");
    let whole = std::fs::read(dir.path().join("whole.tar")).unwrap();
    std::fs::write(dir.path().join("cut.tar"), &whole[..whole.len() / 1024 * 512]).unwrap();
    let not_found = FileServer::start(Vec::new(), &[Fault::Status(404)]);
    let cut = FileServer::start(content[..content.len() / 2].to_vec(), &[]);
    let wrong = "0".repeat(64);
    for (arguments, why) in [
        (&["w", "missing.sqsh"][..], "No such file"),
        (&["w", "cut.sqsh"], "cut off"),
        (&["w", "junk"], "neither a squashfs nor an archive"),
        (&["w", "cut.tar"], "cut off"),
        (&["w", "other.tar"], "other.tar as an image: it is not an image root"),
        (&["w", "empty"], "empty as an image: it is not an image root"),
        (&["--sha256", &wrong, "w", squashfs], "expected 0000"),
        (&["w", &not_found.url], "404 Not Found"),
        (&["w", &cut.url], "cut off"),
        (&["w", "http://127.0.0.1:1/x"], "127.0.0.1:1"),
        (&["--open", "overlay", "w", "whole.tar.gz"], "it is not a squashfs"),
        (&["--open", "overlay", "w", "cut.sqsh"], "cut off"),
        (&["w", "w/image-root"], "it lies in the image root that --fresh drops"),
    ] {
        let refused = ims_sshd(&["prepare", "--fresh"], &[])
            .env("IMS_RETRY_LIMIT", "1")
            .args(arguments)
            .current_dir(dir.path())
            .output()
            .unwrap();
        let said = text(&refused.stderr);
        assert!(!refused.status.success() && said.contains(why), "{arguments:?}: {said}");
        assert_eq!(state(&parent), before, "{arguments:?}");
    }
    let said = text(fresh(dir.path(), &["w", "missing.sqsh"]).stderr);
    assert!(said.contains("w/image-root is as it was"), "{said}");
}

#[test]
fn image_root_open_in_a_pod_is_neither_replaced_nor_packed() {
    let (dir, _, squashfs) = packed_image();
    let mut environment = Environment::open(Image::Busybox, Mode::Jailed);
    let parent = environment.volume.parent.clone();
    let image_root = environment.volume.image_root.clone();
    std::fs::write(image_root.join("etc/mine"), "hours of work").unwrap();
    let (shown, source) = (parent.to_str().unwrap(), squashfs.to_str().unwrap());
    for command in [
        &["prepare", "--fresh", shown, source][..],
        &["prepare", shown, source],
        &["package", "--kernel", "auto", shown],
        &["package", "--kernel", "auto", image_root.to_str().unwrap()],
    ] {
        // Like another container, which has the volume and not the mounts of the environment.
        let mut other = Command::new("unshare");
        other.args(["-m", &*IMS_SSHD]).args(command).current_dir(dir.path());
        let refused = other.output().unwrap();
        assert_eq!(refused.status.code(), Some(1), "{command:?}: {refused:?}");
        let why = format!("cannot claim {shown}: another build environment is open on it");
        assert!(text(&refused.stderr).contains(&why), "{command:?}: {refused:?}");
    }
    assert_eq!(std::fs::read_to_string(image_root.join("etc/mine")).unwrap(), "hours of work");
    assert_eq!(environment.says("echo open"), "open");
    assert_eq!(environment.complete(), 0);
    succeed(ims_sshd(&["prepare", "--fresh", shown, source], &[]).current_dir(dir.path()));
    assert!(!image_root.join("etc/mine").exists());
}

/// `prepare SOURCE PARENT`, with both in the wrong order or a variable wrong: the job of the open environment goes on.
#[test]
fn refusal_by_hand_leaves_the_job_of_an_open_environment_alone() {
    let (_dir, tree, squashfs) = packed_image();
    let mut environment = Environment::open(Image::Busybox, Mode::Jailed);
    let parent = environment.volume.parent.clone();
    let ims = ImsServer::start();
    for (source, wrong) in [(&tree, None), (&squashfs, None), (&squashfs, Some(("SSH_JAIL", "maybe".to_owned())))] {
        for places in [[source, &parent], [&parent, source]] {
            let variables: Vec<_> = ims.variables().into_iter().chain(wrong.clone()).collect();
            let refused = ims_sshd(&["prepare"], &variables).args(places).output().unwrap();
            assert!(!refused.status.success(), "{places:?}: {refused:?}");
            assert_eq!(ims.statuses(), [""; 0], "{places:?}: {refused:?}");
            for place in places {
                assert!(!place.join("pod_error").exists(), "{places:?}");
            }
        }
    }
    assert_eq!(environment.complete(), 0);
}

/// A container engine creates a directory where a bind mount names a file that does not exist.
#[test]
fn directory_in_place_of_a_record_of_the_publication_does_not_stop_prepare() {
    let dir = directory();
    let (_image, _, squashfs) = packed_image();
    let parent = prepared(dir.path(), squashfs.to_str().unwrap());
    for name in [".ims-sshd.upload", ".ims-sshd.publication", "transfer.sqsh"] {
        std::fs::create_dir(parent.join(name)).unwrap();
        std::fs::write(parent.join(name).join("mine"), "").unwrap();
        let output = fresh(dir.path(), &["w", squashfs.to_str().unwrap()]);
        let said = text(&output.stderr);
        assert!(output.status.success() && said.contains("has been renamed to"), "{name}: {said}");
        assert!(!parent.join(name).exists());
    }
}

#[test]
fn new_image_root_replaces_the_old_one_with_its_changes_and_archives() {
    let (dir, tree, squashfs) = packed_image();
    let parent = prepared(dir.path(), squashfs.to_str().unwrap());
    std::fs::write(parent.join("notes.txt"), "mine").unwrap();
    let server = FileServer::start(std::fs::read(&squashfs).unwrap(), &[]);
    for source in ["tree.sqsh", "tree", &server.url] {
        let output = fresh(dir.path(), &["w", source]);
        assert!(output.status.success(), "{source}: {output:?}");
        crate::prepare::same_tree(&tree, &parent.join("image-root"));
        // A squashfs that was fetched is kept for the packer, and a directory is no source of one.
        let kept: &[_] = match source {
            "tree.sqsh" => &[".ims-sshd.unpacked"],
            "tree" => &[],
            _ => &[".ims-sshd.source.sqsh", ".ims-sshd.unpacked"],
        };
        let mut wanted = [&[".ims-sshd.inventory", ".ims-sshd.source", "image-root", "notes.txt"], kept].concat();
        wanted.sort_unstable();
        assert_eq!(names(&parent), wanted, "{source}");
    }
    // The record is the new source's.
    let again = ims_sshd(&["prepare", "w", &server.url], &[]).current_dir(dir.path()).output().unwrap();
    assert!(text(&again.stderr).contains("is there already, made of http"), "{again:?}");
}

#[test]
fn overlay_replaces_a_mounted_overlay() {
    let (dir, _, squashfs) = packed_image();
    succeed(Command::new("cp").args([&squashfs, &dir.path().join("two.sqsh")]));
    let server = FileServer::start(std::fs::read(&squashfs).unwrap(), &[]);
    let script = "set -e; p=\"$0 prepare --open overlay\"; $p w tree.sqsh; echo old > w/image-root/etc/old; \
        ! $p --fresh w missing; cat w/image-root/etc/old; \
        $p --fresh w two.sqsh; ! test -e w/image-root/etc/old; echo new > w/image-root/etc/new; \
        $p w two.sqsh; cat w/image-root/etc/new; \
        $p --fresh w $1; ! test -e w/image-root/etc/new; test -e w/image.sqsh; \
        $p --fresh w tree; test -e w/image-root/etc/passwd; ! test -e w/image.sqsh; \
        grep -c $PWD/w/ /proc/self/mountinfo; ls -A w";
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script, &*IMS_SSHD, &server.url]).current_dir(dir.path());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(text(&output.stdout), "old\nnew\n1\n.ims-sshd.source\nimage-root\noverlay\n");
}

#[test]
fn disk_without_space_for_both_keeps_the_old_image_root() {
    let (dir, _, squashfs) = packed_image();
    std::fs::create_dir(dir.path().join("disk")).unwrap();
    let script = "set -e; size=$(du -sk tree | cut -f1); mount -t tmpfs -o size=$((size * 3 / 2))k tmpfs disk; \
        $0 prepare disk/w $1; echo mine > disk/w/image-root/etc/mine; ! $0 prepare --fresh disk/w $1; \
        cat disk/w/image-root/etc/mine; ls -A disk/w";
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script, &*IMS_SSHD]).arg(&squashfs).current_dir(dir.path());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(text(&output.stdout), "mine\n.ims-sshd.inventory\n.ims-sshd.source\nimage-root\n");
    let said = text(&output.stderr);
    assert!(said.contains("and the disk has no space for both; remove "), "{said}");
}

#[test]
fn killed_run_loses_nothing_and_the_next_one_cleans_up() {
    let (dir, tree) = bootable_image();
    std::fs::write(tree.join("random"), feed(Command::new("head").args(["-c", "20M", "/dev/urandom"]), b"").stdout)
        .unwrap();
    let squashfs = squashfs_of(&tree);
    let parent = prepared(dir.path(), squashfs.to_str().unwrap());
    let before = state(&parent);
    let mut child = ims_sshd(&["prepare", "--fresh", "w", "tree.sqsh"], &[]).current_dir(dir.path()).spawn().unwrap();
    let unpacking = parent.join(".ims-sshd.fresh/.ims-sshd.unpacking");
    wait_until("it to unpack", || unpacking.exists());
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until("its programs to end", || processes_with(unpacking.to_str().unwrap()).is_empty());
    succeed(ims_sshd(&["prepare", "w", "tree.sqsh"], &[]).current_dir(dir.path()));
    assert_eq!(state(&parent), before);
    succeed(ims_sshd(&["prepare", "--fresh", "w", "tree.sqsh"], &[]).current_dir(dir.path()));
    let wanted = [".ims-sshd.inventory", ".ims-sshd.source", ".ims-sshd.unpacked", "image-root"];
    assert_eq!(names(&parent), wanted);
}

#[test]
fn marks_are_removed_only_when_an_image_root_takes_its_place() {
    const MARKS: [&str; 4] = ["complete", "exiting", "ready", "sshd_listening"];
    let (dir, _, squashfs) = packed_image();
    let squashfs = squashfs.to_str().unwrap();
    let content = std::fs::read(squashfs).unwrap();
    for (name, bytes) in [("cut.sqsh", &content[..content.len() / 2]), ("junk", b"<html>404</html>")] {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    let marks = |parent: &Path| MARKS.iter().filter(|name| parent.join(name).exists()).count();
    let mark = |parent: &Path| MARKS.iter().for_each(|name| std::fs::write(parent.join(name), "").unwrap());
    let run = |options: &[&str], source: &str| {
        let mut prepare = Command::new("unshare");
        prepare.args(["-m", &*IMS_SSHD, "prepare"]).args(options).args(["w", source]).current_dir(dir.path());
        prepare.output().unwrap()
    };
    let parent = dir.path().join("w");
    std::fs::create_dir(&parent).unwrap();
    for ways in [&[][..], &["--open", "overlay"]] {
        for there in ["no image root", "an image root"] {
            mark(&parent);
            let before = state(&parent);
            for options in [&[][..], &["--fresh"]] {
                for source in ["missing", "junk", "cut.sqsh"] {
                    let refused = run(&[options, ways].concat(), source);
                    assert!(!refused.status.success(), "{refused:?}");
                    assert_eq!(state(&parent), before, "{options:?} {ways:?} {source}, {there}");
                }
            }
            let status = succeed(ims_sshd(&["status", "w"], &[]).current_dir(dir.path()));
            assert!(!status.contains("remove:"), "{status}");
            // The second time it goes on with what is there.
            for options in [&[][..], &[], &["--fresh"]] {
                mark(&parent);
                let prepared = run(&[options, ways].concat(), squashfs);
                assert!(prepared.status.success(), "{prepared:?}");
                assert_eq!(marks(&parent), 0, "{options:?} {ways:?}, {there}");
            }
        }
        succeed(Command::new("sh").args(["-c", "rm -r w/* w/.ims*"]).current_dir(dir.path()));
    }
}
