//! The packer: a child process of this program that writes the squashfs, confined as mksquashfs is. Both ends of what
//! they tell each other are in this file.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{Attempt, Error, Result};
use crate::image::unchanged::{Source, Unchanged, changed};
use crate::squashfs::gather::{Choice, Gathered, gather, opener};
use crate::squashfs::{self, Compression, Content, Failure, Fault, Inventory, Method, Options, Reader, Summary};
use crate::sys::tree::Tree;
use crate::transfer::Work;
use crate::transfer::confinement::Confined;
use crate::transfer::progress::{Progress, Written};

/// First argument of the child.
const CHILD: &str = "pack-as-child";

/// This program's own file.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// Instructions for the packer, besides the source.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Order {
    /// Compression; that of the source, or else gzip, if there is none.
    pub(crate) compression: Option<&'static str>,
    /// Time of everything in the image.
    pub(crate) epoch: Option<u64>,
    /// Memory for blocks that are being compressed, in bytes.
    pub(crate) memory: u64,
    /// Paths that are left out.
    pub(crate) left_out: Vec<PathBuf>,
    /// Files that are packed without their content.
    pub(crate) emptied: Vec<PathBuf>,
    /// Permissions that differ from those of the tree.
    pub(crate) modes: Vec<(PathBuf, u32)>,
}

/// Result of the packer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// Length of the image in bytes.
    pub(crate) length: u64,
    /// Bytes of it that were taken over.
    pub(crate) taken: u64,
    /// Bytes of it that were compressed.
    pub(crate) compressed: u64,
    /// Why the source was not used.
    anew: Option<String>,
    /// Extended attributes that a squashfs cannot hold.
    not_kept: Vec<String>,
}

/// Packs `image_root` into the empty file `part`, which lies in `volume`.
pub(crate) fn pack(
    work: &Work,
    image_root: &Tree,
    (part, volume): (&File, &Tree),
    order: &Order,
    source: Option<&Source>,
    attempted: &str,
) -> Result<Outcome> {
    let own = File::open(OWN_PROGRAM).attempt(|| "open this program's own file")?;
    let (told, progress) = (inheritable(&order.encode(source)), inheritable(&[0; Written::LENGTH]));
    let (told, progress) = (told.attempt(|| attempted)?, progress.attempt(|| attempted)?);
    let squashfs = source.map(|source| rustix::io::dup(&source.squashfs)).transpose().attempt(|| attempted)?;
    let mut child = Command::new(OWN_PROGRAM);
    child.args([CHILD, &told.as_raw_fd().to_string(), &progress.as_raw_fd().to_string()]);
    if let Some(squashfs) = &squashfs {
        child.arg(squashfs.as_raw_fd().to_string());
    }
    let readable = squashfs.iter().map(AsFd::as_fd).chain([own.as_fd()]);
    let confined = Confined::packing(image_root, part, volume)?.reading(readable)?;
    let mut shown = Progress::begin("packing", None);
    let look = |_: &_| {
        let mut bytes = [0; Written::LENGTH];
        if progress.read_exact_at(&mut bytes, 0).is_ok() {
            shown.of_image(Written::decode(&bytes));
        }
    };
    let output = work.run(&mut child, Some(&confined), look)?;
    drop(shown);
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if !output.status.success() {
        return Err(Error::new(attempted).because(if said.is_empty() { output.status.to_string() } else { said }));
    }
    let outcome: Outcome = serde_json::from_slice(&output.stdout).attempt(|| attempted)?;
    if let Some(why) = &outcome.anew {
        tracing::info!("compressed everything anew: {why}");
    }
    for name in &outcome.not_kept {
        tracing::warn!("extended attribute {name} is not packed: a squashfs cannot store it");
    }
    let length = part.metadata().attempt(|| attempted)?.len();
    if length != outcome.length {
        let why = format!("the image has {length} bytes, expected {}", outcome.length);
        return Err(Error::new(attempted).because(why));
    }
    Ok(outcome)
}

/// A file in memory that a child inherits. Landlock lets it be opened, since it is on no mounted file system.
pub(crate) fn inheritable(content: &[u8]) -> io::Result<File> {
    use rustix::fs::MemfdFlags;
    // Kernels before 6.3 reject the flag, and later ones may require it (vm.memfd_noexec).
    let made = rustix::fs::memfd_create("packing", MemfdFlags::NOEXEC_SEAL)
        .or_else(|_| rustix::fs::memfd_create("packing", MemfdFlags::empty()))?;
    let file = File::from(made);
    file.write_all_at(content, 0)?;
    Ok(file)
}

/// The order without its paths, as it is told.
#[derive(Serialize, Deserialize)]
struct Head {
    compression: Option<String>,
    epoch: Option<u64>,
    memory: u64,
}

