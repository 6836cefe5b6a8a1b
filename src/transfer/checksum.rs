//! Expected and actual checksums of a file.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::sync::mpsc::sync_channel;

use md5::{Digest, Md5};
use reqwest::header::{ETAG, HeaderMap, HeaderName};
use ring::digest;

use crate::error::{Attempt, Result};
use crate::job::variables::{Checked, Reader};
use crate::sys::named::can_be_changed;
use crate::sys::tree::Tree;
use crate::transfer::Work;
use crate::transfer::progress::Progress;

/// Expected checksums of a source, in hexadecimal.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Expected {
    /// `DOWNLOAD_MD5SUM`.
    pub(crate) md5: Option<String>,
    /// `DOWNLOAD_SHA256SUM`.
    pub(crate) sha256: Option<String>,
}

impl Expected {
    /// True if at least one checksum is given.
    pub(crate) fn is_given(&self) -> bool {
        self.md5.is_some() || self.sha256.is_some()
    }

    /// Compares the expected checksums with those of `file`, which messages call `shown`, and returns the verified
    /// file. If another user can change `file`, returns an unnamed copy in `volume`. `volume` may be `None` only if no
    /// other user can.
    pub(crate) fn check(&self, work: &Work, file: File, shown: &str, volume: Option<&Tree>) -> Result<File> {
        let mut sums = Sums::of(self);
        let copy = if can_be_changed(&file).attempt(|| format!("open {shown}"))? { volume } else { None };
        let copy = copy.map(Tree::create_nameless).transpose().attempt(|| format!("copy {shown}"))?;
        read_through(work, &file, shown, |bytes| {
            sums.update(&bytes);
            if let Some(mut copy) = copy.as_ref() {
                copy.write_all(&bytes).attempt(|| format!("copy {shown}"))?;
            }
            Ok(bytes)
        })?;
        sums.check(self).attempt(|| format!("use {shown}"))?;
        Ok(copy.unwrap_or(file))
    }
}

/// Checksums of the bytes read so far.
pub(crate) struct Sums {
    md5: Option<Md5>,
    sha256: Option<digest::Context>,
}

impl Sums {
    /// Starts the checksums that are expected.
    pub(crate) fn of(expected: &Expected) -> Self {
        Self {
            md5: expected.md5.as_ref().map(|_| Md5::new()),
            sha256: expected.sha256.as_ref().map(|_| digest::Context::new(&digest::SHA256)),
        }
    }

    /// Starts the MD5 too, because the server may announce one.
    pub(crate) fn with_md5(expected: &Expected) -> Self {
        Self { md5: Some(Md5::new()), ..Self::of(expected) }
    }

    /// Adds more bytes.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        if let Some(md5) = &mut self.md5 {
            md5.update(bytes);
        }
        if let Some(sha256) = &mut self.sha256 {
            sha256.update(bytes);
        }
    }

    /// Starts over.
    pub(crate) fn reset(&mut self) {
        if let Some(md5) = &mut self.md5 {
            md5.reset();
        }
        if let Some(sha256) = &mut self.sha256 {
            *sha256 = digest::Context::new(&digest::SHA256);
        }
    }

    /// Compares the checksums with the expected ones; the error names one that differs.
    pub(crate) fn check(&self, expected: &Expected) -> std::result::Result<(), String> {
        let md5 = self.md5.clone().map(|sum| format!("{:x}", sum.finalize()));
        let sha256 = self.sha256.clone().map(|sum| hex(sum.finish().as_ref()));
        for (kind, sum, expected) in [("MD5", md5, &expected.md5), ("SHA-256", sha256, &expected.sha256)] {
            if let (Some(sum), Some(expected)) = (sum, expected)
                && !expected.eq_ignore_ascii_case(&sum)
            {
                return Err(format!("its {kind} is {sum}, expected {expected}"));
            }
        }
        Ok(())
    }
}

/// SHA-256 of `text`, in hexadecimal.
pub(crate) fn sha256_of(text: &[u8]) -> String {
    hex(digest::digest(&digest::SHA256, text).as_ref())
}

/// The bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Maximum number of pieces of a file that are in use at a time.
const PIECES: usize = 6;
/// Size of a piece in bytes, small enough to stay in a processor's cache.
const PIECE: usize = 256 << 10;

/// Checksums of a file.
#[derive(Debug)]
pub(crate) struct OfFile {
    /// MD5, in hexadecimal digits.
    pub(crate) md5: String,
    /// SHA-256, in hexadecimal digits.
    pub(crate) sha256: String,
    /// SHA-256 of each part of the file, if it was divided.
    pub(crate) parts: Vec<Sha256>,
}

