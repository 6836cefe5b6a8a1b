//! Checks a tar archive for members that GNU tar would lose while it reports success. Without `--absolute-names`, tar
//! creates symbolic links to absolute paths, and those through `..`, after all other members. Until then an empty file
//! stands in for each such link, and creating the link then replaces any later member of that name. tar also ignores
//! everything after the end of an archive.

use std::collections::HashMap;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, BufRead, BufReader, BufWriter, ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// Size of a block in bytes. Headers are one block, contents are padded to whole blocks, two empty blocks end an
/// archive.
pub(crate) const BLOCK: usize = 512;

/// Maximum size of an extended header, in bytes. It holds names and extended attributes.
const LARGEST_EXTENSION: u64 = 16 << 20;

/// Memory for symbolic links, in bytes: a few million of them.
const MEMORY_FOR_LINKS: usize = 256 << 20;

/// Memory of one link besides its target, in bytes.
const MEMORY_OF_A_LINK: usize = 64;

/// Maximum number of symbolic links on a path that the kernel follows (path_resolution(7)).
const MOST_LINKS: usize = 40;

/// Reason for which an archive is not unpacked.
#[derive(Debug)]
pub(crate) enum Fault {
    /// tar would lose a member: the reason, and advice.
    Lossy(String, &'static str),
    /// The archive ends before its end mark.
    Cut,
    /// The archive could not be read.
    Unread(io::Error),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::UnexpectedEof => Self::Cut,
            _ => Self::Unread(error),
        }
    }
}

type Result<T> = std::result::Result<T, Fault>;

/// An archive that is read from its start to its end.
pub(crate) trait Input: Read {
    /// Skips `length` bytes. May go past the end of the file.
    fn skip(&mut self, length: u64) -> io::Result<()>;

    /// Announces that the end mark was read; `at` is the offset at which the mark ends. Returns the first later block
    /// that is not all zeros, with its offset in the archive; `None` if only zeros follow. The file may end in that
    /// block.
    fn rest(&mut self, at: u64) -> io::Result<Option<(u64, Vec<u8>)>>;
}

/// An uncompressed archive.
pub(crate) struct Plain(BufReader<File>);

impl Plain {
    /// Reads `file` from its start.
    pub(crate) fn new(file: File) -> Self {
        Self(BufReader::with_capacity(1 << 16, file))
    }
}

impl Read for Plain {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Input for Plain {
    fn skip(&mut self, length: u64) -> io::Result<()> {
        self.0.seek_relative(length.try_into().map_err(|_| ErrorKind::UnexpectedEof)?)
    }

    fn rest(&mut self, at: u64) -> io::Result<Option<(u64, Vec<u8>)>> {
        let file = self.0.get_ref();
        let Some(found) = first_data(file, at, file.metadata()?.len())? else { return Ok(None) };
        let block = found / BLOCK as u64 * BLOCK as u64;
        Ok(Some((block, read_up_to(file, block, BLOCK)?)))
    }
}

/// An archive that is passed on to tar, up to its end mark, while it is read.
pub(crate) struct Passed<R: Read, W: Write> {
    from: BufReader<R>,
    /// tar's standard input; `None` after the end mark, so that tar ends.
    to: Option<BufWriter<W>>,
}

impl<R: Read, W: Write> Passed<R, W> {
    /// Reads from `from`, and writes everything that was read to `to`.
    pub(crate) fn new(from: R, to: W) -> Self {
        Self { from: BufReader::with_capacity(1 << 16, from), to: Some(BufWriter::with_capacity(1 << 16, to)) }
    }
}

impl<R: Read, W: Write> Read for Passed<R, W> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.from.read(buffer)?;
        self.to.as_mut().map_or(Ok(()), |to| to.write_all(&buffer[..length]))?;
        Ok(length)
    }
}

impl<R: Read, W: Write> Input for Passed<R, W> {
    fn skip(&mut self, mut length: u64) -> io::Result<()> {
        while length > 0 {
            let buffer = self.from.fill_buf()?;
            let piece = buffer.len().min(usize::try_from(length).unwrap_or(usize::MAX));
            if piece == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            self.to.as_mut().map_or(Ok(()), |to| to.write_all(&buffer[..piece]))?;
            self.from.consume(piece);
            length -= piece as u64;
        }
        Ok(())
    }

