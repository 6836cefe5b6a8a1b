//! Hostile images, with odd files where the jail mounts, reads or writes. Each image works, or is refused by a message
//! that names the odd file; nothing outside the image root changes, no mount appears outside, and nothing hangs.

use std::ffi::OsStr;
use std::fs::Permissions;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use ims_sshd::sys::mounts::mount_points;
use nix::sys::stat::{Mode as Permission, SFlag, makedev, mknod};

/// A tier of the jail.
#[derive(Debug)]
struct Tier {
    name: &'static str,
    /// False if nothing is mounted in the image root, so that odd mount points do not matter.
    mounts: bool,
}

const WAYS: [Tier; 3] = [
    Tier { name: "namespace", mounts: true },
    Tier { name: "user", mounts: true },
    Tier { name: "chroot", mounts: false },
];

impl Tier {
    /// A command that prints the mount table.
    fn look(&self) -> &'static str {
        if self.mounts { "cat /proc/self/mountinfo" } else { "true" }
    }
}

/// Expected outcome for an image.
#[derive(Clone, Debug)]
enum Outcome {
    /// A command and a file transfer work as in any other image.
    Works,
    /// The environment is not opened, and its log has this text.
    Refused(String),
    /// The command fails with this text.
    Answered(&'static str),
    /// The file transfer fails, and the log has this text, since sshd shows the client nothing; a command works.
    NoTransfer(&'static str),
}

const NO_USER: Outcome = NoTransfer("/etc/passwd of the image has no entry with user ID 0");

use Outcome::{Answered, NoTransfer, Refused, Works};

struct Case {
    name: String,
    /// Makes a busybox image hostile.
    shape: Box<dyn Fn(&Volume) + Sync>,
    /// Outcome in each of [`WAYS`].
    outcomes: [Outcome; 3],
}

impl Case {
    fn new(name: impl Into<String>, outcome: Outcome, shape: impl Fn(&Volume) + Sync + 'static) -> Self {
        Self { name: name.into(), shape: Box::new(shape), outcomes: [(); 3].map(|()| outcome.clone()) }
    }

    /// In a user namespace the kernel copies no mount without the mounts below it. Without mounts, the bound tree is
    /// visible.
    fn bound(name: impl Into<String>, seen: Outcome, shape: impl Fn(&Volume) + Sync + 'static) -> Self {
        let mut case = Self::new(name, Works, shape);
        case.outcomes[1] = Refused("unmount what is mounted below it".into());
        case.outcomes[2] = seen;
        case
    }

    fn outcome(&self, tier: &Tier) -> &Outcome {
        &self.outcomes[WAYS.iter().position(|known| known.name == tier.name).unwrap()]
    }
}

/// An odd file at some path of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thing {
    AbsoluteLink,
    LinkUp,
    LinkLoop,
    File,
    Fifo,
    Socket,
    Device,
    Nothing,
    Unreadable,
}

use Thing::{AbsoluteLink, Device, Fifo, File, LinkLoop, LinkUp, Nothing, Socket, Unreadable};
use testbed::*;

const THINGS: [Thing; 9] = [AbsoluteLink, LinkUp, LinkLoop, File, Fifo, Socket, Device, Nothing, Unreadable];

/// Paths in the image where the jail mounts, reads or writes.
const PLACES: [&str; 7] = ["proc", "sys", "dev", "dev/pts", "etc", "run", "tmp"];

impl Thing {
    /// The file's type, as messages name it.
    fn in_words(self) -> &'static str {
        match self {
            AbsoluteLink | LinkUp | LinkLoop => "a symbolic link",
            File => "a regular file",
            Fifo => "a fifo",
            Socket => "a socket",
            Device => "a character device",
            Nothing | Unreadable => "a directory",
        }
    }

