//! The packer: a child process of this program that writes the squashfs, confined as mksquashfs is. Both ends of the
//! protocol between parent and child are in this file.

use std::collections::{HashMap, HashSet};
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{Attempt, Error, Result};
use crate::image::access_list::{ACCESS_LIST, narrowed};
use crate::image::holes::{self, Holes, sparse_logs};
use crate::image::state::State;
use crate::image::times::OutOfRange;
use crate::image::unchanged::{Basis, Before, Entries, Overlaid, Source, Unchanged, Unpacked};
use crate::image::upper_layer::{Directories, UpperDirectory};
use crate::printable::listed;
use crate::squashfs::gather::{Choice, Gathered, gather_with, opener};
use crate::squashfs::{self, Compression, Content, Failure, Fault, Inventory, Method, Options, Reader, Summary};
use crate::sys::process::OWN_PROGRAM;
use crate::sys::tree::Tree;
use crate::transfer::confinement::Confined;
use crate::transfer::progress::{Progress, Written};
use crate::transfer::{Work, too_large};

/// First argument of the packer's child process.
const CHILD: &str = "pack-as-child";

/// Name that the child gives itself; the kernel keeps 15 characters of it.
pub(super) const NAME: &str = "ims-sshd-packer";

/// Instructions for the packer, besides the source.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Order {
    /// Compression; `None` means that of the source or, without a source, gzip.
    pub(crate) compression: Option<&'static str>,
    /// Time given to everything in the image, in seconds since 1970.
    pub(crate) epoch: Option<u64>,
    /// Memory for blocks that are being compressed, in bytes.
    pub(crate) memory: u64,
    /// Paths that are left out.
    pub(crate) left_out: Vec<PathBuf>,
    /// Files that are packed without their content.
    pub(crate) emptied: Vec<PathBuf>,
    /// Paths to pack with another mode than in the tree, and that mode.
    pub(crate) modes: Vec<(PathBuf, u32)>,
    /// True if the packer is to report the state of the tree.
    pub(crate) tells_state: bool,
}

/// Result of the packer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// Length of the image in bytes.
    pub(crate) length: u64,
    /// Number of these bytes that were taken over from the source.
    pub(crate) taken: u64,
    /// Reason why the image was packed anew, without the source.
    anew: Option<String>,
    /// Extended attributes that a squashfs cannot hold.
    not_kept: Vec<String>,
    /// Files that are packed with fewer rights for their group.
    narrowed: Vec<String>,
    /// Files whose times a squashfs cannot store, and that are packed with another time.
    out_of_range: OutOfRange,
    /// State of the tree, if it was asked for.
    pub(crate) state: Option<String>,
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
    let output = work.run(attempted, &mut child, Some(&confined), look)?;
    drop(shown);
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if output.status.signal() == Some(libc::SIGXFSZ) {
        return Err(Error::new(attempted).because(too_large(Some(confined.limits.file))));
    }
    if !output.status.success() {
        let (why, advice) = said.split_once(ADVICE).unwrap_or((&said, ""));
        let error = Error::new(attempted).because(if why.is_empty() { output.status.to_string() } else { why.into() });
        return Err(if advice.is_empty() { error } else { error.advise(advice) });
    }
    let outcome: Outcome = serde_json::from_slice(&output.stdout).attempt(|| attempted)?;
    if let Some(why) = &outcome.anew {
        tracing::info!("compressed everything anew: {why}");
    }
    for name in &outcome.not_kept {
        tracing::warn!("extended attribute {name} is not packed: a squashfs cannot store it");
    }
    if !outcome.narrowed.is_empty() {
        tell_narrowed(&outcome.narrowed);
    }
    outcome.out_of_range.tell("the nearest time");
    let length = part.metadata().attempt(|| attempted)?.len();
    if length != outcome.length {
        let why = format!("the image has {length} bytes, expected {}", outcome.length);
        return Err(Error::new(attempted).because(why));
    }
    Ok(outcome)
}

