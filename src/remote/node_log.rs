//! Logs the standard error of a command on a node: this program's log there, and messages of ssh. Each line becomes the
//! text of an event in the log on this side, since a node may write anything.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::printable::Printable;
use crate::sys::poll;

/// Maximum length of a logged line, in bytes.
const LONGEST: u64 = 1000;

/// Bytes that one command may log at once: more than a long build does.
const AT_ONCE: i64 = 8 << 20;

/// Bytes per second by which the allowance grows again: a flood that does not end adds some 180 MB a day.
const PER_SECOND: i64 = 2 << 10;

/// Allowance with which logging goes on after a gap.
const ENOUGH: i64 = 64 << 10;

/// Maximum number of lines that are kept during a gap. The last lines tell why a command has failed.
const MOST_KEPT: usize = 100;

/// Number of bytes that a log event counts for in addition to its text.
const AROUND: i64 = 150;

/// Logs what `host` writes to `stderr`, until its end. Reads on after the last line that is logged, so that the command
/// does not block.
pub(super) fn log_all(host: &str, stderr: impl Read + AsFd) {
    let mut input = BufReader::new(stderr);
    let mut allowance = Allowance::new(Instant::now());
    let mut log = |output| match output {
        Output::Line(line) => log(host, &line),
        Output::LeftOut(0) => tracing::warn!("{host} writes too much to the log; from here on, lines are left out"),
        Output::LeftOut(count) => tracing::warn!("{count} lines of {host} were left out of the log here"),
    };
    loop {
        // Lines that were kept are logged although none follows, such as before a command that hangs.
        if let (Some(wait), true) = (allowance.wait(), input.buffer().is_empty()) {
            let mut source = [PollFd::new(input.get_ref(), PollFlags::IN)];
            if poll::wait(&mut source, wait).is_ok_and(|ready| ready == 0) {
                allowance.go_on(Instant::now(), &mut log);
                continue;
            }
        }
        let Some(line) = next_line(&mut input) else { break };
        let line = line.trim();
        if !line.is_empty() {
            allowance.take(line.to_owned(), Instant::now(), &mut log);
        }
    }
    allowance.end(&mut log);
}

/// Something to be logged.
#[derive(Debug, PartialEq, Eq)]
enum Output {
    Line(String),
    /// The number of lines that were left out here; 0 where that begins.
    LeftOut(u64),
}

/// Decides which lines are logged. After too many there is a gap, in which the last lines are kept.
struct Allowance {
    /// Number of bytes that may be logged now; negative after the end of a gap, which may use more.
    bytes: i64,
    since: Instant,
    /// Lines of the gap, if there is one.
    kept: Option<VecDeque<String>>,
    left_out: u64,
}

impl Allowance {
    fn new(now: Instant) -> Self {
        Self { bytes: AT_ONCE, since: now, kept: None, left_out: 0 }
    }

    fn take(&mut self, line: String, now: Instant, log: &mut impl FnMut(Output)) {
        self.go_on(now, log);
        if let Some(kept) = &mut self.kept {
            kept.push_back(line);
            if kept.len() > MOST_KEPT {
                kept.pop_front();
                self.left_out += 1;
            }
        } else if self.bytes <= 0 {
            self.spend(Output::LeftOut(0), log);
            self.kept = Some([line].into());
        } else {
            self.spend(Output::Line(line), log);
        }
    }

    /// How long a gap lasts at least.
    fn wait(&self) -> Option<Duration> {
        let missing = u64::try_from((ENOUGH - self.bytes) / PER_SECOND).unwrap_or(0);
        self.kept.as_ref().map(|_| Duration::from_secs(missing + 1))
    }

    /// Ends a gap, if enough may be logged again.
    fn go_on(&mut self, now: Instant, log: &mut impl FnMut(Output)) {
        let seconds = now.saturating_duration_since(self.since).as_secs();
        self.since += Duration::from_secs(seconds);
        let more = i64::try_from(seconds).unwrap_or(i64::MAX).saturating_mul(PER_SECOND);
        self.bytes = self.bytes.saturating_add(more).min(AT_ONCE);
        if self.bytes >= ENOUGH {
            self.end(log);
        }
    }

    /// Ends a gap.
    fn end(&mut self, log: &mut impl FnMut(Output)) {
        let Some(kept) = self.kept.take() else { return };
        let left_out = std::mem::take(&mut self.left_out);
        if left_out > 0 {
            self.spend(Output::LeftOut(left_out), log);
        }
        for line in kept {
            self.spend(Output::Line(line), log);
        }
    }

    fn spend(&mut self, output: Output, log: &mut impl FnMut(Output)) {
        let length = if let Output::Line(line) = &output { Printable(line).to_string().len() } else { 0 };
        self.bytes -= AROUND + i64::try_from(length).unwrap_or(i64::MAX - AROUND);
        log(output);
    }
}

/// Returns the next line, truncated to [`LONGEST`] bytes.
fn next_line(input: &mut impl BufRead) -> Option<String> {
    let mut line = Vec::new();
    input.by_ref().take(LONGEST).read_until(b'\n', &mut line).ok().filter(|length| *length > 0)?;
    let is_cut = line.last() != Some(&b'\n') && input.skip_until(b'\n').is_ok_and(|rest| rest > 1);
    let line = String::from_utf8_lossy(&line);
    Some(if is_cut { format!("{line}…") } else { line.into_owned() })
}

