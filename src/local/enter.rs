//! `ims-sshd enter`: the jail without SSH, in this terminal.

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{SetArg, Termios, tcgetattr, tcsetattr};
use nix::sys::wait::WaitStatus;
use nix::unistd::{Pid, getpgrp, tcgetpgrp};
use rustix::event::{PollFd, PollFlags};

use crate::environment::processes;
use crate::environment::settings::of_jail;
use crate::environment::stage::Stage;
use crate::error::{Attempt, Error, Result};
use crate::jail::arguments::Arguments;
use crate::jail::binds::Bind;
use crate::jail::link::Message;
use crate::jail::plan::Plan;
use crate::jail::tier::Tier;
use crate::jailer::emulation;
use crate::jailer::open::{self, OpenJail, TIME_TO_CLOSE_FILES, Wanted};
use crate::jailer::trial;
use crate::local::claim::{is_claimed, remove_directory};
use crate::local::directory::refuse_while_used;
use crate::local::left_over::clear_left_over;
use crate::local::mounts;
use crate::local::register;
use crate::local::run::{End, Fate, Run};
use crate::local::run_directory::RunDirectory;
use crate::local::script::Script;
use crate::local::unattended::Unattended;
use crate::printable::Printable;
use crate::sys::poll;
use crate::sys::process::end_like;
use crate::sys::signals::{Signals, unblock_signals};
use crate::sys::tree::Tree;
use crate::sys::umask;
use crate::transfer::without_query;
use crate::verdict::{Markers, Verdict};
use crate::volume::image_root;
use crate::volume::state_directory::StateDirectory;

/// The command to run, and its environment.
#[derive(Debug)]
pub struct Entry {
    /// A program of the image with its arguments; the login shell if empty.
    pub command: Vec<OsString>,
    /// A script of this machine to run instead of the command.
    pub script: Option<Script>,
    /// Variables to set for the command.
    pub variables: Vec<(String, String)>,
    /// Files and directories of this machine to show in the jail.
    pub binds: Vec<Bind>,
    /// The answer to the question about the changes, if the command line gives one.
    pub answer: Option<Answer>,
    /// True if the variable `JOB_ENABLE_DKMS` has an effect.
    pub heeds_dkms: bool,
}

impl Entry {
    /// The command or script; `None` for a shell that a person uses.
    fn unattended(&self) -> Option<Unattended> {
        let of = |what, content| Unattended::of(what, &self.command, content, &self.variables, &self.binds);
        match &self.script {
            Some(script) => Some(of("script", script.content())),
            None => (!self.command.is_empty()).then(|| of("command", &[])),
        }
    }

    /// States that the command, script or shell failed, and how.
    fn failure(&self, status: WaitStatus) -> String {
        let what = match &self.script {
            Some(_) => "script",
            None if self.command.is_empty() => "shell",
            None => "command",
        };
        match status {
            WaitStatus::Signaled(_, signal, _) => format!("the {what} was killed by {signal}"),
            WaitStatus::Exited(_, code) => ended_with(what, code),
            _ => format!("the {what} failed"),
        }
    }
}

/// States that `what` failed with the exit code `code`.
pub(crate) fn ended_with(what: &str, code: i32) -> String {
    format!("the {what} ended with exit code {code}")
}

/// The command line's answer to the question at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// `--yes`.
    Yes,
    /// `--discard`.
    Discard,
}

