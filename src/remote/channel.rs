//! A channel between the two sides of a remote job: messages, file data and keepalives over two non-blocking pipes.
//!
//! A message is a line of JSON. Data is a line `@LENGTH`, followed by that many bytes. An empty line is a keepalive.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::OFlags;

use crate::error::{Attempt, Error, Result};
use crate::remote::message::Message;

/// Interval between keepalives.
const BEAT: Duration = Duration::from_secs(1);

/// Maximum length of a line, in bytes. It is large, since an order contains keys and certificates.
const LONGEST_LINE: usize = 4 << 20;

/// Maximum number of data bytes after one line.
const MOST_DATA: usize = 256 << 10;

/// Number of queued bytes at which sending a file pauses until the other side has read some of them.
const ENOUGH: usize = 1 << 20;

/// Maximum number of bytes that one call reads.
const AT_ONCE: usize = 128 << 10;

/// A message or data from the other side.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// A message.
    Message(Message),
    /// Part of a file.
    Data(Vec<u8>),
}

/// Total time for which the other side was silent while this side was listening.
pub(crate) struct Silence {
    length: Duration,
    listened: Instant,
}

impl Silence {
    /// Starts with no silence so far.
    pub(crate) fn begin() -> Self {
        Self { length: Duration::ZERO, listened: Instant::now() }
    }

    /// Adds the time since the last call, but at most [`BEAT`]. If this side was busy or the whole machine was
    /// suspended, this side heard nothing in that time, so it does not count as the other side's silence.
    pub(crate) fn listen(&mut self) {
        self.length += self.listened.elapsed().min(BEAT);
        self.listened = Instant::now();
    }

    /// Resets the silence to zero, since something was heard.
    pub(crate) fn end(&mut self) {
        self.length = Duration::ZERO;
    }

    /// Returns whether the silence has lasted for more than `limit`.
    pub(crate) fn exceeds(&self, limit: Duration) -> bool {
        self.length > limit
    }
}

/// One end of the channel.
pub(crate) struct Channel {
    input: File,
    output: File,
    /// Bytes that were read. The frames in the first `taken` bytes have already been returned.
    inbox: Vec<u8>,
    taken: usize,
    outbox: Vec<u8>,
    silence: Silence,
    /// Time in which neither side has sent anything but keepalives.
    standstill: Silence,
    said: Instant,
    /// Time for which the other side may be silent. If `None`, there is no limit, and this side sends no keepalives.
    patience: Option<Duration>,
    is_over: bool,
}

impl Channel {
    /// Creates a channel from two pipes, which become non-blocking.
    pub(crate) fn new(input: OwnedFd, output: OwnedFd, patience: Option<Duration>) -> Result<Self> {
        for end in [&input, &output] {
            let flags = rustix::fs::fcntl_getfl(end).attempt(|| "read from a pipe")?;
            rustix::fs::fcntl_setfl(end, flags | OFlags::NONBLOCK).attempt(|| "read from a pipe")?;
        }
        Ok(Self {
            input: input.into(),
            output: output.into(),
            inbox: Vec::new(),
            taken: 0,
            outbox: Vec::new(),
            silence: Silence::begin(),
            standstill: Silence::begin(),
            said: Instant::now(),
            patience,
            is_over: false,
        })
    }

    /// Sets the time for which the other side may be silent, counted from now.
    pub(crate) fn set_patience(&mut self, patience: Duration) {
        self.patience = Some(patience);
        self.silence.end();
        self.standstill.end();
    }

    /// Queues a message.
    pub(crate) fn say(&mut self, message: &Message) {
        self.outbox.extend(serde_json::to_vec(message).unwrap_or_default());
        self.outbox.push(b'\n');
    }

    /// Queues file data.
    pub(crate) fn send(&mut self, data: &[u8]) {
        for data in data.chunks(MOST_DATA) {
            self.outbox.extend(format!("@{}\n", data.len()).bytes());
            self.outbox.extend(data);
        }
    }

    /// Returns whether the queue is so long that the caller should add nothing.
    pub(crate) fn is_full(&self) -> bool {
        self.outbox.len() >= ENOUGH
    }

    /// Returns whether everything that was queued has been written.
    pub(crate) fn is_flushed(&self) -> bool {
        self.outbox.is_empty()
    }

    /// Returns whether the other side has closed the channel.
    pub(crate) fn is_over(&self) -> bool {
        self.is_over
    }

