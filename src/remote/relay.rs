//! The near side of a remote job, in a pod or on a user's machine. It uses the same state machine as a local
//! environment, but lets the node carry out most of the actions. It also passes on users' marks to the node, and
//! results from it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io::Seek;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::OFlags;
use serde_json::{Value, json};

use crate::environment::state_machine::{Action, Event, Machine, State};
use crate::environment::supervisor::Outcome;
use crate::error::{Attempt, Error, Result};
use crate::image::boot::Names;
use crate::remote::channel::Frame;
use crate::remote::connection::Heed;
use crate::remote::container::Container;
use crate::remote::far::{Far, Told, Wanted, cannot_go_on, give_names, unless_signalled};
use crate::remote::message::{Judged, Message, Order, Part, Task};
use crate::remote::program::{Incoming, Program};
use crate::remote::transfer::Sending;
use crate::session::report::SOCKET;
use crate::sshd::public_keys;
use crate::sys::poll;
use crate::sys::seqpacket::{Listener, Packets};
use crate::sys::signals::Signals;
use crate::verdict::Verdict;
use crate::volume::layout::{ARCHIVE, EXITING, POD_ERROR, READY, REMOTE_PARTS, REMOTE_PORT, SSHD_LISTENING};
use crate::volume::signal_files::{LOOK_EVERY, SignalFiles, Stamp, Watch};
use crate::volume::state_directory::StateDirectory;

/// Time that the image root parent gets to appear, the same as for a local environment.
const TIME_FOR_PARENT: Duration = Duration::from_secs(30);

/// Time that the far side gets to open the image, once it has all of it. Upstream's container unpacks it first.
const TIME_TO_OPEN: Duration = Duration::from_mins(30);

/// Runs a remote job from start to end, on the image root parent `parent`. If the caller has already claimed that
/// directory, `files` is its claim. Calls `wanted` when the job may begin. Calls `listening` when the environment can
/// be reached, with the public host key of the environment's sshd.
pub(crate) fn run(
    parent: &Path,
    files: Option<SignalFiles>,
    wanted: impl FnOnce() -> Result<Wanted>,
    listening: impl FnOnce(&str),
) -> Result<Outcome> {
    let blocked = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];
    let signals = Signals::block(&blocked).attempt(|| "block signals")?;
    let mut relay = Relay {
        // Use no grace period on this side: the node itself gives running commands time to finish.
        machine: Machine::new(Duration::ZERO),
        parent: parent.to_owned(),
        is_private: files.is_some(),
        files,
        old_marks: [None; 2],
        began: Instant::now(),
        signals,
        watch: Watch::new()?,
        wanted: Some(wanted),
        listening: Some(listening),
        node: None,
        host: String::new(),
        listener: None,
        asking: Vec::new(),
        is_broken: false,
        stopped_by: None,
    };
    relay.run()
}