/// Runs the command in a jail around the image root and then ends everything inside. Publishes, keeps or discards the
/// changes. Returns the command's exit code, or 0 for a published image. If a signal killed the command, dies of the
/// same signal.
pub fn run(mut run: Run, entry: &Entry) -> Result<u8> {
    open::program()?;
    let heeded = |(name, _): &(OsString, OsString)| entry.heeds_dkms || name != "JOB_ENABLE_DKMS";
    let (tiers, hostname, dkms, grace) = of_jail(std::env::vars_os().filter(heeded))?;
    let (decides, end, in_place) = (run.decides(), run.end, run.in_place);
    if !run.is_in_place() {
        // Must precede opening anything: a descriptor opened earlier belongs to the machine's mount namespace.
        mounts::own_mounts()?;
    }
    run.unattended = entry.unattended();
    let question = Question { source: without_query(&run.named), in_place };
    let is_discarded = !decides && !run.is_in_place();
    let registered = run.register()?;
    let label = registered.name();
    let ended = run.carry_out(&registered, exited(0), |image_root, markers| {
        if is_discarded {
            let source = &question.source;
            let is_chosen = entry.answer == Some(Answer::Discard);
            let instead = if is_chosen { "" } else { "; --output STORE publishes it instead" };
            tracing::info!("changes to {source} are discarded at the end{instead}");
        }
        let is_shell = entry.command.is_empty() && entry.script.is_none();
        let is_unattended = decides || entry.answer == Some(Answer::Yes);
        let grace = is_unattended.then_some(grace);
        let answer = entry.answer;
        let end_of_changes = decides.then_some(end);
        let session =
            Session { is_shell, grace, answer, end: end_of_changes, in_place, markers, tiers, dkms, hostname, label };
        let at_terminal = session.is_at_terminal();
        let Ended { status, mut mark, mut stopped, is_given_up } = session.run(image_root, entry, &registered)?;
        if is_given_up {
            (mark, stopped) = (Some(Verdict::Failed), None);
        }
        // Not for a person at the shell, who saw this message when the shell was hung up.
        if let Some(mark) = mark.filter(|_| !at_terminal) {
            tracing::info!("the image was marked {}", mark.signal_file());
        }
        let verdict = mark.filter(|mark| *mark == Verdict::Failed || !has_failed(status, at_terminal, true));
        // A command that changes a directory in place handles signals itself, as under chroot, unless `--yes` is given.
        let stopped = stopped.filter(|_| decides || entry.answer == Some(Answer::Yes));
        let status = stopped.map_or(status, |signal| exited(128 + signal as i32));
        if !decides {
            if let Some(signal) = stopped {
                tracing::warn!("interrupted by {signal}");
            }
            let marked_to_discard = mark == Some(Verdict::Failed) || mark.is_some() && is_discarded;
            // A failure matters only for the command of `customize --in-place`: `enter` is like chroot, and its shell
            // may end with any code.
            let has_failed = stopped.is_some() || has_failed(status, at_terminal, mark.is_some());
            let fate = if marked_to_discard {
                Fate::Discard
            } else if is_discarded || has_failed && entry.answer == Some(Answer::Yes) {
                Fate::Keep
            } else {
                Fate::Publish
            };
            if verdict == Some(Verdict::Complete) && !is_discarded {
                tracing::info!("the changes are in {}, which was changed in place", question.source);
            }
            return Ok((fate, verdict.filter(|_| stopped.is_none()).map_or(status, exited_as)));
        }
        Ok(match decide(status, verdict, entry.answer, at_terminal, stopped.is_some()) {
            Some(Fate::Publish) => (Fate::Publish, exited(0)),
            Some(Fate::Keep) => {
                let why = stopped.map_or_else(|| entry.failure(status), |signal| format!("received {signal}"));
                tracing::warn!("{why}: {}", not_done(end));
                (Fate::Keep, status)
            }
            Some(Fate::Discard) if stopped.is_some() => (Fate::Discard, status),
            Some(Fate::Discard) => (Fate::Discard, verdict.map_or(status, exited_as)),
            None => match question.ask()? {
                Some(fate) => (fate, exited(0)),
                None => {
                    tracing::error!(
                        "the image is not published: there is no terminal on which to ask; --yes publishes it, \
                         --discard drops it"
                    );
                    (Fate::Keep, exited(1))
                }
            },
        })
    })?;
    // Drop the entry first: dying of a signal drops nothing, and the register would show the run as killed.
    drop(registered);
    Ok(end_like(ended))
}

fn not_done(end: End) -> &'static str {
    match end {
        End::Applied => "the changes are not applied",
        End::Published | End::Discarded => "the image is not published",
    }
}

fn exited(code: i32) -> WaitStatus {
    WaitStatus::Exited(Pid::from_raw(1), code)
}

/// Exit status with which `customize` would end for the verdict.
fn exited_as(verdict: Verdict) -> WaitStatus {
    exited(i32::from(verdict == Verdict::Failed))
}

/// Returns whether the command failed. The exit code of a shell at a terminal is that of its last command and does not
/// count. Neither does death by a signal once the image is `marked`, because the shell is then hung up.
fn has_failed(status: WaitStatus, at_terminal: bool, marked: bool) -> bool {
    match status {
        WaitStatus::Exited(_, code) => code != 0 && !at_terminal,
        _ => !(at_terminal && marked),
    }
}

