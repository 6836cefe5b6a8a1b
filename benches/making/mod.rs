//! Making the jail, in containers in which more and more is mounted.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use ims_sshd::jail::link::{Link, Message};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use rustix::mount::{MountFlags, mount};

use crate::support::{IMS_JAIL_SHELL, Image, Volume};
use crate::{Bound, Report, Unit, ratios, time, title};

const MOUNTS: [usize; 3] = [0, 100, 1000];

/// From the start of `ims-jail-shell` to a jail that can be entered.
pub fn making(rounds: usize, report: &mut Report) {
    title(&format!("Making a jail ({rounds} rounds)"));
    let volume = Volume::new(Image::Debian);
    let first = own_mounts();
    let containers = MOUNTS.map(|mounts| {
        setns(&first, CloneFlags::CLONE_NEWNS).unwrap();
        Container::with(mounts, &volume)
    });
    let mut samples = MOUNTS.map(|_| Vec::new());
    for _ in 0..rounds {
        for (container, samples) in containers.iter().zip(&mut samples) {
            setns(&container.mounts, CloneFlags::CLONE_NEWNS).unwrap();
            let mut made = None;
            samples.push(time(|| made = Some(make(&volume.image_root, Some(&container.bare)))));
            end(made.unwrap().0);
        }
    }
    setns(&first, CloneFlags::CLONE_NEWNS).unwrap();
    let ratio = ratios(&samples[2], &samples[0]);
    for (mounts, samples) in MOUNTS.iter().zip(samples) {
        let limit = Bound::Limit { limit: 6.0, aim: Some(3.0) };
        report.add(&format!("a jail, {mounts} mounts in the container"), Unit::Milliseconds, samples, limit);
    }
    let limit = Bound::Limit { limit: 1.2, aim: None };
    report.add("with 1000 mounts / with none", Unit::Times, ratio, limit);
}

/// A mount namespace, and the one that a jail on trial has left there.
struct Container {
    mounts: OwnedFd,
    bare: OwnedFd,
}

impl Container {
    fn with(mounts: usize, volume: &Volume) -> Self {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let folder = |place: String| {
            let path = volume.dir.path().join(place);
            std::fs::create_dir_all(&path).unwrap();
            path
        };
        for number in 0..mounts {
            mount("tmpfs", folder(format!("mounts/{number}")), "tmpfs", MountFlags::empty(), None).unwrap();
        }
        let points = ["dev", "proc", "run", "sys"].map(|name| folder(format!("trial/{name}")));
        let (init, _, mut doors) = make(&volume.dir.path().join("trial"), None);
        end(init);
        for point in points {
            std::fs::remove_dir(point).unwrap();
        }
        Self { mounts: own_mounts(), bare: doors.swap_remove(0) }
    }
}

fn own_mounts() -> OwnedFd {
    std::fs::File::open("/proc/thread-self/ns/mnt").unwrap().into()
}

fn make(image_root: &Path, bare: Option<&OwnedFd>) -> (Pid, Link, Vec<OwnedFd>) {
    let (ours, theirs) = Link::pair().unwrap();
    let mut command = Command::new(IMS_JAIL_SHELL);
    command.args(["init", "--tier", "namespace", "--root"]).arg(image_root).current_dir(image_root).env_clear();
    if let Some(bare) = bare {
        command.arg("--bare").arg(format!("/proc/{}/fd/{}", std::process::id(), bare.as_raw_fd()));
    }
    assert!(command.stdin(Stdio::from(theirs.into_fd())).status().unwrap().success());
    let (mut init, mut doors) = (None, None);
    loop {
        match ours.receive().unwrap().unwrap() {
            (Message::Started(number), _) => init = Some(Pid::from_raw(number)),
            (Message::Ready, namespaces) => doors = Some(namespaces),
            other => panic!("{other:?}"),
        }
        if let (Some(init), Some(doors)) = (init, doors.take_if(|_| init.is_some())) {
            return (init, ours, doors);
        }
    }
}

fn end(init: Pid) {
    kill(init, Signal::SIGKILL).unwrap();
    waitpid(init, None).unwrap();
}
