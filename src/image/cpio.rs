//! Unpacks cpio archives of the format `newc`, which xCAT, Warewulf and dracut make. cpio(1) is not used because it
//! follows links that the archive itself has created.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Timespec, Timestamps};

use crate::sys::attributes;
use crate::sys::tree::Tree;

/// Size of an entry's header: the magic number and thirteen numbers of eight hexadecimal digits, all ASCII.
const HEADER: usize = 110;

/// Alignment of names and contents in bytes.
const ALIGNED: u64 = 4;

/// Name of the last entry.
const TRAILER: &[u8] = b"TRAILER!!!";

/// Maximum length of a path or a link target that the kernel accepts, in bytes (PATH_MAX).
const LONGEST_NAME: u32 = 4096;

/// Header of an entry.
#[derive(Debug, Clone, Copy)]
struct Header {
    inode: u32,
    mode: u32,
    user: u32,
    group: u32,
    links: u32,
    modified: u32,
    size: u32,
    device: (u32, u32),
    represents: (u32, u32),
    name_size: u32,
    /// Sum of the content's bytes, modulo 2^32; `None` in the format without checksums.
    sum: Option<u32>,
}

/// An archive being read.
struct Reader<R> {
    input: R,
    /// Bytes read so far.
    at: u64,
    /// True after the trailer entry; an archive that ends without one was cut off.
    ended: bool,
}

/// Unpacks `input` into `root`, an empty directory of ours. Calls `look` regularly, and stops if that returns an error.
/// Strips leading slashes; refuses a name that contains `..` or leads through a link.
pub(crate) fn unpack(input: impl Read, root: &Tree, mut look: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    let mut archive = Reader { input, at: 0, ended: false };
    let mut directories = Vec::new();
    // Path of the first hard link of each file with several, by inode and device in the archive.
    let mut linked: HashMap<(u32, (u32, u32)), PathBuf> = HashMap::new();
    while let Some(header) = archive.header()? {
        look()?;
        let name = archive.name(&header)?;
        archive.ended = name == TRAILER;
        if archive.ended {
            // Another archive may follow, in which the same inode numbers mean other files.
            linked.clear();
            continue;
        }
        let path = path_of(&name)?;
        refuse_malformed(&header, &name, path.as_deref())?;
        let Some(path) = path else {
            archive.skip(u64::from(header.size))?;
            directories.push((PathBuf::from("."), header));
            continue;
        };
        let (parent, name) = make_parent(root, &path)?;
        let kind = FileType::from_raw_mode(header.mode);
        if kind == FileType::Directory {
            archive.skip(u64::from(header.size))?;
            match rustix::fs::mkdirat(&parent, &name, Mode::RWXU) {
                Err(rustix::io::Errno::EXIST) => drop(parent.directory_without_links(&name)?),
                other => other?,
            }
            directories.push((path, header));
            continue;
        }
        let of_several = kind == FileType::RegularFile && header.links > 1;
        let first = linked.get(&(header.inode, header.device)).filter(|_| of_several);
        // Let a later entry replace an earlier one of the same name, as cpio does. An earlier directory is an error
        // (EISDIR).
        match rustix::fs::unlinkat(&parent, &name, AtFlags::empty()) {
            Err(rustix::io::Errno::NOENT) => {}
            other => other?,
        }
        if let Some(first) = first {
            let (parent_of_first, name_of_first) = make_parent(root, first)?;
            rustix::fs::linkat(&parent_of_first, &name_of_first, &parent, &name, AtFlags::empty())?;
        }
        match kind {
            FileType::RegularFile => {
                let mut flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                if first.is_none() {
                    flags |= OFlags::CREATE | OFlags::EXCL;
                }
                let mut file = File::from(rustix::fs::openat(&parent, &name, flags, Mode::RUSR | Mode::WUSR)?);
                // In this format, the last entry of a file with several hard links has the content.
                let sum = archive.copy(u64::from(header.size), &mut file, &mut look)?;
                // Check only an entry with content: among the entries of a file with several hard links, no other has
                // the checksum.
                if header.size > 0 && header.sum.is_some_and(|expected| expected != sum) {
                    return Err(invalid(&format!("the content of '{}' does not match its checksum", path.display())));
                }
                if of_several && first.is_none() {
                    linked.insert((header.inode, header.device), path);
                }
            }
            FileType::Symlink => {
                let mut target = vec![0; short(header.size)?];
                archive.read(&mut target)?;
                rustix::fs::symlinkat(OsStr::from_bytes(&target), &parent, &name)?;
            }
            _ => {
                archive.skip(u64::from(header.size))?;
                let device = rustix::fs::makedev(header.represents.0, header.represents.1);
                rustix::fs::mknodat(&parent, &name, kind, Mode::RUSR | Mode::WUSR, device)?;
            }
        }
        archive.align()?;
        set_attributes(&parent, &name, &header)?;
    }
    // Creating entries in a directory changed its times.
    for (path, header) in directories {
        set_attributes(&root.directory_without_links(&path)?, OsStr::new("."), &header)?;
    }
    Ok(())
}