/// Decides the fate of the changes; `None` if the person has to be asked. The caller must pass no mark `complete` for a
/// failed command.
///
/// The first that applies decides: `--discard`, a signal to this program, a mark in the image, failure of the command,
/// `--yes`.
fn decide(
    status: WaitStatus,
    verdict: Option<Verdict>,
    answer: Option<Answer>,
    at_terminal: bool,
    is_stopped: bool,
) -> Option<Fate> {
    match (verdict, answer) {
        (_, Some(Answer::Discard)) => Some(Fate::Discard),
        _ if is_stopped => Some(Fate::Keep),
        (Some(Verdict::Failed), _) => Some(Fate::Discard),
        (None, _) if has_failed(status, at_terminal, false) => Some(Fate::Keep),
        (Some(Verdict::Complete), _) | (None, Some(Answer::Yes)) => Some(Fate::Publish),
        (None, None) => None,
    }
}

/// Writes to the terminal, ignoring errors: it may be gone.
fn tell(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// The question at the end about the changes.
struct Question {
    source: String,
    /// True for a directory that is changed in place.
    in_place: bool,
}

impl Question {
    /// Possible answers, with the default in brackets.
    fn choices(&self) -> &'static str {
        if self.in_place {
            "(y)es, (n)o, the directory stays as it is now [n]"
        } else {
            "(y)es, (k)eep the changes for later, (d)iscard them [k]"
        }
    }

    /// Asks the person at the terminal; `None` if there is no terminal. A signal, end of input or an empty line keeps
    /// the changes.
    fn ask(&self) -> Result<Option<Fate>> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() || !std::io::stderr().is_terminal() {
            return Ok(None);
        }
        let attempted = || "read the answer";
        let signals = Signals::block(&[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]).attempt(attempted)?;
        let drain = || while let Ok(Some(_)) = signals.next() {};
        // Ignore signals that were meant for the session.
        drain();
        loop {
            tell(&format!("Publish the changed image of {}? {}: ", Printable(&self.source), self.choices()));
            let mut sources = [PollFd::new(&stdin, PollFlags::IN), PollFd::new(&signals, PollFlags::IN)];
            match rustix::event::poll(&mut sources, None) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other.attempt(attempted)?,
            };
            // Read without the standard library, which would buffer further lines where poll does not see them.
            let mut line = [0; 64];
            let is_read = sources[1].revents().is_empty();
            let length = if is_read { rustix::io::read(&stdin, &mut line).unwrap_or(0) } else { 0 };
            if length == 0 {
                drain();
                tell("\n");
                return Ok(Some(Fate::Keep));
            }
            match String::from_utf8_lossy(&line[..length]).trim().to_ascii_lowercase().as_str() {
                "y" | "yes" => return Ok(Some(Fate::Publish)),
                "" | "k" | "keep" | "n" | "no" => return Ok(Some(Fate::Keep)),
                "d" | "discard" => return Ok(Some(Fate::Discard)),
                _ => {}
            }
        }
    }
}

/// Time for a shell to write its history after it has been hung up.
const HANG_UP_TIME: Duration = Duration::from_secs(2);

/// Signals that arrive within this time of the first count as one: a terminal that closes can cause two.
const SAME_SIGNAL: Duration = Duration::from_millis(500);

/// Result of a session.
struct Ended {
    status: WaitStatus,
    /// The mark found in the image.
    mark: Option<Verdict>,
    /// Signal that asks this program to end.
    stopped: Option<Signal>,
    /// True if `ims-sshd fail` has ended the session.
    is_given_up: bool,
}

/// The session that runs in the jail.
struct Session {
    /// True if the login shell runs, and no command.
    is_shell: bool,
    /// Time for the command to end after a signal; `None` if the command handles signals itself.
    grace: Option<Duration>,
    /// The answer to the question about the changes, if the command line gives one.
    answer: Option<Answer>,
    /// Use of the changes, if a mark or an answer decides their fate.
    end: Option<End>,
    in_place: bool,
    /// Users whose marks count.
    markers: Markers,
    tiers: Vec<Tier>,
    /// True if the jail gets all privileges of this process, as DKMS needs.
    dkms: bool,
    hostname: Option<String>,
    /// Name of the image.
    label: String,
}

impl Session {
    /// Returns whether a person is at the shell. The shell is then hung up when the image is marked, as over SSH.
    fn is_at_terminal(&self) -> bool {
        self.is_shell && std::io::stdin().is_terminal()
    }

