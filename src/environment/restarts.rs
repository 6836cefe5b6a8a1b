//! Limits how often a part that died is restarted, and determines the wait before each restart.

use std::time::{Duration, Instant};

/// Part of the environment that can die and be restarted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// sshd's listener.
    Sshd,
    /// The jail's init; every process in the jail dies with it.
    Jail,
}

impl Part {
    /// Name in messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Sshd => "sshd",
            Self::Jail => "the jail's init",
        }
    }
}

/// Restarts of the last minute.
#[derive(Debug, Default)]
pub(crate) struct Restarts {
    past: Vec<(Part, Instant)>,
}

/// Maximum number of restarts of a part in a [`MINUTE`]; a part that dies more often has a fault that a restart does
/// not mend.
const MOST: usize = 5;
const MINUTE: Duration = Duration::from_mins(1);

impl Restarts {
    /// Returns the wait before `part`, which died at `now`, is restarted: none at first, then 0.5 s, doubled each time.
    /// `None` if it has been restarted too often.
    pub(crate) fn next(&mut self, part: Part, now: Instant) -> Option<Duration> {
        self.past.retain(|(_, at)| now.saturating_duration_since(*at) < MINUTE);
        let before = self.past.iter().filter(|(p, _)| *p == part).count();
        if before >= MOST {
            return None;
        }
        self.past.push((part, now));
        Some(if before == 0 { Duration::ZERO } else { Duration::from_millis(500 << (before - 1)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_restarted_five_times_a_minute_with_backoff() {
        let mut restarts = Restarts::default();
        let start = Instant::now();
        let waits: Vec<_> = (0..6).map(|s| restarts.next(Part::Sshd, start + Duration::from_secs(s))).collect();
        let seconds: Vec<_> = waits.iter().map(|w| w.map(|d| d.as_millis())).collect();
        assert_eq!(seconds, [Some(0), Some(500), Some(1000), Some(2000), Some(4000), None]);
        assert!(restarts.next(Part::Jail, start).is_some(), "each part has its own count");
        assert!(
            restarts.next(Part::Sshd, start + Duration::from_secs(61)).is_some(),
            "a minute later the first is forgotten"
        );
    }
}
