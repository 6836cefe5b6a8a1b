//! The watchdog of a serving environment: closes it when a time limit is over or the image root cannot be written to
//! any more.

use std::time::{Duration, Instant};

use crate::environment::hang_up::tell_terminals;
use crate::environment::settings::Settings;
use crate::environment::state_machine::Event;
use crate::sys::process::Entry;
use crate::sys::tree::{Condition, Tree};
use crate::volume::signal_files::SignalFiles;

/// Time after which an environment on a full volume closes if it has no session: nobody can create a mark from inside
/// without space.
const FULL_TIME: Duration = Duration::from_secs(10);

/// Interactive shells are warned this long before the session limit, or later if the limit is short.
const WARNING_TIME: Duration = Duration::from_mins(5);

/// State of the watchdog.
#[derive(Debug)]
pub(crate) struct Watchdog {
    opened: Instant,
    last_session: Instant,
    warned: bool,
    full_since: Option<Instant>,
}

impl Watchdog {
    /// Starts the time limits now.
    pub(crate) fn start() -> Self {
        let now = Instant::now();
        Self { opened: now, last_session: now, warned: false, full_since: None }
    }

    /// Returns an event if the environment has to close. `busy` is true if a session or the script is running; `last`
    /// is the end of the last session, which may have been too short to be found running; `shells` are the interactive
    /// shells.
    pub(crate) fn check(
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
                &format!("this environment closes as failed in {} s, unless it is marked complete", left.as_secs()),
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
        let on_disk = settings.on_disk.as_ref().unwrap_or(&shown).display();
        let shown = shown.display();
        if !files.holds(name, image_root) {
            tracing::error!("the image root {shown} was removed or replaced by another directory: closing as failed");
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
                        "the volume of {on_disk} is full and no session is open: closing as failed unless space is \
                         freed in {} s",
                        FULL_TIME.as_secs()
                    );
                    self.full_since = Some(now);
                }
                Some(since) if now.duration_since(since) >= FULL_TIME => {
                    tracing::error!("the volume of {on_disk} is still full: closing as failed");
                    return Some(Event::Broken);
                }
                Some(_) => {}
            },
            _ => self.full_since = None,
        }
        None
    }
}
