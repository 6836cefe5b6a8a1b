//! How far a long step is: a bar on a terminal, a line every ten seconds in a pod's log.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::printable::Printable;

/// Between two lines of a log.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Between two looks of a bar.
const BAR_EVERY: Duration = Duration::from_millis(200);

const BAR_WIDTH: usize = 30;

/// One step.
pub struct Progress {
    what: String,
    /// In bytes; `None` where nobody knows.
    total: Option<u64>,
    done: u64,
    began: Instant,
    told: Instant,
    terminal: bool,
}

impl Progress {
    /// Begins a step that `what` names.
    pub fn begin(what: impl Into<String>, total: Option<u64>) -> Self {
        let now = Instant::now();
        let terminal = std::io::stderr().is_terminal();
        let what = Printable(what.into()).to_string();
        Self { what, total, done: 0, began: now, told: now, terminal }
    }

    /// It turns out how much there is to do.
    pub fn expect(&mut self, total: u64) {
        self.total = Some(total);
    }

    /// So many bytes are done by now.
    pub fn at(&mut self, done: u64) {
        self.done = done;
        let every = if self.terminal { BAR_EVERY } else { LINE_EVERY };
        if self.told.elapsed() >= every {
            self.told = Instant::now();
            self.tell();
        }
    }

    /// So many bytes more are done.
    pub fn add(&mut self, bytes: u64) {
        self.at(self.done + bytes);
    }

    fn tell(&self) {
        let per_second = megabytes(self.done) / self.began.elapsed().as_secs_f64().max(0.001);
        let amount = match self.total {
            Some(total) => format!("{:.0} of {:.0} MB", megabytes(self.done), megabytes(total)),
            None => format!("{:.0} MB", megabytes(self.done)),
        };
        if self.terminal {
            let bar = self.total.map(|total| bar(self.done, total)).unwrap_or_default();
            let _ = write!(std::io::stderr(), "\r\x1b[K{} {bar}{amount}, {per_second:.0} MB/s", self.what);
        } else {
            tracing::info!("{}: {amount}, {per_second:.0} MB/s", self.what);
        }
    }
}

impl Drop for Progress {
    /// The bar makes room for the log.
    fn drop(&mut self) {
        if self.terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

#[allow(clippy::cast_precision_loss)]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

fn bar(done: u64, total: u64) -> String {
    let share = done.min(total).saturating_mul(BAR_WIDTH as u64).checked_div(total).unwrap_or(0);
    let full = usize::try_from(share).unwrap_or(BAR_WIDTH);
    format!("[{}{}] ", "#".repeat(full), "-".repeat(BAR_WIDTH - full))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_full_at_the_end_and_never_longer() {
        assert_eq!(bar(0, 10), format!("[{}] ", "-".repeat(30)));
        assert_eq!(bar(5, 10), format!("[{}{}] ", "#".repeat(15), "-".repeat(15)));
        assert_eq!(bar(11, 10), bar(10, 10));
        assert_eq!(bar(0, 0), bar(0, 10));
    }
}