/// Separator, in the child's error, between the reason and the advice.
const ADVICE: &str = "\n";

/// Warns about files that get fewer rights for their group.
pub(crate) fn tell_narrowed(shown: &[String]) {
    tracing::warn!("packed with the rights that the access list gives the group: {}", listed(shown));
}

/// A file in memory for a child to inherit. Landlock does not keep the child from opening the file, since it is on no
/// mounted file system.
pub(crate) fn inheritable(content: &[u8]) -> io::Result<File> {
    use rustix::fs::MemfdFlags;
    // Kernels before 6.3 reject the flag, and later ones may require it (vm.memfd_noexec).
    let made = rustix::fs::memfd_create("packing", MemfdFlags::NOEXEC_SEAL)
        .or_else(|_| rustix::fs::memfd_create("packing", MemfdFlags::empty()))?;
    let file = File::from(made);
    file.write_all_at(content, 0)?;
    Ok(file)
}

/// The order without its paths, as the parent passes it to the child.
#[derive(Serialize, Deserialize)]
struct Head {
    compression: Option<String>,
    epoch: Option<u64>,
    memory: u64,
    tells_state: bool,
    /// [`Overlaid::has_whole_links`]; `None` if the image root is not an overlay.
    overlay: Option<bool>,
}

/// The order as the child reads it.
#[derive(Default)]
struct Told {
    compression: Option<Compression>,
    epoch: Option<u64>,
    memory: u64,
    tells_state: bool,
    left_out: HashSet<OsString>,
    emptied: HashSet<OsString>,
    modes: HashMap<OsString, u32>,
    basis: Option<Basis>,
}

/// Kind of the record of a path that is left out. Records follow the head; each ends with a zero byte, which no path
/// contains.
const LEFT_OUT: u8 = b'x';
/// Kind of the record of a file that is packed without its content.
const EMPTIED: u8 = b'e';
/// Kind of the record of a path with the permissions that it gets.
const MODE: u8 = b'm';
/// Kind of the record of an unpacked file, with its status when it was unpacked.
const UNPACKED: u8 = b'f';
/// Kind of the record of a path in the upper layer of an overlay.
const UPPER: u8 = b'u';
/// Kind of the record of a directory of the upper layer.
const DIRECTORY: u8 = b'd';
/// Kind of the record of the directory of the source that the preceding [`DIRECTORY`] is merged with.
const SOURCE: u8 = b's';