/// A SHA-256.
pub(crate) type Sha256 = [u8; digest::SHA256_OUTPUT_LEN];

/// Checksums of a file, which is read once from its start; also those of its parts, if their length in bytes is given.
/// SHA-256 and MD5 are computed on two threads.
pub(crate) fn sums_of(work: &Work, file: &File, what: &str, part: Option<u64>) -> Result<OfFile> {
    std::thread::scope(|scope| {
        // Pieces go to the other thread, and come back to be filled again. There are so few that neither thread ever
        // waits for room in a channel.
        let [(free, unused), (to_sha256, pieces)] = std::array::from_fn(|_| sync_channel::<Vec<u8>>(PIECES));
        let sha256 = scope.spawn(move || {
            let (mut whole, mut parts) = (digest::Context::new(&digest::SHA256), part.map(OfParts::new));
            for piece in pieces {
                whole.update(&piece);
                if let Some(parts) = &mut parts {
                    parts.update(&piece);
                }
                // If reading has failed, nobody takes the piece any more.
                let _ = free.send(piece);
            }
            (hex(whole.finish().as_ref()), parts.map(OfParts::finish).unwrap_or_default())
        });
        let (mut md5, mut made) = (Md5::new(), 1);
        read_through(work, file, what, |piece| {
            md5.update(&piece);
            to_sha256.send(piece).attempt(|| format!("compute the SHA-256 of {what}"))?;
            if made < PIECES {
                made += 1;
                return Ok(Vec::new());
            }
            unused.recv().attempt(|| format!("compute the SHA-256 of {what}"))
        })?;
        drop(to_sha256);
        let (sha256, parts) = sha256.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok(OfFile { md5: format!("{:x}", md5.finalize()), sha256, parts })
    })
}

/// SHA-256 of a file, in hexadecimal digits.
pub(crate) fn sha256_of_file(work: &Work, file: &File, what: &str) -> Result<String> {
    let mut sum = digest::Context::new(&digest::SHA256);
    read_through(work, file, what, |piece| {
        sum.update(&piece);
        Ok(piece)
    })?;
    Ok(hex(sum.finish().as_ref()))
}

/// Computes the SHA-256 of each part of the bytes passed so far.
struct OfParts {
    /// Length of a part in bytes.
    length: u64,
    /// Bytes that the current part still lacks.
    left: u64,
    current: digest::Context,
    done: Vec<Sha256>,
}

impl OfParts {
    fn new(length: u64) -> Self {
        Self { length, left: length, current: digest::Context::new(&digest::SHA256), done: Vec::new() }
    }

    fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, later) =
                bytes.split_at(usize::try_from(self.left).map_or(bytes.len(), |left| left.min(bytes.len())));
            self.current.update(now);
            self.left -= now.len() as u64;
            if self.left == 0 {
                self.end();
            }
            bytes = later;
        }
    }

    fn end(&mut self) {
        let ended = std::mem::replace(&mut self.current, digest::Context::new(&digest::SHA256));
        let mut sum = Sha256::default();
        sum.copy_from_slice(ended.finish().as_ref());
        self.done.push(sum);
        self.left = self.length;
    }

    fn finish(mut self) -> Vec<Sha256> {
        if self.left < self.length {
            self.end();
        }
        self.done
    }
}

/// Reads a file in pieces, and passes each piece to `each`, which returns a buffer for the next one.
fn read_through(
    work: &Work,
    mut file: &File,
    what: &str,
    mut each: impl FnMut(Vec<u8>) -> Result<Vec<u8>>,
) -> Result<()> {
    let attempted = || format!("read {what}");
    let mut buffer = Vec::new();
    let mut progress = Progress::begin(format!("checksum of {what}"), file.metadata().ok().map(|m| m.len()));
    file.rewind().attempt(attempted)?;
    loop {
        buffer.resize(PIECE, 0);
        let length = file.read(&mut buffer).attempt(attempted)?;
        if length == 0 {
            return Ok(());
        }
        buffer.truncate(length);
        buffer = each(buffer)?;
        progress.add(length as u64);
        work.heed()?;
    }
}

/// Checks a SHA-256 in hexadecimal; returns it in lower case.
pub fn sha256(sum: &str) -> Checked {
    hexadecimal(sum, 64)
}

