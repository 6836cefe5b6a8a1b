//! File transfers into and out of an image root, with all attributes.

use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use testbed::*;

use crate::clients::{PACKED, Place};

crate::clients::shown! {
    "OpenSSH sftp", "resumes an interrupted transfer (`reget`, `reput`)" => interrupted_transfer_is_resumed;
    "OpenSSH sftp", "directories, symbolic and hard links, free space, renaming over a file" => sftp_handles_directories_links_and_renames;
    "OpenSSH scp", "`-3` between two environments" => scp_copies_between_environments;
    "sshfs", "parallel reads and writes" => sshfs_reads_and_writes_in_parallel;
    "rsync", "both ways, with ACLs, extended attributes, capabilities, holes and hard links" => rsync_preserves_all_attributes;
    "tar", "piped through ssh both ways, with the same attributes" => tar_preserves_all_attributes;
    "setcap", "a program has its capability in the packed image" => capabilities_survive_packing;
}

/// A directory of the image root that both sides can reach.
struct Ground {
    environment: Environment,
    /// Its path for sessions.
    there: String,
    /// Its path for this test.
    here: PathBuf,
    local: tempfile::TempDir,
}

impl Ground {
    fn new(place: Place) -> Self {
        let environment = place.open(Image::Node);
        let here = environment.image_root.join("srv");
        let there = if place == Place::Plain { here.display().to_string() } else { "/srv".to_owned() };
        Self { environment, there, here, local: tempfile::tempdir().unwrap() }
    }

    fn local(&self, name: &str) -> PathBuf {
        self.local.path().join(name)
    }

    fn sftp(&self, batch: &str) -> String {
        let batch = batch.replace("LOCAL", &self.local.path().display().to_string()).replace("THERE", &self.there);
        let output = self.environment.sftp(&batch);
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        text(output.stdout)
    }

    /// The `ssh` command line for other programs.
    fn shell(&self) -> String {
        format!("ssh {} -p {}", self.environment.ssh_options().join(" "), self.environment.port)
    }

    /// Calls a program with these arguments, separated by spaces.
    fn call(&self, line: &str, last: &[&str]) -> String {
        let mut words = line.split(' ');
        succeed(Command::new(words.next().unwrap()).args(words).args(last).current_dir(&self.local))
    }
}

fn bytes() -> Vec<u8> {
    (0..500_000_u32).flat_map(u32::to_le_bytes).collect()
}

fn interrupted_transfer_is_resumed(place: Place) {
    let ground = Ground::new(place);
    let bytes = bytes();
    std::fs::write(ground.here.join("whole"), &bytes).unwrap();
    std::fs::write(ground.local("got"), &bytes[..700_001]).unwrap();
    std::fs::write(ground.local("whole"), &bytes).unwrap();
    std::fs::write(ground.here.join("put"), &bytes[..3]).unwrap();
    let said = ground.sftp("reget THERE/whole LOCAL/got\nreput LOCAL/whole THERE/put\n");
    assert!(!said.contains("already"), "{said}");
    assert!(std::fs::read(ground.local("got")).unwrap() == bytes);
    assert!(std::fs::read(ground.here.join("put")).unwrap() == bytes);
}

fn sftp_handles_directories_links_and_renames(place: Place) {
    let ground = Ground::new(place);
    std::fs::create_dir_all(ground.local("tree/a/b")).unwrap();
    std::fs::write(ground.local("tree/a/b/file"), "text").unwrap();
    std::fs::write(ground.local("other"), "other").unwrap();
    let said = ground.sftp(
        "put -rp LOCAL/tree THERE\nget -r THERE/tree LOCAL/back\nput LOCAL/other THERE/new\nput LOCAL/tree/a/b/file THERE/old\n\
         rename THERE/new THERE/old\nsymlink old THERE/link\nln THERE/old THERE/second\ndf -h THERE\ndf -i THERE\nls -l THERE\n",
    );
    assert_eq!(std::fs::read_to_string(ground.here.join("tree/a/b/file")).unwrap(), "text");
    assert_eq!(std::fs::read_to_string(ground.local("back/a/b/file")).unwrap(), "text");
    assert_eq!(std::fs::read_to_string(ground.here.join("link")).unwrap(), "other");
    assert!(!ground.here.join("new").exists());
    assert_eq!(std::fs::metadata(ground.here.join("second")).unwrap().nlink(), 2);
    assert_eq!(said.lines().filter(|line| line.ends_with('%')).count(), 2, "{said}");
}

