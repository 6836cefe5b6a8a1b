//! Files that a command would replace, and archives that are out of date.

use std::path::Path;
use std::process::Output;

use testbed::file_server::FileServer;
use testbed::job::*;
use testbed::*;

fn run(dir: &Path, arguments: &[&str]) -> Output {
    ims_sshd(arguments, &[]).current_dir(dir).output().unwrap()
}

fn done(dir: &Path, arguments: &[&str]) -> Output {
    let output = run(dir, arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    output
}

fn refused(dir: &Path, arguments: &[&str], why: &str) {
    let output = run(dir, arguments);
    let said = text(&output.stderr);
    assert!(!output.status.success() && said.contains(why), "{arguments:?}: {said}");
}

#[test]
fn package_replaces_only_what_it_has_packed_of_the_same_image_root() {
    let (dir, _, squashfs) = packed_image();
    let dir = dir.path();
    let source = dir.join("image.sqsh");
    std::fs::rename(squashfs, &source).unwrap();
    std::fs::write(dir.join("my.txt"), "mine").unwrap();
    std::os::unix::fs::symlink("my.txt", dir.join("link.sqsh")).unwrap();
    let content = std::fs::read(&source).unwrap();
    done(dir, &["prepare", ".", "image.sqsh"]);
    for archive in [&[][..], &["--archive", "image.sqsh"]] {
        let package = [&["package"][..], archive, &["."]].concat();
        refused(dir, &package, "the image root was made from this file; name another file with --archive");
    }
    refused(
        dir,
        &["package", "--archive", "my.txt", "."],
        "my.txt: the file exists, and was not packed from this image root",
    );
    refused(
        dir,
        &["package", "--archive", "link.sqsh", "."],
        "it is a symbolic link; name another file with --archive",
    );
    assert_eq!(std::fs::read(&source).unwrap(), content);
    assert_eq!(std::fs::read(dir.join("my.txt")).unwrap(), b"mine");
    for _ in 0..2 {
        done(dir, &["package", "--name", "new", "."]);
        done(dir, &["package", "--archive", "other.sqsh", "image-root"]);
        std::fs::write(dir.join("image-root/etc/later"), "").unwrap();
    }
    // One that another program has replaced since.
    std::fs::copy(&source, dir.join("new.sqsh")).unwrap();
    refused(
        dir,
        &["package", "--name", "new", "."],
        "was not packed from this image root; name another file with --archive",
    );
}

#[test]
fn prepare_fetches_no_image_over_a_file_of_somebody_else() {
    let (dir, _, content) = served_image();
    let server = FileServer::start(content, &[]);
    let mine = dir.path().join("w/image.sqsh");
    std::fs::create_dir(dir.path().join("w")).unwrap();
    std::fs::write(&mine, "mine").unwrap();
    refused(dir.path(), &["prepare", "w", &server.url], "w/image.sqsh exists, and was not fetched; rename or remove");
    assert_eq!(std::fs::read(&mine).unwrap(), b"mine");
    // A new image root leaves the file that the old one was made of.
    std::fs::copy(dir.path().join("tree.sqsh"), &mine).unwrap();
    done(dir.path(), &["prepare", "w", "w/image.sqsh"]);
    done(dir.path(), &["prepare", "--fresh", "w", "tree"]);
    assert!(mine.exists());
}

#[test]
fn upload_refuses_an_archive_of_an_image_root_that_was_changed_since() {
    let (dir, _, _) = packed_image();
    let dir = dir.path();
    done(dir, &["prepare", "w", "tree.sqsh"]);
    let upload = ["upload", "--store", "s", "w"];
    let root = dir.join("w/image-root");
    let changes: [(&str, &dyn Fn()); 5] = [
        ("a new file", &|| std::fs::write(root.join("etc/late"), "x").unwrap()),
        ("an old time", &|| {
            succeed(std::process::Command::new("touch").args(["-d", "2001-01-01"]).arg(root.join("etc/passwd")));
        }),
        ("a new content", &|| std::fs::write(root.join("etc/late"), "y").unwrap()),
        ("another name", &|| std::fs::rename(root.join("etc/late"), root.join("etc/later")).unwrap()),
        ("nothing", &|| std::fs::remove_file(root.join("etc/later")).unwrap()),
    ];
    for (what, change) in changes {
        done(dir, &["package", "w"]);
        change();
        refused(dir, &upload, "was changed since it was packed; 'ims-sshd package' packs it again");
        assert!(!dir.join("s").exists(), "{what}");
    }
    done(dir, &["package", "w"]);
    // A look, and a program that only reads, change nothing.
    succeed(std::process::Command::new("grep").args(["-rq", "root", root.to_str().unwrap()]));
    done(dir, &upload);
}
