//! Damaged and hostile sources: no panic, and bounded time, memory and output, whatever the bytes are.
//!
//! The images are written without compression of their metadata. A changed byte is therefore a changed inode, listing
//! or table, and not a block that cannot be decompressed; images that are compressed are there for that.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;

use ims_sshd::squashfs::{Attributes, Compression, Content, Fault, Inventory, NodeId, Object, Options, Plan, Reader};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike};
use rustix::fs::MemfdFlags;

use crate::snapshot::{options, pack};
use crate::sources::mksquashfs;
use crate::trees::{Drawn, Random};

/// Entries of the tree in an image. The smaller an image, the more of its bytes decide what is read.
const ENTRIES: u64 = 12;

/// Bytes of content that are read of one image.
const CONTENT: u64 = 1 << 20;

/// One of so many images that can be walked through is also taken over into another image, which starts threads.
const TAKEN_OVER: u64 = 8;

/// Longest use of an image, in milliseconds of this thread's processor time; a build without optimization takes ten
/// times as long as another. The time of day would also count what other programs do.
const LONGEST: i64 = 5000;

/// A file in memory that holds one image after another: making a file for each takes longer than reading it.
struct Memory(File);

impl Memory {
    fn new() -> Self {
        Self(File::from(rustix::fs::memfd_create("image", MemfdFlags::CLOEXEC).unwrap()))
    }

    fn holding(&self, bytes: &[u8]) -> File {
        self.0.set_len(bytes.len() as u64).unwrap();
        self.0.write_all_at(bytes, 0).unwrap();
        self.0.try_clone().unwrap()
    }
}

/// Options of mksquashfs for the images: most without compression of metadata.
const KINDS: [&[&str]; 8] = [
    &["-noI", "-noX", "-noId"],
    &["-noI", "-noX", "-noId", "-comp", "zstd"],
    &["-noI", "-noX", "-noId", "-comp", "xz"],
    &["-noI", "-noX", "-noId", "-always-use-fragments"],
    &["-noI", "-noX", "-noId", "-no-fragments", "-no-exports"],
    &["-comp", "gzip"],
    &["-comp", "zstd"],
    &["-comp", "xz"],
];

/// Small images: of ours and of mksquashfs, with and without compression.
fn images() -> Vec<Vec<u8>> {
    let dir = testbed::directory();
    let (root, image) = (dir.path().join("tree"), dir.path().join("image"));
    let mut made = Vec::new();
    for seed in 0..4 {
        let root = root.join(seed.to_string());
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("large"), Random(seed).bytes(5000)).unwrap();
        fs::write(root.join("a/holes"), vec![0; 20_000]).unwrap();
        Drawn::with_entries(&root, seed, 4096, ENTRIES);
        for compression in Compression::ALL {
            pack(&root, &image, &options(compression, 4096));
            made.push(fs::read(&image).unwrap());
        }
        for kind in KINDS {
            mksquashfs(&root, &image, &[kind, &["-b", "4096"]].concat());
            made.push(fs::read(&image).unwrap());
        }
    }
    made.iter_mut().for_each(trim);
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

/// How far the use of an image went.
#[derive(PartialEq, Eq)]
enum Used {
    /// All of it was read.
    Read,
    /// Its files were taken over, too.
    TakenOver,
}

/// Reads all of an image, as of a source, and takes its files over if `is_taken_over`.
fn use_as_source(file: File, length: usize, is_taken_over: bool, output: &Memory) -> Result<Used, Fault> {
    let reader = Reader::open(file)?;
    let mut plan = Plan::new(&Attributes::default()).unwrap();
    let mut number = 0;
    let mut budget = CONTENT;
    reader.walk(true, &mut |entry| {
        number += 1;
        if entry.kind() == 0o100_000 {
            if is_taken_over {
                let name = number.to_string();
                let object = Object::File { size: entry.size(), content: Content::Taken(entry.number()) };
                plan.add(NodeId::ROOT, OsStr::from_bytes(name.as_bytes()), &Attributes::default(), &object).unwrap();
            }
            // Damaged content is an error of its own; the walk goes on.
            let _ = reader.content(entry, &mut |part| {
                budget = budget.saturating_sub(part.len() as u64);
                if budget == 0 { Err(Fault::TooLarge("content".into())) } else { Ok(()) }
            });
        }
        Ok(())
    })?;
    let options = Options { processors: 1, ..reader.options() };
    let mut inventory = Inventory::new(reader)?;
    // Without lengths, the writer measures what it needs, and finds the same damage.
    if let Ok(lengths) = inventory.measure(2) {
        inventory.set_lengths(lengths);
    }
    if !is_taken_over {
        return Ok(Used::Read);
    }
    let output = output.holding(&[]);
    let mut open = |_: &std::path::Path| Err(std::io::ErrorKind::NotFound.into());
    let written = ims_sshd::squashfs::write(&plan, Some(&inventory), &options, &mut open, &output, &|_| {});
    if let Ok(summary) = written {
        let most = 2 * length as u64 + 100_000;
        assert!(summary.length < most, "an image of {length} bytes became one of {}", summary.length);
        // The files that were taken over can be read again.
        let again = Reader::open(output).unwrap();
        again.walk(true, &mut |_| Ok(())).unwrap();
    }
    Ok(Used::TakenOver)
}

/// Processor time of this thread so far, in milliseconds.
fn processor_time() -> i64 {
    let used = getrusage(UsageWho::RUSAGE_THREAD).unwrap();
    let sum: TimeVal = used.user_time() + used.system_time();
    sum.num_milliseconds()
}

#[test]
fn damaged_sources_are_refused_or_used_but_never_harm() {
    let mutations: u64 = std::env::var("SQUASHFS_MUTATIONS").map_or(2000, |number| number.parse().unwrap());
    let first: u64 = std::env::var("SQUASHFS_SEED").map_or(0, |number| number.parse().unwrap());
    let images = images();
    let (source, output, mut image) = (Memory::new(), Memory::new(), Vec::new());
    let (mut read, mut taken_over, mut longest) = (0_u64, 0_u64, 0);
    for seed in first..first + mutations {
        let mut random = Random(seed);
        image.clone_from(&images[random.index(images.len())]);
        mutate(&mut image, &mut random);
        let (file, is_taken_over) = (source.holding(&image), random.one_in(TAKEN_OVER));
        let start = processor_time();
        let used = std::panic::catch_unwind(|| use_as_source(file, image.len(), is_taken_over, &output));
        let took = processor_time() - start;
        let used = used.unwrap_or_else(|_| panic!("seed {seed} panicked"));
        assert!(took < LONGEST, "seed {seed} took {took} ms of processor time");
        longest = longest.max(took);
        read += u64::from(used.is_ok());
        taken_over += u64::from(used.is_ok_and(|used| used == Used::TakenOver));
    }
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    println!(
        "{mutations} mutants from seed {first}: {read} could be read to the end, {taken_over} of them were taken over; \
         the longest took {longest} ms of processor time; {peak}"
    );
    assert!(taken_over > 0 && read < mutations);
}
