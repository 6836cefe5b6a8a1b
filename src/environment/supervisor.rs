//! Carries the machine's actions out and brings it what happens. As PID 1 or as a subreaper: every process of the job
//! is a descendant, whoever started it.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags};

use crate::environment::groundwork::Groundwork;
use crate::environment::hang_up::{GracePeriod, Progress, hang_up};
use crate::environment::machine::{Action, Event, Machine, State};
use crate::environment::open::{Open, Place, succeeded};
use crate::environment::processes;
use crate::environment::restarts::Part;
use crate::environment::script::Script;
use crate::environment::settings::Settings;
use crate::environment::sshd_setup;
use crate::environment::watchdog::Watchdog;
use crate::error::{Attempt, Error, Result};
use crate::jail::link::Message;
use crate::jailer::open::TIME_TO_CLOSE_FILES;
use crate::job::Action as JobAction;
use crate::sshd::daemon::Daemon;
use crate::sshd::refusals::Refusals;
use crate::sys::poll::{self, Sources};
use crate::sys::process::reap;
use crate::sys::signals::Signals;
use crate::sys::tree::Tree;
use crate::verdict::Verdict;
use crate::volume::image_root;
use crate::volume::layout::{BUILD_FAILED, EXITING, READY, SSHD_LISTENING};
use crate::volume::mounts_below;
use crate::volume::signal_files::{LOOK_EVERY, SignalFiles, Stamp, Watch};
use crate::volume::state_directory::StateDirectory;

/// How long the image root parent may be missing. A pod's volumes are there before its containers start; a mount of a
/// machine may come later.
const TIME_FOR_PARENT: Duration = Duration::from_secs(30);

/// How an environment ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// What became of the image; nothing if no shell was wanted.
    pub verdict: Option<Verdict>,
    /// Whether somebody has marked the image failed.
    pub(crate) given_up: bool,
    /// The exit code of the contract: 0 for complete and failed, 1 if the environment broke, 128 + n after signal n.
    pub exit_code: u8,
}

/// Runs a build environment from start to end. `files` is the image root's parent if the caller has claimed it already;
/// `listening` is called once, when sshd accepts connections.
pub fn run(settings: Settings, files: Option<SignalFiles>, listening: impl FnOnce()) -> Result<Outcome> {
    if !shell_is_wanted(&settings)? {
        return Ok(Outcome { verdict: None, given_up: false, exit_code: 0 });
    }
    let held = [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];
    let signals = Signals::block(&held).attempt(|| "block signals")?;
    let watch = Watch::new()?;
    let attempted = || "make an event loop";
    let mut sources = Sources::new().attempt(attempted)?;
    sources.add(&signals, Source::Signals).attempt(attempted)?;
    sources.add(&watch, Source::Marks).attempt(attempted)?;
    let mut supervisor = Supervisor {
        machine: Machine::new(settings.close_grace),
        since: SystemTime::now(),
        began: Instant::now(),
        sources,
        next_look: Instant::now(),
        signals,
        watch,
        state: StateDirectory::of(&settings.job.parent)?,
        groundwork: None,
        old_marks: [None; 2],
        files,
        image_root: None,
        open: None,
        closing_since: None,
        hung_up: Vec::new(),
        grace_period: None,
        listening: Some(listening),
        settings,
    };
    nix::sys::prctl::set_child_subreaper(true).attempt(|| "become the parent of orphaned processes")?;
    supervisor.live()
}

/// A create job's shell is for looking at a failed build, if somebody asked for it.
fn shell_is_wanted(settings: &Settings) -> Result<bool> {
    if settings.job.action == Some(JobAction::Customize) {
        return Ok(true);
    }
    let failed = match SignalFiles::open(&settings.job.parent)? {
        Some(files) => files.stands(BUILD_FAILED)?,
        None => false,
    };
    match (failed, settings.job.debug) {
        (true, true) => return Ok(true),
        (true, false) => tracing::info!("the build failed, and ENABLE_DEBUG is not true: no shell is wanted"),
        (false, _) => tracing::info!("the build did not fail: no shell is wanted"),
    }
    Ok(false)
}

/// Sources that wake the event loop, in the order in which they are handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    Script,
    Signals,
    /// Something happened in the image root parent, or the jail's init has found a mark.
    Marks,
    Sessions,
    /// A session or connection that is waited for has ended.
    End,
    /// Time to look at what raises no event.
    Interval,
}

