//! Progress of a long step: a bar on a terminal, a line every ten seconds in a log.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::printable::Printable;

/// Interval between log lines.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Interval between updates of the bar.
const BAR_EVERY: Duration = Duration::from_millis(200);

/// Minimum time over which a rate is averaged: long enough to be stable, short enough to show a stall.
const RATE_OVER: Duration = Duration::from_secs(2);

const BAR_WIDTH: usize = 30;

/// Progress of writing a packed image, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Written {
    /// Bytes of the image that were taken over from its source.
    pub(crate) taken: u64,
    /// Bytes of the image that were compressed.
    pub(crate) compressed: u64,
    /// Bytes of files that were read to be compressed.
    pub(crate) read: u64,
    /// Total of [`Self::taken`] at the end.
    pub(crate) to_take: u64,
    /// Total of [`Self::read`] at the end.
    pub(crate) to_read: u64,
}

impl Written {
    /// Length of the encoded value, in bytes.
    pub(crate) const LENGTH: usize = 40;

    pub(crate) fn encode(&self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        let fields = [self.taken, self.compressed, self.read, self.to_take, self.to_read];
        for (place, field) in bytes.chunks_exact_mut(8).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; Self::LENGTH]) -> Self {
        let (fields, _) = bytes.as_chunks();
        let field = |index: usize| u64::from_le_bytes(fields[index]);
        let [taken, compressed, read, to_take, to_read] = [0, 1, 2, 3, 4].map(field);
        Self { taken, compressed, read, to_take, to_read }
    }

    /// Work done, and total work, in bytes to compress. Taking over a byte costs little in comparison, but not nothing.
    fn work(&self) -> (u64, u64) {
        let all = |taken: u64, read: u64| (taken / TAKEN_IS_FASTER).saturating_add(read);
        (all(self.taken, self.read), all(self.to_take, self.to_read))
    }

    /// The line that people see, with a rate in bytes of work per second.
    fn line(&self, rate: Option<f64>) -> String {
        let image = megabytes(self.taken.saturating_add(self.compressed));
        let (taken, compressed) = (megabytes(self.taken), megabytes(self.compressed));
        let read = format!("{:.0} of {:.0} MB read", megabytes(self.read), megabytes(self.to_read));
        let parts = format!("{taken:.0} taken over from the source and {compressed:.0} compressed");
        let line = format!("{image:.0} MB of the image, {parts}; {read}");
        let (done, all) = self.work();
        match rate {
            Some(rate) if rate > 0.0 => {
                let left = megabytes(all.saturating_sub(done)) / rate;
                format!("{line}, {rate:.0} MB/s, {left:.0} s left")
            }
            Some(rate) => format!("{line}, {rate:.0} MB/s"),
            None => line,
        }
    }
}

/// Approximate factor by which taking over a byte is faster than compressing one.
const TAKEN_IS_FASTER: u64 = 32;

/// Progress of one step.
pub(crate) struct Progress {
    what: String,
    /// Total in bytes; `None` if unknown.
    total: Option<u64>,
    done: u64,
    /// Bytes written, for a step whose output comes long after its input.
    written: Option<u64>,
    /// Progress of the image, for a step that packs one.
    image: Option<Written>,
    /// Time from which the current rate is computed, and the bytes done at that time.
    mark: (Instant, u64),
    /// Rate in MB/s; `None` at first.
    rate: Option<f64>,
    told: Instant,
    terminal: bool,
}

impl Progress {
    /// Starts a step, called `what`, of `total` bytes if known.
    pub(crate) fn begin(what: impl Into<String>, total: Option<u64>) -> Self {
        let now = Instant::now();
        let terminal = std::io::stderr().is_terminal();
        let what = Printable(what.into()).to_string();
        Self { what, total, done: 0, written: None, image: None, mark: (now, 0), rate: None, told: now, terminal }
    }

    /// Sets the total in bytes once it is known.
    pub(crate) fn expect(&mut self, total: u64) {
        self.total = Some(total);
    }

    /// Sets the number of bytes done.
    pub(crate) fn at(&mut self, done: u64) {
        self.done = done;
        let every = if self.terminal { BAR_EVERY } else { LINE_EVERY };
        if self.told.elapsed() >= every {
            self.told = Instant::now();
            self.tell();
        }
    }

    /// Sets the bytes read and written so far.
    pub(crate) fn between(&mut self, read: u64, written: u64) {
        self.written = Some(written);
        self.at(read.max(self.done));
    }

    /// Sets the progress of the image.
    pub(crate) fn of_image(&mut self, written: Written) {
        self.image = Some(written);
        let (done, all) = written.work();
        self.total = (all > 0).then_some(all);
        self.at(done);
    }

    /// Adds to the number of bytes done.
    pub(crate) fn add(&mut self, bytes: u64) {
        self.at(self.done + bytes);
    }

