//! Time to create a jail as the container's mounts grow in number, compared with tools that create one per program.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use ims_sshd::jail::arguments::Arguments;
use ims_sshd::jail::link::{Link, Message};
use ims_sshd::jail::plan::Plan;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use testbed::{IMS_JAIL_SHELL, Image, Volume, succeed};

use crate::environments::installed;
use crate::measure::{order, succeeding, time};
use crate::peers;
use crate::report::LineChart;
use crate::report::statistics::median;
use crate::{Bound, Report, Unit, ratios};

/// Numbers of additional mounts in the container.
const MOUNTS: [usize; 3] = [0, 100, 1000];

const NAMES: [&str; 3] = ["ims-jail-shell init until `ready`", "unshare, chroot: `/bin/true`", "bwrap: `/bin/true`"];

pub fn making(runs: usize, report: &mut Report) {
    let volume = Volume::new(Image::Debian);
    let helper = installed(Path::new(&IMS_JAIL_SHELL), volume.dir.path());
    let containers = MOUNTS.map(|count| Container::with(count, &helper, volume.dir.path()));
    let mut samples = [const { [const { Vec::new() }; MOUNTS.len()] }; NAMES.len()];
    for round in 0..=runs * 5 {
        for at in order(round, MOUNTS.len()) {
            let Container { mounts, bare } = &containers[at];
            setns(mounts, CloneFlags::CLONE_NEWNS).unwrap();
            let bare = format!("/proc/{}/fd/{}", std::process::id(), bare.as_raw_fd());
            let plan = Plan {
                image_root: volume.image_root.clone(),
                programs: ims_sshd::sshd::sftp_server::files().unwrap(),
                bare: Some(bare.into()),
                ..Plan::default()
            };
            let took = [
                make(init(&helper, plan)).0,
                succeeding(&mut peers::unshare(&volume.image_root)),
                succeeding(&mut peers::bwrap(&volume.image_root)),
            ];
            // The first round is a warm-up.
            if round > 0 {
                samples.iter_mut().zip(took).for_each(|(samples, took)| samples[at].push(took));
            }
        }
    }
    for (name, samples) in NAMES.iter().zip(&samples) {
        for (count, samples) in MOUNTS.iter().zip(samples) {
            let bound = if *name == NAMES[0] { Bound::Limit(3.0) } else { Bound::Information };
            report.add(&format!("{name}, {count} mounts"), Unit::Milliseconds, samples.clone(), bound);
        }
    }
    for (at, (name, samples)) in NAMES.iter().zip(&samples).enumerate() {
        let bound = if at == 0 { Bound::Limit(1.2) } else { Bound::Information };
        let of_mounts = ratios(&samples[2], &samples[0]);
        report.add(&format!("{name}, {} / {} mounts", MOUNTS[2], MOUNTS[0]), Unit::Times, of_mounts, bound);
    }
    report
        .note("The values of unshare and bwrap include a run of `/bin/true`, without which they do not create a jail.");
    let line = |samples: &[Vec<f64>; 3]| {
        MOUNTS.iter().zip(samples).map(|(count, samples)| (*count as f64, median(samples))).collect()
    };
    report.lines(LineChart {
        file: "making",
        title: "Making a jail in a container of many mounts",
        x: "mounts in the container",
        y: "milliseconds, median (logarithmic)",
        of_a_colour: 1,
        lines: NAMES.iter().zip(&samples).map(|(name, samples)| (name.replace('`', ""), line(samples))).collect(),
    });
}

/// A mount namespace with additional mounts, and the empty one that the supervisor keeps from trying out a jail.
struct Container {
    mounts: File,
    bare: OwnedFd,
}

impl Container {
    /// Enters a new mount namespace.
    fn with(count: usize, helper: &str, directory: &Path) -> Self {
        let script = "for n in $(seq $1); do mkdir -p $0/$n && mount -t tmpfs -o size=4k tmpfs $0/$n || exit; done";
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let places = directory.join(format!("mounts-{count}"));
        succeed(Command::new("sh").args(["-c", script]).arg(places).arg(count.to_string()));
        let trial = directory.join(format!("trial-{count}"));
        let points = ["dev", "proc", "run", "sys"].map(|name| trial.join(name));
        for point in &points {
            std::fs::create_dir_all(point).unwrap();
        }
        let (_, mut jail) = make(init(helper, Plan { image_root: trial, ..Plan::default() }));
        // Removing mount points removes the mounts.
        for point in points {
            std::fs::remove_dir(point).unwrap();
        }
        Self { mounts: File::open("/proc/thread-self/ns/mnt").unwrap(), bare: jail.swap_remove(0) }
    }
}

fn init(helper: &str, plan: Plan) -> Command {
    let mut init = Command::new(helper);
    init.current_dir(&plan.image_root).args(Arguments::Init(plan).to_words()).env_clear();
    init
}

/// Creates a jail as the supervisor does, and ends it. Returns the time until it can be entered, and the descriptors to
/// enter it by.
fn make(mut init: Command) -> (f64, Vec<OwnedFd>) {
    let (ours, theirs) = Link::pair().unwrap();
    init.stdin(Stdio::from(theirs.into_fd()));
    let (mut number, mut jail, mut serves) = (None, None, false);
    let took = time(|| {
        assert!(init.status().unwrap().success());
        while number.is_none() || !serves {
            match ours.receive().unwrap() {
                Some((Message::Started(pid), _)) => number = Some(Pid::from_raw(pid)),
                Some((Message::Made, namespaces)) => jail = Some(namespaces),
                Some((Message::Ready, _)) => serves = true,
                other => panic!("{other:?}"),
            }
        }
    });
    kill(number.unwrap(), Signal::SIGKILL).unwrap();
    waitpid(number.unwrap(), None).unwrap();
    (took, jail.unwrap())
}