    /// The verdict that `message` gives, if it is a mark that counts.
    fn mark(&self, message: Message) -> Option<Verdict> {
        let (verdict, owner) = message.mark()?;
        image_root::counts(self.markers, verdict, owner).then_some(verdict)
    }

    /// Runs the session to its end.
    fn run(&self, image_root: &Path, entry: &Entry, registered: &register::Entry) -> Result<Ended> {
        clear_left_over(&["customize"], image_root)?;
        let run = RunDirectory::claim("enter", image_root)?;
        refuse_while_used(image_root).inspect_err(|_| drop(remove_directory(run.path())))?;
        // Block these signals and read them later: none may kill this program while the command runs.
        let blocked = [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD];
        let signals = Signals::block(&blocked).attempt(|| "block signals")?;
        nix::sys::prctl::set_child_subreaper(true).attempt(|| "become the parent of orphaned processes")?;

        let state = StateDirectory::of(run.path())?;
        let tree = Tree::open(image_root).attempt(|| format!("open the image root {}", image_root.display()))?;
        let record_directory = Tree::open(run.path()).attempt(|| format!("open {}", run.path().display()))?;
        open::clear_image_root(&tree, &record_directory)?;
        let cleared = |e: Error| {
            let _ = state.remove();
            // The directory stays if it still has the record of a mount point that could not be removed.
            let _ = std::fs::remove_dir(run.path());
            e
        };
        let mut is_ours = !(self.in_place && is_open_elsewhere(image_root).map_err(cleared)?);
        if !is_ours {
            tracing::info!("{} is also open elsewhere: a mark in it counts for that environment", image_root.display());
        } else if let Err(error) = image_root::remove_old_marks(&tree) {
            if tree.directory("tmp").is_ok() {
                return Err(cleared(error));
            }
            // An image whose /tmp is not a directory can be opened all the same.
            tracing::warn!("{error}; /tmp/complete and /tmp/failed do not count");
            is_ours = false;
        }
        let kind = trial::choose(&self.tiers, self.dkms, &state).map_err(cleared)?;
        let script = entry.script.as_ref().map(|script| script.put(run.path(), kind.tier));
        let script = script.transpose().map_err(cleared)?;
        let emulation = emulation::prepare(&tree, None, &record_directory, Some(kind.tier)).map_err(cleared)?;
        let wanted = Wanted {
            plan: Plan {
                dkms: self.dkms,
                emulated: emulation.in_jail,
                label: Some(self.label.clone()),
                hostname: self.hostname.clone(),
                binds: entry.binds.clone(),
                programs: script.into_iter().collect(),
                ..kind.plan(image_root)
            },
            image_root: &tree,
            record_directory: &record_directory,
            in_place: self.in_place,
            job: None,
        };
        let keep = || Ok(entry.variables.iter().map(|(name, _)| name.clone()).collect());
        let jail = OpenJail::open(wanted, &state, keep).map_err(cleared)?;
        registered.set(&[("run", &run.path().to_string_lossy())]);
        registered.reach(Stage::Serving);
        let command = entry.script.as_ref().map_or_else(|| entry.command.clone(), Script::command);
        let mut helper = open::helper(&Arguments::Enter(state.jail(), command))?;
        helper.envs(entry.variables.iter().cloned());
        let terminal = self.is_at_terminal().then(TerminalModes::save).flatten();
        let ended = umask::with_callers(unblock_signals(&mut helper)).spawn().attempt(|| "start ims-jail-shell");
        let ended = ended.and_then(|helper| {
            let pid = Pid::from_raw(helper.id().cast_signed());
            self.attend(helper, &jail, &signals, is_ours).map(|ended| (pid, ended))
        });

        let all_ended = processes::end_all(Some(&jail));
        // The init looked for marks once more before it ended, so read its last messages.
        let last_mark = match all_ended {
            Ok(()) if is_ours => std::iter::from_fn(|| jail.receive()).filter_map(|message| self.mark(message)).max(),
            _ => None,
        };
        if let Some(terminal) = terminal {
            terminal.restore();
        }
        drop(emulation);
        let all_ended = all_ended.and_then(|()| {
            OpenJail::seal(&state, Instant::now() + TIME_TO_CLOSE_FILES, self.in_place.then_some(&tree))
        });
        jail.clear(&tree, &record_directory)?;
        let is_given_up = run.signal_files().stands(Verdict::Failed.signal_file())?;
        state.remove()?;
        remove_directory(run.path())?;
        all_ended?;
        let (helper, mut ended) = ended?;
        let found = if is_ours { take_marks(&tree, self.markers)? } else { None };
        // Signals that arrived after the command's end count too.
        while let Ok(Some((signal, sender))) = signals.next_with_sender() {
            ended.stopped = ended.stopped.or(self.stops(signal, sender == Some(helper)));
        }
        Ok(Ended { mark: ended.mark.max(last_mark).max(found), is_given_up, ..ended })
    }