fn scp_copies_between_environments(place: Place) {
    let (from, to) = (Ground::new(place), Ground::new(place));
    let bytes = bytes();
    std::fs::write(from.here.join("file"), &bytes).unwrap();
    let url = |ground: &Ground| format!("scp://root@127.0.0.1:{}/{}/file", ground.environment.port, ground.there);
    succeed(Command::new("scp").args(from.environment.ssh_options()).args(["-3", &url(&from), &url(&to)]));
    assert!(std::fs::read(to.here.join("file")).unwrap() == bytes);
}

fn sshfs_reads_and_writes_in_parallel(place: Place) {
    let ground = Ground::new(place);
    let mounted = ground.local("mounted");
    std::fs::create_dir(&mounted).unwrap();
    let mut sshfs = Command::new("sshfs");
    let place = format!("root@127.0.0.1:{}", ground.there);
    sshfs.args(["-f", "-o", &format!("ssh_command={}", ground.shell()), &place]);
    let mut sshfs = Ended::new(sshfs.arg(&mounted).spawn().unwrap());
    let device = |path: &Path| std::fs::metadata(path).map_or(0, |found| found.dev());
    wait_until("sshfs to mount", || device(&mounted) != device(ground.local.path()));

    let content = |n: u8| vec![n; 300_000 + usize::from(n)];
    std::thread::scope(|scope| {
        for n in 0..8 {
            let (mounted, here) = (&mounted, &ground.here);
            scope.spawn(move || {
                let name = format!("file{n}");
                std::fs::write(mounted.join(&name), content(n)).unwrap();
                assert!(std::fs::read(mounted.join(&name)).unwrap() == content(n));
                assert!(std::fs::read(here.join(&name)).unwrap() == content(n));
                std::fs::rename(mounted.join(&name), mounted.join(format!("{name}.new"))).unwrap();
            });
        }
    });
    assert_eq!(std::fs::read_dir(&mounted).unwrap().count(), 8);
    // The kernel may still be closing a file.
    wait_until("sshfs to be unmounted", || {
        Command::new("umount").arg(&mounted).stderr(Stdio::null()).status().unwrap().success()
    });
    assert!(sshfs.wait().unwrap().success());
}

/// Creates files of every kind whose attributes must survive.
fn lay_out(tree: &Path) {
    std::fs::create_dir_all(tree.join("directory")).unwrap();
    let file = |name: &str| std::fs::write(tree.join(name), name).unwrap();
    for name in ["plain", "shared", "described", "capable", "others"] {
        file(name);
    }
    std::fs::hard_link(tree.join("plain"), tree.join("directory/plain-too")).unwrap();
    symlink("plain", tree.join("link")).unwrap();
    std::os::unix::fs::lchown(tree.join("others"), Some(12345), Some(54321)).unwrap();
    std::fs::File::create(tree.join("holes")).unwrap().set_len(8 << 20).unwrap();
    let call =
        |line: &str, name: &str| succeed(Command::new("sh").args(["-c", &format!("{line} {name}")]).current_dir(tree));
    call("setfacl -m u:12345:rw,g:54321:r", "shared");
    call("setfacl -d -m u:12345:rwx", "directory");
    call("setfattr -n user.comment -v 'of the test'", "described");
    call("setcap cap_net_bind_service,cap_net_raw+ep", "capable");
    call("touch -d 2001-02-03T04:05:06.789", "plain");
}