impl Order {
    fn encode(&self, source: Option<&Source>) -> Vec<u8> {
        let basis = source.map(|source| &source.basis);
        let head = json!(Head {
            compression: self.compression.map(str::to_owned),
            epoch: self.epoch,
            memory: self.memory,
            tells_state: self.tells_state,
            overlay: if let Some(Basis::Overlay(overlaid)) = basis { Some(overlaid.has_whole_links) } else { None },
        });
        let mut bytes = head.to_string().into_bytes();
        bytes.push(0);
        let mut write = |kind: u8, record: &[u8]| {
            bytes.push(kind);
            bytes.extend_from_slice(record);
            bytes.push(0);
        };
        if let Some(Basis::Unpacked(files)) = basis {
            files.encode(&mut |record| write(UNPACKED, record));
        }
        let mut add = |kind: u8, path: &Path| write(kind, path.as_os_str().as_bytes());
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
        if let Some(Basis::Overlay(Overlaid { in_upper, directories, .. })) = basis {
            for path in in_upper {
                add(UPPER, Path::new(path));
            }
            for (path, directory) in directories {
                add(DIRECTORY, path);
                if let Some(source) = &directory.source {
                    add(SOURCE, source);
                }
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
        let Head { epoch, memory, tells_state, .. } = head;
        let mut told = Self { compression: compression.ok()?, epoch, memory, tells_state, ..Self::default() };
        let path = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
        let (mut unpacked, mut in_upper, mut directories) = (Unpacked::default(), HashSet::new(), Directories::new());
        let mut directory = PathBuf::new();
        for record in records {
            match record.split_first()? {
                (&LEFT_OUT, rest) => drop(told.left_out.insert(path(rest))),
                (&EMPTIED, rest) => drop(told.emptied.insert(path(rest))),
                (&MODE, rest) => {
                    let (mode, name) = named(rest)?;
                    told.modes.insert(path(name), u32::from_str_radix(mode, 8).ok()?);
                }
                (&UNPACKED, rest) => unpacked.add(rest)?,
                (&UPPER, rest) => drop(in_upper.insert(path(rest))),
                (&DIRECTORY, rest) => {
                    directory = path(rest).into();
                    let new = UpperDirectory { source: None, is_renamed: false, aside: String::new() };
                    directories.insert(directory.clone(), new);
                }
                (&SOURCE, rest) => directories.get_mut(&directory)?.source = Some(path(rest).into()),
                _ => return None,
            }
        }
        told.basis = Some(match head.overlay {
            Some(has_whole_links) => Basis::Overlay(Overlaid::new(in_upper, directories, has_whole_links)),
            None => Basis::Unpacked(unpacked),
        });
        Some(told)
    }
}

/// Splits bytes at the first space, into a word and the rest.
fn named(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let space = bytes.iter().position(|byte| *byte == b' ')?;
    Some((std::str::from_utf8(&bytes[..space]).ok()?, &bytes[space + 1..]))
}

/// Does the work of the packer's child if this process was started as one, and returns the exit code; otherwise returns
/// `None`.
pub fn run_as_child() -> Option<u8> {
    let mut words = std::env::args_os().skip(1);
    if words.next()? != CHILD {
        return None;
    }
    // The kernel has named the process "exe", after the path that was executed.
    if let Ok(name) = CString::new(NAME) {
        let _ = rustix::thread::set_name(&name);
    }
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
    write(&tree, &told, source, (&output.into(), &progress))
}

/// A source that has been read.
struct Known {
    inventory: Inventory,
    options: Options,
    entries: Entries,
}

/// Reads a source. Anything in the source may be wrong, or written by an attacker.
fn read(squashfs: File) -> std::result::Result<Known, Fault> {
    let reader = Reader::open(squashfs)?;
    let options = reader.options();
    let mut entries = Entries::new();
    let inventory = Inventory::with(reader, &mut |entry| {
        let before = Before {
            number: entry.number(),
            mode: entry.kind() | entry.mode(),
            size: entry.size(),
            modified: entry.modified(),
            links: entry.links(),
            has_attributes: entry.has_xattrs(),
        };
        let twice = |known: &mut Option<Before>| *known = None;
        entries.entry(entry.path.into()).and_modify(twice).or_insert(Some(before));
    })?;
    Ok(Known { inventory, options, entries })
}

/// A collected tree, and findings made while collecting it.
struct Seen {
    gathered: Gathered,
    narrowed: Vec<String>,
    out_of_range: OutOfRange,
    state: Option<String>,
}

/// Collects the files of `tree` as the order says.
fn look(tree: &Tree, told: &Told, known: Option<&Known>) -> std::result::Result<Seen, String> {
    let root = rustix::fs::fstat(tree).map_err(|error| error.to_string())?;
    let mut state = told.tells_state.then(State::new);
    if let Some(state) = &mut state {
        state.add(Path::new(""), &root);
    }
    let mut holes = Holes::new(&sparse_logs(tree));
    let mut out_of_range = OutOfRange::default();
    // With an epoch, all entries get that time, so their own times do not matter.
    let keeps_times = told.epoch.is_none();
    if keeps_times {
        out_of_range.add(Path::new(""), &root);
    }
    let basis = told.basis.as_ref().zip(known);
    let mut choose = |path: &Path, found: &mut rustix::fs::Stat| {
        if let Some(state) = &mut state {
            state.add(path, found);
        }
        let name = path.as_os_str();
        if told.left_out.contains(name) {
            return Choice::LeaveOut;
        }
        holes.add(path, found);
        if keeps_times {
            out_of_range.add(path, found);
        }
        let unchanged = basis.and_then(|(basis, known)| basis.find(path, found, root.st_dev, &known.entries));
        if told.emptied.contains(name) {
            found.st_size = 0;
        }
        if let Some(mode) = told.modes.get(name) {
            found.st_mode = found.st_mode & !0o7777 | mode & 0o7777;
        }
        match unchanged {
            None => Choice::Pack(Content::Read),
            Some(Unchanged { number, is_bare: true }) => Choice::PackBare(Content::Taken(number)),
            Some(Unchanged { number, is_bare: false }) => Choice::Pack(Content::Taken(number)),
        }
    };
    let mut shown = Vec::new();
    let mut unkept = |path: &Path, at: &Path, found: &rustix::fs::Stat, name: &[u8]| {
        let is_list = name == ACCESS_LIST.as_bytes() && !told.modes.contains_key(path.as_os_str());
        let mode = is_list.then(|| narrowed(at, found)).flatten()?;
        shown.push(format!("/{} ({mode:o})", path.display()));
        Some(mode)
    };
    let gathered = gather_with(tree, &mut choose, &mut unkept).map_err(|failure| failure.to_string())?;
    if let Some(why) = holes.refusal() {
        return Err(format!("{why}{ADVICE}{}", holes::ADVICE));
    }
    Ok(Seen { gathered, narrowed: shown, out_of_range, state: state.map(State::finish) })
}

/// Writes the image of `tree`, and its progress.
fn write(
    tree: &Tree,
    told: &Told,
    source: Option<File>,
    (output, progress): (&File, &File),
) -> std::result::Result<Outcome, String> {
    let mut anew = None;
    let mut known = source.map(read).transpose().unwrap_or_else(|fault| {
        anew = Some(format!("source: {fault}"));
        None
    });
    let mut options = known.as_ref().map_or_else(|| Options::new(Compression::Gzip), |known| known.options);
    let theirs = options.method.algorithm();
    if let Some(wanted) = told.compression.filter(|wanted| *wanted != theirs) {
        options.method = Method::new(wanted, options.block_size);
        if known.take().is_some() {
            anew =
                Some(format!("the source is compressed with {}, and the image with {}", theirs.name(), wanted.name()));
        }
    }
    options.epoch = told.epoch.map(|epoch| u32::try_from(epoch).unwrap_or(u32::MAX));
    options.memory = options.memory.min(told.memory);
    let (seen, lengths) = thread::scope(|scope| {
        let inventory = known.as_ref().map(|known| &known.inventory).filter(|_| options.processors > 1);
        // While the tree is being collected, other processors would be idle, so measure the source on them.
        let measuring = inventory.map(|inventory| scope.spawn(|| inventory.measure(options.processors)));
        let seen = look(tree, told, known.as_ref());
        (seen, measuring.and_then(|measuring| measuring.join().ok()?.ok()))
    });
    let Seen { gathered: Gathered { plan, not_kept }, narrowed, out_of_range, state } = seen?;
    let inventory = known.map(|mut known| {
        if let Some(lengths) = lengths {
            known.inventory.set_lengths(lengths);
        }
        known.inventory
    });
    let report = |now: &squashfs::Progress| {
        let squashfs::Progress { taken, compressed, read, to_take, to_read } = *now;
        let _ = progress.write_all_at(&Written { taken, compressed, read, to_take, to_read }.encode(), 0);
    };
    let write =
        |source: Option<&Inventory>| squashfs::write(&plan, source, &options, &mut opener(tree), output, &report);
    let summary = write(inventory.as_ref()).or_else(|failure| match failure {
        Failure::Source(fault) => {
            anew = Some(format!("source: {fault}"));
            write(None)
        }
        other => Err(other),
    });
    let Summary { length, progress, .. } = summary.map_err(|failure| failure.to_string())?;
    let not_kept = not_kept.iter().map(|name| name.to_string_lossy().into_owned()).collect();
    let taken = progress.taken;
    Ok(Outcome { length, taken, anew, not_kept, narrowed, out_of_range, state })
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
            tells_state: true,
        };
        let directory = |source: Option<&str>| UpperDirectory {
            source: source.map(PathBuf::from),
            is_renamed: false,
            aside: String::new(),
        };
        let directories = [("", directory(Some(""))), ("new", directory(None)), ("moved", directory(Some("a/b")))];
        let directories: Directories = directories.into_iter().map(|(path, it)| (path.into(), it)).collect();
        let in_upper = HashSet::from([OsString::from("new"), path(b"a\xff\nb").into_os_string()]);
        let basis = Basis::Overlay(Overlaid::new(in_upper.clone(), directories, true));
        let source = Source { squashfs: File::open("/dev/null").unwrap(), basis, is_dropped: None };
        let told = Told::decode(&order.encode(Some(&source))).unwrap();
        assert_eq!((told.compression, told.epoch, told.memory), (Some(Compression::Zstd), Some(7), 8));
        let names = |paths: &[PathBuf]| paths.iter().map(|path| path.clone().into_os_string()).collect();
        assert_eq!((told.left_out, told.emptied), (names(&order.left_out), names(&order.emptied)));
        assert_eq!(told.modes, order.modes.iter().map(|(path, mode)| (path.clone().into(), *mode)).collect());
        let Some(Basis::Overlay(overlaid)) = told.basis else { panic!("it is an overlay") };
        assert_eq!((overlaid.in_upper, overlaid.has_whole_links), (in_upper, true));
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let sources: Vec<_> =
            overlaid.directories.iter().map(|(path, it)| (text(path), it.source.as_deref().map(text))).collect();
        let expected = [("", Some("")), ("moved", Some("a/b")), ("new", None)];
        assert_eq!(sources, expected.map(|(path, source)| (path.to_owned(), source.map(str::to_owned))));
        assert!(Told::decode(b"{}\0").is_none() && Told::decode(b"").is_none());
    }