fn hexadecimal(sum: &str, digits: usize) -> Checked {
    let sum = sum.to_ascii_lowercase();
    if sum.len() != digits || !sum.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(format!("expected {digits} hexadecimal digits"));
    }
    Ok(sum)
}

/// Value of a variable that holds a checksum of `digits` hexadecimal digits.
pub(crate) fn checksum(reader: &mut Reader, variable: &str, digits: usize) -> Option<String> {
    let sum = reader.text(variable)?;
    reader.check(variable, &sum, |sum| hexadecimal(sum, digits))
}

/// Text of a header; `None` if it is missing or not ASCII.
pub(crate) fn text_of<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// True for an ETag that may stay the same when the bytes change (RFC 9110, 8.8.1).
pub(crate) fn is_weak(etag: &str) -> bool {
    etag.starts_with("W/")
}

/// True if an ETag, without quotes, looks like an MD5.
pub(crate) fn looks_like_md5(etag: &str) -> bool {
    etag.len() == 32 && etag.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Returns whether the ETag of a response is the MD5 of its content: it looks like one, and no header says otherwise.
pub(crate) fn etag_is_md5(headers: &HeaderMap) -> bool {
    let etag = text_of(headers, ETAG.as_str()).filter(|etag| !is_weak(etag)).unwrap_or_default().trim_matches('"');
    looks_like_md5(etag) && etag_can_be_md5(headers)
}

/// Returns whether the ETag may be the MD5 of the content: no header says otherwise.
pub(crate) fn etag_can_be_md5(headers: &HeaderMap) -> bool {
    let mut names = headers.keys().map(HeaderName::as_str);
    // These headers mark objects that are encrypted with keys of a client or a key service (SSE-C, SSE-KMS), and
    // Swift's large objects, which consist of several objects.
    let other = ["x-amz-server-side-encryption", "x-static-large-object", "x-object-manifest"];
    !names.any(|name| other.iter().any(|other| name.starts_with(other)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::network::Network;
    use std::time::Duration;

    #[test]
    fn sums_are_those_of_the_file_and_of_its_parts() {
        let limit = Duration::from_mins(1);
        let network = Network { ca: None, stall_limit: limit, retry_limit: limit, is_shortened: false };
        let work = Work::begin(&network).unwrap();
        // No part, fewer parts than are hashed in parallel, as many, and more; the last part is shorter or not.
        for (size, length) in [(0, 100), (1, 100), (300, 100), (400, 100), (1950, 100), (1_500_000, 150_001)] {
            let content: Vec<u8> = (0..size).map(|at: u32| (at / 3 * 7 + at / 251).to_le_bytes()[0]).collect();
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&content).unwrap();
            let sha256 = |bytes: &[u8]| hex(digest::digest(&digest::SHA256, bytes).as_ref());
            for part in [Some(length as u64), None] {
                let found = sums_of(&work, &file, "it", part).unwrap();
                assert_eq!((found.md5, found.sha256), (format!("{:x}", Md5::digest(&content)), sha256(&content)));
                let parts: Vec<_> = content.chunks(length).filter(|_| part.is_some()).map(sha256).collect();
                let shown = format!("{size} bytes in parts of {length}");
                assert_eq!(found.parts.iter().map(|sum| hex(sum)).collect::<Vec<_>>(), parts, "{shown}");
            }
        }
    }

    #[test]
    fn only_an_etag_that_can_be_an_md5_is_used_as_one() {
        let sum = "\"d41d8cd98f00b204e9800998ecf8427e\"";
        let of = |headers: &[(&'static str, &'static str)]| {
            let pairs = headers.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()));
            etag_is_md5(&pairs.collect())
        };
        assert!(of(&[("etag", sum)]));
        assert!(of(&[("etag", "D41D8CD98F00B204E9800998ECF8427E")]), "as Swift writes it, without quotes");
        for etag in ["W/\"d41d8cd98f00b204e9800998ecf8427e\"", "\"d41d8cd98f00b204e9800998ecf8427e-2\"", "\"x\"", ""] {
            assert!(!of(&[("etag", etag)]), "{etag}");
        }
        for (name, value) in [
            ("x-static-large-object", "True"),
            ("x-object-manifest", "container/prefix"),
            ("x-amz-server-side-encryption", "aws:kms"),
            ("x-amz-server-side-encryption", "aws:kms:dsse"),
            ("x-amz-server-side-encryption-customer-algorithm", "AES256"),
        ] {
            assert!(!of(&[("etag", sum), (name, value)]), "{name}: {value}");
        }
        assert!(!of(&[]));
    }
}
