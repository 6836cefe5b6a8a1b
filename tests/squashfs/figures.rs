//! Times and sizes beside mksquashfs's. They are no tests: `cargo test --release --test squashfs figures -- --ignored
//! --nocapture --test-threads 1`. `SQUASHFS_FIGURES` is the tree, the cache's Debian by default.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ims_sshd::squashfs::gather::{Choice, gather};
use ims_sshd::squashfs::{Compression, Content, Inventory, Options, Reader};
use ims_sshd::sys::tree::Tree;
use testbed::succeed;

use crate::snapshot::{inventory, pack, pack_from};
use crate::trees::Random;

fn tree(dir: &Path) -> PathBuf {
    let original =
        std::env::var_os("SQUASHFS_FIGURES").map_or_else(|| testbed::cache_directory().join("debian"), PathBuf::from);
    let copy = dir.join("tree");
    succeed(Command::new("cp").arg("-a").arg(&original).arg(&copy));
    // Into the page cache.
    succeed(Command::new("tar").arg("-cf").arg("/dev/null").arg("--exclude=./dev").arg("-C").arg(&copy).arg("."));
    copy
}

/// Time on the clock, and of processors, which says more on a machine that does other things too.
#[derive(Clone, Copy)]
struct Took {
    clock: f64,
    processors: f64,
}

/// Seconds that this process and those that it has waited for have used.
fn processor_time() -> f64 {
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeValLike;
    let whose = [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN];
    let used = whose.map(|who| getrusage(who).map(|usage| [usage.user_time(), usage.system_time()]).unwrap());
    used.as_flattened()
        .iter()
        .map(|time| Duration::from_micros(time.num_microseconds().cast_unsigned()).as_secs_f64())
        .sum()
}

fn took(run: impl FnOnce()) -> Took {
    let (start, used) = (Instant::now(), processor_time());
    run();
    Took { clock: start.elapsed().as_secs_f64(), processors: processor_time() - used }
}

