//! The near side of a remote job, in a pod or on a person's machine. It drives the same state machine as a local
//! environment: what that does here, this has done on the node, and relays marks and results.

use std::collections::VecDeque;
use std::io::Seek;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::OFlags;

use crate::environment::machine::{Action, Event, Machine, State};
use crate::environment::supervisor::Outcome;
use crate::error::{Attempt, Error, Result};
use crate::image::boot::Names;
use crate::printable::Printable;
use crate::remote::channel::{Channel, Frame};
use crate::remote::connection::{Connection, Heed};
use crate::remote::container::Container;
use crate::remote::far::{Far, Told, Wanted, give_names, part_name};
use crate::remote::message::{Hello, Judged, Message, Order, Part, Task, is_of_log};
use crate::remote::provision;
use crate::remote::transfer::{Receiving, Sending};
use crate::sshd::public_keys;
use crate::sys::poll;
use crate::sys::signals::Signals;
use crate::verdict::Verdict;
use crate::volume::layout::{ARCHIVE, EXITING, POD_ERROR, READY, REMOTE_PARTS, REMOTE_PORT, SSHD_LISTENING};
use crate::volume::signal_files::{LOOK_EVERY, SignalFiles, Stamp, Watch};
use crate::volume::state_directory::StateDirectory;

/// Time for the parent to appear, as for a local environment.
const TIME_FOR_PARENT: Duration = Duration::from_secs(30);

/// Time for the node to remove everything at the end. Afterwards its own limit of silence ends it.
const TIME_TO_CLEAR: Duration = Duration::from_secs(20);

/// Runs a remote job from start to end, on the image root's parent `parent`. `files` is that directory if the caller has
/// claimed it. `wanted` is called once the job may begin, and `listening` once the environment can be reached, with the
/// public host key of its sshd.
pub(crate) fn run(
    parent: &Path,
    files: Option<SignalFiles>,
    wanted: impl FnOnce() -> Result<Wanted>,
    listening: impl FnOnce(&str),
) -> Result<Outcome> {
    let blocked = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];
    let signals = Signals::block(&blocked).attempt(|| "block signals")?;
    let mut relay = Relay {
        // The node gives running commands their time.
        machine: Machine::new(Duration::ZERO),
        parent: parent.to_owned(),
        files,
        old_marks: [None; 2],
        began: Instant::now(),
        signals,
        watch: Watch::new()?,
        wanted: Some(wanted),
        listening: Some(listening),
        node: None,
        is_broken: false,
    };
    relay.run()
}

struct Relay<W, L> {
    machine: Machine,
    parent: PathBuf,
    files: Option<SignalFiles>,
    old_marks: [Option<Stamp>; 2],
    began: Instant,
    signals: Signals,
    watch: Watch,
    wanted: Option<W>,
    listening: Option<L>,
    node: Option<Box<dyn Far>>,
    /// True after an error, of which the sidecar hears by 'pod_error'.
    is_broken: bool,
}

impl<W: FnOnce() -> Result<Wanted>, L: FnOnce(&str)> Relay<W, L> {
    fn run(&mut self) -> Result<Outcome> {
        self.open_parent()?;
        tracing::info!(parent = %self.parent.display(), "waiting for '{READY}', for a remote job");
        while self.machine.state() != State::Done {
            for event in self.wait()? {
                self.handle(event);
            }
        }
        let Self { machine, .. } = self;
        Ok(Outcome { verdict: machine.verdict(), given_up: machine.is_given_up(), exit_code: machine.exit_code() })
    }