/// The order as the child reads it.
#[derive(Default)]
struct Told {
    compression: Option<Compression>,
    epoch: Option<u64>,
    memory: u64,
    left_out: HashSet<PathBuf>,
    emptied: HashSet<PathBuf>,
    modes: HashMap<PathBuf, u32>,
    unchanged: Vec<Unchanged>,
}

/// Kinds of the records that follow the head. A record ends with a zero byte, which no path has.
const LEFT_OUT: u8 = b'x';
const EMPTIED: u8 = b'e';
const MODE: u8 = b'm';
const UNCHANGED: u8 = b'u';
/// Path in the source of the file before.
const SOURCE: u8 = b's';

impl Order {
    fn encode(&self, source: Option<&Source>) -> Vec<u8> {
        let Self { compression, epoch, memory, .. } = self;
        let head = json!(Head { compression: compression.map(str::to_owned), epoch: *epoch, memory: *memory });
        let mut bytes = head.to_string().into_bytes();
        bytes.push(0);
        let mut add = |kind: u8, path: &Path| {
            bytes.push(kind);
            bytes.extend_from_slice(path.as_os_str().as_bytes());
            bytes.push(0);
        };
        for (kind, paths) in [(LEFT_OUT, &self.left_out), (EMPTIED, &self.emptied)] {
            for path in paths {
                add(kind, path);
            }
        }
        for (path, mode) in &self.modes {
            let mut named = OsString::from(format!("{mode:o} "));
            named.push(path);
            add(MODE, Path::new(&named));
        }
        for Unchanged { path, source, changed } in source.map(|source| &source.files).into_iter().flatten() {
            let mut named = OsString::from(format!("{}.{} ", changed.0, changed.1));
            named.push(path);
            add(UNCHANGED, Path::new(&named));
            if let Some(source) = source {
                add(SOURCE, source);
            }
        }
        bytes
    }
}

impl Told {
    fn decode(bytes: &[u8]) -> Option<Self> {
        let mut records = bytes.strip_suffix(&[0])?.split(|byte| *byte == 0);
        let head: Head = serde_json::from_slice(records.next()?).ok()?;
        let compression = head.compression.as_deref().map(|name| Compression::named(name).ok_or(())).transpose();
        let mut told =
            Self { compression: compression.ok()?, epoch: head.epoch, memory: head.memory, ..Self::default() };
        let path = |bytes: &[u8]| PathBuf::from(OsString::from_vec(bytes.to_vec()));
        for record in records {
            match record.split_first()? {
                (&LEFT_OUT, rest) => drop(told.left_out.insert(path(rest))),
                (&EMPTIED, rest) => drop(told.emptied.insert(path(rest))),
                (&MODE, rest) => {
                    let (mode, name) = named(rest)?;
                    told.modes.insert(path(name), u32::from_str_radix(mode, 8).ok()?);
                }
                (&UNCHANGED, rest) => {
                    let (changed, name) = named(rest)?;
                    let (seconds, nanoseconds) = changed.split_once('.')?;
                    let changed = (seconds.parse().ok()?, nanoseconds.parse().ok()?);
                    told.unchanged.push(Unchanged { path: path(name), source: None, changed });
                }
                (&SOURCE, rest) => told.unchanged.last_mut()?.source = Some(path(rest)),
                _ => return None,
            }
        }
        Some(told)
    }
}

/// A word, and the bytes behind the space after it.
fn named(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let space = bytes.iter().position(|byte| *byte == b' ')?;
    Some((std::str::from_utf8(&bytes[..space]).ok()?, &bytes[space + 1..]))
}

/// Runs the child, if that is what this process was started as. Returns its exit code.
pub fn run_as_child() -> Option<u8> {
    let mut words = std::env::args_os().skip(1);
    if words.next()? != CHILD {
        return None;
    }
    // It was started as "exe".
    let _ = rustix::thread::set_name(c"ims-sshd-packer");
    let descriptors: Vec<_> = words.collect();
    Some(match child(&descriptors) {
        Ok(outcome) => {
            println!("{}", json!(outcome));
            0
        }
        Err(why) => {
            eprintln!("{why}");
            1
        }
    })
}

