//! Rename races: while a jail is made, another thread renames its mount points and the image root itself as fast as it
//! can. The jail is made of the image or not at all, and nothing is ever mounted or created outside it.

use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::Scope;

use ims_sshd::jail::record::Record;
use ims_sshd::jail::tier::Tier;
use ims_sshd::sys::mounts::mount_points;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use rustix::fs::{CWD, RenameFlags};
use testbed::*;

use crate::hostile::{host, make_host};

/// Two names that are exchanged and exchanged back.
type Swap = (PathBuf, PathBuf);

/// A thread that exchanges names until this value is dropped, and leaves them as they were.
struct Racer<'a> {
    state: &'a State,
}

#[derive(Default)]
struct State {
    stop: AtomicBool,
    ended: AtomicBool,
    swapped: AtomicUsize,
}

impl<'a> Racer<'a> {
    fn start<'scope>(scope: &'scope Scope<'scope, '_>, state: &'a State, swaps: Vec<Swap>) -> Self
    where
        'a: 'scope,
    {
        state.stop.store(false, Ordering::Relaxed);
        state.ended.store(false, Ordering::Relaxed);
        scope.spawn(move || {
            while !state.stop.load(Ordering::Relaxed) {
                for (a, b) in &swaps {
                    // The kernel refuses to rename a mount point while something is mounted on it.
                    let swap = || rustix::fs::renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).is_ok();
                    if swap() {
                        while !swap() {}
                        state.swapped.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
            state.ended.store(true, Ordering::Release);
        });
        Self { state }
    }
}

impl Drop for Racer<'_> {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
        while !self.state.ended.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
    }
}

/// Creates an image with all mount points and, beside each, an absolute or relative link to the same name on the host.
fn image() -> (Volume, Vec<Swap>) {
    let volume = Volume::in_memory(Image::Busybox);
    make_host(&volume);
    furnish(&volume.image_root);
    let mut swaps = Vec::new();
    for (place, absolute) in
        [("dev", true), ("proc", false), ("sys", true), ("run", false), ("tmp", true), ("etc", false)]
    {
        let name = volume.image_root.join(place);
        let link = name.with_extension("link");
        let target = if absolute { host(&volume).join(place) } else { Path::new("../../host").join(place) };
        symlink(target, &link).unwrap();
        assert!(link.metadata().unwrap().is_dir());
        swaps.push((name, link));
    }
    let file = volume.image_root.join("etc/resolv.conf");
    let link = volume.image_root.join("etc/resolv.link");
    symlink(host(&volume).join("etc/resolv.conf"), &link).unwrap();
    swaps.push((file, link));
    (volume, swaps)
}

fn furnish(image_root: &Path) {
    for name in ["dev", "proc", "sys", "run"] {
        std::fs::create_dir_all(image_root.join(name)).unwrap();
    }
    std::fs::write(image_root.join("etc/resolv.conf"), "nameserver 192.0.2.1\n").unwrap();
}

/// Records everything that is created, removed or changed in a tree, even if it is undone at once.
struct Witness {
    events: Inotify,
}

impl Witness {
    fn of(tree: &Path) -> Self {
        let events = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
        for path in walk(tree).into_iter().filter(|path| path.is_dir()) {
            let all = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVE;
            events.add_watch(&path, all | AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_ATTRIB).unwrap();
        }
        Self { events }
    }

    fn saw(&self) -> Vec<String> {
        let events = self.events.read_events().unwrap_or_default();
        events.iter().map(|event| format!("{:?} {:?}", event.mask, event.name)).collect()
    }
}

/// Number of jails to make in a race: `share` of 200, or of IMS_SSHD_SOAK.
fn rounds(share: usize) -> usize {
    std::env::var("IMS_SSHD_SOAK").map_or(200, |n| n.parse().expect("IMS_SSHD_SOAK is a number")) * share / 200
}

/// Shell command that prints the mounts of the jail once /proc has its name again.
const LOOK: &str = "until cat /proc/self/mountinfo; do true; done";

fn enter(volume: &Volume, tier: Tier, command: &str) -> Output {
    let mut enter = Command::new(&IMS_SSHD);
    enter.arg("enter").arg(&volume.image_root).args(["--", "sh", "-c", command]).env("IMS_JAIL_TIER", tier.name());
    enter.output().unwrap()
}

#[test]
fn race_misdirects_a_mount_by_path() {
    let (volume, swaps) = image();
    let before = new_mounts(&[]);
    let state = State::default();
    std::thread::scope(|scope| {
        let _racer = Racer::start(scope, &state, swaps);
        wait_until("a mount on the host", || {
            for name in ["dev", "proc", "sys", "run"] {
                let _ = rustix::mount::mount_bind(volume.dir.path(), volume.image_root.join(name));
            }
            let made = new_mounts(&before);
            for (_, mount) in &made {
                rustix::mount::unmount(mount, rustix::mount::UnmountFlags::DETACH).unwrap();
            }
            made.iter().any(|(_, mount)| mount.starts_with(host(&volume)))
        });
    });
    println!("after {} swaps", state.swapped.load(Ordering::Relaxed));
}

#[test]
fn mount_points_exchanged_with_links_cause_no_mount_outside() {
    for (tier, share) in [(Tier::Namespace, 80), (Tier::User, 40)] {
        make_jails_in_a_race(tier, rounds(share));
    }
}

