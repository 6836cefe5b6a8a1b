//! The near side's access to this program on a node: the connection, the process there, the channel to that process,
//! and the files that it sends back.

use std::fs::File;
use std::io::PipeReader;
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::error::{Attempt, Error, Result};
use crate::printable::Printable;
use crate::remote::channel::{Channel, Frame};
use crate::remote::connection::{Connection, Destination, Heed};
use crate::remote::far::{cannot_go_on, part_name};
use crate::remote::message::{Hello, Message, Order, Part, is_of_log};
use crate::remote::provision;
use crate::remote::transfer::{Receiving, receiving};
use crate::sys::poll;
use crate::sys::tree::Tree;
use crate::volume::signal_files::LOOK_EVERY;

/// Time that the node gets to remove everything at the end. If it takes longer, its part ends by its own silence
/// timeout.
const TIME_TO_CLEAR: Duration = Duration::from_secs(20);

/// This program, running on a node. The node's part of the job ends when this value is dropped.
pub(super) struct Program {
    pub(super) connection: Connection,
    pub(super) channel: Channel,
    process: Child,
}

impl Program {
    /// Connects, starts this program on the node, and sends it the order. Fails if the node refuses the order. `state`
    /// is a private directory.
    pub(super) fn start(to: &Destination, order: Order, state: &Path, heed: Heed<'_>) -> Result<Self> {
        let began = Instant::now();
        let silence = Duration::from_secs(order.patience);
        let connection = Connection::open(to, state, silence, heed)?;
        let path = provision::provide(&connection, heed)?;
        let attempted = || format!("start ims-sshd on the build node {}", connection.host());
        // Pass on the variables for the log, since ssh brings the node's log to this side.
        let log = order.task.variables().iter().filter(|(name, _)| is_of_log(name));
        let log: Vec<_> = log.map(|(name, value)| format!("{name}={value}")).collect();
        let words = ["env"].into_iter().chain(log.iter().map(String::as_str)).chain([path.as_str(), "node"]);
        let mut command = connection.command(&words.collect::<Vec<_>>());
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = connection.spawn(command).attempt(attempted)?;
        let pipes = process.stdout.take().zip(process.stdin.take());
        let (output, input) = pipes.ok_or_else(|| Error::new(attempted()).because("ssh has no pipes"))?;
        let mut channel = Channel::new(output.into(), input.into(), Some(silence))?;
        channel.say(&Message::Order(Box::new(order)));
        let mut program = Self { connection, channel, process };
        let hello = program.hello(heed)?;
        tracing::info!(
            milliseconds = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
            "the build node {} is able: Linux {}, {} MB free",
            program.connection.host(),
            Printable(&hello.kernel),
            hello.free / 1_000_000
        );
        Ok(program)
    }

    /// Waits for the node's first message. Fails if the job cannot run on the node.
    fn hello(&mut self, heed: Heed<'_>) -> Result<Hello> {
        let attempted = format!("use the build node {}", self.connection.host());
        let attempted = || attempted.clone();
        loop {
            self.channel.turn()?;
            match self.next()? {
                Some(Frame::Message(Message::Hello(hello))) if hello.refusals.is_empty() => return Ok(hello),
                Some(Frame::Message(Message::Hello(hello))) => {
                    return Err(Error::new(attempted()).because(hello.refusals.join("; ")));
                }
                Some(Frame::Message(Message::Failed { why })) => return Err(Error::new(attempted()).because(why)),
                Some(_) => return Err(Error::new(attempted()).because("it does not say what it is")),
                None => self.channel.check_progress().map_err(|e| Error::new(attempted()).because(e.reason()))?,
            }
            heed()?;
            let _ = poll::wait(&mut self.channel.sources(), LOOK_EVERY / 10);
        }
    }

    /// Returns the next frame, if it has arrived completely.
    pub(super) fn next(&mut self) -> Result<Option<Frame>> {
        self.channel.next().map_err(|e| self.refused(e.reason()))
    }

    /// Fails if the connection is lost or, at a time at which the job `must_progress`, if nothing but keepalives passes.
    /// The error includes the output of ssh.
    pub(super) fn check(&self, must_progress: bool) -> Result<()> {
        let checked = if must_progress { self.channel.check_progress() } else { self.channel.check() };
        checked.map_err(|e| {
            let said = self.connection.last_words();
            let error = self.refused(e.reason());
            if said.is_empty() { error } else { error.advise(said) }
        })
    }

    /// Returns the error of a job that cannot continue.
    pub(super) fn refused(&self, why: impl std::fmt::Display) -> Error {
        cannot_go_on(self.connection.host(), why)
    }