    /// Creates it at `place` in the image. Links lead to the same path of the decoy host, where they would arrive
    /// outside a jail.
    fn put(self, volume: &Volume, place: &str) {
        let path = volume.image_root.join(place);
        std::fs::create_dir_all(&path).unwrap();
        if self == Unreadable {
            return std::fs::set_permissions(&path, Permissions::from_mode(0o000)).unwrap();
        }
        std::fs::remove_dir_all(&path).unwrap();
        let up = Path::new(place).components().map(|_| "..").collect::<PathBuf>();
        match self {
            AbsoluteLink => {
                let target = host(volume).join(place);
                assert!(target.exists());
                symlink(target, &path).unwrap();
            }
            LinkUp => {
                let target = up.join("../host").join(place);
                assert!(path.parent().unwrap().join(&target).exists());
                symlink(target, &path).unwrap();
            }
            LinkLoop => symlink(path.file_name().unwrap(), &path).unwrap(),
            File => std::fs::write(&path, "odd\n").unwrap(),
            Fifo => fifo(&path),
            Socket => drop(UnixListener::bind(short(&path)).unwrap()),
            Device => mknod(&path, SFlag::S_IFCHR, Permission::S_IRUSR, makedev(1, 7)).unwrap(),
            Nothing | Unreadable => {}
        }
    }
}

fn fifo(path: &Path) {
    nix::unistd::mkfifo(path, Permission::S_IRUSR | Permission::S_IWUSR).unwrap();
}

/// A path short enough for a socket's address.
fn short(path: &Path) -> PathBuf {
    let directory = std::fs::File::open(path.parent().unwrap()).unwrap();
    // Kept open until this process ends, because the path refers to it by number.
    let number = std::os::fd::IntoRawFd::into_raw_fd(directory);
    Path::new("/proc/self/fd").join(number.to_string()).join(path.file_name().unwrap())
}

/// The decoy host, which a link out of the image would reach.
pub fn host(volume: &Volume) -> PathBuf {
    volume.dir.path().join("host")
}

pub fn make_host(volume: &Volume) {
    for directory in ["proc", "sys", "dev/pts", "etc", "run", "tmp", "root", "bin"] {
        std::fs::create_dir_all(host(volume).join(directory)).unwrap();
    }
    for (file, text) in [
        ("etc/passwd", "root:x:0:0:the host's:/root:/bin/sh\n"),
        ("etc/group", "root:x:0:\n"),
        ("etc/resolv.conf", "nameserver 192.0.2.99\n"),
        ("tmp/complete", ""),
        ("run/file", "the host's\n"),
    ] {
        std::fs::write(host(volume).join(file), text).unwrap();
    }
}

fn odd_places() -> Vec<Case> {
    let mut cases = Vec::new();
    for place in PLACES {
        for thing in THINGS {
            let shape = move |volume: &Volume| thing.put(volume, place);
            let mounted = match (place, thing) {
                ("etc", Nothing) => NO_USER,
                (_, Nothing | Unreadable) | ("dev/pts", _) => Works,
                ("proc" | "sys" | "dev" | "run", _) => {
                    Refused(format!("cannot mount on /{place} of the image: it is {}", thing.in_words()))
                }
                ("etc", LinkLoop) => Refused("cannot look at /etc/resolv.conf of the image".into()),
                ("etc", _) => NO_USER,
                // It leads to a path that the image lacks.
                ("tmp", AbsoluteLink | LinkUp) => Works,
                _ => Refused("cannot remove /tmp/complete of the image".into()),
            };
            let unmounted = match (place, thing) {
                ("dev" | "dev/pts", Nothing) | ("dev", Unreadable) => Works,
                ("dev" | "dev/pts", _) => NoTransfer("cannot open its /dev/null"),
                ("etc" | "tmp", _) => mounted.clone(),
                _ => Works,
            };
            cases.push(Case {
                name: format!("{thing:?} at /{place}"),
                shape: Box::new(shape),
                outcomes: [mounted.clone(), mounted, unmounted],
            });
        }
    }
    cases
}

