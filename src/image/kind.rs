//! Type of an image's source, which is a file or a directory, opened once.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{FileType, SeekFrom};

use crate::error::{Attempt, Error, Result};
use crate::image::tar::{BLOCK as TAR_BLOCK, first_data, read_up_to};
use crate::sys::file_kind::FileKind;
use crate::sys::named;
use crate::sys::signals::unblock_signals;
use crate::sys::tree::Tree;
use crate::transfer::confinement::clear_environment;

/// A source on this machine, opened once, so that exactly the checked file is unpacked, even if another file gets its
/// name in the meantime.
#[derive(Debug)]
pub(crate) struct Opened {
    /// Path, for messages.
    pub(crate) shown: PathBuf,
    /// The open file or directory.
    pub(crate) content: Content,
}

/// Type of a source.
#[derive(Debug)]
pub(crate) enum Content {
    /// An archive or a squashfs.
    File(File),
    /// A directory tree, or a saved container image.
    Directory(Tree),
}

impl Opened {
    /// Opens `path`, through links that no other user can change. The type is checked before the file is opened for
    /// reading: opening a fifo or a device can block forever or have side effects.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let attempted = || format!("open {}", path.display());
        let handle = named::open(path).attempt(attempted)?;
        let found = rustix::fs::fstat(&handle).attempt(attempted)?;
        let place = format!("/proc/self/fd/{}", handle.as_raw_fd());
        let shown = std::fs::read_link(&place).attempt(attempted)?;
        let content = match FileType::from_raw_mode(found.st_mode) {
            FileType::Directory => Content::Directory(Tree::from_fd(handle)),
            FileType::RegularFile => Content::File(named::reopen(&handle).attempt(attempted)?),
            _ => {
                let why = format!("it is {}", FileKind::of(&found));
                return Err(Error::new(attempted()).because(why).advise("name a regular file or a directory"));
            }
        };
        Ok(Self { shown, content })
    }

    /// The regular file; `None` for a directory.
    pub(crate) fn file(&self) -> Option<&File> {
        match &self.content {
            Content::File(file) => Some(file),
            Content::Directory(_) => None,
        }
    }

    /// The regular file; a directory is an error.
    pub(crate) fn into_file(self) -> Result<File> {
        match self.content {
            Content::File(file) => Ok(file),
            Content::Directory(_) => {
                Err(Error::new(format!("open {}", self.shown.display())).because("it is a directory"))
            }
        }
    }

    /// Type of the file; `None` for a directory. Refuses unknown types, and files that are shorter or longer than their
    /// header says.
    pub(crate) fn kind(&self) -> Result<Option<Kind>> {
        self.file().map(|file| kind_of_file(file, &self.shown.display().to_string(), u64::MAX)).transpose()
    }

    /// Size in bytes; 0 for a directory.
    pub(crate) fn size(&self) -> u64 {
        self.file().and_then(|file| file.metadata().ok()).map_or(0, |found| found.len())
    }
}

impl AsFd for Opened {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.content {
            Content::File(file) => file.as_fd(),
            Content::Directory(tree) => tree.as_fd(),
        }
    }
}