struct Supervisor<F> {
    settings: Settings,
    machine: Machine,
    /// When it came into its state.
    since: SystemTime,
    began: Instant,
    sources: Sources<Source>,
    /// When [`Source::Interval`] comes next.
    next_look: Instant,
    signals: Signals,
    watch: Watch,
    state: StateDirectory,
    groundwork: Option<Groundwork>,
    files: Option<SignalFiles>,
    /// Verdicts as they stood when this run began.
    old_marks: [Option<Stamp>; 2],
    image_root: Option<Tree>,
    open: Option<Open>,
    /// When the verdict came; the close's steps are logged with the time since.
    closing_since: Option<Instant>,
    hung_up: Vec<Pid>,
    grace_period: Option<GracePeriod>,
    listening: Option<F>,
}

impl<F: FnOnce()> Supervisor<F> {
    fn live(&mut self) -> Result<Outcome> {
        self.open_parent()?;
        tracing::info!(
            parent = %self.settings.job.parent.display(),
            jailed = self.settings.job.jailed,
            job = self.settings.job.id.as_deref(),
            "waiting for '{READY}'",
        );
        if self.files.is_none() {
            tracing::warn!(
                "{} does not exist: it is waited for {} s, as a volume may be mounted late",
                self.settings.job.parent.display(),
                TIME_FOR_PARENT.as_secs()
            );
        }
        match Groundwork::lay(&self.settings, &self.state) {
            Ok(groundwork) => self.groundwork = Some(groundwork),
            Err(e) => self.happen(broken(&e)),
        }
        while self.machine.state() != State::Done {
            for event in self.wait()? {
                self.happen(event);
            }
        }
        let Self { machine, .. } = self;
        Ok(Outcome { verdict: machine.verdict(), given_up: machine.is_given_up(), exit_code: machine.exit_code() })
    }