/// The medians of so many.
fn timed(times: usize, mut run: impl FnMut()) -> Took {
    let all: Vec<_> = (0..times).map(|_| took(&mut run)).collect();
    let median = |of: fn(&Took) -> f64| {
        let mut values: Vec<_> = all.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Took { clock: median(|one| one.clock), processors: median(|one| one.processors) }
}

fn show(what: &str, one: Took, other: Took) {
    println!(
        "{what}: {:.3} s, of processors {:.3} s: {:.4} x, {:.4} x",
        one.clock,
        one.processors,
        one.clock / other.clock,
        one.processors / other.processors
    );
}

fn mksquashfs(root: &Path, image: &Path, compression: &str) {
    let _ = fs::remove_file(image);
    let mut command = Command::new("mksquashfs");
    command.arg(root).arg(image).args(["-comp", compression, "-noappend", "-quiet", "-no-progress", "-xattrs"]);
    succeed(&mut command);
}

fn length(image: &Path) -> f64 {
    u32::try_from(fs::metadata(image).unwrap().len() / 1024).unwrap().into()
}

#[test]
#[ignore = "takes minutes, and asserts nothing"]
fn from_scratch() {
    let dir = testbed::directory();
    let root = tree(dir.path());
    let (theirs, ours) = (dir.path().join("theirs"), dir.path().join("ours"));
    for compression in compressions() {
        let theirs_took = timed(times(), || mksquashfs(&root, &theirs, compression.name()));
        let ours_took = timed(times(), || _ = pack(&root, &ours, &Options::new(compression)));
        show(&format!("{} mksquashfs", compression.name()), theirs_took, theirs_took);
        show(&format!("{} ours", compression.name()), ours_took, theirs_took);
        println!("{:.0} KiB to {:.0}: {:.4}", length(&theirs), length(&ours), length(&ours) / length(&theirs));
    }
}

/// `SQUASHFS_COMPRESSION`, or all but none.
fn compressions() -> Vec<Compression> {
    match std::env::var("SQUASHFS_COMPRESSION") {
        Ok(name) => vec![Compression::named(&name).unwrap()],
        Err(_) => vec![Compression::Gzip, Compression::Zstd, Compression::Xz],
    }
}

/// Number of runs, of which the median is taken.
fn times() -> usize {
    std::env::var("SQUASHFS_RUNS").map_or(3, |number| number.parse().unwrap())
}

#[test]
#[ignore = "takes minutes, and asserts nothing"]
fn taken_over() {
    let dir = testbed::directory();
    let root = tree(dir.path());
    let (source, image, copy) = (dir.path().join("source"), dir.path().join("image"), dir.path().join("copy"));
    for compression in compressions() {
        let whole = took(|| mksquashfs(&root, &source, compression.name()));
        let copied = timed(5, || _ = succeed(Command::new("cp").arg("--reflink=never").arg(&source).arg(&copy)));
        let name = compression.name();
        show(&format!("{name} mksquashfs"), whole, whole);
        show(&format!("{name} cp"), copied, whole);
        let (_, unchanged, options) = inventory(&source, &root);
        let read = timed(5, || _ = Inventory::new(Reader::open(File::open(&source).unwrap()).unwrap()).unwrap());
        show(&format!("{name} inventory, against cp"), read, copied);
        let tree = Tree::open(&root).unwrap();
        let gathered = timed(5, || _ = gather(&tree, &mut |_, _| Choice::Pack(Content::Read)).unwrap());
        show(&format!("{name} gather, against cp"), gathered, copied);
        let mut summary = None;
        let nothing = timed(5, || {
            let source = Inventory::new(Reader::open(File::open(&source).unwrap()).unwrap()).unwrap();
            summary = Some(pack_from(&root, Some((&source, &unchanged)), &image, &options));
        });
        println!("{summary:?} size {:.4}", length(&image) / length(&source));
        show(&format!("{name} nothing changed, against cp"), nothing, copied);
        let mut unchanged = unchanged;
        let mut inodes: Vec<_> = unchanged.keys().copied().collect();
        inodes.sort_unstable();
        let mut random = Random(1);
        for _ in 0..inodes.len() / 100 {
            unchanged.remove(&inodes[random.index(inodes.len())]);
        }
        let few = timed(times(), || {
            let source = Inventory::new(Reader::open(File::open(&source).unwrap()).unwrap()).unwrap();
            summary = Some(pack_from(&root, Some((&source, &unchanged)), &image, &options));
        });
        println!("{summary:?} size {:.4}", length(&image) / length(&source));
        show(&format!("{name} 1 % changed, against mksquashfs"), few, whole);
    }
}

#[test]
#[ignore = "takes a minute, and asserts nothing"]
fn memory_of_many_files() {
    let dir = testbed::directory();
    let (root, image) = (dir.path().join("tree"), dir.path().join("image"));
    let mut random = Random(1);
    for number in 0..200_000_u32 {
        let directory = root.join(format!("directory{}", number / 100));
        if number % 100 == 0 {
            fs::create_dir_all(&directory).unwrap();
        }
        let length = random.index(2000);
        fs::write(directory.join(format!("a file with the number {number}")), random.bytes(length)).unwrap();
    }
    let peak = || {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        status.lines().find(|line| line.starts_with("VmHWM")).unwrap().to_owned()
    };
    println!("before {}", peak());
    for compression in compressions() {
        let options = Options { processors: 64, ..Options::new(compression) };
        pack(&root, &image, &options);
        println!("{compression:?} from scratch {}", peak());
        File::options()
            .write(true)
            .open("/proc/self/clear_refs")
            .map(|file| {
                use std::io::Write;
                (&file).write_all(b"5").unwrap();
            })
            .unwrap();
        let (source, unchanged, options) = inventory(&image, &root);
        pack_from(&root, Some((&source, &unchanged)), &dir.path().join("again"), &options);
        println!("{compression:?} taken over {}", peak());
    }
}
