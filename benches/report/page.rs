//! The page in Markdown.

use std::fmt::Write;

use super::machine::Machine;
use super::statistics::Summary;
use super::{Section, number};

const INTRODUCTION: &str = "\
# Benchmarks

`make bench` installs the peers, runs all benchmarks and writes this page. `cargo bench --bench benchmarks -- entering
making` runs only the named groups and writes nothing.

Alternatives take turns within one run, in a different order each time, and ratios and differences are computed within
each turn. The third column has the quartiles: the middle half of the samples lies between them. Each limit applies to
the median.
";

/// Markdown of all results.
pub fn page(machine: &Machine, runs: usize, sections: &[Section]) -> String {
    let mut page = String::from(INTRODUCTION);
    let _ = write!(page, "\n## The machine\n\n{}", machine.table());
    let _ = writeln!(page, "| `IMS_SSHD_BENCH_RUNS` | {runs} |");
    for section in sections {
        let _ = write!(page, "\n## {}\n\n{}", section.heading, table(section));
        for plot in &section.plots {
            let _ = write!(page, "\n![{}](benchmarks/{}.svg)\n", plot.title(), plot.file());
        }
        for note in &section.notes {
            let _ = write!(page, "\n{note}\n");
        }
    }
    page
}

fn table(section: &Section) -> String {
    let mut table = String::from("| | median | middle half | all | samples | limit |\n|---|--:|---|---|--:|---|\n");
    for row in &section.rows {
        let Summary { count, least, most, .. } = row.summary;
        let all = if count > 1 { format!("{} … {}", number(least), number(most)) } else { String::new() };
        let median = format!("{} {}", number(row.summary.median()), row.unit.label());
        let _ = writeln!(
            table,
            "| {} | {median} | {} | {all} | {count} | {} |",
            row.name,
            spread(&row.summary),
            row.judgement
        );
    }
    table
}

/// Quartiles of more than one sample.
pub fn spread(summary: &Summary) -> String {
    match (summary.count, summary.quartiles) {
        (1, _) => String::new(),
        (_, [lower, _, upper]) => format!("{} … {}", number(lower), number(upper)),
    }
}
