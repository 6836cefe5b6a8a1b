//! Packing of a large image, compared with mksquashfs and with a copy of the packed file.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use testbed::{IMS_SSHD, Mounted, cache, is_regular, succeed, walk};

use super::quiet;
use crate::enclosure::CONTROL_GROUP;
use crate::measure::{in_turns, ratios};
use crate::{Bound, Report, Unit};

/// Copies of the cache's Debian that make an image of a gigabyte.
const COPIES: usize = 5;

/// One of so many files is changed.
const CHANGED: usize = 100;

/// Files of the image whose packing is watched for its memory.
const MANY: usize = 200_000;

/// Memory limit of a control group in bytes.
const MEMORY: u64 = 256 << 20;

/// Compresses a tree as `package` is told to.
const MKSQUASHFS: &str =
    "rm -f $0 && exec mksquashfs $1 $0 -noappend -quiet -no-progress -xattrs -comp $2 -processors $(nproc)";

/// A squashfs of a gigabyte of files in `dir`; the root is a Debian.
pub fn large_image(dir: &Path) -> PathBuf {
    let (tree, squashfs) = (dir.join("large-tree"), dir.join("large-source.sqsh"));
    succeed(Command::new("cp").arg("-aT").arg(cache().join("debian")).arg(&tree));
    for file in ["boot/vmlinuz", "boot/initrd"] {
        fs::write(tree.join(file), "").unwrap();
    }
    for number in 1..COPIES {
        let copy = tree.join(format!("opt/{number}"));
        succeed(Command::new("cp").arg("-aT").arg(cache().join("debian")).arg(&copy));
        // Equal files would be stored once.
        for file in walk(&copy).into_iter().filter(|path| is_regular(path)) {
            let content = fs::read(&file).unwrap();
            fs::write(&file, [format!("{number}\n").as_bytes(), &content].concat()).unwrap();
        }
    }
    mksquashfs(&tree, &squashfs, "gzip").status().unwrap();
    fs::remove_dir_all(tree).unwrap();
    squashfs
}

fn mksquashfs(tree: &Path, squashfs: &Path, compression: &str) -> Command {
    let mut command = quiet("sh");
    command.args(["-c", MKSQUASHFS]).args([squashfs, tree]).arg(compression);
    command
}

/// An image root that `prepare` has opened, with its mounts.
struct Opened {
    parent: PathBuf,
    _mounts: Vec<Mounted>,
}

impl Opened {
    fn new(dir: &Path, squashfs: &Path, open: &str) -> Self {
        let parent = dir.join(open);
        succeed(Command::new(&IMS_SSHD).args(["prepare", "--open", open]).args([&parent, squashfs]));
        let places = ["image-root", "overlay/lower"].map(|place| parent.join(place));
        let mounts = if open == "overlay" { places.map(Mounted).into() } else { Vec::new() };
        Self { parent, _mounts: mounts }
    }

    fn root(&self) -> PathBuf {
        self.parent.join("image-root")
    }

    fn package(&self, arguments: &[&str]) -> Command {
        let mut command = quiet(&IMS_SSHD);
        command.arg("package").args(arguments).arg(&self.parent);
        command
    }

    /// Changes one of [`CHANGED`] files.
    fn change(&self) {
        let files = walk(&self.root()).into_iter().filter(|path| is_regular(path));
        for file in files.step_by(CHANGED) {
            File::options().append(true).open(&file).unwrap().write_all(b"changed\n").unwrap();
        }
    }
}

fn length(file: &Path) -> f64 {
    fs::metadata(file).unwrap().len() as f64
}

