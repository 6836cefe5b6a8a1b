//! Results: printed at once, judged, and collected for the page.

mod machine;
mod page;
mod plots;
pub mod statistics;

use std::path::Path;
use std::process::ExitCode;

pub use plots::{BarChart, LineChart};

use machine::Machine;
use plots::Plot;
use statistics::Summary;

#[derive(Clone, Copy)]
pub enum Unit {
    Microseconds,
    Milliseconds,
    Seconds,
    Times,
    Kibibytes,
    Mebibytes,
    MebibytesPerSecond,
    FilesPerSecond,
    SessionsPerSecond,
    Failures,
}

impl Unit {
    fn label(self) -> &'static str {
        match self {
            Self::Microseconds => "µs",
            Self::Milliseconds => "ms",
            Self::Seconds => "s",
            Self::Times => "×",
            Self::Kibibytes => "KiB",
            Self::Mebibytes => "MiB",
            Self::MebibytesPerSecond => "MiB/s",
            Self::FilesPerSecond => "files/s",
            Self::SessionsPerSecond => "sessions/s",
            Self::Failures => "failures",
        }
    }
}

#[derive(Clone, Copy)]
pub enum Bound {
    /// Upper limit of the median.
    Limit(f64),
    Information,
}

/// One result.
struct Row {
    name: String,
    unit: Unit,
    summary: Summary,
    judgement: String,
}

/// A group of results, as on the page.
struct Section {
    heading: &'static str,
    rows: Vec<Row>,
    notes: Vec<String>,
    plots: Vec<Plot>,
}

/// All results, and whether one exceeds its limit by more than half.
pub struct Report {
    machine: Machine,
    runs: usize,
    sections: Vec<Section>,
    missed_by_far: bool,
}

impl Report {
    pub fn begin(runs: usize) -> Self {
        println!("{:<66}{:>9}  {:<10} {:<20} limit", "", "median", "", "middle half");
        Self { machine: Machine::now(), runs, sections: Vec::new(), missed_by_far: false }
    }

    /// Starts a group: all results added from here on belong to it.
    pub fn section(&mut self, heading: &'static str) {
        println!("\n{heading}");
        self.sections.push(Section { heading, rows: Vec::new(), notes: Vec::new(), plots: Vec::new() });
    }

    fn current(&mut self) -> &mut Section {
        self.sections.last_mut().expect("a section")
    }

    #[allow(clippy::needless_pass_by_value)]
    pub fn add(&mut self, name: &str, unit: Unit, samples: Vec<f64>, bound: Bound) {
        let summary = Summary::of(&samples);
        let median = summary.median();
        let judgement = match bound {
            Bound::Information => String::new(),
            Bound::Limit(limit) => {
                self.missed_by_far |= median > limit * 1.5;
                let reached = if median <= limit { "reached" } else { "MISSED" };
                format!("≤ {} {}: {reached}", number(limit), unit.label())
            }
        };
        let spread = page::spread(&summary);
        println!("  {name:<64}{:>9}  {:<10} {spread:<20} {judgement}", number(median), unit.label());
        self.current().rows.push(Row { name: name.to_owned(), unit, summary, judgement });
    }

    /// Adds a sentence below the table.
    pub fn note(&mut self, sentence: &str) {
        println!("  {sentence}");
        self.current().notes.push(sentence.to_owned());
    }

    pub fn bars(&mut self, bars: BarChart) {
        self.current().plots.push(Plot::Bars(bars));
    }

    pub fn lines(&mut self, lines: LineChart) {
        self.current().plots.push(Plot::Lines(lines));
    }

    /// Writes the page, and its plots into the directory `benchmarks` beside it.
    pub fn write(&self, file: &Path) {
        let directory = file.parent().unwrap().join("benchmarks");
        std::fs::create_dir_all(&directory).unwrap();
        for plot in self.sections.iter().flat_map(|section| &section.plots) {
            plot.draw(&directory);
        }
        std::fs::write(file, page::page(&self.machine, self.runs, &self.sections)).unwrap();
        println!("\nwritten: {}", file.display());
    }

    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(u8::from(self.missed_by_far))
    }
}

/// Formats with three significant digits.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        1.0.. => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}