fn odd_image_roots() -> Vec<Case> {
    let elsewhere = |volume: &Volume| {
        let elsewhere = volume.dir.path().join("elsewhere");
        std::fs::rename(&volume.image_root, &elsewhere).unwrap();
        elsewhere
    };
    let refused = |kind: &str| Refused(format!("image-root: it is {kind}"));
    vec![
        Case::new("the image root is a link to the host", refused("a symbolic link"), move |volume| {
            elsewhere(volume);
            symlink(host(volume), &volume.image_root).unwrap();
        }),
        Case::new("the image root is a link to an image", refused("a symbolic link"), move |volume| {
            elsewhere(volume);
            symlink("../elsewhere", &volume.image_root).unwrap();
        }),
        Case::new("the image root is a fifo", refused("a fifo"), move |volume| {
            elsewhere(volume);
            fifo(&volume.image_root);
        }),
        Case::new("names with newlines, and in no encoding", Works, |volume| {
            for directory in ["", "tmp", "etc", "root"] {
                for name in [&b"a\nb"[..], b"\xff\xfe", b"-rf *", b"\x1b[2J", b" "] {
                    std::fs::write(volume.image_root.join(directory).join(OsStr::from_bytes(name)), "").unwrap();
                }
            }
        }),
        Case::bound("forty levels of binds in each other, and one of the host", Works, |volume| {
            let mut place = volume.image_root.join("bound");
            std::fs::create_dir(&place).unwrap();
            let source = volume.dir.path().join("source");
            std::fs::create_dir_all(source.join("bound")).unwrap();
            for _ in 0..40 {
                bind(&source, &place);
                place.push("bound");
            }
            bind(&host(volume), &place);
        }),
        Case::bound("binds where the jail mounts", NoTransfer("cannot open its /dev/null"), |volume| {
            for name in ["proc", "sys", "dev", "run"] {
                let place = volume.image_root.join(name);
                std::fs::create_dir(&place).unwrap();
                bind(&host(volume).join(name), &place);
                bind(&host(volume).join(name), &place);
            }
        }),
        Case::new("a /tmp that leads elsewhere in the image", Works, |volume| {
            AbsoluteLink.put(volume, "tmp");
            let target = host(volume).join("tmp");
            std::fs::create_dir_all(volume.image_root.join(target.strip_prefix("/").unwrap())).unwrap();
        }),
        Case::new("a mark that is a directory", Refused("cannot remove /tmp/complete of the image".into()), |volume| {
            std::fs::create_dir_all(volume.image_root.join("tmp/complete/full")).unwrap();
        }),
        Case::new("an /etc that lies where the jail mounts", Works, |volume| {
            std::fs::create_dir(volume.image_root.join("run")).unwrap();
            std::fs::rename(volume.image_root.join("etc"), volume.image_root.join("run/etc")).unwrap();
            std::fs::write(volume.image_root.join("run/etc/resolv.conf"), "nameserver 192.0.2.1\n").unwrap();
            symlink("run/etc", volume.image_root.join("etc")).unwrap();
        }),
        Case::new("fifos at /proc/self/mountinfo and maps", Works, |volume| {
            std::fs::create_dir_all(volume.image_root.join("proc/self")).unwrap();
            for name in ["mountinfo", "maps", "exe", "stat"] {
                fifo(&volume.image_root.join("proc/self").join(name));
            }
        }),
        Case::new("no shell at all", Answered("cannot start /bin/sh in this image"), |volume| {
            std::fs::remove_dir_all(volume.image_root.join("bin")).unwrap();
        }),
    ]
}

fn bind(source: &Path, place: &Path) {
    succeed(Command::new("mount").arg("--bind").args([source, place]));
}

