//! Carries the machine's actions out and brings it what happens. As PID 1 or as a subreaper: every process of the job is a
//! descendant, whoever started it.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::error::{Attempt, Result};
use crate::jail::link::Message;
use crate::lifecycle::environment::{self, Groundwork};
use crate::lifecycle::machine::{Action, Event, Machine, State};
use crate::lifecycle::open_jail::{self, OpenJail};
use crate::lifecycle::processes;
use crate::lifecycle::script::Script;
use crate::lifecycle::sessions::{Farewell, Progress, hang_up};
use crate::lifecycle::settings::{Action as JobAction, Settings};
use crate::lifecycle::signal_files::{BUILD_FAILED, EXITING, READY, SSHD_LISTENING, SignalFiles, Watch};
use crate::lifecycle::state::StateFolder;
use crate::sshd::daemon::Daemon;
use crate::sys::signals::Signals;
use crate::sys::tree::Tree;
use crate::verdict::Verdict;

/// How an environment ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// What became of the image; nothing if no shell was wanted.
    pub verdict: Option<Verdict>,
    /// The exit code of the contract: 0 for complete and failed, 1 if the environment broke, 128 + n after signal n.
    pub exit_code: u8,
}

/// How long a signal file can stay unseen at the most where the file system raises no event.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Runs a build environment from start to end. `files` is the image root's parent if the caller has claimed it already; `listening` is
/// called once, when sshd accepts connections.
pub fn run(settings: Settings, files: Option<SignalFiles>, listening: impl FnOnce()) -> Result<Outcome> {
    if !shell_is_wanted(&settings)? {
        return Ok(Outcome { verdict: None, exit_code: 0 });
    }
    let held = [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];
    let mut supervisor = Supervisor {
        machine: Machine::new(settings.close_grace),
        signals: Signals::hold(&held).attempt(|| "hold back signals")?,
        watch: Watch::new()?,
        state: StateFolder::of(&settings.parent)?,
        groundwork: None,
        files,
        image_root: None,
        jail: None,
        daemon: None,
        script: None,
        script_output: false,
        hung_up: Vec::new(),
        farewell: None,
        look_again: None,
        listening: Some(listening),
        settings,
    };
    nix::sys::prctl::set_child_subreaper(true).attempt(|| "become the parent of orphaned processes")?;
    supervisor.live()
}

/// A create job's shell is for looking at a failed build, if somebody asked for it.
fn shell_is_wanted(settings: &Settings) -> Result<bool> {
    if settings.action == JobAction::Customize {
        return Ok(true);
    }
    let failed = match SignalFiles::open(&settings.parent)? {
        Some(files) => files.stands(BUILD_FAILED)?,
        None => false,
    };
    match (failed, settings.debug) {
        (true, true) => return Ok(true),
        (true, false) => tracing::info!("the build failed, and ENABLE_DEBUG is not true: no shell is wanted"),
        (false, _) => tracing::info!("the build did not fail: no shell is wanted"),
    }
    Ok(false)
}

struct Supervisor<F> {
    settings: Settings,
    machine: Machine,
    signals: Signals,
    watch: Watch,
    state: StateFolder,
    groundwork: Option<Groundwork>,
    files: Option<SignalFiles>,
    image_root: Option<Tree>,
    jail: Option<OpenJail>,
    daemon: Option<Daemon>,
    script: Option<Script>,
    /// Whether the script's output can still grow; something that it started may hold it after its end.
    script_output: bool,
    hung_up: Vec<Pid>,
    farewell: Option<Farewell>,
    look_again: Option<Instant>,
    listening: Option<F>,
}

impl<F: FnOnce()> Supervisor<F> {
    fn live(&mut self) -> Result<Outcome> {
        self.open_parent()?;
        tracing::info!(
            parent = %self.settings.parent.display(),
            jailed = self.settings.jailed,
            job = self.settings.job.as_deref().unwrap_or("none"),
            "waiting for '{READY}'",
        );
        match Groundwork::lay(&self.settings) {
            Ok(groundwork) => self.groundwork = Some(groundwork),
            Err(e) => self.happen(broken(&e)),
        }
        while self.machine.state() != State::Done {
            let events = self.look()?;
            if events.is_empty() {
                self.wait();
            }
            for event in events {
                self.happen(event);
            }
        }
        Ok(Outcome { verdict: self.machine.verdict(), exit_code: self.machine.exit_code() })
    }

