//! The supervisor: carries out the actions of the state machine and reports events to it. It is PID 1 or a child
//! subreaper, so that every process of the job stays its descendant.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags};

use crate::environment::grace_period::{GracePeriod, Progress};
use crate::environment::groundwork::Groundwork;
use crate::environment::hang_up::hang_up;
use crate::environment::open::{Open, Place, succeeded};
use crate::environment::processes;
use crate::environment::restarts::Part;
use crate::environment::script::Script;
use crate::environment::settings::Settings;
use crate::environment::shell_wanted;
use crate::environment::sshd_setup;
use crate::environment::state_machine::{Action, Event, Machine, State};
use crate::environment::watchdog::Watchdog;
use crate::error::{Attempt, Error, Result};
use crate::jail::link::Message;
use crate::jailer::open::TIME_TO_CLOSE_FILES;
use crate::job::action::Action as JobAction;
use crate::sshd::daemon::Daemon;
use crate::sys::poll::{self, Sources};
use crate::sys::process::reap;
use crate::sys::signals::Signals;
use crate::sys::tree::Tree;
use crate::verdict::Verdict;
use crate::volume::image_root;
use crate::volume::layout::{EXITING, READY, SSHD_LISTENING};
use crate::volume::mounts_below;
use crate::volume::signal_files::{LOOK_EVERY, SignalFiles, Stamp, Watch};
use crate::volume::state_directory::StateDirectory;

/// How long to wait for a missing image root parent. A pod's volumes are mounted before its containers start; on one
/// machine a mount may come later.
const TIME_FOR_PARENT: Duration = Duration::from_secs(30);

/// How an environment ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Verdict on the image; `None` if no shell was wanted.
    pub verdict: Option<Verdict>,
    /// True if somebody has marked the image failed.
    pub(crate) given_up: bool,
    /// Exit code: 0 for complete and failed, 1 after an error, 128 + n after signal n.
    pub exit_code: u8,
}

/// Runs a build environment from start to end. `files` is the image root parent if the caller has claimed it already;
/// `listening` is called once, when sshd accepts connections.
pub fn run(settings: Settings, files: Option<SignalFiles>, listening: impl FnOnce()) -> Result<Outcome> {
    if !shell_wanted::is_wanted(&settings)? {
        return Ok(Outcome { verdict: None, given_up: false, exit_code: 0 });
    }
    let blocked = [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];
    let signals = Signals::block(&blocked).attempt(|| "block signals")?;
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
    supervisor.run()
}

/// Sources that wake the event loop, in the order in which they are handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    Script,
    Signals,
    /// The image root parent has changed, or the jail's init has found a mark.
    Marks,
    Sessions,
    /// A session or connection that the closing environment waited for has ended.
    End,
    /// Poll of everything that raises no event.
    Interval,
}

struct Supervisor<F> {
    settings: Settings,
    machine: Machine,
    /// When the machine entered its current state.
    since: SystemTime,
    began: Instant,
    sources: Sources<Source>,
    /// When [`Source::Interval`] is next due.
    next_look: Instant,
    signals: Signals,
    watch: Watch,
    state: StateDirectory,
    groundwork: Option<Groundwork>,
    files: Option<SignalFiles>,
    /// Stamps of verdict files that existed when this run began.
    old_marks: [Option<Stamp>; 2],
    image_root: Option<Tree>,
    open: Option<Open>,
    /// When the environment began to close; each step is logged with the time since then.
    closing_since: Option<Instant>,
    hung_up: Vec<Pid>,
    grace_period: Option<GracePeriod>,
    listening: Option<F>,
}

impl<F: FnOnce()> Supervisor<F> {
    fn run(&mut self) -> Result<Outcome> {
        self.open_parent()?;
        tracing::info!(
            parent = %self.settings.job.parent.display(),
            jailed = self.settings.job.jailed,
            job = self.settings.job.id.as_deref(),
            "waiting for '{READY}'",
        );
        if self.files.is_none() {
            tracing::warn!(
                "{} does not exist: waiting up to {} s for the volume to be mounted",
                self.settings.job.parent.display(),
                TIME_FOR_PARENT.as_secs()
            );
        }
        match Groundwork::lay(&self.settings, &self.state) {
            Ok(groundwork) => self.groundwork = Some(groundwork),
            Err(e) => self.handle(broken(&e)),
        }
        while self.machine.state() != State::Done {
            for event in self.wait()? {
                self.handle(event);
            }
        }
        let Self { machine, .. } = self;
        Ok(Outcome { verdict: machine.verdict(), given_up: machine.is_given_up(), exit_code: machine.exit_code() })
    }