    /// Returns `signal` if it is to end this program. `is_typed` is true for a signal that was typed at the command's
    /// terminal: with `--yes` such a signal counts however the command handles it, otherwise the command alone handles
    /// it. If a person is at a shell, SIGINT and SIGQUIT never end this program.
    fn stops(&self, signal: Signal, is_typed: bool) -> Option<Signal> {
        let stops = match signal {
            Signal::SIGTERM | Signal::SIGHUP => true,
            Signal::SIGINT | Signal::SIGQUIT => {
                !self.is_at_terminal() && (!is_typed || self.answer == Some(Answer::Yes))
            }
            _ => false,
        };
        stops.then_some(signal)
    }

    /// Waits until the command ends. If `listens` is true, hangs up a person's shell when the image is
    /// marked.
    fn attend(&self, mut helper: Child, jail: &OpenJail, signals: &Signals, mut listens: bool) -> Result<Ended> {
        let attempted = || "wait for ims-jail-shell";
        let pid = Pid::from_raw(helper.id().cast_signed());
        let (mut marked, mut stopped): (Option<Verdict>, Option<Signal>) = (None, None);
        let mut hung_up: Option<Instant> = None;
        let (mut signalled, mut is_killed): (Option<Instant>, bool) = (None, false);
        loop {
            if let Some(status) = helper.try_wait().attempt(attempted)? {
                let status = WaitStatus::from_raw(pid, status.into_raw()).attempt(attempted)?;
                // Take the signals that ims-jail-shell sent when it ended, so that they do not interrupt the cleanup of
                // a shell.
                while let Ok(Some((signal, sender))) = signals.next_with_sender() {
                    stopped = stopped.or(self.stops(signal, sender == Some(pid)));
                }
                return Ok(Ended { status, mark: marked, stopped, is_given_up: false });
            }
            if hung_up.is_some_and(|since| since.elapsed() >= HANG_UP_TIME) {
                let _ = jail.end();
            }
            if let (Some(grace), Some(since), false) = (self.grace, signalled, is_killed)
                && since.elapsed() >= grace
            {
                tracing::warn!("the command was still running when the grace period ended; killing it");
                is_killed = true;
                let _ = jail.end();
            }
            let mut sources = vec![PollFd::new(signals, PollFlags::IN)];
            if listens {
                sources.push(PollFd::from_borrowed_fd(jail.link(), PollFlags::IN));
            }
            let _ = poll::wait(&mut sources, HANG_UP_TIME / 4);
            let has_message = sources.get(1).is_some_and(|link| !link.revents().is_empty());
            while let Ok(Some((signal, sender))) = signals.next_with_sender() {
                // A signal from ims-jail-shell stands for a key, such as Ctrl-C, that was typed while the command was
                // in the foreground.
                let is_typed = sender == Some(pid);
                let stops = self.stops(signal, is_typed);
                stopped = stopped.or(stops);
                if let (Some(signal), Some(grace)) = (stops, self.grace) {
                    match signalled {
                        None => {
                            tracing::info!(
                                "received {signal}: the command has {} s to end (IMS_CLOSE_GRACE); a second signal \
                                 kills it",
                                grace.as_secs()
                            );
                            signalled = Some(Instant::now());
                        }
                        // The same event may send a signal twice: a closed terminal sends SIGHUP, and the person's
                        // shell sends it again.
                        Some(since) if since.elapsed() < SAME_SIGNAL || is_killed => {}
                        Some(_) => {
                            tracing::warn!("received {signal} again: killing the command");
                            is_killed = true;
                            let _ = jail.end();
                        }
                    }
                }
                // Pass on SIGINT and SIGQUIT only if a process sent them: the terminal sends them to the whole
                // foreground group, the command included.
                let is_sent = sender.is_some() && !is_typed;
                if matches!(signal, Signal::SIGTERM | Signal::SIGHUP)
                    || matches!(signal, Signal::SIGINT | Signal::SIGQUIT) && is_sent
                {
                    let _ = kill(pid, signal);
                }
            }
            match has_message.then(|| jail.receive().map(|message| self.mark(message))) {
                Some(Some(Some(verdict))) => {
                    marked = marked.max(Some(verdict));
                    if self.is_at_terminal() && hung_up.is_none() {
                        let word = match (verdict, self.end) {
                            (Verdict::Complete, Some(End::Published)) => "complete and will be packed",
                            (Verdict::Complete, _) => "complete",
                            (Verdict::Failed, _) => "failed",
                        };
                        tell(&format!("\r\nims-sshd: the image was marked {word}; this session ends now\r\n"));
                        let _ = kill(pid, Signal::SIGHUP);
                        hung_up = Some(Instant::now());
                    }
                }
                // The init has ended and sends no more messages.
                Some(None) => listens = false,
                Some(Some(None)) | None => {}
            }
        }
    }
}