    /// Brings the machine an event, and what comes of it.
    fn happen(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let before = self.machine.state();
            let actions = self.machine.on(event);
            if let Event::Died(part, _) = event
                && self.machine.state() == State::Grace
                && before == State::Serving
            {
                tracing::error!("{} has died too often within a minute: closing as failed", part.name());
            }
            if self.machine.state() != before {
                self.since = SystemTime::now();
                tracing::debug!(state = ?self.machine.state(), "next");
            }
            for action in actions {
                events.extend(self.carry_out(action));
            }
        }
    }

    fn carry_out(&mut self, action: Action) -> Vec<Event> {
        let closing = matches!(action, Action::EndProcesses | Action::Release | Action::Record(_) | Action::Announce);
        let answer = match action {
            Action::Prepare => Some(self.prepare().unwrap_or_else(|e| broken(&e))),
            Action::Restart(part, wait) => {
                self.open.iter_mut().for_each(|open| open.restarts.push((part, Instant::now() + wait)));
                None
            }
            Action::StopListening => {
                self.closing_since = Some(Instant::now());
                if let Some(open) = &mut self.open {
                    open.restarts.clear();
                    if let Some(daemon) = &open.daemon {
                        daemon.stop_listening();
                        self.step("sshd takes no new connections");
                    }
                }
                None
            }
            Action::HangUp(verdict, grace) => {
                if let Some(open) = &mut self.open {
                    let running = open.running();
                    self.hung_up = hang_up(&open.interactive(running), verdict, grace);
                }
                if !self.hung_up.is_empty() {
                    self.step("people at a terminal were told, and hung up");
                }
                None
            }
            Action::AwaitSessions(grace) => {
                self.grace_period = Some(GracePeriod::start(grace, std::mem::take(&mut self.hung_up)));
                None
            }
            Action::EndProcesses => {
                self.grace_period = None;
                Some(match processes::end_all(self.open.as_ref().and_then(|open| open.jail.as_ref())) {
                    Ok(()) => {
                        self.step("no process of the job is left");
                        Event::AllEnded
                    }
                    Err(e) => broken(&e),
                })
            }
            Action::Release => Some(Event::Released { cleanly: self.release() }),
            Action::Record(verdict) => Some(self.record(verdict)),
            Action::Announce => Some(Event::Announced { cleanly: self.announce() }),
        };
        // A process may mark the image as it is ended, and another container at any time: until the others are told, it
        // counts.
        let late = if closing { self.late_marks() } else { Vec::new() };
        late.into_iter().chain(answer).collect()
    }

    /// Logs a step of the close.
    fn step(&self, what: &str) {
        let since = self.closing_since.map_or(0, milliseconds);
        tracing::info!(milliseconds = since, "closing: {what}");
    }

    /// Sleeps until something happens, or until it is time to look whether something has. Returns what has happened.
    fn wait(&mut self) -> Result<Vec<Event>> {
        let restarts = self.open.iter().flat_map(|open| &open.restarts).map(|(_, at)| *at);
        let moments = restarts.chain(self.grace_period.as_ref().map(|grace_period| grace_period.next_look));
        let next = moments.fold(self.next_look, Instant::min);
        let mut ready = self.sources.wait(next.saturating_duration_since(Instant::now()));
        if Instant::now() >= self.next_look {
            self.next_look = Instant::now() + LOOK_EVERY;
            // A network file system raises no event for another node's writes.
            ready.extend([Source::Script, Source::Signals, Source::Marks, Source::Sessions, Source::Interval]);
        }
        let mut events = Vec::new();
        for source in ready {
            match source {
                Source::Script => {
                    self.open.iter_mut().filter_map(|open| open.script.as_mut()).for_each(Script::log_output);
                }
                Source::Signals => events.extend(self.signalled()),
                Source::Marks => {
                    self.watch.drain();
                    match self.machine.state() {
                        State::Waiting => events.extend(self.look_for_ready()?),
                        State::Serving | State::Grace => events.extend(self.marks()),
                        _ => {}
                    }
                }
                Source::Sessions => self.look_at_sessions(),
                Source::End => {}
                Source::Interval => {
                    self.open.iter_mut().filter_map(|open| open.refusals.as_mut()).for_each(Refusals::look);
                    if self.machine.state() == State::Serving {
                        events.extend(self.look_after());
                    }
                }
            }
        }
        if self.machine.state() == State::Serving {
            events.extend(self.start_again());
        }
        if let (Some(grace_period), Some(open)) = (&mut self.grace_period, &mut self.open) {
            match grace_period.look(open.running(), open.script_runs()) {
                Progress::Idle => events.push(Event::Idle),
                Progress::Over => events.push(Event::GraceOver),
                Progress::Running => {
                    // One that cannot be registered is found by the next look.
                    grace_period.ends().for_each(|end| _ = self.sources.add(end, Source::End));
                }
            }
        }
        Ok(events)
    }

    fn signalled(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while let Ok(Some(signal)) = self.signals.next() {
            if signal != Signal::SIGCHLD {
                tracing::info!("received {signal}: closing as failed");
                events.push(Event::Stop(signal));
            }
        }
        events.extend(reap().into_iter().filter_map(|status| self.ended(status)));
        events
    }

    fn look_for_ready(&mut self) -> Result<Option<Event>> {
        self.open_parent()?;
        Ok(match self.files.as_ref().map(|files| files.stands(READY)) {
            None if self.began.elapsed() > TIME_FOR_PARENT => {
                let error = Error::new(format!("open the image root parent {}", self.settings.job.parent.display()))
                    .because(format!("it does not exist after {} s", TIME_FOR_PARENT.as_secs()))
                    .advise("mount the volume there, or name its directory by the argument or IMAGE_ROOT_PARENT");
                Some(broken(&error))
            }
            Some(Ok(true)) => Some(Event::Ready),
            // Nobody will make a better one while this stands there.
            Some(Err(e)) => Some(broken(&e)),
            _ => self.mark_instead_of_ready(),
        })
    }

    fn look_at_sessions(&mut self) {
        let Some(open) = &mut self.open else { return };
        for asking in open.presence.look() {
            let _ = asking.send(self.status().to_string().as_bytes());
        }
    }

    /// What `ims-sshd status` prints.
    fn status(&self) -> serde_json::Value {
        let open = self.open.as_ref();
        serde_json::json!({
            "image_root_parent": self.settings.job.parent,
            "state": self.machine.state().stage().name(),
            "since": humantime::format_rfc3339_seconds(self.since).to_string(),
            "tier": open.and_then(|open| open.jail.as_ref()).map_or("plain", |jail| jail.tier.name()),
            "job": self.settings.job.id,
            "verdict": self.machine.verdict().map(Verdict::signal_file),
            "sessions": open.map(|open| open.presence.to_json()),
        })
    }

    /// Starts again what has died, when its time has come.
    fn start_again(&mut self) -> Vec<Event> {
        let now = Instant::now();
        let is_due = |(open, _): &(&mut Open, Place<'_>)| open.restarts.iter().any(|(_, at)| *at <= now);
        let Some((open, place)) = self.opened().filter(is_due) else { return Vec::new() };
        let failed = open.start_again(place);
        self.listen();
        failed.into_iter().map(|part| Event::Died(part, Instant::now())).collect()
    }

    /// Looks, at intervals, whether the environment can still come to a good end.
    fn look_after(&mut self) -> Option<Event> {
        let (open, place) = self.opened()?;
        let running = open.running();
        let busy = open.script_runs() || !running.sessions.is_empty();
        let shells = open.interactive(running);
        open.watchdog.look(busy, open.presence.last_heard(), place.settings, &shells, place.files, place.image_root)
    }

    /// The open environment, and where it is.
    fn opened(&mut self) -> Option<(&mut Open, Place<'_>)> {
        let Self { settings, state, files: Some(files), image_root: Some(image_root), open: Some(open), .. } = self
        else {
            return None;
        };
        Some((open, Place { settings, state, files, image_root }))
    }

    fn open_parent(&mut self) -> Result<()> {
        if self.files.is_none() {
            self.watch.on(&self.settings.job.parent);
            if let Some(mut files) = SignalFiles::open(&self.settings.job.parent)? {
                files.claim()?;
                files.remove_marks_of_earlier_pods()?;
                self.old_marks = files.verdict_stamps();
                self.files = Some(files);
            }
        }
        self.watch.on(&self.settings.job.parent);
        Ok(())
    }

    /// A mark that was made instead of `ready`: by somebody who waits no longer, or by a sidecar that has given up.
    fn mark_instead_of_ready(&self) -> Option<Event> {
        let verdict = self.files.as_ref()?.verdict_instead_of_ready(self.old_marks[Verdict::Failed as usize])?;
        tracing::info!(
            verdict = verdict.signal_file(),
            "marked in the image root parent while waiting for '{READY}'; the sidecar's log may say why"
        );
        Some(Event::Marked(verdict))
    }

    /// Marks that have been made, in the jail and outside, and that the machine does not know yet.
    fn marks(&mut self) -> Vec<Event> {
        let mut marks = Vec::new();
        if let Some(jail) = self.open.as_ref().and_then(|open| open.jail.as_ref()) {
            let readable = || {
                let mut source = [PollFd::from_borrowed_fd(jail.link(), PollFlags::IN)];
                poll::wait(&mut source, Duration::ZERO).is_ok_and(|ready| ready > 0)
            };
            while readable() {
                let Some(message) = jail.receive() else {
                    // The init has ended: its socket would be ready for ever.
                    self.sources.remove(jail.link());
                    break;
                };
                match message {
                    Message::Marked(verdict) => {
                        tracing::info!(verdict = verdict.signal_file(), "marked from inside the jail");
                        marks.push(Event::Marked(verdict));
                    }
                    Message::Failed(why) => tracing::error!("{why}"),
                    _ => {}
                }
            }
        }
        match self.files.as_ref().map(SignalFiles::verdict) {
            Some(Ok(Some(verdict))) if self.machine.verdict() < Some(verdict) => {
                tracing::info!(verdict = verdict.signal_file(), "marked in the image root parent");
                marks.push(Event::Marked(verdict));
            }
            Some(Err(e)) if self.machine.verdict() != Some(Verdict::Failed) => {
                tracing::error!("{e}; the image is taken as failed");
                marks.push(Event::Failed);
            }
            _ => {}
        }
        marks
    }

    /// What it means that a child has ended.
    fn ended(&mut self, status: WaitStatus) -> Option<Event> {
        let pid = status.pid()?;
        let open = self.open.as_mut()?;
        if let Some(script) = open.script.as_mut().filter(|script| script.pid() == Some(pid)) {
            script.end();
            let script = self.settings.script.as_deref().unwrap_or_else(|| Path::new("")).display();
            if matches!(status, WaitStatus::Exited(_, 0)) {
                tracing::info!("the customization script {script} has ended");
                return None;
            }
            let how = how_ended(status);
            if self.settings.job.debug {
                tracing::error!(
                    "the customization script {script} {how}; ENABLE_DEBUG is true, so the environment stays open"
                );
                return None;
            }
            tracing::error!(
                "the customization script {script} {how}: the image is marked failed; its output stands above"
            );
            return Some(Event::Failed);
        }
        if open.daemon.take_if(|daemon| daemon.pid == pid).is_some() && self.machine.state() == State::Serving {
            let words = Daemon::last_words(&self.settings.sshd);
            tracing::error!("sshd {}; its log ends with: {words}", how_ended(status));
            return Some(Event::Died(Part::Sshd, Instant::now()));
        }
        if open.jail.as_ref().is_some_and(|jail| jail.init() == pid) && self.machine.state() == State::Serving {
            tracing::error!("the jail's init {}, and with it every process in the jail", how_ended(status));
            return Some(Event::Died(Part::Jail, Instant::now()));
        }
        None
    }

    fn prepare(&mut self) -> Result<Event> {
        let began = Instant::now();
        let (Some(files), Some(groundwork)) = (&self.files, self.groundwork.take()) else { return Ok(Event::Broken) };
        if files.stands(EXITING)? {
            let error = Error::new(format!("open {} again", files.path().display()))
                .because(format!(
                    "'{EXITING}' stands there: this environment has ended and the image may be being packed"
                ))
                .advise("whoever starts a new job removes it before creating 'ready'");
            // Its verdict stands as well, and is not ours to change.
            self.files = None;
            return Err(error);
        }
        files.remove_marks_of_earlier_jobs(self.old_marks)?;
        files.reserve()?;
        let image_root = image_root::open(files, self.settings.job.image_root())?;
        // A create job's is open to be looked at as far as it was built.
        if self.settings.job.action == Some(JobAction::Customize) {
            let shown = files.path().join(self.settings.job.image_root());
            let refused = |why| Error::new(format!("open the image root {}", shown.display())).because(why);
            image_root::check(&image_root, &shown, false, refused)?;
        }
        let image_root = &*self.image_root.insert(image_root);
        let place = Place { settings: &self.settings, state: &self.state, files, image_root };
        // In its place before anything of it runs: if the rest fails, it is released like an open one.
        let open = self.open.insert(Open::make(groundwork, place)?);
        open.make_jail(place)?;
        open.start_sshd(place)?;
        tracing::info!(milliseconds = milliseconds(began), "the environment is open");
        files.touch(SSHD_LISTENING)?;
        if let Some(listening) = self.listening.take() {
            listening();
        }
        open.start_script(&self.settings)?;
        open.watchdog = Watchdog::start();
        self.listen();
        Ok(Event::Listening)
    }

    /// Registers the sources of the open environment.
    fn listen(&mut self) {
        let Some(open) = &self.open else { return };
        // One that is registered already, or cannot be, is no fault: at intervals, all are looked at.
        let _ = self.sources.add(&open.presence, Source::Sessions);
        let _ = open.jail.as_ref().map(|jail| self.sources.add(jail.link(), Source::Marks));
        let _ = open.script.as_ref().and_then(Script::output).map(|output| self.sources.add(output, Source::Script));
    }

    /// Marks that were made while the environment closes, in the image too: nobody in the jail watches that any more.
    fn late_marks(&mut self) -> Vec<Event> {
        const FAILED: Event = Event::Marked(Verdict::Failed);
        let mut marks = self.marks();
        let known = self.machine.verdict() == Some(Verdict::Failed) || marks.contains(&FAILED);
        let image_root = self.image_root.as_ref().filter(|_| self.settings.job.jailed);
        match self.files.as_ref().filter(|_| !known).map(|files| image_root::is_marked_failed(files, image_root)) {
            Some(Ok(true)) => {
                tracing::info!("marked failed while closing");
                marks.push(FAILED);
            }
            Some(Err(e)) if !marks.contains(&Event::Failed) => {
                tracing::error!("{e}; the image is taken as failed");
                marks.push(Event::Failed);
            }
            _ => {}
        }
        marks
    }

    /// Gives the image root back: no trace of ours, nothing mounted, everything on disk. Returns whether all of that
    /// was done.
    fn release(&mut self) -> bool {
        let mut cleanly = true;
        if let (Some(files), Some(image_root)) = (&self.files, &self.image_root) {
            if let Some(open) = self.open.take() {
                let place = Place { settings: &self.settings, state: &self.state, files, image_root };
                // An image that has failed is not worth a wait.
                let now = Instant::now();
                let in_grace = self.closing_since.map_or(now, |since| since + self.settings.close_grace);
                let is_failed = self.machine.verdict() == Some(Verdict::Failed);
                let limit = if is_failed { now } else { in_grace.max(now + TIME_TO_CLOSE_FILES) };
                cleanly &= open.release(place, limit, is_failed);
            }
            let path: PathBuf = files.path().join(self.settings.job.image_root());
            cleanly &= succeeded(mounts_below::unmount_below(&path));
            self.step("nothing is mounted in the image root");
            // First: what it writes to the same disk is then written with the rest.
            cleanly &= succeeded(sshd_setup::unconfigure_sshd(&self.settings).map(|_| ()));
            cleanly &= succeeded(image_root.sync().attempt(|| format!("write {} to its disk", path.display())));
            self.step("all is on its disk");
        }
        cleanly &= succeeded(self.state.remove());
        cleanly
    }

    /// Marks the image root with the verdict: in the parent and, for a jailed job, in the image.
    fn record(&self, verdict: Verdict) -> Event {
        let mut cleanly = true;
        let Some(files) = &self.files else { return Event::Recorded { verdict, cleanly } };
        if self.settings.job.jailed {
            let name = self.settings.job.image_root();
            let marked = match &self.image_root {
                Some(image_root) => image_root::mark(files, image_root, verdict),
                // The image root was never opened here, but whoever packs it looks for the mark in it too. A
                // half-unpacked one may have no place for a mark.
                None => {
                    let _ = image_root::open(files, name)
                        .and_then(|image_root| image_root::mark(files, &image_root, verdict));
                    Ok(())
                }
            };
            cleanly = succeeded(marked);
            if !cleanly && verdict == Verdict::Complete {
                // An image that is not to be packed must not look as if it were.
                return Event::Recorded { verdict, cleanly };
            }
        }
        if !succeeded(files.touch(verdict.signal_file())) {
            return Event::Unrecorded(verdict);
        }
        if verdict == Verdict::Failed {
            // If it stays, 'failed' wins all the same: not a reason to keep the others waiting for 'exiting'.
            succeeded(files.retract(Verdict::Complete.signal_file()));
        }
        self.step("the image root is released, and marked");
        Event::Recorded { verdict, cleanly }
    }

    /// Tells the others that nobody writes to the image root any more. Returns whether that could be done.
    fn announce(&self) -> bool {
        let Some(files) = &self.files else { return true };
        // Gives a full volume the inode that 'exiting' needs.
        let announced = files.release_reserve().and_then(|()| files.touch(EXITING));
        let cleanly = succeeded(announced);
        if cleanly {
            let verdict = self.machine.verdict().map(Verdict::signal_file);
            tracing::info!(verdict, "closed: '{EXITING}' created, nothing writes to the image root any more");
        }
        cleanly
    }
}

/// Milliseconds since `began`, in a type that the log writes as a number.
fn milliseconds(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX)
}

fn broken(error: &crate::error::Error) -> Event {
    tracing::error!("{error}");
    Event::Broken
}

fn how_ended(status: WaitStatus) -> String {
    match status {
        WaitStatus::Exited(_, code) => format!("has ended with exit code {code}"),
        WaitStatus::Signaled(_, signal, _) => format!("was killed by {signal}"),
        other => format!("has ended ({other:?})"),
    }
}

/// Tells the other containers that no environment will open on `parent`, so that nobody waits for one. For what goes
/// wrong before an environment exists; one that is open there, or has ended, is left alone. Without `ready`, `exiting`
/// is an earlier one's.
pub fn tell_refusal(parent: &std::path::Path) {
    if let Ok(Some(mut files)) = SignalFiles::open(parent)
        && files.claim().is_ok()
        && ![READY, EXITING].iter().all(|name| files.stands(name).unwrap_or(false))
    {
        succeeded(files.touch(Verdict::Failed.signal_file()).and_then(|()| files.touch(EXITING)));
    }
}