/// Accounts with any content of passwd and group.
fn odd_accounts() -> Vec<Case> {
    const LARGE: usize = 100 << 20;
    let shell = |name: &str, shell: Vec<u8>| {
        Case::new(format!("a shell that is {name}"), Works, move |volume| {
            let text = [b"root:x:0:0:root:/root:", &shell[..], b"\n"].concat();
            std::fs::write(volume.image_root.join("etc/passwd"), text).unwrap();
            std::fs::create_dir(volume.image_root.join("bin/directory")).unwrap();
            std::fs::write(volume.image_root.join("bin/empty"), "").unwrap();
            std::fs::write(volume.image_root.join("bin/script"), "#!/bin/nowhere\n").unwrap();
            for name in ["empty", "script"] {
                std::fs::set_permissions(volume.image_root.join("bin").join(name), Permissions::from_mode(0o755))
                    .unwrap();
            }
            symlink("../../host/bin/sh", volume.image_root.join("bin/out")).unwrap();
            symlink("loop", volume.image_root.join("bin/loop")).unwrap();
            fifo(&volume.image_root.join("bin/fifo"));
        })
    };
    let file = |name: &str, outcome: Outcome, file: &'static str, text: fn() -> Vec<u8>| {
        Case::new(name, outcome, move |volume| {
            std::fs::write(volume.image_root.join("etc").join(file), text()).unwrap()
        })
    };
    let instead = |file: &'static str, outcome: Outcome, thing: Thing| {
        Case::new(format!("{thing:?} at /etc/{file}"), outcome, move |volume| {
            let _ = std::fs::remove_file(volume.image_root.join("etc").join(file));
            thing.put(volume, &format!("etc/{file}"));
        })
    };
    let home = |home: &'static str| {
        Case::new(format!("a home that is {home}"), Works, move |volume| {
            let text = format!("root:x:0:0:root:{home}:/bin/sh\n");
            std::fs::write(volume.image_root.join("etc/passwd"), text).unwrap();
            symlink(host(volume).join("root"), volume.image_root.join("root/out")).unwrap();
            fifo(&volume.image_root.join("root/fifo"));
        })
    };
    let mut cases = vec![
        file("a passwd without root", NO_USER, "passwd", || b"bin:x:1:1::/bin:/bin/false\n".into()),
        file("a passwd of NULs", NO_USER, "passwd", || vec![0; 1 << 20]),
        file("a NUL in root's line", NO_USER, "passwd", || b"ro\0t:x:0:0::/root:/bin/\0sh\n".into()),
        file("a passwd of 100 MB", NO_USER, "passwd", || {
            b"bin:x:1:1::/bin:/bin/false\n".iter().copied().cycle().take(LARGE).collect()
        }),
        file("a passwd of one endless line", NO_USER, "passwd", || vec![b'x'; LARGE]),
        file("an endless shell", Works, "passwd", || endless(b"root:x:0:0::/root:/bin/", b'x')),
        file("an endless home", Works, "passwd", || endless(b"root:x:0:0::/", b'x')),
        file("a passwd of colons", Works, "passwd", || endless(b"root:x:0:0::/root:/bin/sh", b':')),
        file("a group of colons", Works, "group", || endless(b"", b':')),
        file("root in a hundred thousand groups", Works, "group", || b"g:x:7:root\n".repeat(100_000)),
        file("a group of one endless line", Works, "group", || endless(b"g:x:7:", b',')),
        shell("nowhere", b"/bin/nowhere".into()),
        shell("a directory", b"/bin/directory".into()),
        shell("relative", b"sh".into()),
        shell("in no encoding", b"/bin/\xff\xfe".into()),
        shell("a fifo", b"/bin/fifo".into()),
        shell("empty", b"/bin/empty".into()),
        shell("a script without interpreter", b"/bin/script".into()),
        shell("a link out of the image", b"/bin/out".into()),
        shell("a link loop", b"/bin/loop".into()),
        shell("longer than a path", [b"/bin/", &b"x/".repeat(4000)[..]].concat()),
        shell("out of the image", b"/../../../../bin/sh".into()),
    ];
    cases.extend(["/../../../../root", "/root/out", "/root/fifo", "/root/\x1b]0;x\x07"].map(home));
    cases.extend([AbsoluteLink, LinkLoop, Device, Nothing, Unreadable].map(|thing| instead("passwd", NO_USER, thing)));
    cases.extend([LinkUp, Socket].map(|thing| instead("group", Works, thing)));
    cases
}

/// A file of the largest size that is still read.
fn endless(begin: &[u8], byte: u8) -> Vec<u8> {
    let mut text = begin.to_vec();
    text.resize((4 << 20) - 1, byte);
    text
}

/// Files that programs read at their start, which the helper must ignore.
fn odd_files() -> Vec<Case> {
    let file = |path: &'static str, text: &'static str| {
        Case::new(format!("/{path} of the image's own"), Works, move |volume| {
            let path = volume.image_root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        })
    };
    let fifo_at = |path: &'static str, outcome: Outcome| {
        Case::new(format!("a fifo at /{path}"), outcome, move |volume| {
            let path = volume.image_root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let _ = std::fs::remove_file(&path);
            fifo(&path);
        })
    };
    let mut cases = vec![
        file("etc/nsswitch.conf", "passwd: evil files\ngroup: evil\nhosts: evil\n"),
        file("etc/ld.so.preload", "/lib/evil.so\n"),
        file("lib/x86_64-linux-gnu/libnss_evil.so.2", "not a library"),
        file("etc/ld.so.cache", "ld.so-1.7.0 evil"),
    ];
    for path in ["etc/motd", "etc/resolv.conf", "root/.hushlogin", "etc/hosts", "etc/profile", "usr/share/zoneinfo/UTC"]
    {
        cases.push(fifo_at(path, Works));
    }
    for (path, message) in [
        ("etc/ld.so.preload", "/etc/ld.so.preload is a fifo"),
        ("etc/nsswitch.conf", "/etc/nsswitch.conf is a fifo"),
        ("etc/passwd", "/etc/passwd is a fifo"),
        ("etc/group", "/etc/group is a fifo"),
        ("etc/localtime", "/etc/localtime is a fifo"),
    ] {
        cases.push(fifo_at(path, NoTransfer(message)));
    }
    cases
}