    fn rest(&mut self, mut at: u64) -> io::Result<Option<(u64, Vec<u8>)>> {
        if let Some(mut to) = self.to.take() {
            to.flush()?;
        }
        let mut block = Vec::with_capacity(BLOCK);
        loop {
            block.clear();
            let length = self.from.by_ref().take(BLOCK as u64).read_to_end(&mut block)?;
            if length == 0 {
                return Ok(None);
            }
            if block.iter().any(|&b| b != 0) {
                return Ok(Some((at, block)));
            }
            at += length as u64;
        }
    }
}

/// Reads an archive to its end, and calls `look` before each member. Refuses an archive of which tar would lose
/// something.
pub(crate) fn check(input: &mut impl Input, mut look: impl FnMut() -> io::Result<()>) -> Result<()> {
    let mut links = Links::new();
    let mut at = 0;
    let mut block = [0; BLOCK];
    let mut extension = Extension::default();
    loop {
        input.read_exact(&mut block)?;
        at += BLOCK as u64;
        if is_empty(&block) {
            return end(input, at);
        }
        if !is_header(&block) {
            let why = format!("it has no valid header at byte {}", at - BLOCK as u64);
            return Err(Fault::Lossy(why, "copy or fetch it again"));
        }
        look()?;
        let kind = block[156];
        let size = match extension.size.take() {
            Some(size) if !is_extension(kind) => size,
            _ => number(&block[124..136]),
        };
        if is_extension(kind) {
            if size > LARGEST_EXTENSION {
                let why = format!("it has an extended header of {size} bytes");
                return Err(Fault::Lossy(why, "make it anew without such names or attributes"));
            }
            let mut content = vec![0; usize::try_from(size).unwrap_or_default()];
            input.read_exact(&mut content)?;
            extension.take(kind, &content);
            at += size + pass_padding(input, size)?;
            continue;
        }
        links.member(&Member::of(&block, std::mem::take(&mut extension)))?;
        // tar ignores the size that the header of a link, a device, a directory or a fifo gives.
        let size = if (b'1'..=b'6').contains(&kind) { 0 } else { size };
        if kind == b'S' && block[482] != 0 {
            // The map of a sparse file continues in further blocks (GNU's old format).
            let mut map = [0; BLOCK];
            loop {
                input.read_exact(&mut map)?;
                at += BLOCK as u64;
                if map[504] == 0 {
                    break;
                }
            }
        }
        input.skip(size)?;
        at = at.saturating_add(size).saturating_add(pass_padding(input, size)?);
    }
}

/// Skips the zeros after a content of `size` bytes, and returns their number.
fn pass_padding(input: &mut impl Input, size: u64) -> io::Result<u64> {
    let padding = size.wrapping_neg() % BLOCK as u64;
    input.skip(padding).map(|()| padding)
}

/// Checks what follows the first empty block, which ends `at` bytes into the archive.
fn end(input: &mut impl Input, at: u64) -> Result<()> {
    let mut second = [0; BLOCK];
    input.read_exact(&mut second)?;
    let found = if is_empty(&second) { input.rest(at + BLOCK as u64)? } else { Some((at, second.to_vec())) };
    let Some((at, block)) = found else { return Ok(()) };
    Err(if <&[u8; BLOCK]>::try_from(&*block).is_ok_and(is_header) {
        let why = format!("a second tar archive follows its end, at byte {at}, which tar would not read");
        Fault::Lossy(why, "join them with 'tar --concatenate', or take one of them")
    } else {
        Fault::Lossy(format!("something follows its end, at byte {at}"), "copy or fetch it again")
    })
}

fn is_empty(block: &[u8; BLOCK]) -> bool {
    block.iter().all(|&b| b == 0)
}

/// True if the checksum of a header is right. In the sum, the field of the checksum itself counts as spaces. Old
/// programs add up signed bytes, so accept that sum too.
fn is_header(block: &[u8; BLOCK]) -> bool {
    let bytes = || block.iter().enumerate().map(|(at, &b)| if (148..156).contains(&at) { b' ' } else { b });
    let unsigned: i64 = bytes().map(i64::from).sum();
    let signed: i64 = bytes().map(|b| i64::from(b.cast_signed())).sum();
    i64::try_from(number(&block[148..156])).is_ok_and(|sum| sum == unsigned || sum == signed)
}

/// A number in a header: octal digits after spaces, or a binary number whose first bit is set.
fn number(field: &[u8]) -> u64 {
    if field[0] & 0x80 != 0 {
        let low = field.iter().enumerate().map(|(at, &b)| if at == 0 { b & 0x7f } else { b });
        return low.fold(0, |number: u64, b| number.saturating_mul(256).saturating_add(b.into()));
    }
    let digits = field.iter().skip_while(|&&b| b == b' ').take_while(|b| (b'0'..=b'7').contains(b));
    digits.fold(0, |number: u64, b| number.saturating_mul(8).saturating_add((b - b'0').into()))
}