    /// Brings the machine an event, and what comes of it.
    fn happen(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let before = self.machine.state();
            let actions = self.machine.on(event);
            if self.machine.state() != before {
                tracing::debug!(state = ?self.machine.state(), "next");
            }
            for action in actions {
                events.extend(self.carry_out(action));
            }
        }
    }

    fn carry_out(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Prepare => Some(self.prepare().unwrap_or_else(|e| broken(&e))),
            Action::StopListening => {
                if let Some(daemon) = &self.daemon {
                    daemon.stop_listening();
                    tracing::info!("sshd takes no new connections");
                }
                None
            }
            Action::HangUp(verdict) => {
                tracing::info!(verdict = verdict.signal_file(), "closing");
                self.hung_up = hang_up(verdict);
                None
            }
            Action::AwaitSessions(grace) => {
                self.farewell = Some(Farewell::start(grace, std::mem::take(&mut self.hung_up)));
                None
            }
            Action::EndProcesses => {
                self.farewell = None;
                if let Some(jail) = &self.jail {
                    jail.end();
                }
                Some(processes::end_all().map_or_else(|e| broken(&e), |()| Event::AllEnded))
            }
            Action::Release(verdict) => Some(Event::Released { cleanly: self.release(verdict) }),
        }
    }

    /// What has happened since the last look.
    fn look(&mut self) -> Result<Vec<Event>> {
        self.watch.drain();
        let mut events = Vec::new();
        while let Ok(Some(signal)) = self.signals.next() {
            if signal != Signal::SIGCHLD {
                tracing::info!("received {signal}: closing as failed");
                events.push(Event::Stop(signal));
            }
        }
        self.log_script();
        events.extend(processes::reap().into_iter().filter_map(|status| self.ended(status)));
        match self.machine.state() {
            State::Waiting => {
                self.open_parent()?;
                if let Some(files) = &self.files
                    && files.stands(READY).unwrap_or(false)
                {
                    events.push(Event::Ready);
                }
            }
            State::Serving | State::Grace | State::Ending => events.extend(self.marks()),
            State::Preparing | State::Releasing | State::Done => {}
        }
        if let Some(farewell) = &mut self.farewell {
            let script = self.script.is_some();
            self.look_again = None;
            match farewell.look(self.daemon.as_ref().map(|d| d.pid), script) {
                Progress::Idle => events.push(Event::Idle),
                Progress::Over => events.push(Event::GraceOver),
                Progress::Until(moment) => self.look_again = Some(moment),
            }
        }
        Ok(events)
    }

    fn open_parent(&mut self) -> Result<()> {
        if self.files.is_none() {
            self.watch.on(&self.settings.parent);
            if let Some(mut files) = SignalFiles::open(&self.settings.parent)? {
                files.claim()?;
                self.files = Some(files);
            }
        }
        self.watch.on(&self.settings.parent);
        Ok(())
    }

    /// Marks that have been made, in the jail and outside, and that the machine does not know yet.
    fn marks(&mut self) -> Vec<Event> {
        let mut marks = Vec::new();
        if let Some(jail) = &self.jail {
            let mut source = [PollFd::from_borrowed_fd(jail.link(), PollFlags::IN)];
            if rustix::event::poll(&mut source, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
                && let Some(Message::Marked(verdict)) = jail.told()
            {
                tracing::info!(verdict = verdict.signal_file(), "marked from inside the jail");
                marks.push(Event::Marked(verdict));
            }
        }
        match self.files.as_ref().map(SignalFiles::verdict) {
            Some(Ok(Some(verdict))) if self.machine.verdict() < Some(verdict) => {
                tracing::info!(verdict = verdict.signal_file(), "marked in the image root parent");
                marks.push(Event::Marked(verdict));
            }
            Some(Err(e)) if self.machine.verdict() != Some(Verdict::Failed) => {
                tracing::error!("{e}: taken as failed");
                marks.push(Event::Marked(Verdict::Failed));
            }
            _ => {}
        }
        marks
    }

    /// What it means that a child has ended.
    fn ended(&mut self, status: WaitStatus) -> Option<Event> {
        let pid = status.pid()?;
        if self.script.as_ref().is_some_and(|s| s.pid() == pid) {
            self.log_script();
            self.script = None;
            if matches!(status, WaitStatus::Exited(_, 0)) {
                tracing::info!("the customization script has ended");
                return None;
            }
            let how = how_ended(status);
            if self.settings.debug {
                tracing::error!("the customization script {how}; ENABLE_DEBUG is true, so the environment stays open");
                return None;
            }
            tracing::error!("the customization script {how}: the image is marked failed");
            return Some(Event::Marked(Verdict::Failed));
        }
        if self.daemon.as_ref().is_some_and(|d| d.pid == pid) {
            self.daemon = None;
            if self.machine.state() == State::Serving {
                tracing::error!("sshd {}: nobody can log in any more", how_ended(status));
                return Some(Event::Broken);
            }
        }
        if self.jail.as_ref().is_some_and(|j| j.init() == pid) && self.machine.state() != State::Ending {
            tracing::error!("the jail's init {}, and with it every process in the jail", how_ended(status));
            return Some(Event::Broken);
        }
        None
    }

    fn prepare(&mut self) -> Result<Event> {
        let began = Instant::now();
        let settings = &self.settings;
        let (Some(files), Some(groundwork)) = (&self.files, &self.groundwork) else { return Ok(Event::Broken) };
        if files.stands(EXITING)? {
            return Err(crate::error::Error::new(format!("open {} again", files.path().display()))
                .because(format!(
                    "'{EXITING}' stands there: this environment has ended and the image may be being packed"
                ))
                .advise("whoever starts a new job removes it before creating 'ready'"));
        }
        let image_root = environment::open_image_root(files, settings.image_root())?;
        // An earlier environment that was killed may have left something behind.
        open_jail::clear_mount_points(&image_root, files.parent())?;
        let restarted = files.stands(SSHD_LISTENING)?;
        if restarted {
            tracing::warn!("an environment was open on this image root before and was killed: going on with it");
            files.remove(SSHD_LISTENING)?;
        } else if settings.jailed {
            environment::remove_old_marks(&image_root)?;
        }
        let image_root = &*self.image_root.insert(image_root);
        let effective = environment::configure_sshd(settings, &self.state)?;
        if settings.jailed {
            let jail = environment::make_jail(settings, files, image_root, groundwork, &effective, &self.state)?;
            tracing::info!(tier = "namespace", dkms = settings.dkms, "the jail is made");
            self.jail = Some(jail);
        }
        let daemon = environment::start_sshd(settings, &effective)?;
        tracing::info!(pid = daemon.pid.as_raw(), milliseconds = began.elapsed().as_millis(), "sshd is listening");
        self.daemon = Some(daemon);
        files.touch(SSHD_LISTENING)?;
        if let Some(listening) = self.listening.take() {
            listening();
        }
        self.start_script()?;
        Ok(Event::Listening)
    }

    fn start_script(&mut self) -> Result<()> {
        let Some(path) = self.settings.script.as_ref().filter(|p| p.exists()) else { return Ok(()) };
        let mut variables = self.settings.session_variables.clone();
        variables.push(("IMAGE_ROOT_PARENT".into(), self.settings.parent.display().to_string()));
        tracing::info!("customization script {} starts", path.display());
        self.script = Some(Script::start(path, &variables)?);
        self.script_output = true;
        Ok(())
    }

    fn log_script(&mut self) {
        if self.script_output
            && let Some(script) = &mut self.script
        {
            self.script_output = script.log_output();
        }
    }

    /// Gives the image root back: no trace of ours, nothing mounted, everything on disk; then the verdict, then `exiting`, last.
    fn release(&mut self, verdict: Verdict) -> bool {
        let mut cleanly = true;
        let mut note = |result: Result<()>| {
            if let Err(e) = result {
                tracing::error!("{e}");
                cleanly = false;
            }
        };
        if let (Some(files), Some(image_root)) = (&self.files, &self.image_root) {
            if let Some(jail) = self.jail.take() {
                note(jail.clear(image_root, files.parent(), &self.state));
            }
            if self.settings.jailed {
                note(environment::mark_in_image(image_root, verdict));
            }
            let path: PathBuf = files.path().join(self.settings.image_root());
            note(processes::unmount_below(&path));
            note(image_root.sync().attempt(|| format!("write {} to its disk", path.display())));
            note(environment::unconfigure_sshd(&self.settings));
        }
        note(self.state.remove());
        let Some(files) = &self.files else { return cleanly };
        let verdict = if cleanly { verdict } else { Verdict::Failed };
        let marked = (|| {
            if verdict == Verdict::Failed {
                files.remove(Verdict::Complete.signal_file())?;
            }
            files.touch(verdict.signal_file())
        })();
        let marked = marked.and_then(|()| files.touch(EXITING));
        match marked {
            Ok(()) => {
                tracing::info!(
                    verdict = verdict.signal_file(),
                    "'{EXITING}': nobody writes to the image root any more"
                );
            }
            Err(e) => {
                tracing::error!("{e}");
                cleanly = false;
            }
        }
        cleanly
    }

    /// Sleeps until something happens, or until it is time to look whether something has.
    fn wait(&self) {
        let mut sources = vec![
            PollFd::from_borrowed_fd(self.signals.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.watch.as_fd(), PollFlags::IN),
        ];
        let link = self.jail.as_ref().map(OpenJail::link);
        if let Some(link) = link {
            sources.push(PollFd::from_borrowed_fd(link, PollFlags::IN));
        }
        if let Some(script) = self.script.as_ref().filter(|_| self.script_output) {
            sources.push(PollFd::from_borrowed_fd(script.as_fd(), PollFlags::IN));
        }
        if let Some(farewell) = &self.farewell {
            sources.extend(farewell.ends());
        }
        let sooner = self.look_again.map(|moment| moment.saturating_duration_since(Instant::now()));
        let limit = sooner.map_or(LOOK_EVERY, |s| s.min(LOOK_EVERY));
        let limit = Timespec { tv_sec: limit.as_secs().cast_signed(), tv_nsec: limit.subsec_nanos().into() };
        let _ = rustix::event::poll(&mut sources, Some(&limit));
    }
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

/// Tells the other containers that no environment will open on `parent`, so that nobody waits for one. For input that was refused
/// before an environment existed; one that is open there is left alone.
pub fn tell_refusal(parent: &std::path::Path) {
    if let Ok(Some(mut files)) = SignalFiles::open(parent)
        && files.claim().is_ok()
    {
        let told = files.touch(Verdict::Failed.signal_file()).and_then(|()| files.touch(EXITING));
        if let Err(e) = told {
            tracing::error!("{e}");
        }
    }
}