/// Runs `command`, and ends it if it hangs.
fn limited(command: &Command, input: &[u8]) -> Output {
    let mut limited = Command::new("timeout");
    limited.arg(LIMIT.as_secs().to_string()).arg(command.get_program()).args(command.get_args());
    limited.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    feed(&mut limited, input)
}

/// Time and mounts of an environment on a harmless image.
struct Usual {
    time: Duration,
    mounts: Vec<PathBuf>,
}

/// Time allowed beyond that of a harmless image.
const EXTRA: Duration = Duration::from_secs(5);

impl Usual {
    /// Time limit for an environment. If the harmless one took more than half a second, the machine is busy, and the
    /// extra time grows too.
    fn limit(&self) -> Duration {
        self.time + EXTRA.mul_f64(f64::max(1.0, self.time.as_secs_f64() / 0.5))
    }
}

/// Runs an environment on an image from `ready` to its end. Returns the time it took, and the mounts of its jail.
fn live(case: &Case, tier: &Tier) -> Usual {
    let volume = Volume::in_memory(Image::Busybox);
    make_host(&volume);
    let host_before = digest(&host(&volume));
    let mounts_before = new_mounts(&[]);
    (case.shape)(&volume);
    let image_is_directory = volume.image_root.symlink_metadata().unwrap().is_dir();
    let image = |volume: &Volume| if image_is_directory { digest(&volume.image_root) } else { Digest::new() };
    let nothing_below = new_mounts(&mounts_before).is_empty();
    let image_before = if nothing_below { image(&volume) } else { Digest::new() };

    let mounts_shaped = new_mounts(&[]);
    let began = Instant::now();
    let mut environment = volume.start_with(Mode::Jailed, &[("IMS_JAIL_TIER", tier.name)]);
    environment.touch("ready");
    wait_until("the environment to open, or to be refused", || {
        environment.status = environment.entrypoint.try_wait().unwrap();
        environment.status.is_some() || environment.signal("sshd_listening").exists()
    });
    let mut mounts = Vec::new();
    match case.outcome(tier) {
        Refused(message) => {
            assert_eq!(environment.end(), 1);
            let log = environment.log_text();
            assert!(log.contains(message), "missing from the log: {message}");
            assert!(environment.signal("failed").exists() && environment.signal("exiting").exists());
        }
        answer => {
            assert_eq!(environment.status, None, "it was refused");
            let master = environment.master();
            let command = limited(master.ssh().arg(format!("echo begun; {}; echo ended", tier.look())), b"");
            let said = text(&command.stdout);
            match answer {
                Answered(message) => assert!(text(&command.stderr).contains(message), "{command:?}"),
                _ => assert!(said.starts_with("begun\n") && said.ends_with("ended\n"), "{command:?}"),
            }
            mounts = mount_points(said.as_bytes());
            let transfer = limited(&master.sftp(), b"ls /\n");
            match answer {
                NoTransfer(message) => {
                    assert!(!transfer.status.success(), "{transfer:?}");
                    wait_until(&format!("'{message}' in the log"), || environment.log_text().contains(message));
                }
                _ => assert!(text(&transfer.stdout).contains("etc"), "{transfer:?}"),
            }
            drop(master);
            assert_eq!(new_mounts(&mounts_shaped), [], "mounted outside the jail");
            assert_eq!(environment.complete(), 0);
            assert!(environment.signal("exiting").exists());
        }
    }
    let time = began.elapsed();
    assert_eq!(new_mounts(&mounts_before), [], "mounted at the end");
    let mut changed = differences(&host_before, &digest(&host(&environment)));
    if nothing_below {
        changed.extend(differences(&image_before, &image(&environment)));
    }
    if matches!(case.outcome(tier), Refused(_)) {
        // The mark of a failed job in the image, for whoever packs it.
        changed.retain(|change| !change.starts_with("/tmp: ") && !change.starts_with("/tmp/failed: nothing -> "));
    }
    assert!(changed.is_empty(), "{changed:#?}");
    Usual { time, mounts }
}