/// Type of an image that is a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A complete squashfs.
    Squashfs,
    /// A tar archive, with the program that decompresses it; `None` if it is not compressed.
    Tar(Option<&'static str>),
    /// A cpio archive of the format `newc`, with the program that decompresses it; `None` if it is not compressed.
    Cpio(Option<&'static str>),
}

/// Magic numbers of compressed files, with the programs that decompress them.
const COMPRESSED: [(&[u8], &str); 4] = [
    (&[0x1f, 0x8b], "gzip"),
    (b"BZh", "bzip2"),
    (&[0xfd, b'7', b'z', b'X', b'Z', 0], "xz"),
    (&[0x28, 0xb5, 0x2f, 0xfd], "zstd"),
];

/// Magic number of a squashfs, and the offset of the image's size in the superblock.
const SQUASHFS: (&[u8], usize) = (b"hsqs", 40);

/// Offset of the compression in the superblock (squashfs_fs.h).
const SQUASHFS_COMPRESSION: usize = 20;

/// Offset of the flags in the superblock.
const SQUASHFS_FLAGS: usize = 24;

/// Flag in the superblock for uncompressed data.
const SQUASHFS_PLAIN_DATA: u16 = 1 << 1;

/// Magic numbers of cpio entries in the format `newc`, without and with checksums.
const CPIO: [&[u8]; 2] = [b"070701", b"070702"];

/// Magic numbers of older cpio formats, whose files are limited to 2 or 8 GiB: `odc`, and binary in both byte orders.
const OLD_CPIO: [&[u8]; 3] = [b"070707", b"\xc7\x71", b"\x71\xc7"];

/// Detects the type of the open file that messages call `shown`. A squashfs may be followed by up to `padding` zero
/// bytes. See [`Opened::kind`].
pub(crate) fn kind_of_file(file: &File, shown: &str, padding: u64) -> Result<Kind> {
    let attempted = || format!("use {shown} as an image");
    let size = file.metadata().attempt(attempted)?.len();
    let start = read_up_to(file, 0, TAR_BLOCK).attempt(attempted)?;
    let refuse = |why: String| Err(Error::new(attempted()).because(why));
    if start.starts_with(SQUASHFS.0) {
        let Some(bytes) = start.get(SQUASHFS.1..SQUASHFS.1 + 8) else {
            return refuse("it is a squashfs cut off in its first block".into());
        };
        let used = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        return if size < used {
            refuse(format!("it is cut off: the file has {size} bytes, its squashfs {used}"))
        } else if size - used > padding || !is_zero(file, used, size).attempt(attempted)? {
            // Only zeros may follow a squashfs, which is padded to the blocks of a device or tape.
            refuse(format!("something follows it: the file has {size} bytes, its squashfs {used}"))
        } else {
            Ok(Kind::Squashfs)
        };
    }
    if let Some((_, program)) = COMPRESSED.iter().find(|(magic, _)| start.starts_with(magic)) {
        let content = uncompressed(file, program).attempt(|| format!("{} with {program}", attempted()))?;
        return match archive(&content) {
            Some(Archive::Tar) => Ok(Kind::Tar(Some(program))),
            Some(Archive::Cpio) => Ok(Kind::Cpio(Some(program))),
            None => refuse(format!("its content, compressed with {program}, is {}", unknown(&content))),
        };
    }
    match archive(&start) {
        Some(Archive::Cpio) => return Ok(Kind::Cpio(None)),
        Some(Archive::Tar) => {}
        None => return refuse(format!("it is {}", unknown(&start))),
    }
    // This checks only the end of the file. An earlier end mark is found when the members are checked.
    let mut end = [1; 2 * TAR_BLOCK];
    let at = size.saturating_sub(end.len() as u64);
    if file.read_exact_at(&mut end, at).is_err() || end.iter().any(|&b| b != 0) {
        return refuse("it is a tar archive that is cut off, or something follows it".into());
    }
    Ok(Kind::Tar(None))
}

/// Compression of the squashfs at `path`, as a value of `IMAGE_COMPRESSION`; `None` for other compressions and other
/// files.
pub(crate) fn compression(path: &Path) -> Option<&'static str> {
    let start = read_up_to(&named::open_file(path).ok()?, 0, TAR_BLOCK).ok()?;
    let number = |at: usize| Some(u16::from_le_bytes(start.get(at..at + 2)?.try_into().ok()?));
    let (algorithm, flags) = (number(SQUASHFS_COMPRESSION)?, number(SQUASHFS_FLAGS)?);
    match algorithm {
        _ if !start.starts_with(SQUASHFS.0) => None,
        _ if flags & SQUASHFS_PLAIN_DATA != 0 => Some("none"),
        1 => Some("gzip"),
        4 => Some("xz"),
        6 => Some("zstd"),
        _ => None,
    }
}

/// True if the file is an uncompressed tar archive without members; such an archive is all zeros.
pub(crate) fn is_empty_tar(file: &File) -> io::Result<bool> {
    let size = file.metadata()?.len();
    is_zero(file, 0, size)
}

enum Archive {
    Tar,
    Cpio,
}