    /// Returns the descriptors to poll.
    pub(crate) fn sources(&self) -> [PollFd<'_>; 2] {
        // Leave out descriptors that are not needed: poll(2) reports a closed end again and again, even if no events
        // are requested for it.
        let [read, write] = [!self.is_over, !self.outbox.is_empty()];
        let wish = |is: bool, flags| if is { flags } else { PollFlags::empty() };
        let input = if self.is_over { self.output.as_fd() } else { self.input.as_fd() };
        let output = if write { self.output.as_fd() } else { input };
        [
            PollFd::from_borrowed_fd(input, wish(read, PollFlags::IN)),
            PollFd::from_borrowed_fd(output, if write { PollFlags::OUT } else { wish(read, PollFlags::IN) }),
        ]
    }

    /// Reads and writes as much as is possible without blocking.
    pub(crate) fn turn(&mut self) -> Result<()> {
        self.read().attempt(|| "read from the other side")?;
        if self.patience.is_some() && self.outbox.is_empty() && self.said.elapsed() >= BEAT {
            self.outbox.push(b'\n');
        }
        self.write().attempt(|| "write to the other side")
    }

    fn read(&mut self) -> io::Result<()> {
        self.inbox.drain(..self.taken);
        self.taken = 0;
        self.silence.listen();
        self.standstill.listen();
        let mut bytes = vec![0; AT_ONCE];
        while !self.is_over && self.inbox.len() < LONGEST_LINE + ENOUGH {
            match self.input.read(&mut bytes) {
                Ok(0) => self.is_over = true,
                Ok(length) => {
                    self.silence.end();
                    // Data of newlines alone looks like keepalives, but the line before it does not.
                    if bytes[..length].iter().any(|byte| *byte != b'\n') {
                        self.standstill.end();
                    }
                    self.inbox.extend(&bytes[..length]);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
            // Stop reading, so that the caller can take frames out first.
            if self.inbox.len() >= ENOUGH {
                break;
            }
        }
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        let mut written = 0;
        let is_keepalive = self.outbox == b"\n";
        let result = loop {
            match self.output.write(&self.outbox[written..]) {
                _ if written == self.outbox.len() => break Ok(()),
                Ok(length) => {
                    self.said = Instant::now();
                    if !is_keepalive {
                        self.standstill.end();
                    }
                    written += length;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Ignore the error: frames that the other side sent before it closed the channel may still be unread.
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
                    written = self.outbox.len();
                    break Ok(());
                }
                Err(e) => break Err(e),
            }
        };
        self.outbox.drain(..written);
        result
    }

    /// Returns the next frame, if it has arrived completely.
    pub(crate) fn next(&mut self) -> Result<Option<Frame>> {
        loop {
            let unread = &self.inbox[self.taken..];
            let refused = |why: &str| Err(Error::new("understand the other side").because(why));
            let Some(end) = unread.iter().position(|byte| *byte == b'\n') else {
                return if unread.len() > LONGEST_LINE { refused("a line is too long") } else { Ok(None) };
            };
            let line = &unread[..end];
            if let Some(length) = line.strip_prefix(b"@") {
                let length = std::str::from_utf8(length).ok().and_then(|length| length.parse::<usize>().ok());
                let Some(length) = length.filter(|length| (1..=MOST_DATA).contains(length)) else {
                    return refused("the length of data is wrong");
                };
                let Some(data) = unread.get(end + 1..end + 1 + length) else { return Ok(None) };
                let data = data.to_vec();
                self.taken += end + 1 + length;
                return Ok(Some(Frame::Data(data)));
            }
            let message = if line.is_empty() { None } else { Some(serde_json::from_slice(line)) };
            self.taken += end + 1;
            match message {
                None => {}
                Some(Ok(message)) => return Ok(Some(Frame::Message(message))),
                Some(Err(e)) => return refused(&e.to_string()),
            }
        }
    }

    /// Fails if the other side has closed the channel, or was silent for too long.
    pub(crate) fn check(&self) -> Result<()> {
        let lost = |why: String| Err(Error::new("go on with the job").because(why));
        if self.is_over {
            return lost("the other side has closed the connection".into());
        }
        match self.patience {
            Some(patience) if self.silence.exceeds(patience) => {
                lost(format!("nothing was heard from the other side for {} s", patience.as_secs()))
            }
            _ => Ok(()),
        }
    }

    /// Fails as [`check`](Self::check) does, and if nothing but keepalives has passed for as long as the other side may
    /// be silent. For times in which one side sends a file or owes an answer: keepalives alone would let it wait for ever.
    pub(crate) fn check_progress(&self) -> Result<()> {
        self.check()?;
        match self.patience {
            Some(patience) if self.standstill.exceeds(patience) => {
                let why = format!("nothing but keepalives was heard from the other side for {} s", patience.as_secs());
                Err(Error::new("go on with the job").because(why))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn pair(patience: Option<Duration>) -> [Channel; 2] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        [ours, theirs].map(|end| {
            let input = end.try_clone().unwrap().into();
            Channel::new(input, end.into(), patience).unwrap()
        })
    }

    fn turn(ends: &mut [Channel; 2]) {
        for end in ends {
            end.turn().unwrap();
        }
    }

    #[test]
    fn messages_and_data_arrive_whole_and_in_order() {
        let mut ends = pair(None);
        let data: Vec<u8> = (0..3 << 20).map(|at: u32| at.to_le_bytes()[1]).collect();
        let listening = Message::Listening { port: 22, host_key: "ssh-ed25519 AAAA".into() };
        ends[0].say(&listening);
        ends[0].send(&data);
        // A length of 0 would be refused.
        ends[0].send(&[]);
        ends[0].say(&Message::End);
        let (mut messages, mut arrived) = (Vec::new(), Vec::new());
        while messages.len() < 2 {
            turn(&mut ends);
            while let Some(frame) = ends[1].next().unwrap() {
                match frame {
                    Frame::Message(message) => messages.push(message),
                    Frame::Data(data) => arrived.extend(data),
                }
            }
        }
        assert_eq!(messages, [listening, Message::End]);
        assert!(arrived == data);
    }

    #[test]
    fn line_that_is_no_message_is_refused() {
        for wrong in ["{\"is\":\"order\"}\n", "no JSON\n", "@-1\n", "@0\n", "@262145\n", "@1x\n", "\u{0}\n"] {
            let mut ends = pair(None);
            ends[0].output.write_all(wrong.as_bytes()).unwrap();
            ends[1].turn().unwrap();
            assert!(ends[1].next().is_err(), "{wrong}");
        }
    }

    #[test]
    fn signs_of_life_keep_a_silent_connection_and_silence_or_a_closed_end_loses_it() {
        let mut ends = pair(Some(BEAT * 2));
        let began = Instant::now();
        while began.elapsed() < BEAT * 3 {
            turn(&mut ends);
            assert_eq!(ends[1].next().unwrap(), None);
            ends[1].check().unwrap();
            let mut sources = ends[1].sources();
            let _ = crate::sys::poll::wait(&mut sources, BEAT / 10);
        }
        // From here on, the first end sends nothing, so the second end must report its silence.
        let began = Instant::now();
        let lost = loop {
            ends[1].turn().unwrap();
            if let Err(error) = ends[1].check() {
                break error.to_string();
            }
            let mut sources = ends[1].sources();
            let _ = crate::sys::poll::wait(&mut sources, BEAT / 10);
        };
        assert!(lost.contains("nothing was heard"), "{lost}");
        assert!(began.elapsed() > BEAT, "{:?}", began.elapsed());
        let [mut ours, mut theirs] = ends;
        // Read everything before closing: closing a socket with unread data would reset the connection.
        ours.turn().unwrap();
        drop(ours);
        theirs.turn().unwrap();
        assert!(theirs.check().unwrap_err().to_string().contains("closed the connection"));
    }

    #[test]
    fn keepalives_alone_are_no_progress_but_messages_and_data_in_either_direction_are() {
        let standing = || {
            let mut ends = pair(Some(BEAT * 3));
            for end in &mut ends {
                end.standstill.length = BEAT * 4;
            }
            ends
        };
        let mut ends = standing();
        ends[0].outbox.push(b'\n');
        turn(&mut ends);
        for end in &ends {
            end.check().unwrap();
            assert!(end.check_progress().unwrap_err().to_string().contains("nothing but keepalives"));
        }
        ends[0].say(&Message::Ask);
        turn(&mut ends);
        ends.iter().try_for_each(Channel::check_progress).unwrap();
        let mut ends = standing();
        ends[1].send(b"\n");
        ends[1].turn().unwrap();
        ends[0].turn().unwrap();
        ends.iter().try_for_each(Channel::check_progress).unwrap();
    }

    #[test]
    fn time_in_which_nobody_listened_is_no_silence_of_the_other_side() {
        let mut ends = pair(Some(BEAT * 3));
        ends[1].turn().unwrap();
        // Simulate that the whole machine was suspended: the other side could not send anything either.
        ends[1].silence.listened = Instant::now().checked_sub(BEAT * 60).unwrap();
        ends[1].turn().unwrap();
        ends[1].check().unwrap();
    }
}