/// True for headers that describe the next member: GNU's long names, and extended headers (pax(1)), which Solaris
/// marks by a letter of its own.
fn is_extension(kind: u8) -> bool {
    matches!(kind, b'L' | b'K' | b'x' | b'X' | b'g')
}

/// Values that extension headers set for the next member.
#[derive(Debug, Default)]
struct Extension {
    /// GNU's long name and long link target.
    long: [Option<Vec<u8>>; 2],
    path: Option<Vec<u8>>,
    /// Real name of a sparse file, whose header and `path` have a made-up one.
    sparse: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    size: Option<u64>,
}

impl Extension {
    fn take(&mut self, kind: u8, content: &[u8]) {
        match kind {
            b'L' | b'K' => self.long[usize::from(kind == b'K')] = Some(up_to_nul(content).to_vec()),
            // A global header applies to all members, so it names none.
            b'g' => {}
            _ => records(content, |key, value| match key {
                b"path" => self.path = Some(value.to_vec()),
                b"GNU.sparse.name" => self.sparse = Some(value.to_vec()),
                b"linkpath" => self.target = Some(value.to_vec()),
                b"size" => self.size = str::from_utf8(value).ok().and_then(|size| size.parse().ok()),
                _ => {}
            }),
        }
    }
}

/// Calls `each` with key and value of each record, `LENGTH KEY=VALUE\n`. Stops at a malformed record, as tar does.
fn records(mut content: &[u8], mut each: impl FnMut(&[u8], &[u8])) {
    while let Some(space) = content.iter().position(|&b| b == b' ')
        && let Some(length) = str::from_utf8(&content[..space]).ok().and_then(|digits| digits.parse().ok())
        && let Some((record, rest)) = content.split_at_checked(length)
        && let Some(record) = record.get(space + 1..).and_then(|record| record.strip_suffix(b"\n"))
        && let Some(equals) = record.iter().position(|&b| b == b'=')
    {
        each(&record[..equals], &record[equals + 1..]);
        content = rest;
    }
}

fn up_to_nul(field: &[u8]) -> &[u8] {
    field.split(|&b| b == 0).next().unwrap_or_default()
}

/// One member.
#[derive(Debug)]
struct Member {
    name: Vec<u8>,
    kind: u8,
    target: Vec<u8>,
    /// Owner, size and time of modification, in the form of the header.
    attributes: Vec<u8>,
}

impl Member {
    fn of(block: &[u8; BLOCK], extension: Extension) -> Self {
        let [long_name, long_target] = extension.long;
        let short = || {
            let (prefix, name) = (up_to_nul(&block[345..500]), up_to_nul(&block[..100]));
            // Only the POSIX format has a prefix; GNU's format has other fields there.
            let has_prefix = &block[257..263] == b"ustar\0" && !prefix.is_empty();
            if has_prefix { [prefix, b"/", name].concat() } else { name.to_vec() }
        };
        Self {
            name: extension.sparse.or(extension.path).or(long_name).unwrap_or_else(short),
            kind: block[156],
            target: extension.target.or(long_target).unwrap_or_else(|| up_to_nul(&block[157..257]).to_vec()),
            attributes: block[108..148].to_vec(),
        }
    }
}

/// Symbolic links that the archive has created so far, by a hash of their paths.
struct Links {
    hashes: [RandomState; 2],
    /// Links that tar creates last, each with a hash of its target and attributes.
    delayed: HashMap<u128, u64>,
    /// The other links, with their targets.
    created: HashMap<u128, Vec<u8>>,
    /// Memory that the links may still use, in bytes.
    room: usize,
}

impl Links {
    fn new() -> Self {
        let hashes = [RandomState::new(), RandomState::new()];
        Self { hashes, delayed: HashMap::new(), created: HashMap::new(), room: MEMORY_FOR_LINKS }
    }

    fn key(&self, path: &[u8]) -> u128 {
        let [high, low] = &self.hashes;
        u128::from(high.hash_one(path)) << 64 | u128::from(low.hash_one(path))
    }