fn make_jails_in_a_race(tier: Tier, wanted: usize) {
    let (volume, swaps) = image();
    let mounts = |output: &Output| mount_points(&output.stdout);
    let usual = mounts(&enter(&volume, tier, LOOK)).len();
    let before = [digest(&host(&volume)), digest(&volume.image_root)];
    let (witness, mounts_before) = (Witness::of(&host(&volume)), new_mounts(&[]));
    let state = State::default();
    let (mut made, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        let _racer = Racer::start(scope, &state, swaps);
        while made < wanted {
            let output = enter(&volume, tier, LOOK);
            let said = text(&output.stderr);
            match output.status.code() {
                Some(0) => {
                    made += 1;
                    let mounts = mounts(&output);
                    assert_eq!(mounts.len(), usual, "a mount is missing inside, so it is outside: {mounts:?}");
                }
                _ => {
                    refused += 1;
                    assert!(NAMED.iter().any(|name| said.contains(name)), "{output:?}");
                    assert!(refused < wanted * 20, "too few jails were made for the race to mean anything");
                }
            }
        }
    });
    println!(
        "{}: {made} jails made, {refused} refused, during {} swaps",
        tier.name(),
        state.swapped.load(Ordering::Relaxed)
    );
    assert_eq!(witness.saw(), [""; 0]);
    assert_eq!(new_mounts(&mounts_before), []);
    let after = [digest(&host(&volume)), digest(&volume.image_root)];
    let mut changed: Vec<_> = before.iter().zip(&after).flat_map(|(a, b)| differences(a, b)).collect();
    // Ignore what the race itself changes: times, and resolv.conf, which stays where it was exchanged to.
    changed.retain(|change| !["/: ", "/etc: ", "/etc/resolv."].iter().any(|own| change.starts_with(own)));
    assert!(changed.is_empty(), "{changed:#?}");
}

/// Words of which every refusal contains one.
const NAMED: [&str; 6] = ["/dev", "/proc", "/sys", "/run", "/etc/resolv.conf", "cannot start sh in this image"];

#[test]
fn image_root_exchanged_with_another_directory_never_becomes_half_of_a_jail() {
    let (volume, _) = image();
    let container = std::fs::read_to_string("/etc/resolv.conf").unwrap();
    // The first image root has the container's resolv.conf already; the other one needs it replaced.
    std::fs::write(volume.image_root.join("etc/resolv.conf"), &container).unwrap();
    let other = volume.parent.join("other");
    succeed(Command::new("cp").arg("-aT").args([&volume.image_root, &other]));
    std::fs::write(other.join("etc/resolv.conf"), "nameserver 192.0.2.1\n").unwrap();
    let (state, rounds) = (State::default(), rounds(80));
    let mut made = 0;
    std::thread::scope(|scope| {
        let _racer = Racer::start(scope, &state, vec![(volume.image_root.clone(), other)]);
        for _ in 0..rounds {
            let output = enter(&volume, Tier::Namespace, "cat /etc/resolv.conf");
            if output.status.success() {
                made += 1;
                assert_eq!(text(&output.stdout), container, "one image root was prepared and another one entered");
            } else {
                assert!(text(&output.stderr).contains(&volume.image_root.display().to_string()), "{output:?}");
            }
        }
    });
    println!("{made} jails of {rounds} made, during {} swaps", state.swapped.load(Ordering::Relaxed));
    assert!(made >= rounds / 20, "too few jails were made for the race to mean anything");
}

/// Starts one environment while its image root is exchanged with a link to another directory. Returns whether it
/// opened.
fn open_in_a_race() -> bool {
    let (volume, _) = image();
    // The twin lies beside the image root, so that a link to it does not lead out of the parent.
    let twin = volume.parent.join("twin");
    succeed(Command::new("cp").arg("-aT").args([&volume.image_root, &twin]));
    let mut swaps = Vec::new();
    for (name, target) in [("to-twin", "twin"), ("to-host", "../host")] {
        let link = volume.parent.join(name);
        symlink(target, &link).unwrap();
        assert!(link.metadata().unwrap().is_dir());
        swaps.push((volume.image_root.clone(), link));
    }
    let image_root = std::fs::metadata(&volume.image_root).unwrap().ino();
    let witnesses = [Witness::of(&host(&volume)), Witness::of(&twin)];
    let state = State::default();
    let mut opened = false;
    std::thread::scope(|scope| {
        let mut environment = volume.start(Mode::Jailed);
        let _racer = Racer::start(scope, &state, swaps);
        environment.touch("ready");
        wait_until("the environment to open or to end", || {
            environment.status = environment.entrypoint.try_wait().unwrap();
            environment.status.is_some() || environment.signal("sshd_listening").exists()
        });
        // The environment may be closing again, since it checks whether the image root is still there.
        if let Ok(record) = Record::read(&environment.state_directory().join("jail"))
            && let Ok(root) = std::fs::metadata(format!("/proc/{}/root/", record.init.pid))
        {
            opened = true;
            assert_eq!(root.ino(), image_root, "the jail's root is another directory");
        }
        environment.touch("complete");
        let code = environment.end();
        assert!(environment.signal("exiting").exists());
        let log = environment.log_text();
        assert!(code == 0 || log.contains("the image root"), "{log}");
        assert_eq!(witnesses.each_ref().map(Witness::saw), [const { Vec::<String>::new() }; 2]);
    });
    opened
}

#[test]
fn image_root_exchanged_with_a_link_never_leads_the_jail_elsewhere() {
    let rounds = vec![(); rounds(30)];
    let opened = AtomicUsize::new(0);
    let failed = run_each(
        &rounds,
        2,
        |()| "a race".to_owned(),
        |()| {
            opened.fetch_add(usize::from(open_in_a_race()), Ordering::Relaxed);
        },
    );
    let opened = opened.into_inner();
    println!("{opened} jails of {} made", rounds.len());
    assert!(failed.is_empty(), "{} of {}", failed.len(), rounds.len());
    assert!(opened >= rounds.len() / 20, "too few jails were made for the race to mean anything");
}