struct Relay<W, L> {
    machine: Machine,
    parent: PathBuf,
    files: Option<SignalFiles>,
    /// True if no pod shares the directory, and the run itself marks the image once its command has ended.
    is_private: bool,
    old_marks: [Option<Stamp>; 2],
    began: Instant,
    signals: Signals,
    watch: Watch,
    wanted: Option<W>,
    listening: Option<L>,
    node: Option<Box<dyn Far>>,
    /// Name of the node, once there is one.
    host: String,
    /// Socket for `ims-sshd status`, and the clients that wait for an answer.
    listener: Option<Listener>,
    asking: Vec<Packets>,
    /// True after an error. The file 'pod_error' then tells the sidecar about it.
    is_broken: bool,
    /// The signal that ended the job.
    stopped_by: Option<Signal>,
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
        // Do not wait for the results of an image that was marked as failed in the meantime.
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
            Action::Prepare => match self.prepare().and_then(|()| self.listen()) {
                Ok(()) => None,
                Err(_) if self.is_marked_failed() => Some(Event::Marked(Verdict::Failed)),
                Err(error) => Some(match self.signals.next() {
                    Ok(Some(signal)) => self.stopped(signal),
                    _ => self.broken(&error),
                }),
            },
            Action::AwaitSessions(_) => {
                // After a mark, wait for the node's report that its environment has closed. After a signal, do not wait
                // for sessions.
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
                (self.node, self.listener) = (None, None);
                self.asking.clear();
                let mut cleanly = succeeded(StateDirectory::of(&self.parent).and_then(|state| state.remove()));
                for name in REMOTE_PARTS {
                    cleanly &= succeeded(self.files.as_ref().map_or(Ok(()), |files| files.remove(name)));
                }
                Some(Event::Released { cleanly })
            }
            Action::Record(verdict) => Some(self.record(verdict)),
            Action::Announce => Some(Event::Announced { cleanly: self.announce() }),
            // The node does this itself: when it closes, its sshd accepts no connections, and users at shells get a
            // message.
            Action::Restart(..) | Action::StopListening | Action::HangUp(..) => None,
        };
        let late = if is_closing { self.marks() } else { Vec::new() };
        late.into_iter().chain(answer).collect()
    }

    fn stopped(&mut self, signal: Signal) -> Event {
        tracing::info!("received {signal}: closing as failed");
        self.stopped_by = Some(signal);
        Event::Stop(signal)
    }

    fn broken(&mut self, error: &Error) -> Event {
        self.is_broken = true;
        tracing::error!("{error}");
        Event::Broken
    }

    /// Sleeps until something happens, and returns the events.
    fn wait(&mut self) -> Result<Vec<Event>> {
        let mut sources = vec![PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&self.watch, PollFlags::IN)];
        sources.extend(self.listener.iter().map(|listener| PollFd::new(listener, PollFlags::IN)));
        sources.extend(self.node.iter().flat_map(|node| node.sources()));
        let _ = poll::wait(&mut sources, LOOK_EVERY / 2);
        drop(sources);
        self.watch.drain();
        let mut events = Vec::new();
        while let Ok(Some(signal)) = self.signals.next() {
            events.push(self.stopped(signal));
        }
        match self.machine.state() {
            State::Waiting => events.extend(self.look_for_ready()?),
            State::Preparing | State::Serving | State::Grace | State::Ending => events.extend(self.marks()),
            _ => {}
        }
        self.ask();
        if let Some(node) = &mut self.node {
            let told = node.turn(self.files.as_ref(), &self.signals);
            let is_late = node.opening_since().is_some_and(|since| since.elapsed() > TIME_TO_OPEN);
            match told {
                Ok(None) if is_late => {
                    let minutes = TIME_TO_OPEN.as_secs() / 60;
                    let why = format!("nobody can log in there {minutes} min after it got the image");
                    events.push(self.broken(&cannot_go_on(&self.host, why)));
                }
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

    /// Returns the events that result from a report of the node.
    fn told(&mut self, told: Told) -> Vec<Event> {
        match told {
            Told::Listening(host_key) => {
                if let Some(listening) = self.listening.take() {
                    listening(&host_key);
                }
                let stands = self.files.as_ref().map_or(Ok(()), |files| files.touch(SSHD_LISTENING));
                if let Err(error) = stands {
                    return vec![self.broken(&error)];
                }
                vec![Event::Listening]
            }
            Told::Closed(_, code) if code != 0 => {
                let error = Error::new("go on with the job")
                    .because(format!("the environment on the node has ended with exit code {code}"))
                    .advise("its messages are above");
                vec![self.broken(&error)]
            }
            Told::Closed(Verdict::Complete, _) if self.machine.state() == State::Preparing => {
                vec![self.broken(&cannot_go_on(&self.host, "it has closed before anybody could log in"))]
            }
            Told::Report(report) => {
                self.answer(&report);
                Vec::new()
            }
            Told::Closed(verdict, _) => vec![Event::Marked(verdict), Event::Idle],
            Told::Gone => {
                self.node = None;
                vec![Event::AllEnded]
            }
        }
    }

    fn listen(&mut self) -> Result<()> {
        let path = StateDirectory::of(&self.parent)?.path().join(SOCKET);
        self.listener = Some(Listener::bind(&path).attempt(|| format!("listen at {}", path.display()))?);
        Ok(())
    }

    /// Passes the questions of `ims-sshd status` on.
    fn ask(&mut self) {
        let known = self.asking.len();
        self.asking.extend(std::iter::from_fn(|| self.listener.as_ref()?.accept()));
        let is_asked = self.asking.len() > known;
        if is_asked && !self.node.as_mut().is_some_and(|node| node.ask()) {
            self.answer(&Value::Null);
        }
    }

    /// Answers with what is known here, and what the node has said of sessions.
    fn answer(&mut self, there: &Value) {
        let mut report = json!({
            "image_root_parent": self.parent,
            "state": self.machine.state().stage().name(),
            "node": self.host,
            "verdict": self.machine.verdict().map(Verdict::signal_file),
        });
        for field in ["since", "tier", "job", "sessions"] {
            if !there[field].is_null() {
                report[field] = there[field].clone();
            }
        }
        for client in self.asking.drain(..) {
            // A socket that is closed with a packet unread is reset, and the answer lost.
            let mut question = [PollFd::new(&client, PollFlags::IN)];
            if poll::wait(&mut question, LOOK_EVERY / 10).is_ok_and(|ready| ready > 0) {
                let _ = client.receive();
            }
            let _ = client.send(report.to_string().as_bytes());
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

    /// Returns the events that result from new marks in the image root parent.
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
        // The command's success is no verdict: the image may have been marked failed on the node.
        if !self.is_private || verdict == Verdict::Failed {
            tracing::info!(verdict = verdict.signal_file(), "marked in the image root parent");
        }
        if let Some(node) = &mut self.node {
            node.mark(verdict);
        }
        vec![Event::Marked(verdict)]
    }

    /// Connects to the node, and begins to send the image or, if upstream's prepare has started a container, to watch
    /// it.
    fn prepare(&mut self) -> Result<()> {
        let (Some(files), Some(wanted)) = (&self.files, self.wanted.take()) else { return Ok(()) };
        if files.stands(EXITING)? {
            let error = Error::new(format!("open {} again", files.path().display()))
                .because(format!("'{EXITING}' exists: its environment has ended, and packing may have begun"))
                .advise("start a new job; a job must remove 'exiting' before it creates 'ready'");
            self.files = None;
            return Err(error);
        }
        files.remove_marks_of_earlier_jobs(self.old_marks)?;
        files.reserve()?;
        let mut wanted = wanted()?;
        let state = StateDirectory::of(&self.parent)?;
        let heed = || -> Result<()> {
            unless_signalled(&self.signals)?;
            match files.verdict()? {
                Some(Verdict::Failed) => Err(Error::new("go on").because("the image was marked failed")),
                _ => Ok(()),
            }
        };
        std::fs::write(state.node(), &wanted.to.host).attempt(|| format!("write {}", state.node().display()))?;
        self.host.clone_from(&wanted.to.host);
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
        self.node = Some(Box::new(Node::begin(wanted, image, size, state.path(), &heed)?));
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
            // A signal ended the job and nobody has marked the image: write this reason, which the sidecar reports.
            if let (Some(signal), false) = (self.stopped_by, self.machine.is_given_up()) {
                let why = format!("the build environment received {signal}\n");
                let _ = files.parent().replace(verdict.signal_file(), why.as_bytes());
            }
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

/// State of the node's part, which decides what the node may send. A hostile node can send keepalives for ever, so each
/// wait for it has a limit, but for those for people and for the packer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The node is receiving the image, which has to go on.
    Sending,
    /// The node has had the image since this time, and opens it within [`TIME_TO_OPEN`].
    Opening(Instant),
    /// Users can log in, for as long as they like.
    Open,
    /// The environment has closed. If the image is complete, the node packs it, which may take hours, and sends it,
    /// which has to go on once it has begun.
    Closed,
    /// The node has been removing everything since this time.
    Ending(Instant),
}

/// A node, the files that are being sent to it, and those that are being received from it.
struct Node {
    program: Program,
    listen: Vec<(Option<IpAddr>, u16)>,
    boot: Names,
    step: Step,
    has_script: bool,
    is_marked: bool,
    /// Number of reports that the node still has to send.
    asked: usize,
    sending: Option<Sending>,
    incoming: Incoming,
}

impl Node {
    /// Connects, starts this program on the node, and begins to send the image.
    fn begin(wanted: Wanted, image: File, size: u64, state: &Path, heed: Heed<'_>) -> Result<Self> {
        let Wanted { to, job, task, listen, boot, silence, .. } = wanted;
        let has_script = matches!(&task, Task::Customize(order) if order.script.is_some());
        let mut program = Program::start(&to, Order { job, size, patience: silence.as_secs(), task }, state, heed)?;
        let sending = Some(Sending::begin(&mut program.channel, Part::Source, image)?);
        let (step, incoming) = (Step::Sending, Incoming::default());
        Ok(Self { program, listen, boot, step, has_script, is_marked: false, asked: 0, sending, incoming })
    }

    fn heard(&mut self, frame: Frame, files: Option<&SignalFiles>, signals: &Signals) -> Result<Option<Told>> {
        // It may come between the parts of the results. One that nobody asked for falls through and is refused.
        if let (Frame::Message(Message::Report { report }), 1..) = (&frame, self.asked) {
            self.asked -= 1;
            return Ok(Some(Told::Report(report.clone())));
        }
        let parent = files.map(SignalFiles::parent).filter(|_| self.step == Step::Closed);
        let Some(message) = self.incoming.take(frame, parent).map_err(|e| self.program.refused(e))? else {
            return Ok(None);
        };
        let host = self.program.connection.host();
        match (message, self.step) {
            (Message::Failed { why }, _) => Err(self.program.refused(why)),
            (Message::Listening { port, host_key }, Step::Opening(_)) => {
                // The key becomes a line of known_hosts, so refuse anything else than a single key.
                let host_key = public_keys::host_key(&host_key)
                    .ok_or_else(|| self.program.refused("it has sent something that is not a host key"))?;
                // Send keepalives during the forwarding: without them, the node would consider the connection lost.
                let Program { connection, channel, .. } = &mut self.program;
                let (host, channel) = (connection.host(), RefCell::new(channel));
                let heed = || {
                    channel.borrow_mut().turn()?;
                    unless_signalled(signals)
                };
                let here = connection.forward(&self.listen, port, &heed)?;
                match connection.await_greeting(here, &heed) {
                    Ok(()) => {
                        tracing::info!("the environment on {host} is open, and can be reached on port {}", here.port());
                    }
                    // If the script has already marked the image, sshd may have closed by now.
                    Err(error) if self.has_script && !error.to_string().contains("administratively prohibited") => {
                        tracing::warn!("cannot reach sshd on {host}, so only the script can change the image: {error}");
                    }
                    Err(error) => return Err(error),
                }
                self.step = Step::Open;
                Ok(Some(Told::Listening(host_key)))
            }
            (Message::Closed { verdict, exit_code }, Step::Opening(_) | Step::Open) => {
                self.step = Step::Closed;
                if verdict == Judged::Complete && exit_code == 0 {
                    tracing::info!(
                        "the environment on {host} has closed, marked complete: the image is now being packed there"
                    );
                }
                Ok(Some(Told::Closed(verdict.into(), exit_code)))
            }
            (message, _) => Err(self.program.out_of_order(&message)),
        }
    }
}

impl Far for Node {
    fn sources(&self) -> Vec<PollFd<'_>> {
        self.program.channel.sources().into_iter().chain(self.incoming.sources()).collect()
    }

    fn mark(&mut self, verdict: Verdict) {
        self.is_marked = true;
        self.program.channel.say(&Message::Mark(verdict.into()));
    }

    fn is_closing(&self) -> bool {
        self.is_marked && self.step == Step::Open
    }

    fn opening_since(&self) -> Option<Instant> {
        if let Step::Opening(since) = self.step { Some(since) } else { None }
    }

    fn has_closed(&self) -> bool {
        self.step == Step::Closed
    }

    fn ask(&mut self) -> bool {
        let is_open = self.step == Step::Open;
        if is_open {
            self.asked += 1;
            self.program.channel.say(&Message::Ask);
        }
        is_open
    }

    fn end(&mut self) {
        if !matches!(self.step, Step::Ending(_)) {
            self.step = Step::Ending(Instant::now());
            self.sending = None;
            self.program.channel.say(&Message::End);
        }
    }

    fn turn(&mut self, files: Option<&SignalFiles>, signals: &Signals) -> Result<Option<Told>> {
        self.program.channel.turn()?;
        if let Some(sending) = &mut self.sending
            && sending.go_on(&mut self.program.channel)?
        {
            self.sending = None;
            self.step = Step::Opening(Instant::now());
            tracing::info!("the image is on the node");
        }
        if let Step::Ending(since) = self.step {
            return Ok(self.program.has_ended(since).then_some(Told::Gone));
        }
        while let Some(frame) = self.program.next()? {
            if let Some(told) = self.heard(frame, files, signals)? {
                return Ok(Some(told));
            }
            if matches!(self.step, Step::Ending(_)) {
                return Ok(None);
            }
        }
        if let Some(received) = self.incoming.results()? {
            if !received.contains(&Part::Image) {
                return Err(self.program.refused("it has sent no image"));
            }
            let files = files.ok_or_else(|| self.program.refused("the image root parent is gone"))?;
            give_names(files.parent(), &received, &self.boot)?;
            tracing::info!("received the packed image from {}, whole and unaltered", self.program.connection.host());
            self.end();
            return Ok(None);
        }
        let must_progress = match self.step {
            Step::Sending => true,
            Step::Closed => self.incoming.has_begun() && !self.incoming.is_sent(),
            _ => false,
        };
        self.program.check(must_progress).map(|()| None)
    }
}

/// Logs an error and continues. Returns whether there was no error.
fn succeeded(result: Result<()>) -> bool {
    result.inspect_err(|e| tracing::error!("{e}")).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A far side that has had the image since this time, and is alive.
    struct Opening(Instant);

    impl Far for Opening {
        fn sources(&self) -> Vec<PollFd<'_>> {
            Vec::new()
        }

        fn mark(&mut self, _: Verdict) {}

        fn is_closing(&self) -> bool {
            false
        }

        fn opening_since(&self) -> Option<Instant> {
            Some(self.0)
        }

        fn has_closed(&self) -> bool {
            false
        }

        fn end(&mut self) {}

        fn turn(&mut self, _: Option<&SignalFiles>, _: &Signals) -> Result<Option<Told>> {
            Ok(None)
        }
    }

    #[test]
    fn node_gets_a_limited_time_to_open_the_image() {
        for (time, expected) in [(TIME_TO_OPEN / 2, &[][..]), (TIME_TO_OPEN * 2, &[Event::Broken])] {
            let mut machine = Machine::new(Duration::ZERO);
            machine.on(Event::Ready);
            let since = Instant::now().checked_sub(time).unwrap();
            let mut relay = Relay {
                machine,
                parent: PathBuf::new(),
                files: None,
                is_private: true,
                old_marks: [None; 2],
                began: Instant::now(),
                signals: Signals::block(&[]).unwrap(),
                watch: Watch::new().unwrap(),
                wanted: None::<fn() -> Result<Wanted>>,
                listening: None::<fn(&str)>,
                node: Some(Box::new(Opening(since))),
                host: "node".into(),
                listener: None,
                asking: Vec::new(),
                is_broken: false,
                stopped_by: None,
            };
            assert_eq!(relay.wait().unwrap(), expected);
        }
    }
}