    /// Returns the error of a job whose node has sent `message` when it was not allowed to.
    pub(super) fn out_of_order(&self, message: &Message) -> Error {
        self.refused(format!("it has sent '{}' out of order", message.kind()))
    }

    /// Reads messages, and ignores all but the node's last one. Returns true if that message has arrived, if the
    /// channel has closed, or if too much time has passed `since` the node was asked to end.
    pub(super) fn has_ended(&mut self, since: Instant) -> bool {
        loop {
            match self.channel.next() {
                Ok(Some(Frame::Message(Message::Gone))) => {
                    tracing::info!("nothing of the job is left on the node");
                    return true;
                }
                Ok(Some(Frame::Message(Message::Failed { why }))) => {
                    tracing::warn!("the node says: {}", Printable(&why));
                }
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return true,
            }
        }
        if self.channel.is_over() || since.elapsed() > TIME_TO_CLEAR {
            let host = self.connection.host();
            tracing::warn!("{host} has not said that it removed everything; the next job there does what is left");
            return true;
        }
        false
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Files that arrive from a node.
#[derive(Default)]
pub(super) struct Incoming {
    receiving: Option<Receiving>,
    /// Complete files that threads are writing to the disk, since this may take longer than the node waits for a
    /// keepalive.
    storing: Vec<Storing>,
    received: Vec<Part>,
    is_sent: bool,
}

struct Storing {
    thread: JoinHandle<Result<Part>>,
    /// Reports a hang-up when the thread ends.
    done: PipeReader,
}

impl Incoming {
    /// Handles a frame that belongs to a file, and writes the file into `directory`. Returns any other message.
    /// `directory` is `None` at a time when the node must not send files.
    pub(super) fn take(&mut self, frame: Frame, directory: Option<&Tree>) -> Result<Option<Message>> {
        let refused = |why: &str| Err(Error::new("receive the results").because(why));
        match (frame, directory) {
            (_, _) if self.is_sent => refused("the node sent something after the last file"),
            (Frame::Data(data), _) => match &mut self.receiving {
                Some(receiving) => receiving.take(&data).map(|()| None),
                None => refused("the node sent data without a file"),
            },
            (Frame::Message(Message::File { part, size }), Some(directory)) => {
                if self.receiving.is_some() || part == Part::Source || self.received.contains(&part) {
                    return refused("the node sent a file that was not expected");
                }
                let name = part_name(part);
                let file = directory.create_file(name).attempt(|| format!("create {name}"))?;
                self.receiving = Some(Receiving::begin(part, size, file)?);
                Ok(None)
            }
            (Frame::Message(Message::Sum { sha256 }), _) => match self.receiving.take() {
                Some(receiving) => {
                    let (part, file) = receiving.finish(&sha256)?;
                    self.received.push(part);
                    self.store(part, file).map(|()| None)
                }
                None => refused("the node sent a digest without a file"),
            },
            (Frame::Message(Message::Sent), Some(_)) if self.receiving.is_none() => {
                self.is_sent = true;
                Ok(None)
            }
            (Frame::Message(message), _) => Ok(Some(message)),
        }
    }

    fn store(&mut self, part: Part, file: File) -> Result<()> {
        let (done, held) = std::io::pipe().attempt(|| receiving(part))?;
        let thread = std::thread::spawn(move || {
            let _held = held;
            file.sync_all().attempt(|| receiving(part)).map(|()| part)
        });
        self.storing.push(Storing { thread, done });
        Ok(())
    }

    /// Returns whether a file has begun to arrive.
    pub(super) fn has_begun(&self) -> bool {
        self.receiving.is_some() || !self.received.is_empty()
    }

    /// Returns whether the node has sent all files.
    pub(super) fn is_sent(&self) -> bool {
        self.is_sent
    }

    /// Returns the received files, once all have arrived and are on the disk.
    pub(super) fn results(&mut self) -> Result<Option<Vec<Part>>> {
        if !self.is_sent || self.storing.iter().any(|storing| !storing.thread.is_finished()) {
            return Ok(None);
        }
        let joined = self.storing.drain(..).map(|storing| storing.thread.join());
        joined
            .map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect::<Result<_>>()
            .map(Some)
    }

    /// Returns the descriptors to poll.
    pub(super) fn sources(&self) -> impl Iterator<Item = PollFd<'_>> {
        let unfinished = self.storing.iter().filter(|storing| !storing.thread.is_finished());
        unfinished.map(|storing| PollFd::new(&storing.done, PollFlags::empty()))
    }
}