/// Logs a line. A line of this program's log on the node keeps its level.
fn log(host: &str, line: &str) {
    let (level, said) = level_of(line);
    let said = Printable(said);
    match level {
        "ERROR" => tracing::error!("{host} says: {said}"),
        "WARN" => tracing::warn!("{host} says: {said}"),
        "DEBUG" => tracing::debug!("{host} says: {said}"),
        _ => tracing::info!("{host} says: {said}"),
    }
}

/// Splits a line in the format of [the log](crate::log::format) into its level and text, which follow the time.
fn level_of(line: &str) -> (&str, &str) {
    let after_time = line.split_once(' ').filter(|(time, _)| time.starts_with("20") && time.ends_with('Z'));
    let parts = after_time.and_then(|(_, rest)| rest.trim_start().split_once(' '));
    parts.filter(|(level, _)| ["ERROR", "WARN", "INFO", "DEBUG"].contains(level)).unwrap_or(("", line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_and_none_runs_into_the_next() {
        let long = "x".repeat(5000);
        let whole = "y".repeat(999);
        let text = format!("{long}\nshort\n\n{whole}\n{}\n{long}", "z".repeat(1000));
        let mut input = BufReader::new(text.as_bytes());
        let lines: Vec<_> = std::iter::from_fn(|| next_line(&mut input)).collect();
        let cut = format!("{}…", "x".repeat(1000));
        assert_eq!(lines, [cut.clone(), "short\n".into(), "\n".into(), format!("{whole}\n"), "z".repeat(1000), cut]);
    }

    fn logged(allowance: &mut Allowance, lines: impl Iterator<Item = String>, now: Instant) -> Vec<Output> {
        let mut outputs = Vec::new();
        lines.for_each(|line| allowance.take(line, now, &mut |output| outputs.push(output)));
        outputs
    }

    #[test]
    fn flood_has_a_gap_in_the_log_and_its_last_lines_are_not_lost() {
        let began = Instant::now();
        let mut allowance = Allowance::new(began);
        let lines = |from: u64, to| (from..to).map(|number| format!("{number:0850}"));
        // A thousand bytes each, with what is around them.
        let outputs = logged(&mut allowance, lines(0, 10_000), began);
        let whole = AT_ONCE.unsigned_abs() / 1000 + 1;
        assert!(outputs[..outputs.len() - 1].iter().zip(lines(0, whole)).all(|(o, line)| *o == Output::Line(line)));
        assert_eq!((outputs.len() as u64, outputs.last()), (whole + 1, Some(&Output::LeftOut(0))));
        let after = |seconds| began + Duration::from_secs(seconds);
        assert_eq!(logged(&mut allowance, lines(10_000, 10_001), after(30)), []);
        let wait = allowance.wait().unwrap();
        assert!((1..5).contains(&wait.as_secs()), "{wait:?}");
        // Then they are logged although nothing follows.
        let mut outputs = Vec::new();
        allowance.go_on(after(30) + wait, &mut |output| outputs.push(output));
        let kept = MOST_KEPT as u64;
        assert_eq!(outputs.remove(0), Output::LeftOut(10_001 - kept - whole));
        assert_eq!(outputs, lines(10_001 - kept, 10_001).map(Output::Line).collect::<Vec<_>>());
        assert!(allowance.wait().is_none());
        // The last lines used more than was allowed: the next gap begins at once.
        assert_eq!(logged(&mut allowance, lines(0, 500), after(40)), [Output::LeftOut(0)]);
        assert!(allowance.wait().unwrap() > Duration::from_secs(40));
        let mut outputs = Vec::new();
        allowance.end(&mut |output| outputs.push(output));
        assert_eq!(outputs.remove(0), Output::LeftOut(500 - kept));
        assert_eq!(outputs, lines(500 - kept, 500).map(Output::Line).collect::<Vec<_>>());
    }

    #[test]
    fn build_that_logs_for_hours_loses_no_line() {
        let began = Instant::now();
        let mut allowance = Allowance::new(began);
        let mut count = 0;
        for second in 0..4 * 3600 {
            let lines = (0..8).map(|number| format!("[ INFO    ]: {second} installing package {number}"));
            let outputs = logged(&mut allowance, lines, began + Duration::from_secs(second));
            count += outputs.iter().filter(|output| matches!(output, Output::Line(_))).count();
        }
        assert_eq!(count, 4 * 3600 * 8);
    }

    #[test]
    fn line_of_the_log_keeps_its_level_and_another_has_none() {
        let line = "2026-11-26T16:08:05.000001Z  WARN the disk is full";
        assert_eq!(level_of(line), ("WARN", "the disk is full"));
        for line in ["WARN x", "2026-11-26T16:08:05Z", "2026-11-26T16:08:05Z  ALERT x", "{\"level\":\"ERROR\"}", ""] {
            assert_eq!(level_of(line), ("", line), "{line}");
        }
    }
}
