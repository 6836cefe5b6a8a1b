//! `ims-sshd node`: the far side of a remote job. It reads an order, reports facts about this machine, receives the
//! image, and starts the process that runs [inside](crate::remote::inside) namespaces. The far side itself stays
//! outside of the namespaces. So it can remove everything when they end, and only this process talks to the pod.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::CloneFlags;
use nix::sys::signal::Signal;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::OFlags;
use serde_json::Value;

use crate::error::{Attempt, Error, Result};
use crate::remote::channel::{Channel, Frame};
use crate::remote::hello::hello;
use crate::remote::inside::{self, Stage};
use crate::remote::job_directory::{IMAGE, JobDirectory, RESULTS};
use crate::remote::message::{Judged, Message, Order, Part, Task, is_job_id, is_of_log};
use crate::remote::node_root::PARENT;
use crate::remote::shell;
use crate::remote::transfer::{Receiving, Sending};
use crate::session::report;
use crate::sys::poll;
use crate::sys::signals::{Signals, unblock_signals};
use crate::sys::tree::Tree;
use crate::verdict::Verdict;
use crate::volume::layout::{ARCHIVE, REMOTE_RECIPE};
use crate::volume::state_directory::StateDirectory;

/// Time limit for the order to arrive, and for the other side to read the last message.
const SOON: Duration = Duration::from_secs(30);

/// Time for the environment to report. `ims-sshd status` waits for twice as long.
const TIME_TO_REPORT: Duration = Duration::from_secs(1);

/// Interval at which time limits are checked.
const TICK: Duration = Duration::from_millis(500);

/// Runs the far side. With `stage`, runs a stage of the process inside instead; with `is_shell`, runs the command to
/// which an administrator may restrict a key.
pub fn run(stage: Option<Stage>, is_shell: bool) -> Result<u8> {
    if is_shell {
        return shell::run();
    }
    if let Some(stage) = stage {
        return inside::run(stage);
    }
    let attempted = || "take over standard input and output";
    let input: OwnedFd = rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3).attempt(attempted)?;
    let output: OwnedFd = rustix::io::fcntl_dupfd_cloexec(std::io::stdout(), 3).attempt(attempted)?;
    let mut node = Node {
        channel: Channel::new(input, output, Some(SOON))?,
        signals: Signals::block(&[Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]).attempt(|| "block signals")?,
        inside: None,
    };
    let result = node.serve();
    if let Err(error) = &result {
        node.channel.say(&Message::Failed { why: error.to_string() });
    }
    node.channel.say(&Message::Gone);
    node.flush();
    result.map(|()| 0)
}

/// The far side of a job.
struct Node {
    channel: Channel,
    signals: Signals,
    inside: Option<Inside>,
}

/// The process inside the namespaces, and the channel to it.
struct Inside {
    child: Child,
    channel: Channel,
    /// True once the process has reported how the job ended.
    is_told: bool,
}