fn archive(start: &[u8]) -> Option<Archive> {
    if start.get(257..262) == Some(b"ustar") {
        return Some(Archive::Tar);
    }
    CPIO.iter().any(|magic| start.starts_with(magic)).then_some(Archive::Cpio)
}

fn unknown(start: &[u8]) -> &'static str {
    if OLD_CPIO.iter().any(|magic| start.starts_with(magic)) {
        "a cpio archive of an old format; make it with 'cpio -o -H newc'"
    } else if start.starts_with(SQUASHFS.0) {
        "a squashfs, which is compressed itself; unpack the file first"
    } else {
        "neither a squashfs nor an archive of tar or cpio (plain, or compressed with gzip, bzip2, xz or zstd)"
    }
}

/// First block of a compressed file, decompressed; shorter if the file is damaged.
fn uncompressed(file: &File, program: &str) -> io::Result<Vec<u8>> {
    let mut command = Command::new(program);
    rustix::fs::seek(file, SeekFrom::Start(0))?;
    command.arg("-dc").stdin(file.try_clone()?).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = unblock_signals(clear_environment(&mut command)).spawn()?;
    let mut start = Vec::new();
    if let Some(out) = child.stdout.take() {
        out.take(TAR_BLOCK as u64).read_to_end(&mut start)?;
    }
    let _ = child.kill();
    child.wait()?;
    Ok(start)
}

/// True if all bytes of a file of `size` bytes from offset `at` on are zero.
fn is_zero(file: &File, at: u64, size: u64) -> io::Result<bool> {
    first_data(file, at, size).map(|found| found.is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_type_is_detected_and_truncated_or_trailing_data_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let of = |content: &[u8]| {
            std::fs::write(&path, content).unwrap();
            Opened::open(&path).unwrap().kind().map(Option::unwrap).map_err(|e| e.to_string())
        };
        let mut squashfs = b"hsqs".to_vec();
        squashfs.resize(5000, 0);
        squashfs[40..48].copy_from_slice(&4500_u64.to_le_bytes());
        assert_eq!(of(&squashfs).unwrap(), Kind::Squashfs);
        assert!(of(&squashfs[..4499]).unwrap_err().contains("cut off"));
        assert!(of(&squashfs[..20]).unwrap_err().contains("cut off"));
        squashfs.resize(3 << 20, 0);
        assert_eq!(of(&squashfs).unwrap(), Kind::Squashfs, "with zeros after it");
        squashfs.push(1);
        assert!(of(&squashfs).unwrap_err().contains("something follows"));
        // The 8 TiB hole must be skipped and not read.
        of(&squashfs[..3 << 20]).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(1 << 43).unwrap();
        assert_eq!(Opened::open(&path).unwrap().kind().unwrap(), Some(Kind::Squashfs));
        assert!(of(b"<html>").unwrap_err().contains("neither"));
        assert!(of(b"").unwrap_err().contains("neither"));
        let mut tar = vec![0; 2048];
        tar[257..262].copy_from_slice(b"ustar");
        assert_eq!(of(&tar).unwrap(), Kind::Tar(None));
        assert!(of(&tar[..1024]).is_err(), "without its end");
        let cpio = [&b"070701"[..], &[b'0'; 104]].concat();
        assert_eq!(of(&cpio).unwrap(), Kind::Cpio(None));
        assert!(of(b"070707000000").unwrap_err().contains("cpio -o -H newc"));
        for program in ["gzip", "bzip2", "xz", "zstd"] {
            let packed = |content: &[u8]| {
                std::fs::write(&path, content).unwrap();
                Command::new(program).arg("-c").stdin(File::open(&path).unwrap()).output().unwrap().stdout
            };
            assert_eq!(of(&packed(&tar)).unwrap(), Kind::Tar(Some(program)));
            assert_eq!(of(&packed(&cpio)).unwrap(), Kind::Cpio(Some(program)));
            assert!(of(&packed(&squashfs)).unwrap_err().contains("unpack the file first"));
            assert!(of(&packed(b"a text")).unwrap_err().contains("neither"));
            assert!(of(&packed(&tar)[..8]).unwrap_err().contains("neither"), "cut off in its first block");
        }
        tar.extend([7; 512]);
        assert!(of(&tar).unwrap_err().contains("something follows"));
    }
}