    /// Checks the next member, and records it if it is a link.
    fn member(&mut self, member: &Member) -> Result<()> {
        const ADVICE: &str = "make the archive anew from an unpacked tree, with each name once";
        let shown = String::from_utf8_lossy(&member.name);
        let below = |link: &[u8]| {
            let link = String::from_utf8_lossy(link);
            let why = format!(
                "tar cannot unpack the member '{shown}' below '{link}': an earlier member, that is a symbolic link to \
                 an absolute path or through '..'"
            );
            Fault::Lossy(why, ADVICE)
        };
        let path = self.resolve(&member.name).map_err(|link| below(&link))?;
        if path.is_empty() {
            return Ok(());
        }
        let key = self.key(&path);
        // A hard link to a symbolic link is another name of that link.
        let linked =
            if member.kind == b'1' { self.resolve(&member.target).ok().map(|path| self.key(&path)) } else { None };
        let delayed = match (member.kind, linked) {
            (b'2', _) if is_delayed(&member.target) => {
                Some(self.hashes[0].hash_one((&member.target, &member.attributes)))
            }
            (_, Some(linked)) => self.delayed.get(&linked).copied(),
            _ => None,
        };
        if let Some(earlier) = self.delayed.get(&key) {
            if delayed == Some(*earlier) {
                return Ok(());
            }
            let why = format!(
                "tar would lose the member '{shown}', which replaces an earlier member: a symbolic link to an absolute \
                 path or through '..'"
            );
            return Err(Fault::Lossy(why, ADVICE));
        }
        let created = match (member.kind, linked) {
            _ if delayed.is_some() => None,
            (b'2', _) => Some(member.target.clone()),
            (_, Some(linked)) => self.created.get(&linked).cloned(),
            _ => None,
        };
        let needed = MEMORY_OF_A_LINK + created.as_ref().map_or(0, Vec::len);
        if delayed.is_some() || created.is_some() {
            self.room = self.room.checked_sub(needed).ok_or_else(|| {
                Fault::Lossy("it has more symbolic links than can be checked".into(), "use a squashfs or a directory")
            })?;
        }
        match created {
            Some(target) => self.created.insert(key, target),
            None => self.created.remove(&key),
        };
        if let Some(delayed) = delayed {
            self.delayed.insert(key, delayed);
        }
        Ok(())
    }

    /// Path, without a leading slash, to which `name` leads through the links that exist by now; a link in the last
    /// part is not followed. For a path below a delayed link, the error is the path of that link.
    fn resolve(&self, name: &[u8]) -> std::result::Result<Vec<u8>, Vec<u8>> {
        let mut left: Vec<&[u8]> = parts(name);
        left.reverse();
        let mut path: Vec<u8> = Vec::new();
        let mut followed = 0;
        while let Some(part) = left.pop() {
            let above = path.len();
            if above > 0 {
                path.push(b'/');
            }
            path.extend(part);
            if left.is_empty() || (self.delayed.is_empty() && self.created.is_empty()) {
                continue;
            }
            let key = self.key(&path);
            if self.delayed.contains_key(&key) {
                return Err(path);
            }
            // tar itself fails on paths through more links.
            if let Some(target) = self.created.get(&key).filter(|_| followed < MOST_LINKS) {
                followed += 1;
                path.truncate(above);
                left.extend(parts(target).into_iter().rev());
            }
        }
        Ok(path)
    }
}

/// Parts of a path as tar understands it: tar strips everything up to the last `..`.
fn parts(path: &[u8]) -> Vec<&[u8]> {
    let parts = path.split(|&b| b == b'/');
    let begin = parts.clone().enumerate().filter(|(_, part)| *part == b"..").last().map_or(0, |(at, _)| at + 1);
    parts.skip(begin).filter(|part| !part.is_empty() && *part != b".").collect()
}

/// True if tar creates a link with this target after all other members.
fn is_delayed(target: &[u8]) -> bool {
    target.starts_with(b"/") || target.split(|&b| b == b'/').any(|part| part == b"..")
}

/// Offset of the first byte from `at` on that is not zero. Skips holes.
pub(crate) fn first_data(file: &File, mut at: u64, size: u64) -> io::Result<Option<u64>> {
    let mut buffer = vec![0; 1 << 20];
    while at < size {
        at = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let length = file.read_at(&mut buffer, at)?;
        if length == 0 {
            return Ok(None);
        }
        if let Some(found) = buffer[..length].iter().position(|&b| b != 0) {
            return Ok(Some(at + found as u64));
        }
        at += length as u64;
    }
    Ok(None)
}

/// Up to `length` bytes from `at` on; fewer at the end of the file.
pub(crate) fn read_up_to(file: &File, at: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut start = vec![0; length];
    let mut there = 0;
    while there < length {
        match file.read_at(&mut start[there..], at + there as u64)? {
            0 => break,
            read => there += read,
        }
    }
    start.truncate(there);
    Ok(start)
}
