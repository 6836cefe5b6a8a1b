//! Times and sizes beside mksquashfs's. They are no tests: `cargo test --release --test squashfs figures -- --ignored
//! --nocapture --test-threads 1`. `SQUASHFS_FIGURES` is the tree, the cache's Debian by default.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ims_sshd::squashfs::{Compression, Options};
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

/// The median of three.
fn timed(mut run: impl FnMut()) -> Duration {
    let mut times = [(); 3].map(|()| {
        let start = Instant::now();
        run();
        start.elapsed()
    });
    times.sort();
    times[1]
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
    for compression in [Compression::Gzip, Compression::Zstd, Compression::Xz] {
        let their_time = timed(|| mksquashfs(&root, &theirs, compression.name()));
        let our_time = timed(|| _ = pack(&root, &ours, &Options::new(compression)));
        println!(
            "{:5} mksquashfs {:6.2} s {:8} KiB, ours {:6.2} s {:8} KiB: time {:.3} size {:.4}",
            compression.name(),
            their_time.as_secs_f64(),
            length(&theirs),
            our_time.as_secs_f64(),
            length(&ours),
            our_time.as_secs_f64() / their_time.as_secs_f64(),
            length(&ours) / length(&theirs)
        );
    }
}

#[test]
#[ignore = "takes minutes, and asserts nothing"]
fn taken_over() {
    let dir = testbed::directory();
    let root = tree(dir.path());
    let (source, image, copy) = (dir.path().join("source"), dir.path().join("image"), dir.path().join("copy"));
    for compression in [Compression::Gzip, Compression::Zstd, Compression::Xz] {
        let start = Instant::now();
        mksquashfs(&root, &source, compression.name());
        let whole = start.elapsed();
        let copied = timed(|| drop(succeed(Command::new("cp").arg("--reflink=never").arg(&source).arg(&copy))));
        let (_, unchanged, options) = inventory(&source, &root);
        let mut summary = None;
        let mut all = || {
            let (source, _, _) = inventory(&source, &root);
            summary = Some(pack_from(&root, Some((&source, &unchanged)), &image, &options));
        };
        let nothing = timed(&mut all);
        println!("{summary:?}");
        println!(
            "{:5} mksquashfs {:.2} s; cp {:.3} s; nothing changed {:.3} s: {:.2} x cp, {:.4} x mksquashfs, size {:.4}",
            compression.name(),
            whole.as_secs_f64(),
            copied.as_secs_f64(),
            nothing.as_secs_f64(),
            nothing.as_secs_f64() / copied.as_secs_f64(),
            nothing.as_secs_f64() / whole.as_secs_f64(),
            length(&image) / length(&source)
        );
        let mut unchanged = unchanged;
        let mut inodes: Vec<_> = unchanged.keys().copied().collect();
        inodes.sort_unstable();
        let mut random = Random(1);
        for _ in 0..inodes.len() / 100 {
            unchanged.remove(&inodes[random.index(inodes.len())]);
        }
        let mut summary = None;
        let few = timed(|| {
            let (source, _, _) = inventory(&source, &root);
            summary = Some(pack_from(&root, Some((&source, &unchanged)), &image, &options));
        });
        println!("{summary:?}");
        println!(
            "{:5} 1 % changed {:.3} s: {:.4} x mksquashfs, size {:.4}",
            compression.name(),
            few.as_secs_f64(),
            few.as_secs_f64() / whole.as_secs_f64(),
            length(&image) / length(&source)
        );
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
    for compression in [Compression::Gzip, Compression::Zstd, Compression::Xz] {
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
