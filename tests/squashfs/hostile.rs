//! Damaged and hostile sources: no panic, and bounded time, memory and output, whatever the bytes are.
//!
//! The images are written without compression of their metadata. A changed byte is therefore a changed inode, listing
//! or table, and not a block that cannot be decompressed; images that are compressed are there for that.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use ims_sshd::squashfs::{Attributes, Compression, Content, Fault, Inventory, NodeId, Object, Options, Plan, Reader};
use rustix::fs::MemfdFlags;

use crate::snapshot::{options, pack};
use crate::sources::mksquashfs;
use crate::trees::{Drawn, Random};

/// A file in memory with these bytes.
fn file(bytes: &[u8]) -> File {
    let file = File::from(rustix::fs::memfd_create("image", MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(bytes, 0).unwrap();
    file
}

/// Small images: of ours and of mksquashfs, with and without compression.
fn images() -> Vec<Vec<u8>> {
    let dir = testbed::directory();
    let (root, image) = (dir.path().join("tree"), dir.path().join("image"));
    let mut made = Vec::new();
    for seed in 0..3 {
        let root = root.join(seed.to_string());
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("large"), Random(seed).bytes(9000)).unwrap();
        fs::write(root.join("a/holes"), vec![0; 20_000]).unwrap();
        let mut tree = Drawn::new(&root, seed, 4096);
        (0..10).for_each(|_| tree.add());
        pack(&root, &image, &options(Compression::None, 4096));
        made.push(fs::read(&image).unwrap());
        for options in
            [&["-noI", "-noX", "-noId", "-b", "4096"][..], &["-b", "4096", "-comp", "zstd"], &["-comp", "xz"]]
        {
            mksquashfs(&root, &image, options);
            made.push(fs::read(&image).unwrap());
        }
    }
    made.iter_mut().for_each(trim);
    // Writing mutants over and over takes the longest.
    made.retain(|image| image.len() < 200_000);
    made
}

/// Removes the padding.
fn trim(image: &mut Vec<u8>) {
    let length = u64::from_le_bytes(image[40..48].try_into().unwrap());
    image.truncate(usize::try_from(length).unwrap());
}

/// Changes an image in one to four places.
fn mutate(image: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(4) {
        // The tables at the end are small beside the data, and hold most of what can be wrong.
        let tables = usize::try_from(u64::from_le_bytes(image[64..72].try_into().unwrap())).unwrap_or(0);
        let from = if random.one_in(4) || tables >= image.len() { 0 } else { tables };
        let from = if random.one_in(6) { 0..96.min(image.len()) } else { from..image.len() };
        let at = from.start + random.index(from.len());
        let width = [1, 2, 4, 8][random.index(4)].min(image.len() - at);
        let interesting = [0, 1, 2, 3, 7, 8, 14, 255, 256, 4095, 4096, 8191, 8192, 0x7fff, 0x8000, 0xffff, 1 << 24];
        let value = match random.below(6) {
            0 => random.next(),
            1 => u64::MAX - random.below(3),
            2 => image.len() as u64 - random.below(image.len() as u64),
            _ => interesting[random.index(interesting.len())],
        };
        match random.below(8) {
            0 => image[at] ^= 1 << random.below(8),
            1 => image[at] = image[at].wrapping_add(1),
            2 => image[at] = image[at].wrapping_sub(1),
            3..6 => image[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]),
            6 => {
                // A structure in the place of another one: loops and overlaps.
                let length = (1 + random.index(40)).min(image.len() - at);
                let source = random.index(image.len() - length + 1);
                image.copy_within(source..source + length, at);
            }
            _ if random.one_in(10) => {
                let length = 96 + random.index(image.len());
                image.truncate(length);
            }
            _ => image[at..at + width].fill(0xff),
        }
        if image.len() < 97 {
            return;
        }
    }
}

/// Does everything with an image that can be done with a source. Returns how far that went.
fn use_as_source(bytes: &[u8]) -> Result<(), Fault> {
    let reader = Reader::open(file(bytes))?;
    let mut plan = Plan::new(&Attributes::default()).unwrap();
    let mut number = 0;
    let mut budget = 4_u64 << 20;
    reader.walk(true, &mut |entry| {
        number += 1;
        let name = number.to_string();
        if entry.kind() == 0o100_000 {
            let object = Object::File { size: entry.size(), content: Content::Taken(entry.number()) };
            plan.add(NodeId::ROOT, OsStr::from_bytes(name.as_bytes()), &Attributes::default(), &object).unwrap();
            // Damaged content is an error of its own; the walk goes on.
            let _ = reader.content(entry, &mut |part| {
                budget = budget.saturating_sub(part.len() as u64);
                if budget == 0 { Err(Fault::TooLarge("content".into())) } else { Ok(()) }
            });
        }
        Ok(())
    })?;
    let options = Options { processors: 1, ..reader.options() };
    let inventory = Inventory::new(reader)?;
    let output = file(&[]);
    let mut open = |_: &std::path::Path| Err(std::io::ErrorKind::NotFound.into());
    let written = ims_sshd::squashfs::write(&plan, Some(&inventory), &options, &mut open, &output, &|_| {});
    if let Ok(summary) = written {
        let most = 2 * bytes.len() as u64 + 100_000;
        assert!(summary.length < most, "an image of {} bytes became one of {}", bytes.len(), summary.length);
        // The files that were taken over can be read again.
        let again = Reader::open(output).unwrap();
        again.walk(true, &mut |_| Ok(())).unwrap();
    }
    Ok(())
}

#[test]
fn damaged_sources_are_refused_or_used_but_never_harm() {
    let mutations: u64 = std::env::var("SQUASHFS_MUTATIONS").map_or(2000, |number| number.parse().unwrap());
    let first: u64 = std::env::var("SQUASHFS_SEED").map_or(0, |number| number.parse().unwrap());
    let images = images();
    let threads = if mutations > 10_000 { 2 } else { 1 };
    let count = |thread: u64| {
        let (mut used, mut longest) = (0_u64, Duration::ZERO);
        for seed in (first..first + mutations).filter(|seed| seed % threads == thread) {
            let mut random = Random(seed);
            let mut image = images[random.index(images.len())].clone();
            mutate(&mut image, &mut random);
            let start = Instant::now();
            let result = std::panic::catch_unwind(|| use_as_source(&image));
            let took = start.elapsed();
            assert!(result.is_ok(), "seed {seed} panicked");
            // On a machine that does other things for seconds, too.
            assert!(took < Duration::from_mins(1), "seed {seed} took {took:?}");
            used += u64::from(result.is_ok_and(|result| result.is_ok()));
            longest = longest.max(took);
        }
        (used, longest)
    };
    let counted: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|thread| scope.spawn(move || count(thread))).collect();
        running.into_iter().map(|one| one.join().unwrap()).collect()
    });
    let used: u64 = counted.iter().map(|(used, _)| used).sum();
    let longest = counted.iter().map(|(_, longest)| *longest).max().unwrap();
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    println!("{mutations} mutants, {used} of them could be used; the longest took {longest:?}; {peak}");
    assert!(used > 0 && used < mutations);
}