/// Number of environments at once. Each mostly waits.
const AT_ONCE: usize = 4;

#[test]
fn hostile_image_works_or_is_refused_and_changes_nothing_outside() {
    let only = std::env::var("IMS_SSHD_HOSTILE").unwrap_or_default();
    for tier in &WAYS {
        let mut cases: Vec<_> = odd_places().into_iter().chain(odd_image_roots()).collect();
        if tier.name == WAYS[0].name {
            // Accounts and files are treated alike in all tiers.
            cases.extend(odd_accounts().into_iter().chain(odd_files()));
        }
        println!("{}: {} images", tier.name, cases.len());
        assert!(cases.len() >= 40);
        cases.retain(|case| case.name.contains(&only));
        let harmless = Case::new("nothing odd", Works, |_| {});
        let mut usual = Usual { time: Duration::ZERO, mounts: Vec::new() };
        std::thread::scope(|scope| {
            // The number of calls at once is that of the test, so that the times compare.
            let lives = [(); AT_ONCE].map(|()| scope.spawn(|| live(&harmless, tier)));
            for life in lives {
                let life = life.join().unwrap();
                usual = Usual { time: usual.time.max(life.time), mounts: life.mounts };
            }
        });
        let began = Instant::now();
        let failed = run_each(
            &cases,
            AT_ONCE,
            |case| format!("{}: {}", tier.name, case.name),
            |case| {
                let life = live(case, tier);
                println!("{:?} {}", life.time, case.name);
                assert!(life.time < usual.limit(), "it took {:?}, a harmless image {:?}", life.time, usual.time);
                if tier.mounts && matches!(case.outcome(tier), Works | NoTransfer(_)) {
                    assert_eq!(life.mounts, usual.mounts, "the jail's mounts differ from those of a harmless image");
                }
            },
        );
        println!("{}: {:.1} s, a usual life {:?}", tier.name, began.elapsed().as_secs_f64(), usual.time);
        assert!(failed.is_empty(), "{} of {} images: {failed:#?}", failed.len(), cases.len());
    }
}

/// Enters `case` without SSH, with limited memory. Returns the mounts of the jail.
fn enter(case: &Case, tier: &Tier) -> Vec<PathBuf> {
    const MEMORY: usize = 32 << 20;
    let volume = Volume::in_memory(Image::Busybox);
    make_host(&volume);
    (case.shape)(&volume);
    let before = [&host(&volume), &volume.image_root].map(|root| digest(root));
    let mounts_before = new_mounts(&[]);
    let mut command = Command::new("prlimit");
    command.arg(format!("--data={MEMORY}")).args([&*IMS_SSHD, "enter"]).arg(&volume.image_root);
    command.args(["--", "sh", "-c", tier.look()]).env("IMS_JAIL_TIER", tier.name);
    let output = limited(&command, b"");
    match case.outcome(tier) {
        // 'enter' checks no marks.
        Refused(message) if !message.contains("/tmp/complete") => {
            assert_eq!(output.status.code(), Some(1), "{output:?}");
            assert!(text(&output.stderr).contains(message), "{output:?}");
        }
        _ => assert!(output.status.success(), "{output:?}"),
    }
    assert_eq!(new_mounts(&mounts_before), []);
    let after = [&host(&volume), &volume.image_root].map(|root| digest(root));
    let changed: Vec<_> = before.iter().zip(&after).flat_map(|(before, after)| differences(before, after)).collect();
    assert!(changed.is_empty(), "{changed:#?}");
    mount_points(&output.stdout)
}

#[test]
fn hostile_image_is_entered_or_refused_with_limited_memory() {
    for tier in &WAYS {
        let usual = enter(&Case::new("nothing odd", Works, |_| {}), tier);
        let cases: Vec<_> = odd_places().into_iter().chain(odd_accounts()).collect();
        let failed = run_each(
            &cases,
            AT_ONCE,
            |case| format!("{}: {}", tier.name, case.name),
            |case| {
                let mounts = enter(case, tier);
                assert!(mounts.is_empty() || mounts == usual, "{mounts:?}");
            },
        );
        assert!(failed.is_empty(), "{} of {} images: {failed:#?}", failed.len(), cases.len());
    }
}