impl<R: Read> Reader<R> {
    /// Header of the next entry; `None` at the end of the input. Skips zeros, which may stand between archives and at
    /// the end.
    fn header(&mut self) -> io::Result<Option<Header>> {
        let mut text = [0; HEADER];
        while text[0] == 0 {
            if self.input.read(&mut text[..1])? == 0 {
                return if self.ended { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
            self.at += 1;
        }
        self.read(&mut text[1..])?;
        if !matches!(&text[..6], b"070701" | b"070702") {
            return Err(invalid("the data after an entry is not an entry"));
        }
        let mut numbers = [0; 13];
        for (number, digits) in numbers.iter_mut().zip(text[6..].chunks_exact(8)) {
            let digits = std::str::from_utf8(digits).ok().filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
            *number = digits
                .and_then(|digits| u32::from_str_radix(digits, 16).ok())
                .ok_or_else(|| invalid("an entry's header is damaged"))?;
        }
        let [inode, mode, user, group, links, modified, size, device, minor, represents, its_minor, name_size, sum] =
            numbers;
        let sum = (&text[..6] == b"070702").then_some(sum);
        let (device, represents) = ((device, minor), (represents, its_minor));
        Ok(Some(Header { inode, mode, user, group, links, modified, size, device, represents, name_size, sum }))
    }

    fn name(&mut self, header: &Header) -> io::Result<Vec<u8>> {
        let mut name = vec![0; short(header.name_size)?];
        self.read(&mut name)?;
        self.align()?;
        let end = name.iter().position(|&b| b == 0).ok_or_else(|| invalid("a name is not terminated"))?;
        // Some programs pad names with NULs.
        if name[end..].iter().any(|&b| b != 0) {
            let shown = String::from_utf8_lossy(&name);
            return Err(invalid(&format!("the name '{}' has a NUL in it", shown.trim_end_matches('\0'))));
        }
        name.truncate(end);
        Ok(name)
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.at += buffer.len() as u64;
        self.input.read_exact(buffer)
    }

    fn align(&mut self) -> io::Result<()> {
        let length = self.at.next_multiple_of(ALIGNED) - self.at;
        (0..length).try_for_each(|_| self.read(&mut [0]))
    }

    fn skip(&mut self, length: u64) -> io::Result<()> {
        let _ = self.copy(length, &mut io::sink(), &mut || Ok(()))?;
        self.align()
    }

    /// Copies the next bytes, and returns their sum modulo 2^32.
    fn copy(
        &mut self,
        mut length: u64,
        to: &mut impl Write,
        look: &mut impl FnMut() -> io::Result<()>,
    ) -> io::Result<u32> {
        let mut sum = 0_u32;
        let mut buffer = vec![0; 1 << 20];
        while length > 0 {
            let piece = length.min(buffer.len() as u64);
            let buffer = &mut buffer[..usize::try_from(piece).unwrap_or_default()];
            self.read(buffer)?;
            to.write_all(buffer)?;
            sum = buffer.iter().fold(sum, |sum, &byte| sum.wrapping_add(byte.into()));
            length -= piece;
            look()?;
        }
        Ok(sum)
    }
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

fn short(length: u32) -> io::Result<usize> {
    if length == 0 || length > LONGEST_NAME {
        return Err(invalid("a name is empty, or longer than any path"));
    }
    usize::try_from(length).map_err(io::Error::other)
}

/// Refuses entries that other programs would read differently. `path` is the result of [`path_of`] for `name`.
fn refuse_malformed(header: &Header, name: &[u8], path: Option<&Path>) -> io::Result<()> {
    let refuse = |why: &str| Err(invalid(&format!("'{}' {why}", String::from_utf8_lossy(name))));
    // -1 is no user ID: chown(2) takes it as "leave the owner", which is root for a new file.
    if header.user == u32::MAX || header.group == u32::MAX {
        return refuse("belongs to the user or group 4294967295, which is not a valid ID");
    }
    if name.is_empty() {
        return Err(invalid("an entry has an empty name"));
    }
    if path.is_none() && FileType::from_raw_mode(header.mode) != FileType::Directory {
        return refuse("is the root of the archive, and not a directory");
    }
    Ok(())
}

/// Path of an entry below the root; `None` for the root itself.
fn path_of(name: &[u8]) -> io::Result<Option<PathBuf>> {
    let mut path = PathBuf::new();
    for component in Path::new(OsStr::from_bytes(name)).components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                let shown = String::from_utf8_lossy(name);
                return Err(invalid(&format!("'{shown}' contains '..'")));
            }
        }
    }
    Ok(Some(path).filter(|path| !path.as_os_str().is_empty()))
}