/// Returns whether an environment that obeys marks has the image root open too: one of this machine, or one of a pod,
/// which is found by its image root parent.
fn is_open_elsewhere(image_root: &Path) -> Result<bool> {
    let is_one = RunDirectory::is_claimed("customize", image_root)?;
    let above = image_root.ancestors().skip(1).take(2);
    Ok(is_one || above.map(is_claimed).collect::<Result<Vec<_>>>()?.contains(&true))
}

/// Removes the marks from the image's /tmp, since they would be packed. Returns the mark that counts, if any.
fn take_marks(image_root: &Tree, markers: Markers) -> Result<Option<Verdict>> {
    let mut found = None;
    for verdict in Verdict::ALL {
        if image_root::remove_mark(image_root, verdict)?.is_some_and(|owner| markers.include(owner)) {
            found = found.max(Some(verdict));
        }
    }
    Ok(found)
}

/// Modes of the terminal before the session, to be restored: a killed shell leaves behind the modes of its line editor.
struct TerminalModes(Termios);

impl TerminalModes {
    fn save() -> Option<Self> {
        tcgetattr(std::io::stdin()).ok().map(Self)
    }

    /// Restores the modes if this program is in the foreground; otherwise another program owns the terminal.
    fn restore(&self) {
        if tcgetpgrp(std::io::stdin()) == Ok(getpgrp()) {
            let _ = tcsetattr(std::io::stdin(), SetArg::TCSADRAIN, &self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discard_outranks_a_signal_a_signal_a_mark_and_a_mark_yes() {
        let killed = WaitStatus::Signaled(Pid::from_raw(1), Signal::SIGHUP, false);
        let (yes, discard) = (Some(Answer::Yes), Some(Answer::Discard));
        for (status, verdict, answer, at_terminal, fate) in [
            (exited(0), None, yes, false, Some(Fate::Publish)),
            (exited(0), None, None, false, None),
            (exited(3), None, yes, false, Some(Fate::Keep)),
            (exited(3), None, None, false, Some(Fate::Keep)),
            (exited(3), None, yes, true, Some(Fate::Publish)),
            (exited(3), None, None, true, None),
            (killed, None, yes, true, Some(Fate::Keep)),
            (exited(0), None, discard, false, Some(Fate::Discard)),
            (exited(3), None, discard, false, Some(Fate::Discard)),
            (killed, Some(Verdict::Complete), discard, true, Some(Fate::Discard)),
            (exited(0), Some(Verdict::Failed), yes, false, Some(Fate::Discard)),
        ] {
            assert_eq!(decide(status, verdict, answer, at_terminal, false), fate, "{status:?} {verdict:?} {answer:?}");
            let if_stopped = if answer == discard { Fate::Discard } else { Fate::Keep };
            assert_eq!(decide(status, verdict, answer, at_terminal, true), Some(if_stopped), "{verdict:?} {answer:?}");
        }
        for (status, at_terminal, marked, failed) in [
            (exited(3), false, true, true),
            (exited(3), true, true, false),
            (killed, true, true, false),
            (killed, true, false, true),
            (killed, false, true, true),
            (exited(0), false, false, false),
        ] {
            assert_eq!(has_failed(status, at_terminal, marked), failed, "{status:?}");
        }
    }
}