    fn handle(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for action in self.machine.on(event) {
                events.extend(self.carry_out(action));
            }
        }
        // An image that has failed meanwhile is not fetched.
        if self.machine.state() == State::Ending
            && self.machine.verdict() == Some(Verdict::Failed)
            && let Some(node) = &mut self.node
        {
            node.end();
        }
    }

    fn carry_out(&mut self, action: Action) -> Vec<Event> {
        let is_closing = matches!(action, Action::Release | Action::Record(_) | Action::Announce);
        let answer = match action {
            Action::Prepare => match self.prepare() {
                Ok(()) => None,
                Err(_) if self.is_marked_failed() => Some(Event::Marked(Verdict::Failed)),
                Err(error) => Some(match self.signals.next() {
                    Ok(Some(signal)) => stopped(signal),
                    _ => self.broken(&error),
                }),
            },
            Action::AwaitSessions(_) => {
                // A mark is passed on, and the node tells when it has closed. After a signal nobody waits.
                let awaits = self.node.as_ref().is_some_and(|node| node.is_closing());
                (!awaits).then_some(Event::Idle)
            }
            Action::EndProcesses => match &mut self.node {
                None => Some(Event::AllEnded),
                Some(node) => {
                    if !(node.has_closed() && self.machine.verdict() == Some(Verdict::Complete)) {
                        node.end();
                    }
                    None
                }
            },
            Action::Release => {
                self.node = None;
                let mut cleanly = succeeded(StateDirectory::of(&self.parent).and_then(|state| state.remove()));
                for name in REMOTE_PARTS {
                    cleanly &= succeeded(self.files.as_ref().map_or(Ok(()), |files| files.remove(name)));
                }
                Some(Event::Released { cleanly })
            }
            Action::Record(verdict) => Some(self.record(verdict)),
            Action::Announce => Some(Event::Announced { cleanly: self.announce() }),
            // The node's sshd accepts no connection once it closes, and tells people at its shells.
            Action::Restart(..) | Action::StopListening | Action::HangUp(..) => None,
        };
        let late = if is_closing { self.marks() } else { Vec::new() };
        late.into_iter().chain(answer).collect()
    }

    fn broken(&mut self, error: &Error) -> Event {
        self.is_broken = true;
        tracing::error!("{error}");
        Event::Broken
    }

    /// Sleeps until something happens. Returns the events.
    fn wait(&mut self) -> Result<Vec<Event>> {
        let mut sources = vec![PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&self.watch, PollFlags::IN)];
        sources.extend(self.node.iter().flat_map(|node| node.sources()));
        let _ = poll::wait(&mut sources, LOOK_EVERY / 2);
        drop(sources);
        self.watch.drain();
        let mut events = Vec::new();
        while let Ok(Some(signal)) = self.signals.next() {
            events.push(stopped(signal));
        }
        match self.machine.state() {
            State::Waiting => events.extend(self.look_for_ready()?),
            State::Preparing | State::Serving | State::Grace | State::Ending => events.extend(self.marks()),
            _ => {}
        }
        if let Some(node) = &mut self.node {
            match node.turn(self.files.as_ref(), &self.signals) {
                Ok(None) => {}
                Ok(Some(told)) => events.extend(self.told(told)),
                Err(error) => {
                    self.node = None;
                    events.push(self.broken(&error));
                }
            }
        }
        Ok(events)
    }

    /// Events of what the node has told.
    fn told(&mut self, told: Told) -> Vec<Event> {
        match told {
            Told::Listening(host_key) => {
                let stands = self.files.as_ref().map_or(Ok(()), |files| files.touch(SSHD_LISTENING));
                if let Err(error) = stands {
                    return vec![self.broken(&error)];
                }
                if let Some(listening) = self.listening.take() {
                    listening(&host_key);
                }
                vec![Event::Listening]
            }
            Told::Closed(_, code) if code != 0 => {
                let error = Error::new("go on with the job")
                    .because(format!("the environment on the node has ended with exit code {code}"))
                    .advise("its messages are above");
                vec![self.broken(&error)]
            }
            Told::Closed(verdict, _) => vec![Event::Marked(verdict), Event::Idle],
            Told::Gone => {
                self.node = None;
                vec![Event::AllEnded]
            }
        }
    }

    fn open_parent(&mut self) -> Result<()> {
        self.watch.on(&self.parent);
        if self.files.is_none()
            && let Some(mut files) = SignalFiles::open(&self.parent)?
        {
            files.claim()?;
            files.remove_marks_of_earlier_pods()?;
            self.old_marks = files.verdict_stamps();
            self.files = Some(files);
            self.watch.on(&self.parent);
        }
        Ok(())
    }

    fn look_for_ready(&mut self) -> Result<Option<Event>> {
        self.open_parent()?;
        let Some(files) = &self.files else {
            if self.began.elapsed() < TIME_FOR_PARENT {
                return Ok(None);
            }
            let error = Error::new(format!("open the image root parent {}", self.parent.display()))
                .because(format!("it does not exist after {} s", TIME_FOR_PARENT.as_secs()))
                .advise("mount the volume there, or name its directory in the argument or in IMAGE_ROOT_PARENT");
            return Ok(Some(self.broken(&error)));
        };
        match files.stands(READY) {
            Ok(true) => Ok(Some(Event::Ready)),
            Ok(false) => {
                let verdict = files.verdict_instead_of_ready(self.old_marks[Verdict::Failed as usize]);
                Ok(verdict.map(Event::Marked))
            }
            Err(error) => Ok(Some(self.broken(&error))),
        }
    }

    fn is_marked_failed(&self) -> bool {
        self.files.as_ref().is_some_and(|files| matches!(files.verdict(), Ok(Some(Verdict::Failed))))
    }

    /// New marks in the image root's parent.
    fn marks(&mut self) -> Vec<Event> {
        let found = self.files.as_ref().map(SignalFiles::verdict);
        let verdict = match found {
            Some(Ok(Some(verdict))) => verdict,
            Some(Err(error)) if self.machine.verdict() != Some(Verdict::Failed) => {
                tracing::error!("{error}; the image counts as failed");
                Verdict::Failed
            }
            _ => return Vec::new(),
        };
        if self.machine.verdict() >= Some(verdict)
            || self.machine.state() == State::Preparing && verdict != Verdict::Failed
        {
            return Vec::new();
        }
        tracing::info!(verdict = verdict.signal_file(), "marked in the image root parent");
        if let Some(node) = &mut self.node {
            node.mark(verdict);
        }
        vec![Event::Marked(verdict)]
    }

    /// Connects, and begins to send the image.
    fn prepare(&mut self) -> Result<()> {
        let (Some(files), Some(wanted)) = (&self.files, self.wanted.take()) else { return Ok(()) };
        if files.stands(EXITING)? {
            let error = Error::new(format!("open {} again", files.path().display()))
                .because(format!("'{EXITING}' exists: its environment has ended and the image may be being packed"))
                .advise("start a new job, which has to remove 'exiting' before it creates 'ready'");
            self.files = None;
            return Err(error);
        }
        files.remove_marks_of_earlier_jobs(self.old_marks)?;
        files.reserve()?;
        let mut wanted = wanted()?;
        let state = StateDirectory::of(&self.parent)?;
        let heed = || -> Result<()> {
            let mut signals = [PollFd::new(&self.signals, PollFlags::IN)];
            if poll::wait(&mut signals, Duration::ZERO).is_ok_and(|ready| ready > 0) {
                return Err(Error::new("go on").because("a signal has arrived"));
            }
            match files.verdict()? {
                Some(Verdict::Failed) => Err(Error::new("go on").because("the image was marked failed")),
                _ => Ok(()),
            }
        };
        if files.stands(REMOTE_PORT)? {
            let attempted = || format!("read {}", files.path().join(REMOTE_PORT).display());
            let text = files.parent().read(REMOTE_PORT, 16).attempt(attempted)?;
            let port = String::from_utf8_lossy(&text).trim().parse().attempt(attempted)?;
            self.node = Some(Box::new(Container::begin(wanted, port, state.path(), &heed)?));
            return Ok(());
        }
        let attempted = || format!("open {}", files.path().join(ARCHIVE).display());
        let open = || files.parent().open_regular(ARCHIVE, OFlags::RDONLY | OFlags::NOFOLLOW);
        let mut image = wanted.image.take().map_or_else(open, Ok).attempt(attempted)?;
        image.rewind().attempt(attempted)?;
        let size = image.metadata().attempt(attempted)?.len();
        let began = Instant::now();
        let mut node = Node::begin(wanted, size, state.path(), &heed)?;
        let hello = node.hello(&heed)?;
        tracing::info!(
            milliseconds = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
            "the build node {} is able: Linux {}, {} MB free",
            node.connection.host(),
            Printable(&hello.kernel),
            hello.free / 1_000_000
        );
        let sending = Sending::begin(&mut node.channel, Part::Source, image)?;
        node.sending = Some(sending);
        self.node = Some(Box::new(node));
        Ok(())
    }

    fn record(&mut self, verdict: Verdict) -> Event {
        let Some(files) = &self.files else { return Event::Recorded { verdict, cleanly: true } };
        if self.is_broken && !succeeded(files.touch(POD_ERROR)) {
            return Event::Unrecorded(verdict);
        }
        if !succeeded(files.touch(verdict.signal_file())) {
            return Event::Unrecorded(verdict);
        }
        if verdict == Verdict::Failed {
            succeeded(files.retract(Verdict::Complete.signal_file()));
        }
        Event::Recorded { verdict, cleanly: true }
    }

    fn announce(&self) -> bool {
        let Some(files) = &self.files else { return true };
        let announced = files.release_reserve().and_then(|()| files.touch(EXITING));
        let verdict = self.machine.verdict().map(Verdict::signal_file);
        tracing::info!(verdict, "closed: '{EXITING}' created");
        succeeded(announced)
    }
}

