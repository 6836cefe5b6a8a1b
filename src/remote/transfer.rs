//! Sends files over a channel: first the length, then the content, then the digest. The receiver accepts a file only if
//! length and digest match.

use std::fs::File;
use std::io::{Read, Seek, Write};

use ring::digest::{Context, SHA256};

use crate::error::{Attempt, Error, Result};
use crate::remote::channel::Channel;
use crate::remote::message::{Message, Part};
use crate::transfer::checksum::hex;

/// Maximum number of bytes of a file in one read.
const CHUNK: usize = 256 << 10;

/// A file that is being sent.
pub(crate) struct Sending {
    file: File,
    left: u64,
    digest: Context,
    is_queued: bool,
}

impl Sending {
    /// Begins to send `file`, whose offset must be 0, by announcing its length.
    pub(crate) fn begin(channel: &mut Channel, part: Part, file: File) -> Result<Self> {
        let left = file.metadata().attempt(|| format!("read the length of the {}", part.name()))?.len();
        channel.say(&Message::File { part, size: left });
        Ok(Self { file, left, digest: Context::new(&SHA256), is_queued: false })
    }

    /// Sends as much as the other side accepts now. Returns whether everything has left the queue.
    pub(crate) fn go_on(&mut self, channel: &mut Channel) -> Result<bool> {
        let mut bytes = vec![0; CHUNK];
        while self.left > 0 && !channel.is_full() {
            let most = usize::try_from(self.left).unwrap_or(CHUNK).min(CHUNK);
            let length = self.file.read(&mut bytes[..most]).attempt(|| "read a file that is sent")?;
            if length == 0 {
                return Err(Error::new("send a file").because("it became shorter meanwhile"));
            }
            self.digest.update(&bytes[..length]);
            channel.send(&bytes[..length]);
            self.left -= length as u64;
        }
        if self.left > 0 {
            return Ok(false);
        }
        if !self.is_queued {
            channel.say(&Message::Sum { sha256: hex(self.digest.clone().finish().as_ref()) });
            self.is_queued = true;
        }
        Ok(channel.is_flushed())
    }
}

/// A file that is being received.
pub(crate) struct Receiving {
    /// The file's role in the job.
    pub(crate) part: Part,
    file: File,
    left: u64,
    digest: Context,
}

impl Receiving {
    /// Begins to receive `size` bytes into the empty `file`. Fails if the file system has no room for them.
    pub(crate) fn begin(part: Part, size: u64, file: File) -> Result<Self> {
        check_room(part, size, &file)?;
        Ok(Self { part, file, left: size, digest: Context::new(&SHA256) })
    }

    /// Writes received data to the file.
    pub(crate) fn take(&mut self, data: &[u8]) -> Result<()> {
        self.count(data)?;
        self.file.write_all(data).attempt(|| receiving(self.part))
    }

    fn count(&mut self, data: &[u8]) -> Result<()> {
        let Some(left) = self.left.checked_sub(data.len() as u64) else {
            return Err(Error::new(receiving(self.part)).because("it is longer than announced"));
        };
        self.digest.update(data);
        self.left = left;
        Ok(())
    }

    /// Checks the length and the digest. The file is not synced to disk.
    pub(crate) fn finish(self, sha256: &str) -> Result<(Part, File)> {
        let refused = |why: &str| Err(Error::new(receiving(self.part)).because(why));
        if self.left > 0 {
            return refused("it was cut off");
        }
        if hex(self.digest.finish().as_ref()) != sha256 {
            return refused("it was altered on the way: its SHA-256 differs");
        }
        Ok((self.part, self.file))
    }
}

/// Fails if the file system of `file` has no room for `size` more bytes.
pub(crate) fn check_room(part: Part, size: u64, file: &File) -> Result<()> {
    let room = rustix::fs::fstatvfs(file).attempt(|| receiving(part))?;
    let free = room.f_bavail.saturating_mul(room.f_frsize);
    if room.f_blocks > 0 && size > free {
        let why = format!("it has {size} bytes, and {free} are free");
        return Err(Error::new(receiving(part)).because(why).advise("free space there"));
    }
    Ok(())
}

/// Checks the length and digest of a file that another program has received.
pub(crate) fn check_whole(part: Part, file: &File, size: u64, sha256: &str) -> Result<()> {
    let attempted = || receiving(part);
    let mut copy = file.try_clone().attempt(attempted)?;
    copy.rewind().attempt(attempted)?;
    let mut received = Receiving { part, file: copy, left: size, digest: Context::new(&SHA256) };
    let mut bytes = vec![0; CHUNK];
    loop {
        match received.file.read(&mut bytes).attempt(attempted)? {
            0 => {
                let (_, file) = received.finish(sha256)?;
                return file.sync_all().attempt(attempted);
            }
            length => received.count(&bytes[..length])?,
        }
    }
}

pub(super) fn receiving(part: Part) -> String {
    format!("receive the {}", part.name())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ring::digest::digest;

    fn receive(announced: u64, data: &[&[u8]], sum: &[u8]) -> Result<Part> {
        let mut receiving = Receiving::begin(Part::Image, announced, tempfile::tempfile().unwrap())?;
        data.iter().try_for_each(|data| receiving.take(data))?;
        receiving.finish(&hex(digest(&SHA256, sum).as_ref())).map(|(part, _)| part)
    }

    #[test]
    fn file_is_accepted_only_with_its_length_and_digest() {
        assert_eq!(receive(6, &[b"abc", b"def"], b"abcdef").unwrap(), Part::Image);
        assert_eq!(receive(0, &[], b"").unwrap(), Part::Image);
        for (announced, data, sum, why) in [
            (7, "abcdef", "abcdef", "it was cut off"),
            (5, "abcdef", "abcdef", "longer than announced"),
            (6, "abcdeg", "abcdef", "altered on the way"),
            (u64::MAX, "", "", "are free"),
        ] {
            let refused = receive(announced, &[data.as_bytes()], sum.as_bytes()).unwrap_err().to_string();
            assert!(refused.contains(why), "{refused}");
        }
    }
}