fn child(descriptors: &[OsString]) -> std::result::Result<Outcome, String> {
    let misused = || "started by 'ims-sshd package' and others, not by hand; see ims-sshd --help".to_owned();
    let (told, progress, source) = match descriptors {
        [told, progress] => (told, progress, None),
        [told, progress, source] => (told, progress, Some(source)),
        _ => return Err(misused()),
    };
    let open = |number: &OsStr, writes: bool| {
        let path = Path::new("/proc/self/fd").join(number);
        File::options().read(true).write(writes).open(path)
    };
    let mut bytes = Vec::new();
    open(told, false).and_then(|mut file| file.read_to_end(&mut bytes)).map_err(|e| e.to_string())?;
    let told = Told::decode(&bytes).ok_or_else(misused)?;
    drop(bytes);
    let progress = open(progress, true).map_err(|e| e.to_string())?;
    let source = source.map(|number| open(number, false)).transpose().map_err(|e| e.to_string())?;
    let output: OwnedFd = io::stdin().as_fd().try_clone_to_owned().map_err(|e| e.to_string())?;
    let tree = Tree::open(Path::new(".")).map_err(|e| e.to_string())?;
    write(&tree, told, source, (&output.into(), &progress))
}

/// A source that was read.
struct Known {
    inventory: Inventory,
    options: Options,
    /// Inode numbers of the unchanged files, with the time at which they were found unchanged.
    files: HashMap<PathBuf, (u32, (i64, u64))>,
}

/// Reads a source. All that it says may be wrong.
fn read(squashfs: File, unchanged: Vec<Unchanged>) -> std::result::Result<Known, Fault> {
    let reader = Reader::open(squashfs)?;
    let options = reader.options();
    let mut numbers: HashMap<PathBuf, Option<u32>> = HashMap::new();
    for file in &unchanged {
        numbers.insert(file.source.as_ref().unwrap_or(&file.path).clone(), None);
    }
    let mut twice = HashSet::new();
    reader.walk(false, &mut |entry| {
        if let Some(number) = numbers.get_mut(entry.path)
            && entry.kind() == 0o100_000
            && number.replace(entry.number()).is_some()
        {
            twice.insert(entry.path.to_owned());
        }
        Ok(())
    })?;
    let inventory = Inventory::new(reader)?;
    let mut files = HashMap::with_capacity(unchanged.len());
    for Unchanged { path, source, changed } in unchanged {
        let named = source.as_ref().unwrap_or(&path);
        // Two entries of one path: nobody knows which one the file is.
        if let Some(Some(number)) = numbers.get(named)
            && !twice.contains(named)
        {
            files.insert(path, (*number, changed));
        }
    }
    Ok(Known { inventory, options, files })
}