/// How far the node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// It receives the image, and opens it.
    Opening,
    /// People can log in.
    Open,
    /// It has closed; if the image is complete, it packs and sends that.
    Closed,
    /// It removes everything.
    Ending(Instant),
}

/// A node, and what is under way to it and from it.
struct Node {
    connection: Connection,
    program: Child,
    channel: Channel,
    listen: Vec<(Option<IpAddr>, u16)>,
    boot: Names,
    step: Step,
    has_script: bool,
    is_marked: bool,
    sending: Option<Sending>,
    receiving: Option<Receiving>,
    received: Vec<Part>,
}

impl Node {
    /// Connects, and starts this program there.
    fn begin(wanted: Wanted, size: u64, state: &Path, heed: Heed<'_>) -> Result<Self> {
        let Wanted { to, job, task, listen, boot, silence, .. } = wanted;
        let connection = Connection::open(&to, state, silence, heed)?;
        let path = provision::provide(&connection, heed)?;
        let attempted = || format!("start ims-sshd on the build node {}", connection.host());
        let Task::Customize(order) = &task;
        let has_script = order.script.is_some();
        // Its log comes here, by ssh.
        let log = order.variables.iter().filter(|(name, _)| is_of_log(name));
        let log: Vec<_> = log.map(|(name, value)| format!("{name}={value}")).collect();
        let words = ["env"].into_iter().chain(log.iter().map(String::as_str)).chain([path.as_str(), "node"]);
        let mut program = connection.command(&words.collect::<Vec<_>>());
        let program = program.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut program = connection.spawn(program).attempt(attempted)?;
        let pipes = program.stdout.take().zip(program.stdin.take());
        let (output, input) = pipes.ok_or_else(|| Error::new(attempted()).because("ssh has no pipes"))?;
        let mut channel = Channel::new(output.into(), input.into(), Some(silence))?;
        channel.say(&Message::Order(Box::new(Order { job, size, patience: silence.as_secs(), task })));
        Ok(Self {
            connection,
            program,
            channel,
            listen,
            boot,
            step: Step::Opening,
            has_script,
            is_marked: false,
            sending: None,
            receiving: None,
            received: Vec::new(),
        })
    }