impl Inside {
    /// The environment's report, if it is open.
    fn report(&self) -> Option<Value> {
        let state = StateDirectory::place(Path::new(PARENT));
        let state =
            Path::new("/proc").join(self.child.id().to_string()).join("root").join(state.strip_prefix("/").ok()?);
        serde_json::from_slice(&report::ask(&state, TIME_TO_REPORT)?).ok()
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        // The child is PID 1 of its PID namespace: when it dies, the kernel kills all other processes there, and its
        // mounts disappear.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Node {
    fn serve(&mut self) -> Result<()> {
        let order = self.order()?;
        self.channel.set_patience(Duration::from_secs(order.patience.max(1)));
        let mut hello = hello(&order);
        let directory = if hello.refusals.is_empty() {
            JobDirectory::make(&order.job).map_err(|e| hello.refusals.push(e.to_string())).ok()
        } else {
            None
        };
        self.channel.say(&Message::Hello(hello));
        // Without a directory the job is refused. The other side has just received the reasons and reports them.
        let Some(directory) = directory else { return Ok(()) };
        let result = self.carry_out(&order, directory.tree());
        // End the process inside before removing its directory.
        self.inside = None;
        result.and(directory.remove())
    }

    /// Reads the first message, which must be an order.
    fn order(&mut self) -> Result<Order> {
        match self.next()? {
            Frame::Message(Message::Order(order)) if is_job_id(&order.job) => Ok(*order),
            _ => Err(Error::new("take an order").because("the first message is not an order")),
        }
    }

    /// Waits for the next frame.
    fn next(&mut self) -> Result<Frame> {
        loop {
            self.turn()?;
            if let Some(frame) = self.channel.next()? {
                return Ok(frame);
            }
            self.channel.check_progress()?;
            self.wait();
        }
    }

    /// Waits until the channels can be read or written, or a signal arrives.
    fn wait(&self) {
        let mut sources: Vec<_> = self.channel.sources().into();
        sources.push(PollFd::new(&self.signals, PollFlags::IN));
        sources.extend(self.inside.iter().flat_map(|inside| inside.channel.sources()));
        let _ = poll::wait(&mut sources, TICK);
    }

    fn turn(&mut self) -> Result<()> {
        if let Some(signal) = self.signals.next().attempt(|| "read signals")? {
            return Err(Error::interrupted(signal));
        }
        self.channel.turn()
    }

    fn carry_out(&mut self, order: &Order, directory: &Tree) -> Result<()> {
        let [image, results] = [IMAGE, RESULTS].map(|name| directory.directory_without_links(name));
        let (image, results) =
            (image.attempt(|| "open the job's directory")?, results.attempt(|| "open the job's directory")?);
        let source = match order.task {
            Task::Customize(_) => ARCHIVE,
            Task::Build(_) => REMOTE_RECIPE,
        };
        if !self.receive(&image, source)? {
            return Ok(());
        }
        self.inside = Some(start(order)?);
        let mut to_send: VecDeque<Part> = VecDeque::new();
        let mut sending: Option<Sending> = None;
        loop {
            self.turn()?;
            while let Some(frame) = self.channel.next()? {
                match frame {
                    Frame::Message(Message::End) => return Ok(()),
                    Frame::Message(Message::Mark(judged)) => mark(&image, judged)?,
                    Frame::Message(Message::Ask) => {
                        let report = self.inside.as_ref().and_then(Inside::report).unwrap_or_default();
                        self.channel.say(&Message::Report { report });
                    }
                    _ => return Err(unexpected()),
                }
            }
            for message in self.heard_inside()? {
                match message {
                    // A build that fails before kiwi-ng starts leaves no file behind.
                    Message::Packed { parts } if parts.is_empty() => self.channel.say(&Message::Sent),
                    Message::Packed { parts } => to_send.extend(parts),
                    other => self.channel.say(&other),
                }
            }
            if sending.is_none()
                && let Some(part) = to_send.pop_front()
            {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW;
                let file = results.open_regular(part.name(), flags).attempt(|| format!("open the {}", part.name()))?;
                sending = Some(Sending::begin(&mut self.channel, part, file)?);
            }
            if let Some(file) = &mut sending
                && file.go_on(&mut self.channel)?
            {
                sending = None;
                if to_send.is_empty() {
                    self.channel.say(&Message::Sent);
                }
                continue;
            }
            self.channel.check()?;
            self.wait();
        }
    }

    /// Receives the image or the recipe into the file `name`. Returns false if the other side has ended the job.
    fn receive(&mut self, image: &Tree, name: &str) -> Result<bool> {
        let mut receiving: Option<Receiving> = None;
        loop {
            match (self.next()?, receiving.take()) {
                (Frame::Message(Message::File { part: Part::Source, size }), None) => {
                    let file = image.create_file(name).attempt(|| "create a file for the image")?;
                    receiving = Some(Receiving::begin(Part::Source, size, file)?);
                }
                (Frame::Data(data), Some(mut file)) => {
                    file.take(&data)?;
                    receiving = Some(file);
                }
                (Frame::Message(Message::Sum { sha256 }), Some(file)) => return file.finish(&sha256).map(|_| true),
                (Frame::Message(Message::End), _) => return Ok(false),
                _ => return Err(unexpected()),
            }
        }
    }

    /// Returns new messages from the process inside. If that process has ended without reporting how the job ended, the
    /// result includes an error.
    fn heard_inside(&mut self) -> Result<Vec<Message>> {
        let mut messages = Vec::new();
        let Some(inside) = &mut self.inside else { return Ok(messages) };
        inside.channel.turn()?;
        while let Some(frame) = inside.channel.next()? {
            let Frame::Message(message) = frame else { return Err(unexpected()) };
            inside.is_told |= matches!(message, Message::Packed { .. } | Message::Failed { .. })
                || matches!(message, Message::Closed { verdict, exit_code } if (verdict, exit_code) != (Judged::Complete, 0));
            messages.push(message);
        }
        if inside.channel.is_over() && !inside.is_told {
            inside.is_told = true;
            let status = inside.child.wait().attempt(|| "wait for the environment")?;
            messages.push(Message::Failed { why: format!("the environment's first process ended: {status}") });
        }
        Ok(messages)
    }

    /// Waits until the other side has read the last messages.
    fn flush(&mut self) {
        let began = Instant::now();
        while !self.channel.is_flushed() && began.elapsed() < SOON && self.channel.turn().is_ok() {
            self.wait();
        }
    }
}

/// Starts the process inside, in a new PID namespace.
fn start(order: &Order) -> Result<Inside> {
    let attempted = || "start the environment";
    // After this call, the next child becomes the first process of a new PID namespace.
    nix::sched::unshare(CloneFlags::CLONE_NEWPID).attempt(attempted)?;
    let program = std::env::current_exe().attempt(|| "find this program's own file")?;
    let mut command = Command::new(program);
    command.args(["node", "--inside", "root"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let variables = order.task.variables().iter();
    command.envs(variables.filter(|(name, _)| is_of_log(name)).map(|(name, value)| (name, value)));
    let mut child = unblock_signals(&mut command).spawn().attempt(attempted)?;
    let pipes = child.stdout.take().zip(child.stdin.take());
    let (output, input) = pipes.ok_or_else(|| Error::new(attempted()).because("it has no pipes"))?;
    let mut channel = Channel::new(output.into(), input.into(), None)?;
    channel.say(&Message::Order(Box::new(order.clone())));
    channel.turn()?;
    Ok(Inside { child, channel, is_told: false })
}

/// Creates the signal file of a mark, which the environment watches for.
fn mark(image: &Tree, judged: Judged) -> Result<()> {
    let name = Verdict::from(judged).signal_file();
    image.touch(name).attempt(|| format!("create '{name}'")).map(drop)
}

fn unexpected() -> Error {
    Error::new("go on with the job").because("the other side has sent something unexpected")
}
