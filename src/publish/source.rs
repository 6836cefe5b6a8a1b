//! What an image is made from: where it lies, and what it is.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{Attempt, Error, Result};
use crate::lifecycle::secrets::without_secrets;

/// Where it lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// At an http or https URL, presigned where it has to be.
    Web(String),
    /// In a store: bucket and key.
    S3(String, String),
    /// On this machine.
    Here(PathBuf),
}

impl Source {
    /// Understands what the command line names.
    pub fn parse(text: &str) -> Result<Self> {
        let refuse =
            |expected: &str| Error::bad_input(format!("SOURCE is '{}': expected {expected}", without_secrets(text)));
        match text.split_once("://") {
            Some(("http" | "https", _)) => Ok(Self::Web(text.to_owned())),
            Some(("s3", rest)) => match rest.split_once('/') {
                Some((bucket, key)) if !bucket.is_empty() && !key.is_empty() => {
                    Ok(Self::S3(bucket.to_owned(), key.to_owned()))
                }
                _ => Err(refuse("s3://BUCKET/KEY")),
            },
            Some(("file", path)) => Ok(Self::Here(path.into())),
            Some(_) => Err(refuse("a URL of http, https, s3 or file, a folder, a squashfs or a tar archive")),
            None if text.is_empty() => Err(refuse("a URL, a folder, a squashfs or a tar archive")),
            None => Ok(Self::Here(text.into())),
        }
    }
}

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A squashfs, whole.
    Squashfs,
    /// A tar archive, with the program that unpacks it first.
    Tar(Option<&'static str>),
}

/// What compressed files begin with.
const COMPRESSED: [(&[u8], &str); 3] =
    [(&[0x1f, 0x8b], "gzip"), (&[0xfd, b'7', b'z', b'X', b'Z', 0], "xz"), (&[0x28, 0xb5, 0x2f, 0xfd], "zstd")];

/// The magic of a squashfs, where its size stands in the superblock, and to what it is padded.
const SQUASHFS: (&[u8], u64, u64) = (b"hsqs", 40, 4096);

/// A tar archive is made of blocks of this size, and ends with two that are empty.
const TAR_BLOCK: usize = 512;

/// Looks at a file. One that is neither, or that is shorter or longer than it says, is refused.
pub fn kind(path: &Path) -> Result<Kind> {
    let attempted = || format!("take {} as an image", path.display());
    let file = File::open(path).attempt(attempted)?;
    let size = file.metadata().attempt(attempted)?.len();
    let mut start = [0; 512];
    let length = read_up_to(&file, &mut start).attempt(attempted)?;
    let start = &start[..length];
    let refuse = |why: String| Err(Error::new(attempted()).because(why));
    if start.starts_with(SQUASHFS.0) {
        let at = usize::try_from(SQUASHFS.1).unwrap_or_default();
        let Some(bytes) = start.get(at..at + 8) else {
            return refuse("it is a squashfs cut off in its first block".into());
        };
        let used = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        return if size < used {
            refuse(format!("it is cut off: {size} bytes of a squashfs of {used}"))
        } else if size > used.next_multiple_of(SQUASHFS.2) {
            refuse(format!("something follows it: {size} bytes, and a squashfs of {used}"))
        } else {
            Ok(Kind::Squashfs)
        };
    }
    if let Some((_, program)) = COMPRESSED.iter().find(|(magic, _)| start.starts_with(magic)) {
        return Ok(Kind::Tar(Some(program)));
    }
    if start.get(257..262) != Some(b"ustar") {
        return refuse(
            "it is neither a squashfs nor a tar archive (plain, or compressed with gzip, xz or zstd)".into(),
        );
    }
    let mut end = [1; 2 * TAR_BLOCK];
    let at = size.saturating_sub(end.len() as u64);
    let whole = size.is_multiple_of(TAR_BLOCK as u64) && file.read_exact_at(&mut end, at).is_ok();
    if !whole || end.iter().any(|&b| b != 0) {
        return refuse("it is a tar archive that is cut off, or that something follows".into());
    }
    Ok(Kind::Tar(None))
}

fn read_up_to(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read_at(&mut buffer[length..], length as u64)? {
            0 => break,
            read => length += read,
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_a_url_or_a_path() {
        assert_eq!(Source::parse("https://h/k?x=1").unwrap(), Source::Web("https://h/k?x=1".into()));
        assert_eq!(Source::parse("s3://b/a/k").unwrap(), Source::S3("b".into(), "a/k".into()));
        assert_eq!(Source::parse("./image").unwrap(), Source::Here("./image".into()));
        for wrong in ["", "ftp://h/k", "s3://bucket", "s3:///key"] {
            assert_eq!(Source::parse(wrong).unwrap_err().exit_code(), 2, "{wrong}");
        }
    }

    #[test]
    fn a_file_is_what_it_says_no_shorter_and_no_longer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let of = |content: &[u8]| {
            std::fs::write(&path, content).unwrap();
            kind(&path).map_err(|e| e.to_string())
        };
        let mut squashfs = b"hsqs".to_vec();
        squashfs.resize(5000, 0);
        squashfs[40..48].copy_from_slice(&4500_u64.to_le_bytes());
        assert_eq!(of(&squashfs).unwrap(), Kind::Squashfs);
        assert!(of(&squashfs[..4499]).unwrap_err().contains("cut off"));
        assert!(of(&squashfs[..20]).unwrap_err().contains("cut off"));
        squashfs.resize(8193, 0);
        assert!(of(&squashfs).unwrap_err().contains("something follows"));
        assert_eq!(of(&[0x1f, 0x8b, 8]).unwrap(), Kind::Tar(Some("gzip")));
        assert_eq!(of(b"\xfd7zXZ\0").unwrap(), Kind::Tar(Some("xz")));
        assert_eq!(of(b"\x28\xb5\x2f\xfd").unwrap(), Kind::Tar(Some("zstd")));
        assert!(of(b"<html>").unwrap_err().contains("neither"));
        assert!(of(b"").unwrap_err().contains("neither"));
        let mut tar = vec![0; 2048];
        tar[257..262].copy_from_slice(b"ustar");
        assert_eq!(of(&tar).unwrap(), Kind::Tar(None));
        assert!(of(&tar[..1024]).is_err(), "without its end");
        tar.extend([7; 512]);
        assert!(of(&tar).unwrap_err().contains("something follows"));
    }
}
