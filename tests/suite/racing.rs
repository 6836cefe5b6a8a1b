//! A racing image: while its jail is made, somebody renames what the jail mounts on, and the image root itself, as fast as he can. A jail
//! is made of the image or not at all, and nothing is ever mounted or created beside it.

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

/// Names that change places, and back at once.
type Swap = (PathBuf, PathBuf);

/// Somebody who swaps names as long as this lives, and leaves all as it was.
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
                    // What is mounted on cannot be renamed for a moment.
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

/// An image with all mount points, and beside each the same name of the host, as a link that leads there by an absolute or by a relative path.
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
    for folder in ["dev", "proc", "sys", "run"] {
        std::fs::create_dir_all(image_root.join(folder)).unwrap();
    }
    std::fs::write(image_root.join("etc/resolv.conf"), "nameserver 192.0.2.1\n").unwrap();
}

/// Tells of everything that is created, removed or changed in a tree, however soon it is undone.
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

/// How many jails are made under a race, of 200 in all.
fn rounds(share: usize) -> usize {
    std::env::var("IMS_SSHD_SOAK").map_or(200, |n| n.parse().expect("IMS_SSHD_SOAK is a number")) * share / 200
}

/// What is mounted inside, which can be seen as soon as /proc is in its place again.
const LOOK: &str = "until cat /proc/self/mountinfo; do true; done";

fn enter(volume: &Volume, tier: Tier, command: &str) -> Output {
    let mut enter = Command::new(&IMS_SSHD);
    enter.arg("enter").arg(&volume.image_root).args(["--", "sh", "-c", command]).env("IMS_JAIL_TIER", tier.name());
    enter.output().unwrap()
}

#[test]
fn a_mount_by_path_goes_astray_in_this_race() {
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
fn mount_points_that_are_swapped_for_links_get_no_mount_outside() {
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
                    assert_eq!(mounts.len(), usual, "what is not inside is outside: {mounts:?}");
                }
                _ => {
                    refused += 1;
                    assert!(NAMED.iter().any(|name| said.contains(name)), "{output:?}");
                    assert!(refused < wanted * 20, "too few jails come to be for the race to mean anything");
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
    // The racer's own times, and what it has exchanged: whoever moves the lent file decides which one stays.
    changed.retain(|change| !["/: ", "/etc: ", "/etc/resolv."].iter().any(|own| change.starts_with(own)));
    assert!(changed.is_empty(), "{changed:#?}");
}

/// What a refusal names.
const NAMED: [&str; 6] = ["/dev", "/proc", "/sys", "/run", "/etc/resolv.conf", "cannot start sh in this image"];

#[test]
fn an_image_root_that_is_swapped_for_another_folder_is_never_half_of_a_jail() {
    let (volume, _) = image();
    let container = std::fs::read_to_string("/etc/resolv.conf").unwrap();
    // It needs nothing mounted for its name servers, and the other one does.
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
                assert_eq!(text(&output.stdout), container, "one image root was prepared, and another one entered");
            } else {
                assert!(text(&output.stderr).contains(&volume.image_root.display().to_string()), "{output:?}");
            }
        }
    });
    println!("{made} jails of {rounds} made, during {} swaps", state.swapped.load(Ordering::Relaxed));
    assert!(made >= rounds / 20, "too few jails came to be for the race to mean anything");
}

/// One environment, while its image root is swapped for a link to another folder. Returns whether it was opened.
fn open_in_a_race() -> bool {
    let (volume, _) = image();
    // Beside the image root: a link to it does not even lead out of the parent.
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
        wait_until("the environment to open, or to be refused", || {
            environment.status = environment.entrypoint.try_wait().unwrap();
            environment.status.is_some() || environment.signal("sshd_listening").exists()
        });
        // It may be closing by now, as it looks whether the image root is still there.
        if let Ok(record) = Record::read(&environment.state_directory().join("jail"))
            && let Ok(root) = std::fs::metadata(format!("/proc/{}/root/", record.init.pid))
        {
            opened = true;
            assert_eq!(root.ino(), image_root, "the jail's root is another folder");
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
fn an_image_root_that_is_swapped_for_a_link_is_never_left() {
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
    assert!(opened >= rounds.len() / 20, "too few jails came to be for the race to mean anything");
}