/// Attributes that must stay the same.
fn description(tree: &Path) -> String {
    // File systems list a directory in different orders.
    let tell = "find . ! -type l | sort | xargs getfacl -n -p; find . | sort | xargs getfattr -h -d -m - -e hex; \
        find . -type f -o -type l | sort | xargs stat -c '%n %f %u:%g %s %h %Y'";
    let all = succeed(Command::new("sh").args(["-c", tell]).current_dir(tree));
    let blocks = std::fs::metadata(tree.join("holes")).unwrap().blocks();
    // Only whether the file is sparse counts, not how many blocks it has.
    format!("{all}\n{}", if blocks < 1000 { "holes" } else { "no holes" })
}

fn preserves_all_attributes(ground: &Ground, put: impl Fn(&Path), get: impl Fn(&Path)) {
    let (tree, back) = (ground.local("tree"), ground.local("back"));
    lay_out(&tree);
    std::fs::create_dir(&back).unwrap();
    let before = description(&tree);
    assert!(before.contains("security.capability") && before.contains("user:12345:rw-") && before.ends_with("\nholes"));
    put(&tree);
    assert_eq!(description(&ground.here.join("tree")), before);
    get(&back);
    assert_eq!(description(&back), before);
}

fn rsync_preserves_all_attributes(place: Place) {
    let ground = Ground::new(place);
    let shell = ground.shell();
    let remote = format!("root@127.0.0.1:{}/tree/", ground.there);
    let rsync = |from: &str, to: &str| ground.call("rsync -aAXSH --numeric-ids -e", &[&shell, from, to]);
    preserves_all_attributes(
        &ground,
        |tree| drop(rsync(&format!("{}/", tree.display()), &remote)),
        |back| drop(rsync(&remote, &format!("{}/", back.display()))),
    );
    // A second run has nothing left to do.
    let again = ground.call("rsync -aAXSHi --numeric-ids -e", &[&shell, &remote, "back/"]);
    assert_eq!(again, "");
}

fn tar_preserves_all_attributes(place: Place) {
    let ground = Ground::new(place);
    std::fs::create_dir(ground.here.join("tree")).unwrap();
    let shell = ground.shell();
    let there = &ground.there;
    let options = "--acls --xattrs --xattrs-include=* --numeric-owner -S";
    let create = format!("tar {options} -cf -");
    let extract = format!("tar {options} -xpf -");
    let pipe = |line: String| drop(succeed(Command::new("bash").args(["-o", "pipefail", "-fc", &line])));
    preserves_all_attributes(
        &ground,
        |tree| {
            pipe(format!(
                "{create} -C {} . | {shell} root@127.0.0.1 \"set -f; {extract} -C {there}/tree\"",
                tree.display()
            ));
        },
        |back| {
            pipe(format!("{shell} root@127.0.0.1 {create} -C {there}/tree . | {extract} -C {}", back.display()));
        },
    );
}

fn capabilities_survive_packing(place: Place) {
    let mut ground = Ground::new(place);
    let there = &ground.there;
    ground.environment.says(&format!("cp /bin/busybox {there}/grep && setcap cap_net_raw,cap_kill+ep {there}/grep"));
    let inside = ground.environment.says(&format!("getcap {there}/grep"));
    // The user nobody runs it, first in the session and then in the packed image.
    let has = "grep CapEff /proc/self/status";
    let granted = "CapEff:\t0000000000002020";
    let as_nobody = "setpriv --reuid 65534 --clear-groups";
    assert_eq!(ground.environment.says(&format!("{as_nobody} {there}/{has}")), granted, "{inside}");
    assert_eq!(ground.environment.complete(), 0);

    let mounted = ground.local("mounted");
    let (packed, below) = if place == Place::Node {
        (ground.environment.signal(PACKED), "srv")
    } else {
        let packed = ground.local("packed");
        succeed(Command::new("mksquashfs").args([&ground.here, &packed]).args(["-quiet", "-no-progress"]));
        (packed, ".")
    };
    std::fs::create_dir(&mounted).unwrap();
    std::fs::set_permissions(ground.local.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    succeed(Command::new("mount").args(["-o", "loop,ro"]).arg(&packed).arg(&mounted));
    let said =
        succeed(Command::new("sh").args(["-c", &format!("{as_nobody} ./{has}")]).current_dir(mounted.join(below)));
    succeed(Command::new("umount").arg(&mounted));
    assert_eq!(said.trim_end(), granted);
}