/// Parent directory of `path`, created if the archive left it out, and the last component.
fn make_parent(root: &Tree, path: &Path) -> io::Result<(Tree, OsString)> {
    let name = path.file_name().unwrap_or_default().to_owned();
    let above = path.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match root.directory_without_links(above) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        other => {
            let refused = |e| io::Error::other(format!("'{}' leads through a link or a file: {e}", path.display()));
            return Ok((other.map_err(refused)?, name));
        }
    }
    let (parent, last) = make_parent(root, above)?;
    rustix::fs::mkdirat(&parent, &last, Mode::from_raw_mode(0o755))?;
    Ok((parent.directory_without_links(&last)?, name))
}

/// Sets owner, mode and time; the owner first, because chown(2) clears the setuid bit.
fn set_attributes(directory: &Tree, name: &OsStr, header: &Header) -> io::Result<()> {
    // `refuse_malformed` has ruled out -1, for which chown(2) would leave root as the owner.
    let (user, group) = (attributes::user(header.user), attributes::group(header.group));
    rustix::fs::chownat(directory, name, user, group, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(header.mode) != FileType::Symlink {
        rustix::fs::chmodat(directory, name, Mode::from_raw_mode(header.mode & 0o7777), AtFlags::empty())?;
    }
    let modified = Timespec { tv_sec: header.modified.into(), tv_nsec: 0 };
    let times = Timestamps { last_access: modified, last_modification: modified };
    Ok(rustix::fs::utimensat(directory, name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fmt::Write as _;

    /// An entry in the format that cpio writes.
    fn entry(name: &str, mode: u32, links: u32, content: &[u8]) -> Vec<u8> {
        let mut header = String::from("070701");
        let numbers = [7, mode, 0, 0, links, 1, u32::try_from(content.len()).unwrap(), 0, 0, 0, 0];
        for number in numbers.into_iter().chain([u32::try_from(name.len()).unwrap() + 1, 0]) {
            let _ = write!(header, "{number:08x}");
        }
        let mut entry = [header.as_bytes(), name.as_bytes(), &[0]].concat();
        entry.resize(entry.len().next_multiple_of(4), 0);
        entry.extend(content);
        entry.resize(entry.len().next_multiple_of(4), 0);
        entry
    }

    const FILE: u32 = 0o100_644;
    const LINK: u32 = 0o120_777;

    fn unpacked(archive: &[u8]) -> (tempfile::TempDir, io::Result<()>) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("root")).unwrap();
        std::fs::create_dir(dir.path().join("outside")).unwrap();
        let root = Tree::open(&dir.path().join("root")).unwrap();
        let result = unpack(archive, &root, || Ok(()));
        assert_eq!(std::fs::read_dir(dir.path().join("outside")).unwrap().count(), 0);
        (dir, result)
    }

    #[test]
    fn nothing_is_written_outside_the_root_of_a_cpio_archive() {
        let trailer = entry("TRAILER!!!", 0, 1, b"");
        for (entries, word) in [
            (vec![entry("../outside/made", FILE, 1, b"hostile")], "contains '..'"),
            (vec![entry("a/../../outside/made", FILE, 1, b"hostile")], "contains '..'"),
            (
                vec![entry("way", LINK, 1, b"../outside"), entry("way/made", FILE, 1, b"hostile")],
                "leads through a link",
            ),
            (
                vec![entry("way", LINK, 1, b".."), entry("way/outside/made", FILE, 1, b"hostile")],
                "leads through a link",
            ),
            (vec![entry("way", LINK, 1, b"../outside"), entry("way", 0o040_755, 1, b"")], ""),
            (vec![entry("a", FILE, 1, b""), entry("a/b", FILE, 1, b"")], "leads through"),
        ] {
            let (_dir, result) = unpacked(&[entries.concat(), trailer.clone()].concat());
            let error = result.unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        // Nothing is written through a link that is replaced, and no attribute of its target changes.
        let entries = [
            entry("way", LINK, 1, b"../outside/made"),
            entry("way", FILE, 1, b"own"),
            entry("/a/b", FILE, 1, b"x"),
            trailer,
        ];
        let (dir, result) = unpacked(&entries.concat());
        result.unwrap();
        assert_eq!(std::fs::read(dir.path().join("root/way")).unwrap(), b"own");
        assert_eq!(std::fs::read(dir.path().join("root/a/b")).unwrap(), b"x");
    }

    #[test]
    fn truncated_or_damaged_cpio_archive_is_refused() {
        let whole =
            [entry("a", FILE, 2, b""), entry("b", FILE, 2, b"content"), entry("TRAILER!!!", 0, 1, b"")].concat();
        unpacked(&whole).1.unwrap();
        unpacked(&[&whole[..], &[0; 512]].concat()).1.unwrap();
        let (dir, result) = unpacked(&whole);
        result.unwrap();
        assert_eq!(std::fs::read(dir.path().join("root/a")).unwrap(), b"content", "one file of two names");
        for length in (0..whole.len() - 4).filter(|length| *length > 0) {
            unpacked(&whole[..length]).1.unwrap_err();
        }
        assert!(unpacked(&[&whole[..], b"something else"].concat()).1.is_err());
        let long = entry(&"a".repeat(5000), FILE, 1, b"");
        assert!(unpacked(&long).1.unwrap_err().to_string().contains("longer than any path"));
    }

    #[test]
    fn malformed_entries_of_a_cpio_archive_are_refused_by_name() {
        let refused = |entry: Vec<u8>, word: &str| {
            let (_dir, result) = unpacked(&[entry, super::tests::entry("TRAILER!!!", 0, 1, b"")].concat());
            let error = result.unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        };
        for owner in [22..30, 30..38] {
            let mut archive = entry("a", FILE, 1, b"");
            archive[owner].fill(b'f');
            refused(archive, "'a' belongs to the user or group 4294967295");
        }
        refused(entry("a\0b", FILE, 1, b""), "has a NUL in it");
        refused(entry("", FILE, 1, b"data"), "an entry has an empty name");
        refused(entry("", 0o040_755, 1, b""), "an entry has an empty name");
        refused(entry(".", FILE, 1, b"data"), "'.' is the root of the archive, and not a directory");
        refused(entry("/", LINK, 1, b"etc"), "'/' is the root of the archive, and not a directory");
    }

    #[test]
    fn content_that_does_not_match_its_checksum_is_refused() {
        let trailer = entry("TRAILER!!!", 0, 1, b"");
        let sum: u32 = b"content".iter().map(|&byte| u32::from(byte)).sum();
        for (told, is_whole) in [(sum, true), (sum + 1, false)] {
            let mut file = entry("a", FILE, 1, b"content");
            file[..6].copy_from_slice(b"070702");
            file[102..110].copy_from_slice(format!("{told:08x}").as_bytes());
            let (_dir, result) = unpacked(&[file, trailer.clone()].concat());
            assert_eq!(result.is_ok(), is_whole, "{result:?}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(at in 0_usize..200, byte: u8) {
            let mut archive = [entry("a/b", FILE, 1, b"content"), entry("l", LINK, 1, b"a"), entry("TRAILER!!!", 0, 1, b"")].concat();
            archive[at] = byte;
            let _ = unpacked(&archive).1;
        }
    }
}