/// Writes the image of `tree` and how far that has come.
fn write(
    tree: &Tree,
    mut told: Told,
    source: Option<File>,
    (output, progress): (&File, &File),
) -> std::result::Result<Outcome, String> {
    let mut anew = None;
    let unchanged = std::mem::take(&mut told.unchanged);
    let known = source.map(|source| read(source, unchanged)).transpose().unwrap_or_else(|fault| {
        anew = Some(format!("source: {fault}"));
        None
    });
    let mut options = known.as_ref().map_or_else(|| Options::new(Compression::Gzip), |known| known.options);
    let theirs = options.method.algorithm();
    if let Some(wanted) = told.compression.filter(|wanted| *wanted != theirs) {
        options.method = Method::new(wanted, options.block_size);
        if known.is_some() {
            anew =
                Some(format!("the source is compressed with {}, and the image with {}", theirs.name(), wanted.name()));
        }
    }
    options.epoch = told.epoch.map(|epoch| u32::try_from(epoch).unwrap_or(u32::MAX));
    options.memory = options.memory.min(told.memory);
    let files = known.as_ref().map(|known| &known.files);
    let gathered = gather(tree, &mut |path, found| {
        if told.left_out.contains(path) {
            return Choice::LeaveOut;
        }
        if told.emptied.contains(path) {
            found.st_size = 0;
        }
        if let Some(mode) = told.modes.get(path) {
            found.st_mode = found.st_mode & !0o7777 | mode & 0o7777;
        }
        let known = files.and_then(|files| files.get(path)).filter(|(_, then)| *then == changed(found));
        Choice::Pack(known.map_or(Content::Read, |(number, _)| Content::Taken(*number)))
    });
    let Gathered { plan, not_kept } = gathered.map_err(|failure| failure.to_string())?;
    let report = |now: &squashfs::Progress| {
        let squashfs::Progress { taken, compressed, read, to_take, to_read } = *now;
        let _ = progress.write_all_at(&Written { taken, compressed, read, to_take, to_read }.encode(), 0);
    };
    let write =
        |source: Option<&Inventory>| squashfs::write(&plan, source, &options, &mut opener(tree), output, &report);
    let inventory = known.as_ref().map(|known| &known.inventory);
    let summary = write(inventory).or_else(|failure| match failure {
        Failure::Source(fault) => {
            anew = Some(format!("source: {fault}"));
            write(None)
        }
        other => Err(other),
    });
    let Summary { length, progress, .. } = summary.map_err(|failure| failure.to_string())?;
    let not_kept = not_kept.iter().map(|name| name.to_string_lossy().into_owned()).collect();
    Ok(Outcome { length, taken: progress.taken, compressed: progress.compressed, anew, not_kept })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_read_as_it_was_told_whatever_bytes_the_paths_have() {
        let path = |bytes: &[u8]| PathBuf::from(OsString::from_vec(bytes.to_vec()));
        let order = Order {
            compression: Some("zstd"),
            epoch: Some(7),
            memory: 8,
            left_out: vec![path(b"a\nb"), path(b"\xff")],
            emptied: vec![path(b"var/log/lastlog")],
            modes: vec![(path(b"a 7 b"), 0o4700)],
        };
        let files = vec![
            Unchanged { path: path(b"1.2 3"), source: None, changed: (-1, 999) },
            Unchanged { path: path(b"new/x"), source: Some(path(b"old/\xfe")), changed: (1, 0) },
        ];
        let source = Source { squashfs: File::open("/dev/null").unwrap(), files: files.clone(), is_dropped: None };
        let told = Told::decode(&order.encode(Some(&source))).unwrap();
        assert_eq!((told.compression, told.epoch, told.memory), (Some(Compression::Zstd), Some(7), 8));
        assert_eq!(told.left_out, order.left_out.iter().cloned().collect());
        assert_eq!(told.emptied, order.emptied.iter().cloned().collect());
        assert_eq!(told.modes, order.modes.iter().cloned().collect());
        assert_eq!(told.unchanged, files);
        assert!(Told::decode(b"{}\0").is_none() && Told::decode(b"").is_none());
    }
    /// Packs a tree, whose files are all told to be unchanged, and returns the image, with what the packer says.
    fn packed(tree: &Tree, source: Option<&[u8]>) -> (Vec<u8>, Outcome) {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &[u8]| {
            let mut options = File::options();
            let file = options.create_new(true).read(true).write(true).open(dir.path().join(name)).unwrap();
            file.write_all_at(content, 0).unwrap();
            file
        };
        let mut told = Told { memory: 64 << 20, ..Told::default() };
        let listed = tree.walk(|path, _, _, found| {
            told.unchanged.push(Unchanged { path: path.to_owned(), source: None, changed: changed(found) });
            Ok(())
        });
        listed.unwrap();
        let (output, progress) = (file("output", b""), file("progress", b""));
        let outcome = write(tree, told, source.map(|bytes| file("source", bytes)), (&output, &progress)).unwrap();
        let mut now = [0; Written::LENGTH];
        progress.read_exact_at(&mut now, 0).unwrap();
        assert_eq!(Written::decode(&now).taken, outcome.taken);
        (std::fs::read(dir.path().join("output")).unwrap(), outcome)
    }

    #[test]
    fn source_that_is_damaged_gives_the_image_that_is_packed_from_scratch() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        let mut state = 1_u32;
        let mut noise = |length| {
            let next = |_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state.to_be_bytes()[0]
            };
            (0..length).map(next).collect::<Vec<_>>()
        };
        for number in 0..30 {
            std::fs::write(dir.path().join(format!("sub/small-{number}")), noise(1000)).unwrap();
            std::fs::write(dir.path().join(format!("large-{number}")), noise(150_000)).unwrap();
        }
        let tree = Tree::open(dir.path()).unwrap();
        let (scratch, outcome) = packed(&tree, None);
        assert_eq!((outcome.taken, &outcome.anew, outcome.length), (0, &None, scratch.len() as u64));
        let (_, outcome) = packed(&tree, Some(&scratch));
        assert!(outcome.taken > 4_000_000 && outcome.anew.is_none(), "{outcome:?}");
        let mut damaged =
            vec![b"no squashfs".repeat(1000), scratch[..scratch.len() / 2].to_vec(), scratch[..50].to_vec()];
        // Its blocks; and then, each in turn, its tables.
        for part in [96..scratch.len() / 2, scratch.len() - 6000..scratch.len() - 4500, 28..40, 40..96] {
            let mut copy = scratch.clone();
            copy[part].fill(0xa5);
            damaged.push(copy);
        }
        for (number, source) in damaged.iter().enumerate() {
            let (image, outcome) = packed(&tree, Some(source));
            // Blocks of large files are taken over as they are.
            if outcome.taken == 0 {
                assert!(outcome.anew.is_some() && image == scratch, "{number}: {outcome:?}");
            }
            assert_eq!(outcome.length, image.len() as u64);
        }
        // A source that was cut off after its superblock was read.
        let told = packed(&tree, Some(&damaged[1])).1;
        assert!(told.anew.is_some_and(|why| why.starts_with("source: ")));
    }
}