    fn tell(&mut self) {
        let (since, before) = self.mark;
        if since.elapsed() >= RATE_OVER {
            let bytes = self.done.saturating_sub(before);
            self.rate = Some(megabytes(bytes) / since.elapsed().as_secs_f64());
            self.mark = (Instant::now(), self.done);
        }
        let amount = match &self.image {
            Some(image) => image.line(self.rate),
            None => amount(self.done, self.total, self.written, self.rate),
        };
        if self.terminal {
            let bar = self.total.map(|total| bar(self.done, total)).unwrap_or_default();
            let _ = write!(std::io::stderr(), "\r\x1b[K{} {bar}{amount}", self.what);
        } else {
            tracing::info!("{}: {amount}", self.what);
        }
    }
}

/// Describes the bytes done. For a compressor (`written` is given) shows no rate: it finishes reading long before
/// writing.
fn amount(done: u64, total: Option<u64>, written: Option<u64>, rate: Option<f64>) -> String {
    let done = match total {
        Some(total) => format!("{:.0} of {:.0} MB", megabytes(done), megabytes(total)),
        None => format!("{:.0} MB", megabytes(done)),
    };
    match (written, rate) {
        (Some(written), _) => format!("{done} read, {:.0} MB written", megabytes(written)),
        (None, Some(rate)) => format!("{done}, {rate:.0} MB/s"),
        (None, None) => done,
    }
}

impl Drop for Progress {
    /// Removes the bar, to make room for the log.
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

/// Unit in which messages give a size of `bytes`, in bytes, and its name.
fn unit_for(bytes: u64) -> (u64, &'static str) {
    if bytes < 1 << 20 { (1 << 10, "KiB") } else { (1 << 20, "MiB") }
}

/// Size in KiB or MiB, for messages.
pub(crate) fn size_in_words(bytes: u64) -> String {
    let (unit, name) = unit_for(bytes);
    format!("{} {name}", bytes.div_ceil(unit))
}

/// Sizes of an image of `length` bytes, of its `part` and of the rest, all in the unit of the image. Part and rest add
/// up to the image's size, and only a part without bytes is shown as 0.
pub(crate) fn parts_in_words(length: u64, part: u64) -> [String; 3] {
    let (unit, name) = unit_for(length);
    let all = length.div_ceil(unit);
    let most = all.saturating_sub(u64::from(part < length));
    let part = ((part + unit / 2) / unit).min(most).max(u64::from(part > 0)).min(all);
    [all, part, all - part].map(|size| format!("{size} {name}"))
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
    fn parts_of_an_image_have_its_unit_and_add_up() {
        for (length, part, wanted) in [
            (1016 << 10, 700 << 10, ["1016 KiB", "700 KiB", "316 KiB"]),
            (1_040_000, 1_000_000, ["1016 KiB", "977 KiB", "39 KiB"]),
            (4096, 0, ["4 KiB", "0 KiB", "4 KiB"]),
            (10 << 20, 100, ["10 MiB", "1 MiB", "9 MiB"]),
            (10 << 20, (10 << 20) - 100, ["10 MiB", "9 MiB", "1 MiB"]),
            (4096, 4096, ["4 KiB", "4 KiB", "0 KiB"]),
        ] {
            assert_eq!(parts_in_words(length, part), wanted);
        }
    }

    #[test]
    fn progress_line_has_the_current_rate_or_the_bytes_read_and_written() {
        assert_eq!(amount(5_000_000, None, None, None), "5 MB");
        assert_eq!(amount(5_000_000, Some(9_000_000), None, Some(2.4)), "5 of 9 MB, 2 MB/s");
        assert_eq!(amount(9_000_000, Some(9_000_000), Some(3_000_000), Some(0.0)), "9 of 9 MB read, 3 MB written");
        let mut progress = Progress::begin("packing", None);
        progress.mark.0 -= RATE_OVER;
        progress.between(4_000_000, 1_000_000);
        progress.tell();
        assert!(progress.rate.is_some_and(|rate| (1.0..=2.0).contains(&rate)), "{:?}", progress.rate);
        progress.mark.0 -= RATE_OVER;
        // The program has ended, so the number of bytes that it has read is no longer known.
        progress.between(0, 2_000_000);
        progress.tell();
        assert_eq!((progress.done, progress.rate), (4_000_000, Some(0.0)));
    }

    #[test]
    fn progress_bar_is_full_at_the_end_and_never_longer() {
        assert_eq!(bar(0, 10), format!("[{}] ", "-".repeat(30)));
        assert_eq!(bar(5, 10), format!("[{}{}] ", "#".repeat(15), "-".repeat(15)));
        assert_eq!(bar(11, 10), bar(10, 10));
        assert_eq!(bar(0, 0), bar(0, 10));
    }
}