    /// Waits for the node's first message, and fails if the job cannot run there.
    fn hello(&mut self, heed: Heed<'_>) -> Result<Hello> {
        let attempted = || format!("use the build node {}", self.connection.host());
        loop {
            self.channel.turn()?;
            match self.channel.next()? {
                Some(Frame::Message(Message::Hello(hello))) if hello.refusals.is_empty() => return Ok(hello),
                Some(Frame::Message(Message::Hello(hello))) => {
                    return Err(Error::new(attempted()).because(hello.refusals.join("; ")));
                }
                Some(Frame::Message(Message::Failed { why })) => return Err(Error::new(attempted()).because(why)),
                Some(_) => return Err(Error::new(attempted()).because("it does not say what it is")),
                None => self.channel.check().map_err(|e| Error::new(attempted()).because(e))?,
            }
            heed()?;
            let _ = poll::wait(&mut self.channel.sources(), LOOK_EVERY / 10);
        }
    }

    /// Waits for the node's last message. Whatever comes before it no longer counts.
    fn ending(&mut self, since: Instant) -> Option<Told> {
        loop {
            match self.channel.next() {
                Ok(Some(Frame::Message(Message::Gone))) => {
                    tracing::info!("nothing of the job is left on the node");
                    return Some(Told::Gone);
                }
                Ok(Some(Frame::Message(Message::Failed { why }))) => {
                    tracing::warn!("the node says: {}", Printable(&why));
                }
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return Some(Told::Gone),
            }
        }
        if self.channel.is_over() || since.elapsed() > TIME_TO_CLEAR {
            let host = self.connection.host();
            tracing::warn!("{host} has not said that it removed everything; the next job there does what is left");
            return Some(Told::Gone);
        }
        None
    }