    /// Packs a tree, claiming that all its files are unchanged. Returns the image and the packer's result.
    fn packed(tree: &Tree, source: Option<&[u8]>) -> (Vec<u8>, Outcome) {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &[u8]| {
            let mut options = File::options();
            let file = options.create_new(true).read(true).write(true).open(dir.path().join(name)).unwrap();
            file.write_all_at(content, 0).unwrap();
            file
        };
        let mut files = Unpacked::default();
        let listed = tree.walk(|path, _, _, found| {
            let (modified, changed) = ((found.st_mtime, found.st_mtime_nsec), (found.st_ctime, found.st_ctime_nsec));
            let times = format!("{} {} {} {}", modified.0, modified.1, changed.0, changed.1);
            files.add(format!("{} {} {times} - {}", found.st_ino, found.st_size, path.display()).as_bytes()).unwrap();
            Ok(())
        });
        listed.unwrap();
        let told = Told { memory: 64 << 20, basis: Some(Basis::Unpacked(files)), ..Told::default() };
        let (output, progress) = (file("output", b""), file("progress", b""));
        let outcome = write(tree, &told, source.map(|bytes| file("source", bytes)), (&output, &progress)).unwrap();
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
        // Overwrites blocks of the source, then each of its tables in turn.
        for part in [96..scratch.len() / 2, scratch.len() - 6000..scratch.len() - 4500, 28..40, 40..96] {
            let mut copy = scratch.clone();
            copy[part].fill(0xa5);
            damaged.push(copy);
        }
        for (number, source) in damaged.iter().enumerate() {
            let (image, outcome) = packed(&tree, Some(source));
            // Damage to the data of large files goes unnoticed, since their blocks are taken over as they are. If
            // nothing is taken over, the damage was found.
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
