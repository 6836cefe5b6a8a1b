//! sftp and scp, in an image that has all of it and in one that has nothing.

use std::process::Command;

use testbed::*;

const PLACES: [(Image, Mode); 3] =
    [(Image::Debian, Mode::Jailed), (Image::Busybox, Mode::Jailed), (Image::Debian, Mode::Plain)];

/// A directory of the image root as sessions name it.
fn inside(environment: &Environment, mode: Mode, path: &str) -> String {
    match mode {
        Mode::Jailed => path.to_owned(),
        Mode::Plain => format!("{}{path}", environment.image_root.display()),
    }
}

#[test]
fn sftp_does_what_sftp_does() {
    for (image, mode) in PLACES {
        let environment = Environment::open(image, mode);
        let local = tempfile::tempdir().unwrap();
        let (sent, got) = (local.path().join("sent"), local.path().join("got"));
        let bytes: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
        std::fs::write(&sent, &bytes).unwrap();
        let root = inside(&environment, mode, "/root");
        let batch = format!(
            "put {0} {1}/a\nchmod 640 {1}/a\nrename {1}/a {1}/b\nln -s b {1}/link\nls -l {1}\nget {1}/link {2}\nmkdir {1}/d\n\
             rmdir {1}/d\nput {0} {1}/c\nrm {1}/c\n",
            sent.display(),
            root,
            got.display()
        );
        let output = environment.sftp(&batch);
        assert!(output.status.success(), "{image:?} {mode:?}: {output:?}");
        assert!(text(&output.stdout).contains("-rw-r-----"), "{output:?}");
        assert!(std::fs::read(&got).unwrap() == bytes);
        let there = environment.image_root.join("root");
        assert!(std::fs::read(there.join("b")).unwrap() == bytes);
        assert_eq!(std::fs::read_link(there.join("link")).unwrap(), std::path::Path::new("b"));
        assert!(!there.join("c").exists() && !there.join("d").exists());
        let failed = environment.sftp(&format!("get {root}/missing {}\n", got.display()));
        assert!(!failed.status.success());
    }
}

#[test]
fn scp_works_the_new_way_everywhere_and_the_old_way_where_the_image_has_scp() {
    for (image, mode) in PLACES {
        let environment = Environment::open(image, mode);
        let local = tempfile::tempdir().unwrap();
        let sent = local.path().join("sent");
        std::fs::write(&sent, "text").unwrap();
        let ways: &[&[&str]] = if image == Image::Debian { &[&[], &["-O"]] } else { &[&[]] };
        for way in ways {
            let scp = |from: &str, to: &str| {
                let mut scp = Command::new("scp");
                scp.args(environment.ssh_options()).args(*way).args([
                    "-p",
                    "-P",
                    &environment.port.to_string(),
                    from,
                    to,
                ]);
                succeed(&mut scp);
            };
            let remote = format!("root@127.0.0.1:{}", inside(&environment, mode, "/root/there"));
            let back = local.path().join("back");
            scp(&sent.display().to_string(), &remote);
            scp(&remote, &back.display().to_string());
            assert_eq!(std::fs::read_to_string(back).unwrap(), "text");
            assert_eq!(std::fs::read_to_string(environment.image_root.join("root/there")).unwrap(), "text");
        }
    }
}

#[test]
fn sftp_stays_in_the_image() {
    let environment = Environment::open(Image::Busybox, Mode::Jailed);
    let secret = environment.dir.path().join("secret");
    std::fs::write(&secret, "x").unwrap();
    std::os::unix::fs::symlink(environment.dir.path(), environment.image_root.join("root/out")).unwrap();
    for path in [secret.display().to_string(), "/root/out/secret".into(), format!("/../../../..{}", secret.display())] {
        let output = environment.sftp(&format!("get {path} {}/stolen\n", environment.dir.path().display()));
        assert!(!output.status.success(), "{path}");
    }
    // The copies that start sessions and the server. Opened to append nothing.
    let tried =
        environment.says("cd /run/.ims-sshd && for file in *; do ( : >> $file ) 2>/dev/null && echo $file; done; ls");
    assert_eq!(
        tried.lines().collect::<Vec<_>>(),
        ["ims-jail-shell", "ld.so", "libc.so.6", "sftp-server"],
        "listed, and none can be written"
    );
    assert!(!environment.sftp("rm /run/.ims-sshd/ld.so\n").status.success());
}

#[test]
fn rsync_goes_both_ways() {
    let environment = Environment::open(Image::Debian, Mode::Jailed);
    let local = tempfile::tempdir().unwrap();
    std::fs::write(local.path().join("file"), "text").unwrap();
    // The image needs an rsync of its own, as a node does: this machine's, with its libraries, will do.
    let source = environment.image_root.join("usr/bin/rsync");
    std::fs::copy("/usr/bin/rsync", source).unwrap();
    for library in
        succeed(Command::new("ldd").arg("/usr/bin/rsync")).split_whitespace().filter(|w| w.starts_with("/lib/"))
    {
        let place = environment.image_root.join("usr").join(&library[1..]);
        if !place.exists() {
            std::fs::copy(library, place).unwrap();
        }
    }
    let shell = format!("ssh {} -p {}", environment.ssh_options().join(" "), environment.port);
    let rsync = |from: &str, to: &str| succeed(Command::new("rsync").args(["-a", "-e", &shell, from, to]));
    rsync(&format!("{}/", local.path().display()), "root@127.0.0.1:/root/tree/");
    assert_eq!(environment.says("cat /root/tree/file"), "text");
    let back = local.path().join("back");
    rsync("root@127.0.0.1:/root/tree/", &format!("{}/", back.display()));
    assert_eq!(std::fs::read_to_string(back.join("file")).unwrap(), "text");
}