    fn heard(&mut self, frame: Frame, files: Option<&SignalFiles>, signals: &Signals) -> Result<Option<Told>> {
        let host = self.connection.host();
        let refused = |why: &str| Error::new(format!("go on with the job on {host}")).because(why);
        let message = match (frame, &mut self.receiving) {
            (Frame::Message(message), _) => message,
            (Frame::Data(data), Some(receiving)) => return receiving.take(&data).map(|()| None),
            (Frame::Data(_), None) => return Err(refused("it has sent data without a file")),
        };
        match (message, self.step) {
            (Message::Failed { why }, _) => Err(refused(&why)),
            (Message::Listening { port, host_key }, Step::Opening) => {
                // It becomes a line of known_hosts.
                let host_key =
                    public_keys::host_key(&host_key).ok_or_else(|| refused("it has sent a host key that is none"))?;
                let heed = || {
                    let mut arrived = [PollFd::new(signals, PollFlags::IN)];
                    match poll::wait(&mut arrived, Duration::ZERO) {
                        Ok(0) | Err(_) => Ok(()),
                        Ok(_) => Err(Error::new("go on").because("a signal has arrived")),
                    }
                };
                let here = self.connection.forward(&self.listen, port, &heed)?;
                match self.connection.await_greeting(here) {
                    Ok(()) => {
                        tracing::info!("the environment on {host} is open, and can be reached on port {}", here.port());
                    }
                    // A script that marks the image at once has sshd closed by now.
                    Err(error) if self.has_script && !error.to_string().contains("administratively prohibited") => {
                        tracing::warn!("the environment on {host} is open to its script alone: {error}");
                    }
                    Err(error) => return Err(error),
                }
                self.step = Step::Open;
                Ok(Some(Told::Listening(host_key)))
            }
            (Message::Closed { verdict, exit_code }, Step::Opening | Step::Open) => {
                self.step = Step::Closed;
                if verdict == Judged::Complete && exit_code == 0 {
                    tracing::info!("the environment on {host} has closed as complete: the image is packed there");
                }
                Ok(Some(Told::Closed(verdict.into(), exit_code)))
            }
            (Message::File { part, size }, Step::Closed) if self.receiving.is_none() && part != Part::Source => {
                if self.received.contains(&part) {
                    return Err(refused("it has sent a file twice"));
                }
                let parent = files.ok_or_else(|| refused("the image root parent is gone"))?.parent();
                let file = parent.create_file(part_name(part)).attempt(|| format!("create {}", part_name(part)))?;
                self.receiving = Some(Receiving::begin(part, size, file)?);
                Ok(None)
            }
            (Message::Sum { sha256 }, Step::Closed) => {
                let receiving = self.receiving.take().ok_or_else(|| refused("it has sent a digest without a file"))?;
                self.received.push(receiving.finish(&sha256)?);
                Ok(None)
            }
            (Message::Sent, Step::Closed) if self.receiving.is_none() && self.received.contains(&Part::Image) => {
                let files = files.ok_or_else(|| refused("the image root parent is gone"))?;
                give_names(files, &self.received, &self.boot)?;
                tracing::info!("the packed image has come from {host}, whole and unaltered");
                self.end();
                Ok(None)
            }
            _ => Err(refused("it has sent something unexpected")),
        }
    }
}

impl Far for Node {
    fn sources(&self) -> Vec<PollFd<'_>> {
        self.channel.sources().into()
    }

    fn mark(&mut self, verdict: Verdict) {
        self.is_marked = true;
        self.channel.say(&Message::Mark(verdict.into()));
    }

    fn is_closing(&self) -> bool {
        self.is_marked && self.step == Step::Open
    }

    fn has_closed(&self) -> bool {
        self.step == Step::Closed
    }

    fn end(&mut self) {
        if !matches!(self.step, Step::Ending(_)) {
            self.step = Step::Ending(Instant::now());
            self.sending = None;
            self.channel.say(&Message::End);
        }
    }

    fn turn(&mut self, files: Option<&SignalFiles>, signals: &Signals) -> Result<Option<Told>> {
        let lost = |e: Error, host: &str| Error::new(format!("go on with the job on {host}")).because(e);
        self.channel.turn()?;
        if let Some(sending) = &mut self.sending
            && sending.go_on(&mut self.channel)?
        {
            self.sending = None;
            tracing::info!("the image is on the node");
        }
        if let Step::Ending(since) = self.step {
            return Ok(self.ending(since));
        }
        while let Some(frame) = self.channel.next()? {
            if let Some(told) = self.heard(frame, files, signals)? {
                return Ok(Some(told));
            }
            if matches!(self.step, Step::Ending(_)) {
                return Ok(None);
            }
        }
        self.channel.check().map_err(|e| {
            let said = self.connection.last_words();
            let error = lost(e, self.connection.host());
            if said.is_empty() { error } else { error.advise(said) }
        })?;
        Ok(None)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

fn stopped(signal: Signal) -> Event {
    tracing::info!("received {signal}: closing as failed");
    Event::Stop(signal)
}

/// Logs an error without stopping. Returns whether there was none.
fn succeeded(result: Result<()>) -> bool {
    result.inspect_err(|e| tracing::error!("{e}")).is_ok()
}
