//! Confinement of programs that parse hostile data. A script plays a program that was taken over: it tries what
//! root can do, and reports the result of each attempt.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use testbed::job::*;
use testbed::*;

/// Prints `NAME: done` or `NAME: ERROR` for each attempt. $0 is the program.
const TRIES: &str = r#"#!/usr/bin/python3
import ctypes, errno, os, resource, socket, stat, sys
libc = ctypes.CDLL(None, use_errno=True)
outside = os.path.dirname(os.path.dirname(os.path.abspath(sys.argv[0]))) + '/outside/'
port = int(open(os.path.dirname(os.path.abspath(sys.argv[0])) + '/port').read())
results = []

def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)

def attempt(name, *steps):
    try:
        for step in steps:
            step()
        result = 'done'
    except OSError as e:
        result = errno.errorcode[e.errno]
    results.append(f'{name}: {result}')

def connect(family, address):
    s = socket.socket(family)
    s.settimeout(5)
    s.connect(address)

attempt('write outside', lambda: open(outside + 'new', 'w').close(), lambda: os.remove(outside + 'new'))
attempt('append outside', lambda: open(outside + 'secret', 'a').write(''))
attempt('truncate outside', lambda: os.truncate(outside + 'secret', 6))
attempt('read outside', lambda: open(outside + 'secret').read())
attempt('list outside', lambda: os.listdir(outside))
attempt('read shadow', lambda: open('/etc/shadow').read())
attempt('read parent', lambda: open(f'/proc/{os.getppid()}/environ').read())
attempt('rename outside', lambda: os.rename(outside + 'secret', outside + 'other'), lambda: os.rename(outside + 'other', outside + 'secret'))
attempt('remove outside', lambda: os.mkdir(outside + 'd'), lambda: os.rmdir(outside + 'd'))
attempt('chmod outside', lambda: os.chmod(outside + 'secret', 0o600))
attempt('chown outside', lambda: os.chown(outside + 'secret', 0, 0))
attempt('utime outside', lambda: os.utime(outside + 'secret'))
attempt('xattr outside', lambda: os.setxattr(outside + 'secret', 'user.x', b'x'))
attempt('tcp', lambda: connect(socket.AF_INET, ('127.0.0.1', port)))
attempt('unix', lambda: connect(socket.AF_UNIX, outside + 'socket'))
attempt('netlink', lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
attempt('ptrace', lambda: call('ptrace', 16, os.getppid(), 0, 0), lambda: os.waitpid(os.getppid(), 0x40000000), lambda: call('ptrace', 17, os.getppid(), 0, 0))
attempt('signal', lambda: os.kill(os.getppid(), 0))
attempt('mount', lambda: call('mount', b'none', outside.encode(), b'tmpfs', 0, None), lambda: call('umount2', outside.encode(), 2))
attempt('chroot', lambda: call('chroot', b'/'))
attempt('setuid', lambda: call('syscall', 117, 0, 0, 0), lambda: os.setgroups([0]))
attempt('nice', lambda: os.setpriority(os.PRIO_PROCESS, 0, -1))
attempt('device', lambda: os.mknod('null', stat.S_IFCHR | 0o666, os.makedev(1, 3)), lambda: open('null').close())
attempt('system', lambda: open('/usr/bin/env').close())
attempt('target', lambda: open('new', 'w').close(), lambda: os.mkdir('d'), lambda: os.link('new', 'd/new'), lambda: os.rename('d/new', 'moved'),
        lambda: os.chown('new', 7, 8), lambda: os.chmod('new', 0o4755), lambda: os.mkfifo('fifo'), lambda: os.setxattr('new', 'user.x', b'x'))
attempt('trusted', lambda: os.setxattr('.', 'trusted.x', b'x'))
attempt('read here', lambda: os.listdir('.'))
attempt('unshare', lambda: call('unshare', 0x10000000))
for name in ['DATA', 'FSIZE', 'CPU', 'CORE']:
    results.append(f'{name}: {resource.getrlimit(getattr(resource, "RLIMIT_" + name))[1]}')
results.append(f'privileges: {libc.prctl(39, 0, 0, 0, 0)}')
# In one line: of many, a message quotes the first ones.
print(', '.join(results), file=sys.stderr)
"#;

/// Makes the target an image root.
const IMAGE_ROOT: &str = "\nos.mkdir('etc')\nopen('etc/passwd', 'w').close()\n";

/// Targets outside that the script tries to read or write, and the script itself: `programs/NAME`.
struct Place {
    dir: tempfile::TempDir,
    _listeners: (TcpListener, UnixListener),
}

impl Place {
    fn new(program: &str, script: &str) -> Self {
        let dir = directory();
        for name in ["programs", "outside"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        std::fs::write(dir.path().join("outside/secret"), "secret").unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        std::fs::write(dir.path().join("programs/port"), tcp.local_addr().unwrap().port().to_string()).unwrap();
        let outside = std::fs::File::open(dir.path().join("outside")).unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&outside);
        let unix = UnixListener::bind(format!("/proc/self/fd/{number}/socket")).unwrap();
        let program = dir.path().join("programs").join(program);
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        Self { dir, _listeners: (tcp, unix) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, command: &mut Command) -> Output {
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", self.path("programs").display());
        command.env("PATH", path).current_dir(self.dir.path()).output().unwrap()
    }
}

/// Result of each attempt.
fn ended(output: &Output) -> BTreeMap<String, String> {
    let said = text(&output.stderr);
    let tries = said.split(['\n', ',']).filter_map(|part| {
        let (name, result) = part.rsplit_once(": ")?;
        let name = name.rsplit(": ").next()?.trim();
        Some((name.to_owned(), result.trim().to_owned()))
    });
    tries.collect()
}

/// Attempts by which root escapes, and which only mounts of its own prevent.
const OUT: [&str; 17] = [
    "write outside",
    "append outside",
    "truncate outside",
    "read outside",
    "list outside",
    "read shadow",
    "read parent",
    "rename outside",
    "remove outside",
    "tcp",
    "unix",
    "netlink",
    "ptrace",
    "signal",
    "mount",
    "unshare",
    "chroot",
];
const OUT_WITHOUT_MOUNTS: [&str; 5] = ["chmod outside", "chown outside", "utime outside", "xattr outside", "device"];

fn squashfs_header(place: &Place) -> PathBuf {
    let mut superblock = b"hsqs".to_vec();
    superblock.resize(4096, 0);
    superblock[40..48].copy_from_slice(&4096_u64.to_le_bytes());
    let file = place.path("image.sqsh");
    std::fs::write(&file, superblock).unwrap();
    file
}

#[test]
fn hostile_unpacker_has_no_access_to_other_files_or_the_network() {
    let place = Place::new("unsquashfs", &format!("{TRIES}{IMAGE_ROOT}"));
    // Unconfined, every attempt succeeds: each one is valid.
    std::fs::create_dir(place.path("free")).unwrap();
    let mut free = Command::new("unshare");
    free.args(["-m", "sh", "-c", "cd free; unsquashfs"]);
    let by_itself = ended(&place.run(&mut free));
    for name in OUT.iter().chain(&OUT_WITHOUT_MOUNTS).chain(&["setuid", "nice", "target", "trusted"]) {
        assert_eq!(by_itself[*name], "done", "{name} by itself: {by_itself:#?}");
    }
    let image = squashfs_header(&place);
    let output = place.run(ims_sshd(&["prepare"], &[]).arg(place.path("parent")).arg(&image));
    assert!(output.status.success(), "{output:?}");
    let results = ended(&output);
    for name in OUT.iter().chain(&OUT_WITHOUT_MOUNTS).chain(&["setuid", "nice"]) {
        assert_ne!(results[*name], "done", "{name}: {results:#?}");
    }
    for name in ["system", "target", "trusted", "read here"] {
        assert_eq!(results[name], "done", "{name}: {results:#?}");
    }
    assert_eq!((results["CORE"].as_str(), results["privileges"].as_str()), ("0", "1"), "{results:#?}");
    let memory: u64 = results["DATA"].parse().unwrap();
    assert!(memory > 1 << 30 && memory < 1 << 40, "{results:#?}");
    assert_eq!(results["FSIZE"], (2_u64 << 40).to_string());
    assert_ne!(results["CPU"], "-1");
    assert_eq!(std::fs::read(place.path("outside/secret")).unwrap(), b"secret");
}

/// Capabilities of a pod: none includes CAP_SYS_ADMIN.
#[test]
fn hostile_unpacker_is_confined_without_privileges_and_limits_are_logged() {
    let place = Place::new("unsquashfs", &format!("{TRIES}{IMAGE_ROOT}"));
    let image = squashfs_header(&place);
    let mut prepare = Command::new("setpriv");
    prepare.args(["--bounding-set", "-sys_admin", &*IMS_SSHD, "prepare"]).arg(place.path("parent")).arg(&image);
    let output = place.run(prepare.env("LOG_LEVEL", "DEBUG"));
    assert!(output.status.success(), "{output:?}");
    let results = ended(&output);
    for name in OUT.iter().chain(&["setuid", "nice"]) {
        assert_ne!(results[*name], "done", "{name}: {results:#?}");
    }
    assert_eq!((results["target"].as_str(), results["system"].as_str()), ("done", "done"), "{results:#?}");
    assert!(text(&output.stderr).contains("have no read-only mounts of their own: "), "{output:?}");
}

#[test]
fn unpacking_is_refused_without_capabilities_to_keep_attributes() {
    let place = Place::new("none", "");
    let tree = image(place.dir.path());
    let squashfs = squashfs_of(&tree);
    for (capability, open) in [
        ("chown", "unpack"),
        ("dac_override", "unpack"),
        ("fowner", "unpack"),
        ("fsetid", "unpack"),
        ("setfcap", "unpack"),
        ("mknod", "unpack"),
        ("fsetid", "overlay"),
    ] {
        let parent = tempfile::tempdir_in(place.dir.path()).unwrap();
        let mut prepare = Command::new("setpriv");
        prepare.args(["--bounding-set", &format!("-{capability}"), &*IMS_SSHD, "prepare", "--open", open]);
        let output = place.run(prepare.arg(parent.path()).arg(&squashfs));
        let said = text(&output.stderr);
        if capability == "mknod" || open == "overlay" {
            assert!(output.status.success(), "{capability}: {said}");
            succeed(
                Command::new("sh")
                    .args(["-c", "umount \"$0\"/image-root \"$0\"/overlay/lower 2> /dev/null; :"])
                    .arg(parent.path()),
            );
            continue;
        }
        assert_eq!(output.status.code(), Some(1), "{capability}: {said}");
        assert!(said.contains(&format!("CAP_{} is missing", capability.to_uppercase())), "{said}");
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0, "{capability}");
    }
}

/// A program that can be replaced packs.
const MKSQUASHFS: [(&str, &str); 1] = [("IMAGE_PACKER", "mksquashfs")];

#[test]
fn hostile_packer_neither_changes_the_image_nor_reads_other_files() {
    let place = Place::new("mksquashfs", TRIES);
    let tree = image(place.dir.path());
    let before = digest(&tree);
    let output = place
        .run(ims_sshd(&["package", "--archive", "image.sqsh"], &MKSQUASHFS.map(|(n, v)| (n, v.into()))).arg(&tree));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let results = ended(&output);
    for name in OUT.iter().chain(&OUT_WITHOUT_MOUNTS).chain(&["target", "trusted", "setuid", "nice"]) {
        assert_ne!(results[*name], "done", "{name}: {results:#?}");
    }
    assert_eq!((results["system"].as_str(), results["read here"].as_str()), ("done", "done"), "{results:#?}");
    assert_eq!(differences(&before, &digest(&tree)), [""; 0]);
}

/// Writes the names of its variables to standard error, and to a file beside itself if it can, and exits. A shell adds
/// some.
const NAMES: &str = r#"#!/bin/sh
names="names: $(env | cut -d= -f1 | grep -vx 'PWD\|OLDPWD\|SHLVL\|_' | sort | tr '\n' ' ')"
echo "$names" >&2
echo "$names" > "$0.names"
exit 1
"#;

#[test]
fn programs_do_not_inherit_variables_with_secrets() {
    let secrets = [
        ("S3_ACCESS_KEY", "access".to_owned()),
        ("S3_SECRET_KEY", "secret".into()),
        ("AWS_SESSION_TOKEN", "token".into()),
        ("OAUTH_CONFIG_DIR", "/nowhere".into()),
        ("TAR_OPTIONS", "--verbose".into()),
    ];
    for (program, source) in [("unsquashfs", "image.sqsh"), ("tar", "image.tar"), ("cp", "tree"), ("mksquashfs", "")] {
        let place = Place::new(program, NAMES);
        let tree = image(place.dir.path());
        squashfs_header(&place);
        succeed(Command::new("tar").args(["-C", "tree", "-cf", "image.tar", "."]).current_dir(place.dir.path()));
        let mut command = if source.is_empty() {
            let mut package = ims_sshd(&["package", "--archive", "packed.sqsh"], &secrets);
            package.arg(&tree).envs(MKSQUASHFS);
            package
        } else {
            let mut prepare = ims_sshd(&["prepare"], &secrets);
            prepare.args([place.path("parent"), place.path(source)]);
            prepare
        };
        let output = place.run(&mut command);
        let said = text(&output.stderr);
        assert!(said.contains("names: LANG PATH "), "{program}: {said}");
    }
    // Reads the beginning of an archive, unconfined.
    let place = Place::new("gzip", NAMES);
    std::fs::write(place.path("image.tar.gz"), b"\x1f\x8b").unwrap();
    place.run(ims_sshd(&["prepare"], &secrets).args([place.path("parent"), place.path("image.tar.gz")]));
    assert_eq!(std::fs::read_to_string(place.path("programs/gzip.names")).unwrap(), "names: LANG PATH \n");
}

#[test]
fn unpacker_with_endless_output_is_killed() {
    for (script, reason) in [
        ("#!/bin/sh\nexec yes >&2\n", "the output of unsquashfs is too long"),
        ("#!/bin/sh\nexec truncate -s 3T large\n", "a file in it is larger than 2199023255552 bytes"),
        ("#!/bin/sh\nexec cat /usr/bin/* /usr/bin/* /usr/bin/* > large\n", "space left"),
    ] {
        let place = Place::new("unsquashfs", script);
        std::fs::create_dir(place.path("small")).unwrap();
        let image = squashfs_header(&place);
        let mut command = Command::new("unshare");
        command.args([
            "-m",
            "sh",
            "-c",
            "mount -t tmpfs -o size=100m tmpfs small; exec \"$@\"",
            "sh",
            &*IMS_SSHD,
            "prepare",
        ]);
        let output = place.run(command.arg(place.path("small/parent")).arg(&image));
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(text(&output.stderr).contains(reason), "{reason}: {output:?}");
    }
}

/// Everything that ordinary programs show of a tree.
fn listing(tree: &Path) -> String {
    let script = "cd $0; find . -printf '%p %M %U %G %y %l %n %s %T@ %D\\n' | sed 's/ [0-9]*$//' | sort; \
                  find . -type c -o -type b | sort | xargs stat -c '%n %t %T'; getfattr -Rhd -m - . 2>&1 | sort; \
                  find . -type f -print0 | sort -z | xargs -0 md5sum; stat -c '%n %i' usr/one etc/two | cut -d' ' -f2 | uniq | wc -l";
    succeed(Command::new("sh").args(["-c", script]).arg(tree))
}

#[test]
fn real_archives_keep_devices_attributes_capabilities_owners_and_links() {
    let (dir, tree) = bootable_image();
    let script = "cd $0; mkdir -p usr dev etc/closed; mknod dev/null c 1 3; mknod dev/disk b 7 0; mkfifo fifo; echo one > usr/one; ln usr/one etc/two; \
                  chown 1234:4321 usr/one; chmod 4751 usr/one; cp bin/busybox usr/capable; setcap cap_net_raw+ep usr/capable; \
                  setfattr -n user.note -v u usr/one; setfattr -n trusted.note -v t usr/one; setfattr -n security.selinux -v label usr/one; \
                  truncate -s 64M sparse; chmod 0 etc/closed; touch etc/closed/in; ln -s /etc/passwd link; ln -s nowhere dangling; \
                  chown -h 5:6 link; ln -s /proc/self/fd/0 magic; chmod 751 .; setfattr -n user.root -v r .; \
                  find . -depth -exec touch -hd 2001-02-03 {} +";
    succeed(Command::new("sh").args(["-e", "-c", script]).arg(&tree));
    let squashfs = squashfs_of(&tree);
    let tar = dir.path().join("image.tar.zst");
    let mut pack = Command::new("tar");
    pack.args(["--create", "--zstd", "--sparse", "--acls", "--xattrs", "--xattrs-include=*", "--file"]).arg(&tar);
    succeed(pack.arg("--directory").arg(&tree).arg("."));
    let expected = listing(&tree);
    assert!(expected.contains("trusted.note") && expected.contains("security.capability"), "{expected}");
    for source in [&squashfs, &tar, &tree] {
        let parent = dir.path().join(format!("parent-{}", source.file_name().unwrap().display()));
        let output = ims_sshd(&["prepare"], &[]).arg(&parent).arg(source).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let found = listing(&parent.join("image-root"));
        let differ: Vec<_> = expected.lines().filter(|line| !found.lines().any(|other| other == *line)).collect();
        assert!(differ.is_empty() && found.len() == expected.len(), "{}: {differ:#?}", source.display());
    }
}

#[test]
fn program_of_the_image_is_not_run_outside_whatever_the_search_path_is() {
    let (dir, tree, squashfs) = packed_image();
    let usual = std::env::var("PATH").unwrap();
    for name in ["mksquashfs", "unsquashfs", "tar", "cp", "rpm", "ssh-keygen"] {
        let hostile = tree.join(name);
        std::fs::write(&hostile, "#!/bin/sh\necho a program of the image runs outside >&2\nexit 1\n").unwrap();
        std::fs::set_permissions(&hostile, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    for (number, first) in ["", ".", "bin:..:"].into_iter().enumerate() {
        let path = format!("{first}:{usual}");
        let (archive, parent) = (dir.path().join(format!("{number}.sqsh")), dir.path().join(format!("parent{number}")));
        let (store, work) = (dir.path().join(format!("out{number}")), dir.path().join(format!("work{number}")));
        let mut package = ims_sshd(&["package", "--archive", archive.to_str().unwrap()], &[]);
        package.arg(&tree);
        let mut prepare = ims_sshd(&["prepare"], &[]);
        prepare.arg(&parent).arg(&squashfs);
        let mut customize = ims_sshd(&["customize", tree.to_str().unwrap(), "--output", store.to_str().unwrap()], &[]);
        customize.args(["--kernel", "vmlinuz", "--initrd", "initrd", "--work"]).arg(&work).args(["--", "true"]);
        for command in [&mut package, &mut prepare, &mut customize] {
            let output = command.env("PATH", &path).current_dir(dir.path()).output().unwrap();
            assert!(output.status.success(), "'{path}': {output:?}");
            let said = text(&output.stderr);
            assert!(!said.contains("runs outside"), "'{path}': {said}");
        }
    }
}

#[test]
fn ignored_sigchld_of_the_caller_changes_nothing() {
    let (dir, tree) = bootable_image();
    let archive = dir.path().join("image.sqsh");
    let mut package = Command::new("python3");
    let script =
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])";
    package.args(["-c", script, &*IMS_SSHD, "package", "--archive"]).arg(&archive).arg(&tree);
    let output = package.current_dir(dir.path()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}