    /// Reports an event to the machine, carries out its actions, and reports their results in turn.
    fn handle(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let before = self.machine.state();
            let actions = self.machine.on(event);
            if let Event::Died(part, _) = event
                && self.machine.state() == State::Grace
                && before == State::Serving
            {
                tracing::error!("{} died too often within a minute: closing as failed", part.name());
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
                        self.step("sshd accepts no new connections");
                    }
                }
                None
            }
            Action::HangUp(verdict, grace) => {
                if let Some(open) = &mut self.open {
                    let running = open.running();
                    let marked = self.settings.marked.for_verdict(verdict);
                    self.hung_up = hang_up(&open.interactive(running), marked, grace);
                }
                if !self.hung_up.is_empty() {
                    self.step("interactive shells were notified and hung up");
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
        // A process may mark the image while the process is being ended, and another container at any time. Such a mark
        // counts until 'exiting' exists.
        let late = if closing { self.late_marks() } else { Vec::new() };
        late.into_iter().chain(answer).collect()
    }

    /// Logs a step of closing the environment.
    fn step(&self, what: &str) {
        let since = self.closing_since.map_or(0, milliseconds);
        tracing::info!(milliseconds = since, "closing: {what}");
    }

    /// Sleeps until a source is ready or the next poll is due. Returns the events.
    fn wait(&mut self) -> Result<Vec<Event>> {
        let restarts = self.open.iter().flat_map(|open| &open.restarts).map(|(_, at)| *at);
        let moments = restarts.chain(self.grace_period.as_ref().map(|grace_period| grace_period.next_look));
        let next = moments.fold(self.next_look, Instant::min);
        let mut ready = self.sources.wait(next.saturating_duration_since(Instant::now()));
        if Instant::now() >= self.next_look {
            self.next_look = Instant::now() + LOOK_EVERY;
            // Poll all sources: a network file system raises no event for another node's writes.
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
                    self.open.iter_mut().for_each(Open::look_at_refusals);
                    if self.machine.state() == State::Serving {
                        events.extend(self.check_limits());
                    }
                }
            }
        }
        if self.machine.state() == State::Serving {
            events.extend(self.restart_due());
        }
        if let (Some(grace_period), Some(open)) = (&mut self.grace_period, &mut self.open) {
            match grace_period.look(open.running(), open.script_runs()) {
                Progress::Idle => events.push(Event::Idle),
                Progress::Over => events.push(Event::GraceOver),
                Progress::Running => {
                    // A descriptor that cannot be registered is polled at `next_look`.
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
                    .advise("mount the volume there, or name its directory in the argument or in IMAGE_ROOT_PARENT");
                Some(broken(&error))
            }
            Some(Ok(true)) => Some(Event::Ready),
            // An error means that 'ready' is something other than a regular file, so the signal file cannot be created.
            Some(Err(e)) => Some(broken(&e)),
            _ => self.mark_instead_of_ready(),
        })
    }

    fn look_at_sessions(&mut self) {
        let Some(open) = &mut self.open else { return };
        for client in open.session_list.receive() {
            let _ = client.send(self.status().to_string().as_bytes());
        }
    }

    /// Report that `ims-sshd status` prints.
    fn status(&self) -> serde_json::Value {
        let open = self.open.as_ref();
        serde_json::json!({
            "image_root_parent": self.settings.job.parent,
            "state": self.machine.state().stage().name(),
            "since": humantime::format_rfc3339_seconds(self.since).to_string(),
            "tier": open.and_then(|open| open.jail.as_ref()).map_or("plain", |jail| jail.tier.name()),
            "job": self.settings.job.id,
            "verdict": self.machine.verdict().map(Verdict::signal_file),
            "sessions": open.map(|open| open.session_list.sessions().collect::<Vec<_>>()),
        })
    }

    /// Restarts parts whose wait is over.
    fn restart_due(&mut self) -> Vec<Event> {
        let now = Instant::now();
        let is_due = |(open, _): &(&mut Open, Place<'_>)| open.restarts.iter().any(|(_, at)| *at <= now);
        let Some((open, place)) = self.opened().filter(is_due) else { return Vec::new() };
        let failed = open.restart_due(place);
        self.listen();
        failed.into_iter().map(|part| Event::Died(part, Instant::now())).collect()
    }

    /// Checks, at each poll, the time limits and the image root.
    fn check_limits(&mut self) -> Option<Event> {
        let (open, place) = self.opened()?;
        let running = open.running();
        let busy = open.script_runs() || !running.sessions.is_empty();
        let shells = open.interactive(running);
        open.watchdog.check(
            busy,
            open.session_list.last_heard(),
            place.settings,
            &shells,
            place.files,
            place.image_root,
        )
    }

    /// The open environment and its place.
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

    /// A mark that an administrator, or a sidecar that has given up, set instead of `ready`.
    fn mark_instead_of_ready(&self) -> Option<Event> {
        let verdict = self.files.as_ref()?.verdict_instead_of_ready(self.old_marks[Verdict::Failed as usize])?;
        tracing::info!(
            verdict = verdict.signal_file(),
            "marked in the image root parent while waiting for '{READY}'; the sidecar's log may say why"
        );
        Some(Event::Marked(verdict))
    }

    /// New marks in the jail and in the image root parent.
    fn marks(&mut self) -> Vec<Event> {
        let mut marks = Vec::new();
        if let Some(jail) = self.open.as_ref().and_then(|open| open.jail.as_ref()) {
            let readable = || {
                let mut source = [PollFd::from_borrowed_fd(jail.link(), PollFlags::IN)];
                poll::wait(&mut source, Duration::ZERO).is_ok_and(|ready| ready > 0)
            };
            while readable() {
                let Some(message) = jail.receive() else {
                    // No message means that the init has ended. Its socket would stay readable, and the event loop
                    // would spin.
                    self.sources.remove(jail.link());
                    break;
                };
                match message {
                    Message::Marked(verdict, owner) if image_root::counts(self.settings.markers, verdict, owner) => {
                        tracing::info!(verdict = verdict.signal_file(), "marked from inside the jail");
                        marks.push(Event::Marked(verdict));
                    }
                    Message::Failed { why, .. } => tracing::error!("{why}"),
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
                tracing::error!("{e}; the image counts as failed");
                marks.push(Event::Failed);
            }
            _ => {}
        }
        marks
    }

    /// Logs the end of a child, and returns the event that it means for the machine.
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
            tracing::error!("the customization script {script} {how}: closing as failed; see its output above");
            return Some(Event::Failed);
        }
        if open.daemon.take_if(|daemon| daemon.pid == pid).is_some() && self.machine.state() == State::Serving {
            let words = Daemon::last_words(&self.settings.sshd);
            tracing::error!("sshd {}; its log ends with: {words}", how_ended(status));
            return Some(Event::Died(Part::Sshd, Instant::now()));
        }
        if open.jail.as_ref().is_some_and(|jail| jail.init() == pid) && self.machine.state() == State::Serving {
            tracing::error!("the jail's init {}; every process in the jail ended with it", how_ended(status));
            return Some(Event::Died(Part::Jail, Instant::now()));
        }
        None
    }

    fn prepare(&mut self) -> Result<Event> {
        let began = Instant::now();
        let (Some(files), Some(groundwork)) = (&self.files, self.groundwork.take()) else { return Ok(Event::Broken) };
        if files.stands(EXITING)? {
            let error = Error::new(format!("open {} again", files.path().display()))
                .because(format!("'{EXITING}' exists: its environment has ended, and packing may have begun"))
                .advise("start a new job; a job must remove 'exiting' before it creates 'ready'");
            // Forget the parent, so that the verdict file of the ended environment is not changed.
            self.files = None;
            return Err(error);
        }
        files.remove_marks_of_earlier_jobs(self.old_marks)?;
        files.reserve()?;
        let image_root = image_root::open(files, self.settings.job.image_root())?;
        // Do not check a create job's image root: a failed build is shown as far as it got.
        if self.settings.job.action == Some(JobAction::Customize) {
            let shown = files.path().join(self.settings.job.image_root());
            let refused = |why| Error::new(format!("open the image root {}", shown.display())).because(why);
            image_root::check(&image_root, &shown, false, refused)?;
        }
        let image_root = &*self.image_root.insert(image_root);
        let place = Place { settings: &self.settings, state: &self.state, files, image_root };
        // Store the environment before the jail and sshd start, so that an error releases it like an open one.
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
        // Ignore errors, such as a source that is registered already: all sources are polled as well.
        let _ = self.sources.add(&open.session_list, Source::Sessions);
        let _ = open.jail.as_ref().map(|jail| self.sources.add(jail.link(), Source::Marks));
        let _ = open.script.as_ref().and_then(Script::output).map(|output| self.sources.add(output, Source::Script));
    }

    /// Marks that were set while the environment closes. Checks the image for marks too, because the jail's init, which
    /// watched for them, has ended.
    fn late_marks(&mut self) -> Vec<Event> {
        const FAILED: Event = Event::Marked(Verdict::Failed);
        let mut marks = self.marks();
        let known = self.machine.verdict() == Some(Verdict::Failed) || marks.contains(&FAILED);
        let image_root = self.image_root.as_ref().filter(|_| self.settings.job.jailed);
        let is_marked_failed = |files| image_root::is_marked_failed(files, image_root, self.settings.markers);
        match self.files.as_ref().filter(|_| !known).map(is_marked_failed) {
            Some(Ok(true)) => {
                tracing::info!("marked failed while closing");
                marks.push(FAILED);
            }
            Some(Err(e)) if !marks.contains(&Event::Failed) => {
                tracing::error!("{e}; the image counts as failed");
                marks.push(Event::Failed);
            }
            _ => {}
        }
        marks
    }

    /// Releases the image root: removes everything of ours, unmounts, syncs. Returns whether all of that succeeded.
    fn release(&mut self) -> bool {
        let mut cleanly = true;
        if let (Some(files), Some(image_root)) = (&self.files, &self.image_root) {
            if let Some(open) = self.open.take() {
                let place = Place { settings: &self.settings, state: &self.state, files, image_root };
                // Do not wait for open files of a failed image.
                let now = Instant::now();
                let in_grace = self.closing_since.map_or(now, |since| since + self.settings.close_grace);
                let is_failed = self.machine.verdict() == Some(Verdict::Failed);
                let limit = if is_failed { now } else { in_grace.max(now + TIME_TO_CLOSE_FILES) };
                cleanly &= open.release(place, limit, is_failed);
            }
            let path: PathBuf = files.path().join(self.settings.job.image_root());
            cleanly &= succeeded(mounts_below::unmount_below(&path));
            self.step("nothing is mounted in the image root");
            // Change the configuration before the sync, since the configuration may be on the same disk.
            cleanly &= succeeded(sshd_setup::unconfigure_sshd(&self.settings).map(|_| ()));
            cleanly &= succeeded(image_root.sync().attempt(|| format!("sync {} to disk", path.display())));
            self.step("the image root is synced to disk");
        }
        cleanly &= succeeded(self.state.remove());
        cleanly
    }

    /// Records the verdict: in the parent and, for a jailed job, in the image.
    fn record(&self, verdict: Verdict) -> Event {
        let mut cleanly = true;
        let Some(files) = &self.files else { return Event::Recorded { verdict, cleanly } };
        if self.settings.job.jailed {
            let name = self.settings.job.image_root();
            let marked = match &self.image_root {
                Some(image_root) => image_root::mark(files, image_root, verdict),
                // The image root was never opened, but a sidecar looks for the mark in it too. Ignore errors: a
                // half-unpacked image root may lack the directory for the mark.
                None => {
                    let _ = image_root::open(files, name)
                        .and_then(|image_root| image_root::mark(files, &image_root, verdict));
                    Ok(())
                }
            };
            cleanly = succeeded(marked);
            if !cleanly && verdict == Verdict::Complete {
                // Do not create 'complete': the image must not be packed.
                return Event::Recorded { verdict, cleanly };
            }
        }
        if !succeeded(files.touch(verdict.signal_file())) {
            return Event::Unrecorded(verdict);
        }
        if verdict == Verdict::Failed {
            // Only log an error: 'failed' wins over a 'complete' that stays, and the other containers wait for
            // 'exiting'.
            succeeded(files.retract(Verdict::Complete.signal_file()));
        }
        self.step("the image root is released and the verdict recorded");
        Event::Recorded { verdict, cleanly }
    }

    /// Creates `exiting`: nothing writes to the image root any more. Returns whether that succeeded.
    fn announce(&self) -> bool {
        let Some(files) = &self.files else { return true };
        // Free the reserved files first: on a full volume 'exiting' needs one of their inodes.
        let announced = files.release_reserve().and_then(|()| files.touch(EXITING));
        let cleanly = succeeded(announced);
        if cleanly {
            let verdict = self.machine.verdict().map(Verdict::signal_file);
            tracing::info!(verdict, "closed: '{EXITING}' created, nothing writes to the image root any more");
        }
        cleanly
    }
}

/// Milliseconds since `began`, as a type that the log prints as a number.
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

/// Creates `failed` and `exiting` in `parent` after an error that comes before the environment exists, so that no other
/// container waits for the environment. Changes nothing if an environment is open on `parent` or has ended there. It
/// has ended there if both `ready` and `exiting` exist; `exiting` without `ready` is left over from an earlier job.
pub fn tell_refusal(parent: &std::path::Path) {
    if let Ok(Some(mut files)) = SignalFiles::open(parent)
        && files.claim().is_ok()
        && ![READY, EXITING].iter().all(|name| files.stands(name).unwrap_or(false))
    {
        succeeded(files.touch(Verdict::Failed.signal_file()).and_then(|()| files.touch(EXITING)));
    }
}