pub fn packing(dir: &Path, squashfs: &Path, rounds: usize, report: &mut Report) {
    let [overlay, unpacked] = ["overlay", "unpack"].map(|open| Opened::new(dir, squashfs, open));
    let (copy, packed) = (dir.join("copy.sqsh"), unpacked.parent.join("image.sqsh"));
    let mut plain = quiet("cp");
    plain.arg("--reflink=never").args([squashfs, &copy]);
    let mut synced = quiet("sh");
    synced.args(["-c", "cp --reflink=never $0 $1 && sync $1"]).args([squashfs, &copy]);
    let [over, above, plain, synced] =
        in_turns(rounds.max(4), [&mut overlay.package(&[]), &mut unpacked.package(&[]), &mut plain, &mut synced]);
    for (name, ours) in [("overlay", &over), ("unpacked", &above)] {
        let limit = Bound::Limit(3.0);
        let name = format!("package, nothing changed, {name}");
        report.add(&format!("{name}, against cp of the squashfs"), Unit::Times, ratios(ours, &plain), limit);
        let what = format!("{name}, against cp and sync, which package does too");
        report.add(&what, Unit::Times, ratios(ours, &synced), Bound::Information);
        report.add(&name, Unit::Milliseconds, ours.clone(), Bound::Information);
    }
    overlay.change();
    unpacked.change();
    let theirs = dir.join("theirs.sqsh");
    let (scratch, mut bare) = (["--from-scratch"], mksquashfs(&unpacked.root(), &theirs, "gzip"));
    let [over, above, ours, bare] = in_turns(
        rounds.div_ceil(2),
        [&mut overlay.package(&[]), &mut unpacked.package(&[]), &mut unpacked.package(&scratch), &mut bare],
    );
    for (name, ours) in [("overlay", over), ("unpacked", above)] {
        let what = format!("package, 1 % of the files changed, {name}, against mksquashfs");
        report.add(&what, Unit::Times, ratios(&ours, &bare), Bound::Limit(0.05));
    }
    report.add("package from scratch, gzip, against mksquashfs", Unit::Times, ratios(&ours, &bare), Bound::Limit(0.7));
    report.add("mksquashfs, gzip", Unit::Milliseconds, bare, Bound::Information);
    succeed(&mut unpacked.package(&scratch));
    let size = |report: &mut Report, compression: &str| {
        let sizes = vec![length(&packed) / length(&theirs)];
        let what = format!("size of the squashfs from scratch, {compression}, against mksquashfs");
        report.add(&what, Unit::Times, sizes, Bound::Limit(1.01));
    };
    size(report, "gzip");
    for compression in ["zstd", "xz"] {
        let mut ours = unpacked.package(&["--from-scratch", "--compression", compression]);
        let [ours, bare] = in_turns(1, [&mut ours, &mut mksquashfs(&unpacked.root(), &theirs, compression)]);
        let what = format!("package from scratch, {compression}, against mksquashfs");
        report.add(&what, Unit::Times, ratios(&ours, &bare), Bound::Limit(1.0));
        size(report, compression);
    }
}

/// A control group with a memory limit, of either version.
fn control_group() -> PathBuf {
    let (first, all) = (Path::new("/sys/fs/cgroup/memory"), Path::new("/sys/fs/cgroup"));
    let is_first = first.join("memory.limit_in_bytes").exists();
    let hierarchy = if is_first { first } else { all };
    let group = hierarchy.join(CONTROL_GROUP.trim_start_matches('/')).join("packing");
    if !is_first {
        fs::create_dir_all(group.parent().unwrap()).unwrap();
        for above in [all, group.parent().unwrap()] {
            fs::write(above.join("cgroup.subtree_control"), "+memory").unwrap();
        }
    }
    fs::create_dir_all(&group).unwrap();
    let limit = if is_first { "memory.limit_in_bytes" } else { "memory.max" };
    fs::write(group.join(limit), MEMORY.to_string()).unwrap();
    group
}

pub fn memory(dir: &Path, report: &mut Report) {
    let (tree, archive) = (dir.join("many"), dir.join("many.sqsh"));
    fs::create_dir_all(tree.join("etc")).unwrap();
    fs::write(tree.join("etc/os-release"), "ID=debian\n").unwrap();
    let noise = File::open("/dev/urandom").unwrap();
    for number in 0..MANY {
        let directory = tree.join(format!("directory-{}", number / 100));
        if number % 100 == 0 {
            fs::create_dir_all(&directory).unwrap();
        }
        let mut content = vec![0; number % 2000];
        noise.read_exact_at(&mut content, 0).unwrap();
        fs::write(directory.join(format!("a file with the number {number}")), content).unwrap();
    }
    let mut package = quiet("sh");
    package.args(["-c", "echo $$ > $0/cgroup.procs; exec \"$@\""]).arg(control_group()).arg(&*IMS_SSHD);
    let mut child = package.args(["package", "--archive"]).args([&archive, &tree]).current_dir(dir).spawn().unwrap();
    let mut peaks = std::collections::BTreeMap::new();
    let status = loop {
        for pid in children(child.id()).into_iter().chain([child.id()]) {
            peaks.extend(peak(pid).map(|peak| (pid, peak)));
        }
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    assert!(status.success(), "package within {MEMORY} bytes: {status}");
    assert!(fs::metadata(&archive).unwrap().size() > 0);
    let what = "package of 200,000 files in a control group of 256 MiB: peaks of both processes";
    report.add(what, Unit::Mebibytes, vec![peaks.values().sum::<f64>() / 1024.0], Bound::Limit(256.0));
    fs::remove_dir_all(tree).unwrap();
}

/// Children of all threads of a process.
fn children(pid: u32) -> Vec<u32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    let of_thread =
        |thread: std::io::Result<fs::DirEntry>| fs::read_to_string(thread.ok()?.path().join("children")).ok();
    let words: Vec<_> = threads.filter_map(of_thread).collect();
    words.concat().split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// Largest size of a process in memory so far, in KiB.
fn peak(pid: u32) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?.trim().strip_suffix(" kB")?.parse().ok()
}
