//! Special files of an image where programs outside the jail expect a regular file: they are not opened, and nothing
//! blocks.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent};
use nix::sys::stat::{Mode as Permission, SFlag, makedev, mknod};
use testbed::*;

/// Paths in an image that the supervisor, `enter`, `prepare`, `package` and sshd's helpers read, also through libc.
const FILES: [&str; 27] = [
    "bin/sh",
    "boot/initrd",
    "boot/kernel-parameters",
    "boot/vmlinuz",
    "etc/cray/ca/certificate_authority.crt",
    "etc/environment",
    "etc/group",
    "etc/hostname",
    "etc/hosts",
    "etc/ld.so.preload",
    "etc/localtime",
    "etc/motd",
    "etc/nsswitch.conf",
    "etc/os-release",
    "etc/passwd",
    "etc/resolv.conf",
    "etc/shadow",
    "lib64/ld-linux-x86-64.so.2",
    "root/.hushlogin",
    "tmp/complete",
    "tmp/failed",
    "usr/bin/env",
    "usr/lib/os-release",
    "usr/lib/sysimage/rpm/Packages",
    "var/lib/dpkg/status",
    "var/lib/rpm/Packages",
    "var/lib/rpm/rpmdb.sqlite",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Fifo,
    Device,
    BlockDevice,
    Socket,
    Directory,
    /// A hole of 100 GB.
    Sparse,
}

const KINDS: [Kind; 6] = [Kind::Fifo, Kind::Device, Kind::BlockDevice, Kind::Socket, Kind::Directory, Kind::Sparse];

impl Kind {
    fn put(self, path: &Path) {
        let permissions = Permission::S_IRUSR | Permission::S_IWUSR | Permission::S_IXUSR;
        let device = |kind, major, minor| mknod(path, kind, permissions, makedev(major, minor)).unwrap();
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let _ = std::fs::remove_file(path);
        match self {
            Kind::Fifo => nix::unistd::mkfifo(path, permissions).unwrap(),
            // null and loop0 can be opened by anybody; inotify reports only opens on this path.
            Kind::Device => device(SFlag::S_IFCHR, 1, 3),
            Kind::BlockDevice => device(SFlag::S_IFBLK, 7, 0),
            Kind::Socket => {
                let directory = std::fs::File::open(path.parent().unwrap()).unwrap();
                let number = std::os::fd::AsRawFd::as_raw_fd(&directory);
                let name = path.file_name().unwrap().to_str().unwrap();
                drop(UnixListener::bind(format!("/proc/self/fd/{number}/{name}")).unwrap());
            }
            Kind::Directory => std::fs::create_dir(path).unwrap(),
            Kind::Sparse => std::fs::File::create(path).unwrap().set_len(100 << 30).unwrap(),
        }
    }
}

/// Time limit for each program, also on a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

fn run(what: &str, command: &mut Command) -> Output {
    let began = Instant::now();
    let mut limited = Command::new("timeout");
    limited.args(["--signal=KILL", &LIMIT.as_secs().to_string()]).arg(command.get_program()).args(command.get_args());
    let output = feed(&mut limited, b"");
    assert!(output.status.code().is_some_and(|code| code < 124), "{what}: {output:?}");
    println!("{what}: {:?}", began.elapsed());
    output
}

#[test]
fn a_special_file_of_an_image_is_never_opened_outside_the_jail() {
    let cases: Vec<_> = FILES.iter().flat_map(|file| KINDS.map(|kind| (*file, kind))).collect();
    let failed = run_each(
        &cases,
        2,
        |(file, kind)| format!("{kind:?} at /{file}"),
        |(file, kind)| {
            let volume = Volume::in_memory(Image::Busybox);
            let odd = volume.image_root.join(file);
            for boot in ["boot/vmlinuz", "boot/initrd"] {
                std::fs::create_dir_all(volume.image_root.join("boot")).unwrap();
                std::fs::write(volume.image_root.join(boot), "x").unwrap();
            }
            kind.put(&odd);
            let opened = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
            let watch = |path: &Path| {
                opened.add_watch(path, AddWatchFlags::IN_OPEN | AddWatchFlags::IN_DONT_FOLLOW).unwrap();
            };
            // Directories may be opened to list them, and regular files are opened anyway.
            let is_opened = || {
                let events = opened.read_events().or_else(|e| if e == Errno::EAGAIN { Ok(Vec::new()) } else { Err(e) });
                let is_open = |event: &InotifyEvent| event.mask.contains(AddWatchFlags::IN_OPEN);
                events.unwrap().iter().any(is_open) && !matches!(kind, Kind::Directory | Kind::Sparse)
            };
            watch(&odd);
            let parent = volume.dir.path().join("prepared");
            let ims_sshd = |arguments: &[&str]| {
                let mut command = Command::new(&IMS_SSHD);
                command.args(arguments);
                command
            };
            run("enter", ims_sshd(&["enter"]).arg(&volume.image_root).args(["--", "busybox", "true"]));
            assert!(!is_opened(), "'enter' opened it");
            // A mark of an earlier job is removed.
            if odd.symlink_metadata().is_err() {
                kind.put(&odd);
                watch(&odd);
            }
            let prepared = run("prepare", ims_sshd(&["prepare"]).arg(&parent).arg(&volume.image_root));
            assert!(prepared.status.success() && !is_opened(), "{prepared:?}");
            watch(&parent.join("image-root").join(file));
            // mksquashfs reads holes at a few gigabytes a second.
            if *kind == Kind::Sparse {
                return;
            }
            let changes = volume.dir.path().join("changes");
            let mut package = ims_sshd(&[
                "package",
                "--kernel",
                "vmlinuz",
                "--initrd",
                "initrd",
                "--compression",
                "none",
                "--changes",
            ]);
            let packed = run("package", package.arg(changes).arg(&parent));
            let is_missing = ["boot/vmlinuz", "boot/initrd"].contains(file);
            let said = text(&packed.stderr);
            assert_eq!(packed.status.success(), !is_missing, "{said}");
            assert!(!is_missing || said.contains(&format!("/{file} in the image: it is not a regular file")), "{said}");
            assert!(!is_opened(), "'package' opened it");
        },
    );
    assert!(failed.is_empty(), "{} of {}: {failed:#?}", failed.len(), cases.len());
}
