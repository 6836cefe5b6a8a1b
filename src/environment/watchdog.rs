//! What is looked after while the environment serves: that somebody comes, that it does not stay open for ever, and that the image root
//! can still be written to.

use std::time::{Duration, Instant};

use crate::environment::hang_up::tell_terminals;
use crate::environment::machine::Event;
use crate::environment::settings::Settings;
use crate::sys::process::Entry;
use crate::sys::tree::{Condition, Tree};
use crate::volume::signal_files::SignalFiles;

/// An environment without a session on a full volume is given up after this time: nobody can mark it from inside.
const FULL_TIME: Duration = Duration::from_secs(10);

/// How long before the session limit people at a terminal are warned, at the most.
const WARNING_TIME: Duration = Duration::from_mins(5);

/// What was seen so far.
#[derive(Debug)]
pub(crate) struct Watchdog {
    opened: Instant,
    last_session: Instant,
    warned: bool,
    full_since: Option<Instant>,
}

impl Watchdog {
    /// From now on.
    pub(crate) fn start() -> Self {
        let now = Instant::now();
        Self { opened: now, last_session: now, warned: false, full_since: None }
    }

    /// Looks, and says why the environment should close, if it should. `busy` is whether a session or the script is running, `last` when
    /// one ended that may have been too short to be seen running; `shells` are the interactive ones.
    pub(crate) fn look(
        &mut self,
        busy: bool,
        last: Option<Instant>,
        settings: &Settings,
        shells: &[Entry],
        files: &SignalFiles,
        image_root: &Tree,
    ) -> Option<Event> {
        let now = Instant::now();
        self.last_session = if busy { now } else { self.last_session.max(last.unwrap_or(self.last_session)) };
        self.limits(now, shells, settings).or_else(|| self.image_root(now, busy, settings, files, image_root))
    }

    fn limits(&mut self, now: Instant, shells: &[Entry], settings: &Settings) -> Option<Event> {
        if let Some(limit) = settings.idle_limit
            && now.duration_since(self.last_session) >= limit
        {
            tracing::warn!("no session for {} s (IMS_IDLE_LIMIT): closing as failed", limit.as_secs());
            return Some(Event::Forgotten);
        }
        let limit = settings.session_limit?;
        let left = limit.saturating_sub(now.duration_since(self.opened));
        if left.is_zero() {
            tracing::warn!("open for {} s (IMS_SESSION_LIMIT): closing as failed", limit.as_secs());
            return Some(Event::Forgotten);
        }
        if left <= WARNING_TIME.min(limit / 2) && !self.warned {
            self.warned = true;
            tell_terminals(
                shells,
                &format!("this environment closes as failed in {} s; before that, mark it complete", left.as_secs()),
            );
        }
        None
    }

    fn image_root(
        &mut self,
        now: Instant,
        busy: bool,
        settings: &Settings,
        files: &SignalFiles,
        image_root: &Tree,
    ) -> Option<Event> {
        let name = settings.job.image_root();
        let shown = files.path().join(name);
        let shown = shown.display();
        if !files.holds(name, image_root) {
            tracing::error!(
                "the image root {shown} has vanished, or another folder stands in its place: closing as failed"
            );
            return Some(Event::Broken);
        }
        match image_root.condition() {
            Ok(Condition::ReadOnly) => {
                tracing::error!("the image root {shown} has become read-only: closing as failed");
                return Some(Event::Broken);
            }
            Ok(Condition::Full) if !busy => match self.full_since {
                None => {
                    tracing::warn!(
                        "the volume of {shown} is full and no session is open: make space, or it is given up"
                    );
                    self.full_since = Some(now);
                }
                Some(since) if now.duration_since(since) >= FULL_TIME => {
                    tracing::error!("the volume of {shown} is still full: closing as failed");
                    return Some(Event::Broken);
                }
                Some(_) => {}
            },
            _ => self.full_since = None,
        }
        None
    }
}
